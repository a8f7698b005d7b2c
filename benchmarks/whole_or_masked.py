"""How well a run reads whole pictures, and the same pictures with the mask that it was trained under.

    .venv/bin/python benchmarks/whole_or_masked.py runs/demo --data emoji:val_vendor

Prints image-to-caption R@1 and R@5 of the trained image tower on all patches, on the patches that its EMA
encoder attends to most, and on random ones. Not an evaluation to quote: nothing is masked in `aclip evaluate`.
"""

from collections.abc import Callable

import torch
from rich.console import Console
from torch import Tensor

from aclip import data, models
from aclip.evaluation.features import encode_texts
from aclip.evaluation.ranking import ranks, recall
from aclip.evaluation.retrieval import distinct
from aclip.masking import AttentiveMasking, MaskingContext, MaskingStrategy, UniformMasking
from aclip.models.averaged import load_average
from scored_run import opened, options


def main() -> None:
    """Evaluate and print."""
    parser = options(__doc__, "emoji:val_vendor")
    parser.add_argument("--mask-ratio", type=float, default=0.5)
    args = parser.parse_args()

    model, source = opened(args)
    visual = models.visual_of(model.model)
    scorer = models.load(args.run)
    load_average(models.visual_of(scorer.model), args.run / "checkpoints")
    height, width = (side // visual.conv1.kernel_size[0] for side in visual.image_size)
    batches = list(data.EvaluationSet(source, model.preprocess, batch_size=256, workers=2))
    captions, of_picture = distinct([caption for batch in batches for caption in batch.captions])
    texts = encode_texts(model, captions, torch.device("cpu"))
    groups = torch.tensor(of_picture)

    def masked(strategy: MaskingStrategy) -> Callable[[Tensor], Tensor]:
        def encode(pixels: Tensor) -> Tensor:
            keep = strategy(MaskingContext(len(pixels), (height, width), "cpu", scorer.attention_scores(pixels),
                                           generator=torch.Generator().manual_seed(0)))
            return models.encode_image(visual, pixels, keep).features

        return encode

    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "whole pictures": lambda pixels: models.encode_image(visual, pixels).features,
        f"attentive mask, ratio {args.mask_ratio}": masked(AttentiveMasking(args.mask_ratio)),
        f"random mask, ratio {args.mask_ratio}": masked(UniformMasking(args.mask_ratio)),
    }
    console = Console()
    for name, encode in ways.items():
        with torch.inference_mode():
            features = torch.cat([encode(batch.pixels) for batch in batches])
        rank, _ = ranks(torch.nn.functional.normalize(features, dim=1), texts, groups, torch.arange(len(captions)))
        console.print(f"{name}: R@1 {recall(rank, 1):.1%}, R@5 {recall(rank, 5):.1%}")


if __name__ == "__main__":
    main()
