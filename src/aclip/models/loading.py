"""Models by name: presets, open_clip's models with or without pretrained weights, files, folders and runs."""

import functools
import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import open_clip
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from jaxtyping import Float
from open_clip.constants import HF_CONFIG_NAME as CONFIG_NAME
from open_clip.constants import HF_SAFE_WEIGHTS_NAME as WEIGHTS_NAME
from open_clip.model import CLIP, CustomTextCLIP, set_model_preprocess_cfg
from open_clip.pretrained import download_pretrained, download_pretrained_from_hf
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import is_model, model_entrypoint
from torch import Tensor, nn
from torch.nn import functional as F

from aclip.checkpoint import crc32, list_checkpoints, open_checkpoint, open_newest
from aclip.errors import CheckpointError, ConfigError, UnsupportedModelError, unknown_name
from aclip.models import hugging_face
from aclip.models.blocks import blocks_of
from aclip.models.hugging_face import read_json
from aclip.models.lora import merged
from aclip.models.text import can_cut, is_hugging_face, text_blocks_of, text_tower_of
from aclip.models.vision import SUPPORTED, attention_pool_of, grid_of, pair, resize_images, visual_of, vit_of
from aclip.models.weights import from_released, is_released, load_weights, read_weights, released_config
from aclip.structs import TowerShape

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
    name: str | Path, *, image_size: int | tuple[int, int] | None = None, with_text: bool | None = True,
    logit_scale: float | None = None,
) -> nn.Module:
    """Build an open_clip model on the CPU in fp32, in training mode.

    Fresh weights come from torch's global generator, the image tower's whether or not there is text. Fresh models
    normalise as for ImageNet, others as their weights do.

    Args:
        name: see `resolve_source`.
        image_size: pixels, one side or (height, width), in place of the model's own; positions are interpolated.
        with_text: False leaves the text tower out (`ImageTower`); None does so if the weights hold an image tower only;
            with True, the text tower starts fresh then.
        logit_scale: first multiplier of similarities, where neither weights nor the config have one; None is
            open_clip's 1 / 0.07.

    Raises:
        ConfigError: an unknown name or a size that is not a whole number of patches.
        CheckpointError: weights that are missing, damaged, of another model, or cannot be fetched.
        UnsupportedModelError: a model whose towers cannot be trained here.
    """
    return build(resolve_source(name), image_size, with_text, logit_scale)[0]


def build(
    source: Source, image_size: int | tuple[int, int] | None = None, with_text: bool | None = True,
    logit_scale: float | None = None,
) -> tuple[nn.Module, Weights | None]:
    """Build the model of a source as `create_model` does; also return where its weights came from, without them."""
    config = _at_size(source.config, image_size)
    # fixed positions that become learned ones start from those of the model's own grid
    unfixed = "pos_embed_type" in source.config["vision_cfg"] and "pos_embed_type" not in config["vision_cfg"]
    model = build_modules(source.config if source.read or unfixed else config, own_weights=source.read is None)
    visual = visual_of(model)
    if logit_scale is not None and "init_logit_scale" not in source.config:
        nn.init.constant_(cast(Any, model).logit_scale, math.log(logit_scale))
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


def shape_of(config: Mapping[str, Any]) -> TowerShape:
    """Return the sizes of a model from its open_clip config (`model_config`) alone.

    Raises:
        UnsupportedModelError: a tower that cannot be trained here.
        ConfigError: a config that describes no model, or an image size that is not a whole number of patches.
    """
    model = _outline(json.dumps(config))
    vit, text = vit_of(visual_of(model)), text_tower_of(model)
    pool: Any = attention_pool_of(vit.visual)
    image_size = pair(config["vision_cfg"].get("image_size", 224))
    grid_of(image_size, vit.patch_size)
    blocks, text_blocks = blocks_of(vit.stack), text_blocks_of(text)
    words = text.transformer.get_input_embeddings() if is_hugging_face(text) else text.token_embedding
    return TowerShape(
        image_size=image_size,
        patch_size=vit.patch_size,
        width=vit.patch_embedding.out_channels,
        layers=len(blocks),
        heads=blocks[0].attn.num_heads,
        mlp_width=_mlp_width(blocks[0].mlp, vit.patch_embedding.out_channels),
        joint_dim=config["embed_dim"],
        num_prefix_tokens=vit.num_prefix_tokens,
        text_width=words.embedding_dim,
        text_layers=len(text_blocks),
        text_mlp_width=_mlp_width(text_blocks[-1], words.embedding_dim, attention=4) if text_blocks else 0,
        context_length=int(text.context_length),
        vocab_size=words.num_embeddings,
        text_cut=can_cut(model),
        scored=vit.scored_by is not None,
        pool_mlp_width=0 if pool is None else pool.mlp.fc1.out_features,
    )


