"""Training speed and memory beside a textbook loop in nanoGPT's way, eager and compiled, and Hugging Face's Trainer.

    python scripts/bench_train.py --precision bf16
    python scripts/bench_train.py --device cuda --model gpt2_small --block-size 1024 --batch 64 --micro-batch 16
    python scripts/bench_train.py --device cuda --precision fp16 --no-flash       # what a T4 can do

Each contestant is a process of its own, so that its peak memory is its own; all train on the same file of ids, with the
same shapes, and take turns of a few steps in one run, so that what else the machine does hits all alike. Where it does
much, processor seconds tell more than those of the clock: with OMP_NUM_THREADS=1 they count work alone, not waiting.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
import os
import resource
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass

import numpy as np

from cli import flags
from cli.errors import UserError
from cli.flags import flag
from gpt.model import flops_per_token
from gpt.presets import preset
from scripts.benchmark import machine_facts, settings_of, write_json

ROOT = Path(__file__).resolve().parent.parent
NAMES = {
    "ours": "this project",
    "ours-eager": "this project, not compiled",
    "textbook": "textbook loop",
    "textbook-compiled": "textbook loop, compiled",
    "trainer": "Hugging Face Trainer",
    "trainer-compiled": "Hugging Face Trainer, compiled",
}


@dataclass(frozen=True)
class BenchFlags:
    """Flags of scripts/bench_train.py."""

    contestants: tuple[str, ...] = flag(
        ("ours", "textbook", "textbook-compiled", "trainer"), f"who takes part: {' '.join(NAMES)}"
    )
    model: str = flag("small", "preset that gives depth, heads and width")
    vocab_size: int = flag(32000, "vocabulary")
    block_size: int = flag(512, "context length in tokens")
    batch: int = flag(16, "sequences per optimizer step")
    micro_batch: int = flag(16, "sequences per forward pass")
    rounds: int = flag(5, "turns of each contestant after its first step")
    steps: int = flag(1, "steps in a turn")
    lr: float = flag(1e-3, "learning rate, constant")
    device: str = flag("auto", "cuda, mps, cpu or auto")
    precision: str = flag("auto", "bf16, fp16, fp32 or auto")
    flash: bool = flag(True, "allow FlashAttention (without: what GPUs before Ampere have)")
    ids: str = flag("", "raw token shard to train on (default: random ids, the frequent ones frequent)")
    json: str = flag("", "file for the figures")
    role: str = flag("", "used by the program itself: the contestant that this process is")


def main(argv: list[str] | None = None) -> int:
    """Print a table; write the figures as JSON. Returns 0."""
    args, _ = flags.parse(BenchFlags, argv, prog="bench_train.py", description=__doc__.split("\n")[0])
    if args.role:
        return contestant(args)
    for name in args.contestants:
        if name not in NAMES:
            raise UserError(f"--contestants {name}: expected some of {' '.join(NAMES)}")
    if args.batch % args.micro_batch:
        raise UserError(f"--batch {args.batch}: expected a multiple of --micro-batch {args.micro_batch}")
    with tempfile.TemporaryDirectory() as folder:
        ids = args.ids or str(random_shard(Path(folder) / "ids.bin", args.vocab_size))
        players = [Player(name, [*(sys.argv[1:] if argv is None else argv), "--ids", ids]) for name in args.contestants]
        try:
            rows = play(args, players)
        finally:
            for player in players:
                player.end()
    facts = machine_facts(args.device)
    show(args, rows, facts)
    if args.json:
        write_json(args.json, {"benchmark": "train", **facts, "settings": settings_of(args), "results": rows})
    return 0


def random_shard(path: Path, vocab_size: int, tokens: int = 1 << 20) -> Path:
    """A raw shard in llm.c's format, of ids as frequent as words are (Zipf)."""
    from store.shards import ShardWriter, dtype_for

    ranks = np.random.default_rng(0).zipf(1.2, tokens)
    with ShardWriter(path, tokens, dtype_for(vocab_size), level=None, durable=False) as writer:
        writer.write((ranks - 1) % vocab_size)
    return path


# ---- the referee ----------------------------------------------------------------------------------------------------


class Player:
    """A contestant's process: `turn` has it do some steps and returns what it tells of them."""

    def __init__(self, name: str, argv: list[str]) -> None:
        self.name = name
        command = [sys.executable, str(ROOT / "scripts" / "bench_train.py"), *argv, "--role", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def turn(self, steps: int) -> dict[str, float]:
        """Raises UserError when the process has ended."""
        try:
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"{NAMES[self.name]}: ended with exit code {self.process.wait()}; what it said is above")
        return json.loads(line)

    def end(self) -> None:
        """Close its input, which ends it."""
        self.process.stdin.close()
        self.process.wait()


