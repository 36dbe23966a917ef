"""report.html: the report as one page that needs no network and runs nothing but the few lines that show timing.js.

Every text of the corpus is hostile. It reaches the page through `shown` or `shown_token` alone, which escape it and make
what is invisible visible; the page's own policy forbids every script but timing.js and those lines.
"""

import base64
import hashlib
import html
import re
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from prep.charts import Bar, bar_chart, log_log, short
from prep.verdict import DUPLICATES, LATE, UNREADABLE, named, percent, share_of

TEMPLATE = Path(__file__).with_name("report_page.html")
SHOWN_CHARS = 600  # of any one text: a page must stay small whatever the corpus holds
SHOWN_ITEMS = 20
NATS = 0.6931  # of a bit
OTHERS = {"left_out_of_mix": "Left out by --mix"}
SUSPECTS = 5  # shown at once
LABELS = 17  # more bars than this leave no room for a label at every doubling

# What has no picture of its own, or moves the text around it. Not asked of `unicodedata`: its answer depends on the
# version of Python, and the page must not.
_ODD = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\ufffe\uffff"
    "\U000e0000-\U000e0fff]"
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


def render(report: dict[str, Any]) -> str:
    """The page of a report."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    sections = (
        verdict_section,
        flow_section,
        shape_section,
        sources_section,
        token_section,
        document_section,
        settings_section,
    )
    return Template(TEMPLATE.read_text("utf-8")).substitute(
        # 'self' is timing.js; a page opened as file:// has no self in some browsers
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'self' file: 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'",
        title=f"Data report: {shown(name_of(report), 80, plain=True)}",
        script=SCRIPT,
        body="\n".join(section(report) for section in sections),
    )


# ---- words ----------------------------------------------------------------------------------------------------------


def shown(text: str, limit: int = SHOWN_CHARS, *, plain: bool = False) -> str:
    """Hostile text as HTML: escaped, cut, and with what is invisible spelled out."""
    cut, text = len(text) > limit, text[:limit]
    pieces, at = [], 0
    for odd in _ODD.finditer(text):
        name = f"U+{ord(odd[0]):04X}"
        pieces += [html.escape(text[at : odd.start()]), name if plain else f'<span class="odd">{name}</span>']
        at = odd.end()
    return "".join([*pieces, html.escape(text[at:]), " …" if cut else ""])


def shown_token(token: str) -> str:
    """A token as HTML: blanks and line ends visible."""
    spelled = (
        shown(token, 48).replace("\n", '<span class="blank">⏎</span>').replace("\t", '<span class="blank">⇥</span>')
    )
    lead = len(spelled) - len(spelled.lstrip(" "))
    return f'<code><bdi><span class="blank">{"·" * lead}</span>{spelled.lstrip(" ")}</bdi></code>'


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


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """A table of cells that are HTML already; the columns `right` hold numbers."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=' + chr(34) + 'right num' + chr(34) if i in right else ''}>{cell}</{tag}>"
            for i, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>{body}</tbody></table></div>'


def name_of(report: dict[str, Any]) -> str:
    """corpus.txt, more.jsonl and 3 others."""
    names = [s["name"] + (f" (+{s['files'] - 1} files)" if s["files"] > 1 else "") for s in report["sources"]]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")


# ---- sections -------------------------------------------------------------------------------------------------------