def patch_size_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the patch size (height, width) of a config; raises as `shape_of`."""
    return vit_of(visual_of(_outline(json.dumps(config)))).patch_size


@functools.lru_cache(maxsize=64)
def _outline(config: str) -> nn.Module:
    """Return the model of a config in JSON on the meta device, without weights; shared, not to be changed."""
    with torch.device("meta"):
        return build_modules(json.loads(config))


def build_modules(config: Mapping[str, Any], *, own_weights: bool = False) -> nn.Module:
    """Build the modules of a config with fresh weights; raises as `shape_of`.

    With `own_weights`, a Hugging Face text tower and a timm image tower with `timm_model_pretrained` start from theirs.
    `vision_cfg.act_kwargs` is that of a timm tower's GELU, too.
    """
    try:
        vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
        if "multimodal_cfg" in config:
            raise UnsupportedModelError("it has a captioning decoder (CoCa), which cannot be trained here: "
                                        f"{SUPPORTED}")
        if vision.get("timm_model_name"):
            vision["timm_model_pretrained"] = own_weights and vision.get("timm_model_pretrained", False)
        if text.get("hf_model_name"):
            text["hf_model_pretrained"] = own_weights and text.get("hf_model_pretrained", True)
            text["hf_model_name"] = _text_tower(text["hf_model_name"], weights=text["hf_model_pretrained"])
        cls = CustomTextCLIP if config.get("custom_text") or text.get("hf_model_name") else CLIP
        rest = {key: value for key, value in config.items() if key != "custom_text"}
        model: Any = cls(**{**rest, "vision_cfg": vision, "text_cfg": text})
    except UnsupportedModelError:
        raise
    except OSError as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        name = config["text_cfg"].get("hf_model_name")
        if vision.get("timm_model_pretrained"):
            towers = " or ".join([f"timm's {vision['timm_model_name']}", *([f"'{name}'"] if name else [])])
            raise CheckpointError(f"the weights of {towers} cannot be fetched ({reason}): start once with a network, "
                                  "they are kept") from error
        raise CheckpointError(f"its Hugging Face text tower '{name}' is not here ({reason}): fetch it once with "
                              f"`hf download {name}`, or name a folder of it as hf_model_name and hf_tokenizer_name in "
                              "an open_clip_config.json") from error
    except Exception as error:  # whatever open_clip and timm meet in unknown fields and sizes that do not fit
        raise ConfigError(f"its config describes no model that open_clip can build: {error!r}") from error
    if text.get("hf_model_name"):  # open_clip's is what the tower could read
        model.text.context_length = model.context_length = text.get("context_length", DEFAULT_CONTEXT_LENGTH)
    if vision.get("timm_model_name") and vision.get("act_kwargs"):
        for module in model.visual.modules():
            if isinstance(getattr(module, "act", None), nn.GELU):
                module.act = nn.GELU(**vision["act_kwargs"])
    visual, size = visual_of(model), pair(vision.get("image_size", 224))
    if vision.get("timm_model_name") and vit_of(visual).grid_size != grid_of(size, vit_of(visual).patch_size):
        resize_images(visual, size)  # timm builds at a size of its own
    return cast(nn.Module, model)


def _mlp_width(mlp: nn.Module, width: int, attention: int = 0) -> int:
    """Return the hidden width of an MLP; of a gated one, that of the plain MLP with as many weights.

    It reads and returns `width`, and may be a block with as many square matrices of `attention` besides.
    """
    return round(sum(p.numel() for p in mlp.parameters() if p.ndim == 2) / (2 * width)) - attention * width // 2


def _text_tower(name: str, *, weights: bool) -> str:
    """Return where a Hugging Face text tower is read: its folder, in the cache if it is there, or its name on the hub.

    The config is fetched if it is not cached; OSError without a network. `weights`: whether they are wanted, too.
    """
    if Path(name).is_dir():
        return name
    try:
        config = hf_hub_download(name, "config.json", local_files_only=True)
    except LocalEntryNotFoundError:
        config = hf_hub_download(name, "config.json")
    folder = Path(config).parent
    found = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return str(folder) if found or not weights else name


def list_models() -> list[str]:
    """Return the names that can be trained: the presets, open_clip's own ViTs, and timm's plain ones in open_clip.

    Not those with a Hugging Face text tower, whose config must be fetched first.
    """
    return [name for name in open_clip.list_models() if _seems_supported(open_clip.get_model_config(name))]


def resolve_source(name: str | Path, weights: WeightsOf = "online") -> Source:
    """Find the model that a name means; first match wins.

        vit-tiny, ViT-B-32 (or ViT-B/32)   a preset or one of open_clip's models, fresh weights
        ViT-B-32:laion2b_s34b_b79k          the same with pretrained weights (fetched, then cached)
        ViT-B-32:FILE                       the same with the weights of a local file
        hf-hub:OWNER/MODEL                  an open_clip model on the Hugging Face hub (fetched, then cached)
        FOLDER, local-dir:FOLDER            open_clip_config.json and weights; transformers' CLIPModel; or that config
                                            alone, with "timm_model_pretrained": true: each tower's own weights
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
    except (CheckpointError, ConfigError, UnsupportedModelError) as error:
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
            Path(fetch(f"'{name}'", download_pretrained_from_hf, rest, filename=CONFIG_NAME)))
        return Source(config, preprocess, read=lambda: Weights(
            read_weights(Path(fetch(f"'{name}'", download_pretrained_from_hf, rest))), name))
    if scheme == "local-dir":
        return _folder_source(Path(rest))
    base = scheme.replace("/", "-")
    if base in open_clip.list_models():
        return _named_source(base, rest)
    if Path(name).is_dir():
        return _folder_source(Path(name))
    if Path(name).is_file():
        return _file_source(Path(name))
    folder = Path(name).parent
    beside = [str(one) for one in sorted(folder.iterdir())] if "/" in name and folder.is_dir() else None
    raise ConfigError(unknown_name("model, folder or file", name, beside or list_models()))


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
            read_weights(Path(fetch(f"'{name}'", download_pretrained, pretrained))), name))
    if file.is_file():
        return Source(config, read=lambda: Weights(read_weights(file), str(file)))
    raise ConfigError(unknown_name(f"weight file or pretrained weights of {base}", rest, tags))


