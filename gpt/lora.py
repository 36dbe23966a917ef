"""LoRA (Hu et al., arXiv:2106.09685): a linear layer W is tuned as W + (alpha / rank) * B A, with W itself frozen.

A (rank, in) and B (out, rank) hold a few percent of W's numbers, and the optimizer keeps moments of these alone. B
begins at zero: an adapted model computes at first what it did.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.errors import GPTError
from gpt.model import GPT

A, B = ".lora_a", ".lora_b"


class LoRALinear(nn.Module):
    """A linear layer and its adapter. `weight` and `bias` keep their names, so a state dict holds the base as it was."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = base.weight, base.bias, scale
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # of a linear layer, as loralib and peft have it

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale


def add_adapters(model: GPT, *, rank: int, alpha: float) -> None:
    """Freeze the model and give every linear layer inside its blocks an adapter, drawn from torch's global generator.

    Raises GPTError for a rank at which it would save nothing.
    """
    if not 1 <= rank <= model.config.n_embd // 2:
        raise GPTError(f"lora rank {rank}: expected 1 to {model.config.n_embd // 2}, half of the model's width")
    model.requires_grad_(False)
    for parent in list(model.blocks.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear):
                setattr(parent, name, LoRALinear(layer, rank, alpha / rank))


@torch.no_grad()
def merged(tensors: dict[str, Tensor], *, alpha: float) -> dict[str, Tensor]:
    """A state dict with its adapters added to their layers, for a plain GPT; as it is where it has none.

    Raises GPTError where an adapter does not fit its layer.
    """
    plain = {name: t for name, t in tensors.items() if not name.endswith((A, B))}
    for layer in {name.removesuffix(A).removesuffix(B) for name in tensors.keys() - plain.keys()}:
        try:
            a, b, weight = (tensors[layer + part] for part in (A, B, ".weight"))
            plain[f"{layer}.weight"] = torch.addmm(weight, b, a, alpha=alpha / len(a))
        except (KeyError, RuntimeError, ZeroDivisionError) as e:
            raise GPTError(f"the adapter of {layer} does not fit it: the checkpoint is of another program") from e
    return plain
