"""Two ranks that share an evaluation find what one process finds; an error of one is raised on both."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist
from evaluation_models import PixelModel, Squares
from torch import multiprocessing

from aclip.data import EvaluationSet
from aclip.errors import DataError
from aclip.evaluation import sharding
from aclip.evaluation.features import TextEncoder, encode_image_set
from aclip.evaluation.probes import NearestNeighbours
from aclip.evaluation.retrieval import Retrieval
from aclip.evaluation.zero_shot import Calibration, ZeroShot

RANKS = 2


def measure(count: int, bad: frozenset[int] = frozenset()) -> dict[str, object]:
    """Return everything that a set of `count` images says about a model, in batches of four."""
    model, cpu = PixelModel(), torch.device("cpu")
    found: dict[str, object] = {}
    images = EvaluationSet(Squares(count, bad), model.preprocess, batch_size=4,
                             share=(sharding.rank(), sharding.world_size()))
    encoded = encode_image_set(model, images, cpu)
    found["features"], found["keys"], found["skipped"] = encoded.features, encoded.keys, encoded.skipped
    texts = TextEncoder(model, cpu)
    probe = NearestNeighbours(k=3).fit(encoded)
    for evaluator in (Retrieval(), Retrieval(protocol="all"), ZeroShot(), Calibration(), probe):
        result = evaluator.evaluate(encoded, texts)
        found[f"{evaluator.name} {evaluator.variant}"] = (result.metrics, result.counts)
    return found


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)  # torch's, of names that it gives up: every process would print them
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    results: dict[str, object] = {}
    alone = measure(21)
    with sharding.sharded():
        results["many"] = measure(21)
        results["bad"] = measure(21, bad=frozenset({0, 13}))
        results["one share is empty"] = measure(4)
        try:
            measure(21, bad=frozenset(range(21)))
        except DataError as error:
            results["error"] = str(error)
        try:
            measure(21, bad=frozenset({-1}))  # only the last process meets it
        except DataError as error:
            results["error of one"] = str(error)
    assert str(alone) == str(results["many"]), "outside of sharded() each process evaluates alone"
    torch.save(results, f"{folder}/{rank}.pt")
    torch_dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    folder = tmp_path_factory.mktemp("sharding")
    multiprocessing.spawn(one_rank, args=(str(folder),), nprocs=RANKS)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize(("name", "count", "bad"), [
    ("many", 21, frozenset()), ("bad", 21, frozenset({0, 13})), ("one share is empty", 4, frozenset())])
def test_every_process_finds_what_one_finds(
    results: list[dict[str, object]], name: str, count: int, bad: frozenset[int]
) -> None:
    expected = measure(count, bad)
    for found in results:
        assert str(found[name]) == str(expected)
        assert torch.equal(found[name]["features"], expected["features"])  # type: ignore[index]
    assert 0.0 < expected["retrieval "][0]["image_to_text_r1"] < 1.0  # type: ignore[index]


def test_an_error_is_common(results: list[dict[str, object]]) -> None:
    nothing = "nothing to evaluate: the set has no usable image (21 skipped)"
    assert {found["error"] for found in results} == {nothing}
    assert {found["error of one"] for found in results} == {"cannot evaluate: the disk is gone"}


def test_a_share_of_a_set_is_whole_batches_in_order() -> None:
    model = PixelModel()
    keys = [[key for batch in EvaluationSet(Squares(21), model.preprocess, batch_size=4, share=(i, 4))
             for key in batch.keys] for i in range(4)]
    assert [len(part) for part in keys] == [4, 8, 4, 5]
    assert [key for part in keys for key in part] == [str(i) for i in range(21)]
