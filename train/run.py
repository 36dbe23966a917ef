"""Train a GPT on a token dataset, and go on after any interruption with the same command.

    python train/run.py --data DIR --resume

Flags -> settings -> fresh or resumed state -> the loop, top to bottom in this file.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from train.preempt import leave_at_once

    leave_at_once()  # before torch is imported: that takes seconds, and a signal can come in them

import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from cli import flags
from cli.errors import UserError
from store.errors import StoreError
from store.lease import Fenced
from train import checkpoint, clock, gce, loggers, parallel, preflight
from train import config as settings
from train.batches import Batches, validation_windows
from train.compile_cache import CompileCache
from train.config import TrainConfig
from train.data import Data, open_data, same_data
from train.diagnosis import diagnose
from train.elastic import machine_record, moved
from train.exits import DIVERGED, FENCED, FINISHED, LOST, MEANINGS, STOPPED, UNSAVED
from train.folder import BystandingFolder, RunFolder
from train.live import Display
from train.log import TrainLog, describe, show_samples, summarize
from train.micro_batch import MicroBatch, is_out_of_memory
from train.parallel import Ranks
from train.precision import Machine, choose_machine, keep_freed_memory
from train.preempt import StopSignal
from train.saver import BystandingSaver, Saver, Unsaved
from train.schedule import learning_rate
from train.state import State, checkpoint_fits, new_state, restore, state_record, state_tensors
from train.step import to_device, train_step, validation_loss
from train.targets import make_targets
from train.weights import load_weights


def main(argv: list[str] | None = None) -> int:
    """Train. Returns one of train/exits.py; raises USER_ERRORS."""
    config, given = flags.parse(
        TrainConfig, argv, prog="run.py", description=__doc__.split("\n")[0], epilog=f"exit codes: {MEANINGS}"
    )
    settings.check(config)
    config = settings.with_places(config)
    if config.dry_run or config.preflight:
        if parallel.several():
            raise UserError("--dry-run and --preflight look at one process: leave torchrun out")
        return preflight.main(config, given)
    stop = StopSignal(grace_s=config.grace_seconds, stop_after_s=config.stop_after)
    folder: RunFolder | BystandingFolder = BystandingFolder(config.out)
    try:
        ranks = parallel.join(config.device)
        stop.alone, stop.silent = ranks.world == 1, not ranks.first
        if ranks.first:
            folder = RunFolder(config.out, config.cache_folder)
        gce.watch(stop.ask)
        return start(config, given, folder, ranks, stop)
    except BaseException as e:  # a library that is interrupted may raise another exception in the place of ours
        if not stop.interrupted:
            if parallel.is_lost(e):
                print("another process of this run has died or is silent; the same command with --resume goes on")
                return LOST
            if is_out_of_memory(e):  # not in a step: those are tried again with less
                raise UserError(
                    "out of memory before the first step: give a smaller --model, or a device with more"
                    if stop.nothing_to_save
                    else "out of memory between two steps: the same command with --resume and a smaller --micro-batch goes on"
                ) from e
            raise
        stop.record("stopped", signal=stop.name)
        print(f"stopped by {stop.name} with nothing new to save; the same command with --resume goes on")
        return STOPPED
    finally:
        stop.nothing_to_save = False  # what is left to do is not interrupted any more
        folder.release()


def start(
    config: TrainConfig, given: frozenset[str], folder: RunFolder | BystandingFolder, ranks: Ranks, stop: StopSignal
) -> int:
    """All before the loop: a fresh or resumed state from flags, checkpoints and data."""
    if settings.dies_with_the_machine(config.out):
        folder.warn(
            f"--out {config.out} is on this Colab machine and goes when it goes: mount your Drive, or give a gs:// URL"
        )
    found = newest_checkpoint(folder, ranks, resume=config.resume)
    if found:
        config = settings.merge_resumed(
            found.state["config"], config, given, imported=bool(found.state.get("imported"))
        )
    elif (
        folder.stored_config
    ):  # begun, and killed before its first checkpoint: nothing binds yet, but flags can be left out
        config = settings.merge_begun(folder.stored_config, config, given)
    settings.check_tuning(config)
    base = load_weights(config.init_from) if config.init_from and not found else None
    if base:
        config = settings.begin_with(base.record["config"], config, given)
    settings.check(config)
    machine = choose_machine(ranks.device(config.device), config.precision, config.compile)
    keep_freed_memory(machine)
    config = settings.with_recipe(config, machine.device.type)

    began_s = time.monotonic()
    data = open_data(config, base.tokenizer if base else None, copies=ranks.local_world)
    data_s = time.monotonic() - began_s
    if found:
        same_data(found.state, data)
    shape = settings.model_config(config, data.tokens.vocab_size)
    batches = data.batches(config)
    ranks.rows(config.batch)  # which refuses a batch that cannot be shared out
    total = settings.total_steps(config, batches.windows_per_epoch)
    config = dataclasses.replace(
        config,
        warmup=settings.warmup_steps(config, total),  # kept with the run: a longer one must not warm up again
    )
    if found and ranks.first:
        checkpoint_fits(found, shape)
    data.begin(config, batches, found.state["step"] if found else 0, total)  # shards come while the model is made

    torch.manual_seed(config.seed)
    state = new_state(config, shape, machine, base, ranks)
    del base  # as with `found` below
    if found:
        restore(state, found, machine, ranks)
    micro = MicroBatch(config, state, machine, folder, ranks)
    config = dataclasses.replace(
        config, micro_batch=micro.size, checkpoint_activations="on" if state.model.recompute else "off"
    )
    if found:
        here = machine_record(machine, micro.size, ranks.world)
        if line := moved(found.state.get("machine", {}), here, dropout=config.dropout > 0):
            print(f"machine    {line}")
    began_s = time.monotonic()
    if ranks.any(not data.ready(stop)):
        who = stop.name or "another process of this run"
        print(f"stopped by {who} with nothing new to save; the same command with --resume goes on")
        return STOPPED
    data_s += time.monotonic() - began_s
    if config.loss_on == "assistant" and data.first and not data.chat:
        raise UserError(f"--loss-on assistant: {config.data} holds no conversations: leave the flag out")
    folder.open(
        settings.stored_form(config), data.tokenizer.json_text,
        step=state.step, val_due=state.val_due, machine=machine.name, model=config.model, data_s=round(data_s, 3),
        resumed_from=found.manifest.name if found else None,
    )  # fmt: skip
    folder.run_id = ranks.tell(folder.run_id)
    stop.record = folder.event
    if ranks.first:
        loggers.attach(config, folder, state.step)
    saver = Saver(config, folder, machine, step=state.step) if ranks.first else BystandingSaver()
    saver.guard(state.optimizer)
    if found:
        saver.resumed(found.manifest, found.place)
        del found  # a second copy of weights and moments is not wanted while training
    describe(config, shape, machine, data, folder, state, total, ranks)
    data.staging.report(folder.event)
    try:
        if state.step >= total and not state.val_due:
            folder.event("finished", step=state.step)
            saver.finish()
            print(
                f"finished already: step {state.step} of {total}; give a larger --steps, --epochs or --tokens to go on"
            )
            return FINISHED
        code = train(config, state, micro, data, batches, folder, saver, machine, ranks, total, stop)
        if code != FINISHED:
            ranks.any(False)  # the launcher ends all as soon as one has failed: not before rank 0 has saved
        return code
    except (Unsaved, Fenced) as e:
        folder.event("fenced" if isinstance(e, Fenced) else "unsaved", step=state.step)
        print(f"error: {e}", file=sys.stderr)
        return FENCED if isinstance(e, Fenced) else UNSAVED
    except Exception as e:
        if not parallel.is_lost(e):
            raise
        saver.wait(stop.seconds_left())  # what is being written is worth its seconds
        folder.event("lost", step=state.step)
        raise
    finally:
        data.close()


def newest_checkpoint(
    folder: RunFolder | BystandingFolder, ranks: Ranks, *, resume: bool
) -> checkpoint.Checkpoint | None:
    """What the run goes on from, on every rank; its tensors are rank 0's alone. None where it begins."""
    found = None
    if ranks.first and folder.is_a_run(resume=resume):
        folder.hold()  # before looking: what a living trainer is just deleting would seem damaged
        found = checkpoint.load_newest(
            folder.places(), folder.warn, also=folder.saved_last(), promised=folder.promised()
        )
    folder.stored_config = ranks.tell(folder.stored_config)
    told = ranks.tell((dataclasses.asdict(found.manifest), found.state) if found else None)
    return found or (checkpoint.Checkpoint(checkpoint.Manifest(**told[0]), folder.url, {}, told[1]) if told else None)


