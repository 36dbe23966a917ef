"""Text <-> ids, special tokens, and the rendering of conversations.

Special tokens are ids that only this module's `render` functions emit. The same characters inside a text are ordinary
text: `encode("<|user|>")` gives the ids of those eight characters, so a corpus or a chat message cannot forge a turn.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from gpt.errors import GPTError

END_OF_TEXT = "<|endoftext|>"  # begins every document
END_OF_TURN = "<|end|>"
ROLE_TOKENS = {"user": "<|user|>", "assistant": "<|assistant|>", "system": "<|system|>"}
SPECIAL_TOKENS = (END_OF_TEXT, *ROLE_TOKENS.values(), END_OF_TURN)

# What Tokenizer.render does, in the language of chat templates (Jinja), for programs that read exported models.
CHAT_TEMPLATE = (
    "{{ 'BEGIN' }}{% for m in messages %}"
    "{% if m['role'] not in ROLES %}{{ raise_exception('unknown role ' + m['role']) }}{% endif %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + 'END' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'REPLY' }}{% endif %}"
)
for _name, _value in (
    ("BEGIN", END_OF_TEXT),
    ("ROLES", str(list(ROLE_TOKENS))),
    ("END", END_OF_TURN),
    ("REPLY", ROLE_TOKENS["assistant"]),
):
    CHAT_TEMPLATE = CHAT_TEMPLATE.replace(_name, _value)

# How text is cut into words before BPE. Bytes per token at 32k on 138 MB of real conversation: see docs/tokenizer.md.
SPLIT_PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def blank_tokenizer(pattern: str) -> tokenizers.Tokenizer:
    """An untrained byte-level BPE `tokenizers.Tokenizer` that splits words by the given regular expression."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def special_token(text: str) -> AddedToken:
    """One that is matched as it is written."""
    return AddedToken(text, special=True, normalized=False)


def add_special_tokens(tokenizer: tokenizers.Tokenizer) -> list[str]:
    """Give a tokenizer the special tokens that it lacks, after its last id; returns the added ones."""
    missing = [t for t in SPECIAL_TOKENS if tokenizer.token_to_id(t) is None]
    known = [t for t in SPECIAL_TOKENS if t not in missing]
    tokenizer.add_special_tokens([special_token(t) for t in (*known, *missing)])
    return missing


class Tokenizer:
    """A trained tokenizer with this project's special tokens. Raises GPTError where the JSON is not one."""

    def __init__(self, json_text: str) -> None:
        try:
            reference = tokenizers.Tokenizer.from_str(json_text)
        except Exception as e:  # tokenizers raises bare Exception
            raise GPTError(f"not a tokenizer.json in the Hugging Face format ({str(e)[:120]})") from e
        self._adopt(reference, json_text)

    @classmethod
    def of(cls, reference: tokenizers.Tokenizer) -> "Tokenizer":
        """One that is loaded already: parsing its JSON again would take 0.06 s."""
        tokenizer = cls.__new__(cls)
        tokenizer._adopt(reference, reference.to_str(pretty=True))
        return tokenizer

    def _adopt(self, reference: tokenizers.Tokenizer, json_text: str) -> None:
        self.reference = reference
        missing = [t for t in SPECIAL_TOKENS if self.reference.token_to_id(t) is None]
        if missing:
            raise GPTError(f"the tokenizer has no {', '.join(missing)}: make the dataset with prep/tokenize_bpe.py")
        self.json_text = json_text
        self.reference.encode_special_tokens = True  # special spellings inside text are text
        self.reference.no_truncation()
        self.reference.no_padding()
        self.vocabulary: dict[str, int] = self.reference.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(self.vocabulary.values()) + 1
        self.special_ids = {t: self.reference.token_to_id(t) for t in SPECIAL_TOKENS}
        self.end_of_text, self.end_of_turn = self.special_ids[END_OF_TEXT], self.special_ids[END_OF_TURN]

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never a special id. Half a surrogate pair, which no UTF-8 can hold, is encoded as "?"."""
        return self.reference.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(all ids, (n,) uint32; ids of each text, (len(texts),) int64): the reference for any faster engine."""
        encodings = self.reference.encode_batch_fast(list(texts), add_special_tokens=False)
        lengths = np.fromiter((len(e) for e in encodings), np.int64, len(texts))
        ids = np.fromiter((i for e in encodings for i in e.ids), np.uint32, int(lengths.sum()))
        return ids, lengths

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of ids; special ids appear by their spelling unless skipped. Incomplete UTF-8 shows as U+FFFD."""
        return self.reference.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def render(self, messages: Sequence[tuple[str, str]], *, reply: bool = False) -> list[int]:
        """Ids of a conversation of (role, text) turns: `<|endoftext|><|user|>…<|end|><|assistant|>…<|end|>`.

        With `reply` it ends in `<|assistant|>`, ready for the model to answer. Raises GPTError for an unknown role.
        """
        ids = [self.end_of_text]
        for role, text in messages:
            ids += [self.role_id(role), *self.encode(text), self.end_of_turn]
        return [*ids, self.role_id("assistant")] if reply else ids

    def role_id(self, role: str) -> int:
        """The special id that begins a turn of that role."""
        if role not in ROLE_TOKENS:
            raise GPTError(f"unknown role '{role}': expected one of {', '.join(ROLE_TOKENS)}")
        return self.special_ids[ROLE_TOKENS[role]]


class TextStream:
    """Turns ids into text as they come, holding back a character until all of its bytes are there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.ids, self.shown = tokenizer, [], 0

    def push(self, token_id: int) -> str:
        """The text that this id completes, often its own, sometimes none yet."""
        self.ids.append(token_id)
        text = self.tokenizer.decode(self.ids, skip_special=True)
        if text.endswith("�") and len(self.ids) < 8:
            return ""
        new, self.ids = text, []
        return new
