"""SimCLR between the views of a pass, through its own head."""

from dataclasses import replace

import pytest
import torch
from synthetic_passes import SHAPE, B, masked, step_context
from torch import nn

from aclip.errors import ConfigError
from aclip.objectives import NtXent
from aclip.objectives.functional import ntxent_loss


def build(of: tuple[str, ...], **options: object) -> NtXent:
    torch.manual_seed(0)
    return NtXent(masked(of), SHAPE, hidden=16, out=4, **options)


@pytest.mark.parametrize(
    ("views", "options", "pairs"),
    [
        (("a", "b"), {}, [(0, 1)]),
        (("a", "b", "c"), {}, [(0, 1), (0, 2), (1, 2)]),
        (("a", "b"), {"views": (0, 0)}, [(0, 0)]),  # what the release computes
        (("a", "b"), {"views": (1, 0)}, [(1, 0)]),
        (("a",), {"views": (0, 0)}, [(0, 0)]),
    ],
)
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_is_the_mean_over_pairs_of_views(
    views: tuple[str, ...], options: dict[str, object], pairs: list[tuple[int, int]], temperature: float
) -> None:
    objective = build(views, temperature=temperature, **options)
    context = step_context(masked(views))
    # one run of the head over all views, so that the statistics are those of V x B rows
    z = objective.head(context.passes["masked"].cls.reshape(len(views) * B, SHAPE.width)).reshape(len(views), B, 4)
    expected = sum(ntxent_loss(z[i], z[j], temperature) for i, j in pairs) / len(pairs)
    torch.testing.assert_close(objective(context), expected)


def test_published_head() -> None:
    with torch.device("meta"):
        objective = NtXent(masked(), replace(SHAPE, width=768))
    linear = [layer for layer in objective.head if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linear] == [(4096, 768), (4096, 4096), (256, 4096)]
    assert all(layer.bias is not None for layer in linear)
    assert objective.temperature == 0.1


def test_gradient_reaches_both_views() -> None:
    objective, context = build(("a", "b")), step_context(masked())
    objective(context).backward()
    gradient = context.passes["masked"].cls.grad
    assert gradient is not None
    assert (gradient.abs().amax(dim=(1, 2)) > 0).all()


@pytest.mark.parametrize(("views", "options"), [(("a",), {}), (("a", "b"), {"views": (0, 2)})])
def test_refuses_views_that_are_not_there(views: tuple[str, ...], options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"compares two views, but pass 'masked' has {len(views)}: a"):
        build(views, **options)
