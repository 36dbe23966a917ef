"""The loop as the device sees it: one graph, compiled in the first step, and a host that does not ask in between."""

import functools

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from gpt import loss
from tests.helpers import train
from train import run

SMALL = ["--model", "tiny", "--block-size", "32", "--eval-tokens", "256", "--seed", "3", "--device", "cpu"]


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="--compile on is refused there")
def test_no_graph_break_and_no_recompilation_while_it_evaluates_samples_and_saves(data, tmp_path, monkeypatch):
    # dynamo alone, without inductor's minute: what breaks a graph or has it made anew is dynamo's business
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    inner = run.train_step
    monkeypatch.setattr(
        run, "train_step", lambda *a, **k: (graphs.append(counters["stats"]["unique_graphs"]), inner(*a, **k))[1]
    )
    # 5 sequences in micro-batches of 2: the last is smaller, and is a graph of its own
    train("--data", data, "--out", tmp_path / "run", *SMALL, "--batch", 5, "--micro-batch", 2, "--steps", 9, "--n-layer", 1,
          "--eval-every", 2, "--sample-every", 3, "--save-every", 2, "--log-every", 1, "--compile", "on",
          "--compile-cache", "off", "--precision", "bf16")  # fmt: skip
    assert graphs == [0, *[2] * 8]
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"], counters["graph_break"]


class Reads(TorchDispatchMode):
    """Counts how often a tensor's value is brought to the host: on a GPU each is a wait."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **kwargs or {})


def test_the_loss_reads_nothing_from_a_device_that_is_no_cpu():
    """Reads cannot see into its one operation; a tensor without values cannot be read."""
    logits = torch.empty(8, 97, device="meta")
    index, counted = torch.zeros(8, 1, dtype=torch.int64, device="meta"), torch.ones(8, 1, device="meta")
    assert loss._loss_and_dlogits(logits, index, counted, grads=True).shape == ()
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(logits.min() > 0)


def test_between_log_lines_the_host_reads_nothing_from_the_device(data, tmp_path, monkeypatch):
    seen = []
    inner = run.train_step
    with Reads() as reads:
        monkeypatch.setattr(run, "train_step", lambda *a, **k: (seen.append(reads.count), inner(*a, **k))[1])
        train("--data", data, "--out", tmp_path / "run", *SMALL, "--batch", 4, "--steps", 8, "--log-every", 4,
              "--eval-every", 0, "--sample-every", 0)  # fmt: skip
    assert seen[1] == seen[2] == seen[3] < seen[4] == seen[5] == seen[6] == seen[7]
