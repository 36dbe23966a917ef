"""The optimizer, and its state as named tensors."""

import torch
from torch import Tensor, nn


def make_adamw(
    model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float, device_type: str
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) with decay on matrices only: not on biases and LayerNorm gains.

    Fused where torch has the kernel: one launch for all tensors instead of one each.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=device_type in ("cuda", "cpu"))


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state as `{parameter name}/{exp_avg, exp_avg_sq, step}`: names survive any regrouping of parameters."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put saved state back, on each parameter's device; `step` where the (fused) kernel wants it."""
    fused = optimizer.defaults.get("fused")
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, kind = key.rpartition("/")
        by_name.setdefault(name, {})[kind] = value
    for name, parameter in model.named_parameters():
        if name in by_name:
            optimizer.state[parameter] = {
                kind: value.to(parameter.device if kind != "step" or fused else "cpu", copy=True)
                for kind, value in by_name[name].items()
            }
