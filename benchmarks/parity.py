"""How far exported models are from their own features: one row a model, one column a library.

    python benchmarks/parity.py                               the table of docs/benchmarks.md
    python benchmarks/parity.py --models ViT-B-32 --formats huggingface

Weights are random (seeded), so nothing is fetched; the tokens of models whose tokenizer would have to be are random
too. Models are exported one after the other into a temporary folder.
"""

import argparse
import gc
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aclip import models
from aclip.data import CaptionTokenizer
from aclip.errors import AclipError, UnsupportedModelError
from aclip.exporters import EXPORTERS
from aclip.exporters.base import compare

MODELS = ("ViT-B-32", "ViT-B-16", "ViT-B-16-quickgelu", "ViT-L-14", "ViT-B-16-SigLIP", "vit_medium_patch16_gap_256")
FORMATS = ("open_clip", "huggingface", "onnx")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=sorted(EXPORTERS))
    args = parser.parse_args()
    libraries = [EXPORTERS[name].library for name in args.formats]
    print_row("model", *libraries)
    print_row(*["---"] * (1 + len(libraries)))
    for name in args.models:
        model, config = random_model(name)
        print_row(name, *(measure(model, config, to) for to in args.formats))
        del model
        gc.collect()


def random_model(name: str) -> tuple[models.LoadedModel, dict[str, Any]]:
    """Return a model with seeded weights, all of its vectors moved away from zeros and ones, and its config."""
    torch.manual_seed(0)
    model = models.create_model(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    config = models.model_config(name)
    return models.LoadedModel(model, tokenizer(name, config["text_cfg"]), name=name).eval(), config


def tokenizer(name: str, text: dict[str, Any]) -> models.Tokenizer:
    """Return a model's tokenizer, or one that draws tokens where the model's would have to be fetched."""
    if not text.get("hf_tokenizer_name"):
        return CaptionTokenizer(models.tokenizer_of(name))

    def draw(texts: Sequence[str]) -> Tensor:
        return torch.randint(2, int(text["vocab_size"]), (len(texts), int(text["context_length"])),
                             generator=torch.Generator().manual_seed(len(texts)))

    return draw


def measure(model: models.LoadedModel, config: dict[str, Any], to: str) -> str:
    """Return the largest difference of an entry of L2-normalised features, image and text, or why there is none."""
    sys.stderr.write(f"{model.name} -> {to}\n")
    exporter = EXPORTERS[to]
    try:
        exporter.check_supported(model)
        with tempfile.TemporaryDirectory(prefix="aclip-parity-") as folder:
            exporter.write(model, config, Path(folder))
            differences = compare(exporter.read(Path(folder), model), model)
    except UnsupportedModelError as error:
        return f"refused: {str(error).partition(': ')[2].partition(';')[0]}"
    except AclipError as error:
        return f"failed: {error}"
    return ", ".join(f"{differences[f'{what} features']:.1e}" for what in ("image", "text"))


def print_row(*cells: str) -> None:
    """Print one row of the table."""
    sys.stdout.write("| " + " | ".join(cells) + " |\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
