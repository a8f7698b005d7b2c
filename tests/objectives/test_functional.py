"""The losses against the release's numbers and against the papers' formulas, loop by loop."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from aclip.objectives import functional
from aclip.objectives.functional import byol_loss, chance_loss, clip_loss, ntxent_loss, sigmoid_loss
from golden_numbers import Golden

GRADIENTS = ("image_embed", "text_embed", "image_ssl_embed", "byol_feats", "logit_scale")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("version", ["corrected", "as_released"])
def test_golden_losses_and_gradients(golden: Golden, version: str) -> None:
    inputs = {name: golden[f"loss/in/{name}"].requires_grad_() for name in GRADIENTS}
    image = F.normalize(inputs["image_embed"], dim=1).chunk(2)
    text = F.normalize(inputs["text_embed"], dim=1)
    ssl = inputs["image_ssl_embed"].chunk(2)
    byol = inputs["byol_feats"].chunk(2)
    target = golden["loss/in/byol_feats_ema"]

    parts = {
        "contra_loss_1": clip_loss(image[0], text, inputs["logit_scale"]),
        "contra_loss_2": clip_loss(image[1], text, inputs["logit_scale"]),
        "simclr_loss": ntxent_loss(ssl[0], ssl[1] if version == "corrected" else ssl[0], temperature=0.1),
        "im_byol_loss": (byol_loss(byol[0], target) + byol_loss(byol[1], target)) / 2,
    }
    total = (
        0.5 * parts["contra_loss_1"] + 0.5 * parts["contra_loss_2"] + parts["simclr_loss"] + 2 * parts["im_byol_loss"]
    )
    total.backward()

    for name, value in {**parts, "total": total}.items():
        golden.check(f"loss/{version}/{name}", value)
    for name, tensor in inputs.items():
        assert tensor.grad is not None
        golden.check(f"loss/{version}/grad/{name}", tensor.grad)


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def slow_infonce(queries: list[list[float]], keys: list[list[float]], scale: float, ids: list[int]) -> float:
    """Mean over i of -log(exp(s q_i k_i) / sum_j exp(s q_i k_j)), over j = i and those of other captions."""
    total = 0.0
    for i, query in enumerate(queries):
        negatives = sum(math.exp(scale * dot(query, key)) for j, key in enumerate(keys) if ids[j] != ids[i])
        positive = math.exp(scale * dot(query, keys[i]))
        total -= math.log(positive / (positive + negatives))
    return total / len(queries)


@pytest.mark.parametrize("ids", [None, [0, 1, 2, 3, 4, 5], [7, 7, 1, 2, 7, 1], [3] * 6])
@pytest.mark.parametrize("scale", [1.0, 14.3])
def test_clip_loss_is_the_symmetric_infonce(ids: list[int] | None, scale: float) -> None:
    image, text = F.normalize(randn(6, 5), dim=1), F.normalize(randn(6, 5, seed=1), dim=1)
    loss = clip_loss(image, text, torch.tensor(scale), None if ids is None else torch.tensor(ids))
    different = ids or list(range(6))
    expected = (
        slow_infonce(image.tolist(), text.tolist(), scale, different)
        + slow_infonce(text.tolist(), image.tolist(), scale, different)
    ) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_pairs_that_share_a_caption_do_not_push_each_other_away() -> None:
    image = F.normalize(randn(4, 5), dim=1).requires_grad_()
    text = F.normalize(randn(4, 5, seed=1), dim=1).requires_grad_()
    loss = clip_loss(image, text, 10.0, torch.tensor([5, 5, 1, 2]))
    (sensitivity,) = torch.autograd.grad(loss, text, retain_graph=True)
    assert loss.isfinite()
    assert sensitivity.isfinite().all()
    # the loss of the pairs 0 and 1 alone, which are each other's only company, is zero
    assert clip_loss(image[:2], text[:2], 10.0, torch.tensor([5, 5])).item() == 0.0
    assert clip_loss(image[:2], text[:2], 10.0).item() > 0.01


def alike(ids: list[int] | None, guide: list[list[float]], threshold: float) -> list[list[bool]]:
    """Which pairs are not each other's negatives: those with one caption, and those with nearly the same."""
    return [[i != j and ((ids is not None and ids[i] == ids[j]) or dot(g, h) >= threshold)
             for j, h in enumerate(guide)] for i, g in enumerate(guide)]


