"""Dialogues and rows: which are longer than a row, and what becomes of them.

A document of text may be cut into pieces anywhere. A dialogue may not: what follows a cut would be an answer without
its question. So a dialogue lies in one row, whole or up to its first tokens, or nowhere.

Shape letters: D = dialogues.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamita.data import tokens
from llamita.data.shards import UNSUPERVISED, Words

Int = NDArray[np.int64]


class Overlong(StrEnum):
    """What becomes of a dialogue that is longer than a row."""

    drop = "drop"
    """It is left out."""
    truncate = "truncate"
    """Its first tokens stay. An answer that is cut has no end of turn, so the model does not learn to stop there. A
    dialogue of which nothing supervised is left is left out."""


@dataclass(frozen=True)
class Fitted:
    """Where the dialogues that stay lie in the stream of all, none longer than a row."""

    start: Int
    length: Int
    dropped: int
    truncated: int


def fit(stream: Words, length_D: Int, sequence_length: int, overlong: Overlong) -> Fitted:
    """Apply the rule to dialogues end to end in ``stream``; one of length zero is no dialogue and is not counted."""
    start_D = np.cumsum(length_D) - length_D
    kept_D = length_D > 0
    too_long = np.flatnonzero(length_D > sequence_length)
    for index in too_long.tolist():
        begin = int(start_D[index])
        # The first token of a dialogue is predicted by nothing.
        said = overlong is Overlong.truncate and (stream[begin + 1 : begin + sequence_length] < UNSUPERVISED).any()
        kept_D[index] = said
    truncated = int(kept_D[too_long].sum())
    return Fitted(
        start=start_D[kept_D],
        length=np.minimum(length_D, sequence_length)[kept_D],
        dropped=too_long.size - truncated,
        truncated=truncated,
    )


class CheckedEncoder(tokens.DialogueEncoder):
    """As its base, but a dialogue that is refused has no words instead of ending everything."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to a worker as arguments."""
        return CheckedEncoder, self._given

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[Words]]:
        """The batch's dialogues, for ``datasets.map``."""
        found = []
        for text in batch["text"]:
            try:
                found.append(self.words(text))
            except ValueError:
                found.append(np.empty(0, dtype=np.uint32))
        return {"words": found}

    def words(self, text: str) -> Words:
        """The words of one dialogue, as JSON; ``ValueError`` where it is refused."""
        return tokens.words_of(self._encoder.dialogue(json.loads(text)))
