"""The table keeps its columns."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_frame.tracking.format import cells
from torch_frame.tracking.table import LINES_BELOW_A_HEADER, Entry, Table

NAMES = ["total_loss", "cls", "box", "train_acc", "grad_norm", "eval_acc"]


def entry_of(epoch: int, names: list[str] = NAMES, epochs: int = 100, **more: Any) -> Entry:
    values = {name: 0.5 + index + epoch for index, name in enumerate(names)}
    known = {"lr": [0.1], "per_s": 1234.0, "time_s": 61.0, "eta_s": 7200.0}
    return Entry(f"Epoch {epoch + 1}/{epochs}", epoch * 10 + 9, epoch, values, **{**known, **more})


def printed(table: Table, entries: list[Entry], width: int, names: list[str] = NAMES) -> list[str]:
    return [line.text for entry in entries for line in table.lines(entry, names, width)]


def test_columns_stay_where_they_are_over_a_run() -> None:
    lines = printed(Table(["eval_acc"], label_width=13), [entry_of(epoch) for epoch in range(100)], 120)
    heads = [line for line in lines if line.startswith("Epoch ") and "total_loss" in line]
    assert len(set(heads)) == 1
    assert len({len(line) for line in lines}) == 1


def test_a_header_stands_before_each_forty_lines() -> None:
    lines = printed(
        Table([], label_width=13), [entry_of(epoch, epochs=200) for epoch in range(2 * LINES_BELOW_A_HEADER + 1)], 120
    )
    heads = [number for number, line in enumerate(lines) if "total_loss" in line]
    assert heads == [0, LINES_BELOW_A_HEADER + 1, 2 * (LINES_BELOW_A_HEADER + 1)]


def test_a_new_name_has_a_header_and_an_old_one_keeps_its_column() -> None:
    table = Table([], label_width=9)
    lines = printed(table, [entry_of(0, ["total_loss"])], 120, ["total_loss"])
    lines += printed(table, [entry_of(1, ["total_loss"])], 120, ["total_loss", "late"])
    lines += printed(table, [entry_of(2, ["total_loss", "late"])], 120, ["total_loss", "late"])
    assert ["late" in line for line in lines] == [False, False, True, False, False]
    assert lines[3].startswith("Epoch 2/100      1.5000                 0.1"), lines[3]  # blank below the new name


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_lines_fit_the_screen_and_hold_what_is_followed_and_the_total_first(width: int) -> None:
    table = Table(["eval_acc"], label_width=13)
    head, line = printed(table, [entry_of(0)], width)
    assert max(cells(head), cells(line)) < width
    assert {"Epoch", "total_loss", "eval_acc"} <= set(head.split())
    shown = set(head.split()) & set(NAMES)
    assert sorted(shown | set(table.left_out())) == sorted(NAMES)
    assert table.left_out() == []  # told once


def test_too_narrow_a_screen_still_has_the_epoch_and_the_followed_metric() -> None:
    head, line = printed(Table(["eval_acc"]), [entry_of(0)], 10)
    assert head.split() == ["Epoch", "eval_acc"]
    assert line.split() == ["Epoch", "1/100", "5.5000"]


def test_the_whole_line_has_all_values() -> None:
    head, line = Table(["eval_acc"]).lines(entry_of(0), NAMES, 40)
    assert set(NAMES) < set(str(head.whole).split())
    assert len(str(line.whole).split()) == 2 + len(NAMES) + 4  # lr, speed, time, ETA


def test_the_only_part_of_a_loss_comes_after_all_other_values() -> None:
    values = {"total_loss": 0.25, "cross_entropy": 0.25, "acc": 0.75}
    entry = Entry("Epoch 1/2", 9, 0, values)
    head, _ = Table([]).lines(entry, list(values), 36)
    assert head.text.split() == ["Epoch", "total_loss", "acc"]


def test_a_part_that_is_the_total_in_some_epochs_only_moves_no_column() -> None:
    table = Table()
    heads = []
    for epoch, other in enumerate((1.0, 0.0, 1.0, 0.0, float("nan"))):
        values = {"total_loss": 0.5 + other, "cls_loss": 0.5, "other_loss": other}
        entry = Entry(f"Epoch {epoch + 1}/5", epoch, epoch, values, lr=[0.1], time_s=1.0, eta_s=1.0)
        heads += [line.text for line in table.lines(entry, list(values), 64) if "total_loss" in line.text]
    assert len(heads) == 1


def test_another_width_lays_the_table_out_anew() -> None:
    table = Table(["eval_acc"])
    assert len(table.lines(entry_of(0), NAMES, 200)) == 2
    assert len(table.lines(entry_of(1), NAMES, 200)) == 1
    narrow = table.lines(entry_of(2), NAMES, 60)
    assert len(narrow) == 2
    assert max(len(line.text) for line in narrow) < 60


def test_what_was_not_evaluated_is_blank() -> None:
    table = Table(["eval_acc"])
    head, line = table.lines(entry_of(0, ["total_loss"]), ["total_loss", "eval_acc"], 120)
    assert "eval_acc" in head.text
    start = head.text.index("eval_acc")
    assert not line.text[start : start + len("eval_acc")].strip()


def test_the_best_is_marked() -> None:
    _, line = Table(["eval_acc"]).lines(entry_of(0, best=["eval_acc"]), NAMES, 200)
    ((start, end, style),) = line.marks
    assert (line.text[start:end], style) == ("5.5000*", "best")


def test_groups_with_rates_of_their_own_have_a_column_wide_enough() -> None:
    head, line = Table([]).lines(entry_of(0, lr=[1e-3, 2.5e-5]), NAMES, 200)
    assert "0.001/2.5e-05" in line.text
    assert head.text.index("lr") + 2 == line.text.index("2.5e-05") + 7


def test_rates_that_a_schedule_makes_longer_do_not_move_the_columns() -> None:
    rates = [(0.1, 0.01), (0.0983, 0.00983), (1.23e-05, 1.23e-06), (0.0, 0.0)]
    lines = printed(Table([], label_width=9), [entry_of(epoch, lr=lr) for epoch, lr in enumerate(rates)], 200)
    assert sum(line.startswith("Epoch  ") for line in lines) == 1
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("seconds", [0.1, 3599, 35999, 36001, 86399, 1e6, 1e7, 1e9])
def test_times_of_any_length_stay_in_their_columns(seconds: float) -> None:
    head, line = printed(Table([]), [entry_of(0, time_s=seconds, eta_s=seconds)], 200)
    assert len(head) == len(line)


def test_names_that_look_alike_when_they_are_shortened_are_not_shortened() -> None:
    names = ["validation_precision", "validation_box_precision", "a" * 30]
    head, _ = printed(Table([]), [entry_of(0, names)], 200, names)
    assert head.split()[1:4] == [*names[:2], "aaaaaaaa..aaaaaaaa"]


def test_files_have_names_in_full() -> None:
    names = ["validation_mean_average_precision", "准确率\n"]
    head, line = Table([], encoding="ascii").lines(entry_of(0, names), names, 200)
    assert str(head.whole).split()[1:3] == [names[0], "准确率\\n"]
    assert cells(str(head.whole)) == cells(str(line.whole))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gbk", "utf-8"])
def test_columns_are_aligned_by_what_the_encoding_shows(encoding: str) -> None:
    names = ["total_loss", "准确率", "f1🎉", "\x1b[31mred", "é"]
    head, line = Table(["准确率"], encoding=encoding).lines(entry_of(0, names, best=["准确率"]), names, 200)
    shown = [line.text.encode(encoding, "backslashreplace").decode(encoding) for line in (head, line)]
    assert len({cells(text) for text in shown}) == 1
    assert "\x1b" not in shown[0]


@given(
    st.dictionaries(st.text(min_size=1, max_size=30), st.floats(), max_size=8),
    st.integers(min_value=0, max_value=300),
    st.lists(st.floats(), max_size=5),
)
def test_nothing_that_a_run_may_hold_fails(values: dict[str, float], width: int, lr: list[float]) -> None:
    entry = Entry("Epoch 1", 0, 0, values, list(values)[:1], lr, math.inf, math.nan, None, 3.5)
    table = Table(list(values)[:2])
    for line in table.lines(entry, list(values), width):
        assert line.on_screen({"best": "", "head": ""})
    assert [line.text for line in table.lines(entry, list(values), width)]


def test_an_entry_survives_its_file() -> None:
    entry = entry_of(3, best=["eval_acc"])
    assert Entry.from_row(json.loads(json.dumps(entry.as_row()))) == entry
    row = {**entry.as_row(), "values": {"a": None}, "of a later version": 1}
    assert math.isnan(Entry.from_row(row).values["a"])