def _read_config(path: Path) -> tuple[Any, dict[str, Any]]:
    config = read_json(path)
    if not isinstance(config, dict) or "model_cfg" not in config:
        raise CheckpointError(f"'{path}' is damaged: it has no model_cfg")
    return config["model_cfg"], config.get("preprocess_cfg") or {}


def _folder_source(folder: Path) -> Source:
    for place in (folder, folder / "final"):
        if (place / CONFIG_NAME).is_file():
            return _open_clip_source(place)
    theirs = read_json(folder / "config.json")
    if isinstance(theirs, dict) and "model_type" in theirs:
        return Source(hugging_face.open_clip_config(theirs, folder), hugging_face.preprocess(folder), folder,
                      lambda: Weights(hugging_face.read_folder(folder, theirs), str(folder)))
    if steps := _steps(folder):
        return _run_source(folder, steps, ema=False)
    raise CheckpointError(f"'{folder}' holds no model: there is neither {CONFIG_NAME} (a saved model), "
                          f"final/{CONFIG_NAME} (a finished run), checkpoints/step-* (a run) nor a transformers "
                          "config.json with a model_type")


def _open_clip_source(place: Path) -> Source:
    config, preprocess = _read_config(place / CONFIG_NAME)
    files = [place / name for name in _WEIGHT_NAMES if (place / name).is_file()]
    files = files[:1] or sorted(file for file in place.iterdir() if file.suffix in _WEIGHT_SUFFIXES)
    if not files and config["vision_cfg"].get("timm_model_pretrained"):
        return Source(config, preprocess or None, place)
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
        return Weights(merged(state), str(checkpoint.path), checkpoint.step, checkpoint.values.get("samples_seen"))

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
    state = read_weights(file)
    if not is_released(state):
        raise ConfigError(f"the architecture of the weights '{file}' is unknown: name it, as in ViT-B-16:{file}")
    return Source(released_config(state, file), FRESH_PREPROCESS, read=lambda: Weights(from_released(state), str(file)))


def fetch(what: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
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
    if not is_model(name) or model_entrypoint(name).__module__ not in ("timm.models.vision_transformer",
                                                                       "timm.models.eva"):
        return False
    patch = re.search(r"patch(\d+)", name)  # does not divide the image of one (SO400M at 384)
    return patch is None or all(side % int(patch[1]) == 0 for side in pair(vision["image_size"]))
