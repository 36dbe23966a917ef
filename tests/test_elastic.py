"""A run goes on elsewhere: the same batches in the same order, and one line says what is not the same to the bit."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import error_of, result, train
from tests.test_resume import SMALL, hostile, train_until_killed
from train import checkpoint, run
from train.elastic import moved
from train.optim import optimizer_tensors
from train.precision import Machine

A100 = {"name": "NVIDIA A100-SXM4-40GB", "device": "cuda", "precision": "bf16", "micro_batch": 32, "compile": True,
        "threads": 6, "torch": "2.11.0+cu128"}  # fmt: skip
T4 = {**A100, "name": "Tesla T4", "precision": "fp16", "micro_batch": 4, "threads": 1}
CPU = {**A100, "name": "cpu", "device": "cpu", "precision": "fp32", "compile": False, "threads": 2}


def test_the_line_names_what_differs_and_only_that():
    assert moved(A100, A100, dropout=True) is None
    assert moved(A100, {**A100, "threads": 2}, dropout=True) is None  # the GPU does the sums
    assert moved(A100, T4, dropout=False) == (
        "goes on from NVIDIA A100-SXM4-40GB in bf16, micro-batch 32, here Tesla T4 in fp16, micro-batch 4: "
        "the same batches in the same order, results equal to rounding"
    )
    line = moved(A100, CPU, dropout=True)
    assert "compiled, here cpu in fp32, not compiled: " in line
    assert line.endswith("; dropout draws other numbers")
    assert "2 threads, here cpu in fp32, 3 threads" in moved(CPU, {**CPU, "threads": 3}, dropout=True)
    assert "torch 2.6.0" in moved({**A100, "torch": "2.6.0"}, A100, dropout=False)


@pytest.mark.parametrize("then", [{}, {"threads": "9", "name": None, "other": 1}])
def test_what_an_older_program_did_not_note_counts_as_the_same(then):
    assert moved(then, CPU, dropout=True) is None


def test_a_hostile_name_does_not_reach_the_terminal():
    line = moved({**A100, "name": "\x1b[2J\n" + "x" * 999}, CPU, dropout=False)
    assert line.isprintable()
    assert len(line) < 300


def as_fp16(device, precision, compile):
    """A machine whose GPU needs a loss scaler; its arithmetic runs on this CPU too, slowly."""
    return Machine(torch.device("cpu"), torch.float16, False)


def steps(out):
    return [m for m in result(out)["metrics"] if "lr" in m]


def state_of(out):
    return checkpoint.load(str(out), checkpoint.committed(str(out))[-1]).state


def test_on_an_a100_then_a_t4_then_a_cpu_with_another_micro_batch_each_time(data, tmp_path, monkeypatch, capsys):
    """bf16 -> fp16 with a fresh scaler -> fp32 -> bf16: each step's data are the uninterrupted run's, and so is its loss."""
    flags = ("--data", data, "--steps", 24, "--save-every", 6, *SMALL, "--resume")
    assert train(*flags, "--out", tmp_path / "quiet") == 0
    moving, capsys_out = (*flags, "--out", tmp_path / "moving"), capsys.readouterr
    with monkeypatch.context() as m:
        m.setattr(Machine, "name", property(lambda self: "NVIDIA A100-SXM4-40GB"))
        train_until_killed(m, 8, *moving, "--precision", "bf16", "--micro-batch", 8)
    assert state_of(tmp_path / "moving")["scaler"] == {}
    assert "goes on from" not in capsys_out().out
    with monkeypatch.context() as m:
        m.setattr(run, "choose_machine", as_fp16)
        m.setattr(Machine, "name", property(lambda self: "Tesla T4"))
        train_until_killed(m, 8, *moving, "--micro-batch", 2)
    said = capsys_out().out
    assert (
        "goes on from NVIDIA A100-SXM4-40GB in bf16, micro-batch 8, here Tesla T4 in fp16, micro-batch 2: the same"
        in said
    )
    assert state_of(tmp_path / "moving")["scaler"]["_growth_tracker"] == 6  # begun anew at step 6
    train_until_killed(monkeypatch, 8, *moving, "--precision", "fp32", "--micro-batch", 3)
    assert "goes on from Tesla T4 in fp16, micro-batch 2, here cpu in fp32, micro-batch 3: the same" in capsys_out().out
    assert train(*moving, "--precision", "bf16") == 0
    assert "goes on from cpu in fp32, micro-batch 3, here cpu in bf16, micro-batch 8: the same" in capsys_out().out
    quiet, moved_ = steps(tmp_path / "quiet"), steps(tmp_path / "moving")
    assert [(m["step"], m["lr"]) for m in moved_] == [(m["step"], m["lr"]) for m in quiet]
    assert [m["loss"] for m in moved_] == pytest.approx([m["loss"] for m in quiet], rel=0.005)
    neighbours = [abs(a["loss"] - b["loss"]) / a["loss"] for a, b in itertools.pairwise(quiet)]
    assert max(neighbours) > 0.005  # so that other batches would be seen


def test_another_number_of_threads_is_said_and_equal_to_rounding(data, tmp_path, monkeypatch, capsys):
    flags = ("--data", data, "--steps", 12, "--save-every", 6, *SMALL, "--resume")
    assert train(*flags, "--out", tmp_path / "quiet") == 0
    train_until_killed(monkeypatch, 8, *flags, "--out", tmp_path / "moved")
    capsys.readouterr()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert train(*flags, "--out", tmp_path / "moved") == 0
    finally:
        torch.set_num_threads(threads)
    assert f"{threads} threads, here cpu in fp32, {threads + 1} threads: the same batches" in capsys.readouterr().out
    losses = [[m["loss"] for m in steps(tmp_path / name)] for name in ("quiet", "moved")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("overflow", [False, True])
def test_a_loss_scale_in_mid_growth_is_taken_up_where_it_was(data, tmp_path, monkeypatch, overflow):
    """fp16: the scale doubles every 10 good steps; kills fall between two doublings, and one after an overflow halved it."""

    def scaler(self):
        return torch.amp.GradScaler("cpu", init_scale=2.0**24 if overflow else 2.0**10, growth_interval=10)

    monkeypatch.setattr(run, "choose_machine", as_fp16)
    monkeypatch.setattr(Machine, "grad_scaler", scaler)
    flags = ("--data", data, "--steps", 40, "--save-every", 7, "--dropout", 0.1, *SMALL, "--resume")
    assert train(*flags, "--out", tmp_path / "quiet") == 0
    trackers = []
    for step in (9, 13, 10):
        train_until_killed(monkeypatch, step, *flags, "--out", tmp_path / "killed")
        trackers.append(state_of(tmp_path / "killed")["scaler"]["_growth_tracker"])
    assert any(trackers)
    assert train(*flags, "--out", tmp_path / "killed") == 0
    assert result(tmp_path / "killed") == result(tmp_path / "quiet")
    assert state_of(tmp_path / "killed")["scaler"] == state_of(tmp_path / "quiet")["scaler"]
    assert state_of(tmp_path / "quiet")["guard"]["skipped"] == 0  # overflows are no faults
    scales = state_of(tmp_path / "quiet")["scaler"]["scale"]
    assert scales < 2.0**24 if overflow else scales == 2.0**14


@pytest.mark.parametrize(
    ("field", "value"),
    [("scaler", {"scale": "big"}), ("guard", {"skipped": "many"}), ("guard", [1]), ("machine", "T4"), ("scaler", {"scale": 1.0})],
)  # fmt: skip
def test_hostile_fields_are_one_line(data, tmp_path, monkeypatch, field, value):
    flags = ("--data", data, "--steps", 2, *SMALL, "--resume", "--out", tmp_path / "out")
    monkeypatch.setattr(run, "choose_machine", as_fp16)
    assert train(*flags) == 0
    hostile(tmp_path / "out", "state.json", lambda s: {**s, field: value})
    error_of(train, *flags, "--steps", 4)


# ---- what the first program wrote -----------------------------------------------------------------------------------

FIRST = Path(__file__).parent / "first_checkpoint"  # make.py there says how


def test_the_first_programs_checkpoint_still_loads_and_trains_on(tmp_path, monkeypatch, capsys):
    shutil.copytree(FIRST, tmp_path / "first")
    place = ("--data", tmp_path / "first" / "data", "--out", tmp_path / "first" / "out", "--device", "cpu", "--resume")
    real, seen = run.train, {}

    def looking(config, state, *rest):
        seen["model"] = {k: t.clone() for k, t in state.model.state_dict().items()}
        seen["optimizer"] = {k: t.clone() for k, t in optimizer_tensors(state.model, state.optimizer).items()}
        seen["rng"] = torch.get_rng_state()
        seen["step"] = state.step
        return real(config, state, *rest)

    monkeypatch.setattr(run, "train", looking)
    assert train(*place) == 0
    assert seen["step"] == 2
    for part in ("model", "optimizer"):
        stored = load_file(FIRST / "out" / "step-00000002" / f"{part}.safetensors")
        assert seen[part].keys() == stored.keys()
        assert all(torch.equal(seen[part][k], t) for k, t in stored.items())
    assert torch.equal(seen["rng"], load_file(FIRST / "out" / "step-00000002" / "rng.safetensors")["cpu"])
    assert "goes on from step 2" in (said := capsys.readouterr().out)
    assert "goes on from cpu" not in said
    losses = [m["loss"] for m in steps(tmp_path / "first" / "out")]
    assert losses == pytest.approx(
        json.loads((FIRST / "losses.json").read_text()), rel=0.01
    )  # other torch: 0.1 %; a step off: 2 %
