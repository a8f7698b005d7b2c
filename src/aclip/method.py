"""THE ALGORITHM: one training step of every recipe, from CLIP to A-CLIP.

A-CLIP (Yang et al., "Attentive Mask CLIP", arXiv 2212.08653) is the general case; other methods are the
same four steps with parts switched off.

    1. text:        t = norm(text_encoder(captions)), once, cut after the longest caption; for masked language
                    modelling a second time, with some words hidden; for distillation by the frozen model too
    2. passes, in declared order:
       a. scores:   resample an earlier pass's [CLS] attention onto each view's own patch grid
       b. masking:  keep_indices = strategy(scores): the K patches of each view that stay
       c. encoding: v = norm(encoder(kept patches of all views)), encoder = online, or without gradient its
                    EMA, or the frozen model that training started from
    3. objectives:  L = sum of weight * objective(passes, t)
    4. EMA:         after the optimizer step, theta_ema <- m theta_ema + (1 - m) theta

In the recipe `a-clip` the EMA encoder sees `context`, a plain crop that encloses the two augmented views;
its attention ranks their patches, the better half of which the online encoder sees:
    L = 1/2 NCE(v1, t) + 1/2 NCE(v2, t) + SimCLR(v1, v2) + 2 mean BYOL(v -> ema).
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Self, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from aclip import models
from aclip.data import augment
from aclip.ema import Ema, frozen_copy
from aclip.errors import ConfigError
from aclip.masking import MaskingContext, TextReductionContext, crop_scores, hide_tokens
from aclip.objectives import Objective
from aclip.plan import PassPlan, Plan, TextPlan, build_objective, resolve
from aclip.structs import Batch, Encoded, EncodedBatch, EncodedText, StepContext, StepOutput, ViewBatch


class Method(nn.Module):
    """A model, its EMA image encoder, a frozen model, and the heads of a recipe: all that a step computes with.

    Args:
        model: an open_clip model; stays native, so that its state dict is open_clip's.
        plan: the recipe resolved for this model (`aclip.plan.resolve`).
        mean, std: normalisation of the model's input.
        teacher: the model of the frozen encoder; None: a copy of `model` as it is now.
        stored: batches come with the features of the frozen passes (`Batch.stored`), and there is no frozen model.
        stored_logit_scale: the multiplier of the model that those features are of; None without text.

    Attributes:
        frequencies: (vocabulary,) relative frequency of every token in the training captions, where a text pass is
            reduced by it; equal until they are counted in the data, kept in checkpoints.
    """

    mean: Tensor
    std: Tensor
    frozen_mean: Tensor
    frozen_std: Tensor
    frequencies: Tensor | None
    stored_logit_scale: Tensor | None

    def __init__(
        self, model: nn.Module, plan: Plan, mean: Sequence[float], std: Sequence[float],
        teacher: nn.Module | None = None, *, stored: bool = False, stored_logit_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.plan = plan
        self._plans: dict[float, Plan] = {}
        self.model = model
        self.ema_visual = frozen_copy(models.visual_of(model)) if plan.recipe.uses_ema else None
        computes = plan.recipe.uses_frozen and not stored
        self.frozen = frozen_copy(model if teacher is None else teacher) if computes else None
        scale = None if stored_logit_scale is None else torch.tensor(stored_logit_scale)
        self.register_buffer("stored_logit_scale", scale, persistent=False)
        freeze(model, plan.recipe.freeze)
        shape = plan.shape
        fills = any(p.spec.fill for p in plan.passes.values())
        hides = any(text.encoded and text.spec.mask_ratio > 0 for text in plan.texts.values())
        self.mask_token = nn.Parameter(torch.randn(shape.width) * 0.02) if fills else None
        self.text_mask_token = nn.Parameter(torch.randn(shape.text_width) * 0.02) if hides else None
        self.objectives = nn.ModuleDict({name: build_objective(name, plan) for name in plan.recipe.objectives})
        bias = getattr(model, "logit_bias", None)
        if bias is not None:
            adopted = [o.adopt_bias(bias) for o in cast(Iterable[Objective], self.objectives.values())]
            bias.requires_grad_(bias.requires_grad and any(adopted))
        pool = models.attention_pool_of(models.visual_of(model))
        if pool is not None and not any(o.needs_pooled for o in self.objectives.values()):
            pool.requires_grad_(False)  # DDP and the optimizer expect gradients of all trained parameters
        counts = any(text.reduction is not None and text.reduction.needs_frequencies for text in plan.texts.values())
        self.register_buffer("frequencies", torch.full((shape.vocab_size,), 1 / shape.vocab_size) if counts else None)
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        pixels = {"mean": mean, "std": std} if teacher is None else models.preprocess_config(teacher)
        self.register_buffer("frozen_mean", torch.tensor(pixels["mean"]), persistent=False)
        self.register_buffer("frozen_std", torch.tensor(pixels["std"]), persistent=False)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of everything that is trained; the frozen model stays in evaluation mode."""
        super().train(mode)
        if self.frozen is not None:
            self.frozen.eval()
        return self

    def forward(self, batch: Batch, masked: bool = True, resolution: float = 1.0) -> StepOutput:
        """Return the loss of one batch, its parts, and the encoded passes.

        Args:
            batch: on the method's device.
            masked: False keeps every patch and every word in this step (unmasked tuning, FLIP, arXiv 2212.00794,
                section 3).
            resolution: image side relative to the recipe's own (a resolution schedule starts with small images).
        """
        return self.compute_loss(self.encode_batch(batch, masked, resolution), batch.caption_ids)

    def encode_batch(
        self, batch: Batch, masked: bool = True, resolution: float = 1.0, earlier: EncodedBatch | None = None
    ) -> EncodedBatch:
        """Steps 1 and 2: encode a batch.

        No sample depends on the others, so a batch can be encoded in parts, and again: given `earlier`, the result
        for these samples with the same weights, masks and passes without gradient are reused.
        """
        # 1. text
        texts = {name: self.encode_text(text, batch, masked) if earlier is None or text.trains else earlier.texts[name]
                 for name, text in self.plan.texts.items()}

        # 2. passes
        return EncodedBatch(texts, self.run_passes(batch, masked, resolution, earlier))

    def compute_loss(self, encoded: EncodedBatch, caption_ids: Int[Tensor, " B"]) -> StepOutput:
        """Step 3: objectives, over the whole batch."""
        logit_scale, frozen_scale = (
            models.logit_scale_of(model).exp() if self.plan.uses_text and model is not None else None
            for model in (self.model, self.frozen))
        context = StepContext(encoded.texts, encoded.passes, caption_ids, logit_scale,
                              getattr(self.model, "logit_bias", None),
                              frozen_scale if self.frozen is not None else self.stored_logit_scale)
        losses = {name: objective(context) for name, objective in self.objectives.items()}
        loss = torch.stack([o.weight * losses[name] for name, o in self.plan.recipe.objectives.items()]).sum()
        return StepOutput(loss, {name: part.detach() for name, part in losses.items()}, encoded.passes)

    def encode_text(self, text: TextPlan, batch: Batch, masked: bool = True) -> EncodedText:
        """Step 1: run the text encoder over the captions, or over the part of them that the text pass keeps."""
        tokens = batch.tokens
        if text.reduction is not None and masked:
            tokens = text.reduction(tokens, TextReductionContext(seeds=batch.seeds, frequencies=self.frequencies))
        if not text.encoded:
            return EncodedText(tokens)
        if self.text_mask_token is not None and text.spec.mask_ratio > 0:
            ratio = text.spec.mask_ratio if masked else 0.0
            seen = hide_tokens(tokens, ratio, batch.seeds, self.plan.shape.vocab_size, f"text/{text.name}")
            states = models.encode_hidden_text(self.model, seen.tokens, seen.masked, self.text_mask_token)
            return EncodedText(tokens, hidden=seen.hidden, states=states)
        if text.trains:
            features = models.encode_text(self.model, tokens)
        elif self.frozen is None:
            features = batch.stored[text.name]
        else:
            missing = 0 if text.shape.text_cut else text.shape.context_length - tokens.shape[1]
            with torch.no_grad():
                features = models.encode_text(self.frozen, F.pad(tokens, (0, missing)))
        return EncodedText(tokens, F.normalize(features.float(), dim=-1))

    def run_passes(
        self, batch: Batch, masked: bool = True, resolution: float = 1.0, earlier: EncodedBatch | None = None
    ) -> dict[str, Encoded]:
        """Step 2: (score ->) mask -> encode, pass by pass."""
        plan = self.plan_at(resolution)
        passes: dict[str, Encoded] = {}
        run = [p for p in plan.passes.values() if plan.runs(p, masked)]
        if self.frozen is None:  # features come with the batch, but not with a snapshot's
            run = [p for p in run if p.spec.encoder != "frozen" or p.name in batch.stored]
            passes |= {p.name: stored_pass(p, batch) for p in run if p.spec.encoder == "frozen"}
        if earlier is not None:  # no gradient reaches them
            passes |= {p.name: earlier.passes[p.name] for p in run if not p.trains}
        todo = [p for p in run if p.name not in passes]
        # parameters were drawn per sample in the loader; they are applied here, in batch, on the device
        needed = {view for p in todo for view in p.spec.views}
        images = {name: augment.apply(batch.views[name], self.mean, self.std) for name in batch.views if name in needed}
        for p in todo:
            views = [resized(images[view], p.image_size) for view in p.spec.views]
            if p.spec.encoder == "frozen":
                views = [self.normalised_for_frozen(pixels) for pixels in views]
            if not (masked and p.removes):
                keep = None
            elif earlier is not None:
                kept = earlier.passes[p.name].keep_indices
                keep = kept.flatten(0, 1) if kept is not None else None
            else:
                keep = self.choose_patches(plan, p, batch, passes, views)
            passes[p.name] = self.encode(p, views, keep)
        return {p.name: passes[p.name] for p in run}

    def normalised_for_frozen(self, pixels: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B 3 h w"]:
        """Return images that are normalised for the model as the frozen one expects them."""
        mean, std, theirs, deviation = (
            v[:, None, None] for v in (self.mean, self.std, self.frozen_mean, self.frozen_std))
        return pixels * (std / deviation) + (mean - theirs) / deviation

    def ema(self) -> Ema:
        """Step 4: return the EMA of the image encoder and of the heads that have an averaged copy, for `Ema.update`."""
        objectives = cast(Iterable[Objective], self.objectives.values())
        pairs = [pair for objective in objectives for pair in objective.ema_pairs()]
        if self.ema_visual is not None:
            pairs.append((models.visual_of(self.model), self.ema_visual))
        return Ema(pairs)

    def choose_patches(
        self, plan: Plan, p: PassPlan, batch: Batch, passes: Mapping[str, Encoded], views: list[Tensor]
    ) -> Int[Tensor, "VB K"]:
        """Steps 2a and 2b: return the kept patches of every view, stacked view by view."""
        return torch.cat([p.strategy(MaskingContext(
            batch_size=batch.size, grid_size=p.grid_size, device=pixels.device,
            scores=self.scores_for(plan, p, name, batch.views, passes),
            images=pixels, seeds=batch.seeds, purpose=f"mask/{p.name}/{name}",
        )) for name, pixels in zip(p.spec.views, views, strict=True)])

    def scores_for(
        self, plan: Plan, p: PassPlan, view: str, batch_views: Mapping[str, ViewBatch], passes: Mapping[str, Encoded]
    ) -> Float[Tensor, "B N"] | None:
        """Step 2a: return the scores of one view's patches, seen by the pass that it reads them from."""
        if p.spec.scores_from is None:
            return None
        source = plan.passes[p.spec.scores_from]
        source_view = view if view in source.spec.views else source.spec.views[0]
        scores = passes[source.name].scores
        assert scores is not None
        seen, wanted = batch_views[source_view], batch_views[view]
        maps = scores[source.spec.views.index(source_view)].unflatten(1, source.grid_size)
        upright = torch.where(seen.flipped[:, None, None], maps.flip(2), maps).flatten(1)
        return crop_scores(upright, source.grid_size, seen.boxes, wanted.boxes, p.grid_size,
                           flipped=wanted.flipped, padding=p.spec.score_padding)

    def encode(self, p: PassPlan, views: list[Tensor], keep: Int[Tensor, "VB K"] | None) -> Encoded:
        """Step 2c: run all views of a pass through its encoder in one batch."""
        model = {"online": self.model, "ema": self.ema_visual, "frozen": self.frozen}[p.spec.encoder]
        assert model is not None
        with torch.set_grad_enabled(p.trains and torch.is_grad_enabled()):
            pixels = torch.cat(views)
            out = models.encode_image(
                models.visual_of(model), pixels, keep, mask_token=self.mask_token if p.spec.fill else None,
                return_scores=p.gives_scores, return_patches=p.gives_patches)
        if p.spec.encoder == "online" and not p.trains:
            torch.clear_autocast_cache()  # some versions of torch would reuse weights that were cast without gradient
        width = 0 if p.scores_only else None  # features that nobody reads
        by_view = (len(views), -1)
        return Encoded(
            features=F.normalize(out.features[:, :width].float(), dim=-1).unflatten(0, by_view),
            cls=out.cls[:, :width].unflatten(0, by_view),
            scores=out.scores.unflatten(0, by_view) if out.scores is not None else None,
            keep_indices=keep.unflatten(0, by_view) if keep is not None else None,
            num_tokens=out.num_tokens,
            grid_size=p.grid_size,
            pixels=pixels.unflatten(0, by_view) if p.gives_pixels else None,
            patches=out.patches.unflatten(0, by_view) if out.patches is not None else None,
        )

    def plan_at(self, resolution: float) -> Plan:
        """Return the plan with images of another size; positions are interpolated to it."""
        if resolution == 1.0:
            return self.plan
        if resolution not in self._plans:
            self._plans[resolution] = resolve(self.plan.recipe, self.plan.shape, resolution,
                                              frozen_shape=self.plan.frozen_shape)
        return self._plans[resolution]


def stored_pass(p: PassPlan, batch: Batch) -> Encoded:
    """Return a frozen pass whose features the batch comes with."""
    features = batch.stored[p.name].float().transpose(0, 1)
    return Encoded(features=F.normalize(features, dim=-1), cls=features[..., :0], scores=None, keep_indices=None,
                   num_tokens=p.num_tokens, grid_size=p.grid_size)


def resized(pixels: Float[Tensor, "B 3 h w"], size: tuple[int, int]) -> Float[Tensor, "B 3 p q"]:
    """Return the images at `size`; only views shared by passes of several sizes are resized here."""
    if pixels.shape[-2:] == size:
        return pixels
    return F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Stop training the parameters whose names match a pattern ("visual.*"), or start with one ending in ".".

    `patch_embedding` is the image tower's, whatever its family calls it; `towers` is both towers, without their
    projections into the joint space, the scale and the bias.

    Raises:
        ConfigError: a pattern that names nothing.
    """
    for pattern in patterns:
        if pattern == "patch_embedding":
            matched = list(models.patch_embedding_of(models.visual_of(model)).parameters())
        elif pattern == "towers":
            matched = [parameter for name, parameter in model.named_parameters()
                       if not any(part in name for part in models.INTO_JOINT_SPACE)]
        else:
            matched = [parameter for name, parameter in model.named_parameters()
                       if fnmatchcase(name, pattern) or (pattern.endswith(".") and name.startswith(pattern))]
        if not matched:
            raise ConfigError(f"nothing to freeze: no parameter of the model is called '{pattern}'")
        for parameter in matched:
            parameter.requires_grad_(False)
