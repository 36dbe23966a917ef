"""Token shards: readable by others, equal whichever way they are read, and never read when damaged."""

import hashlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from store import fs, shards
from store.errors import DataError, StoreError
from store.shards import HEADER_BYTES, ShardWriter, TokenShards, dtype_for, read_header, write_metadata

ROOT = Path(__file__).parent.parent
TOKENIZER = b'{"model": "stand-in: shards know only its hash"}'
WIDTHS = pytest.mark.parametrize("vocab", [50_257, 100_277])
LEVELS = pytest.mark.parametrize("level", [None, 10], ids=["raw", "zst"])


@pytest.fixture(autouse=True)
def _small_frames(monkeypatch, tmp_path):
    monkeypatch.setattr(shards, "FRAME_BYTES", 1 << 12)  # many frames for few bytes
    monkeypatch.setenv("PERENNIAL_CACHE", str(tmp_path / "default-cache"))


def ids_of(n: int, vocab: int, seed: int = 0) -> np.ndarray:
    """Repetitive ids, with both ends of the range among them."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab, n) * (rng.random(n) < 0.3)
    ids[: min(n, 2)] = [vocab - 1, 0][:n]
    return ids


def write_shard(path: Path, ids: np.ndarray, vocab: int, level: int | None, split: str = "train") -> shards.Shard:
    with ShardWriter(path, len(ids), dtype_for(vocab), level=level) as writer:
        for part in np.array_split(ids, 7):
            writer.write(part)
    return writer.entry(split, documents=3)


def make(folder: Path, *, vocab: int = 50_257, level: int | None = 3, sizes: tuple[int, ...] = (9_000, 9_000, 500)):
    """A dataset of train shards and, last, one val shard: (its URL, the ids of each)."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = [ids_of(n, vocab, seed=i) for i, n in enumerate(sizes)]
    names = [f"train-{i:05d}" for i in range(len(sizes) - 1)] + ["val-00000"]
    suffix = ".bin" if level is None else ".bin.zst"
    entries = [write_shard(folder / f"{name}{suffix}", ids, vocab, level, name.split("-")[0])
               for name, ids in zip(names, arrays, strict=True)]  # fmt: skip
    (folder / "tokenizer.json").write_bytes(TOKENIZER)
    write_metadata(str(folder), entries, vocab_size=vocab, tokenizer_sha256=hashlib.sha256(TOKENIZER).hexdigest())
    return str(folder), arrays


def rewrite(url: str, **changes: object) -> None:
    """Change metadata.json; `shard__name` changes a field of the first shard."""
    path = Path(url) / "metadata.json"
    data = json.loads(path.read_text())
    for key, value in changes.items():
        target = data["shards"][0] if key.startswith("shard__") else data
        target[key.removeprefix("shard__")] = value
    path.write_text(json.dumps(data))


# ---- the format -----------------------------------------------------------------------------------------------------


@WIDTHS
@LEVELS
def test_others_read_our_shards(tmp_path, vocab, level):
    """Ten lines that know only llm.c's header read every shard, after plain zstd decompression if it is compressed."""
    url, arrays = make(tmp_path / "d", vocab=vocab, level=level)
    for path, ids in zip(sorted(Path(url).glob("*.bin*")), arrays, strict=True):
        stored = path.read_bytes()
        if level is not None:
            stored = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(stored), read_across_frames=True).read()
        header = np.frombuffer(stored[:1024], np.int32)
        magic, version, n = header[:3]
        assert (magic, version) in ((20240520, 1), (20240801, 7))
        tokens = np.frombuffer(stored[1024:], np.uint16 if version == 1 else np.uint32)
        assert len(header) == 256
        assert len(tokens) == n
        assert not header[3:].any()
        np.testing.assert_array_equal(tokens, ids)


