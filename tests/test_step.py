"""One optimizer step in every number format; the fp16 path with its loss scaler runs on a CPU too, slowly."""

import numpy as np
import pytest
import torch

from gpt.model import GPT
from gpt.presets import preset
from train.optim import make_adamw, optimizer_tensors, step_unless
from train.precision import Machine
from train.step import to_device, train_step, validation_loss


def setup(dtype, dropout=0.0):
    torch.manual_seed(1)
    machine = Machine(torch.device("cpu"), dtype, False)
    model = GPT(preset("tiny", vocab_size=300, block_size=32, n_embd=32, n_head=2, dropout=dropout))
    optimizer = make_adamw(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, device_type="cpu")
    return machine, model, optimizer, machine.grad_scaler()


def step(machine, model, optimizer, scaler, ids, micro_batch=8, clip=1.0, stop=lambda: False):
    return train_step(model, model, optimizer, scaler, ids,
                      micro_batch=micro_batch, lr=1e-3, clip=clip, machine=machine, stop=stop)  # fmt: skip


def some_ids(seed=0):
    return torch.randint(0, 300, (8, 33), generator=torch.Generator().manual_seed(seed))


def losses(dtype, steps=25):
    parts = setup(dtype)
    return [step(*parts, some_ids(s % 3))[0].item() for s in range(steps)], parts[3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_formats_learn_what_fp32_learns(dtype):
    expected, _ = losses(torch.float32)
    found, scaler = losses(dtype)
    assert found == pytest.approx(expected, rel=0.02)
    assert found[-1] < found[0] - 0.1
    assert scaler.is_enabled() == (dtype == torch.float16)


def test_an_overflow_skips_the_step_and_halves_the_scale():
    machine, model, optimizer, scaler = setup(torch.float16)
    step(machine, model, optimizer, scaler, some_ids())
    before, scale = [p.clone() for p in model.parameters()], scaler.get_scale()
    handle = model.ln_f.weight.register_hook(lambda g: g * float("inf"))
    _, norm = step(machine, model, optimizer, scaler, some_ids())
    handle.remove()
    assert not norm.isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert scaler.get_scale() == scale / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("poisoned", ["loss", "gradient"])
def test_a_step_that_is_no_number_leaves_weights_moments_and_counts_alone(dtype, poisoned):
    machine, model, optimizer, scaler = setup(dtype)
    for good in range(3):
        step(machine, model, optimizer, scaler, some_ids(good))
    before = {k: t.clone() for k, t in {**model.state_dict(), **optimizer_tensors(model, optimizer)}.items()}
    if poisoned == "loss":  # a finite gradient of a loss that overflowed
        handle = model.register_forward_hook(lambda module, inputs, loss: loss + float("inf"))
    else:
        handle = model.blocks[0].mlp.up.weight.register_hook(lambda g: g * float("nan"))
    step(machine, model, optimizer, scaler, some_ids(3))
    handle.remove()
    after = {**model.state_dict(), **optimizer_tensors(model, optimizer)}
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert after["wte.weight/step"] == 3
    _, norm = step(machine, model, optimizer, scaler, some_ids(4))
    assert norm.isfinite() or scaler.is_enabled()


def test_the_very_first_step_can_be_left_out_and_be_saved():
    machine, model, optimizer, scaler = setup(torch.float32)
    handle = model.ln_f.weight.register_hook(lambda g: g * float("nan"))
    step(machine, model, optimizer, scaler, some_ids())
    handle.remove()
    moments = optimizer_tensors(model, optimizer)
    assert len(moments) == 3 * len(list(model.parameters()))
    assert not any(t.any() for t in moments.values())


@pytest.mark.parametrize("fused", [True, False])
def test_healthy_steps_are_torchs_own_to_the_bit(fused):
    """Whatever watches over the steps changes none of them."""
    _, ours, _, _ = setup(torch.float32)
    _, theirs, _, _ = setup(torch.float32)
    optimizer = make_adamw(ours, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, device_type="cpu" if fused else "mps")
    groups = [{"params": [p for p in theirs.parameters() if p.ndim > 1]},
              {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
    plain = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)
    for seed in range(5):
        ids = some_ids(seed)
        for model in (ours, theirs):
            model(ids[:, :-1], ids[:, 1:]).backward()
        step_unless(optimizer, torch.tensor(False))
        plain.step()
        optimizer.zero_grad()
        plain.zero_grad()
    a, b = optimizer_tensors(ours, optimizer), optimizer_tensors(theirs, plain)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(x, y) for x, y in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_unfused_too_a_bad_step_changes_nothing():
    _, model, _, _ = setup(torch.float32)
    optimizer = make_adamw(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, device_type="mps")
    before = [p.clone() for p in model.parameters()]
    (model(some_ids()[:, :-1], some_ids()[:, 1:]) * float("nan")).backward()
    step_unless(optimizer, torch.tensor(True))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(t.any() for t in optimizer_tensors(model, optimizer).values())


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_any_micro_batch_gives_the_same_loss_and_gradient(micro_batch):
    whole, parts = setup(torch.float32), setup(torch.float32)
    a, b = step(*whole, some_ids()), step(*parts, some_ids(), micro_batch=micro_batch)
    assert a[0].item() == pytest.approx(b[0].item(), rel=1e-6)
    assert a[1].item() == pytest.approx(b[1].item(), rel=1e-5)


def test_told_to_stop_between_micro_batches_nothing_has_changed():
    machine, model, optimizer, scaler = setup(torch.float32, dropout=0.5)
    before, rng = [p.clone() for p in model.parameters()], torch.get_rng_state()
    answers = iter([False, False, True])
    assert step(machine, model, optimizer, scaler, some_ids(), micro_batch=2, stop=lambda: next(answers)) is None
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize(("dtype", "largest"), [("<u2", 65_535), ("<u4", 4_000_000_000)])
def test_ids_are_widened_without_a_sign(dtype, largest):
    ids = np.array([[0, 1, largest]], dtype)
    assert to_device(ids, setup(torch.float32)[0]).tolist() == [[0, 1, largest]]


def test_validation_is_the_mean_over_all_windows_and_can_be_left():
    machine, model, _, _ = setup(torch.float32, dropout=0.5)
    windows = some_ids().numpy().astype(np.uint16)[:7]
    mean = validation_loss(model, windows, micro_batch=3, machine=machine, stop=lambda: False)
    model.eval()
    with torch.no_grad():
        each = [model(to_device(w[None], machine)[:, :-1], to_device(w[None], machine)[:, 1:]).item() for w in windows]
    assert mean == pytest.approx(np.mean(each), rel=1e-5)
    model.train()
    assert validation_loss(model, windows, micro_batch=3, machine=machine, stop=lambda: True) is None
    assert model.training
    assert validation_loss(model, windows[:0], micro_batch=3, machine=machine, stop=lambda: False) is None
