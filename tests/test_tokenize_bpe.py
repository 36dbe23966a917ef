"""Law 4: the dataset is a pure function of input bytes, settings and seed. And what a user can get wrong."""

import json
import os
import signal
import socket
import subprocess
import time

import numpy as np
import pytest

from gpt.tokenizer import Tokenizer
from prep import corpus as planning
from prep import merge, pool, reading, stages, tokenize_bpe
from prep.labelled import conversations
from prep.settings import Settings, check
from store.shards import TokenShards
from tests.helpers import command, error_of, files, prepare, start

FLAGS = ("--vocab-size", 512, "--compress", "--shard-tokens", 30_000, "--val-fraction", 0.05)


def documents(folder, split):
    """The ids of every document of a split, as tuples."""
    data = TokenShards(str(folder))
    ids = np.concatenate([data.load(s, preload=True) for s in data.split(split)])
    return [tuple(d.tolist()) for d in np.split(ids, np.flatnonzero(ids == 0)[1:])]


def test_every_document_arrives_once_and_decodes_to_its_text(corpus, tmp_path):
    assert prepare("--input", corpus, "--output", tmp_path / "d", *FLAGS, "--clean", "off") == 0
    tokenizer = Tokenizer((tmp_path / "d" / "tokenizer.json").read_text("utf-8"))
    expected = {tokenizer.decode(tokenizer.render(d)) for d in conversations(corpus.read_bytes())}
    train, val = documents(tmp_path / "d", "train"), documents(tmp_path / "d", "val")
    decoded = [tokenizer.decode(d) for d in train + val]
    assert len(decoded) == len(set(decoded))
    assert set(decoded) == expected
    assert 0.03 < len(val) / len(decoded) < 0.07
    metadata = TokenShards(str(tmp_path / "d")).metadata
    assert metadata["totals"]["train"]["documents"] == len(train)
    assert len(TokenShards(str(tmp_path / "d")).split("train")) > 3


def test_documents_are_shuffled_across_shards(corpus, tmp_path):
    prepare("--input", corpus, "--output", tmp_path / "d", *FLAGS)
    tokenizer = Tokenizer((tmp_path / "d" / "tokenizer.json").read_text("utf-8"))
    original = {tokenizer.decode(tokenizer.render(d)): i for i, d in
                enumerate(conversations(corpus.read_bytes()))}  # fmt: skip
    order = [original.get(tokenizer.decode(d), 0) for d in documents(tmp_path / "d", "train")]
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.1


def test_same_bytes_for_any_workers_task_size_and_killed_runs(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "TASK_BYTES", 50_000)
    prepare("--input", corpus, "--output", tmp_path / "one", *FLAGS)
    monkeypatch.setattr(planning, "TASK_BYTES", 7_000)
    prepare("--input", corpus, "--output", tmp_path / "small-tasks", *FLAGS)
    assert files(tmp_path / "small-tasks") == files(tmp_path / "one")
    assert not (tmp_path / "one" / ".prep").exists()

    real = start("prep/tokenize_bpe.py", "--input", corpus, "--output", tmp_path / "three", *FLAGS, "--workers", 3)
    assert real.wait(120) == 0  # real processes, the real task size
    assert files(tmp_path / "three") == files(tmp_path / "one")


def test_killed_at_any_task_it_resumes_to_the_same_bytes(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "TASK_BYTES", 100_000)
    prepare("--input", corpus, "--output", tmp_path / "quiet", *FLAGS)

    class Killed(BaseException):
        pass

    calls = 0
    real_run = pool.Pool.run

    def dying_run(self, work, tasks):
        nonlocal calls
        for result in real_run(self, work, tasks):
            calls += 1
            if calls == limit:
                raise Killed
            yield result

    redone = []
    for limit in (1, 4, 9, 14, 17):  # noqa: B007 - dying_run reads it
        calls = 0
        with monkeypatch.context() as m:
            m.setattr(pool.Pool, "run", dying_run)
            with pytest.raises(Killed):
                prepare("--input", corpus, "--output", tmp_path / "d", *FLAGS, "--resume")
        assert not (tmp_path / "d" / "metadata.json").exists()  # unfinished is never taken for complete
    real_documents = reading.documents
    monkeypatch.setattr(reading, "documents", lambda *a, **k: redone.append(1) or real_documents(*a, **k))
    assert prepare("--input", corpus, "--output", tmp_path / "d", *FLAGS, "--resume") == 0
    assert redone == []  # what was done is not done again
    assert files(tmp_path / "d") == files(tmp_path / "quiet")