@pytest.mark.skipif(not shutil.which("zstd"), reason="no zstd command here")
def test_the_zstd_command_gives_back_the_raw_shard(tmp_path):
    raw, _ = make(tmp_path / "raw", level=None)
    compressed, _ = make(tmp_path / "zst", level=10)
    for path in Path(raw).glob("*.bin"):
        unpacked = subprocess.run(["zstd", "-dc", f"{compressed}/{path.name}.zst"], capture_output=True, check=True)
        assert unpacked.stdout == path.read_bytes()


def test_width_comes_from_the_header():
    """uint16 up to 65,536 ids, uint32 above; any other header is refused."""
    assert dtype_for(65_536) == np.dtype("<u2")
    assert dtype_for(65_537) == np.dtype("<u4")
    for vocab in (65_536, 65_537):
        assert read_header(shards.make_header(7, dtype_for(vocab)), "x") == (7, dtype_for(vocab))
    wrong = np.zeros(256, "<i4")
    wrong[:3] = 20240520, 7, 1
    for raw in (b"", bytes(1024), shards.make_header(7, dtype_for(9))[:-1], wrong.tobytes()):
        with pytest.raises(DataError, match=r"^some/shard: not a token shard"):
            read_header(raw, "some/shard")


def test_compression_changes_no_token_hash(tmp_path):
    """The xxh3 of the tokens is the same raw and compressed; the stored hashes are of the stored files."""
    raw, _ = make(tmp_path / "raw", level=None)
    compressed, _ = make(tmp_path / "zst", level=9)
    for a, b in zip(TokenShards(raw).shards, TokenShards(compressed).shards, strict=True):
        assert (a.xxh3, a.tokens, a.split, a.name + ".zst") == (b.xxh3, b.tokens, b.split, b.name)
        for url, s in ((raw, a), (compressed, b)):
            stored = Path(url, s.name).read_bytes()
            assert (len(stored), hashlib.sha256(stored).hexdigest()) == (s.stored_bytes, s.sha256)
        assert b.stored_bytes < a.stored_bytes


# ---- reading --------------------------------------------------------------------------------------------------------


@WIDTHS
@LEVELS
def test_every_way_of_loading_gives_the_ids(tmp_path, vocab, level):
    url, arrays = make(tmp_path / "d", vocab=vocab, level=level)
    data = TokenShards(url, cache=tmp_path / "cache")
    assert [s.name.split("-")[0] for s in data.split("train")] == ["train", "train"]
    assert len(data.split("val")) == 1
    data.verify()
    for shard, ids in zip(data.shards, arrays, strict=True):
        for preload in (True, False):
            got = data.load(shard, preload=preload)
            assert got.dtype == data.dtype
            assert isinstance(got, np.memmap) != preload
            np.testing.assert_array_equal(got, ids)


@pytest.mark.parametrize("scheme", ["memory", "gs"])
@LEVELS
def test_remote_datasets_read_the_same(gcs, tmp_path, scheme, level):
    """From an object store too; parts are fetched by range, not whole."""
    local, arrays = make(tmp_path / "d", level=level, sizes=(200_000, 500))
    url = f"{scheme}://bucket/{tmp_path.name}"
    for path in Path(local).iterdir():
        fs.put_file(fs.join(url, path.name), path)
    data = TokenShards(url, cache=tmp_path / "cache")
    data.verify()
    shard, ids = data.shards[0], arrays[0]
    np.testing.assert_array_equal(data.load(shard, preload=True), ids)
    np.testing.assert_array_equal(data.load(shard, preload=False), ids)
    np.testing.assert_array_equal(data.read(shard, 150_000, 150_010), ids[150_000:150_010])
    if scheme == "gs":
        gcs.seen.clear()
        np.testing.assert_array_equal(data.load(shard, preload=False), ids)
        assert gcs.seen == []  # from the cache
        gcs.fail("read", 503, times=8)
        np.testing.assert_array_equal(data.load(shard, preload=True), ids)


@pytest.fixture(scope="module", params=[(v, level) for v in (50_257, 100_277) for level in (None, 3)], ids=str)
def for_slices(request, tmp_path_factory):
    vocab, level = request.param
    with pytest.MonkeyPatch.context() as m:
        m.setattr(shards, "FRAME_BYTES", 1 << 12)
        url, arrays = make(tmp_path_factory.mktemp("slices"), vocab=vocab, level=level, sizes=(20_000, 1))
    return TokenShards(url), arrays[0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20_000), st.one_of(st.integers(0, 20_000), st.integers(0, 3)))
