"""The weights that a plan makes of a model's: computed tensor by tensor, when they are asked for.

:class:`Pruned` can be read layer by layer like the directory it comes from, so the smaller model can be run before,
or without, being written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from llamita import checkpoints
from llamita.prune.plan import COVARIANCE_WEIGHT, Plan, Rope, Tie
from llamita.prune.stream import Model
from llamita.shapes import LlamaShape

CHUNK_ROWS = 16384
PUBLISHED_ROPE_FACTOR = 32.0
"""Llama 3.2 1B and 3B (their config.json)."""


class Pruned:
    """A smaller Llama as a view on ``model``: one layer at a time is ever held."""

    def __init__(self, model: Model, plan: Plan) -> None:
        """Join a model and a plan.

        Raises:
            ValueError: the plan was made for other sizes.
        """
        if model.shape != plan.source:
            raise ValueError(f"the plan was made for {plan.source}, the model has {model.shape}")
        self.model = model
        self.plan = plan
        self.shape: LlamaShape = plan.target
        self.dtype = model.dtype
        self.config = pruned_config(model.config, plan)
        self._embedding: Tensor | None = None

    def layer(self, index: int) -> dict[str, Tensor]:
        """The tensors of layer ``index`` of the smaller model."""
        plan, source = self.plan, self.plan.source
        weights = self.model.layer(int(plan.layers[index]))
        kept, half = plan.hidden, source.head_dim // 2
        keys, group = plan.kv_heads[index], len(plan.heads[index]) // len(plan.kv_heads[index])
        pairs_KE = torch.cat([plan.pairs[index], plan.pairs[index] + half], dim=1)
        values_KE, heads = plan.values[index], plan.heads[index]
        query = _channels(heads, pairs_KE.repeat_interleave(group, 0), source.head_dim)
        read = _channels(heads, values_KE.repeat_interleave(group, 0), source.head_dim)
        key, value = (_channels(keys, dims, source.head_dim) for dims in (pairs_KE, values_KE))
        mlp = plan.mlp[index]
        selection: dict[str, tuple[Tensor | None, Tensor | None, float]] = {
            "input_layernorm.weight": (kept, None, float(plan.norm_gain[2 * index])),
            "self_attn.q_proj.weight": (query, kept, plan.query_scale),
            "self_attn.k_proj.weight": (key, kept, 1.0),
            "self_attn.v_proj.weight": (value, kept, 1.0),
            "self_attn.o_proj.weight": (kept, read, 1.0),
            "post_attention_layernorm.weight": (kept, None, float(plan.norm_gain[2 * index + 1])),
            "mlp.gate_proj.weight": (mlp, kept, 1.0),
            "mlp.up_proj.weight": (mlp, kept, 1.0),
            "mlp.down_proj.weight": (kept, mlp, 1.0),
        }
        return {
            name: scaled(take(weights[name], rows, columns), factor)
            for name, (rows, columns, factor) in selection.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name that belongs to no layer."""
        match name:
            case "model.embed_tokens.weight":
                return self.embedding()
            case "model.norm.weight":
                return scaled(take(self.model[name], self.plan.hidden, None), float(self.plan.norm_gain[-1]))
            case "lm_head.weight":
                return self.head()
            case _:
                raise KeyError(name)

    def embedding(self) -> Tensor:
        """The input matrix, which is the output matrix as well where the two are tied."""
        plan, source = self.plan, self.model["model.embed_tokens.weight"]
        if plan.tie is None or plan.tie is Tie.embedding:
            return take(source, None, plan.hidden)
        if plan.tie is Tie.head:
            return take(self.model.head(), None, plan.hidden)
        if self._embedding is None:
            self._embedding = tied(source, self.model.head(), plan)
        return self._embedding

    def head(self) -> Tensor:
        """The output matrix."""
        if self.shape.tie_word_embeddings:
            return self.embedding()
        return take(self.model.head(), self.plan.output_rows, self.plan.hidden)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every stored tensor of the smaller model by its name in a Hugging Face file, in file order."""
        yield "model.embed_tokens.weight", self.embedding()
        self._embedding = None
        for index in range(self.shape.num_hidden_layers):
            for name, tensor in self.layer(index).items():
                yield f"model.layers.{index}.{name}", tensor
        yield "model.norm.weight", self["model.norm.weight"]
        if self.shape.output_rows is not None:
            yield "score.weight", self.head()
            yield "score.bias", torch.zeros(self.shape.output_rows, dtype=self.dtype)
        elif not self.shape.tie_word_embeddings:
            yield "lm_head.weight", self.head()


def take(tensor: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Rows and columns of those indices (``None``: all) in the stored dtype; the tensor itself where all are kept."""
    for axis, index in enumerate((rows, columns)):
        if index is not None and not torch.equal(index, torch.arange(tensor.shape[axis])):
            tensor = tensor.index_select(axis, index)
    return tensor


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """``tensor`` times ``factor``, multiplied in float32 or better and rounded once."""
    if factor == 1.0:
        return tensor
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return (tensor.to(wide) * factor).to(tensor.dtype)


