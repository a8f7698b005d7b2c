"""Made batches: as long as stated, and shaped as the loader's."""

import pytest
import torch

from aclip import models
from aclip.engine.trial import caption_lengths, made_batch, made_tokens
from aclip.plan import resolve
from aclip.recipes import RECIPES


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_lengths_follow_the_stated_distribution() -> None:
    lengths = caption_lengths(100_000, 14, 77, generator()).float()
    assert lengths.mean() == pytest.approx(14, rel=0.01)
    assert lengths.quantile(torch.tensor([0.25, 0.75])).tolist() == [9, 17]
    assert (lengths > 39).float().mean() == pytest.approx(0.01, rel=0.1)
    assert (lengths.min(), lengths.max()) == (3, 77)
    assert caption_lengths(100, 30, 16, generator()).max() == 16


def test_tokens_end_where_they_should() -> None:
    lengths = torch.tensor([3, 7, 5])
    tokens = made_tokens(lengths, 9, 49408, generator())
    assert tokens.shape == (3, 9)
    assert (tokens.argmax(dim=1) + 1).tolist() == lengths.tolist()
    assert (tokens != 0).sum(dim=1).tolist() == lengths.tolist()


@pytest.mark.parametrize("cut", [True, False])
def test_batches_hold_what_the_plan_reads(cut: bool) -> None:
    plan = resolve(RECIPES["a-clip-eff"], models.shape_of(models.model_config("vit-micro")))
    batch = made_batch(plan, 4, cut_text=cut)
    assert {name: view.pixels.shape for name, view in batch.views.items()} == {
        name: (4, 3, *size) for name, size in plan.view_sizes.items()}
    assert batch.tokens.shape[1] == (int((batch.tokens.argmax(dim=1) + 1).max()) if cut else 77)
    assert batch.views["context"].augmentation is None
    assert batch.views["a"].augmentation is not None
    assert made_batch(plan, 4, augmented=False).views["a"].augmentation is None
    assert torch.equal(made_batch(plan, 4, cut_text=cut).tokens, batch.tokens)
    assert not torch.equal(made_batch(plan, 4, seed=1).seeds, batch.seeds)
