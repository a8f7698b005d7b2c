"""Layouts that people have on their disks, each as small as it can be, and what should be read of them.

A builder writes files into a folder and returns a `Layout`, or an `Asked` where the user has to choose.
"""

import base64
import csv
import gzip
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from made_pictures import encode, picture

Text = tuple[str, ...]


@dataclass
class Layout:
    """What a specification should give.

    Attributes:
        spec: below the folder.
        captions: of every sample in order; a text stands for itself alone, None for those of a bad sample.
        labels: likewise, or None where they do not matter.
        bad: samples that cannot be read, by number.
        says: texts that the summary has.
        tags: of the first sample, or None where they do not matter.
    """

    spec: str
    captions: list[str | Text] | list[str | Text | None]
    labels: list[str | None] | None = None
    bad: tuple[int, ...] = ()
    says: tuple[str, ...] = ()
    tags: Text | None = None
    advice: tuple[str, ...] = ()


@dataclass
class Asked:
    """A specification that cannot be read without a choice, and what the message has to say."""

    spec: str
    says: tuple[str, ...] = field(default=())


LAYOUTS: dict[str, Callable[[Path], Layout | Asked]] = {}


def layout(build: Callable[[Path], Layout | Asked]) -> Callable[[Path], Layout | Asked]:
    """Add a builder to the corpus under its own name."""
    LAYOUTS[build.__name__] = build
    return build


