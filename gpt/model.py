"""A GPT decoder: the config that describes it and the module that computes it."""

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gpt.errors import GPTError
from gpt.loss import linear_cross_entropy
from gpt.modern import NORM_EPS, GatedMLP, QKNorm, Rotation, rotate, rotation

if TYPE_CHECKING:
    from gpt.cache import KVCache

ARCHS = ("gpt2", "modern")
INIT_STD = 0.02


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model; the defaults are GPT-2 small with a 32k vocabulary. Wrong values raise GPTError.

    arch="gpt2": Radford et al. 2019. arch="modern": the parts of gpt/modern.py, which have no biases.
    bias=False removes every bias of linear layers and LayerNorms; qkv_bias=False only that of the attention input.
    """

    vocab_size: int = 32000
    block_size: int = 512
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_ff: int | None = None  # width of the MLP; None means 4 * n_embd, or a gated one of about as many parameters
    dropout: float = 0.0
    bias: bool = True
    qkv_bias: bool = True
    tied: bool = False  # the head shares the token embedding's weight
    arch: str = "gpt2"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_ff"):
            value = getattr(self, name)
            if value is None and name == "n_ff":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise GPTError(f"{name}={value!r}: expected a whole number of 1 or more")
        for name in ("bias", "qkv_bias", "tied"):
            if not isinstance(getattr(self, name), bool):
                raise GPTError(f"{name}={getattr(self, name)!r}: expected True or False")
        number = isinstance(self.dropout, int | float) and not isinstance(self.dropout, bool)
        if not number or not 0 <= self.dropout < 1:  # also refuses nan
            raise GPTError(f"dropout={self.dropout!r}: expected a number from 0 up to, but not including, 1")
        if self.n_embd % self.n_head:
            below = self.n_embd // self.n_head * self.n_head
            near = f"{below} or {below + self.n_head}" if below else f"{self.n_head}"
            raise GPTError(f"n_embd={self.n_embd} is no multiple of n_head={self.n_head}: try n_embd={near}")
        if self.arch not in ARCHS:
            raise GPTError(f"arch={self.arch!r}: expected {' or '.join(ARCHS)}")
        if self.modern and self.head_width % 2:
            raise GPTError(f"heads {self.head_width} wide (n_embd / n_head) cannot be rotated: choose an even width")

    @property
    def modern(self) -> bool:
        return self.arch == "modern"

    @property
    def ff_width(self) -> int:
        if self.n_ff is not None:
            return self.n_ff
        # three matrices in the place of two: 8/3 of the width, in multiples of 64 as matmul kernels like them
        return 64 * max(1, round(self.n_embd / 24)) if self.modern else 4 * self.n_embd

    @property
    def head_width(self) -> int:
        return self.n_embd // self.n_head


class Attention(nn.Module):
    """Causal multi-head self-attention; in "modern" of normalised and rotated queries and keys."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.head_width, self.dropout = config.n_head, config.head_width, config.dropout
        bias = config.bias and not config.modern
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=bias and config.qkv_bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=bias)
        self.qk_norm = QKNorm(config.head_width) if config.modern else None
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, angles: Rotation | None = None, cache: "KVCache | None" = None, layer: int = 0
    ) -> Tensor:
        B, T, C = x.shape
        # (B, T, 3C) -> (B, T, 3, H, D) -> three of (B, T, H, D)
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, self.head_width).unbind(2)
        if angles is not None:
            q, k = (rotate(t, angles) for t in self.qk_norm(q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        if cache is None:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            k, v = cache.update(layer, k, v)  # (B, H, S, D): S positions so far
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=cache.mask, is_causal=cache.causal)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C)
        return self.residual_dropout(self.proj(y))


class MLP(nn.Module):
    """The position-wise feed-forward layer, with GPT-2's tanh approximation of GELU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.ff_width, bias=config.bias)
        self.down = nn.Linear(config.ff_width, config.n_embd, bias=config.bias)
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual_dropout(self.down(F.gelu(self.up(x), approximate="tanh")))


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = Attention(config)
        self.ln_2 = make_norm(config)
        self.mlp = GatedMLP(config) if config.modern else MLP(config)

    def forward(
        self, x: Tensor, angles: Rotation | None = None, cache: "KVCache | None" = None, layer: int = 0
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), angles, cache, layer)
        return x + self.mlp(self.ln_2(x))


def make_norm(config: GPTConfig) -> nn.Module:
    """LayerNorm, or in "modern" RMSNorm (Zhang & Sennrich, arXiv:1910.07467), over the model's width."""
    return nn.RMSNorm(config.n_embd, eps=NORM_EPS) if config.modern else nn.LayerNorm(config.n_embd, bias=config.bias)


