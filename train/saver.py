"""Asynchronous saves: the loop copies the state between two steps and goes on; a thread writes, proves and commits it."""

import contextlib
import math
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cli.progress import count, duration
from store import fs
from store.errors import StoreError
from store.lease import Fenced
from train import checkpoint
from train.checkpoint import Manifest
from train.config import AUTO, TrainConfig
from train.folder import RunFolder
from train.guard import first_nonfinite
from train.mirror import Mirror
from train.optim import Optimizer
from train.parallel import whole
from train.precision import Machine

LOCAL_KEEP = 2  # in the local tier: the newest, and one that is not as far back as --out's should it be damaged
AGAIN_S = 20.0  # after a save that failed, the next try


class Unsaved(StoreError):
    """No checkpoint could be stored for longer than --max-unsaved-minutes, or the last one of a run could not be."""


class Snapshot:
    """A second home for a state's tensors: one block of host memory, allocated once (page-locked for a GPU) and refilled."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.buffers: dict[str, dict[str, Tensor]] = {}  # by part and name: views of the block
        self.copied: torch.cuda.Event | None = None
        self.aside = torch.cuda.Stream(machine.device) if machine.device.type == "cuda" else None
        self.unlock: Callable[[], object] = lambda: None  # undoes the page-locking

    def guard(self, optimizer: Optimizer) -> None:
        """Have its steps wait for copies under way. Forward and backward passes change nothing that is copied: they need not."""

        def wait_for_copies(*_: object) -> None:
            if self.copied is not None:
                torch.cuda.current_stream().wait_event(self.copied)

        if self.aside is not None:
            for part in getattr(optimizer, "parts", (optimizer,)):
                part.register_step_pre_hook(wait_for_copies)

    def take(self, parts: dict[str, dict[str, Tensor]], *, last: bool = False) -> dict[str, dict[str, Tensor]]:
        """Copies of all tensors, by part and name, on the CPU; `wait` before reading them.

        Of the `last` state, which nothing changes any more, on a CPU the tensors themselves: a first block of 1.6 GB took
        2.2 s of the grace on a virtual machine, which hands memory out page by page.
        """
        if last and self.machine.device.type == "cpu":
            return {part: {name: whole(t.detach()) for name, t in named.items()} for part, named in parts.items()}
        on_gpu = self.machine.device.type == "cuda"
        if {p: t.keys() for p, t in parts.items()} != {p: t.keys() for p, t in self.buffers.items()}:
            self._allocate(parts, on_gpu)
        if self.aside is not None:
            self.aside.wait_stream(torch.cuda.current_stream())  # the step that is to be copied
        with torch.cuda.stream(self.aside):  # None: as if it were not there
            for part, tensors in parts.items():
                for name, t in tensors.items():
                    source = whole(t.detach())
                    self.buffers[part][name].copy_(source, non_blocking=on_gpu)
                    if source.is_cuda:
                        source.record_stream(
                            self.aside
                        )  # what was gathered from shards is freed here: not before it is read
        if self.aside is not None:
            self.copied = self.aside.record_event()
        return self.buffers

    def _allocate(self, parts: dict[str, dict[str, Tensor]], on_gpu: bool) -> None:
        self.wait()  # nothing is on its way to the block that goes
        self.unlock()
        self.buffers = {}
        block = torch.empty(sum(_padded(t) for named in parts.values() for t in named.values()), dtype=torch.uint8)
        if on_gpu and _page_lock(block, self.machine.device):
            self.unlock = weakref.finalize(self, torch.cuda.cudart().cudaHostUnregister, block.data_ptr())
        at = 0
        for part, tensors in parts.items():
            self.buffers[part] = {}
            for name, t in tensors.items():
                self.buffers[part][name] = block[at : at + t.nbytes].view(t.dtype).view(t.shape)
                at += _padded(t)

    def wait(self) -> None:
        """Until the copies are complete."""
        if self.copied is not None:
            self.copied.synchronize()


def _page_lock(block: Tensor, gpu: torch.device) -> bool:
    """True when copies from the GPU go to this block behind the host's back; refused (no rights), copies merely wait."""
    # `pin_memory=True` would round each tensor up to a power of two
    if int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes, 1)) == 0:
        return True
    with contextlib.suppress(RuntimeError):  # CUDA keeps the refusal for the next kernel's check to raise: this one's
        torch.full((1,), 1.0, device=gpu)
    return False


