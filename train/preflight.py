"""Before anything is paid for: what a run will take (`--dry-run`), and three real steps of it (`--preflight`).

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
from dataclasses import dataclass
from typing import Any

from cli import flags
from cli.errors import USER_ERRORS, UserError
from cli.progress import count, duration
from gpt.model import GPTConfig
from store import fs
from store.errors import NotFound
from train import checkpoint, checks, estimate, loggers
from train import config as settings
from train.checks import Check
from train.config import AUTO, TrainConfig
from train.data import Data, available_bytes, open_data, same_data
from train.estimate import Memory
from train.exits import FINISHED, USER_ERROR
from train.folder import RunFolder
from train.micro_batch import CPU_TOKENS, largest_divisor
from train.precision import Machine, choose_machine
from train.preempt import SIGNALS
from train.prices import GPUS, Gpu
from train.weights import load_weights

STEPS = 3  # of the rehearsal's first half
MEASURE_S = 10.0  # of training in its second half, for a rate to be trusted
PARTS = {"wte": "token embedding", "wpe": "position embedding", "attn": "attention", "mlp": "MLP", "norm": "norms",
         "head": "head"}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A run before it begins: all that `train/run.py` would decide at its start."""

    config: TrainConfig
    shape: GPTConfig
    machine: Machine
    data: Data
    total: int  # steps
    step: int  # done already
    epoch_tokens: int
    micro_batch: int
    recompute: bool

    @property
    def tokens_left(self) -> int:
        return (self.total - self.step) * self.config.batch * self.config.block_size

    @property
    def memory(self) -> Memory:
        """On this machine."""
        return estimate.memory(
            self.shape, precision=self.machine.precision, micro_batch=self.micro_batch,
            optimizer=self.config.optimizer, recompute=self.recompute,
        )  # fmt: skip

    @property
    def checkpoint_bytes(self) -> int:
        return estimate.checkpoint_bytes(self.shape, self.config.optimizer)

    @property
    def price(self) -> tuple[float, str] | None:
        """What an hour costs, and who says so; None where nobody does."""
        if self.config.price_per_hour is not None:
            return self.config.price_per_hour, "--price-per-hour"
        gpu = _table_row(self.machine)
        return (gpu.price_per_hour, gpu.price_of) if gpu else None


def main(config: TrainConfig, given: frozenset[str]) -> int:
    """Print what the run will take and what stands in its way; with --preflight try it. FINISHED (go) or USER_ERROR."""
    found: list[Check] = []
    plan = _plan(config, given, found)
    if plan:
        describe(plan)
    found += look(plan.config if plan else config, plan)
    print()
    for check in found:
        print(f"{'ok   ' if check.ok else 'NO   '} {check.name:<10} {check.text}")
    obstacles = [f"{c.name}: {c.text}" for c in found if not c.ok]
    if config.preflight and plan and not obstacles:
        print(flush=True)
        try:
            rehearse(plan)
        except USER_ERRORS as e:
            obstacles.append(str(e))
    print()
    for line in obstacles:
        print(f"no go      {line}", flush=True)
    if obstacles:
        return USER_ERROR
    tried = f"{STEPS} steps, a save and a restore went well"
    print(
        "go         " + (tried if config.preflight else "as far as can be seen without a step; --preflight tries three")
    )
    return FINISHED


# ---- what is planned ------------------------------------------------------------------------------------------------


