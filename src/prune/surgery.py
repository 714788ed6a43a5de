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
from llamita.prune import tie
from llamita.prune.basis import scaled, take
from llamita.prune.plan import Plan
from llamita.prune.stream import Model
from llamita.prune.target import Rope, check_kind
from llamita.shapes import LlamaShape

NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
NORM_BEFORE = {
    "self_attn.q_proj.weight": NORMS[0],
    "self_attn.k_proj.weight": NORMS[0],
    "self_attn.v_proj.weight": NORMS[0],
    "mlp.gate_proj.weight": NORMS[1],
    "mlp.up_proj.weight": NORMS[1],
}
"""The norm behind which each matrix reads the stream."""
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
        self._scale: float | None = None

    def readers(self, index: int) -> dict[str, tuple[Tensor | None, float]]:
        """Rows of the matrices of layer ``index`` that read the stream, ``None``: all, and the factor of each."""
        plan, half, size = self.plan, self.plan.source.head_dim // 2, self.plan.source.head_dim
        keys, group = plan.kv_heads[index], len(plan.heads[index]) // len(plan.kv_heads[index])
        pairs_KE = torch.cat([plan.pairs[index], plan.pairs[index] + half], dim=1)
        query = channels(plan.heads[index], pairs_KE.repeat_interleave(group, 0), size)
        key, value = (channels(keys, dims, size) for dims in (pairs_KE, plan.values[index]))
        return {
            "self_attn.q_proj.weight": (query, plan.query_scale),
            "self_attn.k_proj.weight": (key, 1.0),
            "self_attn.v_proj.weight": (value, 1.0),
            "mlp.gate_proj.weight": (plan.mlp[index], 1.0),
            "mlp.up_proj.weight": (plan.mlp[index], 1.0),
        }

    def writers(self, index: int) -> dict[str, Tensor]:
        """Columns of the matrices of layer ``index`` that write into the stream."""
        plan, size = self.plan, self.plan.source.head_dim
        heads, group = plan.heads[index], len(plan.heads[index]) // len(plan.kv_heads[index])
        read = channels(heads, plan.values[index].repeat_interleave(group, 0), size)
        return {"self_attn.o_proj.weight": read, "mlp.down_proj.weight": plan.mlp[index]}

    def layer(self, index: int) -> dict[str, Tensor]:
        """The tensors of layer ``index`` of the smaller model."""
        plan, basis = self.plan, self.plan.basis
        weights = self.model.layer(int(plan.layers[index]))
        result = {
            norm: scaled(basis.gain(weights[norm]), float(plan.norm_gain[2 * index + place]))
            for place, norm in enumerate(NORMS)
        }
        for name, (rows, factor) in self.readers(index).items():
            gain = weights[NORM_BEFORE[name]]
            result[name] = basis.reads(take(weights[name], rows, None), gain, factor)
        for name, columns in self.writers(index).items():
            result[name] = basis.writes(take(weights[name], None, columns))
        return {name: result[name] for name in self.shape.layer_tensors()}

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name that belongs to no layer."""
        match name:
            case "model.embed_tokens.weight":
                return self.embedding()
            case "model.norm.weight":
                gain = float(self.plan.norm_gain[-1]) * self._tied_scale()
                return scaled(self.plan.basis.gain(self.model[name]), gain)
            case "lm_head.weight":
                return self.head()
            case _:
                raise KeyError(name)

    def embedding(self) -> Tensor:
        """The input matrix, which is the output matrix as well where the two are tied."""
        if self.plan.tie is None:
            return self.plan.basis.states(self.model["model.embed_tokens.weight"])
        if self._embedding is None:
            scale = self._tied_scale()
            self._embedding = tie.tied(
                self.model["model.embed_tokens.weight"],
                self.model.head(),
                self.model["model.norm.weight"],
                self.plan,
                scale,
            )
        return self._embedding

    def _tied_scale(self) -> float:
        """Factor of the final norm by which the shared matrix, good as an input, has the output matrix's size."""
        if self.plan.tie is None or not self.plan.basis.rotates:
            return 1.0
        if self._scale is None:
            embedding, head = self.model["model.embed_tokens.weight"], self.model.head()
            self._scale = tie.scale(embedding, head, self.model["model.norm.weight"], self.plan.basis)
        return self._scale

    def head(self) -> Tensor:
        """The output matrix."""
        if self.shape.tie_word_embeddings:
            return self.embedding()
        rows = take(self.model.head(), self.plan.output_rows, None)
        return self.plan.basis.reads(rows, self.model["model.norm.weight"])


def tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor of a smaller model by its name in a Hugging Face file, in file order."""
    yield "model.embed_tokens.weight", model["model.embed_tokens.weight"]
    for index in range(model.shape.num_hidden_layers):
        for name, tensor in model.layer(index).items():
            yield f"model.layers.{index}.{name}", tensor
    yield "model.norm.weight", model["model.norm.weight"]
    if model.shape.output_rows is not None:
        yield "score.weight", model.head()
        yield "score.bias", torch.zeros(model.shape.output_rows, dtype=model.dtype)
    elif not model.shape.tie_word_embeddings:
        yield "lm_head.weight", model.head()


def channels(heads: Tensor, inside: Tensor, head_dim: int) -> Tensor:
    """Rows of a projection: of each head the channels ``inside`` [heads, kept]."""
    return (heads[:, None] * head_dim + inside).flatten()


def pruned_config(source: LlamaConfig, plan: Plan) -> LlamaConfig:
    """The smaller model's configuration: the source's, with the sizes of the target.

    Raises:
        ValueError: the source is a reward model, or ``rope=published`` for one without Llama 3's rotary scaling.
    """
    check_kind(source)
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


def write(model: Model, writer: checkpoints.ModelWriter) -> None:
    """Send every tensor of the smaller model to ``writer``."""
    for name, tensor in tensors(model):
        writer.add(name, tensor)
