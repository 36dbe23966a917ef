"""Named model sizes. A preset sets depth, heads and width; vocabulary, block size and the rest stay the caller's."""

import difflib
from dataclasses import fields
from typing import Any

from gpt.errors import GPTError
from gpt.model import GPTConfig

# gpt2_small and gpt2_medium: Radford et al. 2019, table 2. n_head gives heads 32 to 64 wide throughout.
PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"n_layer": 2, "n_head": 4, "n_embd": 128},
    "small": {"n_layer": 4, "n_head": 4, "n_embd": 256},
    "medium": {"n_layer": 6, "n_head": 6, "n_embd": 384},
    "large": {"n_layer": 8, "n_head": 8, "n_embd": 512},
    "xlarge": {"n_layer": 10, "n_head": 12, "n_embd": 768},
    "gpt2_small": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2_medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
}


def preset(name: str, **overrides: Any) -> GPTConfig:
    """The preset's config with some fields replaced; an unknown name or field raises GPTError with the nearest one."""
    if name not in PRESETS:
        raise GPTError(f"unknown preset {name!r}{_nearest(name, PRESETS)}; choose one of {', '.join(PRESETS)}")
    known = [field.name for field in fields(GPTConfig)]
    for key in overrides:
        if key not in known:
            raise GPTError(f"unknown model setting {key!r}{_nearest(key, known)}; choose from {', '.join(known)}")
    return GPTConfig(**{**PRESETS[name], **overrides})


def _nearest(word: str, known) -> str:
    match = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {match[0]!r}?" if match else ""
