"""Train a GPT on a token dataset, and go on after any interruption with the same command.

    python train/run.py --data DIR --resume

Flags -> settings -> fresh or resumed state -> the loop, top to bottom in this file.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import math
import resource
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cli import flags
from cli.errors import UserError
from cli.progress import Meter, count, duration
from gpt import sample
from gpt.model import GPT, GPTConfig, count_params
from gpt.tokenizer import Tokenizer
from store import fs
from store.errors import StoreError
from store.shards import TokenShards, choose_preload
from train import checkpoint
from train import config as settings
from train.batches import Batches, validation_windows
from train.config import TrainConfig
from train.folder import RunFolder
from train.log import TrainLog
from train.optim import load_optimizer_tensors, make_adamw, optimizer_tensors
from train.precision import Machine, choose_machine
from train.preempt import STOPPED, StopSignal
from train.schedule import learning_rate
from train.step import to_device, train_step, validation_loss

DIVERGED = 3  # exit code: the loss or gradient is no longer a number; the last good checkpoint is intact


@dataclass
class Data:
    """A verified dataset in memory or memory-mapped."""

    tokens: TokenShards
    tokenizer: Tokenizer
    train: list[np.ndarray]
    val: list[np.ndarray]


@dataclass
class State:
    """All that changes while training: what a checkpoint holds."""

    model: GPT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0  # optimizer steps done
    elapsed_s: float = 0.0  # of all attempts
    val_loss: float | None = None  # the last one measured


def main(argv: list[str] | None = None) -> int:
    """Train. Returns 0 when finished, 75 when stopped by a signal, 3 when diverged; raises USER_ERRORS."""
    stop = StopSignal()
    config, given = flags.parse(TrainConfig, argv, prog="run.py", description=__doc__.split("\n")[0])
    settings.check(config)
    config = settings.with_places(config)

    folder = RunFolder(config.out, cache_folder(config))
    found = checkpoint.load_newest(config.out, warn) if folder.is_a_run(resume=config.resume) else None
    if found:
        config = settings.merge_resumed(found.state["config"], config, given)
        settings.check(config)
    machine = choose_machine(config.device, config.precision, config.compile)
    config = settings.with_recipe(config, machine.device.type)

    data = open_data(config)
    if found:
        same_data(found.state, data.tokens)
    shape = settings.model_config(config, data.tokens.vocab_size)
    batches = Batches(data.train, block_size=config.block_size, batch=config.batch, seed=config.seed)
    total = settings.total_steps(config, batches.windows_per_epoch)
    config = dataclasses.replace(config, micro_batch=choose_micro_batch(config, shape, machine))

    torch.manual_seed(config.seed)
    state = new_state(config, shape, machine)
    if found:
        restore(state, found)
    folder.open(settings.stored_form(config), data.tokenizer.json_text, step=state.step)
    describe(config, shape, machine, data, folder, state, total)
    if state.step >= total:
        print(f"finished already: step {state.step} of {total}; give a larger --steps, --epochs or --tokens to go on")
        return 0
    try:
        return train(config, state, data, batches, folder, machine, total, stop)
    except torch.OutOfMemoryError as e:
        smaller = max(1, config.micro_batch // 2)
        raise UserError(f"out of GPU memory with --micro-batch {config.micro_batch}: run the same command with "
                        f"--micro-batch {smaller} (the batch stays {config.batch}, so the result does too)") from e  # fmt: skip


def train(
    config: TrainConfig, state: State, data: Data, batches: Batches, folder: RunFolder, machine: Machine,
    total: int, stop: StopSignal,
) -> int:  # fmt: skip
    """The loop: one pass of it is one optimizer step."""
    model, saved_step, saved_s = state.model, state.step, time.monotonic()
    forward = torch.compile(model) if machine.compile else model
    windows = validation_windows(data.val, block_size=config.block_size, tokens=config.eval_tokens)
    log = TrainLog(
        folder, machine,
        total=total, tokens_per_step=config.batch * config.block_size, flops_per_token=model.flops_per_token(),
        steps_per_epoch=batches.windows_per_epoch / config.batch, elapsed_s=state.elapsed_s,
    )  # fmt: skip
    diverged = False

    def save() -> None:
        nonlocal saved_step, saved_s
        state.elapsed_s = log.elapsed_s
        save_state(config, state, data, folder)
        saved_step, saved_s = state.step, time.monotonic()

    for host_ids in batches.ahead(state.step, total):
        if stop():
            break
        ids = to_device(host_ids, machine)  # (batch, block + 1)
        lr = rate(config, state.step, total)
        loss, norm = train_step(
            model, forward, state.optimizer, state.scaler, ids,
            micro_batch=config.micro_batch, lr=lr, clip=config.clip, machine=machine,
        )  # fmt: skip
        state.step += 1
        log.step(state.step, lr, loss, norm)

        last = state.step == total
        new_val = None
        if last or due(state.step, config.eval_every):
            with log.pause():
                new_val = validation_loss(model, windows, micro_batch=config.micro_batch, machine=machine, stop=stop)
                if new_val is not None:
                    state.val_loss = new_val
        save_due = last or due(state.step, config.save_every) or minutes_passed(saved_s, config.save_every_minutes)
        if last or new_val is not None or save_due or due(state.step, config.log_every):
            diverged = not log.finite(state.scaler.is_enabled())
            log.line(val_loss=new_val)
            if new_val is not None:
                log.validation(state.step, new_val)
            if diverged:
                break
        if last or due(state.step, config.sample_every):
            with log.pause():
                show_samples(config, state, data, folder, machine, stop)
        if save_due:
            with log.pause():
                try:
                    save()
                except (
                    StoreError
                ) as e:  # storage may come back; training must not stop for it, only the last save must hold
                    if last:
                        raise
                    warn(f"checkpoint at step {state.step} failed, training goes on: {e}")
                    folder.event("save_failed", step=state.step, error=str(e))
                    saved_s = time.monotonic()

    if diverged:
        folder.event("diverged", step=state.step)
        print(f"error: the loss or gradient is not a number at step {state.step}: the newest checkpoint is step {saved_step}; "
              f"start a new run with a lower --lr than {config.lr:g}", file=sys.stderr)  # fmt: skip
        return DIVERGED
    if stop():
        log.flush()
        if state.step > saved_step:
            save()
        folder.event("stopped", step=state.step, signal=stop.name)
        folder.publish()
        print(
            f"stopped by {stop.name} after step {state.step} of {total}, saved; the same command with --resume goes on"
        )
        return STOPPED
    folder.event("finished", step=state.step)
    folder.publish()
    summarize(config, state, machine, log, total)
    return 0


# ---- beginning ------------------------------------------------------------------------------------------------------


def open_data(config: TrainConfig) -> Data:
    """The dataset, every byte verified, its shards in memory or mapped."""
    if not fs.exists(fs.join(config.data, "metadata.json")) and not config.data.startswith("-"):
        raise UserError(f"{fs.redact(config.data)}: no token dataset there (no metadata.json): make one with "
                        "`python prep/tokenize_bpe.py --input corpus.txt --compress`, and name it with --data")  # fmt: skip
    tokens = TokenShards(config.data, cache=cache_folder(config) / "shards" if config.cache else None)
    tokenizer = Tokenizer(tokens.tokenizer_json())
    if tokenizer.vocab_size != tokens.vocab_size:
        raise UserError(f"{fs.redact(config.data)}: tokenizer.json has {tokenizer.vocab_size} ids, metadata.json says "
                        f"{tokens.vocab_size}: re-run prep")  # fmt: skip
    tokens.check_sizes()
    raw_bytes = sum(s.tokens for s in tokens.shards) * tokens.dtype.itemsize
    preload = choose_preload(config.loading, raw_bytes)
    arrays: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    with Meter("load data", raw_bytes, "B") as meter:
        for shard in tokens.shards:
            arrays[shard.split].append(tokens.load(shard, preload=preload))
            meter.add(shard.tokens * tokens.dtype.itemsize, shard.name)
    return Data(tokens, tokenizer, arrays["train"], arrays["val"])


def same_data(stored: dict[str, Any], tokens: TokenShards) -> None:
    """Refuse to go on with another dataset than the checkpoint's: its order of tokens would mean nothing here."""
    if stored["data"]["vocab_size"] != tokens.vocab_size:
        raise UserError(f"{fs.redact(tokens.url)}: has a vocabulary of {tokens.vocab_size}, the checkpoint one of "
                        f"{stored['data']['vocab_size']}: give the data it was trained on, or another --out")  # fmt: skip
    if stored["data"]["fingerprint"] != tokens.fingerprint:
        raise UserError(f"{fs.redact(tokens.url)}: is not the dataset this run was trained on (metadata.json differs): "
                        "give that one, or another --out")  # fmt: skip


