"""Told to stop in any phase, by whomever, once or twice: the process leaves in its grace and loses nothing it had."""

import http.server
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.helpers import ROOT, result, start, train
from train import checkpoint, gce, preempt, run
from train.saver import Saver

FLAGS = ("--model", "tiny", "--n-embd", 32, "--n-head", 2, "--block-size", 32, "--batch", 8, "--device", "cpu",
         "--log-every", 1, "--eval-every", 0, "--sample-every", 0, "--save-every-minutes", 0, "--resume",
         "--schedule", "constant", "--warmup", 1, "--eval-tokens", 512)  # fmt: skip

LIGHT = """
import hashlib, os, sys, time
from train.preempt import StopSignal, Interrupted
def in_c():  # no bytecode of the main thread, so no handler of Python's, for minutes
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
stop = StopSignal()
stop.nothing_to_save = False
def ready():
    print("ready", flush=True)
"""


def light(body: str, **options: object) -> subprocess.Popen:
    """A process with a StopSignal and no torch, which runs `body`; it has said that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", LIGHT + body], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        **{"stderr": subprocess.PIPE, **options},
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


def leaves(process: subprocess.Popen, number: int) -> tuple[int, float, str]:
    """(exit code, seconds until it was there, stderr) after this signal."""
    process.send_signal(number)
    begin_s = time.monotonic()
    process.wait(30)
    seconds = time.monotonic() - begin_s
    return process.returncode, seconds, process.stderr.read() if process.stderr else ""


TERM, INT = signal.SIGTERM, signal.SIGINT


@pytest.mark.parametrize("hangs", ["", "the log", "stderr"])
def test_the_watchdog_leaves_when_the_grace_is_over_whatever_hangs(hangs):
    read, write = os.pipe()
    options = {}
    if hangs == "stderr":  # a terminal that was halted: nobody reads, and the pipe is full
        os.set_blocking(write, False)
        while select.select([], [write], [], 0)[1]:
            os.write(write, b"x" * 4096)
        os.set_blocking(write, True)
        options["stderr"] = write
    log = "stop.record = lambda *a, **k: time.sleep(60)\n" if hangs == "the log" else ""
    process = light(f"stop.grace_s = 1.0\n{log}ready()\nin_c()", **options)
    code, seconds, said = leaves(process, TERM)
    os.close(read), os.close(write)
    assert code == 75
    assert 0.8 < seconds < 2.5
    if not hangs:
        assert "SIGTERM: saving, then stopping" in said
        assert "its grace is over (--grace-seconds 1)" in said


def test_a_second_signal_ends_it_even_where_python_does_not_run():
    process = light("ready()\nin_c()")
    process.send_signal(TERM)
    time.sleep(0.3)
    code, seconds, said = leaves(process, INT)
    assert code == 128 + INT
    assert seconds < 1.5
    assert "SIGINT, the second signal" in said


SAVING = """
ready()
while not stop(): time.sleep(0.001)
time.sleep({commit_s})  # the save
print("committed", flush=True)
os._exit(75)
"""


def test_a_signal_passed_on_twice_is_one_request():
    process = light(SAVING.format(commit_s=0.8))
    process.send_signal(TERM)
    time.sleep(0.02)
    assert leaves(process, TERM)[0] == 75
    assert process.stdout.read() == "committed\n"


@pytest.mark.parametrize(("commit_s", "code"), [(0.45, 75), (3.0, 143)])
def test_colabs_double_stop_lets_a_short_save_end(commit_s, code):
    """SIGINT, then SIGTERM with SIGKILL half a second after it: what can be committed in between is."""
    process = light(SAVING.format(commit_s=commit_s))
    process.send_signal(INT)
    time.sleep(0.25)
    process.send_signal(TERM)
    assert process.wait(0.5) == code  # by itself, before the SIGKILL
    assert (process.stdout.read() == "committed\n") == (code == 75)


def test_with_nothing_to_save_it_leaves_at_once():
    unwinds = "stop.nothing_to_save = True\ntry:\n ready(); time.sleep(60)\nexcept Interrupted: sys.exit(75)"
    code, seconds, said = leaves(light(unwinds), TERM)
    assert (code, said) == (75, "")
    assert seconds < 1.5
    swallows = "stop.nothing_to_save = True\nwhile True:\n try: ready(); time.sleep(60)\n except BaseException: pass"
    for body in (swallows, "stop.nothing_to_save = True\nready()\nin_c()"):
        process = light(body)
        time.sleep(0.2)  # until it is where it says
        code, seconds, said = leaves(process, TERM)
        assert code == 75
        assert seconds < preempt.UNWIND_S + 1.5
        assert "nothing new to save" in said


def test_what_is_not_saved_is_left_in_its_middle():
    body = """