def train(
    config: TrainConfig, state: State, micro: MicroBatch, data: Data, batches: Batches, folder: RunFolder, saver: Saver,
    machine: Machine, ranks: Ranks, total: int, stop: StopSignal,
) -> int:  # fmt: skip
    """The loop: one pass of it is one optimizer step."""
    model = state.model
    cache = CompileCache(config, model.config, machine, folder) if machine.compile else None
    found_compiled = cache.restore() if cache else "off"
    # dynamic=False: a smaller last micro-batch gets a graph of its own, not one for all sizes that is slower for each
    compiled = torch.compile(model, dynamic=False) if machine.compile and not ranks.sharded else model
    forward = ranks.averaging(compiled, machine)
    windows = validation_windows(
        data.val, block_size=config.block_size, tokens=config.eval_tokens, lengths=data.val.lengths
    )
    log = TrainLog(
        folder, machine, state,
        total=total, tokens_per_step=config.batch * config.block_size,
        steps_per_epoch=batches.windows_per_epoch / config.batch, display=Display(config, folder), ranks=ranks,
    )  # fmt: skip

    choose = make_targets(config.loss_on, data.tokenizer)
    missing: StoreError | UserError | None = None

    def feed() -> Iterator[np.ndarray | None]:
        """Batches, then None: at the end, or where a shard cannot be had. What was learnt is saved before that is told."""
        nonlocal missing
        try:
            yield from batches.ahead(state.step, total, told_to_stop=stop)
        except StoreError as e:
            missing = e
        yield None

    def save(*, last: bool = False) -> None:
        state.elapsed_s = log.elapsed_s
        here = machine_record(machine, micro.size, ranks.world)
        saver.begin(state.step, state_tensors(state, machine), state_record(config, state, data, here), last=last)

    def validate() -> float | None:
        with log.pause("evaluated", step=state.step):
            loss = stop.unless_stopped(
                lambda: micro.run(
                    validation_loss, model, windows, machine=machine, stop=stop, choose=choose, ranks=ranks
                )
            )
        state.val_due = loss is None and (ranks.any(stop()) or micro.fault is not None)
        if loss is not None and not math.isfinite(loss):
            folder.warn(f"the validation loss at step {state.step} is not a number")
            loss = None
        state.val_loss = loss if loss is not None else state.val_loss
        return loss

    if state.val_due and (val_loss := validate()) is not None:
        log.validation(state.step, val_loss)
    for host_ids in feed():
        if ranks.leaving(stop, host_ids is None):
            break
        saver.check()
        folder.lease.renew(step=state.step)
        ids = to_device(host_ids, machine)  # (batch, block + 1)
        targets = choose(ids, batches.replayed(state.step))  # (batch, block), -100 for what is not to be learnt
        if config.dropout:
            ranks.seed(config.seed, state.step)
        lr, begin_s = rate(config, state.step, total), time.monotonic()
        loss, norm = micro.run(
            train_step, model, forward, state.optimizer, state.scaler, ids,
            lr=lr, clip=config.clip, machine=machine, stop=stop, targets=targets, ranks=ranks,
        ) or (None, None)  # fmt: skip
        if loss is None:
            break
        if stop.nothing_to_save:  # the first step, compilation included
            stop.nothing_to_save = False
            machine.synchronize()
            if cache:
                folder.event("compiled", seconds=round(time.monotonic() - begin_s, 3), cache=found_compiled)
                if ranks.first:
                    cache.keep()
            folder.event("first_step", seconds=round(clock.up_s(), 3))
        state.step += 1
        log.step(state.step, lr, loss, norm)

        last = state.step == total
        new_val = None
        if last or due(state.step, config.eval_every):
            new_val = validate()
        save_due = ranks.tell(not last and saver.due(state.step))
        line_due = ranks.tell(log.is_due(state.step, config.log_every))
        if last or new_val is not None or save_due or line_due:
            log.line(val_loss=new_val)
            if new_val is not None:
                log.validation(state.step, new_val)
            if state.guard.fault:
                break
        if save_due and state.guard.in_a_row:
            saver.put_off()  # this may be the first of many: the good checkpoints are not to be crowded out by its like
        elif save_due:
            with log.pause():
                save()
        stop.reserve_s = saver.takes_s()
        if config.sample_every and not ranks.sharded and (last or due(state.step, config.sample_every)):
            with log.pause("sampled", step=state.step):
                stop.unless_stopped(lambda: show_samples(config, state, data, folder, machine, stop))

    log.flush()
    if not ranks.sharded:
        state.guard.look_at(state.model)
    if state.guard.fault:
        saver.wait()
        folder.event("diverged", step=state.step)
        folder.tell(f"error: {state.guard.fault}; the newest checkpoint is {saver.newest()}")
        if ranks.first and not ranks.sharded:
            for line in diagnose(state, ids, targets, micro_batch=micro.size, machine=machine):
                folder.tell(f"  {line}")
        folder.tell(f"  start a new run with a lower --lr than {config.lr:g}")
        return DIVERGED
    missing = missing or micro.fault
    failed, told_to_stop = ranks.any(missing is not None), ranks.any(stop())
    if failed and not told_to_stop:
        saver.wait()
        if ranks.tell(state.step > saver.begun_step):
            save(last=True)
        saver.finish()
        ranks.any(False)  # the launcher ends all as soon as one has failed: not before rank 0 has saved
        raise missing or StoreError("another process of this run could not go on: it says why")
    if state.step < total or state.val_due:
        return leave(stop, saver, save, folder, ranks, state.step, total)
    saver.wait()
    save(last=True)
    saver.wait()
    if not saver.error:
        folder.event("finished", step=state.step)
    saver.finish()
    if cache:
        cache.wait(30.0)
    summarize(config, state, machine, log, total)
    return FINISHED


