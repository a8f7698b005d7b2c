"""Evaluation on held-out images. Everything is imported on first use, so that `evaluate` costs nothing to import."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from aclip.evaluation.api import evaluate
from aclip.evaluation.result import Result

if TYPE_CHECKING:
    from aclip.evaluation.base import Evaluation, Evaluator
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

__all__ = ["EVALUATORS", "PROTOCOLS", "Calibration", "ClassList", "Evaluation", "Evaluator", "HeldOut", "ImageFeatures",
           "LinearProbe", "MaskedEncoder", "NearestNeighbours", "Probe", "Result", "Retrieval", "TextEncoder",
           "ZeroShot", "check_sets", "encode_image_set", "evaluate", "evaluate_sets", "find_classes", "find_evaluator",
           "find_templates", "is_probe", "name_skipped", "open_sets", "sharded"]

_HOMES = {
    "base": ("Evaluation", "Evaluator"),
    "features": ("ImageFeatures", "MaskedEncoder", "TextEncoder", "encode_image_set"),
    "probes": ("LinearProbe", "NearestNeighbours", "Probe"),
    "retrieval": ("PROTOCOLS", "Retrieval"),
    "sets": ("EVALUATORS", "HeldOut", "check_sets", "evaluate_sets", "find_evaluator", "is_probe",
             "name_skipped", "open_sets"),
    "sharding": ("sharded",),
    "zero_shot": ("Calibration", "ClassList", "ZeroShot", "find_classes", "find_templates"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"aclip.evaluation.{module}"), name)
    raise AttributeError(f"module 'aclip.evaluation' has no attribute '{name}'")
