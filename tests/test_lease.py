"""One run has one writer: the living is refused company, the dead is followed, the overtaken finds itself fenced."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from store import fs, lease, lock, retry
from store.errors import StoreError
from store.lease import Fenced, Lease

ROOT = Path(__file__).parent.parent
TTL_S = 0.6


@pytest.fixture(params=["local", "memory", "gs"])
def out(request, tmp_path, monkeypatch):
    """A run folder of each kind; leases lapse after 0.6 s."""
    monkeypatch.setattr(lease, "TTL_S", TTL_S)
    monkeypatch.setattr(fs, "SETTLE_S", 0.05)
    if request.param == "gs":
        request.getfixturevalue("gcs")
        return "gs://bucket/out"
    return str(tmp_path / "out") if request.param == "local" else f"memory:///{tmp_path.name}"


@pytest.fixture
def unhurried(monkeypatch, out):
    """Where a beat must come in time, on a busy machine too; it is seen after a quarter of it."""
    monkeypatch.setattr(lease, "TTL_S", 4.0)


@pytest.fixture
def claim():
    """Lease.claim with defaults; every lease is silenced at the end."""
    held = []

    def claim(out, lock="", above=0, **info):
        held.append(Lease.claim(out, lock, info, lambda seconds, holder: time.sleep(seconds), above=above))
        return held[-1]

    yield claim
    for each in held:
        silence(each)


def silence(held: Lease) -> None:
    """What a kill does to a lease: it is renewed no more."""
    held._end.set()
    held._thread.join()


def stored(out: str, epoch: int) -> dict:
    return json.loads(fs.read_bytes(fs.join(out, "leases", f"{epoch:08d}.json")))


def test_released_is_followed_at_once(out, claim):
    """The next holder has the next epoch and is told what the last one said last."""
    first = claim(out, run_id="abc")
    assert (first.epoch, first.previous) == (1, None)
    first.renew(step=7)
    first.release()
    started_s = time.monotonic()
    second = claim(out)
    assert time.monotonic() - started_s < TTL_S / 2
    assert second.epoch == 2
    assert second.previous["step"] == 7
    assert second.previous["run_id"] == "abc"
    assert abs(second.previous["time"] - time.time()) < 60
    second.check()
    with pytest.raises(Fenced):
        first.check()


def test_the_living_is_refused_company(out, claim, unhurried):
    """While the holder renews, nobody else gets in, and the line says who and what to do; the holder goes on."""
    first = claim(out, lock="boot:1:2", host="tulip")
    with pytest.raises(StoreError, match=r"another trainer is writing there \(host tulip\): stop it, or give another"):
        claim(out, lock="boot:1:3")
    first.check()
    assert len(fs.list_folder(fs.join(out, "leases"))) == 1


def test_the_silent_is_followed_after_its_time(out, claim):
    """No release and no sign of life: the next waits one TTL on its own clock, however the stamped clock is wrong."""
    for stamp in (time.time(), time.time() + 3600):
        first = claim(out)
        silence(first)
        record = {**stored(out, first.epoch), "time": stamp}
        started_s = time.monotonic()
        fs.put_bytes(fs.join(out, "leases", f"{first.epoch:08d}.json"), json.dumps(record).encode())
        second = claim(out)
        assert TTL_S <= time.monotonic() - started_s < 3 * TTL_S
        assert second.epoch == first.epoch + 1
        with pytest.raises(Fenced, match=r"another trainer .* has taken this run over"):
            first.check()
        second.release()


def test_who_held_the_same_lock_is_dead(out, claim):
    """Of one machine: the lock file that we hold now was the predecessor's, so nobody has to wait."""
    silence(claim(out, lock="boot:1:2"))
    started_s = time.monotonic()
    assert claim(out, lock="boot:1:2").epoch == 2
    assert time.monotonic() - started_s < TTL_S / 2


@pytest.mark.parametrize(("age_s", "waits"), [(5 * TTL_S, (0.4, 1.2)), (lease.LONG_AGO_S + 60, (0, 0.3))])
def test_an_old_stamp_is_watched_for_a_beat_one_of_long_ago_not_at_all(out, claim, age_s, waits):
    silence(claim(out))
    record = {**stored(out, 1), "time": time.time() - age_s}
    fs.put_bytes(fs.join(out, "leases", "00000001.json"), json.dumps(record).encode())
    started_s = time.monotonic()
    assert claim(out).epoch == 2
    assert waits[0] * TTL_S <= time.monotonic() - started_s < waits[1] * TTL_S + 0.3


