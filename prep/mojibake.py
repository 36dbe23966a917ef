"""Mojibake: UTF-8 that was read as another encoding, once or twice ("donâ€™t"), repaired line by line by ftfy.

ftfy judges at 3 to 5 MB/s. It can only find fault where two characters of its tables stand together, or one of a few
stands alone; everything else needs no judgement.
"""

import functools
import re
from collections.abc import Callable

from cli.errors import UserError
from prep.look import Look

# Characters that ftfy's heuristic (ftfy.badness, version 6) names, but for Greek and Cyrillic letters, which make up whole
# languages: a pair counts only when one of its two is none of those.
_LETTERS = "\u0386-\u03ce\u0401-\u045f"
_SIGNS = (
    "\x80-\u024f\u02c6-\u02dd\u0384\u0385\u0490\u0491\u2010-\u203a\u2044\u20a7\u20ac\u2116\u2122\u2202-\u2265\u2310"
    "\u2320-\u25ca\uf8ff\ufb01\ufb02\ufffd"
)
_ALONE = "\x80-\x9fÂÃŒœ"
_GATE = re.compile(f"[{_ALONE}]|[{_SIGNS}][{_SIGNS}{_LETTERS}]|[{_LETTERS}][{_SIGNS}]|[вВ]Ђ")


def mojibake(text: str) -> str:
    """The text with the lines repaired that ftfy finds to be mojibake; all others as they are."""
    return "\n".join(_fixer()(line) if _GATE.search(line) else line for line in text.split("\n"))


def may_be_mojibake(look: Look) -> bool:
    return _GATE.search(look.wide) is not None


@functools.cache
def _fixer() -> Callable[[str], str]:
    """ftfy with nothing but the repair of encodings. Raises UserError where it is not installed."""
    try:
        import ftfy
    except ImportError as e:
        raise UserError(
            "the cleaning rule mojibake needs ftfy, which is not installed: pip install ftfy, or add --skip-rules mojibake"
        ) from e
    config = ftfy.TextFixerConfig(
        unescape_html=False, remove_terminal_escapes=False, fix_latin_ligatures=False, fix_character_width=False,
        uncurl_quotes=False, fix_line_breaks=False, fix_surrogates=False, remove_control_chars=False, normalization=None,
        explain=False,
    )  # fmt: skip
    return functools.partial(ftfy.fix_text, config=config)
