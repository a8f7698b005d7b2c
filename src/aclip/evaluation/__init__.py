"""Evaluation on held-out pictures: `EVALUATORS` maps names to `Evaluator` classes."""

from aclip.evaluation import together
from aclip.evaluation.base import Evaluation, Evaluator, Example
from aclip.evaluation.calibration import Calibration
from aclip.evaluation.class_names import find_classes, find_templates
from aclip.evaluation.classes import ClassList
from aclip.evaluation.features import PictureFeatures, encode_pictures
from aclip.evaluation.knn import NearestNeighbours
from aclip.evaluation.linear_probe import LinearProbe
from aclip.evaluation.masked_encoder import KEPT_BY, MaskedEncoder
from aclip.evaluation.probe import Probe
from aclip.evaluation.records import write_details, write_examples
from aclip.evaluation.retrieval import PROTOCOLS, Retrieval
from aclip.evaluation.texts import TextEncoder
from aclip.evaluation.zero_shot import DEFAULT_TEMPLATES, ZeroShot

EVALUATORS: dict[str, type[Evaluator]] = {
    evaluator.name: evaluator for evaluator in (Retrieval, ZeroShot, Calibration, LinearProbe, NearestNeighbours)
}

__all__ = [
    "DEFAULT_TEMPLATES",
    "EVALUATORS",
    "KEPT_BY",
    "PROTOCOLS",
    "Calibration",
    "ClassList",
    "Evaluation",
    "Evaluator",
    "Example",
    "LinearProbe",
    "MaskedEncoder",
    "NearestNeighbours",
    "PictureFeatures",
    "Probe",
    "Retrieval",
    "TextEncoder",
    "ZeroShot",
    "encode_pictures",
    "find_classes",
    "find_templates",
    "together",
    "write_details",
    "write_examples",
]
