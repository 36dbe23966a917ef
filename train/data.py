"""The dataset a run trains on: opened, verified, in memory or memory-mapped."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cli.errors import UserError
from cli.progress import Meter
from gpt.tokenizer import Tokenizer
from store import fs
from store.shards import Loading, TokenShards
from train.config import DRIVE, TrainConfig, on_colab

LOOK_TOKENS = 1 << 16


@dataclass
class Data:
    """A verified dataset in memory or memory-mapped."""

    tokens: TokenShards
    tokenizer: Tokenizer
    train: list[np.ndarray]
    val: list[np.ndarray]
    chat: bool  # whether it holds conversations: its beginning has turns of a user


def open_data(config: TrainConfig) -> Data:
    """The dataset, every byte verified, its shards in memory or mapped."""
    if not fs.exists(fs.join(config.data, "metadata.json")):
        drive = (
            "mount your Drive first (drive.mount in a cell of its own), or "
            if on_colab() and not DRIVE.is_dir()
            else ""
        )
        raise UserError(f"{fs.redact(config.data)}: no token dataset there (no metadata.json): {drive}make one with "
                        "`python prep/tokenize_bpe.py --input corpus.txt --compress`, and name it with --data")  # fmt: skip
    tokens = TokenShards(config.data, cache=config.cache_folder)
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
    chat = any((a[:LOOK_TOKENS] == tokenizer.role_id("user")).any() for a in arrays["train"][:1])
    return Data(tokens, tokenizer, arrays["train"], arrays["val"], bool(chat))


def same_data(stored: dict[str, Any], tokens: TokenShards) -> None:
    """Refuse to go on with another dataset than the checkpoint's: its order of tokens would mean nothing here."""
    if stored["data"]["vocab_size"] != tokens.vocab_size:
        raise UserError(f"{fs.redact(tokens.url)}: has a vocabulary of {tokens.vocab_size}, the checkpoint one of "
                        f"{stored['data']['vocab_size']}: give the data it was trained on, or another --out")  # fmt: skip
    if stored["data"]["fingerprint"] != tokens.fingerprint:
        raise UserError(f"{fs.redact(tokens.url)}: is not the dataset this run was trained on (its tokens differ): "
                        "give that one, or another --out")  # fmt: skip


def choose_preload(loading: Loading, raw_bytes: int) -> bool:
    """Whether to hold `raw_bytes` in memory: as told, or (auto) when that takes at most a third of what is free."""
    if loading != "auto":
        return loading == "preload"
    return raw_bytes <= max(_available_bytes() // 3, 256 << 20)


def _available_bytes() -> int:
    """Memory that can be had: the kernel's estimate (page cache can be given up), and a container's own limit."""
    limits = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        meminfo = Path("/proc/meminfo").read_text()
        limits.append(int(meminfo.split("MemAvailable:")[1].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(limits) if limits else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
