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
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # what is installed must be enough
    work = tmp_path / "content"
    work.mkdir()
    for name in ("cli", "store", "gpt", "prep", "train", "scripts", "requirements.txt"):
        (work / name).symlink_to(ROOT / name)
    return work


def cells(work: Path, steps: int) -> nbformat.NotebookNode:
    """The notebook with a small corpus, so many steps, and a folder here as the Drive."""
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        for there, here in (
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


def test_stopped_in_its_middle_and_run_again(colab):
    out = colab / "My Drive" / "perennial" / "out"
    stop = press_stop(colab, out / "metrics.jsonl", after=20, times=1)
    first = run_all(colab, cells(colab, 100_000))
    stop.join()
    assert "the demo is made there" in first
    assert "training is not finished (exit code" in first
    assert "unassigned" not in first  # the machine is kept for whoever looks what is wrong

    stop = press_stop(colab, out / "metrics.jsonl", after=len(read_lines(out / "metrics.jsonl")) + 20, times=2)
    second = run_all(colab, cells(colab, 100_000))
    stop.join()
    assert "the demo is made there" not in second
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
