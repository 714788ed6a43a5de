"""Tasks whose answers this machine cannot judge are left out, and counted."""

from __future__ import annotations

from pathlib import Path

import pytest

import preferred
from llamita import chat, checkpoints
from llamita.align import ifeval, reinforce


def test_a_task_that_nothing_here_can_judge_is_no_reward_of_nought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ifeval, "can_tell_languages", lambda: False)
    encoder = chat.Encoder(checkpoints.load_tokenizer(preferred.model(tmp_path / "model")))
    language, comma = "language:response_language", "punctuation:no_comma"
    given = [
        *preferred.tasks(0, 2, kind="ifeval", instruction_id_list=[language], kwargs=[{"language": "de"}]),
        *preferred.tasks(2, 4, kind="ifeval", instruction_id_list=[language, comma], kwargs=[{"language": "de"}, {}]),
        *preferred.tasks(4, 5, kind="number", answer=3),
        *preferred.tasks(5, 6),
    ]
    found = reinforce.encode(given, encoder, most=60, name="train.tasks.jsonl")
    assert [task.id for task in found.tasks] == ["task-2", "task-3", "task-4", "task-5"]
    assert found.unjudged == 2
    with pytest.raises(ValueError, match=r"none of the 2 tasks of train.tasks.jsonl: telling languages needs langdet"):
        reinforce.encode(given[:2], encoder, most=60, name="train.tasks.jsonl")
    ranked = reinforce.encode(given, encoder, most=60, name="train.tasks.jsonl", are_verified=False)
    assert (len(ranked), ranked.unjudged) == (6, 0)
    monkeypatch.setattr(ifeval, "can_tell_languages", lambda: True)
    assert len(reinforce.encode(given, encoder, most=60, name="train.tasks.jsonl")) == 6
