"""How much of what the paper's scores keep is kept by cheaper ones: of the first layers, or of smaller pictures.

    aclip train --recipe attentive-2x50 --model vit-micro --data emoji:train --epochs 4 --batch-size 128 --lr 1e-3 \\
                --unmasked-tuning 0.15 --precision bf16 --set recipe.ema_momentum.start=0.9 \\
                --set recipe.ema_momentum.end=0.99 --output runs/scores
    python benchmarks/cheaper_scores.py runs/scores

For the EMA encoder of a finished run: the share of the patches kept by scores of all layers at full resolution that
are kept by the scores of its first n layers (`score_layers` of a pass), and by those at half of the resolution
(`resolution`); chance is the share that is kept at all. Beside it, the multiply-accumulates of the scoring pass.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from aclip import data, models
from aclip.masking import AttentiveMasking, MaskingContext
from aclip.models.averaged import load_average
from aclip.plan import image_macs
from scored_run import opened, options
from step import markdown


def main() -> None:
    """Measure and print."""
    parser = options(__doc__, "emoji:val_vendor")
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--mask-ratio", type=float, default=0.5)
    args = parser.parse_args()

    model, source = opened(args)
    visual = models.visual_of(model.model)
    load_average(visual, args.run / "checkpoints")
    shape = models.shape_of(models.model_config(args.run))
    chosen = range(0, len(source), max(1, len(source) // args.pictures))[: args.pictures]
    pixels = torch.stack([model.preprocess(data.decode_image(source.read(i).image)) for i in chosen])
    mask = AttentiveMasking(args.mask_ratio)
    height, width = grid = shape.grid_size

    def kept(scores: Tensor) -> Tensor:
        chosen = mask(MaskingContext(len(pixels), grid, "cpu", scores))
        return F.one_hot(chosen, height * width).sum(dim=1).bool()

    def ways() -> Iterator[tuple[str, Tensor, float]]:
        many = height * width
        for layers in range(1, shape.layers + 1):
            found = models.encode_image(visual, pixels, return_scores=True, score_layers=layers, scores_only=True)
            macs = image_macs(shape, many, many + 1, layers - 1)
            yield f"first {layers} of {shape.layers} layers", found.scores, macs
        small = F.interpolate(pixels, (shape.image_size[0] // 2, shape.image_size[1] // 2), mode="bilinear",
                              antialias=True)
        scores = models.encode_image(visual, small, return_scores=True).scores
        maps = F.interpolate(scores.view(-1, 1, height // 2, width // 2), grid, mode="bilinear", align_corners=False)
        few = height // 2 * (width // 2)
        yield "half resolution, all layers", maps.flatten(1), image_macs(shape, few, few + 1)

    with torch.inference_mode():
        expected = kept(models.encode_image(visual, pixels, return_scores=True).scores)
        whole = image_macs(shape, height * width, height * width + 1)
        rows = [[name, f"{(kept(scores) & expected).sum() / expected.sum():.1%}", f"{macs / whole:.2f}"]
                for name, scores, macs in ways()]
    rows.append(["chance", f"{expected.float().mean():.1%}", "0"])
    Console(width=200).print(markdown(["scores", "of the kept patches", "arithmetic"], rows), markup=False,
                             highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
