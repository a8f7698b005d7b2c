"""What every format in `EXPORTERS` must do: the same features in its own library, or nothing at all."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import TINY, changed, tiny_model, with_shifted

from aclip.errors import ExportError
from aclip.exporters import EXPORTERS, Exporter, Readback
from aclip.exporters.base import write_checked
from aclip.exporters.programs import write_metadata
from aclip.models import LoadedModel

SHALLOW = changed("vision_cfg", layers=1) | {"text_cfg": changed("text_cfg", layers=1)["text_cfg"]}
TRACED = ("onnx", "torch-export")  # formats whose cost grows with the layers


class Exported(NamedTuple):
    """An export of a tiny model, written and read once a format."""

    name: str
    model: LoadedModel
    folder: Path
    differences: dict[str, float]
    read: Readback


@pytest.fixture(scope="module", params=list(EXPORTERS))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    name, folder = request.param, tmp_path_factory.mktemp("exports") / request.param
    config = SHALLOW if name in TRACED else TINY
    model = tiny_model(config)
    differences = write_checked(EXPORTERS[name], model, config, folder)
    return Exported(name, model, folder, differences, EXPORTERS[name].read(folder, model))


def test_features_equal_the_models(exported: Exported) -> None:
    model, read, folder = exported.model, exported.read, exported.folder
    for what in ("image features", "text features", "logit scale"):
        assert exported.differences[what] < 1e-6
    assert {"README.md", "aclip_export.json"} < {path.name for path in folder.iterdir()}
    assert not list(folder.parent.glob(".*"))
    # once more, from the final folder, on other input and another batch size
    pixels = torch.randn(5, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    tokens = model.tokenizer(["one", "two cats", "three", "four &amp; five", "six"])
    assert read.encode_text is not None
    with torch.inference_mode():
        for theirs, ours in ((read.encode_image(pixels), model.encode_image(pixels)),
                             (read.encode_text(tokens), model.encode_text(tokens)),
                             (read.encode_image(pixels[:1]), model.encode_image(pixels[:1]))):
            torch.testing.assert_close(torch.nn.functional.normalize(theirs, dim=-1), ours, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("weight", "what"), [
    ("visual.transformer.resblocks.0.attn.in_proj_bias", "image features"),
    ("visual.ln_pre.weight", "image features"),
    ("ln_final.bias", "text features"),
    ("transformer.resblocks.0.mlp.c_fc.weight", "text features"),
    ("logit_scale", "logit scale"),
])
def test_an_export_with_other_weights_is_refused_and_nothing_is_left(
    exported: Exported, weight: str, what: str, tmp_path: Path
) -> None:
    class Copying(Exporter):
        """Writes the export of another model than it is asked for."""

        library = EXPORTERS[exported.name].library

        def write(self, model: LoadedModel, config: Mapping[str, Any], folder: Path) -> None:
            shutil.copytree(exported.folder, folder, dirs_exist_ok=True)

        def read(self, folder: Path, model: LoadedModel) -> Readback:
            return exported.read

        def usage(self, model: LoadedModel) -> str:
            return ""

    with pytest.raises(ExportError, match=rf"{what}: .* differs from the model by .* nothing was written"):
        write_checked(Copying(), with_shifted(exported.model, weight), TINY, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_code_on_the_model_card_runs(exported: Exported, tmp_path: Path) -> None:
    name, model = exported.name, exported.model
    image = tmp_path / "cat.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(image)
    pixels, tokens = model.preprocess(Image.open(image))[None], model.tokenizer(["a cat", "a dog"])
    code = EXPORTERS[name].usage(model).replace("FOLDER", str(exported.folder)).replace("cat.png", str(image))
    names: dict[str, Any] = {"pixels": pixels.numpy() if name == "onnx" else pixels, "tokens": tokens}
    with torch.no_grad():
        exec(code, names)
        image_features, text_features = model.encode_image(pixels), model.encode_text(tokens)
        probabilities = (model.model.logit_scale.exp() * image_features @ text_features.T).softmax(dim=-1)
        if "image_features" in names:
            torch.testing.assert_close(torch.as_tensor(names["image_features"]), image_features, rtol=0, atol=1e-5)
        if "probabilities" in names:
            torch.testing.assert_close(names["probabilities"], probabilities, rtol=0, atol=1e-3)
        if name == "onnx":
            text_features = model.encode_text(model.tokenizer(["a cat", "two dogs"]))
            torch.testing.assert_close(torch.as_tensor(names["text_features"]), text_features, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["huggingface", "torch-export"])
def test_an_image_tower_alone_is_exported(name: str, tmp_path: Path) -> None:
    differences = write_checked(EXPORTERS[name], tiny_model(SHALLOW, with_text=False), SHALLOW, tmp_path / "out")
    assert differences["image features"] < 1e-6
    assert "text features" not in differences
    assert not (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize(("config", "bias"), [(TINY, 0.0), (changed(init_logit_bias=-10.0), -10.0)])
def test_scale_and_bias_of_the_logits_are_beside_the_graphs(
    config: dict[str, Any], bias: float, tmp_path: Path
) -> None:
    model = tiny_model(config)
    write_metadata(model, tmp_path)
    metadata = json.loads((tmp_path / "config.json").read_text())
    assert metadata["logit_scale"] == pytest.approx(float(model.model.logit_scale.detach().exp()))
    assert metadata["logit_bias"] == pytest.approx(bias, abs=0.5)
    assert metadata["context_length"] == 20


@pytest.mark.parametrize(("config", "variant"), [
    (changed(quick_gelu=False), "the exact GELU"),
    (changed("vision_cfg", ls_init_value=None), "no LayerScale"),
    (changed(custom_text=True), "a text tower in a module of its own"),
    (changed("text_cfg", proj_bias=False, mlp_ratio=2.0, ls_init_value=0.3), "LayerScale in the text tower"),
])
def test_variants_of_the_architecture_are_exported(config: dict[str, Any], variant: str, tmp_path: Path) -> None:
    for name in ("huggingface", "open_clip"):
        differences = write_checked(EXPORTERS[name], tiny_model(config), config, tmp_path / name)
        assert max(differences["image features"], differences["text features"]) < 1e-6, variant
