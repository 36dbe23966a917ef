"""The Colab notebook runs from top to bottom, and again; its flags and paths exist."""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests.helpers import ROOT, help_of
from train.config import TrainConfig
from train.folder import read_lines

NOTEBOOK = ROOT / "scripts" / "perennial.ipynb"

COLAB = """
class drive:
    mount = staticmethod(lambda path: print("Mounted at", path))
    flush_and_unmount = staticmethod(lambda: print("flushed"))
class auth:
    authenticate_user = staticmethod(lambda: print("authenticated"))
class runtime:
    unassign = staticmethod(lambda: print("unassigned"))
"""

# Colab's first press on Stop waits for the program; plain IPython kills it 0.6 s later, its second press does in both
AS_COLAB = """
import os, IPython.utils._process_posix as posix
posix.ProcessHandler.terminate_timeout = 60
open("kernel.pid", "w").write(str(os.getpid()))
"""


def sources() -> dict[str, str]:
    return {c["id"]: c["source"] for c in nbformat.read(NOTEBOOK, 4).cells if c["cell_type"] == "code"}


def test_is_valid_and_has_no_outputs():
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    assert all(not c.get("outputs") and c.get("execution_count") is None for c in notebook.cells)
    raw = NOTEBOOK.read_text("utf-8")
    assert raw == json.dumps(json.loads(raw), indent=1, ensure_ascii=False) + "\n"


def test_the_training_cell_is_the_bare_command():
    """Anything around it (a pipe, a second command) keeps the Stop button from reaching the trainer."""
    assert sources()["train"] == "!python train/run.py --resume $TRAIN_FLAGS"


def test_every_script_and_flag_it_names_exists():
    text = "\n".join(sources().values())
    for script, arguments in re.findall(r"!python (\S+\.py)(.*)", text):
        known = help_of(script)
        for name in re.findall(r"--[a-z-]+", arguments):
            assert f"{name} " in known, f"{script} has no {name}"
    names = {"--" + name.replace("_", "-") for name in TrainConfig.__dataclass_fields__}
    assert set(re.findall(r"--[a-z-]+", re.search(r'TRAIN_FLAGS = "([^"]+)"', text)[1])) <= names


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """A kernel's world that looks like Colab: `google.colab`, COLAB_RELEASE_TAG, this environment's python first."""
    package = tmp_path / "stub" / "google" / "colab"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(COLAB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stub"))
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab-test")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SHELL", "/bin/bash")  # Colab's `!` too; Debian's sh answers a Ctrl-C with a code of its own
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # what is installed must be enough
    work = tmp_path / "content"
    work.mkdir()
    return work


@pytest.fixture
def cloned(colab):
    """That, with this very code as its clone."""
    for name in ("cli", "store", "gpt", "prep", "train", "scripts", "requirements.txt"):
        (colab / name).symlink_to(ROOT / name)
    return colab


def cells(work: Path, steps: int, *other: tuple[str, str]) -> nbformat.NotebookNode:
    """The notebook with a small corpus, so many steps, and a folder here as the Drive."""
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        for there, here in (
            *other,
            ("/content/drive/MyDrive", str(work / "My Drive")),  # its name has a blank
            ("--steps 800", f"--steps {steps}"),
            ("--save-every 100", "--save-every 5"),
            ("--output demo.txt", "--output demo.txt --megabytes 0.5"),
        ):
            cell.source = cell.source.replace(there, here)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(AS_COLAB))
    return notebook


def run_all(work: Path, notebook: nbformat.NotebookNode) -> str:
    """Every cell in order until one fails; returns all output."""
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(work)}})
    with contextlib.suppress(CellExecutionError):
        client.execute()
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    return "".join(o.get("text", "") + o.get("evalue", "") for o in outputs)


def press_stop(work: Path, metrics: Path, after: int, times: int) -> threading.Thread:
    """Once so many steps are logged: Colab's first press is SIGINT, and people press again."""

    def press() -> None:
        while not (metrics.exists() and len(read_lines(metrics)) >= after):
            time.sleep(0.1)
        for _ in range(times):
            os.kill(int((work / "kernel.pid").read_text()), signal.SIGINT)
            time.sleep(0.3)

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    return thread


def test_stopped_in_its_middle_and_run_again(cloned):
    colab = cloned
    out = colab / "My Drive" / "perennial" / "out"
    stop = press_stop(colab, out / "metrics.jsonl", after=20, times=1)
    first = run_all(colab, cells(colab, 100_000))
    stop.join()
    assert "the demo is made there" in first
    assert "training is not finished (exit code 75)" in first, first[-3000:]
    assert "unassigned" not in first  # the machine is kept for whoever looks what is wrong

    stop = press_stop(colab, out / "metrics.jsonl", after=len(read_lines(out / "metrics.jsonl")) + 20, times=2)
    second = run_all(colab, cells(colab, 100_000))
    stop.join()
    assert "the demo is made there" not in second
    assert re.search(
        r"training is not finished \(exit code (75|130)\)", second
    )  # by how fast the presses follow each other
    assert "unassigned" not in second

    done = max(m["step"] for m in read_lines(out / "metrics.jsonl"))
    again = run_all(colab, cells(colab, done + 20))
    assert 0 < int(re.search(r"goes on from step (\d+)", again)[1]) <= done
    assert f"step {done + 20}/{done + 20}" in again
    assert "\x1b[" not in again  # a `!` cell is a terminal of size 0: cursor movements would show as text
    assert again.index("Mounted at") < again.index("flushed") < again.index("unassigned")
    assert (colab / "My Drive" / "perennial" / "exported" / "model.safetensors").exists()
    steps = [m["step"] for m in read_lines(out / "metrics.jsonl") if "loss" in m]
    assert steps == list(range(1, done + 21))  # each once


def test_with_a_bucket_from_a_clone_and_with_a_dataset_that_is_out_of_order(colab, gcs, monkeypatch):
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone itself")
    for name, value in gcs.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PERENNIAL_CACHE", str(colab / "cache"))
    mine = (
        ('KEEP_ON = "Drive"', 'KEEP_ON = "bucket"'),
        ("gs://my-bucket/perennial", "gs://bucket/mine"),
        ("https://github.com/perennial-gpt/perennial", f"file://{ROOT}"),
    )
    text = run_all(colab, cells(colab, 20, *mine))
    assert text.index("authenticated") < text.index("the demo is made there") < text.index("step 20/20")
    assert "unassigned" in text
    assert any(name.startswith("bucket/mine/out/step-00000020") for name in gcs.objects)
    gcs.objects.pop("bucket/mine/data/val-00000.bin.zst")
    text = run_all(colab, cells(colab, 40, *mine))
    assert "shard val-00000.bin.zst is missing" in text
    assert "the demo is made there" not in text
    assert "step 40/40" not in text
