"""Weight files, the A-CLIP release's among them: how they are read, and one sentence for each that cannot be."""

import argparse
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from tower_oracles import fresh_model, images, open_clip_alone, shake, write_model

from aclip import models
from aclip.errors import CheckpointError, UnsupportedModelError
from aclip.models.weights import read_weights, released_config


@pytest.fixture(scope="module")
def micro():
    return fresh_model("vit-micro")


@pytest.fixture(scope="module")
def file(micro, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("micro") / "model", micro, models.model_config("vit-micro")
                       ) / "open_clip_model.safetensors"


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in a.state_dict().items())


def wrapped(state: dict[str, torch.Tensor], form: str) -> object:
    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
    return {
        "plain": state,
        "open_clip": {"epoch": 3, "name": "run", "state_dict": prefixed, "optimizer": {"step": 1}},
        "with arguments": {"state_dict": prefixed, "args": argparse.Namespace(lr=0.1), "best": np.float64(0.5)},
        "compiled": {"model": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}},
        "half": {name: tensor.half() for name, tensor in state.items()},
    }[form]


@pytest.mark.parametrize("form", ["plain", "open_clip", "with arguments", "compiled", "half"])
def test_torch_files_are_read_whatever_they_are_wrapped_in(micro, form, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(wrapped(dict(micro.state_dict()), form), path)
    model = models.create_model(f"vit-micro:{path}")
    assert same(model.half().float() if form == "half" else model, micro.half().float() if form == "half" else micro)


def test_positions_of_another_grid_are_interpolated_as_in_open_clip(micro, tmp_path):
    folder = write_model(tmp_path / "larger", micro, models.model_config("vit-micro", image_size=48))
    ours, theirs = models.create_model(folder), open_clip_alone(folder)
    assert ours.visual.grid_size == (12, 12)
    torch.testing.assert_close(ours.visual.positional_embedding, theirs.visual.positional_embedding, rtol=0, atol=1e-6)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.victim),)


def test_code_in_a_file_is_not_run(tmp_path):
    victim = tmp_path / "run"
    for name, match in (("weights.pt", r"weights\.pt .* hold more than tensors.* \(it would call posix\.mkdir\)"),
                        ("weights.safetensors", r"weights\.safetensors ")):
        torch.save({"state_dict": {"logit_scale": torch.zeros(())}, "extra": Payload(victim)}, tmp_path / name)
        with pytest.raises(CheckpointError, match=match):
            models.create_model(f"vit-micro:{tmp_path / name}")
        assert not victim.exists()
    torch.load(tmp_path / "weights.pt", weights_only=False)
    assert victim.exists()  # it is a payload


def cut(path: Path, share: float) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])


@pytest.mark.parametrize("kind", ["weights.safetensors", "weights.pt"])
@pytest.mark.parametrize(("share", "match"), [(0.0, "are damaged"), (0.5, "are damaged"), (0.999, "are damaged")])
def test_files_that_are_cut_off(micro, kind, share, match, tmp_path):
    path = tmp_path / kind
    state = {"visual.conv1.weight": micro.visual.conv1.weight.detach().clone()}
    if kind.endswith("t"):
        torch.save(state, path)
    else:
        save_file(state, path)
    cut(path, share)
    with pytest.raises(CheckpointError, match=match) as refused:
        models.create_model(f"vit-micro:{path}")
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(("content", "match"), [
    (b"these are no weights at all", "more than tensors|damaged"),
    (b"\x89PNG\r\n\x1a\n" + bytes(50), "more than tensors|damaged"),
    (b"\x08\0\0\0\0\0\0\0{}      ", "hold no state dict"),
    (b"\x80\x02garbage", "more than tensors|damaged"),
    (b"PK\x03\x04" + bytes(100), "damaged"),
])
def test_files_of_another_kind(content, match, tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=match) as refused:
        models.create_model(f"vit-micro:{path}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [{"state_dict": {"a": 1}}, [torch.zeros(1)], {"epoch": 1}, torch.zeros(2)])
def test_torch_files_without_a_state_dict(content, tmp_path):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="hold no state dict"):
        read_weights(tmp_path / "weights.pt")


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_of_an_image_tower_are_used_without_text_whatever_their_file(micro, suffix, prefix, tmp_path):
    """A fresh text tower would give captions features that mean nothing."""
    path = tmp_path / f"weights{suffix}"
    state = {f"{prefix}visual.{name}": tensor for name, tensor in micro.visual.state_dict().items()}
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    loaded = models.load(f"vit-micro:{path}")
    assert not loaded.has_text
    with pytest.raises(UnsupportedModelError, match="image tower only"):
        loaded.encode_texts(["a cat"])
    pixels = images(1, (32, 32))
    assert torch.equal(loaded.encode_trunk(pixels), models.encode_image(micro.visual, pixels).cls)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_programs_are_not_run(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"weights\.pt are damaged or .*\(.*TorchScript"):
        models.create_model(f"vit-micro:{tmp_path / 'weights.pt'}")


