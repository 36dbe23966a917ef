"""The chunked loss equals F.cross_entropy: value and gradients, in every precision it is used in."""

import math

import pytest
import torch
from torch.nn import functional as F

from gpt import loss
from gpt.errors import GPTError
from gpt.loss import linear_cross_entropy


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 64 * 97)  # 64 rows: every batch below takes several unequal chunks


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models this small only wait for each other's threads, seconds long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch(n=200, width=24, vocab=97, dtype=torch.float32, scale=1.0):
    torch.manual_seed(0)
    x = (torch.randn(n, width, dtype=dtype) * scale).requires_grad_()
    weight = torch.randn(vocab, width, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocab, (n,))
    targets[::7] = -100
    return x, weight, targets


def reference(x, weight, targets):
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    value = F.cross_entropy(x @ weight.T, targets)
    return value.detach(), *torch.autograd.grad(value, (x, weight))


def test_worked_by_hand():
    x = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3.0)]], requires_grad=True)  # probabilities 1/4 and 3/4
    value = linear_cross_entropy(x, weight, torch.tensor([1]))
    value.backward()
    assert value.item() == pytest.approx(math.log(4 / 3))
    assert weight.grad.flatten().tolist() == pytest.approx([1 / 4, 3 / 4 - 1])
    assert x.grad.item() == pytest.approx((3 / 4 - 1) * math.log(3.0))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("scale", [1.0, 100.0])  # logits in the hundreds overflow an exp that is not shifted
def test_value_and_gradients_equal_cross_entropy(dtype, tolerance, scale):
    x, weight, targets = batch(dtype=dtype, scale=scale)
    value = linear_cross_entropy(x, weight, targets)
    got = (value, *torch.autograd.grad(value, (x, weight)))
    assert value.dtype == dtype
    for mine, theirs in zip(got, reference(x, weight, targets), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_errors_are_those_of_its_matmuls(dtype):
    x, weight, targets = batch()
    with torch.autocast("cpu", dtype):
        value = linear_cross_entropy(x, weight, targets)
    assert value.dtype == torch.float32
    got = (value, *torch.autograd.grad(value, (x, weight)))
    for mine, theirs in zip(got, reference(x, weight, targets), strict=True):
        assert (mine.double() - theirs).norm() / theirs.norm() < 8 * torch.finfo(dtype).eps


def test_float16_gradients_do_not_underflow_in_a_large_batch():
    n, vocab = 2**12, 2**13  # an untrained model's softmax over N rows: p / N = 2**-25, which float16 rounds to zero
    x, weight = torch.ones(n, 1), torch.zeros(vocab, 1, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        value = linear_cross_entropy(x, weight, torch.zeros(n).long())
    (value * 1024).backward()  # what a GradScaler does
    expected = torch.full((vocab, 1), 1024 / vocab)
    expected[0] -= 1024
    torch.testing.assert_close(weight.grad, expected, rtol=1e-3, atol=0)


def test_many_bfloat16_chunks_add_up():
    # In bfloat16 1 + 2**-8 is 1: a sum of 256 chunks kept in it would stand still.
    x, weight = torch.ones(64 * 256, 1), torch.zeros(97, 1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(x, weight, torch.zeros(64 * 256).long()).backward()
    assert weight.grad[1].item() == pytest.approx(1 / 97, rel=4e-3)
    assert weight.grad[0].item() == pytest.approx(1 / 97 - 1, rel=4e-3)


def test_all_ignored_is_zero_and_gives_zero_gradients():
    x, weight, targets = batch()
    value = linear_cross_entropy(x, weight, torch.full_like(targets, -100))
    value.backward()
    assert value.item() == 0.0
    assert x.grad.count_nonzero() == weight.grad.count_nonzero() == 0


def test_without_gradients_same_value_and_no_gradient_work(monkeypatch):
    x, weight, targets = batch()
    expected = linear_cross_entropy(x, weight, targets)
    inner = loss.summed_loss
    results = []
    monkeypatch.setattr(loss, "summed_loss", lambda *a, **k: results.append(inner(*a, **k)) or results[-1])
    with torch.no_grad():
        value = linear_cross_entropy(x, weight, targets)
    assert not value.requires_grad
    assert torch.equal(value, expected)
    assert [t.numel() for t in results[0][1:]] == [0, 0]


def test_backward_twice_over_a_retained_graph_adds_the_same_again():
    x, weight, targets = batch()
    value = linear_cross_entropy(x, weight, targets)
    value.backward(retain_graph=True)
    once = weight.grad.clone()
    value.backward()
    assert torch.equal(weight.grad, 2 * once)


def test_shapes_that_do_not_fit_are_one_clear_line():
    x, weight, targets = batch()
    with pytest.raises(GPTError, match=r"do not fit: pass \(N, C\), \(V, C\) and \(N,\)"):
        linear_cross_entropy(x, weight, targets[:-1])
