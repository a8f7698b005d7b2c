"""Models by name: presets, open_clip's names, tags, the hub, files, folders and runs."""

import json
import logging
import shutil

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tower_oracles import fresh_model, images, open_clip_alone, shake, write_checkpoint, write_model

from aclip import models
from aclip.errors import AclipError, CheckpointError, ConfigError, UnsupportedModelError
from aclip.method import freeze
from aclip.models import loaded, loading
from aclip.models.loading import FRESH_PREPROCESS


@pytest.fixture(scope="module")
def tiny():
    return fresh_model("vit-tiny")


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "saved", tiny, models.model_config("vit-tiny"))


@pytest.fixture(scope="module")
def weights(saved):
    return saved / "open_clip_model.safetensors"


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
    assert name not in (folder / "open_clip_config.json").read_text()  # no registered name is needed
    theirs = open_clip_alone(folder)
    pixels = images(1, model.visual.image_size)
    assert torch.equal(theirs.encode_image(pixels), model.encode_image(pixels))
    assert theirs.visual.preprocess_cfg["mean"] == [0.1, 0.2, 0.3]


def test_shapes_of_the_presets():
    tiny, small = (models.shape_of(models.model_config(name)) for name in ("vit-tiny", "vit-small"))
    assert (tiny.grid_size, tiny.width, tiny.layers, tiny.heads, tiny.joint_dim) == ((8, 8), 192, 4, 3, 192)
    assert (tiny.text_width, tiny.text_layers, tiny.context_length, tiny.text_cut) == (192, 4, 77, True)
    assert (small.grid_size, small.width, small.layers, small.heads) == ((14, 14), 384, 12, 6)
    assert (small.joint_dim, small.text_width, small.text_layers, small.text_cut) == (256, 256, 6, True)


def test_shape_agrees_with_the_model_that_is_built(tiny):
    shape, visual = models.shape_of(models.model_config("vit-tiny")), tiny.visual
    block, text_block = visual.transformer.resblocks[0], tiny.transformer.resblocks[0]
    assert (shape.image_size, shape.patch_size, shape.grid_size) == (
        visual.image_size, visual.conv1.kernel_size, visual.grid_size)
    assert (shape.width, shape.layers) == (visual.transformer.width, len(visual.transformer.resblocks))
    assert (shape.heads, shape.mlp_width) == (block.attn.num_heads, block.mlp.c_fc.out_features)
    assert shape.joint_dim == visual.output_dim
    assert shape.num_prefix_tokens == len(visual.positional_embedding) - 64
    assert (shape.text_width, shape.text_layers) == (tiny.transformer.width, len(tiny.transformer.resblocks))
    assert (shape.text_mlp_width, shape.context_length) == (text_block.mlp.c_fc.out_features, tiny.context_length)


def test_every_listed_model_has_a_shape_and_is_a_vit():
    names = models.list_models()
    assert {"vit-tiny", "vit-small", "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14-CLIPA"} <= set(names)
    assert {"ViT-B-16-SigLIP", "ViT-SO400M-14-SigLIP2-378", "vit_medium_patch16_gap_256"} <= set(names)
    assert {"EVA02-B-16", "EVA02-E-14-plus", "PE-Core-bigG-14-448", "ViT-L-14-CLIPA"} <= set(names)
    assert not [name for name in names if name.startswith(("RN", "convnext", "coca", "roberta", "swin"))]
    assert "ViT-SO400M-14-SigLIP-384" not in names  # 27.4 patches
    many = ("SigLIP", "EVA", "PE-Core")  # alike but for their size
    configs = {name: models.model_config(name) for name in names if "B-16" in name or not any(a in name for a in many)}
    for config in configs.values():
        shape = models.shape_of(config)
        assert shape.grid_size[0] * shape.patch_size[0] == shape.image_size[0]
        assert shape.width % shape.heads == 0
    assert not models.shape_of(configs["ViT-H-14-CLIPA"]).text_cut


@pytest.mark.parametrize(("name", "what"), [
    ("RN50", "this image tower, a ModifiedResNet, is not a plain ViT"),
    ("convnext_base", "this image tower, a ConvNeXt, is not a plain ViT"),
    ("vit_relpos_medium_patch16_cls_224", "this image tower, a VisionTransformerRelPos, is not a plain ViT"),
    ("coca_ViT-B-32", r"captioning decoder \(CoCa\)"),
])
def test_unsupported_models_are_refused_before_they_are_built(name, what):
    for use in (models.create_model, models.model_config):
        with pytest.raises(UnsupportedModelError, match=f"model '{name}': .*{what}.*supported are .*ViT-B"):
            use(name)


