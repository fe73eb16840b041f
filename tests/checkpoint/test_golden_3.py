"""A run that was saved in format 3 goes on bitwise; the files are real ones (golden_3/make.py)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.golden_2.make import environment
from tests.checkpoint.golden_3.make import INTERRUPTED_AT, finished, make_run
from tests.checkpoint.test_golden_2 import numbers
from tests.small_runs import differences

GOLDEN = Path(__file__).parent / "golden_3"


def golden(name: str) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(GOLDEN / f"{name}.pth", weights_only=True)
    return content


def test_the_file_is_of_format_3_and_goes_by_name() -> None:
    saved = golden("inside")
    assert (saved["format"], saved["version"]) == ("torch_frame.state", 3)
    assert saved["progress"]["iter"] == INTERRUPTED_AT + 1
    optimizer = saved["optimizers"]["optimizer"]
    assert [group["params"] for group in optimizer["param_groups"]] == [
        ["a.weight", "a.bias"],
        ["b.weight", "b.bias"],
        ["head.1.weight", "head.1.bias", "(optimizer) 0"],
    ]
    assert list(optimizer["values"]) == ["(optimizer) 0"]
    assert set(saved["frozen"]) == {"base.0.weight", "base.0.bias", "base.1.weight", "base.1.bias"}
    assert not set(saved["frozen"]) & set(saved["model"])


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_it_ends_where_the_uninterrupted_run_did(names: str, tmp_path: Path) -> None:
    """To the last bit on a machine like the one that the files were made on; in another order of layers and groups too."""
    (tmp_path / "checkpoints").mkdir()
    shutil.copyfile(GOLDEN / "inside.pth", tmp_path / "checkpoints" / "latest.pth")
    trainer, loss = make_run(tmp_path, 99, names=names, resume="auto")
    trainer.train()
    came, expected = finished(trainer, loss), golden("finished")
    made_on = expected.pop("environment")
    del came["environment"]
    if environment() == made_on:
        assert differences(came, expected) == []
    assert list(numbers(came)) == pytest.approx(list(numbers(expected)), rel=1e-5, abs=1e-5)