def test_sigkill_of_a_real_run_leaves_no_worker_and_resumes(corpus, tmp_path):
    big = tmp_path / "big.txt"
    big.write_bytes(corpus.read_bytes() * 30)
    flags = ("--input", big, *FLAGS, "--dedup", "off", "--workers", 2)
    quiet = start("prep/tokenize_bpe.py", *flags, "--output", tmp_path / "quiet")
    assert quiet.wait(120) == 0
    for stage in ("clean-*.json", "ids-*.json", "train-*.json"):  # in the middle of each pass
        process = start("prep/tokenize_bpe.py", *flags, "--output", tmp_path / "d", "--resume", start_new_session=True)
        while not list((tmp_path / "d" / ".prep").glob(stage)):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline_s = time.monotonic() + 10
        while group_is_alive(process.pid) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert not group_is_alive(process.pid)
    process = start("prep/tokenize_bpe.py", *flags, "--output", tmp_path / "d", "--resume")
    assert process.wait(120) == 0
    assert files(tmp_path / "d") == files(tmp_path / "quiet")


def group_is_alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_damaged_working_files_are_made_again(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "TASK_BYTES", 100_000)
    prepare("--input", corpus, "--output", tmp_path / "quiet", *FLAGS)
    with monkeypatch.context() as m:
        m.setattr(merge, "plan_shards", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare("--input", corpus, "--output", tmp_path / "d", *FLAGS)
    for number, path in enumerate(sorted((tmp_path / "d" / ".prep").iterdir())):
        if path.name not in ("job.json", ".lock"):
            raw = bytearray(path.read_bytes())
            if number % 3 == 0:
                raw[len(raw) // 2] ^= 1
            elif number % 3 == 1:
                raw = raw[:-1]
            path.write_bytes(raw)
    assert prepare("--input", corpus, "--output", tmp_path / "d", *FLAGS, "--resume") == 0
    assert files(tmp_path / "d") == files(tmp_path / "quiet")


def test_seed_and_settings_matter(corpus, tmp_path):
    made = {}
    for name, extra in {"a": (), "seed": ("--seed", 2), "split": ("--split-pattern", "gpt2")}.items():
        prepare("--input", corpus, "--output", tmp_path / name, *FLAGS, *extra)
        made[name] = files(tmp_path / name)["train-00000.bin.zst"]
    assert len(set(made.values())) == 3


def test_duplicates_are_dropped_and_cannot_straddle_the_split(corpus, tmp_path):
    doubled = tmp_path / "doubled.txt"
    doubled.write_bytes(corpus.read_bytes() + b"\n\n" + corpus.read_bytes())
    prepare("--input", doubled, "--output", tmp_path / "d", *FLAGS)
    prepare("--input", corpus, "--output", tmp_path / "once", *FLAGS)
    assert sorted(documents(tmp_path / "d", "train")) == sorted(documents(tmp_path / "once", "train"))
    prepare("--input", doubled, "--output", tmp_path / "kept", *FLAGS, "--dedup", "off")
    train, val = documents(tmp_path / "kept", "train"), documents(tmp_path / "kept", "val")
    assert len(train) + len(val) >= 2 * (
        len(documents(tmp_path / "d", "train")) + len(documents(tmp_path / "d", "val"))
    )
    assert not set(train) & set(val)


def test_inputs_of_many_kinds_in_one_run(corpus, tmp_path):
    folder = tmp_path / "in put"
    folder.mkdir()
    chats = list(conversations(corpus.read_bytes()))[:300]
    (folder / "a.txt").write_text("\n\n".join("\n".join(f"{r.title()}: {t}" for r, t in d) for d in chats[:100]))
    as_json = [json.dumps({"messages": [{"role": r, "content": t} for r, t in d]}) for d in chats[100:200]]
    (folder / "b.jsonl").write_text("\n".join([*as_json, "{broken", "", '{"no": 1}']))
    import gzip

    (folder / "ç.jsonl.gz").write_bytes(
        gzip.compress("\n".join(json.dumps({"text": d[0][1] * 3}) for d in chats[200:]).encode())
    )
    assert prepare("--input", folder, "--output", tmp_path / "d", "--vocab-size", 400) == 0
    report = json.loads((tmp_path / "d" / "report.json").read_text())
    assert report["counts"]["dropped_broken_json"] == 1
    assert report["counts"]["dropped_no_text_field"] == 1
    assert report["counts"]["kept"] == 300
    assert report["counts"]["chat"] == 200


def test_reused_tokenizer_and_remote_output(corpus, data, tmp_path):
    url = f"memory://prep/{tmp_path.name}"
    prepare(
        "--input", corpus, "--output", url, "--tokenizer", data / "tokenizer.json", "--compress", "--work-dir", tmp_path
    )
    made = TokenShards(url)
    made.verify()
    assert made.vocab_size == 512
    assert not list(tmp_path.glob("perennial-prep*"))


def test_datasets_that_share_a_work_dir_share_no_work(corpus, tmp_path, monkeypatch):
    work = ("--work-dir", tmp_path / "work", "--vocab-size", 300)
    prepare("--input", corpus, "--output", tmp_path / "a", *work)
    with monkeypatch.context() as m:
        m.setattr(stages, "select", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare("--input", corpus, "--output", tmp_path / "b", *work, "--seed", 2)
    markers = len(list((tmp_path / "work").rglob("clean-*.json")))
    assert markers
    prepare("--input", corpus, "--output", tmp_path / "a", *work, "--resume")  # complete already
    prepare("--input", corpus, "--output", tmp_path / "c", *work, "--seed", 3)
    assert len(list((tmp_path / "work").rglob("clean-*.json"))) == markers
    assert prepare("--input", corpus, "--output", tmp_path / "b", *work, "--seed", 2, "--resume") == 0


def test_a_dataset_of_characters(corpus, data, tmp_path):
    """The same documents, a vocabulary that is as small as the text needs, one token for each character."""
    d = tmp_path / "d"
    assert prepare("--input", corpus, "--output", d, "--tokenizer-type", "char", "--tokenizer-sample", "all") == 0
    made = TokenShards(str(d))
    made.verify()
    assert made.vocab_size < 300
    tokenizer = Tokenizer(made.tokenizer_json())
    assert tokenizer.special_ids["<|end|>"] == 4
    assert all(len(tokenizer.encode(c)) == 1 for c in set(corpus.read_text("utf-8")))
    texts = {}
    for folder in (d, data):
        decode = Tokenizer(TokenShards(str(folder)).tokenizer_json()).decode
        texts[folder] = sorted(decode(ids) for split in ("train", "val") for ids in documents(folder, split))
    assert texts[d] == texts[data]


def test_limit_is_a_trial(corpus, tmp_path):
    prepare("--input", corpus, "--output", tmp_path / "d", "--vocab-size", 300, "--limit", "50kB")
    assert 45_000 < TokenShards(str(tmp_path / "d")).metadata["counts"]["bytes"] < 60_000


def test_default_output_is_beside_the_input_and_named_after_it(corpus, tmp_path):
    (tmp_path / "my corpus.txt").write_bytes(corpus.read_bytes())
    process = start("prep/tokenize_bpe.py", "--input", "my corpus.txt", "--compress", "--vocab-size", 300, cwd=tmp_path)
    assert process.wait(60) == 0
    assert (tmp_path / "my corpus-tokens" / "metadata.json").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [("a/corpus.txt.gz", "a/corpus-tokens"), ("corpus.jsonl", "corpus-tokens"), ("a/b/", "a/b-tokens"), ("a/*.txt", "a-tokens"),
     ("a/part-*/x?.txt", "a-tokens"), ("gs://bucket/x/c.txt", "gs://bucket/x/c-tokens"), ("https://h/x/c.txt?s=1", "c-tokens"),
     ("hf://org/name", "name-tokens"), ("hf://datasets/org/name/data/*.parquet", "data-tokens")],
)  # fmt: skip
def test_default_output(given, expected):
    from prep.settings import default_output

    assert default_output(given) == expected


def test_default_output_of_a_file_whose_name_looks_like_a_glob(tmp_path):
    from prep.settings import default_output

    path = tmp_path / "what? [ab]*.txt"
    path.write_text("words")
    assert default_output(str(path)) == str(tmp_path / "what? [ab]*-tokens")


def bad_inputs(tmp_path, corpus, data):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "mac.txt").write_bytes(b"User: Hello?\rAssistant: Hello.\r\r" * 90)
    (tmp_path / "blank.txt").write_bytes(b"\n\n \n\n")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "latin.txt").write_bytes(b"User: caf\xe9 au lait, please\nAssistant: Coming.\n\n" * 50)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.doc").write_bytes(b"do not touch")
    (tmp_path / "md").mkdir()
    (tmp_path / "md" / "read.md").write_bytes(b"About something, in a format that is not read.\n")
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "the.txt").write_text("the\na\n")
    (tmp_path / "junk.json").write_bytes(b"{}")
    ok = ("--input", corpus)
    return {
        "no input": ((), "--input is missing"),
        "missing file": (("--input", tmp_path / "no.txt"), "no.txt: not found"),
        "an old Mac's lines": (("--input", tmp_path / "mac.txt"), "tr '\\r' '\\n'"),
        "empty file": (("--input", tmp_path / "empty.txt"), "empty (0 bytes)"),
        "blank file": (("--input", tmp_path / "blank.txt"), "the corpus is empty"),
        "a folder with nothing to read": (("--input", tmp_path / "md"), "no text found there"),
        "a file named twice": (("--input", corpus, corpus), "corpus.txt: named twice"),
        "a level of nothing": ((*ok, "--level", 3), "no effect without --compress"),
        "fields of plain text": ((*ok, "--text-field", "body"), "is text, without fields"),
        "a blocklist of nearly everything": (
            (*ok, "--blocklist", tmp_path / "the.txt"),
            "most were dropped as blocklist (",
        ),
        "shards too large": ((*ok, "--shard-tokens", "2G"), "expected at most"),
        "binary file": (("--input", tmp_path / "binary.txt"), "looks binary"),
        "invalid UTF-8, strict": (("--input", tmp_path / "latin.txt", "--clean", "strict"), "invalid UTF-8 (e9"),
        "vocabulary too large": ((*ok, "--vocab-size", 60_000), "supports only"),
        "vocabulary too small": ((*ok, "--vocab-size", 100), "at least 261"),
        "val fraction": ((*ok, "--val-fraction", 2), "expected 0 to 0.5"),
        "output holds something else": ((*ok, "--output", tmp_path / "other"), "holds something else (thesis.doc)"),
        "the same with --resume": ((*ok, "--output", tmp_path / "other", "--resume"), "holds something else"),
        "output exists": ((*ok, "--output", data), "exists already and is complete"),
        "output under a file": ((*ok, "--output", tmp_path / "file" / "out"), "a part of that path is a file"),
        "another job": ((*ok, "--output", data, "--resume"), "was begun with --vocab-size 512, now it is 32000"),
        "tokenizer and its size": ((*ok, "--tokenizer", data, "--vocab-size", 300), "no effect on a given --tokenizer"),
        "characters and words": ((*ok, "--tokenizer-type", "char", "--split-pattern", "gpt2"), "no effect on --token"),
        "tokenizer missing": ((*ok, "--tokenizer", tmp_path / "no.json"), "not found"),
        "tokenizer junk": ((*ok, "--tokenizer", tmp_path / "junk.json"), "not a tokenizer.json"),
        "unknown URL": (("--input", "ftpx://host/x.txt"), "unknown kind of URL"),
    }


