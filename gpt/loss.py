"""The training loss: output projection and cross-entropy in one, a few rows at a time.

Float32 logits of a whole batch are the largest thing in training a small GPT: 16k tokens over 32k ids are 2 GB,
several times over. Here at most CHUNK_LOGITS of them exist; each chunk turns its logits into its share of the loss
and of both gradients at once, so nothing is kept or computed twice (the arrangement of Liger Kernel's
FusedLinearCrossEntropy, arXiv:2410.10989, in plain torch).

Seconds and peak GB over the inputs, forward + backward, 4,096 rows, V = 32,000, 2 CPU cores, torch 2.13.
Best of 3 on a quiet machine, one run each (the seconds of "this" with earlier forms of its loop). Paired repeats on a
busy machine moved the seconds by up to 2.7x, but this stayed ahead of F.cross_entropy in all four columns:

                          C=256 fp32   C=256 bf16   C=768 fp32   C=768 bf16
    F.cross_entropy       2.00  1.55   1.92  1.60   4.75  1.53   3.18  1.56
    this                  1.56  0.33   1.31  0.34   3.87  0.35   2.23  0.50
    checkpointed chunks   2.96  0.62   2.11  0.55   5.50  0.58   3.67  0.56
    torch's own, chunked  2.33  0.18   3.60  0.35   4.69  0.30   6.62  0.62
    compiled: F.c_e       1.33  0.50   0.71  0.26   3.30  0.61   1.88  0.36
    compiled: this        1.42  0.31   0.84  0.23   3.44  0.45   1.80  0.42

Not torch.nn.functional.linear_cross_entropy, although torch 2.13 has it: with bfloat16 inputs it returns a bfloat16
loss (10.19 where the others give 10.52; acc_policy="accurate" too, though that takes only 0.88 s and 1.93 s), it stays
eager inside torch.compile, and torch 2.6 lacks it. F.cross_entropy compiled is about as fast at 4,096 rows (18 %
ahead to 14 % behind), but its logits grow with the rows, and uncompiled it is slower. No GPU was at hand: measure
CHUNK_LOGITS on one.
"""

import torch
from torch import Tensor

from gpt.errors import GPTError

IGNORE_INDEX = -100
MOST_CHUNKS = 16
CHUNK_LOGITS = 2**25  # 1,024 rows of a 32k vocabulary, 128 MiB in float32


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean of F.cross_entropy(x @ weight.T, targets) over the targets that are not -100; 0 where all of them are.

    x: (N, C), weight: (V, C), floating point; targets: (N,) int64. Returns a scalar, float32 (float64 from float64).
    First derivatives only. Under autocast the matmuls run in its dtype; softmax, sums over chunks and the scaling of
    gradients are float32.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or targets.shape != x.shape[:1]:
        raise GPTError(
            f"loss: x {tuple(x.shape)}, weight {tuple(weight.shape)} and targets {tuple(targets.shape)} do not fit: "
            "pass (N, C), (V, C) and (N,)"
        )
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    # No `torch.autocast(enabled=False)` around this: every matmul below has its dtype already, and torch's cache of
    # traced graphs takes none that enters autocast (a warm start of 6 layers then traced for 8 s instead of 3).
    if torch.is_grad_enabled():
        total = _SummedLoss.apply(x, weight, targets, dtype)
    else:
        total, _, _ = _loss_and_grads(x, weight, targets, dtype, grads=False)
    # A plain 0/0 would be NaN where every target is ignored, and one such batch would end a training run.
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


class _SummedLoss(torch.autograd.Function):
    """The sum over rows. The mean's 1/N and a GradScaler's factor arrive in backward, where they multiply float32:
    applied before the float16 matmuls, 1/N alone would push most of the softmax below the smallest float16."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        total, dx, dweight = _loss_and_grads(x, weight, targets, dtype, grads=True)
        ctx.save_for_backward(dx, dweight)
        ctx.dtypes = x.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx, dweight = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        # Not in place: the graph may be walked again (retain_graph).
        return (dx * grad_total).to(x_dtype), (dweight * grad_total).to(weight_dtype), None, None


def _loss_and_grads(
    x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, *, grads: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The summed loss and, if asked for, its gradients (N, C) and (V, C), all at least float32."""
    wide = torch.promote_types(dtype, torch.float32)
    w = weight.to(dtype)
    dweight = torch.zeros(weight.shape, dtype=wide, device=x.device) if grads else None
    total, dx = torch.zeros((), dtype=wide, device=x.device), []
    rows = max(64, CHUNK_LOGITS // weight.shape[0] // 64 * 64)  # whole matmul tiles
    if dtype == torch.float16:
        rows = min(rows, 4096)  # a float16 matmul over more rows can sum past 65,504 for a target that is very common
    # torch.compile unrolls the loop: 128 chunks took it 209 s on a CPU, 4 took 15
    rows = max(rows, -(-x.shape[0] // MOST_CHUNKS))
    for x_rows, target_rows in zip(x.to(dtype).split(rows), targets.split(rows), strict=True):
        loss_rows, dx_rows = _rows_loss_and_grads(x_rows, w, target_rows, dweight)
        total += loss_rows
        dx.append(dx_rows)
    return total, torch.cat(dx) if grads else None, dweight


def _rows_loss_and_grads(x: Tensor, w: Tensor, targets: Tensor, dweight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One chunk's summed loss and dx; adds its share to dweight. A function, so that its logits die before the next."""
    logits = x @ w.T  # (n, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = (targets != IGNORE_INDEX)[:, None].to(logits.dtype)  # (n, 1), 0 or 1
    index = targets.clamp(min=0)[:, None]  # (n, 1)
    logits -= logits.amax(1, keepdim=True)
    at_target = logits.gather(1, index)
    exp = logits.exp_()  # in place: from here on logits are gone
    norm = exp.sum(1, keepdim=True)
    loss = ((norm.log() - at_target) * counted).sum()
    if dweight is None:
        return loss, None
    exp *= counted / norm  # softmax, ...
    dlogits = exp.scatter_add_(1, index, -counted).to(x.dtype)  # ... less one at the target
    dweight += dlogits.T @ x  # float32 sum: in bfloat16 later chunks would be rounded away
    return loss, (dlogits @ w).to(logits.dtype)
