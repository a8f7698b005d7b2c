"""A recipe as a contender in a comparison: what `aclip train` is told, and what it costs by arithmetic."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch

from aclip import data, models
from aclip.cli.train import config_from
from aclip.config import Recipe
from aclip.engine.run_config import RunConfig, Timetable, settled
from aclip.errors import BadSampleError, ConfigError, unknown_name
from aclip.plan import Plan, asks_only_of_masked, resolve
from aclip.recipes import RECIPES
from aclip.rng import generator

BASELINE = "clip"
"""What times and arithmetic are relative to, whether it is compared or not."""

TEXT_SAMPLES = 512
NOMINAL_STEPS = 1000


@dataclass(frozen=True)
class Stage:
    """Steps of a run that cost the same.

    Attributes:
        share: of the run's steps.
        masked: whether the recipe masks in them. resolution: image side relative to the recipe's own.
        plan: resolved for them.
    """

    share: float
    masked: bool
    resolution: float
    plan: Plan

    def label(self, name: str) -> str:
        """Return the recipe's name with what is special about these steps."""
        words = [name, *(["unmasked"] if not self.masked else []),
                 *([f"at {self.resolution:g} of the size"] if self.resolution != 1.0 else [])]
        return ", ".join(words)

    def kinds(self, name: str) -> list[tuple[str, float, bool]]:
        """Return the kinds of its steps: label, share of the stage, and whether scores are known from earlier epochs.

        One kind, but where scores serve for n epochs: an n-th of the steps computes them, as `Plan.macs` counts.
        """
        share = self.plan.scoring_share
        if share == 1.0:
            return [(self.label(name), 1.0, False)]
        return [(f"{self.label(name)}, scoring", share, False), (f"{self.label(name)}, scores known", 1 - share, True)]


@dataclass(frozen=True)
class Contender:
    """A recipe of a comparison.

    Attributes:
        arguments: of `aclip train`, for all of its runs.
        config: settled; its seed, length and folder are not those of any run.
        plan: resolved on the model.
        stages: of each run, in order.
    """

    arguments: tuple[str, ...]
    config: RunConfig
    plan: Plan
    stages: tuple[Stage, ...]

    @property
    def recipe(self) -> Recipe:
        """The recipe, with everything that the options set."""
        return self.config.recipe

    def macs(self, text_tokens: float) -> float:
        """Return multiply-accumulates per pair and step, averaged over the stages."""
        return sum(stage.share * stage.plan.macs(text_tokens) for stage in self.stages)


def contender(name: str, common: Mapping[str, list[str]], num_pairs: int, device: torch.device) -> Contender:
    """Return a recipe with the options that every run is given, as far as they concern it.

    Args:
        name: of the recipe.
        common: option of `aclip train` -> the words that set it. `--mask-ratio` is left out where nothing is masked,
            `--unmasked-tuning` where everything that is asked is what the mask hides.
        num_pairs: in the training source.
        device: on which the run will train.

    Raises:
        ConfigError: an unknown recipe, model or setting.
    """
    if name not in RECIPES:
        raise ConfigError(unknown_name("recipe", name, RECIPES))
    recipe, left_out = RECIPES[name], set()
    if all(p.masking == "none" for p in recipe.passes):
        left_out.add("--mask-ratio")
    if asks_only_of_masked(recipe):
        left_out |= {"--unmasked-tuning", "--unmasked-lr"}
    words = [word for option, words in common.items() if option not in left_out for word in words]
    return contender_from(("--recipe", name, *words), num_pairs, device)


def contender_from(arguments: Sequence[str], num_pairs: int, device: torch.device) -> Contender:
    """Return the contender of these arguments of `aclip train`.

    Raises:
        ConfigError: an unknown model, or a setting that does not fit the recipe.
    """
    try:
        config = settled(config_from(arguments), num_pairs, device)
        shape = models.shape_of(models.model_config(config.model, image_size=config.image_size))
        plan = resolve(config.recipe, shape)
        stages = stages_of(config, plan, num_pairs)
    except ConfigError as error:
        raise ConfigError(f"{arguments[1]}: {error}") from error
    return Contender(tuple(arguments), config, plan, stages)


def stages_of(config: RunConfig, plan: Plan, num_pairs: int) -> tuple[Stage, ...]:
    """Return the stages of a run: its whole timetable, for shares do not depend on its length."""
    timetable = Timetable.of(replace(config, samples=NOMINAL_STEPS * (config.batch_size or 1)), num_pairs)
    masks = any(p.removes for p in plan.passes) or any(t.reduction is not None for t in plan.texts)
    phases = [timetable.phase(step) for step in range(NOMINAL_STEPS)]
    counts = Counter((phase.masked or not masks, phase.resolution) for phase in phases)
    plans = {resolution: resolve(plan.recipe, plan.shape, resolution) for _, resolution in counts}
    return tuple(
        Stage(number / NOMINAL_STEPS, masked, resolution, plans[resolution] if masked else plans[resolution].unmasked())
        for (masked, resolution), number in counts.items())


def baseline(common: Mapping[str, list[str]], num_pairs: int, device: torch.device) -> Contender:
    """Return plain CLIP with the same options, but for changes to recipes, which are not meant for it."""
    kept = {option: words for option, words in common.items() if option not in ("--set", "--weight-decay")}
    changes = [word for word in common.get("--set", ()) if word != "--set" and not word.startswith("recipe.")]
    return contender(BASELINE, kept | {"--set": [w for c in changes for w in ("--set", c)]}, num_pairs, device)


def mean_text_length(source: data.Source, config: RunConfig, cut: bool) -> float:
    """Return the mean length in tokens to which the text of a batch is cut, from some of the first epoch's captions.

    Args:
        source: the pairs.
        config: settled.
        cut: whether the tower allows text to be cut after the longest caption of the batch; else the context length.
    """
    tokenizer = data.CaptionTokenizer(models.tokenizer_of(config.model))
    if not cut:
        return float(tokenizer.context_length)
    captions = []
    some = max(TEXT_SAMPLES, config.batch_size or 0)  # a batch at least: its longest caption sets the length
    for index in generator(config.seed, "text length").permutation(len(source))[:some].tolist():
        try:
            raw = source.read(index)
            captions.append(data.draw_caption(data.clean_captions(raw.captions), raw.tags, seed=config.seed, epoch=0,
                                              sample=index).text)
        except BadSampleError:
            continue
    tokens = tokenizer(captions or [""])
    batches = tokens.split(config.batch_size or len(tokens))
    return fmean(models.cut_after_eot(batch).shape[1] for batch in batches)
