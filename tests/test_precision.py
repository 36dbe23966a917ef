"""What is said of the machine is what the machine does."""

import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from cli import flags
from gpt.model import GPT, GPTConfig
from scripts import bench_train
from tests.helpers import train
from tests.test_train import QUICK
from train.precision import attention_kernel, choose_machine

KERNELS = [(SDPBackend.FLASH_ATTENTION, "flash"), (SDPBackend.MATH, "math")]


class Seen(TorchDispatchMode):
    """The names of all operations that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("allowed", "name"), KERNELS)
def test_the_attention_kernel_named_is_the_one_that_runs(data, tmp_path, capsys, allowed, name):
    machine = choose_machine("cpu", "fp32", "off")
    shape = GPTConfig(vocab_size=50, block_size=16, n_layer=1, n_head=2, n_embd=32)
    model = GPT(shape)
    with sdpa_kernel(allowed):
        assert attention_kernel(shape, machine) == name
        with Seen() as seen:
            model(torch.zeros(1, 16, dtype=torch.long))
        assert train("--data", data, "--out", tmp_path / "out", *QUICK) == 0
    assert any("flash_attention" in op for op in seen.names) == (name == "flash")
    assert any("softmax" in op for op in seen.names) == (name == "math")
    assert re.search(rf"^machine    cpu, fp32, .*, attention {name}, ", capsys.readouterr().out, re.M)


@pytest.mark.parametrize(("given", "name"), [((), "flash"), (("--no-flash",), "math")])
def test_bench_train_without_flash_attention(monkeypatch, given, name):
    named = []
    monkeypatch.setattr(bench_train, "Turns", lambda *facts: facts[-1])
    monkeypatch.setattr(bench_train, "ours", lambda args, machine, attention: named.append(attention))
    argv = ["--role", "ours-eager", "--device", "cpu", "--precision", "fp32", "--model", "tiny", *given]
    try:
        bench_train.contestant(flags.parse(bench_train.BenchFlags, argv, prog="bench_train.py", description="")[0])
        with Seen() as seen:
            GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=1, n_head=2, n_embd=32))(
                torch.zeros(1, 16, dtype=torch.long)
            )
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    assert named == [name]
    assert any("flash_attention" in op for op in seen.names) == (name == "flash")
