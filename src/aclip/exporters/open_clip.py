"""Writing a model as open_clip reads it: `open_clip.create_model_and_transforms("local-dir:FOLDER")`."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import open_clip
from safetensors.torch import save_file
from torch import nn

from aclip.errors import UnsupportedModelError
from aclip.exporters.base import ExportFormat, Readback, Subject, fp32_tensors, multiplier
from aclip.exporters.tokenizer_files import is_bundled, write_foreign
from aclip.models.shapes import timm_outline
from aclip.models.sources import CONFIG_NAME, WEIGHTS_NAME, Tokenizer, tokenizer_of
from aclip.models.timm_vit import TimmVit


class OpenClipFormat(ExportFormat):
    """`open_clip_config.json` and `open_clip_model.safetensors`, with open_clip's own names."""

    about: ClassVar[str] = "a folder for open_clip, and for clip_benchmark: model, preprocessing, tokenizer"
    library: ClassVar[str] = "open_clip"

    def check_can_represent(self, subject: Subject) -> None:
        """Everything is an open_clip model, save an image tower alone; but one of timm's it builds at one size only."""
        if not subject.model.has_text:
            raise UnsupportedModelError(f"{subject.name} has an image tower only, and open_clip loads models with both "
                                        "towers: use --to huggingface, onnx, torch-export or safetensors")
        if subject.config["vision_cfg"].get("timm_model_name"):
            built, own = TimmVit(timm_outline(subject.config)), subject.image_size
            size = (built.grid_size[0] * built.patch_size[0], built.grid_size[1] * built.patch_size[1])
            if size != own:
                raise UnsupportedModelError(
                    f"{subject.name} has timm's image tower for pictures of {own[0]} x {own[1]} pixels, and open_clip "
                    f"builds it for {size[0]} x {size[1]} only: use --to onnx, torch-export or safetensors")

    def write(self, subject: Subject, folder: Path) -> None:
        """Write config, weights, and the tokenizer where it is none that open_clip bundles."""
        write(subject.model.model, subject.config, subject.preprocess, subject.model.tokenizer, folder)

    def read(self, folder: Path, subject: Subject) -> Readback:
        """Load with open_clip alone."""
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        model.eval()
        # open_clip would run code of a tokenizer's own where the config asks for it; ours never does
        tokenizer = (open_clip.get_tokenizer(f"local-dir:{folder}") if is_bundled(subject.model.tokenizer)
                     else tokenizer_of(folder))
        return Readback(model.encode_image, model.encode_text, preprocess, tokenizer, multiplier(model))

    def usage(self, subject: Subject) -> str:
        """See `ExportFormat`."""
        return '''\
import open_clip
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
image_features = model.eval().encode_image(preprocess(Image.open("cat.png"))[None], normalize=True)
text_features = model.encode_text(tokenizer(["a cat", "a dog"]), normalize=True)
probabilities = (model.logit_scale.exp() * image_features @ text_features.T).softmax(dim=-1)'''


def save(
    model: nn.Module, model_config: Mapping[str, Any], preprocess_config: Mapping[str, Any], tokenizer: Tokenizer,
    folder: Path,
) -> None:
    """Write weights (fp32), architecture, preprocessing and tokenizer to `folder`, replacing it as a whole.

    Args:
        model: the open_clip model; its state dict is native already.
        model_config: open_clip's `model_cfg`, complete, so that loading needs no registered name.
        preprocess_config: open_clip's `preprocess_cfg`: mean, std, interpolation, resize_mode.
        tokenizer: the model's. One of Hugging Face's is written beside the model, where open_clip looks for it; the one
            that open_clip bundles needs no files.
        folder: may hold an earlier one.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(model, model_config, preprocess_config, tokenizer, temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def write(
    model: nn.Module, model_config: Mapping[str, Any], preprocess_config: Mapping[str, Any], tokenizer: Tokenizer,
    folder: Path,
) -> None:
    """Write the files into a folder that is there; arguments as in `save`."""
    config = {"model_cfg": dict(model_config), "preprocess_cfg": dict(preprocess_config)}
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    save_file(fp32_tensors(model), folder / WEIGHTS_NAME)
    write_foreign(tokenizer, folder)
