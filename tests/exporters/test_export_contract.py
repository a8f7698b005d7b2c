"""What every format in `EXPORTS` must do: the same features in its own library, or nothing at all."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from exported_models import TINY, changed, files_below, make_subject, with_shifted
from PIL import Image

from aclip.errors import ExportError
from aclip.exporters import EXPORTS, ExportFormat, Parity, Readback, Subject, made_examples, write_checked
from aclip.exporters.torch_export import write_companions

EXAMPLES = made_examples((24, 24))
SHALLOW = changed("vision_cfg", layers=1) | {"text_cfg": changed("text_cfg", layers=1)["text_cfg"]}
TRACED = ("onnx", "torch-export")  # formats whose cost grows with the layers
SUBJECTS = {name: make_subject(SHALLOW if name in TRACED else TINY) for name in EXPORTS}


def written(name: str, subject: Subject, folder: Path) -> Parity:
    return write_checked(EXPORTS[name], subject, folder, EXAMPLES, card=lambda parity: f"{parity}\n")


class Exported(NamedTuple):
    """An export of a tiny model, made and read once a format."""

    name: str
    subject: Subject
    folder: Path
    parity: Parity
    read: Readback


@pytest.fixture(scope="module", params=EXPORTS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    name, folder = request.param, tmp_path_factory.mktemp("exports") / request.param
    subject = SUBJECTS[name]
    return Exported(name, subject, folder, written(name, subject, folder), EXPORTS[name].read(folder, subject))


def test_features_are_the_models_own(exported: Exported) -> None:
    model, read, folder = exported.subject.model, exported.read, exported.folder
    assert exported.parity.largest < 1e-6
    assert exported.parity.text is not None
    assert {"README.md", "aclip_export.json"} < {path.name for path in folder.iterdir()}
    assert not list(folder.parent.glob(".*"))
    # once more, from the folder where it ended up, on other input and another batch size
    pixels = torch.randn(5, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    tokens = model.tokenizer(["one", "two cats", "three", "four &amp; five", "six"])
    assert read.encode_text is not None
    with torch.inference_mode():
        for theirs, ours in ((read.encode_image(pixels), model.encode_image(pixels)),
                             (read.encode_text(tokens), model.encode_text(tokens)),
                             (read.encode_image(pixels[:1]), model.encode_image(pixels[:1]))):
            torch.testing.assert_close(torch.nn.functional.normalize(theirs, dim=-1), ours, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("weight", "sentence"), [
    ("visual.transformer.resblocks.0.attn.in_proj_bias", "image features"),
    ("visual.ln_pre.weight", "image features"),
    ("ln_final.bias", "text features"),
    ("transformer.resblocks.0.mlp.c_fc.weight", "text features"),
    ("logit_scale", "the logit scale"),
])
def test_a_model_whose_weights_differ_is_refused_and_nothing_is_left(
    exported: Exported, weight: str, sentence: str, tmp_path: Path
) -> None:
    """The other model's export is copied to where this one's should be: `read` gives what was read of it before."""

    class Copying(ExportFormat):
        """Puts the export of another model in the place of the one that is asked for."""

        library = EXPORTS[exported.name].library

        def check_can_represent(self, subject: Subject) -> None:
            pass

        def write(self, subject: Subject, target: Path) -> None:
            shutil.copytree(exported.folder, target, dirs_exist_ok=True)

        def read(self, source: Path, subject: Subject) -> Readback:
            return exported.read

        def usage(self, subject: Subject) -> str:
            return ""

    with pytest.raises(ExportError, match=rf"{sentence} by .* differ from the model's by .* nothing was written"):
        write_checked(Copying(), with_shifted(exported.subject, weight), tmp_path / "a" / "b", EXAMPLES,
                      card=lambda parity: "")
    assert files_below(tmp_path) == []


def test_what_the_model_card_shows_runs(exported: Exported, tmp_path: Path) -> None:
    name, model = exported.name, exported.subject.model
    picture = tmp_path / "cat.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(picture)
    pixels = model.preprocess(Image.open(picture))[None]
    texts = ["a cat", "a dog"]
    tokens = model.tokenizer(texts)
    shown = EXPORTS[name].usage(exported.subject)
    shown = shown.replace("FOLDER", str(exported.folder)).replace("cat.png", str(picture))
    names: dict[str, Any] = {"pixels": pixels.numpy() if name == "onnx" else pixels, "tokens": tokens}
    with torch.no_grad():
        exec(shown, names)
        image, text = model.encode_image(pixels), model.encode_text(tokens)
        probabilities = (model.model.logit_scale.exp() * image @ text.T).softmax(dim=-1)
    if "image_features" in names:
        torch.testing.assert_close(torch.as_tensor(names["image_features"]), image, rtol=0, atol=1e-5)
    if "probabilities" in names:
        torch.testing.assert_close(names["probabilities"], probabilities, rtol=0, atol=1e-3)
    if name == "onnx":
        other = model.encode_text(model.tokenizer(["a cat", "two dogs"])).detach()
        torch.testing.assert_close(torch.as_tensor(names["text_features"]), other, rtol=0, atol=1e-5)
    if name == "safetensors":
        assert names["weights"].keys() == model.model.state_dict().keys()
        assert names["config"]["model_cfg"] == TINY


@pytest.mark.parametrize("name", [name for name in EXPORTS if name not in ("open_clip", "onnx")])
def test_an_image_tower_alone_is_exported_where_the_format_can(name: str, tmp_path: Path) -> None:
    parity = written(name, make_subject(SHALLOW, with_text=False), tmp_path / "out")
    assert parity.image < 1e-6
    assert parity.text is None
    assert not (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize(("config", "bias"), [(TINY, None), (changed(init_logit_bias=-10.0), -10.0)])
def test_graphs_come_with_what_turns_features_into_logits(
    config: dict[str, Any], bias: float | None, tmp_path: Path
) -> None:
    """ONNX and torch.export hold the towers alone; scale and bias stand beside them, as the model has them."""
    subject = make_subject(config)
    write_companions(subject, tmp_path)
    beside = json.loads((tmp_path / "config.json").read_text())
    assert beside["logit_scale"] == pytest.approx(float(subject.model.model.logit_scale.detach().exp()))
    assert ("logit_bias" in beside) == (bias is not None)
    if bias is not None:
        assert beside["logit_bias"] == float(subject.model.model.logit_bias.detach()) == pytest.approx(bias, abs=0.5)


@pytest.mark.parametrize(("config", "what"), [
    (changed(quick_gelu=False), "the exact GELU"),
    (changed("vision_cfg", ls_init_value=None), "no LayerScale"),
    (changed(custom_text=True), "a text tower of its own module"),
    (changed("text_cfg", proj_bias=False, mlp_ratio=2.0, ls_init_value=0.3), "LayerScale in the text tower"),
])
def test_variants_of_the_architecture_come_out_the_same(config: dict[str, Any], what: str, tmp_path: Path) -> None:
    for name in ("huggingface", "open_clip"):
        assert written(name, make_subject(config), tmp_path / name).largest < 1e-6, what
