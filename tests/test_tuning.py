"""Tuning a trained run: what of the weights, the targets and the replayed data is promised, and that resume keeps it."""

import itertools
import json

import pytest
import torch

from gpt import lora
from gpt.loss import IGNORE_INDEX
from gpt.model import GPT, GPTConfig
from gpt.tokenizer import Tokenizer
from scripts import export, sample
from scripts.loading import load_model
from tests.helpers import error_of, prepare, result, train
from tests.test_resume import SMALL, train_until_killed
from train import checkpoint
from train.batches import Batches
from train.config import TrainConfig
from train.data import open_data
from train.replay import MixedBatches
from train.targets import make_targets

TUNE = SMALL[6:]  # what the shape is not named by: it comes from the run that is tuned
LORA = ("--lora-rank", 4, "--lora-alpha", 8)


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    """(run, a second dataset in its tokenizer's ids)."""
    folder = tmp_path_factory.mktemp("pretrained")
    assert train("--data", data, "--out", folder / "run", "--steps", 150, *SMALL) == 0
    (folder / "chat.jsonl").write_text("".join(
        json.dumps({"messages": [{"role": "user", "content": f"What follows {n}?"},
                                 {"role": "assistant", "content": f"After {n} comes {n + 1}, I am sure of it."}]}) + "\n"
        for n in range(900)
    ))  # fmt: skip
    tokenizer = folder / "run" / "tokenizer.json"
    assert prepare("--input", folder / "chat.jsonl", "--tokenizer", tokenizer, "--output", folder / "chat") == 0
    return folder / "run", folder / "chat"


# ---- what the loss looks at -----------------------------------------------------------------------------------------


def test_the_loss_looks_at_what_the_assistant_says_and_at_its_end(data):
    tokenizer = Tokenizer((data / "tokenizer.json").read_text())
    said, hi, more = (
        tokenizer.encode("It is four."),
        tokenizer.encode("Hi."),
        tokenizer.encode("Why? <|assistant|> No."),
    )
    ids = [*tokenizer.encode("the end of an unknown turn"), tokenizer.end_of_turn,
           *tokenizer.render([("system", "Be kind."), ("user", "2 + 2?"), ("assistant", "It is four."),
                              ("user", "Why? <|assistant|> No."), ("assistant", "Hi.")]),
           *tokenizer.render([("user", "Hello")]), tokenizer.role_id("assistant"), *said[:2]]  # fmt: skip
    targets = make_targets("assistant", tokenizer)(torch.tensor([ids]))
    assert targets.shape == (1, len(ids) - 1)
    learnt = [*said, tokenizer.end_of_turn, *hi, tokenizer.end_of_turn, *said[:2]]
    assert targets[targets != IGNORE_INDEX].tolist() == learnt
    where = (targets[0] != IGNORE_INDEX).nonzero().flatten() + 1
    assert [ids[i] for i in where] == learnt
    assert len(more) > 3  # the spelling of a special token inside a message was a part of it


def test_each_position_is_decided_as_a_plain_reading_would(data):
    """Against a loop over random ids, every window cut at random."""
    tokenizer = Tokenizer((data / "tokenizer.json").read_text())
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 12, (64, 40), generator=g)  # special ids are 0 to 4: about four in ten
    special, assistant = set(tokenizer.special_ids.values()), tokenizer.role_id("assistant")
    assert special == {0, 1, 2, 3, 4}
    targets = make_targets("assistant", tokenizer)(ids, replayed=2)
    for row, got in zip(ids.tolist(), targets.tolist(), strict=True):
        role, expected = None, []
        for here, after in itertools.pairwise(row):
            role = here if here in special else role
            expected.append(after if role == assistant else IGNORE_INDEX)
        assert got == (expected if row not in ids[-2:].tolist() else row[1:])
    assert torch.equal(make_targets("all", tokenizer)(ids), ids[:, 1:])


def test_any_micro_batch_gives_the_same_tuned_weights(pretrained, tmp_path):
    """Though micro-batches hold differing numbers of targets."""
    run, chat = pretrained
    flags = ("--init-from", run, "--data", chat, "--loss-on", "assistant", "--steps", 3, *TUNE)
    weights = []
    for micro in (8, 3):
        assert train(*flags, "--micro-batch", micro, "--out", tmp_path / str(micro)) == 0
        weights.append(load_model(str(tmp_path / str(micro)), device="cpu")[0].state_dict())
    moved = load_model(str(run), device="cpu")[0].state_dict()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(moved["head.weight"], weights[0]["head.weight"], atol=1e-4)


