import io
import json
import logging
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tower_oracles import fresh_model, images, open_clip_alone, shake, write_model

from aclip import models
from aclip.errors import CheckpointError, ConfigError, UnsupportedModelError
from aclip.models import models, network, sources
from aclip.models.sources import IMAGENET_MEAN, IMAGENET_STD


@pytest.fixture(scope="module")
def tiny():
    return fresh_model("vit-tiny")


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "saved", tiny, models.model_config("vit-tiny"))


@pytest.mark.parametrize("name", [
    "vit-tiny", "vit-small", "ViT-B-32", "ViT-B-16", pytest.param("ViT-L-14", marks=pytest.mark.slow),
])
@torch.no_grad()
def test_unmasked_features_equal_open_clips(name):
    model = fresh_model(name)
    pixels = images(1, model.visual.image_size)
    tokens = models.tokenizer_of(name)(["a photo of a cat"])
    ours = F.normalize(models.encode_image(models.visual_of(model), pixels).features)
    torch.testing.assert_close(ours, model.encode_image(pixels, normalize=True), rtol=0, atol=1e-5)
    ours = F.normalize(models.encode_text(model, models.cut_after_eot(tokens)))
    torch.testing.assert_close(ours, model.encode_text(tokens, normalize=True), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["vit-tiny", "vit-small"])
def test_presets_load_in_open_clip_from_their_config_alone(name, tmp_path):
    model = fresh_model(name)
    folder = write_model(tmp_path / "final", model, models.model_config(name))
    text = (folder / "open_clip_config.json").read_text()
    assert name not in text  # no registered name is needed
    theirs = open_clip_alone(folder)
    pixels = images(1, model.visual.image_size)
    assert torch.equal(theirs.encode_image(pixels), model.encode_image(pixels))
    assert theirs.visual.preprocess_cfg["mean"] == [0.1, 0.2, 0.3]


def test_presets_are_what_they_say():
    tiny, small = (models.shape_of(models.model_config(name)) for name in ("vit-tiny", "vit-small"))
    assert (tiny.grid_size, tiny.width, tiny.layers, tiny.heads, tiny.joint_dim) == ((8, 8), 192, 4, 3, 192)
    assert (tiny.text_width, tiny.text_layers, tiny.context_length, tiny.text_cut) == (192, 4, 77, True)
    assert (small.grid_size, small.width, small.layers, small.heads) == ((14, 14), 384, 12, 6)
    assert small.joint_dim == 256
    assert (small.text_width, small.text_layers, small.context_length, small.text_cut) == (256, 6, 77, True)


def test_shape_agrees_with_the_model_that_is_built(tiny):
    shape, visual = models.shape_of(models.model_config("vit-tiny")), tiny.visual
    block, text_block = visual.transformer.resblocks[0], tiny.transformer.resblocks[0]
    assert shape.image_size == visual.image_size
    assert shape.patch_size == visual.conv1.kernel_size
    assert shape.grid_size == visual.grid_size
    assert (shape.width, shape.layers) == (visual.transformer.width, len(visual.transformer.resblocks))
    assert shape.heads == block.attn.num_heads
    assert shape.mlp_width == block.mlp.c_fc.out_features
    assert shape.joint_dim == visual.output_dim
    assert shape.num_prefix_tokens == len(visual.positional_embedding) - 64
    assert shape.text_width == tiny.transformer.width
    assert shape.text_layers == len(tiny.transformer.resblocks)
    assert shape.text_mlp_width == text_block.mlp.c_fc.out_features
    assert shape.context_length == tiny.context_length


def test_every_listed_model_has_a_shape_and_is_a_vit():
    names = models.list_models()
    assert {"vit-tiny", "vit-small", "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14-CLIPA"} <= set(names)
    assert {"ViT-B-16-SigLIP", "ViT-SO400M-14-SigLIP2-378", "vit_medium_patch16_gap_256"} <= set(names)
    assert not [name for name in names if name.startswith(("RN", "convnext", "coca", "roberta", "EVA", "swin"))]
    assert "ViT-SO400M-14-SigLIP-384" not in names  # 27.4 patches
    configs = {name: models.model_config(name) for name in names if "SigLIP" not in name or "B-16" in name}
    for config in configs.values():
        shape = models.shape_of(config)
        assert shape.grid_size[0] * shape.patch_size[0] == shape.image_size[0]
        assert shape.width % shape.heads == 0
    assert not models.shape_of(configs["ViT-H-14-CLIPA"]).text_cut


