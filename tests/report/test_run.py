"""The report of a run: all sections, from damaged and hostile files too."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from html_page import EVIL, Page, write_lines
from synthetic_comparison import write_comparison_folder

from aclip.errors import ConfigError
from aclip.report import run as reporting
from aclip.report.run import write_report
from aclip.report.snapshots import read_snapshot, write_snapshot


def report(folder: Path) -> Page:
    return Page(write_report(folder))


def add_details(folder: Path, name: str, **content: object) -> None:
    (folder / "details").mkdir(exist_ok=True)
    about = {"set": "val", "evaluator": "zero_shot", "weights": "online", "step": 20}
    (folder / "details" / f"{name}.json").write_text(json.dumps(about | content))


def evaluation(evaluator: str, metrics: dict[str, float], **more: object) -> dict[str, object]:
    return {"step": 20, "samples_seen": 5120, "weights": "online", "evaluator": evaluator, "set": "s",
            "metrics": metrics} | more


def test_everything_is_on_the_page(run_folder: Path) -> None:
    page = report(run_folder)
    assert write_report(run_folder) == run_folder / "report.html"
    assert [path.name for path in run_folder.iterdir() if "part" in path.name] == []
    for expected in ("a-clip", "20.0 %", "40.0 %", "chance (1.0 %, 100 captions)", "40 s", "5,120", "128", "1.23 GB",
                     "val_a", "val_b", "R@5", "early · step 10", "late · step 20", "step 15", "Learning rate",
                     "EMA momentum", "Waiting for data", "rank 77", "aclip train", "a → b", "1 sample could not"):
        assert expected in page.words(), expected
    assert page.charts() == 3 + 8
    assert "missing" not in page.words()
    assert list(page.text)[1:] == ["results", "looks", "curves", "retrievals", "recipe", "skipped", "incidents",
                                   "environment"]


def test_maps_of_captions_are_shown_where_there_are_any(run_folder: Path) -> None:
    """Snapshots of recipes without text, and of earlier versions, have none."""
    labels = [a["aria-label"] for _, a in report(run_folder).elements if "aria-label" in a]
    assert [label for label in labels if label and label.startswith("where the image answers")] == [
        "where the image answers: a cat", f"where the image answers: {EVIL}"]
    for path in (run_folder / "snapshots").iterdir():
        write_snapshot(path, replace(read_snapshot(path), maps=None))
    assert "answers" not in report(run_folder).words("looks")


def test_text_from_data_is_never_markup(run_folder: Path) -> None:
    page = report(run_folder)
    assert "<script>alert" not in page.source
    assert "".join(page.text.values()).count(EVIL) >= 10  # all of it, as text


def test_images_have_words(run_folder: Path) -> None:
    page = report(run_folder)
    assert all("alt" in a for a in page.named("img"))
    assert all(a.get("aria-label") for _, a in page.elements if a.get("role") == "img")


def test_a_run_that_has_just_begun_has_a_page_that_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"recipe": {"name": "flip", "passes": {}}}')
    words = report(tmp_path).words()
    for sentence in ("flip", "No training step has been logged", "Nothing has been evaluated", "No snapshots",
                     "No examples", "No sample was skipped"):
        assert sentence in words


@pytest.mark.parametrize("config", [None, "{}", '{"model_type": "clip"}', "[1]", "{"])
def test_a_folder_that_holds_no_run_is_refused_and_left_alone(tmp_path: Path, config: str | None) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    before = list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"is no run: it has neither a config\.json of aclip nor journals; give the"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == before
    with pytest.raises(ConfigError, match="there is no run folder"):
        write_report(tmp_path / "nowhere")


def test_the_verb_prints_where_the_page_is(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = reporting.report(run_folder)
    assert capsys.readouterr().out == f"report: {path}\n"


def test_the_report_of_a_comparison_is_its_page(tmp_path: Path) -> None:
    folder = write_comparison_folder(tmp_path / "comparison")
    assert write_report(folder) == folder / "index.html"


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
@pytest.mark.parametrize("where", [slice(0, 1), slice(-1, None), slice(None)])
def test_charts_are_drawn_without_the_values_that_are_no_number(
        run_folder: Path, value: float | None, where: slice) -> None:
    records = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    for record in records[where]:
        record |= {"loss": value, "grad_norm": value, "parts": {"contrastive": value}}
    write_lines(run_folder / "metrics.jsonl", records)
    page = report(run_folder)
    everything = where == slice(None)
    assert page.charts() == 3 + (6 if everything else 8)  # without loss and gradient norm
    assert ("Gradient norm" in page.words("curves")) is not everything
    assert "nan" not in page.words("curves")


def test_thousands_of_evaluations_give_a_page_of_bounded_size(run_folder: Path) -> None:
    record = {"weights": "online", "evaluator": "retrieval", "set": "val_a"}
    write_lines(run_folder / "evaluations.jsonl", (
        record | {"step": step, "samples_seen": 256 * step, "chance": {"image_to_text_r1": 0.01},
                  "metrics": {f"{way}_r{k}": step / 5000 for way in ("image_to_text", "text_to_image") for k in (1, 5)}}
        for step in range(1, 5001)))
    page = report(run_folder)
    assert page.charts() == 1 + 8
    assert len(page.source) < 300_000
    assert page.words("results").count("val_a") == 3  # two rows and a chart


@pytest.mark.parametrize(("name", "section"), [
    ("config.json", "recipe"), ("metrics.jsonl", "curves"), ("evaluations.jsonl", "results"),
    ("skipped.jsonl", "skipped"), ("snapshots", "looks"), ("examples", "retrievals")])
def test_each_piece_may_be_missing(run_folder: Path, name: str, section: str) -> None:
    (run_folder / name).rename(run_folder / "elsewhere")
    source = report(run_folder).source
    assert '<p class="missing">' in source.split(f'<section id="{section}"')[1].split("</section>")[0]


def test_incidents_are_listed_where_there_are_any(run_folder: Path) -> None:
    words = report(run_folder).words("incidents")
    for expected in ("step skipped (1), checkpoint not written (1), checkpoint damaged (1).",
                     "loss nan, gradient norm 0.25", f"1 steps {EVIL}", "step-00000006: cut off"):
        assert expected in words, expected
    (run_folder / "incidents.jsonl").unlink()
    assert "incidents" not in report(run_folder).text


def test_truncated_and_foreign_lines_are_left_out_and_named(run_folder: Path) -> None:
    with (run_folder / "metrics.jsonl").open("ab") as file:
        file.write(b'[1, 2]\n"text"\n{"step": 21, "lo\xc3')
    (run_folder / "examples" / "val_a.json").write_text("{truncated", encoding="utf-8")
    (run_folder / "snapshots" / "step-00000015.safetensors").write_bytes(b"\x00" * 40)
    words = report(run_folder).words()
    assert "metrics.jsonl: 3 truncated lines were left out" in words
    assert "val_a.json is damaged" in words
    assert "step-00000015.safetensors is damaged" in words
    assert "late · step 20" in words


def test_names_that_are_no_utf8_are_shown_escaped(run_folder: Path) -> None:
    with (run_folder / "skipped.jsonl").open("a") as file:  # as JSON has what os.fsdecode returns
        file.write('{"step": 2, "key": "caf\\udce9.jpg", "reason": "truncated"}\n')
    assert "caf\\udce9.jpg" in report(run_folder).words("skipped")


def test_results_lead_with_online_weights_and_keep_the_order_of_sets(run_folder: Path) -> None:
    with (run_folder / "evaluations.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(evaluation("retrieval", {"image_to_text_r1": 0.876}, set="val_a", weights="ema")) + "\n")
    page = report(run_folder)
    assert "87.6 %" not in page.words("")
    assert "87.6 %" in page.words("results")
    assert page.words("").index("val_b") < page.words("").index("val_a")
    assert page.source.index("<summary>val_b") < page.source.index("<summary>val_a")


def test_unknown_evaluators_and_zero_shot_have_tables(run_folder: Path) -> None:
    more = {"chance": {"top1": 0.1}, "counts": {"classes": 10}}
    write_lines(run_folder / "evaluations.jsonl", [
        evaluation("zero_shot", {"top1": 0.123, "mean_per_class": 0.2}, **more),
        evaluation("calibration", {"ece": 0.31, "nll": 2.25}, **more), evaluation("segmentation", {"iou": 0.654})])
    page = report(run_folder)
    for words in ("Zero-shot classification", "segmentation", "0.654", "calibration error", "31.0 %", "2.25"):
        assert words in page.words("results")
    assert "learned from" not in page.words("results")
    assert "12.3 %" in page.words("")


def test_skipped_samples_are_counted_by_what_their_reasons_have_in_common(run_folder: Path) -> None:
    write_lines(run_folder / "skipped.jsonl", [
        {"step": 1, "key": f"row {n}", "reason": f"cannot read the image file: gone: /d/{n}.jpg"} for n in range(250)])
    words = report(run_folder).words("skipped")
    assert "Reasons: cannot read the image file (250)." in words
    assert "and 50 more, in skipped.jsonl" in words


def test_probes_name_their_training_set_and_lead_where_nothing_else_was_measured(run_folder: Path) -> None:
    write_lines(run_folder / "evaluations.jsonl", [
        evaluation(name, {"top1": top1, "mean_per_class": 0.2}, step=step, samples_seen=256 * step,
                   chance={"top1": 0.25}, counts={"classes": 4, "training_pictures": 5000}, training_set="labelled",
                   settings=settings)
        for step in (10, 20) for name, top1, settings in (("linear_probe", 0.543, {"l2": 0.316, "iterations": 57}),
                                                          ("knn", 0.321, {"k": 20}))])
    page = report(run_folder)
    for expected in ("Linear probe", "Nearest neighbours", "labelled", "l2 0.316, iterations 57", "k 20", "5,000",
                     "linear probe, online weights", "nearest neighbours, online weights"):
        assert expected in page.words("results"), expected
    assert "54.3 %" in page.words("")
    assert "32.1 %" not in page.words("")


def test_evaluating_twice_at_one_step_draws_no_curve(run_folder: Path) -> None:
    path = run_folder / "evaluations.jsonl"
    last = path.read_text(encoding="utf-8").splitlines()[-1]
    path.write_text(f"{last}\n{last}\n", encoding="utf-8")
    assert report(run_folder).charts() == 8


def test_confusions_are_drawn_and_listed(run_folder: Path) -> None:
    add_details(run_folder, "val-zero_shot", classes=["cat", EVIL, "cow"], pictures=[10, 4, 0], right=[7, 1, 0],
                confusions=[[0, 1, 3], [1, 2, 3]])
    page = report(run_folder)
    assert page.source.count('class="right"') >= 2
    assert '<rect x="1" y="0" width="1" height="1" class="wrong" opacity="0.300">' in page.source
    words = page.words("classes")
    assert f"cat taken for {EVIL}: 3 of 10" in words
    assert words.index("25.0 %") < words.index("70.0 %")  # the worst class comes first
    assert "robustness" not in page.text


def test_of_many_classes_those_with_errors_are_drawn(run_folder: Path) -> None:
    wrong = {3, 50, 99}
    add_details(run_folder, "val-knn", evaluator="knn", classes=[f"class {i}" for i in range(100)], pictures=[5] * 100,
                right=[4 if i in wrong else 5 for i in range(100)],
                confusions=[[3, 50, 1], [50, 99, 1], [99, 3, 1]])
    page = report(run_folder)
    assert "the 30 of 100 classes with the most errors" in page.words("classes")
    assert all(f"<li>class {i}</li>" in page.source for i in wrong)


def test_reliability_is_drawn(run_folder: Path) -> None:
    bins = [{"from": 0.4, "to": 0.6, "pictures": 4, "confidence": 0.5, "accuracy": 0.25}]
    add_details(run_folder, "val-calibration", evaluator="calibration", reliability=bins, logit_scale=100.0)
    page = report(run_folder)
    assert "perfectly calibrated</li>" in page.source  # without the value at which the line ends
    assert "logit_scale 100" in page.words("classes")


@pytest.mark.parametrize("content", ["[]", "{", '{"classes": ["a"]}'])
def test_damaged_details_do_not_break_the_page(run_folder: Path, content: str) -> None:
    (run_folder / "details").mkdir()
    (run_folder / "details" / "val-zero_shot.json").write_text(content)
    report(run_folder)


def test_robustness_is_a_curve_with_speeds(run_folder: Path) -> None:
    write_lines(run_folder / "robustness.jsonl", [
        {"set": "val", "evaluator": "retrieval", "weights": "online", "keep": keep, "kept_by": way,
         "num_keep": round(64 * keep), "num_patches": 64, "pictures_per_second": 100 / keep,
         "metrics": {"image_to_text_r1": value}}
        for keep, way, value in ((1.0, "attentive", 0.5), (0.5, "attentive", 0.45), (0.5, "uniform", 0.31))])
    words = report(run_folder).words("robustness")
    assert "32 of 64" in words
    assert "31.0 %" in words
    assert words.count("% of the patches kept") == 1
