"""Text -> ids in bulk, with the fastest engine that gives exactly the reference's ids.

`fastokens` encodes 32 MB of conversation at 284 MB/s on one thread here, `tokenizers` at 3.4. It is used only after it
has proved equal on a sample of the very corpus that is to be encoded.
"""

import functools
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from gpt.tokenizer import END_OF_TEXT, END_OF_TURN, ROLE_TOKENS, SPLIT_PATTERNS, Tokenizer, blank_tokenizer
from prep.dedup import place, shuffle_key, validates
from prep.formats import ROLES
from prep.parts import SEPARATOR, Documents, Encoded, separated, turn_begins, turn_texts

Engine = Literal["joined", "fastokens", "tokenizers"]  # "joined": fastokens, many texts in each string
# Of all characters the two that fastokens 0.3.5 cuts words at otherwise than `tokenizers`: the long s, which is an s when
# case is ignored ('ſ ends a word as 's does in cl100k and o200k), and a separator that is no white space any more (gpt2).
DOUBTFUL = "\u017f\u180e"
# fastokens 0.3.5 loads a vocabulary in the square of its longest token: 0.16 s at 4,096 bytes, half an hour at the
# 500,000 that a "word" of one letter, repeated in a few documents, teaches
LONGEST_TOKEN = 4096

# fastokens takes a microsecond for each string, as long as for 300 bytes of it. So many turns are one string, with what stands
# after each of them in a cleaned part, " ZQ000": cl100k and o200k always cut that off, whatever is before or after, since a
# blank and letters begin a word, and three digits are a whole number.
JOINED_SPLITS = ("cl100k", "o200k")  # gpt2's numbers are of any length
JOINED_BYTES = 4096  # of one string: one wide character makes all of it wide

Batch = tuple[np.ndarray, np.ndarray]  # all ids, (n,) uint32; ids of each text, (texts,) int64


class Encoder:
    """Encodes batches of texts with one engine; special spellings inside a text stay text with any."""

    def __init__(self, tokenizer_json: str, engine: Engine) -> None:
        self.tokenizer_json, self.fast = tokenizer_json, None
        if engine != "tokenizers":
            import fastokens  # optional: a faster equal of the reference

            self.fast = fastokens.Tokenizer.from_json_str(tokenizer_json)
        self.separator = self._encode_each([SEPARATOR.decode()])[0] if engine == "joined" else None

    @functools.cached_property
    def reference(self) -> Tokenizer:
        """Loaded where it is needed: 0.07 s of every process."""
        return Tokenizer(self.tokenizer_json)

    def token_id(self, special_token: str) -> int:
        """The id of a special token."""
        return (self.fast or self.reference.reference).token_to_id(special_token)

    def encode_batch(self, texts: Sequence[str]) -> Batch:
        """(all ids, ids of each text)."""
        said = [text.encode() for text in texts]
        return self.encode_turns(separated(said), np.fromiter(map(len, said), np.int64, len(said)))

    def encode_turns(self, text: bytes | np.ndarray, turn_bytes: np.ndarray) -> Batch:
        """(all ids, ids of each turn) of text as `parts.Documents` have it."""
        joined = None
        if self.separator is not None and len(turn_bytes):
            strings, n_turns = _join(text, turn_bytes)
            joined = self._split(*self._encode_each(strings), n_turns)
            if joined and not any(map(_is_doubtful, strings)):
                return joined
        texts = turn_texts(text, turn_bytes)
        if self.fast is None:
            return self.reference.encode_batch(texts)
        return self._encode_again(texts, *(joined or self._encode_each(texts)))

    def _encode_each(self, texts: list[str]) -> Batch:
        ids, offsets = self.fast.encode_batch_flat(texts, split_special_tokens=True)
        return np.frombuffer(ids, np.uint32), np.diff(np.frombuffer(offsets, np.uint64).astype(np.int64))

    def _split(self, ids: np.ndarray, lengths: np.ndarray, n_turns: np.ndarray) -> Batch | None:
        """Ids of strings as those of the `n_turns` in each of them; None where a turn holds a separator itself."""
        size = len(self.separator)
        found = np.flatnonzero(ids[: max(len(ids) - size + 1, 0)] == self.separator[0])
        for i in range(1, size):
            found = found[ids[found + i] == self.separator[i]]
        if not np.array_equal(np.diff(np.searchsorted(found, np.cumsum(lengths)), prepend=0), n_turns):
            return None
        return np.delete(ids, found[:, None] + np.arange(size)), np.diff(found, prepend=-size) - size

    def _encode_again(self, texts: list[str], ids: np.ndarray, lengths: np.ndarray) -> Batch:
        """The same with the doubtful texts encoded by the reference."""
        doubtful = [i for i, text in enumerate(texts) if _is_doubtful(text)]
        if not doubtful:
            return ids, lengths
        of_each = np.split(ids, np.cumsum(lengths)[:-1])
        for i in doubtful:
            of_each[i] = np.array(self.reference.encode(texts[i]), np.uint32)
        return np.concatenate(of_each), np.fromiter(map(len, of_each), np.int64, len(of_each))


