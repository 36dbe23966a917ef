"""How much of each source a mixture uses: shares of text, the largest total in which no document is repeated."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cli.errors import UserError
from prep.dedup import below
from store import fs


@dataclass(frozen=True)
class Mix:
    """Inputs and their weights, which need not sum to one."""

    inputs: tuple[str, ...]
    weights: tuple[float, ...]


def parse(arguments: Sequence[str]) -> Mix | None:
    """`a.txt=0.7 b.jsonl=0.3`; a URL may hold = itself, so the last one counts. Raises UserError."""
    inputs, weights = [], []
    for argument in arguments:
        name, equals, weight = argument.rpartition("=")
        try:
            weights.append(float(weight))
        except ValueError:
            weights.append(0)
        if not (name and equals and 0 < weights[-1] < float("inf")):
            raise UserError(f"--mix {fs.redact(argument)}: expected SOURCE=SHARE, such as a.txt=0.7")
        inputs.append(name)
    return Mix(tuple(inputs), tuple(weights)) if inputs else None


def fractions(mix: Mix, text_bytes: np.ndarray) -> list[float]:
    """Which part of each input is used, given the (inputs,) bytes of text it has. The scarcest is used whole.

    Raises UserError for an input that has nothing to give.
    """
    for name, n in zip(mix.inputs, text_bytes, strict=True):
        if n == 0:
            raise UserError(f"--mix: {fs.redact(name)} has no text after cleaning and deduplication: leave it out")
    wanted = np.array(mix.weights) / text_bytes
    return (wanted / wanted.max()).tolist()


def choose(used: Sequence[float], group: np.ndarray, doc_hash: np.ndarray, seed: int) -> np.ndarray:
    """(documents,) bool: those that the mixture uses, by a seeded hash of their content. `group` says whose they are."""
    chosen = np.zeros(len(doc_hash), bool)
    for number, fraction in enumerate(used):
        mine = group == number
        chosen[mine] = below(doc_hash[mine], fraction, seed)
    return chosen
