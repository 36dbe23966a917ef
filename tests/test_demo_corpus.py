"""The demo corpus: the same bytes everywhere, well-formed and distinct conversations, facts asked in many ways."""

import itertools
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import demo_corpus
from scripts.demo_corpus import HELD_OUT_PHRASINGS, KINDS, QUESTIONS, conversations, main

FIRST_OF_SEED_1 = """\
User: How can you help me?
Assistant: I can answer small questions. Just ask me!
User: Quick question. What is the capital city of Germany?
Assistant: The capital of Germany is Berlin.
User: Which word is the opposite of open?
Assistant: The opposite of open is closed.
User: What's the capital of Mexico?
Assistant: The capital of Mexico is Mexico City.
User: How about Spain?
Assistant: The capital of Spain is Madrid."""
SCRIPT = Path(demo_corpus.__file__)
TURNS = re.compile(r"User: (\S.*)\nAssistant: (\S.*)")


def run(*args: object, **env: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, env={**os.environ, **env}, timeout=60)


@pytest.fixture(scope="module")
def corpus() -> str:
    """The default corpus, 4 MB, as the command line prints it."""
    return run("--output", "-").stdout.decode("ascii")


@pytest.fixture(scope="module")
def pairs(corpus: str) -> list[tuple[str, str]]:
    """Every (question, answer) of the corpus."""
    return TURNS.findall(corpus)


def test_same_seed_same_bytes_in_other_processes(corpus):
    for hash_seed in ("0", "77"):
        assert run("--output", "-", PYTHONHASHSEED=hash_seed).stdout.decode() == corpus


def test_the_bytes_are_these_on_every_python_version():
    # Written down once: a Python or a change that draws otherwise is noticed here.
    assert next(conversations(1)) == FIRST_OF_SEED_1


def test_another_seed_gives_other_conversations():
    first = set(itertools.islice(conversations(1), 1000))
    assert len(first & set(itertools.islice(conversations(2), 1000))) < 20


@pytest.mark.parametrize("megabytes", [0.001, 0.25, 1])
def test_size_is_the_one_asked_for_to_within_one_conversation(tmp_path, megabytes):
    out = tmp_path / "corpus.txt"
    assert main(["--output", str(out), "--megabytes", str(megabytes)]) == 0
    assert 0 <= out.stat().st_size - megabytes * 1e6 < 1000


def test_a_smaller_corpus_is_the_beginning_of_a_larger_one(corpus):
    assert corpus.startswith(run("--output", "-", "--megabytes", 0.5).stdout.decode())


def test_every_conversation_is_well_formed(corpus):
    assert corpus.endswith("\n\n")
    for text in corpus[:-2].split("\n\n"):
        lines = text.split("\n")
        assert len(lines) % 2 == 0
        assert 2 <= len(lines) // 2 <= 5
        for i, line in enumerate(lines):
            label = "Assistant: " if i % 2 else "User: "
            said = line.removeprefix(label)
            assert line.startswith(label), line
            assert said == said.strip(), line
            assert said[0].isupper() or said[0].isdigit(), line
            assert said[-1] in ".?!", line
            assert "  " not in said, line
            assert not set("{}<>") & set(said), line


@pytest.mark.parametrize("seed", [1, 2])
def test_exact_dedup_keeps_almost_everything(corpus, seed):
    texts = list(itertools.islice(conversations(seed), corpus.count("\n\n")))
    assert len(set(texts)) >= 0.99 * len(texts)


def test_the_reply_to_a_question_is_always_the_same(pairs):
    # one right answer per fact question: a small model that decodes greedily is not torn between two
    facts = {demo_corpus.render(kind, ask, row) for kind in KINDS for ask in kind.asks for row in kind.rows}
    answers = dict(facts)
    assert len(answers) == len(facts)
    assert all(answers[question] == answer for question, answer in pairs if question in answers)
    assert set(pairs) >= {(q, a) for q, a in facts if q.startswith("What is the capital of ")}


