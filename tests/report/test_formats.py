import pytest

from aclip.report.formats import MISSING, compact, count, duration, percent
from aclip.report.markup import Html, join, table, tag


@pytest.mark.parametrize(("share", "text"), [
    (0.0, "0 %"), (1.0, "100 %"), (0.4213, "42.1 %"), (0.000576, "0.06 %"), (0.0000021, "0.0002 %"),
    (-0.5, "-50.0 %"), (None, MISSING),
])
def test_percent(share, text):
    assert percent(share) == text


@pytest.mark.parametrize(("value", "text"), [
    (0.0, "0"), (5.53718, "5.54"), (153_600, "154k"), (9_999, "9999"), (2_500_000, "2.5M"), (999_999, "1M"),
    (0.0005, "5×10⁻⁴"), (1.01e-6, "1.01×10⁻⁶"), (-0.25, "-0.25"), (100.0, "100"), (None, MISSING),  # noqa: RUF001
])
def test_compact(value, text):
    assert compact(value) == text


def test_count_and_duration():
    assert [count(12720), count(None)] == ["12,720", MISSING]
    assert [duration(s) for s in (0.4, 59.6, 725, 3659.0, 90_061, None)] == [
        "0 s", "1 min 00 s", "12 min 05 s", "1 h 00 min", "25 h 01 min", MISSING]


def test_tag_escapes_text_and_attributes_but_not_markup():
    made = tag("p", "<b>", tag("i", "&"), None, title='"<', class_="x", data_a=1, lang=None)
    assert made == '<p title="&quot;&lt;" class="x" data-a="1">&lt;b&gt;<i>&amp;</i></p>'
    assert tag("img", src="a") == '<img src="a">'
    assert join("<", Html("<br>"), None) == "&lt;<br>"


def test_table_dims_what_repeats_the_row_above():
    cells = [["a", "x", "1"], ["a", "y", "1"], ["b", "y", "1"]]
    made = table(["set", "weights", "value"], cells, numeric_from=2)
    rows = made.split("<tr>")[2:]
    assert "again" not in rows[0]
    assert rows[1].count("again") == 1
    assert "again" not in rows[2]
    assert made.count('class="num"') == 4
