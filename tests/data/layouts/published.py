"""Layouts of published sets, exports of annotation tools and what scrapers leave, reduced to a few files."""

import base64
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from layouts import LAYOUTS, Asked, Layout, dump, encoded, image, images, layout, lines, table, text

from made_pictures import encode, picture

__all__ = ["LAYOUTS"]


def png(number: int) -> bytes:
    return encode(picture(number, 16))


# Catalogues, museums, shops


@layout
def fashion_products_with_unquoted_commas(root: Path) -> Layout:
    images(root / "images", "15970.jpg", "39386.jpg", "6.jpg")
    text(root / "styles.csv", "id,gender,productDisplayName\n15970,Men,Turtle Check Shirt\n39386,Men,Blue Jeans, Slim\n"
                              "6,Women,Red Dress\n")  # fmt: skip
    return Layout("styles.csv", ["Turtle Check Shirt", None, "Red Dress"], bad=(1,), says=("1 left out",))


@layout
def articles_whose_numbers_lost_a_zero(root: Path) -> Layout:
    images(root / "images", "010/0108775015.jpg", "011/0110065001.jpg")
    table(root / "articles.csv", ("article_id", "prod_name", "detail_desc"), (108775015, "Strap top", "Jersey top "
                                                                                                      "with straps"),
          (110065001, "OP T-shirt", "Microfibre T-shirt bra"))
    return Layout("articles.csv?image=article_id&caption=prod_name,detail_desc",
                  [("Strap top", "Jersey top with straps"), ("OP T-shirt", "Microfibre T-shirt bra")])


@layout
def paintings_in_tabs_and_latin_letters(root: Path) -> Layout:
    images(root / "SemArt/Images", "1-a.jpg", "2-b.jpg")
    text(root / "SemArt/semart_train.csv", "IMAGE_FILE\tDESCRIPTION\tAUTHOR\tTITLE\n1-a.jpg\tThe cathédrale at "
                                           "noon\tX\tÉglise\n"
                                           "2-b.jpg\tA portrait, half \"length\"\tY\tPortrait\n", "cp1252")  # fmt: skip
    return Layout("SemArt/semart_train.csv?image=IMAGE_FILE&caption=DESCRIPTION",
                  ["The cathédrale at noon", 'A portrait, half "length"'])


@layout
def museum_objects_with_addresses(root: Path) -> Asked:
    table(root / "MetObjects.csv", ("Object Number", "Title", "Link Resource"), ("1", "Coin",
                                                                                 "http://www.museum.org/art/1"))
    return Asked("MetObjects.csv", ("URLs", "img2dataset"))


@layout
def recipes_with_images_two_folders_down(root: Path) -> Layout:
    images(root / "Food Images/Food Images", "miso-chicken-1.jpg", "apple-pie.jpg")
    table(root / "recipes.csv", ("", "Title", "Ingredients", "Instructions", "Image_Name"),
          (0, "Miso chicken", "['1 chicken', '2 apples']", "Roast it.", "miso-chicken-1"), (1, "Pie", "[]", "Bake.",
                                                                                            "apple-pie"))
    return Layout("recipes.csv", ["Miso chicken", "Pie"])


@layout
def products_with_lists_of_images(root: Path) -> Layout:
    images(root / "photos", "a.jpg", "b.jpg")
    table(root / "items.csv", ("title", "images"), ("A lamp", "['photos/a.jpg', 'photos/b.jpg']"), ("A chair",
                                                                                                    "['photos/b.jpg']"))
    return Layout("items.csv", ["A lamp", "A chair"])


@layout
def a_spreadsheet_that_names_its_separator(root: Path) -> Layout:
    images(root, "a.jpg", "b.jpg")
    text(root / "sheet.csv", "sep=;\r\nimage;caption\r\na.jpg;one, two\r\nb.jpg;three\r\n", "utf-8-sig")
    return Layout("sheet.csv", ["one, two", "three"])


# Caption sets


@layout
def flickr30k_annotations(root: Path) -> Layout:
    images(root / "flickr30k-images", "1.jpg", "2.jpg")
    table(root / "flickr_annotations_30k.csv", ("raw", "sentids", "split", "filename", "img_id"),
          ('["Two men, talking.", "A \\"pair\\""]', "[0, 1]", "train", "1.jpg", 0), ('["A dog."]', "[2]", "test",
                                                                                     "2.jpg", 1))
    return Layout("flickr_annotations_30k.csv", [("Two men, talking.", 'A "pair"'), "A dog."], says=("?split=train",))


