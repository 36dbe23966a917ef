"""The dataset a run trains on: opened at once, its shards brought into memory or memory-mapped while it trains."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cli.errors import UserError
from gpt.tokenizer import Tokenizer
from store import drive, fs
from store.shards import Loading, Shard, TokenShards, default_cache
from train.batches import Batches, validation_grid
from train.config import TrainConfig, on_colab
from train.staging import StagedShards, Staging

LOOK_TOKENS = 1 << 16


@dataclass
class Data:
    """A dataset, its shards known by their metadata and brought from `begin` on."""

    tokens: TokenShards
    tokenizer: Tokenizer
    staging: Staging
    train: StagedShards
    val: StagedShards
    chat: bool = False  # whether it holds conversations: known from `ready` on
    first: list[Shard] = field(default_factory=list)  # what the first step cannot go without

    def begin(self, config: TrainConfig, batches: Batches, step: int, total: int) -> None:
        """Start to bring the shards that steps `step` … `total` - 1 and validation read, in the order of their reading."""
        grid = validation_grid(self.val.lengths, block_size=config.block_size, tokens=config.eval_tokens)
        val = [self.val.shards[i] for i in dict.fromkeys(shard for shard, _ in grid)] if step < total else []

        def visits(end: int) -> Iterator[Shard]:
            windows = batches.order.shards_between(step * config.batch, end * config.batch)
            return itertools.chain(val, (self.train.shards[i] for i in windows))

        self.first = list(dict.fromkeys(visits(min(step + 1, total))))
        self.staging.begin(visits(total))

    def ready(self, told_to_stop: Callable[[], bool]) -> bool:
        """Wait until the first step can go; False when told to stop before that."""
        there = False
        try:
            there = self.staging.wait(self.first, told_to_stop)
        finally:
            if not there:
                self.staging.close()
        if there and self.first:  # documents are shuffled: the beginning of any shard tells what they are
            begins = self.staging.arrays[self.first[0].name][:LOOK_TOKENS]
            self.chat = bool((begins == self.tokenizer.role_id("user")).any())
        return there


def open_data(config: TrainConfig) -> Data:
    """The dataset, none of its shards there yet: their sizes alone are checked. Every byte is verified before it is used."""
    if not fs.exists(fs.join(config.data, "metadata.json")):
        mount = (
            "mount your Drive first (drive.mount in a cell of its own), or "
            if on_colab() and not drive.mounted(drive.MOUNT / "MyDrive")
            else ""
        )
        raise UserError(f"{fs.redact(config.data)}: no token dataset there (no metadata.json): {mount}make one with "
                        "`python prep/tokenize_bpe.py --input corpus.txt --compress`, and name it with --data")  # fmt: skip
    tokens = TokenShards(config.data, cache=(config.cache_folder or default_cache()) / "shards")
    tokenizer = Tokenizer(tokens.tokenizer_json())
    if tokenizer.vocab_size != tokens.vocab_size:
        raise UserError(f"{fs.redact(config.data)}: tokenizer.json has {tokenizer.vocab_size} ids, metadata.json says "
                        f"{tokens.vocab_size}: re-run prep")  # fmt: skip
    tokens.check_sizes()
    raw_bytes = sum(s.tokens for s in tokens.shards) * tokens.dtype.itemsize
    staging = Staging(tokens, preload=choose_preload(config.loading, raw_bytes), limit=config.cache_limit)
    train, val = (StagedShards(staging, tokens.split(split)) for split in ("train", "val"))
    return Data(tokens, tokenizer, staging, train, val)


def same_data(stored: dict[str, Any], tokens: TokenShards) -> None:
    """Refuse to go on with another dataset than the checkpoint's: its order of tokens would mean nothing here."""
    if stored["data"]["vocab_size"] != tokens.vocab_size:
        raise UserError(f"{fs.redact(tokens.url)}: has a vocabulary of {tokens.vocab_size}, the checkpoint one of "
                        f"{stored['data']['vocab_size']}: give the data it was trained on, or another --out")  # fmt: skip
    if not stored["data"]["fingerprint"]:  # imported weights: any data in their tokenizer's ids will do
        if stored["data"].get("tokenizer_sha256") != tokens.metadata["tokenizer_sha256"]:
            raise UserError(f"{fs.redact(tokens.url)}: was made with another tokenizer than the imported model's: re-run "
                            "prep with --tokenizer RUN/tokenizer.json")  # fmt: skip
    elif stored["data"]["fingerprint"] != tokens.fingerprint:
        raise UserError(f"{fs.redact(tokens.url)}: is not the dataset this run was trained on (its tokens differ): "
                        "give that one, or another --out")  # fmt: skip


def choose_preload(loading: Loading, raw_bytes: int) -> bool:
    """Whether to hold `raw_bytes` in memory: as told, or (auto) when that takes at most a third of what is free."""
    if loading != "auto":
        return loading == "preload"
    return raw_bytes <= max(available_bytes() // 3, 256 << 20)


def available_bytes() -> int:
    """Memory that can be had: the kernel's estimate (page cache can be given up), and a container's own limit."""
    limits = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        meminfo = Path("/proc/meminfo").read_text()
        limits.append(int(meminfo.split("MemAvailable:")[1].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(limits) if limits else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
