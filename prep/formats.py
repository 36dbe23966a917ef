"""Records as documents, pure: the text of a chat, plain or JSONL chunk, and the rows of any table.

A document is its turns of (role, text); role None is plain text. What cannot be one is given as `Unusable`, with the
reason, so that it is counted and can be shown.
"""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["chat", "turns", "plain", "lines", "jsonl", "json", "csv", "parquet", "arrow"]
RECORDS = ("jsonl", "json", "csv", "parquet", "arrow")  # have fields
Document = list[tuple[str | None, str]]
ROLES = (None, "user", "assistant", "system")  # arrays hold the index
ROLE_INDEX = {role: i for i, role in enumerate(ROLES)}

DOCUMENT_CHARS = 16 << 10  # text without ends of documents is cut at about this: four blocks of 1,024 tokens
EXCERPT_CHARS = 200

ROLE_OF = {"user": "user", "human": "user", "assistant": "assistant", "bot": "assistant", "system": "system"}
_AS_WRITTEN = ROLE_OF | {label.title(): role for label, role in ROLE_OF.items()}  # nearly all: no need to lower them
RECORD_ROLE_OF = ROLE_OF | {"gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "developer": "system"}
TURN_LISTS = ("messages", "conversations", "conversation")  # OpenAI, ShareGPT, LMSYS
USER_FIELDS, EXTRA_FIELDS = ("prompt", "instruction", "question", "query"), ("input", "context")
ASSISTANT_FIELDS = ("response", "completion", "output", "answer")
SYSTEM_FIELDS = ("system", "system_prompt")
TEXT_FIELD = "text"

_LABEL = r"(?:user|human|system)[ \t]{0,9}:"
# where records begin, in kinds that can be entered in the middle. Runs of blanks are bounded so that a boundary can be
# found from a fixed distance before it
BOUNDARY = {
    # not before an assistant's label: an answer may stand an empty line below its question
    "chat": re.compile(rf"\n[ \t\r]{{0,16}}\n(?={_LABEL})".encode(), re.IGNORECASE),
    "turns": re.compile(rf"\n(?={_LABEL})".encode(), re.IGNORECASE),
    "plain": re.compile(rb"\n[ \t\r]{0,16}\n"),
    "lines": re.compile(rb"\n"),
    "jsonl": re.compile(rb"\n"),
}
BOUNDARY_BYTES = 64  # hold any boundary with its label


@dataclass(frozen=True)
class Fields:
    """Names of a user's own, instead of those that are known; "" where none was given."""

    text: str = ""
    user: str = ""
    assistant: str = ""


KNOWN_FIELDS = Fields()


@dataclass(frozen=True)
class Unusable:
    """A record that is no document: why, how it begins, and its line (or row), counted from 1."""

    reason: str
    excerpt: str
    line: int


def kind_of(suffix: str, head: bytes) -> Kind | None:
    """What a file holds, by its name's suffix where that says it, else by how it begins. None for unusable JSON."""
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"ARROW1") or suffix == ".arrow":
        return "arrow"
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    if suffix in (".csv", ".tsv"):
        return "csv"
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if re.match(rb"\[\s*\{", start):
        return "json"
    if start.startswith(b"{") and _is_json(start.split(b"\n", 1)[0]):
        return "jsonl"
    return None if suffix == ".json" else text_kind(head)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


# ---- text -----------------------------------------------------------------------------------------------------------


def text_kind(head: bytes) -> Kind:
    """What a text file is, from how it begins: conversations or not, with empty lines between documents or without."""
    blocks = [b for b in re.split(rb"\n[ \t\r]*\n", head) if b.strip()]
    starts = (b[:64].decode(errors="replace").lstrip("\ufeff \t\r\n") for b in blocks)
    labelled = sum(role_and_text(start)[0] is not None for start in starts)
    chat = labelled * 2 >= max(len(blocks), 1)
    if len(blocks) > 1 or len(head) < DOCUMENT_CHARS:
        return "chat" if chat else "plain"
    return "turns" if chat else "lines"


