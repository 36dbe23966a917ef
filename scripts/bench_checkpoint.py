"""Measure what saving costs training: the stall of a snapshot, the throughput with saves and without, the memory.

    python scripts/bench_checkpoint.py --model gpt2_small --rounds 5

Rounds with one save and rounds with none take turns in one run, so that what else the machine does hits both alike.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import gc
import json
import platform
import resource
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass

import numpy as np
import psutil
import torch

from cli import flags
from cli.flags import flag
from gpt.presets import preset
from train.config import TrainConfig
from train.folder import RunFolder
from train.precision import Machine, choose_machine, keep_freed_memory
from train.saver import Saver
from train.state import State, new_state, state_tensors
from train.step import to_device, train_step


@dataclass(frozen=True)
class BenchFlags:
    """Flags of scripts/bench_checkpoint.py."""

    model: str = flag("gpt2_small", "preset whose state is saved")
    vocab_size: int = flag(32000, "vocabulary")
    block_size: int = flag(512, "context length in tokens")
    batch: int = flag(1, "sequences per step")
    rounds: int = flag(5, "rounds with a save, and as many without")
    round_seconds: float = flag(60.0, "length of a round: one save in each, so the time between saves")
    device: str = flag("auto", "cuda, mps, cpu or auto")
    precision: str = flag("auto", "bf16, fp16, fp32 or auto")
    folder: str = flag("", "where to save (default: a temporary folder)")
    json: str = flag("", "write the figures to this file too")


def main(argv: list[str] | None = None) -> int:
    """Print a table."""
    args, _ = flags.parse(BenchFlags, argv, prog="bench_checkpoint.py", description=__doc__.split("\n")[0])
    machine = choose_machine(args.device, args.precision, "auto")
    keep_freed_memory(machine)
    config = TrainConfig(
        model=args.model, batch=args.batch, micro_batch=args.batch, block_size=args.block_size, lr=1e-4
    )
    with tempfile.TemporaryDirectory(dir=args.folder or None, prefix="bench-checkpoint-") as out:
        figures = measure(args, config, machine, RunFolder(str(Path(out) / "run")))
    print(f"\n| {figures['model']}, {figures['state_gb']:.2f} GB of state, {figures['machine']} | |\n|---|---|")
    print("\n".join(f"| {name} | {text} |" for name, text in table(figures)))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def measure(args: BenchFlags, config: TrainConfig, machine: Machine, folder: RunFolder) -> dict[str, object]:
    """All figures of one run."""
    torch.manual_seed(0)
    state = new_state(config, preset(args.model, vocab_size=args.vocab_size, block_size=args.block_size), machine)
    forward = torch.compile(state.model) if machine.compile else state.model
    tokens = np.random.default_rng(0).integers(0, args.vocab_size, (args.batch, args.block_size + 1), dtype=np.uint16)

    def step() -> None:
        train_step(state.model, forward, state.optimizer, state.scaler, to_device(tokens, machine), micro_batch=args.batch,
                   lr=config.lr, clip=1.0, machine=machine, stop=lambda: False)  # fmt: skip
        state.step += 1

    for _ in range(3):
        step()
    gc.collect()
    folder.hold()
    saver = Saver(config, folder, machine, step=0)
    before = psutil.Process().memory_info().rss
    save(saver, state, machine)  # the first one allocates
    saver.wait()
    extra = psutil.Process().memory_info().rss - before

    times: dict[bool, list[float]] = {True: [], False: []}
    stalls, writes = [], []
    for number in range(2 * args.rounds):
        saving = number % 4 in (1, 2)  # without, with, with, without: a drift over time hits both alike
        seconds = round_of_steps(args, step, machine, (lambda: save(saver, state, machine)) if saving else lambda: None)
        times[saving].append(seconds)
        saver.wait()
        if saving:
            stalls.append(saver.stall_s)
            writes.append(saver.write_s)
        print(
            f"round {number + 1}/{2 * args.rounds}  {'one save' if saving else 'no save '}  {1000 * seconds:.1f} ms a step",
            flush=True,
        )
    state_bytes = sum(t.nbytes for part in saver.snapshot.buffers.values() for t in part.values())
    without, with_saves = statistics.median(times[False]), statistics.median(times[True])
    return {
        **asdict(args), "machine": f"{machine.name}, {machine.precision}, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"),
        "state_gb": state_bytes / 1e9, "stall_ms": 1000 * statistics.median(stalls), "write_s": statistics.median(writes),
        "step_ms": {"no_save": [1000 * t for t in times[False]], "one_save": [1000 * t for t in times[True]]},
        "overhead_percent": 100 * (with_saves / without - 1), "extra_memory_states": extra / state_bytes,
        "peak_host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9,
    }  # fmt: skip


def save(saver: Saver, state: State, machine: Machine) -> None:
    """Begin a save as the loop does."""
    saver.begin(state.step, state_tensors(state, machine), {"step": state.step, "val_loss": None})


def round_of_steps(args: BenchFlags, step: object, machine: Machine, begin_save: object) -> float:
    """Mean seconds of a step over one round, which begins with a save or with nothing."""
    start_s, n = time.monotonic(), 0
    begin_save()
    while time.monotonic() - start_s < args.round_seconds:
        step()
        machine.synchronize()
        n += 1
    return (time.monotonic() - start_s) / n


def table(figures: dict) -> list[tuple[str, str]]:
    """The rows a person reads."""
    return [
        ("the loop waits for a save", f"{figures['stall_ms']:.0f} ms"),
        ("written and committed, behind it", f"{figures['write_s']:.1f} s"),
        (f"step, no save in {figures['round_seconds']:.0f} s", f"{statistics.median(figures['step_ms']['no_save']):.1f} ms"),
        (f"step, one save in {figures['round_seconds']:.0f} s", f"{statistics.median(figures['step_ms']['one_save']):.1f} ms"),
        ("saving costs training", f"{figures['overhead_percent']:.1f} %"),
        ("memory it takes", f"{figures['extra_memory_states']:.2f} of a state"),
    ]  # fmt: skip


if __name__ == "__main__":
    flags.run(main)
