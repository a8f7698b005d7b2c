"""The projection heads, and what every objective of the table has in common."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from made_passes import CAPTIONS, HIDDEN, SHAPE, made_pass, step_context
from torch import nn

from aclip.config import Pass, TextPass
from aclip.errors import ConfigError
from aclip.objectives import OBJECTIVES, Objective
from aclip.objectives.base import hidden_width, mlp
from aclip.objectives.batch_norm import BatchNorm1d

ONLINE = made_pass("masked", ("a", "b"), masking="uniform", mask_ratio=0.5)
TARGET = made_pass("context", ("a", "b"), "ema")

READS: dict[str, tuple[Pass | TextPass, ...]] = {
    "contrastive": (ONLINE, CAPTIONS),
    "ntxent": (ONLINE,),
    "byol": (ONLINE, TARGET),
    "masked_distillation": (ONLINE, TARGET),
    "masked_language": (HIDDEN,),
    "reconstruction": (ONLINE,),
    "sigmoid": (ONLINE, CAPTIONS),
    "bag_of_words": (ONLINE, CAPTIONS),
}
SMALL: dict[str, dict[str, Any]] = {"ntxent": {"hidden": 16, "out": 4}, "byol": {"hidden": 16, "out": 4}}


def build(name: str) -> Objective:
    return OBJECTIVES[name](READS[name], SHAPE, **SMALL.get(name, {}))


def context_of(name: str) -> Any:
    return step_context(
        *(p for p in READS[name] if isinstance(p, Pass)), texts=tuple(p for p in READS[name] if isinstance(p, TextPass))
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [[3, 5], [3, 7, 5], [3, 7, 9, 5]])
def test_mlp_is_linear_norm_relu_and_ends_with_linear(widths: list[int], bias: bool) -> None:
    layers = list(mlp(widths, bias))
    assert [type(layer) for layer in layers] == ([nn.Linear, BatchNorm1d, nn.ReLU] * (len(widths) - 1))[:-2]
    linear = layers[::3]
    assert [(layer.in_features, layer.out_features) for layer in linear] == list(pairwise(widths))
    assert all((layer.bias is not None) == bias for layer in linear)


def test_mlp_normalises_with_the_statistics_of_the_batch() -> None:
    head = mlp([3, 4, 2], bias=True)
    x = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    hidden = x @ head[0].weight.T + head[0].bias
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
    expected = hidden.clamp(min=0) @ head[3].weight.T + head[3].bias
    torch.testing.assert_close(head(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("width", "expected"), [(1024, 4096), (768, 4096), (384, 2048), (192, 1024)])
def test_heads_are_4096_wide_from_width_768_and_in_proportion_below(width: int, expected: int) -> None:
    assert hidden_width(replace(SHAPE, width=width)) == expected


@pytest.mark.parametrize("name", OBJECTIVES)
def test_returns_a_float32_scalar_and_trains_all_of_its_heads(name: str) -> None:
    objective = build(name)
    loss = objective(context_of(name))
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    averaged = {id(p) for _, average in objective.ema_pairs() for p in average.parameters()}
    trained = [p for p in objective.parameters() if id(p) not in averaged]
    assert all(p.requires_grad == (id(p) not in averaged) for p in objective.parameters())
    if trained:
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_refuses_other_passes(name: str) -> None:
    with pytest.raises(ConfigError, match=r"reads an? (image|text) pass.*, not none"):
        OBJECTIVES[name]([], SHAPE)
    with pytest.raises(ConfigError, match="not masked, masked, masked, captions"):
        OBJECTIVES[name]([ONLINE, ONLINE, ONLINE, CAPTIONS], SHAPE)
