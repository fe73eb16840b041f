"""Documents name files, functions and tests that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *sorted(ROOT.glob("docs/*.md")),
    *(ROOT / name for name in ("README.md", "README.zh.md", "CONTRIBUTING.md")),
]
FUNCTION = re.compile(r"`([\w/]+\.py):([\w.]+)")
TEST = re.compile(r"`?(tests/[\w/]+\.py)(?:::(\w+))?")
LINK = re.compile(r"\]\((?!https?://)([^)#\s]+)")


@cache
def names_in(path: Path) -> frozenset[str]:
    """Functions and classes of a file, methods and attributes with their class's name."""
    return frozenset(_names(ast.parse(path.read_text(encoding="utf-8")).body, ""))


def _names(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from _names(node.body, f"{node.name}.")
            yield from (f"{node.name}.{inner.attr}" for inner in ast.walk(node) if _is_of_self(inner))  # type: ignore[attr-defined]


def _is_of_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_names_is_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    missing = []
    for file, name in FUNCTION.findall(text):
        path = ROOT / "src" / "torch_frame" / file
        if not path.exists() or name.rstrip(".") not in names_in(path):
            missing.append(f"{file}:{name}")
    for file, name in TEST.findall(text):
        path = ROOT / file
        if not path.exists() or (name and name not in names_in(path)):
            missing.append(f"{file}::{name}")
    missing += [target for target in LINK.findall(text) if not (document.parent / target).exists()]
    assert not missing


def test_a_name_that_is_not_there_is_seen() -> None:
    trainer = ROOT / "src" / "torch_frame" / "trainer.py"
    assert {"Trainer", "Trainer.train", "Trainer.progress"} <= names_in(trainer)
    assert "Trainer.fit" not in names_in(trainer)
    assert FUNCTION.findall("`trainer.py:Trainer.train_one_epoch`: then") == [("trainer.py", "Trainer.train_one_epoch")]