class BystandingSaver:
    """The Saver of every rank but the first: it gives its shards, and waits for nothing."""

    begun_step, error, write_s, failed = 0, None, 0.0, False

    def begin(
        self, step: int, parts: dict[str, dict[str, Tensor]], state: dict[str, Any], *, last: bool = False
    ) -> None:
        """Take part in gathering what rank 0 saves."""
        for tensors in parts.values():
            for t in tensors.values():
                whole(t.detach())

    def due(self, step: int) -> bool:
        """Rank 0 decides."""
        return False

    def wait(self, timeout_s: float | None = None) -> bool:
        """Nothing is in flight here."""
        return True

    def newest(self) -> str:
        """Rank 0 knows."""
        return ""

    def takes_s(self) -> float:
        """Rank 0 alone leaves time for it."""
        return 0.0

    def nothing(self, *arguments: object) -> None:
        """What rank 0 alone has to do."""

    resumed = put_off = check = finish = guard = nothing


def _padded(t: Tensor) -> int:
    return -(-t.nbytes // 64) * 64  # every view begins where any dtype, and a cache line, may


class Saver:
    """Decides when a save is due and makes it, never two at once; feeds the Mirror of a run that lives elsewhere."""

    def __init__(self, config: TrainConfig, folder: RunFolder, machine: Machine, *, step: int) -> None:
        self.config, self.folder = config, folder
        self.snapshot = Snapshot(machine)
        self.thread: threading.Thread | None = None
        self.begun_step, self.saved_step = step, step  # of the newest save begun, and committed on this machine
        self.begun_s = time.monotonic()
        self.stall_s, self.write_s = 0.0, 0.0  # of the newest save: what the loop lost, what the thread took
        self.late = False  # a save is due while one is in flight
        self.waiting_since_s: float | None = None  # when the oldest save that is not committed yet was begun
        self.error: BaseException | None = None  # of the newest save; None once one is committed
        self.mirror = Mirror(folder, keep=config.keep) if folder.two_tiers else None

    def guard(self, optimizer: Optimizer) -> None:
        """To be called once, with what changes the state that is saved."""
        self.snapshot.guard(optimizer)

    @property
    def failed(self) -> bool:
        """The newest save failed for a reason that may pass."""
        return isinstance(self.error, StoreError) and not isinstance(self.error, Fenced)

    def resumed(self, manifest: Manifest, place: str) -> None:
        """The run goes on from this checkpoint: where only the local tier has it, it still has to travel."""
        if self.mirror and place == str(self.folder.local):
            self.mirror.offer(manifest)

    # ---- when ---------------------------------------------------------------------------------------------------

    def interval_s(self) -> float:
        """Seconds between saves for `--save-every auto`: the optimum of Young (1974) and Daly (2006) for what a save costs
        the loop, but no shorter than a save takes to write."""
        return max(math.sqrt(2 * self.stall_s * 60 * self.config.preemption_minutes), self.write_s, 1.0)

    def due(self, step: int) -> bool:
        """Whether to `begin` a save after this step. One that falls due while another is in flight waits for it."""
        every, since_s = self.config.save_every, time.monotonic() - self.begun_s
        due = (
            self.late
            or (self.failed and since_s >= AGAIN_S)
            or (since_s >= self.interval_s() if every == AUTO else every > 0 and step % every == 0)
            or (self.config.save_every_minutes > 0 and since_s >= 60 * self.config.save_every_minutes)
        )
        if due and self._busy():
            if not self.late:
                self.folder.event("save_late", step=step)
            self.late = True
            return False
        return due

    def put_off(self) -> None:
        """The save that is due is not for now: the next step is asked again."""
        self.late = True

    def _busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    # ---- how ----------------------------------------------------------------------------------------------------

    def begin(
        self, step: int, parts: dict[str, dict[str, Tensor]], state: dict[str, Any], *, last: bool = False
    ) -> None:
        """Copy the state of `step`; the rest happens in a thread. Not while a save is in flight: see `due`, `wait`.

        `last`: nothing changes the state any more.
        """
        self.begun_s, self.begun_step, self.late = time.monotonic(), step, False
        if self.waiting_since_s is None:
            self.waiting_since_s = self.begun_s
        tensors = self.snapshot.take(parts, last=last)
        self.stall_s = time.monotonic() - self.begun_s
        self.folder.event("save_begun", step=step)
        self.thread = threading.Thread(target=self._write, args=(step, tensors, state), daemon=True, name="saver")
        self.thread.start()

    def _write(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        try:
            self._commit(step, tensors, state)
        except BaseException as e:  # for `check` to raise in the loop: it must not die with the thread
            self.error = e
            if self.failed:
                self.folder.warn(f"checkpoint at step {step} failed, training goes on: {e}")
                self.folder.event("save_failed", step=step, tier="local", error=str(e))

    def _commit(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        start_s = time.monotonic()
        self.snapshot.wait()
        for part, named in tensors.items():
            if wrong := first_nonfinite(named):
                raise StoreError(f"{wrong} in {part} is not finite: such a state is never kept")
        manifest = checkpoint.save(
            self.folder.local, step=step, run_id=self.folder.run_id, attempt=self.folder.attempt,
            val_loss=state["val_loss"], tensors=tensors, state=state,
            fence=self._before_commit,
        )  # fmt: skip
        self.write_s = time.monotonic() - start_s
        if not self.mirror:
            self.folder.lease.renew(step=step, saved=manifest.name)
        self.saved_step, self.error, self.waiting_since_s = step, None, None
        self.folder.event(
            "saved", step=step, tier="local", bytes=manifest.n_bytes, seconds=round(self.write_s, 3),
            stall_s=round(self.stall_s, 4),
        )  # fmt: skip
        where = fs.redact(fs.join(str(self.folder.local), manifest.name))
        print(f"saved      {where} ({count(manifest.n_bytes)}B in {duration(self.write_s)})", flush=True)
        try:
            if self.mirror:
                self.mirror.offer(manifest)
                checkpoint.retain(str(self.folder.local), LOCAL_KEEP, spare=self.mirror.spare())
            else:
                checkpoint.retain(str(self.folder.local), self.config.keep)
        except StoreError as e:  # the new step is committed: old ones that stay too long hurt nobody
            self.folder.warn(f"old checkpoints could not be removed: {e}")

    def _before_commit(self) -> None:
        self.folder.settle()
        if not self.mirror:
            self.folder.fence()

    def check(self) -> None:
        """Between two steps: raises Fenced, Unsaved once saving has failed for too long, or what broke the thread."""
        mirror_error = self.mirror.error if self.mirror else None
        for error in (self.error, mirror_error, self.folder.lease.fenced):
            if isinstance(error, Fenced) or (error is not None and not isinstance(error, StoreError)):
                raise error
        limit_s = 60 * self.config.max_unsaved_minutes
        oldest = [s for s in (self.waiting_since_s, self.mirror and self.mirror.waiting_since_s) if s is not None]
        if limit_s and oldest and time.monotonic() - min(oldest) > limit_s:
            raise Unsaved(
                f"no checkpoint could be stored for {self.config.max_unsaved_minutes:g} minutes "
                f"({self.error or mirror_error or 'the save is still under way'}); the newest stored is {self.newest()}: "
                "mend the storage, then run the same command again"
            )

    def newest(self) -> str:
        """What a restart would find, for a message."""
        here = f"step {self.saved_step}" if self.saved_step else "none"
        if not self.mirror:
            return here
        return f"{f'step {self.mirror.stored.step}' if self.mirror.stored else 'as at the start'} (on this machine: {here})"

    def takes_s(self) -> float:
        """Seconds that the newest save took, to where the run lives: what the last one may take."""
        return self.stall_s + self.write_s + (self.mirror.upload_s if self.mirror else 0.0)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until no save is in flight on this machine; False when that takes longer."""
        if self.thread is not None:
            self.thread.join(None if timeout_s is None else max(timeout_s, 0.0))
        return not self._busy()

    def finish(self, timeout_s: float | None = None) -> None:
        """Wait until everything is stored where the run lives. Raises Unsaved when that fails or takes longer."""
        limit_s = None if timeout_s is None else time.monotonic() + timeout_s
        if not self.wait(timeout_s) or self.error:
            self.check()
            raise Unsaved(f"the last checkpoint could not be written ({self.error or 'no time left'}); the newest stored "
                          f"is {self.newest()}")  # fmt: skip
        left_s = None if limit_s is None else max(limit_s - time.monotonic(), 0.0)
        if self.mirror and not self.mirror.finish(left_s):
            self.check()
            raise Unsaved(f"{fs.redact(self.folder.url)}: the last checkpoint could not be stored there "
                          f"({self.mirror.error or 'no time left'}); it is on this machine, where the same command goes on from "
                          "it")  # fmt: skip
        if self.mirror and self.mirror.on_its_way:
            self.folder.warn(f"{self.mirror.on_its_way.name} is on the Drive's way to the cloud, not there yet: "
                             "drive.flush_and_unmount() in a cell waits for it")  # fmt: skip
