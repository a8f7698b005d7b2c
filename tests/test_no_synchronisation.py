"""No step synchronises with the device: every recipe runs on the meta device, which holds no values."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from aclip.objectives.functional import chance_loss
from aclip.recipes import RECIPES
from aclip.training.accumulation import accumulate
from over_ranks import a_batch, build

MORE = ("flip passes.masked.masking=cluster", "flip passes.masked.masking=edge", "flip passes.masked.masking=gaussian",
        "clip texts.captions.reduction=frequency texts.captions.reduction_options.num_keep=2")


@pytest.mark.parametrize("recipe", [*RECIPES, *MORE])
def test_a_step_does_not_synchronise(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # not available on the meta device
    method = build(recipe)
    batch = a_batch(method, 4).to(torch.device("meta"))
    method.to("meta")
    for masked, resolution in ((True, 1.0), (False, 0.5)):
        method(batch, masked=masked, resolution=resolution).loss.backward()
    accumulate(method, batch, 2, masked=True, resolution=1.0, autocast=nullcontext, scale=lambda loss: loss)
    assert chance_loss(batch.caption_ids).is_meta


def test_a_synchronisation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    method = build("clip")
    compute_loss = method.compute_loss

    def synchronising(encoded, caption_ids):
        output = compute_loss(encoded, caption_ids)
        return replace(output, loss=output.loss * (2.0 if output.loss > 3 else 1.0))

    method.compute_loss = synchronising
    with pytest.raises(RuntimeError, match="meta"):
        method.to("meta")(a_batch(method, 4).to(torch.device("meta")))