def documents(
    text: str, kind: Kind, fields: Fields = KNOWN_FIELDS, *, first_line: int = 1
) -> Iterator[Document | Unusable]:
    """The documents of a chunk's text, of any kind but chat: those are found by `labelled.conversations`."""
    text = text.removeprefix("\ufeff")
    if kind == "jsonl":
        for number, line in enumerate(text.split("\n"), first_line):
            if line and not line.isspace():
                document = parse_json(line, fields)
                yield Unusable(document, line[:EXCERPT_CHARS], number) if isinstance(document, str) else document
    elif kind == "turns":
        yield from _runs_of_turns(text)
    elif kind == "plain":
        yield from _passages(_blocks(text), "\n\n")
    elif kind == "lines":
        yield from _passages(text.split("\n"), "\n")
    else:
        raise ValueError(kind)


def _blocks(text: str) -> list[str]:
    return [b for b in re.split(r"\n[ \t\r]*\n", text) if b and not b.isspace()]


def _turns(block: str) -> Document:
    first, *lines = block.strip().split("\n")
    speaker, text = role_and_text(first)
    turns: Document = []
    for line in lines:
        label, colon, said = line.partition(":")
        role = _AS_WRITTEN.get(label) if colon else None
        if role is None:
            role, said = role_and_text(line)
        if role is None:
            text += "\n" + line
        else:
            turns.append((speaker, text.strip()))
            speaker, text = role, said
    return [*turns, (speaker, text.strip())]


def _runs_of_turns(text: str) -> Iterator[Document]:
    """Labelled turns with nothing between conversations: cut before a question, once a document is long enough."""
    run: Document = []
    length = 0
    for role, said in _turns(text):
        if length >= DOCUMENT_CHARS and role == "user":
            yield run
            run, length = [], 0
        run.append((role, said))
        length += len(said)
    if run:
        yield run


def role_and_text(line: str) -> tuple[str | None, str]:
    """("user", "Hi") for "User: Hi"; (None, the line) where no label begins it. Labels in any case."""
    label, colon, rest = line.partition(":")
    if not colon or len(label) >= 16:
        return None, line
    role = _AS_WRITTEN.get(label) or ROLE_OF.get(label.rstrip(" \t").lower())
    return (role, rest.lstrip(" \t")) if role else (None, line)


def _passages(blocks: list[str], between: str) -> Iterator[Document]:
    """Plain text: consecutive paragraphs or lines, joined until a document is DOCUMENT_CHARS long."""
    passage: list[str] = []
    length = 0
    for block in blocks:
        passage.append(block)
        length += len(block)
        if length >= DOCUMENT_CHARS:
            yield [(None, between.join(passage))]
            passage, length = [], 0
    if length:
        yield [(None, between.join(passage))]


def decode(chunk: bytes, *, strict: bool = False) -> tuple[str, int]:
    """(text, number of invalid sequences mended or lost). Raises UnicodeDecodeError on the first one if `strict`.

    A lone byte between ASCII is read as Windows-1252, as in "caf\\xe9" or "don\\x92t"; any other becomes U+FFFD.
    """
    try:
        return str(chunk, "utf-8"), 0
    except UnicodeDecodeError:
        if strict:
            raise
        return _INVALID.subn(_windows_1252, chunk.decode("utf-8", "surrogateescape"))


_INVALID = re.compile("[\udc80-\udcff]+")


def _windows_1252(found: re.Match[str]) -> str:
    """The character of a lone invalid byte, else U+FFFD: more of them together are of another encoding, or cut off."""
    before = found.string[max(found.start() - 1, 0) : found.start()]
    after = found.string[found.end() : found.end() + 1]
    character = found[0].encode("utf-8", "surrogateescape").decode("cp1252", "replace")
    cut = before.islower() and character.isupper()  # "cafÃ" is the first half of a cut "café"
    return character if len(character) == 1 and before.isascii() and after.isascii() and not cut else "\ufffd"


# ---- records --------------------------------------------------------------------------------------------------------