@pytest.mark.parametrize(("name", "what"), [
    ("RN50", "a ResNet image tower"),
    ("convnext_base", "timm's image tower convnext_base, which is no plain ViT"),
    ("EVA02-B-16", "eva02_base_patch16_clip_224, whose rotary positions"),
    ("swin_base_patch4_window7_224", "whose windows need the whole grid"),
    ("vit_relpos_medium_patch16_cls_224", "whose relative positions"),
    ("MobileCLIP-B", "whose convolutional stem"),
    ("ViTamin-S", "whose convolutional stages"),
    ("coca_ViT-B-32", r"captioning decoder \(CoCa\)"),
    ("coca_base", r"captioning decoder \(CoCa\)"),
    ("roberta-ViT-B-32", "Hugging Face text tower roberta-base"),
])
def test_unsupported_models_are_refused_before_they_are_built(name, what):
    for use in (models.create_model, models.model_config):
        with pytest.raises(UnsupportedModelError, match=f"model '{name}': .*{what}.*supported are .*ViT-B"):
            use(name)


@pytest.mark.parametrize(("name", "error", "match"), [
    ("vit-tinny", ConfigError, "unknown model 'vit-tinny': did you mean 'vit-tiny'"),
    ("ViT-B-33", ConfigError, "did you mean 'ViT-B-32'"),
    ("ViT-B-32:laion", ConfigError, r"unknown pretrained weights of ViT-B-32 'laion': .*There are: .*openai"),
    ("vit-tiny:openai", ConfigError, "There are: none"),
    ("runs/nothing-here", ConfigError, "there is no folder 'runs/nothing-here', nor a model of that name"),
    ("local-dir:nothing-here", ConfigError, "there is no folder 'nothing-here'"),
])
def test_names_that_mean_nothing(name, error, match):
    with pytest.raises(error, match=match):
        models.create_model(name)


def test_hub_models_that_cannot_be_fetched_are_named(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(sources, "download_pretrained_from_hf", unreachable)
    monkeypatch.setattr(network.urllib.request, "urlopen", lambda *_, **__: io.BytesIO())
    with pytest.raises(CheckpointError, match="'hf-hub:someone/model' cannot be fetched: no route"):
        models.create_model("hf-hub:someone/model")


def test_slashes_are_read_as_open_clip_reads_them():
    assert models.model_config("ViT-B/32") == models.model_config("ViT-B-32")


def test_tags_bring_their_activation():
    assert models.model_config("ViT-B-32:openai")["quick_gelu"] is True
    assert not models.model_config("ViT-B-32:laion2b_s34b_b79k").get("quick_gelu", False)
    assert "quick_gelu" not in models.model_config("ViT-B-32")


def test_a_returned_config_is_the_callers_own():
    models.model_config("vit-tiny")["vision_cfg"]["width"] = 1
    assert models.model_config("vit-tiny")["vision_cfg"]["width"] == 192


def test_fresh_weights_follow_the_seed_and_not_the_text():
    torch.manual_seed(5)
    whole = models.create_model("vit-tiny")
    torch.manual_seed(5)
    image_only = models.create_model("vit-tiny", with_text=False)
    names = [name for name, _ in image_only.named_parameters()]
    assert all(name.startswith("visual.") for name in names)
    assert not list(image_only.buffers())
    whole_state = whole.state_dict()
    assert all(torch.equal(value, whole_state[name]) for name, value in image_only.state_dict().items())
    assert isinstance(whole, open_clip.CLIP)
    pixels = images(1, (64, 64))
    assert "visual.proj" not in names  # no joint space to project into
    assert torch.equal(image_only.encode_image(pixels) @ whole.visual.proj, whole.encode_image(pixels))


def test_models_are_trainable_in_fp32(tiny):
    assert models.create_model("vit-tiny").training
    assert {p.dtype for p in tiny.parameters()} == {torch.float32}
    fixed = [name for name, p in tiny.named_parameters() if not p.requires_grad]
    assert fixed == ["visual.positional_embedding"]  # sine-cosine


def test_presets_learn_their_positions_on_oblong_grids():
    """open_clip has sine-cosine positions for square grids alone; ours start from those, interpolated."""
    oblong = models.create_model("vit-tiny", image_size=(32, 64))
    assert oblong.visual.positional_embedding.requires_grad
    square = models.create_model("vit-tiny")
    at_size = models.vision.positions_at(models.vision.vit_of(square.visual), (4, 8))
    assert torch.equal(oblong.visual.positional_embedding[1:], at_size)
    assert torch.equal(oblong.visual.positional_embedding[0], square.visual.positional_embedding[0])
    assert "pos_embed_type" not in models.model_config("vit-tiny", image_size=(32, 64))["vision_cfg"]
    assert models.model_config("vit-tiny", image_size=32)["vision_cfg"]["pos_embed_type"] == "sin_cos_2d"


@pytest.mark.parametrize(("given", "size"), [(96, (96, 96)), ((32, 64), (32, 64))])
def test_fresh_models_take_any_size(given, size):
    model = models.create_model("vit-tiny", image_size=given, with_text=False)
    grid = size[0] // 8, size[1] // 8
    assert model.visual.grid_size == grid
    assert len(model.visual.positional_embedding) == grid[0] * grid[1] + 1
    assert models.preprocess_config(model)["size"] == size
    config = models.model_config("vit-tiny", image_size=given)
    assert models.shape_of(json.loads(json.dumps(config))).grid_size == grid


@pytest.mark.parametrize("size", [30, (64, 0)])
def test_sizes_that_are_not_whole_patches_are_refused(size):
    for use in (models.create_model, models.model_config):
        with pytest.raises(ConfigError, match="cannot be cut into patches of 8 x 8"):
            use("vit-tiny", image_size=size)


def test_saved_models_take_another_size_as_in_open_clip(saved):
    ours = models.create_model(saved, image_size=96).eval()
    theirs = open_clip_alone(saved, force_image_size=96)
    torch.testing.assert_close(
        ours.visual.positional_embedding, theirs.visual.positional_embedding, rtol=0, atol=1e-6)
    pixels = images(1, (96, 96))
    torch.testing.assert_close(ours.encode_image(pixels), theirs.encode_image(pixels), rtol=0, atol=1e-5)
    assert models.preprocess_config(ours)["size"] == (96, 96)


def test_models_saved_at_an_oblong_size_load_at_any(tmp_path):
    model = fresh_model("vit-tiny", image_size=(32, 64))
    folder = write_model(tmp_path / "oblong", model, models.model_config("vit-tiny", image_size=(32, 64)))
    pixels = images(1, (32, 64))
    expected = model.encode_image(pixels)
    again = models.create_model(folder).eval()
    torch.testing.assert_close(again.encode_image(pixels), expected, rtol=0, atol=1e-5)
    square = models.create_model(folder, image_size=64).eval()
    pixels = images(1, (64, 64))
    torch.testing.assert_close(
        square.encode_image(pixels), models.encode_image(model.visual, pixels).features, rtol=0, atol=1e-5)


def test_fresh_models_normalise_as_imagenet_and_saved_ones_as_saved(tiny, saved):
    fresh = models.preprocess_config(tiny)
    assert (fresh["mean"], fresh["std"], fresh["interpolation"]) == (IMAGENET_MEAN, IMAGENET_STD, "bicubic")
    assert fresh["size"] == (64, 64)
    assert list(models.preprocess_config(models.create_model(saved))["mean"]) == [0.1, 0.2, 0.3]


def test_folders_prefixes_and_runs_name_the_same_model(tiny, saved, tmp_path):
    run = tmp_path / "run"
    write_model(run / "final", tiny, models.model_config("vit-tiny"))
    for name in (saved, str(saved), f"local-dir:{saved}", run):
        state = models.create_model(name).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in tiny.state_dict().items())
        assert models.model_config(name) == models.model_config("vit-tiny")


