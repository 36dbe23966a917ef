"""A folder with transformers' GPT2LMHeadModel, as a run: sampled from at once, gone on with by train/run.py --resume."""

import dataclasses
import hashlib
import secrets
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cli.errors import UserError
from gpt import hf
from gpt.model import GPT
from gpt.presets import PRESETS
from gpt.tokenizer import Tokenizer
from prep import given
from store import fs
from store.untrusted import parse_json
from train import checkpoint
from train.config import SHAPE

EMBEDDINGS = ("wte.weight", "head.weight")  # one row for each id


def import_run(folder: Path, out: str) -> list[str]:
    """Write the run `out`, a folder or URL that holds nothing yet; returns what differs from the folder, a line each.

    Nothing of it is run: weights are read from safetensors alone. The checkpoint is of step 0 and has no optimizer state.
    Its weights bind the model's shape and its tokenizer the data's, all else is free. Raises UserError, GPTError, StoreError.
    """
    if fs.list_folder(out):
        raise UserError(f"--out {fs.redact(out)}: is not empty: give a new folder")
    model = read_model(folder)
    tokenizer, added = given.load(str(folder))
    model, notes = fitted(model, tokenizer.vocab_size)
    if added:
        notes.insert(0, f"the tokenizer was given {', '.join(added)}")
    with tempfile.TemporaryDirectory(prefix="perennial-import-") as staging:
        manifest = checkpoint.save(
            Path(staging), step=0, run_id=secrets.token_hex(4), attempt=0, val_loss=None,
            tensors={"model.safetensors": model.state_dict(), "optimizer.safetensors": {}, "rng.safetensors": {}},
            state=imported_state(model, tokenizer),
        )  # fmt: skip
        fs.put_bytes(fs.join(out, "tokenizer.json"), tokenizer.json_text.encode())
        checkpoint.upload(Path(staging), out, manifest)
    return notes


def read_model(folder: Path) -> GPT:
    """The folder's config.json and safetensors files as our model. Raises UserError, GPTError."""
    try:
        config = parse_json((folder / "config.json").read_text("utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no object")
    except OSError as e:
        raise UserError(
            f"--from hf {folder}: config.json: {e.strerror}: name a folder that transformers has saved"
        ) from e
    except ValueError as e:
        raise UserError(f"--from hf {folder}: config.json is not what transformers writes ({e})") from e
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"--from hf {folder}: no .safetensors file there (pickled weights are not read: they can run any "
                        "program); save it again with model.save_pretrained(folder)")  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for file in files:  # large models come in several
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as e:
            raise UserError(f"--from hf {folder}: {file.name} cannot be read ({e})") from e
    return hf.from_hf(config, tensors)


def fitted(model: GPT, vocab_size: int) -> tuple[GPT, list[str]]:
    """(the model with one row for each id of the tokenizer, what was done for it).

    A new row is the mean of the others: an id never seen is then as likely as the average one. (Zeros would make it the
    likeliest of all in GPT-2, whose logits are far below zero.)
    """
    rows = model.config.vocab_size
    if rows == vocab_size:
        return model, []
    tensors = model.state_dict()
    for name in EMBEDDINGS & tensors.keys():
        old = tensors[name]
        new = old.mean(0, keepdim=True).expand(max(vocab_size - rows, 0), -1)
        tensors[name] = torch.cat([old[:vocab_size], new])
    with torch.device("meta"):
        other = GPT(dataclasses.replace(model.config, vocab_size=vocab_size))
    other.load_state_dict(tensors, assign=True)
    change = f"{vocab_size - rows} rows, the mean of the others, were added" if vocab_size > rows else (
        f"{rows - vocab_size} rows that no token has were left out")  # fmt: skip
    return other, [f"the embedding has {rows} rows, the tokenizer {vocab_size} ids: {change}"]


def imported_state(model: GPT, tokenizer: Tokenizer) -> dict[str, Any]:
    """state.json of step 0: what train/state.py writes, but for what training alone can tell."""
    shape = dataclasses.asdict(model.config)
    nearest = min(  # its batch and learning rate are the defaults
        PRESETS, key=lambda n: [abs(PRESETS[n][k] - shape[k]) for k in ("n_embd", "n_layer")]
    )
    return {
        "step": 0,
        "tokens": 0,
        "elapsed_s": 0.0,
        "val_loss": None,
        "scaler": {},
        "imported": True,
        "config": {"model": nearest, **{name: shape[name] for name in SHAPE if name in shape}},
        "model": shape,
        "data": {
            "fingerprint": "",
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_sha256": hashlib.sha256(tokenizer.json_text.encode()).hexdigest(),
        },
    }
