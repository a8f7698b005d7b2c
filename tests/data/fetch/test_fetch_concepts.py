"""Pictures of concepts: the splits."""

from aclip.data.fetch.concepts import split_of
from aclip.data.fetch.shards import unit_hash


def test_the_split_hash_is_the_documented_one() -> None:
    # First 8 hex digits from `printf TEXT | sha1sum`.
    assert unit_hash("concept1f600") == 0x54626BD9 / 2**32
    assert unit_hash("concept2764") == 0xB66ECBF7 / 2**32
    assert unit_hash("concept31-20e3") == 0xE04B6203 / 2**32


def test_splits_follow_concept_and_style() -> None:
    assert split_of("1f600", style_held_out=False) == "train"
    assert split_of("1f600", style_held_out=True) == "val_vendor"
    assert split_of("1f607", style_held_out=False) == "val_concept"
    assert split_of("1f607", style_held_out=True) == "val_both"
    # 0x1f602 hashes to 0.10395: just above the share that is held out.
    assert split_of("1f602", style_held_out=False) == "train"
