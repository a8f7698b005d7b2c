"""Messages are one line, and say what exists instead."""

from aclip.errors import AclipError, BadSampleError, category, unknown_name


def test_messages_are_one_line() -> None:
    assert str(AclipError("first\n  second\n")) == "first second"


def test_unknown_names_get_the_closest_match_and_the_list() -> None:
    assert unknown_name("recipe", "aclip", ["clip", "a-clip"]) == (
        "unknown recipe 'aclip': did you mean 'a-clip'? There are: a-clip, clip")
    assert unknown_name("pass", "zzz", []) == "unknown pass 'zzz'; there are: none"


def test_the_category_of_a_bad_sample_has_no_details() -> None:
    error = BadSampleError("image too large: 30000x30000 pixels, the limit is 100 million")
    assert category(error.reason) == "image too large"