class GPT(nn.Module):
    """GPT-2 (the layout of openai/gpt-2 and transformers' GPT2LMHeadModel), or "modern" (that of Qwen3ForCausalLM)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False  # activations inside the blocks are computed again in the backward pass, not kept
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = None if config.modern else nn.Embedding(config.block_size, config.n_embd)
        self.embedding_dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = make_norm(config)
        # Tied: no second parameter, so a state dict holds the shared weight once (safetensors refuses aliases).
        self.head = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw GPT-2's initial weights from torch's global generator, in one fixed order."""
        # Each block adds two terms to the residual stream: this keeps its variance at the output independent of depth.
        residual_std = INIT_STD / math.sqrt(2 * self.config.n_layer)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                residual = name.endswith(("attn.proj", "mlp.down"))
                module.weight.normal_(0.0, residual_std if residual else INIT_STD)
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm | QKNorm):
                module.reset_parameters()

    @property
    def head_weight(self) -> Tensor:
        """The output projection, (V, C): its own parameter, or the token embedding where tied."""
        return self.wte.weight if self.head is None else self.head.weight

    def forward(self, ids: Tensor, targets: Tensor | None = None, *, cache: "KVCache | None" = None) -> Tensor:
        """Mean loss when targets are given, otherwise logits.

        ids: (B, T), any integer dtype, every id below vocab_size. targets: (B, T), likewise; -100 is left out of
        the mean. Returns a float32 scalar, or logits (B, T, V) in the dtype of the matmuls. With a cache, ids are
        the positions that follow what it holds. GPTError when T exceeds block_size (with a cache: its room).
        """
        x = self.hidden(ids, cache=cache)  # (B, T, C)
        if targets is None:
            return F.linear(x, self.head_weight)  # (B, T, V)
        if targets.shape != ids.shape:
            raise GPTError(f"targets {tuple(targets.shape)} do not fit ids {tuple(ids.shape)}: pass one per id")
        return linear_cross_entropy(x.flatten(0, 1), self.head_weight, targets.flatten().long())  # (B*T, C), (B*T,)

    def hidden(self, ids: Tensor, *, cache: "KVCache | None" = None) -> Tensor:
        """The final hidden states (B, T, C), after ln_f: what the head multiplies."""
        if ids.ndim != 2 or ids.is_floating_point():
            raise GPTError(f"ids of shape {tuple(ids.shape)}, {ids.dtype}: expected whole numbers of shape (B, T)")
        T = ids.shape[1]
        if self.config.block_size < T:
            raise GPTError(f"{T} positions exceed block_size={self.config.block_size}: pass fewer ids at a time")
        # (T,), or (B, T) where rows stand at differing positions
        positions = torch.arange(T, device=ids.device) if cache is None else cache.advance(T)
        x = self.wte(ids.long())  # (B, T, C)
        if self.wpe is None:
            angles = rotation(positions, self.config.head_width)
        else:
            angles, x = None, x + self.wpe(positions)
        x = self.embedding_dropout(x)
        for layer, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, angles, use_reentrant=False)
            else:
                x = block(x, angles, cache, layer)
        return self.ln_f(x)

    def num_params(self) -> int:
        """All parameters, a shared one counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Forward and backward FLOPs per trained token at full block size; see flops_per_token below."""
        return flops_per_token(self.config)


def parameter_table(config: GPTConfig) -> dict[str, int]:
    """Parameters by part, without allocating any (meta device); the values add up to the model's total."""
    with torch.device("meta"):
        model = GPT(config)
    table = {"wte": 0, "wpe": 0, "attn": 0, "mlp": 0, "norm": 0, "head": 0}
    for name, p in model.named_parameters():
        parts = name.split(".")
        part = parts[2] if parts[0] == "blocks" else parts[0]  # QK-norm's few gains count as attention
        table["norm" if part.startswith("ln_") else part] += p.numel()
    return table


def count_params(config: GPTConfig) -> dict[str, int]:
    """{"untied": n, "tied": m}: the parameters of this shape with a head of its own and with a shared one."""
    return {
        name: sum(parameter_table(dataclasses.replace(config, tied=tied)).values())
        for name, tied in (("untied", False), ("tied", True))
    }


def flops_per_token(config: GPTConfig) -> int:
    """6N + 12 * n_layer * n_embd * block_size: FLOPs per token, forward + backward (PaLM, arXiv:2204.02311, app. B).

    N leaves out look-up-only tables (wpe, and wte where the head has its own weight): they multiply nothing.
    The attention term counts the full square as PaLM does, not the causal half, so MFU compares with published ones.
    """
    table = parameter_table(config)
    multiplied = sum(table.values()) - table["wpe"] - (0 if config.tied else table["wte"])
    return 6 * multiplied + 12 * config.n_layer * config.n_embd * config.block_size
