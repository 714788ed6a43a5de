"""Text to token ids, many processes at a time; and a byte-level BPE vocabulary where none is given.

A document becomes ``<BOS> text <EOS>``. A dialogue becomes what its chat template makes of it, or Llama 3's format, and
only what the assistant says, with the token that ends its turn, is supervised.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llamita import chat, checkpoints
from llamita.chat import BOS, EOS, PAD, SPECIAL_TOKENS
from llamita.data.shards import UNSUPERVISED, Words

log = logging.getLogger(__name__)

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Llama 3 cuts text before merging bytes (llama-models, models/llama3/tokenizer.py)."""

SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
BATCH_BYTES = 2**20
"""Text that a worker takes at a time: long documents one by one, so that few of them still keep all workers busy."""
PART_CHARACTERS = 2**20
"""Of a document are encoded at a time where that changes nothing: encoding needs some 130 bytes per character."""


@dataclass(kw_only=True)
class TokenizerConfig:
    """How text becomes ids."""

    path: Path | None = None
    """A tokenizer or model directory; unset: a byte-level BPE is trained on the training documents."""
    vocab_size: int = 4096
    """Entries of the trained vocabulary, the special tokens included."""
    train_bytes: int = 2**28
    """Train on no more than about so many bytes, taken from the documents in pseudo-random order."""
    date: str = chat.DATE
    """The date in chat templates that ask for one; fixed, because Llama 3.2's would else change the data every day."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what cannot be meant."""
        if not SMALLEST_VOCABULARY <= self.vocab_size < 2**30:
            raise ValueError(
                f"tokenizer.vocab_size must be in {SMALLEST_VOCABULARY}..{2**30 - 1} (256 bytes and "
                f"{len(SPECIAL_TOKENS)} special tokens at least), got {self.vocab_size}"
            )
        if self.train_bytes < 1:
            raise ValueError(f"tokenizer.train_bytes must be at least 1, got {self.train_bytes}")


