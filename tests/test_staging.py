"""Shards come while training runs: in the order of need, from anywhere, after any fault, within the cache's limit."""

import contextlib
import functools
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time

import numpy as np
import pytest

from scripts import bench_restart
from store import drive
from store.errors import DataError, StoreError
from store.shards import ShardWriter, TokenShards, write_metadata
from tests.helpers import error_of, files, result, start, train
from tests.test_fs import small_disk
from train import checkpoint, staging
from train.batches import Batches
from train.config import TrainConfig
from train.data import Data, open_data

BLOCK, BATCH, VOCAB = 32, 8, 512
SMALL = ("--model", "tiny", "--n-embd", 32, "--n-head", 2, "--block-size", BLOCK, "--batch", BATCH, "--device", "cpu",
         "--log-every", 4, "--eval-every", 50, "--eval-tokens", 512, "--sample-every", 0, "--save-every-minutes", 0)  # fmt: skip


def make(folder, tokenizer, train=(), val=(), level=3):
    """A dataset of random ids with the tokenizer of another one."""
    folder.mkdir(parents=True)
    shutil.copy(tokenizer / "tokenizer.json", folder / "tokenizer.json")
    rng, entries = np.random.default_rng(3), []
    for split, sizes in (("train", train), ("val", val)):
        for i, n in enumerate(sizes):
            path = folder / f"{split}-{i:05}.bin{'' if level is None else '.zst'}"
            with ShardWriter(path, n, np.dtype("<u2"), level=level) as w:
                w.write(rng.integers(0, VOCAB, n, dtype=np.uint16))
            entries.append(w.entry(split, 1))
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    write_metadata(str(folder), entries, vocab_size=VOCAB, tokenizer_sha256=digest)
    return folder


@pytest.fixture(scope="module")
def many(data, tmp_path_factory):
    """Eight training shards of 3,000 to 10,000 tokens and two of validation."""
    return make(tmp_path_factory.mktemp("many") / "d", data, [3000 + 1000 * i for i in range(8)], (900, 700))


def upload(gcs, folder):
    """The dataset in the bucket, as gs:// and as plain http."""
    for name, raw in files(folder).items():
        gcs.objects[f"bucket/{name}"] = raw
    return "gs://bucket"


def opened(url, cache, *, first=0, last=10**6, before=lambda: None, **settings) -> tuple[Data, Batches]:
    """A dataset of which the shards are coming that steps `first` … `last` - 1 read; `before` they begin to."""
    config = TrainConfig(data=str(url), cache=str(cache), block_size=BLOCK, batch=BATCH, eval_tokens=512, **settings)
    data = open_data(config)
    batches = Batches(data.train, block_size=BLOCK, batch=BATCH, seed=1, lengths=data.train.lengths)
    before()
    data.begin(config, batches, first, last)
    return data, batches


@contextlib.contextmanager
def staged(*args, **settings):
    """The same, ready for the first step, and ended afterwards."""
    data, batches = opened(*args, **settings)
    try:
        assert data.ready(lambda: False)
        yield data, batches
    finally:
        data.staging.close()


def wait_until(condition, limit_s=60):
    begin_s = time.monotonic()
    while not condition():
        assert time.monotonic() - begin_s < limit_s
        time.sleep(0.01)


def expected(folder):
    """Batches of the arrays as they are."""
    tokens = TokenShards(str(folder))
    return Batches([tokens.load(s, preload=True) for s in tokens.split("train")], block_size=BLOCK, batch=BATCH, seed=1)


