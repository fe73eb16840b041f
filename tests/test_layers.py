"""The house: imports run downward only, and no modules import each other in a circle, types included."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "torch_frame"
MODULES = sorted(PACKAGE.rglob("*.py"))

# From the ground up. A room imports from the floors below; from its own floor only what BESIDE lists.
FLOORS = [
    {"errors", "types", "scalars", "progress", "_version", "_collision", "distributed", "signals"},
    {"training", "data", "metrics", "tracking", "checkpoint", "vision", "report", "bench"},
    {"hooks", "run"},
    {"trainer", "ddp_trainer", "accelerate_trainer"},
    {"__init__", "utils", "datasets", "lr_scheduler", "cli"},
]
BESIDE = {
    "signals": {"distributed"},
    "scalars": {"types"},
    "__init__": {"utils", "datasets", "lr_scheduler"},
    "bench": {"tracking"},
    "ddp_trainer": {"trainer"},
    "accelerate_trainer": {"trainer"},
    "cli": {"__init__"},
    "metrics": {"vision"},
}


def module_name(path: Path) -> str:
    """The dotted name below torch_frame; "" is torch_frame itself."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


NAMES = {module_name(path) for path in MODULES}


def imported_modules(path: Path) -> set[str]:
    """The modules of torch_frame that a module imports, in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {_imported(node.module or "", alias.name) for alias in node.names}
    inside = {name.removeprefix("torch_frame").removeprefix(".") for name in found if _is_ours(name)}
    return inside - {module_name(path)}


def _imported(module: str, name: str) -> str:
    """`from module import name`: the module `module.name` if there is one, else `module`."""
    longer = f"{module}.{name}"
    return longer if longer.removeprefix("torch_frame.") in NAMES else module


def _is_ours(name: str) -> bool:
    return name == "torch_frame" or name.startswith("torch_frame.")


def room_of(module: str) -> str:
    return module.split(".")[0] or "__init__"


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def ids(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_imports_run_downward(path: Path) -> None:
    room = room_of(module_name(path))
    below = set().union(*FLOORS[: floor_of(room)]) | {room} | BESIDE.get(room, set())
    upward = {room_of(module) for module in imported_modules(path)} - below
    assert not upward, f"{ids(path)} imports {', '.join(sorted(upward))}, which is not below {room!r}"


def test_the_distributed_room_imports_torch_only() -> None:
    for path in (PACKAGE / "distributed").glob("*.py"):
        assert {room_of(module) for module in imported_modules(path)} <= {"distributed"}


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module_name(path): imported_modules(path) for path in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")
