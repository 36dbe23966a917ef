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
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=device_type in ("cuda", "cpu"))
    for p in model.parameters():  # torch makes them in the first step, which may be one that is left out
        optimizer.state[p] = {
            "step": torch.zeros((), device=_step_device(p, optimizer)),
            "exp_avg": torch.zeros_like(p, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
        }
    return optimizer


def step_unless(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """optimizer.step(), but weights, moments and step counts stay as they are where `bad`, () bool, is true.

    A fused kernel reads `bad` itself (the contract of torch.amp.GradScaler with it), so that the host need not wait.
    """
    if optimizer.defaults["fused"]:
        optimizer.found_inf = bad.float()
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf
    elif not bad:
        optimizer.step()


def _step_device(parameter: Tensor, optimizer: torch.optim.Optimizer) -> torch.device:
    """Where the kernel wants `step`: the fused one beside the parameter, the other ones on the CPU."""
    return parameter.device if optimizer.defaults["fused"] else torch.device("cpu")


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state as `{parameter name}/{exp_avg, exp_avg_sq, step}`: names survive any regrouping of parameters."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put saved state back, on each parameter's device; `step` where the kernel wants it."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, kind = key.rpartition("/")
        by_name.setdefault(name, {})[kind] = value
    for name, parameter in model.named_parameters():
        if name in by_name:
            optimizer.state[parameter] = {
                kind: value.to(_step_device(parameter, optimizer) if kind == "step" else parameter.device, copy=True)
                for kind, value in by_name[name].items()
            }