def leave(
    stop: StopSignal, saver: Saver, save: Callable[..., None], folder: RunFolder, ranks: Ranks, step: int, total: int
) -> int:  # fmt: skip
    """Told to stop: the state is committed if the grace lasts, first on this machine, then where the run lives."""
    if ranks.tell(step > saver.begun_step or saver.error is not None):
        end_s, pause_s = time.monotonic() + stop.seconds_left(), 1.0
        while ranks.tell(saver.wait(stop.seconds_left() - saver.write_s) and stop.seconds_left() >= saver.write_s):
            save(last=True)
            saver.wait(stop.seconds_left())
            if not ranks.tell(saver.failed and time.monotonic() + pause_s + saver.write_s < end_s):
                break
            time.sleep(pause_s)
            pause_s *= 2
        else:
            folder.warn(f"no time left to save step {step}: {saver.newest()} is what is saved")
    elif not saver.wait(stop.seconds_left()):
        folder.warn(f"no time left: {saver.newest()} is what is saved")
    folder.event("stopped", step=step, signal=stop.name)
    try:
        saver.finish(stop.seconds_left())
    except Unsaved as e:
        folder.warn(str(e))
    print(f"stopped by {stop.name} after step {step} of {total}; the same command with --resume goes on from there")
    return STOPPED


def rate(config: TrainConfig, step: int, total: int) -> float:
    """The learning rate of a step under these settings."""
    return learning_rate(
        step, total=total, peak=config.lr, warmup=settings.warmup_steps(config, total),
        schedule=config.schedule, floor=config.lr_floor, decay_fraction=config.decay_fraction,
    )  # fmt: skip


def due(step: int, every: int) -> bool:
    """True on every `every`-th step; never for 0."""
    return every > 0 and step % every == 0


if __name__ == "__main__":
    flags.run(main, outlives_stdout=True, at_once=True, unreachable=UNSAVED)
