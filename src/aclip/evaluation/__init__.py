"""Evaluation on held-out images. Everything is imported on first use, so that `evaluate` costs nothing to import."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from aclip.evaluation.api import evaluate
from aclip.evaluation.base import Evaluation, Evaluator, Result

if TYPE_CHECKING:
    from aclip.evaluation.features import ImageFeatures, MaskedEncoder, TextEncoder, encode_image_set
    from aclip.evaluation.probes import LinearProbe, NearestNeighbours, Probe
    from aclip.evaluation.retrieval import PROTOCOLS, Retrieval
    from aclip.evaluation.sets import (
        EVALUATORS,
        HeldOut,
        check_sets,
        evaluate_sets,
        find_evaluator,
        is_probe,
        name_skipped,
        open_sets,
    )
    from aclip.evaluation.sharding import sharded
    from aclip.evaluation.zero_shot import Calibration, ClassList, ZeroShot, find_classes, find_templates

_HOMES = {
    **dict.fromkeys(("ImageFeatures", "MaskedEncoder", "TextEncoder", "encode_image_set"), "features"),
    **dict.fromkeys(("LinearProbe", "NearestNeighbours", "Probe"), "probes"),
    **dict.fromkeys(("PROTOCOLS", "Retrieval"), "retrieval"),
    **dict.fromkeys(("EVALUATORS", "HeldOut", "check_sets", "evaluate_sets", "find_evaluator", "is_probe",
                     "name_skipped", "open_sets"), "sets"),
    "sharded": "sharding",
    **dict.fromkeys(("Calibration", "ClassList", "ZeroShot", "find_classes", "find_templates"), "zero_shot"),
}
__all__ = ["EVALUATORS", "PROTOCOLS", "Calibration", "ClassList", "Evaluation", "Evaluator", "HeldOut", "ImageFeatures",
           "LinearProbe", "MaskedEncoder", "NearestNeighbours", "Probe", "Result", "Retrieval", "TextEncoder",
           "ZeroShot", "check_sets", "encode_image_set", "evaluate", "evaluate_sets", "find_classes", "find_evaluator",
           "find_templates", "is_probe", "name_skipped", "open_sets", "sharded"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"aclip.evaluation.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'aclip.evaluation' has no attribute '{name}'")
