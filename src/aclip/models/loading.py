"""Models by name: presets, open_clip's models with or without pretrained weights, files, folders and runs."""

import functools
import logging
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import open_clip
from jaxtyping import Float
from open_clip.constants import HF_CONFIG_NAME as CONFIG_NAME
from open_clip.constants import HF_SAFE_WEIGHTS_NAME as WEIGHTS_NAME
from open_clip.model import set_model_preprocess_cfg
from open_clip.pretrained import download_pretrained, download_pretrained_from_hf
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import is_model, model_entrypoint
from torch import Tensor, nn
from torch.nn import functional as F

from aclip.checkpoint import crc32, list_checkpoints, open_checkpoint, open_newest
from aclip.errors import CheckpointError, ConfigError, UnsupportedModelError, unknown_name
from aclip.models import hugging_face
from aclip.models.hugging_face import read_json
from aclip.models.shapes import build_modules, patch_size_of
from aclip.models.vision import grid_of, pair, resize_images, visual_of, vit_of
from aclip.models.weights import from_released, is_released, load_weights, read_weights, released_config

logger = logging.getLogger(__name__)

open_clip.add_model_config(Path(__file__).parent / "configs")  # the presets

FRESH_PREPROCESS: Mapping[str, Any] = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
"""The normalisation of models trained from scratch, and of the A-CLIP release."""

_WEIGHT_NAMES = (WEIGHTS_NAME, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
                 "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")

Tokenizer = Callable[[list[str]], Tensor]
"""Texts -> (B, T) int64 token ids, padded to the context length."""

WeightsOf = Literal["online", "ema"]
"""Which weights of a run: those that were trained, or an image tower of their exponential moving average."""


class Weights(NamedTuple):
    """Weights that were read: a state dict in open_clip's names, its origin, and how far it was trained, if known."""

    state: dict[str, Tensor]
    origin: str
    step: int | None = None
    samples_seen: int | None = None


@dataclass(frozen=True)
class Source:
    """A model that a name resolves to; nothing but its config has been read or fetched.

    Attributes:
        config: open_clip's `model_cfg`.
        preprocess: what is known of open_clip's `preprocess_cfg`.
        folder: local folder that may hold a tokenizer.
        read: reads the weights, after fetching them if they are remote; None for an architecture without weights.
    """

    config: Mapping[str, Any]
    preprocess: Mapping[str, Any] | None = None
    folder: Path | None = None
    read: Callable[[], Weights] | None = None


class ImageTower(nn.Module):
    """A model without text, so without joint space: features are the pooled token, (B, C).

    Its state dict is `visual.*` of open_clip's, without the projection.
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        vit_of(visual).drop_projection()

    def encode_image(self, image: Float[Tensor, "B 3 h w"], normalize: bool = False) -> Float[Tensor, "B C"]:
        """As open_clip's: the pooled token after the final norm, L2-normalised on request."""
        features: Tensor = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features


def create_model(
    name: str | Path, *, image_size: int | tuple[int, int] | None = None, with_text: bool | None = True
) -> nn.Module:
    """Build an open_clip model on the CPU in fp32, in training mode.

    Fresh weights come from torch's global generator, the image tower's whether or not there is text. Fresh models
    normalise as for ImageNet, others as their weights do.

    Args:
        name: see `resolve_source`.
        image_size: pixels, one side or (height, width), in place of the model's own; positions are interpolated.
        with_text: False leaves the text tower out (`ImageTower`); None does so if the weights hold an image tower only;
            with True, the text tower starts fresh then.

    Raises:
        ConfigError: an unknown name or a size that is not a whole number of patches.
        CheckpointError: weights that are missing, damaged, of another model, or cannot be fetched.
        UnsupportedModelError: a model whose towers cannot be trained here.
    """
    return build(resolve_source(name), image_size, with_text)[0]


