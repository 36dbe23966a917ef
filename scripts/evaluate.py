"""How good is a model? Loss, perplexity and bits per byte of text; HellaSwag; its answers over the course of training.

python scripts/evaluate.py --run out --data corpus-tokens
python scripts/evaluate.py --run out --text book.txt --stride 128
python scripts/evaluate.py --run out --hellaswag download
python scripts/evaluate.py --run out --answers
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import contextlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cli import flags
from cli.errors import UserError
from cli.flags import flag
from cli.progress import Meter
from gpt.model import GPT
from gpt.score import text_losses
from gpt.tokenizer import Tokenizer
from scripts import hellaswag
from scripts.loading import load_model
from scripts.plot import read_log
from store import fs
from store.shards import TokenShards

MOST_TEXT_BYTES = 32 << 20


@dataclass(frozen=True)
class EvaluateFlags:
    """Flags of scripts/evaluate.py."""

    run: str = flag("out", "run folder or URL: the --out of train/run.py", env="PERENNIAL_OUT")
    step: int | None = flag(None, "checkpoint of this step instead of the newest")
    device: str = flag("auto", "cuda, mps, cpu, or auto")
    data: str = flag("", "score a split of this token dataset, folder or URL")
    split: Literal["train", "val"] = flag("val", "which")
    tokens: int | None = flag(None, "at most so many of it (default: all)")
    text: tuple[str, ...] = flag((), "score text files, each as one document")
    window: int | None = flag(None, "tokens the model reads at a time (default: its block size)")
    stride: int | None = flag(None, "tokens from one window to the next; fewer give more context (default: the window)")
    batch: int = flag(8, "windows at a time")
    hellaswag: str = flag("", "score HellaSwag: a .jsonl file with ctx, endings and label, or the word download")
    items: int | None = flag(None, "only its first items (default: all)")
    answers: bool = flag(False, "show, as a Markdown table, what training's fixed prompts were answered at each step")
    json: bool = flag(False, "print one JSON object")


@dataclass(frozen=True)
class Score:
    """Sums over a text: of all tokens asked for, and of those that are text (special ones spell no bytes)."""

    tokens: int
    nats: float
    text_nats: float
    text_bytes: int

    @property
    def loss(self) -> float:
        """Mean nats per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Which no tokenizer flatters. NaN where there is no text."""
        return self.text_nats / math.log(2) / self.text_bytes if self.text_bytes else math.nan

    def figures(self) -> dict[str, float]:
        """What is shown of it."""
        return {"tokens": self.tokens, "bytes": self.text_bytes, "loss": self.loss,
                "perplexity": math.exp(self.loss), "bits_per_byte": self.bits_per_byte}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Print a line for each thing asked for, or one JSON object."""
    args, _ = flags.parse(EvaluateFlags, argv, prog="evaluate.py", description=__doc__.split("\n")[0])
    if not args.json:
        evaluate(args)
        return 0
    with contextlib.redirect_stdout(sys.stderr):  # progress and lines for people
        found = evaluate(args)
    print(json.dumps(found, indent=1))
    return 0


def evaluate(args: EvaluateFlags) -> dict[str, Any]:
    """All figures asked for, by name; each is printed as it is found. Raises UserError."""
    if not (args.data or args.text or args.hellaswag or args.answers):
        raise UserError("nothing to do: give --data DIR, --text FILE, --hellaswag FILE or --answers")
    found: dict[str, Any] = {}
    if args.answers:
        found["answers"] = answers(args.run)
        print(table(found["answers"]))
    if args.data or args.text or args.hellaswag:
        items = read_hellaswag(args)
        model, tokenizer = load_model(args.run, device=args.device, step=args.step)
        for name, streams, n_ids in texts(args, tokenizer):
            found[name] = report(name, score(model, tokenizer, streams, n_ids, args))
        if items:
            found["hellaswag"] = score_hellaswag(model, tokenizer, items)
    return found


def texts(args: EvaluateFlags, tokenizer: Tokenizer) -> Iterator[tuple[str, Iterable[np.ndarray], int]]:
    """(name, streams of ids, how many ids) of everything that is to be scored. Raises UserError."""
    for url in args.text:
        if (fs.size(url) or 0) > MOST_TEXT_BYTES:  # encoded at once, which takes some 160 bytes of memory for each
            raise UserError(f"--text {fs.redact(url)}: is larger than {MOST_TEXT_BYTES >> 20} MiB: prepare it with "
                            "prep/tokenize_bpe.py --tokenizer, and give --data")  # fmt: skip
        ids = np.array([tokenizer.end_of_text, *tokenizer.encode(fs.read_text(url))])
        if len(ids) == 1:
            raise UserError(f"--text {fs.redact(url)}: is empty")
        yield fs.redact(url), [ids], len(ids)
    if args.data:
        data = TokenShards(args.data)
        if data.tokenizer_json() != tokenizer.json_text:
            raise UserError(f"--data {fs.redact(args.data)}: was made with another tokenizer than the model's: prepare it with "
                            f"--tokenizer {fs.redact(args.run)}/tokenizer.json")  # fmt: skip
        lengths, left = [], args.tokens
        for shard in data.split(args.split):
            lengths.append(shard.tokens if left is None else min(shard.tokens, left))
            left = None if left is None else left - lengths[-1]
        if sum(lengths) < 2:
            raise UserError(f"--data {fs.redact(args.data)}: its {args.split} split has nothing to score")
        shards = zip(data.split(args.split), lengths, strict=True)
        yield args.split, (data.read(shard, 0, n) for shard, n in shards if n > 1), sum(lengths)


