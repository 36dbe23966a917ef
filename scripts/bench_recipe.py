"""Which recipe learns more from the same tokens and the same seconds: GPT-2 with AdamW, the modern one, every ingredient.

    python scripts/bench_recipe.py --data DATASET --output recipe.json

Trials run one after another through train_step, so what is measured is what train/run.py does. Each is kept in the JSON
file as soon as it ends: the same command goes on from there, and shows only the tables when nothing is left to do.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cli import flags
from cli.errors import UserError
from cli.flags import flag, number
from gpt.model import GPT, GPTConfig, make_norm
from gpt.modern import GatedMLP, QKNorm
from scripts.benchmark import machine_facts, write_json
from store.shards import TokenShards
from train.batches import Batches, validation_windows
from train.optim import make_optimizer
from train.precision import Machine, choose_machine, keep_freed_memory
from train.schedule import learning_rate
from train.step import to_device, train_step, validation_loss

PARTS = ("rotary", "rms_norm", "qk_norm", "swiglu", "no_bias")  # of --arch modern
TRIED = ("zero_head",)  # and left out: it did not pay
MODERN = (*PARTS, "muon", "wsd")
GPT2 = ()  # AdamW and cosine: no ingredient
WSD = {"schedule": "wsd", "floor": 0.0, "decay_fraction": 0.5}
COSINE = {"schedule": "cosine", "floor": 0.1, "decay_fraction": 0.0}


@dataclass(frozen=True)
class RecipeFlags:
    """Flags of scripts/bench_recipe.py."""

    data: str = flag("data", "folder or URL of a token dataset", env="PERENNIAL_DATA")
    output: str = flag("recipe.json", "JSON file of the results; trials found there are not repeated")
    sizes: tuple[str, ...] = flag(("2x128", "4x128"), "models, layers x width; the ingredients are tried on the first")
    tokens: tuple[str, ...] = flag(("600K", "600K"), "training tokens of GPT-2, for each size")
    block_size: int = flag(128, "context length in tokens")
    batch: int = flag(16, "sequences per step")
    share: float = flag(0.4, "of those tokens for the modern recipe")
    lrs: tuple[str, ...] = flag(
        ("7.5e-4", "1.5e-3", "3e-3", "6e-3"), "peak learning rates, of which GPT-2 gets its best"
    )
    muon_lr: float = flag(3e-3, "peak learning rate of every trial with Muon, which is not tuned")
    seeds: int = flag(3, "seeds of the comparison; learning rates and ingredients are compared at the first one")
    eval_tokens: int = flag(32768, "tokens of the last validation; those along the curve take an eighth of them")
    device: str = flag("cpu", "cuda, mps or cpu")
    precision: Literal["bf16", "fp32"] = flag("bf16", "number format of the matmuls")
    compile: Literal["on", "off"] = flag("off", "torch.compile; its first step is in none of the times")
    plot: str = flag("", "also draw the curves into this file, .svg or .png (needs matplotlib)")
    minutes: float | None = flag(None, "begin no trial later than this")


@dataclass(frozen=True)
class Trial:
    """One training run: what its result is kept under."""

    size: str
    ingredients: tuple[str, ...]  # what is different from GPT-2 with AdamW and cosine
    lr: float
    seed: int
    tokens: int


class Enough(Exception):
    """--minutes have passed."""


class Book:
    """Results by trial, each written down as soon as it is there."""

    def __init__(
        self, path: str, conditions: dict[str, Any], run: Callable[[Trial], dict[str, Any]], until_s: float
    ) -> None:
        self.path, self.run, self.until_s = path, run, until_s
        self.page = {**conditions, "trials": []}
        if Path(path).exists():
            found = json.loads(Path(path).read_text())
            for name in ("settings", "data"):
                if found[name] != conditions[name]:
                    raise UserError(f"--output {path}: holds results of other {name}: give a new file")
            self.page["trials"] = found["trials"]
        self.results = {trial_of(row): row for row in self.page["trials"]}

    def __getitem__(self, trial: Trial) -> dict[str, Any]:
        """The result, after running the trial if it was never run. Raises Enough."""
        if trial not in self.results:
            if time.monotonic() > self.until_s:
                raise Enough
            self.results[trial] = {**asdict(trial), **self.run(trial)}
            self.page["trials"].append(self.results[trial])
            write_json(self.path, self.page)
            print(f"{trial.size} {name_of(trial.ingredients)} lr {trial.lr:g} seed {trial.seed} {trial.tokens:,} tokens: "
                  f"loss {self.results[trial]['loss']:.4f}, {self.results[trial]['cpu_s']:.0f} s", flush=True)  # fmt: skip
        return self.results[trial]

    def best_lr(self, trial: Trial, lrs: Iterable[float]) -> float:
        """The learning rate that ends lowest."""
        return min(lrs, key=lambda lr: self[dataclasses.replace(trial, lr=lr)]["loss"])


def trial_of(row: dict[str, Any]) -> Trial:
    values = {f.name: row[f.name] for f in dataclasses.fields(Trial)}
    return Trial(**{**values, "ingredients": tuple(values["ingredients"])})


def name_of(ingredients: tuple[str, ...]) -> str:
    """`GPT-2`, `GPT-2 + muon`, `modern`, `modern - swiglu`."""
    if len(ingredients) <= len(MODERN) // 2:
        return " + ".join(("GPT-2", *ingredients))
    more = "".join(f" + {i}" for i in ingredients if i in TRIED)
    return " - ".join(("modern", *(i for i in MODERN if i not in ingredients))) + more


def main(argv: list[str] | None = None) -> int:
    """Run what has not been run, then print the tables. Returns 0."""
    args, _ = flags.parse(RecipeFlags, argv, prog="bench_recipe.py", description=__doc__.split("\n")[0])
    if len(args.sizes) != len(args.tokens):
        raise UserError("--tokens: give as many numbers as --sizes")
    machine, tokens = choose_machine(args.device, args.precision, args.compile), TokenShards(args.data)
    keep_freed_memory(machine)
    settings = {k: getattr(args, k) for k in ("block_size", "batch", "eval_tokens", "device", "precision", "compile")}
    conditions = {**machine_facts(args.device), "settings": settings,
                  "data": {"fingerprint": tokens.fingerprint, "vocab_size": tokens.vocab_size}}  # fmt: skip
    until_s = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
    book = Book(args.output, conditions, lambda trial: run(trial, args, tokens, machine), until_s)
    lrs = [float(lr) for lr in args.lrs]
    budgets = {s: number(t) for s, t in zip(args.sizes, args.tokens, strict=True)}
    try:
        for seed in range(1, args.seeds + 1):  # all sizes at one seed before the next: what is cut short still compares
            for size, budget in budgets.items():
                pair(book, size, budget, args.share, lrs, args.muon_lr, seed)
        for size, budget in budgets.items():
            compare(book, size, budget, args.share, lrs, args.muon_lr, range(1, args.seeds + 1))
        taste(book, args.sizes[0], budgets[args.sizes[0]], args.share, lrs, args.muon_lr)
    except Enough:
        print("more trials are left: the same command goes on with them")
    if args.plot:
        plot(book, budgets, args.share, args.plot)
    return 0


def pair(
    book: Book, size: str, budget: int, share: float, lrs: list[float], muon_lr: float, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results of GPT-2 with all of the tokens, at its best learning rate, and of the modern recipe with a part of them."""
    few = round(budget * share)  # where the learning rates are compared
    lr = book.best_lr(Trial(size, GPT2, 0.0, 1, few), lrs)
    return book[Trial(size, GPT2, lr, seed, budget)], book[Trial(size, MODERN, muon_lr, seed, few)]