def verdict_section(report: dict[str, Any]) -> str:
    """The answer, the figures behind it and what to look at."""
    verdict, counts, totals = report["verdict"], report["counts"], report["totals"]
    tokens = sum(t["tokens"] for t in totals.values())
    stored = sum(t["stored_bytes"] for t in totals.values())
    documents = sum(s["documents"] for s in report["sources"])
    per_token = share_of(sum(s["text_bytes"] for s in report["sources"]), tokens)
    tiles = (
        (size(counts["bytes"]), "of text read"),
        (f"{documents:,}", f"documents kept of {counts['documents']:,}"),
        (amount(tokens), f"tokens from a vocabulary of {report['vocabulary']['size']:,}"),
        (f"{per_token:.2f}", "bytes of text per token"),
        (size(stored), f"stored, {share_of(stored, tokens):.2f} bytes per token"),
        (amount(totals["val"]["tokens"]), "tokens to validate on"),
    )
    findings = "".join(
        f'<li><span class="tag {f["level"]}">{f["level"]}</span><a href="#{f["section"]}">{shown(f["what"])}</a><span>{shown(f["do"])}</span></li>'
        for f in verdict["findings"]
    )
    enough = amount(totals["train"]["tokens"] / 20)
    return f"""<h1><b>Perennial</b> data report: {shown(name_of(report), 160)}</h1>
<section class="card verdict {verdict["level"]}">
<div class="says">{shown(verdict["headline"])}</div>
<p>At 20 tokens per parameter this is one pass of training for a model of about {enough} parameters. A model that knows
nothing but how often each token occurs has a loss of {report["surprise"]["bits_per_token"] * NATS:.2f}: training must get below it soon.</p>
<div class="tiles">{"".join(f"<div><b>{value}</b><span>{label}</span></div>" for value, label in tiles)}</div>
</section>
<ul class="findings">{findings}</ul>"""


def flow_section(report: dict[str, Any]) -> str:
    """Where the documents went, with examples of what was dropped and changed."""
    counts = report["counts"]
    dropped = sorted(
        ((n, name) for name, n in counts.items() if name.startswith("dropped_") and n and name != LATE), reverse=True
    )
    documents = sum(s["documents"] for s in report["sources"])
    steps = [(named(name).capitalize(), n) for n, name in dropped]
    steps += [(word, counts.get(name, 0)) for name, word in (DUPLICATES | OTHERS).items()]
    left, rows = counts["documents"], []
    rows.append(flow_row("Read", left, 0, left, left))
    for label, n in steps:
        if n:
            left -= n
            rows.append(flow_row(label, n, left, n, counts["documents"], gone=True))
    rows.append(flow_row("Kept", documents, 0, documents, counts["documents"]))
    sampled = sum(s["text_bytes"] for s in report["sources"])
    return f"""<section id="flow">
<h2>What happened to the documents</h2>
<p class="lead">{size(counts["bytes"])} read, {size(counts["kept_bytes"])} after cleaning, {size(sampled)} without duplicates.</p>
<div class="card"><div class="wide"><table class="flow"><tbody>{"".join(rows)}</tbody></table></div>
{drop_details(report, dropped)}{change_details(report)}{placeholder_details(counts)}{cluster_details(report)}</div>
</section>"""


def flow_row(label: str, n: int, begin: int, width: int, whole: int, *, gone: bool = False) -> str:
    """One bar of the flow: what was taken away stands where it was taken from."""
    bar = f'<i class="{"gone" if gone else ""}" style="left:{100 * share_of(begin, whole):.3f}%;width:{100 * share_of(width, whole):.3f}%"></i>'
    sign = "−" if gone else ""
    return (f'<tr><td>{shown(label)}</td><td><div class="track">{bar}</div></td><td class="right num">{sign}{n:,}</td>'
            f'<td class="right num soft">{percent(share_of(n, whole))}</td></tr>')  # fmt: skip


def drop_details(report: dict[str, Any], dropped: list[tuple[int, str]]) -> str:
    """What each rule dropped, with examples to judge it by."""
    parts, first = [], report["first_unusable"]
    if first:
        parts.append(
            f'<details open><summary>The first record that is no document</summary><div class="example">{shown(first)}</div></details>'
        )
    for n, name in dropped:
        reason = name.removeprefix("dropped_")
        examples = "".join(
            f'<div class="example" dir="auto">{shown(e)}</div>' for e in report["examples_dropped"].get(reason, [])
        )
        if examples:
            word = "could not be read" if reason in UNREADABLE else "dropped"
            parts.append(f'<details><summary>{shown(named(name).capitalize())} <span class="num">{n:,} {word}</span></summary>'
                         f"<div>{examples}</div></details>")  # fmt: skip
    return "".join(parts)


