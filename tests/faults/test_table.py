"""The list of faults in the documentation is that of the tests, and every crash point of the source is used."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import table

from llamita import faults

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
DOCUMENT = REPOSITORY / "docs" / "faults.md"


def faults_with_tests() -> set[str]:
    """Faults that a test of this folder is named after."""
    texts = [path.read_text() for path in HERE.glob("test_*.py")]
    return {number.upper() for text in texts for number in re.findall(r"^def test_(f\d\d)_", text, re.MULTILINE)}


def test_every_fault_has_a_test_here_or_a_place_elsewhere_in_the_documentation() -> None:
    text = DOCUMENT.read_text()
    rows = set(re.findall(r"^\| (F\d\d) \|", text, re.MULTILINE))
    assert faults_with_tests() == set(table.FAULTS)
    assert rows | {"F28"} == {f"F{number:02d}" for number in range(1, 29)}
    elsewhere = text.partition("## Where the other faults are tested")[2]
    for file in set(re.findall(r"`(tests/[\w/.]+)`", elsewhere)):
        assert (REPOSITORY / file).exists(), f"docs/faults.md names {file}"
    assert (
        set(re.findall(r"^\| (F\d\d) \|", elsewhere, re.MULTILINE))
        == {f"F{number:02d}" for number in range(1, 29)} - faults_with_tests()
    )


def points_in_source() -> set[str]:
    files = [*(REPOSITORY / "src").rglob("*.py"), *(REPOSITORY / "recipes").glob("*.py")]
    return {name for file in files for name in re.findall(r'crash_point\("(\w+)"\)', file.read_text())}


def test_every_crash_point_is_in_the_list_and_used_by_a_test() -> None:
    assert points_in_source() == set(faults.CRASH_POINTS)
    tests = "\n".join(path.read_text() for path in (REPOSITORY / "tests").rglob("*.py") if path != Path(__file__))
    assert [name for name in faults.CRASH_POINTS if not re.search(rf'"{name}[":]', tests)] == []


def test_a_crash_point_that_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that names one would test nothing."""
    monkeypatch.setenv("LLAMITA_CRASH_AT", "before_renam:1")
    with pytest.raises(ValueError, match=r"must name one of .*before_rename.*, got 'before_renam'"):
        faults.crash_point("before_rename")


def test_the_table_tells_the_most_that_was_lost_and_names_what_failed() -> None:
    case = {"id": "F01", "ok": True, "what": "same", "steps_lost": 1, "checkpoints_lost": 0, "samples_wrong": 0}
    worse = {**case, "steps_lost": 3, "what": "other"}
    failed = {"id": "F02", "ok": False, "what": "failed", "test": "test_f02_x"}
    rows = table.rows(json.dumps(row) for row in (case, worse, failed))
    assert [(row["id"], row["cases"], row["ok"]) for row in rows] == [("F01", 2, True), ("F02", 1, False)]
    text = table.markdown(rows)
    assert "| F01 | " + table.FAULTS["F01"] + " | 2 | same; other | 3 |" in text
    assert "FAILED: test_f02_x" in text
    assert text.endswith("Published checkpoints lost: 0. Samples skipped or repeated: 0.")
