"""The tokenizer pass: a spread sample of the kept documents -> tokenizer.json."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cli.progress import Meter
from prep import bpe, char_level
from prep.pool import Executor
from prep.stages import Cleaned, Selection, kept_documents

NUMBERING_BYTES = 4 << 20  # of text that decides which ids are small, where words are not counted


def choose_trainer(kind: str, asked: bpe.Trainer) -> str:
    """Who will make a tokenizer of `--tokenizer-type kind`: a setting, since its choice changes the bytes."""
    return "characters" if kind == "char" else bpe.choose_trainer(asked)


def train(
    cleaned: Cleaned, selection: Selection, *,
    trainer: str, vocab_size: int, min_frequency: int, split: str, pool: Executor,
) -> str:  # fmt: skip
    """tokenizer.json, the same whatever the number of workers. Raises UserError when the sample is too small for it."""
    limits = (vocab_size, min_frequency)
    with Meter("tokenizer", selection.sample_bytes, "B") as meter:
        if trainer == "tokenizers":
            counts: dict[str, int] = {}
            batches = sample_batches(cleaned, selection, meter)
            text = bpe.train_on_texts(keep_some(batches, selection.sample_bytes, counts), *limits, split)
        elif trainer == "ffbpe":
            counts = bpe.sum_counts(count_sample(cleaned, selection, split, pool, meter))
            text = bpe.train_on_words(counts, *limits, split)
        else:
            counts = bpe.sum_counts(count_sample(cleaned, selection, "characters", pool, meter))
            text = char_level.train(counts, *limits)
        return bpe.number_by_frequency(text, counts)


def count_sample(
    cleaned: Cleaned, selection: Selection, unit: str, pool: Executor, meter: Meter
) -> Iterator[dict[str, int]]:
    """How often each word (or character) occurs in the sampled documents of each part."""
    jobs = ((*job, unit) for job in _sampled(cleaned, selection))
    for n_bytes, counts in pool.run(count_task, jobs):
        yield counts
        meter.add(n_bytes)


def count_task(path: Path, chosen: np.ndarray, repeated: np.ndarray | None, unit: str) -> tuple[int, dict[str, int]]:
    """(bytes of text, counts) of one part; `unit` is "characters" or the name of a split pattern."""
    documents = kept_documents(path, chosen, repeated)
    texts = documents.turns()
    counts = char_level.count_characters(texts) if unit == "characters" else bpe.count_words(texts, unit)
    return documents.text_bytes(), counts


def sample_batches(cleaned: Cleaned, selection: Selection, meter: Meter) -> Iterator[list[str]]:
    """The sampled turns, some megabytes at a time, in the order of the corpus."""
    for job in _sampled(cleaned, selection):
        documents = kept_documents(*job)
        yield documents.turns()
        meter.add(documents.text_bytes())


def _sampled(cleaned: Cleaned, selection: Selection) -> Iterator[tuple[Path, np.ndarray, np.ndarray | None]]:
    repeated = selection.repeated or [None] * len(cleaned.parts)
    jobs = zip(cleaned.parts, selection.sample, repeated, strict=True)
    return (job for job in jobs if job[1].any())


def keep_some(batches: Iterator[list[str]], n_bytes: int, counts: dict[str, int]) -> Iterator[list[str]]:
    """The batches, while every n-th text of all, NUMBERING_BYTES in sum, is counted in `counts`."""
    every, seen = 1 + n_bytes // NUMBERING_BYTES, 0
    for batch in batches:
        for text in batch[-seen % every :: every]:
            counts[text] = counts.get(text, 0) + 1
        seen += len(batch)
        yield batch
