"""A GGUF file holds exactly the model and its tokenizer; two independent readers compute what we do."""

import importlib.util
import itertools
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken, pre_tokenizers

from gpt.model import GPTConfig
from gpt.sample import generate
from gpt.tokenizer import SPLIT_PATTERNS, Tokenizer, add_special_tokens, blank_tokenizer
from scripts import check_gguf, export
from scripts.loading import load_model
from scripts.to_gguf import gguf_tensors, vocabulary, write_gguf
from tests.helpers import error_of
from tests.test_model import SHAPES, noisy

gguf = pytest.importorskip("gguf")
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 16}
ALL_SHAPES = [*SHAPES, {"arch": "modern"}, {"arch": "modern", "tied": True, "n_ff": 24}]
# transformers' reader leaves these to its config's defaults: GPT-2's context and MLP, the width of Qwen3's heads
READABLE = {"gpt2": {"block_size": 1024, "n_ff": None}, "modern": {"n_head": 1, "n_embd": 128}}


@pytest.fixture(scope="module")
def tokenizer(data):
    return Tokenizer((data / "tokenizer.json").read_text("utf-8"))


def written(path, shape, tokenizer, float_type="f32"):
    model = noisy(GPTConfig(**{**TINY, "block_size": 32, **shape, "vocab_size": tokenizer.vocab_size}))
    write_gguf(path, model, tokenizer, float_type=float_type)
    return model


@pytest.mark.parametrize("shape", ALL_SHAPES, ids=str)
@torch.no_grad()
def test_transformers_reads_it_and_agrees(shape, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("transformers 4.50 does not load a GGUF file of this gguf's")
    model = written(tmp_path / "m.gguf", {**shape, **READABLE[shape.get("arch", "gpt2")]}, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").eval()
    ids = torch.randint(tokenizer.vocab_size, (2, 31), generator=torch.Generator().manual_seed(1))
    logits = model(ids)
    assert logits.std() > 0.5
    assert (theirs(ids).logits - logits).abs().max() < 1e-4


@pytest.mark.parametrize("shape", ALL_SHAPES, ids=str)
def test_every_number_is_there_exactly(shape, tokenizer, tmp_path):
    """And nothing else but the zero biases that llama.cpp's GPT-2 asks for."""
    model = written(tmp_path / "m.gguf", shape, tokenizer)
    stored = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    tensors = gguf_tensors(model)
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensors[name]) for name in stored)
    zeros = sum(t.numel() for t in tensors.values() if not t.any())
    assert sum(t.numel() for t in tensors.values()) == model.num_params() + zeros
    assert (zeros > 0) == (shape.get("bias", True) is False or shape.get("qkv_bias", True) is False)


def test_f16_halves_matrices_alone_and_refuses_what_it_cannot_hold(tokenizer, tmp_path):
    model = written(tmp_path / "m.gguf", {}, tokenizer, "f16")
    for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors:
        halved = len(t.shape) == 2 and t.name != "position_embd.weight"
        assert t.tensor_type == (gguf.GGMLQuantizationType.F16 if halved else gguf.GGMLQuantizationType.F32), t.name
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[0, 0] = 70_000.0
    assert "blk.1.ffn_up.weight holds a number that f16 cannot: use f32" in error_of(
        lambda: write_gguf(tmp_path / "n.gguf", model, tokenizer, float_type="f16")
    )


def test_the_tokenizer_goes_along(tokenizer, tmp_path):
    written(tmp_path / "m.gguf", {}, tokenizer)
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens == [tokenizer.reference.id_to_token(i) for i in range(tokenizer.vocab_size)]
    types = fields["tokenizer.ggml.token_type"].contents()
    special = {i for i, t in enumerate(types) if t == gguf.TokenType.CONTROL}
    assert special == set(tokenizer.special_ids.values())
    assert fields["tokenizer.ggml.bos_token_id"].contents() == tokenizer.end_of_text
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.end_of_turn
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-4o"


def test_each_split_pattern_has_the_name_that_gave_our_ids():
    """In llama.cpp, on 20,000 lines of conversation; not "llama-bpe", which lets a word in the vocabulary skip the merges."""
    names = {}
    for split, pattern in SPLIT_PATTERNS.items():
        reference = blank_tokenizer(pattern)
        add_special_tokens(reference)
        names[split] = vocabulary(Tokenizer(reference.to_str()))[3]
    assert names == {"gpt2": "gpt-2", "cl100k": "dbrx", "o200k": "gpt-4o"}