@pytest.fixture(scope="module")
def web(many):
    """A web server of that folder that knows no ranges: Python's own."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(many)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


# ---- from anywhere --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loading", ["preload", "memmap"])
@pytest.mark.parametrize("place", ["local", "raw", "gs", "http", "web", "drive"])
def test_every_place_gives_the_same_batches(many, data, gcs, web, tmp_path, monkeypatch, place, loading):
    """Over the end of an epoch, from a step in its middle; then again, from what the cache has, fetching nothing."""
    monkeypatch.setattr(staging, "RANGE_BYTES", 1500)
    url = {"gs": upload(gcs, many), "http": f"{gcs.url}/download/storage/v1/b/bucket/o", "web": web}.get(place, many)
    if place == "raw":
        url = make(tmp_path / "d", data, [3000 + 1000 * i for i in range(8)], (900, 700), level=None)
    if place == "drive":
        monkeypatch.setattr(drive, "MOUNT", many.parent)
    straight = expected(many)
    for _ in range(2):
        gcs.served.clear()
        with staged(url, tmp_path / "cache", first=170, last=220, loading=loading) as (_, batches):
            assert batches.windows_per_epoch // BATCH in range(171, 219)
            for step in range(170, 220):
                np.testing.assert_array_equal(batches.batch_at(step), straight.batch_at(step))
    # one byte tells whether ranges are served; older drivers ask twice
    assert sum(n for name, n in gcs.served.items() if "train" in name) <= 2
    copies = {p.suffix for p in (tmp_path / "cache").rglob("*") if p.is_file()}
    fetched = {"preload": {".part"}, "memmap": {".bin"}}[loading]
    assert copies == {"raw": set(), "local": fetched - {".part"}}.get(place, fetched)


def test_only_what_the_run_reads_is_brought_and_in_the_order_of_need(many, gcs, tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "FETCHERS", 1)
    monkeypatch.setattr(staging, "UNPACKERS", 1)
    with staged(upload(gcs, many), tmp_path / "cache", first=40, last=140) as (data, batches):
        wait_until(lambda: data.staging._staged)
        order = list(dict.fromkeys(batches.order.locate(np.arange(40 * BATCH, 140 * BATCH))[0].tolist()))
    assert 2 < len(order) < 8
    read = list(dict.fromkeys(name for kind, name in gcs.seen if kind == "read" and ".bin" in name))
    assert read == [f"bucket/{s}.bin.zst" for s in ("val-00000", "val-00001", *(f"train-{i:05}" for i in order))]


@pytest.mark.parametrize("loading", ["preload", "memmap"])
def test_the_first_batch_comes_before_the_last_shard(many, gcs, tmp_path, loading):
    gcs.bytes_per_s = 50_000  # 70 kB in all
    with staged(upload(gcs, many), tmp_path / "cache", loading=loading) as (data, batches):
        first = batches.batch_at(0)
        assert data.staging._staged is None
        assert len(data.staging.arrays) < 8
    np.testing.assert_array_equal(first, expected(many).batch_at(0))


def test_several_ranges_of_one_shard_are_fetched_at_once(data, gcs, tmp_path, monkeypatch):
    """One connection gives a part of what the line can: four that wait for each other all come."""
    upload(gcs, make(tmp_path / "d", data, (20_000,)))
    monkeypatch.setattr(staging, "RANGE_BYTES", 1500)
    real, four = staging._fetch, threading.Barrier(4)

    def fetch(url, begin, end):
        if begin < 4 * 1500:
            four.wait(20)
        return real(url, begin, end)

    monkeypatch.setattr(staging, "_fetch", fetch)
    with staged("gs://bucket", tmp_path / "cache"):
        pass


def test_training_from_a_bucket_is_training_from_a_folder(many, gcs, tmp_path, capsys):
    flags = ("--steps", 60, *SMALL, "--cache", tmp_path / "cache", "--cache-limit", "30kB", "--loading", "memmap")
    assert train("--data", many, "--out", tmp_path / "a", *SMALL, "--steps", 60) == 0
    assert train("--data", upload(gcs, many), "--out", tmp_path / "b", *flags) == 0
    assert result(tmp_path / "a") == result(tmp_path / "b")
    events = [json.loads(line) for line in (tmp_path / "b" / "events.jsonl").read_text().splitlines()]
    (told,) = (e for e in events if e["event"] == "staged")
    assert told["bytes"] == sum(len(gcs.objects[n]) for n in gcs.served if ".bin" in n)
    assert told["seconds"] > 0
    assert "load data  " in capsys.readouterr().out


# ---- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["flip", "truncate", "drop", 503])
@pytest.mark.parametrize("loading", ["preload", "memmap"])
def test_downloads_that_arrive_damaged_are_made_again(many, gcs, tmp_path, monkeypatch, fault, loading):
    monkeypatch.setattr(staging, "RANGE_BYTES", 1500)
    upload(gcs, many)
    faults = {"before": lambda: gcs.fail("read", fault, times=2), "last": 90}
    with staged("gs://bucket", tmp_path / "cache", loading=loading, **faults) as (_, batches):
        for step in range(90):
            np.testing.assert_array_equal(batches.batch_at(step), expected(many).batch_at(step))
    assert not gcs.faults["read"]


def large(data, tmp_path):
    """One training shard of 9 MB stored, which takes more than one range."""
    return make(tmp_path / "large", data, (8_000_000,), (700,))


def test_a_killed_download_goes_on(data, gcs, tmp_path):
    """What had arrived is not fetched again, but for the ranges that were on their way; nor by the next start."""
    folder = large(data, tmp_path)
    shard, size = "bucket/train-00000.bin.zst", (folder / "train-00000.bin.zst").stat().st_size
    gcs.bytes_per_s = 6_000_000
    flags = ("--data", upload(gcs, folder), "--steps", 2, *SMALL, "--cache", tmp_path / "cache", "--resume")
    process = start("train/run.py", *flags, "--out", tmp_path / "out")
    (part,) = [tmp_path / "cache" / "shards" / f"{s.sha256[:20]}-{s.name}.part" for s in TokenShards(str(folder)).split("train")]  # fmt: skip
    wait_until(lambda: part.exists() and part.stat().st_size >= staging.RANGE_BYTES)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept, gcs.bytes_per_s = part.stat().st_size, None
    assert staging.RANGE_BYTES <= kept < size
    gcs.served.clear()
    assert train(*flags, "--out", tmp_path / "out") == 0
    assert gcs.served[shard] == size - kept
    assert not [p for p in part.parent.iterdir() if p.suffix == ".tmp"]


@pytest.mark.parametrize("damage", ["flip", "longer", "not ours"])
def test_a_damaged_part_is_dropped(many, gcs, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(staging, "RANGE_BYTES", 1500)
    cache = tmp_path / "cache" / "shards"
    cache.mkdir(parents=True)
    for s in TokenShards(str(many)).split("train"):
        raw = bytearray((many / s.name).read_bytes())
        raw[700] ^= 1
        data = {"flip": bytes(raw[:3000]), "longer": bytes(raw) + b"x", "not ours": b"\0" * 2000}[damage]
        (cache / f"{s.sha256[:20]}-{s.name}.part").write_bytes(data)
    with staged(upload(gcs, many), tmp_path / "cache", loading="memmap", last=90) as (_, batches):
        for step in range(90):
            np.testing.assert_array_equal(batches.batch_at(step), expected(many).batch_at(step))


def spoil(gcs, name):
    raw = bytearray(gcs.objects[name])
    raw[len(raw) // 2] ^= 16
    gcs.objects[name] = bytes(raw)


@pytest.mark.parametrize("where", ["gs", "local"])
def test_a_shard_that_stays_damaged_is_named_after_what_was_learnt_is_saved(many, gcs, tmp_path, where):
    """Training goes on until it needs it; mended, it ends as if nothing had been."""
    flags = ("--steps", 120, *SMALL, "--resume", "--cache", tmp_path / "cache")
    assert train("--data", many, *flags, "--out", tmp_path / "quiet") == 0
    order = Batches([np.empty(s.tokens) for s in TokenShards(str(many)).split("train")], block_size=BLOCK, batch=BATCH,
                    seed=1).order  # fmt: skip
    visits = order.locate(np.arange(120 * BATCH))[0]
    late = visits[-1]
    first_step = int(np.flatnonzero(visits == late)[0]) // BATCH
    assert first_step > 20
    folder, name = tmp_path / "copy", f"train-{late:05}.bin.zst"
    shutil.copytree(many, folder)
    upload(gcs, folder)
    spoil(gcs, f"bucket/{name}")
    (folder / name).write_bytes(gcs.objects[f"bucket/{name}"])
    url = "gs://bucket" if where == "gs" else folder
    message = error_of(train, "--data", url, *flags, "--out", tmp_path / "out", "--cache", tmp_path / "other")
    assert name in message
    assert "damaged" in message
    assert checkpoint.committed(str(tmp_path / "out"))[-1].step == first_step
    shutil.copy(many / name, folder / name)
    gcs.objects[f"bucket/{name}"] = (many / name).read_bytes()
    assert train("--data", url, *flags, "--out", tmp_path / "out", "--cache", tmp_path / "other") == 0
    assert result(tmp_path / "out") == result(tmp_path / "quiet")


def test_what_is_mended_before_it_is_needed_stops_nothing(many, gcs, tmp_path, caplog):
    upload(gcs, many)
    straight = expected(many)
    last = straight.order.locate(np.array([100 * BATCH - 1]))[0][0]
    name = f"bucket/train-{last:05}.bin.zst"
    good = gcs.objects[name]
    spoil(gcs, name)
    with staged("gs://bucket", tmp_path / "cache", last=100) as (data, batches):
        wait_until(lambda: data.staging.failed)
        assert f"train-{last:05}" in caplog.text
        assert "training goes on" in caplog.text
        gcs.objects[name] = good
        for step in range(100):
            np.testing.assert_array_equal(batches.batch_at(step), straight.batch_at(step))


def test_a_missing_shard_is_told_at_once(many, gcs, tmp_path):
    upload(gcs, many)
    del gcs.objects["bucket/train-00003.bin.zst"]
    message = error_of(train, "--data", "gs://bucket", "--out", tmp_path / "out", *SMALL)
    assert "train-00003.bin.zst is missing" in message
    assert not (tmp_path / "out").exists()


def test_a_full_cache_disk_is_one_line(data, gcs, tmp_path):
    cache = small_disk(tmp_path / "cache")
    try:
        url = upload(gcs, make(tmp_path / "d", data, (2_000_000,), (700,)))
        for loading in ("preload", "memmap"):
            message = error_of(train, "--data", url, "--out", tmp_path / "out", *SMALL, "--cache", cache,
                               "--loading", loading)  # fmt: skip
            assert "no space left for shard" in message
            assert "--cache" in message
            assert not (tmp_path / "out").exists()
    finally:
        subprocess.run(["umount", "--lazy", str(cache)], check=True)


def test_a_signal_while_the_first_shard_comes_exits_at_once_with_75(data, gcs, tmp_path):
    gcs.bytes_per_s = 100_000  # two minutes
    flags = ("--data", upload(gcs, large(data, tmp_path)), "--steps", 2, *SMALL, "--cache", tmp_path / "cache")
    process = start("train/run.py", *flags, "--out", tmp_path / "out")
    wait_until(lambda: (tmp_path / "cache" / "shards").exists() and list((tmp_path / "cache" / "shards").glob("*train*.part")))  # fmt: skip
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    begin_s = time.monotonic()
    assert process.wait(60) == 75
    assert time.monotonic() - begin_s < 20  # two, and more on a busy machine: torch and Python take their time to end
    assert not (tmp_path / "out").exists()


def test_a_signal_while_a_later_shard_comes_saves_and_exits_with_75(many, gcs, tmp_path, monkeypatch):
    """The loop waits for a shard that does not come, and hears the signal nevertheless."""
    flags = ("--steps", 120, *SMALL, "--resume", "--cache", tmp_path / "cache")
    assert train("--data", many, *flags, "--out", tmp_path / "quiet") == 0
    upload(gcs, many)
    real, slow = staging._fetch, threading.Event()
    arrived = []

    def fetch(url, begin, end):
        if len(arrived) == 5:
            slow.wait(60)
        arrived.append(url)
        return real(url, begin, end)

    monkeypatch.setattr(staging, "_fetch", fetch)
    monkeypatch.setattr(staging, "FETCHERS", 1)
    threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    flags = ("--data", "gs://bucket", *flags, "--out", tmp_path / "out", "--cache", tmp_path / "other")
    assert train(*flags) == 75
    assert 0 < checkpoint.committed(str(tmp_path / "out"))[-1].step < 120
    slow.set()
    assert train(*flags) == 0
    assert result(tmp_path / "out") == result(tmp_path / "quiet")


# ---- the limit ------------------------------------------------------------------------------------------------------


def on_disk(folder):
    total = 0
    for p in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += p.stat().st_size
    return total


@pytest.mark.parametrize("loading", ["preload", "memmap"])
@pytest.mark.parametrize("limit", [1, 60_000, 90_000])
def test_the_limit_is_kept_but_for_what_is_in_use(many, gcs, tmp_path, loading, limit):
    """Three epochs through a cache that holds none of the shards, or two or three; an earlier dataset's go first."""
    cache = tmp_path / "cache" / "shards"
    cache.mkdir(parents=True)
    other = cache / f"{'0' * 20}-train-00000.bin"
    other.write_bytes(b"x" * 50_000)
    straight, peak = expected(many), 0
    steps = 3 * straight.windows_per_epoch // BATCH
    shards = TokenShards(str(many)).shards
    in_use = max(s.tokens for s in shards) * 2 + 1024 + max(s.stored_bytes for s in shards)
    if loading == "preload":
        in_use = max(s.stored_bytes for s in shards)
    with staged(upload(gcs, many), tmp_path / "cache", last=steps, loading=loading, cache_limit=limit) as (_, batches):
        for step in range(steps):
            np.testing.assert_array_equal(batches.batch_at(step), straight.batch_at(step))
            peak = max(peak, on_disk(cache))
    assert not other.exists()
    fetched = sum(n for name, n in gcs.served.items() if ".bin" in name) / sum(s.stored_bytes for s in shards)
    assert fetched <= (1 if loading == "preload" else {1: 3, 60_000: 2.9, 90_000: 2.2}[limit])
    # two shards at a time where a batch lies in both, and the two of validation at the start
    assert peak <= limit + 2 * in_use


