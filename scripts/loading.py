"""Load a trained model to use it: the newest sound checkpoint of a run, on the best device here."""

from typing import Any

from gpt.model import GPT
from gpt.tokenizer import Tokenizer
from train.precision import choose_machine
from train.weights import find, load_weights


def load_model(
    run: str, *, device: str = "auto", step: int | None = None, precision: str = "fp32"
) -> tuple[GPT, Tokenizer]:  # fmt: skip
    """(model in eval mode, tokenizer) of a run at any URL: its newest checkpoint, or that of `step`; adapters merged.

    Weights are in `precision`, as --precision of train/run.py means it. Every byte is verified; nothing in the run is changed. Raises UserError or DataError.
    """
    weights = load_weights(run, step=step)
    model = GPT(weights.shape)
    model.load_state_dict(weights.tensors)
    machine = choose_machine(device, precision, "off")
    return model.to(machine.device, machine.dtype).eval(), weights.tokenizer


def load_record(run: str, *, step: int | None = None) -> dict[str, Any]:
    """state.json of a run's newest checkpoint, or that of `step`: settings, tokens, seconds. Raises UserError."""
    return find(run, step, ("state.json",))[1].state
