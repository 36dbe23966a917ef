"""The ledger: parts add up to what was paid, whatever the file holds; sums of hand-made ledgers and of a real run."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts import goodput
from tests.helpers import ROOT, error_of
from train.ledger import PARTS, attempts, crash_found, iso, read_events, totals

T0 = 1_760_000_000.0


def line(began_s, up_s, attempt, event, **fields):
    return json.dumps({"time": iso(T0 + began_s + up_s), "up_s": up_s, "attempt": attempt, "event": event, **fields})


KILLED = [
    line(0, 10, 1, "start", step=0, host="a", machine="T4", data_s=4.0),
    line(0, 25, 1, "compiled", seconds=12.0),
    line(0, 26, 1, "first_step", seconds=26.0),
    line(0, 40, 1, "saved", step=50, tier="local", stall_s=0.5),
    line(0, 50, 1, "evaluated", step=60, seconds=5.0),
    line(0, 90, 1, "saved", step=100, tier="local", stall_s=0.5),
    line(0, 95, 1, "saved", step=100, tier="remote", seconds=40.0),
    line(186, 8, 2, "crash_found", of=1, last_step=130, steps_lost=30, last_time=iso(T0 + 126)),
]
STOPPED = [
    line(186, 8, 2, "start", step=100, host="b", machine="A100", data_s=1.0),
    line(186, 10, 2, "first_step", seconds=10.0),
    line(186, 40, 2, "saved", step=140, tier="local", stall_s=1.0),
    line(186, 60, 2, "signal", name="SIGTERM"),
    line(186, 61, 2, "saved", step=150, tier="local", stall_s=0.0),
    line(186, 62, 2, "stopped", step=150, signal="SIGTERM"),
]
FINISHED = [
    line(256, 4, 3, "start", step=150, host="b", machine="A100"),
    line(256, 5, 3, "first_step", seconds=5.0),
    line(256, 28, 3, "save_begun", step=200),
    line(256, 30, 3, "finished", step=200),
]


def account(*lines):
    events, ignored = read_events("\n".join(lines))
    return attempts(events), ignored


def test_sums_of_a_ledger_made_by_hand():
    found, ignored = account(*KILLED, *STOPPED, *FINISHED)
    assert ignored == 0
    assert [(a.seconds, a.first_step, a.last_step, a.steps_lost) for a in found] == [
        (126, 0, 130, 30), (62, 100, 150, 0), (30, 150, 200, 0)]  # fmt: skip
    assert [a.ended for a in found] == ["crashed", "stopped by SIGTERM", "finished"]
    training = 126 - 26 - 5 - 1
    assert found[0].parts == pytest.approx(
        {"useful": training * 100 / 130, "lost": training * 30 / 130, "start": 10, "data": 4, "compile": 12, "aside": 5,
         "saving": 1})  # fmt: skip
    assert found[1].parts == pytest.approx(
        dict.fromkeys(PARTS, 0.0) | {"useful": 49, "start": 9, "data": 1, "saving": 1 + 2}
    )
    assert found[2].parts == pytest.approx(dict.fromkeys(PARTS, 0.0) | {"useful": 23, "start": 5, "saving": 2})
    sums = totals(found)
    assert (sums["paid"], sums["down"]) == pytest.approx((126 + 62 + 30, 60 + 8))
    summary = goodput.summarize(found, price=3600.0, paid_when_down=False)  # one a second
    assert summary["goodput"] == pytest.approx((training * 100 / 130 + 49 + 23) / 218)
    assert (summary["crashes"], summary["steps_lost"], summary["steps_lost_per_crash"]) == (1, 30, 30)
    assert summary["money"]["paid"] == pytest.approx(218)
    assert goodput.summarize(found, price=1.0, paid_when_down=True)["paid_s"] == pytest.approx(218 + 68)


def test_work_lost_by_two_attempts_is_counted_in_each():
    """The third found the newest checkpoint damaged and began before where the second had."""
    found, _ = account(
        line(0, 1, 1, "start", step=0), line(0, 2, 1, "first_step", seconds=2), line(0, 12, 1, "saved", step=100),
        line(20, 1, 2, "crash_found", of=1, last_step=100, last_time=iso(T0 + 12)),
        line(20, 1, 2, "start", step=100), line(20, 2, 2, "first_step", seconds=2),
        line(40, 1, 3, "crash_found", of=2, last_step=140, last_time=iso(T0 + 32)),
        line(40, 1, 3, "start", step=75), line(40, 2, 3, "first_step", seconds=2),
    )  # fmt: skip
    assert [a.steps_lost for a in found] == [25, 40, 0]
    assert [a.parts["lost"] for a in found] == pytest.approx([2.5, 10, 0])


def test_a_clock_that_was_moved_by_an_hour_moves_no_duration():
    moved = [json.dumps(json.loads(x) | {"time": iso(T0 + 3600)}) for x in STOPPED[1:]]
    found, _ = account(*KILLED, STOPPED[0], *moved, *FINISHED)
    assert [a.seconds for a in found] == [126, 62, 30]
    back = [x.replace(iso(T0 + 126), iso(T0 + 7200)) for x in KILLED]  # the crash's stamp alone cannot be proved
    assert account(*back, *STOPPED)[0][0].seconds == 186  # but it was over when the next one began


def test_the_last_attempt_is_told_by_the_metrics():
    events, _ = read_events("\n".join(KILLED[:-1]))
    (only,) = attempts(events, logged_step=123)
    assert (only.last_step, only.ended, only.crashed) == (123, "running, or gone", False)


GARBAGE = st.one_of(
    st.text(max_size=40),
    st.sampled_from([*KILLED, *STOPPED, *FINISHED]),
    st.builds(
        lambda fields, base: json.dumps(json.loads(base) | fields),
        st.dictionaries(
            st.sampled_from(["time", "up_s", "attempt", "event", "step", "seconds", "of", "last_time", "host", "stall_s"]),
            st.one_of(st.floats(), st.integers(-5, 10**400), st.booleans(), st.none(), st.text(max_size=9),
                      st.sampled_from([iso(T0 + 50), "0001-01-01", "9999-12-31T23:59:59", "start", "crash_found"]),
                      st.lists(st.none())),
        ),
        st.sampled_from([*KILLED, *STOPPED, *FINISHED]),
    ),
)  # fmt: skip


@given(st.lists(GARBAGE, max_size=20))
def test_whatever_the_file_holds_the_parts_add_up(lines):
    events, ignored = read_events("\n".join(lines))
    assert len(events) + ignored <= sum(x.count("\n") + 1 for x in lines)
    found = attempts(events)
    for a in found:
        assert all(seconds >= 0 for seconds in a.parts.values())
        assert sum(a.parts.values()) == pytest.approx(a.seconds)
        assert 0 <= a.steps_lost <= max(a.last_step - a.first_step, 0)
    for row in map(goodput._row, found):
        assert all(cell.isprintable() for cell in row)
    goodput._closing(goodput.summarize(found, price=1.0, paid_when_down=True)) if found else None


def test_what_a_crash_leaves_is_read_once():
    events = [{"attempt": 4, "event": "start", "time": iso(T0)}, {"attempt": 4, "event": "saved", "time": iso(T0 + 9)}]
    metrics = [{"step": 1}, {"step": 17, "loss": 2.0}, {"step": "x"}]
    beat = {"epoch": 4, "step": 21, "time": T0 + 40}
    found = {"of": 4, "last_step": 21, "last_time": iso(T0 + 40), "steps_lost": 11}
    assert crash_found(events, metrics, 10, beat) == found
    assert crash_found(events, metrics, 10, {**beat, "epoch": 3})["last_step"] == 17  # of a start that came to nothing
    assert crash_found(events, metrics, 10, None)["last_time"] == iso(T0 + 9)
    assert crash_found(events, metrics, 10, None, T0 + 12)["last_time"] == iso(T0 + 12)
    ended = [*events, {"attempt": 4, "event": "stopped", "time": iso(T0 + 10)}]
    assert crash_found(ended, metrics, 17, None) is None
    assert crash_found(ended, metrics, 10, None)["steps_lost"] == 7  # told, but its checkpoint is gone
    assert crash_found([], [], 0, None) is None


def test_what_is_printed(tmp_path, capsys):
    (tmp_path / "events.jsonl").write_text("\n".join([*KILLED, "no event", *STOPPED, *FINISHED]))
    assert goodput.main(["--run", str(tmp_path), "--price-per-hour", "1.2"]) == 0
    text = capsys.readouterr().out
    assert "1  2025-10-09 08:53  T4       2:06    0 to 130    30  crashed" in text
    assert "down                 1:08  not paid" in text
    assert "goodput 66.2% of 3:38 paid, 0.07 in money; 1 crash; 30 steps lost, 30.0 a crash" in text
    assert "1 lines of events.jsonl are no events: ignored" in text
    assert goodput.main(["--run", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["seconds"]["paid"] == pytest.approx(218)
    assert told["lines_ignored"] == 1
    assert "is not a run folder" in error_of(goodput.main, ["--run", str(tmp_path / "none")])
    (tmp_path / "events.jsonl").write_text("\x00" * 999)
    assert "tells of no start" in error_of(goodput.main, ["--run", str(tmp_path)])


def test_a_real_run_killed_and_stopped(data, tmp_path):
    """The wall time from the first start to the last end is what the ledger accounts for."""
    flags = ("--data", data, "--out", tmp_path / "out", "--model", "tiny", "--device", "cpu", "--resume", "--log-every", 1,
             "--sample-every", 0, "--eval-every", 0, "--save-every", 40, "--save-every-minutes", 0, "--batch", 8,
             "--block-size", 32, "--schedule", "constant", "--warmup", 1, "--steps")  # fmt: skip
    command = [sys.executable, str(ROOT / "train/run.py"), *map(str, flags)]
    environment = {**os.environ, "PERENNIAL_LEASE_S": "2"}  # a beat every half second says how long it lived
    began_s, ended_s, killed = time.monotonic(), [], []
    for number, steps in ((signal.SIGKILL, 100_000), (signal.SIGTERM, 100_000), (None, None)):
        if steps is None:
            steps = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[-1])["step"] + 20
        process = subprocess.Popen([*command, str(steps)], env=environment, stdout=subprocess.DEVNULL)
        if number:
            target = 30 + (killed[-1] if killed else 40)
            while _logged(tmp_path / "out") < target:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(number)
        assert process.wait(60) == {signal.SIGKILL: -9, signal.SIGTERM: 75, None: 0}[number]
        killed.append(_logged(tmp_path / "out"))
        ended_s.append(time.monotonic() - began_s)
    events, ignored = read_events((tmp_path / "out/events.jsonl").read_text())
    found = attempts(events)
    assert ignored == 0
    assert [a.ended for a in found] == ["crashed", "stopped by SIGTERM", "finished"]
    assert [a.number for a in found] == [1, 2, 3]
    assert found[0].last_step >= killed[0] >= found[1].first_step + found[0].steps_lost - 40
    assert found[0].steps_lost == found[0].last_step - found[1].first_step > 0
    assert (found[1].last_step, found[1].steps_lost) == (found[2].first_step, 0)
    told_s = [a.seconds + a.began_s - found[0].began_s for a in found]
    assert all(-4 < told - ended < 0.2 for told, ended in zip(told_s, ended_s, strict=True)), (told_s, ended_s)
    sums = totals(found)
    assert sums["paid"] + sums["down"] == pytest.approx(told_s[-1])
    assert sums["useful"] > 0
    assert sums["lost"] > 0


def _logged(out):
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(x)["step"] for x in lines if x.endswith("}")), default=0)
