"""Scores are what they are said to be: every token asked for once, and equal to transformers' for the same weights."""

import hashlib
import json
import math
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gpt.errors import GPTError
from gpt.model import GPT, GPTConfig
from gpt.score import id_losses, text_losses, windows
from gpt.tokenizer import Tokenizer
from scripts import check_hellaswag, evaluate, hellaswag
from scripts.hellaswag import Choice, Item
from scripts.loading import load_model
from store.shards import TokenShards
from tests.helpers import error_of
from tests.test_model import TINY, noisy, random_ids, reference
from train.batches import validation_windows
from train.precision import choose_machine
from train.step import validation_loss

TEXT = "Bees make honey, and nobody knows why.\n\nÉcole ☃ 12,345! " * 12
ITEMS = [
    {"ctx": "A spider has", "endings": ["eight legs.", "no legs at all, they say.", "honey.", "3"], "label": 0},
    {"ctx": "Bees make " * 9 + "so", "endings": ["much honey.", "a", "noise, noise, noise.", "it is."], "label": "2"},
    {"ctx": "The capital of France", "endings": ["is Paris.", "is Rome.", "is", "was."], "label": 3},
]


@pytest.fixture
def items_file(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in ITEMS), "utf-8")
    return path


def figures(capsys, *arguments):
    """What evaluate.py prints with --json: nothing else is on stdout."""
    capsys.readouterr()
    assert evaluate.main([*map(str, arguments), "--device", "cpu", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("length", [1, 4, 7])
@pytest.mark.parametrize("n", range(1, 20))
def test_every_id_but_the_first_is_asked_for_once_with_enough_before_it(n, length):
    for stride in range(1, length + 1):
        asked = []
        for begin, end, first in windows(n, length=length, stride=stride):
            assert 0 <= begin < end <= begin + length
            asked += range(first, end + 1)
            assert first - begin >= min(first, length - stride + 1)  # ids read before the first one asked for
        assert asked == list(range(1, n))


def test_a_stride_that_leaves_ids_out_is_refused():
    for stride in (0, 5):
        with pytest.raises(GPTError, match="expected 1 to the window's 4"):
            list(windows(9, length=4, stride=stride))


def test_rows_of_any_length_score_as_each_by_itself():
    model = noisy(GPTConfig(**TINY))
    rows = [random_ids(n, seed=n).tolist() for n in (2, 17, 9)]
    for row, losses in zip(rows, id_losses(model, rows), strict=True):
        logits = model(torch.tensor([row[:-1]]))[0]
        torch.testing.assert_close(losses, F.cross_entropy(logits, torch.tensor(row[1:]), reduction="none"))


@pytest.mark.parametrize(("length", "stride"), [(15, 15), (15, 4), (15, 1), (7, 7)])
@torch.no_grad()
def test_perplexity_equals_transformers(length, stride):
    """Its guide's own procedure, with labels of -100 for what is context only (docs: Perplexity of fixed-length models)."""
    model = noisy(GPTConfig(**TINY))
    theirs = reference(model)
    ids = random_ids(1, 200)
    nats, n_asked, previous_end = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + length + 1, ids.shape[1])
        labels = ids[:, begin:end].clone()
        if previous_end:
            labels[:, : previous_end - begin] = -100
        n = int((labels[:, 1:] != -100).sum())  # it shifts them by one
        if n:
            nats += float(theirs(ids[:, begin:end], labels=labels).loss) * n
        n_asked, previous_end = n_asked + n, end
        if end == ids.shape[1]:
            break
    losses = torch.cat(list(text_losses(model, ids[0].numpy(), length=length, stride=stride, batch=3)))
    assert len(losses) == n_asked == 199
    assert math.exp(losses.double().mean()) == pytest.approx(math.exp(nats / n_asked), rel=1e-5)


def test_bits_per_byte_of_a_model_that_knows_nothing(run_folder, tmp_path):
    """All ids equally likely: log2 of their number for every token, whatever the bytes."""
    tokenizer = Tokenizer((run_folder / "tokenizer.json").read_text("utf-8"))
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=16, n_layer=1, n_head=1, n_embd=8)).eval()
    torch.nn.init.zeros_(model.head.weight)
    args = evaluate.EvaluateFlags()
    ids = tokenizer.encode(TEXT)
    found = evaluate.score(model, tokenizer, [np.array([tokenizer.end_of_text, *ids])], len(ids) + 1, args)
    assert (found.tokens, found.text_bytes) == (len(ids), len(TEXT.encode()))
    assert found.loss == pytest.approx(math.log(tokenizer.vocab_size), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(
        math.log2(tokenizer.vocab_size) * len(ids) / len(TEXT.encode()), rel=1e-6
    )
    chat = tokenizer.render([("user", TEXT), ("assistant", "Hi.")])
    found = evaluate.score(model, tokenizer, [np.array(chat)], len(chat), args)
    assert found.tokens == len(chat) - 1
    assert found.text_bytes == len((TEXT + "Hi.").encode())  # four special tokens: no bytes, and no bits
    n_text = len(ids) + len(tokenizer.encode("Hi."))
    assert found.text_nats == pytest.approx(n_text * math.log(tokenizer.vocab_size), rel=1e-6)


def test_a_text_file_and_a_split(run_folder, data, tmp_path, capsys):
    (tmp_path / "t.txt").write_text(TEXT, "utf-8")
    found = figures(capsys, "--run", run_folder, "--text", tmp_path / "t.txt", "--data", data, "--stride", 8)
    assert found[str(tmp_path / "t.txt")]["bytes"] == len(TEXT.encode())
    val = TokenShards(str(data)).split("val")
    assert found["val"]["tokens"] == sum(s.tokens - 1 for s in val)
    assert found["val"]["loss"] < found[str(tmp_path / "t.txt")]["loss"]  # it was trained on such
    assert found["val"]["perplexity"] == pytest.approx(math.exp(found["val"]["loss"]))


def test_a_splits_loss_is_the_one_training_would_log(run_folder, data, capsys):
    shards = TokenShards(str(data))
    first = shards.split("train")[0]
    model, _ = load_model(str(run_folder), device="cpu")
    block, n = model.config.block_size, 40
    ids = validation_windows([shards.read(first, 0, n * block + 1)], block_size=block, tokens=n * block)
    logged = validation_loss(
        model, ids, micro_batch=7, machine=choose_machine("cpu", "fp32", "off"), stop=lambda: False
    )
    found = figures(capsys, "--run", run_folder, "--data", data, "--split", "train", "--tokens", n * block + 1)
    assert found["train"]["tokens"] == n * block
    assert found["train"]["loss"] == pytest.approx(logged, abs=1e-5)


@torch.no_grad()
def test_hellaswag_asks_for_the_endings_alone(run_folder, items_file):
    """One row by itself at a time; the second context does not fit: what is cut off is its beginning."""
    model, tokenizer = load_model(str(run_folder), device="cpu")
    items = hellaswag.read_items(items_file)
    block, was_cut = model.config.block_size, False
    for item, choice in zip(items, hellaswag.choices(model, tokenizer, items), strict=True):
        for i, ending in enumerate(item.endings):
            context, ids = tokenizer.encode(item.context), tokenizer.encode(" " + ending)
            was_cut |= len(context + ids) > block + 1
            row = (context + ids)[-block - 1 :]
            logp = F.log_softmax(model(torch.tensor([row[:-1]]))[0].double(), -1)
            expected = -sum(float(logp[len(row) - 1 - len(ids) + j, t]) for j, t in enumerate(ids))
            assert choice.nats[i] == pytest.approx(expected, abs=1e-3)
            assert choice.tokens[i] == len(ids)
            assert choice.characters[i] == len(ending)
    assert was_cut


def test_accuracies_worked_by_hand():
    choice = Choice(nats=(6.0, 5.0, 9.0, 8.0), tokens=(2, 1, 4, 2), characters=(12, 2, 3, 40))
    assert (choice.by(), choice.by(choice.tokens), choice.by(choice.characters)) == (1, 2, 3)
    items = [Item("c", ("a", "b", "c", "d"), label) for label in (1, 2, 2, 3)]
    found = hellaswag.accuracies(items, [choice] * 4)
    assert found == {"acc": 0.25, "acc_norm": 0.5, "acc_norm_lm_eval": 0.25}


def test_hellaswags_file_is_proved_and_fetched_once(items_file, tmp_path, monkeypatch):
    monkeypatch.setenv("PERENNIAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hellaswag, "URL", str(items_file))
    assert "sha256 differs" in error_of(hellaswag.download)
    assert not list((tmp_path / "cache").rglob("*.jsonl"))
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(items_file.read_bytes()).hexdigest())
    path = hellaswag.download()
    items_file.unlink()
    assert hellaswag.download() == path
    assert [item.label for item in hellaswag.read_items(path)] == [0, 2, 3]
    path.write_text("damaged")
    items_file.write_text("".join(json.dumps(item) + "\n" for item in ITEMS), "utf-8")
    assert len(hellaswag.read_items(hellaswag.download())) == 3


@pytest.mark.parametrize("line", ["{", '{"ctx": "a"}', '{"ctx": "a", "endings": ["b", ""], "label": 0}', "[1]",
                                  '{"ctx": "a", "endings": ["b", "c"], "label": 2}'])  # fmt: skip
def test_a_line_that_is_no_item_is_named(line, items_file):
    items_file.write_text(json.dumps(ITEMS[0]) + "\n" + line + "\n", "utf-8")
    assert "line 2 is no item with ctx, endings and label" in error_of(hellaswag.read_items, items_file)
    assert len(hellaswag.read_items(items_file, limit=1)) == 1


def test_answers_over_the_course_of_training(run_folder, capsys):
    found = figures(capsys, "--run", run_folder, "--answers")["answers"]
    assert [row["step"] for row in found] == [6, 12]
    said = found[1]["answers"]["What is the capital of France?"]
    assert f"sample     What is the capital of France? -> {said}\n" in (
        run_folder / "samples" / "step-00000012.txt").read_text()  # fmt: skip
    metrics = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert found[1]["val_loss"] == next(m["val_loss"] for m in metrics if m["step"] == 12 and "val_loss" in m)
    found[1]["answers"]["What is the capital of France?"] = "a | b"
    table = evaluate.table(found).splitlines()
    assert table[0] == "| step | val loss | What is the capital of France? | Hello! How are you? |"
    assert "| a \\| b |" in table[3]


def test_what_cannot_be_scored_is_one_clear_line(run_folder, data, tmp_path):
    def error(*arguments):
        return error_of(evaluate.main, ["--run", str(run_folder), "--device", "cpu", *map(str, arguments)])

    (tmp_path / "empty.txt").write_text("")
    assert "nothing to do" in error()
    assert "is empty" in error("--text", tmp_path / "empty.txt")
    assert "expected 1 to the model's block size, 32" in error("--data", data, "--window", 33)
    assert "stride 40: expected 1 to the window's 32" in error("--data", data, "--stride", 40)
    assert "cannot be read" in error("--hellaswag", tmp_path / "none.jsonl")
    shutil.copytree(run_folder, tmp_path / "mute", ignore=shutil.ignore_patterns("samples"))
    assert "has no samples" in error_of(evaluate.main, ["--run", str(tmp_path / "mute"), "--answers"])
    other = json.loads((data / "tokenizer.json").read_text())
    other["version"] = "1.0 "
    changed = tmp_path / "other"
    shutil.copytree(data, changed)
    (changed / "tokenizer.json").write_text(json.dumps(other))
    metadata = json.loads((changed / "metadata.json").read_text())
    metadata["tokenizer_sha256"] = hashlib.sha256((changed / "tokenizer.json").read_bytes()).hexdigest()
    (changed / "metadata.json").write_text(json.dumps(metadata))
    assert "was made with another tokenizer than the model's" in error("--data", changed)


@pytest.mark.parametrize("weights", ["trained", "noisy"])
@torch.no_grad()
def test_perplexity_of_a_real_text_equals_transformers(run_folder, tmp_path, weights):
    """The file named by PERENNIAL_WIKITEXT, such as WikiText-2's wiki.test.raw, in our tokens; windows that overlap.

    In a short run the context hardly counts yet; with noisy weights a slip in what is read shows. The losses are transformers' own.
    """
    path = os.environ.get("PERENNIAL_WIKITEXT")
    if not path:
        pytest.skip("PERENNIAL_WIKITEXT names no file")
    text = Path(path).read_bytes()[:20_000].decode("utf-8", "ignore")
    (tmp_path / "text.txt").write_text(text, "utf-8", newline="")
    model, tokenizer = load_model(str(run_folder), device="cpu")
    model = noisy(model.config) if weights == "noisy" else model
    length, stride = model.config.block_size - 1, 8  # transformers' loss reads the last id too
    args = evaluate.EvaluateFlags(text=(str(tmp_path / "text.txt"),), window=length, stride=stride)
    [(_, streams, n_ids)] = evaluate.texts(args, tokenizer)
    ours = evaluate.score(model, tokenizer, streams, n_ids, args).figures()
    ids = torch.tensor([tokenizer.end_of_text, *tokenizer.encode(text)])
    theirs, nats, asked = reference(model), 0.0, 1
    for begin in range(0, len(ids) - 1, stride):
        row = ids[begin : begin + length + 1]
        labels = row.clone()
        labels[: asked - begin] = -100
        if n := int((labels[1:] != -100).sum()):
            nats += float(theirs(row[None], labels=labels[None]).loss) * n
            asked += n
    assert ours["tokens"] == asked - 1 == len(ids) - 1
    assert ours["bytes"] == len(text.encode())
    perplexity = math.exp(nats / (asked - 1))
    print(f"{len(ids) - 1} tokens: perplexity {ours['perplexity']:.6f}, transformers' {perplexity:.6f}")
    assert ours["perplexity"] == pytest.approx(perplexity, rel=1e-4)


def test_lm_eval_gives_the_same_score(roomy_run, tmp_path, capsys):
    """Of 200 items: those of the file that PERENNIAL_HELLASWAG names, or others of the same form."""
    pytest.importorskip("lm_eval")
    path = os.environ.get("PERENNIAL_HELLASWAG")
    if not path:
        path, rng = tmp_path / "items.jsonl", random.Random(1)
        words = TEXT.split()[:9]
        items = [
            {"ctx": " ".join(rng.choices(words, k=rng.randint(3, 20))), "label": rng.randrange(4),
             "endings": [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(4)]}
            for _ in range(210)
        ]  # fmt: skip
        path.write_text("".join(json.dumps(item) + "\n" for item in items), "utf-8")
    assert check_hellaswag.main(["--run", str(roomy_run), "--hellaswag", str(path)]) == 0
    assert "\n200 items; " in capsys.readouterr().out
