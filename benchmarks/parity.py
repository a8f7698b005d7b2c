"""How far exported models are from their own features: one row a model, one column a library.

    python benchmarks/parity.py                               the table of docs/interop.md
    python benchmarks/parity.py --models ViT-B-32 --formats huggingface

Weights are random (seeded), so nothing is fetched; the tokens of models whose tokenizer would have to be are random
too. Models are exported one after the other into a temporary folder.
"""

import argparse
import gc
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from aclip import models
from aclip.data import CaptionTokenizer
from aclip.errors import AclipError, UnsupportedModelError
from aclip.exporters import EXPORTS, Subject, made_examples
from aclip.exporters.check import compare

MODELS = ("ViT-B-32", "ViT-B-16", "ViT-B-16-quickgelu", "ViT-L-14", "ViT-B-16-SigLIP", "vit_medium_patch16_gap_256")
FORMATS = ("open_clip", "huggingface", "onnx")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=sorted(EXPORTS))
    args = parser.parse_args()
    libraries = [EXPORTS[name].library for name in args.formats]
    print_row("model", *libraries)
    print_row(*["---"] * (1 + len(libraries)))
    for name in args.models:
        subject = random_model(name)
        print_row(name, *(measure(subject, to) for to in args.formats))
        del subject
        gc.collect()


def random_model(name: str) -> Subject:
    """Return a model with seeded weights, all of its vectors moved away from zeros and ones."""
    torch.manual_seed(0)
    model = models.create_model(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    config = models.model_config(name)
    return Subject(models.LoadedModel(model, tokenizer(name, config["text_cfg"])), config, name)


def tokenizer(name: str, text: dict[str, object]) -> models.Tokenizer:
    """Return a model's tokenizer, or one that draws tokens where the model's would have to be fetched."""
    if not text.get("hf_tokenizer_name"):
        return CaptionTokenizer(models.tokenizer_of(name))
    shape = int(str(text["context_length"]))

    def draw(texts: list[str]) -> Tensor:
        return torch.randint(2, int(str(text["vocab_size"])), (len(texts), shape),
                             generator=torch.Generator().manual_seed(len(texts)))

    return draw


def measure(subject: Subject, to: str) -> str:
    """Return the largest difference of an entry of L2-normalised features, image and text, or why there is none."""
    sys.stderr.write(f"{subject.name} -> {to}\n")
    try:
        EXPORTS[to].check_can_represent(subject)
        with tempfile.TemporaryDirectory(prefix="aclip-parity-") as folder, torch.inference_mode():
            with torch.inference_mode(False):
                EXPORTS[to].write(subject, Path(folder))
            parity = compare(EXPORTS[to].read(Path(folder), subject), subject, made_examples(subject.image_size))
    except UnsupportedModelError as error:
        return f"refused: {str(error).partition(': ')[2].partition(';')[0]}"
    except AclipError as error:
        return f"failed: {error}"
    return f"{parity.image:.1e}, {parity.text:.1e}"


def print_row(*cells: str) -> None:
    """Print one row of the table."""
    sys.stdout.write("| " + " | ".join(cells) + " |\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
