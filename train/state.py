"""All that changes while training, and its way into a checkpoint and back."""

import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from cli.progress import count
from gpt.model import GPT, GPTConfig
from store import fs
from train import checkpoint
from train.config import TrainConfig, stored_form
from train.data import Data
from train.folder import RunFolder
from train.optim import load_optimizer_tensors, make_adamw, optimizer_tensors
from train.precision import Machine


@dataclass
class State:
    """All that changes while training: what a checkpoint holds."""

    model: GPT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0  # optimizer steps done
    elapsed_s: float = 0.0  # of all attempts
    val_loss: float | None = None  # the last one measured


def new_state(config: TrainConfig, shape: GPTConfig, machine: Machine) -> State:
    """Fresh weights, the same on every machine for one seed: they are drawn on the CPU."""
    model = GPT(shape).to(machine.device)
    optimizer = make_adamw(
        model, lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay,
        device_type=machine.device.type,
    )  # fmt: skip
    return State(model, optimizer, machine.grad_scaler())


def save_state(config: TrainConfig, state: State, data: Data, folder: RunFolder) -> None:
    """Commit the state as a checkpoint, mirror the logs before it, and thin out older ones."""
    start_s = time.monotonic()
    folder.publish()
    manifest = checkpoint.save(
        folder.url,
        step=state.step,
        run_id=folder.run_id,
        attempt=folder.attempt,
        val_loss=state.val_loss,
        tensors={
            "model.safetensors": state.model.state_dict(),
            "optimizer.safetensors": optimizer_tensors(state.model, state.optimizer),
            "rng.safetensors": rng_tensors(),
        },
        state={
            "step": state.step,
            "tokens": state.step * config.batch * config.block_size,
            "elapsed_s": state.elapsed_s,
            "val_loss": state.val_loss,
            "scaler": state.scaler.state_dict(),
            "config": stored_form(config),
            "model": asdict(state.model.config),
            "data": {"fingerprint": data.tokens.fingerprint, "vocab_size": data.tokens.vocab_size},
            "torch": torch.__version__,
        },
    )
    checkpoint.retain(folder.url, config.keep)
    n_bytes = sum(p["bytes"] for p in manifest.parts.values())
    folder.event("saved", step=state.step, bytes=n_bytes, seconds=round(time.monotonic() - start_s, 3))
    print(f"saved      {fs.redact(fs.join(folder.url, manifest.name))} ({count(n_bytes)}B)", flush=True)


def restore(state: State, found: checkpoint.Checkpoint) -> None:
    """Put a verified checkpoint into a fresh state of the same shape."""
    state.model.load_state_dict(found.tensors["model.safetensors"])
    load_optimizer_tensors(state.model, state.optimizer, found.tensors["optimizer.safetensors"])
    if state.scaler.is_enabled() and found.state["scaler"]:
        state.scaler.load_state_dict(found.state["scaler"])
    state.step, state.elapsed_s = found.state["step"], found.state["elapsed_s"]
    state.val_loss = found.state["val_loss"]
    rng = found.tensors["rng.safetensors"]
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])


def rng_tensors() -> dict[str, Tensor]:
    """The random state that dropout draws from."""
    return {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
