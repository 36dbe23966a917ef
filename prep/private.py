"""Cleaning rules for what names or finds a person: links, e-mail and IP addresses, card and phone numbers.

Each becomes a placeholder such as [EMAIL]. Code between backticks keeps its links and numbers, but no e-mail address.
"""

import ipaddress
import re

from prep.look import Look, has_number
from prep.markup import outside_code

PLACEHOLDERS = {"url": "[URL]", "email": "[EMAIL]", "ip": "[IP]", "card": "[CARD]", "phone": "[PHONE]"}
PLACEHOLDER = re.compile("|".join(map(re.escape, PLACEHOLDERS.values())))
KIND_OF_RULE = {"urls": "url", "emails": "email", "ips": "ip", "cards": "card", "phones": "phone"}

# ASCII and Latin letters: in Chinese no blank ends a link. Brackets only in pairs, as in [text](https://a.org/b_(c)).
_URL_CHAR = r"[^\s<>\"`()\[\]{}|\\^\u0250-\U0010ffff]"
# case is ignored in the beginning alone: to it "k" equals U+212A, the kelvin sign, so a link ended before each "k"
_URL = re.compile(
    rf"(?<![A-Za-z0-9])(?i:(?:https?|ftp)://|www\.(?=[\w-]+\.))(?:{_URL_CHAR}|\({_URL_CHAR}*\)|\\_)+(?<![.,;:!?'*_])"
)
# the local part is bounded, and begins at its own beginning: a megabyte of letters is read once
_EMAIL = re.compile(r"(?<![\w.%+-])(?!git@)[\w.%+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
_IPV4 = re.compile(r"(?<![\w.\-/])(?<!ersion )(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\w)")
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:]{2,34}(?![\w:])")
_CARD = re.compile(
    r"(?<![\w.,$\-])(?:\d{4}([ -])\d{4}\1\d{4}\1\d{4}|\d{4}([ -])\d{6}\2\d{5}|\d{13,19})(?![\w-]|[.,]\d)"
)
# beginnings and lengths of Visa, Mastercard, American Express, Diners Club, JCB, Discover
_CARD_KINDS = re.compile(
    r"4\d{15}|4\d{12}|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|3(?:0[0-5]|[689]\d)\d{11}|35\d{14}|6(?:011|4[4-9]\d|5\d\d)\d{12}"
)
_MIN_ADDRESS_DIGITS = 7  # 1.2.3.4 is a version or a section
_MIN_COLONS = 3  # std::abc, a::b::c

_BEFORE = r"(?<![\w.,$€£#%/@=<>*^+\-])"
_NO_DIGIT = r"(?<!\d[ (])"  # not the rest of a longer row of numbers
_AFTER = r"(?![\w%°]|[.,:/*=^+\-]\d| ?[/*=+^] ?\d)"
_PHONE = re.compile(
    _BEFORE + r"(?:"
    # +44 20 7946 1472, +1 (415) 555-1236, +493012345678
    r"\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,5}(?:[ .-]?\d{2,5}){1,5}"
    # (212) 555-2084, 555-010-8284, 1-800-555-0199, 1.800.555.0199; with blanks alone only as North America numbers
    r"|\(\d{3}\)[ -]?\d{3}[ .-]\d{4}"
    rf"|{_NO_DIGIT}(?:1[ .-])?(?:\(\d{{3}}\)[ -]?\d{{3}}[ .-]|\d{{3}}-\d{{3}}-|\d{{3}}\.\d{{3}}\.|\d{{3}} \d{{3}}-|[2-9]\d\d [2-9]\d\d )\d{{4}}"
    # 020 7946 0018, 01632 960 001, 06 12 34 56 78
    rf"|{_NO_DIGIT}(?:0\d{{2,4}} \d{{3,4}} \d{{3,4}}|0\d(?:[ .]\d\d){{4}})"
    r")" + _AFTER
)  # fmt: skip
# any grouping, where the words before it say that it is a number to call
_GROUPED = re.compile(_BEFORE + r"\(?\d{1,5}\)?(?:[ -]?\d{2,5}){1,5}" + _AFTER)
_CALLED = re.compile(
    r"\b(?:phone|call|contact|reach|dial|tel|telephone|fax|tty|mobile|whatsapp)\b[^\n\d.!?]*(?:[.:] ?)?$", re.IGNORECASE
)
_NUMBER_IS = re.compile(r"\bnumbers?(?: is| are|:)? ?$", re.IGNORECASE)  # weaker: barcodes have numbers too
_CALLED_CHARS = 40


