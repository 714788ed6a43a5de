"""Who may import whom: the floors of the house, and what may not exist in it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = sorted((REPOSITORY / "src").rglob("*.py"))
RECIPES = sorted((REPOSITORY / "recipes").glob("*.py"))
FLOOR = dict.fromkeys(("shapes", "chat", "hub", "metrics", "precision", "stdlib", "locks", "redaction", "stops"), 0)
FLOOR |= {"faults": 1, "sinks": 1, "adapters": 1, "estimate": 1}
FLOOR |= {"directories": 2, "storage": 2, "manifests": 3, "runs": 3, "progress": 4, "checkpoints": 4, "harness": 6}
"""Every other module or package of ``src`` is on floor 5."""


def part(path: Path) -> str:
    """The module or package of ``src`` that a file belongs to."""
    first = path.relative_to(REPOSITORY / "src").parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                yield from (f"{module}.{alias.name}" for alias in names)


def calls(path: Path) -> Iterator[str]:
    """Dotted text of every function called in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_part_imports_itself_and_lower_floors_only(path: Path) -> None:
    here = part(path)
    for module in imports(path):
        if module.startswith("llamita."):
            there = module.split(".")[1]
            assert there == here or FLOOR.get(there, 5) < FLOOR.get(here, 5), f"{path} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_nothing_in_src_has_heard_of_hydra_or_of_a_recipe(path: Path) -> None:
    for module in imports(path):
        assert module.split(".")[0] not in {"hydra", "omegaconf", "recipes", "_main"}, f"{path} imports {module}"


@pytest.mark.parametrize("path", [*SOURCES, *RECIPES], ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_code_comes_from_data(path: Path) -> None:
    """No pickle, no eval, no remote code, no ``_target_``: settings and weights are data."""
    banned_calls = {
        "eval",
        "exec",
        "pickle.load",
        "pickle.loads",
        "torch.load",
        "hydra.utils.instantiate",
        "instantiate",
    }
    assert not banned_calls & set(calls(path))
    assert "trust_remote_code=True" not in path.read_text(encoding="utf-8")


def test_no_configuration_names_code() -> None:
    for path in (REPOSITORY / "configs").rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert "_target_" not in text, path
        assert "!!python" not in text, path


def test_the_house_has_no_junk_rooms() -> None:
    names = {path.stem for path in SOURCES} | {path.name for path in (REPOSITORY / "src").iterdir()}
    assert not names & {"utils", "common", "core", "helpers", "misc"}
    for forbidden in ("requirements.txt", "setup.py", "setup.cfg"):
        assert not (REPOSITORY / forbidden).exists()
    assert not list(REPOSITORY.glob("*.ipynb"))


@pytest.mark.parametrize("path", sorted((REPOSITORY / "src").rglob("__init__.py")), ids=str)
def test_packages_export_nothing_again(path: Path) -> None:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assert all(isinstance(node, ast.Expr) for node in body), f"{path} holds more than its docstring"


@pytest.mark.parametrize("path", [p for p in RECIPES if not p.name.startswith("_")], ids=lambda path: path.name)
def test_a_recipe_is_wiring(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 200