def test_each_user_error_is_one_line_and_writes_nothing(corpus, data, tmp_path):
    cases = bad_inputs(tmp_path, corpus, data)
    before, data_before = files(tmp_path), files(data)
    for name, (flags, says) in cases.items():
        flags = flags if "--output" in flags else (*flags, "--output", tmp_path / "out")
        assert says in error_of(prepare, *flags), name
        assert files(tmp_path) == before, name
        assert not (tmp_path / "out").exists(), name
    assert files(data) == data_before


def test_workers_are_one_or_more():
    for n in (0, -3):
        assert f"--workers {n}: expected 1 or more" in error_of(check, Settings(("a.txt",), workers=n))


@pytest.mark.parametrize("flag", ["--input", "--output", "--tokenizer", "--blocklist"])
def test_a_server_that_is_not_there_is_soon_told(corpus, monkeypatch, flag):
    monkeypatch.setattr(tokenize_bpe, "FIRST_LOOK_S", 2.0)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # and does not listen
        flags = {"--input": corpus, "--output": "d", flag: f"http://127.0.0.1:{s.getsockname()[1]}/x.txt"}
        started_s = time.monotonic()
        message = error_of(prepare, *(word for item in flags.items() for word in item))
    assert "x.txt: cannot look up: Connect call failed" in message
    assert time.monotonic() - started_s < 5


