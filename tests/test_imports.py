"""Arrows point down, names shadow nothing, importing does nothing: read from the source itself."""

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("store", "gpt", "cli", "prep", "train", "scripts")
FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
MODULES = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in FILES]

# package -> the names of ours that it may import; store and gpt stand on third parties alone
ALLOWED = {
    "store": ("store",),
    "gpt": ("gpt",),
    "cli": ("cli", "store.errors", "gpt.errors"),
    "prep": ("prep", "store", "cli", "gpt.tokenizer"),
    "train": ("train", "store", "gpt", "cli"),
    "scripts": PACKAGES,
}
# third parties that a package must do without; prep runs on laptops that have no torch
FORBIDDEN = {"store": ("torch", "transformers"), "cli": ("torch", "transformers"), "prep": ("torch", "transformers")}


def imported(path: Path) -> set[str]:
    """Every dotted name that a file imports anywhere in it, `from a import b` as a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names |= {f"{node.module}.{a.name}" for a in node.names}
    return names


def within(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == a or name.startswith(a + ".") for a in allowed)


def test_the_project_was_found():
    assert {"store.fs", "gpt.model", "prep.tokenize_bpe", "train.run", "cli.flags"} <= set(MODULES)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_down(path):
    """A package imports only what the design lets it, functions and type-checking blocks included."""
    package = path.relative_to(ROOT).parts[0]
    ours = {n for n in imported(path) if n.split(".")[0] in (*PACKAGES, "tests")}
    assert {n for n in ours if not within(n, ALLOWED[package])} == set()
    assert {n for n in imported(path) if within(n, FORBIDDEN.get(package, ()))} == set()


def test_gpt_touches_no_storage():
    """The model takes tensors and ids; what it imports knows no URL and no flag."""
    for path in (ROOT / "gpt").glob("*.py"):
        assert {n for n in imported(path) if within(n, ("fsspec", "gcsfs", "argparse", "subprocess"))} == set()


def test_no_name_shadows_another():
    """No package, module or test is called like a standard library module or like what a requirement is imported as.

    A script's own folder comes first in sys.path: prep/tokenize.py would break Python's own tokenize.
    """
    requirements = set()
    for file in ROOT.glob("requirements*.txt"):
        requirements |= {m[0].lower() for m in map(re.compile(r"[\w.-]+").match, file.read_text().splitlines()) if m}
    assert {"torch", "numpy", "pytest"} <= requirements
    known = {name for name, dists in packages_distributions().items() if {d.lower() for d in dists} & requirements}
    known |= {"tokenizers", "datasets", "torch", "wandb", "tensorboard"} | {r.replace("-", "_") for r in requirements}
    stems = {p.stem for p in [*FILES, *(ROOT / "tests").glob("*.py"), *ROOT.glob("*.py")]} | {*PACKAGES, "tests"}
    stems -= {"__init__"}
    assert stems & (sys.stdlib_module_names | known) == set()


def python(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *flags, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_prep_runs_without_torch():
    """Not even by way of a third party: importing the entry point leaves torch alone."""
    ran = python(
        "import prep.tokenize_bpe, sys; assert 'torch' not in sys.modules; assert 'gpt.model' not in sys.modules"
    )
    assert ran.returncode == 0, ran.stderr


def test_local_work_waits_for_no_drivers():
    """fsspec, tenacity (with asyncio) and psutil take 0.06 s to load: each where it is first needed."""
    ran = python(
        "import prep.tokenize_bpe, sys; from store import fs; assert fs.size('README.md') and fs.list_folder('prep')\n"
        "assert not fs.exists('no such file')\n"
        "assert not {'fsspec', 'tenacity', 'asyncio', 'psutil'} & set(sys.modules)"
    )
    assert ran.returncode == 0, ran.stderr


def test_importing_does_nothing():
    """No output, no threads, no child processes, no devices, no signal handlers, no change to sys.path or logging."""
    ran = python(
        "import logging, os, signal, sys, threading, importlib\n"
        "def state(): return (list(sys.path), logging.root.handlers[:], signal.getsignal(signal.SIGTERM), "
        "signal.getsignal(signal.SIGINT), os.getcwd(), threading.active_count(), len(os.listdir('/proc/self/task')) if sys.platform == 'linux' else 0)\n"
        "third = 'numpy torch fsspec rich tenacity tokenizers xxhash zstandard safetensors.torch'.split()\n"
        "[importlib.import_module(m) for m in third]\n"
        "before = state()\n"
        f"for m in {MODULES!r}:\n"
        "    importlib.import_module(m)\n"
        "    assert state() == before, m\n"
        "import torch; assert not torch.cuda.is_initialized()\n",
        "-W", "error::SyntaxWarning",
    )  # fmt: skip
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
