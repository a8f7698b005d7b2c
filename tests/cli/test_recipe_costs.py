"""What recipes cost by arithmetic, against figures worked out independently of the code."""

import pytest

from aclip import models, plan
from aclip.cli import main
from aclip.config import override
from aclip.describe import relative_to_padded
from aclip.recipes import RECIPES

# ViT-B/16, relative to CLIP: text padded to 77, text of 14 tokens, and that against CLIP padded. Worked out by hand
# with 99 tokens for a half-kept view and every patch embedded and trained (whole blocks of 2 x 2 give 101).
COSTS = {
    "clip": (1.00, 1.00, 0.88),
    "flip": (0.57, 0.51, 0.45),
    "a-clip": (1.28, 1.32, 1.16),
    "a-clip-eff": (1.07, 1.07, 0.95),
    "a-clip-online": (1.28, 1.32, 1.16),
    "a-clip-ema": (1.28, 1.32, 1.16),
    "random-1x50": (0.57, 0.51, 0.45),
    "attentive-1x50": (0.85, 0.83, 0.73),
    "attentive-2x50": (1.28, 1.32, 1.16),
    "attentive-3x33": (1.28, 1.31, 1.16),
    "slip": (2.71, 2.94, 2.59),
    "maskclip": (1.57, 1.65, 1.45),
    "finetune": (1.33, 1.33, 1.17),
    "finetune-attentive": (0.90, 0.84, 0.74),
}
TOLERANCE = 0.03


@pytest.mark.parametrize("name", COSTS)
def test_costs_are_those_worked_out_by_hand(name: str) -> None:
    resolved = plan.resolve(RECIPES[name], models.shape_of(models.model_config("ViT-B-16")))
    found = resolved.relative_cost(), resolved.relative_cost(14), relative_to_padded(resolved, 14)
    assert found == pytest.approx(COSTS[name], rel=TOLERANCE)


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["clip", "--text-tokens", "200"], "text_tokens is between 1 and 77 for ViT-B-16, not 200"),
    (["clip", "--text-tokens", "-5"], "not -5"),
    (["flip", "clip", "--passes.masked.mask_ratio", "0.75"], "recipe 'clip': "),
])
def test_what_makes_no_sense_is_named(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipes", "cost", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_three_quarters_masked_cost_a_third() -> None:
    flip = override(RECIPES["flip"], {"passes.masked.mask_ratio": 0.75})
    resolved = plan.resolve(flip, models.shape_of(models.model_config("ViT-B-16")))
    found = resolved.relative_cost(), resolved.relative_cost(14), relative_to_padded(resolved, 14)
    assert found == pytest.approx((0.36, 0.27, 0.24), rel=TOLERANCE)


def test_the_table_has_every_recipe_and_its_tokens(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["recipes", "cost"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert set(RECIPES) <= set(lines)
    assert lines["a-clip"].split()[1:4] == ["197", "EMA,", "2x101"]
    assert lines["clip"].split()[-3:] == ["1.00", "1.00", "0.88"]


def test_some_recipes_on_another_model(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    arguments = ["recipes", "cost", "flip", "--model", "vit-tiny", "--text-tokens", "9",
                 "--passes.masked.mask_ratio", "0.75"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "vit-tiny, text padded to 77 or cut to 9 tokens" in out
    assert "flip    17 " in out
    assert "a-clip" not in out
    assert main(["recipes", "cost", "flipp"]) == 2
    assert "did you mean 'flip'" in capsys.readouterr().err
