"""Memory that ends costs no step: the same data and random state again, with less at once."""

import gc
import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch

from gpt import sample
from gpt.model import GPT
from gpt.presets import preset
from tests.helpers import ROOT, error_of, result, train
from tests.limited import limit
from tests.test_resume import SMALL, train_until_killed
from train import checkpoint, micro_batch
from train.config import TrainConfig
from train.folder import RunFolder
from train.micro_batch import MicroBatch, is_out_of_memory
from train.optim import optimizer_tensors
from train.parallel import ALONE, Ranks
from train.precision import Machine
from train.state import new_state
from train.step import train_step

CPU = Machine(torch.device("cpu"), torch.float32, False)
TINY = preset("tiny", vocab_size=300, block_size=32, n_embd=32, n_head=2, dropout=0.5)


def losses(out):
    return [m.get("loss", m.get("val_loss")) for m in result(out)["metrics"]]


def events(out, name):
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [e for e in lines if e["event"] == name]


@pytest.fixture(scope="module")
def quiet(data, tmp_path_factory):
    """A run whose memory never ends."""
    out = tmp_path_factory.mktemp("quiet")
    assert train("--data", data, "--steps", 20, "--save-every", 6, *SMALL, "--out", out) == 0
    return out


def test_a_real_process_goes_on_through_the_first_step_a_middle_one_and_a_validation(data, quiet, tmp_path):
    """Sums in another order round differently: each loss is the same to 1e-5, as with any other micro-batch."""
    limits = [[1, 4], [12, 2], [29, 1]]  # 12 is in step 5, 29 in the validation after step 8
    flags = ("--data", data, "--steps", 20, "--save-every", 6, "--out", tmp_path / "limited", *SMALL)
    command = [sys.executable, "-m", "tests.limited", json.dumps(limits), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [e["step"] for e in events(tmp_path / "limited", "out_of_memory")] == [0, 5, 8]
    assert [e["micro_batch"] for e in events(tmp_path / "limited", "out_of_memory")] == [4, 2, 1]
    assert done.stderr.count("from the same step") == 3
    assert losses(tmp_path / "limited") == pytest.approx(losses(quiet), rel=1e-5)
    assert [m["step"] for m in result(tmp_path / "limited")["metrics"] if "lr" in m] == list(range(1, 21))


def test_memory_that_ends_after_a_resume(data, quiet, tmp_path, monkeypatch):
    flags = ("--data", data, "--steps", 20, "--save-every", 6, "--out", tmp_path / "out", "--resume", *SMALL)
    train_until_killed(monkeypatch, 9, *flags)
    limit(monkeypatch, (1, 4), (15, 2))
    assert train(*flags) == 0
    assert [e["step"] for e in events(tmp_path / "out", "out_of_memory")] == [6, 10]
    assert losses(tmp_path / "out") == pytest.approx(losses(quiet), rel=1e-5)


def test_recomputed_activations_are_the_last_resort_and_change_no_bit(data, tmp_path, monkeypatch, capfd):
    """At the same micro-batch nothing is summed in another order: dropout too draws what it would have drawn."""
    flags = ("--data", data, "--steps", 10, "--micro-batch", 1, "--dropout", 0.2, *SMALL)
    assert train(*flags, "--out", tmp_path / "quiet") == 0
    limited = limit(monkeypatch, (30, 0))
    assert train(*flags, "--out", tmp_path / "limited") == 0
    assert limited.refused == 1
    assert result(tmp_path / "limited") == result(tmp_path / "quiet")
    warned = (
        "out of memory with micro-batch 1: goes on with micro-batch 1 and activations recomputed from the same step"
    )
    assert warned in capfd.readouterr().err


def _raise(error):
    raise error


def test_memory_that_ends_while_gradients_are_clipped_in_fp16(tmp_path, monkeypatch):
    """There the scaler has divided them already, which it does once a step."""
    machine = Machine(torch.device("cpu"), torch.float16, False)
    ids = torch.randint(300, (4, 33), generator=torch.manual_seed(1))
    weights = []
    for fails in (False, True):
        folder = RunFolder(str(tmp_path / str(fails)))
        torch.manual_seed(1)
        state = new_state(TrainConfig(batch=4, lr=1e-3), replace(TINY, dropout=0.0), machine)
        micro = MicroBatch(TrainConfig(batch=4, micro_batch=4), state, machine, folder)
        clip = torch.nn.utils.clip_grad_norm_
        errors = [torch.OutOfMemoryError("CUDA out of memory.")] * fails
        monkeypatch.setattr(
            torch.nn.utils, "clip_grad_norm_", lambda *a, e=errors, c=clip: _raise(e.pop()) if e else c(*a)
        )
        for _ in range(2):
            train_step_of = (state.model, state.model, state.optimizer, state.scaler, ids)
            micro.run(train_step, *train_step_of, lr=1e-3, clip=1.0, machine=machine, stop=lambda: False)
        monkeypatch.undo()
        assert micro.size == (2 if fails else 4)
        weights.append(torch.cat([p.detach().flatten() for p in state.model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-2, atol=1e-3)


def test_no_memory_for_samples_ends_no_run(data, tmp_path, monkeypatch, capfd):
    def fails(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(sample, "generate", fails)
    assert train("--data", data, "--steps", 4, *SMALL, "--sample-every", 2, "--out", tmp_path / "out") == 0
    assert capfd.readouterr().err.count("training goes on without them") == 2


def test_where_nothing_helps_one_line_says_so_and_no_step_is_lost(data, quiet, tmp_path, monkeypatch):
    flags = ("--data", data, "--steps", 20, "--save-every", 6, "--out", tmp_path / "out", "--resume", *SMALL)
    with monkeypatch.context() as m:
        limit(m, (16, -1))
        message = error_of(train, *flags)
    assert message.startswith(
        "out of memory on cpu with micro-batch 1 and activations recomputed: give a smaller --model"
    )
    lost = checkpoint.committed(str(tmp_path / "out"))[-1].step
    assert lost == 13  # the validation after step 8 made two calls
    assert train(*flags) == 0
    assert losses(tmp_path / "out") == pytest.approx(losses(quiet), rel=1e-5)


def test_told_not_to_recompute_it_does_not(data, tmp_path, monkeypatch):
    limited = limit(monkeypatch, (1, 0))
    flags = ("--data", data, "--steps", 2, "--checkpoint-activations", "off", "--out", tmp_path / "out", *SMALL)
    assert "give --checkpoint-activations on, a smaller --model" in error_of(train, *flags)
    assert limited.refused == 4  # 8, 4, 2, 1


# ---- trying sizes, as on a GPU --------------------------------------------------------------------------------------


@pytest.fixture
def tries(monkeypatch):
    monkeypatch.setattr(micro_batch, "can_try", lambda machine: True)


def fitted(tmp_path, batch=24, ranks=ALONE, **changes):
    """A MicroBatch, and the state it was found with, trained for no step yet."""
    torch.manual_seed(1)
    config = TrainConfig(lr=1e-3, batch=batch, block_size=32, cache=str(tmp_path / "cache"), **changes)
    state = new_state(config, TINY, CPU)
    return MicroBatch(config, state, CPU, RunFolder(str(tmp_path / "out")), ranks), state


@pytest.mark.parametrize(("rows", "size", "recompute"), [(99, 24, False), (11, 8, False), (1, 1, False), (0, 24, True)])
def test_the_largest_that_fits_is_found_and_kept_for_the_next_start(
    tmp_path, monkeypatch, tries, rows, size, recompute
):  # fmt: skip
    limited = limit(monkeypatch, (1, rows))
    micro, state = fitted(tmp_path)
    assert (micro.size, state.model.recompute) == (size, recompute)
    calls = limited.calls
    again, state = fitted(tmp_path)
    assert (again.size, state.model.recompute, limited.calls) == (size, recompute, calls)
    assert fitted(tmp_path, batch=36)[0].size == (36 if rows in (0, 99) else {11: 9, 1: 1}[rows])  # tried anew


def test_trying_leaves_weights_moments_and_random_state_to_the_bit(tmp_path, monkeypatch, tries):
    torch.manual_seed(1)
    fresh = new_state(TrainConfig(lr=1e-3), TINY, CPU)
    rng = torch.get_rng_state()
    limit(monkeypatch, (1, 4))
    _, state = fitted(tmp_path)
    assert torch.equal(rng, torch.get_rng_state())
    ours, theirs = ({**s.model.state_dict(), **optimizer_tensors(s.model, s.optimizer)} for s in (state, fresh))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert all(p.grad is None for p in state.model.parameters())


def test_nothing_fits_at_the_start(tmp_path, monkeypatch, tries):
    limit(monkeypatch, (1, -1))
    assert "with micro-batch 1 and activations recomputed: give" in error_of(fitted, tmp_path)


def test_a_note_is_believed_only_as_far_as_it_makes_sense(tmp_path, tries):
    micro, _ = fitted(tmp_path)
    for note in (b"", b"[]", b'{"micro_batch": 0, "recompute": false}', b'{"micro_batch": "x", "recompute": 1}'):
        micro.note.write_bytes(note)
        assert fitted(tmp_path)[0].size == 24
    micro.note.write_bytes(b'{"micro_batch": 1, "recompute": true}')
    assert fitted(tmp_path, checkpoint_activations="off")[0].size == 24


def test_where_the_state_is_sharded_sizes_are_estimated(tmp_path, monkeypatch, tries):
    """A rank that runs out of memory in a try would leave the others waiting for it."""

    class Sharded(Ranks):
        world, sharded = 4, True

    limited, found = limit(monkeypatch, (1, 0)), []
    for memory in (2**40, 10**6, 2**10):
        monkeypatch.setattr(Machine, "memory_bytes", lambda self, memory=memory: memory)
        micro, state = fitted(tmp_path, ranks=Sharded())
        found.append((micro.size, state.model.recompute))
    assert found[0] == (6, False)  # 24 over four ranks
    assert found[1] == (3, False)
    assert found[2] == (1, True)
    assert limited.calls == 0


# ---- what a failed try leaves behind ----------------------------------------------------------------------------------


def test_no_tensor_of_a_failed_try_is_alive_at_the_next(tmp_path):
    micro, _ = fitted(tmp_path, micro_batch=8)
    left = []

    def action(*, micro_batch):
        assert not any(ref() is not None for ref in left)
        activations = torch.zeros(micro_batch, 1000)
        left.append(weakref.ref(activations))
        if micro_batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return micro_batch

    gc.disable()  # the exception alone must not keep them: a cycle that Python would find later is found too late
    try:
        assert micro.run(action) == 2
    finally:
        gc.enable()
    assert len(left) == 3


def test_other_errors_are_not_memorys(tmp_path):
    micro, _ = fitted(tmp_path)
    with pytest.raises(RuntimeError, match="shapes"):
        micro.run(lambda *, micro_batch: exec("raise RuntimeError('shapes differ')"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_gradients_of_recomputed_blocks_are_those_of_kept_ones():
    grads = []
    for recompute in (False, True):
        torch.manual_seed(3)
        model = GPT(TINY)
        model.recompute = recompute
        model(torch.arange(64).view(2, 32), torch.arange(64).view(2, 32)).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
