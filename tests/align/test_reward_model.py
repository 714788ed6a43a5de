"""A reward is what the stock model says at the last token, whatever stands beside it in the batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import assistants
from llamita import chat, checkpoints
from llamita.align.reward_model import RewardModel, least_where_unread

DIALOGUES = [
    (assistants.user("Hi"), "Hello"),
    (assistants.user("What is 3 + 4?"), "The answer is 7."),
    (assistants.user("What is 3 + 4?"), "No"),
    (({"role": "system", "content": "Be kind."}, *assistants.user("a b c")), "abc " * 9),
]
NAMES = [f"row {place}" for place in range(4)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return assistants.reward_model(tmp_path / "reward")


def test_rewards_are_those_of_the_stock_model_one_by_one(folder: Path) -> None:
    stock = AutoModelForSequenceClassification.from_pretrained(folder)
    encoder = chat.Encoder(checkpoints.load_tokenizer(folder))
    expected = [
        stock(torch.tensor([encoder.dialogue([*prompt, assistants.said(answer)]).ids])).logits.item()
        for prompt, answer in DIALOGUES
    ]
    for rows in (1, 3, 4):
        assert RewardModel.open(folder, batch_rows=rows).score(DIALOGUES, NAMES) == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.1


def test_a_reward_does_not_depend_on_the_arithmetic_of_who_asks(folder: Path) -> None:
    model = RewardModel.open(folder)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.score(DIALOGUES, NAMES)
    assert found == model.score(DIALOGUES, NAMES)


def test_a_reward_that_is_no_number_is_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"][:] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="the reward of row 0 is nan"):
        RewardModel.open(folder).score(DIALOGUES, NAMES)
    assert all(value != value for value in RewardModel.open(folder).score(DIALOGUES, NAMES, may_be_nan=True))


def test_an_answer_that_cannot_be_read_is_worth_the_least_and_ends_no_run(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(chat.TEMPLATE + "{# another #}")
    model, names = RewardModel.open(folder), [*NAMES, "spells"]
    said = [*DIALOGUES, (assistants.user("Hi"), f"It ends with {chat.TURN_END}.")]
    with pytest.raises(ValueError, match="spells: a message holds the special token"):
        model.score(said, names)
    found = least_where_unread(model.score(said, names, may_be_nan=True), names)
    assert found[:4] == model.score(DIALOGUES, NAMES)
    assert found[4] == min(found[:4])
    for values in ([float("nan")] * 2, [1.0, float("inf")]):
        with pytest.raises(ValueError, match=r"the reward of row . is"):
            least_where_unread(values, NAMES[:2])
    assert least_where_unread([], []) == []


def test_a_directory_that_is_no_reward_model_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a LlamaForSequenceClassification with one label"):
        RewardModel.open(assistants.assistant(tmp_path / "assistant"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(ValueError, match="with 2"):
        RewardModel.open(folder)
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(ValueError, match="never run"):
        RewardModel.open(folder)


def test_a_missing_head_is_not_filled_with_random_numbers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"score\.weight"):
        RewardModel.open(folder)


def test_a_dialogue_longer_than_the_model_is_named(folder: Path) -> None:
    model = RewardModel.open(folder)
    model._model.config.max_position_embeddings = 12
    with pytest.raises(ValueError, match=r"row 0: it has .* 12 positions"):
        model.score(DIALOGUES, NAMES)
