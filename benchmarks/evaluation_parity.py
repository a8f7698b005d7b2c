"""Our metrics beside those of clip-benchmark and scikit-learn, computed by their own code on the same features.

    pip install clip-benchmark
    python benchmarks/evaluation_parity.py runs/demo --data emoji:val_both --labelled cifar10:train[:5000]

With features of a real model on real images: zero-shot classification of labelled images, both given the same
class names and prompts; retrieval with five captions an image, made from `--data` by five templates and numbered, so
that no two images share one; and linear probes, ours beside scikit-learn's LogisticRegression over a fixed list of
penalties, chosen on our validation split. Prints each figure and the largest difference.

clip-benchmark 1.6.2 calls float() on arrays of one element, which NumPy 2.4 no longer converts: its float is replaced.
"""

import argparse
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import numpy as np
import torch
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import aclip
from aclip import data, models
from aclip.evaluation.features import ImageFeatures, Space, TextEncoder, encode_image_set
from aclip.evaluation.probes import LinearProbe, split
from aclip.evaluation.retrieval import Retrieval
from aclip.evaluation.zero_shot import DEFAULT_TEMPLATES, ZeroShot

zeroshot_classification.float = lambda value: np.asarray(value).item()
FIVE = ("{} number {n}", "a picture of {} ({n})", "{n}: a photo of a {}", "an image of {}, {n}", "a drawing of {} {n}")
CPU = torch.device("cpu")


class Features:
    """What clip-benchmark takes for a model: its images are features already."""

    def __init__(self, model: models.LoadedModel) -> None:
        self.model = model

    def encode_image(self, features: Tensor) -> Tensor:
        return features

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens)


class Loader:
    """What clip-benchmark takes for a data loader."""

    def __init__(self, features: Tensor, targets: Tensor | Sequence[object], classes: list[str]) -> None:
        self.features, self.targets, self.dataset = features, targets, SimpleNamespace(classes=classes)

    def __iter__(self) -> Iterator[tuple[Tensor, object]]:
        for start in range(0, len(self.features), 500):
            yield self.features[start : start + 500], self.targets[start : start + 500]


def encode(model: models.LoadedModel, spec: str, target: data.Target, space: Space = "joint") -> ImageFeatures:
    """Return the features of a source's images."""
    images = data.EvaluationSet(data.open_source(spec), model.preprocess, batch_size=256, target=target)
    return encode_image_set(model, images, CPU, space=space)


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a run's folder, or an open_clip name")
    parser.add_argument("--data", default="emoji:val_both", help="images with captions")
    parser.add_argument("--labelled", default="cifar10:train[:5000]", help="images with labels")
    parser.add_argument("--held-out", default="cifar10:test[:2000]", help="labelled images to measure on")
    args = parser.parse_args()
    model, console = aclip.load(args.model), Console(highlight=False, soft_wrap=True)
    texts = TextEncoder(model, CPU)
    pairs: list[tuple[str, float, float]] = []

    images = encode(model, args.held_out, "label")
    classes = sorted({str(label) for label in images.labels})
    ours = ZeroShot(classes=tuple(classes)).measure(images, texts).metrics
    targets = torch.tensor([classes.index(str(label)) for label in images.labels])
    theirs = zeroshot_classification.evaluate(
        Features(model), Loader(images.features, targets, classes), model.tokenizer, classes,
        [template.replace("{}", "{c}") for template in DEFAULT_TEMPLATES], "cpu", amp=False)
    pairs += [(f"zero-shot {name}", ours[name], theirs[other]) for name, other in
              (("top1", "acc1"), ("top5", "acc5"), ("mean_per_class", "mean_per_class_recall")) if name in ours]

    shown = encode(model, args.data, "caption")
    captions = tuple(tuple(t.replace("{}", caption).replace("{n}", str(i)) for t in FIVE)
                     for i, (caption, *_) in enumerate(shown.captions))
    many = ImageFeatures(shown.features, captions, shown.labels, shown.keys)
    ours = Retrieval(protocol="karpathy").measure(many, texts).metrics
    theirs = zeroshot_retrieval.evaluate(Features(model), Loader(shown.features, captions, []), model.tokenizer, "cpu",
                                         amp=False, recall_k_list=[1, 5, 10])
    pairs += [(f"retrieval {name}_r{k}", ours[f"{name}_r{k}"], theirs[f"{other}_retrieval_recall@{k}"])
              for k in (1, 5, 10) for name, other in (("image_to_text", "text"), ("text_to_image", "image"))]
    for name, own, their in pairs:
        console.print(f"{name:32} ours {own:.6f}  clip-benchmark {their:.6f}  difference {abs(own - their):.1e}")
    console.print(f"largest difference {max(abs(own - their) for _, own, their in pairs):.1e} over "
                  f"{len(images):,} images of {len(classes)} classes and {len(shown):,} of five captions")

    training, held = encode(model, args.labelled, "label", "trunk"), encode(model, args.held_out, "label", "trunk")
    result = LinearProbe().fit(training).measure(held, texts)
    console.print(f"linear probe: {result.metrics['top1']:.4f}  {dict(result.settings)}")
    console.print(f"scikit-learn: {scikit_learn(training, held, classes):.4f}")


def scikit_learn(training: ImageFeatures, held: ImageFeatures, classes: list[str]) -> float:
    """Return the accuracy of LogisticRegression on standardised features, C chosen on our validation split."""
    mean, deviation = training.features.mean(dim=0), training.features.std(dim=0, correction=0)
    x, z = (((part.features - mean) / deviation).numpy() for part in (training, held))
    y, answers = (np.array([classes.index(str(label)) for label in part.labels]) for part in (training, held))
    fitted, validating = split(y, 20_000, 0)
    strengths = [10.0**exponent for exponent in np.arange(-6, 6.1, 0.5)]
    scores = [LogisticRegression(C=1 / l2, max_iter=1000).fit(x[fitted], y[fitted]).score(x[validating], y[validating])
              for l2 in strengths]
    best = max(range(len(scores)), key=lambda i: (scores[i], i))
    return float(LogisticRegression(C=1 / strengths[best], max_iter=1000).fit(x, y).score(z, answers))


if __name__ == "__main__":
    main()
