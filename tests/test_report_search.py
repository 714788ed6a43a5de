"""A search on the page: its candidates in order, its front, and names that are text."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from llamita import runs, storage
from llamita.report import gather, page, searches
from llamita.report.stages import read_stage

ROWS: list[tuple[str, float, float, float | None]] = [
    ("l2-a", 90.0, 3.0, 2.5),
    ("l3-b", 95.0, 2.9, 2.6),
    ("l4-<b>c", 80.0, 3.5, None),
]


def search_run(path: Path, *, finish: bool = True, rows: Any = ROWS) -> Path:
    """A directory as ``recipes/search.py`` leaves it."""
    settings = {"budget": {"parameters": 100.0, "latency_ms": 9.0, "bytes": None}}
    with runs.start(path, "search", settings, runs.RunConfig()) as run:
        lines = [
            {
                "name": name,
                "costs": {"parameters": parameters, "bytes": 2 * parameters, "latency_ms": parameters / 10},
                "predicted": 4.0,
                "loss": loss,
                "recovered": recovered,
                "shape": {},
            }
            for name, parameters, loss, recovered in rows
        ]
        (path / searches.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
        storage.write_json(path / "whole.json", {"loss": 2.25})
        if finish:
            run.finish([searches.FILE])
    return path


def test_candidates_stand_on_the_page_by_their_recovered_loss(tmp_path: Path) -> None:
    report = gather.gather({"search": search_run(tmp_path / "search")})
    (tmp_path / "out").mkdir()
    files = page.write(report, tmp_path / "out")
    assert "plots/search-search.png" in files
    text = (tmp_path / "out/report.html").read_text()
    section = text[text.index('<section id="search">') : text.index('<section id="lineage">')]
    rows = re.findall(r"<tr[^>]*><td>(.*?)</td>(.*?)</tr>", section)
    assert [name for name, _ in rows] == ["l2-a", "l3-b", "l4-&lt;b&gt;c"]
    assert re.findall(r"<td>(.*?)</td>", rows[0][1]) == ["90", "9", "4.000", "3.000", "2.500"]
    assert re.findall(r"<td>(.*?)</td>", rows[2][1])[-1] == "–"
    assert section.count('class="main"') == 1
    assert "where the whole model has 2.250" in section
    assert "<b>c" not in text
    svg = section[section.index("<svg") : section.index("</svg>")]
    for label in ("parameters", "milliseconds per batch of answers", "winner", "cut", "distilled for a short while"):
        assert f">{label}<" in svg


def test_a_search_that_still_cuts_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    rows = [("l2-a", 90.0, 3.0, None), ("l3-b", 95.0, None, None)]
    stage = read_stage("s", search_run(tmp_path / "search", finish=False, rows=rows))
    found = searches.read(stage)
    assert found is not None
    assert [candidate.name for candidate in found.candidates] == ["l2-a"]
    assert found.axes == ["parameters", "latency_ms"]
    report = gather.gather({"s": tmp_path / "search"})
    (tmp_path / "out").mkdir()
    page.write(report, tmp_path / "out")
    assert "distilled for a short while" not in (tmp_path / "out/report.html").read_text()


def test_a_damaged_search_is_named(tmp_path: Path) -> None:
    path = search_run(tmp_path / "search")
    (path / searches.FILE).write_text('{"name": "half')
    with pytest.raises(ValueError, match=r"candidates\.jsonl is damaged"):
        searches.read(read_stage("s", path))


def test_the_front_is_what_no_other_point_beats() -> None:
    dice = random.Random(0)
    points = [(float(dice.randrange(12)), float(dice.randrange(12))) for _ in range(60)]

    def beaten(point: tuple[float, float]) -> bool:
        return any(o != point and o[0] <= point[0] and o[1] <= point[1] for o in points)

    front = searches.front(points)
    assert front == sorted({point for point in points if not beaten(point)})
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(front))