def new_state(config: TrainConfig, shape: GPTConfig, machine: Machine) -> State:
    """Fresh weights, the same on every machine for one seed: they are drawn on the CPU."""
    model = GPT(shape).to(machine.device)
    optimizer = make_adamw(
        model, lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay,
        device_type=machine.device.type,
    )  # fmt: skip
    return State(model, optimizer, machine.grad_scaler())


def choose_micro_batch(config: TrainConfig, shape: GPTConfig, machine: Machine) -> int:
    """Sequences per forward pass: as told, else what an estimate of activation memory allows, at most the batch."""
    if config.micro_batch:
        return min(config.micro_batch, config.batch)
    if machine.device.type == "cuda":
        params = count_params(shape)["tied" if shape.tied else "untied"]
        free = torch.cuda.get_device_properties(machine.device).total_memory * 0.8 - 18 * params
        # Megatron's 34 bytes per token, layer and width (Korthikanti et al. 2022, attention fused), and the head's chunk
        per_token = 34 * shape.n_layer * shape.n_embd + 8 * shape.n_embd
        fits = int(free / (per_token * shape.block_size))
    else:
        fits = 8192 // shape.block_size  # beyond this a CPU only loses cache
    fits = max(1, min(fits, config.batch))
    return next(m for m in range(fits, 0, -1) if config.batch % m == 0)