def changed(state: dict[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
    if what == "missing":
        return {name: tensor for name, tensor in state.items() if "ln_2" not in name}
    if what == "extra":
        return state | {"visual.head.weight": torch.zeros(3, 3)}
    return state | {"visual.conv1.weight": torch.zeros(128, 3, 8, 8)}


@pytest.mark.parametrize(("what", "match"), [
    ("missing", r"12 missing \(visual\.transformer\.resblocks\.0\.ln_2\.weight, .*, \.\.\.\)"),
    ("extra", r"1 unknown \(visual\.head\.weight\)$"),
    ("shape", r"visual\.conv1\.weight: .*\[128, 3, 8, 8\].* from checkpoint, the shape in current model .*3, 4, 4\]"),
])
def test_tensors_that_are_not_the_models(file, what, match, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(changed(load_file(file), what), path)
    with pytest.raises(CheckpointError, match=match) as refused:
        models.create_model(f"vit-micro:{path}")
    assert f"the weights {path} are not of this model" in str(refused.value)


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
    """A checkpoint in the release's layout, wrapped as its trainer wraps it, and the towers in it."""
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
    tokens = loaded.tokenizer(["a cat", "two dogs on a red sofa"])
    torch.testing.assert_close(loaded.encode_text(tokens, normalize=False), text(tokens), rtol=0, atol=1e-5)
    assert loaded.attention_scores(pixels).shape == (2, 4)
    assert loaded.model.logit_scale == 3.0
    assert tuple(models.preprocess_config(loaded.model)["mean"]) == (0.485, 0.456, 0.406)
    shape = models.shape_of(models.model_config(path))
    assert (shape.width, shape.layers, shape.heads, shape.grid_size) == (192, 12, 3, (2, 2))
    assert shape.text_cut


def release_of_size(width: int, layers: int, heads: int, patch: int) -> dict[str, torch.Tensor]:
    """A state of the release's layout that has shapes and no numbers."""
    with torch.device("meta"):
        visual = VisionTransformer(img_size=224, patch_size=patch, embed_dim=width, depth=layers, num_heads=heads,
                                   num_classes=0)
        text = ReleasedText(64, 1, 24, 20)
        state = {f"visual.{name}": tensor for name, tensor in visual.state_dict().items()}
        return state | dict(text.state_dict()) | {"image_projection": torch.empty(width, 24)}


@pytest.mark.parametrize(("width", "layers", "heads", "patch"), [(192, 12, 3, 16), (768, 12, 12, 16),
                                                                  (1024, 24, 16, 16)])
def test_every_size_of_the_release_gets_its_heads(width, layers, heads, patch):
    """Width, layers, heads and patch as in SLIP's and A-CLIP's models.py; the smallest, which is not there, as timm."""
    shape = models.shape_of(released_config(release_of_size(width, layers, heads, patch), Path("release.pt")))
    assert (shape.width, shape.layers, shape.heads) == (width, layers, heads)
    assert (shape.patch_size, shape.image_size) == ((patch, patch), (224, 224))


@pytest.mark.parametrize(("width", "layers", "heads"), [(384, 12, 12), (192, 11, 3)])
def test_sizes_whose_heads_timm_does_not_have_are_refused(width, layers, heads):
    with pytest.raises(UnsupportedModelError, match=rf"no ViT of width {width} and {layers} layers .*768 x 12"):
        released_config(release_of_size(width, layers, heads, 16), Path("release.pt"))
