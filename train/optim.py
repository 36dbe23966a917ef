"""The optimizers, and their state as named tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cli.errors import UserError


class Together:
    """Optimizers of different parameters, to be handled as one. `parts` are stepped by `step_unless`."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of every part, live."""
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """That of every part; its tensors are live."""
        return {parameter: state for part in self.parts for parameter, state in part.state.items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)


Optimizer = torch.optim.Optimizer | Together

# Beside Muon: embeddings, head and gains take larger steps well. At 4 layers of 128 and 0.64 M tokens of dialogue the
# validation loss ended at 4.31 so, and at 4.40 with 1; a larger --lr for all did not help (docs/recipe.md).
ADAMW_LR_SCALE = 4.0


def make_optimizer(
    kind: str, model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float, device_type: str
) -> Optimizer:
    """`adamw` for every parameter, or `muon` for the matrices inside the blocks and AdamW for the rest.

    Muon takes the learning rates of AdamW, as its steps are scaled to their usual size ("match_rms_adamw", Liu et al.,
    arXiv:2502.16982); AdamW beside it takes ADAMW_LR_SCALE of them. Raises UserError where torch has no Muon.
    """
    named = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "device_type": device_type}
    if kind == "adamw":
        return make_adamw(model, **named)
    if not hasattr(torch.optim, "Muon"):
        raise UserError(
            f"--optimizer muon: torch {torch.__version__} has none: install torch 2.9 or later, or use adamw"
        )
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    for p in matrices:  # as for AdamW below
        muon.state[p] = {"momentum_buffer": torch.zeros_like(p, requires_grad=False)}
    inside = set(matrices)
    adamw = _adamw([p for p in model.parameters() if p not in inside], **named)
    for group in adamw.param_groups:
        group["lr_scale"] = ADAMW_LR_SCALE
    return Together(muon, adamw)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """The learning rate of the next step, for each group in its scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def make_adamw(
    model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float, device_type: str
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) with decay on matrices only: not on biases and the gains of norms.

    Fused where torch has the kernel: one launch for all tensors instead of one each.
    """
    moving = [p for p in model.parameters() if p.requires_grad]  # with LoRA most are frozen
    return _adamw(moving, lr=lr, betas=betas, weight_decay=weight_decay, device_type=device_type)


def _adamw(
    parameters: Sequence[nn.Parameter], *, lr: float, betas: tuple[float, float], weight_decay: float, device_type: str
) -> torch.optim.AdamW:
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=device_type in ("cuda", "cpu"))
    for p in parameters:  # torch makes them in the first step, which may be one that is left out
        optimizer.state[p] = {
            "step": torch.zeros((), device=_step_device(p, optimizer)),
            "exp_avg": torch.zeros_like(p, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
        }
    return optimizer


def step_unless(optimizer: Optimizer, bad: Tensor) -> None:
    """optimizer.step(), but weights, moments and step counts stay as they are where `bad`, () bool, is true.

    A fused kernel reads `bad` itself (the contract of torch.amp.GradScaler with it), so that the host need not wait.
    Muon has none: on a GPU it steps at once, and the device puts back what was, from copies that live for the step.
    """
    if isinstance(optimizer, Together):
        for part in optimizer.parts:
            step_unless(part, bad)
    elif optimizer.defaults.get("fused"):
        optimizer.found_inf = bad.float()
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf
    elif bad.device.type == "cuda":
        _step_and_undo(optimizer, bad)
    elif not bad:
        optimizer.step()


@torch.no_grad()
def _step_and_undo(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """optimizer.step(), undone where `bad` is true, without asking the device for it."""
    changing = [t for p, state in optimizer.state.items() for t in (p, *state.values())]
    before = [t.clone() for t in changing]
    optimizer.step()
    for now, then in zip(changing, before, strict=True):
        torch.where(bad, then, now, out=now)


def _step_device(parameter: Tensor, optimizer: torch.optim.Optimizer) -> torch.device:
    """Where the kernel wants `step`: the fused one beside the parameter, the other ones on the CPU."""
    return parameter.device if optimizer.defaults["fused"] else torch.device("cpu")


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Optimizer state, live, as `{parameter name}/{exp_avg, exp_avg_sq, step}` and, where Muon moves the parameter,
    `{parameter name}/momentum_buffer`: names survive any regrouping of parameters."""
    state = optimizer.state
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for key, value in state[parameter].items()
    }