@outside_code
def urls(text: str) -> str:
    """Links that begin with http://, https://, ftp:// or www. -> [URL]."""
    return _URL.sub(PLACEHOLDERS["url"], text) if _may_link(text) else text


def has_urls(look: Look) -> bool:
    return _may_link(look.text)


def _may_link(text: str) -> bool:
    return ("/" in text and "://" in text) or "www." in text or "WWW." in text


def emails(text: str) -> str:
    """E-mail addresses, in code too -> [EMAIL]."""
    return _EMAIL.sub(PLACEHOLDERS["email"], text) if "@" in text else text


def has_emails(look: Look) -> bool:
    return "@" in look.text


@outside_code
def ips(text: str) -> str:
    """Public IPv4 and IPv6 addresses -> [IP]; those of one's own network, and version numbers, stay."""
    if text.count(".") >= 3 and has_number(text):
        text = _IPV4.sub(_hide_ip, text)
    return _IPV6.sub(_hide_ip, text) if _may_be_ipv6(text) else text


def has_ips(look: Look) -> bool:
    return look.has_number or _may_be_ipv6(look.text)


def _may_be_ipv6(text: str) -> bool:
    colons = text.count(":")
    return colons >= _MIN_COLONS and ("::" in text or colons >= 7)


def _hide_ip(found: re.Match[str]) -> str:
    text = found[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return text
    if address.version == 4 and sum(map(str.isdigit, text)) < _MIN_ADDRESS_DIGITS:
        return text
    if address.version == 6 and text.count(":") < _MIN_COLONS:
        return text
    own = any(address in network for network in _OWN if network.version == address.version)
    return text if own else PLACEHOLDERS["ip"]


# loopback, home networks, masks; not ipaddress.is_private, which counts the addresses of documentation among them
_OWN = tuple(map(ipaddress.ip_network, ("0.0.0.0/8", "10.0.0.0/8", "127.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16",
                                        "169.254.0.0/16", "255.0.0.0/8", "::/127", "fe80::/10", "fc00::/7")))  # fmt: skip


@outside_code
def cards(text: str) -> str:
    """Payment card numbers, with a known beginning and a right check digit -> [CARD]."""
    if not has_number(text):
        return text
    return _CARD.sub(lambda found: PLACEHOLDERS["card"] if is_card(found[0]) else found[0], text)


def is_card(text: str) -> bool:
    """Whether the digits are a card's by beginning and length, and pass the Luhn check (ISO/IEC 7812-1)."""
    number = "".join(filter(str.isdigit, text))
    doubled = [d * 2 - 9 * (d > 4) for d in map(int, number[-2::-2])]
    return _CARD_KINDS.fullmatch(number) is not None and (sum(map(int, number[-1::-2])) + sum(doubled)) % 10 == 0


@outside_code
def phones(text: str) -> str:
    """Phone numbers as they are commonly written, or after words such as "call" -> [PHONE]."""
    if not has_number(text):
        return text
    return _GROUPED.sub(_hide_called, _PHONE.sub(_hide_phone, text))


def _hide_phone(found: re.Match[str]) -> str:
    digits = sum(map(str.isdigit, found[0]))
    return PLACEHOLDERS["phone"] if 9 <= digits <= 15 else found[0]  # E.164


def _hide_called(found: re.Match[str]) -> str:
    words = found.string[max(found.start() - _CALLED_CHARS, 0) : found.start()]
    grouped = " " in found[0] or "-" in found[0]
    called = _CALLED.search(words) or (grouped and _NUMBER_IS.search(words))
    return _hide_phone(found) if called else found[0]


def has_numbers(look: Look) -> bool:
    return look.has_number


_ADDRESS = re.compile(r"[\w.%+-]+@[\w.-]*")
_DIGITS = re.compile(r"[+(]?\d[\d ().+/:-]{5,}\d")


def mask(text: str) -> str:
    """Excerpts for reports, which travel with a dataset: e-mail addresses as xxx@xxx.xx, numbers as 999-9999."""
    text = _ADDRESS.sub(lambda found: re.sub(r"[^\W_]", "x", found[0]), text)
    return _DIGITS.sub(lambda found: re.sub(r"\d", "9", found[0]), text)
