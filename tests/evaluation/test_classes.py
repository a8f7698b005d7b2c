"""Class lists and templates: files, published sets, and how labels find their classes."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch

from aclip.errors import ConfigError, MissingDependencyError
from aclip.evaluation import zero_shot
from aclip.evaluation.zero_shot import ClassList, ZeroShot, find_classes, find_templates


@pytest.fixture
def clip_benchmark(tmp_path, monkeypatch):
    """A stand-in for the files of the package clip-benchmark."""
    (tmp_path / "datasets").mkdir()
    names = {"eurosat": ["annual crop land", "forest", "highway or road", "pasture land", "river"]}
    templates = {"eurosat": ["a satellite photo of {c}.", "{c} from above."]}
    (tmp_path / "datasets" / "en_classnames.json").write_text(json.dumps(names))
    (tmp_path / "datasets" / "en_zeroshot_classification_templates.json").write_text(json.dumps(templates))
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(zero_shot, "find_spec", lambda name: spec)


def test_imagenet_folders_are_found_by_their_identifiers():
    classes = find_classes("imagenet")
    assert (len(classes.names), classes.names[0], classes.labels[0]) == (1000, "tench", "n01440764")
    assert classes.indices(["n01443537", "n01440764", "n15075141", "elsewhere"]) == [1, 0, 999, None]
    assert classes.indices(["Goldfish", "great_white_shark"]) == [1, 2]


def test_classes_without_images_are_left_out_of_a_subset(table_model, image_set, cpu):
    prompts = {"tench": torch.tensor([1.0, 0.0]), "goldfish": torch.tensor([0.0, 1.0])}
    images = image_set(["x", "y"], ["n01443537", "n01440764"])
    evaluator = ZeroShot(classes=find_classes("imagenet-subset"), templates=("{}",))
    result = evaluator.run(table_model(torch.eye(2).flip(0), prompts), images, cpu)
    assert (result.counts["classes"], result.metrics["top1"]) == (2, 1.0)


def test_classes_of_one_name_are_distinguished_by_their_order_alone(table_model, image_set, cpu):
    """As the two "missile" of ImageNet: no model could rank them, and neither counts against the other twice."""
    prompts = {"missile": torch.tensor([1.0, 0.0]), "cat": torch.tensor([0.0, 1.0])}
    classes = ClassList(("missile", "cat", "missile"), labels=("n1", "n2", "n3"))
    images = torch.tensor([[1.0, 0.1], [1.0, 0.1], [0.1, 1.0]])
    result = ZeroShot(classes=classes, templates=("{}",)).run(
        table_model(images, prompts), image_set(["a", "b", "c"], ["n1", "n3", "n2"]), cpu)
    assert result.metrics["top1"] == pytest.approx(2 / 3)
    assert result.details["right"] == [1, 1, 0]
    assert result.details["confusions"] == [[2, 0, 1]]


def test_case_tells_labels_apart_and_prompts_do_not(caplog):
    classes = ClassList(("capital a", "small a", "seven"), labels=("A", "a", "7"))
    assert classes.indices(["a", "A", "7", "SEVEN"]) == [1, 0, 2, 2]
    with caplog.at_level(logging.WARNING, logger="aclip"):
        assert zero_shot._classes_of(["Cat", "dog", "red_fox", "red  fox"]).indices(["cat", "dog"]) == [0, 1]
        assert not caplog.text
        assert zero_shot._classes_of(["A", "a", "b"]).names == ("A", "b")
    assert "3 labels of the set make 2 classes, as prompts ignore case" in caplog.text


def test_published_lists_and_templates_come_from_the_package(clip_benchmark):
    classes = find_classes("eurosat")
    assert classes.indices(["River", "forest", "pasture_land"]) == [4, 1, 3]
    assert classes.indices(["02", "00"]) == [2, 0]
    assert classes.indices(["AnnualCrop", "SeaLake"]) == [None, None]
    assert find_templates(["eurosat"]) == ("a satellite photo of {}.", "{} from above.")
    with pytest.raises(ConfigError, match="unknown class list or file 'eurosta': did you mean 'eurosat'"):
        find_classes("eurosta")


def test_numbers_are_lines_of_the_class_list_from_0(caplog):
    classes = ClassList(tuple("abcd"))
    with caplog.at_level(logging.INFO, logger="aclip"):
        assert classes.indices(["3", "01", "2"]) == [3, 1, 2]
    assert "labels are taken as numbers of the 4 given classes, from 0: label 1 is 'b'" in caplog.text
    with pytest.raises(ConfigError, match="numbers up to 4, and the 4 given classes count from 0 to 3: if"):
        classes.indices(["1", "4"])


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(zero_shot, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"'eurosat'.* package clip-benchmark: pip install"):
        find_classes("eurosat")


def test_templates_are_texts_lists_and_files(tmp_path):
    assert len(find_templates(["openai"])) == 80
    assert "itap of a {}." in find_templates(["simple"])
    (tmp_path / "prompts.txt").write_text("a sketch of {c}.\n\n{} drawn\n")
    assert find_templates([str(tmp_path / "prompts.txt"), "my {}"]) == ("a sketch of {}.", "{} drawn", "my {}")


@pytest.mark.parametrize(("words", "sentence"), [
    (["opena"], r"unknown template without \{\} or list of templates 'opena': did you mean 'openai'"),
    (["prompts.txt"], "there is no file 'prompts.txt'"),
])
def test_unknown_templates_are_refused(clip_benchmark, words, sentence):
    with pytest.raises(ConfigError, match=sentence):
        find_templates(words)


def test_a_class_file_may_name_the_sets_labels(tmp_path):
    (tmp_path / "names.txt").write_text("﻿n1\ttabby cat\nn2\tdog\n", encoding="utf-8")
    classes = find_classes(str(tmp_path / "names.txt"))
    assert (classes.names, classes.labels) == (("tabby cat", "dog"), ("n1", "n2"))
    assert classes.indices(["n2", "tabby_cat", "n9"]) == [1, 0, None]


@pytest.mark.parametrize(("content", "names", "labels"), [
    ('["cat", "big dog"]', ("cat", "big dog"), None),
    ('{"n1": "cat", "n2": "big dog"}', ("cat", "big dog"), ("n1", "n2")),
])
def test_a_class_file_may_be_json(tmp_path, content, names, labels):
    (tmp_path / "names").write_text(content)
    classes = find_classes(str(tmp_path / "names"))
    assert (classes.names, classes.labels) == (names, labels)


@pytest.mark.parametrize(("content", "sentence"), [
    ("", r"names.txt: zero-shot classification needs at least two classes, not 0 \(none\)"),
    ("cat\ndog\nCat \n", "names.txt: class 'cat' is named twice"),
    ("cat\n", r"names.txt: zero-shot classification needs at least two classes, not 1 \(cat\)"),
    ("n1\tcat\nn2\tdog\nn1\tcow\n", "names.txt: class 'n1' is named twice"),
    ('["cat", 3]', "names.txt: JSON class files hold a list of names"),
    ('["cat", ', "names.txt: not valid JSON"),
    ("n1\tcat\ndog\n", "names.txt: 'dog' has no tab, and other lines have"),
])
def test_bad_class_files_are_refused_in_one_sentence(tmp_path, content, sentence):
    (tmp_path / "names.txt").write_text(content)
    with pytest.raises(ConfigError, match=sentence):
        find_classes(str(tmp_path / "names.txt"))


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252"])
def test_class_files_may_be_in_the_encodings_of_spreadsheets(tmp_path, encoding):
    (tmp_path / "names.txt").write_text("café\ncat\n", encoding=encoding)
    assert find_classes(str(tmp_path / "names.txt")).names == ("café", "cat")


def test_a_class_file_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"there is no file 'names\.txt'"):
        find_classes("names.txt")


def test_a_set_of_one_class_is_refused(table_model, image_set, cpu):
    images = image_set(["a", "b"], ["cat", "Cat"])
    with pytest.raises(ConfigError, match="all 2 images of the set are of class 'cat'"):
        ZeroShot().run(table_model(torch.eye(2)), images, cpu)


def test_underscores_of_folders_are_spaces_in_prompts(table_model, image_set, cpu):
    prompts = {"tabby cat": torch.tensor([1.0, 0.0]), "dog": torch.tensor([0.0, 1.0])}
    images = image_set(["a", "b"], ["tabby_cat", "dog"])
    assert ZeroShot(templates=("{}",)).run(table_model(torch.eye(2), prompts), images, cpu).metrics["top1"] == 1.0
