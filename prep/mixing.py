"""How much of each source a mixture uses: shares of text, the largest total in which no document is repeated."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cli.errors import UserError
from store import fs
from store.hashing import mix


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
            weights.append(float("nan"))
        if not (name and equals and abs(weights[-1]) < float("inf")):
            raise UserError(f"--mix {fs.redact(argument)}: expected SOURCE=SHARE, such as a.txt=0.7")
        if weights[-1] <= 0:
            raise UserError(
                f"--mix {fs.redact(argument)}: a share is more than 0: leave out the source you do not want"
            )
        if name in inputs:
            raise UserError(f"--mix {fs.redact(argument)}: that source is named twice: give it one share")
        inputs.append(name)
    return Mix(tuple(inputs), tuple(weights)) if inputs else None


def fractions(wanted: Mix, text_bytes: np.ndarray) -> list[float]:
    """Which part of each input is used, given the (inputs,) bytes of text it has. The scarcest is used whole.

    Raises UserError for an input that has nothing to give.
    """
    for name, n in zip(wanted.inputs, text_bytes, strict=True):
        if n == 0:
            raise UserError(f"--mix: {fs.redact(name)} has no text after cleaning and deduplication: leave it out")
    fraction = np.array(wanted.weights) / text_bytes
    return (fraction / fraction.max()).tolist()


def choose(
    used: Sequence[float], group: np.ndarray, doc_hash: np.ndarray, doc_bytes: np.ndarray, seed: int
) -> np.ndarray:
    """(documents,) bool: those the mixture uses, in the order of a seeded hash of their content up to each fraction.

    `group` says which input a document came from, `doc_bytes` its share of that input's text: 0 for one not kept.
    """
    chosen = np.zeros(len(doc_hash), bool)
    for number, fraction in enumerate(used):
        mine = np.flatnonzero((group == number) & (doc_bytes > 0))
        order = mine[np.argsort(mix(doc_hash[mine], seed), kind="stable")]
        ends = np.cumsum(doc_bytes[order], dtype=np.int64)
        chosen[order[: np.searchsorted(ends, fraction * ends[-1], "right")]] = True
    return chosen