def _channels(heads: Tensor, inside: Tensor, head_dim: int) -> Tensor:
    """Rows of a projection: of each head the channels ``inside`` [heads, kept]."""
    return (heads[:, None] * head_dim + inside).flatten()


@torch.no_grad()
def tied(embedding: Tensor, head: Tensor, plan: Plan) -> Tensor:
    """One matrix in the place of two, in the plan's channels.

    ``mean``: (E + U) / 2. ``least_squares``: the minimiser W of a |W - E|^2 + tr (W - U) C (W - U)^T, which is
    (a E + U C) (a I + C)^-1: with C = E[h h^T] of the head's input h the second term is the squared error of the
    logits, and a is ``COVARIANCE_WEIGHT`` times the mean of C's diagonal.
    """
    size = len(plan.hidden)
    result = torch.empty(len(embedding), size, dtype=embedding.dtype)
    wide = torch.float64 if embedding.dtype == torch.float64 else torch.float32
    of_embedding = None
    if plan.tie is Tie.least_squares:
        assert plan.head_covariance is not None
        covariance = plan.head_covariance.double()
        weight = COVARIANCE_WEIGHT * float(covariance.diagonal().mean())
        of_embedding = torch.linalg.inv(torch.eye(size, dtype=torch.float64) + covariance / weight).to(wide)
    for first in range(0, len(embedding), CHUNK_ROWS):
        rows = slice(first, first + CHUNK_ROWS)
        inputs = take(embedding[rows], None, plan.hidden).to(wide)
        outputs = take(head[rows], None, plan.hidden).to(wide)
        gap = inputs - outputs
        result[rows] = (outputs + (gap / 2 if of_embedding is None else gap @ of_embedding)).to(result.dtype)
    return result


def pruned_config(source: LlamaConfig, plan: Plan) -> LlamaConfig:
    """The smaller model's configuration: the source's, with the sizes of the target.

    Raises:
        ValueError: ``rope=published`` for a model without Llama 3's rotary scaling.
    """
    fields: dict[str, Any] = source.to_dict() | plan.target.config_fields()
    fields["architectures"] = ["LlamaForCausalLM"]
    if plan.rope is Rope.published:
        rope = dict(fields["rope_parameters"])
        if rope.get("rope_type") != "llama3":
            raise ValueError(f"target.rope=published needs a rope_type of 'llama3', got {rope.get('rope_type')!r}")
        fields["rope_parameters"] = rope | {"factor": PUBLISHED_ROPE_FACTOR}
    config = LlamaConfig.from_dict(fields)
    _check_config(source, config, plan)
    return config


def _check_config(source: LlamaConfig, config: LlamaConfig, plan: Plan) -> None:
    """Hold that nothing but the sizes, and the rotary factor when asked, differs from the source."""
    before, after = source.to_dict(), config.to_dict()
    wanted = plan.target.config_fields()
    for name in sorted(before.keys() | after.keys()):
        if name in wanted:
            assert after[name] == wanted[name], name
        elif name == "rope_parameters" and plan.rope is Rope.published:
            assert after[name] == before[name] | {"factor": PUBLISHED_ROPE_FACTOR}, name
        elif name != "architectures":
            assert after[name] == before[name], name


def classifier_config(config: LlamaConfig, token_ids: Sequence[int], tokens: Sequence[str]) -> LlamaConfig:
    """The configuration of a stock ``LlamaForTokenClassification`` whose label r is the r-th kept token.

    A ``LlamaForCausalLM`` cannot have fewer output rows than input rows.
    """
    fields = config.to_dict() | {
        "architectures": ["LlamaForTokenClassification"],
        "num_labels": len(token_ids),
        "id2label": dict(enumerate(tokens)),
        "label2id": {token: row for row, token in enumerate(tokens)},
        "classifier_dropout": 0.0,
        "output_token_ids": list(token_ids),
    }
    return LlamaConfig.from_dict(fields)


def final_config(pruned: Pruned, source: Path) -> LlamaConfig:
    """The configuration to write: a classifier's where output rows were cut, its labels the tokens of ``source``."""
    if pruned.plan.output_rows is None:
        return pruned.config
    ids = pruned.plan.output_rows.tolist()
    tokens = [str(token) for token in ids]
    if (source / "tokenizer.json").is_file():
        tokens = list(checkpoints.load_tokenizer(source).convert_ids_to_tokens(ids))
    return classifier_config(pruned.config, ids, tokens)


def write(pruned: Pruned, writer: checkpoints.ModelWriter) -> None:
    """Send every tensor of the smaller model to ``writer``."""
    for name, tensor in pruned.tensors():
        writer.add(name, tensor)
