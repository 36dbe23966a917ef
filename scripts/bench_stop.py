"""Measure a stop: from SIGTERM to the end of a real trainer, its checkpoint committed, at random moments of training.

python scripts/bench_stop.py --model gpt2_small
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import random
import signal
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from typing import Any

from cli import flags
from cli.errors import UserError
from cli.flags import flag
from cli.progress import count
from scripts.benchmark import machine_facts, settings_of, write_json
from train import checkpoint
from train.exits import STOPPED

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class StopFlags:
    """Flags of scripts/bench_stop.py."""

    model: str = flag("gpt2_small", "preset whose state is saved")
    data: str = flag("", "token dataset (default: a small one is made)")
    block_size: int = flag(64, "context length in tokens")
    batch: int = flag(2, "sequences per step: a stop waits for the step that is under way")
    stops: int = flag(5, "how often the trainer is stopped and started again")
    device: str = flag("auto", "cuda, mps, cpu or auto")
    seed: int = flag(0, "of the moments")
    folder: str = flag("", "where to save (default: a temporary folder)")
    json: str = flag("", "write the figures to this file too")


def main(argv: list[str] | None = None) -> int:
    """Print how long each stop took."""
    args, _ = flags.parse(StopFlags, argv, prog="bench_stop.py", description=__doc__.split("\n")[0])
    pick, seconds = random.Random(args.seed), []
    with tempfile.TemporaryDirectory(prefix="bench-stop-", dir=args.folder or None) as scratch:
        data, out = args.data or make_dataset(Path(scratch)), Path(scratch) / "out"
        for number in range(1, args.stops + 1):
            took, manifest = stop_once(args, data, out, pick.uniform(0.0, 2.0))
            seconds.append(took)
            print(f"stop {number}/{args.stops}  {took:.2f} s from SIGTERM to exit, step {manifest.step} saved "
                  f"({count(manifest.n_bytes)}B)", flush=True)  # fmt: skip
    print(f"median {statistics.median(seconds):.2f} s, longest {max(seconds):.2f} s")
    if args.json:
        figures: dict[str, Any] = {"benchmark": "stop", **machine_facts(args.device), "settings": settings_of(args)}
        write_json(
            args.json, {**figures, "checkpoint_bytes": manifest.n_bytes, "seconds": [round(s, 3) for s in seconds]}
        )
    return 0


def make_dataset(scratch: Path) -> str:
    """A dataset of a few thousand sentences."""
    corpus = scratch / "corpus.txt"
    corpus.write_text("".join(f"User: What is {i}?\nAssistant: It is {i} again.\n\n" for i in range(5000)))
    prep = [sys.executable, ROOT / "prep/tokenize_bpe.py", "--input", corpus, "--output", scratch / "data"]
    done = subprocess.run([*prep, "--vocab-size", "512"], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"no dataset could be made: {done.stderr.strip()}")
    return str(scratch / "data")


def stop_once(args: StopFlags, data: str, out: Path, wait_s: float) -> tuple[float, checkpoint.Manifest]:
    """(seconds from SIGTERM to the exit, the checkpoint it left); sent `wait_s` after the first step that is told."""
    command = [sys.executable, ROOT / "train/run.py", "--data", data, "--out", out, "--resume", "--model", args.model]
    command += ["--device", args.device, "--block-size", args.block_size, "--batch", args.batch, "--log-every", 1]
    command += ["--steps", 1_000_000, "--lr", "1e-4", "--warmup", 10, "--eval-every", 0, "--sample-every", 0]
    command += ["--save-every", 0, "--save-every-minutes", 0, "--keep", 1]
    trainer = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    said = []
    try:
        for line in trainer.stdout:
            said.append(line)
            if line.startswith("step "):
                break
        time.sleep(wait_s)
        start_s = time.monotonic()
        trainer.send_signal(signal.SIGTERM)
        said += trainer.stdout.readlines()
        code = trainer.wait()
        took = time.monotonic() - start_s
    finally:
        trainer.kill()
        trainer.stdout.close()
    saved = checkpoint.committed(str(out))
    if code != STOPPED or not saved or f"step {saved[-1].step}" not in "".join(said[-20:]):
        raise UserError(f"the trainer did not stop as it should (exit code {code}): {''.join(said[-5:]).strip()}")
    return took, saved[-1]


if __name__ == "__main__":
    flags.run(main)
