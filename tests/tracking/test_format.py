"""Numbers and times fit their cells, whatever they are."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_frame.tracking.format import (
    ago,
    aligned,
    cells,
    duration,
    rate_text,
    rates_width,
    shares,
    shortened,
    showable,
    value_text,
    wrapped,
)


@given(st.floats())
def test_a_value_fits_eight_cells_and_is_not_far_off(value: float) -> None:
    text = value_text(value)
    assert len(text) <= 8
    if math.isfinite(value) and abs(value) < 1e300:
        assert float(text) == pytest.approx(value, rel=0.5, abs=1e-300)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0000"),
        (1e-4, "1.00e-04"),
        (999.9999, "999.9999"),
        (1000, "1000.000"),
        (-0.5, "-0.5000"),
        (1e9, "1.00e+09"),
    ],
)
def test_values_have_as_many_decimals_as_fit(value: float, text: str) -> None:
    assert value_text(value) == text


@given(st.floats(min_value=-10, max_value=1e9))
def test_a_time_fits_seven_cells(seconds: float) -> None:
    assert 0 < len(duration(seconds)) <= 7


@given(st.text(max_size=20), st.sampled_from(["utf-8", "ascii", "gbk", "cp1252", "no such encoding"]))
def test_what_is_showable_is_one_line_that_the_encoding_has(text: str, encoding: str) -> None:
    shown = showable(text, encoding)
    assert not set(shown) & {"\n", "\r", "\x1b", "\x85", "\u2028"}
    if encoding != "no such encoding":
        shown.encode(encoding)


@given(st.lists(st.floats(min_value=1e-12, max_value=1e3), max_size=6))
def test_rates_fit_the_width_that_is_kept_for_so_many(rates: list[float]) -> None:
    assert len(rate_text(rates)) <= max(rates_width(rates), 8)


@pytest.mark.parametrize("text", ["\u200d", "e\u0301"[1:], "\ufe0f", "\u20dd"])
def test_joiners_and_accents_take_no_cell(text: str) -> None:
    assert cells(text) == 0


def test_times_that_are_none_have_no_text() -> None:
    assert [duration(math.nan), duration(math.inf), ago(-3.0)] == ["", "", "0 s ago"]


def test_rates_of_many_groups_are_a_range() -> None:
    assert rate_text([1e-5, 3e-5, 1e-4, 1e-3, 1e-3]) == "1e-05..0.001"
    assert rate_text([]) == ""


def test_shares_of_nothing_are_nothing() -> None:
    assert shares({"steps": 0.0}) == ""


@given(st.text(max_size=60), st.integers(min_value=4, max_value=30))
def test_a_shortened_name_fits(name: str, width: int) -> None:
    assert cells(shortened(name, width)) <= max(width, 0)


def test_chinese_names_are_aligned_by_the_cells_they_take() -> None:
    first, second = aligned({"准确率": "0.9", "loss": "0.1"}, 80)
    assert cells(first) == cells(second)


@given(st.text(alphabet="ab ", max_size=80), st.integers(min_value=1, max_value=20))
def test_wrapping_loses_nothing(text: str, width: int) -> None:
    assert " ".join(wrapped(text, width)) == text
