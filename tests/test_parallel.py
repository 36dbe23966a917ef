"""Several processes train as one: the same losses, the same checkpoints, and no rank leaves alone.

Two of them over gloo, on the CPU, and four once; PERENNIAL_TEST_RANKS=4 takes four for all.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from tests.helpers import ROOT, error_of, result, train
from tests.test_resume import SMALL
from train import checkpoint
from train.exits import DIVERGED, FINISHED, LOST, STOPPED
from train.parallel import ALONE, Ranks

WORLD = int(os.environ.get("PERENNIAL_TEST_RANKS", 2))
CAN_SHARD = hasattr(torch.cpu.Stream, "record_event")  # torch 2.6 shards on GPUs only
LONG = (*SMALL, "--schedule", "constant", "--warmup", 2, "--resume")  # may end anywhere, and go on as if it had not


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ranks(tmp_path, jobs, world=WORLD):
    """Do jobs (tests/rank.py) in so many processes; returns what each rank's ended with."""
    common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PERENNIAL_PEER_S": "200"}  # fmt: skip
    jobs = json.dumps([{**job, "flags": [str(flag) for flag in job["flags"]]} for job in jobs])
    codes = [tmp_path / f"codes-{r}.json" for r in range(world)]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.rank", str(codes[r]), jobs],
            cwd=ROOT, env={**common, "RANK": str(r), "LOCAL_RANK": str(r)},
        )
        for r in range(world)
    ]  # fmt: skip
    assert [p.wait(400) for p in started] == [0] * world
    return [json.loads(path.read_text()) for path in codes]


def steps(out):
    """The steps' lines; with the last of a shorter run there is a validation more."""
    return [m for m in result(out)["metrics"] if "lr" in m]


def losses(out):
    return [m["loss"] for m in steps(out)] + [result(out)["metrics"][-1]["val_loss"]]


@pytest.fixture(scope="module")
def ran(data, tmp_path_factory):
    """All that several processes do here, by the names of their run folders, and what they ended with."""
    tmp = tmp_path_factory.mktemp("ranks")
    flags = ("--data", data, *LONG)
    assert train(*flags, "--steps", 8, "--save-every", 4, "--out", tmp / "from-one") == FINISHED
    jobs = {
        "plain": (*flags, "--steps", 20),
        "accumulated": (*flags, "--steps", 20, "--micro-batch", 1),
        "dropout": (*flags, "--steps", 20, "--dropout", 0.3),
        "dropout-resumed 1": (*flags, "--steps", 9, "--dropout", 0.3),
        "dropout-resumed 2": (*flags, "--steps", 20, "--dropout", 0.3),
        "from-one": (*flags, "--steps", 20),
        "stopped 1": (*flags, "--steps", 20),
        "stopped 2": (*flags, "--steps", 20),
        "memory": (*flags, "--steps", 20, "--save-every", 2),
        "nan": (*flags, "--steps", 20, "--max-skipped", 3, "--log-every", 1),
        "uneven": (*flags, "--steps", 20, "--batch", 9),
        **({"sharded 1": (*flags, "--steps", 9, "--shard", "on", "--checkpoint-activations", "on"),
            "sharded 2": (*flags, "--steps", 20, "--shard", "on", "--micro-batch", 1)} if CAN_SHARD else {}),
    }  # fmt: skip
    faults = {"stopped 1": (WORLD - 1, 8, "stop"), "memory": (WORLD - 1, 7, "memory"), "nan": (WORLD - 1, 5, "nan")}
    list_of_jobs = [
        {"flags": [*job, "--out", tmp / name.split()[0]], **({"fault": faults[name]} if name in faults else {})}
        for name, job in jobs.items()
    ]
    ends = ranks(tmp, list_of_jobs)
    return tmp, {name: [of_rank[i] for of_rank in ends] for i, name in enumerate(jobs)}


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The same run in one process."""
    out = tmp_path_factory.mktemp("alone")
    assert train("--data", data, *LONG, "--steps", 20, "--out", out) == FINISHED
    return out


@pytest.mark.parametrize(
    "name", ["plain", "accumulated", "from-one", pytest.param("sharded", marks=pytest.mark.skipif(not CAN_SHARD, reason="torch 2.6"))]
)  # fmt: skip
def test_several_processes_have_the_losses_of_one(ran, alone, name):
    """The same rows make the same step; their sums are added in another order, which rounds differently: 1e-5 of a loss."""
    tmp, ends = ran
    assert all(set(codes) == {FINISHED} for job, codes in ends.items() if job.split()[0] == name)
    assert losses(tmp / name) == pytest.approx(losses(alone), rel=1e-5)
    assert [m["step"] for m in steps(tmp / name)] == list(range(1, 21))


def test_four_have_them_too(alone, data, tmp_path):
    ends = ranks(tmp_path, [{"flags": ("--data", data, *LONG, "--steps", 20, "--out", tmp_path / "four")}], world=4)
    assert ends == [[FINISHED]] * 4
    assert losses(tmp_path / "four") == pytest.approx(losses(alone), rel=1e-5)


def test_resumed_by_as_many_it_is_the_uninterrupted_run_to_the_bit(ran):
    """Each rank's dropout is a function of seed, step and rank: there is no random state of theirs to lose."""
    tmp, _ = ran
    resumed, straight = result(tmp / "dropout-resumed"), result(tmp / "dropout")
    assert steps(tmp / "dropout-resumed") == steps(tmp / "dropout")
    assert {**resumed, "metrics": []} == {**straight, "metrics": []}


