"""Linear layers for one row at a time, which is all that decoding does, on a CPU: as fast as the matrix can be read.

MKL multiplies a single row on one core, whatever the number of threads. A batched product is spread over the cores, so
the matrix is seen as one: of parts of its outputs, or, where it is stored by columns, of its inputs. float32 on two Zen 4
cores, GB/s of weights, each matrix read from memory (reading alone does 30 to 40):

    outputs x inputs             F.linear, by rows   by columns   split, by rows   split, by columns
    2,304 x 768                              12.9         18.5             24.2               29.2
    3,072 x 768                              12.7         20.8             24.5               31.1
    768 x 3,072                              20.2         16.1             29.7               25.6
    32,000 x 768                             13.2         22.6             25.0               46.9
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.model import GPT


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear(x, weight, bias), to rounding; x: (..., in), weight: (out, in). A single float32 row on a CPU is spread over
    the cores, forward only."""
    one = x.numel() == weight.shape[1] and x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    if not one or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.get_num_threads() == 1:
        return F.linear(x, weight, bias)
    out, n = weight.shape[0], torch.get_num_threads()
    if weight.t().is_contiguous():
        parts = _divisor(weight.shape[1], n)
        y = torch.bmm(x.reshape(parts, 1, -1), weight.t().view(parts, -1, out)).sum(0)  # (parts, 1, out) -> (1, out)
    else:
        parts = _divisor(out, n)
        y = torch.bmm(x.reshape(1, 1, -1).expand(parts, 1, -1), weight.view(parts, out // parts, -1).transpose(1, 2))
    y = y.view(*x.shape[:-1], out)
    return y if bias is None else y + bias


class RowLinear(nn.Linear):
    """nn.Linear by the function above."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def lay_out_for_decoding(model: GPT) -> GPT:
    """The same model for decoding with float32 on a CPU, changed in place and returned; any other as it is.

    Matrices that widen are stored by columns, and linear layers do single rows by `linear`.
    """
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32:
            module.__class__ = RowLinear  # as torch.nn.utils.parametrize does: the parameters stay where they are
            if module.out_features > module.in_features:
                module.weight.data = module.weight.data.t().contiguous().t()  # the same shape, other strides
    return model


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n up to `most`."""
    return next(k for k in range(most, 0, -1) if n % k == 0)
