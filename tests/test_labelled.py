"""Conversations found with numpy are those that plain Python finds, whatever the text."""

import itertools
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prep import labelled, reading
from prep.formats import Document, role_and_text
from prep.parts import Gathered


def plainly(text: str) -> list[Document]:
    """The conversations of a text, block by block and line by line."""
    found: list[Document] = []
    for block in re.split(r"\n[ \t\r]*\n", text.removeprefix("\ufeff")):
        if not block or block.isspace():
            continue
        turns: Document = []
        for i, line in enumerate(block.strip().split("\n")):
            role, said = role_and_text(line)
            if role or i == 0:
                turns.append((role, said))
            else:
                turns[-1] = (turns[-1][0], f"{turns[-1][1]}\n{line}")
        turns = [(role, said.strip()) for role, said in turns]
        speaker, said = turns[0]
        if speaker is None and len(turns) == 1 and found:  # one more paragraph
            role, before = found[-1][-1]
            found[-1][-1] = (role, f"{before}\n\n{said}")
            continue
        if speaker is None and len(turns) > 1:  # its label was lost
            turns[0] = ("assistant" if turns[1][0] == "user" else "user", said)
        if found and speaker == "assistant" and found[-1][-1][0] == "user":
            found[-1] += turns
        else:
            found.append(turns)
    return found


PIECES = st.sampled_from(
    ["\n", "\n\n", "\n\n", " ", "\t", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\xa0", "\u2003", "\u2028", "\u3000", "\ufeff",
     "User:", "User: ", "\nUser: ", "user:", "USER :", "\nAssistant: ", "Assistant:", "assistant : ", "aSSISTANT:", "\nBot: ",
     "System: ", "\nHuman: ", "human\t:", "Humans: ", "Assistants:", "Assistant", "User", "ſystem:", "So: ", "Also:\n", ":",
     "u", "b", "a:", "Hi", "you?", "é", "“", "。", "🙂", "\x00", "  indented", "user" + " " * 11 + ":", "user" + " " * 12 + ":"]
)  # fmt: skip
TEXT = st.lists(PIECES, max_size=40).map("".join) | st.text(max_size=60)


@given(TEXT)
@settings(max_examples=2000, deadline=None)
@example("")
@example("\n")
@example("User:\n\nsaid below\n\n \nand more")
@example("first\n\nsecond\n\nUser: a\n\n\t\r\nthird\n\nAssistant: b")
@example("User: a\n\n\x0c\n \x0c\nAssistant: b\n\x0c\n\nAssistant: c")
@example("said before\nAssistant: b\n\nlost\nUser: a\n\nBot: c\n\nSystem: d\nBot: e")
@example("User: a \xa0\n\n\u3000 b\u3000\n\n\u3000\n\nc")
@example("so\nUser: a\nSo: b\nbot")
def test_what_is_found(text):
    assert list(labelled.conversations(text.encode())) == plainly(text)


@given(st.lists(TEXT, min_size=1, max_size=6).map("\n\nUser: ".join), st.integers(1, 40))
@settings(max_examples=300, deadline=None)
def test_pieces_for_the_cache_hold_the_same(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "CACHED_BYTES", size)
        pieces = list(reading._in_cache(text.encode()))
    assert b"".join(pieces) == text.encode()
    assert [d for piece in pieces for d in labelled.conversations(piece)] == plainly(text)


@given(st.lists(st.booleans(), max_size=12), TEXT)
@settings(deadline=None)
def test_runs_are_all_documents_in_order(flags, text):
    import numpy as np

    gathered, expected = Gathered(), []
    for i, _ in enumerate(flags):
        expected.append([("user", f"{i}{text}")] * (i % 3 + 1))
        gathered.add(expected[-1])
    runs = list(gathered.runs(np.array(flags, bool)))
    assert [document for _, run in runs for document in run] == expected
    assert [flag for flag, run in runs for _ in range(len(run))] == flags
    assert all(a[0] != b[0] for a, b in itertools.pairwise(runs))
    joined = Gathered()
    for _, run in runs:
        joined.extend(run)
    assert joined == gathered
