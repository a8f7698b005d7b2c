"""Evaluation on held-out pictures: `EVALUATORS` maps names to `Evaluator` classes."""

from aclip.evaluation.base import Evaluation, Evaluator, Example
from aclip.evaluation.features import PictureFeatures, encode_pictures, encode_texts
from aclip.evaluation.knn import NearestNeighbours
from aclip.evaluation.linear_probe import LinearProbe
from aclip.evaluation.probe import Probe
from aclip.evaluation.records import write_examples
from aclip.evaluation.retrieval import Retrieval
from aclip.evaluation.zero_shot import DEFAULT_TEMPLATES, ZeroShot

EVALUATORS: dict[str, type[Evaluator]] = {
    evaluator.name: evaluator for evaluator in (Retrieval, ZeroShot, LinearProbe, NearestNeighbours)
}

__all__ = [
    "DEFAULT_TEMPLATES",
    "EVALUATORS",
    "Evaluation",
    "Evaluator",
    "Example",
    "LinearProbe",
    "NearestNeighbours",
    "PictureFeatures",
    "Probe",
    "Retrieval",
    "ZeroShot",
    "encode_pictures",
    "encode_texts",
    "write_examples",
]