assert stop.unless_stopped(lambda: 5) == 5
try: stop.unless_stopped(lambda: 1 / 0)
except ZeroDivisionError: pass
def swallow():
    try: time.sleep(60)
    except BaseException: raise RuntimeError("of a library that was interrupted")
ready()
assert stop.unless_stopped(swallow) is None
assert stop.unless_stopped(lambda: 5) is None  # not even begun
sys.exit(0 if stop() else 1)
"""
    code, seconds, _ = leaves(light(body), TERM)
    assert code == 0
    assert seconds < 1.5


def test_stop_after_leaves_room_for_the_save():
    body = """
from train import clock
stop.grace_s, stop.reserve_s, stop.stop_after_s = 0.1, 1.0, clock.up_s() + 2.0
ready()
begin_s = time.monotonic()
while not stop(): time.sleep(0.001)
assert stop.name == "--stop-after", stop.name
assert 0.3 < stop.seconds_left() < 1.0, stop.seconds_left()
assert time.monotonic() - begin_s < 2.0
time.sleep(0.5)
sys.exit(75)
"""
    process = light(body)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75, err


def test_the_process_began_before_its_imports():
    begin_s = time.monotonic()
    code = "import time; time.sleep(0.5); from train import clock; print(clock.up_s())"
    up_s = float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout)
    assert 0.5 <= up_s <= time.monotonic() - begin_s + 0.02  # the kernel counts in ticks of 10 ms


# ---- GCE ------------------------------------------------------------------------------------------------------------


class Metadata(http.server.BaseHTTPRequestHandler):
    """Compute Engine's metadata server: it holds a request until `preempted` changes."""

    def do_GET(self):
        server = self.server
        server.paths.append(self.path)
        assert self.headers["Metadata-Flavor"] == "Google"
        status = server.statuses.pop(0) if server.statuses else 200
        if status == 200 and "last_etag=0" not in self.path:
            server.changed.wait(20)
        body = b"TRUE" if server.changed.is_set() else b"FALSE"
        self.send_response(status)
        self.send_header("ETag", "a1" if body == b"FALSE" else "b2")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass


@pytest.fixture
def metadata(monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        server.daemon_threads = True
        server.paths, server.statuses, server.changed = [], [], threading.Event()
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # what would be asked for other hosts
        yield server
        server.changed.set()
        server.shutdown()


def wait_until(condition, limit_s=20.0):
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.01)


def test_gces_notice_is_told_once_it_comes(metadata):
    metadata.statuses = [503]
    told = []
    gce.watch(told.append)
    wait_until(lambda: "last_etag=a1" in "".join(metadata.paths))
    assert metadata.paths[0].startswith("/computeMetadata/v1/instance/preempted?wait_for_change=true&timeout_sec=60")
    assert told == []
    metadata.changed.set()
    wait_until(lambda: told)
    assert told == ["GCE preemption notice"]


def test_a_notice_given_before_the_first_look_counts(metadata):
    metadata.changed.set()
    told = []
    gce.watch(told.append)
    wait_until(lambda: told)


def test_a_server_that_cannot_know_is_left_alone(metadata, monkeypatch):
    metadata.statuses = [404]
    gce.watch(pytest.fail)
    wait_until(lambda: not any(t.name == "gce" for t in threading.enumerate()))
    assert len(metadata.paths) == 1
    monkeypatch.delenv("GCE_METADATA_HOST")
    monkeypatch.setattr(gce, "PRODUCT", ROOT / "none")
    assert gce.metadata_host() is None  # not on GCE


def test_colab_is_not_taken_for_a_vm_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "product_name").write_text("Google Compute Engine\n")
    monkeypatch.setattr(gce, "PRODUCT", tmp_path / "product_name")
    assert gce.metadata_host() == "metadata.google.internal"
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab-1")
    assert gce.metadata_host() is None


# ---- the trainer ----------------------------------------------------------------------------------------------------

SLOW = """
import sys, time
from cli import flags
from train import checkpoint, run
def slow(real, says, before_s=0.0):
    def wrapped(*a, **k):
        print(says, flush=True)
        time.sleep(before_s)
        return real(*a, **k)
    return wrapped
{patch}
flags.run(lambda: run.main(sys.argv[1:]), at_once=True)
"""
PHASES = {
    "staging": ("run.Data.ready = slow(run.Data.ready, 'in it', 60)", None),
    "compile": ("run.train_step = slow(run.train_step, 'in it', 60)", None),
    "evaluation": ("run.validation_loss = slow(run.validation_loss, 'in it', 60)", 3),
    "sampling": ("run.show_samples = slow(run.show_samples, 'in it', 60)", 2),
    "saving": ("checkpoint.save = slow(checkpoint.save, 'in it', 1)", 1),
}

