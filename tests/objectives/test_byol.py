"""BYOL from online views to EMA targets: which regresses on which, and what learns."""

import copy
from dataclasses import replace

import pytest
import torch
from synthetic_passes import SHAPE, B, step_context
from torch import nn

from aclip.config import Pass
from aclip.ema import Ema
from aclip.errors import ConfigError
from aclip.objectives import Byol
from aclip.objectives.functional import byol_loss


def reads(online: tuple[str, ...], target: tuple[str, ...]) -> dict[str, Pass]:
    return {"online": Pass(views=online), "target": Pass(views=target, encoder="ema")}


def build(online: tuple[str, ...], target: tuple[str, ...]) -> Byol:
    torch.manual_seed(0)
    return Byol(reads(online, target), SHAPE, hidden=16, out=4)


@pytest.mark.parametrize(
    ("online", "target", "pairs"),
    [
        (("a", "b"), ("context",), [(0, 0), (1, 0)]),  # A-CLIP: one target for every view
        (("a", "b"), ("a", "b"), [(0, 1), (1, 0)]),  # BYOL: the other views' targets
        (("a",), ("a", "b"), [(0, 1)]),
        (("a",), ("a",), [(0, 0)]),
        (("a", "b", "c"), ("a", "b", "c"), [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]),
    ],
)
def test_is_the_mean_over_view_and_target(
    online: tuple[str, ...], target: tuple[str, ...], pairs: list[tuple[int, int]]
) -> None:
    objective = build(online, target)
    context = step_context(reads(online, target))
    seen, aimed = context.passes["online"].cls, context.passes["target"].cls
    # statistics over all views of a pass
    predictions = objective.predictor(objective.projector(seen.reshape(len(online) * B, -1))).reshape(-1, B, 4)
    targets = objective.ema_projector(aimed.reshape(len(target) * B, -1)).reshape(-1, B, 4)
    expected = sum(byol_loss(predictions[i], targets[j]) for i, j in pairs) / len(pairs)
    torch.testing.assert_close(objective(context), expected)


def test_only_the_online_side_learns() -> None:
    objective = build(("a", "b"), ("context",))
    context = step_context(reads(("a", "b"), ("context",)))
    aimed = context.passes["target"].cls.requires_grad_()
    objective(context).backward()
    assert aimed.grad is None
    assert all(p.grad is None and not p.requires_grad for p in objective.ema_projector.parameters())
    for head in (objective.projector, objective.predictor):
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in head.parameters())
    seen = context.passes["online"].cls.grad
    assert seen is not None
    assert (seen.abs().amax(dim=(1, 2)) > 0).all()


def test_the_projector_alone_has_an_average() -> None:
    objective = build(("a", "b"), ("context",))
    assert objective.ema_pairs() == [(objective.projector, objective.ema_projector)]
    start = copy.deepcopy(objective.ema_projector.state_dict())
    assert all(torch.equal(objective.projector.state_dict()[k], v) for k, v in start.items())
    with torch.no_grad():
        objective.projector[0].weight.add_(1.0)
    Ema(objective.ema_pairs()).update(0.75)
    torch.testing.assert_close(objective.ema_projector[0].weight, start["0.weight"] + 0.25)


def test_published_heads() -> None:
    with torch.device("meta"):
        objective = Byol(reads(("a",), ("context",)), replace(SHAPE, width=1024))
    for head, widths in (
        (objective.projector, [(4096, 1024), (256, 4096)]),
        (objective.predictor, [(4096, 256), (256, 4096)]),
    ):
        linear = [layer for layer in head if isinstance(layer, nn.Linear)]
        assert [tuple(layer.weight.shape) for layer in linear] == widths
        assert all(layer.bias is None for layer in linear)
        assert isinstance(head[-1], nn.Linear)


def test_refuses_an_online_target() -> None:
    with pytest.raises(ConfigError, match="regresses on an EMA pass, but 'target' is online"):
        Byol({"online": Pass(views=("a",)), "target": Pass(views=("a",))}, SHAPE)


def test_refuses_a_view_without_a_target() -> None:
    with pytest.raises(ConfigError, match="a view of pass 'online' has no target: add another view to pass 'target'"):
        Byol(reads(("a", "b", "c"), ("a", "a")), SHAPE)
