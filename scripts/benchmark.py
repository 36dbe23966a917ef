"""What all benchmarks write beside their figures: the machine, the versions, the date."""

import json
import platform
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

LIBRARIES = ("torch", "numpy", "transformers", "accelerate")


def machine_facts(device: str) -> dict[str, Any]:
    """{"machine", "threads", "versions", "date"} of this process; `device` as in --device."""
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    cores = f"{_processor()}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "machine": f"{torch.cuda.get_device_name()}; {cores}" if on_gpu else cores,
        "threads": torch.get_num_threads(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def settings_of(args: Any) -> dict[str, Any]:
    """What the figures depend on: the flags, but for the names of files."""
    return {name: value for name, value in asdict(args).items() if name not in ("json", "folder", "ids", "role")}


def write_json(path: str, figures: dict[str, Any]) -> None:
    """Write a benchmark's figures where they can be committed."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(figures, indent=1) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
