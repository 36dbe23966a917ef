"""Cleaning is pure, leaves clean text alone, and says why it drops."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prep.clean import CLEANERS, RULES, clean, clean_turns, drop_reason

CASES = [
    ("light", "a\r\nb\rc\u2028d", "a\nb\nc\nd"),
    ("light", "cafe\u0301", "café"),
    ("light", "a\x00b\x07c\u200bd\ufeffe\u00adf", "abcdef"),
    ("light", "a\x1bb", "ab"),
    ("light", "👩\u200d💻 \u0915\u094d\u200d\u0937", "👩\u200d💻 \u0915\u094d\u200d\u0937"),  # joiners carry meaning
    ("light", "  a \t b\u00a0c  \n\n\n\n d ", "a b c\n\n d"),
    ("standard", "def f(x):\n    if a<b and c>d:\n\treturn  1 \n", "def f(x):\n    if a<b and c>d:\n\treturn 1"),
    ("light", "Tom &amp; Jerry <b>x</b>", "Tom &amp; Jerry <b>x</b>"),
    ("standard", "Tom &amp; Jerry &#39;s &amp;quot;show&amp;quot;", 'Tom & Jerry \'s "show"'),
    ("standard", "one<br />two<b class='x'>three</b> 1 < 2 and a > b", "one\ntwothree 1 < 2 and a > b"),
    ("standard", "x & y &notanentity; <3 List<String> <user>", "x & y &notanentity; <3 List<String> <user>"),
    ("standard", "end\n--------------------\nnext ......... ok", "end\n---\nnext ......... ok"),
    ("standard", "sooooooo good", "sooooooo good"),
    ("strict", "“Quoted” – it’s naïve… €5 日本", '"Quoted" - it\'s naive... 5'),
    ("off", " \x00 a  ", " \x00 a  "),
]


@pytest.mark.parametrize(("rules", "text", "expected"), CASES)
def test_cases(rules, text, expected):
    assert clean(text, RULES[rules]) == expected


@given(st.text())
@settings(max_examples=300, deadline=None)
@pytest.mark.parametrize("rules", ["light", "strict"])
def test_cleaning_twice_changes_nothing_more(rules, text):
    once = clean(text, RULES[rules])
    assert clean(once, RULES[rules]) == once
    assert unicodedata.is_normalized("NFC", once)


@given(st.lists(st.text(alphabet=st.sampled_from("ab \n\t\r\x00&;<br>é\u0301\u200b-…"), max_size=30), max_size=5))
@settings(max_examples=500, deadline=None)
@pytest.mark.parametrize("rules", list(RULES))
def test_turns_are_cleaned_as_if_alone(rules, turns):
    """The shortcut for conversations that are clean as a whole must never show."""
    assert clean_turns(turns, RULES[rules]) == [clean(t, RULES[rules]) for t in turns]


def test_ordinary_text_passes_untouched_through_every_rule():
    text = "User said: \"It's 3 < 4, isn't it?\" — yes & no; naïve café, 100%… 日本語\n\nNext: f(x) = y_1 * 2"
    for name, rule in CLEANERS.items():
        if name != "ascii":
            assert rule(text) == text


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "empty"),
        (["What is 3 + 4?", "7"], None),
        (["ok"], None),
        (["0 1 2 3 4 5 6 7 8 9 " * 20], "few_letters"),
        (["+-" * 100], "few_letters"),
        (["日本語の会話です。" * 30], None),
        (["buy now\n" * 50], "repeated_lines"),
        (["caf\ufffd " * 40], "undecodable"),
    ],
)
def test_drop_reasons(turns, reason):
    assert drop_reason(turns, RULES["standard"]) == reason
    assert drop_reason(turns, RULES["light"]) == ("empty" if not turns else None)
