"""What a run will be, as far as that is known before it begins: settings, shape, machine, data, length and memory."""

import dataclasses
from dataclasses import dataclass

from cli.errors import USER_ERRORS
from cli.progress import count, duration
from gpt.model import GPTConfig
from store import fs
from train import checkpoint, checks, estimate
from train import config as settings
from train.checks import Check
from train.config import AUTO, TrainConfig
from train.data import Data, open_data, same_data
from train.estimate import Memory
from train.folder import RunFolder
from train.micro_batch import CPU_TOKENS, largest_divisor
from train.precision import Machine, choose_machine
from train.prices import GPUS, Gpu
from train.weights import load_weights

PARTS = {"wte": "token embedding", "wpe": "position embedding", "attn": "attention", "mlp": "MLP", "norm": "norms",
         "head": "head"}  # fmt: skip
VOCAB_SIZE = 32000  # of a plan without data: what prep/tokenize_bpe.py makes unless told otherwise
TOKENS_A_PARAMETER = 20  # its length unless told: what a compute-optimal run takes (Hoffmann et al., arXiv:2203.15556)


@dataclass(frozen=True)
class Plan:
    """A run before it begins: all that `train/run.py` would decide at its start."""

    config: TrainConfig
    shape: GPTConfig
    machine: Machine
    data: Data | None  # None: it cannot be read, or is not made yet
    total: int  # steps
    step: int  # done already
    extent: str  # the epochs that this is; without data what was assumed in their place
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


def make_plan(config: TrainConfig, given: frozenset[str], found: list[Check]) -> Plan | None:
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
    if any(not c.ok and c.name != "data" for c in found) or not machine or (record and not data):
        return None
    try:
        config = settings.with_recipe(config, machine.device.type)
        shape = settings.model_config(config, data.tokens.vocab_size if data else VOCAB_SIZE)
        windows = data.batches(config).windows_per_epoch if data else None
    except USER_ERRORS as e:
        found.append(Check("settings", str(e), ok=False))
        return None
    assumed = f"{shape.vocab_size:,} ids"
    if not windows and config.steps is None and config.tokens is None:
        config = dataclasses.replace(config, tokens=TOKENS_A_PARAMETER * sum(estimate.count_by_part(shape).values()))
        assumed += f", {TOKENS_A_PARAMETER} tokens a parameter"
    total = settings.total_steps(config, windows or 0)
    left = total - min(step, total)
    extent = f"{left * config.batch / windows:.2f} epochs" if windows else f"assumed: {assumed}"
    size, recompute = _micro_batch(config, shape, machine)
    return Plan(config, shape, machine, data, total, min(step, total), extent, size, recompute)


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
          f"{config.block_size} = {count(tokens)} tokens, {plan.extent}; "
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


def _table_row(machine: Machine) -> Gpu | None:
    return next((g for g in GPUS if machine.device.type == "cuda" and g.name in machine.name), None)
