"""Each published form gives the rows that it holds."""

from __future__ import annotations

import ast
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from llamita.align import dialogues, python_stdlib, sources, verifiers
from llamita.align.forms import Raw
from llamita.align.sources import Kind, SourceConfig

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


def rows(path: Path, kind: Kind, content: Any, **settings: Any) -> list[Raw]:
    path.write_text("\n".join(json.dumps(row) for row in content) if isinstance(content, list) else content)
    return list(sources.read("s", SourceConfig(kind=kind, path=str(path), **settings)))


def parsed(raw: Raw) -> Any:
    return dialogues.PARSERS[raw.kind](raw.row, raw.place)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_messages_in_both_forms(tmp_path: Path) -> None:
    share_gpt = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    found = rows(tmp_path / "x.jsonl", Kind.messages, [{"messages": [user("a"), said("b")]}, share_gpt])
    assert [parsed(raw).messages for raw in found] == [(user("a"), said("b"))] * 2
    assert [raw.place for raw in found] == ["x.jsonl:1", "x.jsonl:2"]
    share_gpt["conversations"].insert(1, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a message must have role and content, got 'None'"):
        parsed(*rows(tmp_path / "x.jsonl", Kind.messages, [share_gpt]))


def test_instructions_give_a_dialogue_and_where_there_are_two_answers_a_pair(tmp_path: Path) -> None:
    row = {"instruction": "Do.", "input": "this", "output": "done", "chosen": "done", "rejected": "no"}
    dialogue, pair = rows(tmp_path / "x.json", Kind.instructions, json.dumps([row]))
    assert parsed(dialogue).messages == (user("Do.\n\nthis"), said("done"))
    assert (parsed(pair).chosen, parsed(pair).rejected) == (said("done"), said("no"))


def test_preferences_share_a_prompt_up_to_where_they_part(tmp_path: Path) -> None:
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c"
    texts = {"chosen": f"{start}\n\nAssistant: good", "rejected": f"{start}\n\nAssistant: bad\n\nbut long"}
    early = {"chosen": "\n\nHuman: a\n\nAssistant: x\n\nHuman: c\n\nAssistant: y", "rejected": texts["rejected"]}
    explicit = {"prompt": "a", "chosen": "x", "rejected": [said("y")]}
    repeated = {"prompt": "a", "chosen": [user("a"), said("x")], "rejected": [user("a"), said("y")]}
    found = [parsed(raw) for raw in rows(tmp_path / "x.jsonl", Kind.preferences, [texts, early, explicit, repeated])]
    assert found[0].prompt == (user("a"), said("b"), user("c"))
    assert (found[0].chosen, found[0].rejected) == (said("good"), said("bad\n\nbut long"))
    assert (found[1].prompt, found[1].chosen, found[1].rejected) == ((user("a"),), said("x"), said("b"))
    for pair in found[2:]:
        assert (pair.prompt, pair.chosen, pair.rejected) == ((user("a"),), said("x"), said("y"))
    other = {"prompt": "b", "chosen": [user("a"), said("x")], "rejected": [user("a"), said("y")]}
    with pytest.raises(ValueError, match="chosen must be one message, got 2"):
        parsed(*rows(tmp_path / "x.jsonl", Kind.preferences, [other]))


def test_trees_give_the_best_path_and_the_ranked_siblings(tmp_path: Path) -> None:
    def node(role: str, text: str, rank: int | None, *replies: Any) -> dict[str, Any]:
        return {"role": role, "text": text, "rank": rank, "replies": list(replies)}

    deep = node("prompter", "more?", 0, node("assistant", "yes", 0), node("assistant", "no", 1))
    best = node("assistant", "good", 0, deep)
    tree = node("prompter", "q", None, node("assistant", "poor", 2), best, node("assistant", "fair", 1))
    deleted = {**node("assistant", "gone", 0), "deleted": True}
    tied = {**node("assistant", "fine", 1), "replies": []}
    tree["replies"] += [deleted, tied]
    found = rows(tmp_path / "x.jsonl", Kind.trees, [{"message_tree_id": "t", "prompt": tree}])
    assert parsed(found[0]).messages == (user("q"), said("good"), user("more?"), said("yes"))
    pairs = [(raw.row["chosen"][0]["content"], raw.row["rejected"][0]["content"]) for raw in found[1:]]
    # Fair and fine are of one rank: neither is preferred.
    wanted = [("fair", "poor"), ("fine", "poor"), ("yes", "no")]
    assert pairs == [*(("good", other) for other in ("fair", "fine", "poor")), *wanted]
    # A flat export of the same tree has the prompt alone to be split by.
    assert {raw.group for raw in found} == {None}
    assert all(dialogues.prompt_of(parsed(raw)) == (user("q"),) for raw in found)


def test_a_worked_answer_loses_the_marks_of_its_calculator(tmp_path: Path) -> None:
    row = {"question": "How many?", "answer": "It is 48/2 = <<48/2=24>>24.\n#### 1,024"}
    dialogue, task = rows(tmp_path / "x.jsonl", Kind.gsm8k, [row])
    assert parsed(dialogue).messages[-1] == said("It is 48/2 = 24.\n#### 1,024")
    assert parsed(task).check == {"kind": "number", "answer": "1,024"}


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        (Kind.gsm8k, {"question": "q", "answer": "24"}, "the answer has no #### before its number"),
        (Kind.trees, {}, "the prompt of a tree must be a message, got NoneType"),
        (Kind.trees, {"prompt": {"role": "prompter", "text": "q", "replies": ["x"]}}, "replies must be a list of mess"),
        (
            Kind.trees,
            {"prompt": {"role": "prompter", "text": "q", "replies": [{"rank": "x"}]}},
            "must be a number, got",
        ),
    ],
)
def test_a_row_of_another_form_is_wrong_and_the_next_is_read(kind: Kind, row: Any, reason: str, tmp_path: Path) -> None:
    right = {
        Kind.gsm8k: {"question": "q", "answer": "#### 24"},
        Kind.trees: {"prompt": {"role": "prompter", "text": "q", "replies": [{"role": "assistant", "text": "a"}]}},
    }
    wrong, *found = rows(tmp_path / "x.jsonl", kind, [row, right[kind]], take=["dialogues"])
    assert wrong.place == "x.jsonl:1"
    assert reason in str(wrong.wrong)
    assert [(raw.place, raw.kind, raw.wrong) for raw in found] == [("x.jsonl:2", "dialogues", None)]


