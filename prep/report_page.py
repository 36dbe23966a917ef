"""report.html: the report as one page that needs no network and runs nothing but the few lines that show timing.js.

Every text of the corpus is hostile. The template escapes whatever it is given, and `shown` spells out what is invisible
or moves the text around it; the page's own policy forbids every script but timing.js and those lines.
"""

import base64
import functools
import hashlib
import html
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from prep.charts import Bar, bar_chart, log_log, short
from prep.verdict import DUPLICATES, LATE, UNREADABLE, named, percent, share_of

SHOWN_CHARS = 600  # of any one text: a page must stay small whatever the corpus holds
TOKEN_CHARS = 48
NATS = 0.6931  # of a bit
LABELS = 17  # more bars than this leave no room for a label at every doubling

# Not asked of `unicodedata`: its answer depends on the version of Python, and the page must not.
_ODD = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e0fff]"
)

SCRIPT = """
(function () {
  var t = window.perennial_timing, box = document.getElementById("timing");
  if (!t) return;
  function add(parent, tag, text, kind) {
    var e = parent.appendChild(document.createElement(tag));
    e.textContent = text; e.className = kind || "";
    return e;
  }
  box.textContent = "";
  var table = add(add(box, "div", "", "wide"), "table", ""), head = add(add(table, "thead", ""), "tr", "");
  ["Pass", "Time", "Amount", "Rate", "Most memory"].forEach(function (s, i) { add(head, "th", s, i ? "right" : ""); });
  var body = add(table, "tbody", "");
  t.passes.forEach(function (p) {
    var row = add(body, "tr", "");
    p.forEach(function (s, i) { add(row, "td", s, i ? "right num" : ""); });
  });
  add(box, "p", t.about, "soft");
})();
"""


@functools.cache
def template() -> jinja2.Template:
    """The page's template. Making it takes 35 ms, filling it 2."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, finalize=shown, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"cut": cut, "token": token, "size": size, "amount": amount, "percent": percent}
    environment.filters |= {"named": lambda rule: named(rule).capitalize(), "grouped": "{:,}".format}
    return environment.get_template("report_page.html")


def render(report: dict[str, Any]) -> str:
    """The page of a report."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return template().render(
        report,
        # 'self' is timing.js; a page opened as file:// has no self in some browsers
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'self' file: 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'",
        script=Markup(SCRIPT),
        name=name_of(report),
        share_of=share_of,
        NATS=NATS,
        UNREADABLE=UNREADABLE,
        flow=flow(report),
        changed=changed(report),
        charts=charts(report),
    )


# ---- texts ----------------------------------------------------------------------------------------------------------


def shown(value: Any) -> Any:
    """Any text that reaches the page, as HTML: escaped, cut, and with what is invisible spelled out as U+202E."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else cut(value, SHOWN_CHARS)


def cut(text: str, limit: int) -> Markup:
    """The beginning of a text as HTML."""
    whole = _ODD.sub(lambda odd: f"\x00{ord(odd[0]):04X}\x01", text[:limit])
    spelled = re.sub("\x00([0-9A-F]+)\x01", r'<span class="odd">U+\1</span>', html.escape(whole))
    return Markup(spelled + (" …" if len(text) > limit else ""))


def token(text: str) -> Markup:
    """A token as HTML: the blanks before it, tabs and line ends visible."""
    blanks = len(text) - len(text.lstrip(" "))
    spelled = cut(text[blanks:], TOKEN_CHARS)
    for odd, sign in (("\n", "⏎"), ("\t", "⇥")):
        spelled = spelled.replace(odd, Markup(f'<span class="blank">{sign}</span>'))
    lead = Markup(f'<span class="blank">{"·" * min(blanks, TOKEN_CHARS)}</span>')
    return Markup(f"<code><bdi>{lead}{spelled}</bdi></code>")


def size(n: float) -> str:
    """138280699 -> 138.3 MB."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= limit:
            return f"{n / limit:.1f} {unit}"
    return f"{n:.0f} bytes"


def amount(n: float) -> str:
    """30983725 -> 31.0 million."""
    for limit, unit in ((1e9, "billion"), (1e6, "million")):
        if n >= limit:
            return f"{n / limit:.1f} {unit}"
    return f"{n:,.0f}"


def name_of(report: dict[str, Any]) -> str:
    """corpus.txt, more.jsonl and 3 others."""
    names = [s["name"] + (f" (+{s['files'] - 1} files)" if s["files"] > 1 else "") for s in report["sources"]]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")


# ---- what is drawn --------------------------------------------------------------------------------------------------


