"""The figure of one run or of several: loss, learning rate, speed and where the paid time went, as PNG, PDF, SVG or HTML."""

import html
import io
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.figure
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter

from cli.progress import count, duration
from scripts.goodput import NAMES
from train.ledger import PARTS

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito: for all eyes
SHADES = ("#009E73", "#D55E00", "#999999", "#56B4E9", "#CC79A7", "#F0E442", "#0072B2")  # of PARTS, useful first
MOST_POINTS = 800  # of a curve: what a screen can show
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6",
         "axes.axisbelow": True, "svg.fonttype": "none", "pdf.fonttype": 42, "legend.frameon": False}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What is drawn of a run. `x` maps a step to the axis: itself, or tokens."""

    name: str
    losses: dict[int, float]
    vals: dict[int, float]
    lrs: dict[int, float]
    speeds: list[list[tuple[int, float]]]  # (step, tokens/s), one list for each attempt
    seams: list[int]  # steps that a later attempt went on from
    seconds: dict[str, float]  # by part of the paid time; empty where it is not known
    tokens_per_step: int | None = None
    facts: dict[str, str] = field(default_factory=dict)  # for the table below the page's figure

    def x(self, step: float, by_tokens: bool) -> float:
        return step * (self.tokens_per_step or 1) if by_tokens else step


def draw(runs: list[Run], *, by_tokens: bool = False) -> matplotlib.figure.Figure:
    """The figure: loss above; learning rate, speed and paid time below. Restarts are dotted lines."""
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(11, 7.2), layout="constrained")
        grid = figure.add_gridspec(2, 3, height_ratios=(2, 1))
        loss, lr, speed = (figure.add_subplot(g) for g in (grid[0, :], grid[1, 0], grid[1, 1]))
        for run, color in zip(runs, _colors(len(runs)), strict=True):
            _curves(run, color, loss, lr, speed, by_tokens=by_tokens, alone=len(runs) == 1)
        for axes, title in ((loss, "loss"), (lr, "learning rate"), (speed, "tokens per second")):
            axes.set_title(title, loc="left", fontweight="bold")
            axes.set_xlabel("tokens" if by_tokens else "step")
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.set_xlim(0, 1.01 * max(run.x(max(run.losses), by_tokens) for run in runs))
        _focus(loss, runs)
        speed.yaxis.set_major_formatter(EngFormatter(sep=""))
        speed.set_ylim(0, 1.1 * speed.dataLim.y1 if speed.lines else 1)
        lr.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        lr.set_ylim(bottom=0)
        loss.legend(loc="upper right", ncols=min(len(loss.get_legend_handles_labels()[1]), 4))
        if not any(run.speeds for run in runs):
            speed.text(0.5, 0.5, "none logged", ha="center", transform=speed.transAxes, color="#777777")
        _paid(figure.add_subplot(grid[1, 2]), runs)
        if len(runs) == 1:
            facts = ", ".join(f"{key} {value}" for key, value in runs[0].facts.items() if value)
            figure.suptitle(f"{runs[0].name}: {facts}", x=0.01, ha="left", fontsize=9, color="#555555")
    return figure


def _colors(n: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(n)]


def _curves(run: Run, color: str, loss: Axes, lr: Axes, speed: Axes, *, by_tokens: bool, alone: bool) -> None:
    def xy(points: dict[int, float] | list[tuple[int, float]]) -> tuple[list[float], list[float]]:
        pairs = sorted(points.items()) if isinstance(points, dict) else points
        return [run.x(s, by_tokens) for s, _ in pairs], [v for _, v in pairs]

    loss.plot(*xy(thinned(run.losses)), color=color, alpha=0.25, linewidth=0.8)
    label = "training, smoothed" if alone else f"{run.name}"
    loss.plot(*xy(thinned(smoothed(run.losses))), color=color, linewidth=1.6, label=label)
    if run.vals:
        label = "validation" if alone else f"{run.name}, validation"
        one = len(run.vals) > 40
        loss.plot(*xy(run.vals), color=COLORS[1] if alone else color, linestyle="--", linewidth=1.2,
                  marker=None if one else "o", markersize=4, label=label)  # fmt: skip
    lr.plot(*xy(thinned(run.lrs)), color=color, linewidth=1.4)
    for attempt in run.speeds:
        speed.plot(*xy(attempt), color=color, linewidth=1.2, marker="o" if len(attempt) < 20 else None, markersize=3)
    for i, step in enumerate(run.seams):
        for axes in (loss, lr, speed):
            seam = "restart" if alone and axes is loss and i == 0 else None
            axes.axvline(
                run.x(step, by_tokens), color="#777777" if alone else color, linestyle=":", linewidth=1.1, label=seam
            )


def _focus(axes: Axes, runs: list[Run]) -> None:
    """Leave out of sight the fall of the first twentieth, which would flatten all that follows."""
    shown = []
    for run in runs:
        begins = max(run.losses) / 20
        shown += [v for means in (smoothed(run.losses), run.vals) for step, v in means.items() if step >= begins]
    if shown and max(shown) > min(shown):
        room = 0.05 * (max(shown) - min(shown))
        axes.set_ylim(min(shown) - room, max(shown) + room)


def _paid(axes: Axes, runs: list[Run]) -> None:
    """One bar a run: the parts of its paid time, the useful one first and named."""
    axes.set_title("paid time", loc="left", fontweight="bold")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.tick_params(length=0)
    told = [(i, run) for i, run in enumerate(runs) if sum(run.seconds.values())]
    axes.set_yticks([i for i, _ in told], [run.name if len(runs) > 1 else "" for _, run in told])
    axes.invert_yaxis()
    if not told:
        axes.text(0.5, 0.5, "not known", ha="center", transform=axes.transAxes, color="#777777")
        return
    seen = {part for _, run in told for part, seconds in run.seconds.items() if seconds}
    for i, run in told:
        paid, at = sum(run.seconds.values()), 0.0
        for part, shade in zip(PARTS, SHADES, strict=True):
            share = run.seconds.get(part, 0.0) / paid
            named = part in seen and i == told[0][0]
            axes.barh(i, share, left=at, height=0.5, color=shade, label=NAMES[part] if named else None)
            if part == "useful" and share > 0.08:
                axes.text(share / 2, i, f"{share:.0%}", ha="center", va="center", color="white", fontweight="bold")
            at += share
    axes.set_xlim(0, 1)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, fontsize=8)
    axes.set_ylim(len(runs) - 0.4, -0.6)


def smoothed(values: dict[int, float]) -> dict[int, float]:
    """Each step's mean with its neighbours, a hundredth of the run to either side; as few of both at the beginning, where a
    lopsided mean would lag behind the fall."""
    steps = sorted(values)
    sums = list(itertools.accumulate((values[s] for s in steps), initial=0.0))
    means = {}
    for i, step in enumerate(steps):
        reach = min(i, len(steps) // 100)
        end = min(i + reach + 1, len(steps))
        means[step] = (sums[end] - sums[i - reach]) / (end - i + reach)
    return means


def thinned(values: dict[int, float]) -> dict[int, float]:
    """At most MOST_POINTS of them, each the mean of its neighbours."""
    steps = sorted(values)
    size = -(-len(steps) // MOST_POINTS) or 1
    parts = [steps[i : i + size] for i in range(0, len(steps), size)]
    return {part[len(part) // 2]: sum(values[s] for s in part) / len(part) for part in parts}


# ---- files ----------------------------------------------------------------------------------------------------------


def save(figure: matplotlib.figure.Figure, runs: list[Run], path: Path) -> None:
    """Write the figure as the file's ending says: .png, .pdf, .svg, or .html, one page that needs nothing else."""
    with matplotlib.rc_context(STYLE):
        if path.suffix == ".html":
            path.write_text(page(figure, runs), "utf-8")
        else:
            figure.savefig(path, dpi=150)


