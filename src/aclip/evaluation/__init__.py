"""Evaluation on held-out images. Everything is imported on first use, so that `evaluate` costs nothing to import."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from aclip.evaluation.api import evaluate
from aclip.evaluation.base import Evaluation, Evaluator, Result

if TYPE_CHECKING:
    from aclip.evaluation.features import ImageFeatures, MaskedEncoder, TextEncoder, encode_image_set
    from aclip.evaluation.probes import LinearProbe, NearestNeighbours, Probe
    from aclip.evaluation.retrieval import Retrieval
    from aclip.evaluation.sets import (
        EVALUATORS,
        check_sets,
        evaluate_sets,
        find_evaluator,
        is_probe,
        name_skipped,
        open_sets,
    )
    from aclip.evaluation.sharding import sharded
    from aclip.evaluation.zero_shot import Calibration, ClassList, ZeroShot

_HOMES = {
    **dict.fromkeys(("ImageFeatures", "MaskedEncoder", "TextEncoder", "encode_image_set"), "features"),
    **dict.fromkeys(("LinearProbe", "NearestNeighbours", "Probe"), "probes"),
    "Retrieval": "retrieval",
    **dict.fromkeys(("EVALUATORS", "check_sets", "evaluate_sets", "find_evaluator", "is_probe", "name_skipped",
                     "open_sets"), "sets"),
    "sharded": "sharding",
    **dict.fromkeys(("Calibration", "ClassList", "ZeroShot"), "zero_shot"),
}
__all__ = ["EVALUATORS", "Calibration", "ClassList", "Evaluation", "Evaluator", "ImageFeatures", "LinearProbe",
           "MaskedEncoder", "NearestNeighbours", "Probe", "Result", "Retrieval", "TextEncoder", "ZeroShot",
           "check_sets", "encode_image_set", "evaluate", "evaluate_sets", "find_evaluator", "is_probe", "name_skipped",
           "open_sets", "sharded"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"aclip.evaluation.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'aclip.evaluation' has no attribute '{name}'")