def test_two_share_a_cache(data, gcs, tmp_path):
    """Two that need the same shards at the same time fetch each once; one that removes hurts no other."""
    folder = make(tmp_path / "d", data, [300_000] * 4, (700,))
    upload(gcs, folder)
    gcs.bytes_per_s = 8_000_000
    straight = expected(folder)
    settings = {"last": 4000, "loading": "memmap"}
    with contextlib.ExitStack() as stack:
        pair = [opened("gs://bucket", tmp_path / "cache", **settings) for _ in range(2)]
        for data, _ in pair:
            stack.callback(data.staging.close)
            assert data.ready(lambda: False)
        wait_until(lambda: all(d.staging._staged for d, _ in pair))
        assert {p.name: gcs.served[f"bucket/{p.name}"] for p in folder.glob("train*")} == {
            p.name: p.stat().st_size for p in folder.glob("train*")
        }
        stack.enter_context(staged("gs://bucket", tmp_path / "cache", cache_limit=1, **settings))
        for _, batches in pair:
            for step in range(0, 4000, 100):
                np.testing.assert_array_equal(batches.batch_at(step), straight.batch_at(step))


def test_what_cannot_be_had_says_so(many, gcs, tmp_path):
    """Refused reads are a StoreError of one line, in the thread that asks for the shard."""
    upload(gcs, many)
    data, _ = opened("gs://bucket", tmp_path / "cache", before=lambda: gcs.fail("read", 403, times=1000))
    with pytest.raises(StoreError) as refused:
        data.ready(lambda: False)
    data.staging.close()
    assert not isinstance(refused.value, DataError)
    assert "\n" not in str(refused.value)


