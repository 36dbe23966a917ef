"""Steps that are no numbers are left out and counted; too many end the run with a diagnosis and a good checkpoint."""

import json
import math
import os
import random
import signal

import pytest
import torch

from scripts import plot
from tests.helpers import error_of, result, saves_in_time, train
from tests.test_resume import SMALL, train_until_killed
from train import checkpoint, run
from train.guard import LEAST_LOSSES, SMALLEST_SCALE, Guard, first_nonfinite
from train.optim import optimizer_tensors

NAN, INF = math.nan, math.inf


@pytest.fixture
def poison(monkeypatch):
    """`poison({7}, at={7: f})`: gradients of these steps (1 = the first) become NaN; `f(model, optimizer)` after them."""

    def begin(steps, after=lambda step, before, now: None):
        real_rate, real_step, current = run.rate, run.train_step, 0

        def rate(config, step, total):
            nonlocal current
            current = step + 1
            return real_rate(config, step, total)

        def poisoned(model, forward, optimizer, *rest, **named):
            def state():
                return {k: t.clone() for k, t in {**model.state_dict(), **optimizer_tensors(model, optimizer)}.items()}

            if current not in steps:
                return real_step(model, forward, optimizer, *rest, **named)
            before = state()
            handle = model.blocks[1].attn.qkv.weight.register_hook(lambda g: g * NAN)
            try:
                return real_step(model, forward, optimizer, *rest, **named)
            finally:
                handle.remove()
                after(current, before, state())

        monkeypatch.setattr(run, "rate", rate)
        monkeypatch.setattr(run, "train_step", poisoned)

    return begin


def events(out, name):
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [e for e in lines if e["event"] == name]


def test_a_poisoned_step_changes_nothing_and_training_goes_on_also_over_a_resume(
    data, tmp_path, monkeypatch, poison, capsys
):
    flags = ("--data", data, "--steps", 20, "--save-every", 3, "--dropout", 0.1, *SMALL, "--resume")
    changed = []

    def compare(step, before, now):
        changed.extend(k for k in before if not torch.equal(before[k], now[k]))

    poison({6, 7, 13}, compare)
    saves_in_time(monkeypatch)
    assert train(*flags, "--out", tmp_path / "quiet") == 0
    said = capsys.readouterr().err
    assert said.count("left out: loss or gradient not a number") >= 2
    assert sum(e["count"] for e in events(tmp_path / "quiet", "skipped_steps")) == 3
    saved = {e["step"] for e in events(tmp_path / "quiet", "saved")}
    assert saved == {3, 8, 9, 12, 15, 18, 20}  # that of 6 put off until the first good step
    for step in (7, 5, 8):  # dies at 7, between two; at 8, from 3 again; at 11
        train_until_killed(monkeypatch, step, *flags, "--out", tmp_path / "killed")
    assert train(*flags, "--out", tmp_path / "killed") == 0
    assert result(tmp_path / "killed") == result(tmp_path / "quiet")
    assert changed == []
    metrics = [m for m in result(tmp_path / "quiet")["metrics"] if "lr" in m]
    assert [m["step"] for m in metrics if m["grad_norm"] is None] == [6, 7, 13]
    assert [m["step"] for m in metrics] == list(range(1, 21))
    newest = checkpoint.committed(str(tmp_path / "killed"))[-1]
    found = checkpoint.load(str(tmp_path / "killed"), newest)
    assert found.state["guard"] == {"skipped": 3, "in_a_row": 0}
    assert found.tensors["optimizer.safetensors"]["wte.weight/step"] == 17  # 20 less the three
    assert plot.main(["--run", str(tmp_path / "quiet")]) == 0  # whose losses can be null


def finite(out):
    return all(
        first_nonfinite(named) is None
        for manifest in checkpoint.committed(str(out))
        for named in checkpoint.load(str(out), manifest).tensors.values()
    )


