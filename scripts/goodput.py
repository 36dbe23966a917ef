"""Where a run's paid time went, over all its restarts: `python scripts/goodput.py --run out --price-per-hour 1.2`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import datetime
import json
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli import flags
from cli.errors import UserError
from cli.flags import flag
from cli.progress import duration, is_live_terminal
from store import fs
from store.errors import NotFound
from store.untrusted import parse_json
from train.ledger import Attempt, attempts, read_events, totals

NAMES = {
    "useful": "training",
    "lost": "lost work",
    "start": "start",
    "data": "waiting for data",
    "compile": "compile",
    "aside": "validation, samples",
    "saving": "saving",
    "down": "down",
}


@dataclasses.dataclass(frozen=True)
class GoodputFlags:
    """Flags of scripts/goodput.py."""

    run: str = flag("out", "run folder or URL: the --out of train/run.py", env="PERENNIAL_OUT")
    price_per_hour: float | None = flag(None, "what the machine costs while it is up", parse=flags.price)
    paid_when_down: bool = flag(False, "the machine costs the same while no trainer runs on it")
    json: bool = flag(False, "print one JSON object")


def main(argv: list[str] | None = None) -> int:
    """Print attempts, parts and goodput."""
    args, _ = flags.parse(GoodputFlags, argv, prog="goodput.py", description=__doc__)
    events, ignored = read_events(_text(args.run, "events.jsonl"))
    found = attempts(events, _newest_step(_text(args.run, "metrics.jsonl", missing="")))
    if not found:
        raise UserError(f"{fs.redact(args.run)}: events.jsonl tells of no start: name the --out of train/run.py")
    summary = summarize(found, price=args.price_per_hour, paid_when_down=args.paid_when_down)
    if args.json:
        rows = [dataclasses.asdict(a) for a in found]
        print(json.dumps({**summary, "attempts": rows, "lines_ignored": ignored}, indent=1))
        return 0
    show(("#", "began (UTC)", "machine", "ran", "steps", "lost", "ended"), [_row(a) for a in found], right=(0, 3, 4, 5))
    print()
    show(
        ("time", "", "share", *(["money"] if args.price_per_hour is not None else [])),
        _shares(summary),
        right=(1, 2, 3),
    )
    print()
    print(_closing(summary))
    if ignored:
        print(f"{ignored} lines of events.jsonl are no events: ignored")
    return 0


def summarize(found: list[Attempt], *, price: float | None, paid_when_down: bool) -> dict[str, Any]:
    """What `--json` prints of all attempts together."""
    seconds = totals(found)
    paid = seconds["paid"] + (seconds["down"] if paid_when_down else 0.0)
    crashes = [a for a in found if a.crashed]
    lost = sum(a.steps_lost for a in found)
    summary = {"seconds": seconds, "paid_s": paid, "goodput": seconds["useful"] / paid if paid else 0.0,
               "crashes": len(crashes), "steps": max(a.last_step for a in found), "steps_lost": lost,
               "steps_lost_per_crash": sum(a.steps_lost for a in crashes) / len(crashes) if crashes else 0.0}  # fmt: skip
    if price is not None:
        summary["money"] = {part: price * seconds[part] / 3600 for part in NAMES if part != "down" or paid_when_down}
        summary["money"]["paid"] = price * paid / 3600
    return summary


def _row(a: Attempt) -> tuple[str, ...]:
    began = datetime.datetime.fromtimestamp(a.began_s, datetime.UTC).strftime("%Y-%m-%d %H:%M")
    where = a.machine or a.host or "?"
    return (str(a.number), began, where, duration(a.seconds), f"{a.first_step} to {a.last_step}",
            str(a.steps_lost or ""), a.ended)  # fmt: skip


def _shares(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for part, name in NAMES.items():
        seconds, money = summary["seconds"][part], summary.get("money", {})
        paid = part != "down" or summary["paid_s"] > summary["seconds"]["paid"]
        share = f"{seconds / summary['paid_s']:.1%}" if paid and summary["paid_s"] else "not paid"
        rows.append(
            (name, duration(seconds), share, *([f"{money[part]:.2f}" if part in money else ""] if money else []))
        )
    return rows


def _closing(summary: dict[str, Any]) -> str:
    crashes = summary["crashes"]
    per = f", {summary['steps_lost_per_crash']:.1f} a crash" if crashes else ""
    money = f", {summary['money']['paid']:.2f} in money" if "money" in summary else ""
    return (f"goodput {summary['goodput']:.1%} of {duration(summary['paid_s'])} paid{money}; {crashes} crash"
            f"{'' if crashes == 1 else 'es'}; {summary['steps_lost']} steps lost{per}")  # fmt: skip


def show(head: tuple[str, ...], rows: list[tuple[str, ...]], *, right: tuple[int, ...]) -> None:
    """A table on a terminal, aligned plain lines elsewhere."""
    if is_live_terminal():
        table = Table()
        for i, name in enumerate(head):
            table.add_column(name, justify="right" if i in right else "left")
        for row in rows:
            table.add_row(*map(Text, row))  # Text: a machine's name is no markup
        return Console().print(table)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        print("  ".join(cells).rstrip())
    return None


def _text(run: str, name: str, missing: str | None = None) -> str:
    try:
        return fs.read_bytes(fs.join(run, name)).decode("utf-8", "replace")
    except NotFound as e:
        if missing is not None:
            return missing
        raise UserError(
            f"{fs.redact(run)}: is not a run folder ({name} is missing): name the --out of train/run.py"
        ) from e


def _newest_step(metrics: str) -> int:
    """The step of the last whole line of metrics.jsonl."""
    for line in reversed(metrics.split("\n")):
        try:
            step = parse_json(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if type(step) is int and 0 <= step < 1e9:
            return step
    return 0


if __name__ == "__main__":
    flags.run(main)
