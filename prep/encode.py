"""Text -> ids in bulk, with the fastest engine that gives exactly the reference's ids.

`fastokens` encodes 32 MB of conversation at 284 MB/s on one thread here, `tokenizers` at 3.4. It is used only after it
has proved equal on a sample of the very corpus that is to be encoded.
"""

import importlib.util
import itertools
import operator
from collections.abc import Callable, Sequence

import numpy as np

from gpt.tokenizer import Tokenizer
from prep.dedup import place, shuffle_key, validates
from prep.parts import ROLES, Documents, Encoded

Engine = str  # "fastokens" or "tokenizers"
# Of all characters the two that fastokens 0.3.5 cuts words at otherwise than `tokenizers`: the long s, which is an s when
# case is ignored ('ſ ends a word as 's does in cl100k and o200k), and a separator that is no white space any more (gpt2).
DOUBTFUL = "\u017f\u180e"
# fastokens 0.3.5 loads a vocabulary in the square of its longest token: 0.16 s at 4,096 bytes, half an hour at the
# 500,000 that a "word" of one letter, repeated in a few documents, teaches
LONGEST_TOKEN = 4096


class Encoder:
    """Encodes batches of texts with one engine; special spellings inside a text stay text with either."""

    def __init__(self, tokenizer: Tokenizer, engine: Engine) -> None:
        self.tokenizer, self.fast = tokenizer, None
        if engine == "fastokens":
            import fastokens  # optional: a faster equal of the reference

            self.fast = fastokens.Tokenizer.from_json_str(tokenizer.json_text)

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(all ids, (n,) uint32; ids of each text, (len(texts),) int64)."""
        if self.fast is None:
            return self.tokenizer.encode_batch(texts)
        ids, offsets = self.fast.encode_batch_flat(list(texts), split_special_tokens=True)
        ids, lengths = np.frombuffer(ids, np.uint32), np.diff(np.frombuffer(offsets, np.uint64).astype(np.int64))
        long_s, separator = DOUBTFUL
        others = itertools.compress(range(len(texts)), map(operator.not_, map(str.isascii, texts)))
        doubtful = [i for i in others if long_s in texts[i] or separator in texts[i]]
        return self._encode_again(texts, doubtful, ids, lengths) if doubtful else (ids, lengths)

    def _encode_again(
        self, texts: Sequence[str], which: list[int], ids: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same with some of the texts encoded by the reference."""
        of_each = np.split(ids, np.cumsum(lengths)[:-1])
        for i in which:
            of_each[i] = np.array(self.tokenizer.encode(texts[i]), np.uint32)
        return np.concatenate(of_each), np.fromiter(map(len, of_each), np.int64, len(of_each))


def unfit(tokenizer: Tokenizer) -> str | None:
    """Why fastokens cannot even be tried; None where it can."""
    if importlib.util.find_spec("fastokens") is None:
        return ("fastokens is not installed: encoding with tokenizers, same ids, about 40 times slower "
                "(pip install -r requirements-prep.txt)")  # fmt: skip
    if (longest := max(map(len, tokenizer.vocabulary))) > LONGEST_TOKEN:
        return f"a token is {longest} bytes long, too long for fastokens: encoding with tokenizers, slower"
    return None


def disproof(load: Callable[[], Encoder], sample: Sequence[str]) -> str | None:
    """Why the encoder that `load` gives must not be used; None where its ids for `sample` are the reference's."""
    try:
        encoder = load()
        ids, lengths = encoder.encode_batch(sample)
    except Exception as e:  # whatever it raises about this tokenizer.json, the reference can do it
        return f"fastokens cannot use this tokenizer ({str(e)[:80]}): encoding with tokenizers, slower"
    expected_ids, expected_lengths = encoder.tokenizer.encode_batch(sample)
    if not (np.array_equal(ids, expected_ids) and np.array_equal(lengths, expected_lengths)):
        return "fastokens gives other ids than tokenizers on this corpus: encoding with tokenizers, slower"
    return None


def encode_documents(
    documents: Documents, encoder: Encoder, *, val_limit: int, seed: int, dtype: np.dtype
) -> tuple[Encoded, np.ndarray]:
    """(ids of documents, in the order of their place in the dataset; ids of each turn's text, (turns,) int64).

    A document is `<|endoftext|>` and its turns, `<|role|>` ids `<|end|>`, or the bare ids of plain text.
    """
    ids, turn_ids = encoder.encode_batch(documents.turns())
    tokenizer = encoder.tokenizer
    role_ids = np.array([0, *(tokenizer.role_id(r) for r in ROLES if r)], np.uint32)
    marked = (documents.turn_role > 0).astype(np.int64)  # a turn with a role has a token before and one after
    first_turn = np.zeros(len(documents.turn_role), np.int64)
    doc_first = np.cumsum(documents.doc_turns, dtype=np.int64) - documents.doc_turns
    first_turn[doc_first] = 1

    span = first_turn + turn_ids + 2 * marked  # ids a turn takes, with what surrounds it
    ends = np.cumsum(span)
    begins = ends - span
    out = np.empty(int(ends[-1]) if len(ends) else 0, dtype)
    is_text = np.ones(len(out), bool)
    spoken = marked > 0
    for at, special in (
        (begins[doc_first], tokenizer.end_of_text),
        ((begins + first_turn)[spoken], role_ids[documents.turn_role[spoken]]),
        (ends[spoken] - 1, tokenizer.end_of_turn),
    ):
        out[at], is_text[at] = special, False
    out[is_text] = ids

    tokens = np.add.reduceat(span, doc_first) if len(doc_first) else np.zeros(0, np.int64)
    key = shuffle_key(documents.doc_hash, seed)
    at = place(key, validates(key, val_limit, seed))
    order = np.argsort(at, kind="stable")
    doc_at = np.cumsum(tokens) - tokens
    in_order = zip(doc_at[order].tolist(), tokens[order].tolist(), strict=True)
    shuffled = np.concatenate([out[:0], *(out[a : a + n] for a, n in in_order)])
    return Encoded(at[order], tokens[order].astype(np.uint32), shuffled), turn_ids