def _join(text: bytes | np.ndarray, turn_bytes: np.ndarray) -> tuple[list[str], np.ndarray]:
    """(strings of about JOINED_BYTES, a separator after each turn; how many turns each is) of at least one turn."""
    begins, blob = turn_begins(turn_bytes), memoryview(text)
    first = np.flatnonzero(np.diff(begins[:-1] // JOINED_BYTES, prepend=-1))
    cuts = np.append(first, len(turn_bytes))
    return [str(blob[a:b], "utf-8") for a, b in itertools.pairwise(begins[cuts].tolist())], np.diff(cuts)


def _is_doubtful(text: str) -> bool:
    return not text.isascii() and any(character in text for character in DOUBTFUL)


def fastest(tokenizer: Tokenizer) -> tuple[Engine, str | None]:
    """(the fastest engine that may be tried, None), or ("tokenizers", why no other can)."""
    if importlib.util.find_spec("fastokens") is None:
        return "tokenizers", ("fastokens is not installed: encoding with tokenizers, same ids, about 40 times slower "
                              "(pip install -r requirements-prep.txt)")  # fmt: skip
    if (longest := max(map(len, tokenizer.vocabulary))) > LONGEST_TOKEN:
        return "tokenizers", (f"a token is {longest} bytes long, too long for fastokens: "
                              "encoding with tokenizers, slower")  # fmt: skip
    return "joined" if can_join(tokenizer) else "fastokens", None


def can_join(tokenizer: Tokenizer) -> bool:
    """Whether nothing but one of JOINED_SPLITS decides where this tokenizer cuts words."""
    reference = tokenizer.reference
    splits = [blank_tokenizer(SPLIT_PATTERNS[name]).pre_tokenizer.__getstate__() for name in JOINED_SPLITS]
    added = reference.get_added_tokens_decoder().values()
    return (
        reference.normalizer is None
        and reference.pre_tokenizer.__getstate__() in splits
        and all(token.special for token in added)
    )


def attempt(load: Callable[[], Encoder], sample: Sequence[str]) -> Batch | str:
    """What the encoder that `load` gives makes of the sample, or why it cannot."""
    try:
        return load().encode_batch(sample)
    except Exception as e:  # whatever it raises about this tokenizer.json, the reference can do it
        return f"fastokens cannot use this tokenizer ({str(e)[:80]}): encoding with tokenizers, slower"


def disproof(made: Batch | str, expected: Batch) -> str | None:
    """Why an engine whose `attempt` gave this must not be used; None where that is what the reference gives."""
    if isinstance(made, str):
        return made
    if all(map(np.array_equal, made, expected)):
        return None
    return "fastokens gives other ids than tokenizers on this corpus: encoding with tokenizers, slower"


def encode_documents(
    documents: Documents, encoder: Encoder, *, val_limit: int, seed: int, dtype: np.dtype
) -> tuple[Encoded, np.ndarray]:
    """(ids of documents, in the order of their place in the dataset; ids of each turn's text, (turns,) int64).

    A document is `<|endoftext|>` and its turns, `<|role|>` ids `<|end|>`, or the bare ids of plain text.
    """
    ids, turn_ids = encoder.encode_turns(documents.text, documents.turn_bytes)
    role_ids = np.array([0, *(encoder.token_id(ROLE_TOKENS[role]) for role in ROLES if role)], np.uint32)
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
        (begins[doc_first], encoder.token_id(END_OF_TEXT)),
        ((begins + first_turn)[spoken], role_ids[documents.turn_role[spoken]]),
        (ends[spoken] - 1, encoder.token_id(END_OF_TURN)),
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