def test_as_a_real_process_an_error_is_one_line_and_exit_2(tmp_path):
    for flags, says in ((("--input", "no.txt"), "not found"), (("--inptu", "x"), "did you mean --input?")):
        done = subprocess.run(command("prep/tokenize_bpe.py", *flags), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("error: ")
        assert says in done.stderr
        assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["300k", "450k", "600k", "750k", "900k"])
def test_a_full_disk_is_one_line_and_with_room_it_resumes(corpus, tmp_path, size):
    """At whichever file the disk is full."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    flags = ("--input", corpus, "--output", disk / "d", "--vocab-size", 512, "--resume", "--workers", 1)
    try:
        done = subprocess.run(command("prep/tokenize_bpe.py", *flags), capture_output=True, text=True)
        if done.returncode == 0:
            pytest.fail(f"{size} was enough")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "--resume" in done.stderr
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        assert prepare(*flags[:-2]) == 0
        assert prepare("--input", corpus, "--output", tmp_path / "quiet", "--vocab-size", 512) == 0
        assert files(disk / "d") == files(tmp_path / "quiet")
    finally:
        subprocess.run(["umount", "-l", disk])


def test_unfinished_output_without_resume_is_refused(corpus, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(stages, "select", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare("--input", corpus, "--output", tmp_path / "d", *FLAGS)
    assert "holds an unfinished run: add --resume" in error_of(
        prepare, "--input", corpus, "--output", tmp_path / "d", *FLAGS
    )
    other = error_of(prepare, "--input", corpus, "--output", tmp_path / "d", *FLAGS, "--resume", "--seed", 9)
    assert "was begun with --seed 1, now it is 9" in other


def test_invalid_utf8_is_counted_and_replaced(corpus, tmp_path, capsys):
    dirty = tmp_path / "dirty.txt"
    dirty.write_bytes(corpus.read_bytes() + b"\n\nUser: caf\xe9 and th\xe9\nAssistant: Yes.\n")
    prepare("--input", dirty, "--output", tmp_path / "d", *FLAGS)
    assert "2 invalid UTF-8 sequences" in capsys.readouterr().err
