import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from aclip.errors import ConfigError
from aclip.report import write_report

VOID = {"meta", "link", "img", "br", "hr"}


class Reader(HTMLParser):
    """Collects elements and visible text, and checks that every element is closed."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.stack, self.text = [], [], []
        self.feed(page)
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] not in ("script", "style"):
            self.text.append(data)

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def read(folder):
    path = write_report(folder)
    page = path.read_text(encoding="utf-8")
    return page, Reader(page)


def test_everything_is_on_the_page(run_folder):
    page, reader = read(run_folder)
    text = " ".join(reader.text)
    assert write_report(run_folder) == run_folder / "report.html"
    assert not list(run_folder.glob("*.partial"))
    for expected in ("a-clip", "20.0 %", "40.0 %", "chance (1.0 %, 100 captions)", "40 s", "5,120", "128",
                     "val_a", "val_b", "R@5", "early · step 10", "late · step 20", "step 15", "Learning rate",
                     "EMA momentum", "Waiting for data", "rank 77", "aclip train", "a → b",
                     "1 sample could not"):
        assert expected in text, expected
    assert len([a for a in reader.named("figure") if "chart" in a.get("class", "")]) == 3 + 8
    assert text.count("missing") == 0
    assert not re.search(r"\$\{?[a-z]", page.split("<script>")[0].split("</style>")[1])


def test_text_from_data_is_never_markup(run_folder, evil):
    page, reader = read(run_folder)
    assert evil not in page
    assert "<script>alert" not in page
    assert len(reader.named("script")) == 1
    text = "".join(reader.text)
    assert text.count(evil) >= 10  # it is all there, as text


def test_nothing_is_loaded_from_elsewhere(run_folder):
    page, reader = read(run_folder)
    for _, attributes in reader.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), value
    styles = re.search(r"<style>(.*?)</style>", page, re.S).group(1) + "".join(
        attributes.get("style", "") for _, attributes in reader.elements)
    assert "@import" not in styles
    assert all(url.startswith("data:") for url in re.findall(r"url\(([^)]*)", styles))
    assert "fetch(" not in page
    assert "XMLHttpRequest" not in page


def test_content_policy_allows_only_the_script_of_the_page(run_folder):
    page, reader = read(run_folder)
    policy = next(a["content"] for a in reader.named("meta") if "http-equiv" in a)
    script = re.search(r"<script>(.*?)</script>", page, re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_pictures_have_words(run_folder):
    _, reader = read(run_folder)
    assert all("alt" in a for a in reader.named("img"))
    assert all(a.get("aria-label") for _, a in reader.elements if a.get("role") == "img")


def test_an_empty_folder_gets_a_page_that_says_what_is_missing(tmp_path):
    page, reader = read(tmp_path)
    text = " ".join(reader.text)
    for sentence in ("config.json) is missing", "No training step has been logged",
                     "Nothing has been evaluated", "No snapshots", "No examples", "No sample was skipped"):
        assert sentence in text
    assert tmp_path.name in page


@pytest.mark.parametrize(("name", "section"), [
    ("config.json", "recipe"), ("metrics.jsonl", "curves"), ("evaluations.jsonl", "results"),
    ("skipped.jsonl", "skipped"), ("snapshots", "looks"), ("examples", "retrievals")])
def test_each_piece_may_be_missing(run_folder, name, section):
    (run_folder / name).rename(run_folder / "elsewhere")
    page, _ = read(run_folder)
    assert f'<section id="{section}"' in page
    assert '<p class="missing">' in page.split(f'<section id="{section}"')[1].split("</section>")[0]


def test_incidents_are_listed_where_there_are_any(run_folder, evil):
    _, reader = read(run_folder)
    text = " ".join(reader.text)
    for expected in ("step skipped (1), gone back to a checkpoint (1), checkpoint damaged (1).",
                     "loss nan, gradient norm 0.25", f"1 steps {evil}", "step-00000006: cut off"):
        assert expected in text, expected
    (run_folder / "incidents.jsonl").unlink()
    assert '<section id="incidents"' not in read(run_folder)[0]


def test_torn_and_foreign_lines_are_left_out_and_named(run_folder):
    with (run_folder / "metrics.jsonl").open("ab") as file:
        file.write(b'[1, 2]\n"text"\n{"step": 21, "lo\xc3')
    (run_folder / "examples" / "val_a.json").write_text("{torn", encoding="utf-8")
    (run_folder / "snapshots" / "step-00000015.safetensors").write_bytes(b"\x00" * 40)
    _, reader = read(run_folder)
    text = " ".join(reader.text)
    assert "metrics.jsonl: 3 torn lines were left out" in text
    assert "val_a.json is damaged" in text
    assert "step-00000015.safetensors is damaged" in text
    assert "late · step 20" in text


@pytest.mark.parametrize("value", [None, "word", [1], {"a": 1}, float("nan"), float("inf"), -1, True])
def test_any_value_in_any_field_still_gives_a_page(run_folder, value):
    for name in ("metrics.jsonl", "evaluations.jsonl", "skipped.jsonl", "incidents.jsonl"):
        path = run_folder / name
        first = json.loads(path.read_text(encoding="utf-8").split("\n")[0])
        with path.open("a", encoding="utf-8") as file:
            for key in first:
                file.write(json.dumps(first | {key: value}) + "\n")
    config = json.loads((run_folder / "config.json").read_text(encoding="utf-8"))
    example = json.loads((run_folder / "examples" / "val_a.json").read_text(encoding="utf-8"))[0]
    variants = [example | {key: value} for key in example if key != "kind"]
    (run_folder / "examples" / "val_a.json").write_text(json.dumps([value, *variants]), encoding="utf-8")
    for key in config:
        (run_folder / "config.json").write_text(json.dumps(config | {key: value}), encoding="utf-8")
        read(run_folder)


def test_results_lead_with_online_weights_and_keep_the_order_of_sets(run_folder):
    with (run_folder / "evaluations.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 20, "samples_seen": 5120, "weights": "ema", "evaluator": "retrieval",
                               "set": "val_a", "metrics": {"image_to_text_r1": 0.876}}) + "\n")
    page, _ = read(run_folder)
    header = page.split("</header>")[0].split("<header>")[1]
    assert "87.6 %" not in header
    assert "87.6 %" in page
    assert header.index("val_b") < header.index("val_a")
    assert page.index("<summary>val_b") < page.index("<summary>val_a")


def test_unknown_evaluators_and_zero_shot_have_tables(run_folder):
    records = [("zero_shot", {"top1": 0.123, "mean_per_class": 0.2}), ("segmentation", {"iou": 0.654})]
    with (run_folder / "evaluations.jsonl").open("w", encoding="utf-8") as file:
        for name, metrics in records:
            record = {"step": 1, "samples_seen": 2, "weights": "online", "evaluator": name, "set": "s",
                      "metrics": metrics, "chance": {"top1": 0.1}, "counts": {"classes": 10}}
            file.write(json.dumps(record) + "\n")
    page, reader = read(run_folder)
    text = " ".join(reader.text)
    assert "Zero-shot classification" in text
    assert "segmentation" in text
    assert "0.654" in text
    assert "12.3 %" in page.split("</header>")[0]


def test_bad_samples_are_counted_by_what_their_reasons_share(run_folder):
    records = [{"step": 1, "key": f"row {n}", "reason": f"cannot read the image file: gone: /d/{n}.jpg"} for n in "123"]
    (run_folder / "skipped.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "Reasons: cannot read the image file (3)." in " ".join(read(run_folder)[1].text)


def test_probes_say_what_they_learned_from_and_lead_where_nothing_else_was_measured(run_folder):
    with (run_folder / "evaluations.jsonl").open("w", encoding="utf-8") as file:
        for step in (10, 20):
            for name, settings in (("linear_probe", {"l2": 0.316, "iterations": 57}), ("knn", {"k": 20})):
                record = {"step": step, "samples_seen": 256 * step, "weights": "online", "evaluator": name, "set": "s",
                          "metrics": {"top1": 0.321 if name == "knn" else 0.543, "mean_per_class": 0.2},
                          "chance": {"top1": 0.25}, "counts": {"classes": 4, "training_pictures": 5000},
                          "training_set": "labelled", "settings": settings}
                file.write(json.dumps(record) + "\n")
    page, reader = read(run_folder)
    text = " ".join(reader.text)
    for expected in ("Linear probe", "Nearest neighbours", "labelled", "l2 0.316, iterations 57", "k 20", "5,000"):
        assert expected in text, expected
    header = page.split("</header>")[0]
    assert "54.3 %" in header
    assert "32.1 %" not in header
    charts = page.split('class="charts"')[1]
    assert "linear probe, online weights" in charts
    assert "nearest neighbours, online weights" in charts


def test_evaluating_twice_at_one_step_draws_no_curve(run_folder):
    path = run_folder / "evaluations.jsonl"
    last = path.read_text(encoding="utf-8").splitlines()[-1]
    path.write_text(f"{last}\n{last}\n", encoding="utf-8")
    page, _ = read(run_folder)
    assert 'class="chart"' not in page.split('<section id="results"')[1].split("</section>")[0]


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="there is no run folder"):
        write_report(tmp_path / "nowhere")
