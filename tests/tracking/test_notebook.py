"""In a notebook bars share one output, which is replaced. Real kernels run in `make notebook`; here IPython's names stand in."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from torch_frame.tracking.bar import WIDTH_IN_A_NOTEBOOK, ProgressBar
from torch_frame.tracking.console import console_width
from torch_frame.tracking.notebook import updates_outputs


class Cell:
    """What one cell shows: outputs, each with the texts that it has had."""

    def __init__(self) -> None:
        self.outputs: list[list[str]] = []

    def display(self, data: dict[str, str], *, raw: bool, display_id: bool) -> Any:
        texts = [data["text/plain"]]
        self.outputs.append(texts)
        return SimpleNamespace(update=lambda data, raw: texts.append(data["text/plain"]))


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Cell:
    cell = Cell()
    shell = SimpleNamespace(kernel=object(), execution_count=7)
    for name, content in (
        ("ipykernel", {}),
        ("IPython", {"get_ipython": lambda: shell}),
        ("IPython.display", {"display": cell.display}),
    ):
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("torch_frame.tracking.notebook._area", None)
    monkeypatch.delenv("COLUMNS", raising=False)
    return cell


def drawn(bar: ProgressBar) -> None:
    bar.set_postfix(refresh=True)


def test_the_bars_of_a_run_share_one_output_that_is_empty_at_the_end(cell: Cell) -> None:
    for epoch in range(5):
        with ProgressBar(total=3, desc=f"epoch {epoch}", leave=False, values=lambda: {"loss": 0.5}) as outer:
            outer.update(2)
            drawn(outer)
            with ProgressBar(total=2, desc="eval", leave=False) as inner:
                drawn(inner)
    (texts,) = cell.outputs
    assert any("epoch 4" in text and "\\neval" in text for text in map(repr, texts))
    assert any("2/3" in text and "loss=0.5" in text for text in texts)
    assert max(len(line) for text in texts for line in text.splitlines()) <= WIDTH_IN_A_NOTEBOOK
    assert texts[-1] == ""


def test_a_bar_that_stays_shows_its_last_count(cell: Cell) -> None:
    with ProgressBar(total=3, desc="mine") as bar:
        bar.update(3)
    assert "3/3" in cell.outputs[0][-1]


def test_a_short_loop_shows_nothing(cell: Cell) -> None:
    with ProgressBar(total=3, leave=False) as bar:
        bar.update(3)
    assert cell.outputs == []


def test_lines_have_the_width_of_a_page(cell: Cell) -> None:
    assert console_width() == WIDTH_IN_A_NOTEBOOK


def test_an_output_that_fails_turns_the_bar_off(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["IPython.display"], "display", None)
    bar = ProgressBar(total=3, leave=False)
    drawn(bar)
    bar.update(3)
    bar.close()
    assert bar.n == 3


def test_spyders_console_is_no_page() -> None:
    assert not updates_outputs(type("SpyderShell", (), {})())
    assert not updates_outputs(None)
