"""Tests of the description of the environment, the small table and the link."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tracking.pseudo_terminal import run_script
from torch_frame.tracking.environment import collect_env, create_small_table, symlink


def test_it_names_what_a_run_runs_on() -> None:
    text = collect_env()
    rows = dict(line.split("  ", 1) for line in text.splitlines() if "  " in line)
    assert rows["sys.platform"].strip() == sys.platform
    assert rows["Numpy"].strip() == np.__version__
    assert rows["PyTorch"].strip() == torch.__version__
    assert rows["CUDA available"].strip() == str(torch.cuda.is_available())
    assert text.endswith(torch.__config__.show())


def test_it_imports_neither_torchvision_nor_opencv() -> None:
    done = run_script(
        """
        import sys
        from torch_frame.tracking.environment import collect_env
        collect_env()
        assert not {"torchvision", "cv2", "tabulate"} & set(sys.modules)
        """
    )
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(
    ("small_dict", "table"),
    [
        ({}, ""),
        ({"a": 1}, "|  a  |\n|:---:|\n|  1  |"),
        (
            {"map": np.float32(0.41237), "long name": "x|y"},
            "|  map  | long name |\n|:-----:|:---------:|\n| 0.412 |   x\\|y    |",
        ),
    ],
)
def test_a_dict_becomes_a_markdown_table(small_dict: dict[str, object], table: str) -> None:
    assert create_small_table(small_dict) == table


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_link_is_made_and_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    symlink("a", tmp_path / "link")
    symlink("b", tmp_path / "link")
    assert (tmp_path / "link").read_text() == "b"
    with pytest.raises(FileExistsError):
        symlink("a", tmp_path / "link", overwrite=False)
    symlink("nowhere", tmp_path / "link")
    symlink("a", tmp_path / "link")
    assert (tmp_path / "link").read_text() == "a"


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_folder_is_never_replaced_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        symlink("a", tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]
