"""The loss against torch's own cross-entropy on the pairs that count."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model import loss, loss_tiled

SCALE = 1 / 0.07


def features(num: int = 8, dim: int = 5, seed: int = 0, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, num, dim, generator=generator, dtype=torch.float64)
    return F.normalize(image, dim=-1).to(dtype), F.normalize(text, dim=-1).to(dtype)


def dense(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    logits, target = scale * image @ text.T, torch.arange(len(image))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def valid_slots(*bad: int, num: int = 8) -> torch.Tensor:
    valid = torch.ones(num, dtype=torch.bool)
    valid[list(bad)] = False
    return valid


@pytest.fixture(params=["dense", "tiled"])
def info_nce(request):
    """Either loss: the tiled one in blocks of 3 rows of 8, so that the last is a shorter one."""
    if request.param == "dense":
        return loss.info_nce
    return functools.partial(loss_tiled.tiled_info_nce, tile_values=24)


@pytest.mark.parametrize("bad", [(), (0,), (7,), (1, 2, 6), tuple(range(1, 8))])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_is_dense_cross_entropy_on_the_valid_pairs(info_nce, bad, dtype, atol):
    image, text = (x.requires_grad_() for x in features(dtype=dtype))
    scale, valid = torch.tensor(SCALE, dtype=dtype, requires_grad=True), valid_slots(*bad)
    loss, expected = info_nce(image, text, scale, valid), dense(image[valid], text[valid], scale)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=atol)
    inputs = (image, text, scale)
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=10 * atol)


@pytest.mark.parametrize("garbage", [0.0, 1e30, float("inf"), float("nan")])
def test_what_an_invalid_slot_holds_changes_nothing(info_nce, garbage):
    image, text = features()
    valid, scale = valid_slots(2, 5), torch.tensor(SCALE)
    expected = info_nce(image, text, scale, valid)
    image[~valid], text[~valid] = garbage, -garbage
    image.requires_grad_(), text.requires_grad_(), scale.requires_grad_()
    loss = info_nce(image, text, scale, valid)
    loss.backward()
    assert torch.equal(loss, expected)
    for x in (image, text):
        assert not x.grad[~valid].any()
        assert x.grad[valid].isfinite().all()
        assert x.grad[valid].any(dim=1).all()
    assert scale.grad.isfinite()


def test_without_a_valid_pair_it_is_a_connected_zero(info_nce):
    image, text = (x.requires_grad_() for x in features())
    scale = torch.tensor(SCALE, requires_grad=True)
    loss = info_nce(image, text, scale, torch.zeros(8, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    for x in (image, text, scale):
        assert not x.grad.any()


def test_order_of_pairs_and_exchange_of_towers_do_not_matter(info_nce):
    image, text = features(dtype=torch.float64)
    scale, valid, labels = torch.tensor(SCALE), valid_slots(3), torch.tensor([0, 1, 2, 3, 0, 5, 1, 0])
    loss = info_nce(image, text, scale, valid, labels)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    permuted = info_nce(image[order], text[order], scale, valid[order], labels[order])
    torch.testing.assert_close(permuted, loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(info_nce(text, image, scale, valid, labels), loss, rtol=0, atol=1e-12)


def test_labels_leave_copies_out_of_each_others_denominators(info_nce):
    image, text = features(dtype=torch.float64)
    scale, valid, labels = torch.tensor(SCALE, dtype=torch.float64), valid_slots(4), [9, 7, 9, 3, 9, 7, 1, 2]
    expected = 0.0
    for rows, columns in ((image, text), (text, image)):
        for i in range(8):
            rivals = [j for j in range(8) if valid[j] and (j == i or labels[j] != labels[i])]
            if valid[i]:
                logits = SCALE * rows[i] @ columns[rivals].T
                expected += float(logits.logsumexp(0) - logits[rivals.index(i)]) / (2 * int(valid.sum()))
    loss = info_nce(image, text, scale, valid, torch.tensor(labels))
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert loss < info_nce(image, text, scale, valid)


def test_labels_that_all_differ_change_nothing_and_one_label_leaves_nothing(info_nce):
    image, text = features()
    scale, valid = torch.tensor(SCALE), valid_slots(1)
    assert torch.equal(info_nce(image, text, scale, valid, torch.arange(8)), info_nce(image, text, scale, valid))
    assert info_nce(image, text, scale, valid, torch.zeros(8, dtype=torch.int64)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 0, 2, 3, 1, 0, 4])], ids=["plain", "labels"])
def test_gradients_are_those_of_finite_differences(info_nce, labels):
    image, text = (x.requires_grad_() for x in features(dtype=torch.float64))
    scale, valid = torch.tensor(3.0, dtype=torch.float64, requires_grad=True), valid_slots(2, 3)
    assert torch.autograd.gradcheck(lambda *x: info_nce(*x, valid, labels), (image, text, scale))


def test_is_float32_under_autocast(info_nce):
    image, text = features()
    scale, valid = torch.tensor(SCALE), valid_slots(0)
    expected = info_nce(image, text, scale, valid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(info_nce(image, text, scale, valid), expected)
    lowered = info_nce(image.bfloat16(), text.bfloat16(), scale, valid)
    assert lowered.dtype == torch.float32


def test_the_dense_loss_compiles_as_one_graph():
    image, text = features()
    scale, valid = torch.tensor(SCALE), valid_slots(0)
    compiled = torch.compile(loss.info_nce, backend="eager", fullgraph=True)
    expected = loss.info_nce(image, text, scale, valid)
    torch.testing.assert_close(compiled(image, text, scale, valid), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_tiled_loss_stays_under_a_gibibyte_at_a_batch_of_32768():
    """Dense would hold several matrices of 4 GiB. In a process of its own, whose peak is nobody else's."""
    script = """
import resource, torch
from model.loss_tiled import tiled_info_nce
torch.manual_seed(0)
image, text = (torch.randn(32768, 512, requires_grad=True) for _ in range(2))
valid, scale = torch.ones(32768, dtype=torch.bool), torch.tensor(0.01, requires_grad=True)
few = [x[:64].detach().requires_grad_() for x in (image, text)]
tiled_info_nce(*few, scale, valid[:64]).backward()  # what the first use of torch loads is no part of it
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tiled_info_nce(image, text, scale, valid).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2**20, "KiB over the inputs"
