"""Mojibake comes out as ftfy's, and the gate before ftfy lets all of it through.

FTFY_CASES=folder also runs ftfy's own case files (tests/*.json of its repository), which are not copied here.
"""

import json
import os
from pathlib import Path

import ftfy
import pytest
from ftfy.badness import MOJIBAKE_CATEGORIES, is_bad
from hypothesis import given, settings
from hypothesis import strategies as st

from prep.mojibake import _GATE, mojibake

CASES = [
    ("donâ€™t be naÃ¯ve", "don’t be naïve"),
    ("donâ\x80\x99t", "don’t"),
    ("wonÃ¢Â\x80Â\x99t", "won’t"),  # twice
    ("l’humanitÃ©\nl’humanité", "l’humanité\nl’humanité"),  # line by line
    ("Ñ\x81ÐµÐ³Ð¾Ð´Ð½Ñ\x8f", "сегодня"),
    ("des g√¢teaux et un r√©gime √©quilibr√©", "des gâteaux et un régime équilibré"),
    ("voilÃ  le travail", "voilà le travail"),
]
CLEAN = [
    "“naïve café” – it’s 5 €, 20 °C, ½ × ±3 … ¿qué? ¡olé! «bon» §4 © ® ™",
    "Привет, «мир»! Ελλάδα, Łódź, İstanbul, Þór, œuvre, Œuvre, PARCE QUE SUR LEURS PLAQUES IL Y MARQUÉ…",
    "日本語、한국어、中文。 ÃO SÃO ÀÉÎ Â",
]


@pytest.mark.parametrize(("text", "repaired"), CASES)
def test_repaired(text, repaired):
    assert mojibake(text) == repaired


@pytest.mark.parametrize("text", CLEAN)
def test_clean_text_stays(text):
    assert mojibake(text) == text


def alphabet():
    """Every character that ftfy's judgement names, with some ASCII between."""
    named = "".join(MOJIBAKE_CATEGORIES.values()) + "вЂГўВЃ²³¹¼½¾±∂†≠®™´≤≥¥µø∏Ã¡àŸŠž°·»ÂÎÐβ€Άā√≈‚Äìîïòôúùûâóêôæ"
    ranges = [chr(c) for c in (*range(0x80, 0x250), *range(0x370, 0x490))]
    return st.sampled_from([*"aZ. \n", *named, *ranges])


@given(st.text(alphabet(), max_size=8))
@settings(max_examples=1500, deadline=None)
def test_the_gate_lets_all_mojibake_through(text):
    for line in text.split("\n"):
        assert not is_bad(line) or _GATE.search(line)


def case_files():
    folder = os.environ.get("FTFY_CASES")
    return sorted(Path(folder).glob("*.json")) if folder else []


@pytest.mark.skipif(not case_files(), reason="FTFY_CASES names no folder with ftfy's case files")
def test_ftfys_own_cases_come_out_as_ftfys_do():
    cases = [case for path in case_files() for case in json.loads(path.read_text("utf-8"))]
    assert len(cases) > 100
    for case in cases:
        assert mojibake(case["original"]) == ftfy.fix_encoding(case["original"]), case["label"]