def image(path: Path, number: int = 0, image_format: str | None = None) -> Path:
    """Write an image; the format is that of the ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = image_format or {"jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF"}.get(path.suffix[1:].lower(), path.suffix[1:])
    path.write_bytes(encode(picture(number, 16), kind.upper()))
    return path


def images(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        image(folder / name, number)


def text(path: Path, content: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(encoding))
    return path


def dump(path: Path, content: Any, **options: Any) -> Path:
    return text(path, json.dumps(content, **options))


def lines(path: Path, *objects: Any) -> Path:
    return text(path, "".join(json.dumps(one) + "\n" for one in objects))


def table(path: Path, *rows: tuple[Any, ...], delimiter: str = ",", encoding: str = "utf-8") -> Path:
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return text(path, file.getvalue(), encoding)


def encoded(number: int) -> str:
    return base64.b64encode(encode(picture(number, 16))).decode()


# Folders


@layout
def folder_with_texts(root: Path) -> Layout:
    images(root / "set", "a.jpg", "b.png")
    text(root / "set/a.txt", "a cat\nthe cat")
    text(root / "set/b.txt", "a dog")
    return Layout("set", [("a cat", "the cat"), "a dog"], says=("2 images", "several lines", "captions=whole"))


@layout
def folder_with_texts_read_whole(root: Path) -> Layout:
    images(root / "set", "a.jpg")
    text(root / "set/a.txt", "a cat\non a sofa")
    return Layout("set?captions=whole", ["a cat\non a sofa"])


@layout
def class_folders(root: Path) -> Layout:
    images(root / "set", "tabby_cat/1.jpg", "dog/1.jpg")
    return Layout("set", ["a photo of a dog.", "a photo of a tabby cat."], ["dog", "tabby_cat"], says=("folders are "
                                                                                                       "classes",))


@layout
def class_folders_with_templates(root: Path) -> Layout:
    images(root / "set", "cat/1.jpg", "dog/1.jpg")
    return Layout("set?templates=a photo of a {}.|what is this? a {} & more = +", [
        ("a photo of a cat.", "what is this? a cat & more = +"), ("a photo of a dog.", "what is this? a dog & more = "
                                                                                       "+")])


@layout
def class_folders_that_are_links(root: Path) -> Layout:
    images(root / "full", "cat/1.jpg", "dog/1.jpg", "bird/1.jpg")
    (root / "set").mkdir()
    (root / "set/cat").symlink_to(root / "full/cat")
    (root / "set/dog").symlink_to("../full/dog")
    return Layout("set", ["a photo of a cat.", "a photo of a dog."])


@layout
def links_in_a_circle(root: Path) -> Layout:
    images(root / "set", "cat/1.jpg", "dog/1.jpg")
    (root / "set/cat/again").symlink_to(root / "set")
    (root / "set/dog/again").symlink_to(root)
    return Layout("set", ["a photo of a cat.", "a photo of a dog."], says=("2 linked folders",))


@layout
def flickr8k_of_kaggle_by_folder(root: Path) -> Layout:
    return _flickr8k(root, "flickr8k")


@layout
def flickr8k_of_kaggle_by_file(root: Path) -> Layout:
    return _flickr8k(root, "flickr8k/captions.txt")


def _flickr8k(root: Path, spec: str) -> Layout:
    images(root / "flickr8k/Images", "1.jpg", "2.jpg")
    rows = [(f"{n}.jpg", f"caption {n} {k}, with a comma") for n in (1, 2) for k in range(5)]
    table(root / "flickr8k/captions.txt", ("image", "caption"), *rows)
    return Layout(spec, [tuple(f"caption {n} {k}, with a comma" for k in range(5)) for n in (1, 2)])


@layout
def flickr8k_token_file(root: Path) -> Layout:
    images(root / "set/Flicker8k_Dataset", "1_a.jpg", "2_b.jpg")
    text(root / "set/Flickr8k.token.txt", "1_a.jpg#0\tA child .\n1_a.jpg#1\tA girl .\n2_b.jpg#0\tA dog .\n")
    return Layout("set", [("A child .", "A girl ."), "A dog ."], says=("no header",))


@layout
def flickr30k_results_csv(root: Path) -> Layout:
    images(root / "flickr30k_images", "1.jpg", "2.jpg")
    text(root / "results.csv", "image_name| comment_number| comment\n1.jpg| 0| Two men .\n1.jpg| 1| A \"pair\" "
                               ".\n2.jpg| 0| A dog .\n")
    return Layout("results.csv", [("Two men .", 'A "pair" .'), "A dog ."])


@layout
def splits_without_a_choice(root: Path) -> Asked:
    _splits(root)
    return Asked("set", ("train", "test", "?split=train"))


@layout
def splits_with_a_choice(root: Path) -> Layout:
    _splits(root)
    return Layout("set?split=train", ["a red ball", "a blue ball"])


@layout
def two_splits_together(root: Path) -> Layout:
    _splits(root)
    return Layout("set?split=train+test", ["a red ball", "a blue ball", "a test ball"])


def _splits(root: Path) -> None:
    images(root / "set", "train/1.png", "train/2.png", "test/1.png")
    table(root / "set/train/metadata.csv", ("file_name", "text"), ("1.png", "a red ball"), ("2.png", "a blue ball"))
    lines(root / "set/test/metadata.jsonl", {"file_name": "1.png", "text": "a test ball"})


@layout
def class_folders_in_splits(root: Path) -> Layout:
    images(root / "set", "train/cat/1.jpg", "train/dog/1.jpg", "val/cat/2.jpg", "val/dog/3.jpg")
    return Layout("set?split=val", ["a photo of a cat.", "a photo of a dog."], ["cat", "dog"])


@layout
def one_split_alone(root: Path) -> Layout:
    images(root / "set", "train/cat/1.jpg", "train/dog/1.jpg")
    return Layout("set", ["a photo of a cat.", "a photo of a dog."])


@layout
def phone_photos(root: Path) -> Layout:
    from aclip.data.decode import reads_heic

    images(root / "set", "a.jpg")
    text(root / "set/a.txt", "a cat")
    if not reads_heic():
        (root / "set/b.HEIC").write_bytes(b"x")
        return Layout("set", ["a cat"], says=("1 left out", ".heic", "attentive-clip[heic]"))
    import pillow_heif
    from PIL import Image

    heif = pillow_heif.from_pillow(Image.new("RGB", (16, 16), "red"))
    heif.save(root / "set/b.HEIC")
    text(root / "set/b.txt", "a red square")
    return Layout("set", ["a cat", "a red square"])


@layout
def img2dataset_files(root: Path) -> Layout:
    for number in (0, 1):
        image(root / f"set/00000/00000000{number}.jpg", number)
        dump(root / f"set/00000/00000000{number}.json", {"caption": f"picture {number}", "url": "http://x/y",
                                                         "key": "1"})
    return Layout("set", ["picture 0", "picture 1"])


@layout
def images_and_texts_in_folders_side_by_side(root: Path) -> Layout:
    images(root / "cub/images", "001.Albatross/a_1.jpg", "002.Auklet/b_1.jpg")
    text(root / "cub/text/001.Albatross/a_1.txt", "a white bird\na large bird")
    text(root / "cub/text/002.Auklet/b_1.txt", "a black bird")
    return Layout("cub", [("a white bird", "a large bird"), "a black bird"])


@layout
def text_files_of_one_more_ending(root: Path) -> Layout:
    images(root / "set", "a.jpg", "b.jpg")
    text(root / "set/a.jpg.txt", "a cat")
    text(root / "set/b.caption", "a dog")
    return Layout("set", ["a cat", "a dog"])


@layout
def names_with_dots(root: Path) -> Layout:
    images(root / "set", "2024.01.02.jpg", "2024.01.03.jpg")
    text(root / "set/2024.01.02.txt", "monday")
    text(root / "set/2024.01.03.txt", "tuesday")
    return Layout("set", ["monday", "tuesday"])


@layout
def file_names_that_are_not_utf8(root: Path) -> Layout:
    (root / "set").mkdir()
    name = os.fsencode(root / "set") + b"/caf\xe9"
    with open(name + b".jpg", "wb") as file:
        file.write(encode(picture(1), "JPEG"))
    with open(name + b".txt", "wb") as file:
        file.write(b"a cup")
    return Layout("set", ["a cup"])


@layout
def texts_in_gbk(root: Path) -> Layout:
    for number, said in enumerate(("一只猫坐在红色的沙发上", "两个人在海边走路", "看着窗外的鸟")):
        image(root / f"set/{number}.jpg", number)
        text(root / f"set/{number}.txt", said, "gbk")
    return Layout("set", ["一只猫坐在红色的沙发上", "两个人在海边走路", "看着窗外的鸟"], says=("gb18030",))


@layout
def one_bad_byte_in_a_text(root: Path) -> Layout:
    image(root / "set/a.jpg")
    (root / "set/a.txt").write_bytes("Größe 一只猫坐在 ".encode() + b"caf\xe9")
    return Layout("set", ["Größe 一只猫坐在 café"])


@layout
def one_folder_of_images_alone(root: Path) -> Layout:
    images(root / "set", "images/1.jpg", "images/2.jpg")
    return Layout("set", [(), ()], ["images", "images"], says=("2 without caption",), advice=("no image of",))


@layout
def kaggle_competition(root: Path) -> Layout:
    images(root / "set", "train/aa.jpg", "train/bb.jpg", "test/cc.jpg")
    table(root / "set/train.csv", ("id", "label"), ("aa", "cat"), ("bb", "dog"))
    table(root / "set/sample_submission.csv", ("id", "label"), ("cc", "cat"))
    table(root / "set/test.csv", ("id",), ("cc",))
    return Layout("set", ["cat", "dog"], ["cat", "dog"], says=("found by name, such as train/aa.jpg for 'aa'",))


@layout
def coco_by_folder(root: Path) -> Asked:
    _coco(root / "coco", "train2017")
    _coco(root / "coco", "val2017")
    return Asked("coco", ("train", "val", "split="))


@layout
def coco_by_folder_and_split(root: Path) -> Layout:
    _coco(root / "coco", "train2017")
    _coco(root / "coco", "val2017")
    return Layout("coco?split=val", [("one of val2017", "1 again"), "two of val2017"])


@layout
def coco_captions_file(root: Path) -> Layout:
    _coco(root / "coco", "train2017")
    return Layout("coco/annotations/captions_train2017.json", [("one of train2017", "1 again"), "two of train2017"],
                  says=("train2017",))


def _coco(root: Path, split: str) -> None:
    images(root / split, "000000000001.jpg", "000000000002.jpg")
    dump(root / f"annotations/captions_{split}.json", {
        "info": {}, "images": [{"id": 1, "file_name": "000000000001.jpg"}, {"id": 2, "file_name": "000000000002.jpg"}],
        "annotations": [{"image_id": 1, "caption": f"one of {split}"}, {"image_id": 2, "caption": f"two of {split}"},
                        {"image_id": 1, "caption": "1 again"}]})
    dump(root / f"annotations/instances_{split}.json", {
        "images": [{"id": 1, "file_name": "000000000001.jpg"}], "categories": [{"id": 7, "name": "cat"}],
        "annotations": [{"image_id": 1, "category_id": 7, "bbox": [0, 0, 1, 1]}]})


@layout
def folder_with_two_lists(root: Path) -> Asked:
    images(root / "set", "1.jpg")
    table(root / "set/a.csv", ("image", "caption"), ("1.jpg", "a"))
    table(root / "set/b.csv", ("image", "caption"), ("1.jpg", "b"))
    return Asked("set", ("a.csv", "b.csv"))


@layout
def readme_beside_class_folders(root: Path) -> Layout:
    images(root / "set", "cat/1.jpg", "dog/1.jpg")
    text(root / "set/README.txt", "This set has cats, dogs.\nThanks to all.\n")
    text(root / "set/labels.txt", "cat\ndog\n")
    return Layout("set", ["a photo of a cat.", "a photo of a dog."])


# Lists


@layout
def plain_csv(root: Path) -> Layout:
    images(root, "1.jpg", "2.jpg")
    table(root / "pairs.csv", ("filepath", "title"), ("1.jpg", "a cat"), ("2.jpg", 'a "dog", brown'))
    return Layout("pairs.csv", ["a cat", 'a "dog", brown'], says=("2 images", "filepath", "title"))


@layout
def csv_with_named_columns(root: Path) -> Layout:
    images(root / "C++ shots & more", "1.jpg")
    table(root / "pairs.csv", ("file", "Q&A text", "kind", "words"), ("1.jpg", "what? that", "x", "a, b"))
    return Layout("pairs.csv?image=file&caption=Q&A text&label=kind&tags=words&images=" + str(root / "C++ shots & "
                                                                                                     "more"),
                  ["what? that"], ["x"], tags=("a", "b"))


@layout
def list_with_windows_paths(root: Path) -> Layout:
    images(root, "images/0.jpg", "images/1.jpg")
    table(root / "pairs.csv", ("image", "caption"), (r"images\0.jpg", "zero"), (r"images\1.jpg", "one"))
    return Layout("pairs.csv", ["zero", "one"])


@layout
def list_with_paths_of_another_drive(root: Path) -> Layout:
    images(root, "images/0.jpg", "images/1.jpg")
    table(root / "pairs.csv", ("image", "caption"), (r"D:\data\images\0.jpg", "zero"), (r"D:\data\images\1.jpg", "one"))
    return Layout("pairs.csv", ["zero", "one"], says=("without the first part of their paths",))


@layout
def list_with_paths_of_another_machine(root: Path) -> Layout:
    images(root / "photos", "a/0.jpg", "b/1.jpg")
    lines(root / "pairs.jsonl", {"image": "/home/ann/photos/a/0.jpg", "caption": "zero"},
          {"image": "/home/ann/photos/b/1.jpg", "caption": "one"})
    return Layout("pairs.jsonl", ["zero", "one"])


@layout
def list_of_ids(root: Path) -> Layout:
    images(root / "train", "ab12.jpg", "cd34.jpg")
    table(root / "labels.csv", ("id", "breed", "label"), ("ab12", "x", "boston terrier"), ("cd34", "y", "dingo"))
    return Layout("labels.csv", ["boston terrier", "dingo"])


@layout
def list_of_numbers_with_zeros_lost(root: Path) -> Layout:
    images(root / "imgs", "000042.png", "000007.png")
    table(root / "list.csv", ("image_id", "caption"), (42, "a"), (7, "b"))
    return Layout("list.csv", ["a", "b"])


@layout
def list_of_ids_in_nested_folders(root: Path) -> Layout:
    images(root / "train", "6/e/1/6e1a.jpg", "0/0/a/00ab.jpg")
    table(root / "train.csv", ("id", "caption"), ("6e1a", "tower"), ("00ab", "bridge"))
    return Layout("train.csv?images=" + str(root / "train"), ["tower", "bridge"])


@layout
def list_with_other_endings(root: Path) -> Layout:
    images(root, "0.webp", "1.webp")
    table(root / "pairs.csv", ("image", "caption"), ("0.jpg", "zero"), ("1.jpg", "one"))
    return Layout("pairs.csv", ["zero", "one"], says=("found by name, such as 0.webp",))


@layout
def list_with_file_addresses(root: Path) -> Layout:
    images(root / "my images", "0.jpg", "1.jpg")
    lines(root / "pairs.jsonl", *({"image": f"file://{root}/my%20images/{n}.jpg", "text": str(n)} for n in (0, 1)))
    return Layout("pairs.jsonl", ["0", "1"])


@layout
def coco_with_ids_as_text(root: Path) -> Layout:
    images(root, "a.jpg", "b.jpg")
    dump(root / "c.json", {"images": [{"id": "3", "file_name": "a.jpg"}, {"id": "4", "file_name": "b.jpg"}],
                           "annotations": [{"image_id": 3, "caption": "a"}, {"image_id": 4, "caption": "b"}]})
    return Layout("c.json", ["a", "b"])


@layout
def coco_whose_first_image_is_missing(root: Path) -> Layout:
    images(root, "b.jpg", "c.jpg")
    dump(root / "c.json", {"images": [{"id": n, "file_name": f"{name}.jpg"} for n, name in enumerate("abc")],
                           "annotations": [{"image_id": n, "caption": name} for n, name in enumerate("abc")]})
    return Layout("c.json", ["a", "b", "c"], bad=(0,), says=("3 images", "1 left out", "a.jpg"))


@layout
def karpathy_split(root: Path) -> Layout:
    _karpathy(root)
    return Layout("dataset_flickr8k.json?split=train+restval", ["one", ("two", "2")])


@layout
def karpathy_without_a_split(root: Path) -> Asked:
    _karpathy(root)
    return Asked("dataset_flickr8k.json", ("train (1)", "restval (1)", "test (2)", "?split="))


def _karpathy(root: Path) -> None:
    images(root / "images", "1.jpg", "2.jpg", "3.jpg")
    said = [("train", ["one"]), ("restval", ["two", "2"]), ("test", ["three"]), ("test", ["missing"])]
    dump(root / "dataset_flickr8k.json", {"dataset": "flickr8k", "images": [
        {"filename": f"{n}.jpg", "split": split, "sentences": [{"raw": text, "tokens": text.split()} for text in texts]}
        for n, (split, texts) in enumerate(said, start=1)]})


@layout
def karpathy_whose_first_image_is_missing(root: Path) -> Layout:
    _karpathy(root)
    (root / "images/3.jpg").rename(root / "images/4.jpg")
    return Layout("dataset_flickr8k.json?split=test", ["three", "missing"], bad=(0,))


@layout
def a_long_field(root: Path) -> Layout:
    images(root, "1.jpg", "2.jpg")
    table(root / "pairs.csv", ("image", "caption"), ("1.jpg", "word " * 40_000), ("2.jpg", "short"))
    return Layout("pairs.csv", [("word " * 40_000)[:20_000], "short"], says=("1 captions are truncated",))


@layout
def images_in_base64_and_captions_beside(root: Path) -> Layout:
    return _chinese_clip(root, "train_imgs.tsv")


@layout
def captions_beside_images_in_base64(root: Path) -> Layout:
    return _chinese_clip(root, "train_texts.jsonl")


def _chinese_clip(root: Path, spec: str) -> Layout:
    text(root / "train_imgs.tsv", "".join(f"{n}\t{encoded(n)}\n" for n in (1000002, 1000016)))
    lines(root / "train_texts.jsonl", {"text_id": 8428, "text": "高级感托特包斜挎", "image_ids": [1000002]},
          {"text_id": 8429, "text": "包", "image_ids": [1000002, 1000016]})
    return Layout(spec, [("高级感托特包斜挎", "包"), "包"])


@layout
def one_tsv_with_images_in_base64(root: Path) -> Layout:
    text(root / "caption.tsv", "".join(f"{n}\t{n}\ta caption of {n}\tcat&&dog\t{encoded(n)}\n" for n in (1, 2)))
    return Layout("caption.tsv", ["a caption of 1", "a caption of 2"])


@layout
def csv_with_images_in_base64(root: Path) -> Layout:
    table(root / "pairs.csv", ("caption", "image"), *((f"a, {n}", "data:image/png;base64," + encoded(n)) for n in (1,
                                                                                                                   2)))
    return Layout("pairs.csv", ["a, 1", "a, 2"])


@layout
def json_lines_with_images_in_base64(root: Path) -> Layout:
    lines(root / "pairs.jsonl", *({"text": str(n), "image": encoded(n)} for n in (1, 2)))
    return Layout("pairs.jsonl", ["1", "2"])


@layout
def json_lines_called_json(root: Path) -> Layout:
    images(root, "1.jpg", "2.jpg")
    lines(root / "train.json", {"image": "1.jpg", "text": "a"}, {"image": "2.jpg", "text": "b"})
    return Layout("train.json", ["a", "b"])


@layout
def a_json_list_called_jsonl(root: Path) -> Layout:
    images(root, "1.jpg", "2.jpg")
    dump(root / "train.jsonl", [{"image": "1.jpg", "text": "a"}, {"image": "2.jpg", "text": "b"}])
    return Layout("train.jsonl", ["a", "b"])


@layout
def objects_printed_one_behind_the_other(root: Path) -> Layout:
    images(root, "1.jpg", "2.jpg")
    objects = [{"image": "1.jpg", "text": "a"}, {"image": "2.jpg", "text": "b"}]
    text(root / "train.jsonl", "\n".join(json.dumps(one, indent=2) for one in objects))
    return Layout("train.jsonl", ["a", "b"])


@layout
def a_list_called_data(root: Path) -> Layout:
    images(root, "1.jpg", "2.jpg")
    lines(root / "pairs.data", {"image": "1.jpg", "text": "a"}, {"image": "2.jpg", "text": "b"})
    return Layout("pairs.data", ["a", "b"])


@layout
def captions_that_are_numbers(root: Path) -> Layout:
    images(root, "1.jpg", "2.jpg", "3.jpg")
    lines(root / "pairs.jsonl", {"image": "1.jpg", "caption": 1984, "label": 0.0},
          {"image": "2.jpg", "caption": 3.5, "label": 1.0}, {"image": "3.jpg", "caption": 2020.0, "label": None})
    return Layout("pairs.jsonl", ["1984", "3.5", "2020"], ["0", "1", None])


@layout
def labels_that_pandas_made_floats(root: Path) -> Layout:
    images(root, "1.jpg", "2.jpg", "3.jpg")
    table(root / "pairs.csv", ("image", "caption", "label"), ("1.jpg", "a", "0.0"), ("2.jpg", "b", "1.0"), ("3.jpg",
                                                                                                            "c", ""))
    return Layout("pairs.csv", ["a", "b", "c"], ["0", "1", None])


@layout
def a_table_in_gbk(root: Path) -> Layout:
    return _in_encoding(root, "gbk", ("一只猫坐在红色的沙发上", "两个人在海边走路"))


@layout
def a_table_in_shift_jis(root: Path) -> Layout:
    return _in_encoding(root, "shift_jis", ("猫が赤いソファに座って窓の外の鳥を見ている", "犬が公園を走っている"))


@layout
def a_table_in_euc_kr(root: Path) -> Layout:
    return _in_encoding(root, "euc_kr", ("고양이가 빨간 소파에 앉아 있다", "개가 공원에서 뛰고 있다"))


@layout
def a_table_in_windows_1252(root: Path) -> Layout:
    return _in_encoding(root, "cp1252", ("Un café très agréable", "Mädchen in größerem Kleid"))


@layout
def a_table_in_utf_16(root: Path) -> Layout:
    return _in_encoding(root, "utf-16", ("Un café", "一只猫"), says=())


def _in_encoding(root: Path, encoding: str, said: tuple[str, str], says: tuple[str, ...] = ("encoding=",)) -> Layout:
    images(root, "1.jpg", "2.jpg")
    table(root / "pairs.csv", ("image", "caption"), ("1.jpg", said[0]), ("2.jpg", said[1]), encoding=encoding)
    return Layout("pairs.csv", list(said), says=says)


@layout
def a_table_in_a_named_encoding(root: Path) -> Layout:
    images(root, "1.jpg")
    table(root / "pairs.csv", ("image", "caption"), ("1.jpg", "猫の絵"), encoding="euc_jp")
    return Layout("pairs.csv?encoding=euc_jp", ["猫の絵"])


@layout
def captions_by_file_name(root: Path) -> Layout:
    images(root / "images", "a.jpg", "b.jpg")
    dump(root / "captions.json", {"a.jpg": "a cat", "b.jpg": ["a dog", "the dog"]})
    return Layout("captions.json", ["a cat", ("a dog", "the dog")])


@layout
def objects_by_file_name(root: Path) -> Layout:
    images(root, "a.jpg", "b.jpg")
    dump(root / "captions.json", {"a.jpg": {"caption": "a cat"}, "b.jpg": {"caption": "a dog"}})
    return Layout("captions.json", ["a cat", "a dog"])


@layout
def objects_by_id(root: Path) -> Layout:
    images(root, "a.jpg", "b.jpg")
    dump(root / "captions.json", {"id1": {"image_path": "a.jpg", "caption": "a cat"},
                                  "id2": {"image_path": "b.jpg", "caption": "a dog"}})
    return Layout("captions.json", ["a cat", "a dog"])


@layout
def a_wrapped_list(root: Path) -> Layout:
    images(root, "a.jpg", "b.jpg")
    dump(root / "d.json", {"version": 1, "data": [{"file": "a.jpg", "caption": "a"}, {"file": "b.jpg",
                                                                                      "caption": "b"}]})
    return Layout("d.json", ["a", "b"])


@layout
def label_studio_tasks(root: Path) -> Layout:
    images(root / "photos", "a.jpg", "b.jpg")
    dump(root / "export.json", [
        {"id": n, "data": {"image": f"/data/local-files/?d=photos/{name}.jpg"},
         "annotations": [{"result": [{"type": "textarea", "value": {"text": [f"a photo of {name}"]}}]}]}
        for n, name in enumerate("ab")])
    return Layout("export.json", ["a photo of a", "a photo of b"])


@layout
def label_studio_uploads(root: Path) -> Layout:
    images(root / "photos", "a.jpg", "b.jpg")
    dump(root / "min.json", [{"image": f"/data/upload/1/0123abcd-{name}.jpg", "caption": name} for name in "ab"])
    return Layout("min.json", ["a", "b"])


@layout
def nested_objects(root: Path) -> Layout:
    images(root, "a.jpg", "b.jpg")
    lines(root / "d.jsonl", *({"data": {"image": f"{name}.jpg", "caption": name}} for name in "ab"))
    return Layout("d.jsonl", ["a", "b"])


@layout
def an_unclosed_quote_in_a_tsv(root: Path) -> Layout:
    images(root, "1.jpg", "2.jpg", "3.jpg", "4.jpg")
    text(root / "p.tsv", 'image\tcaption\n1.jpg\tone\n2.jpg\t"two, never closed\n3.jpg\tthree\n4.jpg\tfour\n')
    return Layout("p.tsv", ["one", '"two, never closed', "three", "four"])


@layout
def an_inch_mark_in_a_csv(root: Path) -> Layout:
    images(root, "1.jpg", "2.jpg", "3.jpg")
    text(root / "p.csv", 'image,caption\n1.jpg,a 5" screen\n2.jpg,"two\nlines, and a comma"\n3.jpg,three\n')
    return Layout("p.csv", ['a 5" screen', "two\nlines, and a comma", "three"])


@layout
def one_caption_for_all(root: Path) -> Layout:
    images(root, "1.jpg", "2.jpg")
    table(root / "p.csv", ("image", "caption"), ("1.jpg", "a chair"), ("2.jpg", "a chair"))
    return Layout("p.csv", ["a chair", "a chair"], advice=("one caption for every image",))


@layout
def a_column_of_splits(root: Path) -> Layout:
    images(root, "1.jpg", "2.jpg", "3.jpg")
    _with_splits(root)
    return Layout("p.csv", ["a", "b", "c"], says=("train (2), test (1)", "?split=train"))


@layout
def a_column_of_splits_with_a_choice(root: Path) -> Layout:
    images(root, "1.jpg", "2.jpg", "3.jpg")
    _with_splits(root)
    return Layout("p.csv?split=test", ["c"])


def _with_splits(root: Path) -> None:
    rows = (("1.jpg", "a", "train"), ("2.jpg", "b", "train"), ("3.jpg", "c", "test"))
    table(root / "p.csv", ("image", "caption", "split"), *rows)


@layout
def list_whose_images_are_in_another_folder(root: Path) -> Layout:
    images(root / "elsewhere/deep", "1.jpg")
    table(root / "lists/p.csv", ("image", "caption"), ("1.jpg", "a"))
    return Layout(f"lists/p.csv?images={root / 'elsewhere/deep'}", ["a"])


@layout
def several_lists(root: Path) -> Layout:
    images(root, "1.jpg", "2.jpg")
    table(root / "a.csv", ("image", "caption"), ("1.jpg", "a"))
    table(root / "b.csv", ("image", "caption"), ("2.jpg", "b"))
    return Layout("{a,b}.csv", ["a", "b"])


@layout
def a_part_of_a_list(root: Path) -> Layout:
    images(root, "1.jpg", "2.jpg", "3.jpg")
    table(root / "a.csv", ("image", "caption"), ("1.jpg", "a"), ("2.jpg", "b"), ("3.jpg", "c"))
    return Layout("a.csv[1:]", ["b", "c"])


@layout
def a_file_whose_name_looks_like_syntax(root: Path) -> Layout:
    images(root, "1.jpg")
    table(root / "year=2024[1:2]?image=x.csv", ("image", "caption"), ("1.jpg", "a"))
    return Layout("year=2024[1:2]?image=x.csv", ["a"])


@layout
def a_folder_whose_name_looks_like_a_weight(root: Path) -> Layout:
    images(root / "year=2024", "1.jpg")
    table(root / "a.csv", ("image", "caption"), ("1.jpg", "a"))
    return Layout(f"a.csv?images={root / 'year=2024'}", ["a"])


@layout
def images_that_are_addresses(root: Path) -> Asked:
    table(root / "a.tsv", ("caption", "url"), ("a cat", "https://example.org/1.jpg"), delimiter="\t")
    return Asked("a.tsv", ("URLs", "img2dataset"))


@layout
def gzipped_json_lines(root: Path) -> Layout:
    images(root, "1.jpg", "2.jpg")
    path = lines(root / "p.jsonl", {"image": "1.jpg", "caption": "a"}, {"image": "2.jpg", "caption": "b"})
    (root / "p.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    return Layout("p.jsonl.gz", ["a", "b"])


@layout
def malformed_json(root: Path) -> Asked:
    images(root, "1.jpg")
    text(root / "p.json",
         '[{"image":"1.jpg","caption":"a"},{"image":"1.jpg","caption":"b"}x,{"image":"1.jpg","caption":"c"}]')
    return Asked("p.json", ("is not JSON",))


@layout
def splits_below_a_folder_of_images(root: Path) -> Asked:
    images(root / "set", "images/train/1.jpg", "images/test/2.jpg")
    return Asked("set", ("train (1)", "test (1)", "?split=train"))


@layout
def an_archive_unpacked_into_its_own_name(root: Path) -> Layout:
    images(root / "set", "set/cat/1.jpg", "set/dog/2.jpg")
    return Layout("set", ["a photo of a cat.", "a photo of a dog."], ["cat", "dog"])


@layout
def coco_with_ids_in_floats_and_with_zeros(root: Path) -> Layout:
    images(root, "a.jpg", "b.jpg")
    dump(root / "c.json", {"images": [{"id": 3, "file_name": "a.jpg"}, {"id": "0004", "file_name": "b.jpg"}],
                           "annotations": [{"image_id": 3.0, "caption": "a"}, {"image_id": 4, "caption": "b"}]})
    return Layout("c.json", ["a", "b"])


@layout
def list_of_a_bucket_that_was_copied(root: Path) -> Layout:
    images(root / "copy", "x/0.jpg", "y/1.jpg")
    lines(root / "p.jsonl", {"image": "s3://bucket/data/x/0.jpg", "text": "0"}, {"image": "s3://bucket/data/y/1.jpg",
                                                                                 "text": "1"})
    return Layout(f"p.jsonl?images={root / 'copy'}", ["0", "1"])


@layout
def list_of_a_network_share(root: Path) -> Layout:
    images(root, "x/0.jpg", "x/1.jpg")
    lines(root / "p.jsonl", *({"image": rf"\\server\share\x\{n}.jpg", "text": str(n)} for n in (0, 1)))
    return Layout("p.jsonl", ["0", "1"])


@layout
def single_captions_by_file_name_in_a_list(root: Path) -> Layout:
    images(root, "a.jpg", "b.jpg")
    dump(root / "c.json", [{"a.jpg": "a cat"}, {"b.jpg": ["a dog"]}])
    return Layout("c.json", ["a cat", "a dog"])


@layout
def lists_of_names_and_captions(root: Path) -> Layout:
    images(root, "a.jpg", "b.jpg")
    dump(root / "c.json", {"filenames": ["a.jpg", "b.jpg"], "captions": ["a cat", "a dog"]})
    return Layout("c.json", ["a cat", "a dog"])


@layout
def captions_inside_two_objects(root: Path) -> Layout:
    images(root, "a.jpg", "b.jpg")
    dump(root / "c.json", {"dataset": {"images": {"a.jpg": [{"caption": "a cat"}], "b.jpg": [{"caption": "a dog"}]}}})
    return Layout("c.json", ["a cat", "a dog"])


@layout
def a_table_in_utf_16_without_a_mark(root: Path) -> Layout:
    return _in_encoding(root, "utf-16-le", ("a cafe by the sea", "two dogs"), says=())


@layout
def json_lines_in_gbk(root: Path) -> Layout:
    images(root, "a.jpg", "b.jpg")
    said = {"a.jpg": "一只猫坐在红色的沙发上", "b.jpg": "两个人在海边走路"}
    rows = [json.dumps({"image": name, "caption": one}, ensure_ascii=False) + "\n" for name, one in said.items()]
    text(root / "p.jsonl", "".join(rows), "gbk")
    return Layout("p.jsonl", list(said.values()), says=("gb18030",))


@layout
def a_table_of_one_very_long_line(root: Path) -> Asked:
    text(root / "p.tsv", "x" * 50_000 + "\t" + "y" * 50_000 + "\n")
    return Asked("p.tsv")


@layout
def list_with_phone_photos(root: Path) -> Layout:
    images(root, "a.jpg", "b.jpg")
    (root / "b.jpg").rename(root / "b.HEIC")
    table(root / "p.csv", ("photo file", "words"), ("a.jpg", "one small cat"), ("b.HEIC", "one small dog"))
    return Layout("p.csv", ["one small cat", "one small dog"])


@layout
def masks_beside_images(root: Path) -> Layout:
    images(root / "set", "cat/1.jpg", "cat/1_mask.png", "dog/2.jpg", "dog/2.depth.png", "dog/face_mask.jpg")
    return Layout("set", ["a photo of a cat.", "a photo of a dog.", "a photo of a dog."],
                  says=("5 images", "2 left out (masks"))


@layout
def boxes_beside_images(root: Path) -> Layout:
    images(root / "set", "cat/1.jpg", "dog/2.jpg")
    text(root / "set/cat/1.txt", "0 0.51 0.4 0.1 0.25\n1 0.2 0.2 0.1 1e-05\n")
    text(root / "set/dog/2.txt", "16 0.5 0.5 0.1 0.1\n")
    return Layout("set", ["a photo of a cat.", "a photo of a dog."], says=("2 .txt files beside images hold boxes",))


@layout
def outlines_beside_images(root: Path) -> Layout:
    images(root / "set", "cat/1.jpg", "dog/2.jpg")
    for name in ("cat/1", "dog/2"):
        dump(root / f"set/{name}.json", {"version": "5.0", "shapes": [{"label": "cat", "points": [[0, 1]]}],
                                         "imageData": "x"})
    return Layout("set", ["a photo of a cat.", "a photo of a dog."], says=("2 .json files beside images hold no "
                                                                           "captions",))


@layout
def a_list_over_folders_of_splits(root: Path) -> Layout:
    images(root / "set", "train/1.jpg", "test/2.jpg")
    table(root / "set/metadata.csv", ("file_name", "text"), ("train/1.jpg", "one"), ("test/2.jpg", "two"))
    return Layout("set?split=test", ["two"])


@layout
def a_list_over_folders_of_splits_without_a_choice(root: Path) -> Layout:
    a_list_over_folders_of_splits(root)
    return Layout("set", ["one", "two"], says=("all of its splits are read, train (1), test (1)", "?split=train"))


@layout
def captions_by_stem(root: Path) -> Layout:
    images(root / "img", "sunset.jpg", "harbour.jpg")
    dump(root / "captions.json", {"sunset": "the sun sets", "harbour": "boats"})
    return Layout("captions.json", ["the sun sets", "boats"])
