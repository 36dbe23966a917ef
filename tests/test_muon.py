"""--optimizer muon: which parameters it moves, that a bad step moves none, and that its state survives a kill."""

import pytest
import torch
from safetensors.torch import load_file

from gpt.model import GPT
from gpt.presets import preset
from scripts import export
from scripts.loading import load_model
from tests.helpers import error_of, result, train
from tests.test_resume import SMALL, train_until_killed
from tests.test_step import some_ids, step
from train import checkpoint
from train.optim import ADAMW_LR_SCALE, _step_and_undo, make_optimizer, optimizer_tensors
from train.parallel import ALONE
from train.precision import Machine

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch below 2.9 has no Muon")
RECIPE = ("--arch", "modern", "--optimizer", "muon", "--schedule", "wsd")


def setup(dtype=torch.float32, arch="modern"):
    torch.manual_seed(1)
    machine = Machine(torch.device("cpu"), dtype, False)
    model = GPT(preset("tiny", vocab_size=300, block_size=32, n_embd=32, n_head=2, arch=arch))
    optimizer = make_optimizer("muon", model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, device_type="cpu")
    return machine, model, optimizer, machine.grad_scaler()


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_muon_has_the_matrices_inside_the_blocks_and_adamw_the_rest(arch):
    _, model, optimizer, _ = setup(arch=arch)
    muon, adamw = optimizer.parts
    names = {p: name for name, p in model.named_parameters()}
    of_muon = {names[p] for group in muon.param_groups for p in group["params"]}
    of_adamw = [names[p] for group in adamw.param_groups for p in group["params"]]
    assert {n.split(".", 2)[2] for n in of_muon} == {
        "attn.qkv.weight", "attn.proj.weight", "mlp.up.weight", "mlp.down.weight",
        *(["mlp.gate.weight"] if arch == "modern" else []),
    }  # fmt: skip
    assert sorted([*of_muon, *of_adamw]) == sorted(names.values())
    assert {"wte.weight", "head.weight", "ln_f.weight"} <= set(of_adamw)
    kinds = {n.rpartition("/")[2] for n in optimizer_tensors(model, optimizer) if n.rpartition("/")[0] in of_muon}
    assert kinds == {"momentum_buffer"}


def test_one_learning_rate_leads_both():
    machine, model, optimizer, scaler = setup()
    step(machine, model, optimizer, scaler, some_ids())  # at 1e-3
    muon, adamw = optimizer.parts
    assert {group["lr"] for group in muon.param_groups} == {1e-3}
    assert {group["lr"] for group in adamw.param_groups} == {1e-3 * ADAMW_LR_SCALE}


def test_a_muon_step_is_of_adamws_size_and_every_direction_counts_alike():
    """0.2 lr in each number, root mean square; of singular values that are all about equal (Newton-Schulz: 0.7 to 1.2)."""
    machine, model, optimizer, scaler = setup()
    with torch.no_grad():  # at its initial zero the head lets no gradient through
        model.head.weight.normal_(0.0, 0.02)
    weight = model.blocks[0].mlp.up.weight
    before = weight.detach().clone()
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    step(machine, model, optimizer, scaler, some_ids())
    moved = weight.detach() - before
    assert moved.square().mean().sqrt().item() == pytest.approx(0.2e-3, rel=0.3)
    singular = torch.linalg.svdvals(moved)
    assert singular.max() / singular.median() < 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_is_no_number_leaves_weights_and_both_optimizers_alone(dtype, first):
    machine, model, optimizer, scaler = setup(dtype)
    for good in range(0 if first else 3):
        step(machine, model, optimizer, scaler, some_ids(good))
    before = {k: t.clone() for k, t in {**model.state_dict(), **optimizer_tensors(model, optimizer)}.items()}
    handle = model.blocks[0].mlp.up.weight.register_hook(lambda g: g * float("nan"))
    step(machine, model, optimizer, scaler, some_ids(3))
    handle.remove()
    after = {**model.state_dict(), **optimizer_tensors(model, optimizer)}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    step(machine, model, optimizer, scaler, some_ids(4))
    if dtype != torch.float16:  # there it may be an overflow
        assert all(
            (before[k] != t).any() for k, t in optimizer_tensors(model, optimizer).items() if k.endswith("/step")
        )


