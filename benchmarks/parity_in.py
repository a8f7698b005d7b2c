"""How far our towers' features are from those of the libraries that the weights come from.

    python benchmarks/parity_in.py [--seed 0] [MODEL ...]

Random weights and seeded noise, fp32, on the CPU: `largest` is the greatest difference of any number in L2-normalised
features of 4 images and 4 captions; `masked` is that between a half-masked image and the same model of the other
library with the removed patches taken out of its sequence by hooks. Texts are tokens of the bundled tokenizer, or
random ids where the model's own needs the network. Prints a Markdown table.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aclip import models

MODELS = ("ViT-B-32", "ViT-B-16", "ViT-B-16-quickgelu", "ViT-L-14", "ViT-B-16-SigLIP", "vit_medium_patch16_gap_256",
          "MobileCLIP2-L-14", "ViT-B-16-SigLIP2", "EVA02-B-16", "EVA02-L-14", "PE-Core-T-16-384", "PE-Core-B-16",
          "PE-Core-L-14-336", "ViT-L-14-CLIPA", "SiglipModel", "Siglip2Model")
HUGGING_FACE = ("ViT-B-32", "ViT-B-16", "ViT-B-16-quickgelu", "ViT-L-14")
SIGLIP = ("SiglipModel", "Siglip2Model")
CAPTIONS = ["a cat", "two dogs on a red sofa", "", "a diagram of a heart, drawn by hand " * 9]


def shaken(model: nn.Module, seed: int) -> nn.Module:
    """Move biases, norms and scales away from zeros and ones, so that leaving one out shows."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    return model.eval()


def tokens_of(name: str, model: Any, seed: int) -> tuple[Tensor, Tensor]:
    """Return whole captions, and the same as our tower takes them: cut where it can be cut."""
    text = getattr(model, "text", model)
    if models.model_config(name)["text_cfg"].get("hf_tokenizer_name"):
        size = (4, text.context_length)
        tokens = torch.randint(1, text.vocab_size, size, generator=torch.Generator().manual_seed(seed))
    else:
        tokens = models.tokenizer_of(name)(CAPTIONS)
    return tokens, models.cut_after_eot(tokens) if models.can_cut(model) else tokens


def largest(ours: Tensor, theirs: Tensor) -> float:
    """Return the greatest difference of any number, after both are L2-normalised."""
    return float((F.normalize(ours, dim=-1) - F.normalize(theirs, dim=-1)).abs().max())


