"""The losses against torch's own functions on the pairs that count. On many ranks: test_loss_distributed.py."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model import loss_tiled
from model.loss import Features, contrastive_loss

SCALE, BIAS = 1 / 0.07, -3.0
KINDS = ("infonce", "sigmoid")
Loss = Callable[[Features, torch.Tensor], torch.Tensor]


def features(num: int = 8, dim: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> Features:
    generator = torch.Generator().manual_seed(seed)
    image, text = F.normalize(torch.randn(2, num, dim, generator=generator, dtype=torch.float64), dim=-1).to(dtype)
    found = (image, text, torch.tensor(SCALE, dtype=dtype), torch.tensor(BIAS, dtype=dtype))
    return Features(*(x.clone().requires_grad_() for x in found))


def reference(kind: str, inputs: Features, valid: torch.Tensor) -> torch.Tensor:
    """As the papers write it, on the valid pairs alone."""
    image, text = inputs.image_features_BE[valid], inputs.text_features_BE[valid]
    logits, number = inputs.logit_scale * image @ text.T, len(image)
    if kind == "infonce":
        target = torch.arange(number)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    assert inputs.logit_bias is not None
    sign = 2 * torch.eye(number, dtype=logits.dtype) - 1
    return -F.logsigmoid(sign * (logits + inputs.logit_bias)).sum() / number


def gradients(loss: torch.Tensor, inputs: Features) -> list[torch.Tensor]:
    """InfoNCE gives the bias none, which is a zero here."""
    wanted = [x for x in inputs if x is not None]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(wanted, found, strict=True)]


def valid_slots(*bad: int, num: int = 8) -> torch.Tensor:
    valid = torch.ones(num, dtype=torch.bool)
    valid[list(bad)] = False
    return valid


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["dense", 1, 3, 8])
def loss(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str) -> Loss:
    """Either kind, dense or in tiles of so many rows and columns; with 3, the last ones of 8 are smaller."""
    tiled = request.param != "dense"
    if tiled:
        monkeypatch.setattr(loss_tiled, "TILE", request.param)
    return lambda inputs, valid: contrastive_loss(inputs, valid, kind=kind, tiled=tiled)


@pytest.mark.parametrize("bad", [(), (0,), (7,), (1, 2, 6), tuple(range(1, 8))])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_is_the_papers_loss_on_the_valid_pairs(loss: Loss, kind: str, bad: tuple[int, ...], dtype, atol: float):
    inputs, valid = features(dtype=dtype), valid_slots(*bad)
    ours, expected = loss(inputs, valid), reference(kind, inputs, valid)
    torch.testing.assert_close(ours, expected, rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=atol)
    for mine, theirs in zip(gradients(ours, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4 if dtype == torch.float32 else 1e-11, atol=10 * atol)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    tile=st.integers(1, 13),
    valid=st.lists(st.booleans(), min_size=1, max_size=12),
    scale=st.floats(1, 100),
    seed=st.integers(0, 1000),
)
def test_tiled_is_dense_for_any_batch(kind, tile: int, valid: list[bool], scale: float, seed: int):
    inputs, mask = features(len(valid), seed=seed), torch.tensor(valid)
    inputs = inputs._replace(logit_scale=torch.tensor(scale, dtype=torch.float64, requires_grad=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_tiled, "TILE", tile)
        tiled = contrastive_loss(inputs, mask, kind=kind, tiled=True)
        found = gradients(tiled, inputs)
    dense = contrastive_loss(inputs, mask, kind=kind)
    torch.testing.assert_close(tiled, dense, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(found, gradients(dense, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("garbage", [0.0, 1e30, float("inf"), float("nan")])
def test_what_an_invalid_slot_holds_changes_nothing(loss: Loss, garbage: float):
    valid = valid_slots(2, 5)
    inputs = features(dtype=torch.float32)
    expected = loss(inputs, valid)
    before = gradients(expected, inputs)
    with torch.no_grad():
        inputs.image_features_BE[~valid], inputs.text_features_BE[~valid] = garbage, -garbage
    found = loss(inputs, valid)
    after = gradients(found, inputs)
    assert torch.equal(found, expected)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(after, before, strict=True))
    for grad in after[:2]:
        assert not grad[~valid].any()
        assert grad[valid].any(dim=1).all()


def test_without_a_valid_pair_it_is_a_connected_zero(loss: Loss):
    inputs = features(dtype=torch.float32)
    found = loss(inputs, torch.zeros(8, dtype=torch.bool))
    assert found.item() == 0
    assert found.requires_grad
    assert not any(grad.any() for grad in gradients(found, inputs))


def test_one_pair_alone_is_a_match_and_nothing_else(loss: Loss, kind: str):
    inputs, valid = features(), valid_slots(*range(1, 8))
    logit = SCALE * (inputs.image_features_BE[0] * inputs.text_features_BE[0]).sum() + BIAS
    expected = torch.zeros_like(logit) if kind == "infonce" else -F.logsigmoid(logit)
    torch.testing.assert_close(loss(inputs, valid), expected, rtol=1e-12, atol=1e-13)


def test_order_of_pairs_and_exchange_of_towers_do_not_matter(loss: Loss):
    inputs, valid = features(), valid_slots(3)
    image, text, scale, bias = inputs
    expected = loss(inputs, valid)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    permuted = loss(Features(image[order], text[order], scale, bias), valid[order])
    torch.testing.assert_close(permuted, expected, rtol=0, atol=1e-12)
    for mine, theirs in zip(gradients(permuted, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(loss(Features(text, image, scale, bias), valid), expected, rtol=0, atol=1e-12)


def test_gradients_are_those_of_finite_differences(loss: Loss, kind: str):
    inputs, valid = features(), valid_slots(2, 3)
    inputs = inputs._replace(logit_scale=torch.tensor(3.0, dtype=torch.float64, requires_grad=True))
    asked = tuple(inputs) if kind == "sigmoid" else inputs[:3]
    assert torch.autograd.gradcheck(lambda *x: loss(Features(*x), valid), asked)


def test_is_float32_under_autocast_and_takes_no_gradient_where_none_is_asked(loss: Loss):
    inputs, valid = features(dtype=torch.float32), valid_slots(0)
    expected = loss(inputs, valid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(inputs, valid), expected)
    image, text, *rest = inputs
    lowered = loss(Features(image.bfloat16(), text.bfloat16(), *rest), valid)
    assert lowered.dtype == torch.float32
    with torch.no_grad():
        found = loss(inputs, valid)
    assert torch.equal(found, expected)
    assert not found.requires_grad


@pytest.mark.parametrize("tiled", [False, True], ids=["dense", "tiled"])
@pytest.mark.parametrize("logit", [-1000.0, -60.0, 0.0, 60.0, 1000.0])
def test_the_sigmoid_loss_of_a_far_logit_is_exact(tiled: bool, logit: float):
    """One axis for all: every cosine is 1, so every logit is the same."""
    axis = torch.eye(1, 5, dtype=torch.float64).expand(8, 5)
    values = (torch.tensor(value, dtype=torch.float64) for value in (1.0, logit - 1))
    found = contrastive_loss(Features(axis, axis, *values), valid_slots(), kind="sigmoid", tiled=tiled)
    value = torch.tensor(logit, dtype=torch.float64)
    expected = -F.logsigmoid(value) - 7 * F.logsigmoid(-value)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_infonce_is_the_same_whatever_the_bias_and_the_sigmoid_loss_needs_one():
    inputs, valid = features(), valid_slots(1)
    bare = inputs._replace(logit_bias=None)
    for tiled in (False, True):
        found = [contrastive_loss(each, valid, kind="infonce", tiled=tiled) for each in (inputs, bare)]
        assert torch.equal(*found)
        with pytest.raises(ValueError, match=r"^the sigmoid loss needs a model with a logit bias: CLIP\("):
            contrastive_loss(bare, valid, kind="sigmoid", tiled=tiled)


def test_the_dense_losses_compile_as_one_graph(kind):
    inputs, valid = features(), valid_slots(0)

    def loss(inputs: Features) -> torch.Tensor:
        return contrastive_loss(inputs, valid, kind=kind)

    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs), loss(inputs), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_the_tiled_losses_stay_under_a_gibibyte_at_a_batch_of_32768(kind: str):
    """Dense would hold several matrices of 4 GiB. In a process of its own, whose peak is nobody else's."""
    script = f"""
import re, torch
from pathlib import Path
from model.loss import Features, contrastive_loss
def peak_kib():  # not ru_maxrss, which begins with the peak of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
def step(number):
    inputs = [x[:number].detach().requires_grad_() for x in (image, text)]
    inputs += [torch.tensor(x, requires_grad=True) for x in (0.01, -10.0)]
    contrastive_loss(Features(*inputs), torch.ones(number, dtype=torch.bool), kind={kind!r}, tiled=True).backward()
torch.manual_seed(0)
image, text = torch.randn(2, 32768, 512)
step(64)  # what the first use of torch loads is no part of it
before = peak_kib()
step(32768)
print(peak_kib() - before)
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert 2**17 < int(done.stdout) < 2**20, "KiB over the inputs"
