"""Train a GPT on a token dataset, and go on after any interruption with the same command.

    python train/run.py --data DIR --resume

Flags -> settings -> fresh or resumed state -> the loop, top to bottom in this file.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import time

import torch

from cli import flags
from cli.errors import UserError
from store.errors import StoreError
from train import checkpoint
from train import config as settings
from train.batches import Batches, validation_windows
from train.config import TrainConfig
from train.data import Data, open_data, same_data
from train.folder import RunFolder
from train.log import TrainLog, describe, show_samples, summarize
from train.precision import Machine, choose_machine, choose_micro_batch
from train.preempt import STOPPED, StopSignal
from train.schedule import learning_rate
from train.state import State, checkpoint_fits, new_state, restore, save_state
from train.step import to_device, train_step, validation_loss

DIVERGED = 3  # exit code: the loss or gradient is no longer a number; the last good checkpoint is intact


def main(argv: list[str] | None = None) -> int:
    """Train. Returns 0 when finished, 75 when stopped by a signal, 3 when diverged; raises USER_ERRORS."""
    stop = StopSignal()
    config, given = flags.parse(TrainConfig, argv, prog="run.py", description=__doc__.split("\n")[0])
    settings.check(config)
    config = settings.with_places(config)

    folder = RunFolder(config.out, config.cache_folder)
    if settings.dies_with_the_machine(config.out):
        folder.warn(
            f"--out {config.out} is on this Colab machine and goes when it goes: mount your Drive, or give a gs:// URL"
        )
    found = None
    if folder.is_a_run(resume=config.resume):
        folder.hold()  # before looking: what a living trainer is just deleting would seem damaged
        found = checkpoint.load_newest(config.out, folder.warn)
    if found:
        config = settings.merge_resumed(found.state["config"], config, given)
    elif (
        folder.stored_config
    ):  # begun, and killed before its first checkpoint: nothing binds yet, but flags can be left out
        config = settings.merge_begun(folder.stored_config, config, given)
    settings.check(config)
    machine = choose_machine(config.device, config.precision, config.compile)
    config = settings.with_recipe(config, machine.device.type)

    data = open_data(config)
    if found:
        same_data(found.state, data.tokens)
    shape = settings.model_config(config, data.tokens.vocab_size)
    batches = Batches(data.train, block_size=config.block_size, batch=config.batch, seed=config.seed)
    total = settings.total_steps(config, batches.windows_per_epoch)
    config = dataclasses.replace(
        config,
        micro_batch=choose_micro_batch(config, shape, machine),
        warmup=settings.warmup_steps(config, total),  # kept with the run: a longer one must not warm up again
    )
    if found:
        checkpoint_fits(found, shape)

    torch.manual_seed(config.seed)
    state = new_state(config, shape, machine)
    if found:
        restore(state, found, machine)
        del found  # a second copy of weights and moments is not wanted while training
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
        save_state(config, state, data, folder, machine)
        saved_step, saved_s = state.step, time.monotonic()

    for host_ids in batches.ahead(state.step, total):
        if stop():
            break
        ids = to_device(host_ids, machine)  # (batch, block + 1)
        lr = rate(config, state.step, total)
        loss, norm = train_step(
            model, forward, state.optimizer, state.scaler, ids,
            micro_batch=config.micro_batch, lr=lr, clip=config.clip, machine=machine, stop=stop,
        ) or (None, None)  # fmt: skip
        if loss is None:
            break
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
        if last or new_val is not None or save_due or log.is_due(state.step, config.log_every):
            diverged = not log.finite(state.scaler)
            log.line(val_loss=new_val)
            if new_val is not None:
                log.validation(state.step, new_val)
            if diverged:
                break
        if config.sample_every and (last or due(state.step, config.sample_every)):
            with log.pause():
                show_samples(config, state, data, folder, machine, stop)
        if save_due:
            with log.pause():
                try:
                    save()
                except StoreError as e:
                    if last:
                        raise
                    # storage may come back: only the last save must hold, training does not stop for the others
                    folder.warn(f"checkpoint at step {state.step} failed, training goes on: {e}")
                    folder.event("save_failed", step=state.step, error=str(e))
                    saved_s = time.monotonic()

    stopped = state.step < total and stop()
    if stopped and not log.finite(state.scaler):
        diverged = True
    if diverged:
        folder.event("diverged", step=state.step)
        kept = f"the newest checkpoint is step {saved_step}" if saved_step else "nothing was saved yet"
        print(f"error: the loss or gradient is not a number at step {state.step}; {kept}: "
              f"start a new run with a lower --lr than {config.lr:g}", file=sys.stderr)  # fmt: skip
        return DIVERGED
    if stopped:
        log.flush()
        if state.step > saved_step:
            save()
        folder.event("stopped", step=state.step, signal=stop.name)
        folder.publish()
        print(
            f"stopped by {stop.name} after step {state.step} of {total}; the same command with --resume goes on from there"
        )
        return STOPPED
    folder.event("finished", step=state.step)
    folder.publish()
    summarize(config, state, machine, log, total)
    return 0


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


if __name__ == "__main__":
    flags.run(main, outlives_stdout=True)
