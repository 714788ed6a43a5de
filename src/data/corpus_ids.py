"""Token ids and texts of a corpus whose rows are packed, or which is still text, block by block."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from llamita.data import sources, tokens
from llamita.data.shards import ID, START, Split, Words
from llamita.data.sources import Kind, Source

BLOCK_ROWS = 1024


def packed_words(split: Split) -> Iterator[Words]:
    """All rows of a split, with their bits, a block of rows at a time."""
    for first in range(0, len(split), BLOCK_ROWS):
        yield split.words(np.arange(first, min(first + BLOCK_ROWS, len(split))))


def packed_ids(split: Split) -> Iterator[Words]:
    """All ids of a split, padding and special tokens included."""
    return (word_BS & ID for word_BS in packed_words(split))


def packed_texts(split: Split, tokenizer: Tokenizer) -> Iterator[str]:
    """What the documents in the rows of a split say, without special tokens.

    A row may begin or end within a character of several bytes; such a rest is left out.
    """
    for word_BS in packed_words(split):
        for word_S in word_BS:
            begins = np.flatnonzero(word_S & START)
            for piece in np.split(word_S & ID, begins[begins > 0]):
                if text := tokenizer.decode(piece.tolist(), skip_special_tokens=True).strip("\ufffd"):
                    yield text


def source_ids(found: Iterable[Source], tokenizer: PreTrainedTokenizerFast, *, date: str) -> Iterator[Words]:
    """Ids of the documents of sources, encoded as ``prepare`` does it."""
    for source in found:
        dialogues = source.kind is Kind.dialogues
        encoder = tokens.DialogueEncoder(tokenizer, date) if dialogues else tokens.TextEncoder(tokenizer)
        for text in sources.documents(source):
            yield from (words & ID for words in encoder({"text": [text]})["words"])


def source_texts(found: Sequence[Source]) -> Iterator[str]:
    """What the documents of sources say, in turn one of each; of a dialogue, what is said in it."""
    for texts in itertools.zip_longest(*map(_texts, found)):
        yield from (text for text in texts if text is not None)


def _texts(source: Source) -> Iterator[str]:
    for text in sources.documents(source):
        said = [message["content"] for message in json.loads(text)] if source.kind is Kind.dialogues else [text]
        yield "\n".join(said)
