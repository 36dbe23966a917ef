"""Where tasks run changes nothing: separate commands in any order, Ray, a killed worker, a signal."""

import subprocess

import pytest

from prep import corpus as reading
from prep import pool
from store import fs
from tests.helpers import error_of, files, prepare

FLAGS = ("--vocab-size", 512, "--compress", "--shard-tokens", 30_000, "--val-fraction", 0.05)


@pytest.fixture
def small_tasks(monkeypatch):
    monkeypatch.setattr(reading, "TASK_BYTES", 50_000)


# ---- separate commands ----------------------------------------------------------------------------------------------


def test_shares_in_any_order_give_the_same_bytes(corpus, tmp_path, small_tasks):
    prepare("--input", corpus, "--output", tmp_path / "one", *FLAGS)
    array = ("--input", corpus, "--output", tmp_path / "array", *FLAGS)
    says = error_of(prepare, *array, "--finish")
    assert "no --task-index has been run" in says
    assert not (tmp_path / "array").exists()
    for index in (2, 0, 2):  # a task that a scheduler starts again does no harm
        assert prepare(*array, "--num-tasks", 4, "--task-index", index) == 0
    assert "these --task-index are not done: 1, 3:" in error_of(prepare, *array, "--finish")
    for index in (3, 1):
        assert prepare(*array, "--num-tasks", 4, "--task-index", index) == 0
    damaged = next((tmp_path / "array" / ".prep").glob("clean-*.zst"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert prepare(*array, "--num-tasks", 4, "--finish") == 0
    assert files(tmp_path / "array") == files(tmp_path / "one")
    assert prepare(*array, "--num-tasks", 4, "--task-index", 1) == 0  # too late: nothing to do
    assert files(tmp_path / "array") == files(tmp_path / "one")


def test_shares_must_agree(corpus, tmp_path, small_tasks):
    array = ("--input", corpus, "--output", tmp_path / "d", *FLAGS)
    prepare(*array, "--num-tasks", 4, "--task-index", 1)
    assert "begun with --num-tasks 4" in error_of(prepare, *array, "--num-tasks", 5, "--task-index", 0)
    assert "begun with --num-tasks 4" in error_of(prepare, *array, "--num-tasks", 5, "--finish")
    assert "begun with --seed 1" in error_of(prepare, *array, "--num-tasks", 4, "--task-index", 0, "--seed", 2)
    assert "add --resume" in error_of(prepare, *array)
    assert prepare(*array, "--resume") == 0  # one command can always do the whole rest
    prepare("--input", corpus, "--output", tmp_path / "one", *FLAGS)
    assert files(tmp_path / "d") == files(tmp_path / "one")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--task-index", 0), "give --num-tasks too"),
        (("--num-tasks", 4), "give each command its --task-index, 0 to 3"),
        (("--num-tasks", 4, "--task-index", 4), "--task-index 4: expected 0 to 3"),
        (("--num-tasks", 0, "--finish"), "expected 1 or more"),
        (("--num-tasks", 4, "--task-index", 1, "--finish"), "leave one of the two out"),
        (("--num-tasks", 4, "--task-index", 1, "--executor", "ray"), "leave --num-tasks and --task-index out"),
        (("--num-tasks", 4, "--task-index", 1, "--output", "gs://bucket/d"), "--work-dir is missing"),
    ],
)
def test_flags_that_contradict_each_other(corpus, tmp_path, flags, says):
    output = () if "--output" in flags else ("--output", tmp_path / "d")
    assert says in error_of(prepare, "--input", corpus, *output, *flags)
    assert not (tmp_path / "d").exists()


def test_of_many_processes_at_once_the_first_one_writes(tmp_path):
    made = list(pool.in_threads(lambda i: fs.put_first(tmp_path / "job", b"%d" % i * 1000), range(50), threads=16))
    assert len(made) == 50
    assert len(set((tmp_path / "job").read_bytes())) <= 2  # one writer's digits, whole
    assert len((tmp_path / "job").read_bytes()) in (1000, 2000)
    assert [p.name for p in tmp_path.iterdir()] == ["job"]
    before = (tmp_path / "job").read_bytes()
    fs.put_first(tmp_path / "job", b"later")
    assert (tmp_path / "job").read_bytes() == before


# ---- Ray ------------------------------------------------------------------------------------------------------------


def test_ray_gives_the_same_bytes(corpus, tmp_path):
    pytest.importorskip("ray")
    from tests.helpers import command

    prepare("--input", corpus, "--output", tmp_path / "one", *FLAGS)
    flags = ("--input", corpus, "--output", tmp_path / "ray", *FLAGS, "--executor", "ray", "--workers", 2)
    done = subprocess.run(command("prep/tokenize_bpe.py", *flags), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(line[:10].strip() for line in done.stdout.splitlines())  # its own lines and none of Ray's
    assert files(tmp_path / "ray") == files(tmp_path / "one")


# ---- beside the work ------------------------------------------------------------------------------------------------


def test_in_threads_keeps_order_bounds_what_waits_and_raises(tmp_path):
    import threading

    begun, go = [], threading.Event()

    def work(i):
        go.wait(10)
        if i == 5:
            raise ValueError("five")
        return -i

    def items():
        for i in range(8):
            begun.append(i)
            if len(begun) == 3:
                go.set()
            yield i

    results = pool.in_threads(work, items(), threads=3)
    assert next(results) == 0
    assert begun == [0, 1, 2]  # the first result is taken before a fourth is begun
    assert [next(results) for _ in range(4)] == [-1, -2, -3, -4]
    with pytest.raises(ValueError, match="five"):
        next(results)