def test_ranks_draw_dropout_of_their_own(ran, data):
    tmp, _ = ran
    assert train("--data", data, *LONG, "--steps", 20, "--dropout", 0.3, "--out", tmp / "dropout-alone") == FINISHED
    assert losses(tmp / "dropout-alone") != pytest.approx(losses(tmp / "dropout"), rel=1e-4)
    assert losses(tmp / "dropout-alone") == pytest.approx(losses(tmp / "dropout"), rel=0.05)


@pytest.mark.parametrize(
    "name", ["plain", pytest.param("sharded", marks=pytest.mark.skipif(not CAN_SHARD, reason="torch 2.6"))]
)
def test_a_checkpoint_of_several_goes_on_in_one_process(ran, alone, data, name):
    tmp, _ = ran
    for out in (tmp / name, alone):
        assert train("--data", data, *LONG, "--steps", 24, "--out", out) == FINISHED
    assert losses(tmp / name) == pytest.approx(losses(alone), rel=1e-5)


def test_told_to_stop_all_ranks_stop_at_the_same_step_and_lose_none(ran):
    tmp, ends = ran
    assert set(ends["stopped 1"]) == {STOPPED}
    assert [m.step for m in checkpoint.committed(str(tmp / "stopped"))] == [8, 20]
    assert set(ends["stopped 2"]) == {FINISHED}
    # told just before a validation, which is left by all and done first thing after the resume
    lines = [[m for m in result(tmp / name)["metrics"] if m["step"] <= 19] for name in ("stopped", "plain")]
    assert lines[0] == lines[1]


def test_memory_that_ends_on_one_rank_ends_all_with_advice(ran):
    tmp, ends = ran
    *others, last = ends["memory"]
    assert last == (f"out of memory with micro-batch {8 // WORLD} on rank {WORLD - 1}: the same command with --resume and "
                    f"--micro-batch {4 // WORLD} goes on")  # fmt: skip
    assert set(others) == {LOST}
    assert 2 <= checkpoint.committed(str(tmp / "memory"))[-1].step <= 6


def test_a_gradient_that_is_no_number_on_one_rank_is_left_out_by_all(ran):
    tmp, ends = ran
    assert set(ends["nan"]) == {DIVERGED}
    lines = [json.loads(line) for line in (tmp / "nan" / "metrics.jsonl").read_text().splitlines()]
    assert [line["grad_norm"] is None for line in lines] == [False] * 4 + [True] * 3


def test_a_batch_that_cannot_be_shared_out_is_one_line(ran, data, tmp_path):
    _, ends = ran
    assert all(end.startswith(f"--batch 9 over {WORLD} processes: expected a multiple") for end in ends["uneven"])
    flags = ("--data", data, *LONG, "--steps", 2, "--shard", "on", "--out", tmp_path / "out")
    assert "this is one process: start several with torchrun" in error_of(train, *flags)


def test_the_rows_of_all_ranks_are_the_batch():
    for world in (1, 2, 4):
        parts = []
        for rank in range(world):
            one = Ranks()
            one.rank, one.world = rank, world
            parts += range(8)[one.rows(8)]
        assert parts == list(range(8))
    assert ALONE.rows(7) == slice(0, 7)


def test_under_torchrun_a_killed_rank_comes_back_and_a_stop_is_saved(data, tmp_path):
    """kill -9 of one rank, then SIGTERM to torchrun, then the same command: the end is the undisturbed run's, to the bit."""
    flags = ("--data", data, *LONG, "--save-every", 10, "--log-every", 1, "--eval-every", 0)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD),
               "--max-restarts", "3", str(ROOT / "train/run.py"), *map(str, flags), "--steps", "100000", "--out", str(tmp_path / "out")]  # fmt: skip

    def wait_for(step, process):
        path, begin_s = tmp_path / "out" / "metrics.jsonl", time.monotonic()
        while not path.exists() or path.read_text().count('"loss"') < step:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() - begin_s < 300
            time.sleep(0.02)

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(15, process)
        while not checkpoint.committed(str(tmp_path / "out")):  # that of step 10 is on its way
            time.sleep(0.02)
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        assert len(workers) == WORLD
        os.kill(int(workers[1]), signal.SIGKILL)
        begun = checkpoint.committed(str(tmp_path / "out"))[-1].step
        wait_for(begun + 20, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(200) == 1  # torchrun's own, whatever its workers end with
    finally:
        process.terminate()  # after a failure above: it would train for hours
    said = process.stderr.read()
    newest = checkpoint.committed(str(tmp_path / "out"))[-1]
    assert newest.attempt == 2
    events = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "stopped"] == [newest.step]
    assert 1 <= said.count("SIGTERM: saving, then stopping") <= 2  # rank 0 alone speaks, in each start
    jobs = [{"flags": [*flags, "--steps", newest.step + 5, "--out", tmp_path / name]} for name in ("out", "quiet")]
    assert ranks(tmp_path, jobs) == [[FINISHED, FINISHED]] * WORLD
    assert result(tmp_path / "out") == result(tmp_path / "quiet")
