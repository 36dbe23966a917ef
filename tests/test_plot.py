"""Figures show what was logged: curves, seams of restarts, paid time; of several runs, at any address, in any format."""

import json
import re

import pytest

from scripts import plot
from store import fs
from tests.helpers import error_of

pytest.importorskip("matplotlib")
from scripts import figure


@pytest.fixture
def runs(tmp_path):
    """Two runs' logs; the second one went on from steps 40 and 70."""
    for name, floor, seams in (("steady", 2.0, []), ("killed", 1.5, [40, 70])):
        steps = range(1, 101)
        lines = [
            {"step": s, "loss": floor + 6 / s if s != 50 else None, "lr": 1e-3 * s, "grad_norm": 1.0} for s in steps
        ]
        lines += [{"step": s, "val_loss": floor + 0.1 + 6 / s} for s in (50, 100)]
        starts = [0, *seams]
        events = []
        for attempt, step in enumerate(starts, 1):
            end = 100 if step == starts[-1] else starts[attempt] + 5
            at = {"attempt": attempt, "time": f"2026-11-21T0{attempt}:00:00+00:00"}
            events += [
                {**at, "event": "start", "up_s": 10.0, "step": step, "data_s": 1.0},
                {**at, "event": "first_step", "up_s": 20.0},
                {**at, "event": "progress", "up_s": 25.0, "step": step + 1, "tokens_per_s": 1000.0 * attempt},
                {**at, "event": "stopped", "up_s": 120.0, "step": end, "signal": "SIGTERM"},
            ]
        config = {"config": {"model": "tiny", "batch": 4, "block_size": 64, "lr": 1e-3}}
        for file, text in (("config.json", json.dumps(config)), ("metrics.jsonl", "\n".join(map(json.dumps, lines))),
                           ("events.jsonl", "\n".join(map(json.dumps, events)))):  # fmt: skip
            fs.put_bytes(str(tmp_path / name / file), text.encode())
    return [str(tmp_path / name) for name in ("steady", "killed")]


def test_the_figure_holds_what_was_logged(runs):
    found = plot.read_run(runs[1], "killed")
    loss, lr, speed, paid = figure.draw([found]).axes
    raw = loss.lines[0]
    assert list(raw.get_xdata()) == [s for s in range(1, 101) if s != 50]  # null: no number
    assert raw.get_ydata()[0] == 7.5
    seams = [line.get_xdata()[0] for line in loss.lines if line.get_linestyle() == ":"]
    assert seams == [40, 70]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == [
        "training, smoothed",
        "validation",
        "restart",
    ]
    assert list(lr.lines[0].get_ydata()) == pytest.approx([1e-3 * s for s in range(1, 101)])
    speeds = [
        (x, y) for line in speed.lines if line.get_linestyle() != ":" for x, y in zip(*line.get_data(), strict=True)
    ]
    assert speeds == [(1, 1000.0), (41, 2000.0), (71, 3000.0)]
    assert sum(bar.get_width() for bar in paid.patches) == pytest.approx(1.0)
    useful = found.seconds["useful"] / sum(found.seconds.values())
    assert paid.patches[0].get_width() == pytest.approx(useful)
    assert f"{useful:.0%}" in [text.get_text() for text in paid.texts]


def test_several_runs_in_every_format(runs, tmp_path, capsys):
    outputs = [tmp_path / f"two{ending}" for ending in plot.FORMATS]
    assert plot.main(["--run", *runs, "--x", "tokens", "--output", *map(str, outputs)]) == 0
    png, pdf, svg, page = (p.read_bytes() for p in outputs)
    assert png.startswith(b"\x89PNG")
    assert pdf.startswith(b"%PDF")
    for text in (svg.decode(), page.decode()):
        assert {"steady", "killed", "killed, validation", "25k"} <= set(re.findall(r">([^<>]+)</text>", text))
    assert b"<td>25.6k</td>" in page
    assert not re.findall(rb"<script|<link|<img|(?:src|href)=.https?:", page)  # it needs nothing else


def test_names_in_the_page_are_text(runs, tmp_path):
    found = plot.read_run(runs[0], "<b>&run</b>")
    text = figure.page(figure.draw([found]), [found])
    assert "<b>" not in text
    assert "&lt;b&gt;&amp;run&lt;/b&gt;" in text


def test_a_run_in_a_bucket(runs, tmp_path, gcs):
    for name in ("config.json", "metrics.jsonl", "events.jsonl"):
        fs.put_bytes(f"gs://bucket/run/{name}", fs.read_bytes(f"{runs[0]}/{name}"))
    assert plot.main(["--run", "gs://bucket/run", runs[0], "--output", str(tmp_path / "a.svg")]) == 0
    assert ">run<" in (tmp_path / "a.svg").read_text()


def test_smoothing_does_not_lag_and_thinning_keeps_means():
    line = {s: 10.0 - 0.01 * s for s in range(1, 1001)}
    smooth = figure.smoothed(line)
    assert {s: smooth[s] for s in range(1, 990)} == pytest.approx({s: line[s] for s in range(1, 990)})
    flat = figure.smoothed({s: float(s % 2) for s in range(1000)})
    assert all(0.4 < v < 0.6 for s, v in flat.items() if 10 <= s < 990)
    thin = figure.thinned({s: float(s) for s in range(10_000)})
    assert len(thin) <= figure.MOST_POINTS
    assert sum(thin.values()) / len(thin) == pytest.approx(4999.5, rel=0.01)


def test_names_tell_runs_apart():
    assert plot.short_names(("a/x/run", "b/x/run/")) == ["a/x/run", "b/x/run"]
    assert plot.short_names(("gs://b/one", "two")) == ["one", "two"]


def test_mistakes_are_one_line(runs, tmp_path):
    assert "ends in .png, .pdf, .svg, .html" in error_of(plot.main, ["--run", runs[0], "--output", "run.jpeg"])
    assert "there is no folder" in error_of(plot.main, ["--run", runs[0], "--output", str(tmp_path / "no" / "a.png")])
    assert "is not a run folder" in error_of(plot.main, ["--run", str(tmp_path), "--output", str(tmp_path / "a.png")])
    assert not list(tmp_path.glob("*.png"))