@layout
def conceptual_captions(root: Path) -> Asked:
    text(root / "Train_GCC-training.tsv", "a very typical bus station\thttp://example.com/1.jpg\nsierra looked "
                                          "stunning\t"
                                          "http://example.com/2.jpg\n")  # fmt: skip
    return Asked("Train_GCC-training.tsv", ("URLs", "img2dataset"))


@layout
def laion_metadata(root: Path) -> Asked:
    pq.write_table(pa.table({"URL": ["http://a.b/c.jpg"], "TEXT": ["a cat"], "HEIGHT": [3]}), root / "part-0.parquet")
    return Asked("part-0.parquet", ("URLs", "img2dataset"))


@layout
def text_captions_with_references(root: Path) -> Layout:
    images(root / "train_images", "aa.jpg", "bb.jpg")
    dump(root / "TextCaps_0.1_train.json", {"dataset_type": "train", "data": [
        {"image_id": name, "image_path": f"train/{name}.jpg", "caption_str": f"a sign {name}",
         "reference_strs": [f"a sign {name}", f"sign of {name}"]} for name in ("aa", "bb")]})
    return Layout("TextCaps_0.1_train.json", [("a sign aa", "sign of aa"), ("a sign bb", "sign of bb")])


@layout
def coco_numbers_in_a_table(root: Path) -> Layout:
    images(root / "train2014", "COCO_train2014_000000000042.jpg", "COCO_train2014_000000123456.jpg")
    table(root / "captions.csv", ("image_id", "caption"), (42, "a cat"), (123456, "a dog"))
    return Layout("captions.csv", ["a cat", "a dog"], says=("COCO_train2014_",))


@layout
def narratives_by_id(root: Path) -> Layout:
    images(root / "val2017", "000000137576.jpg")
    lines(root / "coco_val_localized_narratives.jsonl", {
        "dataset_id": "mscoco_val2017", "image_id": "137576", "annotator_id": 93, "caption": "In this image there are "
                                                                                             "cows.",
        "timed_caption": [{"utterance": "In this", "start_time": 0.0}], "traces": [[{"x": 0.2, "y": 0.1}]]})
    return Layout("coco_val_localized_narratives.jsonl", ["In this image there are cows."])


@layout
def news_with_dotted_paths(root: Path) -> Layout:
    images(root / "origin/bbc/images/0001", "1.jpg")
    dump(root / "origin/data.json", [{"id": 1, "caption": "A minister.", "image_path": "./bbc/images/0001/1.jpg",
                                      "topic": "x"}])
    return Layout("origin/data.json", ["A minister."])


@layout
def memes(root: Path) -> Layout:
    images(root / "img", "42953.png", "08291.png")
    lines(root / "train.jsonl", {"id": 42953, "img": "img/42953.png", "label": 0, "text": "its their character"},
          {"id": 8291, "img": "img/08291.png", "label": 1, "text": "don't be afraid"})
    return Layout("train.jsonl", ["its their character", "don't be afraid"], ["0", "1"])


@layout
def conversations_about_images(root: Path) -> Layout:
    images(root / "images/00453", "1.jpg", "2.jpg")
    dump(root / "blip_558k.json", [{"id": str(n), "image": f"00453/{n}.jpg", "conversations": [
        {"from": "human", "value": "Describe.\n<image>"}, {"from": "gpt", "value": f"answer {n}"}]} for n in (1, 2)])
    return Layout("blip_558k.json", ["answer 1", "answer 2"])


@layout
def generated_images_by_name(root: Path) -> Layout:
    images(root / "part-000001", "0a.png", "0b.png")
    dump(root / "part-000001/part-000001.json", {f"{name}.png": {"p": f"a castle {name}, 8k", "se": 3, "c": 7.0,
                                                                 "st": 50,
                                                                  "sa": "k_lms"} for name in ("0a", "0b")})
    return Layout("part-000001", ["a castle 0a, 8k", "a castle 0b, 8k"])


@layout
def faces_with_ten_texts(root: Path) -> Layout:
    for number in (0, 1):
        image(root / f"set/images/{number}.jpg", number)
        text(root / f"set/text/{number}.txt", f"She has {number}.\nThis is {number}.\n")
    return Layout("set", [("She has 0.", "This is 0."), ("She has 1.", "This is 1.")])


@layout
def flowers_with_texts_by_class(root: Path) -> Layout:
    images(root / "set/jpg", "image_00001.jpg", "image_00002.jpg")
    text(root / "set/text_c10/class_00077/image_00001.txt", "purple petals")
    text(root / "set/text_c10/class_00001/image_00002.txt", "pink petals")
    return Layout("set", ["purple petals", "pink petals"])