def flow(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Where the documents went: for each step its name, how many, and where its bar begins."""
    counts, kept = report["counts"], sum(s["documents"] for s in report["sources"])
    dropped = {name: n for name, n in counts.items() if name.startswith("dropped_") and name != LATE}
    steps = [(named(name).capitalize(), n) for name, n in sorted(dropped.items(), key=lambda item: -item[1])]
    later = DUPLICATES | {"left_out_of_mix": "Left out by --mix"}
    steps += [(label, counts.get(name, 0)) for name, label in later.items()]
    left = counts["documents"]
    rows = [{"label": "Read", "n": left, "begin": 0, "gone": False}]
    for label, n in steps:
        left -= n
        if n:  # what was taken away stands where it was taken from
            rows.append({"label": label, "n": n, "begin": share_of(left, counts["documents"]), "gone": True})
    return [*rows, {"label": "Kept", "n": kept, "begin": 0, "gone": False}]


def changed(report: dict[str, Any]) -> list[tuple[str, int, list[list[str]]]]:
    """(rule, documents, [before, after] excerpts) for each cleaning rule that changed something, the busiest first."""
    rules = {rule: report["counts"][f"changed_{rule}"] for rule in report["changes"]}
    return [(rule, n, report["changes"][rule]) for rule, n in sorted(rules.items(), key=lambda item: -item[1])]


def charts(report: dict[str, Any]) -> dict[str, Markup]:
    """Each chart as SVG."""
    lengths, words = report["lengths"], report["vocabulary"]
    drawn = {
        "documents": length_chart(lengths["document_tokens"], "tokens", "documents"),
        "turns": length_chart(lengths["turn_tokens"], "tokens", "turns"),
        "conversations": length_chart(lengths["conversation_turns"], "turns", "conversations"),
        "ranks": log_log(words["rank_frequency"], says="Occurrences of tokens by rank", x_name="rank of the token",
                         mark_y=100, mark_says="100 occurrences"),
        "token_bytes": token_bytes_chart(words["tokens_by_bytes"]),
        "surprise": surprise_chart(report["surprise"]["documents_by_quarter_bit"]),
    }  # fmt: skip
    return {name: Markup(svg) for name, svg in drawn.items()}


def length_chart(length: dict[str, Any], unit: str, of: str) -> str:
    """A histogram whose bars are half-doublings wide, with the median as a line; nothing where there are none."""
    edges = sorted({round(2 ** (k / 2)) for k in range(80)})
    total = sum(n for *_, n in length["bins"])
    sums: dict[int, int] = {}
    for first, _, n in length["bins"]:
        at = max(i for i, edge in enumerate(edges) if edge <= first)
        sums[at] = sums.get(at, 0) + n
    if not sums:
        return ""
    low, high = min(sums), max(sums)
    bars = []
    for i in range(low, high + 1):
        n, upto = sums.get(i, 0), edges[i + 1] - 1
        span = f"{edges[i]:,}" + (f" to {upto:,}" if upto > edges[i] else "")
        doubling = edges[i].bit_length() - 1 if edges[i].bit_count() == 1 else None
        labelled = doubling is not None and (high - low < LABELS or doubling % 2 == 0)
        share = share_of(n, total)
        bars.append(Bar(share, short(edges[i]) if labelled else "", f"{span} {unit}: {n:,} {of}, {percent(share)}"))
    middle = max(i for i, edge in enumerate(edges) if edge <= length["median"])
    inside = (length["median"] + 1 - edges[middle]) / (edges[middle + 1] - edges[middle])
    return bar_chart(bars, says=f"Histogram of {unit} of {of}; median {length['median']}",
                     mark=middle - low + inside, mark_says=f"median {length['median']:,}")  # fmt: skip


def token_bytes_chart(tokens: list[int]) -> str:
    """The tokens of the text by the bytes they stand for; the last bar is all that are longer."""
    last = len(tokens) - 1
    shares = [share_of(n, sum(tokens)) for n in tokens]
    bars = [
        Bar(share, f"{i}+" if i == last else str(i), f"{i} bytes{' or more' if i == last else ''}: {percent(share)}")
        for i, share in enumerate(shares)
        if i
    ]
    return bar_chart(bars, says="Histogram of the bytes of the tokens used")


def surprise_chart(documents: list[int]) -> str:
    """The documents by their mean bits a token, in quarters of a bit."""
    first = next((i for i, n in enumerate(documents) if n), 0)
    bars = [
        Bar(share_of(n, sum(documents)), str(i // 4) if i % 4 == 0 else "",
            f"{i / 4:g} to {(i + 1) / 4:g} bits a token: {n:,} documents")
        for i, n in enumerate(documents)
        if i >= first
    ]  # fmt: skip
    return bar_chart(bars, says="Histogram of bits per token")