def test_a_weight_file_fills_a_named_architecture(tiny, saved):
    model = models.create_model("vit-tiny", checkpoint=saved / "open_clip_model.safetensors")
    assert torch.equal(model.token_embedding.weight, tiny.token_embedding.weight)
    with pytest.raises(CheckpointError, match="cannot be loaded into this model"):
        models.create_model("vit-small", checkpoint=saved / "open_clip_model.safetensors")
    with pytest.raises(CheckpointError, match="there is no weight file"):
        models.create_model("vit-tiny", checkpoint=saved / "missing.safetensors")


def test_weights_of_an_image_tower_start_a_model_with_fresh_text(tiny, tmp_path, caplog):
    image_only = models.create_model("vit-tiny", with_text=False)
    shake(image_only, seed=9)
    folder = write_model(tmp_path / "image-only", image_only, models.model_config("vit-tiny"))
    torch.manual_seed(0)
    with caplog.at_level(logging.INFO, "aclip"):
        model = models.create_model(folder)
    assert "projection and text tower start fresh" in caplog.text
    for name, value in image_only.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    torch.manual_seed(0)
    assert torch.equal(model.text_projection, models.create_model("vit-tiny").text_projection)
    state = load_file(folder / "open_clip_model.safetensors")
    del state["visual.class_embedding"]
    save_file(state, folder / "open_clip_model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensors are others: 1 missing \(visual\.class_embedding\)"):
        models.create_model(folder)


def damage(folder: Path, file: str, content: bytes | None) -> None:
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)