def _plan(config: TrainConfig, given: frozenset[str], found: list[Check]) -> Plan | None:
    """The run as it would begin, read without writing or locking anything. What hinders it goes to `found`."""
    machine = data = base = None
    step, record = 0, None
    try:
        folder = RunFolder(config.out, config.cache_folder)
        if folder.is_a_run(resume=config.resume):
            manifests = checkpoint.committed(config.out)
            if manifests:
                step = manifests[-1].step
                record = checkpoint.load(config.out, manifests[-1], ("state.json",)).state
                config = settings.merge_resumed(record["config"], config, given, imported=bool(record.get("imported")))
            elif folder.stored_config:
                config = settings.merge_begun(folder.stored_config, config, given)
        settings.check_tuning(config)
        settings.check_tuning(config)
        if config.init_from and not record:
            base = load_weights(config.init_from)
            config = settings.begin_with(base.record["config"], config, given)
        settings.check(config)
    except USER_ERRORS as e:
        found.append(Check("settings", str(e), ok=False))
    try:
        machine = choose_machine(config.device, config.precision, config.compile)
    except USER_ERRORS as e:
        found.append(Check("device", str(e), ok=False))
    try:
        data = open_data(config, base.tokenizer if base else None)
        if record:
            same_data(record, data)
        shards = data.tokens.shards
        found.append(Check("data", f"{fs.redact(config.data)}: {len(shards)} shards are there, "
                           f"{count(sum(s.stored_bytes for s in shards))}B"))  # fmt: skip
    except USER_ERRORS as e:
        found.append(Check("data", str(e), ok=False))
    if any(not c.ok for c in found) or not machine or not data:
        return None
    try:
        config = settings.with_recipe(config, machine.device.type)
        shape = settings.model_config(config, data.tokens.vocab_size)
        batches = data.batches(config)
    except USER_ERRORS as e:
        found.append(Check("settings", str(e), ok=False))
        return None
    total = settings.total_steps(config, batches.windows_per_epoch)
    size, recompute = _micro_batch(config, shape, machine)
    epoch_tokens = batches.windows_per_epoch * config.block_size
    return Plan(config, shape, machine, data, total, min(step, total), epoch_tokens, size, recompute)


