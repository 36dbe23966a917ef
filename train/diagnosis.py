"""What to tell a person whose run has diverged."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from train.guard import first_nonfinite, is_finite, largest
from train.precision import Machine
from train.state import State


def diagnose(state: State, ids: Tensor, targets: Tensor, *, micro_batch: int, machine: Machine) -> list[str]:
    """The numbers at the end, and where the first that is none comes from, in at most three lines.

    Runs the last batch, (batch, block + 1) and (batch, block), again without a loss scale; its gradients are dropped.
    """
    model, lr, good = state.model, state.optimizer.param_groups[0]["lr"], state.guard.last_good
    scale = f"; loss scale {state.scaler.get_scale():g}" if state.scaler.is_enabled() else ""
    lines = [f"lr {lr:.2e}{scale}; last good step: {f'{good[0]}, loss {good[1]:.4f}' if good else 'none'}"]
    weights = dict(model.named_parameters())
    wrong = first_nonfinite(weights)
    if wrong:
        return [*lines, f"weights: {wrong} is not finite"]
    lines.append(f"weights: finite, the largest {_largest_of(weights)}")
    wrong_outputs: list[str] = []
    hooks = [m.register_forward_hook(_watch(name or "the loss", wrong_outputs)) for name, m in model.named_modules()]
    try:
        for part, wanted in zip(ids.split(micro_batch), targets.split(micro_batch), strict=True):
            with machine.autocast():
                loss = model(part[:, :-1], wanted) * (len(part) / len(ids))
            loss.backward()
        gradients = {name: p.grad for name, p in weights.items() if p.grad is not None}
    except torch.OutOfMemoryError:  # uncompiled it takes more, and this is only for information
        return lines
    finally:
        model.zero_grad(set_to_none=True)
        for hook in hooks:
            hook.remove()
    wrong_gradients = [name for name, g in gradients.items() if not is_finite(g)]
    if wrong_outputs:
        what = f"the first output that is no number is that of {wrong_outputs[0]}"
    elif wrong_gradients:  # they flow from the last layer to the first
        what = f"gradient not finite in {len(wrong_gradients)} of {len(gradients)} parameters, from {wrong_gradients[-1]} on back"
    else:
        what = f"all finite, the largest gradient {_largest_of(gradients)}"
    return [*lines, f"the last batch again: {what}"]


def _watch(name: str, wrong: list[str]) -> Callable[[nn.Module, object, Tensor], None]:
    """A forward hook that adds `name` to `wrong` where the output is not finite."""

    def look(module: nn.Module, inputs: object, output: Tensor) -> None:
        if not is_finite(output):
            wrong.append(name)

    return look


def _largest_of(tensors: dict[str, Tensor]) -> str:
    sizes = {name: largest(t) for name, t in tensors.items()}
    name = max(sizes, key=sizes.__getitem__)
    return f"{sizes[name]:.3g} in {name}"