# ---- where the weights come from ------------------------------------------------------------------------------------


def test_a_run_begins_with_the_weights_of_another(pretrained, tmp_path, capsys):
    run, chat = pretrained
    newest = checkpoint.committed(str(run))[-1]
    flags = ("--data", chat, "--lr", 0, "--steps", 1, *TUNE)
    for name, given in (("run", run), ("checkpoint", run / newest.name)):
        assert train("--init-from", given, *flags, "--out", tmp_path / name) == 0
        assert f"tunes      {newest.name} of {given}; loss on all" in capsys.readouterr().out
        assert_same_weights(run, tmp_path / name)
    record = checkpoint.load(
        str(tmp_path / "run"), checkpoint.committed(str(tmp_path / "run"))[-1], ("state.json",)
    ).state
    assert record["base"] == {"checkpoint": newest.name, "sha256": newest.parts["model.safetensors"]["sha256"]}


def assert_same_weights(one, other):
    a, b = (load_model(str(run), device="cpu")[0].state_dict() for run in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_does_not_fit_is_one_line(pretrained, data, tmp_path):
    run, chat = pretrained
    flags = ("--init-from", run, "--data", chat, "--out", tmp_path / "out", "--steps", 1, *TUNE)

    def error(*more):
        message = error_of(train, *flags, *more)
        assert not (tmp_path / "out").exists()
        return message

    assert "--n-embd 64: the run of --init-from has 32" in error("--n-embd", 64)
    assert "no checkpoint there" in error("--init-from", tmp_path / "nothing")
    assert "go together" in error("--replay", data)
    assert "name it with --init-from" in error_of(train, "--data", data, "--out", tmp_path / "out", *LORA)
    assert "expected 1 to 16" in error("--lora-rank", 17)
    (tmp_path / "plain.txt").write_text("\n\n".join(f"It was day {i} of many." for i in range(3000)))
    assert (
        prepare("--input", tmp_path / "plain.txt", "--tokenizer", run / "tokenizer.json", "--output", tmp_path / "p")
        == 0
    )
    assert "holds no conversations" in error("--data", tmp_path / "p", "--loss-on", "assistant")
    assert prepare("--input", tmp_path / "plain.txt", "--vocab-size", 300, "--output", tmp_path / "other") == 0
    assert "its ids are not those of" in error("--data", tmp_path / "other")
    assert "its ids are not those of" in error("--replay", tmp_path / "other", "--replay-share", 0.5)


# ---- replay ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 0.93])
def test_replayed_windows_have_their_share_and_each_is_read_once_an_epoch(pretrained, data, share):
    _, chat = pretrained
    config = TrainConfig(data=str(chat), replay=str(data), replay_share=share, block_size=32, batch=8)
    opened = open_data(config)
    batches = opened.batches(config)
    assert isinstance(batches, MixedBatches)
    opened.begin(config, batches, 0, 300)
    assert opened.ready(lambda: False)
    main, replay = [], []
    for step in range(300):
        rows, n = batches.batch_at(step), batches.replayed(step)
        assert len(rows) == 8
        assert abs(n - 8 * share) < 1
        main += [row.tobytes() for row in rows[: 8 - n]]
        replay += [row.tobytes() for row in rows[8 - n :]]
    opened.close()
    assert len(replay) / 2400 == pytest.approx(share, abs=1 / 2400)
    for source, got in ((opened.train, main), (opened.replay.train, replay)):
        alone = Batches(source, block_size=32, batch=8, seed=1, lengths=source.lengths)
        assert got == [row.tobytes() for row in alone.windows(0, len(got))]


# ---- LoRA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_merged_weights_give_the_logits_of_the_adapters(arch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=32, arch=arch)).double()
    torch.nn.init.normal_(model.head.weight)
    ids = torch.randint(0, 64, (3, 16))
    before = model(ids)
    lora.add_adapters(model, rank=4, alpha=8)
    assert torch.equal(model(ids), before)  # B is zero
    moving = {name for name, p in model.named_parameters() if p.requires_grad}
    matrices = ("attn.qkv", "attn.proj", *(("mlp.gate",) if arch == "modern" else ()), "mlp.up", "mlp.down")
    assert moving == {f"blocks.{i}.{m}.lora_{ab}" for i in range(2) for m in matrices for ab in "ab"}
    for name, p in model.named_parameters():
        if name in moving:
            torch.nn.init.normal_(p, std=0.3)
    adapted = model(ids)
    plain = GPT(model.config).double()
    plain.load_state_dict(lora.merged(model.state_dict(), alpha=8))
    assert (adapted - before).abs().max() > 1
    torch.testing.assert_close(plain(ids), adapted)  # float64: to seven digits


def test_only_the_adapters_move_and_programs_use_them_merged(pretrained, tmp_path, capsys):
    run, chat = pretrained
    flags = ("--init-from", run, "--data", chat, "--loss-on", "assistant", "--lr", 1e-2, "--steps", 40, *TUNE, *LORA)
    assert train(*flags, "--out", tmp_path / "out") == 0
    assert "loss on assistant; LoRA of rank 4, alpha 8: 4096 parameters" in capsys.readouterr().out
    found = checkpoint.load(str(tmp_path / "out"), checkpoint.committed(str(tmp_path / "out"))[-1])
    base = load_model(str(run), device="cpu")[0].state_dict()
    stored, moments = found.tensors["model.safetensors"], found.tensors["optimizer.safetensors"]
    assert all(torch.equal(stored[name], tensor) for name, tensor in base.items())
    assert {name.rpartition("/")[0] for name in moments} == stored.keys() - base.keys()
    adapted = GPT(GPTConfig(**found.state["model"]))
    lora.add_adapters(adapted, rank=4, alpha=8)
    adapted.load_state_dict(stored)
    ids = torch.randint(0, 512, (2, 32))
    model, _ = load_model(str(tmp_path / "out"), device="cpu")
    torch.testing.assert_close(model(ids), adapted.eval()(ids), rtol=1e-4, atol=1e-5)
    assert sample.main(["--run", str(tmp_path / "out"), "--prompt", "What follows 7?", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.strip()
    assert export.main(["--run", str(tmp_path / "out"), "--to", "torch", "--output", str(tmp_path / "torch")]) == 0
    losses = [m["loss"] for m in result(tmp_path / "out")["metrics"] if "loss" in m]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])  # and it learns


def test_a_tuned_run_can_be_tuned_again(pretrained, tmp_path):
    run, chat = pretrained
    flags = ("--data", chat, "--steps", 2, *TUNE)
    assert train("--init-from", run, *flags, *LORA, "--lr", 1e-2, "--out", tmp_path / "one") == 0
    assert train("--init-from", tmp_path / "one", *flags, "--lr", 0, "--out", tmp_path / "two") == 0
    assert_same_weights(tmp_path / "one", tmp_path / "two")


# ---- resume ---------------------------------------------------------------------------------------------------------

CASES = {
    "assistant, replay": ("--loss-on", "assistant", "--replay-share", 0.3),
    "lora": (*LORA, "--loss-on", "assistant", "--dropout", 0.2, "--micro-batch", 3),
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_equals_uninterrupted_bit_for_bit(pretrained, data, tmp_path, monkeypatch, case):
    run, chat = pretrained
    replay = ("--replay", data) if "replay" in case else ()
    flags = (
        "--init-from",
        run,
        "--data",
        chat,
        *replay,
        "--steps",
        20,
        "--save-every",
        7,
        "--resume",
        *TUNE,
        *CASES[case],
    )
    assert train(*flags, "--out", tmp_path / "quiet") == 0
    for step in (3, 10, 4):  # before the first commit; after the one at 7; after the one at 7 again
        train_until_killed(monkeypatch, step, *flags, "--out", tmp_path / "killed")
    again = flags[2:]  # what the checkpoint has need not be named, and the run that was begun with can be gone
    assert train(*again, "--out", tmp_path / "killed") == 0
    assert result(tmp_path / "killed") == result(tmp_path / "quiet")


def test_resume_asks_for_what_the_checkpoint_was_tuned_with(pretrained, data, tmp_path):
    run, chat = pretrained
    flags = ("--data", chat, "--resume", "--out", tmp_path / "out", *TUNE)
    begun = ("--init-from", run, "--replay", data, "--replay-share", 0.25, *LORA)
    assert train(*flags, *begun, "--steps", 2) == 0
    assert "--replay DIR and --replay-share" in error_of(train, *flags, "--steps", 4)
    assert "is not what this run replays" in error_of(train, *flags, "--replay", chat, "--steps", 4)
    assert "--lora-rank 2: the checkpoint was trained with 4" in error_of(train, *flags, *begun, "--lora-rank", 2)
    assert "--init-from" in error_of(train, *flags, *begun, "--init-from", tmp_path)
    assert train(*flags, "--replay", data, "--steps", 4) == 0