def test_gpt2s_own_tokenizer_and_tokens_that_are_not_special():
    """transformers' GPT-2 leaves the cutting to ByteLevel, whose built-in pattern is the same."""
    reference = blank_tokenizer("x")
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    add_special_tokens(reference)
    reference.add_tokens([AddedToken("Perennial", special=False)])
    tokens, types, _, pre = vocabulary(Tokenizer(reference.to_str()))
    assert pre == "gpt-2"
    assert [types[tokens.index(t)] for t in ("<|user|>", "Perennial")] == ["CONTROL", "USER_DEFINED"]
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert "no name" in error_of(vocabulary, Tokenizer(reference.to_str()))


@pytest.mark.parametrize("change", ["pattern", "normalizer", "ignore_merges"])
def test_text_that_llama_cpp_would_cut_otherwise_is_refused(change, tokenizer):
    data = json.loads(tokenizer.json_text)
    if change == "pattern":
        data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\W"
    elif change == "normalizer":
        data["normalizer"] = {"type": "NFC"}
    else:
        data["model"]["ignore_merges"] = True
    assert "no name for the way this tokenizer.json cuts text" in error_of(vocabulary, Tokenizer(json.dumps(data)))


def test_the_modelfile_says_what_render_does(run_folder, tmp_path):
    """Ollama fills the template of each message; beside the beginning, which llama.cpp adds, it must be our rendering."""
    assert export.main(["--run", str(run_folder), "--to", "gguf", "--output", str(tmp_path / "g")]) == 0
    text = (tmp_path / "g" / "Modelfile").read_text("utf-8")
    assert text.startswith("FROM ./model-f16.gguf\n")
    assert (tmp_path / "g" / "model-f16.gguf").exists()
    template = text.split('"""')[1]
    begin, _, rest = template.partition("{{ range .Messages }}")
    turn, _, reply = rest.partition("{{ end }}")
    messages = [("system", "Be brief."), ("user", "Hi there"), ("assistant", "Hello.")]
    filled = begin + "".join(turn.replace("{{ .Role }}", r).replace("{{ .Content }}", c) for r, c in messages) + reply
    ours = Tokenizer((run_folder / "tokenizer.json").read_text("utf-8"))
    assert "<|endoftext|>" + filled == ours.decode(ours.render(messages, reply=True))
    assert 'PARAMETER stop "<|end|>"' in text
    assert "PARAMETER num_ctx 32" in text


class Llama:
    """What check_gguf.py asks of llama.cpp, answered by our own model; `wrong_at` is where it goes astray."""

    run_folder, wrong_at = None, None

    def __init__(self, path, **options):
        self.model, self.tokenizer = load_model(str(self.run_folder), device="cpu")
        self.special = Tokenizer(self.tokenizer.json_text).reference
        self.special.encode_special_tokens = False

    def tokenize(self, text, *, add_bos, special):
        return [self.tokenizer.end_of_text, *self.special.encode(text.decode(), add_special_tokens=False).ids]

    def generate(self, ids, **options):
        for i in itertools.count():
            [following] = generate(self.model, [ids], max_tokens=1, temperature=0.0)[0]
            ids = [*ids, following]
            yield following + 1 if i == self.wrong_at else following

    def reset(self):
        pass

    def eval(self, ids):
        self.scores = self.model(torch.tensor([ids]))[0].detach().numpy()


def check(monkeypatch, run, wrong_at=None, flags=()):
    fake = type("Fake", (Llama,), {"run_folder": run, "wrong_at": wrong_at})
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=fake, __version__="0"))
    return check_gguf.main(["--run", str(run), *flags])


def test_all_64_tokens_of_each_prompt_are_compared(roomy_run, monkeypatch, capsys):
    assert check(monkeypatch, roomy_run) == 0
    told = capsys.readouterr().out
    assert told.count("same 64 ") == 2 * len(check_gguf.PROMPTS) == 20
    assert "same text  20 of 20, 64 tokens each" in told
    assert check(monkeypatch, roomy_run, wrong_at=63) == 1  # the very last
    assert capsys.readouterr().out.count("DIFFERENT") == 20


def test_a_model_without_room_for_the_comparison_is_refused(run_folder, monkeypatch):
    message = error_of(check, monkeypatch, run_folder)
    assert message.startswith("--max-tokens 64: the model's block size, 32, holds at most ")
    assert "name a run with a larger one" in message
    room = int(message.split("at most ")[1].split()[0])
    assert check(monkeypatch, run_folder, flags=("--max-tokens", str(room))) == 0
    assert "--max-tokens" in error_of(check, monkeypatch, run_folder, None, ("--max-tokens", str(room + 1)))


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is built from its source")
def test_llama_cpp_says_the_same(roomy_run, capsys):
    """Ten prompts, as chat and as text, 64 tokens after each."""
    assert check_gguf.main(["--run", str(roomy_run)]) == 0
    assert capsys.readouterr().out.count("same 64 ") == 20