@pytest.mark.parametrize(("file", "content", "match"), [
    ("open_clip_model.safetensors", None, "no weights beside it"),
    ("open_clip_model.safetensors", b"", "damaged"),
    ("open_clip_model.safetensors", b"\x08\0\0\0\0\0\0\0{}      ", "are empty"),
    ("open_clip_config.json", None, "holds no model: there is neither open_clip_config.json"),
    ("open_clip_config.json", b"{", "is damaged"),
    ("open_clip_config.json", b"{}", "is damaged"),
    ("open_clip_config.json", b'{"model_cfg": {"embed_dim": 4, "vision_cfg": {"width": 100, "head_width": 33}, '
     b'"text_cfg": {}}}', "describes no model"),
])
def test_damaged_folders_are_named(tiny, tmp_path, file, content, match):
    folder = write_model(tmp_path / "model", tiny, models.model_config("vit-tiny"))
    damage(folder, file, content)
    with pytest.raises(CheckpointError, match=match):
        models.create_model(folder)


@pytest.mark.parametrize(("half", "field", "value", "found"), [
    ("vision_cfg", "layers", 0, "0"), ("vision_cfg", "layers", -1, "-1"), ("vision_cfg", "width", 0, "0"),
    ("vision_cfg", "patch_size", [16, 0], "0"), ("vision_cfg", "image_size", -64, "-64"),
    ("text_cfg", "heads", 0, "0"), ("text_cfg", "context_length", 0, "0"), ("text_cfg", "vocab_size", -1, "-1"),
])
def test_sizes_below_one_are_named(tiny, tmp_path, half, field, value, found):
    config = models.model_config("vit-tiny")
    config = config | {half: config[half] | {field: value}}
    folder = write_model(tmp_path / "model", tiny, config)
    with pytest.raises(ConfigError, match=f"^model '{folder}': {field} of this model config's {half} is {found}, and"):
        models.create_model(folder)


@pytest.mark.parametrize(("key", "value", "match"), [
    ("interpolation", "cubic", "unknown interpolation 'cubic': did you mean 'bicubic'"),
    ("interpolation", 3, "unknown interpolation '3'"),
    ("resize_mode", ["squash"], "unknown resize_mode"),
    ("mean", "grey", "mean of 'grey': it takes three numbers"),
    ("std", [0.5], r"std of \[0\.5\]: it takes three numbers"),
])
def test_preparations_that_open_clip_does_not_know_are_named(tiny, tmp_path, key, value, match):
    folder = write_model(tmp_path / "model", tiny, models.model_config("vit-tiny"))
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"][key] = value
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"^the preprocess_cfg of model '{folder}' has an? {match}"):
        models.load(folder)


def test_configs_that_are_none_are_named():
    with pytest.raises(ConfigError, match="not an open_clip model config"):
        models.shape_of({"embed_dim": 1})
    config = models.model_config("vit-tiny")
    config["vision_cfg"]["colour"] = "red"
    with pytest.raises(ConfigError, match="does not know: colour"):
        models.shape_of(config)


def test_building_leaves_the_root_logger_alone(saved, caplog):
    root = logging.getLogger()
    before = list(root.handlers), list(root.filters)
    with caplog.at_level(logging.INFO):
        models.create_model("vit-tiny")
        models.create_model(saved)
    assert (list(root.handlers), list(root.filters)) == before
    assert not caplog.records


def test_open_clips_own_warnings_are_passed_on(tiny, monkeypatch, caplog):
    def create(*_, **__):
        logging.warning("No pretrained weights loaded for model")
        logging.warning("something odd")
        return tiny

    monkeypatch.setattr(open_clip, "create_model", create)
    monkeypatch.setattr(models, "check_fetchable", lambda source: None)
    assert models.create_model("ViT-B-32:laion2b_s34b_b79k") is tiny
    assert [(r.name, r.levelname, r.message) for r in caplog.records] == [
        ("aclip.models.models", "WARNING", "something odd")]


def test_a_weight_file_of_another_name_is_found_if_it_is_the_only_one(tiny, tmp_path):
    folder = write_model(tmp_path / "odd", tiny, models.model_config("vit-tiny"))
    (folder / "open_clip_model.safetensors").rename(folder / "epoch_3.safetensors")
    assert torch.equal(models.create_model(folder).token_embedding.weight, tiny.token_embedding.weight)
    shutil.copy(folder / "epoch_3.safetensors", folder / "epoch_4.safetensors")
    with pytest.raises(CheckpointError, match=r"several weight files \(epoch_3.safetensors, epoch_4.safetensors\)"):
        models.create_model(folder)


def test_tokenizers_by_name_folder_and_config_agree(saved):
    texts = ["A cat, sitting.", "two dogs"]
    expected = open_clip.get_tokenizer("ViT-B-32")(texts)
    for model in ("vit-tiny", saved, models.model_config("vit-small")):
        assert torch.equal(models.tokenizer_of(model)(texts), expected)
    short = models.model_config("vit-tiny")
    short["text_cfg"]["context_length"] = 4
    assert models.tokenizer_of(short)(texts).tolist() == [
        [49406, 320, 2368, 49407], [49406, 1237, 3255, 49407]]