def page(figure: matplotlib.figure.Figure, runs: list[Run]) -> str:
    """The figure and a table of what the runs are, in one file without scripts or links."""
    with io.StringIO() as drawn, matplotlib.rc_context(STYLE):
        figure.savefig(drawn, format="svg")
        svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    heads = list(dict.fromkeys(key for run in runs for key in run.facts))
    rows = [[run.name, *(run.facts.get(key, "") for key in heads)] for run in runs]
    cells = "\n".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    head = "".join(f"<th>{html.escape(h)}</th>" for h in ("run", *heads))
    names = html.escape(", ".join(run.name for run in runs))
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{names}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; color: #222; background: #fff }}
svg {{ width: 100%; height: auto }}
table {{ border-collapse: collapse; margin-top: 1rem }}
td, th {{ padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid #ddd }}
</style>
<h1>{names}</h1>
{svg}
<table><tr>{head}</tr>
{cells}
</table></html>
"""


def facts(
    run: dict[str, Any], losses: dict[int, float], vals: dict[int, float], seconds: dict[str, float]
) -> dict[str, str]:
    """The table's cells of a run, from its settings and logs."""
    config, last = run.get("config", {}), max(losses)
    per_step = tokens_per_step(run)
    paid = sum(seconds.values())
    return {
        "model": str(config.get("model", "")),
        "steps": f"{last:,}",
        "tokens": count(last * per_step) if per_step else "",
        "peak lr": f"{config['lr']:g}" if isinstance(config.get("lr"), int | float) else "",
        "loss": f"{list(smoothed(losses).values())[-1]:.4f}",
        "validation": f"{vals[max(vals)]:.4f}" if vals else "",
        "paid time": duration(paid) if paid else "",
        "goodput": f"{seconds['useful'] / paid:.1%}" if paid else "",
    }


def tokens_per_step(run: dict[str, Any]) -> int | None:
    """Tokens of an optimizer step, from config.json; None where it does not say."""
    config = run.get("config", {})
    sizes = [config.get(name) for name in ("batch", "block_size")] if isinstance(config, dict) else [None]
    return sizes[0] * sizes[1] if all(type(n) is int and n > 0 for n in sizes) else None