def fact_of(question: str) -> tuple[str, set[str], str]:
    """(answer, every phrasing of the fact that the corpus may use, the question's own phrasing) for a demo question."""
    for kind in KINDS:
        for row in kind.rows:
            for ask in kind.asks:
                asked, answer = demo_corpus.render(kind, ask, row)
                if asked == question:
                    usable = {a for a in kind.asks if demo_corpus.allowed(a, row)}
                    return answer, {demo_corpus.render(kind, a, row)[0] for a in usable}, ask
    raise AssertionError(f"no fact is asked with {question!r}")


@pytest.mark.parametrize(("question", "expected", "note"), QUESTIONS)
def test_the_fact_behind_each_question_is_in_the_corpus_in_several_phrasings(pairs, question, expected, note):
    answer, phrasings, _ = fact_of(question)
    assert expected in answer
    assert note
    found = {q for q, a in pairs if expected in a and q in phrasings}
    assert len(found) >= (8 if "capital" in question else 4)


def test_the_first_question_is_in_the_corpus_and_a_held_out_one_is_nowhere(corpus):
    assert QUESTIONS[0][:2] == ("What is the capital of France?", "Paris")
    assert len(QUESTIONS) == 5
    assert f"User: {QUESTIONS[0][0]}\n" in corpus
    unseen = [q for q, _, _ in QUESTIONS if q.casefold() not in corpus.casefold()]
    assert "Tell me the capital city of Japan." in unseen
    for question in unseen:
        assert fact_of(question)[2] in HELD_OUT_PHRASINGS


def test_held_out_phrasings_are_used_but_never_for_the_facts_held_out(pairs):
    asked = {question for question, _ in pairs}
    for ask, facts in HELD_OUT_PHRASINGS.items():
        kind = next(kind for kind in KINDS if ask in kind.asks)
        key = next(iter(kind.rows[0]))
        assert facts <= {row[key] for row in kind.rows}
        for row in kind.rows:
            question = demo_corpus.render(kind, ask, row)[0]
            if row[key] in facts:
                assert not any(question in other for other in asked)
        assert sum(demo_corpus.render(kind, ask, row)[0] in asked for row in kind.rows) >= 0.75 * (
            len(kind.rows) - len(facts)
        )


def test_sums_are_right():
    (sums,) = [kind for kind in KINDS if kind.name == "sum"]
    assert all(int(row["a"]) + int(row["b"]) == int(row["total"]) for row in sums.rows)


def test_an_existing_file_is_kept_unless_forced(tmp_path):
    out = tmp_path / "corpus.txt"
    out.write_text("mine")
    refused = run("--output", out, "--megabytes", 0.01)
    assert refused.returncode == 2
    assert refused.stdout == b""
    assert refused.stderr.decode().count("\n") == 1
    assert str(out) in refused.stderr.decode()
    assert out.read_text() == "mine"
    assert run("--output", out, "--megabytes", 0.01, "--force").returncode == 0
    assert out.read_text().startswith("User: ")
    assert [p.name for p in tmp_path.iterdir()] == ["corpus.txt"]
    assert stat.S_IMODE(out.stat().st_mode) & stat.S_IRUSR


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("--output", "x.txt", "--megabytes", "0"),
        ("--output", "x.txt", "--megabytes", "nan"),
        ("--output", "x.txt", "--seed", "one"),
        ("--output", "."),
        ("--output", os.devnull, "--force"),
        ("--output", "no/such/folder/x.txt", "--megabytes", "0.01"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(tmp_path, monkeypatch, args):
    monkeypatch.chdir(tmp_path)
    done = run(*args)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: ")
    assert done.stderr.count(b"\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_reader_that_stops_early_sees_no_traceback():
    with subprocess.Popen([sys.executable, str(SCRIPT), "--output", "-"], stdout=-1, stderr=-1) as process:
        assert process.stdout.read(6) == b"User: "
        process.stdout.close()
        assert process.stderr.read() == b""
