"""HellaSwag (Zellers et al., arXiv:1905.07830): which of four endings does a model find the likeliest?

Contexts and endings as in build-nanogpt and llm.c: the text as it stands, no shot, nothing before it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cli.errors import UserError
from gpt.model import GPT
from gpt.score import id_losses
from gpt.tokenizer import Tokenizer
from store import fs
from store.shards import default_cache

# the authors' own file of 10,042 validation items
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
AT_ONCE = 8  # items, four rows each


@dataclass(frozen=True)
class Item:
    """A context and its endings, of which one is right."""

    context: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Choice:
    """What a model makes of an item: -log p of each ending in nats, its tokens, its characters."""

    nats: tuple[float, ...]
    tokens: tuple[int, ...]
    characters: tuple[int, ...]

    def by(self, weights: tuple[int, ...] | None = None) -> int:
        """The ending of the least loss, or of the least loss per unit of `weights`."""
        return min(range(len(self.nats)), key=lambda i: self.nats[i] / (weights[i] if weights else 1))


def download() -> Path:
    """The validation file in the cache, fetched once and proved by its hash."""
    path = default_cache() / "hellaswag_val.jsonl"
    if not path.exists() or fs.sha256_file(path) != SHA256:
        fs.get_file(URL, path, sha256=SHA256)
    return path


def read_items(path: Path, limit: int | None = None) -> list[Item]:
    """The items of a JSONL file with `ctx`, `endings` and `label`. Raises UserError naming the line that has none."""
    items = []
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(items) == limit:
                    break
                try:
                    data = json.loads(line)
                    item = Item(str(data["ctx"]), tuple(map(str, data["endings"])), int(data["label"]))
                    if not item.context or not all(item.endings) or not 0 <= item.label < len(item.endings):
                        raise ValueError
                except (ValueError, KeyError, TypeError) as e:
                    raise UserError(f"--hellaswag {path}: line {number} is no item with ctx, endings and label") from e
                items.append(item)
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--hellaswag {path}: cannot be read ({getattr(e, 'strerror', None) or e})") from e
    if not items:
        raise UserError(f"--hellaswag {path}: is empty")
    return items


def rows_of(item: Item, tokenizer: Tokenizer, block_size: int) -> list[tuple[list[int], int]]:
    """(ids of context and ending, how many of them are the ending) for each; what does not fit is cut off in front."""
    context = tokenizer.encode(item.context)
    endings = [tokenizer.encode(f" {ending}") for ending in item.endings]
    return [((context + ending)[-(block_size + 1) :], min(len(ending), block_size)) for ending in endings]


def choices(model: GPT, tokenizer: Tokenizer, items: list[Item]) -> Iterator[Choice]:
    """What the model makes of each item."""
    for i in range(0, len(items), AT_ONCE):
        part = items[i : i + AT_ONCE]
        rows = [rows_of(item, tokenizer, model.config.block_size) for item in part]
        losses = iter(id_losses(model, [ids for item_rows in rows for ids, _ in item_rows]))
        for item, item_rows in zip(part, rows, strict=True):
            nats = tuple(float(next(losses)[-n:].double().sum()) for _, n in item_rows)
            yield Choice(nats, tuple(n for _, n in item_rows), tuple(map(len, item.endings)))


def accuracies(items: list[Item], chosen: list[Choice]) -> dict[str, float]:
    """Shares of right choices: by the sum of log p; per token, as nanoGPT's kin do; per character, as lm-eval does."""
    right = {
        "acc": [c.by() for c in chosen],
        "acc_norm": [c.by(c.tokens) for c in chosen],
        "acc_norm_lm_eval": [c.by(c.characters) for c in chosen],
    }
    return {name: sum(p == item.label for p, item in zip(picked, items, strict=True)) / len(items)
            for name, picked in right.items()}  # fmt: skip
