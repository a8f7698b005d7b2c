import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from tower_oracles import (
    assert_same_gradients,
    draw_kept,
    embed_all_then_index,
    fresh_model,
    gradients,
    images,
    open_clip_alone,
    scores_from_full_maps,
    small_vit,
    write_model,
)

from aclip import models
from aclip.errors import ConfigError, UnsupportedModelError

VARIANTS = {
    "class token": {},
    "no ln_pre": {"no_ln_pre": True},
    "layer scale": {"ls_init_value": 0.3},
    "norm after pooling": {"final_ln_after_pool": True},
    "sine positions, square": {"pos_embed_type": "sin_cos_2d", "image_size": 16},
    "mean": {"pool_type": "avg"},
    "mean, then norm": {"pool_type": "avg", "final_ln_after_pool": True},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_all_patches_equal_open_clips_forward_and_gradients(options):
    visual = small_vit(**options)
    pixels = images(3, visual.image_size)
    ours, theirs = models.encode_image(visual, pixels), visual(pixels)
    torch.testing.assert_close(ours.features, theirs, rtol=0, atol=1e-5)
    assert ours.num_tokens == visual.grid_size[0] * visual.grid_size[1] + 1
    assert ours.scores is None
    assert_same_gradients(gradients(visual, ours.features), gradients(visual, theirs))


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_kept_patches_equal_embedding_all_and_indexing(options):
    visual = small_vit(**options)
    pixels, keep = images(3, visual.image_size), draw_kept(3, visual.grid_size[0] * visual.grid_size[1], 7)
    ours = models.encode_image(visual, pixels, keep)
    theirs = embed_all_then_index(visual, pixels, keep, visual.positional_embedding)
    torch.testing.assert_close(ours.features, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.cls @ visual.proj, ours.features, rtol=0, atol=1e-5)
    assert ours.num_tokens == 8
    assert_same_gradients(gradients(visual, ours.features), gradients(visual, theirs))


def test_keeping_every_patch_is_no_masking():
    visual = small_vit()
    pixels, everything = images(2, (12, 20)), torch.arange(15).expand(2, -1)
    ours, expected = models.encode_image(visual, pixels, everything), models.encode_image(visual, pixels)
    torch.testing.assert_close(ours.features, expected.features, rtol=0, atol=1e-6)


def test_removed_pixels_cannot_be_seen():
    visual = small_vit()
    pixels, keep = images(1, (12, 20)), torch.tensor([[0, 7, 14]])
    changed = pixels.clone()
    changed[:, :, 0:4, 4:20] += 5.0  # patches 1 to 4
    same = models.encode_image(visual, changed, keep).features
    assert torch.equal(same, models.encode_image(visual, pixels, keep).features)
    changed[:, :, 4:8, 8:12] += 5.0  # patch 7, the middle of the second row
    assert not torch.equal(models.encode_image(visual, changed, keep).features, same)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_scores_equal_those_of_full_attention_maps(options):
    visual = small_vit(**options)
    pixels = images(3, visual.image_size)
    encoding = models.encode_image(visual, pixels, return_scores=True)
    torch.testing.assert_close(encoding.scores, scores_from_full_maps(visual, pixels), rtol=0, atol=1e-6)
    torch.testing.assert_close(encoding.features, visual(pixels), rtol=0, atol=1e-5)


def test_scores_of_a_masked_image_are_refused():
    with pytest.raises(ValueError, match="rank all patches"):
        models.encode_image(small_vit(), images(1, (12, 20)), torch.tensor([[1]]), return_scores=True)


def test_golden_numbers_of_the_release(golden):
    visual = golden_vit(golden)
    pixels = golden["vit/image"]
    whole = models.encode_image(visual, pixels, return_scores=True)
    golden.check("vit/scores", whole.scores)
    golden.check("vit/cls_full", whole.cls)
    golden.check("vit/cls_full", whole.features)
    kept = (~golden["vit/removed"]).nonzero()[:, 1].view(len(pixels), -1)
    golden.check("vit/cls_masked", models.encode_image(visual, pixels, kept).cls)


def golden_vit(golden) -> VisionTransformer:
    """Map the golden ViT (timm's names) onto open_clip's: its patch bias goes into the positions."""
    visual = VisionTransformer(
        image_size=64, patch_size=16, width=48, layers=3, heads=4, mlp_ratio=4.0, output_dim=48,
        no_ln_pre=True, norm_layer=lambda width: torch.nn.LayerNorm(width, eps=1e-6))
    positions = golden["vit/weights/pos_embed"][0]
    positions[1:] += golden["vit/weights/patch_embed.proj.bias"]
    state = {
        "class_embedding": golden["vit/weights/cls_token"][0, 0],
        "positional_embedding": positions,
        "conv1.weight": golden["vit/weights/patch_embed.proj.weight"],
        "ln_post.weight": golden["vit/weights/norm.weight"],
        "ln_post.bias": golden["vit/weights/norm.bias"],
        "proj": torch.eye(48),
    }
    names = {
        "ln_1.": "norm1.", "ln_2.": "norm2.", "attn.in_proj_": "attn.qkv.", "attn.out_proj.": "attn.proj.",
        "mlp.c_fc.": "mlp.fc1.", "mlp.c_proj.": "mlp.fc2.",
    }
    for layer in range(3):
        for ours, theirs in names.items():
            for kind in ("weight", "bias"):
                state[f"transformer.resblocks.{layer}.{ours}{kind}"] = golden[
                    f"vit/weights/blocks.{layer}.{theirs}{kind}"]
    visual.load_state_dict(state)
    return visual.eval()


@pytest.mark.parametrize("size", [32, 48, 96])
def test_another_resolution_equals_open_clip_resized(size, tmp_path):
    model = fresh_model("vit-tiny")
    folder = write_model(tmp_path / "saved", model, models.model_config("vit-tiny"))
    resized = open_clip_alone(folder, force_image_size=size)
    pixels = images(2, (size, size))
    with torch.no_grad():
        ours = models.encode_image(model.visual, pixels)
        torch.testing.assert_close(
            F.normalize(ours.features), resized.encode_image(pixels, normalize=True), rtol=0, atol=1e-5)
    assert ours.num_tokens == (size // 8) ** 2 + 1


@pytest.mark.parametrize("size", [(8, 28), (20, 12), (12, 4)])
@pytest.mark.parametrize("keep", [None, 2])
def test_any_shape_of_image_with_interpolated_positions(size, keep):
    visual = small_vit()
    grid = size[0] // 4, size[1] // 4
    own = visual.positional_embedding
    learned = own[1:].view(3, 5, -1).permute(2, 0, 1)[None]
    new = F.interpolate(learned, grid, mode="bicubic", antialias=True, align_corners=False)[0]
    positions = torch.cat([own[:1], new.permute(1, 2, 0).reshape(grid[0] * grid[1], -1)])
    pixels = images(2, size)
    patches = grid[0] * grid[1]
    kept = draw_kept(2, patches, keep or patches)
    ours = models.encode_image(visual, pixels, None if keep is None else kept).features
    theirs = embed_all_then_index(visual, pixels, kept, positions)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(visual, ours), gradients(visual, theirs))


def test_images_that_are_not_whole_patches_are_refused():
    with pytest.raises(ConfigError, match="12 x 21 pixels cannot be cut into patches of 4 x 4"):
        models.encode_image(small_vit(), images(1, (12, 21)))


@pytest.mark.parametrize("options", [
    {"attentional_pool": True, "attn_pooler_heads": 4}, {"pool_type": "none"}, {"qk_norm": True},
])
def test_other_towers_are_refused_by_name_of_what_is_supported(options):
    with pytest.raises(UnsupportedModelError, match=r"a VisionTransformer, is not a plain ViT .*are .*ViT-B-32"):
        models.encode_image(small_vit(**options), images(1, (12, 20)))
    with pytest.raises(UnsupportedModelError, match="this image tower, a Linear"):
        models.encode_image(torch.nn.Linear(1, 1), images(1, (12, 20)))


def test_recomputing_activations_changes_nothing():
    visual, pixels, keep = small_vit(), images(2, (12, 20)), draw_kept(2, 15, 6)
    expected = gradients(visual, models.encode_image(visual, pixels, keep).features)
    visual.set_grad_checkpointing(True)
    recomputed = gradients(visual, models.encode_image(visual, pixels, keep).features)
    assert_same_gradients(recomputed, expected, 1e-7)


def test_half_precision_is_close_and_gives_every_parameter_a_gradient():
    visual, pixels, keep = small_vit(), images(4, (12, 20)), draw_kept(4, 15, 6)
    expected = models.encode_image(visual, pixels, keep)
    exact = gradients(visual, expected.features)
    with torch.autocast("cpu", torch.bfloat16):
        half = models.encode_image(visual, pixels, keep)
        scores = models.encode_image(visual, pixels, return_scores=True).scores
    similarity = F.cosine_similarity(half.features.float(), expected.features)
    assert similarity.min() > 0.999
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, scores_from_full_maps(visual, pixels), rtol=0.03, atol=0)
    rough = gradients(visual, half.features.float())
    assert rough.keys() == exact.keys() == dict(visual.named_parameters()).keys()
    flat = [torch.cat([g[name].flatten() for name in exact]) for g in (rough, exact)]
    assert F.cosine_similarity(*flat, dim=0) > 0.999


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        self.seen |= {tuple(t.shape) for t in (out if isinstance(out, tuple | list) else [out])
                      if isinstance(t, torch.Tensor)}
        return out