def masked_by_hooks(visual: nn.Module, pixels: Tensor, keep: Tensor) -> Tensor:
    """Return the features of the tower's own forward, whose first block is handed the kept patches alone."""
    vit = models.vit_of(visual)
    place = torch.cat([torch.arange(vit.num_prefix_tokens).expand(len(keep), -1), keep + vit.num_prefix_tokens], dim=1)

    def pick(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        x = arguments[0]
        return (x.gather(1, place[:, :, None].expand(-1, -1, x.shape[2])), *arguments[1:]), options

    def rotate(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        table = options.get("rope")
        return arguments, options if table is None else options | {"rope": table[keep][:, None]}

    blocks = vit.stack.resblocks if hasattr(vit.stack, "resblocks") else vit.stack.blocks
    hooks = [blocks[0].register_forward_pre_hook(pick, with_kwargs=True)]
    hooks += [block.register_forward_pre_hook(rotate, with_kwargs=True) for block in blocks]
    try:
        features: Tensor = visual(pixels)
        return features
    finally:
        for hook in hooks:
            hook.remove()


def against_open_clip(name: str, seed: int) -> list[str]:
    """Return a row: image, masked image and text features against open_clip's (and timm's) own forward."""
    torch.manual_seed(seed)
    model: Any = shaken(models.create_model(name), seed)
    head = getattr(getattr(model.visual, "trunk", None), "head", None)
    if isinstance(head, nn.Linear):  # timm starts it at almost nothing
        nn.init.normal_(head.weight, std=0.02)
    vit = models.vit_of(model.visual)
    pixels = torch.randn(4, 3, *(side * patch for side, patch in zip(vit.grid_size, vit.patch_size, strict=True)))
    patches = vit.grid_size[0] * vit.grid_size[1]
    keep = torch.rand(4, patches).argsort(dim=1)[:, : patches // 2].sort(dim=1).values
    whole, cut = tokens_of(name, model, seed)
    image = largest(models.encode_image(model.visual, pixels).features, model.encode_image(pixels))
    masked = largest(models.encode_image(model.visual, pixels, keep).features,
                     masked_by_hooks(model.visual, pixels, keep))
    text = largest(models.encode_text(model, cut), model.encode_text(whole))
    return [name, "open_clip", f"{image:.1e}", f"{masked:.1e}", f"{text:.1e}"]


def against_transformers(name: str, seed: int) -> list[str]:
    """Return a row: a folder that transformers wrote of its own random `CLIPModel`, read by our code."""
    from transformers import CLIPConfig, CLIPModel

    shape, config = models.shape_of(models.model_config(name)), models.model_config(name)
    act = "quick_gelu" if config.get("quick_gelu") else "gelu"
    torch.manual_seed(seed)
    theirs: Any = shaken(CLIPModel(CLIPConfig(
        projection_dim=shape.joint_dim,
        vision_config={"hidden_size": shape.width, "intermediate_size": shape.mlp_width, "hidden_act": act,
                       "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
                       "image_size": shape.image_size[0], "patch_size": shape.patch_size[0]},
        text_config={"hidden_size": shape.text_width, "intermediate_size": shape.text_mlp_width, "hidden_act": act,
                     "num_hidden_layers": shape.text_layers, "num_attention_heads": config["text_cfg"]["heads"],
                     "eos_token_id": 49407})), seed)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours: Any = models.create_model(Path(folder)).eval()
        whole = models.tokenizer_of(Path(folder))(CAPTIONS)
    pixels = torch.randn(4, 3, *shape.image_size)
    image = largest(models.encode_image(ours.visual, pixels).features, theirs.get_image_features(pixels).pooler_output)
    text = largest(models.encode_text(ours, models.cut_after_eot(whole)), theirs.get_text_features(whole).pooler_output)
    return [name, "transformers folder", f"{image:.1e}", "", f"{text:.1e}"]


def against_siglip(name: str, seed: int) -> list[str]:
    """Return a row: a folder that transformers wrote of its own random base model, read by our code."""
    import transformers
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

    torch.manual_seed(seed)
    config = getattr(transformers, name.replace("Model", "Config"))()
    theirs: Any = shaken(getattr(transformers, name)(config), seed)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours: Any = models.create_model(Path(folder)).eval()
    pixels = torch.randn(4, 3, *ours.visual.image_size)
    seen = {"pixel_values": pixels}
    if name == "Siglip2Model":
        patches = torch.stack([convert_image_to_patches(image, 16) for image in pixels])
        seen = {"pixel_values": patches, "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.int64),
                "spatial_shapes": torch.tensor(models.vit_of(ours.visual).grid_size).expand(4, -1)}
    tokens = torch.randint(1, config.text_config.vocab_size, (4, ours.text.context_length))
    image = largest(models.encode_image(ours.visual, pixels).features, theirs.get_image_features(**seen).pooler_output)
    text = largest(models.encode_text(ours, tokens), theirs.get_text_features(tokens).pooler_output)
    return [f"{name}, base", "transformers folder", f"{image:.1e}", "", f"{text:.1e}"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| model | against | image | masked image | text |\n| --- | --- | --- | --- | --- |")  # noqa: T201
    measures: list[tuple[Callable[[str, int], list[str]], tuple[str, ...]]] = [
        (against_open_clip, tuple(name for name in args.models if name not in SIGLIP)),
        (against_transformers, tuple(name for name in args.models if name in HUGGING_FACE)),
        (against_siglip, tuple(name for name in args.models if name in SIGLIP))]
    with torch.no_grad():
        for measure, names in measures:
            for name in names:
                print(f"| {' | '.join(measure(name, args.seed))} |", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
