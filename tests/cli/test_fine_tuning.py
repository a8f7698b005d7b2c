"""Fine-tuning a pretrained model at another resolution, as a user runs it."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from torch.nn import functional as F

from aclip import models
from aclip.cli import main
from aclip.exporters import open_clip as exported
from made_pictures import captioned_noise

# so small that the weights stay what they were: what is trained from can be told from what comes out
STANDING_STILL = (
    "--lr", "1e-12", "--weight-decay", "0", "--precision", "fp32",
    "--recipe.optimization.end_lr", "1e-12", "--recipe.optimization.warmup_start_lr", "1e-12",
    "--recipe.objectives.ntxent.options.hidden", "32", "--recipe.objectives.byol.options.hidden", "32",
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return captioned_noise(tmp_path_factory.mktemp("images"), 8 * [(40, 60)])


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with learned positions at 32 pixels, 8 x 8 patches."""
    folder = tmp_path_factory.mktemp("models") / "pretrained"
    torch.manual_seed(0)
    model = models.create_model("vit-micro")
    with torch.no_grad():
        model.visual.positional_embedding.normal_(std=0.2)
    config = models.model_config("vit-micro")
    del config["vision_cfg"]["pos_embed_type"]
    exported.save(model, config, models.preprocess_config(model), models.tokenizer_of(config), folder)
    return folder


@pytest.mark.parametrize(("wanted", "grid"), [("48", (12, 12)), ("24x40", (6, 10))])
def test_attentive_fine_tuning_at_another_resolution(
    images: Path, pretrained: Path, tmp_path: Path, wanted: str, grid: tuple[int, int]
) -> None:
    main(["train", "--recipe", "a-clip", "--model", str(pretrained), "--image-size", wanted, "--data", str(images),
          "--output", str(tmp_path / "run"), "--batch-size", "4", "--samples", "4", "--workers", "0", *STANDING_STILL])
    final = tmp_path / "run" / "final"
    before, after = models.create_model(pretrained), models.create_model(final)
    assert models.shape_of(models.model_config(final)).grid_size == grid
    picture = before.visual.positional_embedding[1:].unflatten(0, (8, 8)).permute(2, 0, 1)[None]
    expected = F.interpolate(picture, grid, mode="bicubic", antialias=True, align_corners=False)[0].flatten(1).T
    torch.testing.assert_close(after.visual.positional_embedding[1:], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(after.token_embedding.weight, before.token_embedding.weight, rtol=0, atol=1e-6)
    assert models.preprocess_config(after)["size"] == (4 * grid[0], 4 * grid[1])
    theirs = open_clip.create_model(f"local-dir:{final}").eval()
    pixels = torch.randn(2, 3, 4 * grid[0], 4 * grid[1])
    with torch.no_grad():
        torch.testing.assert_close(
            models.encode_image(after.eval().visual, pixels).features, theirs.encode_image(pixels), rtol=0, atol=1e-5)
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    kept = round(0.5 * grid[0] * grid[1] / 4) * 4
    assert f"{kept} of {grid[0] * grid[1]} patches kept" in settings["dataflow"]


@pytest.mark.parametrize("text", ["1x2x3", "large", "-3", "24x"])
def test_a_wrong_size_is_a_wrong_usage(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", f"--image-size={text}", "--data", "x.csv"]) == 2
    assert "image_size" in capsys.readouterr().err
