"""Models from elsewhere: Hugging Face folders, the release's checkpoints, runs that are not finished, the network."""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from tower_oracles import images, shake
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    ViTImageProcessor,
)

from aclip import models
from aclip.errors import CheckpointError, ConfigError, UnsupportedModelError
from aclip.exporters.tokenizer_files import write_tokenizer
from aclip.models import hugging_face, network, sources
from aclip.models.released import _SIZES, released_config

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 16, "vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406}
VISION = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
          "image_size": 24, "patch_size": 8}
HF_VARIANTS = {
    "quick gelu": ({}, {}),
    "gelu, eps, other widths": ({"hidden_act": "gelu", "layer_norm_eps": 1e-6},
                                {"hidden_act": "gelu", "layer_norm_eps": 1e-6}),
    "old end of text": ({"eos_token_id": 2}, {}),
    "other end of text": ({"eos_token_id": 40000}, {}),
}
SIGLIP_SEES = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
CAPTIONS = ["a cat", "two dogs on a red sofa"]


def hugging_face_folder(folder: Path, text: dict, vision: dict) -> CLIPModel:
    torch.manual_seed(0)
    config = CLIPConfig(text_config=TEXT | text, vision_config=VISION | vision, projection_dim=24)
    model = shake(CLIPModel(config)).eval()
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, image_mean=[0.1, 0.2, 0.3]
                       ).save_pretrained(folder)
    return model


@pytest.mark.parametrize(("text", "vision"), HF_VARIANTS.values(), ids=HF_VARIANTS)
@torch.no_grad()
def test_hugging_face_folders_give_their_own_features(text, vision, tmp_path):
    theirs = hugging_face_folder(tmp_path / "clip", text, vision)
    ours = models.create_model(tmp_path / "clip").eval()
    pixels = images(2, (24, 24))
    torch.testing.assert_close(models.encode_image(ours.visual, pixels).features,
                               theirs.get_image_features(pixels).pooler_output, rtol=0, atol=1e-5)
    tokens = models.tokenizer_of(tmp_path / "clip")(CAPTIONS)
    assert tokens.shape == (2, 16)
    if text.get("eos_token_id") == 40000:
        tokens[tokens == 49407] = 40000  # and no longer the highest id
        tokens[:, 1] = 49000
    torch.testing.assert_close(models.encode_text(ours, tokens),
                               theirs.get_text_features(tokens).pooler_output, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.logit_scale, theirs.logit_scale)
    assert models.can_cut(ours) == (text.get("eos_token_id") != 40000)


SEES = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.2, 0.3, 0.4]}
PROCESSORS = {
    "written by transformers": (CLIPImageProcessor, SEES | {
        "size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}),
    "classic": (CLIPImageProcessor, SEES | {
        "feature_extractor_type": "CLIPFeatureExtractor", "do_resize": True, "size": 24, "do_center_crop": True,
        "crop_size": 24, "do_normalize": True, "resample": 3}),
    "bilinear": (CLIPImageProcessor, SEES | {"size": 24, "crop_size": [24, 24], "resample": 2}),
    "not normalised": (CLIPImageProcessor, {"size": 24, "crop_size": 24, "do_normalize": False}),
    "squashed, cropped to the same": (CLIPImageProcessor, SEES | {
        "size": {"height": 24, "width": 24}, "crop_size": 24}),
    "SigLIP's": (SiglipImageProcessor, SEES | {
        "image_processor_type": "SiglipImageProcessor", "size": {"height": 24, "width": 24}}),
    "ViT's, one number": (ViTImageProcessor, SEES | {
        "image_processor_type": "ViTImageProcessor", "size": 24, "resample": 2}),
}
"""Name -> what transformers reads it with, and what is in the file."""


@pytest.mark.parametrize("nested", [False, True], ids=["own file", "nested"])
@pytest.mark.parametrize(("processor", "given"), PROCESSORS.values(), ids=PROCESSORS)
def test_hugging_face_folders_say_how_pictures_are_prepared(processor, given, nested, tmp_path):
    other = {"size": 1, "image_mean": [0.9] * 3, "image_std": [0.9] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(other if nested else given))
    (tmp_path / "processor_config.json").write_text(json.dumps(  # without nesting as transformers 4 has it
        {"processor_class": "CLIPProcessor"} | ({"image_processor": given} if nested else {})))
    ours = image_transform_v2(PreprocessCfg(size=24, **hugging_face.preprocess(tmp_path)), is_train=False)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8))
    theirs = processor.from_pretrained(tmp_path)(picture, return_tensors="pt")["pixel_values"][0]
    # the resampling of two libraries: equal up to the rounding of pixels to bytes
    assert (ours(picture) - theirs).abs().max() < 2.5 / 255 / min(given.get("image_std", [1.0]))