def build(
    source: Source, image_size: int | tuple[int, int] | None = None, with_text: bool | None = True
) -> tuple[nn.Module, Weights | None]:
    """Build the model of a source as `create_model` does; also return where its weights came from, without them."""
    config = _at_size(source.config, image_size)
    # fixed positions that become learned ones start from those of the model's own grid
    unfixed = "pos_embed_type" in source.config["vision_cfg"] and "pos_embed_type" not in config["vision_cfg"]
    model = build_modules(source.config if source.read or unfixed else config)
    visual = visual_of(model)
    fresh = source.read is None and source.preprocess is None
    preprocess = merge_preprocess_dict(PreprocessCfg(), FRESH_PREPROCESS if fresh else source.preprocess)
    set_model_preprocess_cfg(model, {**preprocess, "size": pair(visual.image_size)})
    weights, image_only = None, False
    if source.read is not None:
        weights = source.read()
        image_only = load_weights(model, weights.state, weights.origin)
        if image_only and with_text:
            logger.info("%s holds an image tower only: projection and text tower start fresh", weights.origin)
        weights = weights._replace(state={})
    if image_size is not None:
        resize_images(visual, pair(image_size))
    if unfixed:
        visual.positional_embedding.requires_grad_(True)
    if with_text or (with_text is None and not image_only):
        return model, weights
    return ImageTower(visual), weights


def preprocess_config(model: nn.Module) -> dict[str, Any]:
    """Return open_clip's `preprocess_cfg` of a model: size (height, width), mean, std, interpolation, ..."""
    return dict(visual_of(model).preprocess_cfg)


def model_config(name: str | Path, *, image_size: int | tuple[int, int] | None = None) -> dict[str, Any]:
    """Return open_clip's complete `model_cfg` of a model: saved, it loads without any registered name.

    Arguments and errors as of `create_model`; no weights are read.
    """
    return _at_size(resolve_source(name).config, image_size)


def list_models() -> list[str]:
    """Return the names that can be trained: the presets, open_clip's own ViTs, and timm's plain ones in open_clip."""
    return [name for name in open_clip.list_models() if _seems_supported(open_clip.get_model_config(name))]


