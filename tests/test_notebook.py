"""The Colab notebook runs from top to bottom, and again; its flags and paths exist."""

import json
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers import ROOT
from train.config import TrainConfig
from train.folder import read_lines

NOTEBOOK = ROOT / "scripts" / "perennial.ipynb"

COLAB = """
class drive:
    mount = staticmethod(lambda path: print("Mounted at", path))
    flush_and_unmount = staticmethod(lambda: print("flushed"))
class runtime:
    unassign = staticmethod(lambda: print("unassigned"))
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
    assert sources()["train"] == "!python train/run.py --resume $DEMO_FLAGS"


def test_every_script_and_training_flag_it_names_exists():
    text = "\n".join(sources().values())
    for script in re.findall(r"!python (\S+\.py)", text):
        assert (ROOT / script).exists()
    names = {"--" + name.replace("_", "-") for name in TrainConfig.__dataclass_fields__}
    assert set(re.findall(r"--[a-z-]+", re.search(r'DEMO_FLAGS = "([^"]+)"', text)[1])) <= names


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


def run_all(work: Path, steps: int) -> str:
    """Every cell in order, with a small corpus and few steps; returns all output."""
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("/content/drive/MyDrive", str(work / "drive")).replace(
            "--steps 800", f"--steps {steps}"
        )
        cell.source = cell.source.replace("--output demo.txt", "--output demo.txt --megabytes 0.5")
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(work)}}).execute()
    return "".join(o.get("text", "") for c in notebook.cells if c.cell_type == "code" for o in c.outputs)


def test_run_all_and_run_all_again(colab):
    first = run_all(colab, 6)
    assert "step 6/6" in first
    assert "\x1b[" not in first  # a `!` cell is a terminal of size 0: cursor movements would show as text
    assert first.index("Mounted at") < first.index("unassigned")
    again = run_all(colab, 12)  # nothing else needs to change for a longer run
    assert "goes on from step 6" in again
    assert "step 12/12" in again
    events = [e["event"] for e in read_lines(colab / "drive" / "perennial" / "out" / "events.jsonl")]
    assert events.count("start") == 2