@pytest.mark.parametrize(("name", "error", "match"), [
    ("vit-tinny", ConfigError, "unknown model, folder or file 'vit-tinny': did you mean 'vit-tiny'"),
    ("ViT-B-33", ConfigError, "did you mean 'ViT-B-32'"),
    ("ViT-B-32:laion", ConfigError, r"weights of ViT-B-32 'laion': .*There are: .*openai"),
    ("ViT-B-32:x.pt", ConfigError, r"unknown weight file or pretrained weights of ViT-B-32 'x\.pt'.*laion2b_s34b"),
    ("runs/nothing-here", ConfigError, "unknown model, folder or file 'runs/nothing-here'"),
    ("local-dir:nothing-here", CheckpointError, "'nothing-here' holds no model"),
])
def test_unknown_names_say_what_exists(name, error, match):
    with pytest.raises(error, match=match):
        models.create_model(name)


def test_a_run_that_is_misspelt_is_sought_beside_it(tmp_path):
    (tmp_path / "first").mkdir()
    with pytest.raises(ConfigError, match=f"did you mean '{tmp_path}/first'"):
        models.create_model(f"{tmp_path}/frist")


def test_slashes_are_read_as_in_open_clip():
    assert models.model_config("ViT-B/32") == models.model_config("ViT-B-32")


def test_a_returned_config_is_a_copy():
    models.model_config("vit-tiny")["vision_cfg"]["width"] = 1
    assert models.model_config("vit-tiny")["vision_cfg"]["width"] == 192


def test_tags_are_fetched_and_loaded_as_by_open_clip(weights, monkeypatch):
    assert models.model_config("ViT-B-32:openai")["quick_gelu"] is True  # although the plain name has none
    assert not models.model_config("ViT-B-32:laion2b_s34b_b79k").get("quick_gelu", False)
    torch.manual_seed(0)
    theirs = shake(open_clip.create_model("ViT-B-16-SigLIP", load_weights=False)).eval()
    file = weights.parent / "siglip.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}, file)
    monkeypatch.setattr(loading, "download_pretrained", lambda cfg: str(file))
    ours = models.create_model("ViT-B-16-SigLIP:webli").eval()
    file.unlink()
    pixels = images(1, (224, 224))
    with torch.no_grad():
        assert torch.equal(ours.encode_image(pixels), theirs.encode_image(pixels))
    seen = models.preprocess_config(ours)
    assert (tuple(seen["mean"]), seen["resize_mode"]) == ((0.5, 0.5, 0.5), "squash")


