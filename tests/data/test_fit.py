"""A dialogue lies in one row: whole, up to its first tokens, or nowhere."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from llamita import chat
from llamita.data import fit, tokens
from llamita.data.fit import Overlong
from llamita.data.shards import UNSUPERVISED

TEXTS = [Path(__file__).read_text(encoding="utf-8"), Path(tokens.__file__).read_text(encoding="utf-8")]


def stream_of(dialogues: list[list[bool]]) -> tuple[np.ndarray, np.ndarray]:
    """Words that count up, supervised where it is said, and the lengths."""
    supervised = np.array([one for dialogue in dialogues for one in dialogue], dtype=bool)
    words = np.arange(supervised.size, dtype=np.uint32)
    return np.where(supervised, words, words | UNSUPERVISED), np.array([len(d) for d in dialogues], dtype=np.int64)


@given(
    dialogues=st.lists(st.lists(st.booleans(), max_size=9), min_size=1, max_size=9),
    sequence_length=st.integers(2, 10),
    overlong=st.sampled_from(Overlong),
)
def test_what_stays_is_the_beginning_of_each_dialogue_that_still_teaches(
    dialogues: list[list[bool]], sequence_length: int, overlong: Overlong
) -> None:
    stream, length_D = stream_of(dialogues)
    found = fit.fit(stream, length_D, sequence_length, overlong)
    expected, dropped, truncated, begin = [], 0, 0, 0
    for dialogue in dialogues:
        fits = len(dialogue) <= sequence_length
        teaches = overlong is Overlong.truncate and any(dialogue[1:sequence_length])
        if dialogue and (fits or teaches):
            expected.append((begin, min(len(dialogue), sequence_length)))
            truncated += not fits
        elif dialogue:
            dropped += 1
        begin += len(dialogue)
    assert list(zip(found.start.tolist(), found.length.tolist(), strict=True)) == expected
    assert (found.dropped, found.truncated) == (dropped, truncated)


@pytest.mark.parametrize("template", [None, chat.TEMPLATE + "{# another #}"])
def test_a_refused_dialogue_has_no_words_and_the_others_have_those_of_the_encoder(
    template: str | None,
) -> None:
    """In a template's text the name of a special token could not be told from one. Also after a journey."""
    tokenizer: PreTrainedTokenizerFast = tokens.train(TEXTS, 600)
    tokenizer.chat_template = template  # the second one is not known to the encoder
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    bad = [{"role": "user", "content": f"a {chat.TURN_END}"}, {"role": "assistant", "content": "b"}]
    texts = [json.dumps(messages) for messages in (good, bad, good)]
    encoder = pickle.loads(pickle.dumps(fit.CheckedEncoder(tokenizer, chat.DATE)))  # noqa: S301
    found = encoder({"text": texts})["words"]
    whole = tokens.words_of(chat.Encoder(tokenizer).dialogue(good)).tolist()
    assert [words.tolist() for words in (found[0], found[2])] == [whole, whole]
    assert (len(found[1]) == 0) == bool(template)
    if template:
        with pytest.raises(ValueError, match="holds the special token"):
            encoder.words(texts[1])
