"""The model card of an export: how to load it, how it was trained, evaluated and checked."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from aclip.exporters.base import Exporter
from aclip.models import LoadedModel, preprocess_config


def model_card(
    exporter: Exporter, model: LoadedModel, name: str, differences: Mapping[str, float], weights: str,
    config: Mapping[str, Any] | None, evaluations: Iterable[Mapping[str, Any]],
) -> str:
    """Return the text of the card; `config` and `evaluations` are the files of a run, None and empty without one."""
    # of every set and evaluator the newest result on the exported weights, none of a later step
    newest: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for record in evaluations:
        if record.get("weights") == weights and (model.step is None or record.get("step", 0) <= model.step):
            newest[tuple(record.get(key) for key in ("set", "evaluator", "training_set"))] = record
    data = ModelCardData(
        library_name=exporter.library if exporter.library in ("open_clip", "transformers") else None,
        pipeline_tag="zero-shot-image-classification" if model.has_text else "image-feature-extraction",
        tags=["clip", "attentive-clip"])
    shown = {key: value for key, value in (config or {}).items() if key not in ("command", "dataflow")}
    return str(ModelCard.from_template(
        data, template_path=str(Path(__file__).with_name("card.md.j2")), exporter=exporter, model=model, name=name,
        differences=differences, weights=weights, config=config, evaluations=list(newest.values()),
        pixels=preprocess_config(model.model), config_json=json.dumps(shown, indent=2, ensure_ascii=False)))
