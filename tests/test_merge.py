"""A shard is a slice of every part: all documents, each once, in the order of their places."""

import numpy as np
import pytest

from prep import merge, parts
from store.errors import DataError


def ignore(place, lengths, ids):
    pass


def encoded_parts(folder, n_parts, n_documents, seed=0):
    """Parts of documents that each spell their own number; returns (paths, {place: number})."""
    rng = np.random.Generator(np.random.PCG64(seed))
    paths, number_at = [], {}
    for index in range(n_parts):
        place = np.sort(rng.integers(0, 2**64, n_documents, dtype=np.uint64))
        tokens = rng.integers(1, 50, n_documents).astype(np.uint32)
        numbers = np.arange(index * n_documents, (index + 1) * n_documents)
        number_at |= dict(zip(place.tolist(), zip(numbers.tolist(), tokens.tolist(), strict=True), strict=True))
        paths.append(folder / f"ids-{index}")
        parts.save_encoded(paths[-1], parts.Encoded(place, tokens, np.repeat(numbers, tokens).astype(np.uint16)))
    return paths, number_at


def plan_shards(paths, shard_tokens):
    places = merge.Places()
    for path in paths:
        places.add(path)
    return merge.plan_shards(places, shard_tokens)


@pytest.mark.parametrize("shard_tokens", [3_000, 10**9])
def test_every_document_once_in_the_order_of_places(tmp_path, shard_tokens):
    paths, number_at = encoded_parts(tmp_path, n_parts=5, n_documents=200)
    plans = plan_shards(paths, shard_tokens)
    written = []
    for plan in plans:
        out = tmp_path / plan.file_name(False)
        shard = merge.write_shard(plan, paths, out, dtype=np.dtype(np.uint16), level=None, look=ignore)
        ids = np.fromfile(out, np.uint16, offset=1024)
        written.append((plan.split, ids.tolist()))
        assert (shard.tokens, shard.documents) == (len(ids), plan.documents)
    for split, inside in (("train", lambda p: p >= 2**63), ("val", lambda p: p < 2**63)):
        expected = [
            n for place in sorted(filter(inside, number_at)) for n in [number_at[place][0]] * number_at[place][1]
        ]
        assert [i for s, ids in written if s == split for i in ids] == expected
    if shard_tokens == 3_000:
        assert len(plans) > 6
        assert max(p.tokens for p in plans) <= 3_000 + 50


def test_a_split_without_documents_has_no_shards(tmp_path):
    part = parts.Encoded(np.array([2**63 + 5], np.uint64), np.array([3], np.uint32), np.array([0, 7, 8], np.uint16))
    parts.save_encoded(tmp_path / "ids-0", part)
    assert [p.split for p in plan_shards([tmp_path / "ids-0"], 100)] == ["train"]


def test_a_part_cut_off_is_an_error(tmp_path):
    paths, _ = encoded_parts(tmp_path, n_parts=1, n_documents=20)
    ids = paths[0].with_suffix(".ids.npy")
    ids.write_bytes(ids.read_bytes()[:-10])
    first = plan_shards(paths, 10**9)[0]
    last = plan_shards(paths, 10**9)[-1]
    with pytest.raises(DataError, match="damaged working file"):  # train stands behind val: it is what was cut off
        merge.write_shard(first, paths, tmp_path / "x.bin", dtype=np.dtype(np.uint16), level=None, look=ignore)
    merge.write_shard(last, paths, tmp_path / "x.bin", dtype=np.dtype(np.uint16), level=None, look=ignore)


@pytest.mark.parametrize("level", [None, parts.PACKED])
def test_documents_come_back_and_damage_is_told(tmp_path, level):
    path, saved = (
        tmp_path / "clean-0.docs",
        parts.Documents.build([[("user", "Höllo"), ("assistant", "")], [(None, "x")]]),
    )
    proof = parts.save_documents(path, saved, level)
    assert {name: entry for file in tmp_path.iterdir() for name, entry in parts.prove(file).items()} == proof
    for name, array in vars(parts.load_documents(path)).items():
        assert (array.tolist(), array.dtype) == (getattr(saved, name).tolist(), getattr(saved, name).dtype)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="damaged working file"):
        parts.load_documents(path)
