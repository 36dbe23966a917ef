"""What is exported gives the same logits, ids and text where it is read, without a network."""

import json

import pytest
import torch

from gpt.sample import generate
from scripts import export
from scripts.loading import load_model
from tests.helpers import error_of, train
from tests.test_resume import SMALL


@pytest.fixture(scope="module")
def run_folder(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "out"
    assert train("--data", data, "--steps", 12, "--save-every", 6, *SMALL, "--sample-every", 6, "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def exported(run_folder):
    folder = run_folder.parent / "hf"
    assert export.main(["--run", str(run_folder), "--output", str(folder)]) == 0
    return folder


def test_transformers_loads_the_folder_and_agrees(run_folder, exported, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    ours, our_tokenizer = load_model(str(run_folder), device="cpu")

    ids = torch.randint(5, ours.config.vocab_size, (2, 31), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids)).abs().max() < 1e-4
    chat = [("user", "Hello there!"), ("assistant", "Hi."), ("user", "Ça va?  Good ☃")]
    messages = [{"role": role, "content": text} for role, text in chat]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(rendered) == our_tokenizer.render(chat, reply=True)
    with pytest.raises(Exception, match="unknown role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])

    stops = theirs.generation_config.eos_token_id
    assert stops == [our_tokenizer.end_of_turn, our_tokenizer.end_of_text]
    with torch.no_grad():
        prompt = torch.tensor([rendered[:12]])
        out = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12)
    said = generate(ours, [rendered[:12]], max_tokens=12, temperature=0.0, stop_ids=tuple(stops))[0]
    assert [t for t in out[0].tolist()[12:] if t not in stops] == said


def test_the_model_card_tells_of_the_run(exported):
    card = (exported / "README.md").read_text()
    assert "12 steps of 8 x 32" in card
    assert "| validation loss |" in card
    assert "What is the capital of France?" in card
    assert str(exported.parent) not in card  # nothing of this machine


def test_torch_export_is_the_model_itself(run_folder, tmp_path):
    from safetensors.torch import load_file

    from gpt.model import GPT, GPTConfig

    assert export.main(["--run", str(run_folder), "--to", "torch", "--output", str(tmp_path / "t"), "--step", "6"]) == 0
    model = GPT(GPTConfig(**json.loads((tmp_path / "t" / "model.json").read_text())))
    model.load_state_dict(load_file(tmp_path / "t" / "model.safetensors"))
    ours, _ = load_model(str(run_folder), device="cpu", step=6)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), ours.state_dict().values(), strict=True))


def test_a_folder_that_holds_something_is_refused_and_kept(run_folder, tmp_path):
    (tmp_path / "mine").write_text("precious")
    assert "is not empty" in error_of(export.main, ["--run", str(run_folder), "--output", str(tmp_path)])
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    assert "no checkpoint of step 7" in error_of(
        export.main, ["--run", str(run_folder), "--output", str(tmp_path / "x"), "--step", "7"]
    )
    assert not (tmp_path / "x").exists()
