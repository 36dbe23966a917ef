"""A tokenizer the user already has: a tokenizer.json, or GPT-2's pair of vocabulary and merges."""

import json

import tokenizers

from cli.errors import UserError
from gpt.tokenizer import SPLIT_PATTERNS, Tokenizer, add_special_tokens
from prep.bpe import assemble
from store import fs

PAIRS = {"encoder.json": "vocab.bpe", "vocab.json": "merges.txt"}  # OpenAI's names, Hugging Face's names
# every byte that UTF-8 has occurs in it: ASCII, all continuations, all beginnings of two, three and four bytes
PROBE = "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 0x400), *range(0xE000, 0x110000, 0x1000)]))


def load(where: str) -> tuple[Tokenizer, list[str]]:
    """(tokenizer with all special tokens, those that were added) of a file, or of a folder that holds it.

    Ids that the files give stay. Raises UserError where it is not a byte-level BPE that can give back any text.
    """
    url = _find(where)
    folder, _, name = url.rpartition("/")
    if name in PAIRS:
        tokenizer = _from_pair(url, fs.join(folder, PAIRS[name]) if folder else PAIRS[name])
        kind = "BPE"
    else:
        tokenizer, kind = _from_json(url)
    added = add_special_tokens(tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if kind != "BPE" or tokenizer.decode(tokenizer.encode(PROBE, add_special_tokens=False).ids) != PROBE:
        raise UserError(
            f"{fs.redact(url)}: a {kind} tokenizer that does not give text back exactly; expected a byte-level BPE"
        )
    return Tokenizer.of(tokenizer), added


def _find(where: str) -> str:
    """The file to begin with: tokenizer.json, or the vocabulary of a pair."""
    folder, slash, name = where.rpartition("/")
    for vocab, merges in PAIRS.items():
        if name == merges:
            return f"{folder}{slash}{vocab}"
    if name.endswith(".json"):
        return where
    for known in ("tokenizer.json", *PAIRS):
        if fs.exists(fs.join(where, known)):
            return fs.join(where, known)
    if fs.is_local(where) and fs.local_path(where).is_dir():
        pairs = ", ".join(f"{vocab} with {merges}" for vocab, merges in PAIRS.items())
        raise UserError(f"--tokenizer {where}: the folder has none of tokenizer.json, {pairs}")
    return where


def _from_json(url: str) -> tuple[tokenizers.Tokenizer, str]:
    """(tokenizer, type of its model)."""
    text = fs.read_text(url)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
        return tokenizer, type(tokenizer.model).__name__
    except Exception as e:  # tokenizers raises bare Exception
        raise UserError(f"{fs.redact(url)}: not a tokenizer.json in the Hugging Face format ({str(e)[:100]})") from e


def _from_pair(vocab_url: str, merges_url: str) -> tokenizers.Tokenizer:
    """GPT-2's format: token -> id as JSON; a line for each merge, in order, after a line that names the version."""
    try:
        vocab = json.loads(fs.read_text(vocab_url))
        if not isinstance(vocab, dict) or sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError("expected every id from 0 on, once")
    except (ValueError, TypeError) as e:
        raise UserError(f"{fs.redact(vocab_url)}: not a vocabulary of tokens and ids ({str(e)[:100]})") from e
    lines = fs.read_text(merges_url).replace("\r", "").split("\n")
    if lines and lines[0].startswith("#version"):
        del lines[0]
    try:
        merges = [(a, b) for a, b in (line.split(" ") for line in lines if line)]
        return assemble(vocab, merges, SPLIT_PATTERNS["gpt2"])
    except Exception as e:  # tokenizers raises bare Exception
        raise UserError(f"{fs.redact(merges_url)}: not the merges of that vocabulary ({str(e)[:100]})") from e
