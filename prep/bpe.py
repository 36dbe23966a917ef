"""Train a byte-level BPE tokenizer with this project's special tokens.

Two trainers give the same quality: `ffbpe` (7 to 10 times faster) and the reference, `tokenizers`. On 32 MB
of conversation their 31,744 merges differ in 8, all ties of frequency broken the other way, so the one used counts as a
setting and is recorded.
"""

import importlib.util
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from cli.errors import UserError
from gpt.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERNS, Tokenizer, add_special_tokens, blank_tokenizer, special_token

Trainer = Literal["auto", "ffbpe", "tokenizers"]
MIN_VOCAB = len(SPECIAL_TOKENS) + 256
# Different words held at once, 0.6 GB with what ffbpe makes of them; 1 GB of English has half as many. Languages written
# without spaces have no such limit: a new "word" in almost every sentence.
MAX_WORDS = 1 << 20
NUMBERING_WORDS = 200_000  # the commonest tell how often each token occurs


class TooLittleText(UserError):
    """For a vocabulary of that size."""


def choose_trainer(asked: Trainer) -> str:
    """The trainer that `auto` means on this machine. Raises UserError when the one asked for is not installed."""
    installed = importlib.util.find_spec("ffbpe") is not None
    if asked == "ffbpe" and not installed:
        raise UserError("--trainer ffbpe: it is not installed: pip install -r requirements-prep.txt")
    return asked if asked != "auto" else "ffbpe" if installed else "tokenizers"


# ---- words ----------------------------------------------------------------------------------------------------------


def count_words(texts: list[str], split: str) -> dict[str, int]:
    """How often each word of the texts occurs: all that ffbpe needs to know of them."""
    import ffbpe  # optional: a faster equal of the reference

    counter = ffbpe.PreTokenizer([], pat_str=SPLIT_PATTERNS[split]).word_counter()
    counter.add_batch(texts)
    return counter.words()


def sum_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of counts, in bounded memory: beyond MAX_WORDS the rarer half is forgotten before more are added."""
    total: dict[str, int] = {}
    for counted in counts:
        if len(total) > MAX_WORDS:
            total = commonest(total, MAX_WORDS // 2)
        for word, n in counted.items():
            total[word] = total.get(word, 0) + n
    return total


def commonest(counts: dict[str, int], limit: int) -> dict[str, int]:
    """The most frequent, fewer than `limit`: those that are exactly as rare as the first left out go too."""
    if len(counts) < limit:
        return counts
    rarest = np.partition(np.fromiter(counts.values(), np.int64, len(counts)), -limit)[-limit]
    return {word: n for word, n in counts.items() if n > rarest}


# ---- training -------------------------------------------------------------------------------------------------------


def train_on_words(words: Mapping[str, int], vocab_size: int, min_frequency: int, split: str) -> str:
    """tokenizer.json by ffbpe: ids 0-4 special tokens, then 256 bytes, then merges in order of frequency.

    Raises UserError when the words have too few repeated pairs for that many tokens.
    """
    import ffbpe

    bpe = ffbpe.BpeTrainer([], unit="byte", bigram_cutoff_freq=max(min_frequency, 1))
    bpe.add_words(list(words.items()))
    bpe.init_training()
    # two pairs can spell one token, which counts once: train some more than needed, the loop below stops in time
    bpe.train(vocab_size + 512)
    with tempfile.TemporaryDirectory() as folder:
        bpe.validate_model().save_pretrained(folder)
        lines = (Path(folder) / "merges.txt").read_text("utf-8").split("\n")
    vocab, merges = byte_vocab(), []
    for line in filter(None, lines):
        a, b = line.rsplit(" => ", 1)[0].split(" ")  # "Ġ => => 55" is a merge too
        if len(vocab) == vocab_size and a + b not in vocab:
            break
        vocab.setdefault(a + b, len(vocab))
        merges.append((a, b))
    return _finished(assemble(vocab, merges, SPLIT_PATTERNS[split]), vocab_size, min_frequency)


def train_on_texts(batches: Iterator[list[str]], vocab_size: int, min_frequency: int, split: str) -> str:
    """tokenizer.json by the reference; otherwise as `train_on_words`."""
    tokenizer = blank_tokenizer(SPLIT_PATTERNS[split])
    settings = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[special_token(t) for t in SPECIAL_TOKENS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(batches, settings)
    return _finished(tokenizer, vocab_size, min_frequency)


def byte_vocab() -> dict[str, int]:
    """Special tokens and the 256 bytes, as the byte-level format spells them."""
    return {t: i for i, t in enumerate((*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())))}


def assemble(vocab: dict[str, int], merges: list[tuple[str, str]], pattern: str) -> tokenizers.Tokenizer:
    """A byte-level BPE of these tokens, with the special tokens that it lacks after its last id."""
    tokenizer = blank_tokenizer(pattern)
    tokenizer.model = models.BPE(vocab=vocab, merges=merges)
    add_special_tokens(tokenizer)
    return tokenizer


def _finished(tokenizer: tokenizers.Tokenizer, vocab_size: int, min_frequency: int) -> str:
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise TooLittleText(f"--vocab-size {vocab_size}: this corpus supports only {found} tokens at --min-frequency "
                        f"{min_frequency}: use --vocab-size {found} or less, or more text")  # fmt: skip
    return tokenizer.to_str(pretty=True)


# ---- numbering ------------------------------------------------------------------------------------------------------


def number_by_frequency(json_text: str, counts: dict[str, int]) -> str:
    """The same tokenizer with its learnt tokens renumbered: the more frequent in these texts, the smaller both id bytes.

    The order of merges, which decides how text is cut, is untouched; special tokens keep their ids. zstd codes the
    bytes it cannot match by their frequency alone: stored shards shrink by 5 % (by 2 % if ids simply followed frequency).
    """
    texts = commonest(counts, NUMBERING_WORDS)
    ids, lengths = Tokenizer(json_text).encode_batch([*texts])  # by the reference: the same on every machine
    times = np.repeat(np.fromiter(texts.values(), np.int64, len(texts)), lengths)
    data = json.loads(json_text)
    tokens = sorted(data["model"]["vocab"], key=data["model"]["vocab"].get)
    first = len(SPECIAL_TOKENS)
    free = np.arange(first, len(tokens))
    free = free[np.argsort(((free >> 8) + 1) * ((free & 0xFF) + 1), kind="stable")]
    occurs = np.bincount(ids, times, minlength=len(tokens))
    by_frequency = first + np.argsort(-occurs[first:], kind="stable")
    numbered = dict(zip(free.tolist(), by_frequency.tolist(), strict=True))
    data["model"]["vocab"] = {tokens[numbered.get(i, i)]: i for i in range(len(tokens))}
    return tokenizers.Tokenizer.from_str(json.dumps(data)).to_str(pretty=True)