def test_what_a_processor_of_transformers_saves_is_read(tmp_path):
    hugging_face_folder(tmp_path / "clip", {}, {})
    (tmp_path / "clip" / "preprocessor_config.json").unlink()
    write_tokenizer(tmp_path / "clip", 16)
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24},
                                                 image_mean=[0.1, 0.2, 0.3]),
                              CLIPTokenizer.from_pretrained(tmp_path / "clip"))
    processor.save_pretrained(tmp_path / "clip")
    seen = models.preprocess_config(models.load(tmp_path / "clip").model)
    assert (seen["mean"], seen["size"]) == ((0.1, 0.2, 0.3), (24, 24))


@pytest.mark.parametrize(("change", "what"), [
    ({"resample": 1}, r"resample 1, and open_clip has 2 \(bilinear\) and 3 \(bicubic\)"),
    ({"do_rescale": False}, "other pixels than those from 0 to 1"),
    ({"rescale_factor": 1 / 127.5}, "other pixels than those from 0 to 1"),
    ({"size": {"longest_edge": 24}}, "a size by longest_edge, and open_clip has shortest_edge, or height and width"),
    ({"do_resize": False}, "a crop and no resizing"),
    ({"size": 32}, "a crop to 24 of pictures resized to 32, and open_clip resizes to what it crops"),
])
def test_pictures_that_open_clip_cannot_prepare_alike_are_refused(change, what, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SEES | {"size": 24, "crop_size": 24} | change))
    with pytest.raises(UnsupportedModelError, match=f"preprocessor_config.json' prepares pictures with {what}"):
        hugging_face.preprocess(tmp_path)


@pytest.mark.parametrize(("name", "content"), [
    ("preprocessor_config.json", "{"), ("preprocessor_config.json", "[1]"), ("processor_config.json", "[1]"),
    ("processor_config.json", '{"image_processor": {"size": 24}}'),
    ("preprocessor_config.json", '{"size": [24], "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}'),
])
def test_damaged_processors_are_named(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"/{name}' is damaged"):
        hugging_face.preprocess(tmp_path)


