"""A part of a source, named by a slice."""

from pathlib import Path

import pytest

from aclip.data import open_source, parse_spec
from aclip.data.sources import Part
from aclip.errors import ConfigError, DataError


def write_table(folder: Path, rows: int) -> Path:
    table = folder / "pairs.csv"
    table.write_text("image,caption\n" + "".join(f"{i}.png,picture {i}\n" for i in range(rows)))
    for i in range(rows):
        (folder / f"{i}.png").write_bytes(b"picture " + str(i).encode())
    return table


@pytest.mark.parametrize(
    ("part", "expected"),
    [("[:3]", [0, 1, 2]), ("[4:]", [4, 5, 6]), ("[2:4]", [2, 3]), ("[5:99]", [5, 6]), ("[:]", list(range(7)))],
)
def test_reads_what_the_slice_names(tmp_path: Path, part: str, expected: list[int]) -> None:
    table = write_table(tmp_path, 7)
    whole, some = open_source(str(table)), open_source(f"{table}{part}")
    assert len(some) == len(expected)
    for index, number in enumerate(expected):
        assert some.name(index) == whole.name(number)
        assert some.read(index) == whole.read(number)
        assert some.read(index).captions == (f"picture {number}",)


def test_an_empty_part_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pairs\.csv\[7:\]' is empty: the source has 7 samples"):
        open_source(f"{write_table(tmp_path, 7)}[7:]")


@pytest.mark.parametrize("part", ["[-1000:]", "[:-1]", "[-3:-1]"])
def test_negative_numbers_are_refused(tmp_path: Path, part: str) -> None:
    with pytest.raises(ConfigError, match=r"a part takes no negative numbers, .*pairs\.csv\[:1000\]' is the first"):
        open_source(f"{write_table(tmp_path, 7)}{part}")


def test_a_part_before_the_fields_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"comes after the options, as in '.*pairs\.csv\?images=x\[:2\]'"):
        open_source(f"{write_table(tmp_path, 7)}[:2]?images=x")


def test_parts_of_parts(tmp_path: Path) -> None:
    some = open_source(f"{write_table(tmp_path, 7)}[2:][1:3]")
    assert isinstance(some, Part)
    assert [some.read(i).captions for i in range(len(some))] == [("picture 3",), ("picture 4",)]


def test_a_path_that_ends_like_a_slice_is_a_path(tmp_path: Path) -> None:
    odd = tmp_path / "a[1:2]"
    odd.mkdir()
    assert parse_spec(str(odd)).part is None
    assert parse_spec("shards/[0-9].tar").part is None
