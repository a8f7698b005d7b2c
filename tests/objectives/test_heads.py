"""The projection heads. Batch normalisation over ranks is tested in test_over_ranks.py."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from synthetic_passes import SHAPE
from torch import nn

from aclip.objectives.self_supervised import BatchNorm1d, hidden_width, mlp


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