def _micro_batch(config: TrainConfig, shape: GPTConfig, machine: Machine) -> tuple[int, bool]:
    """Sequences at once as told, else as the estimate allows; and whether activations have to be recomputed for it."""
    how = config.checkpoint_activations
    if config.micro_batch != AUTO:
        return min(config.micro_batch, config.batch), how == "on"
    if machine.device.type != "cuda":
        return largest_divisor(config.batch, CPU_TOKENS // config.block_size), how == "on"
    here = Gpu(machine.name, checks.device_bytes(machine), machine.precision, 1.0, 0.0, "")
    fits = estimate.largest_micro_batch(shape, here, batch=config.batch, optimizer=config.optimizer, recompute=how)
    return fits or (1, how != "off")


def describe(plan: Plan) -> None:
    """What the run is, and what it takes here and on the GPUs of train/prices.py."""
    config, shape, held = plan.config, plan.shape, plan.memory
    table = estimate.count_by_part(shape)
    print(f"model      {config.model}{' (modern)' if shape.modern else ''}: {shape.n_layer} layers, {shape.n_head} heads, "
          f"{shape.n_embd} wide, {sum(table.values()) / 1e6:.1f} M parameters")  # fmt: skip
    print("           " + ", ".join(f"{PARTS[part]} {n / 1e6:.2f} M" for part, n in table.items() if n))
    tokens = plan.tokens_left
    print(f"run        {plan.total - plan.step} steps{f' (of {plan.total})' if plan.step else ''} of {config.batch} x "
          f"{config.block_size} = {count(tokens)} tokens, {tokens / plan.epoch_tokens:.2f} epochs; "
          f"{estimate.run_flops(shape, tokens):.2g} FLOPs")  # fmt: skip
    print(f"memory     {count(held.total)}B at micro-batch {plan.micro_batch} in {plan.machine.precision}: weights {count(held.weights)}B"
          + (f", 16-bit copies {count(held.copies)}B" if held.copies else "") +
          f", gradients {count(held.gradients)}B, moments {count(held.moments)}B, activations {count(held.activations)}B, "
          f"loss {count(held.loss)}B")  # fmt: skip
    print(f"checkpoint {count(plan.checkpoint_bytes)}B")
    if not tokens:
        return
    print()
    casts = [
        estimate.forecast(
            shape,
            gpu,
            recompute=config.checkpoint_activations,
            batch=config.batch,
            tokens=tokens,
            optimizer=config.optimizer,
            price_per_hour=config.price_per_hour,
        )
        for gpu in GPUS
    ]
    print("GPU    memory   format  micro-batch  estimate  tokens/s       time     money  price of")
    for c in casts:
        size = "none fits" if c.micro_batch is None else f"{c.micro_batch}{' recomputed' if c.recompute else ''}"
        told = (f"{count(c.tokens_per_s(tokens)):>8}  {duration(c.seconds):>9}  {c.money:>8.2f}" if c.micro_batch
                else f"{'-':>8}  {'-':>9}  {'-':>8}")  # fmt: skip
        price = (
            "--price-per-hour" if config.price_per_hour is not None else f"{c.gpu.price_per_hour:g}/h: {c.gpu.price_of}"
        )
        print(
            f"{c.gpu.name:<5}  {count(c.gpu.memory):>5}B   {c.gpu.precision}    {size:>11}  {count(c.bytes):>7}B  {told}  {price}"
        )
    print("estimated, at " + ", ".join(f"{g.mfu:.0%}" for g in GPUS) + " of the peak (assumed), without validation, "
          "saves and interruptions")  # fmt: skip


# ---- what can stand in its way --------------------------------------------------------------------------------------


def look(config: TrainConfig, plan: Plan | None) -> list[Check]:
    """Storage, memory, driver and versions, as they are now."""
    found = [checks.out_of(config.out)]
    if plan:
        folder = RunFolder(config.out, config.cache_folder)
        size = plan.checkpoint_bytes
        if fs.is_local(config.out):
            more = max(config.keep + 2 - len(checkpoint.step_names(config.out)), 1)
            found.append(
                checks.room(fs.local_path(config.out), more * size, f"{more} checkpoints")
            )  # best, and in flight
        if folder.two_tiers:
            found.append(checks.cache(config.cache_folder, 3 * size, "checkpoints on their way"))
        if (n_bytes := _cache_bytes(plan)) > 0:
            found.append(checks.cache(config.cache_folder, n_bytes, "unpacked shards (--cache-limit bounds them)"))
        host = available_bytes() - (_raw_bytes(plan.data) if plan.data.staging.preload else 0) - size
        if host < 0:
            found.append(Check("host", f"memory for the data and a copy of the state lacks {count(-host)}B: give "
                               "--loading memmap", ok=False))  # fmt: skip
        found.append(checks.device_memory(plan.machine, plan.memory.total, host))
        found.append(checks.driver(plan.machine))
    if "wandb" in config.log_to:
        key = "has a key" if loggers.wandb_key() else "finds no key (WANDB_API_KEY, ~/.netrc): it would log offline"
        found.append(Check("log", f"wandb {key}"))
    if settings.dies_with_the_machine(config.out):
        found.append(Check("out", f"{config.out} is on this Colab machine and goes when it goes: mount your Drive, or give "
                           "a gs:// URL", ok=False))  # fmt: skip
    return [*found, checks.versions()]


def _raw_bytes(data: Data) -> int:
    return sum(s.tokens for s in data.tokens.shards) * data.tokens.dtype.itemsize


def _cache_bytes(plan: Plan) -> int:
    """What unpacked copies of shards will still take in this machine's cache."""
    staging, tokens = plan.data.staging, plan.data.tokens
    compressed = any(s.name.endswith(".zst") for s in tokens.shards)
    if not (staging.remote or (compressed and not staging.preload)):
        return 0
    missing = sum(s.tokens for s in tokens.shards if not tokens.copy_path(s).exists()) * tokens.dtype.itemsize
    return min(missing, plan.config.cache_limit or missing)


# ---- the rehearsal --------------------------------------------------------------------------------------------------


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


def _table_row(machine: Machine) -> Gpu | None:
    return next((g for g in GPUS if machine.device.type == "cuda" and g.name in machine.name), None)
