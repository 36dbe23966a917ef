"""Draw a run's loss curve in the terminal: `python scripts/plot.py --run out`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import tempfile
from dataclasses import dataclass
from typing import Any

from cli import flags
from cli.errors import UserError
from cli.flags import flag
from store import fs
from store.errors import NotFound
from train.folder import read_lines


@dataclass(frozen=True)
class PlotFlags:
    """Flags of scripts/plot.py."""

    run: str = flag("out", "run folder or URL: the --out of train/run.py", env="PERENNIAL_OUT")
    width: int = flag(72, "columns")
    height: int = flag(16, "lines")


def main(argv: list[str] | None = None) -> int:
    """Print the curve; a restart is a `|` under the axis, where it went on."""
    args, _ = flags.parse(PlotFlags, argv, prog="plot.py", description=__doc__)
    metrics, events = read_log(args.run, "metrics.jsonl"), read_log(args.run, "events.jsonl")
    losses = {m["step"]: m["loss"] for m in metrics if m.get("loss") is not None}  # null: no number
    if not losses:
        raise UserError(f"{fs.redact(args.run)}: no steps logged there: name a run folder, the --out of train/run.py")
    restarts = [e["step"] for e in events if e.get("event") == "start" and e.get("step")]
    vals = {m["step"]: m["val_loss"] for m in metrics if "val_loss" in m}
    print(draw(losses, vals, restarts, width=max(args.width, 20), height=max(args.height, 4)))
    return 0


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