# Medicine


@layout
def radiology_with_names(root: Path) -> Layout:
    images(root / "radiology/images", "PMC1.jpg", "PMC2.jpg")
    table(root / "radiology/traindata.csv", ("id", "name", "caption"), ("ROCO_1", "PMC1.jpg", "CT of the chest"),
          ("ROCO_2", "PMC2.jpg", "MRI"))
    return Layout("radiology/traindata.csv", ["CT of the chest", "MRI"])


@layout
def skin_lesions_in_two_folders(root: Path) -> Layout:
    images(root / "part_1", "ISIC_1.jpg", "ISIC_3.jpg")
    images(root / "part_2", "ISIC_2.jpg", "ISIC_4.jpg")
    table(root / "metadata.csv", ("lesion_id", "image_id", "dx", "age"), *((f"H{n}", f"ISIC_{n}", kind, 50) for n,
                                                                           kind in
                                                                         enumerate(("bkl", "nv", "mel", "nv"),
                                                                                   start=1)))
    return Layout("metadata.csv?image=image_id&caption=dx&label=dx", ["bkl", "nv", "mel", "nv"], ["bkl", "nv", "mel",
                                                                                                  "nv"])


@layout
def chest_images_in_many_folders(root: Path) -> Layout:
    images(root, "images_001/images/00000001_000.png", "images_002/images/00000002_000.png")
    table(root / "Data_Entry_2017.csv", ("Image Index", "Finding Labels", "Follow-up #"),
          ("00000001_000.png", "Cardiomegaly|Emphysema", 0), ("00000002_000.png", "No Finding", 0))
    return Layout("Data_Entry_2017.csv", ["Cardiomegaly|Emphysema", "No Finding"])


@layout
def paths_that_begin_with_the_folder_of_the_list(root: Path) -> Layout:
    images(root / "CheXpert-small", "train/patient1/study1/view1.jpg")
    table(root / "CheXpert-small/train.csv", ("Path", "Report"), ("CheXpert-small/train/patient1/study1/view1.jpg",
                                                                  "no finding"))
    return Layout("CheXpert-small/train.csv", ["no finding"])


@layout
def dark_greys_of_a_detector(root: Path) -> Layout:
    import numpy as np
    from PIL import Image

    for number in (1, 2):
        values = np.random.default_rng(number).integers(0, 4096, (16, 16)).astype(np.uint16)
        (root / f"{number}.png").write_bytes(encode(Image.fromarray(values)))
        text(root / f"{number}.txt", f"X-ray {number}")
    return Layout("", ["X-ray 1", "X-ray 2"], advice=("nearly black", "?stretch=4095"))


# Annotation tools


@layout
def via_project(root: Path) -> Layout:
    images(root, "a.jpg", "b.jpg")
    dump(root / "via.json", {f"{name}.jpg123": {"filename": f"{name}.jpg", "size": 123, "regions": [],
                                                "file_attributes": {"caption": f"a photo of {name}"}} for name in "ab"})
    return Layout("via.json", ["a photo of a", "a photo of b"])


@layout
def datumaro_items(root: Path) -> Layout:
    images(root / "images/default", "a.jpg", "b.jpg")
    dump(root / "annotations/default.json", {"info": {}, "categories": {}, "items": [
        {"id": name, "annotations": [{"id": 0, "type": "caption", "caption": f"this is {name}"}],
         "image": {"path": f"{name}.jpg"}}
        for name in "ab"]})
    return Layout("annotations/default.json", ["this is a", "this is b"])


@layout
def fiftyone_samples(root: Path) -> Layout:
    images(root / "data", "a.jpg", "b.jpg")
    dump(root / "samples.json", {"samples": [
        {"_id": {"$oid": "6"}, "filepath": f"data/{name}.jpg", "tags": ["x"],
         "caption": {"_cls": "Classification", "label": f"one {name}"}} for name in "ab"]})
    return Layout("samples.json", ["one a", "one b"])


@layout
def doccano_captions(root: Path) -> Layout:
    images(root, "a.jpg", "b.jpg")
    lines(root / "all.jsonl", *({"id": n, "filename": f"{name}.jpg", "label": [f"text {name}"], "Comments": []}
                               for n, name in enumerate("ab")))
    return Layout("all.jsonl", ["text a", "text b"])


