"""Hostile JSON is refused as any other damage is: one line for the user, and what is sound is used."""

import pytest

from store.untrusted import parse_json
from tests.helpers import error_of, train
from tests.test_checkpoint import load, save
from train.compile_cache import CompileCache
from train.folder import read_lines
from train.ledger import read_events

DEEP = "[" * 200_000


@pytest.mark.parametrize("text", [DEEP, DEEP.encode(), "{", "", b"\xff", '{"a":' * 200_000])
def test_what_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError):  # noqa: PT011 - json's own words
        parse_json(text)


def test_brackets_without_end_in_a_manifest_are_damage(tmp_path):
    for step in (10, 20):
        save(tmp_path, step)
    (tmp_path / "step-00000020-0001" / "MANIFEST.json").write_text(DEEP)
    found, warnings = load(tmp_path)
    assert (found.manifest.step, len(warnings)) == (10, 1)


def test_brackets_without_end_in_a_log_are_no_line_of_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{DEEP}\n{{"step": 2}}\n')
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
    assert read_events(DEEP) == ([], 1)


def test_brackets_without_end_in_a_runs_config_are_one_line(data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(DEEP)
    assert "config.json is unreadable" in error_of(train, "--data", data, "--resume", "--out", tmp_path / "out")


def test_brackets_without_end_in_a_compile_note_are_a_cold_start(tmp_path, monkeypatch):
    cache = object.__new__(CompileCache)
    cache.on, cache.key, cache.path, cache.url = True, "k", tmp_path / "here", str(tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    (tmp_path / "k.json").write_text(DEEP)
    assert cache.restore() == "cold"
