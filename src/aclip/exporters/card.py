"""The model card of an export: how to load it, how it was trained, evaluated and checked."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from aclip.exporters.base import Exporter
from aclip.models import LoadedModel, preprocess_config

TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

{{ "A CLIP model" if has_text else "An image encoder" }}{% if config %} trained with attentive-clip, recipe \
`{{ config.recipe.name }}` ({{ config.recipe.title }}; {{ config.recipe.paper }}){% endif %}.
{%- if weights == "ema" %} The image tower holds the exponential moving average (EMA) of its weights.{% endif %}

## Use

`FOLDER` is the folder of this file.

```python
{{ usage }}
```

The input is {{ size[0] }} x {{ size[1] }} pixels, RGB from 0 to 1, resized with resize_mode {{ pixels.resize_mode }} \
of open_clip ({{ pixels.interpolation }}), mean {{ pixels.mean | join(", ") }}, standard deviation \
{{ pixels.std | join(", ") }}.
{%- if config %}

## Training

{% if step is not none %}Step {{ step }}, {{ samples_seen }} samples seen.{% endif %}

```bash
{{ config.command }}
```

<details><summary>config.json of the run</summary>

```json
{{ config_json }}
```

</details>

## Metrics

{{ metrics or "These weights were not evaluated." }}
{%- endif %}

## Check

Differences between the model and this export as {{ library }} loads it, on synthetic images and captions; of
L2-normalised features the largest of an entry.

{{ check }}

## Licence

{% if config -%}
State it here: these weights have the licence that you give them, within the licences of the training data\
{% if ":" in config.model %} and of `{{ config.model }}`, from which they were fine-tuned{% endif %}.
{%- else -%}
The licence of the weights that were exported applies.
{%- endif %} attentive-clip, which exported them, is under Apache-2.0.
"""


def model_card(
    exporter: Exporter, model: LoadedModel, name: str, differences: Mapping[str, float], *,
    weights: str = "online", config: Mapping[str, Any] | None = None, evaluations: Iterable[Mapping[str, Any]] = (),
) -> str:
    """Return the text of the card.

    Args:
        exporter: the format.
        model: what was exported.
        name: its title.
        differences: what the check found.
        weights: which weights of the run the model holds.
        config: `config.json` of the run; None for a model from elsewhere.
        evaluations: records of the run's `evaluations.jsonl`.
    """
    card_data = ModelCardData(
        library_name=exporter.library if exporter.library in ("open_clip", "transformers") else None,
        pipeline_tag="zero-shot-image-classification" if model.has_text else "image-feature-extraction",
        tags=["clip", "attentive-clip"])
    shown = {key: value for key, value in (config or {}).items() if key not in ("command", "dataflow")}
    return str(ModelCard.from_template(
        card_data, template_str=TEMPLATE, name=name, has_text=model.has_text, weights=weights, config=config,
        usage=exporter.usage(model), size=model.image_size, pixels=preprocess_config(model.model), step=model.step,
        samples_seen=model.samples_seen, config_json=json.dumps(shown, indent=2, ensure_ascii=False),
        metrics=_metrics(evaluations, weights, model.step), library=exporter.library,
        check=_table(("", "difference"), ((what, f"{value:.2g}") for what, value in differences.items()))))


def _metrics(evaluations: Iterable[Mapping[str, Any]], weights: str, step: int | None) -> str:
    """Return the newest result of every set and evaluator on the exported weights, none of a later step."""
    newest: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for record in evaluations:
        if record.get("weights") == weights and (step is None or record.get("step", 0) <= step):
            newest[tuple(record.get(key) for key in ("set", "evaluator", "training_set"))] = record
    rows = [(record.get("set"), record.get("evaluator"), metric, f"{value:.4g}", record.get("step"))
            for record in newest.values() for metric, value in record.get("metrics", {}).items()]
    return _table(("set", "evaluator", "metric", "value", "after step"), rows) if rows else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
