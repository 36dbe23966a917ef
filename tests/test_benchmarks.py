"""The benchmarks run, on a small setting, and write what they are to write."""

import json
import re

import pytest
import torch

from scripts import bench_checkpoint, bench_compile_cache, bench_data, bench_sample, bench_stop, bench_train


def test_bench_train_lets_contestants_take_turns(tmp_path, capfd):
    flags = ["--contestants", "ours-eager", "textbook", "--model", "tiny", "--vocab-size", "300", "--block-size", "16",
             "--batch", "4", "--micro-batch", "2", "--rounds", "3", "--device", "cpu", "--precision", "bf16"]  # fmt: skip
    assert bench_train.main([*flags, "--json", str(tmp_path / "train.json")]) == 0
    figures = json.loads((tmp_path / "train.json").read_text())
    assert {"machine", "versions", "date", "settings"} <= figures.keys()
    rows = {row["contestant"]: row for row in figures["results"]}
    assert rows.keys() == {"ours-eager", "textbook"}
    assert all(len(row["turns_s"]) == 3 and row["tokens_per_s"] > 0 for row in rows.values())
    assert rows["ours-eager"]["loss"] == pytest.approx(rows["textbook"]["loss"], rel=0.1)  # the same task
    assert "textbook loop" in capfd.readouterr().out


def test_bench_data_measures_warm_and_cold(tmp_path, capsys):
    flags = ["--tokens", "200K", "--shard-tokens", "100K", "--block-size", "64", "--batch", "16", "--rounds", "1",
             "--seconds", "0.1", "--folder", str(tmp_path)]  # fmt: skip
    assert bench_data.main([*flags, "--json", str(tmp_path / "data.json")]) == 0
    figures = json.loads((tmp_path / "data.json").read_text())["results"]
    assert len(figures["tokens_per_s"]) == 5
    assert min(min(of) for of in figures["tokens_per_s"].values()) > 0
    assert 0 <= figures["waiting_share"] < 1


def test_bench_sample_compares_with_transformers(tmp_path, capsys):
    pytest.importorskip("transformers")
    flags = ["--model", "tiny", "--vocab-size", "97", "--block-size", "32", "--prompts", "3", "20", "--new-tokens", "4",
             "--rounds", "1", "--precisions", "fp32"]  # fmt: skip
    assert bench_sample.main([*flags, "--json", str(tmp_path / "sample.json")]) == 0
    rows = json.loads((tmp_path / "sample.json").read_text())["results"]
    assert [row["prompt"] for row in rows] == [3, 20]
    assert all(row["ours"] > 0 and row["transformers"] > 0 and row["bound"] > 0 for row in rows)


def test_bench_stop_stops_a_real_trainer_and_finds_its_checkpoint(tmp_path, data, capsys):
    flags = ["--model", "tiny", "--device", "cpu", "--block-size", "16", "--stops", "2", "--data", str(data)]
    assert bench_stop.main([*flags, "--json", str(tmp_path / "stop.json")]) == 0
    figures = json.loads((tmp_path / "stop.json").read_text())
    assert len(figures["seconds"]) == 2
    assert figures["checkpoint_bytes"] > 1_000_000
    assert "stop 2/2" in capsys.readouterr().out


def test_bench_checkpoint_takes_turns_with_and_without_a_save(tmp_path, capsys):
    flags = ["--model", "tiny", "--vocab-size", "97", "--block-size", "16", "--rounds", "2", "--round-seconds", "0.2",
             "--device", "cpu", "--precision", "fp32", "--folder", str(tmp_path)]  # fmt: skip
    assert bench_checkpoint.main([*flags, "--json", str(tmp_path / "checkpoint.json")]) == 0
    figures = json.loads((tmp_path / "checkpoint.json").read_text())
    assert [len(figures["step_ms"][of]) for of in ("no_save", "one_save")] == [2, 2]
    assert figures["stall_ms"] > 0
    assert figures["write_s"] > 0
    assert figures["state_gb"] == pytest.approx(0.005, rel=0.2)
    told = capsys.readouterr().out
    assert told.count("saved ") == 3  # the first allocates
    assert f"| the loop waits for a save | {figures['stall_ms']:.0f} ms |" in told


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="refused there: train/precision.py says why")
def test_bench_compile_cache_finds_what_was_compiled_on_both_machines(tmp_path, monkeypatch, capsys):
    """With a compiler that takes a second and leaves a file behind: the real one takes 20 s for the smallest model."""
    (tmp_path / "sitecustomize.py").write_text("""
import os, pathlib, sys, time
def compile(model, **_):
    made = pathlib.Path(os.environ["TORCHINDUCTOR_CACHE_DIR"], "code.so")
    if not made.exists():
        time.sleep(1)
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_bytes(b"machine code")
    return model
if any(word.endswith("train/run.py") for word in sys.orig_argv):
    import torch
    torch.compile = compile
""")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert bench_compile_cache.main(["--layers", "1", "--width", "32"]) == 0
    told = capsys.readouterr().out
    seconds = [float(s) for s in re.findall(r"^(?:cold|same|fresh).* (\d+\.\d) +\d+\.\d$", told, re.M)]
    assert len(seconds) == 3
    assert "equal to the bit" in told
