"""The plan of the house: what may import what, and where code may lie."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]

VERBS = {"train", "validate", "ingest", "export"}
MAY_NOT_IMPORT = {
    "pipeline": VERBS | {"model", "training", "evaluation", "benchmarks"},
    "model": VERBS | {"pipeline", "training", "evaluation", "benchmarks"},
    "evaluation": VERBS | {"pipeline", "model", "benchmarks"},
    "training": VERBS | {"benchmarks"},
}


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Returns the dotted modules that a file of this repository imports by absolute name, at any depth of its code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None
            found.add(node.module)
    return found


def holds_code(folder: Path) -> bool:
    return any(folder.glob("*.py"))


@pytest.mark.parametrize("room", MAY_NOT_IMPORT)
def test_data_flows_one_way(room: str) -> None:
    for path in modules(room):
        rooms = {name.partition(".")[0] for name in imported(path)}
        assert not rooms & MAY_NOT_IMPORT[room], path.relative_to(ROOT)


@pytest.mark.parametrize("room", [name for name in SETUP["packages"] if "." not in name])
def test_imports_inside_a_package_are_relative(room: str) -> None:
    for path in modules(room):
        assert room not in {name.partition(".")[0] for name in imported(path)}, path.relative_to(ROOT)


def test_the_walk_sees_every_kind_of_import(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("from .a import b\nimport c.d as e\n\ndef f():\n    from g.h import i\n    import j\n")
    assert imported(path) == {"c.d", "g.h", "j"}


def test_datasets_holds_recipes_only() -> None:
    assert list((ROOT / "datasets").rglob("*.py")) == []


def test_tests_are_flat_and_no_package() -> None:
    assert [path for path in (ROOT / "tests").rglob("*.py") if path.parent.name != "tests"] == []
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_what_is_installed_is_what_is_there() -> None:
    rooms = [folder for folder in ROOT.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    rooms = [room for room in rooms if room.name not in ("tests", "data", "runs", "build")]
    folders = [
        folder for room in rooms for folder in (room, *room.rglob("*")) if folder.is_dir() and holds_code(folder)
    ]
    assert sorted(SETUP["packages"]) == sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)
    assert all((folder / "__init__.py").exists() for folder in folders)
    assert sorted(SETUP["py-modules"]) == sorted(path.stem for path in ROOT.glob("*.py"))
