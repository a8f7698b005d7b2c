"""Export for open_clip: a folder that `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from aclip.checkpoint import crc32
from aclip.errors import UnsupportedModelError
from aclip.exporters.base import Exporter, Readback, replace_folder, write_json
from aclip.exporters.huggingface import is_clip_tokenizer, save_pretrained
from aclip.models import LoadedModel, Tokenizer, preprocess_config, tokenizer_of
from aclip.models.lora import merged


class OpenClipExporter(Exporter):
    """`open_clip_config.json`, `open_clip_model.safetensors`, and a tokenizer that open_clip does not bundle."""

    library = "open_clip"

    def check_supported(self, model: LoadedModel) -> None:
        if not model.has_text:
            raise UnsupportedModelError("this model has only an image tower, and open_clip loads models with both "
                                        "towers: use --to huggingface, onnx or torch-export")

    def write(self, model: LoadedModel, config: Mapping[str, Any], folder: Path) -> None:
        save(model.model, config, preprocess_config(model.model), model.tokenizer, folder,
             step=model.step, samples_seen=model.samples_seen)

    def read(self, folder: Path, model: LoadedModel) -> Readback:
        theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        theirs.eval()
        # Not open_clip.get_tokenizer: it would run a tokenizer's own code if its config asks for that.
        tokenizer = (open_clip.get_tokenizer(f"local-dir:{folder}") if is_clip_tokenizer(model.tokenizer)
                     else tokenizer_of(folder))
        return Readback(theirs.encode_image, theirs.encode_text, preprocess, tokenizer,
                        theirs.logit_scale.exp().item())

    def usage(self, model: LoadedModel) -> str:
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
    folder: Path, *, step: int | None = None, samples_seen: int | None = None,
) -> None:
    """Write a model in fp32 to `folder`, replacing it as a whole; low-rank updates are added to their matrices.

    The configurations are open_clip's `model_cfg`, complete, and `preprocess_cfg`. A tokenizer of Hugging Face's is
    written beside the weights. `aclip.json` holds step and samples, which `aclip.load` returns, and a checksum, which
    it verifies. An OSError leaves an earlier model as it was.
    """
    with replace_folder(folder) as temporary:
        write_json(temporary / HF_CONFIG_NAME,
                   {"model_cfg": dict(model_config), "preprocess_cfg": dict(preprocess_config)})
        # clones, because safetensors refuses tensors that share memory
        state = {name: (tensor.float() if tensor.is_floating_point() else tensor).cpu().contiguous().clone()
                 for name, tensor in merged(model.state_dict()).items()}
        try:
            save_file(state, weights := temporary / HF_SAFE_WEIGHTS_NAME)
        except SafetensorError as error:  # its message holds the system's
            raise OSError(str(error)) from error
        write_json(temporary / "aclip.json", {"step": step, "samples_seen": samples_seen, "crc32": crc32(weights)})
        save_pretrained(tokenizer, temporary)