def test_hub_models_are_fetched(saved, monkeypatch):
    def download(repository, filename="open_clip_model.safetensors"):
        assert repository == "someone/model"
        return str(saved / filename)

    monkeypatch.setattr(loading, "download_pretrained_from_hf", download)
    model = models.create_model("hf-hub:someone/model")
    assert torch.equal(model.token_embedding.weight, load_file(saved / "open_clip_model.safetensors")[
        "token_embedding.weight"])
    assert list(models.preprocess_config(model)["mean"]) == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(("module", "function", "use", "what"), [
    (loading, "download_pretrained_from_hf", lambda: models.create_model("hf-hub:someone/model"),
     "'hf-hub:someone/model'"),
    (loading, "download_pretrained", lambda: models.create_model("ViT-B-32:openai"), "'ViT-B-32:openai'"),
    (loaded, "HFTokenizer", lambda: models.tokenizer_of("ViT-B-16-SigLIP"),
     "the tokenizer 'timm/ViT-B-16-SigLIP' of this"),
])
def test_without_a_network_one_sentence_says_so(module, function, use, what, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route\nto the host")

    monkeypatch.setattr(module, function, unreachable)
    with pytest.raises(CheckpointError, match=f"^{what}.* cannot be loaded: no route; without a network, give its"):
        use()


def test_an_architecture_alone_needs_no_network():
    assert models.shape_of(models.model_config("ViT-B-16-SigLIP")).joint_dim == 768


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
    pixels = images(1, (64, 64))
    assert "visual.proj" not in names  # no joint space to project into
    assert torch.equal(image_only.encode_image(pixels) @ whole.visual.proj, whole.encode_image(pixels))


def test_models_are_trainable_in_fp32(tiny):
    assert models.create_model("vit-tiny").training
    assert {p.dtype for p in tiny.parameters()} == {torch.float32}
    fixed = [name for name, p in tiny.named_parameters() if not p.requires_grad]
    assert fixed == ["visual.positional_embedding"]  # sine-cosine


def test_presets_learn_their_positions_on_oblong_grids():
    """open_clip has sine-cosine positions for square grids only; ours start from those, interpolated."""
    oblong, square = models.create_model("vit-tiny", image_size=(32, 64)), models.create_model("vit-tiny")
    assert oblong.visual.positional_embedding.requires_grad
    at_size = models.vit_of(square.visual).positions_at((4, 8))
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
    again = models.create_model(folder).eval()
    torch.testing.assert_close(again.encode_image(pixels), model.encode_image(pixels), rtol=0, atol=1e-5)
    square, pixels = models.create_model(folder, image_size=64).eval(), images(1, (64, 64))
    torch.testing.assert_close(
        square.encode_image(pixels), models.encode_image(model.visual, pixels).features, rtol=0, atol=1e-5)


def test_fresh_models_normalise_as_imagenet_and_saved_ones_as_saved(tiny, saved):
    fresh = models.preprocess_config(tiny)
    assert (fresh["mean"], fresh["std"]) == tuple(FRESH_PREPROCESS.values())
    assert fresh["size"] == (64, 64)
    assert list(models.preprocess_config(models.create_model(saved))["mean"]) == [0.1, 0.2, 0.3]


def test_folders_prefixes_and_runs_name_the_same_model(tiny, saved, tmp_path):
    run = tmp_path / "run"
    write_model(run / "final", tiny, models.model_config("vit-tiny"))
    for name in (saved, str(saved), f"local-dir:{saved}", run):
        state = models.create_model(name).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in tiny.state_dict().items())
        assert models.model_config(name) == models.model_config("vit-tiny")


def test_a_file_after_an_architecture_is_its_weights(tiny, weights):
    name = f"vit-tiny:{weights}"
    assert torch.equal(models.create_model(name).token_embedding.weight, tiny.token_embedding.weight)
    assert models.model_config(name) == models.model_config("vit-tiny")
    assert list(models.preprocess_config(models.create_model(name))["mean"]) == pytest.approx(
        [0.481, 0.458, 0.408], abs=1e-3)
    with pytest.raises(CheckpointError, match="are not of this model"):
        models.create_model(f"vit-small:{weights}")
    with pytest.raises(ConfigError, match=r"the architecture of .* is unknown: name it, as in ViT-B-16:"):
        models.create_model(weights)


def test_weights_of_an_image_tower_start_a_model_with_fresh_text(tmp_path, caplog):
    image_only = shake(models.create_model("vit-tiny", with_text=False), seed=9)
    folder = write_model(tmp_path / "image-only", image_only, models.model_config("vit-tiny"))
    torch.manual_seed(0)
    with caplog.at_level(logging.INFO, "aclip"):
        model = models.create_model(folder)
    assert "projection and text tower start fresh" in caplog.text
    for name, value in image_only.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    torch.manual_seed(0)
    assert torch.equal(model.text_projection, models.create_model("vit-tiny").text_projection)


def test_checkpoints_of_a_run_are_of_its_model_at_its_size(tmp_path):
    model = models.create_model("vit-micro", image_size=(32, 48))
    write_checkpoint(tmp_path, 9, model)
    (tmp_path / "config.json").write_text(json.dumps({"model": "vit-micro", "image_size": [32, 48]}))
    for name in (tmp_path, tmp_path / "checkpoints" / "step-00000009"):
        again = models.create_model(name)
        assert models.preprocess_config(again) == models.preprocess_config(model)  # as a fresh model, not CLIP's
        assert torch.equal(again.visual.positional_embedding, model.visual.positional_embedding)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"the model of .* is unknown: .*config\.json' is missing"):
        models.create_model(tmp_path)


