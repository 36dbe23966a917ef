"""The training loss: output projection and cross-entropy in one, a few rows at a time.

Float32 logits of a whole batch are the largest thing in training a small GPT: 16k tokens over 32k ids are 2 GB,
several times over. Here CHUNK_LOGITS of them exist at most, in the matmuls' format; each chunk turns its logits into its
share of the loss and of both gradients at once, so nothing is kept or computed twice (the arrangement of Liger Kernel's
FusedLinearCrossEntropy, arXiv:2410.10989, in plain torch).

On a CPU the time that is not matmuls was spent on memory: each pass over a chunk went to RAM, and each fresh buffer of
more than 32 MB is zeroed page by page by the kernel. So the chunk's logits have one buffer, which their gradients
overwrite, and softmax works on tiles of it. 4,096 rows, C = 256, V = 32,000, forward and backward on one core, seconds
(scripts/bench_train.py has whole steps):

                                            bf16   fp32
    the three matmuls alone                 0.98   2.05
    this                                    1.25   2.45
    in plain operations on whole chunks     1.88   2.63

Not torch.nn.functional.linear_cross_entropy, although torch 2.13 has it: with bfloat16 inputs it returns a bfloat16
loss (10.19 where the others give 10.52; acc_policy="accurate" too), in float32 it is slower than F.cross_entropy on a
CPU, and torch 2.6 lacks it. No GPU was at hand: measure CHUNK_LOGITS on one.
"""

import torch
from torch import Tensor

from gpt.errors import GPTError

IGNORE_INDEX = -100
CHUNK_LOGITS = 2**25  # 1,024 rows of a 32k vocabulary: 64 MiB in bfloat16; a CPU takes three quarters of it
RARE = 1e-30  # a share whose logarithm float32 still has to all its digits; asking costs a GPU a wait, and saves a CPU two passes
TILE_LOGITS = 2**21  # 8 MiB in float32: what a CPU's cache still holds from one operation to the next


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
    total, _, _ = summed_loss(x, weight, targets, dtype, torch.is_grad_enabled())
    # A plain 0/0 would be NaN where every target is ignored, and one such batch would end a training run.
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


@torch.library.custom_op("perennial::summed_loss", mutates_args=())
def summed_loss(
    x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, grads: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss summed over rows and, if asked for, its gradients (N, C) and (V, C), all at least float32.

    One operation to torch.compile: unrolled and fused by it, the loop below was slower on a CPU (1.1x at 4,096 rows) and
    took 15 s to compile with 4 chunks, 209 s with 128.
    """
    wide = torch.promote_types(dtype, torch.float32)
    x, w, index = x.to(dtype), weight.to(dtype), targets.clamp(min=0)[:, None]  # (N, 1)
    counted = (targets != IGNORE_INDEX)[:, None].to(wide)  # (N, 1), 0 or 1
    total = torch.zeros((), dtype=wide, device=x.device)
    dx = torch.empty(x.shape if grads else 0, dtype=wide, device=x.device)
    dweight = torch.zeros(weight.shape if grads else 0, dtype=wide, device=x.device)
    most = CHUNK_LOGITS * 3 // 4 if x.device.type == "cpu" else CHUNK_LOGITS
    rows = max(64, most // len(w) // 64 * 64)  # whole matmul tiles
    if dtype == torch.float16:
        rows = min(rows, 4096)  # a float16 matmul over more rows can sum past 65,504 for a target that is very common
    buffer = torch.empty(min(rows, len(x)), len(w), dtype=dtype, device=x.device)  # a fresh one each time cost 30 %
    for begin in range(0, len(x), rows):
        part = slice(begin, begin + rows)
        logits = torch.mm(x[part], w.T, out=buffer[: len(x[part])])  # (n, V)
        total += _loss_and_dlogits(logits, index[part], counted[part], grads=grads)
        if grads:
            _add_product(dweight, logits.T, x[part] * counted[part].to(dtype))
            dx[part] = (logits @ w) * counted[part]
    return total, dx, dweight


def _loss_and_dlogits(logits: Tensor, index: Tensor, counted: Tensor, *, grads: bool) -> Tensor:
    """The summed loss of the rows counted; `logits` (n, V) become its derivative by them, were all rows counted."""
    wide, total = counted.dtype, torch.zeros((), dtype=counted.dtype, device=logits.device)
    on_cpu = logits.device.type == "cpu"
    tile = max(1, TILE_LOGITS // logits.shape[1]) if on_cpu else len(logits)
    for rows, target, mask in zip(logits.split(tile), index.split(tile), counted.split(tile), strict=True):
        softmax = torch.softmax(rows, 1, dtype=wide)
        share = softmax.gather(1, target)
        if on_cpu and share.min() > RARE:
            total -= (share.log() * mask).sum()
        else:  # log(softmax at the target) without the underflow of one that is very unlikely: the best id's share is not
            best = rows.amax(1, keepdim=True).to(wide)
            total += ((best - rows.gather(1, target).to(wide) - softmax.amax(1, keepdim=True).log()) * mask).sum()
        if grads:
            rows.copy_(softmax.scatter_(1, target, share - 1))
    return total


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in total's own dtype: in bfloat16 later chunks would be rounded away."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


@summed_loss.register_fake
def _(x, weight, targets, dtype, grads):
    wide = torch.promote_types(dtype, torch.float32)
    shapes = ((), x.shape if grads else (0,), weight.shape if grads else (0,))
    return tuple(torch.empty(shape, dtype=wide, device=x.device) for shape in shapes)


def _keep_gradients(ctx, inputs, output) -> None:
    _, dx, dweight = output
    ctx.set_materialize_grads(False)  # nothing depends on the two gradients that the operation returns
    ctx.save_for_backward(dx, dweight)
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype


def _scale_gradients(ctx, grad_total, *_):
    """The mean's 1/N and a GradScaler's factor arrive here, where they multiply float32: applied before the float16
    matmuls, 1/N alone would push most of the softmax below the smallest float16."""
    dx, dweight = ctx.saved_tensors
    x_dtype, weight_dtype = ctx.dtypes
    # Not in place: the graph may be walked again (retain_graph).
    return (dx * grad_total).to(x_dtype), (dweight * grad_total).to(weight_dtype), None, None, None


summed_loss.register_autograd(_scale_gradients, setup_context=_keep_gradients)