@pytest.mark.parametrize("bad", [True, False])
def test_what_the_device_puts_back_is_what_was(bad):
    """The way of a GPU, which is not asked whether the step is bad, on the CPU."""
    ours, theirs = setup(), setup()
    for _, model, _, _ in (ours, theirs):
        with torch.no_grad():
            model.head.weight.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(0))
        loss = model(some_ids()[:, :-1], some_ids()[:, 1:])
        (loss * (float("nan") if bad else 1.0)).backward()
    before = {k: t.clone() for k, t in {**ours[1].state_dict(), **optimizer_tensors(ours[1], ours[2])}.items()}
    for part in ours[2].parts:
        _step_and_undo(part, torch.tensor(bad))
    after = {**ours[1].state_dict(), **optimizer_tensors(ours[1], ours[2])}
    if not bad:
        for part in theirs[2].parts:
            part.step()
        before = {**theirs[1].state_dict(), **optimizer_tensors(theirs[1], theirs[2])}
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_its_state_goes_by_name_and_comes_back():
    machine, model, optimizer, scaler = setup()
    for good in range(2):
        step(machine, model, optimizer, scaler, some_ids(good))
    saved = {k: t.clone() for k, t in optimizer_tensors(model, optimizer).items()}
    _, other, fresh, _ = setup()
    ALONE.load(optimizer_tensors(other, fresh), saved)
    back = optimizer_tensors(other, fresh)
    assert back.keys() == saved.keys()
    assert all(torch.equal(back[k], saved[k]) for k in saved)
    assert saved["blocks.0.mlp.gate.weight/momentum_buffer"].any()


@pytest.fixture(scope="module")
def quiet(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("muon") / "quiet"
    assert train("--data", data, "--steps", 20, "--save-every", 7, *SMALL, *RECIPE, "--out", out) == 0
    return out


def test_resumed_equals_uninterrupted_bit_for_bit(data, quiet, tmp_path, monkeypatch):
    flags = (
        "--data",
        data,
        "--steps",
        20,
        "--save-every",
        7,
        "--resume",
        *SMALL,
        *RECIPE,
        "--out",
        tmp_path / "killed",
    )
    train_until_killed(monkeypatch, 16, *flags)
    assert train(*flags) == 0
    assert result(tmp_path / "killed") == result(quiet)


def test_it_learns_and_its_checkpoint_binds(data, quiet, tmp_path):
    metrics = [m["loss"] for m in result(quiet)["metrics"] if "loss" in m]
    assert metrics[-1] < metrics[0] - 0.3
    newest = checkpoint.committed(str(quiet))[-1]
    names = load_file(quiet / newest.name / "optimizer.safetensors").keys()
    assert "blocks.1.attn.qkv.weight/momentum_buffer" in names
    assert "wte.weight/exp_avg" in names
    resumed = ("--data", str(data), "--out", str(quiet), "--resume", "--device", "cpu")
    assert "--optimizer adamw: the checkpoint was trained with muon" in error_of(
        train, *resumed, "--optimizer", "adamw"
    )
    assert "--arch gpt2: the checkpoint was trained with modern" in error_of(train, *resumed, "--arch", "gpt2")


def test_transformers_reads_its_export(quiet, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Qwen3ForCausalLM"):
        pytest.skip("transformers below 4.51 has no Qwen3")
    assert export.main(["--run", str(quiet), "--output", str(tmp_path / "hf")]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ours, _ = load_model(str(quiet), device="cpu")
    ids = torch.randint(5, ours.config.vocab_size, (2, 31), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert type(theirs).__name__ == "Qwen3ForCausalLM"
        assert (theirs(ids).logits - ours(ids)).abs().max() < 1e-4


def test_a_torch_without_muon_is_one_line_and_nothing_written(data, tmp_path, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    flags = (
        "--data",
        str(data),
        "--steps",
        "2",
        *map(str, SMALL),
        "--optimizer",
        "muon",
        "--out",
        str(tmp_path / "out"),
    )
    assert "has none: install torch 2.9 or later" in error_of(train, *flags)
    assert not (tmp_path / "out").exists()