@pytest.mark.parametrize("ids", [None, [7, 7, 1, 2, 3, 1]])
@pytest.mark.parametrize("threshold", [-1.0, 0.3, 1.1])
def test_captions_that_are_nearly_the_same_are_no_negatives(ids: list[int] | None, threshold: float) -> None:
    """Of both losses, term by term; the features that are compared have another width, and get no gradient."""
    image, text = F.normalize(randn(6, 5), dim=1), F.normalize(randn(6, 5, seed=1), dim=1)
    guide = F.normalize(randn(6, 3, seed=2), dim=1).requires_grad_()
    caption_ids = None if ids is None else torch.tensor(ids)
    out = alike(ids, guide.tolist(), threshold)
    expected = {"clip": 0.0, "sigmoid": 0.0}
    for rows, columns in ((image.tolist(), text.tolist()), (text.tolist(), image.tolist())):
        for i, row in enumerate(rows):
            kept = [math.exp(9.0 * dot(row, column)) for j, column in enumerate(columns) if not out[i][j]]
            expected["clip"] -= math.log(math.exp(9.0 * dot(row, columns[i])) / sum(kept)) / 12
    for i, v in enumerate(image.tolist()):
        for j, t in enumerate(text.tolist()):
            if not out[i][j]:
                logit = (1 if i == j else -1) * (9.0 * dot(v, t) - 2.0)
                expected["sigmoid"] += math.log1p(math.exp(-logit)) / 6
    text.requires_grad_()
    found = {"clip": clip_loss(image, text, 9.0, caption_ids, guide=guide, false_negatives=threshold),
             "sigmoid": sigmoid_loss(image, text, 9.0, -2.0, caption_ids, guide=guide, false_negatives=threshold)}
    assert {name: loss.item() for name, loss in found.items()} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    sum(found.values(), torch.zeros(())).backward()
    assert guide.grad is None
    count = sum(map(sum, out))
    assert {-1.0: count == 30, 0.3: 0 < count < 20, 1.1: count == (0 if ids is None else 4)}[threshold]


def test_loss_of_equal_features_is_the_logarithm_of_the_batch() -> None:
    same = F.normalize(torch.ones(8, 4), dim=1)
    assert clip_loss(same, same, 100.0).item() == pytest.approx(math.log(8), rel=1e-6)
    assert ntxent_loss(same, same, 0.1).item() == pytest.approx(math.log(15), rel=1e-6)


@pytest.mark.parametrize("ids", [None, [0, 1, 2, 3, 4, 5], [7, 7, 1, 2, 7, 1], [3] * 6])
@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (10.0, -10.0), (100.0, 3.0)])
def test_sigmoid_loss_is_the_papers(ids: list[int] | None, scale: float, bias: float) -> None:
    image, text = F.normalize(randn(6, 5), dim=1), F.normalize(randn(6, 5, seed=1), dim=1)
    caption_ids = None if ids is None else torch.tensor(ids)
    loss = sigmoid_loss(image, text, torch.tensor(scale), torch.tensor(bias), caption_ids)
    expected = 0.0
    for i, v in enumerate(image.tolist()):
        for j, t in enumerate(text.tolist()):
            if i == j or ids is None or ids[i] != ids[j]:
                logit = (1 if i == j else -1) * (scale * dot(v, t) + bias)
                expected -= math.log(1 / (1 + math.exp(-logit)))  # log sigmoid
    assert loss.item() == pytest.approx(expected / 6, rel=1e-5)


