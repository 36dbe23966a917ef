"""Tokens per second of generation, beside transformers.generate with its cache and beside what the memory allows.

    python scripts/bench_sample.py
    python scripts/bench_sample.py --device cuda --precisions bf16 --compile

The same weights in both, greedy, in turns in one run; prompt and generation together are timed. Each new id needs every
weight once, so memory bandwidth bounds the rate: the bound is measured in the same turns, by summing as many bytes.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cli import flags
from cli.flags import flag
from gpt.compiled import compile_decoding
from gpt.decoding import lay_out_for_decoding
from gpt.hf import to_hf
from gpt.model import GPT
from gpt.presets import preset
from gpt.sample import generate
from scripts.benchmark import machine_facts, settings_of, write_json
from train.precision import Machine, choose_machine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class BenchFlags:
    """Flags of scripts/bench_sample.py."""

    model: str = flag("gpt2_small", "preset")
    vocab_size: int = flag(32000, "vocabulary")
    block_size: int = flag(1024, "context length in tokens")
    prompts: tuple[str, ...] = flag(("8", "900"), "lengths of the prompts")
    batch: int = flag(1, "prompts at once")
    new_tokens: int = flag(96, "ids generated after each prompt")
    precisions: tuple[str, ...] = flag(("fp32", "bf16"), "formats of weights and cache: fp32 bf16 fp16")
    rounds: int = flag(4, "turns of each contestant")
    device: str = flag("cpu", "cuda, mps, cpu or auto")
    compile: bool = flag(False, "ours decodes by one compiled graph (on a GPU a CUDA graph)")
    json: str = flag("", "file for the figures")


def main(argv: list[str] | None = None) -> int:
    """Print a table; write the figures as JSON. Returns 0."""
    args, _ = flags.parse(BenchFlags, argv, prog="bench_sample.py", description=__doc__.split("\n")[0])
    machine = choose_machine(args.device, "auto", "off")
    facts = machine_facts(args.device)
    print(f"{args.model}, {args.batch} at once, {args.new_tokens} new ids; {facts['machine']}, {facts['threads']} threads, "
          f"torch {facts['versions']['torch']}, transformers {facts['versions'].get('transformers')}, {facts['date']}")  # fmt: skip
    print(
        f"{'format':8}{'prompt':>7}{'ours':>10}{'transformers':>14}{'ours is':>9}{'bound':>9}{'ours of it':>12}   tokens/s"
    )
    rows = []
    for precision in args.precisions:
        ours, theirs = models(args, DTYPES[precision], machine)
        for length in map(int, args.prompts):
            row = compare(args, ours, theirs, length, machine)
            rows.append({"precision": precision, "prompt": length, **row})
            print(f"{precision:8}{length:7}{row['ours']:10.1f}{row['transformers']:14.1f}{row['ratio']:8.2f}x{row['ratio_in_cpu_s']:9.2f}x"
                  f"{row['bound']:9.1f}{row['ours'] / row['bound']:12.0%}", flush=True)  # fmt: skip
    if args.json:
        write_json(args.json, {"benchmark": "sample", **facts, "settings": settings_of(args), "results": rows})
    return 0


def models(args: BenchFlags, dtype: torch.dtype, machine: Machine) -> tuple[GPT, Any]:
    """Our model and transformers', with the same weights."""
    import transformers

    torch.manual_seed(0)
    ours = GPT(preset(args.model, vocab_size=args.vocab_size, block_size=args.block_size))
    kwargs, weights = to_hf(ours)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**kwargs, bos_token_id=0, eos_token_id=None))
    theirs.load_state_dict(weights)
    ours, theirs = (model.to(machine.device, dtype).eval() for model in (ours, theirs))
    lay_out_for_decoding(ours)
    return compile_decoding(ours, args.batch) if args.compile else ours, theirs


def compare(args: BenchFlags, ours: GPT, theirs: Any, length: int, machine: Machine) -> dict[str, Any]:
    """Medians over the turns, in tokens per second of the whole batch; a ratio is the median of the turns' ratios."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(args.vocab_size, (args.batch, length), generator=generator)
    rows, ids, n = prompts.tolist(), prompts.to(machine.device), args.new_tokens
    size = ours.wte.weight.element_size()
    weights = sum(p.numel() for p in ours.parameters()) - ours.wte.weight.numel() * (ours.head is not None)
    cached = 2 * ours.config.n_layer * ours.config.n_embd * (length + n / 2) * args.batch
    memory = torch.zeros(weights * size // 4, device=machine.device)  # float32: its sum is as fast as reading is

    def contest(act: Callable[[], object]) -> tuple[float, float]:
        """Seconds of the clock and of the processor."""
        machine.synchronize()
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        act()
        machine.synchronize()
        return time.perf_counter() - start_s, time.process_time() - start_cpu_s

    turns = {
        "ours": lambda: generate(ours, rows, max_tokens=n, temperature=0),
        "transformers": lambda: theirs.generate(
            ids, attention_mask=torch.ones_like(ids), min_new_tokens=n, max_new_tokens=n, do_sample=False,
            use_cache=True, pad_token_id=0,
        ),
        "reading": lambda: [memory.sum() for _ in range(4)],
    }  # fmt: skip
    times = {name: [] for name in turns}
    for i in range(args.rounds + 1):
        for name, act in turns.items():
            taken = contest(act)
            if i:  # the first of each warms up
                times[name].append(taken)
    seconds = {name: statistics.median(s for s, _ in of) for name, of in times.items()}
    ratios = [
        statistics.median(t[clock] / o[clock] for o, t in zip(times["ours"], times["transformers"], strict=True))
        for clock in (0, 1)
    ]
    return {
        "ours": args.batch * n / seconds["ours"],
        "transformers": args.batch * n / seconds["transformers"],
        "ratio": ratios[0],
        "ratio_in_cpu_s": ratios[1],
        "bound": args.batch * 4 * memory.nbytes / seconds["reading"] / (weights * size + cached * size),
        "turns_s": {name: [round(s, 4) for s, _ in of] for name, of in times.items()},
        "turns_cpu_s": {name: [round(s, 4) for _, s in of] for name, of in times.items()},
    }


if __name__ == "__main__":
    flags.run(main)
