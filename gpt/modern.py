"""What arch="modern" puts in the place of GPT-2's parts; with nn.RMSNorm and without biases it is transformers' Qwen3.

Rotary positions (Su et al., arXiv:2104.09864), normalised queries and keys (Henry et al., arXiv:2010.04245) and SwiGLU
(Shazeer, arXiv:2002.05202), in the arrangement of Qwen3ForCausalLM, so that weights need only be renamed.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from gpt.model import GPTConfig

ROTARY_BASE = 10_000.0
NORM_EPS = 1e-6  # Qwen3's

Rotation = tuple[Tensor, Tensor]  # cosines and sines


def rotation(positions: Tensor, width: int) -> Rotation:
    """Cosines and sines, float32 (…, T, 1, width / 2), of the angles at positions (…, T).

    Made anew in each forward pass, once for all layers: a table would be a buffer to allocate, move and keep in step.
    """
    frequencies = ROTARY_BASE ** (torch.arange(0, width, 2, device=positions.device) / -width)  # (width / 2,)
    angles = (positions[..., None] * frequencies)[..., None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: Rotation) -> Tensor:
    """Turn each pair (x[i], x[i + D / 2]) of (B, T, H, D) by its position's i-th angle."""
    cos, sin = (t.to(x.dtype) for t in angles)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class QKNorm(nn.Module):
    """RMSNorm of every query and key over its head, with one gain for queries and one for keys.

    Not of both at once: a gain that broadcasts over heads took a CPU's backward pass 13 ms where this takes 6.
    """

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.q, self.k = (nn.Parameter(torch.ones(head_width)) for _ in range(2))

    def reset_parameters(self) -> None:
        """Gains of one."""
        for gain in (self.q, self.k):
            nn.init.ones_(gain)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Both (…, D)."""
        q, k = (F.rms_norm(x, gain.shape, gain.to(x.dtype), NORM_EPS) for x, gain in ((q, self.q), (k, self.k)))
        return q, k


class GatedMLP(nn.Module):
    """SwiGLU: the position-wise feed-forward layer, one half of it gating the other."""

    def __init__(self, config: "GPTConfig") -> None:
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.ff_width, bias=False)
        self.up = nn.Linear(config.n_embd, config.ff_width, bias=False)
        self.down = nn.Linear(config.ff_width, config.n_embd, bias=False)
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual_dropout(self.down(F.silu(self.gate(x)) * self.up(x)))
