"""Every layout of `layouts.py` gives its samples, captions and classes, and says how it was read."""

import pickle
import re
from pathlib import Path

import published
import pytest
from layouts import LAYOUTS, Asked

from aclip.data import open_source
from aclip.data.decode import decode_image
from aclip.errors import AclipError, BadSampleError

assert published.LAYOUTS is LAYOUTS


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(tmp_path: Path, name: str) -> None:
    root = tmp_path / "disk"  # images are also sought one folder up, where other tests have theirs
    root.mkdir()
    expected = LAYOUTS[name](root)
    spec = f"{root}/{expected.spec}"
    if isinstance(expected, Asked):
        with pytest.raises(AclipError) as caught:
            open_source(spec)
        message = str(caught.value)
        assert "\n" not in message
        assert len(message) < 1500
        assert all(text in message for text in expected.says), message
        return
    source = pickle.loads(pickle.dumps(open_source(spec)))  # as spawned workers get it
    summary = source.summary
    assert len(source) == len(expected.captions), str(summary)
    for index, said in enumerate(expected.captions):
        if said is not None:
            assert source.captions(index) == ((said,) if isinstance(said, str) else said)
    labels = []
    for index in range(len(source)):
        if index in expected.bad:
            with pytest.raises(BadSampleError):
                source.read(index)
            continue
        raw = source.read(index)
        assert raw.name == source.name(index)
        assert raw.captions == source.captions(index)
        assert decode_image(raw.image).size == raw_size(raw.image)
        labels.append(raw.label)
        if index == 0 and expected.tags is not None:
            assert raw.tags == expected.tags
    if expected.labels is not None:
        assert labels == expected.labels
    assert len({source.name(index) for index in range(len(source))}) == len(source)
    assert summary.found == summary.captioned + summary.uncaptioned + sum(summary.left_out.values())
    assert all(text in str(summary) for text in expected.says), str(summary)
    assert str(summary).isprintable()
    advice = " ".join(source.advice())
    assert all(text in advice for text in expected.advice), advice


def raw_size(data: bytes) -> tuple[int, int]:
    return decode_image(data).size


def test_the_page_of_layouts_names_what_exists() -> None:
    root = Path(__file__).parents[3]
    page = (root / "docs" / "layouts.md").read_text(encoding="utf-8")
    tests = set(re.findall(r"def (test_\w+)", "".join(p.read_text("utf-8") for p in (root / "tests").rglob("*.py"))))
    assert set(re.findall(r"`(test_\w+)`", page)) <= tests
    assert set(re.findall(r"\*(\w+)\*", page)) - {"italics"} <= set(LAYOUTS)
    assert f"The corpus has {len(LAYOUTS)} layouts" in page