def score(
    model: GPT, tokenizer: Tokenizer, streams: Iterable[np.ndarray], n_ids: int, args: EvaluateFlags
) -> Score:  # fmt: skip
    """Sums over streams of ids; each begins without context, and its first id is not asked for."""
    spelled = token_bytes(tokenizer)
    length = model.config.block_size if args.window is None else args.window
    if not 1 <= length <= model.config.block_size:
        raise UserError(f"--window {length}: expected 1 to the model's block size, {model.config.block_size}")
    stride = length if args.stride is None else args.stride
    total = np.zeros(4)
    with Meter("score", n_ids, " tokens") as meter:
        for ids in streams:
            at = 1
            for losses in text_losses(model, ids, length=length, stride=stride, batch=args.batch):
                nats, size = losses.double().numpy(), spelled[ids[at : at + len(losses)]]
                at += len(losses)
                total += (len(nats), nats.sum(), nats[size > 0].sum(), size.sum())
                meter.add(len(losses))
    return Score(int(total[0]), total[1], total[2], int(total[3]))


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """(vocab_size,) int64: how many bytes of text each id spells; 0 for the special ones.

    In a byte-level BPE each letter of a token stands for one byte.
    """
    special = set(tokenizer.special_ids.values())
    ids = range(tokenizer.vocab_size)
    return np.array([0 if i in special else len(tokenizer.reference.id_to_token(i) or "") for i in ids])


def report(name: str, found: Score) -> dict[str, float]:
    """One line, and its figures."""
    f = found.figures()
    print(f"{name}: loss {f['loss']:.4f}, perplexity {f['perplexity']:.2f}, {f['bits_per_byte']:.4f} bits per byte "
          f"({f['tokens']:,} tokens, {f['bytes']:,} bytes)")  # fmt: skip
    return f


def read_hellaswag(args: EvaluateFlags) -> list[hellaswag.Item]:
    if not args.hellaswag:
        return []
    path = hellaswag.download() if args.hellaswag == "download" else Path(args.hellaswag).expanduser()
    return hellaswag.read_items(path, args.items)


def score_hellaswag(model: GPT, tokenizer: Tokenizer, items: list[hellaswag.Item]) -> dict[str, float]:
    """One line, and its figures."""
    chosen = []
    with Meter("hellaswag", len(items), " items") as meter:
        for choice in hellaswag.choices(model, tokenizer, items):
            chosen.append(choice)
            meter.add(1)
    found = hellaswag.accuracies(items, chosen)
    error = math.sqrt(found["acc_norm"] * (1 - found["acc_norm"]) / len(items))
    print(f"HellaSwag: acc {found['acc']:.4f}, acc_norm {found['acc_norm']:.4f} (per token; ±{error:.4f}), "
          f"{found['acc_norm_lm_eval']:.4f} (per character, as lm-eval) of {len(items):,} items")  # fmt: skip
    return {**found, "stderr": error, "items": len(items)}


def answers(run: str) -> list[dict[str, Any]]:
    """What training's fixed prompts were answered, by step, with the validation loss of that step where there is one.

    From the run's samples/, which outlive its checkpoints. Raises UserError where there are none.
    """
    names = [e.name for e in fs.list_folder(fs.join(run, "samples")) if re.fullmatch(r"step-\d+\.txt", e.name)]
    if not names:
        raise UserError(f"{fs.redact(run)}: has no samples: name a run that was trained with --sample-every")
    vals = {m["step"]: m["val_loss"] for m in read_log(run, "metrics.jsonl") if m.get("val_loss") is not None}
    rows = []
    for name in names:
        step = int(name[5:-4])
        lines = [
            line.removeprefix("sample").strip() for line in fs.read_text(fs.join(run, "samples", name)).splitlines()
        ]
        said = {prompt: reply for prompt, arrow, reply in (line.partition(" ->") for line in lines) if arrow}
        rows.append({"step": step, "val_loss": vals.get(step), "answers": {p: r.strip() for p, r in said.items()}})
    return sorted(rows, key=lambda row: row["step"])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row for each step, a column for each prompt that any step was asked."""
    prompts = list(dict.fromkeys(p for row in rows for p in row["answers"]))
    lines = [("step", "val loss", *prompts), ("---:", "---:", *["---"] * len(prompts))]
    for row in rows:
        loss = "" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
        lines.append((f"{row['step']:,}", loss, *(row["answers"].get(p, "") for p in prompts)))
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    flags.run(main)