def play(args: BenchFlags, players: list[Player]) -> list[dict[str, object]]:
    """First steps one after the other, then rounds of turns; one row of results for each player."""
    first = {p.name: p.turn(1) for p in players}
    for p in players:
        p.turn(1)  # the second step may still allocate, or compile
    turns = {p.name: [] for p in players}
    for r in range(args.rounds):
        for p in players if r % 2 == 0 else players[::-1]:
            turns[p.name].append(p.turn(args.steps))
    tokens = args.steps * args.batch * args.block_size
    ours = turns.get("ours", next(iter(turns.values())))
    rows = []
    for p in players:
        seconds = [t["seconds"] for t in turns[p.name]]
        last = turns[p.name][-1]
        rate = tokens / statistics.median(seconds)
        rows.append(
            {
                "contestant": p.name,
                "tokens_per_s": round(rate, 1),
                "ours_is_faster_by": round(ratio(turns[p.name], ours, "seconds"), 3),
                "ours_is_faster_by_in_cpu_s": round(ratio(turns[p.name], ours, "cpu_s"), 3),
                "mfu": round(rate * flops(args) / last["peak_flops"], 4) if last["peak_flops"] else None,
                "peak_memory_gb": round(last["peak_bytes"] / 1e9, 3),
                "first_step_s": round(first[p.name]["seconds"], 2),
                "loss": last["loss"],
                "losses": [t["loss"] for t in turns[p.name]],
                "attention": last["attention"],
                "turns_s": [round(s, 4) for s in seconds],
                "turns_cpu_s": [round(t["cpu_s"], 4) for t in turns[p.name]],
            }
        )  # fmt: skip
    return rows


def ratio(theirs: list[dict[str, float]], ours: list[dict[str, float]], clock: str) -> float:
    """How much longer theirs take: the median over turns that followed one another."""
    return statistics.median(t[clock] / o[clock] for t, o in zip(theirs, ours, strict=True))


def flops(args: BenchFlags) -> int:
    """Per token, forward and backward."""
    return flops_per_token(preset(args.model, vocab_size=args.vocab_size, block_size=args.block_size))


def show(args: BenchFlags, rows: list[dict[str, object]], facts: dict[str, object]) -> None:
    """The table."""
    print(f"{args.model}, vocabulary {args.vocab_size}, {args.batch} x {args.block_size} tokens a step in micro-batches of "
          f"{args.micro_batch}, {args.precision}; {facts['machine']}, torch {facts['versions']['torch']}, {facts['date']}")  # fmt: skip
    print(f"{'':34}tokens/s  ours is  in CPU s    MFU  peak GB  first step s    loss")
    for row in rows:
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        loss = "-" if row["loss"] is None else f"{row['loss']:.3f}"
        print(f"{NAMES[row['contestant']]:32}{row['tokens_per_s']:10,.0f}{row['ours_is_faster_by']:8.2f}x{row['ours_is_faster_by_in_cpu_s']:9.2f}x{mfu:>7}"
              f"{row['peak_memory_gb']:9.2f}{row['first_step_s']:14.1f}{loss:>8}")  # fmt: skip


# ---- the contestants ------------------------------------------------------------------------------------------------


class Turns:
    """A contestant's side: `before` each step waits until a step is wanted, `after` it tells when a turn is done."""

    def __init__(self, synchronize, device: str, peak_flops: float | None, attention: str) -> None:
        self.synchronize, self.device, self.left = synchronize, device, 0
        self.peak_flops, self.attention = peak_flops, attention
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is not an answer

    def before(self) -> None:
        """Raises SystemExit when there are no more turns."""
        if self.left:
            return
        line = sys.stdin.readline()
        if not line:
            raise SystemExit(0)
        self.left = self.steps = int(line)
        self.synchronize()
        self.start_s, self.start_cpu_s = time.perf_counter(), time.process_time()

    def after(self, loss) -> None:
        """`loss`: a tensor on the device, read only when the turn is done, or None where it is not known."""
        self.left -= 1
        if self.left:
            return
        self.synchronize()
        seconds, cpu_s = time.perf_counter() - self.start_s, time.process_time() - self.start_cpu_s
        told = {"seconds": seconds, "cpu_s": cpu_s, "loss": None if loss is None else round(float(loss), 4), "peak_bytes": peak_bytes(self.device),
                "peak_flops": self.peak_flops, "attention": self.attention}  # fmt: skip
        print(json.dumps(told), file=self.answers, flush=True)