def change_details(report: dict[str, Any]) -> str:
    """What each rule changed, before and after."""
    parts = []
    changed = {rule: report["counts"][f"changed_{rule}"] for rule in report["changes"]}
    for rule, n in sorted(changed.items(), key=lambda item: (-item[1], item[0])):
        excerpts = "".join(
            f'<div class="before" dir="auto">{shown(before)}</div><div class="after" dir="auto">{shown(after)}</div>'
            for before, after in report["changes"][rule]
        )
        parts.append(f'<details><summary>{shown(named(rule).capitalize())} <span class="num">{n:,} documents</span></summary>'
                     f"<div>{excerpts}</div></details>")  # fmt: skip
    if not parts:
        return ""
    return (f'<details><summary>What cleaning changed <span class="num">{len(parts)} rules, before and after</span></summary>'
            f'<div class="inner">{"".join(parts)}</div></details>')  # fmt: skip


def placeholder_details(counts: dict[str, int]) -> str:
    """How many addresses and numbers were replaced."""
    replaced = {k.removeprefix("replaced_"): n for k, n in counts.items() if k.startswith("replaced_") and n}
    if not replaced:
        return ""
    listed = ", ".join(f"{n:,} {shown(name)}" for name, n in sorted(replaced.items(), key=lambda item: -item[1]))
    return f"<details open><summary>Replaced by placeholders</summary><p>{listed}</p></details>"


def cluster_details(report: dict[str, Any]) -> str:
    """The largest groups of equal or nearly equal documents."""
    clusters = report.get("clusters", [])[:SHOWN_ITEMS]
    if not clusters:
        return ""
    kinds = {"exact": "equal", "near": "nearly equal"}
    rows = [
        [f"{c['size']:,}", kinds[c["kind"]], f'<div class="example" dir="auto">{shown(c["text"], 200)}</div>']
        for c in clusters
    ]
    return (
        "<details><summary>The largest groups of duplicates</summary>"
        f"{table(['Times', '', 'The one that was kept'], rows, right=(0,))}</details>"
    )


# ---- shape ----------------------------------------------------------------------------------------------------------


def shape_section(report: dict[str, Any]) -> str:
    """How long documents and turns are, and who speaks."""
    lengths, roles = report["lengths"], report["roles"]
    documents, turns, conversation = lengths["document_tokens"], lengths["turn_tokens"], lengths["conversation_turns"]
    charts = [
        figure("Document length, in tokens",
               f"Half have {documents['median']:,} or fewer, one in twenty more than {documents['p95']:,}; "
               f"the longest {documents['longest']:,}.", length_chart(documents, "tokens", "documents")),
        figure("Turn length, in tokens",
               f"Half have {turns['median']:,} or fewer, one in twenty more than {turns['p95']:,}.",
               length_chart(turns, "tokens", "turns")),
    ]  # fmt: skip
    if conversation["bins"]:
        says = f"Half have {conversation['median']:,} or fewer, one in twenty more than {conversation['p95']:,}."
        charts.append(figure("Turns per conversation", says, length_chart(conversation, "turns", "conversations")))
    charts.append(figure("Who speaks", "Share of turns, and of the tokens in them.", role_chart(roles)))
    return f"""<section id="shape"><h2>What the documents look like</h2>
<p class="lead">Lengths on a logarithmic scale: each bar is about 1.4 times as long as the one before.</p>
<div class="grid">{"".join(charts)}</div></section>"""


def figure(title: str, says: str, chart: str) -> str:
    """A chart with its heading and the sentence that it illustrates."""
    return f'<figure class="card"><h3>{title}</h3><p>{says}</p>{chart}</figure>'


def length_chart(length: dict[str, Any], unit: str, of: str) -> str:
    """A histogram whose bars are half-doublings wide, with the median as a line."""
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
        upto, share = edges[i + 1] - 1, share_of(sums.get(i, 0), total)
        span = f"{edges[i]:,}" + (f" to {upto:,}" if upto > edges[i] else "")
        power = edges[i].bit_count() == 1 and (high - low < LABELS or (edges[i].bit_length() - 1) % 2 == 0)
        label = short(edges[i]) if power else ""
        bars.append(Bar(share, label, f"{span} {unit}: {sums.get(i, 0):,} {of}, {percent(share)}"))
    middle = max(i for i, edge in enumerate(edges) if edge <= length["median"])
    inside = (length["median"] + 1 - edges[middle]) / (edges[middle + 1] - edges[middle])
    return bar_chart(bars, says=f"Histogram of {unit} of {of}; median {length['median']}",
                     mark=middle - low + inside, mark_says=f"median {length['median']:,}")  # fmt: skip