def test_too_many_in_a_row_end_the_run_with_a_diagnosis(data, tmp_path, monkeypatch, poison, capsys):
    flags = ("--data", data, "--steps", 100, "--save-every", 2, *SMALL, "--resume", "--out", tmp_path / "out")
    poison(range(12, 101))
    saves_in_time(monkeypatch)
    assert train(*flags) == run.DIVERGED
    error = capsys.readouterr().err.split("error: ")[1].splitlines()
    assert error[0].startswith(
        "the loss or gradient was not a number at 20 steps in a row, up to step 31 (--max-skipped 20)"
    )
    assert "the newest checkpoint is step 10" in error[0]
    assert "lr " in error[1]
    assert "last good step: 11, loss " in error[1]
    assert "weights: finite, the largest " in error[2]
    assert len(error) <= 5
    assert finite(tmp_path / "out")
    assert [e["step"] for e in events(tmp_path / "out", "diverged")] == [31]


def test_the_count_is_part_of_the_state(data, tmp_path, poison, capfd, monkeypatch):
    """Stopped by a signal amid bad steps, the resumed run ends where the uninterrupted one would."""
    flags = ("--data", data, "--steps", 40, *SMALL, "--resume", "--max-skipped", 5, "--log-every", 1)

    def stop_at_8(step, before, now):
        if step == 8 and interrupt:
            os.kill(os.getpid(), signal.SIGTERM)

    interrupt = False
    poison(range(6, 41), stop_at_8)
    assert train(*flags, "--out", tmp_path / "quiet") == run.DIVERGED
    quiet = capfd.readouterr().err.split("error: ")[1].split(";")[0]
    interrupt = True
    assert train(*flags, "--out", tmp_path / "stopped") == 75
    found = checkpoint.load(str(tmp_path / "stopped"), checkpoint.committed(str(tmp_path / "stopped"))[-1])
    assert (found.state["step"], found.state["guard"]) == (8, {"skipped": 3, "in_a_row": 3})
    assert train(*flags, "--out", tmp_path / "stopped") == run.DIVERGED
    assert capfd.readouterr().err.split("error: ")[1].split(";")[0] == quiet


@pytest.mark.parametrize("lr", ["1e30", "1e39"])
def test_a_learning_rate_that_blows_up_leaves_no_bad_checkpoint(data, tmp_path, lr, capsys):
    flags = ("--data", data, "--steps", 30, "--save-every", 1, "--keep", 99, *SMALL, "--resume", "--max-skipped", 6)
    assert train(*flags, "--lr", lr, "--clip", 0, "--warmup", 0, "--out", tmp_path / "out") == run.DIVERGED
    assert finite(tmp_path / "out")
    assert "the last batch again: the first output that is no number is that of" in (
        said := capsys.readouterr().err
    ) or ("is not finite" in said)


def test_weights_that_break_in_the_very_last_step_are_not_saved(data, tmp_path, monkeypatch, capsys):
    real = run.train_step

    def breaking(model, *rest, **named):
        out = real(model, *rest, **named)
        with torch.no_grad():
            model.wpe.weight[3, 2] = INF
        return out

    monkeypatch.setattr(run, "train_step", breaking)
    flags = ("--data", data, "--steps", 1, "--eval-tokens", 1, *SMALL, "--resume", "--out", tmp_path / "out")
    assert train(*flags) == run.DIVERGED
    assert "the last step left wpe.weight not finite" in capsys.readouterr().err
    assert checkpoint.committed(str(tmp_path / "out")) == []


def test_a_save_in_the_background_looks_at_what_it_writes(data, tmp_path, monkeypatch, capsys):
    """Moments that break between two steps: no such checkpoint, and training says so."""
    real, calls = run.state_tensors, 0

    def breaking(*args):
        nonlocal calls
        calls += 1
        parts = real(*args)
        if calls == 1:
            parts["optimizer.safetensors"] = {k: t * NAN for k, t in parts["optimizer.safetensors"].items()}
        return parts

    monkeypatch.setattr(run, "state_tensors", breaking)
    assert train("--data", data, "--steps", 8, "--save-every", 4, *SMALL, "--resume", "--out", tmp_path / "out") == 0
    assert "checkpoint at step 4 failed" in (said := capsys.readouterr().err)
    assert "is not finite" in said
    assert [m.step for m in checkpoint.committed(str(tmp_path / "out"))] == [8]