def test_no_attention_map_is_ever_formed_for_scores():
    visual, pixels = small_vit(image_size=(12, 20)), images(2, (12, 20))
    with torch.no_grad(), Shapes() as shapes:
        models.encode_image(visual, pixels, return_scores=True)
    assert (2, 4, 1, 16) in shapes.seen  # the row
    assert not [shape for shape in shapes.seen if shape[-2:] == (16, 16)]


def test_the_last_block_computes_only_what_is_pooled():
    visual, pixels = small_vit(), images(2, (12, 20))
    with torch.no_grad(), Shapes() as shapes:
        models.encode_image(visual, pixels)
    hidden = {shape for shape in shapes.seen if shape[-1] == 64 and len(shape) == 3}
    assert hidden == {(2, 16, 64), (2, 1, 64)}  # (B, L, MLP width) and that of the class token alone


@pytest.mark.parametrize("masked", [False, True])
def test_nothing_synchronises_with_the_host(masked):
    visual = small_vit()
    with FakeTensorMode(allow_non_fake_inputs=True):  # tensors without data: reading one raises
        pixels, keep = torch.empty(2, 3, 12, 20), torch.empty(2, 6, dtype=torch.int64)
        encoding = models.encode_image(visual, pixels, keep if masked else None, return_scores=not masked)
    assert encoding.features.shape == (2, 24)
