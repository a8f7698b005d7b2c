"""What every objective of the table has in common, and a user's own objective."""

from dataclasses import replace
from textwrap import dedent

import pytest
import torch
from synthetic_passes import CAPTIONS, HIDDEN, SHAPE, masked, step_context

import aclip.objectives
from aclip.config import Pass, TextPass
from aclip.errors import ConfigError
from aclip.objectives import OBJECTIVES, Objective
from aclip.plan import build

FROZEN = {"frozen": Pass(views=("a", "b"), encoder="frozen"), "theirs": TextPass(encoder="frozen")}
READS: dict[str, dict[str, Pass | TextPass]] = {
    "contrastive": {**masked(), **CAPTIONS},
    "ntxent": {**masked()},
    "byol": {**masked(), "target": Pass(views=("a", "b"), encoder="ema")},
    "masked_distillation": {**masked(), "target": Pass(views=("a", "b"), encoder="ema")},
    "masked_language": {**HIDDEN},
    "reconstruction": {**masked()},
    "sigmoid": {**masked(), **CAPTIONS},
    "bag_of_words": {**masked(), **CAPTIONS},
    "anchor": {**masked(), **CAPTIONS, **FROZEN},
    "affinity": {**masked(), **CAPTIONS, **FROZEN},
}


def built(name: str) -> Objective:
    options = {"hidden": 16, "out": 4} if name in ("ntxent", "byol") else {}
    objective: Objective = build(OBJECTIVES[name], {"reads": READS[name], "shape": SHAPE}, options, name)
    return objective


@pytest.mark.parametrize("name", OBJECTIVES)
def test_returns_a_float32_scalar_and_trains_all_of_its_heads(name: str) -> None:
    objective = built(name)
    loss = objective(replace(step_context(READS[name]), frozen_logit_scale=torch.tensor(10.0)))
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
    with pytest.raises(ConfigError, match=r"reads an? (image|text) pass.*, not none: correct its reads"):
        OBJECTIVES[name]({}, SHAPE)
    p = masked()["masked"]
    with pytest.raises(ConfigError, match="not first, second, third, captions: correct"):
        OBJECTIVES[name]({"first": p, "second": p, "third": p, **CAPTIONS}, SHAPE)


@pytest.mark.parametrize("name", ["contrastive", "sigmoid"])
def test_refuses_a_text_pass_without_a_feature_of_the_caption(name: str) -> None:
    with pytest.raises(ConfigError, match="text pass 'hidden' hides 30% of the tokens"):
        OBJECTIVES[name]({**masked(), **HIDDEN}, SHAPE)


@pytest.mark.parametrize(
    ("name", "options"),
    [("ntxent", {"temperature": "abc"}), ("ntxent", {"temperature": 0.0}), ("byol", {"hidden": 1.5}),
     ("reconstruction", {"loss": "l2"}), ("reconstruction", {"decoder_layers": -1}),
     ("masked_language", {"decoder_layers": 0}), ("sigmoid", {"init_bias": float("nan")})],
)
def test_options_are_validated_by_their_annotations(name: str, options: dict[str, object]) -> None:
    (option,) = options
    with pytest.raises(ConfigError, match=option):
        build(OBJECTIVES[name], {"reads": READS[name], "shape": SHAPE}, options, name)


def test_an_objective_of_the_users_own() -> None:
    """The example in the package's docstring, executed."""
    example = dedent(aclip.objectives.__doc__.split("script:\n")[1].split("\nA recipe")[0])
    definition = example[example.index("class") : example.index("OBJECTIVES[")].strip()
    assert len(definition.splitlines()) <= 12
    reads = {**masked(), **CAPTIONS}
    try:
        exec(example, {})
        loss = OBJECTIVES["alignment"](reads, SHAPE)(step_context(reads))
    finally:
        OBJECTIVES.pop("alignment", None)
    context = step_context(reads)
    cosines = (context.passes["masked"].features * context.texts["captions"].features).sum(dim=-1)
    torch.testing.assert_close(loss, 2 - 2 * cosines.mean())
