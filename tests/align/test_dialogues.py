"""Rows are right or refused; nothing that a row says decides on which side of the split it lands but its prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llamita.align import dialogues
from llamita.align.dialogues import Dialogue, DialogueData, Pair, Refused, Task

USER = {"role": "user", "content": "one?"}
SAID = {"role": "assistant", "content": "two."}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "a list that is not empty"),
        ("text", "a list that is not empty"),
        (
            [{"role": "narrator", "content": "x"}],
            "one of system, user, assistant, ipython, got 'narrator'",
        ),
        ([USER, {"role": "assistant", "content": " \n"}], "the message of the assistant is empty"),
        ([USER, {"role": "assistant"}], "the message of the assistant must be text, got NoneType"),
        ([USER], "no message of the assistant"),
        ([USER, {"role": "system", "content": "late"}, SAID], "a system message must come first"),
        ([USER, {**SAID, "tool_calls": [{"name": "f"}]}], "either content or tool_calls"),
        ([USER, {"role": "assistant", "tool_calls": [{"arguments": {}}]}], "a tool call needs a name"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": "f"}]}], "a tool call needs a name"),
        ([USER, {"role": "assistant", "tool_calls": 5}], "tool_calls must be a list, got '5'"),
        ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}], "a mapping of arguments"),
        (["text"], "a message must have role and content"),
        ([USER, {**SAID, "content": "\ud83d"}], "the message of the assistant holds half a character"),
    ],
)
def test_a_dialogue_that_cannot_be_learnt_from_is_refused(messages: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        dialogues.parse_dialogue({"messages": messages}, "x")


def test_what_is_said_behind_the_last_answer_is_cut_off() -> None:
    thanks, result = {"role": "user", "content": "thanks"}, {"role": "tool", "content": "3"}
    for rest in ([thanks], [result, thanks]):
        row = {"messages": [USER, SAID, USER, SAID, *rest]}
        assert dialogues.parse_dialogue(row, "x").messages == (USER, SAID, USER, SAID)


def test_tool_calls_are_written_as_llama_writes_them() -> None:
    calls = [
        {"type": "function", "function": {"name": "f", "arguments": '{"a": "x\'y", "n": null}'}},
        {"name": "g", "arguments": {"b": 1, "on": True}},
    ]
    row = {"messages": [USER, {"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": "3"}, SAID]}
    said, result, _ = dialogues.parse_dialogue(row, "x").messages[1:]
    assert said == {"role": "assistant", "content": '[f(a="x\'y", n=None), g(b=1, on=True)]'}
    assert result["role"] == "ipython"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rejected": [{**SAID, "content": "two. "}]}, "chosen and rejected are equal: 'two.'"),
        ({"chosen": []}, "chosen: messages must be a list that is not empty"),
        ({"chosen": [USER]}, "chosen: the last message must be of the assistant, it is of the user"),
        ({"chosen": [USER, SAID]}, "chosen must be one message, got 2"),
        ({"prompt": None}, "messages must be a list"),
        ({"prompt": [USER, SAID]}, "the prompt of a pair must end with a user or a tool, it ends with the assistant"),
        (
            {"prompt": [{"role": "system", "content": "Be kind."}]},
            "must end with a user or a tool, it ends with the sys",
        ),
    ],
)
def test_a_pair_that_prefers_nothing_is_refused(changes: dict[str, Any], reason: str) -> None:
    row = {"prompt": [USER], "chosen": [SAID], "rejected": [{**SAID, "content": "no"}], **changes}
    with pytest.raises(ValueError, match=reason):
        dialogues.parse_pair(row, "x")


def test_a_task_with_an_answer_or_without_a_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="must not end with the assistant"):
        dialogues.parse_task({"prompt": [USER, SAID]}, "x")
    with pytest.raises(ValueError, match="check must be a mapping with a kind"):
        dialogues.parse_task({"prompt": [USER], "check": {"answer": "2"}}, "x")


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    rows = {
        "dialogues": [Dialogue("a", (USER, SAID))],
        "pairs": [Pair("b", (USER,), SAID, {**SAID, "content": "три"})],
        "tasks": [Task("c", (USER,), {"kind": "number", "answer": "2"})],
    }
    files = dialogues.write_all(tmp_path, {"train": rows, "validation": {"dialogues": []}}, {"seed": 1})
    data = DialogueData.open(tmp_path)
    assert files == ["train.dialogues.jsonl", "train.pairs.jsonl", "train.tasks.jsonl", "dialogues.json"]
    assert (data.dialogues("train"), data.pairs("train"), data.tasks("train")) == tuple(rows.values())
    assert data.dialogues("validation") == []
    with pytest.raises(ValueError, match=r"has no validation.dialogues.jsonl; it has 1 in train.dialogues.jsonl"):
        data.need("validation", "dialogues")
    with pytest.raises(ValueError, match=r"has no validation.pairs.jsonl; .* \(validation_pairs=0 does without\)"):
        data.need("validation", "pairs", without="validation_pairs=0")


def test_a_changed_row_is_noticed(tmp_path: Path) -> None:
    dialogues.write_all(tmp_path, {"train": {"dialogues": [Dialogue("a", (USER, SAID))]}}, {})
    file = tmp_path / "train.dialogues.jsonl"
    file.write_text(file.read_text().replace("two", "six"))
    with pytest.raises(ValueError, match=r"train.dialogues.jsonl is not what was written"):
        DialogueData.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no dialogues.json"),
        ({"format": 9, "files": {}}, "has format 9, this program reads 1"),
        ({"format": 1, "files": {"../x": {}}}, "names '../x', which is not there"),
    ],
)
def test_another_directory_is_refused(content: Any, reason: str, tmp_path: Path) -> None:
    if content:
        (tmp_path / "dialogues.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=reason):
        DialogueData.open(tmp_path)


def test_the_split_depends_on_the_prompt_alone_and_takes_its_share() -> None:
    prompts = [({"role": "user", "content": f"question {n}"},) for n in range(2000)]
    held = [dialogues.is_held_out(prompt, share=0.2, seed=3) for prompt in prompts]
    assert 330 < sum(held) < 470  # 400 expected, a standard deviation of 18
    pair = Pair("x", prompts[0], SAID, USER)
    longer = Dialogue("y", (*prompts[0], SAID, USER, SAID))
    assert dialogues.prompt_of(pair) == longer.prompt == prompts[0]


def test_what_the_system_says_changes_no_side() -> None:
    sides = set()
    for number in range(40):
        asked = {"role": "user", "content": f"question {number}"}
        told = [[], [{"role": "system", "content": "Be brief."}], [{"role": "system", "content": "Be kind."}]]
        sides.add(tuple(dialogues.is_held_out([*before, asked], share=0.5, seed=0) for before in told))
    assert sides == {(False, False, False), (True, True, True)}
    alone = [
        dialogues.is_held_out([{"role": "system", "content": f"prompt {n}"}], share=0.5, seed=0) for n in range(40)
    ]
    assert len(set(alone)) == 2


def test_white_space_that_no_model_reads_changes_no_side() -> None:
    for number in range(40):
        plain, padded = ({"role": "user", "content": text} for text in (f"question {number}", f" question {number}\n"))
        assert dialogues.is_held_out([plain], share=0.5, seed=0) == dialogues.is_held_out([padded], share=0.5, seed=0)


def test_too_many_refused_rows_refuse_the_source_with_their_places() -> None:
    refused = Refused(0.1, "share")
    refused.add("file:3", "chosen and rejected are equal: 'x'")
    refused.check("sources.a", 9)
    with pytest.raises(ValueError, match=r"a: 1 of 9 rows were refused, share=0.1 allows fewer:\n  file:3: chosen and"):
        refused.check("sources.a", 8)
    with pytest.raises(ValueError, match="it has no rows"):
        Refused().check("sources.b", 0)
    assert refused.counts == {"chosen and rejected are equal": 1}
