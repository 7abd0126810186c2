from __future__ import annotations

import pytest

from shadowkv.common.dims import Dims
from shadowkv.common.errors import SkvError
from shadowkv.contract.registry import methods, parse_method
from shadowkv.methods.shadowkv.method import ShadowKV

DIMS = Dims(layers=2, q_heads=4, kv_heads=2, head_dim=16, element_bytes=2)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("shadwkv", "did you mean 'shadowkv'"),
        ("nothing-like-it", "methods: full"),
        ("shadowkv:rnak=3", "did you mean 'rank'"),
        ("shadowkv:rank=3,rank=4", "given twice"),
        ("shadowkv:rank", "not of the form key=value"),
        ("shadowkv:rank=big", "'big' is not a whole number"),
        ("shadowkv:energy=much", "'much' is not a number"),
        ("shadowkv:budget=4", "smaller than one chunk"),
        ("shadowkv:rank=0", "at least 1"),
        ("shadowkv:energy=1.5", "not in [0, 1]"),
        ("shadowkv:energy=0.9,rank=5", "either rank or energy"),
        ("quest:budget=8", "smaller than one page"),
        ("quest:reduce=median", "one of per_q_head"),
        ("full:budget=3", "parameters of full: kv, engine"),
    ],
)
def test_bad_specs_are_one_clear_line(spec, says):
    with pytest.raises(SkvError) as caught:
        parse_method(spec)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_name_what_differs_from_the_defaults():
    assert parse_method("shadowkv: rank=64 , budget=256").label == "shadowkv:budget=256,rank=64"
    assert parse_method("shadowkv:rank=160").label == "shadowkv"
    assert parse_method("shadowkv:outliers=auto").outliers is None


def test_rank_beyond_the_width_is_refused():
    with pytest.raises(SkvError, match="rank=64 exceeds the width of this model's keys, 32"):
        ShadowKV(rank=64).check(DIMS)
    ShadowKV(rank=32).check(DIMS)


def test_outliers_keep_the_authors_density_at_any_budget():
    assert [ShadowKV(budget=b).outlier_chunks for b in (256, 896, 1024, 2048, 4096)] == [6, 21, 24, 48, 96]


def test_full_attention_is_listed_first():
    assert next(iter(methods())) == "full"


def test_a_plus_in_a_file_name_is_no_prefill(tmp_path):
    table = tmp_path / "a+b.tsv"
    assert parse_method(f"duo:heads={table}").heads == str(table)