def parse_json(line: str, fields: Fields = KNOWN_FIELDS) -> Document | str:
    """The document of one JSONL record, or the reason it is none."""
    try:
        return record_document(load_json(line), fields)
    except (ValueError, RecursionError):
        return "broken_json"


def load_json(text: str) -> Any:
    """What the JSON says. It can spell half a surrogate pair, which no UTF-8 can hold: that becomes U+FFFD.

    Raises ValueError, and RecursionError for what is nested too deeply.
    """
    value = json.loads(text)
    if "\\ud" in text or "\\uD" in text:
        raw = json.dumps(value, ensure_ascii=False).encode("utf-16", "surrogatepass")
        value = json.loads(raw.decode("utf-16", "replace"))
    return value


def record_document(record: Any, fields: Fields = KNOWN_FIELDS) -> Document | str:
    """The document that a record (a JSON object, a row) holds, or the reason it holds none.

    Known are a list of messages ({role, content} or {from, value}), a question and its answer (with an instruction's
    input and a system prompt), and one text. A user's own `fields` go before all of them.
    """
    if not isinstance(record, dict):
        return "no_text_field"
    if fields.user:
        return _exchange(record, fields.user, fields.assistant)
    if fields.text:
        return _plain(record, fields.text)
    for name in TURN_LISTS:
        if record.get(name):
            return _messages(record[name])
    user = next((f for f in USER_FIELDS if f in record), None)
    assistant = next((f for f in ASSISTANT_FIELDS if f in record), None)
    return _exchange(record, user, assistant) if user and assistant else _plain(record, TEXT_FIELD)


def known_fields(names: list[str], fields: Fields) -> list[str]:
    """Those of a table's columns that `record_document` reads; empty where it can make no document of them."""
    own = [f for f in (fields.text, fields.user, fields.assistant) if f]
    if own:
        return own if set(own) <= set(names) else []
    pair = any(f in names for f in USER_FIELDS) and any(f in names for f in ASSISTANT_FIELDS)
    if not (pair or TEXT_FIELD in names or any(f in names for f in TURN_LISTS)):
        return []
    known = (*TURN_LISTS, *USER_FIELDS, *EXTRA_FIELDS, *ASSISTANT_FIELDS, *SYSTEM_FIELDS, TEXT_FIELD)
    return [n for n in names if n in known]


def _plain(record: dict[str, Any], field: str) -> Document | str:
    text = record.get(field)
    return [(None, text)] if isinstance(text, str) else "no_text_field"


def _exchange(record: dict[str, Any], user: str, assistant: str) -> Document | str:
    asked, answered = record.get(user), record.get(assistant)
    if isinstance(asked, list) and isinstance(answered, list):  # both as messages
        return _messages(asked + answered)
    if not isinstance(asked, str) or not isinstance(answered, str):
        return "no_text_field"
    extra = next((record[f] for f in EXTRA_FIELDS if isinstance(record.get(f), str) and record[f].strip()), "")
    if extra and user == "instruction":
        asked = f"{asked}\n\n{extra}"
    system = next((record[f] for f in SYSTEM_FIELDS if isinstance(record.get(f), str) and record[f].strip()), "")
    return [("system", system)] * bool(system) + [("user", asked), ("assistant", answered)]


def _messages(messages: Any) -> Document | str:
    """OpenAI's {role, content} or ShareGPT's {from, value}; a table may hold the list as JSON text."""
    if isinstance(messages, str):
        try:
            messages = load_json(messages)
        except (ValueError, RecursionError):
            return "broken_json"
    if not isinstance(messages, list):
        return "bad_message"
    turns: Document = []
    for message in messages:
        if not isinstance(message, dict):
            return "bad_message"
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str):
            return "bad_message"
        if role.lower() not in RECORD_ROLE_OF:
            return "unknown_role"
        if isinstance(content, list):  # OpenAI's parts: the text ones
            content = "".join(p["text"] for p in content if isinstance(p, dict) and isinstance(p.get("text"), str))
        turns.append((RECORD_ROLE_OF[role.lower()], content if isinstance(content, str) else ""))
    return turns