def test_hugging_face_folders_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "siglip").mkdir()
    SiglipConfig().save_pretrained(tmp_path / "siglip")
    with pytest.raises(UnsupportedModelError, match="of type 'siglip': 'clip' with both towers is read"):
        models.create_model(tmp_path / "siglip")
    hugging_face_folder(tmp_path / "mixed", {"hidden_act": "gelu"}, {})
    with pytest.raises(UnsupportedModelError, match="activations gelu, quick_gelu"):
        models.create_model(tmp_path / "mixed")
    hugging_face_folder(tmp_path / "ends", {"eos_token_id": [49406, 49407]}, {})
    with pytest.raises(UnsupportedModelError, match=r"eos_token_id is \[49406, 49407\]"):
        models.create_model(tmp_path / "ends")
    hugging_face_folder(tmp_path / "clip", {}, {})
    state = load_file(tmp_path / "clip" / "model.safetensors")
    name = "vision_model.encoder.layers.1.self_attn.k_proj.weight"
    save_file({key: tensor for key, tensor in state.items() if key != name}, tmp_path / "clip" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing \(visual\.transformer\.resblocks\.1\.attn\.in_proj_weight\)"):
        models.create_model(tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds config\.json but no weights"):
        models.create_model(tmp_path / "clip")
    (tmp_path / "clip" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json' is damaged"):
        models.create_model(tmp_path / "clip")


class ReleasedText(torch.nn.Module):
    """CLIP's text tower as the release has it, under its names, from torch's own parts."""

    def __init__(self, width: int, layers: int, joint: int, context: int) -> None:
        super().__init__()
        block = {"ln_1": torch.nn.LayerNorm(width), "attn": torch.nn.MultiheadAttention(width, width // 64),
                 "ln_2": torch.nn.LayerNorm(width), "mlp": torch.nn.ModuleDict(
                     {"c_fc": torch.nn.Linear(width, 4 * width), "c_proj": torch.nn.Linear(4 * width, width)})}
        blocks = [torch.nn.ModuleDict(block if i == 0 else _fresh(block)) for i in range(layers)]
        self.transformer = torch.nn.ModuleDict({"resblocks": torch.nn.ModuleList(blocks)})
        self.token_embedding = torch.nn.Embedding(49408, width)
        self.positional_embedding = torch.nn.Parameter(0.1 * torch.randn(context, width))
        self.ln_final = torch.nn.LayerNorm(width)
        self.text_projection = torch.nn.Parameter(torch.randn(width, joint) / 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = (self.token_embedding(tokens) + self.positional_embedding).transpose(0, 1)
        future = torch.full((len(x), len(x)), float("-inf")).triu(1)
        for block in self.transformer["resblocks"]:
            normed = block["ln_1"](x)
            x = x + block["attn"](normed, normed, normed, need_weights=False, attn_mask=future)[0]
            hidden = block["mlp"]["c_fc"](block["ln_2"](x))
            x = x + block["mlp"]["c_proj"](hidden * torch.sigmoid(1.702 * hidden))
        x = self.ln_final(x.transpose(0, 1))
        return x[torch.arange(len(x)), tokens.argmax(dim=1)] @ self.text_projection


def _fresh(block: dict) -> dict:
    return {"ln_1": torch.nn.LayerNorm(64), "attn": torch.nn.MultiheadAttention(64, 1),
            "ln_2": torch.nn.LayerNorm(64), "mlp": torch.nn.ModuleDict(
                {"c_fc": torch.nn.Linear(64, 256), "c_proj": torch.nn.Linear(256, 64)})}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A checkpoint in the release's layout, wrapped as its trainer wraps it, and the towers that it was made of."""
    torch.manual_seed(0)
    visual = shake(timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)).eval()
    text = shake(ReleasedText(64, 2, 24, 20))
    projection = torch.randn(192, 24) / 8
    state = {f"visual.{name}": tensor for name, tensor in visual.state_dict().items()}
    state |= {f"visual_ema.{name}": torch.zeros_like(tensor) for name, tensor in visual.state_dict().items()}
    state |= dict(text.state_dict()) | {"image_projection": projection, "logit_scale": torch.tensor(3.0)}
    state |= {"image_projection_e": projection, "text_projection_e": text.text_projection.detach(),
              "image_mlp.layer1.weight": torch.zeros(8, 192), "im_proj_byol.1.num_batches_tracked": torch.tensor(7)}
    state |= {name.replace("transformer.", "transformer_e."): t for name, t in state.items()
              if name.startswith("transformer.")}
    path = tmp_path_factory.mktemp("released") / "checkpoint_best.pt"
    torch.save({"epoch": 25, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()},
                "optimizer": {"state": {}}, "best_acc1": np.float64(43.9), "args": argparse.Namespace(lr=5e-4)}, path)
    return path, visual, text, projection


@torch.no_grad()
def test_the_releases_checkpoint_gives_its_features_and_scores(released):
    path, visual, text, projection = released
    loaded = models.load(path)
    pixels = images(2, (32, 32))
    torch.testing.assert_close(
        loaded.encode_image(pixels, normalize=False), visual.forward_features(pixels)[:, 0] @ projection,
        rtol=0, atol=1e-5)
    tokens = loaded.tokenizer(CAPTIONS)
    torch.testing.assert_close(loaded.encode_text(tokens, normalize=False), text(tokens), rtol=0, atol=1e-5)
    assert loaded.attention_scores(pixels).shape == (2, 4)
    assert loaded.model.logit_scale == 3.0
    assert tuple(models.preprocess_config(loaded.model)["mean"]) == (0.485, 0.456, 0.406)
    shape = models.shape_of(models.model_config(path))
    assert (shape.width, shape.layers, shape.heads, shape.grid_size) == (192, 12, 3, (2, 2))
    assert shape.text_cut


def test_a_release_of_an_unknown_size_is_named(released, tmp_path):
    state = {name.removeprefix("module."): t for name, t in torch.load(
        released[0], weights_only=False)["state_dict"].items()}
    torch.save({name: t for name, t in state.items() if ".blocks.11." not in name}, tmp_path / "short.pt")
    with pytest.raises(CheckpointError, match="no ViT of width 192 and 11 layers: there are 192 x 12"):
        models.create_model(tmp_path / "short.pt")
    torch.save({name: t for name, t in state.items() if name != "ln_final.weight"}, tmp_path / "broken.pt")
    with pytest.raises(CheckpointError, match=r"the release's layout, but 'ln_final\.weight' is missing"):
        models.create_model(tmp_path / "broken.pt")


def release_of_size(width: int, layers: int, heads: int, patch: int) -> dict[str, torch.Tensor]:
    """A state of the release's layout that has shapes and no numbers."""
    with torch.device("meta"):
        visual = VisionTransformer(img_size=224, patch_size=patch, embed_dim=width, depth=layers, num_heads=heads,
                                   num_classes=0)
        text = ReleasedText(64, 1, 24, 20)
        state = {f"visual.{name}": tensor for name, tensor in visual.state_dict().items()}
        return state | dict(text.state_dict()) | {"image_projection": torch.empty(width, 24)}


RELEASED_SIZES = {"tiny": (192, 12, 3, 16), "base": (768, 12, 12, 16), "large": (1024, 24, 16, 16)}
"""Width, layers, heads and patch as SLIP's and A-CLIP's models.py have them; tiny, which they do not have, as timm."""


def test_every_size_of_the_release_gets_its_heads():
    assert RELEASED_SIZES.keys() == set(_SIZES.values())
    for width, layers, heads, patch in RELEASED_SIZES.values():
        shape = models.shape_of(released_config(release_of_size(width, layers, heads, patch), Path("release.pt")))
        assert (shape.width, shape.layers, shape.heads) == (width, layers, heads)
        assert (shape.patch_size, shape.image_size) == ((patch, patch), (224, 224))


def test_the_releases_small_vit_is_refused_because_its_heads_are_others():
    with pytest.raises(UnsupportedModelError, match=r"release\.pt are .* 12 heads where timm's .* has 6.*768 x 12"):
        released_config(release_of_size(384, 12, 12, 16), Path("release.pt"))


@pytest.mark.parametrize("asked", [True, False])
def test_code_beside_a_tokenizer_is_not_run_even_if_the_config_asks_for_it(tmp_path, asked):
    folder, trace = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    config = models.model_config("vit-micro")
    config["text_cfg"] |= {"hf_tokenizer_name": str(folder), "tokenizer_kwargs": {"trust_remote_code": asked}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    save_file(models.create_model("vit-micro").state_dict(), folder / "open_clip_model.safetensors")
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}))
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(trace)!r}).touch()\nclass Own: ...\n")
    with pytest.raises(CheckpointError, match=r"the tokenizer .* of this model cannot be fetched: .*custom code"):
        models.load(folder)
    assert not trace.exists()