AT = {"evaluation": ("--eval-every", 3), "sampling": ("--sample-every", 2), "saving": ("--save-every", 1)}


def test_sigterm_in_each_phase(data, tmp_path):
    """Side by side: started, each signalled in its phase. With something learnt, the newest step done is committed."""
    processes = {}
    for phase, (patch, _) in PHASES.items():
        flags = ["--data", data, "--out", tmp_path / phase, "--steps", 100_000, *FLAGS]
        flags += AT.get(phase, ())
        processes[phase] = subprocess.Popen(
            [sys.executable, "-c", SLOW.format(patch=patch), *map(str, flags)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    for phase, process in processes.items():
        said = ""
        while "in it" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        process.send_signal(signal.SIGTERM)
        begin_s = time.monotonic()
        said += process.stdout.read()
        assert process.wait(30) == 75, said
        assert time.monotonic() - begin_s < 25, phase
        assert said.count("stopped by SIGTERM") == 1
        if PHASES[phase][1] is None:
            assert checkpoint.committed(str(tmp_path / phase)) == []
            assert "with nothing new to save" in said
        else:
            logged = [m["step"] for m in lines(tmp_path / phase, "metrics.jsonl") if "loss" in m]
            assert checkpoint.committed(str(tmp_path / phase))[-1].step == logged[-1] >= PHASES[phase][1]
            events = [e["event"] for e in lines(tmp_path / phase, "events.jsonl")]
            assert [e for e in events if e != "staged"][0:2] == ["start", "first_step"]
            assert events.count("signal") == events.count("stopped") == 1
    again = ("--data", data, *FLAGS, *AT["evaluation"], "--steps", 6)
    assert train(*again, "--out", tmp_path / "evaluation") == train(*again, "--out", tmp_path / "quiet") == 0
    assert result(tmp_path / "evaluation") == result(tmp_path / "quiet")  # the validation of step 3 too


def test_twice_within_a_second_while_a_save_is_in_flight(data, tmp_path):
    """What is being written is lost, what is committed stays, and the run goes on from it."""
    patch = "save, saved = checkpoint.save, []\n"
    patch += "late = slow(save, 'in it', 30)\n"
    patch += "checkpoint.save = lambda *a, **k: late(*a, **k) if saved else saved.append(save(*a, **k)) or saved[0]"
    flags = ("--data", data, *FLAGS, "--save-every", 2)
    arguments = map(str, (*flags, "--out", tmp_path / "out", "--steps", 100_000))
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW.format(patch=patch), *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert any("in it" in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    begin_s = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert time.monotonic() - begin_s < 2
    process.stdout.close()
    assert [m.step for m in checkpoint.committed(str(tmp_path / "out"))] == [2]
    again = (*flags, "--steps", 6)
    assert train(*again, "--out", tmp_path / "out") == train(*again, "--out", tmp_path / "quiet") == 0
    assert result(tmp_path / "out") == result(tmp_path / "quiet")


def test_a_signal_in_the_last_validation_is_no_end(data, tmp_path, monkeypatch):
    flags = ("--data", data, *FLAGS, "--steps", 4)
    assert train(*flags, "--out", tmp_path / "quiet") == 0
    real = run.validation_loss

    def signalled(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return real(*args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(run, "validation_loss", signalled)
        assert train(*flags, "--out", tmp_path / "out") == 75
    with monkeypatch.context() as m:  # validated, and killed before that was saved
        m.setattr(Saver, "begin", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(*flags, "--out", tmp_path / "out")
    assert "val_loss" in lines(tmp_path / "out", "metrics.jsonl")[-1]
    assert train(*flags, "--out", tmp_path / "out") == 0
    assert result(tmp_path / "out") == result(tmp_path / "quiet")


def test_an_upload_that_hangs_is_left_and_nothing_is_lost_on_this_machine(data, tmp_path, gcs):
    flags = ("--data", data, *FLAGS, "--save-every", 5)
    patch = "checkpoint.upload = slow(checkpoint.upload, 'in it', 60)"
    arguments = map(str, (*flags, "--out", "gs://bucket/run", "--steps", 100_000, "--grace-seconds", 3))
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW.format(patch=patch), *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **gcs.env},
    )  # fmt: skip
    assert any("in it" in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    begin_s = time.monotonic()
    said = process.stdout.read()
    assert process.wait(30) == 75
    assert time.monotonic() - begin_s < 3 + 1
    stopped_at = int(re.search(r"stopped by SIGTERM after step (\d+) of", said)[1])
    assert not any("MANIFEST" in name for name in gcs.objects)
    again = (*flags, "--steps", stopped_at + 3)
    assert train(*again, "--out", "gs://bucket/run") == train(*again, "--out", tmp_path / "quiet") == 0
    quiet, newest = result(tmp_path / "quiet"), checkpoint.committed("gs://bucket/run")[-1]
    assert {p: newest.parts[p]["sha256"] for p in checkpoint.TENSOR_PARTS} == {
        p: quiet[p] for p in checkpoint.TENSOR_PARTS
    }
    metrics = [json.loads(line) for line in gcs.objects["bucket/run/metrics.jsonl"].splitlines()]
    assert metrics == quiet["metrics"]
    starts = [e for e in map(json.loads, gcs.objects["bucket/run/events.jsonl"].splitlines()) if e["event"] == "start"]
    assert [e["step"] for e in starts] == [0, stopped_at]


def lines(out, name):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def test_a_signal_while_it_imports(tmp_path):
    process = start("train/run.py", "--out", tmp_path, stderr=subprocess.PIPE)
    status = f"/proc/{process.pid}/status"
    wait_until(lambda: int(re.search(r"SigCgt:\s*(\w+)", Path(status).read_text())[1], 16) >> (signal.SIGTERM - 1) & 1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert "stopped by SIGTERM" in process.stderr.read()


def test_frozen_for_a_while_and_told_to_stop_by_a_limit(data, tmp_path):
    """SIGSTOP is nobody's wish to stop; --stop-after is. What comes of both is what a quiet run gives."""
    flags = ("--data", data, *FLAGS, "--steps", 100_000)
    # the process's life is made to begin with its first step, however long the imports take here
    patch = """
run.clock.START_S = time.monotonic() + 1e6
real = run.TrainLog.step
def step(log, number, *rest):
    if number == 1:
        run.clock.START_S = time.monotonic()
    real(log, number, *rest)
run.TrainLog.step = step
"""
    arguments = map(str, (*flags, "--out", tmp_path / "out", "--stop-after", "3s"))
    process = subprocess.Popen([sys.executable, "-c", SLOW.format(patch=patch), *arguments], cwd=ROOT)
    wait_until(lambda: (tmp_path / "out/metrics.jsonl").exists() and lines(tmp_path / "out", "metrics.jsonl"), 60)
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 75
    events = lines(tmp_path / "out", "events.jsonl")
    assert [e["name"] for e in events if e["event"] == "signal"] == ["--stop-after"]
    newest = checkpoint.committed(str(tmp_path / "out"))[-1].step
    assert train(*flags, "--steps", newest, "--out", tmp_path / "quiet") == 0
    assert result(tmp_path / "quiet")["model.safetensors"] == result(tmp_path / "out")["model.safetensors"]


def test_a_wall_clock_that_jumps_changes_stamps_only(data, tmp_path, monkeypatch):
    flags = ("--data", data, *FLAGS, "--steps", 8, "--save-every", 3)
    assert train(*flags, "--out", tmp_path / "quiet") == 0
    real, calls = time.time, 0

    def jumping():
        nonlocal calls
        calls += 1
        return real() + (3600 if calls % 2 else -3600)

    monkeypatch.setattr(time, "time", jumping)
    began_s = time.monotonic()
    assert train(*flags, "--out", tmp_path / "jumping") == 0
    assert time.monotonic() - began_s < 60
    assert result(tmp_path / "jumping") == result(tmp_path / "quiet")
    for event in lines(tmp_path / "jumping", "events.jsonl"):
        assert all(0 <= event.get(key, 0) < 3000 for key in ("seconds", "stall_s")), event  # no hour in any


def test_durations_never_come_from_the_wall_clock():
    """Only stamps may: of events, of leases, of stored compile caches, and the age of another process's heartbeat."""
    pattern = re.compile(r"\btime\.time\(|\btime\.time_ns\(|datetime\.now\(")
    users = {str(p.relative_to(ROOT)) for part in ("train", "store", "cli", "gpt") for p in (ROOT / part).glob("*.py")
             if pattern.search(p.read_text())}  # fmt: skip
    assert users <= {"train/folder.py", "store/lease.py", "train/compile_cache.py", "train/heartbeat.py"}