def rate(config: TrainConfig, step: int, total: int) -> float:
    """The learning rate of a step under these settings."""
    return learning_rate(
        step, total=total, peak=config.lr, warmup=settings.warmup_steps(config, total),
        schedule=config.schedule, floor=config.lr_floor, decay_fraction=config.decay_fraction,
    )  # fmt: skip


def due(step: int, every: int) -> bool:
    """True on every `every`-th step; never for 0."""
    return every > 0 and step % every == 0


def minutes_passed(since_s: float, minutes: float) -> bool:
    """True when that many minutes have gone by; never for 0."""
    return minutes > 0 and time.monotonic() - since_s >= 60 * minutes


def cache_folder(config: TrainConfig) -> Path | None:
    """The cache asked for, or None for this machine's usual one."""
    return Path(config.cache).expanduser() if config.cache else None


def warn(message: str) -> None:
    """One line on stderr."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def save_state(config: TrainConfig, state: State, data: Data, folder: RunFolder) -> None:
    """Commit the state as a checkpoint, mirror the logs before it, and thin out older ones."""
    start_s = time.monotonic()
    folder.publish()
    manifest = checkpoint.save(
        folder.url,
        step=state.step,
        run_id=folder.run_id,
        attempt=folder.attempt,
        val_loss=state.val_loss,
        tensors={
            "model.safetensors": state.model.state_dict(),
            "optimizer.safetensors": optimizer_tensors(state.model, state.optimizer),
            "rng.safetensors": rng_tensors(),
        },
        state={
            "step": state.step,
            "tokens": state.step * config.batch * config.block_size,
            "elapsed_s": state.elapsed_s,
            "val_loss": state.val_loss,
            "scaler": state.scaler.state_dict(),
            "config": settings.stored_form(config),
            "model": asdict(state.model.config),
            "data": {"fingerprint": data.tokens.fingerprint, "vocab_size": data.tokens.vocab_size},
            "torch": torch.__version__,
        },
    )
    checkpoint.retain(folder.url, config.keep)
    n_bytes = sum(p["bytes"] for p in manifest.parts.values())
    folder.event("saved", step=state.step, bytes=n_bytes, seconds=round(time.monotonic() - start_s, 3))
    print(f"saved      {fs.redact(fs.join(folder.url, manifest.name))} ({count(n_bytes)}B)", flush=True)


def restore(state: State, found: checkpoint.Checkpoint) -> None:
    """Put a verified checkpoint into a fresh state of the same shape."""
    state.model.load_state_dict(found.tensors["model.safetensors"])
    load_optimizer_tensors(state.model, state.optimizer, found.tensors["optimizer.safetensors"])
    if state.scaler.is_enabled() and found.state["scaler"]:
        state.scaler.load_state_dict(found.state["scaler"])
    state.step, state.elapsed_s = found.state["step"], found.state["elapsed_s"]
    state.val_loss = found.state["val_loss"]
    rng = found.tensors["rng.safetensors"]
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])


def rng_tensors() -> dict[str, Tensor]:
    """The random state that dropout draws from."""
    return {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


# ---- what a person sees ---------------------------------------------------------------------------------------------


def describe(
    config: TrainConfig, shape: GPTConfig, machine: Machine, data: Data, folder: RunFolder, state: State, total: int
) -> None:
    """The lines before the loop: what is trained on what, where, for how long."""
    mine, other = ("tied", "untied") if shape.tied else ("untied", "tied")
    millions = {name: n / 1e6 for name, n in count_params(shape).items()}
    n_train, n_val = sum(map(len, data.train)), sum(map(len, data.val))
    tokens = total * config.batch * config.block_size
    print(f"model      {config.model}: {shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} wide, "
          f"{millions[mine]:.1f} M parameters ({mine}; {other} {millions[other]:.1f} M)")  # fmt: skip
    print(
        f"data       {fs.redact(config.data)}: {n_train:,} train and {n_val:,} val tokens, vocabulary {shape.vocab_size}"
    )
    print(f"run        {total} steps of {config.batch} x {config.block_size} tokens = {count(tokens)} tokens, "
          f"{tokens / n_train:.2f} epochs; micro-batch {config.micro_batch}; peak lr {config.lr:g}, {config.schedule}")  # fmt: skip
    print(f"machine    {machine.name}, {machine.precision}, torch {torch.__version__}, compile "
          f"{'on' if machine.compile else 'off'}, {torch.get_num_threads()} threads")  # fmt: skip
    begin = f"goes on from step {state.step}" if state.step else "starts"
    print(f"out        {fs.redact(folder.url)}: run {folder.run_id}, attempt {folder.attempt}, {begin}", flush=True)


def show_samples(
    config: TrainConfig, state: State, data: Data, folder: RunFolder, machine: Machine, stop: StopSignal
) -> None:
    """Continue the fixed prompts, as chat where the data is chat; never touches the training's random state."""
    if stop() or not config.prompts:
        return
    chat = data.tokens.metadata.get("counts", {}).get("chat", 0) > 0
    tokenizer = data.tokenizer
    prompts = [
        tokenizer.render([("user", p)], reply=True) if chat else [tokenizer.end_of_text, *tokenizer.encode(p)]
        for p in config.prompts
    ]
    with machine.autocast():
        replies = sample.generate(
            state.model, prompts, max_tokens=48, temperature=0.8, top_k=50, seed=config.seed + state.step,
            stop_ids=(tokenizer.end_of_turn, tokenizer.end_of_text),
        )  # fmt: skip
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
    print(f"next       python scripts/chat.py --run {fs.redact(config.out)}", flush=True)


if __name__ == "__main__":
    flags.run(main)