def test_a_checkpoint_that_is_not_finite_is_refused(data, tmp_path):
    from tests.test_resume import hostile

    flags = ("--data", data, "--steps", 2, *SMALL, "--resume", "--out", tmp_path / "out")
    assert train(*flags) == 0
    hostile(tmp_path / "out", "model.safetensors", lambda t: {**t, "ln_f.bias": t["ln_f.bias"] * NAN})
    assert "ln_f.bias holds what is not a number" in error_of(train, *flags, "--steps", 4)


# ---- the guard by itself --------------------------------------------------------------------------------------------


def test_only_what_is_in_a_row_counts():
    guard = Guard(max_skipped=3)
    assert guard.see([(1, 3.0, 1.0), (2, NAN, NAN), (3, 3.0, INF), (4, 3.0, 1.0), (5, INF, 1.0)], None)
    assert (guard.skipped, guard.in_a_row, guard.fault, guard.last_good) == (3, 1, None, (4, 3.0))
    resumed = Guard(max_skipped=3)
    resumed.load(guard.record())
    for g in (guard, resumed):
        g.see([(6, NAN, NAN), (7, NAN, NAN), (8, 3.0, 1.0)], None)
        assert "3 steps in a row, up to step 7 " in g.fault
    old = Guard(max_skipped=3)
    old.load({})
    assert (old.skipped, old.in_a_row) == (0, 0)


def test_an_fp16_overflow_is_the_scalers_business_until_the_scale_is_nothing():
    guard = Guard(max_skipped=2)
    assert guard.see([(s, 3.0, INF) for s in range(1, 30)], 1024.0) == []
    assert (guard.skipped, guard.fault) == (0, None)
    guard.see([(30, NAN, NAN), (31, 3.0, INF), (32, NAN, NAN)], 512.0)  # a loss that is none is no overflow
    assert "2 steps in a row" in guard.fault
    guard = Guard(max_skipped=2)
    guard.see([(1, 3.0, INF)], SMALLEST_SCALE / 2)
    assert "loss scale fell to" in guard.fault


def test_a_spike_is_one_line_and_healthy_noise_is_none():
    rng = random.Random(1)
    guard = Guard(max_skipped=2)
    rows = [(s, 3 + 7 * math.exp(-s / 200) + rng.gauss(0, 0.05), 1.0) for s in range(1, 5001)]
    assert [w for start in range(0, 5000, 10) for w in guard.see(rows[start : start + 10], None)] == []
    (warning,) = guard.see([(5001, 4.0, 1.0), (5002, 6.5, 9.0)], None)
    assert warning.startswith("loss spike: 6.5000 at step 5002 and 1 more, over 5 sigma above the recent mean 3.")
    assert guard.fault is None
    early = Guard(max_skipped=2)
    assert early.see([(s, 1.0 if s < LEAST_LOSSES else 50.0, 1.0) for s in range(1, LEAST_LOSSES + 1)], None) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_first_nonfinite_finds_it_wherever_it_is(dtype):
    rng = random.Random(3)
    healthy = {
        "ids": torch.arange(9),
        "none": torch.empty(0),
        "scalar": torch.tensor(1.0),
        "most": torch.tensor(torch.finfo(dtype).max, dtype=dtype),
    }
    assert first_nonfinite(healthy) is None
    for size in (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 1000):
        for bad in (NAN, INF, -INF):
            tensor = torch.randn(size).to(dtype)
            tensor[rng.randrange(size)] = bad
            assert first_nonfinite({**healthy, "x": tensor, "later": tensor}) == "x"
