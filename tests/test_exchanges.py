"""Exchanges that an earlier conversation had are taken out of later ones; courtesies stay."""

import json

import numpy as np
import pytest

from gpt.tokenizer import Tokenizer
from prep import corpus as reading
from prep import exchanges
from prep.parts import Documents
from store.shards import TokenShards
from tests.helpers import files, prepare
from tests.test_tokenize_bpe import documents

A = (
    "Why does the moon look larger near the horizon than high above?",
    "It does not, the eye compares it with houses and trees.",
)
B = (
    "How long does a letter from here to Australia take by ordinary mail?",
    "About ten days, in December up to three weeks.",
)
C = (
    "Which of the two roads would you take if it had rained all night?",
    "The upper one: the lower lies under water then.",
)
HI = ("Hi", "Hello! What can I do for you?")


def chat(*pairs):
    return [turn for q, a in pairs for turn in (("user", q), ("assistant", a))]


def text_of(document):
    return "\n".join(f"{role.title()}: {text}" for role, text in document)


def test_an_exchange_is_a_question_with_its_answers():
    first = chat(HI, A)
    second = [("system", "Be brief, and never speak of anything but the weather in the next hundred years, please."), *chat(B),
              ("assistant", "Or by air."), ("user", "A question without an answer " * 5)]  # fmt: skip
    plain = [(None, "Plain text is no exchange. " * 9)]
    records, spans = exchanges.locate(Documents.build([first, second, plain, chat(A)]))
    assert records["doc"].tolist() == [0, 1, 3]
    assert spans.tolist() == [[2, 4], [5, 8], [10, 12]]
    assert records["bytes"].tolist() == [sum(map(len, A)), sum(map(len, B)) + len("Or by air."), sum(map(len, A))]
    assert records["hash"][0] == records["hash"][2] != records["hash"][1]


def test_equal_text_cut_elsewhere_is_another_exchange():
    one = exchanges.locate(Documents.build([chat(A)]))[0]
    other = exchanges.locate(Documents.build([chat((A[0] + A[1][:5], A[1][5:]))]))[0]
    assert one["bytes"] == other["bytes"]
    assert one["hash"] != other["hash"]


def test_without_takes_out_whole_exchanges():
    made = Documents.build([chat(HI, A, B), chat(C), chat(B, HI)])
    left = exchanges.without(made, np.array([True, False, False, True]))
    assert left.turns() == [*HI, *B, *C, *HI]
    assert left.doc_turns.tolist() == [4, 2, 2]
    assert left.turn_role.tolist() == [1, 2] * 4


CONVERSATIONS = [chat(HI, A), chat(A, B), chat(HI, C, B), chat(HI, B, A), chat(B, B, C), chat(HI, ("Thanks", "Bye"))]
EXPECTED = [chat(HI, A), chat(B), chat(HI, C), chat(HI, ("Thanks", "Bye"))]


@pytest.fixture
def said_before(tmp_path):
    path = tmp_path / "chats.txt"
    path.write_text("\n\n".join(map(text_of, CONVERSATIONS)))
    return path


FLAGS = ("--vocab-size", 300, "--dedup", "turns", "--val-fraction", 0)


def test_the_earliest_exchange_is_kept(said_before, tmp_path):
    assert prepare("--input", said_before, "--output", tmp_path / "d", *FLAGS) == 0
    tokenizer = Tokenizer((tmp_path / "d" / "tokenizer.json").read_text("utf-8"))
    found = {tokenizer.decode(d) for d in documents(tmp_path / "d", "train")}
    assert found == {tokenizer.decode(tokenizer.render(d)) for d in EXPECTED}
    counts = TokenShards(str(tmp_path / "d")).metadata["counts"]
    assert counts["duplicate_exchanges"] == 7
    assert counts["dropped_only_duplicate_exchanges"] == 2
    assert counts["encoded"] == 4
    assert counts["encoded_bytes"] == sum(len(text) for d in EXPECTED for _, text in d)
    report = json.loads((tmp_path / "d" / "report.json").read_text())
    assert report["tokenizer_sample_bytes"] == counts["encoded_bytes"]


def test_it_does_not_depend_on_tasks_or_partitions(said_before, tmp_path, monkeypatch):
    prepare("--input", said_before, "--output", tmp_path / "one", *FLAGS)
    monkeypatch.setattr(reading, "TASK_BYTES", 150)
    monkeypatch.setattr(exchanges, "PARTITION", 3)
    prepare("--input", said_before, "--output", tmp_path / "many", *FLAGS)
    assert files(tmp_path / "many") == files(tmp_path / "one")


def test_an_exchange_of_a_dropped_document_does_not_count(tmp_path):
    """Its copy elsewhere is then the earliest that is left."""
    asked = "Question {} of a long conversation that someone saved twice, word for word?"
    long = [(asked.format(i), " ".join(f"so {i} is {j}." for j in range(9))) for i in range(12)]
    chats = [
        chat(*long),
        chat(*long[:6], (long[6][0], long[6][1] + "Really"), *long[7:]),
        chat((long[6][0], long[6][1] + "Really"), C),
    ]
    (tmp_path / "c.txt").write_text("\n\n".join(map(text_of, chats)))
    prepare("--input", tmp_path / "c.txt", "--output", tmp_path / "d", *FLAGS, "--near-dup", 0.8)
    counts = TokenShards(str(tmp_path / "d")).metadata["counts"]
    assert (counts["near_duplicates"], counts["duplicate_exchanges"], counts["encoded"]) == (1, 0, 2)