@pytest.mark.parametrize("store", ["gcs", "s3"])
@pytest.mark.parametrize("machine_ahead_s", [-3600, 0, 3600])
@pytest.mark.parametrize("server_ahead_s", [-3600, 3600])
def test_an_object_store_knows_since_when_its_writer_is_silent(
    request, monkeypatch, claim, store, machine_ahead_s, server_ahead_s
):
    """Whose machine has gone is followed without a wait, once it has been silent for long enough: no machine's clock counts."""
    monkeypatch.setattr(lease, "TTL_S", 8.0)
    server, out = request.getfixturevalue(store), "gs://bucket/out" if store == "gcs" else "s3://bucket/out"
    server.objects.clock_ahead_s = server_ahead_s
    silence(claim(out))
    for epoch, ago_s, waits in ((1, 9.1, (0, 2)), (2, 5.5, (1.4, 4.5))):  # S3 tells whole seconds
        name = f"bucket/out/leases/{epoch:08d}.json"
        record = {**stored(out, epoch), "time": time.time() + machine_ahead_s}
        server.objects[name] = json.dumps(record).encode()
        server.objects.written[name] -= ago_s
        started_s = time.monotonic()
        silence(claim(out))
        assert waits[0] <= time.monotonic() - started_s < waits[1]
        assert [n for n in server.objects if "leases" in n] == [
            f"bucket/out/leases/{n + 1:08d}.json" for n in range(epoch + 1)
        ]