def test_sigmoid_loss_asks_about_every_pair_on_its_own() -> None:
    features = torch.eye(4)
    # all four positives right without a doubt; all negatives at the bias
    loss = sigmoid_loss(features, features, 1000.0, -10.0)
    assert loss.item() == pytest.approx(3 * math.log1p(math.exp(-10)), rel=1e-5)
    # one shared caption: nothing is negative
    assert sigmoid_loss(features, features, 1000.0, -10.0, torch.zeros(4, dtype=torch.int64)).item() == 0.0


def slow_ntxent(z1: list[list[float]], z2: list[list[float]], temperature: float) -> float:
    """SimCLR's algorithm 1: rows 2k - 1 and 2k are the views of one image; l(i, j) over both orders."""
    rows = [[x / math.sqrt(dot(row, row)) for x in row] for pair in zip(z1, z2, strict=True) for row in pair]

    def similarity(i: int, k: int) -> float:
        return math.exp(dot(rows[i], rows[k]) / temperature)

    def anchor_loss(i: int, j: int) -> float:
        return -math.log(similarity(i, j) / sum(similarity(i, k) for k in range(len(rows)) if k != i))

    pairs = [(i, i + 1) for i in range(0, len(rows), 2)]
    return sum(anchor_loss(i, j) + anchor_loss(j, i) for i, j in pairs) / len(rows)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_ntxent_loss_is_the_papers(temperature: float, count: int) -> None:
    z1, z2 = 3 * randn(count, 5), randn(count, 5, seed=1)
    expected = slow_ntxent(z1.tolist(), z2.tolist(), temperature)
    assert ntxent_loss(z1, z2, temperature).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_byol_loss_is_the_papers() -> None:
    prediction, target = randn(6, 5), 4 * randn(6, 5, seed=1)
    expected = 0.0
    for p, t in zip(prediction.tolist(), target.tolist(), strict=True):
        unit_p, unit_t = ([x / math.sqrt(dot(v, v)) for x in v] for v in (p, t))
        expected += sum((a - b) ** 2 for a, b in zip(unit_p, unit_t, strict=True))  # |p' - t'|^2 = 2 - 2 cos
    assert byol_loss(prediction, target).item() == pytest.approx(expected / 6, rel=1e-5)
    assert byol_loss(prediction, 3 * prediction).item() == pytest.approx(0.0, abs=1e-6)
    assert byol_loss(prediction, -prediction).item() == pytest.approx(4.0, rel=1e-6)


