"""What a run will take, by arithmetic alone: parameters, memory, FLOPs, time and money. Nothing is allocated or read."""

import functools
from dataclasses import dataclass

from gpt.loss import CHUNK_LOGITS
from gpt.model import GPTConfig, flops_per_token, parameter_table
from train.config import AUTO
from train.micro_batch import MOST_TOKENS, divisors
from train.prices import Gpu

count_by_part = functools.lru_cache(parameter_table)  # builds the model without memory: seconds for a deep one
USABLE = 0.9  # of a GPU's memory: the rest is the driver's, the context's, and lost between blocks


@dataclass(frozen=True)
class Memory:
    """Bytes on the device while training, by what they are for. An upper bound: torch.compile keeps fewer activations."""

    weights: int  # fp32
    copies: int  # of the weights in 16 bits, which autocast makes for the matmuls
    gradients: int  # fp32
    moments: int  # the optimizer's
    activations: int  # of one micro-batch, kept for the backward pass
    loss: int  # logits of one chunk, and the head's gradient beside the one it is added to
    undo: int  # what Muon's step would be taken back from, on a GPU: it lives when activations are gone

    @property
    def total(self) -> int:
        return self.weights + self.copies + self.gradients + self.moments + max(self.activations + self.loss, self.undo)


def memory(shape: GPTConfig, *, precision: str, micro_batch: int, optimizer: str, recompute: bool = False) -> Memory:
    """What training that shape holds at once, with `micro_batch` sequences going through the model."""
    table = count_by_part(shape)
    n, inside = sum(table.values()), table["attn"] + table["mlp"]
    half = 4 if precision == "fp32" else 2
    tokens = micro_batch * shape.block_size
    layers = tokens * activation_bytes(shape, half)
    kept = layers + shape.n_layer * tokens * 4 * shape.n_embd if recompute else shape.n_layer * layers
    head = shape.vocab_size * shape.n_embd
    return Memory(
        weights=4 * n,
        copies=0 if half == 4 else 2 * inside,
        gradients=4 * n,
        moments=8 * n - (4 * inside if optimizer == "muon" else 0),
        # after the last layer: its norm's input, and the loss's gradient (twice, while it is scaled)
        activations=kept + tokens * (16 if shape.modern else 12) * shape.n_embd,
        loss=chunk_bytes(shape.vocab_size, tokens, half) + head * (4 + (half if half == 2 else 0)),
        undo=8 * inside if optimizer == "muon" else 0,
    )


def activation_bytes(shape: GPTConfig, half: int) -> int:
    """Bytes that one layer keeps per token for its backward pass; `half` is the size of the matmuls' numbers.

    The residual stream and the norms' inputs are fp32, what matmuls read is `half`. Counted from what autograd saves
    (tests/test_estimate.py does so again); Korthikanti et al. 2022 have 34 bytes per width for a 16-bit stream.
    """
    width, inner, heads = shape.n_embd, shape.ff_width, shape.n_head
    if (
        shape.modern
    ):  # norms and rotations in plain torch keep their steps; the MLP keeps gate, its silu, up and product
        return (44 + 3 * half) * width + 4 * half * inner + 12 * heads
    return (8 + 6 * half) * width + 2 * half * inner + 4 * heads


def chunk_bytes(vocab_size: int, tokens: int, half: int) -> int:
    """The logits that exist at once in gpt/loss.py: a chunk in the matmuls' format, and its softmax in fp32."""
    rows = max(64, CHUNK_LOGITS // vocab_size // 64 * 64)
    return min(rows, tokens) * vocab_size * (4 + half)


def checkpoint_bytes(shape: GPTConfig, optimizer: str) -> int:
    """What one checkpoint takes: weights and moments in fp32."""
    held = memory(shape, precision="fp32", micro_batch=1, optimizer=optimizer)
    return held.weights + held.moments


def run_flops(shape: GPTConfig, tokens: int, *, recompute: bool = False) -> float:
    """FLOPs of training on that many tokens, forward and backward; recomputing activations costs another forward."""
    return flops_per_token(shape) * tokens * (4 / 3 if recompute else 1.0)


@dataclass(frozen=True)
class Forecast:
    """A run on one kind of GPU. `micro_batch` None: not even one sequence fits there."""

    gpu: Gpu
    micro_batch: int | None
    recompute: bool
    bytes: int
    seconds: float
    money: float

    def tokens_per_s(self, tokens: int) -> float:
        """The rate that the assumed MFU comes to."""
        return tokens / self.seconds


def largest_micro_batch(
    shape: GPTConfig, gpu: Gpu, *, batch: int, optimizer: str, recompute: str = AUTO
) -> tuple[int, bool] | None:
    """(sequences at once, whether activations are recomputed) that should fit; None where nothing does.

    `recompute` is --checkpoint-activations: auto, on or off.
    """
    for again in {AUTO: (False, True), "on": (True,), "off": (False,)}[recompute]:
        for m in divisors(batch, MOST_TOKENS // shape.block_size):
            held = memory(shape, precision=gpu.precision, micro_batch=m, optimizer=optimizer, recompute=again)
            if held.total <= USABLE * gpu.memory:
                return m, again
    return None


def forecast(
    shape: GPTConfig,
    gpu: Gpu,
    *,
    batch: int,
    tokens: int,
    optimizer: str,
    recompute: str = AUTO,
    price_per_hour: float | None = None,
) -> Forecast:
    """Time and money of training on `tokens` there, at the assumed MFU and the largest micro-batch that should fit."""
    fits = largest_micro_batch(shape, gpu, batch=batch, optimizer=optimizer, recompute=recompute)
    size, again = fits or (1, recompute != "off")
    held = memory(shape, precision=gpu.precision, micro_batch=size, optimizer=optimizer, recompute=again)
    seconds = run_flops(shape, tokens, recompute=again) / (gpu.peak_flops * gpu.mfu)
    price = gpu.price_per_hour if price_per_hour is None else price_per_hour
    return Forecast(gpu, size if fits else None, again, held.total, seconds, price * seconds / 3600)
