"""How well a run reads whole images, and the same images with the mask that it was trained under.

    python benchmarks/whole_or_masked.py runs/demo --data emoji:val_vendor

Prints image-to-caption R@1 and R@5 of the trained image tower on all patches, on the patches that its EMA
encoder attends to most, and on random ones. `aclip evaluate --keep` scores with the trained tower itself instead.
"""

import argparse
from pathlib import Path

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from aclip import data, models
from aclip.evaluation.features import MaskedEncoder, TextEncoder, encode_image_set
from aclip.evaluation.retrieval import Retrieval

CPU = torch.device("cpu")


class ScoredByEma(MaskedEncoder):
    """A masked encoder whose patches are scored by another model."""

    scorer: models.LoadedModel

    def attention_scores(self, images: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B N"]:
        """See `LoadedModel.attention_scores`."""
        return self.scorer.attention_scores(images)


def main() -> None:
    """Evaluate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", default="emoji:val_vendor")
    parser.add_argument("--mask-ratio", type=float, default=0.5)
    args = parser.parse_args()

    model, source = models.load(args.run), data.open_source(args.data)
    attentive = ScoredByEma(model, 1 - args.mask_ratio)
    attentive.scorer = models.load(args.run, weights="ema")
    encoders = {
        "whole images": model,
        f"attentive mask, ratio {args.mask_ratio}": attentive,
        f"random mask, ratio {args.mask_ratio}": MaskedEncoder(model, 1 - args.mask_ratio, "uniform"),
    }
    texts = TextEncoder(model, CPU)
    console = Console()
    for name, encoder in encoders.items():
        images = encode_image_set(encoder, data.EvaluationSet(source, model.preprocess, batch_size=256), CPU)
        metrics = Retrieval().measure(images, texts).metrics
        console.print(f"{name}: R@1 {metrics['image_to_text_r1']:.1%}, R@5 {metrics['image_to_text_r5']:.1%}")


if __name__ == "__main__":
    main()