def compare(
    book: Book, size: str, budget: int, share: float, lrs: list[float], muon_lr: float, seeds: Iterable[int]
) -> None:
    """Print what the seeds of one size say together."""
    pairs = [pair(book, size, budget, share, lrs, muon_lr, seed) for seed in seeds]
    gpt2, modern = map(list, zip(*pairs, strict=True))
    equal = book[Trial(size, GPT2, gpt2[0]["lr"], 1, modern[0]["tokens"])]
    print(
        f"\n{size}, {gpt2[0]['parameters'] / 1e6:.1f} M parameters      tokens    lr        validation loss      seconds  ms/step"
    )
    for name, rows in (("GPT-2", gpt2), ("GPT-2", [equal]), ("modern", modern)):
        losses = [row["loss"] for row in rows]
        spread = f"± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        mean_s = statistics.mean(row["cpu_s"] for row in rows)
        print(f"{name:<28}{rows[0]['tokens']:>10,}  {rows[0]['lr']:<8g}  {statistics.mean(losses):.4f} {spread:<12}"
              f"{mean_s:>8.0f}  {1000 * statistics.median(r['step_cpu_s'] for r in rows):>6.0f}")  # fmt: skip
    reached = sum(m["loss"] <= g["loss"] for m, g in zip(modern, gpt2, strict=True))
    share_s = sum(m["cpu_s"] for m in modern) / sum(g["cpu_s"] for g in gpt2)
    print(
        f"modern reached GPT-2's loss with {share:.0%} of its tokens at {reached} of {len(gpt2)} seeds, in {share_s:.0%} of its time"
    )