def test_arguments_that_are_none_are_left_to_the_check(tmp_path: Path) -> None:
    row = {"prompt": "p", "instruction_id_list": ["a"], "kwargs": ["{}"]}
    assert rows(tmp_path / "x.jsonl", Kind.ifeval, [row])[0].row["check"]["kwargs"] == ["{}"]
    row["kwargs"] = [None]
    assert rows(tmp_path / "x.jsonl", Kind.ifeval, [row])[0].row["check"]["kwargs"] == [{}]


def test_a_system_message_is_put_where_there_is_none(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "mine"}, user("a"), said("b")]
    content = [{"messages": own}, {"messages": own[1:]}]
    found = rows(tmp_path / "x.jsonl", Kind.messages, content, system="given")
    assert [parsed(raw).messages[0]["content"] for raw in found] == ["mine", "given"]


@pytest.fixture(scope="module")
def library() -> list[Raw]:
    return list(python_stdlib.functions())


def test_functions_of_the_library_without_docstring_parse_and_keep_their_name(library: list[Raw]) -> None:
    found = library[:60]
    assert [raw.kind for raw in found[:3]] == ["dialogues", "dialogues", "tasks"]
    for described, asked, task in zip(found[::3], found[1::3], found[2::3], strict=True):
        docstring, source = (parsed(raw).messages[-1]["content"] for raw in (described, asked))
        (function,) = ast.parse(source).body
        assert isinstance(function, ast.FunctionDef)
        assert function.name == task.row["check"]["function"]
        assert docstring in task.row["prompt"][0]["content"]
        assert docstring not in described.row["messages"][0]["content"] or docstring in source
        assert described.group == asked.group == task.group