def role_chart(roles: dict[str, Any]) -> str:
    """Bars of turns and tokens by role."""
    rows = []
    for name in ("turns", "tokens"):
        whole = sum(r[name] for r in roles.values())
        rows.append(f'<tr><th colspan="4">{name.capitalize()}</th></tr>')
        for role, r in roles.items():
            share = share_of(r[name], whole)
            rows.append(f'<tr><td>{shown(role)}</td><td><div class="track"><i style="width:{100 * share:.2f}%"></i></div></td>'
                        f'<td class="right num">{percent(share)}</td><td class="right num soft">{amount(r[name])}</td></tr>')  # fmt: skip
    return f'<div class="wide"><table class="flow"><tbody>{"".join(rows)}</tbody></table></div>'


def sources_section(report: dict[str, Any]) -> str:
    """What each input gave."""
    sources, tokens = report["sources"], sum(s["tokens"] for s in report["sources"])
    rows = []
    for s in sources[:SHOWN_ITEMS]:
        share = share_of(s["tokens"], tokens)
        files = f"<br><small>and {s['files'] - 1:,} more files</small>" if s["files"] > 1 else ""
        files += f"<br><small>{percent(s['fraction'])} of its text is used</small>" if s["fraction"] < 1 else ""
        rows.append([f"<bdi>{shown(s['name'], 80)}</bdi>{files}", size(s["bytes"]), f"{s['read_documents']:,}", f"{s['documents']:,}",
                     amount(s["tokens"]), f'{percent(share)}<div class="track"><i style="width:{100 * share:.2f}%"></i></div>',
                     f"{share_of(s['text_bytes'], s['tokens']):.2f}"])  # fmt: skip
    more = (
        f"<p class='soft'>and {len(sources) - SHOWN_ITEMS} more inputs, in report.json</p>"
        if len(sources) > SHOWN_ITEMS
        else ""
    )
    head = ["Input", "Read", "Documents", "Kept", "Tokens", "Share of tokens", "Bytes per token"]
    return f"""<section id="sources"><h2>Where it came from</h2>
<p class="lead">Few bytes per token mean text of another kind than the rest: another language, code, or garbage.</p>
<div class="card">{table(head, rows, right=(1, 2, 3, 4, 5, 6))}{more}</div></section>"""


# ---- tokens and documents -------------------------------------------------------------------------------------------


def token_section(report: dict[str, Any]) -> str:
    """The vocabulary: suspects, frequencies, lengths."""
    words = report["vocabulary"]
    by_bytes, total = words["tokens_by_bytes"], sum(words["tokens_by_bytes"])
    bars = [Bar(share_of(n, total), f"{i}+" if i == 16 else str(i), f"{i} bytes: {percent(share_of(n, total))} of the tokens")
            for i, n in enumerate(by_bytes) if i]  # fmt: skip
    charts = (
        figure("How often each token occurs", f"{words['never_used']:,} of {words['size']:,} occur nowhere, {words['seldom_used']:,} "
               "fewer than 100 times: those are hardly learnt.",
               log_log(words["rank_frequency"], says="Occurrences of tokens by rank, both logarithmic", x_name="rank of the token",
                       mark_y=100, mark_says="100 occurrences")),
        figure("Length of the tokens used", "Bytes, as a share of all tokens in the text.",
               bar_chart(bars, says="Histogram of the bytes of the tokens used")),
    )  # fmt: skip
    frequent = "".join(
        f'<span title="{t["count"]:,} times">{shown_token(t["token"])}</span>' for t in words["most_frequent"]
    )
    longest = "".join(shown_token(t) for t in words["longest"])
    return f"""<section id="tokens"><h2>Tokens</h2>
<p class="lead">Tokens that are frequent but sit in few documents are the usual sign of markup, tables or machine output that
came with one source. They cost vocabulary and training time, and the model will write them.</p>
<div class="card"><h3>Frequent tokens in few documents</h3>{suspicious_list(words)}</div>
<div class="grid">{"".join(charts)}</div>
<div class="card"><h3>Most frequent</h3><div class="tokens" style="margin:8px 0 16px">{frequent}</div>
<h3>Longest in the vocabulary</h3><div class="tokens" style="margin-top:8px">{longest}</div></div></section>"""