@pytest.mark.parametrize("change", [
    {"text_config": None}, {"vision_config": {"num_attention_heads": 0}}, {"vision_config": {"hidden_size": "768"}},
    {"text_config": {"hidden_act": ["gelu"]}}, {"text_config": {"hidden_size": 0}}])
def test_hugging_face_configs_that_describe_no_model_are_damage(change, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(
        {"model_type": "clip", "text_config": {}, "vision_config": {}} | change))
    with pytest.raises(CheckpointError, match=r"config\.json' describes no model"):
        models.model_config(tmp_path)


@pytest.mark.parametrize("options", [{"nonsense": 1}, [1], {"clean": "nonsense"}])
def test_options_that_the_tokenizer_does_not_take_are_damage(options):
    config = models.model_config("vit-micro")
    config["text_cfg"]["tokenizer_kwargs"] = options
    with pytest.raises(CheckpointError, match="the config of this model gives its tokenizer "):
        models.tokenizer_of(config)


@pytest.mark.parametrize("config", [[1], {"embed_dim": 8, "text_cfg": {}, "vision_cfg": {"timm_model_name": 3}}])
def test_configs_of_another_kind_are_named(config, tmp_path):
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    (tmp_path / "model.pth").touch()
    with pytest.raises((ConfigError, UnsupportedModelError), match=f"^model '{tmp_path}': this "):
        models.create_model(tmp_path)


