"""Which tokens a smaller vocabulary keeps: those of a byte-level BPE that are formed most often in a corpus.

Encoding a word with BPE (Sennrich et al., 2016, arXiv:1508.07909, section 3.2) merges neighbours until nothing can be
merged, so every token that comes out was formed from two parts, and these from theirs, down to single bytes. A token
that is cut is no longer formed: where it stood, its parts stand.

Letters: V = tokens of the larger vocabulary, by their ids.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, pre_tokenizers
from torch import Tensor

from llamita import checkpoints
from llamita.shapes import LlamaShape

FILE = "vocabulary.safetensors"
FORMAT = 1
BYTES = frozenset(pre_tokenizers.ByteLevel.alphabet())
"""The characters that stand for the 256 bytes in a byte-level vocabulary."""

Counts = NDArray[np.int64]
Merges = Mapping[tuple[int, int], tuple[int, int]]
"""Rank and result of each pair that may be merged; the pair of lowest rank is merged first."""


@dataclass(frozen=True, kw_only=True)
class Bpe:
    """The tokens of a byte-level BPE and what each is made of."""

    texts: Mapping[int, str]
    """The tokens of the BPE by id, in the alphabet of ``BYTES``."""
    added: Mapping[int, str]
    """Added tokens by id, special ones among them; in some files they stand in the BPE as well."""
    parts: Mapping[int, tuple[int, ...]]
    """What the bytes of each token of ``texts`` were right before they became it; nothing for a single byte."""
    merges: Merges

    @classmethod
    def read(cls, definition: Mapping[str, Any]) -> Self:
        """Read the tokens of a ``tokenizer.json`` and derive each from its bytes.

        Raises:
            ValueError: it is not a byte-level BPE with all 256 bytes.
        """
        check_byte_level(definition)
        added = {int(token["id"]): str(token["content"]) for token in definition["added_tokens"]}
        ids = {text: int(index) for text, index in definition["model"]["vocab"].items()}
        merges = merges_of(definition["model"])
        parts = {index: parts_of(text, ids, merges) for text, index in ids.items()}
        # What is found in a text before it is split into words needs no parts.
        parts |= {index: () for index in added.keys() & parts.keys() if parts[index] not in merges}
        return cls(texts={index: text for text, index in ids.items()}, added=added, parts=parts, merges=merges)

    @cached_property
    def bytes(self) -> frozenset[int]:
        """Ids of the 256 tokens that are a single byte."""
        return frozenset(index for index, text in self.texts.items() if text in BYTES)

    @cached_property
    def ids(self) -> frozenset[int]:
        """Ids of all tokens."""
        return frozenset({*self.texts, *self.added})

    def closure(self, wanted: Iterable[int]) -> set[int]:
        """The tokens ``wanted`` and all that they are made of."""
        found: set[int] = set()
        waiting = list(wanted)
        while waiting:
            if (token := waiting.pop()) not in found:
                found.add(token)
                waiting += self.parts.get(token, ())
        return found

    def formed(self, counts_V: Counts) -> Counts:
        """How often each token is formed while a corpus is encoded whose ids are counted in ``counts_V``.

        F(t) = c(t) + sum of F(u) over the tokens u that t is a part of (twice where it is both parts).
        """
        formed_V = counts_V.copy()
        for token in sorted(self.parts, key=lambda index: -len(self.texts[index])):
            for part in self.parts[token]:
                formed_V[part] += formed_V[token]
        return formed_V


def check_byte_level(definition: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for a ``tokenizer.json`` that is not a byte-level BPE with all 256 bytes."""
    model = definition["model"]
    if (kind := model.get("type", "BPE" if "merges" in model else None)) != "BPE":
        raise ValueError(
            f"tokenizer.json has a model of type {kind!r}: only a byte-level BPE, as Llama 3's, can be cut"
        )
    if model.get("byte_fallback"):
        raise ValueError(
            "tokenizer.json is a BPE of characters with byte_fallback, as Llama 2's (SentencePiece): only a byte-level "
            "BPE, as Llama 3's, can be cut"
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise ValueError(
                f"tokenizer.json has {name}={model[name]!r}, which a byte-level BPE has not: it cannot be cut"
            )
    if lacking := len(BYTES - model["vocab"].keys()):
        raise ValueError(
            f"tokenizer.json lacks {lacking} of the 256 bytes, so it is no byte-level BPE: it cannot be cut"
        )


def pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """A merge of ``tokenizer.json``, which older files write as one text with a space."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def merges_of(model: Mapping[str, Any]) -> dict[tuple[int, int], tuple[int, int]]:
    """Rank and result of each pair of ids; a token may be the result of several, as most of Llama 3's are."""
    vocabulary = model["vocab"]
    pairs = map(pair, model["merges"])
    return {(vocabulary[a], vocabulary[b]): (rank, vocabulary[a + b]) for rank, (a, b) in enumerate(pairs)}


def states(symbols: Sequence[int], merges: Merges) -> Iterator[tuple[int, ...]]:
    """The symbols at first and after each merge: always the pair of lowest rank, of equal ones the leftmost."""
    yield tuple(symbols)
    while True:
        pairs = enumerate(itertools.pairwise(symbols))
        ranked = [(merges[both][0], place) for place, both in pairs if both in merges]
        if not ranked:
            return
        _, place = min(ranked)
        symbols = [*symbols[:place], merges[symbols[place], symbols[place + 1]][1], *symbols[place + 2 :]]
        yield tuple(symbols)


def parts_of(text: str, ids: Mapping[str, int], merges: Merges) -> tuple[int, ...]:
    """The symbols of ``text`` right before the last merge, or all that are left where it never becomes one token.

    588 of Llama 3's 128,000 are of the second kind: ``ignore_merges`` looks whole words up before anything is merged.
    Inside a longer word a token is formed by the same merges as alone: none of them crosses its borders, and the
    lowest-ranked, leftmost of the word's is that of the part in which it lies.
    """
    if len(text) == 1 or any(character not in ids for character in text):
        return ()
    return next(s for s in reversed(list(states([ids[character] for character in text], merges))) if len(s) > 1)


def count(blocks: Iterable[NDArray[Any]], size: int) -> Counts:
    """How often each id below ``size`` occurs in blocks of ids."""
    counts_V = np.zeros(size, dtype=np.int64)
    for block in blocks:
        counts_V += np.bincount(block.ravel(), minlength=size)
    return counts_V


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The tokens that stay. They keep their order, so the new id of each is its place among them."""

    old_ids: tuple[int, ...]
    bpe: Bpe
    counts: Counts
    """Of each old id in the corpus."""

    def __post_init__(self) -> None:
        assert list(self.old_ids) == sorted(set(self.old_ids)), "ids rise"

    @cached_property
    def new_ids(self) -> dict[int, int]:
        """New id by old id."""
        return {old: new for new, old in enumerate(self.old_ids)}

    @cached_property
    def rows(self) -> Tensor:
        """The rows of the embedding and of the output matrix that stay."""
        return torch.tensor(self.old_ids)

    @cached_property
    def merges(self) -> dict[tuple[int, int], tuple[int, int]]:
        """The merges that stay: those of which all three tokens do."""
        return {
            both: (rank, result)
            for both, (rank, result) in self.bpe.merges.items()
            if {*both, result} <= self.new_ids.keys()
        }

    def spelled(self, old_id: int) -> list[int]:
        """New ids of a token: its own, or those that its text becomes in the smaller vocabulary."""
        if old_id in self.new_ids:
            return [self.new_ids[old_id]]
        *_, last = states([self.byte_ids[character] for character in self.bpe.texts[old_id]], self.merges)
        return [self.new_ids[token] for token in last]

    @cached_property
    def byte_ids(self) -> dict[str, int]:
        """Old id of each byte."""
        return {self.bpe.texts[index]: index for index in self.bpe.bytes}

    def summary(self) -> dict[str, float | int]:
        """Sizes, the share of the corpus's tokens that stay, and by how much the rest makes it longer."""
        text = list(self.bpe.texts.keys() - self.bpe.added.keys())
        formed_V = self.bpe.formed(self.counts)
        cut = [token for token in text if token not in self.new_ids]
        total = int(self.counts[text].sum())
        more = sum((len(self.bpe.parts[token]) - 1) * int(formed_V[token]) for token in cut)
        return {
            "vocab_size_before": len(self.bpe.ids),
            "vocab_size_after": len(self.old_ids),
            "corpus_tokens": total,
            "share_of_tokens_kept": 1 - int(self.counts[cut].sum()) / total,
            "growth_by_parts": 1 + more / total,
        }

    def save(self, folder: Path) -> None:
        """Write ``old_ids`` and the counts into ``folder``; the row of an old id is its new one."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"old_ids": self.rows, "counts": torch.from_numpy(self.counts)}
        checkpoints.write_tensors(folder / FILE, tensors, {"format": str(FORMAT)})


def check_size(bpe: Bpe, size: int, *, always: Collection[int], never: Collection[int]) -> set[int]:
    """The tokens that stay whatever the counts say: all bytes, the added tokens but ``never``, and ``always``.

    Raises:
        ValueError: ``size`` is too small for them, or more than there is.
    """
    must = bpe.closure({*bpe.bytes, *bpe.added, *always} - set(never))
    added, most = len(bpe.added) - len(never), len(bpe.ids) - len(never)
    if not len(must) <= size <= most:
        raise ValueError(
            f"vocab_size must be in {len(must)}..{most} ({len(bpe.bytes)} bytes, {added} added tokens and "
            f"{len(must) - len(bpe.bytes) - added} that the model's settings name always stay), got {size}"
        )
    return must


def choose(bpe: Bpe, counts_V: Counts, size: int, *, always: Collection[int] = (), never: Collection[int] = ()) -> Kept:
    """The ``size`` tokens of least loss: those of :func:`check_size`, then those that are formed most often.

    Cutting t makes the corpus longer by F(t) (see :meth:`Bpe.formed`) once everything made of t is cut, whatever
    else is; a part is formed at least as often as what it makes. So the most formed are closed under parts, and no
    other closed set of that size has a smaller sum of F over the tokens that go. Of equally many the lower id stays,
    which BPE training found first.

    Raises:
        ValueError: as :func:`check_size`; or nothing was counted, or a token of ``never`` was.
    """
    must = check_size(bpe, size, always=always, never=never)
    if not counts_V[list(bpe.texts.keys() - bpe.added.keys())].any():
        raise ValueError("the data and sources hold no text, by whose counts tokens would be chosen")
    for token in sorted(never):
        if counts_V[token]:
            raise ValueError(f"drop_added names {bpe.added[token]!r}, which is in the data {counts_V[token]} times")
    formed_V = bpe.formed(counts_V)
    latest: dict[int, int] = {}  # the highest id in what a token is made of: never below that of a part
    for token in sorted(bpe.parts, key=lambda index: len(bpe.texts[index])):
        latest[token] = max([token, *(latest[part] for part in bpe.parts[token])])
    free = sorted(
        bpe.texts.keys() - must - set(never),
        key=lambda token: (-int(formed_V[token]), latest[token], len(bpe.texts[token])),
    )
    return Kept(old_ids=tuple(sorted([*must, *free[: size - len(must)]])), bpe=bpe, counts=counts_V)


def tensors(weights: checkpoints.Weights, kept: Kept) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor of the model with the kept rows, in file order, the others as they are."""
    for name in weights.shape.tensors():
        whole = weights[name]
        yield name, whole[kept.rows] if name in ("model.embed_tokens.weight", "lm_head.weight") else whole


def cut_shape(shape: LlamaShape, size: int) -> LlamaShape:
    """The sizes of the model with ``size`` tokens.

    Raises:
        ValueError: the model has no more rows than that.
    """
    if size >= shape.vocab_size:
        raise ValueError(f"vocab_size must be below the {shape.vocab_size} rows of model.path, got {size}")
    return dataclasses.replace(shape, vocab_size=size)


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The same text in two vocabularies."""

    utf8_bytes: int
    before: int
    """Tokens."""
    after: int

    def summary(self, prefix: str) -> dict[str, float]:
        """Tokens per byte."""
        size = max(self.utf8_bytes, 1)
        return {
            f"{prefix}tokens_per_byte_before": self.before / size,
            f"{prefix}tokens_per_byte_after": self.after / size,
        }


def lengths(texts: Iterable[str], before: Tokenizer, after: Tokenizer, *, most_bytes: int) -> Lengths:
    """Encode texts with both until ``most_bytes`` are reached."""
    total = np.zeros(3, dtype=np.int64)
    for text in texts:
        both = [tokenizer.encode_batch_fast([text], add_special_tokens=False)[0] for tokenizer in (before, after)]
        total += [len(text.encode()), *(len(encoded.ids) for encoded in both)]
        if total[0] >= most_bytes:
            break
    size, first, second = total.tolist()
    return Lengths(utf8_bytes=size, before=first, after=second)
