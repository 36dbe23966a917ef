"""A character-level tokenizer in the same format as a BPE one: every character seen is one token, any other its bytes.

It is a byte-level BPE whose merges only ever join the bytes of one character, so it loads wherever the other does and
gives back any text.
"""

from collections.abc import Mapping

import numpy as np
from tokenizers import pre_tokenizers

from gpt.tokenizer import SPLIT_PATTERNS
from prep.bpe import assemble, byte_vocab

# No merge crosses a character, so how text is cut changes no id. Words are what engines remember: fastokens encodes
# 62 MB/s of them, 14 MB/s of single characters.
PATTERN = SPLIT_PATTERNS["o200k"]


def count_characters(texts: list[str]) -> dict[str, int]:
    """How often each character of the texts occurs."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), "<u4")
    counts = np.bincount(codes)
    found = np.flatnonzero(counts)
    return dict(zip(map(chr, found.tolist()), counts[found].tolist(), strict=True))


def train(counts: Mapping[str, int], vocab_size: int, min_frequency: int) -> str:
    """tokenizer.json: special tokens, the 256 bytes, and the most frequent characters that fit `vocab_size`."""
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    vocab, merges = byte_vocab(), []
    wanted = (c for c, n in counts.items() if n >= min_frequency and not c.isascii())
    for character in sorted(wanted, key=lambda c: (-counts[c], c)):
        letters = spell(character)[0][0]  # one letter for each of its bytes
        # Joined from the left. A pair of bytes inside one character can then only be joined at its beginning, because no
        # character begins with a byte that continues another: whatever the order of merges, each ends as one token.
        steps = [letters[:i] for i in range(2, len(letters) + 1) if letters[:i] not in vocab]
        if len(vocab) + len(steps) > vocab_size:
            break
        vocab |= {step: len(vocab) + i for i, step in enumerate(steps)}
        merges += [(step[:-1], step[-1]) for step in steps]
    return assemble(vocab, merges, PATTERN).to_str(pretty=True)
