"""The contrast with the captions, averaged over the views of a pass."""

import pytest
import torch
from made_passes import CAPTIONS, SHAPE, made_pass, step_context

from aclip.objectives import Contrastive
from aclip.objectives.functional import clip_loss


@pytest.mark.parametrize("views", [("a",), ("a", "b"), ("a", "b", "c")])
@pytest.mark.parametrize("caption_ids", [(0, 1, 2, 3, 4), (0, 0, 2, 2, 4)])
def test_is_the_mean_over_views(views: tuple[str, ...], caption_ids: tuple[int, ...]) -> None:
    p = made_pass("masked", views)
    context = step_context(p, caption_ids=caption_ids)
    per_view = [
        clip_loss(context.passes["masked"].features[v], context.texts["captions"].features, 12.0, context.caption_ids)
        for v in range(len(views))
    ]
    torch.testing.assert_close(Contrastive([p, CAPTIONS], SHAPE)(context), sum(per_view) / len(views))


def test_shared_captions_are_excluded() -> None:
    p = made_pass("masked", ("a", "b"))
    objective = Contrastive([p, CAPTIONS], SHAPE)
    assert objective(step_context(p, caption_ids=(0, 0, 2, 3, 4))) < objective(step_context(p))


def test_reads_its_own_pass_and_has_no_parameters() -> None:
    first, second = made_pass("first", ("a",)), made_pass("second", ("a",))
    context = step_context(first, second)
    losses = [Contrastive([p, CAPTIONS], SHAPE)(context) for p in (first, second)]
    assert losses[0] != losses[1]
    assert not list(Contrastive([first, CAPTIONS], SHAPE).parameters())
    assert Contrastive.needs_text
