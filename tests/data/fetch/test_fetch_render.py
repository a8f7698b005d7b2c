"""Rendering: right pixels, and drawings that mean harm are refused."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from made_packs import RED
from PIL import Image

from aclip.data.fetch import render as module
from aclip.data.fetch.iconify import Icon
from aclip.data.fetch.render import (
    ELEMENTS,
    Drawing,
    drawing,
    open_renderer,
    render,
    render_chunk,
    render_document,
)
from aclip.errors import BadSampleError, MissingDependencyError

pytest.importorskip("resvg_py")


def pixels(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.mode) == ("PNG", "RGBA")
    return np.asarray(image)


def body(text: str) -> Drawing:
    return Drawing(text, 0, 0, 16)


def test_a_shape_lands_where_it_should_with_its_alpha() -> None:
    picture = pixels(render(body('<path fill="#00f" fill-opacity=".5" d="M0 0h8v16H0z"/>'), 32))
    assert picture.shape == (32, 32, 4)
    np.testing.assert_array_equal(picture[:, 16:], 0)
    left = picture[:, :16].reshape(-1, 4).astype(int)
    np.testing.assert_allclose(left, [[0, 0, 255, 128]] * len(left), atol=1)


def test_a_rectangle_that_is_no_square_is_centred() -> None:
    wide = drawing(Icon('<path d="M0 0h32v16H0z"/>', 0, 0, 32, 16))
    assert wide == Drawing(wide.body, 0, -8, 32)
    opaque = pixels(render(wide, 32))[..., 3] > 0
    assert opaque[8:24].all()
    assert not opaque[:8].any()
    assert not opaque[24:].any()
    assert drawing(Icon("", 2, 4, 10, 20)) == Drawing("", -3, 4, 20)


@pytest.mark.parametrize("side", [0.0, -1.0, float("nan"), float("inf"), 1e9])
def test_an_absurd_rectangle_is_refused(side: float) -> None:
    with pytest.raises(BadSampleError, match="drawn in a rectangle"):
        drawing(Icon(RED, 0, 0, 16, side))


def test_the_same_drawing_gives_the_same_bytes() -> None:
    assert render(body(RED), 128) == render(body(RED), 128)


def test_references_within_the_drawing_are_followed() -> None:
    inner = (
        f'<defs><g id="a">{RED}</g><linearGradient id="b"><stop stop-color="#0f0"/></linearGradient></defs>'
        '<use href="#a"/><rect width="4" height="16" fill="url(#b)"/>'
    )
    picture = pixels(render(body(inner), 16))
    assert tuple(picture[8, 12]) == (255, 0, 0, 255)
    assert tuple(picture[8, 1]) == (0, 255, 0, 255)


@pytest.fixture
def secret(tmp_path: Path) -> str:
    """A picture on this machine that no drawing may show."""
    path = tmp_path / "secret.png"
    Image.new("RGB", (16, 16), "red").save(path)
    return str(path)


@pytest.mark.parametrize(
    "text",
    [
        '<image href="{}" width="16" height="16"/>',
        '<image xlink:href="{}" width="16" height="16"/>',
        '<filter id="f"><feImage href="{}"/></filter><rect width="16" height="16" filter="url(#f)"/>',
        '<use href="{}#a"/>',
        '<rect width="16" height="16" fill="url({})"/>',
        "<rect width=\"16\" height=\"16\" style=\"fill:URL( '{}#a')\"/>",
        '<rect width="16" height="16" style="fill:u\\72l({})"/>',
        '<style>@import "{}";</style>',
        '<foreignObject><img src="{}"/></foreignObject>',
        '<image href="data:image/svg+xml,&lt;svg/&gt;"/>',
        '<use href="http://example.org/a.svg#a"/>',
        '<script>fetch("{}")</script>',
        '<text>depends on the fonts of {}</text>',
        "<h:img xmlns:h='http://www.w3.org/1999/xhtml' src='{}'/>",
    ],
)
def test_a_drawing_that_reaches_outside_itself_is_refused(text: str, secret: str) -> None:
    with pytest.raises(BadSampleError, match=r"outside of the drawing|is not allowed"):
        render(body(text.replace("{}", secret)), 16)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("</svg><svg>", "not well-formed"),
        ('<!DOCTYPE a [<!ENTITY b "c">]>', "not well-formed"),
        ("&undeclared;", "not well-formed"),
        ("<g>", "not well-formed"),
        ("\x00", "not well-formed"),
        ("\ud800", "not well-formed"),
        ("<g>" * 20_000 + "</g>" * 20_000, "levels deep"),
        ('<g id="a"><use href="#a"/></g>', "levels deep"),
        ('<g id="a"><use href="#b"/></g><g id="b"><use href="#a"/></g>', "levels deep"),
        (" " * (2 * 2**20), "bytes of SVG"),
        ("<g/>" * 60_000, "elements"),
    ],
)
def test_a_drawing_that_is_broken_or_too_large_is_refused(text: str, reason: str) -> None:
    with pytest.raises(BadSampleError, match=reason):
        render(body(text), 16)


def test_uses_of_uses_are_counted_as_what_they_show() -> None:
    # 10 levels of 10 uses each: a text of 2 kB that would draw 10^10 rectangles.
    levels = [f'<g id="l{n}">' + f'<use href="#l{n - 1}"/>' * 10 + "</g>" for n in range(1, 11)]
    bomb = '<rect id="l0" width="1" height="1"/>' + "".join(levels)
    with pytest.raises(BadSampleError, match="more than 50000 elements"):
        render(body(bomb), 16)
    render(body(bomb[: bomb.index('<g id="l4">')]), 16)  # 10^3 rectangles are a drawing


def test_an_id_given_twice_does_not_hide_a_bomb() -> None:
    heavy = "<g/>" * 10_000
    text = f'<g id="a"/><defs><g id="a">{heavy}</g></defs>' + '<use href="#a"/>' * 10
    with pytest.raises(BadSampleError, match="elements"):
        render(body(text), 16)


def test_a_bad_drawing_does_not_cost_its_neighbours() -> None:
    good, bad, also_good = render_chunk([body(RED), body("<g>"), body(RED)], 16)
    assert good == also_good == render(body(RED), 16)
    assert isinstance(bad, str)
    assert "not well-formed" in bad


def test_worker_processes_draw_the_same_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 2)
    drawings = [body(f'<rect width="{side}" height="16"/>') for side in range(1, 8)]
    with open_renderer(16, workers=1) as one, open_renderer(16, workers=2) as two:
        assert list(two(drawings)) == list(one(drawings)) == [render(each, 16) for each in drawings]


def test_a_missing_renderer_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'attentive-clip\[demo\]'"):
        render(body(RED), 16)


def test_an_animation_is_drawn_as_its_still_picture() -> None:
    moving = '<rect width="16" height="16" fill="#f00"><animate attributeName="fill" values="#0f0;#00f"/></rect>'
    assert render(body(moving), 16) == render(body(RED), 16)


@pytest.mark.parametrize("text", ["", "<g/>", '<path d="M0 0h16v16z" fill-opacity="0"/>', '<path d="M90 90h9v9z"/>'])
def test_a_drawing_that_shows_nothing_is_refused(text: str) -> None:
    with pytest.raises(BadSampleError, match="nothing is drawn"):
        render(body(text), 16)


def document(inner: str, size: str = 'width="20" height="40"') -> bytes:
    return (
        '<!DOCTYPE svg [<!ENTITY red "#f00">]>'
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {size} '
        f'xmlns:made="http://made.example" made:docbase="C:\\art"><metadata/><made:grid/>{inner}</svg>'
    ).encode()


@pytest.mark.parametrize(("size", "shape"), [((20, 40), (64, 32)), ((40, 20), (32, 64)), ((9, 9), (64, 64))])
def test_a_document_keeps_its_proportions(size: tuple[int, int], shape: tuple[int, int]) -> None:
    said = f'width="{size[0]}" height="{size[1]}"'
    picture = pixels(render_document(document('<rect width="40" height="40" fill="&red;"/>', said), 64, ELEMENTS))
    assert picture.shape == (*shape, 4)
    assert (picture == [255, 0, 0, 255]).all()


def test_a_document_is_drawn_without_what_is_not_allowed(secret: str) -> None:
    inner = (
        f'<rect width="20" height="40" fill="#f00"/><image width="20" height="40" xlink:href="{secret}"/>'
        '<text y="30" font-size="40">text</text><style>rect{fill:#00f}</style>'
    )
    plain = pixels(render_document(document(inner), 40, ELEMENTS))
    assert (plain == [255, 0, 0, 255]).all()
    styled = pixels(render_document(document(inner), 40, ELEMENTS | {"style"}))
    assert (styled == [0, 0, 255, 255]).all()


def test_a_document_that_reaches_outside_itself_is_refused(secret: str) -> None:
    with pytest.raises(BadSampleError, match="outside of the drawing"):
        render_document(document(f'<use xlink:href="{secret}#a"/>'), 16, ELEMENTS)


@pytest.mark.parametrize("text", [b"", b"<svg", b"\xff\xfe", b"<html/>"])
def test_what_is_no_document_is_refused(text: bytes) -> None:
    with pytest.raises(BadSampleError):
        render_document(text, 16, ELEMENTS)