@pytest.mark.parametrize("base", ["vit-micro:{file}", "{folder}"])
def test_checkpoints_of_fine_tuning_preprocess_as_what_it_started_from(base, tmp_path):
    model = fresh_model("vit-micro")
    folder = write_model(tmp_path / "base", model, models.model_config("vit-micro"))
    base = base.format(file=folder / "open_clip_model.safetensors", folder=folder)
    write_checkpoint(tmp_path / "run", 1, model)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": base}))
    assert models.preprocess_config(models.create_model(tmp_path / "run")) == models.preprocess_config(
        models.create_model(base))


@pytest.mark.parametrize(("file", "content", "match"), [
    ("open_clip_model.safetensors", None, "no weights beside it"),
    ("open_clip_model.safetensors", b"", "damaged"),
    ("open_clip_config.json", None, "holds no model: there is neither open_clip_config.json .* checkpoints/step"),
    ("open_clip_config.json", b"{", "is damaged"),
    ("open_clip_config.json", b"{}", "is damaged"),
    ("open_clip_config.json", b'{"model_cfg": {"embed_dim": 4, "vision_cfg": {"width": 100, "head_width": 33}, '
     b'"text_cfg": {}}}', "describes no model"),
    ("open_clip_config.json", b'{"model_cfg": {"embed_dim": 4}}', "describes no model"),
    ("open_clip_config.json", b'{"model_cfg": {"embed_dim": 4, "vision_cfg": {"colour": "red"}, "text_cfg": {}}}',
     "describes no model .*'colour'"),
])
def test_damaged_folders_are_named(tiny, tmp_path, file, content, match):
    folder = write_model(tmp_path / "model", tiny, models.model_config("vit-tiny"))
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(AclipError, match=match):
        models.create_model(folder)


@pytest.mark.parametrize("reachable", [True, False])
def test_a_config_alone_starts_timms_tower_from_its_own_weights(reachable, tmp_path, monkeypatch):
    config = {"embed_dim": 24, "text_cfg": models.model_config("vit-micro")["text_cfg"],
              "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": True,
                             "timm_proj": "mlp", "timm_pool": "", "image_size": 32}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    create = timm.create_model

    def fetched(*arguments, pretrained=False, **options):
        if pretrained and not reachable:
            raise OSError("no network")
        tower = create(*arguments, **options)
        if pretrained:
            torch.nn.init.constant_(tower.norm.weight, 2.0)
        return tower

    monkeypatch.setattr(timm, "create_model", fetched)
    if not reachable:
        with pytest.raises(CheckpointError, match="weights of timm's vit_tiny_patch16_224 cannot be fetched"):
            models.create_model(tmp_path)
        return
    model = models.create_model(tmp_path)
    assert (model.visual.trunk.norm.weight == 2).all()
    freeze(model, ("towers",))
    assert {name for name, one in model.named_parameters() if one.requires_grad} == {
        "visual.head.mlp.fc1.weight", "visual.head.mlp.fc1.bias", "visual.head.mlp.fc2.weight", "text_projection",
        "logit_scale"}


def test_a_weight_file_of_another_name_is_found_if_it_is_the_only_one(tiny, tmp_path):
    folder = write_model(tmp_path / "odd", tiny, models.model_config("vit-tiny"))
    (folder / "open_clip_model.safetensors").rename(folder / "epoch_3.safetensors")
    assert torch.equal(models.create_model(folder).token_embedding.weight, tiny.token_embedding.weight)
    shutil.copy(folder / "epoch_3.safetensors", folder / "epoch_4.safetensors")
    with pytest.raises(CheckpointError, match="several weights beside it"):
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


@pytest.mark.parametrize("asked", [True, False])
def test_code_beside_a_tokenizer_is_not_run_even_if_the_config_asks_for_it(tmp_path, asked):
    folder, trace = tmp_path / "model", tmp_path / "ran"
    config = models.model_config("vit-micro")
    config["text_cfg"] |= {"hf_tokenizer_name": str(folder), "tokenizer_kwargs": {"trust_remote_code": asked}}
    write_model(folder, models.create_model("vit-micro"), config)
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}))
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(trace)!r}).touch()\nclass Own: ...\n")
    with pytest.raises(CheckpointError, match=r"the tokenizer .* of this model cannot be loaded: .*custom code"):
        models.load(folder)
    assert not trace.exists()