def test_every_function_of_the_library_earns_the_whole_reward_of_its_own_task(library: list[Raw]) -> None:
    for asked, task in zip(library[1::3], library[2::3], strict=True):
        assert verifiers.check(task.row["check"], asked.row["messages"][-1]["content"]) == 1, task.place


def test_functions_that_share_a_prompt_are_of_one_group(library: list[Raw]) -> None:
    groups: dict[str, set[str | None]] = {}
    for raw in library:
        prompt = (raw.row.get("prompt") or raw.row["messages"])[0]["content"]
        groups.setdefault(prompt, set()).add(raw.group)
    assert all(len(found) == 1 for found in groups.values())
    # Few functions are tied, and never many to each other.
    assert len({raw.group for raw in library}) > 0.9 * len(library) / 3


def test_a_stage_keeps_its_splits(tmp_path: Path) -> None:
    item = dialogues.Dialogue("a", (user("a"), said("b")))
    dialogues.write_all(tmp_path, {"train": {"dialogues": [item]}, "validation": {"dialogues": [item]}}, {})
    found = list(sources.read("s", SourceConfig(kind=Kind.stage, path=str(tmp_path))))
    assert [raw.split for raw in found] == ["train", "validation"]


def test_a_saved_data_set_is_read_by_its_form(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"question": "q", "answer": "#### 2"}]).save_to_disk(str(tmp_path))
    found = list(sources.read("s", SourceConfig(kind=Kind.datasets, path=str(tmp_path), form=Kind.gsm8k)))
    assert [raw.kind for raw in found] == ["dialogues", "tasks"]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_damage_is_named(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"x.jsonl{suffix}"
    file.write_bytes(gzip.compress(b'{"messages": []}\n' * 99)[:-30] if suffix else b'{"messages": []}\n{"mess')
    with pytest.raises(ValueError, match=r"x.jsonl.* is not a list or lines of JSON objects"):
        list(sources.read("s", SourceConfig(path=str(file))))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "sources.s.path must be given: kind=messages"),
        ({"path": "nowhere.jsonl"}, "sources.s.path=nowhere.jsonl does not exist"),
        ({"path": ".", "take": ["prompts"]}, "no kind of row is called 'prompts'"),
        ({"path": ".", "max_rows": 0}, "sources.s.max_rows must be at least 1, got 0"),
        ({"path": "a/b", "kind": Kind.datasets, "form": Kind.trees}, "sources.s.form=trees"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SourceConfig(**settings).check("s")


@pytest.mark.skipif(not REAL.is_dir(), reason="shared/data is not here")
@pytest.mark.parametrize(
    ("path", "kind", "counts"),
    [
        ("instructions/instruction-data-with-preference.json", Kind.instructions, {"dialogues": 1100, "pairs": 1094}),
        ("conversations/en_100_tree.jsonl", Kind.trees, {"dialogues": 100, "pairs": 754}),
        ("preferences/harmless-base-test.jsonl.gz", Kind.preferences, {"pairs": 2308}),
        ("gsm8k/test.jsonl", Kind.gsm8k, {"dialogues": 1319, "tasks": 1319}),
        ("ifeval/en_input_data.jsonl", Kind.ifeval, {"tasks": 541}),
    ],
)
def test_the_real_files_are_read_whole(path: str, kind: Kind, counts: dict[str, int]) -> None:
    """Six pairs of the instructions are equal; four answers of the preferences are empty."""
    found: dict[str, int] = {}
    for raw in sources.read("s", SourceConfig(kind=kind, path=str(REAL / path))):
        try:
            parsed(raw)
        except ValueError:
            continue
        found[raw.kind] = found.get(raw.kind, 0) + 1
    assert found == counts
