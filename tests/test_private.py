"""What becomes a placeholder, and what only looks like it."""

import pytest

from prep import private

RULES = (private.urls, private.emails, private.ips, private.cards, private.phones)


def replaced(text):
    for rule in RULES:
        text = rule(text)
    return text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see https://example.com/a_(b)?c=d#e.", "see [URL]."),
        ("[here](http://example.com/kite/ask), WWW.EXAMPLE.ORG", "[here]([URL]), [URL]"),
        ("(ftp://files.example.net/1.zip) or www.example.org/1!", "([URL]) or [URL]!"),
        ("看http://example.com/x吧", "看[URL]吧"),
        ("http://192.0.2.7:8080/x", "[URL]"),
        ("Müller <müller@mail.example.co.uk>, x+y@corp.local.", "Müller <[EMAIL]>, [EMAIL]."),
        ("`git config user.email me@example.org`", "`git config user.email [EMAIL]`"),
        ("from 203.0.113.245, [8.8.118.88]:", "from [IP], [[IP]]:"),
        ("at 2001:db8:85a3::8a2e:370:7334 or 2001:db8::1", "at [IP] or [IP]"),
        ("4111 1111 1111 1111, 4111111111111111, 3782-822463-10005", "[CARD], [CARD], [CARD]"),
        ("(212) 555-2084, 212-555-2084, 212.555.2084, +1 (415) 555-1236", "[PHONE], [PHONE], [PHONE], [PHONE]"),
        ("1-800-555-0199; +44 20 7946 1472; 020 7946 0018; 06 12 34 56 78", "[PHONE]; [PHONE]; [PHONE]; [PHONE]"),
        ("+491701234567 and 212 555 2084", "[PHONE] and [PHONE]"),
        ("call 123456789", "call [PHONE]"),
        ("Their number is 20 7485 5511. Phone: 1793 414926", "Their number is [PHONE]. Phone: [PHONE]"),
    ],
)
def test_replaced(text, expected):
    assert replaced(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "It's at 10:45 or 7:20 pm on 2019-03-14, 14/03/2019, from 1990-1995 to 2019 - 2020.",
        "$1,200,000 or 350 000 euros, 100-150 lines, 300 400 of them, 3.14159265358979, 6.02e23",
        "ISBN 978-0-306-40615-7 and 0-306-40615-2; SSN-like 12-34-56; score 110-108, 21-19, 6-4",
        "Version 4.10.2.1, Chrome 100.0.4896.127, v10.20.30.40, section 1.2.3.4, 127.0.0.1, 192.168.1.10, 255.255.255.0",
        "std::vector<std::string>, a::b::c, 10:45:30, aa:bb:cc:dd:ee:ff, foo::bar::baz::qux",
        "x = 350000*5/100=17500 and 16128-3294 = 12834; 100000+10000=110000; the number Pi is 3.14159265",
        "barcode number 742617000027, order 1234567890123456, 4111 1111 1111 1112, timestamp 1612345678",
        "@jane said: pkg@1.2.3, git@github.com:a/b, a @ b, me@localhost; http is a protocol, www. is not a link",
        "1532 20th Street, 1435 163rd Avenue #23, Room 4, 75018 Paris, Bethesda, MD 20892-3655",
        "`ping 8.8.118.88 && curl https://example.com` and ```\ncall 123456789\n```",
    ],
)
def test_left_alone(text):
    assert replaced(text) == text


def test_luhn():
    assert private.is_card("4111 1111 1111 1111")
    assert not private.is_card("4111 1111 1111 1112")
    assert not private.is_card("9111 1111 1111 1116")


def test_excerpts_are_masked():
    assert private.mask("jane.doe@ex") == "xxxx.xxx@xx"
    assert private.mask("at 4:15, call +1 212-555-0100") == "at 4:15, call +9 999-999-9999"
