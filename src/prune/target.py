"""The sizes of the model to make, and which of them can be cut out of a larger Llama."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from transformers import LlamaConfig

from llamita import checkpoints
from llamita.shapes import SIZES, LlamaShape, SizesConfig


class Rope(StrEnum):
    """The rotary scaling of the result."""

    parent = "parent"
    """As in the source: the kept weights were trained with it."""
    published = "published"
    """Factor 32, which Llama 3.2 publishes: changes 35 of 64 frequencies of a Llama 3.1 before any training."""


class Tie(StrEnum):
    """How an embedding E and an output matrix U become one matrix."""

    least_squares = "least_squares"
    """U where the head's input has energy, E elsewhere; see :func:`llamita.prune.tie.tied`. Needs text."""
    mean = "mean"
    embedding = "embedding"
    head = "head"


class Pairs(StrEnum):
    """Which rotary pairs a smaller head keeps; one of each run of r neighbours when the head size is divided by r."""

    first = "first"
    """Pairs 0, r, 2 r, ...: their frequencies are bit-exactly those of the smaller head."""
    strongest = "strongest"
    """The one of most energy E[q^2] E[k^2] in its KV group; it is then turned at the frequency of the first."""


@dataclass(kw_only=True)
class TargetConfig(SizesConfig):
    """Sizes of the model to make; what is unset stays as in the source."""

    tie_word_embeddings: bool | None = None
    output_rows: list[int] | None = None
    """Token ids whose logits the model keeps, in this order; it is then a ``LlamaForTokenClassification``."""
    rope: Rope = Rope.parent
    keep_layers: list[int] | None = None
    """The source's layers to keep, instead of those of highest score."""
    tie: Tie | None = None
    """Unset: ``least_squares`` where there are statistics of text, else ``mean``. Without effect where the source has
    one matrix already, unless the stream is rotated."""
    pairs: Pairs = Pairs.first

    def __post_init__(self) -> None:
        for name in SIZES:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"target.{name} must be at least 1, got {value}")
        if self.output_rows is not None:
            if not self.output_rows:
                raise ValueError("target.output_rows must hold at least one token id, got []")
            if len(set(self.output_rows)) != len(self.output_rows):
                raise ValueError(f"target.output_rows must hold each token id once, got {self.output_rows}")
        if self.keep_layers is not None and sorted(set(self.keep_layers)) != self.keep_layers:
            raise ValueError(f"target.keep_layers must rise without repeats, got {self.keep_layers}")


def check_kind(config: LlamaConfig) -> None:
    """Raise ``ValueError`` for a reward model: it has no output matrix to cut, and would lose what it has instead."""
    if checkpoints.is_reward_model(config):
        raise ValueError(
            "model.path is a reward model, which gives one number for a dialogue: prune a language model, and train "
            "the rewards on what comes out"
        )


def target_shape(source: LlamaShape, target: TargetConfig) -> LlamaShape:
    """The sizes of the model to make.

    Raises:
        ValueError: they cannot be cut out of ``source``, or no stock Llama can have them; names the nearest that can.
    """
    if source.output_rows is not None:
        raise ValueError("model.path has lost output rows already: prune the model that it was cut from")
    sizes = {name: getattr(target, name) for name in SIZES if getattr(target, name) is not None}
    if target.keep_layers is not None:
        sizes.setdefault("num_hidden_layers", len(target.keep_layers))
        _check_layers(source, target.keep_layers, sizes["num_hidden_layers"])
    for name, value in sizes.items():
        if value > getattr(source, name):
            raise ValueError(f"target.{name} must be at most the source's {getattr(source, name)}, got {value}")
    merged = {name: sizes.get(name, getattr(source, name)) for name in SIZES}
    _check_heads(source, merged)
    tied = source.tie_word_embeddings if target.tie_word_embeddings is None else target.tie_word_embeddings
    if target.tie is not None and not tied:
        raise ValueError(
            f"target.tie says how two matrices become one, and needs target.tie_word_embeddings=true: got {target.tie} "
            "for a model that has two"
        )
    rows = None
    if target.output_rows is not None:
        if tied:
            raise ValueError(
                "target.output_rows needs target.tie_word_embeddings=false: a tied matrix also holds the inputs"
            )
        if outside := [row for row in target.output_rows if not 0 <= row < source.vocab_size]:
            raise ValueError(f"target.output_rows must be token ids in 0..{source.vocab_size - 1}, got {outside}")
        rows = len(target.output_rows)
    return dataclasses.replace(source, **merged, tie_word_embeddings=tied, output_rows=rows)


def _check_layers(source: LlamaShape, keep: list[int], number: int) -> None:
    if len(keep) != number:
        raise ValueError(f"target.keep_layers must name target.num_hidden_layers={number} layers, got {keep}")
    if outside := [index for index in keep if not 0 <= index < source.num_hidden_layers]:
        raise ValueError(f"target.keep_layers must be in 0..{source.num_hidden_layers - 1}, got {outside}")


def _check_heads(source: LlamaShape, sizes: dict[str, int]) -> None:
    heads, keys = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    group = source.num_attention_heads // source.num_key_value_heads
    if heads % keys or heads // keys > group:
        allowed = [keys * size for size in range(1, group + 1)]
        raise ValueError(
            f"target.num_attention_heads must give each of the {keys} KV heads between 1 and {group} of the query "
            f"heads that read it in the source: {_nearest(heads, allowed)}; got {heads}"
        )
    if sizes["hidden_size"] % heads:
        allowed = list(range(heads, source.hidden_size + 1, heads))
        raise ValueError(
            f"target.hidden_size must be a multiple of num_attention_heads={heads} (LlamaConfig refuses others): "
            f"{_nearest(sizes['hidden_size'], allowed)}; got {sizes['hidden_size']}"
        )
    if source.head_dim % sizes["head_dim"] or sizes["head_dim"] % 2:
        allowed = [size for size in range(2, source.head_dim + 1, 2) if source.head_dim % size == 0]
        raise ValueError(
            f"target.head_dim must be even and divide the source's {source.head_dim}, so that rotary frequencies stay: "
            f"{_nearest(sizes['head_dim'], allowed)}; got {sizes['head_dim']}"
        )


def _nearest(value: int, allowed: Sequence[int]) -> str:
    """The closest allowed value below and above ``value``."""
    below, above = [v for v in allowed if v <= value][-1:], [v for v in allowed if v > value][:1]
    return "nearest are " + " and ".join(map(str, below + above)) if below + above else "there is none"
