"""Three real steps of a run, before it is paid for.

The rehearsal is the trainer itself, with the run's own settings, data and storage: it trains three steps in a folder beside
--out, evaluates, samples and saves, is started again, goes on from what it saved, and is measured. Then the folder goes.
"""

import contextlib
import dataclasses
import json
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from cli import flags
from cli.errors import USER_ERRORS, UserError
from cli.progress import count, duration
from store import fs
from store.errors import NotFound
from train import checks, estimate
from train import config as settings
from train.config import TrainConfig
from train.folder import RunFolder
from train.plan import Plan
from train.preempt import SIGNALS

STEPS = 3  # of the first half
MEASURE_S = 10.0  # of training in the second half, for a rate to be trusted


def rehearse(plan: Plan) -> None:
    """Train, evaluate, save and restore in a folder beside --out, and say what was measured. Raises UserError."""
    scratch = f"{plan.config.out.rstrip('/')}-preflight-{secrets.token_hex(3)}"
    print(f"rehearsal  {STEPS} steps, a save and a restore in {fs.redact(scratch)}", flush=True)
    config = _rehearsed(plan, scratch)
    try:
        with _cleaned_up_on_signals():
            _train(config)
            first = _events(scratch)
            more = int(min(max(MEASURE_S / max(_step_s(first, STEPS), 1e-4), STEPS + 1), 1000))
            config = dataclasses.replace(config, steps=STEPS + more)
            _train(config)
            second = [e for e in _events(scratch) if e["attempt"] == 2]
            start = _one(second, "start")
            if start["step"] != STEPS or not start.get("resumed_from"):
                raise UserError(
                    f"restore: the second start began at step {start['step']}, not from the save at {STEPS}"
                )
            report(plan, first, second, more)
    finally:
        _remove(scratch)
        local = RunFolder(scratch, config.cache_folder)
        if local.two_tiers:
            shutil.rmtree(local.local, ignore_errors=True)


def report(plan: Plan, first: list[dict[str, Any]], second: list[dict[str, Any]], more: int) -> None:
    """What was measured, and what it makes of the whole run."""
    config = plan.config
    per_step = config.batch * config.block_size
    step_s = _step_s(second, more)
    rate = per_step / step_s
    saved = [e for e in first if e["event"] == "saved"][-1]
    evaluated, sampled = _one(second, "evaluated")["seconds"], _sum(second, "sampled")
    compiled, began = _sum(first, "compiled"), _one(second, "first_step")["up_s"]
    peak = plan.machine.peak_flops()
    flops = estimate.run_flops(plan.shape, 1)
    print(f"measured   {count(rate)} tok/s, {_seconds(step_s)} a step" + (f", mfu {rate * flops / peak:.1%}" if peak else "")
          + (f"; compiled in {compiled:.0f} s" if compiled > 1 else "") + f"; evaluation {_seconds(evaluated)}"
          + (f", samples {_seconds(sampled)}" if sampled else "")
          + f"; a save {_seconds(saved['seconds'])} ({count(saved['bytes'])}B), the loop held up {_seconds(saved.get('stall_s', 0.0))}"
          f"; restored and training again {began:.1f} s after its start")  # fmt: skip
    steps = plan.total - plan.step
    aside = sum(cost * (steps // every + 1) for cost, every in ((evaluated, config.eval_every), (sampled, config.sample_every)) if every)  # fmt: skip
    training = steps * step_s
    saves = training / (60 * config.save_every_minutes) if config.save_every_minutes else 0.0
    if isinstance(config.save_every, int) and config.save_every:
        saves = max(saves, steps / config.save_every)
    seconds = training + aside + saves * saved.get("stall_s", 0.0) + began
    words = [f"whole run  {steps} steps in {duration(seconds)}, {training / seconds:.0%} of it training"]
    if plan.price:
        price, who = plan.price
        words.append(f"; {price * seconds / 3600:.2f} at {price:g} an hour ({who}), {price / 3600 / rate * 1e6:.4f} per "
                     "million tokens")  # fmt: skip
    else:
        words.append("; give --price-per-hour for what it costs")
    print("".join(words))


def _rehearsed(plan: Plan, scratch: str) -> TrainConfig:
    """The run's settings, of which only length, place and what is shown when are others."""
    config = plan.config
    return dataclasses.replace(
        config, out=scratch, resume=True, steps=STEPS, epochs=None, tokens=None, dry_run=False, preflight=False,
        warmup=settings.warmup_steps(config, plan.total),  # a high learning rate in the first steps proves nothing
        log_every=1000, eval_every=0, sample_every=1000 if config.sample_every else 0, save_every=0,
        save_every_minutes=0.0, stop_after=None, log_to=(), display="lines",
    )  # fmt: skip


def _train(config: TrainConfig) -> None:
    """One real start of the trainer, its words indented. Raises UserError with its error, or with how it ended."""
    command = [sys.executable, str(checks.ROOT / "train" / "run.py"), *flags.render(config)]
    trainer = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    said = ""
    try:
        for line in trainer.stdout:
            if not line.startswith("next "):  # there is nothing to talk to
                print(f"  {line}", end="", flush=True)
            said = line.strip() or said
        code = trainer.wait()
    finally:
        trainer.kill()
        trainer.wait()
    if code == 0:
        return
    if code < 0:
        ended = f"killed by {signal.Signals(-code).name}"
        raise UserError(f"rehearsal: the trainer was {ended}" + (": out of memory?" if code == -signal.SIGKILL else ""))
    raise UserError(f"rehearsal: {said.removeprefix('error: ')} (exit code {code})")


@contextlib.contextmanager
def _cleaned_up_on_signals() -> Iterator[None]:
    """Signals unwind the stack in here, so that the trainer is ended and its folder removed."""

    def unwind(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, unwind) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _events(url: str) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in fs.read_text(fs.join(url, "events.jsonl")).splitlines()]
    except NotFound as e:
        raise UserError(f"rehearsal: nothing of what was written to {fs.redact(url)} can be read there") from e


def _one(events: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(e for e in events if e["event"] == name)


def _sum(events: list[dict[str, Any]], name: str) -> float:
    return sum(e["seconds"] for e in events if e["event"] == name)


def _step_s(events: list[dict[str, Any]], steps: int) -> float:
    """Seconds of a step: from the end of the first one to the beginning of the evaluation after the last one."""
    evaluated = _one(events, "evaluated")
    seconds = evaluated["up_s"] - evaluated["seconds"] - _one(events, "first_step")["up_s"]
    return max(seconds, 1e-6) / (steps - 1)


def _seconds(s: float) -> str:
    return f"{s:.2f} s" if s >= 0.1 else f"{1000 * s:.1f} ms"


def _remove(url: str) -> None:
    """A folder and all below it, on any storage; what cannot be removed is named."""
    try:
        for entry in fs.list_folder(url):
            inner = fs.join(url, entry.name)
            _remove(inner) if entry.size is None else fs.delete(inner)
        if fs.is_local(url):
            with contextlib.suppress(OSError):
                fs.local_path(url).rmdir()
    except USER_ERRORS as e:
        print(f"warning: {shlex.quote(fs.redact(url))} could not be removed: {e}", file=sys.stderr)
