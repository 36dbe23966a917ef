"""A dataset named by its hub name is the files it holds."""

import io
import json
import os
import subprocess

import pytest

from store.shards import TokenShards
from tests.fake_hub import FakeHub
from tests.helpers import command

pytest.importorskip("huggingface_hub")


def run(hub, tmp_path, source):
    flags = ("--input", source, "--output", tmp_path / "d", "--vocab-size", 300, "--workers", 1)
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "PERENNIAL_RETRY_FOR_S": "5",
    }
    return subprocess.run(command("prep/tokenize_bpe.py", *flags), env=environment, capture_output=True, text=True)


def test_a_dataset_by_name(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        {"prompt": f"What is the square of {i}?", "response": f"The square is {i * i}, or near it."} for i in range(500)
    ]
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), table, row_group_size=100)
    lines = "\n".join(json.dumps({"text": f"Some more text, number {i}, of no importance."}) for i in range(300))
    files = {"README.md": b"# about", "data/train-0.parquet": table.getvalue(), "more.jsonl": lines.encode()}
    with FakeHub(files) as hub:
        done = run(hub, tmp_path, "hf://org/name")
        assert done.returncode == 0, done.stderr
        assert TokenShards(str(tmp_path / "d")).metadata["counts"]["documents"] == 800
        done = run(hub, tmp_path / "2", "hf://datasets/org/name/data/*.parquet")
        assert done.returncode == 0, done.stderr
        assert TokenShards(str(tmp_path / "2" / "d")).metadata["counts"]["documents"] == 500
        done = run(hub, tmp_path / "3", "hf://org/nothing")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: hf://datasets/org/nothing: ")
