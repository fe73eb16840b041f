"""`torch-frame inspect`: what it says is what torch itself finds in the file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.small_runs import Net, make_trainer
from torch_frame import CheckpointerHook, __version__
from torch_frame.cli.main import main


@pytest.fixture
def ckpt_dir(tmp_path: Path) -> Path:
    trainer = make_trainer(tmp_path / "run", Net(norm=True), max_epochs=2, hooks=[CheckpointerHook()], seed=11)
    trainer.train()
    return Path(trainer.ckpt_dir)


def told(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    capsys.readouterr()
    status = main(["inspect", str(path), *options])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_a_state_is_told_as_json(ckpt_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = told(ckpt_dir / "latest.pth", capsys, "--json")
    described, inside = json.loads(text), torch.load(ckpt_dir / "latest.pth", weights_only=True)
    assert status == 0
    assert (described["kind"], described["digest"]) == ("state", "valid")
    assert described["bytes"] == os.path.getsize(ckpt_dir / "latest.pth")
    assert described["progress"] == inside["progress"]
    assert described["versions"] == {"format": 3, "torch_frame": __version__, "torch": torch.__version__}
    assert described["num_parameters"] == sum(value.numel() for value in inside["model"].values())
    assert [(w["name"], w["shape"]) for w in described["weights"]] == [
        (name, list(value.shape)) for name, value in inside["model"].items()
    ]
    assert described["dtypes"] == ["float32", "int64"]
    assert described["seed"] == 11


def test_a_state_is_told_as_a_table(ckpt_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = told(ckpt_dir / "latest.pth", capsys, "--weights")
    assert status == 0
    for expected in ("10 iterations, 10 updates", "2 done", "valid: sha256", "5 batches an epoch", "layers.0.weight"):
        assert expected in text


@pytest.mark.parametrize("name", ["best.pth", "plain.pth"])
def test_weights_are_told_with_or_without_a_digest(
    name: str, ckpt_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(Net(norm=True).state_dict(), ckpt_dir / "plain.pth")
    status, text = told(ckpt_dir / name, capsys, "--json")
    described = json.loads(text)
    assert (status, described["kind"]) == (0, "weights")
    assert described["digest"] == ("valid" if name == "best.pth" else "none")


def test_names_of_weights_may_be_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({1: torch.ones(2), "bias": torch.ones(3)}, tmp_path / "numbers.pth")
    status, text = told(tmp_path / "numbers.pth", capsys, "--weights")
    assert status == 0
    assert "1     float32    [2]" in text


def test_a_flipped_bit_is_told(ckpt_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray((ckpt_dir / "latest.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (ckpt_dir / "latest.pth").write_bytes(content)
    status, text = told(ckpt_dir / "latest.pth", capsys)
    assert status == 1
    assert "damaged: its content is not what its digest was made of" in text


def test_a_file_that_would_run_code_is_told_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model": Hostile()}, tmp_path / "hostile.pth")
    status, text = told(tmp_path / "hostile.pth", capsys)
    assert status == 1
    assert "more than tensors and plain types (posix.mkdir)" in text
    assert not (tmp_path / "ran").exists()


def test_a_missing_file_is_told_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = told(tmp_path / "none.pth", capsys)
    assert status == 1
    assert "none.pth" in text
    assert "Traceback" not in text