def suspicious_list(words: dict[str, Any]) -> str:
    """Each suspect, where it sits, where it would sit by chance, and one place."""
    looked = f"{words['looked_at_documents']:,} documents"
    items = [
        f'<li>{shown_token(t["token"])} <span class="num">{t["looked_at_count"]:,} times in {t["documents"]:,} documents; '
        f'evenly spread it would be in {t["expected_documents"]:,}</span>'
        f'<div class="example" dir="auto">{shown(t["before"])}<mark>{shown(t["token"])}</mark>{shown(t["after"])}</div></li>'
        for t in words["suspicious"]
    ]  # fmt: skip
    if not items:
        return f'<p class="soft">None, in {looked}.</p>'
    more = ""
    if items[SUSPECTS:]:
        rest = "".join(items[SUSPECTS:])
        more = f'<details><summary>{len(items) - SUSPECTS} more</summary><ul class="docs">{rest}</ul></details>'
    return f'<p class="soft">Counted in {looked}.</p><ul class="docs">{"".join(items[:SUSPECTS])}</ul>{more}'


def document_section(report: dict[str, Any]) -> str:
    """How likely documents are, and those at both ends."""
    surprise = report["surprise"]
    bins, total = surprise["documents_by_quarter_bit"], sum(surprise["documents_by_quarter_bit"])
    first = next((i for i, n in enumerate(bins) if n), 0)
    bars = [Bar(share_of(n, total), f"{i // 4}" if i % 4 == 0 else "", f"{i / 4:g} to {(i + 1) / 4:g} bits a token: {n:,} documents")
            for i, n in enumerate(bins) if i >= first]  # fmt: skip
    usual, odd = surprise["bits_per_token"], sum(bins[round(4 * surprise["odd_from_bits"]) :])
    chart = figure("How surprising documents are", "Mean bits per token when only the frequency of each token is known. A second "
                   "hill at the right is a second kind of text.", bar_chart(bars, says="Histogram of bits per token"))  # fmt: skip
    about = f"""<div class="card"><h3>What that says</h3>
<p class="soft gap">The whole corpus takes {usual:.2f} bits a token, a loss of {usual * NATS:.2f}: what a model reaches that has learnt
which tokens are frequent, and nothing else. A trained one goes far below.</p>
<p class="soft">{percent(share_of(odd, total))} of the documents take {surprise["odd_from_bits"]:g} bits or more: they are made of tokens
that are rare in the rest. In a corpus of one language that is text in another one, code, or garbage; the least likely are below.</p></div>"""
    return f"""<section id="documents"><h2>The least and the most likely documents</h2>
<p class="lead">The least likely are made of tokens that are rare elsewhere: another language, code, or garbage. The most likely say
little, in common words. Documents of fewer than 32 tokens are not listed.</p>
<div class="grid">{chart}{about}</div>
<div class="grid"><div class="card"><h3>Least likely</h3>{document_list(surprise["least_likely"])}</div>
<div class="card"><h3>Most likely</h3>{document_list(surprise["most_likely"])}</div></div></section>"""


def document_list(documents: list[dict[str, Any]]) -> str:
    """Documents with who says what."""
    if not documents:
        return "<p class='soft'>No document has 32 tokens.</p>"
    items = []
    for d in documents:
        turns = "\n".join(
            (f"<b>{shown(role)}</b> " if role else "") + f"<bdi>{shown(text)}</bdi>" for role, text in d["turns"]
        )
        items.append(f'<li><small class="num">{d["bits_per_token"]:.2f} bits a token, {d["tokens"]:,} tokens</small>'
                     f'<div class="doc">{turns}{" …" if d["cut"] else ""}</div></li>')  # fmt: skip
    return f'<ul class="docs">{"".join(items)}</ul>'


def settings_section(report: dict[str, Any]) -> str:
    """The settings that gave this."""
    rows = "".join(
        f"<div><dt>{shown(name.replace('_', '-'))}</dt><dd>{shown(str(value), 60)}</dd></div>"
        for name, value in report["settings"].items()
        if value not in (None, "", [], False)
    )
    return f'<section><h2>Settings</h2><div class="card"><dl>{rows}</dl></div></section>'
