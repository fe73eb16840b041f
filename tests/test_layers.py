"""The layers of the package: imports run downward only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "torch_frame"
LEAVES = {"training", "data", "metrics", "tracking", "checkpoint", "vision"}
GROUND = {"alarm", "stopping", "distributed", "progress", "types", "errors", "_version"}
BELOW = {
    **dict.fromkeys(LEAVES, GROUND),
    "alarm": set(), "progress": set(), "types": set(), "errors": set(), "_version": set(), "_collision": set(),
    "distributed": set(),
    "hooks": LEAVES | GROUND,
    "files": LEAVES | GROUND,
    "run": LEAVES | GROUND,
    "banner": LEAVES | GROUND,
    "stopping": {"alarm"},
    "state": LEAVES | GROUND | {"hooks", "files"},
    "trainer": LEAVES | GROUND | {"hooks", "files", "run", "banner", "state"},
    "utils": LEAVES | GROUND | {"run"},
    "lr_scheduler": LEAVES,
    "datasets": LEAVES,
    "report": LEAVES | GROUND,
    "cli": LEAVES | GROUND | {"", "report", "trainer", "hooks"},
    "__init__": LEAVES | GROUND | {"", "_collision", "hooks", "trainer", "utils"},
}  # fmt: skip


def imported_rooms(module: Path) -> set[str]:
    """The rooms of torch_frame that a module imports, those for type checking alone left out."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    for_types = {id(node) for test in ast.walk(tree) if _is_type_checking(test) for node in ast.walk(test)}
    names = []
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "torch_frame":
            names += [f"torch_frame.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    paths = [name.split(".") for name in names if name.split(".")[0] == "torch_frame"]
    return {path[1] if len(path) > 1 and _exists(path[1]) else "" for path in paths}


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _exists(room: str) -> bool:
    return (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").exists()


@pytest.mark.parametrize("module", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward(module):
    room = module.relative_to(PACKAGE).parts[0].removesuffix(".py")
    upward = imported_rooms(module) - BELOW[room] - {room}
    assert not upward, f"{module.relative_to(PACKAGE)} imports {', '.join(sorted(upward))}, which is not below {room!r}"
