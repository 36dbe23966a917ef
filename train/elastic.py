"""Going on somewhere else: what a checkpoint remembers of its machine, and what cannot be the same here, in one line."""

from typing import Any

import torch

from train.precision import Machine


def machine_record(machine: Machine, micro_batch: int, processes: int) -> dict[str, Any]:
    """All that decides how sums are rounded, for state.json."""
    return {
        "name": machine.name,
        "device": machine.device.type,
        "precision": machine.precision,
        "micro_batch": micro_batch,
        "processes": processes,
        "compile": machine.compile,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def moved(then: dict[str, Any], now: dict[str, Any], *, dropout: bool) -> str | None:
    """The line to print where a run goes on elsewhere than `then`; None where it is bit for bit what it would have been.

    Fields that a checkpoint of an older program lacks, or that are not of their kind, count as the same.
    """
    then = {**now, **{k: v for k, v in then.items() if type(v) is type(now.get(k))}}
    keys = [k for k in now if then[k] != now[k] and (k != "threads" or now["device"] == then["device"] == "cpu")]
    if not keys:
        return None
    there, here = (", ".join(_words(m, keys)) for m in (then, now))
    drawn = dropout and (then["device"] != now["device"] or then["precision"] != now["precision"])
    return (f"goes on from {there}, here {here}: the same batches in the same order, results equal to rounding"
            + ("; dropout draws other numbers" if drawn else ""))  # fmt: skip


def _words(machine: dict[str, Any], keys: list[str]) -> list[str]:
    """`a Tesla T4 in fp16`, and of the rest what differs."""
    name = "".join(c for c in machine["name"] if c.isprintable())[:60]
    words = [f"{name} in {machine['precision']}"]
    if "micro_batch" in keys:
        words.append(f"micro-batch {machine['micro_batch']}")
    if "processes" in keys:
        words.append(f"{machine['processes']} process{'es' if machine['processes'] > 1 else ''}")
    if "compile" in keys:
        words.append("compiled" if machine["compile"] else "not compiled")
    if "threads" in keys:
        words.append(f"{machine['threads']} threads")
    if "torch" in keys:
        words.append(f"torch {machine['torch']}")
    return words
