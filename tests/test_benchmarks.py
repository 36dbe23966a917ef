"""The benchmarks run, on a small setting, and write what they are to write."""

import json

import pytest

from scripts import bench_data, bench_sample, bench_stop, bench_train


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
