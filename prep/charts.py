"""Charts as inline SVG, drawn for a column of about 440 pixels; colours and fonts come from the page's style sheet."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 440, 190
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 18, 30  # room for the labels
MAX_BAR = 56  # wide
PLOT_WIDTH, PLOT_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM


@dataclass(frozen=True)
class Bar:
    """One bar: its share of all, what is written under it (may be nothing) and what a pointer resting on it shows."""

    share: float
    label: str
    says: str


def short(n: int) -> str:
    """10000 -> 10k, 2048 -> 2k: powers of ten and of two, for axes."""
    for ten, two, unit in ((10**9, 1 << 30, "G"), (10**6, 1 << 20, "M"), (10**3, 1 << 10, "k")):
        if n >= ten:
            return f"{n // (ten if n % ten == 0 else two)}{unit}"
    return str(n)


def bar_chart(bars: Sequence[Bar], *, says: str, mark: float | None = None, mark_says: str = "") -> str:
    """Bars of shares side by side; `mark`, a position counted in bars, is drawn as a line. `says` is for screen readers."""
    top, step = _nice_top(max((b.share for b in bars), default=0))
    pieces = []
    for tick in range(round(top / step) + 1):
        y = _y(tick * step / top)
        pieces.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        pieces.append(f'<text class="y" x="{LEFT - 6}" y="{y + 4:.1f}">{100 * tick * step:g} %</text>')
    pitch = min(PLOT_WIDTH / max(len(bars), 1), MAX_BAR)
    for i, bar in enumerate(bars):
        x, y = LEFT + i * pitch, _y(bar.share / top)
        height = TOP + PLOT_HEIGHT - y
        if bar.share:  # a bar of something is never invisible
            y, height = min(y, TOP + PLOT_HEIGHT - 1), max(height, 1)
        pieces.append(f'<g><title>{html.escape(bar.says)}</title>'
                      f'<rect class="hit" x="{x:.1f}" y="{TOP}" width="{pitch:.1f}" height="{PLOT_HEIGHT}"/>'
                      f'<rect class="bar" x="{x + 0.5:.1f}" y="{y:.1f}" width="{max(pitch - 1.5, 0.5):.1f}" height="{height:.1f}"/>'
                      "</g>")  # fmt: skip
        if bar.label:
            pieces.append(f'<text class="x" x="{x + pitch / 2:.1f}" y="{HEIGHT - 14}">{html.escape(bar.label)}</text>')
    if mark is not None:
        x = LEFT + mark * pitch
        anchor, dx = ("end", -5) if x > WIDTH * 0.6 else ("start", 5)
        pieces.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 4}" y2="{TOP + PLOT_HEIGHT}"/>')
        pieces.append(
            f'<text class="mark" text-anchor="{anchor}" x="{x + dx:.1f}" y="{TOP + 6}">{html.escape(mark_says)}</text>'
        )
    return _svg(pieces, says)


def log_log(points: Sequence[tuple[int, int]], *, says: str, x_name: str, mark_y: float, mark_says: str) -> str:
    """A falling curve with both axes logarithmic, and a level `mark_y`."""
    x_decades = max(math.ceil(math.log10(max((x for x, _ in points), default=1))), 1)
    y_decades = max(math.ceil(math.log10(max((y for _, y in points), default=1))), 1)

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + math.log10(x) / x_decades * PLOT_WIDTH, _y(math.log10(y) / y_decades)

    pieces = []
    for decade in range(x_decades + 1):
        x, _ = at(10**decade, 1)
        pieces.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{TOP + PLOT_HEIGHT}"/>')
        pieces.append(f'<text class="x" x="{min(x, WIDTH - 16):.1f}" y="{HEIGHT - 14}">{short(10**decade)}</text>')
    for decade in range(0, y_decades + 1, 1 if y_decades < 6 else 2):
        _, y = at(1, 10**decade)
        pieces.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        pieces.append(f'<text class="y" x="{LEFT - 6}" y="{y + 4:.1f}">{short(10**decade)}</text>')
    if mark_y <= 10**y_decades:
        _, y = at(1, mark_y)
        pieces.append(f'<line class="mark" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        pieces.append(f'<text class="mark" x="{LEFT + 6}" y="{y + 13:.1f}">{html.escape(mark_says)}</text>')
    curve = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in points))
    pieces.append(f'<polyline class="curve" points="{curve}"/>')
    pieces.append(f'<text class="x" x="{LEFT + PLOT_WIDTH / 2}" y="{HEIGHT - 1}">{html.escape(x_name)}</text>')
    return _svg(pieces, says)


def _y(share_of_height: float) -> float:
    return TOP + PLOT_HEIGHT * (1 - share_of_height)


def _nice_top(share: float) -> tuple[float, float]:
    """(top of the axis, distance of its lines) with two to four lines."""
    for step in (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2):
        if share <= 4 * step:
            return step * max(math.ceil(share / step), 1), step
    return 1.0, 0.25


def _svg(pieces: list[str], says: str) -> str:
    return (f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(says)}">'
            f"{''.join(pieces)}</svg>")  # fmt: skip