def test_byol_target_has_no_gradient() -> None:
    prediction, target = randn(6, 5).requires_grad_(), randn(6, 5, seed=1).requires_grad_()
    byol_loss(prediction, target).backward()
    assert prediction.grad is not None
    assert prediction.grad.abs().max() > 0
    assert target.grad is None


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "clip": lambda a, b: clip_loss(a, b, torch.tensor(100.0)),
    "ntxent": lambda a, b: ntxent_loss(a, b, temperature=0.01),
    "byol": byol_loss,
    "sigmoid": lambda a, b: sigmoid_loss(a, b, torch.tensor(100.0), torch.tensor(-10.0)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_computes_in_float32_under_autocast(name: str) -> None:
    a, b = (F.normalize(randn(16, 32, seed=s), dim=1).bfloat16().requires_grad_() for s in (0, 1))
    expected = LOSSES[name](a.float(), b.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ b.T).dtype == torch.bfloat16
        loss = LOSSES[name](a, b)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # logits in bfloat16 are off by 1e-3
    loss.backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_is_differentiable_against_finite_differences(name: str) -> None:
    def gentle(a: Tensor) -> Tensor:
        b = randn(4, 3, seed=1)
        return {
            "clip": lambda: clip_loss(a, b, 2.0, torch.tensor([0, 0, 1, 2])),
            "ntxent": lambda: ntxent_loss(a, b, 0.5),
            "byol": lambda: byol_loss(a, b),
            "sigmoid": lambda: sigmoid_loss(a, b, 2.0, -1.0, torch.tensor([0, 0, 1, 2])),
        }[name]()

    a, direction, step = randn(4, 3).requires_grad_(), randn(4, 3, seed=2), 1e-2
    gentle(a).backward()
    assert a.grad is not None
    with torch.no_grad():
        slope = (gentle(a + step * direction) - gentle(a - step * direction)) / (2 * step)
    assert (a.grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-2)


def test_the_scale_is_a_multiplier_not_its_logarithm() -> None:
    features = F.normalize(randn(6, 5), dim=1)
    losses = [clip_loss(features, features, scale).item() for scale in (0.0, 1.0, 10.0, 100.0)]
    assert losses[0] == pytest.approx(math.log(6), rel=1e-6)
    assert all(later < earlier for earlier, later in pairwise(losses))


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5], [7, 3, 7, 3, 7, 1], [2] * 6, [2**40, 0, -1, 0, 2**40, 5]])
def test_chance_is_the_loss_of_a_model_that_tells_nothing_apart(ids: list[int]) -> None:
    alike = F.normalize(torch.ones(6, 5), dim=1)
    chance = chance_loss(torch.tensor(ids))
    assert chance.item() == pytest.approx(clip_loss(alike, alike, 14.0, torch.tensor(ids)).item(), abs=1e-6)
    assert chance.item() == pytest.approx(sum(math.log(1 + sum(b != a for b in ids)) for a in ids) / 6, abs=1e-6)


@pytest.mark.parametrize(("image", "text"), [((4, 5), (3, 5)), ((4, 5), (4, 6)), ((4, 5, 1), (4, 5))])
def test_shapes_are_checked_in_tests(image: tuple[int, ...], text: tuple[int, ...]) -> None:
    with pytest.raises(TypeCheckError):
        clip_loss(torch.ones(image), torch.ones(text), 1.0)


@pytest.mark.parametrize("name", ["clip", "clip with guide", "sigmoid", "ntxent"])
def test_logits_in_parts_change_nothing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    a, b = randn(7, 5).requires_grad_(), randn(7, 5, seed=1).requires_grad_()
    scale, ids = torch.tensor(3.0, requires_grad=True), torch.tensor([0, 0, 1, 2, 1, 3, 4])
    guide = F.normalize(randn(7, 3, seed=2), dim=1)

    def found() -> list[Tensor]:
        one, other = F.normalize(a, dim=1), F.normalize(b, dim=1)
        losses = {"clip": lambda: clip_loss(one, other, scale, ids), "ntxent": lambda: scale * ntxent_loss(a, b, 0.3),
                  "clip with guide": lambda: clip_loss(one, other, scale, ids, guide=guide, false_negatives=0.3),
                  "sigmoid": lambda: sigmoid_loss(one, other, scale, -1.0, ids)}
        loss = losses[name]()
        return [loss.detach(), *torch.autograd.grad(loss, (a, b, scale))]

    whole = found()
    monkeypatch.setattr(functional, "LOGITS_AT_ONCE", 40)  # some rows at a time, the last time fewer
    for one, other in zip(found(), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class _Largest(TorchDispatchMode):
    """Remembers the most numbers that any result of an operation has had."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else (result,):
            self.numbers = max(self.numbers, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return result


@pytest.mark.parametrize(("at_once", "most"), [(2**24, 128 * 128), (2048, 2048)])
def test_no_more_logits_are_held_than_allowed(monkeypatch: pytest.MonkeyPatch, at_once: int, most: int) -> None:
    monkeypatch.setattr(functional, "LOGITS_AT_ONCE", at_once)
    image, text = (F.normalize(randn(128, 4, seed=s), dim=1).requires_grad_() for s in (0, 1))
    with _Largest() as largest:
        clip_loss(image, text, 10.0, torch.arange(128)).backward()
    assert largest.numbers == most
