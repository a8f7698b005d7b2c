"""Scores in a byte a patch."""

import pytest
import torch

from aclip.masking import from_bytes, to_bytes


def test_bytes_come_back_as_they_are() -> None:
    maps = torch.stack([torch.arange(256), torch.arange(255, -1, -1)]).to(torch.uint8)
    assert torch.equal(to_bytes(from_bytes(maps)), maps)


def test_each_row_is_relative_to_its_largest_score() -> None:
    scores = torch.tensor([[0.0, 0.04, 0.25, 1.0], [0.0, 8e-5, 5e-4, 2e-3], [0.0, 0.0, 0.0, 0.0]])
    assert to_bytes(scores).tolist() == [[0, 51, 128, 255], [0, 51, 128, 255], [0, 0, 0, 0]]
    assert from_bytes(to_bytes(scores))[0].tolist() == pytest.approx([0.0, 0.04, (128 / 255) ** 2, 1.0])


def test_small_scores_are_told_apart_where_attention_gathers_on_one_patch() -> None:
    scores = torch.cat([torch.linspace(0.001, 0.005, 20), torch.ones(1)])[None]
    assert len(to_bytes(scores).unique()) > 8  # in steps of 1 / 255 of the largest it would be 2
