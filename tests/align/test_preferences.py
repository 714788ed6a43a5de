"""Pairs as ids, what counts of them, and how far the preferred answer is ahead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import preferred
from llamita import chat, checkpoints
from llamita.align import preferences
from llamita.align.dialogues import Pair


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> chat.Encoder:
    folder = preferred.model(tmp_path_factory.mktemp("preferences") / "model")
    return chat.Encoder(checkpoints.load_tokenizer(folder))


def test_what_counts_is_what_the_answers_say_without_header_and_end_of_turn(encoder: chat.Encoder) -> None:
    pairs = preferred.pairs(0, 4)
    rows = preferences.encode(pairs, encoder, max_length=200, name="pairs")
    collate = preferences.Collator(encoder.borders.pad_id, tuple(encoder.stop_ids))
    columns = preferences.dataset(rows)
    batch = collate([columns[row] for row in range(4)])
    for row, pair in enumerate(pairs):
        for place, side in ((row, pair.chosen), (row + 4, pair.rejected)):
            ids = batch["input_ids"][place]
            whole = encoder.dialogue([*pair.prompt, side]).ids
            assert ids[batch["attention_mask"][place].bool()].tolist() == whole
            assert encoder.text(ids[batch["completion_mask"][place].bool()].tolist()) == side["content"]
            assert int(batch["completion_mask"][place].sum()) == len(whole) - len(rows.prompt[row]) - 1


def test_a_pair_that_is_too_long_is_counted_and_left_out_and_all_are_refused(encoder: chat.Encoder) -> None:
    long = Pair("long", preferred.asked(1), preferred.said(*["birds"] * 80), preferred.said("rain"))
    rows = preferences.encode([*preferred.pairs(0, 3), long], encoder, max_length=100, name="pairs")
    assert (rows.ids, rows.too_long, rows.refused) == (["pair-0", "pair-1", "pair-2"], 1, 0)
    with pytest.raises(ValueError, match="max_length=10 is too small for all 3 pairs of train"):
        preferences.encode(preferred.pairs(0, 3), encoder, max_length=10, name="train")


def test_a_pair_that_the_template_cannot_write_is_counted_and_named(tmp_path: Path) -> None:
    tokenizer = checkpoints.load_tokenizer(preferred.model(tmp_path / "model"))
    tokenizer.chat_template = chat.TEMPLATE.replace("message['code']", "message.code")  # not the one we know
    strict = chat.Encoder(tokenizer)
    wrong = Pair("wrong", preferred.asked(1), preferred.said("birds", chat.TURN_END), preferred.said("rain"))
    rows = preferences.encode([*preferred.pairs(0, 30), wrong], strict, max_length=200, name="pairs")
    assert (len(rows), rows.refused) == (30, 1)
    with pytest.raises(ValueError, match=r"at most 5% may be:\n  pairs wrong: a message holds the special token"):
        preferences.encode([*preferred.pairs(0, 3), wrong], strict, max_length=200, name="pairs")


def test_ahead_is_counted_by_rewards_and_by_likelihoods_and_a_tie_is_half() -> None:
    policy = torch.tensor([[-3.0, -5.0], [-9.0, -6.0], [-4.0, -4.0]], dtype=torch.float64)
    reference = torch.tensor([[-3.0, -6.0], [-12.0, -6.0], [-4.0, -4.0]], dtype=torch.float64)
    assert preferences.preferred(policy, reference, beta=0.5) == pytest.approx(
        {
            "val/held_out/dpo_accuracy": 0.5,  # -1, 3, 0 times beta
            "val/held_out/dpo_margin": 1 / 3,
            "val/held_out/logp_accuracy": 0.5,
            "val/held_out/logp_margin": -1 / 3,
        }
    )
