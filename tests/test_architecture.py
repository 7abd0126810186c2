"""The house: rooms that import only those above them, no circles, small folders and files, and only the command line
talks to people."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [p for folder in ("shadowkv", "evals", "cli") for p in sorted((ROOT / folder).rglob("*.py"))]

# A room may import itself and the rooms above it; rooms of one line know nothing of each other. A folder that is not
# here belongs to the room that it is in.
ROOMS = (
    ("shadowkv.common",),
    ("shadowkv.tensors",),
    ("shadowkv.anatomy",),
    ("shadowkv.kernels",),
    ("shadowkv.contract",),
    ("shadowkv.methods",),
    ("shadowkv.engine",),
    ("shadowkv.models",),
    ("shadowkv.planning",),
    ("shadowkv",),
    ("evals.common",),
    ("evals.calibration",),
    ("evals.runs",),
    ("evals.tables",),
    ("evals.niah", "evals.ruler", "evals.longbench", "evals.fidelity"),
    ("evals.bench",),
    ("evals.reporting",),
    ("evals.compare", "evals.exports", "evals.paper"),
    ("evals",),
    ("cli.shared",),
    ("cli.eval", "cli.bench", "cli.models", "cli.reports"),
    ("cli",),
)
LEVELS = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
MOST_FILES, MOST_LINES = 12, 300


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def room_of(module):
    """The innermost room that a module is in."""
    parts = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
    return next(room for end in range(len(parts), 0, -1) if (room := ".".join(parts[:end])) in LEVELS)


@cache
def imports(module):
    """Modules of this project that one imports, in functions and under TYPE_CHECKING too; and foreign packages."""
    own, foreign = set(), set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports by its place"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in names]
        else:
            continue
        own |= {name for name in names if name in MODULES}
        foreign |= {name.partition(".")[0] for name in names if name not in MODULES}
    return frozenset(own - {module}), frozenset(foreign)


@pytest.mark.parametrize("module", MODULES)
def test_rooms_import_those_above_them_and_only_the_cli_prints(module):
    own, foreign = imports(module)
    room = room_of(module)
    for used in own:
        other = room_of(used)
        assert other == room or LEVELS[other] < LEVELS[room], f"{room} may not import {used}"
    assert not foreign & {"cli", "evals", "shadowkv"}, "a name that is not there"
    if not module.startswith("cli"):
        assert not foreign & {"typer", "rich"}
        tree = ast.parse(MODULES[module].read_text())
        calls = [n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        assert "print" not in calls


def test_no_module_imports_itself_by_way_of_others():
    # The public names of `shadowkv` are looked up when they are asked for; below it, nothing asks.
    graph = {module: imports(module)[0] for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(reversed(error.args[1]))}")


def test_folders_and_files_stay_small():
    for folder in {path.parent for path in FILES}:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= MOST_FILES, f"{folder} holds {len(files)} files"
    for path in FILES:
        lines = len(path.read_text().splitlines())
        assert lines <= MOST_LINES, f"{path} has {lines} lines"


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_folder_says_what_lives_in_it_and_what_must_not(folder):
    said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert said is not None
    assert "Not here: " in said


def test_nothing_runs_at_import():
    """Modules hold definitions, constants and docstrings; the console script's guard is the one exception."""
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Expr):
                call = node.value
                docstring = isinstance(call, ast.Constant)
                registers = path.parent.name == "cli" and path.name == "main.py"
                assert docstring or registers, f"{path}:{node.lineno}"


def test_the_public_names_are_there():
    import shadowkv

    for name in shadowkv.__all__:
        assert callable(getattr(shadowkv, name))
    with pytest.raises(AttributeError, match="no attribute 'Quest'"):
        shadowkv.Quest  # noqa: B018