def write_run(folder: Path, model: torch.nn.Module, steps: dict[int, float], architecture: str = "vit-micro",
              **settings) -> None:
    """Write the checkpoints of an unfinished run, each with another logit scale."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model": architecture, "recipe": {}, **settings}))
    for step, scale in steps.items():
        place = folder / "checkpoints" / f"step-{step:08d}"
        place.mkdir(parents=True)
        state = {f"method/model.{name}": t.detach().clone() for name, t in model.state_dict().items()}
        state["method/model.logit_scale"] = torch.tensor(scale)
        save_file(state | {"method/ema_visual.conv1.weight": torch.zeros(1), "rng/torch": torch.zeros(1)},
                  place / "state.safetensors")
        (place / "state.json").write_text('{"step": 1}')


def test_unfinished_runs_and_their_checkpoints_are_models(tmp_path):
    model = models.create_model("vit-micro", image_size=(32, 48))
    write_run(tmp_path / "run", model, {9: 1.0, 10: 2.0}, image_size=[32, 48])
    newest = models.load(tmp_path / "run")
    assert newest.model.logit_scale == 2.0
    assert models.preprocess_config(newest.model) == models.preprocess_config(model)  # of a fresh model, not CLIP's
    assert torch.equal(newest.model.visual.positional_embedding, model.visual.positional_embedding)
    assert models.create_model(tmp_path / "run" / "checkpoints" / "step-00000009").logit_scale == 1.0
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"the run of .* is not known: .*config\.json' is missing"):
        models.create_model(tmp_path / "run")


@pytest.mark.parametrize(("size", "what"), [
    ("large", "not 'large'"), ([32, 32, 32], r"not \[32, 32, 32\]"), ([32, "48"], "not"), (-32, "images of -32 x -32"),
])
def test_runs_with_a_size_that_is_none_are_named(size, what, tmp_path):
    write_run(tmp_path / "run", torch.nn.Identity(), {1: 0.0}, image_size=size)
    with pytest.raises(CheckpointError, match=rf"^the image_size in '{tmp_path}/run/config\.json' is none .*{what}"):
        models.load(tmp_path / "run")


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP:webli", "hf-hub:someone/siglip"])
def test_unfinished_fine_tuning_sees_pictures_as_what_it_started_from(name, tmp_path, monkeypatch):
    config = open_clip.get_model_config("ViT-B-16-SigLIP")
    (tmp_path / "config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": SIGLIP_SEES}))
    monkeypatch.setattr(sources, "check_hub", lambda *_: None)
    monkeypatch.setattr(sources, "download_pretrained_from_hf", lambda *_, **__: str(tmp_path / "config.json"))
    write_run(tmp_path / "run", torch.nn.Identity(), {1: 0.0}, architecture=name)
    found = sources.resolve_source(tmp_path / "run").preprocess
    assert {key: list(value) if key in ("mean", "std") else value for key, value in found.items()} == SIGLIP_SEES


def test_weights_of_big_vision_see_pictures_as_the_same_weights_by_their_tag(tmp_path):
    (tmp_path / "webli.npz").touch()
    found = sources.resolve_source(f"ViT-B-16-SigLIP:{tmp_path / 'webli.npz'}").preprocess
    assert found == sources.resolve_source("ViT-B-16-SigLIP:webli").preprocess


def test_unfinished_runs_without_text_are_image_towers(tmp_path):
    model = models.create_model("vit-micro", with_text=False)
    write_run(tmp_path / "run", model, {1: 0.0})
    path = tmp_path / "run" / "checkpoints" / "step-00000001" / "state.safetensors"
    save_file({k: t for k, t in load_file(path).items() if k != "method/model.logit_scale"}, path)
    assert not models.load(tmp_path / "run").has_text


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(network.huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(network.huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))


@pytest.mark.parametrize(("use", "what"), [
    (lambda: models.create_model("ViT-B-32:laion2b_s34b_b79k"), "'ViT-B-32:laion2b_s34b_b79k'"),
    (lambda: models.create_model("hf-hub:someone/model"), "'hf-hub:someone/model'"),
    (lambda: models.tokenizer_of("ViT-B-16-SigLIP"), "the tokenizer 'timm/ViT-B-16-SigLIP' of this model"),
])
@pytest.mark.usefixtures("offline")
def test_what_needs_the_network_says_so_at_once(use, what):
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=f"^{what} needs the network, and http://127.0.0.1:9 does not answer"):
        use()
    assert time.monotonic() - start < network.TIMEOUT


@pytest.mark.usefixtures("offline")
def test_an_architecture_alone_needs_no_network():
    assert models.shape_of(models.model_config("ViT-B-16-SigLIP")).joint_dim == 768


def test_folders_without_a_model_list_what_would_be_one(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither open_clip_config\.json .* checkpoints/step-\* .*Hugging Face"):
        models.create_model(tmp_path)
    (tmp_path / "config.json").write_text('{"recipe": {}}')
    with pytest.raises(CheckpointError, match="holds no model"):
        models.create_model(tmp_path)
    with pytest.raises(ConfigError, match="there is no folder"):
        models.create_model(f"local-dir:{tmp_path / 'missing'}")
