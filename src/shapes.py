"""Sizes of a dense Llama: its tensors, exact parameter count, and whether a stock ``LlamaForCausalLM`` can have them.

Nothing here needs torch, weights or a network, so that a plan can be made on a login node.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
"""What a recipe may choose of a Llama: the rest follows from its vocabulary."""


@dataclass(kw_only=True)
class SizesConfig:
    """Settings for each of ``SIZES``; what is unset is decided by whoever reads them."""

    num_hidden_layers: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """The sizes that fix every tensor of a dense Llama without biases."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    output_rows: int | None = None
    """Rows of the output matrix when it was cut below ``vocab_size`` (Llama Guard 3 1B-INT4 keeps 20)."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for sizes that no stock Llama can have."""
        for name in (*SIZES, "vocab_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads={self.num_key_value_heads}, "
                f"got {self.num_attention_heads}"
            )
        if self.hidden_size % self.num_attention_heads:
            # transformers 5 refuses such a configuration even where head_dim is given.
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads={self.num_attention_heads}, "
                f"got {self.hidden_size} (LlamaConfig refuses it)"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, because rotary embedding turns pairs, got {self.head_dim}")
        if self.output_rows is not None:
            if not 1 <= self.output_rows <= self.vocab_size:
                raise ValueError(f"output_rows must be in 1..{self.vocab_size}, got {self.output_rows}")
            if self.tie_word_embeddings:
                raise ValueError("output_rows needs tie_word_embeddings=false: a tied matrix also holds the inputs")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LlamaShape:
        """Read the sizes from the mapping in a ``config.json``.

        Raises:
            ValueError: the configuration is not of a dense Llama without biases, or a size is missing.
        """
        if (kind := config.get("model_type")) != "llama":
            raise ValueError(f"model_type must be 'llama', got {kind!r}")
        for bias in ("attention_bias", "mlp_bias"):
            if config.get(bias):
                raise ValueError(f"{bias} must be false: no Llama has biases, and they are not handled here")
        required = [name for name in (*SIZES, "vocab_size") if name not in ("num_key_value_heads", "head_dim")]
        if missing := [name for name in required if config.get(name) is None]:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        heads = int(config["num_attention_heads"])
        return cls(
            num_hidden_layers=int(config["num_hidden_layers"]),
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            num_attention_heads=heads,
            num_key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
            vocab_size=int(config["vocab_size"]),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        )

    def config_fields(self) -> dict[str, int | bool]:
        """The fields of a ``LlamaConfig`` that this shape decides."""
        fields = dataclasses.asdict(self)
        del fields["output_rows"]
        return fields

    def layer_tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of one decoder layer, by its name below ``model.layers.N.``, in file order."""
        hidden, ffn = self.hidden_size, self.intermediate_size
        query, key = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (query, hidden),
            "self_attn.k_proj.weight": (key, hidden),
            "self_attn.v_proj.weight": (key, hidden),
            "self_attn.o_proj.weight": (hidden, query),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (ffn, hidden),
            "mlp.up_proj.weight": (ffn, hidden),
            "mlp.down_proj.weight": (hidden, ffn),
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of every stored tensor, by its name in a Hugging Face file; a tied head is not stored."""
        tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for index in range(self.num_hidden_layers):
            tensors |= {f"model.layers.{index}.{name}": size for name, size in self.layer_tensors().items()}
        tensors["model.norm.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            tensors["lm_head.weight"] = (self.output_rows or self.vocab_size, self.hidden_size)
        return tensors

    @property
    def attention_parameters(self) -> int:
        """Parameters of the four attention projections of one layer."""
        return 2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)

    @property
    def mlp_parameters(self) -> int:
        """Parameters of the three MLP projections of one layer."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer, its two norms included."""
        return self.attention_parameters + self.mlp_parameters + 2 * self.hidden_size

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the input matrix, and of the output matrix where it is a second one."""
        rows = 0 if self.tie_word_embeddings else (self.output_rows or self.vocab_size)
        return (self.vocab_size + rows) * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Exact number of stored parameters."""
        return self.embedding_parameters + self.num_hidden_layers * self.layer_parameters + self.hidden_size

    @property
    def kv_cache_values_per_token(self) -> int:
        """Numbers that generation keeps for every token: keys and values of all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim

    def forward_flops_per_token(self, context_tokens: float, *, head: bool = True) -> float:
        """Floating-point operations of a forward pass for one token that attends to ``context_tokens`` others.

        Two per multiply-add: every projection once, plus scores and mixture of values in each layer (Chowdhery et
        al., 2022, arXiv:2204.02311, appendix B). A causal row of S tokens without documents attends to S / 2 on
        average. A backward pass costs twice as much again.
        """
        layer = self.attention_parameters + self.mlp_parameters
        attention = 2 * self.num_attention_heads * self.head_dim * context_tokens
        output = (self.output_rows or self.vocab_size) * self.hidden_size if head else 0
        return 2.0 * (self.num_hidden_layers * (layer + attention) + output)


def _llama(layers: int, hidden: int, ffn: int, heads: int, head_dim: int, *, tied: bool) -> LlamaShape:
    return LlamaShape(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=head_dim,
        vocab_size=128_256,
        tie_word_embeddings=tied,
    )


PUBLISHED: dict[str, LlamaShape] = {
    "meta-llama/Llama-3.1-8B": _llama(32, 4096, 14336, 32, 128, tied=False),
    "meta-llama/Llama-3.1-70B": _llama(80, 8192, 28672, 64, 128, tied=False),
    "meta-llama/Llama-3.1-405B": _llama(126, 16384, 53248, 128, 128, tied=False),
    "meta-llama/Llama-3.2-1B": _llama(16, 2048, 8192, 32, 64, tied=True),
    "meta-llama/Llama-3.2-3B": _llama(28, 3072, 8192, 24, 128, tied=True),
    "meta-llama/Llama-Guard-3-8B": _llama(32, 4096, 14336, 32, 128, tied=False),
    "meta-llama/Llama-Guard-3-1B": _llama(16, 2048, 8192, 32, 64, tied=False),
    "meta-llama/Llama-Guard-3-1B-INT4": dataclasses.replace(_llama(12, 2048, 6400, 32, 64, tied=False), output_rows=20),
}
"""Published dense text models (meta-llama/llama-models, ``models/sku_list.py``; Llama Guard 3 model cards)."""
