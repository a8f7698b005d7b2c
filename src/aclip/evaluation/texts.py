"""The text side of an evaluation: a model's features of texts, which several evaluators and sets may ask for."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from aclip.evaluation import together
from aclip.evaluation.features import autocast, evaluating, gather_rows
from aclip.evaluation.interface import Encoder

KEPT_ELEMENTS = 2**26
"""Float32 entries of features that are remembered (256 MiB), such as 131,072 captions at 512."""


class TextEncoder:
    """A model's text tower as it is now, with a memory of what was made of its features lately.

    So classes are embedded once for all sets and evaluators, and the captions of a set once for every share of its
    pictures' patches. The weights must stay as they are.

    Attributes:
        model: whose text tower is run, already on `device`.
        device: where it runs and the features stay.
        precision: type of autocast (`torch.bfloat16`), or None for none. Features are float32 either way.
    """

    def __init__(
        self, model: Encoder, device: torch.device, *, precision: torch.dtype | None = None, batch_size: int = 256
    ) -> None:
        self.model, self.device, self.precision = model, device, precision
        self._batch_size = batch_size
        self._lately: OrderedDict[Hashable, Tensor] = OrderedDict()

    def encode(self, texts: Sequence[str]) -> Float[Tensor, "M D"]:
        """Encode texts without gradient, in evaluation mode, which is undone afterwards.

        Where processes evaluate together each encodes its share; all must ask for the same texts in the same order.

        Returns:
            (M, D) float32, L2-normalised, on `device`, in the order of `texts`.
        """
        starts = range(0, len(texts), self._batch_size)
        features = []
        with evaluating(self.model), torch.inference_mode(), together.common_fate():
            for start in (starts[i] for i in together.share(len(starts))):
                tokens = self.model.tokenizer(list(texts[start : start + self._batch_size])).to(self.device)
                with autocast(self.device, self.precision):
                    encoded = self.model.encode_text(tokens, normalize=True)
                features.append(F.normalize(encoded.float(), dim=-1))
        return gather_rows(features, self.device)

    def once(self, key: Hashable, make: Callable[[], Float[Tensor, "M D"]]) -> Float[Tensor, "M D"]:
        """Return what `make` returns, or returned when it was last asked for by this key.

        What was not asked for longest is forgotten first, when all together exceed `KEPT_ELEMENTS`.
        """
        features = self._lately.pop(key, None)
        if features is None:
            features = make()
        self._lately[key] = features
        while sum(known.numel() for known in self._lately.values()) > KEPT_ELEMENTS:
            self._lately.popitem(last=False)
        return features
