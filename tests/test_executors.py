"""Where tasks run changes nothing: separate commands in any order, Ray, a killed worker, a signal."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from prep import corpus as reading
from prep import pool, tokenize_bpe, work_folder
from store import fs
from tests.helpers import ROOT, command, error_of, files, prepare, start

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
    damaged = next((tmp_path / "array" / ".prep").glob("clean-*.docs"))
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


def test_other_versions_or_other_code_do_not_go_on_with_a_run(corpus, tmp_path, small_tasks, monkeypatch):
    """Half of the bytes would be the one's, half the other's."""
    array = ("--input", corpus, "--output", tmp_path / "d", *FLAGS)
    prepare(*array, "--num-tasks", 2, "--task-index", 0)
    real = work_folder.code_versions()
    with monkeypatch.context() as m:
        m.setattr(work_folder, "code_versions", lambda: {**real, "prep/clean.py": "another"})
        for more in (("--num-tasks", 2, "--task-index", 1), ("--resume",)):
            assert "has changed since (prep/clean.py)" in error_of(prepare, *array, *more)
    with monkeypatch.context() as m:
        m.setattr(tokenize_bpe, "version", lambda name: "0.0")
        assert "was begun with tokenizers" in error_of(prepare, *array, "--resume")
    assert prepare(*array, "--resume") == 0


def test_an_update_that_changes_no_bytes_is_gone_on_with(tmp_path, monkeypatch):
    for name in ("gpt", "prep", "store"):
        shutil.copytree(work_folder.PROJECT / name, tmp_path / name)
    before = work_folder.code_versions()
    monkeypatch.setattr(work_folder, "PROJECT", tmp_path)
    for shown in ("prep/summary.py", "prep/report_page.py", "gpt/model.py", "store/retry.py"):
        (tmp_path / shown).write_text("changed = True")
    assert work_folder.code_versions() == before
    for makes_bytes in ("prep/clean.py", "gpt/tokenizer.py", "store/shards.py"):
        (tmp_path / makes_bytes).write_text("changed = True")
        assert work_folder.code_versions() != before
        before = work_folder.code_versions()


def test_all_that_tasks_run_counts_as_code():
    """A module that is forgotten in NO_BYTES, or grows into one that makes bytes, would let two versions mix."""
    code = "import sys, prep.stages, prep.vocabulary; print(*(m for m in sys.modules if m.startswith('prep.')))"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=work_folder.PROJECT, capture_output=True, text=True, check=True
    )
    loaded = {name.removeprefix("prep.") for name in ran.stdout.split()}
    assert "clean" in loaded
    assert loaded & work_folder.NO_BYTES == {"pool"}


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
    made = list(pool.in_threads(lambda i: fs.create(str(tmp_path / "job"), b"%d" % i * 1000), range(50), threads=16))
    assert sorted(made) == [False] * 49 + [True]
    assert len(set((tmp_path / "job").read_bytes())) <= 2  # one writer's digits, whole
    assert len((tmp_path / "job").read_bytes()) in (1000, 2000)
    assert [p.name for p in tmp_path.iterdir()] == ["job"]
    before = (tmp_path / "job").read_bytes()
    assert not fs.create(str(tmp_path / "job"), b"later")
    assert (tmp_path / "job").read_bytes() == before


# ---- Ray ------------------------------------------------------------------------------------------------------------


def test_ray_gives_the_same_bytes(corpus, tmp_path):
    pytest.importorskip("ray")
    prepare("--input", corpus, "--output", tmp_path / "one", *FLAGS)
    flags = ("--input", corpus, "--output", tmp_path / "ray", *FLAGS, "--executor", "ray", "--workers", 2)
    done = subprocess.run(command("prep/tokenize_bpe.py", *flags), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(line[:10].strip() for line in done.stdout.splitlines())  # its own lines and none of Ray's
    assert files(tmp_path / "ray") == files(tmp_path / "one")


# ---- beside the work ------------------------------------------------------------------------------------------------


def test_in_threads_keeps_order_bounds_what_waits_and_raises(tmp_path):
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


# ---- stopped from outside -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def big(corpus, tmp_path_factory):
    """11 MB: two tasks of the real size, some seconds of work; and the dataset an undisturbed run makes of it."""
    folder = tmp_path_factory.mktemp("big")
    (folder / "big.txt").write_bytes(corpus.read_bytes() * 18)
    flags = ("--input", folder / "big.txt", *FLAGS, "--dedup", "off", "--tokenizer-sample", "1MB")
    prepare(*flags, "--output", folder / "quiet")
    return flags, files(folder / "quiet")


def begin(big, output, *more, until="clean-*.json", **options):
    """Start a real run of two workers and wait until a working file of that name is there."""
    flags = (*big[0], "--output", output, "--workers", 2, *more)
    process = start(
        "prep/tokenize_bpe.py",
        *flags,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        **options,
    )
    while not list((output / ".prep").glob(until)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    return process


def goes_on(big, output):
    """The same command with --resume makes the same bytes."""
    assert prepare(*big[0], "--output", output, "--resume") == 0
    assert files(output) == big[1]


def test_a_signal_ends_it_with_one_line_and_its_code_and_no_worker_stays(big, tmp_path):
    process = begin(big, tmp_path / "d")
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=20)[1]
    assert (process.returncode, err) == (143, "stopped; the same command with --resume goes on\n")
    psutil.wait_procs(workers, timeout=10)
    assert not [w for w in workers if w.is_running() and w.status() != psutil.STATUS_ZOMBIE]
    goes_on(big, tmp_path / "d")


def test_ctrl_c_while_workers_start_is_one_line_too(corpus, tmp_path):
    """A terminal sends it to every process, also to those that have only just begun."""
    process = start("prep/tokenize_bpe.py", "--input", corpus, "--output", tmp_path / "d", *FLAGS, "--workers", 2,
                    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
    while not psutil.Process(process.pid).children():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    err = process.communicate(timeout=20)[1]
    assert (process.returncode, err) == (130, "stopped; the same command with --resume goes on\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_leaves_at_once_whatever_hangs(number):
    hangs = (
        "import time\nfrom cli.stop import stoppable\n"
        "with stoppable() as stop:\n"
        "    try: print('works', flush=True); time.sleep(60)\n"
        "    except KeyboardInterrupt: print('stops', stop.code, flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", hangs], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "works\n"
    process.send_signal(number)
    assert process.stdout.readline() == f"stops {128 + number}\n"
    process.send_signal(number)
    assert process.communicate(timeout=10) == ("", "")
    assert process.returncode == 128 + number


def test_workers_are_copies_only_where_no_thread_could_hold_what_they_wait_for():
    """A lock that a thread held while the process was copied stays locked in the copy for ever."""
    look = "import sys, threading\nfrom prep import pool\nprint(pool._start_method())\n"
    other = "threading.Thread(target=threading.Event().wait, daemon=True).start()\nprint(pool._start_method())\n"
    out = subprocess.run(
        [sys.executable, "-c", look + other], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert out.split() == ["fork" if sys.platform == "linux" else "spawn", "spawn"]


def test_a_worker_encodes_on_one_thread(corpus, tmp_path):
    """Two at once would take the cores from the other workers: half as much time again for the same text."""
    pytest.importorskip("fastokens")
    prepare("--input", corpus, "--output", tmp_path / "d", *FLAGS)
    encode = (
        "import os, sys, time\nfrom prep.pool import WORKER_ENVIRONMENT\nos.environ.update(WORKER_ENVIRONMENT)\n"
        "import fastokens\nfast = fastokens.Tokenizer.from_file(sys.argv[1])\n"
        "texts = [f'{i} of so many words, none of them new' for i in range(100_000)]\n"
        "here, all_threads = time.thread_time(), time.process_time()\n"
        "fast.encode_batch_flat(texts)\n"
        "print((time.process_time() - all_threads) / (time.thread_time() - here))\n"
    )
    command = [sys.executable, "-c", encode, str(tmp_path / "d/tokenizer.json")]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 0.9 < float(out) < 1.1


def test_an_error_waits_for_no_task_under_way():
    """A compressed file is one task: it can take minutes."""

    def interrupted():
        with pool.Pool(2) as two:
            assert next(two.run(time.sleep, [(0.0,), (60.0,), (60.0,), (60.0,), (60.0,)])) is None
            raise KeyboardInterrupt

    start_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - start_s < 30


def test_a_killed_worker_is_one_line_and_nothing_is_lost(big, tmp_path):
    """As the kernel does when memory is short."""
    process = begin(big, tmp_path / "d")
    psutil.Process(process.pid).children()[-1].kill()
    err = process.communicate(timeout=20)[1]
    assert process.returncode == 2
    assert err.startswith("error: a worker process was killed")
    assert err.count("\n") == 1
    assert list((tmp_path / "d" / ".prep").glob("clean-*.json"))  # a fresh run too keeps what it finished
    goes_on(big, tmp_path / "d")


def test_a_source_that_vanishes_is_one_line_and_when_back_it_goes_on(big, tmp_path):
    source = big[0][1]
    process = begin(big, tmp_path / "d", until="job.json")
    away = source.rename(source.with_name("away"))
    try:
        err = process.communicate(timeout=20)[1]
    finally:
        away.rename(source)
    assert (process.returncode, err) == (2, f"error: {source}: not found\n")
    goes_on(big, tmp_path / "d")


# ---- object stores --------------------------------------------------------------------------------------------------


def bucket_run(gcs, *flags, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PERENNIAL_RETRY_FOR_S": "20", **gcs.env}
    return subprocess.Popen(
        command("prep/tokenize_bpe.py", *flags), env=environment, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )  # fmt: skip


def test_an_object_that_may_not_be_read_is_one_line_and_then_goes_on(corpus, tmp_path, gcs):
    gcs.objects["b/corpus.txt"] = corpus.read_bytes()
    prepare("--input", corpus, "--output", tmp_path / "one", *FLAGS)
    flags = ("--input", "gs://b/corpus.txt", "--output", tmp_path / "d", *FLAGS, "--workers", 2, "--resume")
    process = bucket_run(gcs, *flags)
    while not (tmp_path / "d" / ".prep" / "job.json").exists():
        assert process.poll() is None, process.communicate()
    gcs.faults["read"] = [403] * 1000  # withdrawn in the middle of the run
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 2, err
    assert err.count("\n") == 1
    assert err.startswith("error: gs://b/corpus.txt: cannot read")
    gcs.faults["read"] = [500]  # and back, with one fault that passes
    process = bucket_run(gcs, *flags)
    assert process.communicate(timeout=60)[1] == ""
    assert files(tmp_path / "d") == files(tmp_path / "one")


def test_killed_between_uploads_it_sends_only_what_is_missing(corpus, tmp_path, gcs):
    prepare("--input", corpus, "--output", tmp_path / "one", *FLAGS)
    expected = {f"b/d/{name}": data for name, data in files(tmp_path / "one").items()}
    flags = (
        "--input",
        corpus,
        "--output",
        "gs://b/d",
        *FLAGS,
        "--workers",
        2,
        "--resume",
        "--work-dir",
        tmp_path / "work",
    )
    gcs.bytes_per_s = 40_000  # a shard takes a quarter of a second
    process = bucket_run(gcs, *flags)
    while len(list((tmp_path / "work").rglob("train-*.json"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    done = {p.name.removesuffix(".json") for p in (tmp_path / "work").rglob("train-*.json")}
    process.kill()
    process.wait()
    assert "b/d/metadata.json" not in gcs.objects
    gcs.bytes_per_s, gcs.seen[:] = None, []
    process = bucket_run(gcs, *flags)
    assert process.communicate(timeout=60)[1] == ""
    assert {name: data for name, data in gcs.objects.items() if not name.endswith("timing.js")} == expected
    sent = {name.removeprefix("b/d/") for kind, name in gcs.seen if kind == "upload"}
    assert not sent & done
    assert not list((tmp_path / "work").iterdir())


# ---- leaks of the machine into the bytes ------------------------------------------------------------------------------


def test_locale_time_zone_hash_seed_and_threads_do_not_matter(corpus, tmp_path):
    odd = {"LC_ALL": "C", "TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "5"}
    plain = {"LC_ALL": "C.UTF-8", "TZ": "UTC", "PYTHONHASHSEED": "1", "RAYON_NUM_THREADS": "1"}
    folder = tmp_path / "façade 日本"
    folder.mkdir()
    (folder / "ç.txt").write_bytes(corpus.read_bytes())
    for name, environment, mask in (("a", odd, 0o077), ("b", plain, 0o022)):
        flags = ("--input", folder / "ç.txt", "--output", folder / name, *FLAGS, "--workers", 2)
        line = command("prep/tokenize_bpe.py", *flags)
        assert subprocess.run(line, env={**os.environ, **environment}, umask=mask, cwd=tmp_path).returncode == 0
    assert files(folder / "a") == files(folder / "b")
