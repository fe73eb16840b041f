"""`torch-frame convert`, as a user runs it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.small_runs import run_python

GOLDEN = Path(__file__).parents[1] / "checkpoint" / "golden_17"
CLI = "import sys; from torch_frame.cli.main import main; sys.exit(main())"


def convert(*words: str | Path, cwd: Path) -> tuple[int, str, str]:
    result = run_python(CLI, cwd, "convert", *map(str, words))
    return result.returncode, result.stdout, result.stderr


def test_a_state_of_1_7_is_converted_and_the_parts_are_told(tmp_path: Path) -> None:
    status, out, err = convert(GOLDEN / "cosine_ema.pth", "new.pth", cwd=tmp_path)
    assert (status, err) == (0, "")
    assert "written to new.pth" in out
    taken, rest = out.split("Not in the file")
    missing, left_out = rest.split("Left out")
    for part in (
        "3 epochs, 9 batches, 9 updates",
        "8 tensors, 23 numbers",
        "groups of 1, 4 parameters",
        "0.005, 0.015",
    ):
        assert part in taken
    for part in ("exp warm-up from 0.001 over 4 updates", "fp32", "eval_error", "EvalHook", "best value 3.78714"):
        assert part in taken
    for part in ("ema", "--ema", "rng", "not bitwise", "seed"):
        assert part in missing
    for part in ("work_dir", "dataloader", "load_checkpoint('new.pth')"):
        assert part in left_out
    assert torch.load(tmp_path / "new.pth", weights_only=True)["progress"]["epoch"] == 3


def test_the_average_comes_from_its_own_file(tmp_path: Path) -> None:
    status, out, _ = convert(
        GOLDEN / "cosine_ema.pth", "new.pth", "--ema", GOLDEN / "cosine_ema_best.pth", cwd=tmp_path
    )
    assert status == 0
    assert out.count("8 tensors, 23 numbers") == 2
    assert "--ema" not in out


def test_a_state_from_inside_an_epoch_is_told(tmp_path: Path) -> None:
    status, out, _ = convert(GOLDEN / "inside.pth", "new.pth", cwd=tmp_path)
    assert status == 0
    assert "saved inside an epoch" in out


def test_nothing_is_written_over_without_force(tmp_path: Path) -> None:
    (tmp_path / "new.pth").write_text("precious")
    status, out, err = convert(GOLDEN / "step.pth", "new.pth", cwd=tmp_path)
    assert (status, out) == (1, "")
    assert "new.pth exists already" in err
    assert (tmp_path / "new.pth").read_text() == "precious"
    assert convert(GOLDEN / "step.pth", "new.pth", "--force", cwd=tmp_path)[0] == 0
    assert convert("new.pth", "newer.pth", cwd=tmp_path)[2].endswith("load_checkpoint('new.pth') continues it.\n")


class Runs:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("echo harm > harm",)


@pytest.mark.parametrize("what", ["weights", "no checkpoint", "hostile", "not there"])
def test_other_files_end_in_one_sentence(what: str, tmp_path: Path) -> None:
    content = {"weights": {"w": torch.ones(1)}, "no checkpoint": {"a": 1}, "hostile": {"a": Runs()}}
    if what in content:
        torch.save(content[what], tmp_path / "old.pth")
    status, out, err = convert("old.pth", "new.pth", cwd=tmp_path)
    assert (status, out) == (1, "")
    assert err.startswith("torch-frame: ")
    assert err.count("\n") == 1
    sentence = {
        "weights": "holds weights alone",
        "no checkpoint": "is no state of torch-frame 1.7",
        "hostile": "made to run code",
        "not there": "There is no file old.pth",
    }
    assert sentence[what] in err
    assert set(os.listdir(tmp_path)) <= {"old.pth"}


def test_other_errors_end_in_a_sentence_too(tmp_path: Path) -> None:
    status, _, err = convert(GOLDEN / "step.pth", "nowhere/new.pth", cwd=tmp_path)
    assert status == 1
    assert "could not be written" in err