def load(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a directory, checked for what documents need.

    Raises:
        ValueError: there is none, or it has no BOS or EOS.
    """
    if not path.is_dir():
        raise ValueError(f"tokenizer.path={path} is not a directory")
    tokenizer = checkpoints.load_tokenizer(path)
    chat.borders(tokenizer)
    return tokenizer


def save(tokenizer: PreTrainedTokenizerFast, source: Path | None, folder: Path) -> None:
    """Store a tokenizer: the very files of ``source`` where it came from one."""
    folder.mkdir()
    if source is None:
        tokenizer.save_pretrained(folder)
    else:
        checkpoints.copy_tokenizer(source, folder)


def train(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE (Sennrich et al., 2016, arXiv:1508.07909, section 3.2) with Llama 3's split and special tokens.

    Bytes and merges come first, special tokens last, as in Llama 3. Every text survives encoding and decoding byte
    for byte, because all 256 bytes are in the vocabulary and nothing is normalised.

    Raises:
        ValueError: the texts have too few different words for a vocabulary of that size.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    if (size := tokenizer.get_vocab_size()) != vocab_size:
        raise ValueError(f"tokenizer.vocab_size={vocab_size} is more than the training documents give: at most {size}")
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bos_id)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the highest id, which a model must have rows for even where ids below it are unused."""
    return int(max(tokenizer.get_vocab().values())) + 1


class TextEncoder:
    """Documents to words. Special tokens that a text merely mentions are ordinary characters, as in Meta's code."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        around = chat.borders(tokenizer)
        self._given = tokenizer
        self._bos, self._eos = around.bos_id, around.eos_id
        self._backend = chat.plain_backend(tokenizer)
        self._may_cut = _splits_as_llama3(self._backend)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to a worker as arguments: a pickled tokenizer forgets that special tokens are ordinary text."""
        return TextEncoder, (self._given,)

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[Words]]:
        """The batch's documents, for ``datasets.map``."""
        return {"words": [self._words(text) for text in batch["text"]]}

    def _words(self, text: str) -> Words:
        parts = cut_for_llama3(text, PART_CHARACTERS) if self._may_cut else [text]
        ids = [np.array(self._ids(part), dtype=np.uint32) for part in parts]
        around = [np.array([word], dtype=np.uint32) for word in (self._bos, self._eos)]
        return np.concatenate([around[0], *ids, around[1]])

    def _ids(self, text: str) -> list[int]:
        (encoded,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoded.ids
        return ids


def cut_for_llama3(text: str, size: int) -> Iterator[str]:
    """Parts of at least ``size`` characters whose ids end to end are the ids of the text.

    Each part begins with a letter or digit behind a newline: ``SPLIT_PATTERN`` always cuts there, and looks neither
    behind a cut nor, as every run of space up to the newline is one match, ahead of it.
    """
    begin = 0
    while found := _LINE_BEGINS.search(text, begin + size):
        yield text[begin : found.end()]
        begin = found.end()
    yield text[begin:]


_LINE_BEGINS = re.compile(r"\n(?=[^\W_])")


def _splits_as_llama3(backend: Tokenizer) -> bool:
    """Whether nothing happens to a text before and while it is cut but what Llama 3 does."""
    definition = json.loads(backend.to_str())
    steps = (definition["pre_tokenizer"] or {}).get("pretokenizers", [])
    return (
        definition["normalizer"] is None
        and all(token["special"] for token in definition["added_tokens"])
        and [step["type"] for step in steps] == ["Split", "ByteLevel"]
        and steps[0]["pattern"] == {"Regex": SPLIT_PATTERN}
        and (steps[0]["behavior"], steps[0]["invert"]) == ("Isolated", False)
        and not (steps[1]["add_prefix_space"] or steps[1]["use_regex"])
    )


class DialogueEncoder:
    """Dialogues to words: only what the assistant says and the end of its turn are supervised."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, date: str) -> None:
        """Choose the format; ``ValueError`` as :class:`llamita.chat.Encoder`."""
        self._given = tokenizer, date
        self._encoder = chat.Encoder(tokenizer, date)

    def __reduce__(self) -> tuple[Any, ...]:
        """As for :class:`TextEncoder`."""
        return DialogueEncoder, self._given

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[Words]]:
        """The batch's dialogues, for ``datasets.map``."""
        return {"words": [words_of(self._encoder.dialogue(json.loads(text))) for text in batch["text"]]}


def words_of(encoded: chat.Encoded) -> Words:
    """Ids with the mark of what is not supervised."""
    words = np.array(encoded.ids, dtype=np.uint32)
    return np.where(np.array(encoded.supervised), words, words | UNSUPERVISED)


def num_cores() -> int:
    """Cores that this process may use; macOS does not say, so all of them there."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode(
    texts: Any,
    encoder: Callable[[dict[str, list[str]]], dict[str, list[Words]]],
    path: Path,
    *,
    mean_bytes: float,
    num_proc: int,
) -> Iterator[tuple[Words, NDArray[np.int64]]]:
    """Words and document lengths of a ``datasets.Dataset`` of texts, block by block, in its order.

    ``num_proc`` processes encode at a time; the result does not depend on how many. ``path`` is a file for the
    result, which stays memory-mapped; ``mean_bytes`` is the size of a text.
    """
    import datasets

    encoded = texts.map(
        encoder,
        batched=True,
        batch_size=min(max(1, int(BATCH_BYTES / mean_bytes)), 1000),
        remove_columns=texts.column_names,
        features=datasets.Features({"words": datasets.LargeList(datasets.Value("uint32"))}),
        num_proc=min(num_proc, len(texts)) if num_proc > 1 else None,
        cache_file_name=str(path),
        load_from_cache_file=False,
        new_fingerprint=path.stem,
        desc="tokens",
    )
    for chunk in encoded.data.column("words").chunks:
        offsets = chunk.offsets.to_numpy()
        values = chunk.values.to_numpy()[offsets[0] : offsets[-1]]
        yield values, np.diff(offsets).astype(np.int64)
