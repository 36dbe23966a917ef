"""The checker passes what is right and fails what is not."""

import json

import numpy as np
import pytest

from scripts import check_dedup
from tests.helpers import error_of
from tests.test_minhash import random_text


@pytest.fixture
def checked(tmp_path):
    rng = np.random.Generator(np.random.PCG64(7))
    texts = [random_text(rng, 100) for _ in range(5)]
    words = texts[1].split()
    words[50] = "changed"
    texts += [texts[0].replace(" ", "  "), " ".join(words), texts[2].upper()]
    (tmp_path / "c.txt").write_text("\n\n".join(f"User: {t}\nAssistant: Yes, indeed." for t in texts))
    truth = [{"kind": "clean"}] * 5 + [
        {"kind": "dup_space", "of": 0},
        {"kind": "near", "of": 1},
        {"kind": "dup_case", "of": 2},
    ]

    def check(truth=truth, *extra):
        (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, truth)))
        return check_dedup.main(["--corpus", str(tmp_path / "c.txt"), "--truth", str(tmp_path / "t.jsonl"), *extra])

    check.truth = truth
    return check


def test_it_passes_what_is_found(checked, capsys):
    assert checked() == 0
    out = capsys.readouterr().out
    assert "exact  1 found, 1 in the truth; 0 missed, 0 false" in out
    assert "near   2 found, 2 in the truth; 0 missed, 0 false" in out


def test_it_fails_what_is_missed(checked, capsys):
    assert checked([*checked.truth[:4], {"kind": "near", "of": 3}, *checked.truth[5:]]) == 1
    assert "1 missed, 0 false" in capsys.readouterr().out


def test_it_fails_what_is_false(checked, monkeypatch, capsys):
    real = check_dedup.neardup.find
    monkeypatch.setattr(check_dedup.neardup, "find", lambda *a: np.where(real(*a) == 3, 0, real(*a)))
    assert checked() == 1
    assert "0 missed, 1 false" in capsys.readouterr().out


def test_another_corpus_is_refused(checked):
    assert "has 2 lines for 8 conversations" in error_of(checked, checked.truth[:2])
