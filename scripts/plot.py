"""Draw runs: the loss in the terminal, `python scripts/plot.py --run out`; the whole figure, `--output run.png`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import importlib.util
import json
import os
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cli import flags
from cli.errors import UserError
from cli.flags import flag
from store import fs
from store.errors import NotFound
from store.untrusted import parse_json
from train import ledger
from train.folder import read_lines

if TYPE_CHECKING:
    from scripts import figure

FORMATS = (".png", ".pdf", ".svg", ".html")


@dataclass(frozen=True)
class PlotFlags:
    """Flags of scripts/plot.py."""

    run: tuple[str, ...] = flag((), "run folders or URLs: the --out of train/run.py (default: $PERENNIAL_OUT, out)")
    output: tuple[str, ...] = flag((), "files to draw: .png, .pdf, .svg, or .html, one page that needs nothing else")
    x: Literal["step", "tokens"] = flag("step", "what runs are compared by")
    width: int = flag(72, "columns")
    height: int = flag(16, "lines")


def main(argv: list[str] | None = None) -> int:
    """Print the curves, or draw the figure. In a curve a restart is a `|` under the axis, where it went on."""
    args, _ = flags.parse(PlotFlags, argv, prog="plot.py", description=__doc__)
    runs = args.run or (os.environ.get("PERENNIAL_OUT") or "out",)
    if args.output:
        return figures(runs, args.output, by_tokens=args.x == "tokens")
    for run in runs:
        losses, vals, seams = curves(run)
        if len(runs) > 1:
            print(fs.redact(run))
        print(draw(losses, vals, seams, width=max(args.width, 20), height=max(args.height, 4)))
    return 0


def curves(run: str) -> tuple[dict[int, float], dict[int, float], list[int]]:
    """A run's training and validation losses by step, and the steps it was gone on from. Raises UserError."""
    metrics, events = read_log(run, "metrics.jsonl"), read_log(run, "events.jsonl")
    losses = {m["step"]: m["loss"] for m in metrics if m.get("loss") is not None}  # null: no number
    if not losses:
        raise UserError(f"{fs.redact(run)}: no steps logged there: name a run folder, the --out of train/run.py")
    seams = [e["step"] for e in events if e.get("event") == "start" and e.get("step")]
    return losses, {m["step"]: m["val_loss"] for m in metrics if "val_loss" in m}, seams


def figures(runs: tuple[str, ...], outputs: tuple[str, ...], *, by_tokens: bool) -> int:
    """Draw all runs into one figure, and write it to each file."""
    for output in outputs:
        if Path(output).suffix not in FORMATS:
            raise UserError(f"--output {output}: expected a name that ends in {', '.join(FORMATS)}")
        if not Path(output).absolute().parent.is_dir():
            raise UserError(f"--output {output}: there is no folder {Path(output).parent}: make it first")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--output: matplotlib is not installed: pip install matplotlib")
    from scripts import figure

    found = [read_run(run, name) for run, name in zip(runs, short_names(runs), strict=True)]
    if by_tokens and any(run.tokens_per_step is None for run in found):
        raise UserError("--x tokens: a run's config.json does not tell its batch: compare by steps")
    drawn = figure.draw(found, by_tokens=by_tokens)
    for output in outputs:
        figure.save(drawn, found, Path(output))
        print(f"drawn      {output}")
    return 0


def read_run(run: str, name: str) -> "figure.Run":
    """All that the figure shows of a run."""
    from scripts import figure

    losses, vals, seams = curves(run)
    events = read_log(run, "events.jsonl")
    speeds: dict[int, list[tuple[int, float]]] = {}
    for e in events:
        if e.get("event") == "progress":
            speeds.setdefault(e["attempt"], []).append((e["step"], e["tokens_per_s"]))
    told, _ = ledger.read_events("\n".join(map(json.dumps, events)))
    seconds = ledger.totals(ledger.attempts(told, max(losses)))
    parts = {part: seconds[part] for part in ledger.PARTS}
    try:
        about = parse_json(fs.read_bytes(fs.join(run, "config.json")))
    except (NotFound, ValueError):
        about = {}
    about = about if isinstance(about, dict) else {}
    lrs = {m["step"]: m["lr"] for m in read_log(run, "metrics.jsonl") if m.get("lr") is not None}
    return figure.Run(
        name, losses, vals, lrs, list(speeds.values()), seams, parts, figure.tokens_per_step(about),
        figure.facts(about, losses, vals, parts),
    )  # fmt: skip


def short_names(runs: tuple[str, ...]) -> list[str]:
    """The last part of each address, or as many as tell them apart."""
    parts = [fs.redact(run).rstrip("/").split("/") for run in runs]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-n:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [fs.redact(run) for run in runs]


def read_log(run: str, name: str) -> list[dict[str, Any]]:
    """The lines of one of a run's logs."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(fs.read_bytes(fs.join(run, name)))
            return read_lines(path)
    except NotFound as e:
        raise UserError(
            f"{fs.redact(run)}: is not a run folder ({name} is missing): name the --out of train/run.py"
        ) from e


def draw(losses: dict[int, float], vals: dict[int, float], restarts: list[int], *, width: int, height: int) -> str:
    """The curve as text: `·` mean training loss of the steps in a column, `o` validation loss."""
    first, last = min(losses), max(losses)
    span = max(last - first, 1)

    def column(step: int) -> int:
        return min((step - first) * (width - 1) // span, width - 1)

    bins: dict[int, list[float]] = {}
    for step, loss in losses.items():
        bins.setdefault(column(step), []).append(loss)
    means = {c: sum(v) / len(v) for c, v in bins.items()}
    shown = [*means.values(), *(v for s, v in vals.items() if first <= s <= last)]
    low, high = min(shown), max(shown)

    def row(value: float) -> int:
        return round((high - value) / max(high - low, 1e-9) * (height - 1))

    grid = [[" "] * width for _ in range(height)]
    for c, value in means.items():
        grid[row(value)][c] = "·"
    for step, value in vals.items():
        if first <= step <= last:
            grid[row(value)][column(step)] = "o"
    lines = [f"{high - (high - low) * r / (height - 1):7.3f} |{''.join(cells)}" for r, cells in enumerate(grid)]
    marks = [" "] * width
    for step in restarts:
        marks[column(min(max(step, first), last))] = "|"
    lines.append(" " * 8 + "+" + "-" * width)
    lines.append(" " * 9 + f"{first:<{width - 8}}{last:>8}")
    if restarts:
        lines.append(" " * 9 + "".join(marks).rstrip() + f"  restarted after step {', '.join(map(str, restarts))}")
    return "\n".join([*lines, " " * 9 + "· training loss" + ("   o validation loss" if vals else "")])


if __name__ == "__main__":
    flags.run(main)
