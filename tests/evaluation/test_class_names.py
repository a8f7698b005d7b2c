"""Class lists and templates: files, published sets, and how a set's labels find their classes."""

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from aclip.errors import ConfigError, MissingDependencyError
from aclip.evaluation import ClassList, ZeroShot, class_names, find_classes, find_templates
from aclip.evaluation.classes import classes_of


@pytest.fixture
def clip_benchmark(tmp_path, monkeypatch):
    """A stand-in for the files of the package clip-benchmark."""
    (tmp_path / "datasets").mkdir()
    names = {"eurosat": ["annual crop land", "forest", "highway or road", "pasture land", "river"]}
    templates = {"eurosat": ["a satellite photo of {c}.", "{c} from above."]}
    (tmp_path / "datasets" / "en_classnames.json").write_text(json.dumps(names))
    (tmp_path / "datasets" / "en_zeroshot_classification_templates.json").write_text(json.dumps(templates))
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(class_names, "find_spec", lambda name: spec)


def test_imagenet_folders_are_found_by_their_identifiers():
    classes = find_classes("imagenet")
    assert (len(classes.names), classes.names[0], classes.labels[0]) == (1000, "tench", "n01440764")
    assert classes.numbers(["n01443537", "n01440764", "n15075141", "elsewhere"]) == [1, 0, 999, None]
    assert classes.numbers(["Goldfish", "great_white_shark"]) == [1, 2]


def test_classes_without_pictures_are_left_out_of_a_subset(table_model, picture_set, cpu):
    prompts = {"tench": torch.tensor([1.0, 0.0]), "goldfish": torch.tensor([0.0, 1.0])}
    pictures = picture_set(["x", "y"], ["n01443537", "n01440764"])
    evaluator = ZeroShot(classes=find_classes("imagenet-subset"), templates=("{}",))
    result = evaluator.run(table_model(torch.eye(2).flip(0), prompts), pictures, cpu)
    assert (result.counts["classes"], result.metrics["top1"]) == (2, 1.0)


def test_classes_of_one_name_are_told_apart_by_their_order_alone(table_model, picture_set, cpu):
    """As the two "missile" of ImageNet: no model could rank them, and neither counts against the other twice."""
    prompts = {"missile": torch.tensor([1.0, 0.0]), "cat": torch.tensor([0.0, 1.0])}
    classes = ClassList(("missile", "cat", "missile"), labels=("n1", "n2", "n3"))
    images = torch.tensor([[1.0, 0.1], [1.0, 0.1], [0.1, 1.0]])
    result = ZeroShot(classes=classes, templates=("{}",)).run(
        table_model(images, prompts), picture_set(["a", "b", "c"], ["n1", "n3", "n2"]), cpu)
    assert result.metrics["top1"] == pytest.approx(2 / 3)
    assert result.details["right"] == [1, 1, 0]
    assert result.details["confusions"] == [[2, 0, 1]]


def test_case_tells_labels_apart_and_prompts_do_not(caplog):
    classes = ClassList(("capital a", "small a", "seven"), labels=("A", "a", "7"))
    assert classes.numbers(["a", "A", "7", "SEVEN"]) == [1, 0, 2, 2]
    with caplog.at_level(logging.WARNING, logger="aclip"):
        assert classes_of(["Cat", "dog", "red_fox", "red  fox"]).numbers(["cat", "dog"]) == [0, 1]
        assert not caplog.text
        assert classes_of(["A", "a", "b"]).names == ("A", "b")
    assert "3 labels of the set make 2 classes, for prompts do not tell upper and lower case apart" in caplog.text


def test_published_lists_and_templates_come_from_the_package(clip_benchmark, caplog):
    classes = find_classes("eurosat")
    assert classes.numbers(["River", "forest"]) == [4, 1]
    assert classes.numbers(["02", "00"]) == [2, 0]
    with caplog.at_level(logging.WARNING, logger="aclip"):
        assert classes.numbers(["River", "AnnualCrop", "Forest", "Pasture", "Highway"]) == [4, 0, 1, 3, 2]
    assert "in sorted order: 'AnnualCrop' for 'annual crop land', 'River' for 'river'" in caplog.text
    with pytest.raises(ConfigError, match=r"has 3 classes, for example: AnnualCrop, Pasture, River; the 5 eurosat"):
        classes.numbers(["AnnualCrop", "River", "Pasture"])
    with pytest.raises(ConfigError, match=r"3 of the set's 5 classes are eurosat classes by name, but not: Lake, Road"):
        classes.numbers(["annual crop land", "Lake", "Road", "forest", "River"])  # sorted order would mix them up
    assert find_templates(["eurosat"]) == ("a satellite photo of {}.", "{} from above.")
    with pytest.raises(ConfigError, match="this version of clip-benchmark has no en classnames of 'gtsrb'"):
        find_classes("gtsrb")