def tokenizer_of(model: str | Path | Source | Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer of a model: texts -> (B, context_length) int64; picklable.

    It is the byte-pair tokenizer that open_clip bundles, unless the config names one of Hugging Face (fetched, then
    cached; a folder may bring its own). Captions over the context length are cut and keep their EOT.

    Args:
        model: a name as in `resolve_source`, or a config as `model_config` returns it.

    Raises:
        CheckpointError: a tokenizer that cannot be fetched, or needs code of its own, which is never run.
    """
    folder = None
    if not isinstance(model, Mapping):
        source = model if isinstance(model, Source) else resolve_source(model)
        model, folder = source.config, source.folder
    text = model["text_cfg"]
    options = {"context_length": text.get("context_length", 77), **(text.get("tokenizer_kwargs") or {})}
    options.pop("trust_remote_code", None)  # not for a config from elsewhere to decide
    where = text.get("hf_tokenizer_name")
    if not where:
        return CachingTokenizer(**options)
    if folder is not None and any(folder.glob("tokenizer*")):
        where = str(folder)
    return cast(Tokenizer, _fetch(
        f"the tokenizer '{where}' of this model", HFTokenizer, where, tokenizer_mode=text.get("tokenizer_mode"),
        trust_remote_code=False, **options))


class CachingTokenizer(SimpleTokenizer):  # type: ignore[misc]  # open_clip has no annotations
    """`SimpleTokenizer` with a cache of words, which it never merges across a space.

    Captions repeat their words, so most of the work becomes a look-up. Printable ASCII without `&` needs no ftfy and
    no unescaping.
    """

    cache: dict[str, str]

    def __init__(self, *, clean: str = "lower", **options: Any) -> None:
        """Take the options of `SimpleTokenizer`."""
        super().__init__(clean=clean, **options)
        self._lower = clean == "lower"
        self._special = dict(self.cache)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without start and end tokens."""
        if self._lower and text.isascii() and text.isprintable() and "&" not in text:
            text = text.lower()
        else:
            text = self.clean_fn(text)
        return [token for word in text.split() for token in self._encode_word(word)]

    @functools.lru_cache(maxsize=10_000)  # noqa: B019  # some 3 MB, shared by the few tokenizers of a process
    def _encode_word(self, word: str) -> tuple[int, ...]:
        self.cache = dict(self._special)  # open_clip's own has no limit
        pieces = ("".join(self.byte_encoder[byte] for byte in piece.encode()) for piece in self.pat.findall(word))
        return tuple(self.encoder[part] for piece in pieces for part in self.bpe(piece).split(" "))


def resolve_source(name: str | Path, weights: WeightsOf = "online") -> Source:
    """Find the model that a name means; first match wins.

        vit-tiny, ViT-B-32 (or ViT-B/32)   a preset or one of open_clip's models, fresh weights
        ViT-B-32:laion2b_s34b_b79k          the same with pretrained weights (fetched, then cached)
        ViT-B-32:FILE                       the same with the weights of a local file
        hf-hub:OWNER/MODEL                  an open_clip model on the Hugging Face hub (fetched, then cached)
        FOLDER, local-dir:FOLDER            open_clip_config.json and weights; or transformers' CLIPModel
        RUN, RUN/checkpoints/step-...       a run folder: its final/, or its newest undamaged checkpoint before that
        FILE                                a checkpoint of the A-CLIP release

    Args:
        name: one of these.
        weights: "ema" takes a run's newest undamaged checkpoint (or the given one), with the EMA as image tower.

    Raises:
        ConfigError: nothing of that name, with the closest name that exists; or "ema" of something that is not a run.
        CheckpointError: a folder or file without a model in it, or a config that cannot be fetched.
        UnsupportedModelError: a model whose towers cannot be trained here.
    """
    source = _find_source(str(name), weights)
    try:
        patch_size_of(source.config)
    except (ConfigError, UnsupportedModelError) as error:
        raise type(error)(f"model '{name}': {error}") from error
    return source


def _find_source(name: str, weights: WeightsOf) -> Source:
    if weights == "ema":
        if not (steps := _steps(Path(name))):
            raise ConfigError(f"EMA weights are in the checkpoints of a run, and '{name}' is not a run that has any")
        return _run_source(Path(name), steps, ema=True)
    scheme, _, rest = name.partition(":")
    if scheme == "hf-hub":
        config, preprocess = _read_config(
            Path(_fetch(f"'{name}'", download_pretrained_from_hf, rest, filename=CONFIG_NAME)))
        return Source(config, preprocess, read=lambda: Weights(
            read_weights(Path(_fetch(f"'{name}'", download_pretrained_from_hf, rest))), name))
    if scheme == "local-dir":
        return _folder_source(Path(rest))
    base = scheme.replace("/", "-")
    if base in open_clip.list_models():
        return _named_source(base, rest)
    if Path(name).is_dir():
        return _folder_source(Path(name))
    if Path(name).is_file():
        return _file_source(Path(name))
    raise ConfigError(unknown_name("model, folder or file", name, list_models()))


def _named_source(base: str, rest: str) -> Source:
    config, name, file = open_clip.get_model_config(base), f"{base}:{rest}", Path(rest)
    if not rest:
        return Source(config)
    tags = open_clip.list_pretrained_tags_by_model(base)
    if rest in tags:
        pretrained = open_clip.get_pretrained_cfg(base, rest)
        if pretrained.get("quick_gelu", False):  # whatever the architecture of that name says
            config["quick_gelu"] = True
        return Source(config, pretrained, read=lambda: Weights(
            read_weights(Path(_fetch(f"'{name}'", download_pretrained, pretrained))), name))
    if file.is_file():
        return Source(config, read=lambda: Weights(read_weights(file), str(file)))
    raise ConfigError(unknown_name(f"weight file or pretrained weights of {base}", rest, tags))


def _read_config(path: Path) -> tuple[Any, dict[str, Any]]:
    """Return model_cfg and preprocess_cfg of an `open_clip_config.json`."""
    config = read_json(path)
    if not isinstance(config, dict) or "model_cfg" not in config:
        raise CheckpointError(f"'{path}' is damaged: it has no model_cfg")
    return config["model_cfg"], config.get("preprocess_cfg") or {}


def _folder_source(folder: Path) -> Source:
    """Return the model of a folder: open_clip's, a run's, or transformers'."""
    for place in (folder, folder / "final"):
        if (place / CONFIG_NAME).is_file():
            return _open_clip_source(place)
    theirs = read_json(folder / "config.json")
    if isinstance(theirs, dict) and "model_type" in theirs:
        return Source(hugging_face.open_clip_config(theirs, folder), hugging_face.preprocess(folder), folder,
                      lambda: Weights(hugging_face.read_folder(folder), str(folder)))
    if steps := _steps(folder):
        return _run_source(folder, steps, ema=False)
    raise CheckpointError(f"'{folder}' holds no model: there is neither {CONFIG_NAME} (a saved model), "
                          f"final/{CONFIG_NAME} (a finished run), checkpoints/step-* (a run) nor a transformers "
                          "config.json with a model_type")


def _open_clip_source(place: Path) -> Source:
    config, preprocess = _read_config(place / CONFIG_NAME)
    files = [place / name for name in _WEIGHT_NAMES if (place / name).is_file()]
    files = files[:1] or sorted(file for file in place.iterdir() if file.suffix in _WEIGHT_SUFFIXES)
    if len(files) != 1:
        raise CheckpointError(f"'{place}' holds {CONFIG_NAME} but {'several' if files else 'no'} weights beside it: "
                              f"the right file is named {WEIGHTS_NAME}")
    file, trained = files[0], read_json(place / "aclip.json") or {}

    def read() -> Weights:
        if trained.get("crc32") not in (None, crc32(file)):
            raise CheckpointError(f"the weights {file} have changed since they were written: take an undamaged copy, "
                                  f"or delete {place / 'aclip.json'} if the change was meant")
        return Weights(read_weights(file), str(file), trained.get("step"), trained.get("samples_seen"))

    return Source(config, preprocess, place, read)


def _steps(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, or the folder itself if it is one."""
    return [folder] if (folder / "state.json").is_file() else list_checkpoints(folder / "checkpoints")


def _run_source(folder: Path, steps: list[Path], *, ema: bool) -> Source:
    """Return the model of a run's checkpoints: that of its final/ or its config.json, with the weights of a step."""
    def read() -> Weights:
        checkpoint = open_checkpoint(folder) if folder in steps else open_newest(folder / "checkpoints")
        state, average = checkpoint.tensors("method/model."), checkpoint.tensors("method/ema_visual.") if ema else {}
        if ema and not average:
            raise CheckpointError(f"the run of {checkpoint.path} keeps no EMA: use the online weights")
        state |= {f"visual.{name}": tensor for name, tensor in average.items()}
        return Weights(state, str(checkpoint.path), checkpoint.step, checkpoint.values.get("samples_seen"))

    run = steps[0].parent.parent
    if (run / "final" / CONFIG_NAME).is_file():
        return replace(_open_clip_source(run / "final"), read=read)
    settings = read_json(run / "config.json")
    if not isinstance(settings, dict) or "model" not in settings:
        raise CheckpointError(f"the model of '{folder}' is unknown: '{run / 'config.json'}' is missing or names none")
    base = resolve_source(settings["model"])
    return Source(_at_size(base.config, settings.get("image_size")),
                  base.preprocess if base.read else FRESH_PREPROCESS, base.folder, read)


def _file_source(file: Path) -> Source:
    """Return the model of a weight file alone, if its layout tells the architecture."""
    state = read_weights(file)
    if not is_released(state):
        raise ConfigError(f"the architecture of the weights '{file}' is unknown: name it, as in ViT-B-16:{file}")
    return Source(released_config(state, file), FRESH_PREPROCESS, read=lambda: Weights(from_released(state), str(file)))


def _fetch(what: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function that may use the network, and explain its failure in one sentence."""
    try:
        return function(*arguments, **options)
    except Exception as error:  # no network, no such repository, no such file: the clients' own errors
        reason = (str(error) or repr(error)).splitlines()[0]
        raise CheckpointError(f"{what} cannot be loaded: {reason}; without a network, give its files as a folder or as "
                              "NAME:FILE") from error


def _at_size(config: Mapping[str, Any], image_size: int | tuple[int, int] | None) -> dict[str, Any]:
    """Return a copy of a config at another image size; oblong grids have learned positions in open_clip."""
    sized: dict[str, Any] = deepcopy(dict(config))
    if image_size is not None:
        (height, width), vision = pair(image_size), sized["vision_cfg"]
        grid_of((height, width), patch_size_of(sized))
        if vision.get("pos_embed_type") == "sin_cos_2d" and height != width:
            del vision["pos_embed_type"]
        vision["image_size"] = height if height == width else [height, width]
    return sized


def _seems_supported(config: Mapping[str, Any]) -> bool:
    """Return whether a config of open_clip's registry can be trained here, without building it."""
    vision = config["vision_cfg"]
    name = vision.get("timm_model_name")
    if "multimodal_cfg" in config or config["text_cfg"].get("hf_model_name"):
        return False
    if not name:
        return isinstance(vision.get("layers", 12), int)
    if not is_model(name) or model_entrypoint(name).__module__ != "timm.models.vision_transformer":
        return False
    patch = re.search(r"patch(\d+)", name)  # does not divide the image of one (SO400M at 384)
    return patch is None or all(side % int(patch[1]) == 0 for side in pair(vision["image_size"]))
