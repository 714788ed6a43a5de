"""A block is whole and of these inputs, or it is made again."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamita import runs
from llamita.align import blocks
from llamita.align.blocks import Block, Store

ROWS = [{"id": "a", "text": "line \u2028 and \x85 end\n"}, {"id": "b", "text": "ü"}]


def test_blocks_cover_every_row_once() -> None:
    found = blocks.blocks("train", 7, 3)
    assert [(block.first, block.last) for block in found] == [(0, 3), (3, 6), (6, 7)]
    assert [block.name for block in found] == ["train-00000", "train-00001", "train-00002"]


def test_what_was_written_is_read_and_anything_else_is_missing(tmp_path: Path) -> None:
    block, other = blocks.blocks("train", 4, 2)
    store = Store(tmp_path / "answers", "inputs")
    assert store.missing([block, other]) == [block, other]
    store.write(block, ROWS)
    assert store.read(block) == ROWS
    assert store.missing([block, other]) == [other]
    assert Store(tmp_path / "answers", "other inputs").missing([block]) == [block]
    path = store.path(block)
    whole = path.read_bytes()
    for damaged in (whole[:-3], whole.replace(b'"b"', b'"c"'), b"", b"[]\n", b"\xff\n"):
        path.write_bytes(damaged)
        assert store.missing([block]) == [block]
        with pytest.raises(ValueError, match="not what was written"):
            store.read(block)


def test_a_process_waits_for_what_another_one_makes_again(tmp_path: Path) -> None:
    [block] = blocks.blocks("train", 2, 2)
    store = Store(tmp_path / "answers", "inputs")
    store.write(block, ROWS)
    store.path(block).write_bytes(store.path(block).read_bytes()[:-3])
    run: Any = SimpleNamespace(path=tmp_path, stop=SimpleNamespace(is_set=lambda: False))
    other = threading.Timer(0.3, store.write, (block, ROWS))
    other.start()
    store.wait([block], run)
    other.join()
    assert store.read(block) == ROWS
    store.path(block).unlink()
    run.stop.is_set = lambda: True
    with pytest.raises(runs.Stopped):
        store.wait([block], run)


def test_identity_depends_on_every_part() -> None:
    assert blocks.identity(a=1, b={"c": 2}) == blocks.identity(b={"c": 2}, a=1)
    assert blocks.identity(a=1, b={"c": 2}) != blocks.identity(a=1, b={"c": 3})


def test_a_number_that_json_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Store(tmp_path, "x").write(Block("train", 0, 0, 1), [{"reward": float("nan")}])
