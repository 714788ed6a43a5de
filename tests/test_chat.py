"""The ids of dialogues, and the template that writes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from llamita import chat
from llamita.data import tokens

TEXTS = [Path(__file__).read_text(encoding="utf-8"), Path(chat.__file__).read_text(encoding="utf-8")]
DIALOGUE: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": "How much is 2 + 2?"},
    {"role": "assistant", "content": "print(2 + 2)", "code": True},
    {"role": "ipython", "content": "4"},
    {"role": "assistant", "content": " Four."},
    {"role": "user", "content": "And the weather?"},
    {"role": "assistant", "content": "[weather(city='Rome')]"},
]
MARKED = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHow much is 2 + 2?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{<|python_tag|>print(2 + 2)<|eom_id|>}"
    "<|start_header_id|>ipython<|end_header_id|>\n\n4<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{Four.<|eot_id|>}"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd the weather?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{[weather(city='Rome')]<|eot_id|>}"
)
"""What the model reads; between braces what it learns to say."""


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tokens.train(TEXTS, 600)


def marked(tokenizer: PreTrainedTokenizerFast, encoded: chat.Encoded) -> str:
    """The text with braces around what is supervised."""
    text, inside = "", False
    for id_, supervised in zip(encoded.ids, encoded.supervised, strict=True):
        text += ("{" if supervised and not inside else "}" if inside and not supervised else "") + tokenizer.decode(id_)
        inside = supervised
    return text + "}" * inside


def test_what_is_supervised_is_what_was_marked_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    assert marked(tokenizer, chat.Encoder(tokenizer).dialogue(DIALOGUE)) == MARKED


def test_the_template_writes_the_same_ids_and_the_same_mask(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = chat.Encoder(tokenizer).dialogue(DIALOGUE)
    tokenizer.chat_template = chat.TEMPLATE
    given = tokenizer.apply_chat_template(DIALOGUE, return_dict=True, return_assistant_tokens_mask=True)
    assert given["input_ids"] == encoded.ids
    assert [bool(one) for one in given["assistant_masks"]] == encoded.supervised


@pytest.mark.parametrize("template", [None, chat.TEMPLATE, chat.TEMPLATE + "{# another #}"])
def test_prompt_and_answer_are_the_dialogue(tokenizer: PreTrainedTokenizerFast, template: str | None) -> None:
    """The last one is a template that the encoder does not know, so that it goes through its text."""
    tokenizer.chat_template = template
    encoder = chat.Encoder(tokenizer)
    messages = [message for message in DIALOGUE if not message.get("code")]
    prompt, answer = encoder.answer(messages[:-1], messages[-1])
    assert prompt == encoder.prompt(messages[:-1])
    assert [*prompt, *answer][: len(encoder.dialogue(messages).ids)] == encoder.dialogue(messages).ids
    assert encoder.text(answer) == "[weather(city='Rome')]"


def test_an_answer_ends_at_each_of_llamas_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    ends = [chat.EOS, chat.MESSAGE_END, chat.TURN_END]
    assert chat.Encoder(tokenizer).stop_ids == sorted(tokenizer.convert_tokens_to_ids(ends))


def test_a_template_of_another_tokenizer_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    with pytest.raises(ValueError, match=r"writes <\|im_end\|>, <\|im_start\|>, which the tokenizer does not have"):
        chat.Encoder(tokenizer)
