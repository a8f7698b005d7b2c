"""The objectives that hold a model to a frozen one, against the equations of their papers, pair by pair."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from synthetic_passes import SHAPE, B, step_context
from torch import Tensor

from aclip.config import Pass, TextPass
from aclip.errors import ConfigError
from aclip.objectives import Affinity, Anchor, Contrastive, functional
from aclip.objectives.functional import affinity_loss, clip_loss
from aclip.structs import StepContext

TEACHER_SCALE = 30.0


def reads(views: tuple[str, ...] = ("a",), frozen_views: tuple[str, ...] = ("a",)) -> dict[str, Any]:
    return {"full": Pass(views=views), "captions": TextPass(), "frozen": Pass(views=frozen_views, encoder="frozen"),
            "theirs": TextPass(encoder="frozen")}


def context(of: dict[str, Any], caption_ids: tuple[int, ...] = (0, 1, 2, 3, 4)) -> StepContext:
    """Return a step whose frozen features are of another width than the model's."""
    step = step_context(of, caption_ids)
    noise = torch.Generator().manual_seed(7)
    image, text = (F.normalize(torch.randn(n, B, 11, generator=noise), dim=-1)
                   for n in (len(of["frozen"].views), 1))
    return replace(step, frozen_logit_scale=torch.tensor(TEACHER_SCALE), passes={
        **step.passes, "frozen": replace(step.passes["frozen"], features=image)}, texts={
        **step.texts, "theirs": replace(step.texts["theirs"], features=text[0])})


def softmax_row(scale: float, rows: Tensor, columns: Tensor, i: int, left_out: list[int]) -> list[float]:
    powers = [0.0 if j in left_out else math.exp(scale * float(rows[i] @ columns[j])) for j in range(len(columns))]
    return [power / sum(powers) for power in powers]


def literal(step: StepContext, alpha: float, view: int = 0, frozen_view: int = 0) -> float:
    """MobileCLIP, section 4.1, for alpha 0; CLIP-Refine, section 4.2: q^ = alpha 1[i = j] + (1 - alpha) q."""
    v, t = step.passes["full"].features[view].double(), step.texts["captions"].features.double()
    v_, t_ = step.passes["frozen"].features[frozen_view].double(), step.texts["theirs"].features.double()
    ids, total = step.caption_ids.tolist(), 0.0
    for rows, columns, their_rows, their_columns in ((v, t, v_, t_), (t, v, t_, v_)):
        for i in range(B):
            left_out = [j for j in range(B) if j != i and ids[j] == ids[i]]
            p = softmax_row(12.0, rows, columns, i, left_out)
            q = softmax_row(TEACHER_SCALE, their_rows, their_columns, i, left_out)
            for j in range(B):
                target = alpha * (i == j) + (1 - alpha) * q[j]
                if target > 0:
                    total += target * (math.log(target) - math.log(p[j])) / B / 2
    return total


@pytest.mark.parametrize("caption_ids", [(0, 1, 2, 3, 4), (0, 0, 2, 0, 4)])
@pytest.mark.parametrize(("objective", "alpha"), [
    (Affinity(reads(), SHAPE), 0.0), (Anchor(reads(), SHAPE), 0.5), (Anchor(reads(), SHAPE, label_share=0.2), 0.2),
    (Anchor(reads(), SHAPE, label_share=1.0), 1.0)])
def test_equals_the_literal_papers(objective: Affinity, alpha: float, caption_ids: tuple[int, ...]) -> None:
    step = context(reads(), caption_ids)
    assert objective(step).item() == pytest.approx(literal(step, alpha), rel=1e-5)


def test_of_labels_alone_it_is_the_contrast() -> None:
    step = context(reads(), (0, 0, 2, 0, 4))
    contrast = Contrastive({name: p for name, p in reads().items() if name in ("full", "captions")}, SHAPE)
    torch.testing.assert_close(Anchor(reads(), SHAPE, label_share=1.0)(step), contrast(step))


@pytest.mark.parametrize(("frozen_views", "counterparts"), [(("context",), (0, 0)), (("b", "a"), (1, 0))])
def test_views_are_compared_with_their_own(frozen_views: tuple[str, ...], counterparts: tuple[int, ...]) -> None:
    of = reads(("a", "b"), frozen_views)
    step = context(of)
    expected = sum(literal(step, 0.0, view, counterpart) for view, counterpart in enumerate(counterparts)) / 2
    assert Affinity(of, SHAPE)(step).item() == pytest.approx(expected, rel=1e-5)


def test_a_copy_that_sees_the_same_is_at_the_minimum() -> None:
    noise = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(6, 5, generator=noise), dim=1) for _ in range(2))
    images = image.clone().requires_grad_()
    loss = affinity_loss(images, text, 20.0, image, text, 20.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert float(images.grad.abs().max()) < 1e-5


def test_gradients_are_those_of_the_definition_and_reach_the_student_alone() -> None:
    noise = torch.Generator().manual_seed(0)
    image, text, their_image, their_text = (
        F.normalize(torch.randn(4, 5, generator=noise, dtype=torch.float64), dim=1).requires_grad_() for _ in range(4))
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        assert torch.autograd.gradcheck(
            lambda *student: affinity_loss(*student, their_image.detach(), their_text.detach(), 15.0, label_share=0.3),
            (image, text, scale))
    affinity_loss(image, text, scale, their_image, their_text, 15.0).backward()
    assert their_image.grad is None
    assert their_text.grad is None


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss_and_gradient() -> tuple[Tensor, Tensor]:
        step = context(reads(), (0, 0, 2, 3, 4))
        features = step.passes["full"].features.requires_grad_()
        loss = Anchor(reads(), SHAPE)(step)
        return loss, torch.autograd.grad(loss, features)[0]

    whole = loss_and_gradient()
    monkeypatch.setattr(functional, "LOGITS_AT_ONCE", 20)
    for ours, theirs in zip(loss_and_gradient(), whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_half_precision_features_are_computed_in_fp32() -> None:
    noise = torch.Generator().manual_seed(0)
    features = [F.normalize(torch.randn(8, 5, generator=noise), dim=1).bfloat16() for _ in range(4)]
    with torch.autocast("cpu", torch.bfloat16):
        ours = affinity_loss(features[0], features[1], 90.0, features[2], features[3], 90.0)
    image, text, their_image, their_text = (one.float() for one in features)
    torch.testing.assert_close(ours, affinity_loss(image, text, 90.0, their_image, their_text, 90.0))
    torch.testing.assert_close(affinity_loss(image, text, 90.0, their_image, their_text, 90.0, label_share=1.0),
                               clip_loss(image, text, 90.0))


@pytest.mark.parametrize(("wrong", "sentence"), [
    ({**reads(), "frozen": Pass(views=("a",))}, r"reads an online image and text pass, then a frozen image and text"),
    ({**reads(), "captions": TextPass(encoder="frozen")}, r"not full \(online\), captions \(frozen\)"),
    ({**reads(), "captions": TextPass(mask_ratio=0.3)}, r"hides 30% of the tokens"),
    (reads(("a",), ("b", "c")), r"a view of pass 'full' is not among those of the frozen pass 'frozen': b, c"),
])
def test_passes_that_do_not_fit_are_refused(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Affinity(wrong, SHAPE)
