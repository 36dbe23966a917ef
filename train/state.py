"""All that changes while training, and its way into a checkpoint and back."""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpt import lora
from gpt.model import GPT, GPTConfig
from store.errors import DataError
from train import checkpoint
from train.config import TrainConfig, stored_form
from train.data import Data
from train.guard import Guard, first_nonfinite
from train.optim import Optimizer, make_optimizer, optimizer_tensors
from train.parallel import ALONE, Ranks
from train.precision import Machine

if TYPE_CHECKING:
    from train.weights import Weights


@dataclass
class State:
    """All that changes while training: what a checkpoint holds."""

    model: GPT
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    guard: Guard
    step: int = 0  # optimizer steps done
    elapsed_s: float = 0.0  # of all attempts
    val_loss: float | None = None  # the last one measured
    val_due: bool = False  # a signal came in the validation after this step: it is still to be done
    base: dict[str, Any] | None = None  # the checkpoint whose weights the run began with


def checkpoint_fits(found: checkpoint.Checkpoint, shape: GPTConfig) -> None:
    """Raises DataError unless the checkpoint's tensors are of that shape, before a model of a shape it claims is built."""
    weights = found.tensors["model.safetensors"]
    blocks = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    sizes = {name: tuple(weights[name].shape) for name in ("wte.weight", "wpe.weight") if name in weights}
    expected = {"wte.weight": (shape.vocab_size, shape.n_embd)}
    if not shape.modern:
        expected["wpe.weight"] = (shape.block_size, shape.n_embd)
    if blocks != shape.n_layer or sizes != expected:
        raise DataError(f"{found.manifest.name}: its weights are not those of the model its settings describe: "
                        "restore an older checkpoint, or give another --out")  # fmt: skip


def new_state(
    config: TrainConfig, shape: GPTConfig, machine: Machine, base: "Weights | None" = None, ranks: Ranks = ALONE
) -> State:
    """Fresh weights, the same on every machine for one seed: they are drawn on the CPU. Or those of `base`."""
    model = GPT(shape)
    if base:
        same_tensors(base.tensors, model.state_dict(), base.name)
        model.load_state_dict(base.tensors)
    if config.lora_rank:
        lora.add_adapters(model, rank=config.lora_rank, alpha=config.lora_alpha)
    model = ranks.place(model, machine, config.shard)
    optimizer = make_optimizer(
        config.optimizer, model, lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay,
        device_type=machine.device.type,
    )  # fmt: skip
    origin = {"checkpoint": base.name, "sha256": base.sha256} if base else None
    return State(model, optimizer, machine.grad_scaler(), Guard(config.max_skipped), base=origin)


def state_tensors(state: State, machine: Machine) -> dict[str, dict[str, Tensor]]:
    """The live tensors of a checkpoint, by part: they change with the next step."""
    return {
        "model.safetensors": state.model.state_dict(),
        "optimizer.safetensors": optimizer_tensors(state.model, state.optimizer),
        "rng.safetensors": machine.rng_tensors(),
    }


def state_record(config: TrainConfig, state: State, data: Data, machine: dict[str, Any]) -> dict[str, Any]:
    """What state.json holds; `machine` is a machine_record."""
    return {
        "step": state.step,
        "tokens": state.step * config.batch * config.block_size,
        "elapsed_s": state.elapsed_s,
        "val_loss": state.val_loss,
        "val_due": state.val_due,
        "scaler": state.scaler.state_dict(),
        "guard": state.guard.record(),
        "config": stored_form(config),
        "model": asdict(state.model.config),
        "data": data.record(),
        "base": state.base,
        "machine": machine,
    }


def restore(state: State, found: checkpoint.Checkpoint, machine: Machine, ranks: Ranks = ALONE) -> None:
    """Put a verified checkpoint, whose tensors rank 0 has, into a fresh state of the same shape on every rank.

    Of an imported one (scripts/import_hf.py) there are weights alone: the rest begins anew. Raises DataError where it is
    not of that shape.
    """
    if ranks.first:
        _check_tensors(state, found, machine)
    ranks.load(state.model.state_dict(), found.tensors.get("model.safetensors", {}))
    if found.state.get("imported"):
        return
    ranks.load(optimizer_tensors(state.model, state.optimizer), found.tensors.get("optimizer.safetensors", {}))
    scaler = found.state["scaler"]
    if state.scaler.is_enabled() and scaler:  # none where it comes from bf16 or fp32: then it begins anew
        try:
            state.scaler.load_state_dict({k: _number(v) for k, v in scaler.items()})
        except (KeyError, TypeError, RuntimeError) as e:
            raise DataError(f"state.json: not the state of a GradScaler ({e!r})") from e
    state.step, state.elapsed_s = found.state["step"], found.state["elapsed_s"]
    state.val_loss, state.val_due = found.state["val_loss"], bool(found.state.get("val_due"))
    state.base = found.state.get("base")
    state.guard.load({k: int(_number(v)) for k, v in found.state.get("guard", {}).items()})
    if ranks.first:
        machine.set_rng_tensors(found.tensors["rng.safetensors"])


def _check_tensors(state: State, found: checkpoint.Checkpoint, machine: Machine) -> None:
    """Raises DataError unless all of them are finite, and of this state's names and shapes."""
    weights, moments = found.tensors["model.safetensors"], found.tensors["optimizer.safetensors"]
    same_tensors(weights, state.model.state_dict(), "model.safetensors")
    if found.state.get("imported"):
        if wrong := first_nonfinite(weights):
            raise DataError(f"{found.manifest.name}: {wrong} holds what is not a number: import a sound model")
        return
    # hashes prove that the bytes are the writer's, not that the writer was kind: a wrong shape would crash in native code
    same_tensors(moments, optimizer_tensors(state.model, state.optimizer), "optimizer.safetensors")
    if wrong := first_nonfinite(weights) or first_nonfinite(moments):
        raise DataError(f"{found.manifest.name}: {wrong} holds what is not a number: restore an older checkpoint, or give "
                        "another --out")  # fmt: skip
    rng, usual = found.tensors["rng.safetensors"], machine.rng_tensors()
    same_tensors({k: t for k, t in rng.items() if k in usual}, {k: t for k, t in usual.items() if k in rng or k == "cpu"},
                 "rng.safetensors")  # fmt: skip


def _number(value: Any) -> float:
    """state.json is untrusted input. Raises DataError."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"state.json: {value!r} is no number")
    return value


def same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    """Raises DataError unless both have the same names, shapes and dtypes."""
    wrong = sorted(found.keys() ^ expected.keys()) or [
        n for n, t in expected.items() if (found[n].shape, found[n].dtype) != (t.shape, t.dtype)
    ]
    if wrong:
        raise DataError(
            f"{where}: tensor {wrong[0]!r} is not what this model has: the checkpoint is of another program"
        )