def peak_bytes(device: str) -> int:
    """Most memory this process has held: on the GPU in tensors, elsewhere all of the process."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def contestant(args: BenchFlags) -> int:
    """Train as one of NAMES until the referee has seen enough."""
    import torch

    from train.precision import attention_kernel, choose_machine, keep_freed_memory

    compiled = "on" if args.role.endswith("compiled") or args.role == "ours" else "off"
    machine = choose_machine(args.device, args.precision, compiled)
    if not args.flash:
        torch.backends.cuda.enable_flash_sdp(False)  # a CPU asks it too
        torch.backends.cuda.enable_cudnn_sdp(False)  # which a T4 lacks as well
    if args.role.startswith("ours"):
        keep_freed_memory(machine)  # as train/run.py does; the peers keep the allocator's own ways
    config = preset(args.model, **shape(args))
    attention = attention_kernel(config, machine)
    turns = Turns(machine.synchronize, machine.device.type, machine.peak_flops(), attention)
    torch.manual_seed(1)
    play_as = ours if args.role.startswith("ours") else textbook if args.role.startswith("textbook") else trainer
    play_as(args, machine, turns)
    return 0


def shape(args: BenchFlags) -> dict[str, int]:
    """Of the model, under our names, which are the textbook's too."""
    config = preset(args.model, vocab_size=args.vocab_size, block_size=args.block_size)
    return {n: getattr(config, n) for n in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")}


def token_ids(args: BenchFlags) -> np.memmap:
    """The shard, mapped."""
    from store.shards import HEADER_BYTES, dtype_for

    return np.memmap(args.ids, dtype_for(args.vocab_size), mode="r", offset=HEADER_BYTES)


def ours(args: BenchFlags, machine, turns: Turns) -> None:
    """What the loop of train/run.py does for a step."""
    import torch

    from train.batches import Batches
    from train.config import TrainConfig
    from train.state import new_state
    from train.step import to_device, train_step

    batches = Batches([token_ids(args)], block_size=args.block_size, batch=args.batch, seed=1)
    config = TrainConfig(lr=args.lr, batch=args.batch)
    state = new_state(config, preset(args.model, **shape(args)), machine)
    forward = torch.compile(state.model) if machine.compile else state.model
    turns.before()
    for host_ids in batches.ahead(0, 1 << 30):
        ids = to_device(host_ids, machine)
        loss, _ = train_step(
            state.model, forward, state.optimizer, state.scaler, ids, micro_batch=args.micro_batch, lr=args.lr,
            clip=config.clip, machine=machine, stop=lambda: False,
        )  # fmt: skip
        turns.after(loss)
        turns.before()


def textbook(args: BenchFlags, machine, turns: Turns) -> None:
    """nanoGPT's loop."""
    from scripts.textbook import TextbookGPT, TextbookTrainer

    loop = TextbookTrainer(
        TextbookGPT(**shape(args)), token_ids(args), batch=args.batch, micro_batch=args.micro_batch, lr=args.lr,
        device=str(machine.device), dtype=machine.dtype, compiled=machine.compile,
    )  # fmt: skip
    while True:
        turns.before()
        turns.after(loop.step())


def trainer(args: BenchFlags, machine, turns: Turns) -> None:
    """Hugging Face's Trainer with GPT2LMHeadModel, as its documentation has it."""
    import torch
    import transformers

    ids, T = token_ids(args), args.block_size

    class Windows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(ids) // T

        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            window = torch.from_numpy(ids[i * T : (i + 1) * T].astype(np.int64))
            return {"input_ids": window, "labels": window}

    class TakeTurns(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__) -> None:
            turns.before()

        def on_step_end(self, *_, **__) -> None:
            turns.after(None)  # its loss is known when it logs, with a wait for the device

    s = shape(args)
    config = transformers.GPT2Config(
        vocab_size=s["vocab_size"], n_positions=T, n_embd=s["n_embd"], n_layer=s["n_layer"], n_head=s["n_head"],
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, tie_word_embeddings=False, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=args.micro_batch, learning_rate=args.lr, max_steps=1 << 30,
            gradient_accumulation_steps=args.batch // args.micro_batch, bf16=machine.precision == "bf16",
            fp16=machine.precision == "fp16", tf32=True if machine.device.type == "cuda" else None,
            use_cpu=machine.device.type == "cpu", torch_compile=machine.compile, lr_scheduler_type="constant",
            weight_decay=0.1, save_strategy="no", report_to="none", logging_steps=1 << 30, disable_tqdm=True,
        )  # fmt: skip
        transformers.Trainer(
            model=transformers.GPT2LMHeadModel(config), args=arguments, train_dataset=Windows(), callbacks=[TakeTurns()]
        ).train()


if __name__ == "__main__":
    flags.run(main)