def test_parts_equal_slices(for_slices, start, length):
    """Any part, within a frame or across many, is that slice of the whole."""
    data, ids = for_slices
    stop = min(start + length, len(ids))
    got = data.read(data.shards[0], start, stop)
    assert got.dtype == data.dtype
    np.testing.assert_array_equal(got, ids[start:stop])


def test_parts_at_frame_limits(for_slices):
    data, ids = for_slices
    frame = (1 << 12) // data.dtype.itemsize
    for limit in (0, frame, 2 * frame, len(ids)):
        for a in (limit - 1, limit, limit + 1):
            for b in (a, a + 1, limit + frame, limit + frame + 1):
                if 0 <= a <= b <= len(ids):
                    np.testing.assert_array_equal(data.read(data.shards[0], a, b), ids[a:b])
    for a, b in ((-1, 1), (2, 1), (0, len(ids) + 1)):
        with pytest.raises(ValueError, match="outside"):
            data.read(data.shards[0], a, b)


@LEVELS
def test_a_shard_may_be_empty(tmp_path, level):
    """A corpus too small to have validation documents still makes a dataset that loads."""
    url, _ = make(tmp_path / "d", level=level, sizes=(100, 0))
    data = TokenShards(url)
    data.verify()
    for preload in (True, False):
        assert data.load(data.shards[1], preload=preload).shape == (0,)


def test_the_cached_copy_is_reused(tmp_path):
    """The second load needs no stored shard; the copy is one raw file, under --cache or $PERENNIAL_CACHE."""
    url, arrays = make(tmp_path / "d")
    data = TokenShards(url)
    data.load(data.shards[0], preload=False)
    os.unlink(tmp_path / "d" / data.shards[0].name)
    np.testing.assert_array_equal(data.load(data.shards[0], preload=False), arrays[0])
    (copy,) = (tmp_path / "default-cache" / "shards").iterdir()
    assert copy.stat().st_size == HEADER_BYTES + 2 * len(arrays[0])


