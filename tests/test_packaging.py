"""What is shipped: the packages, the dependencies and their pins."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
DISTRIBUTION = {"yaml": "pyyaml", "lm_eval": "lm-eval", "hydra": "hydra-core"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required() -> dict[str, str]:
    """Every requirement in pyproject.toml by its distribution name."""
    project = PROJECT["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return {normal(re.split(r"[<>=!\[ ]", line)[0]): line for line in [*project["dependencies"], *extras]}


def pinned() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_package_list_is_the_folders() -> None:
    folders = {p.parent.relative_to(REPOSITORY / "src") for p in (REPOSITORY / "src").rglob("__init__.py")}
    packages = {".".join(["llamita", *folder.parts]) for folder in folders}
    assert packages == set(PROJECT["tool"]["setuptools"]["packages"])


def test_what_is_no_module_is_shipped_too() -> None:
    """A template that is not package data is there in a checkout, and missing where a wheel is installed."""
    data = PROJECT["tool"]["setuptools"]["package-data"]
    for path in (REPOSITORY / "src").rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            package = ".".join(["llamita", *path.parent.relative_to(REPOSITORY / "src").parts])
            assert any(path.match(pattern) for pattern in data.get(package, [])), f"{path} is in no wheel"


def test_type_checkers_find_the_package_under_its_name() -> None:
    link = REPOSITORY / "typings" / "llamita"
    assert link.is_symlink()
    assert link.resolve() == REPOSITORY / "src"


def test_every_dependency_has_a_floor_and_a_pin() -> None:
    pins = {normal(name) for name in pinned()}
    for name, line in required().items():
        assert ">=" in line, f"{line} has no floor"
        assert name in pins, f"{name} is not pinned in constraints.txt"


def test_every_import_is_a_dependency() -> None:
    named = set(required())
    for path in [*(REPOSITORY / "src").rglob("*.py"), *(REPOSITORY / "recipes").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Import(names=names):
                    roots = {alias.name.split(".")[0] for alias in names}
                case ast.ImportFrom(module=str(module), level=0):
                    roots = {module.split(".")[0]}
                case _:
                    continue
            for root in roots - set(sys.stdlib_module_names) - {"llamita"}:
                if not (REPOSITORY / "recipes" / f"{root}.py").is_file():
                    assert normal(DISTRIBUTION.get(root, root)) in named, f"{path} imports {root}"


PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_finished(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"^(BENCHMARK|TODO)|<!--", text, re.MULTILINE), f"{page.name} has a place to fill in"
