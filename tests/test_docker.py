"""What of the Dockerfile can be proved without a container engine."""

import json
import re
import subprocess
import sys

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
    import shutil

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