@layout
def prodigy_captions(root: Path) -> Layout:
    lines(root / "captions.jsonl", *({"image": f"data:image/png;base64,{encoded(n)}", "text": f"{n}.png",
                                      "_input_hash": n,
                                     "caption": f"caption {n}", "answer": "accept"} for n in (1, 2)))
    return Layout("captions.jsonl", ["caption 1", "caption 2"])


@layout
def lists_by_split_in_one_file(root: Path) -> Asked:
    images(root, "a.jpg", "b.jpg")
    dump(root / "all.json", {"train": [{"image": "a.jpg", "caption": "a"}], "val": [{"image": "b.jpg",
                                                                                     "caption": "b"}]})
    return Asked("all.json", ("train (1), val (1)", "?split=train"))


@layout
def the_split_of_one_file(root: Path) -> Layout:
    lists_by_split_in_one_file(root)
    return Layout("all.json?split=val", ["b"])


# Scrapers


@layout
def img2dataset_parquet(root: Path) -> Layout:
    names = {"key": ["0", "1"], "caption": ["a", "b"], "url": ["http://x/0", "http://x/1"], "status": ["success",
                                                                                                       "failed"],
             "jpg": [png(0), None]}
    pq.write_table(pa.table(names), root / "00000.parquet")
    return Layout("00000.parquet", ["a", "b"], bad=(1,))


@layout
def gallery_with_json_beside(root: Path) -> Layout:
    images(root / "set/artist", "1.jpg", "2.png")
    dump(root / "set/artist/1.jpg.json", {"title": "A hill", "tags": ["green", "hill"], "description": ""})
    dump(root / "set/artist/2.png.json", {"title": "A lake", "tags": ["blue"]})
    return Layout("set", ["A hill", "A lake"], tags=("green", "hill"))


@layout
def generated_images_with_nested_prompts(root: Path) -> Layout:
    images(root / "set", "1.png", "2.png")
    for number in (1, 2):
        dump(root / f"set/{number}.json", {"id": number, "meta": {"prompt": f"a fox {number}", "seed": 3}})
    return Layout("set", ["a fox 1", "a fox 2"])


@layout
def photos_of_a_macintosh(root: Path) -> Layout:
    images(root, "cafe\u0301.jpg", "b.jpg")  # decomposed, as that file system has it
    text(root / "__MACOSX/._b.jpg", "x")
    table(root / "list.csv", ("image", "caption"), ("caf\u00e9.jpg", "a cup"), ("b.jpg", "b"))
    return Layout("list.csv", ["a cup", "b"])


@layout
def tuning_folders_with_repeats(root: Path) -> Layout:
    images(root / "set", "10_sks dog/a.png", "1_dog/b.png")
    text(root / "set/10_sks dog/a.txt", "sks dog, sitting, grass")
    text(root / "set/1_dog/b.txt", "dog")
    return Layout("set", ["sks dog, sitting, grass", "dog"])


# Hub folders and frames


@layout
def hub_parquet_with_splits(root: Path) -> Layout:
    _hub(root)
    return Layout("set?split=test", ["text 2"])


@layout
def hub_parquet_without_a_choice(root: Path) -> Asked:
    _hub(root)
    return Asked("set", ("train (2)", "test (1)", "?split=train"))


def _hub(root: Path) -> None:
    (root / "set/data").mkdir(parents=True)
    text(root / "set/README.md", "---\nlicense: mit\n---\n")
    for number, name in enumerate(("train-00000-of-00002-0a", "train-00001-of-00002-0b", "test-00000-of-00001-0c")):
        rows = {"image": [{"bytes": png(number), "path": None}], "text": [f"text {number}"]}
        pq.write_table(pa.table(rows), root / f"set/data/{name}.parquet")


@layout
def hub_classes(root: Path) -> Layout:
    features = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"],
                                                                             "_type": "ClassLabel"}}}}
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
                       metadata={"huggingface": json.dumps(features)})
    rows = [{"image": {"bytes": png(n), "path": None}, "label": n} for n in (1, 0)]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), root / "train.parquet")
    return Layout("train.parquet", ["dog", "cat"], ["dog", "cat"])


@layout
def hub_cache(root: Path) -> Layout:
    path = root / "cache/parquet/default/0.0.0/0ab/set-train.arrow"
    path.parent.mkdir(parents=True)
    rows = pa.table({"image": [{"bytes": png(1), "path": None}], "text": ["one"]})
    with pa.ipc.new_stream(str(path), rows.schema) as writer:
        writer.write_table(rows)
    return Layout("cache/parquet/default/0.0.0/0ab/set-train.arrow", ["one"])