@pytest.mark.parametrize("out", ["local", "gs"], indirect=True)
def test_of_many_at_once_one_gets_in(out, unhurried):
    """Eight start together, twice: one holder each time, no epoch twice, every other refused by name."""
    for _ in range(2):
        barrier, held, refused = threading.Barrier(8), [], []

        def start(barrier=barrier, held=held, refused=refused) -> None:
            barrier.wait()
            try:
                held.append(Lease.claim(out, "", {}, lambda seconds, holder: time.sleep(seconds)))
            except StoreError as e:
                refused.append(str(e))

        threads = [threading.Thread(target=start) for _ in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert (len(held), len(refused)) == (1, 7)
        assert all("another trainer is writing there" in line for line in refused)
        held[0].check()
        held[0].release()
    assert len(fs.list_folder(fs.join(out, "leases"))) == 2


@pytest.mark.parametrize("lie", ["nothing", "not the newest", "one that was deleted"])
def test_listings_that_lie(out, claim, monkeypatch, lie, unhurried):
    """A listing that omits the newest lease, or shows a deleted one, leads to no epoch twice and to no hole."""
    for _ in range(3):
        claim(out).release()
    true = fs.list_folder(fs.join(out, "leases"))
    shown = {"nothing": [], "not the newest": true[:1], "one that was deleted": [*true, fs.Entry("00000009.json", 9)]}
    monkeypatch.setattr(fs, "list_folder", lambda url: shown[lie])
    fourth = claim(out)
    assert fourth.epoch == 4
    with pytest.raises(StoreError, match="another trainer is writing there"):
        claim(out)
    fourth.check()


def test_a_lost_lease_is_written_again(out, claim):
    """Its file is gone (deleted by hand, or lost by a mount): still ours, and the next comes after it."""
    first = claim(out)
    fs.delete(fs.join(out, "leases", "00000001.json"))
    first.check()
    assert stored(out, 1)["holder"] == first._record["holder"]
    fs.put_bytes(fs.join(out, "leases", "00000001.json"), json.dumps({"holder": "another", "host": "tulip"}).encode())
    with pytest.raises(Fenced, match="tulip"):
        first.check()


def test_old_leases_go_and_who_slept_meanwhile_is_fenced(out, claim, monkeypatch):
    """A few are kept however often a run starts; a writer whose own is among the gone finds the newest."""
    monkeypatch.setattr(lease, "KEPT", 3)
    silence(first := claim(out, lock="boot:1:2"))
    for epoch in range(2, 9):
        held = claim(out, lock="boot:1:2", host="tulip")
        assert held.epoch == epoch
        silence(held)
    assert [e.name[:8] for e in fs.list_folder(fs.join(out, "leases"))] == ["00000006", "00000007", "00000008"]
    with pytest.raises(Fenced, match="tulip"):
        first.check()
    held.check()


@pytest.mark.parametrize("garbage", [b"", b"null", b"[1]", b"\xff{", b'{"time": "x", "beat": [], "released": 0}'])
def test_an_unreadable_lease_lapses(out, claim, garbage):
    """A full Drive makes files of 0 bytes: such a lease holds for one TTL, and stays where it is."""
    fs.put_bytes(fs.join(out, "leases", "00000001.json"), garbage)
    assert claim(out).epoch == 2
    assert fs.read_bytes(fs.join(out, "leases", "00000001.json")) == garbage


def test_deleted_leases_do_not_bring_epochs_back(out, claim):
    """What is committed under an epoch stays above all that come: `above` says so where the leases are gone."""
    assert claim(out, above=5).epoch == 6


def test_waiting_can_be_given_up(out, claim):
    """Whatever `wait` raises ends the claim: a stop signal while it waits; nothing was taken."""
    silence(claim(out))

    def stop(seconds: float, holder: dict) -> None:
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        Lease.claim(out, "", {}, stop)
    assert len(fs.list_folder(fs.join(out, "leases"))) == 1


def test_creation_that_was_done_but_not_answered(gcs, claim):
    """The name is taken, by our own bytes: that is ours."""
    gcs.fail("upload", "drop after")
    assert fs.create("gs://b/x", b"mine")
    assert not fs.create("gs://b/x", b"yours")
    gcs.fail("upload", "flip")
    assert fs.create("gs://b/y", b"0123456789")
    assert gcs.objects == {"b/x": b"mine", "b/y": b"0123456789"}


def test_an_outage_fences_nobody(gcs, claim, monkeypatch):
    """Renewals that fail are no reason to stop; a check says that it could not look, and passes afterwards."""
    monkeypatch.setattr(lease, "TTL_S", 0.2)
    first = claim("gs://b/out")
    monkeypatch.setattr(retry, "RETRY_FOR_S", 0.1)
    for kind in ("upload", "read"):
        gcs.fail(kind, 503, times=10_000)
    time.sleep(0.4)
    with pytest.raises(StoreError, match="fault on order") as e:
        first.check()
    assert not isinstance(e.value, Fenced)
    gcs.faults.clear()
    first.check()
    beat = stored("gs://b/out", 1)["beat"]
    deadline_s = time.monotonic() + 5
    while stored("gs://b/out", 1)["beat"] == beat and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert stored("gs://b/out", 1)["beat"] > beat


WRITER = """
import sys, time
from store import lock
from store.lease import Fenced, Lease
held = Lease.claim(sys.argv[1], lock.hold(__import__("pathlib").Path(sys.argv[2])), {}, lambda s, h: time.sleep(s))
print(held.epoch, flush=True)
for line in sys.stdin:
    try:
        held.check()
        print("committed", flush=True)
    except Fenced:
        print("fenced", flush=True)
"""


def writer(out: str, lock_path: Path) -> subprocess.Popen:
    env = {**os.environ, "PERENNIAL_LEASE_S": "1.5"}
    command = [sys.executable, "-c", WRITER, out, str(lock_path)]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def commit(child: subprocess.Popen) -> str:
    child.stdin.write("\n")
    child.stdin.flush()
    return child.stdout.readline().strip()


@pytest.mark.parametrize("out", ["local", "gs"], indirect=True)
def test_a_frozen_writer_wakes_up_fenced(out, tmp_path):
    """Two processes on two "machines" (locks): one is refused while the other lives, follows when it is frozen (SIGSTOP),
    and the frozen one cannot commit when it goes on; a killed one is followed at once on its own machine."""
    first = writer(out, tmp_path / "one")
    assert first.stdout.readline().strip() == "1"
    assert commit(first) == "committed"
    refused = writer(out, tmp_path / "two")
    assert refused.wait(20) != 0
    first.send_signal(signal.SIGSTOP)
    second = writer(out, tmp_path / "two")
    assert second.stdout.readline().strip() == "2"
    first.send_signal(signal.SIGCONT)
    assert (commit(first), commit(second)) == ("fenced", "committed")
    second.kill()
    second.wait()
    third = writer(out, tmp_path / "two")
    assert third.stdout.readline().strip() == "3"
    for child in (first, third):
        child.kill()
        child.wait()


def test_the_lock_has_a_name_of_its_own(tmp_path):
    """The same file gives the same name, another gives another."""
    names = []
    for path in (tmp_path / "a", tmp_path / "b", tmp_path / "a"):
        names.append(lock.hold(path))
        lock.let_go()
    assert names[0] == names[2] != names[1]
    assert all(names)
