"""Cleaning rules for web debris: HTML entities, tags, blobs of base64. Code between backticks is left as it is."""

import functools
import html
import html.entities
import re
from collections.abc import Callable

from prep.look import Look

# fenced and inline code as Markdown writes them; an unclosed fence runs to the end
_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
_NAMES = (
    "a|b|i|u|p|br|hr|div|span|em|strong|ul|ol|li|dl|dt|dd|code|pre|font|center|small|big|blockquote|img|h[1-6]"
    "|table|thead|tbody|tr|td|th|html|head|body|meta|link|form|input"
)
# attributes need a value: "a<b and c>d" is arithmetic
_ATTRIBUTE = r"""\s+[\w-]+\s*=\s*(?:"[^"<>]*"|'[^'<>]*'|[^\s"'<>]+)"""
_TAG = re.compile(rf"</?(?:{_NAMES})(?:{_ATTRIBUTE}|\s+nowrap){{0,20}}\s*/?>|<!doctype[^<>]*>", re.IGNORECASE)
_HIDDEN = tuple(
    (re.compile(begin, re.IGNORECASE), re.compile(end, re.IGNORECASE))
    for begin, end in ((r"<script\b[^<>]*>", r"</script\s*>"), (r"<style\b[^<>]*>", r"</style\s*>"), ("<!--", "-->"))
)
_BREAK = re.compile(r"<(?:br|hr|/p|/div|/li|/tr|/h[1-6])\s*/?>", re.IGNORECASE)
# who speaks of these means the tags themselves
_ABOUT_MARKUP = re.compile(r"\bhtml|\bcss\b|\bxml\b|\bjsx\b|<script|<\?|<!doctype|\);|=>|\{", re.IGNORECASE)
_BLOB = re.compile(r"(?:data:[\w/+.-]+;base64,)?(?<![A-Za-z0-9+/])[A-Za-z0-9+/]{100,}={0,2}")


def outside_code(rule: Callable[[str], str]) -> Callable[[str], str]:
    """The rule for text in which what stands between backticks is left alone."""

    @functools.wraps(rule)
    def apply(text: str) -> str:
        if "`" not in text:
            return rule(text)
        return "".join(part if i % 2 else rule(part) for i, part in enumerate(_CODE.split(text)))

    return apply


@outside_code
def entities(text: str) -> str:
    """HTML entities -> characters, also escaped twice; a lone & stays."""
    return _ENTITY.sub(_character, _ENTITY.sub(_character, text)) if "&" in text else text


def has_entities(look: Look) -> bool:
    return "&" in look.text and _ENTITY.search(look.text) is not None


def _character(entity: re.Match[str]) -> str:
    # html.unescape alone also takes prefixes: "&notanentity;" would become "¬anentity;"
    known = entity[0][1] == "#" or entity[0][1:] in html.entities.html5
    return html.unescape(entity[0]) if known else entity[0]


@outside_code
def tags(text: str) -> str:
    """Common HTML tags -> nothing or a line break, scripts and styles with their content; a lone < stays."""
    if "<" not in text:
        return text
    for begin, end in _HIDDEN:
        text = _without(text, begin, end)
    return _TAG.sub("", _BREAK.sub("\n", text))


def _without(text: str, begin: re.Pattern[str], end: re.Pattern[str]) -> str:
    """The text without what stands from each `begin` to its `end`; as one expression it would take quadratic time."""
    pieces, at = [], 0
    while (opened := begin.search(text, at)) and (closed := end.search(text, opened.end())):
        pieces.append(text[at : opened.start()])
        at = closed.end()
    return "".join((*pieces, text[at:]))


def has_tags(look: Look) -> bool:
    """In a conversation about markup the tags are its subject, as is one alone; in pages and mail they are debris."""
    if "<" not in look.text or ">" not in look.text:
        return False
    return not look.chat or (len(_TAG.findall(look.text)) > 1 and not _ABOUT_MARKUP.search(look.text))


@outside_code
def blobs(text: str) -> str:
    """Remove base64: a hundred and more letters of both cases, digits, + and / without a blank."""
    return _BLOB.sub(_without_blob, text)


def _without_blob(found: re.Match[str]) -> str:
    blob = found[0]
    encoded = any(map(str.isdigit, blob)) and any(map(str.islower, blob)) and any(map(str.isupper, blob))
    return "" if encoded else blob


def has_blobs(look: Look) -> bool:
    return look.has_word_of(100)