@pytest.mark.parametrize("damage", ["empty", "half", "longer", "flip header", "flip token", "other"])
def test_a_damaged_cached_copy_is_made_again(tmp_path, damage):
    """What a crash or a bad disk made of the copy is never read, and needs nobody to delete it."""
    url, arrays = make(tmp_path / "d")
    data = TokenShards(url, cache=tmp_path / "cache")
    data.load(data.shards[0], preload=False)
    (copy,) = (tmp_path / "cache").iterdir()
    good = copy.read_bytes()
    at = {"flip header": 9, "flip token": 5_000}.get(damage, 0)
    flipped = good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :]
    other = good[:HEADER_BYTES] + np.flip(arrays[0]).astype("<u2").tobytes()
    copy.write_bytes(
        {"empty": b"", "half": good[: len(good) // 2], "longer": good + b"\0", "other": other}.get(damage, flipped)
    )
    np.testing.assert_array_equal(data.load(data.shards[0], preload=False), arrays[0])
    assert copy.read_bytes() == good


def test_a_killed_copy_leaves_nothing_that_counts(tmp_path):
    """Killed while the cached copy is unpacked: the next run starts it again."""
    url, arrays = make(tmp_path / "d", sizes=(400_000, 5))
    code = (
        "import os, signal, sys; from pathlib import Path; from store import shards\n"
        "write = shards.ShardWriter.write\n"
        "def die(self, ids): write(self, ids); self.file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "shards.ShardWriter.write = die\n"
        f"d = shards.TokenShards({url!r}, cache=Path({str(tmp_path / 'cache')!r})); d.load(d.shards[0], preload=False)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -9
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".tmp"]
    data = TokenShards(url, cache=tmp_path / "cache")
    np.testing.assert_array_equal(data.load(data.shards[0], preload=False), arrays[0])


# ---- damage ---------------------------------------------------------------------------------------------------------


def refused_everywhere(url: str, cache: Path, name: str) -> None:
    """Each way of reading the first shard in full raises one line that names it, and leaves no copy behind."""
    data = TokenShards(url, cache=cache)
    ways = (
        lambda: data.load(data.shards[0], preload=True),
        lambda: data.load(data.shards[0], preload=False),
        data.verify,
    )
    for way in ways:
        with pytest.raises(StoreError, match=name) as e:
            way()
        assert isinstance(e.value, DataError) or "not found" in str(e.value)
        assert "\n" not in str(e.value)
    assert not cache.exists() or list(cache.iterdir()) == []


@LEVELS
@pytest.mark.parametrize(
    "damage", ["truncate", "cut one byte", "empty", "missing", "swap", "longer", "same size", "zero page"]
)
def test_damaged_shards_are_refused(tmp_path, level, damage):
    url, _ = make(tmp_path / "d", level=level)
    path, other = sorted(Path(url).glob("train-*"))
    good = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        rng = np.random.default_rng(0)
        path.write_bytes({
            "truncate": good[: len(good) // 2], "cut one byte": good[:-1], "empty": b"", "swap": other.read_bytes(),
            "longer": good + b"\0", "same size": rng.bytes(len(good)), "zero page": good[:2048] + bytes(2048) + good[4096:],
        }[damage])  # fmt: skip
    refused_everywhere(url, tmp_path / "cache", "train-00000")
    if len(good) != (path.stat().st_size if path.exists() else None):
        with pytest.raises(DataError, match="shard train-00000"):
            TokenShards(url).check_sizes()


@LEVELS
def test_any_flipped_bit_is_refused(tmp_path, level):
    """One bit, in the header, the tokens, a frame's frame, the seek table."""
    url, _ = make(tmp_path / "d", level=level, sizes=(9_000, 5))
    path = Path(url) / TokenShards(url).shards[0].name
    good = path.read_bytes()
    rng = np.random.default_rng(1)
    places = {0, 1, 4, 8, 1023, 1024, len(good) - 1, len(good) - 5, len(good) - 9, len(good) - 12, len(good) - 30}
    for at in sorted(places | set(rng.integers(0, len(good), 40).tolist())):
        path.write_bytes(good[:at] + bytes([good[at] ^ (1 << rng.integers(8))]) + good[at + 1 :])
        refused_everywhere(url, tmp_path / "cache", "train-00000")


def test_parts_of_a_damaged_shard(tmp_path):
    """A part of a compressed shard is right or refused, whichever bit is wrong; never other ids, never a crash."""
    url, arrays = make(tmp_path / "d", sizes=(9_000, 5))
    data = TokenShards(url)
    path, shard = Path(url) / data.shards[0].name, data.shards[0]
    good, refused = path.read_bytes(), 0
    rng = np.random.default_rng(2)
    for at in [*rng.integers(0, len(good), 150), *range(len(good) - 60, len(good))]:
        path.write_bytes(good[:at] + bytes([good[at] ^ (1 << rng.integers(8))]) + good[at + 1 :])
        for a, b in ((0, 10), (4_000, 6_500), (8_990, 9_000)):
            try:
                np.testing.assert_array_equal(data.read(shard, a, b), arrays[0][a:b])
            except DataError as e:
                assert "train-00000" in str(e)  # noqa: PT017 - both outcomes are right
                refused += 1
    assert refused > 150
    path.write_bytes(good[:-2000])
    with pytest.raises(DataError, match="train-00000"):
        data.read(shard, 0, 10)


def test_a_lying_seek_table_is_refused(tmp_path):
    """Frame sizes that add up and yet are not the frames' own would shift every id after them."""
    url, _ = make(tmp_path / "d")
    data = TokenShards(url)
    path, shard = Path(url) / data.shards[0].name, data.shards[0]
    stored = bytearray(path.read_bytes())
    n_frames = int.from_bytes(stored[-9:-5], "little")
    for frame, shift in ((1, 8), (2, -8)):
        at = len(stored) - 9 - 8 * (n_frames - frame) + 4
        raw = int.from_bytes(stored[at : at + 4], "little")
        stored[at : at + 4] = (raw + shift).to_bytes(4, "little")
    path.write_bytes(stored)
    with pytest.raises(DataError, match="train-00000"):
        data.read(shard, 2_100, 2_110)


def test_parts_of_a_truncated_raw_shard(tmp_path):
    url, _ = make(tmp_path / "d", level=None)
    data = TokenShards(url)
    os.truncate(Path(url) / data.shards[0].name, HEADER_BYTES + 2001)
    for a, b in ((990, 1010), (0, 2000), (5000, 5001)):
        with pytest.raises(DataError, match="train-00000"):
            data.read(data.shards[0], a, b)


def test_an_endless_shard_fills_nothing(tmp_path):
    """A small file that unpacks to gigabytes is refused before it fills the memory or the disk."""
    url, _ = make(tmp_path / "d")
    shard, stored = TokenShards(url).shards[0], io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(stored, closefd=False) as w:
        w.write(shards.make_header(shard.tokens, np.dtype("<u2")))
        for _ in range(256):
            w.write(bytes(1 << 20))
    Path(url, shard.name).write_bytes(stored.getvalue())
    rewrite(
        url, shard__stored_bytes=len(stored.getvalue()), shard__sha256=hashlib.sha256(stored.getvalue()).hexdigest()
    )
    data, biggest = TokenShards(url, cache=tmp_path / "cache"), 0
    unlink = Path.unlink

    def watch(self: Path, missing_ok: bool = False) -> None:
        nonlocal biggest
        biggest = max(biggest, self.stat().st_size if self.exists() else 0)
        unlink(self, missing_ok)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(Path, "unlink", watch)
        for preload in (True, False):
            with pytest.raises(DataError, match="train-00000"):
                data.load(data.shards[0], preload=preload)
    assert biggest < 1 << 20


def test_another_tokenizer_is_refused(tmp_path):
    """tokenizer.json must be the one the tokens were made with."""
    url, _ = make(tmp_path / "d")
    assert TokenShards(url).tokenizer_json() == TOKENIZER.decode()
    (tmp_path / "d" / "tokenizer.json").write_bytes(TOKENIZER + b" ")
    for way in (TokenShards(url).tokenizer_json, TokenShards(url).verify):
        with pytest.raises(DataError, match=r"tokenizer\.json: not the tokenizer these shards were made with"):
            way()
    (tmp_path / "d" / "tokenizer.json").unlink()
    with pytest.raises(StoreError, match=r"tokenizer\.json: not found"):
        TokenShards(url).verify()


# ---- metadata.json is untrusted -------------------------------------------------------------------------------------

HASH = "0" * 64


@pytest.mark.parametrize(
    "changes",
    [
        {"shard__name": "../train-00000.bin"},
        {"shard__name": "/etc/train-00000.bin"},
        {"shard__name": "sub/train-00000.bin"},
        {"shard__name": "train-00000.bin\n"},
        {"shard__name": "gs://other/train-00000.bin"},
        {"shard__name": "val-00000.bin"},
        {"shard__name": "train-00001.bin.zst"},  # twice
        {"shard__name": None},
        {"shard__split": "test"},
        {"shard__tokens": -1},
        {"shard__tokens": "9000"},
        {"shard__tokens": 9000.0},
        {"shard__tokens": True},
        {"shard__documents": -1},
        {"shard__stored_bytes": -1},
        {"shard__sha256": "../../../../tmp/evil" + HASH[:44]},  # it names the cached copy
        {"shard__sha256": HASH.upper()[:-1]},
        {"shard__xxh3": None},
        {"shard__extra": 1},
        {"shards": None},
        {"shards": [7]},
        {"shards": {"a": 1}},
        {"vocab_size": "50257"},
        {"vocab_size": -5},
        {"vocab_size": True},
        {"tokenizer_sha256": None},
        {"format": "other"},
        {"version": "1"},
        {"version": None},
    ],
    ids=lambda c: "-".join(f"{k}={v!r}"[:40] for k, v in c.items()),
)
def test_hostile_metadata_is_refused(tmp_path, changes):
    url, _ = make(tmp_path / "d")
    rewrite(url, **changes)
    with pytest.raises(DataError, match=r"metadata\.json: not valid metadata \(.*re-run prep$"):
        TokenShards(url)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"null", b"[]", b"7", b"\xff\xfe", b'"x"', b"[" * 100_000, b"{}", b'{"a":' * 50_000]
)
def test_garbage_metadata_is_refused(tmp_path, raw):
    url, _ = make(tmp_path / "d")
    (tmp_path / "d" / "metadata.json").write_bytes(raw)
    with pytest.raises(DataError, match=r"metadata\.json: not valid metadata") as e:
        TokenShards(url)
    assert "\n" not in str(e.value)


def test_newer_and_missing_metadata_say_what_to_do(tmp_path):
    url, _ = make(tmp_path / "d")
    rewrite(url, version=2)
    with pytest.raises(DataError, match="format version 2 is newer than this program's 1: update it"):
        TokenShards(url)
    (tmp_path / "d" / "metadata.json").unlink()
    for where in (url, str(tmp_path / "nowhere")):
        with pytest.raises(DataError, match=r"no token dataset there \(metadata\.json is missing\)"):
            TokenShards(where)


def test_the_fingerprint_is_of_the_dataset(tmp_path):
    """Equal datasets have equal fingerprints wherever they are; any other has another."""
    a, _ = make(tmp_path / "a")
    b, _ = make(tmp_path / "b")
    c, _ = make(tmp_path / "c", sizes=(9_000, 9_000, 501))
    assert TokenShards(a).fingerprint == TokenShards(b).fingerprint != TokenShards(c).fingerprint


# ---- writing --------------------------------------------------------------------------------------------------------


@LEVELS
@pytest.mark.parametrize(
    "wrong", ["too few", "too many", "exception", "id too large", "negative id", "too many for one"]
)
def test_the_writer_refuses_and_leaves_nothing(tmp_path, level, wrong):
    """A shard that is not what was announced never gets a name, and no temporary file stays."""
    path, n = tmp_path / "train-00000.bin", 1 << 31 if wrong == "too many for one" else 10
    ids = {"too few": [1] * 9, "too many": [1] * 11, "id too large": [1] * 9 + [65_536], "negative id": [1] * 9 + [-1]}
    error = RuntimeError if wrong == "exception" else DataError
    with pytest.raises(error), ShardWriter(path, n, np.dtype("<u2"), level=level) as writer:  # noqa: PT012
        writer.write(np.array(ids.get(wrong, [1] * 10)))
        if wrong == "exception":
            raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_the_writer_replaces_nothing_when_it_fails(tmp_path):
    path = tmp_path / "train-00000.bin"
    write_shard(path, np.arange(10), 100, None)
    good = path.read_bytes()
    with pytest.raises(DataError), ShardWriter(path, 5, np.dtype("<u2"), level=None):
        pass
    assert path.read_bytes() == good


@LEVELS
def test_a_full_disk_leaves_nothing(tmp_path, level):
    """The disk fills while a shard is written, even in the last flush: the error is the system's, nothing stays."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    for n in (29_980, 400_000):  # the first fails only when the last bytes are flushed
        code = (
            "import sys, numpy as np; from pathlib import Path; from store.shards import ShardWriter\n"
            f"ids = np.random.default_rng(0).integers(0, 65536, {n})\n"
            f"with ShardWriter(Path({str(tmp_path / 'x.bin')!r}), {n}, np.dtype('<u2'), level={level}) as w: w.write(ids)"
        )
        ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, preexec_fn=limit, capture_output=True, text=True)
        assert "OSError: [Errno 27] File too large" in ran.stderr
        assert os.listdir(tmp_path) == []


# ---- loading policy -------------------------------------------------------------------------------------------------
