"""Load a trained model to use it: the newest sound checkpoint of a run, on the best device here."""

from typing import Any

from cli.errors import UserError
from gpt.model import GPT, GPTConfig
from gpt.tokenizer import Tokenizer
from store import fs
from store.errors import DataError
from train import checkpoint
from train.precision import choose_machine
from train.state import checkpoint_fits, same_tensors


def load_model(run: str, *, device: str = "auto", step: int | None = None) -> tuple[GPT, Tokenizer]:
    """(model in eval mode, tokenizer) of a run at any URL: its newest checkpoint, or that of `step`.

    Every byte is verified; nothing in the run is changed. Raises UserError or DataError.
    """
    found = _load(run, step, ("model.safetensors", "state.json"))
    try:
        shape = GPTConfig(**found.state["model"])
    except TypeError as e:
        raise UserError(f"{fs.redact(run)}: its model has settings this program does not know ({e})") from e
    checkpoint_fits(found, shape)
    model = GPT(shape)
    same_tensors(found.tensors["model.safetensors"], model.state_dict(), "model.safetensors")
    model.load_state_dict(found.tensors["model.safetensors"])
    tokenizer = Tokenizer(fs.read_bytes(fs.join(run, "tokenizer.json")).decode())
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(f"{fs.redact(run)}: tokenizer.json has {tokenizer.vocab_size} ids, the model "
                        f"{model.config.vocab_size}: the run's tokenizer was replaced, restore it")  # fmt: skip
    return model.to(choose_machine(device, "auto", "off").device).eval(), tokenizer


def load_record(run: str, *, step: int | None = None) -> dict[str, Any]:
    """state.json of a run's newest checkpoint, or that of `step`: settings, tokens, seconds. Raises UserError."""
    return _load(run, step, ("state.json",)).state


def _load(run: str, step: int | None, parts: tuple[str, ...]) -> checkpoint.Checkpoint:
    manifests = [m for m in checkpoint.committed(run) if step is None or m.step == step]
    if not manifests:
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise UserError(f"{fs.redact(run)}: {wanted} there: name a run folder, the --out of train/run.py, with --run")
    try:
        return checkpoint.load(run, manifests[-1], parts)
    except DataError as e:
        older = f"; --step {manifests[-2].step} is the one before" if len(manifests) > 1 else ""
        raise UserError(f"{fs.redact(run)}: checkpoint {manifests[-1].name} is damaged ({e}){older}") from e