def test_a_thread_that_ends_is_told(many, gcs, tmp_path):
    """Here the cache is a file: nobody waits for ever."""
    (tmp_path / "shards").write_bytes(b"")
    url = upload(gcs, many)
    for limit in ((), ("--cache-limit", "1MB")):
        message = error_of(train, "--data", url, "--out", tmp_path / "out", *SMALL, "--cache", tmp_path, *limit)
        assert str(tmp_path / "shards") in message


def test_a_limit_of_nothing_is_refused(many, tmp_path):
    assert error_of(train, "--data", many, "--cache-limit", 0) == "--cache-limit 0: expected 1 or more"


def test_a_restart_is_measured(tmp_path, capsys):
    """The benchmark's small setting: its trainers take their first steps long before the line could bring all data, 10 s."""
    flags = ("--size", "20MB", "--shard-tokens", "2M", "--rate", "2MB", "--scratch", tmp_path)
    assert bench_restart.main([*map(str, flags)]) == 0
    lines = re.findall(
        r"^(new|same) machine +first step after ([\d.]+) s: .*; ([\d.]+) s", capsys.readouterr().out, re.M
    )
    assert [name for name, _, _ in lines] == ["new", "same"]
    assert all(float(data_s) < min(float(total_s), 5) for _, total_s, data_s in lines)
    assert not list(tmp_path.iterdir())