def taste(book: Book, size: str, budget: int, share: float, lrs: list[float], muon_lr: float) -> None:
    """Every ingredient alone on GPT-2, and the modern recipe without each, at equal tokens and at equal time."""
    tokens = round(budget * share)
    lr = {GPT2: book.best_lr(Trial(size, GPT2, 0.0, 1, tokens), lrs), MODERN: muon_lr}
    base, all_of_it = (book[Trial(size, r, lr[r], 1, tokens)] for r in (GPT2, MODERN))
    more = book[Trial(size, GPT2, lr[GPT2], 1, budget)]
    per_doubling = (base["loss"] - more["loss"]) / math.log2(1 / share)
    print(f"\n{size}, {tokens:,} tokens          loss   gain at equal tokens   ms/step   gain at equal time")
    rows = [("GPT-2", base, base)]
    # Muon's best learning rate is not AdamW's: with it comes the one of the whole recipe, and without it GPT-2's
    for i in (*MODERN, *TRIED):
        trial = Trial(size, (i,), lr[MODERN] if i == "muon" else lr[GPT2], 1, tokens)
        rows.append((name_of((i,)), book[trial], base))
    rows.append(("modern", all_of_it, base))
    for i in MODERN:
        rest = tuple(x for x in MODERN if x != i)
        trial = Trial(size, rest, lr[GPT2] if i == "muon" else lr[MODERN], 1, tokens)
        rows.append((name_of(rest), book[trial], all_of_it))
    for i in TRIED:
        trial = Trial(size, (*MODERN, i), lr[MODERN], 1, tokens)
        rows.append((name_of((*MODERN, i)), book[trial], all_of_it))
    for name, row, against in rows:
        gain = against["loss"] - row["loss"]
        # what the same seconds would have bought: the loss falls by so much with each doubling of GPT-2's tokens
        paid = per_doubling * math.log2(row["step_cpu_s"] / against["step_cpu_s"])
        print(f"{name:<26}{row['loss']:.4f}   {gain:+.4f}   {1000 * row['step_cpu_s']:>8.0f}   {gain - paid:+.4f}")


