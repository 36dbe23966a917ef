"""What only a GPU can show. Skipped where there is none."""

import pytest
import torch

from gpt.presets import preset
from tests.helpers import train
from train import run
from train.precision import attention_kernel, choose_machine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
SHAPE = (
    "--model",
    "tiny",
    "--block-size",
    64,
    "--batch",
    8,
    "--micro-batch",
    4,
    "--device",
    "cuda",
    "--compile",
    "off",
)


@pytest.mark.parametrize("loss_on", ["all", "assistant"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_in_a_step_the_host_does_not_wait(data, tmp_path, monkeypatch, precision, optimizer, loss_on):
    """torch itself raises at every wait; in the first steps libraries and optimizer set themselves up."""
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    inner, calls = run.train_step, 0

    def train_step(*args, **options):
        nonlocal calls
        calls += 1
        torch.cuda.set_sync_debug_mode("error" if calls > 2 else "default")
        try:
            return inner(*args, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(run, "train_step", train_step)
    flags = ("--steps", 6, "--precision", precision, "--optimizer", optimizer, "--loss-on", loss_on, "--log-every", 6)
    assert train("--data", data, "--out", tmp_path / "out", *SHAPE, *flags) == 0
    assert calls == 6


def test_without_flash_and_cudnn_it_is_the_kernel_that_a_t4_has():
    shape = preset("gpt2_small", vocab_size=32000, block_size=1024)
    with torch.nn.attention.sdpa_kernel(
        [torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION, torch.nn.attention.SDPBackend.MATH]
    ):
        assert attention_kernel(shape, choose_machine("cuda", "fp16", "off")) == "efficient"
