"""The checker passes what is right and fails what is not."""

import json

import pytest

from prep import clean, mojibake
from prep.clean import Rule
from scripts import check_cleaning
from tests.helpers import error_of

SAID = "Is the café near the old harbour open on Sundays?"
ANSWER = "It is, from nine in the morning until the last guest has gone."
PLAIN = f"User: {SAID}\nAssistant: {ANSWER}"
DIRTY = {
    "clean": PLAIN,
    "moji_cp1252": PLAIN.replace("é", "Ã©"),
    "email": PLAIN.replace("old", "old jane.doe@mail.example.co.uk"),
    "html": PLAIN.replace("é", "&eacute;"),
    "ctrl": PLAIN.replace("old", "o\x07ld"),
    "code": PLAIN.replace("old", "```if a <b> c  &amp; d```"),
    "one_turn": f"User: {SAID}",
}


@pytest.fixture
def checked(tmp_path):
    (tmp_path / "c.txt").write_text("\n\n".join(DIRTY.values()))
    truth = [{"kind": kind, "clean": PLAIN, "inserted": ["jane.doe@mail.example.co.uk"]} for kind in DIRTY]

    def check(truth=truth):
        (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, truth)))
        return check_cleaning.main(["--corpus", str(tmp_path / "c.txt"), "--truth", str(tmp_path / "t.jsonl")])

    return check


def test_it_passes_what_is_right(checked, capsys):
    assert checked() == 0
    out = capsys.readouterr().out
    assert "MISSED" not in out
    assert all(
        f"{bar:<20} {1:>6} {1:>6}" in out
        for bar in ("mojibake", "email", "html", "ctrl", "code", "one_turn", "clean kept")
    )


@pytest.mark.parametrize(
    ("rule", "bar"), [("mojibake", "mojibake"), ("emails", "email"), ("entities", "html"), ("controls", "ctrl")]
)
def test_it_fails_when_a_rule_does_nothing(checked, monkeypatch, capsys, rule, bar):
    monkeypatch.setitem(clean.TEXT_RULES, rule, Rule(lambda text: text, lambda look: False))
    assert checked() == 1
    missed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("MISSED")]
    assert missed == [bar]


def test_it_fails_when_code_or_clean_text_is_changed(checked, monkeypatch, capsys):
    monkeypatch.setitem(clean.TEXT_RULES, "mojibake", Rule(str.upper, lambda look: True))
    assert checked() == 1
    out = capsys.readouterr().out
    assert all(f"{bar:<20} {0:>6} {1:>6}" in out for bar in ("code", "clean not repaired"))
    assert mojibake.mojibake(SAID) == SAID


def test_what_is_dropped_has_not_survived(checked, monkeypatch, capsys):
    monkeypatch.setitem(clean.DROP_RULES, "too_short", lambda look: "```" in look.text)
    assert checked() == 1
    assert f"code{'':<16} {0:>6} {1:>6}" in capsys.readouterr().out


def test_another_corpus_is_refused(checked):
    assert "has 1 lines for 7 conversations" in error_of(checked, [{"kind": "clean"}])