def plot(book: Book, budgets: dict[str, int], share: float, path: str) -> None:
    """Validation loss against tokens and against seconds, a line for each seed of the comparison."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UserError("--plot: needs matplotlib: pip install matplotlib") from e
    figure = Figure(figsize=(9, 3.6 * len(budgets)), layout="constrained")
    panels = figure.subplots(len(budgets), 2, squeeze=False, sharey="row")
    for row, (size, budget) in zip(panels, budgets.items(), strict=True):
        shown = {(GPT2, budget): "tab:blue", (MODERN, round(budget * share)): "tab:orange"}
        for (recipe, tokens), colour in shown.items():
            same = [r for t, r in book.results.items() if (t.size, t.ingredients, t.tokens) == (size, recipe, tokens)]
            best = min(same, key=lambda r: r["loss"], default={"lr": None})["lr"]
            for panel, column in zip(row, (0, 1), strict=True):
                for i, result in enumerate(r for r in same if r["lr"] == best):
                    points = [(point[column], point[3]) for point in result["curve"]]
                    panel.plot(*zip(*points, strict=True), color=colour, label=None if i else name_of(recipe))
        row[0].set(ylabel="validation loss", title=f"{size}", xlabel="tokens")
        row[1].set(xlabel="CPU seconds", title=f"{size}")
        row[0].legend()
    figure.savefig(path)


class NormedQueriesAndKeys(nn.Module):
    """GPT-2's attention input with QK-norm and nothing else of the modern one; (…, 3C) as before."""

    def __init__(self, qkv: nn.Linear, n_head: int, head_width: int) -> None:
        super().__init__()
        self.linear, self.norm, self.shape = qkv, QKNorm(head_width), (3, n_head, head_width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.linear(x).unflatten(-1, self.shape).unbind(2)  # (B, T, H, D)
        return torch.stack((*self.norm(q, k), v), dim=2).flatten(-3)


class Neither(nn.Module):
    """In the place of QK-norm where positions are rotated without it."""

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k


def build(size: str, ingredients: Iterable[str], *, vocab_size: int, block_size: int) -> GPT:
    """The model of a trial, drawn from torch's global generator; all of PARTS together are arch="modern" itself."""
    n_layer, n_embd = map(int, size.split("x"))
    parts = set(ingredients)
    config = GPTConfig(
        vocab_size=vocab_size, block_size=block_size, n_layer=n_layer, n_head=4, n_embd=n_embd, bias="no_bias" not in parts
    )  # fmt: skip
    modern = dataclasses.replace(config, arch="modern")
    if parts >= set(PARTS):
        model = GPT(modern)
    else:
        model = GPT(config)
        _give(model, parts, modern)
    if "zero_head" in parts:
        nn.init.zeros_(model.head.weight)
    return model


def _give(model: GPT, parts: set[str], modern: GPTConfig) -> None:
    """Put some parts of the modern model into a GPT-2, and draw its weights anew."""
    if not parts & set(PARTS):
        return
    if "rotary" in parts:
        model.wpe = None
    if "rms_norm" in parts:
        model.ln_f = make_norm(modern)
    for block in model.blocks:
        if "rotary" in parts:
            block.attn.qk_norm = QKNorm(modern.head_width) if "qk_norm" in parts else Neither()
        elif "qk_norm" in parts:
            block.attn.qkv = NormedQueriesAndKeys(block.attn.qkv, modern.n_head, modern.head_width)
        if "rms_norm" in parts:
            block.ln_1, block.ln_2 = make_norm(modern), make_norm(modern)
        if "swiglu" in parts:
            block.mlp = GatedMLP(modern)
    model.reset_parameters()


def run(trial: Trial, args: RecipeFlags, tokens: TokenShards, machine: Machine) -> dict[str, Any]:
    """Train once. The loss at the end, and the curve as rows of tokens, CPU seconds, seconds and loss."""
    shards = {split: [tokens.load(s, preload=False) for s in tokens.split(split)] for split in ("train", "val")}
    batches = Batches(shards["train"], block_size=args.block_size, batch=args.batch, seed=trial.seed)
    windows = partial(validation_windows, shards["val"], block_size=args.block_size)
    short, long = windows(tokens=args.eval_tokens // 8), windows(tokens=args.eval_tokens)
    torch.manual_seed(trial.seed)
    model = build(trial.size, trial.ingredients, vocab_size=tokens.vocab_size, block_size=args.block_size)
    model.to(machine.device)
    optimizer = make_optimizer(
        "muon" if "muon" in trial.ingredients else "adamw", model,
        lr=trial.lr, betas=(0.9, 0.95), weight_decay=0.1, device_type=machine.device.type,
    )  # fmt: skip
    scaler, never = machine.grad_scaler(), lambda: False
    validate = partial(validation_loss, model, micro_batch=args.batch, machine=machine, stop=never)
    tokens_per_step = args.batch * args.block_size
    total = trial.tokens // tokens_per_step
    if total < 2:
        raise UserError(f"--tokens: {trial.tokens} are {total} steps of {tokens_per_step}: give more")
    rate = partial(
        learning_rate, total=total, peak=trial.lr, warmup=max(1, total // 20),
        **(WSD if "wsd" in trial.ingredients else COSINE),
    )  # fmt: skip
    forward = torch.compile(model) if machine.compile else model
    curve, steps_s, steps_cpu_s = [], [], []
    for step in range(total):
        ids = to_device(batches.batch_at(step), machine)
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        train_step(
            model, forward, optimizer, scaler, ids,
            micro_batch=args.batch, lr=rate(step), clip=1.0, machine=machine, stop=never,
        )  # fmt: skip
        machine.synchronize()
        if step:  # the first one compiles
            steps_s.append(time.perf_counter() - began_s)
            steps_cpu_s.append(time.process_time() - began_cpu_s)
        if (step + 1) % max(1, total // 8) == 0:
            curve.append([(step + 1) * tokens_per_step, sum(steps_cpu_s), sum(steps_s), validate(short)])
    return {"loss": validate(long), "cpu_s": sum(steps_cpu_s), "s": sum(steps_s), "parameters": model.num_params(),
            "step_cpu_s": statistics.median(steps_cpu_s), "step_s": statistics.median(steps_s), "curve": curve}  # fmt: skip


if __name__ == "__main__":
    flags.run(main)
