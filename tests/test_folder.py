"""The run folder's logs: every line once, whatever the disk does."""

import subprocess

import pytest

from train.folder import RunFolder, read_lines


def test_lines_that_met_a_full_disk_come_once_and_whole(tmp_path, capsys):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        folder, filler = RunFolder(str(tmp_path)), tmp_path / "filler"
        filler.write_bytes(b"x" * 16_000)
        steps = iter(range(1, 10_000))
        while "cannot be written now" not in capsys.readouterr().err:
            folder.metrics([{"step": next(steps), "pad": "x" * 700} for _ in range(7)])  # ends inside a line
        folder.metrics([{"step": next(steps)}])
        filler.unlink()
        folder.metrics([{"step": next(steps)}])
        logged = [m["step"] for m in read_lines(tmp_path / "metrics.jsonl")]
        assert logged == list(range(1, next(steps)))
        assert (tmp_path / "metrics.jsonl").read_text().count("\n") == len(logged)
    finally:
        subprocess.run(["umount", "-l", tmp_path])


def test_a_torn_line_swallows_none_that_comes_after_it(tmp_path):
    folder = RunFolder(str(tmp_path))
    (tmp_path / "events.jsonl").write_text('{"event": "start"}\n{"eve')
    for name in ("crash_found", "start"):
        folder.event(name)
    assert [e["event"] for e in read_lines(tmp_path / "events.jsonl")] == ["start", "crash_found", "start"]
    assert (tmp_path / "events.jsonl").read_text().count("\n") == 4


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
    assert read_lines(tmp_path / "none.jsonl") == []
