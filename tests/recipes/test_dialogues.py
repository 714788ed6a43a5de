"""The recipe `dialogues`: sources in, checked and split rows out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llamita import runs
from llamita.align.dialogues import SPLITS, DialogueData, prompt_of
from llamita.align.python_stdlib import Demand
from llamita.align.sources import Kind, Side, SourceConfig


@pytest.fixture
def module(recipe: Callable[[str], ModuleType]) -> ModuleType:
    return recipe("dialogues")


def write(path: Path, count: int, **more: Any) -> SourceConfig:
    rows = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more.pop("and_also", [])]))
    return SourceConfig(path=str(path), **more)


def test_rows_are_split_by_prompt_counted_and_published(module: ModuleType, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", 100, and_also=[{"messages": []}])
    again = write(tmp_path / "b.jsonl", 110, max_characters=4)
    out = tmp_path / "out"
    module.run(module.Dialogues(sources={"a": source, "b": again}, held_out=0.2, out=out))
    data = DialogueData.open(out)
    train, held = data.dialogues("train"), data.dialogues("validation")
    assert len(train) + len(held) == 100
    assert 8 < len(held) < 34
    counts = data.manifest["sources"]
    assert counts["a"] == {
        "dialogues": 100,
        "refused": 1,
        "refused_for": {"messages must be a list that is not empty": 1},
    }
    assert counts["b"] == {"repeated": 10, "too_long": 100, "refused": 0, "refused_for": {}}
    assert runs.read_done(out)["summary"]["train/dialogues"] == len(train)
    # The other seed splits otherwise; the same seed splits a longer list in the same way.
    module.run(module.Dialogues(sources={"a": write(tmp_path / "c.jsonl", 150)}, held_out=0.2, out=tmp_path / "long"))
    longer = {row.messages[0]["content"] for row in DialogueData.open(tmp_path / "long").dialogues("validation")}
    assert {row.messages[0]["content"] for row in held} <= longer


def test_dialogues_that_went_on_behind_the_last_answer_are_counted(module: ModuleType, tmp_path: Path) -> None:
    asked, said = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    source = write(tmp_path / "a.jsonl", 3, and_also=[{"messages": [asked, said, asked]}])
    module.run(module.Dialogues(sources={"a": source}, out=tmp_path / "out"))
    data = DialogueData.open(tmp_path / "out")
    assert data.manifest["sources"]["a"] == {"dialogues": 4, "shortened": 1, "refused": 0, "refused_for": {}}
    assert {len(row.messages) for split in SPLITS for row in data.dialogues(split)} == {2}


def test_a_side_a_kind_and_a_number_can_be_asked_for(module: ModuleType, tmp_path: Path) -> None:
    row = {"question": "How many?", "answer": "#### 2"}
    (tmp_path / "g.jsonl").write_text("".join(json.dumps({**row, "question": f"{n}?"}) + "\n" for n in range(9)))
    source = SourceConfig(
        kind=Kind.gsm8k, path=str(tmp_path / "g.jsonl"), side=Side.validation, take=["tasks"], max_rows=4
    )
    module.run(module.Dialogues(sources={"g": source}, out=tmp_path / "out"))
    data = DialogueData.open(tmp_path / "out")
    assert {name: entry["rows"] for name, entry in data.manifest["files"].items()} == {"validation.tasks.jsonl": 4}


def test_no_prompt_that_is_held_out_in_the_demo_is_trained_on(module: ModuleType, tmp_path: Path) -> None:
    source = SourceConfig(kind=Kind.python_stdlib, demand=Demand.parses, max_characters=400, max_rows=3000)
    module.run(module.Dialogues(sources={"python": source}, held_out=0.1, out=tmp_path / "out"))
    data = DialogueData.open(tmp_path / "out")
    train, held = (
        {prompt_of(row)[0]["content"] for row in [*data.dialogues(split), *data.tasks(split)]} for split in SPLITS
    )
    assert len(held) > 200
    assert not train & held


def test_a_stage_that_is_read_is_a_parent(module: ModuleType, tmp_path: Path) -> None:
    module.run(module.Dialogues(sources={"a": write(tmp_path / "a.jsonl", 20)}, held_out=0.3, out=tmp_path / "one"))
    stage = SourceConfig(kind=Kind.stage, path=str(tmp_path / "one"))
    module.run(module.Dialogues(sources={"one": stage}, out=tmp_path / "two"))
    one, two = (DialogueData.open(tmp_path / name) for name in ("one", "two"))
    assert two.dialogues("validation") == one.dialogues("validation")
    assert runs.read_done(tmp_path / "two")["parents"] == {"one": one.content_hash}


def test_a_source_with_too_many_wrong_rows_publishes_nothing(module: ModuleType, tmp_path: Path) -> None:
    wrong = [{"messages": [{"role": "poet", "content": "x"}]}] * 3
    source = write(tmp_path / "a.jsonl", 10, and_also=wrong)
    with pytest.raises(ValueError, match=r"sources.a: 3 of 13 rows were.*\n  a, a.jsonl:11: role must be"):
        module.run(module.Dialogues(sources={"a": source}, out=tmp_path / "out"))
    assert not (tmp_path / "out" / "DONE.json").exists()
    assert not (tmp_path / "out" / "dialogues.json").exists()


def asked(*replies: Any) -> dict[str, Any]:
    return {"prompt": {"role": "prompter", "text": "q", "replies": list(replies)}}


RIGHT: dict[Kind, dict[str, Any]] = {
    Kind.messages: {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    Kind.gsm8k: {"question": "q", "answer": "#### 2"},
    Kind.ifeval: {"prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    Kind.tasks: {"prompt": "p", "check": {"kind": "length", "min": 1}},
    Kind.trees: asked({"role": "assistant", "text": "a"}),
}


@pytest.mark.parametrize(
    ("kind", "wrong", "reason"),
    [
        (Kind.messages, {"messages": [{"role": "assistant", "tool_calls": 5}]}, "tool_calls must be a list, got '5'"),
        (Kind.gsm8k, {"answer": "2"}, "the answer has no #### before its number"),
        (Kind.ifeval, {"kwargs": ["{}"]}, "check ifeval: an instruction is an id and a mapping"),
        (Kind.ifeval, {"kwargs": 5}, "check ifeval: kwargs must hold one mapping for each"),
        (Kind.tasks, {"check": {"kind": "length", "min": 1, "unit": []}}, "check length: unit must be one of words"),
        (Kind.trees, asked("x"), "replies must be a list of messages"),
    ],
)
def test_a_row_of_another_form_is_refused_and_the_rest_is_read(
    module: ModuleType, kind: Kind, wrong: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "x"
    path.write_text("".join(json.dumps(row) + "\n" for row in ({**RIGHT[kind], **wrong}, RIGHT[kind])))
    sources = {"s": SourceConfig(kind=kind, path=str(path))}
    module.run(module.Dialogues(sources=sources, max_refused=0.5, out=tmp_path / "out"))
    data = DialogueData.open(tmp_path / "out")
    assert data.manifest["sources"]["s"]["refused"] == 1
    assert sum(entry["rows"] for entry in data.manifest["files"].values()) >= 1
    with pytest.raises(ValueError, match=rf"s: 1 of \d rows were refused.*\n  s, x:1: {reason}"):
        module.run(module.Dialogues(sources=sources, max_refused=0.1, out=tmp_path / "again"))


@pytest.mark.parametrize(
    ("settings", "reason"), [({}, "there are no sources"), ({"held_out": 1.0}, "held_out must be in 0..1")]
)
def test_settings_that_cannot_be_meant(module: ModuleType, settings: dict[str, Any], reason: str) -> None:
    given = {"sources": {"p": SourceConfig(kind=Kind.python_stdlib)}} if settings else {}
    with pytest.raises(ValueError, match=reason):
        module.Dialogues(**given, **settings, out=Path("x"))


def test_a_tree_and_its_flat_export_are_on_the_same_side(module: ModuleType, tmp_path: Path) -> None:
    trees, flat = [], []
    for number in range(60):
        said = {"role": "assistant", "text": f"a{number}", "rank": 0, "replies": []}
        root = {"role": "prompter", "text": f"q{number}", "replies": [said, {**said, "text": "no", "rank": 1}]}
        trees.append({"message_tree_id": f"tree {number}", "prompt": root})
        asked = {"role": "user", "content": f"q{number}"}
        flat.append({"messages": [asked, {"role": "assistant", "content": f"other {number}"}]})
    for name, rows in (("trees", trees), ("flat", flat)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {
        "trees": SourceConfig(kind=Kind.trees, path=str(tmp_path / "trees")),
        "flat": SourceConfig(path=str(tmp_path / "flat")),
    }
    module.run(module.Dialogues(sources=sources, held_out=0.5, out=tmp_path / "out"))
    data = DialogueData.open(tmp_path / "out")
    train, held = (
        {prompt_of(row)[0]["content"] for row in [*data.dialogues(split), *data.pairs(split)]} for split in SPLITS
    )
    assert len(train) + len(held) == 60
    assert min(len(train), len(held)) > 10
