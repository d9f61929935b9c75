"""Micro-batches, recomputed activations and clipping: the same gradients, or the stated ones, in one process."""

import functools
import math

import gradient_ranks
import pytest
import torch
from gradient_ranks import Case

from model.loss import contrastive_loss
from training import optim
from training.distributed import World
from training.ema import Ema
from training.fields import LossKind
from training.parallel import over_ranks


@functools.cache
def plain(kind: LossKind) -> dict[str, torch.Tensor]:
    model = gradient_ranks.tiny(kind)
    *inputs, valid = gradient_ranks.batch()
    loss = contrastive_loss(model(*inputs), valid, kind=kind)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize(("accumulate", "checkpointing"), [(1, True), (2, False), (4, True), (16, False)])
def test_micro_batches_have_the_gradients_of_the_whole_batch(
    kind: LossKind, accumulate: int, checkpointing: bool
) -> None:
    found = gradient_ranks.gradients(Case(kind, False, False, accumulate, checkpointing), World())
    for name, gradient in plain(kind).items():
        error = float((found[name] - gradient).norm() / gradient.norm())
        assert error < 1e-12, f"{name}: {error:.1e}"


def test_one_micro_batch_alone_is_another_gradient() -> None:
    """What is tested above is no matter of course: a loss over micro-batches sees fewer negatives."""
    model = gradient_ranks.tiny("infonce")
    *inputs, valid = gradient_ranks.batch()
    for part in torch.arange(gradient_ranks.BATCH).chunk(4):
        share = valid[part].sum() / valid.sum()
        (contrastive_loss(model(*(each[part] for each in inputs)), valid[part], kind="infonce") * share).backward()
    gradient = model.image.projection.weight.grad
    assert gradient is not None
    assert (gradient - plain("infonce")["image.projection.weight"]).norm() > 0.1 * gradient.norm()


def test_clipping_scales_all_gradients_to_the_norm_together() -> None:
    draw = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=draw) for shape in ((3, 4), (7,), ())]
    before = [gradient.clone() for gradient in gradients]
    _, norm = over_ranks(torch.tensor(1.0), gradients, World())
    assert float(norm) == pytest.approx(math.sqrt(sum(float(each.square().sum()) for each in before)), rel=1e-6)
    optim.clip_gradients(gradients, norm, 2 * float(norm))
    assert all(torch.equal(one, other) for one, other in zip(gradients, before, strict=True))
    optim.clip_gradients(gradients, norm, 0.5)
    assert float(over_ranks(torch.tensor(1.0), gradients, World())[1]) == pytest.approx(0.5, rel=1e-5)
    assert all(torch.allclose(one, other * 0.5 / norm) for one, other in zip(gradients, before, strict=True))


def test_a_step_that_is_left_out_changes_nothing() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = optim.build(model, weight_decay=0.1, beta2=0.95)
    optim.set_learning_rate(optimizer, 0.1)
    ema = Ema(model, 0.9)

    def step(scale: float, left_out: float) -> dict[str, torch.Tensor]:
        optimizer.zero_grad()
        (model(torch.ones(1, 3)).sum() * scale).backward()
        optim.step_unless(optimizer, torch.tensor(left_out))
        ema.update(torch.tensor(left_out))
        everything = {**dict(model.named_parameters()), **optim.state_tensors(model, optimizer)}
        averages = {f"ema {name}": value for name, value in ema.tensors.items()}
        return {name: value.detach().clone() for name, value in {**everything, **averages}.items()}

    first = step(1.0, 0.0)
    left_out = step(math.nan, 1.0)
    assert first.keys() == left_out.keys()
    assert all(torch.equal(first[name], left_out[name]) for name in first)
    assert not torch.equal(step(1.0, 0.0)["weight"], first["weight"])


def test_the_moving_average_is_what_its_formula_says() -> None:
    model = torch.nn.Linear(2, 2)
    ema = Ema(model, 0.75)
    expected = model.weight.detach().clone()
    for number in range(4):
        with torch.no_grad():
            model.weight.add_(number)
        ema.update(torch.tensor(0.0))
        expected = 0.75 * expected + 0.25 * model.weight.detach()
    assert torch.allclose(ema.tensors["weight"], expected)
