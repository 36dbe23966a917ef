"""The weights of a trained run, to use them: to sample, to export, to begin another run with."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cli.errors import UserError
from gpt import lora
from gpt.model import GPT, GPTConfig
from gpt.tokenizer import Tokenizer
from store import fs
from store.errors import DataError
from train import checkpoint
from train.state import checkpoint_fits, same_tensors


@dataclass(frozen=True)
class Weights:
    """Proved weights of one checkpoint, plain (adapters merged), on the CPU."""

    name: str  # of the checkpoint
    sha256: str  # of its model.safetensors
    record: dict[str, Any]  # its state.json
    shape: GPTConfig
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer


def load_weights(run: str, *, step: int | None = None) -> Weights:
    """Those of a run's newest checkpoint or that of `step`, or of a checkpoint's own folder, at any URL.

    Every byte is verified; nothing in the run is changed. Raises UserError or DataError.
    """
    run, found = find(run, step, ("model.safetensors", "state.json"))
    tensors, record = found.tensors["model.safetensors"], found.state
    try:
        shape = GPTConfig(**record["model"])
    except TypeError as e:
        raise UserError(f"{fs.redact(run)}: its model has settings this program does not know ({e})") from e
    checkpoint_fits(found, shape)
    if record["config"].get("lora_rank"):
        alpha = record["config"].get("lora_alpha")
        if not isinstance(alpha, int | float):
            raise DataError(f"{found.manifest.name}: lora_alpha is {alpha!r}: restore an older checkpoint")
        tensors = lora.merged(tensors, alpha=alpha)
    with torch.device("meta"):
        expected = GPT(shape).state_dict()
    same_tensors(tensors, expected, "model.safetensors")
    tokenizer = Tokenizer(fs.read_bytes(fs.join(run, "tokenizer.json")).decode())
    if tokenizer.vocab_size != shape.vocab_size:
        raise UserError(f"{fs.redact(run)}: tokenizer.json has {tokenizer.vocab_size} ids, the model "
                        f"{shape.vocab_size}: the run's tokenizer was replaced, restore it")  # fmt: skip
    sha256 = found.manifest.parts["model.safetensors"]["sha256"]
    return Weights(found.manifest.name, sha256, record, shape, tensors, tokenizer)


def find(run: str, step: int | None, parts: tuple[str, ...]) -> tuple[str, checkpoint.Checkpoint]:
    """(run folder, `parts` of its newest checkpoint or that of `step`); `run` may be a checkpoint's own folder.

    Raises UserError.
    """
    above, _, name = run.rstrip("/").rpartition("/")
    wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
    if checkpoint.STEP_NAME.fullmatch(name):
        run, manifests = above or ".", [m for m in [checkpoint.read_manifest(above or ".", name)] if m]
    else:
        manifests = [m for m in checkpoint.committed(run) if step is None or m.step == step]
    if not manifests:
        raise UserError(f"{fs.redact(run)}: {wanted} there: name a run folder, the --out of train/run.py")
    try:
        return run, checkpoint.load(run, manifests[-1], parts)
    except DataError as e:
        older = f"; --step {manifests[-2].step} is the one before" if len(manifests) > 1 else ""
        raise UserError(f"{fs.redact(run)}: checkpoint {manifests[-1].name} is damaged ({e}){older}") from e