def test_folders_that_are_numbers_from_one_are_taken_in_the_order_of_the_numbers():
    names = tuple("abcdefghijkl")
    labels = [str(number) for number in range(1, 13)]  # sorted as words: 1, 10, 11, 12, 2, ...
    assert ClassList(names, in_order=True).numbers(labels) == list(range(12))


def test_numbers_that_may_count_from_0_or_from_1_are_not_guessed():
    classes = ClassList(tuple("abcd"))
    assert classes.numbers(["3", "0"]) == [3, 0]
    assert classes.numbers(["04", "02"]) == [3, 1]  # from 1: there is no fifth class
    with pytest.raises(ConfigError, match=r"numbers, 1 to 3, of 4 given classes, and as neither 0 nor 4 is there, .* "
                       "from 0 or from 1: say so with --first-label"):
        classes.numbers(["3", "1", "2"])
    assert replace(classes, first_number=1).numbers(["3", "1", "2"]) == [2, 0, 1]
    assert replace(classes, first_number=0).numbers(["3", "1", "4"]) == [3, 1, None]
    with pytest.raises(ConfigError, match="no picture of the set is of one of the 4 given classes"):
        classes.numbers(["1", "5"])


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(class_names, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="'eurosat' are held by the package clip-benchmark: pip install"):
        find_classes("eurosat")


def test_templates_are_texts_lists_and_files(tmp_path):
    assert len(find_templates(["openai"])) == 80
    assert "itap of a {}." in find_templates(["simple"])
    (tmp_path / "prompts.txt").write_text("a sketch of {c}.\n\n{} drawn\n")
    assert find_templates([str(tmp_path / "prompts.txt"), "my {}"]) == ("a sketch of {}.", "{} drawn", "my {}")


@pytest.mark.parametrize(("words", "sentence"), [
    (["a photo of a cat"], r"'a photo of a cat' has no \{\} where the class name goes"),
    (["opena"], "unknown list of templates.*did you mean 'openai'"),
    (["prompts.txt"], "there is no file 'prompts.txt' with templates"),
])
def test_templates_that_are_none_are_refused(words, sentence):
    with pytest.raises(ConfigError, match=sentence):
        find_templates(words)


@pytest.mark.parametrize(("content", "sentence"), [
    ("", "holds at least one|needs at least one prompt template"),
    ("a photo\n", r"prompts.txt: prompt template 'a photo' has no \{\}"),
])
def test_files_of_templates_are_checked(tmp_path, content, sentence):
    (tmp_path / "prompts.txt").write_text(content)
    with pytest.raises(ConfigError, match=sentence):
        find_templates([str(tmp_path / "prompts.txt")])


def test_a_class_file_may_name_the_sets_labels(tmp_path):
    (tmp_path / "names.txt").write_text("﻿n1\ttabby cat\nn2\tdog\n", encoding="utf-8")
    classes = find_classes(str(tmp_path / "names.txt"))
    assert (classes.names, classes.labels) == (("tabby cat", "dog"), ("n1", "n2"))
    assert classes.numbers(["n2", "tabby_cat", "n9"]) == [1, 0, None]


@pytest.mark.parametrize(("content", "sentence"), [
    ("", "names.txt holds no class names"),
    ("cat\ndog\nCat \n", "names.txt: class 'Cat' is named twice"),
    ("cat\n", r"names.txt: zero-shot classification tells classes apart: 1 of them \(cat\) is not enough"),
    ("n1\tcat\nn2\tdog\nn1\tcow\n", "names.txt: class 'n1' is named twice"),
    ("n1\tcat\ndog\n", "names.txt: 'dog' has no tab, and other lines do"),
])
def test_bad_class_files_are_refused_in_one_sentence(tmp_path, content, sentence):
    (tmp_path / "names.txt").write_text(content)
    with pytest.raises(ConfigError, match=sentence):
        find_classes(str(tmp_path / "names.txt"))


def test_a_class_file_that_is_no_text_or_not_there_is_refused(tmp_path):
    (tmp_path / "names.bin").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="cannot read class names from"):
        find_classes(str(tmp_path / "names.bin"))
    with pytest.raises(ConfigError, match=r"there is no file 'names\.txt' with class names"):
        find_classes("names.txt")
    with pytest.raises(ConfigError, match="did you mean 'eurosat'"):
        find_classes("eurosta")


def test_a_set_of_one_class_is_refused(table_model, picture_set, cpu):
    pictures = picture_set(["a", "b"], ["cat", "Cat"])
    with pytest.raises(ConfigError, match="all 2 pictures of the set are of class 'cat'"):
        ZeroShot().run(table_model(torch.eye(2)), pictures, cpu)


def test_underscores_of_folders_are_spaces_in_prompts(table_model, picture_set, cpu):
    prompts = {"tabby cat": torch.tensor([1.0, 0.0]), "dog": torch.tensor([0.0, 1.0])}
    pictures = picture_set(["a", "b"], ["tabby_cat", "dog"])
    assert ZeroShot(templates=("{}",)).run(table_model(torch.eye(2), prompts), pictures, cpu).metrics["top1"] == 1.0
