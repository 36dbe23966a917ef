"""What a person sees while it trains, and metrics.jsonl: one line per step, every step once."""

import math
import resource
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cli.progress import count, duration
from gpt import sample
from gpt.model import GPTConfig, count_params
from store import fs
from train.config import TrainConfig
from train.data import Data
from train.folder import RunFolder
from train.live import Display, Line
from train.micro_batch import is_out_of_memory
from train.parallel import ALONE, Ranks
from train.precision import Machine, attention_kernel
from train.state import State

QUIET_S = 30.0
TELL_S = 15.0  # between speeds in events.jsonl


class TrainLog:
    """Collects losses on the device and reads them only when a line is due, so that the loop never waits for them."""

    def __init__(
        self, folder: RunFolder, machine: Machine, state: State, *, total: int, tokens_per_step: int,
        steps_per_epoch: float, display: Display, ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        self.display, self.told_s = display, float("-inf")
        self.folder, self.machine, self.total, self.tokens_per_step = folder, machine, total, tokens_per_step
        self.world = ranks.world
        self.guard, self.scaler = state.guard, state.scaler
        self.flops_per_token, self.steps_per_epoch = state.model.flops_per_token(), steps_per_epoch
        self.start_s = time.monotonic() - state.elapsed_s
        self.waiting: list[tuple[int, float, Tensor, Tensor]] = []
        self.line_s, self.paused_s = time.monotonic(), 0.0
        self.tokens_per_s = 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds of all attempts together, up to now."""
        return time.monotonic() - self.start_s

    def step(self, step: int, lr: float, loss: Tensor, norm: Tensor) -> None:
        """Remember what step number `step` (1 = the first) gave."""
        self.waiting.append((step, lr, loss, norm))

    def flush(self) -> list[float]:
        """Read what is waiting, show it to the guard and write it to metrics.jsonl. Returns the losses."""
        rows = [(s, lr, float(loss), float(norm)) for s, lr, loss, norm in self.waiting]
        self.waiting = []
        if not rows:
            return []
        keys = ("step", "lr", "loss", "grad_norm")
        # JSON has no infinity: what overflowed is null
        rows_json = [[x if math.isfinite(x) else None for x in row] for row in rows]
        self.folder.metrics([dict(zip(keys, row, strict=True)) for row in rows_json])
        skipped = self.guard.skipped
        scale = self.scaler.get_scale() if self.scaler.is_enabled() else None
        for warning in self.guard.see([(s, loss, norm) for s, _, loss, norm in rows], scale):
            self.folder.warn(warning)
        if self.guard.skipped > skipped:
            self.folder.event("skipped_steps", step=rows[-1][0], count=self.guard.skipped - skipped)
        return [loss for _, _, loss, _ in rows]

    def is_due(self, step: int, every: int) -> bool:
        """True on every `every`-th step, and when a person has seen nothing for half a minute."""
        return step % every == 0 or time.monotonic() - self.line_s - self.paused_s > QUIET_S

    def line(self, *, val_loss: float | None) -> None:
        """Print the line of the last step and write the metrics up to it."""
        n = len(self.waiting)
        if not n:
            return
        step, lr, loss, norm = self.waiting[-1]
        loss, norm = float(loss), float(norm)  # the device catches up here: read the clock after it
        now_s = time.monotonic()
        self.tokens_per_s = n * self.tokens_per_step / max(now_s - self.line_s - self.paused_s, 1e-9)
        self.line_s, self.paused_s = now_s, 0.0
        losses = self.flush()
        peak = self.machine.peak_flops()
        now = Line(
            step=step, total=self.total, loss=loss, val_loss=val_loss, lr=lr, norm=norm, tokens_per_s=self.tokens_per_s,
            mfu=self.tokens_per_s * self.flops_per_token / (peak * self.world) if peak else None, epoch=step / self.steps_per_epoch,
            elapsed_s=self.elapsed_s, eta_s=(self.total - step) * self.tokens_per_step / self.tokens_per_s,
        )  # fmt: skip
        self.display.show(now, losses)
        if now_s - self.told_s >= TELL_S:
            self.told_s = now_s
            self.folder.event("progress", step=step, tokens_per_s=round(self.tokens_per_s, 1))

    def pause(self, event: str | None = None, **fields: Any) -> "_Pause":
        """`with log.pause():` around what is not training, so that tokens/s tells of training; noted as an `event`."""
        return _Pause(self, event, fields)

    def validation(self, step: int, val_loss: float) -> None:
        """Record a validation loss."""
        self.folder.metrics([{"step": step, "val_loss": val_loss}])


class _Pause:
    def __init__(self, log: TrainLog, event: str | None, fields: dict[str, Any]) -> None:
        self.log, self.event, self.fields = log, event, fields

    def __enter__(self) -> None:
        self.log.machine.synchronize()
        self.start_s = time.monotonic()

    def __exit__(self, *error: Any) -> None:
        seconds = time.monotonic() - self.start_s
        self.log.paused_s += seconds
        if self.event:
            self.log.folder.event(self.event, **self.fields, seconds=round(seconds, 3))


def describe(
    config: TrainConfig, shape: GPTConfig, machine: Machine, data: Data, folder: RunFolder, state: State, total: int,
    ranks: Ranks = ALONE,
) -> None:  # fmt: skip
    """The lines before the loop: what is trained on what, where, for how long."""
    mine, other = ("tied", "untied") if shape.tied else ("untied", "tied")
    millions = {name: n / 1e6 for name, n in count_params(shape).items()}
    n_train, n_val = sum(data.train.lengths), sum(data.val.lengths)
    windows = total * config.batch
    epochs = windows * (1 - config.replay_share) * (config.stride or config.block_size) / n_train
    recomputed = ", activations recomputed (--checkpoint-activations)" if config.checkpoint_activations == "on" else ""
    print(f"model      {config.model}{' (modern)' if shape.modern else ''}: {shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} wide, "
          f"{millions[mine]:.1f} M parameters ({mine}; {other} {millions[other]:.1f} M)")  # fmt: skip
    print(
        f"data       {fs.redact(config.data)}: {n_train:,} train and {n_val:,} val tokens, vocabulary {shape.vocab_size}"
    )
    print(f"run        {total} steps of {config.batch} x {config.block_size} tokens = {count(windows * config.block_size)} tokens, "
          f"{epochs:.2f} epochs; micro-batch {config.micro_batch}{recomputed}; {config.optimizer}, peak lr {config.lr:g}, {config.schedule}")  # fmt: skip
    if config.init_from:
        print(f"tunes      {tuning(config, state)}")
    several = (
        f"{ranks.world} processes{', the state sharded over them' if ranks.sharded else ''}, each on "
        if ranks.world > 1
        else ""
    )
    print(f"machine    {several}{machine.name}, {machine.precision}, torch {torch.__version__}, compile "
          f"{'on' if machine.compile else 'off'}, attention {attention_kernel(shape, machine)}, {torch.get_num_threads()} threads")  # fmt: skip
    begin = f"goes on from step {state.step}" if state.step else "starts"
    print(f"out        {fs.redact(folder.url)}: run {folder.run_id}, attempt {folder.attempt}, {begin}", flush=True)


def tuning(config: TrainConfig, state: State) -> str:
    """What is tuned, how, and on what the loss is."""
    parts = [f"{state.base['checkpoint']} of {config.init_from}", f"loss on {config.loss_on}"]
    if config.lora_rank:
        tuned = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
        parts.append(f"LoRA of rank {config.lora_rank}, alpha {config.lora_alpha:g}: {count(tuned)} parameters")
    if config.replay:
        parts.append(f"{config.replay_share:.0%} of the sequences from {fs.redact(config.replay)}")
    return "; ".join(parts)


def show_samples(
    config: TrainConfig, state: State, data: Data, folder: RunFolder, machine: Machine, stop: Callable[[], bool]
) -> None:
    """Continue the fixed prompts, as chat where the data is chat; never touches the training's random state."""
    if stop() or not config.prompts:
        return
    tokenizer = data.tokenizer
    prompts = [
        tokenizer.render([("user", p)], reply=True) if data.chat else [tokenizer.end_of_text, *tokenizer.encode(p)]
        for p in config.prompts
    ]
    replies = None
    try:
        with machine.autocast():
            replies = sample.generate(
                state.model, prompts, max_tokens=48, temperature=0.8, top_k=50, seed=config.seed + state.step,
                stop_ids=(tokenizer.end_of_turn, tokenizer.end_of_text),
            )  # fmt: skip
    except Exception as e:
        if not is_out_of_memory(e):
            raise
    if replies is None:  # here the error is gone, and with it what it held
        machine.free_cached_memory()
        return folder.warn(f"no memory for the samples of step {state.step}: training goes on without them")
    texts = [tokenizer.decode(r, skip_special=True) for r in replies]
    lines = [f"sample     {p} -> {' '.join(t.split())}" for p, t in zip(config.prompts, texts, strict=True)]
    print("\n".join(lines), flush=True)
    folder.sample(state.step, "\n".join(lines) + "\n")


def summarize(config: TrainConfig, state: State, machine: Machine, log: TrainLog, total: int) -> None:
    """The closing lines."""
    peak = machine.peak_memory_bytes()
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    memory = f"{count(peak)}B GPU, " if peak else ""
    val = (
        f"val loss {state.val_loss:.4f} (perplexity {math.exp(min(state.val_loss, 50)):.1f}), "
        if state.val_loss
        else ""
    )
    print(f"finished   {total} steps, {count(total * log.tokens_per_step)} tokens in {duration(log.elapsed_s)}; {val}"
          f"peak memory {memory}{count(host)}B host")  # fmt: skip
    print(f"next       python scripts/chat.py --run {shlex.quote(fs.redact(config.out))}", flush=True)
