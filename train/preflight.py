"""Before anything is paid for: what a run will take (`--dry-run`), and three real steps of it (`--preflight`)."""

from cli.errors import USER_ERRORS
from cli.progress import count
from store import fs, retry
from train import checkpoint, checks, loggers, rehearsal
from train import config as settings
from train.checks import Check
from train.config import TrainConfig
from train.data import available_bytes
from train.exits import FINISHED, USER_ERROR
from train.folder import RunFolder
from train.plan import Plan, describe, make_plan


def main(config: TrainConfig, given: frozenset[str]) -> int:
    """Print what the run will take and what stands in its way; with --preflight try it. FINISHED (go) or USER_ERROR."""
    found: list[Check] = []
    far = [fs.redact(url) for url in (config.data, config.out) if not fs.is_local(url)]
    if far:
        print(f"looking    at {' and '.join(far)}", flush=True)
    with retry.patience(checks.PATIENCE_S):
        plan = make_plan(config, given, found)
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
            rehearsal.rehearse(plan)
        except USER_ERRORS as e:
            obstacles.append(str(e))
    print()
    for line in obstacles:
        print(f"no go      {line}", flush=True)
    if obstacles:
        return USER_ERROR
    tried = f"{rehearsal.STEPS} steps, a save and a restore went well"
    print(
        "go         " + (tried if config.preflight else "as far as can be seen without a step; --preflight tries three")
    )
    return FINISHED


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
        host = available_bytes() - _preloaded_bytes(plan) - size
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


def _preloaded_bytes(plan: Plan) -> int:
    """What the data will take of this machine's memory."""
    if not plan.data or not plan.data.staging.preload:
        return 0
    tokens = plan.data.tokens
    return sum(s.tokens for s in tokens.shards) * tokens.dtype.itemsize


def _cache_bytes(plan: Plan) -> int:
    """What unpacked copies of shards will still take in this machine's cache."""
    if not plan.data:
        return 0
    staging, tokens = plan.data.staging, plan.data.tokens
    compressed = any(s.name.endswith(".zst") for s in tokens.shards)
    if not (staging.remote or (compressed and not staging.preload)):
        return 0
    missing = sum(s.tokens for s in tokens.shards if not tokens.copy_path(s).exists()) * tokens.dtype.itemsize
    return min(missing, plan.config.cache_limit or missing)
