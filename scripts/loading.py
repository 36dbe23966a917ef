"""Load a trained model to use it: the newest sound checkpoint of a run, on the best device here."""

from typing import Any

from gpt.model import GPT
from gpt.tokenizer import Tokenizer
from train.precision import choose_machine
from train.weights import find, load_weights


def load_model(run: str, *, device: str = "auto", step: int | None = None) -> tuple[GPT, Tokenizer]:
    """(model in eval mode, tokenizer) of a run at any URL: its newest checkpoint, or that of `step`; adapters merged.

    Every byte is verified; nothing in the run is changed. Raises UserError or DataError.
    """
    weights = load_weights(run, step=step)
    model = GPT(weights.shape)
    model.load_state_dict(weights.tensors)
    return model.to(choose_machine(device, "auto", "off").device).eval(), weights.tokenizer


def load_record(run: str, *, step: int | None = None) -> dict[str, Any]:
    """state.json of a run's newest checkpoint, or that of `step`: settings, tokens, seconds. Raises UserError."""
    return find(run, step, ("state.json",))[1].state
