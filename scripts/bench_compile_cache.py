"""Time the first step of a compiled run: cold, on the same machine again, and on a fresh one from the run's own copy.

python scripts/bench_compile_cache.py --layers 12
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import os
import resource
import subprocess
import tempfile
from dataclasses import dataclass

from cli import flags
from cli.errors import UserError
from cli.flags import flag
from scripts import demo_corpus
from store import fs
from train.folder import read_lines

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class BenchFlags:
    """Flags of scripts/bench_compile_cache.py."""

    layers: int = flag(6, "layers of the model")
    width: int = flag(256, "its width")
    device: str = flag("cpu", "cpu or cuda")


def main(argv: list[str] | None = None) -> int:
    """Print seconds and CPU seconds of each first step. Returns 0."""
    args, _ = flags.parse(BenchFlags, argv, prog="bench_compile_cache.py", description=__doc__.split("\n")[0])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        demo_corpus.main(["--output", str(folder / "corpus.txt"), "--megabytes", "0.6"])
        run("prep/tokenize_bpe.py", folder, "prep", "--input", "corpus.txt", "--output", "data", "--vocab-size", 512)
        cold = first_step(args, folder, "machine-1", steps=2)
        again = first_step(args, folder, "machine-1", steps=4)
        moved = first_step(args, folder, "machine-2", steps=6)
        first_step(args, folder, "machine-1", steps=6, out="straight")
        losses = [
            [m["loss"] for m in read_lines(folder / out / "metrics.jsonl") if "loss" in m]
            for out in ("out", "straight")
        ]
        stored = sum(size or 0 for _, size in fs.find_files(str(folder / "out" / "compile")))
    if not cold[2] == "cold" or not again[2] == moved[2] == "warm":
        raise UserError(f"expected cold, warm, warm, found {cold[2]}, {again[2]}, {moved[2]}: is OUT writable?")
    print(f"{args.layers} layers, {args.width} wide, {args.device}; kept with the run: {stored / 1e6:.2f} MB")
    print(f"{'first step':34} seconds  CPU seconds of the whole process")
    for name, (seconds, cpu_s, _) in {"cold": cold, "same machine, again": again,
                                      "fresh machine, from OUT/compile": moved}.items():  # fmt: skip
        print(f"{name:34} {seconds:7.1f} {cpu_s:12.1f}")
    print(
        f"compile's share is cut {cold[0] / again[0]:.1f}x on the same machine, {cold[0] / moved[0]:.1f}x on a fresh one"
    )
    print(f"losses after a cold start and after warm ones: {'equal to the bit' if losses[0] == losses[1] else losses}")
    return 0


def first_step(
    args: BenchFlags, folder: Path, machine: str, *, steps: int, out: str = "out"
) -> tuple[float, float, str]:
    """Train until `steps`; (seconds of the first step, CPU seconds of all, off, cold or warm)."""
    cpu_s = run(
        "train/run.py", folder, machine, "--data", "data", "--out", out, "--model", "small", "--n-layer", args.layers,
        "--n-embd", args.width, "--block-size", 64, "--batch", 4, "--steps", steps, "--log-every", 1, "--eval-every", 0,
        "--eval-tokens", 256, "--schedule", "constant", "--warmup", 1, "--sample-every", 0, "--device", args.device, "--compile", "on", "--resume",
    )  # fmt: skip
    compiles = [e for e in read_lines(folder / out / "events.jsonl") if e["event"] == "compiled"]
    return compiles[-1]["seconds"], cpu_s, compiles[-1]["cache"]


def run(script: str, folder: Path, machine: str, *arguments: object) -> float:
    """One of our programs on a `machine` of its own: an own cache, the same secret. Returns its CPU seconds."""
    environment = {**os.environ, "PERENNIAL_CACHE": str(folder / machine), "PERENNIAL_COMPILE_KEY": "bench"}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    line = [sys.executable, str(ROOT / script), *map(str, arguments)]
    subprocess.run(line, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    flags.run(main)
