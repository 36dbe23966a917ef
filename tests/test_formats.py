"""Records become documents: conversations in text, and every common shape of JSON record."""

import json

import pytest

from prep import formats, labelled
from prep.formats import Fields, kind_of, record_document, role_and_text

USER_AND_ANSWER = [("user", "a"), ("assistant", "b")]


def test_conversations_by_hand():
    text = (
        "User: Hi!\nAssistant: Hello.\nHow are you?\n\nUser: a\n\nassistant : b\n\nsecond paragraph\n\n"
        "lost its label\nAssistant: yes\n\nSYSTEM: be brief\nHuman: x\nBot: y\n"
    )
    assert list(labelled.conversations(text.encode())) == [
        [("user", "Hi!"), ("assistant", "Hello.\nHow are you?")],
        [("user", "a"), ("assistant", "b\n\nsecond paragraph")],
        [("user", "lost its label"), ("assistant", "yes")],
        [("system", "be brief"), ("user", "x"), ("assistant", "y")],
    ]


def test_turns_apart_by_empty_lines_stay_one_conversation():
    text = "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant: d\n\nAssistant: alone\n"
    assert list(labelled.conversations(text.encode())) == [
        [("user", "a"), ("assistant", "b")],
        [("user", "c"), ("assistant", "d")],
        [("assistant", "alone")],
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "Assistant", "content": "b"}]}',
         [("user", "a"), ("assistant", "b")]),
        ('{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]}', [("user", "a")]),
        ('{"messages": [{"role": "user", "content": null}]}', [("user", "")]),
        ('{"text": "plain", "id": 3}', [(None, "plain")]),
        (r'{"text": "half \ud83d pair, whole \ud83d\ude00"}', [(None, "half \ufffd pair, whole 😀")]),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "unknown_role"),
        ('{"messages": ["x"]}', "bad_message"),
        ('{"text": 3}', "no_text_field"),
        ("[1, 2]", "no_text_field"),
        ('{"text": "cut off', "broken_json"),
        ("[" * 100_000, "broken_json"),
    ],
)  # fmt: skip
def test_jsonl_records(line, expected):
    assert formats.parse_json(line) == expected


def test_plain_text_documents_keep_paragraphs_together():
    text = "\n\n".join(f"paragraph {i} " + "word " * 100 for i in range(200))
    found = list(formats.documents(text, "plain"))
    assert "\n\n".join(d[0][1] for d in found) == text
    assert 3 < len(found) < 10


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, USER_AND_ANSWER),
        ({"conversations": [{"from": "system", "value": "s"}, {"from": "bard", "value": "a"}]}, "unknown_role"),
        ({"conversation": [{"role": "user", "content": "a"}, {"role": "model", "content": "b"}]}, USER_AND_ANSWER),
        ({"messages": json.dumps([{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}])}, USER_AND_ANSWER),
        ({"messages": "no list"}, "broken_json"),
        ({"messages": "{}"}, "bad_message"),
        ({"messages": None, "text": "t"}, [(None, "t")]),
        ({"prompt": "a", "response": "b"}, USER_AND_ANSWER),
        ({"prompt": "a", "completion": "b", "text": "both"}, USER_AND_ANSWER),
        ({"question": "a", "answer": "b", "context": "not an instruction's"}, USER_AND_ANSWER),
        ({"instruction": "a", "input": "", "output": "b"}, USER_AND_ANSWER),
        ({"instruction": "a", "input": "i", "output": "b"}, [("user", "a\n\ni"), ("assistant", "b")]),
        ({"system_prompt": "s", "question": "a", "response": "b"}, [("system", "s"), *USER_AND_ANSWER]),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}, USER_AND_ANSWER),
        ({"prompt": "a", "response": None}, "no_text_field"),
        ({"prompt": "a"}, "no_text_field"),
        ({"text": ""}, [(None, "")]),
        ({"body": "b"}, "no_text_field"),
        (None, "no_text_field"),
    ],
)  # fmt: skip
def test_records(record, expected):
    assert record_document(record) == expected


def test_own_fields_go_before_known_ones():
    record = {"text": "t", "body": "b", "prompt": "p", "response": "r", "q": "a", "a": "b"}
    assert record_document(record, Fields(text="body")) == [(None, "b")]
    assert record_document(record, Fields(user="q", assistant="a")) == USER_AND_ANSWER
    assert record_document(record, Fields(text="missing")) == "no_text_field"


def test_json_that_is_odd_but_json():
    assert formats.parse_json('{"text": "one", "text": "two"}') == [(None, "two")]  # the last of equal keys
    assert formats.parse_json('{"text": "x", "n": 1e999, "m": NaN}') == [(None, "x")]
    assert formats.parse_json('{"text": "x", "n": ' + "9" * 10_000 + "}") == "broken_json"  # Python's limit on integers
    assert formats.parse_json('{"text": "nul \\u0000 and \x7f"}') == [(None, "nul \0 and \x7f")]


def test_unusable_records_are_told_with_their_line():
    lines = ['{"text": "ok"}', "", '{"text": "cut', "  ", '{"id": 1}', '{"text": "ok"}']
    found = list(formats.documents("\n".join(lines), "jsonl", first_line=100))
    assert found[1] == formats.Unusable("broken_json", '{"text": "cut', 102)
    assert (found[2].reason, found[2].line) == ("no_text_field", 104)
    assert len(found) == 4


@pytest.mark.parametrize(
    ("suffix", "head", "kind"),
    [
        (".txt", "User: a\nAssistant: b\n\nUser: c\nAssistant: d\n", "chat"),
        (".txt", "User: a\nAssistant: b\n" * 2000, "turns"),
        (".txt", "It is a truth.\n\nUser: is a word too.\n\nAnd so on.", "plain"),
        (".txt", "one document a line\n" * 2000, "lines"),
        (".txt", '{"text": "JSON Lines, misnamed"}\n{"text": "b"}\n', "jsonl"),
        (".txt", "{curly} text\n", "plain"),
        (".txt", "[Verse 1]\nla la\n", "plain"),
        ("", ' [\n {"text": "x"}]', "json"),
        (".json", '{"text": "a"}\n{"text": "b"}\n', "jsonl"),
        (".json", '{\n "data": []}', None),
        (".jsonl", "anything", "jsonl"),
        (".tsv", "a\tb\n", "csv"),
        ("", "PAR1…", "parquet"),
    ],
)
def test_kind_of(suffix, head, kind):
    assert kind_of(suffix, head.encode()) == kind
    if kind not in ("parquet", None):
        assert kind_of(suffix, b"\xef\xbb\xbf" + head.encode()) == kind


def test_text_without_empty_lines_is_cut_where_a_line_or_a_question_begins():
    lines = [f"line {i} " + "word " * 20 for i in range(1000)]
    found = list(formats.documents("\n".join(lines), "lines"))
    assert "\n".join(d[0][1] for d in found) == "\n".join(lines)
    assert 4 < len(found) < 10
    turns = [("user", "a " * 50), ("assistant", "b " * 50)] * 500
    found = list(formats.documents("\n".join(f"{r}: {t}" for r, t in turns), "turns"))
    assert [t for d in found for t in d] == [(r, t.strip()) for r, t in turns]
    assert 4 < len(found) < 10
    assert {d[0][0] for d in found} == {"user"}


def test_labels():
    assert role_and_text("User: Hi") == ("user", "Hi")
    assert role_and_text("HUMAN \t:Hi") == ("user", "Hi")
    assert role_and_text("ſystem: no") == (None, "ſystem: no")
    assert role_and_text("Users: no") == (None, "Users: no")
