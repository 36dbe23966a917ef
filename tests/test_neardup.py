"""Near-duplicates of a corpus: each dropped one is like an earlier one kept, whatever the tasks, workers, interruptions."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prep import corpus as reading
from prep import neardup, parts
from prep.pool import Pool
from tests.helpers import error_of, files, prepare, start
from tests.test_minhash import change, plain_jaccard, random_text

FLAGS = ("--vocab-size", 300, "--near-dup", 0.8)


def originals_and_copies(n=60, seed=0):
    """Texts of which some are copies with words changed: few (near) or many (not)."""
    rng = np.random.Generator(np.random.PCG64(seed))
    texts = [random_text(rng, int(k)) for k in rng.integers(20, 200, n)]
    for i in rng.integers(0, n, n):
        texts.append(change(texts[i], rng, float(rng.choice([0.0, 0.01, 0.03, 0.3]))))
    return texts


def conversations(texts):
    return "\n\n".join(f"User: {t[: len(t) // 2]}\nAssistant: {t[len(t) // 2 :]}" for t in texts)


@pytest.fixture(scope="module")
def dirty(tmp_path_factory):
    path = tmp_path_factory.mktemp("near") / "dirty.txt"
    path.write_text(conversations(originals_and_copies()))
    return path


def find(texts, cuts, folder, threshold=0.8):
    """Over parts that end where `cuts` say."""
    folder.mkdir(exist_ok=True)
    paths = []
    for i, piece in enumerate(np.split(np.array(texts, object), cuts)):
        paths.append(folder / f"clean-{i:06d}-0000.docs")
        parts.save_documents(paths[-1], parts.Documents.build([[(None, t)] for t in piece]))
    keep = [np.ones(parts.load_index(p).shape[1], bool) for p in paths]
    with Pool(1) as pool:
        return neardup.find(paths, keep, threshold, folder, pool)


def test_what_is_found_is_what_comparing_every_pair_finds(tmp_path):
    texts = originals_and_copies()
    component = list(range(len(texts)))
    for i, j in itertools.combinations(range(len(texts)), 2):
        if alike(texts, i, j) >= 0.8:
            component = [component[i] if c == component[j] else c for c in component]
    expected = []
    for i in range(len(texts)):
        kept = [j for j in range(i) if expected[j] == j and component[j] == component[i] and alike(texts, i, j) >= 0.8]
        expected.append(kept[0] if kept else i)
    found = find(texts, [], tmp_path / "whole").tolist()
    assert found == expected
    assert 10 < sum(i != j for i, j in enumerate(found)) < 60
    assert find(texts, [7, 7, 50, 51], tmp_path / "cut").tolist() == expected  # an empty part too


def test_a_chain_of_small_differences_does_not_end_in_another_text(tmp_path):
    """Each is like the one before it, none like the one before that: every second one is kept."""
    words = random_text(np.random.Generator(np.random.PCG64(4)), 100).split()
    chain = []
    for step in range(6):
        chain.append(" ".join(words))
        for i in (3, 7):
            words[step * 15 + i] = f"other{step}"
    assert [alike(chain, i, i + 1) >= 0.8 for i in range(5)] == [True] * 5
    assert [alike(chain, i, i + 2) >= 0.8 for i in range(4)] == [False] * 4
    assert find(chain, [], tmp_path).tolist() == [0, 0, 2, 2, 4, 4]


def test_a_component_of_too_many_kept_ones_is_left_in_peace(monkeypatch):
    monkeypatch.setattr(neardup, "MAX_LEADERS", 2)
    root = np.array([0, 1, 1, 1, 1, 1, 1, 0])
    found = neardup.leaders(root, lambda a, b: (b - a) % 3 == 0)  # 1, 4; 2, 5; 3, 6; and not 0, 7
    assert found.tolist() == [0, 1, 2, 3, 1, 2, 6, 7]


_alike: dict = {}


def alike(texts, i, j):
    if (texts[i], texts[j]) not in _alike:
        _alike[texts[i], texts[j]] = plain_jaccard(texts[i], texts[j])
    return _alike[texts[i], texts[j]]


def test_what_does_not_take_part_stands_for_itself(tmp_path):
    text = random_text(np.random.Generator(np.random.PCG64(3)), 60)
    path = tmp_path / "clean-000000-0000.docs"
    parts.save_documents(path, parts.Documents.build([[(None, t)] for t in (text, text, text + " more", "else")]))
    with Pool(1) as pool:
        found = neardup.find([path], [np.array([False, True, True, True])], 0.8, tmp_path, pool)
    assert found.tolist() == [0, 1, 1, 3]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=60))
@settings(max_examples=100, deadline=None)
def test_join_gives_the_earliest_of_each_component(pairs):
    root = np.arange(31)
    for some in (pairs[:20], pairs[20:]):
        neardup.join(root, np.array([a for a, _ in some], int), np.array([b for _, b in some], int))
    expected = list(range(31))
    for _ in range(31):
        for a, b in pairs:
            expected[a] = expected[b] = min(expected[a], expected[b])
    assert root.tolist() == expected


@given(st.lists(st.integers(0, 4), max_size=30))
def test_equal_keys_are_linked_to_the_first_and_the_one_before(keys):
    a, b = neardup.equal_pairs(np.array(keys, np.uint32))
    expected = set()
    for i, key in enumerate(keys):
        before = [j for j in range(i) if keys[j] == key]
        expected |= {(before[0], i), (before[-1], i)} if before else set()
    assert sorted(zip(a.tolist(), b.tolist(), strict=True)) == sorted(expected)


def test_the_dataset_is_the_same_for_any_tasks_workers_and_interruption(dirty, tmp_path, monkeypatch):
    assert prepare("--input", dirty, "--output", tmp_path / "one", *FLAGS) == 0
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert report["counts"]["near_duplicates"] > 5
    assert report["totals"]["train"]["documents"] + report["totals"]["val"]["documents"] == report["counts"]["encoded"]
    monkeypatch.setattr(reading, "TASK_BYTES", 9_000)
    prepare("--input", dirty, "--output", tmp_path / "small", *FLAGS)
    assert files(tmp_path / "small") == files(tmp_path / "one")
    real = start("prep/tokenize_bpe.py", "--input", dirty, "--output", tmp_path / "two", *FLAGS, "--workers", 2)
    assert real.wait(60) == 0
    assert files(tmp_path / "two") == files(tmp_path / "one")

    class Killed(BaseException):
        pass

    monkeypatch.setattr(neardup, "BLOCK_SHINGLES", 300)
    for name in ("bands_task", "shingles_task", "join"):
        calls, real = [], getattr(neardup, name)

        def dying(*a, calls=calls, real=real):
            calls.append(a)
            if len(calls) == 3:
                raise Killed
            return real(*a)

        with monkeypatch.context() as m:
            m.setattr(neardup, name, dying)
            with pytest.raises(Killed):
                prepare("--input", dirty, "--output", tmp_path / "killed", *FLAGS, "--resume")
    work = tmp_path / "killed" / ".prep"
    signed = {p: p.stat().st_mtime_ns for p in work.glob("bands-*")}
    assert len(signed) > 12
    next(work.glob("bands-*.npy")).write_bytes(b"damaged")
    with monkeypatch.context() as m:
        m.setattr(neardup, "join", dying_at_once)
        with pytest.raises(ZeroDivisionError):
            prepare("--input", dirty, "--output", tmp_path / "killed", *FLAGS, "--resume")
    again = [p for p, mtime in signed.items() if p.stat().st_mtime_ns != mtime]
    assert len(again) == 2  # the damaged file and its marker
    assert prepare("--input", dirty, "--output", tmp_path / "killed", *FLAGS, "--resume") == 0
    assert files(tmp_path / "killed") == files(tmp_path / "one")


def dying_at_once(*_):
    raise ZeroDivisionError


def test_the_report_tells_of_the_largest_clusters(tmp_path):
    rng = np.random.Generator(np.random.PCG64(5))
    often, twice, alone = (random_text(rng, 120) for _ in range(3))
    texts = [twice, often, *(often.replace(often.split()[60], f"number{i}", 1) for i in range(3)), often, alone, twice]
    (tmp_path / "c.txt").write_text("\n\n".join(f"User: {t}\nAssistant: Yes." for t in texts))
    prepare("--input", tmp_path / "c.txt", "--output", tmp_path / "d", *FLAGS)
    report = json.loads((tmp_path / "d" / "report.json").read_text())
    assert [(c["size"], c["kind"], c["document"]) for c in report["clusters"]] == [(5, "near", 1), (2, "exact", 0)]
    assert report["clusters"][0]["text"] == f"{often}\nYes."[:200]
    counts = report["counts"]
    assert (counts["duplicates"], counts["near_duplicates"], counts["encoded"], counts["kept"]) == (2, 3, 3, 8)


def test_a_threshold_that_cannot_be_meant_is_refused(dirty, tmp_path):
    for threshold in (0, 0.3, 1.01, 80):
        message = error_of(prepare, "--input", dirty, "--output", tmp_path / "d", "--near-dup", threshold)
        assert "expected 0.5 (half in common) to 1" in message
    assert not (tmp_path / "d").exists()