@layout
def parquet_with_base64(root: Path) -> Layout:
    pq.write_table(pa.table({"image": [base64.b64encode(png(n)).decode() for n in (1, 2)], "caption": ["a", "b"]}),
                   root / "p.parquet")
    return Layout("p.parquet", ["a", "b"])


@layout
def frame_as_columns(root: Path) -> Layout:
    images(root, "a.jpg", "b.jpg")
    dump(root / "frame.json", {"image": {"0": "a.jpg", "1": "b.jpg"}, "caption": {"0": "a", "1": "b"}})
    return Layout("frame.json", ["a", "b"])


@layout
def frame_as_split(root: Path) -> Layout:
    images(root, "a.jpg", "b.jpg")
    dump(root / "frame.json", {"columns": ["image", "caption"], "index": [0, 1], "data": [["a.jpg", "a"], ["b.jpg",
                                                                                                           None]]})
    return Layout("frame.json", ["a", ("",)], says=("1 without caption",))


@layout
def frame_as_lists(root: Path) -> Layout:
    images(root, "a.jpg", "b.jpg")
    dump(root / "frame.json", {"image": ["a.jpg", "b.jpg"], "caption": ["a", "b"]})
    return Layout("frame.json", ["a", "b"])


@layout
def pairs_as_lists(root: Path) -> Layout:
    images(root, "a.jpg", "b.jpg")
    dump(root / "pairs.json", [["a.jpg", "a cat"], ["b.jpg", "a dog"]])
    return Layout("pairs.json", ["a cat", "a dog"])


@layout
def numbers_that_are_not_json(root: Path) -> Layout:
    images(root, "a.jpg", "b.jpg")
    text(root / "p.json", '[{"image": "a.jpg", "caption": "a", "score": NaN}, {"image": "b.jpg", "caption": "b", '
                          '"score": 1}]')
    return Layout("p.json", ["a", "b"])


@layout
def names_and_numbers_of_classes(root: Path) -> Layout:
    images(root / "val", "ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.JPEG")
    text(root / "val.txt", "ILSVRC2012_val_00000001.JPEG 65\nILSVRC2012_val_00000002.JPEG 970\n")
    return Layout("val.txt", ["65", "970"], ["65", "970"])


@layout
def a_packed_archive(root: Path) -> Asked:
    import zipfile

    with zipfile.ZipFile(root / "set.zip", "w") as archive:
        archive.writestr("a.jpg", png(1))
    return Asked("set.zip", ("set.zip", "unpack"))


@layout
def many_parquet_files_of_one_name(root: Path) -> Layout:
    for number in range(40):
        folder = root / f"set/part={number:02}"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"image": [png(number)], "text": [str(number)]}), folder / "0.parquet")
    return Layout("set", [str(number) for number in range(40)])


@layout
def one_list_in_two_formats_and_padded_images(root: Path) -> Layout:
    images(root / "set", "images/1.png", "images/2.png", "padded_images/p_1.png", "padded_images/p_2.png")
    rows = [{"caption": f"a drawing, {n}", "image": f"images/{n}.png",
             "padded": f"padded_images/p_{n}.png"} for n in (1, 2)]
    lines(root / "set/metadata1000.jsonl", *rows)
    table(root / "set/metadata1000.csv", ("caption", "image", "padded"), *(tuple(row.values()) for row in rows))
    return Layout("set", ["a drawing, 1", "a drawing, 2"])


@layout
def a_list_with_a_mistyped_ending(root: Path) -> Layout:
    images(root / "set", "img1.png", "img2.png")
    lines(root / "set/metadata.json1", {"file_name": "img1.png", "text": "one"}, {"file_name": "img2.png",
                                                                                  "text": "two"})
    return Layout("set", ["one", "two"])


@layout
def a_table_aligned_with_spaces(root: Path) -> Layout:
    images(root, "1.png", "2.png")
    text(root / "train.csv", "    file_path ,    title\n    1.png ,    a red ball\n    2.png ,    \"a ball, blue\"\n")
    return Layout("train.csv", ["a red ball", "a ball, blue"])


@layout
def pairs_in_folders_named_label(root: Path) -> Layout:
    images(root / "data/images", "1_shepherd.jpg", "2_shepherd.jpg")
    text(root / "data/label/1_shepherd.txt", "a german shepherd")
    text(root / "data/label/2_shepherd.txt", "another one")
    return Layout("data", ["a german shepherd", "another one"])
