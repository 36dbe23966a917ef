"""The remote tier: a thread that brings what was committed on this machine to --out, newest first."""

import threading
import time

from cli.progress import count
from store import drive, fs
from store.errors import StoreError
from store.lease import Fenced
from train import checkpoint
from train.checkpoint import Manifest
from train.folder import RunFolder

PAUSE_S = 20.0  # after a failure that outlasted store.retry's own patience
LOOK_S = 10.0  # between looks at whether Drive has brought a checkpoint to the cloud


class Mirror:
    """Uploads one checkpoint at a time, with the logs; what was offered meanwhile is passed over for the newest.

    A failure is loud and tried again for as long as the process lives: training never waits for it.
    """

    def __init__(self, folder: RunFolder, *, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.offered: Manifest | None = None
        self.uploading: Manifest | None = None
        self.stored: Manifest | None = None  # the newest that is committed there
        self.waiting_since_s: float | None = None  # when the oldest offer that is not answered yet was made
        self.error: BaseException | None = None  # of the last try
        self.leaving = False
        self.upload_s = 0.0  # what the newest upload took
        self.on_its_way: Manifest | None = None  # stored on a Drive, which has not proved yet that it is in the cloud
        self.changed = threading.Condition()
        threading.Thread(target=self._work, daemon=True, name="mirror").start()

    def offer(self, manifest: Manifest) -> None:
        """A step committed in the local tier, newer than all before."""
        with self.changed:
            self.offered = manifest
            if self.waiting_since_s is None:
                self.waiting_since_s = time.monotonic()
            self.changed.notify_all()

    def spare(self) -> str | None:
        """The step whose files are being read: not to be deleted."""
        with self.changed:
            wanted = self.uploading or self.offered
            return wanted.name if wanted else None

    def finish(self, timeout_s: float | None) -> bool:
        """Wait until everything offered, and the logs, are stored: True. False when that failed or took too long."""
        with self.changed:
            self.leaving = True
            if isinstance(self.error, StoreError) and not isinstance(self.error, Fenced):
                self.error = None  # it is tried once more
            self.changed.notify_all()
            self.changed.wait_for(lambda: not self.leaving or self.error, timeout_s)
            done, self.leaving = not self.leaving, False
            return done

    def _work(self) -> None:
        try:
            while True:
                self._next()
        except BaseException as e:  # for the loop to raise: this run is no longer ours, or a fault of our own
            with self.changed:
                self.error = e
                self.changed.notify_all()

    def _next(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.offered or self.leaving, LOOK_S if self.on_its_way else None)
            manifest, leaving = self.offered, self.leaving
            self.uploading = manifest
        try:
            if manifest:
                self._upload(manifest)
            self._look_at_drive()
            if manifest or leaving:
                self.folder.publish()
        except Fenced:
            raise
        except StoreError as e:
            return self._failed(manifest, e)
        with self.changed:
            self.uploading = None
            if self.offered is manifest:
                self.offered = self.waiting_since_s = None
                self.leaving = self.leaving and not leaving
                self.changed.notify_all()

    def _upload(self, manifest: Manifest) -> None:
        start_s = time.monotonic()
        self.folder.publish()  # the logs of a step are there before the step is
        checkpoint.upload(self.folder.local, self.folder.url, manifest, fence=self.folder.fence)
        seconds = self.upload_s = time.monotonic() - start_s
        self.folder.lease.renew(step=manifest.step, saved=manifest.name)
        with self.changed:
            self.stored, self.error = manifest, None
        self.on_its_way = manifest if fs.is_local(self.folder.url) else None
        self.folder.event("saved", step=manifest.step, tier="remote", bytes=manifest.n_bytes, seconds=round(seconds, 3))
        where = fs.redact(fs.join(self.folder.url, manifest.name))
        print(f"stored     {where} ({count(manifest.n_bytes)}B, {count(manifest.n_bytes / seconds)}B/s)", flush=True)
        try:
            checkpoint.retain(self.folder.url, self.keep)
        except StoreError as e:  # the new step is committed: old ones that stay too long hurt nobody
            self.folder.warn(f"old checkpoints could not be removed: {e}")

    def _look_at_drive(self) -> None:
        """On a mounted Drive a checkpoint is local until Drive has given each file its id: only then is it in the cloud."""
        manifest = self.on_its_way
        if manifest is None:
            return
        folder = fs.local_path(self.folder.url) / manifest.name
        told = [drive.uploaded(folder / name) for name in (*manifest.parts, checkpoint.MANIFEST)]
        if None in told:  # no Drive that tells, or retention was quicker
            self.on_its_way = None
        elif all(told):
            self.on_its_way = None
            self.folder.event("proved_remote", step=manifest.step)
            print(f"in cloud   {manifest.name} has left this machine", flush=True)

    def _failed(self, manifest: Manifest | None, error: StoreError) -> None:
        what = f"checkpoint {manifest.name}" if manifest else "the log"
        self.folder.warn(f"{what} is not stored in {fs.redact(self.folder.url)} yet, training goes on: {error}")
        self.folder.event("save_failed", step=manifest.step if manifest else None, tier="remote", error=str(error))
        with self.changed:
            self.uploading, self.error = None, error
            self.changed.notify_all()
            self.changed.wait(PAUSE_S)  # or until there is something newer, or the end
