"""Memory and time of retrieval among many images and captions, on random features.

    python benchmarks/retrieval_memory.py --images 100000 --captions 500000

The features are synthetic; everything else is what `aclip evaluate --protocol all` does with a set of that
size, in this process alone. Prints the peak of the resident memory as the kernel counts it, that of the imports and of
the features alone, and the time.
"""

import argparse
import resource
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from aclip import models
from aclip.evaluation import ImageFeatures, TextEncoder
from aclip.evaluation.retrieval import Retrieval


def tokenize(texts: Sequence[str]) -> Tensor:
    """Return the numbers that are the words."""
    return torch.tensor([[int(word) for word in text.split()] for text in texts])


class RandomTexts(models.LoadedModel):
    """A model whose texts are noise around the features of their images; tokens are numbers."""

    def __init__(self, images: Tensor, noise: float) -> None:
        super().__init__(models.create_model("vit-micro"), tokenize)
        self.images, self.noise = images, noise

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        generator = torch.Generator().manual_seed(int(tokens[0, 1]))
        own = self.images[tokens[:, 0]]
        return F.normalize(own + self.noise * torch.randn(own.shape, generator=generator), dim=-1)


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    console = Console(highlight=False, soft_wrap=True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--captions", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=512, help="of the features")
    parser.add_argument("--noise", type=float, default=0.35, help="of a text's coordinates; images have norm 1")
    args = parser.parse_args()
    console.print(f"imports: {peak_gib():.2f} GiB")
    images = F.normalize(torch.randn(args.images, args.width, generator=torch.Generator().manual_seed(0)), dim=-1)
    each = args.captions // args.images
    captions = tuple(tuple(f"{i} {i * each + n}" for n in range(each)) for i in range(args.images))
    features = ImageFeatures(images, captions, (None,) * len(images), tuple(map(str, range(len(images)))))
    console.print(f"with the images and the captions: {peak_gib():.2f} GiB")
    start = time.perf_counter()
    result = Retrieval(protocol="all").measure(
        features, TextEncoder(RandomTexts(images, args.noise), torch.device("cpu")))
    seconds = time.perf_counter() - start
    entries = len(images) * each * len(images)
    rate = entries * args.width * 2 / seconds / 1e9
    console.print(f"{len(images):,} x {each * len(images):,}, {args.width} wide: peak {peak_gib():.2f} GiB, "
                  f"{seconds:.0f} s on {torch.get_num_threads()} threads ({rate:.0f} GFLOP/s); the matrix itself would "
                  f"take {entries * 4 / 2**30:.0f} GiB")
    console.print("  ".join(f"{key} {value:.4g}" for key, value in result.metrics.items()))


if __name__ == "__main__":
    main()
