"""How good a language model is on held-out rows, and how far it is from its teacher.

Every number is a ratio of two sums over rows: both sums are kept per row in float64, one function divides, and the
same rows give the standard error of a value and of the difference between two models.

Shape letters: B = rows of a batch, R = all rows, S = positions, T = positions that predict a label, D = hidden size,
V = vocabulary.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from llamita import faults, runs

log = logging.getLogger(__name__)

IGNORE = -100
LARGEST_LOSS = 700.0
"""Nats per token of which the exponential is still a number; a worse model has the perplexity of this one."""
CHUNK_VALUES = 2**26
"""Logits that exist at a time for each model: 256 MiB in float32."""


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """UTF-8 bytes that each token id stands for, ``[V]`` in int64; special tokens stand for none.

    A byte-level vocabulary spells every byte as one character (Radford et al., 2019, GPT-2, section 2.2), so a
    token has as many bytes as characters. Added tokens that are not special are spelt as they are.

    Raises:
        ValueError: the tokenizer is not byte-level.
    """
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    if '"ByteLevel"' not in json.dumps([definition["pre_tokenizer"], definition["decoder"]]):
        raise ValueError("bits per byte needs a byte-level tokenizer (Llama 3's kind); this one splits text otherwise")
    vocabulary = tokenizer.get_vocab()
    sizes = torch.zeros(max(vocabulary.values()) + 1, dtype=torch.int64)
    for token, index in vocabulary.items():
        sizes[index] = len(token)
    for index, added in tokenizer.added_tokens_decoder.items():
        sizes[index] = 0 if added.special else len(added.content.encode())
    return sizes


@dataclass(frozen=True, kw_only=True)
class RowSums:
    """What each held-out row adds up to, ``[R]`` in float64 on the CPU."""

    tokens: Tensor
    """Supervised tokens."""
    utf8_bytes: Tensor
    """Bytes of the supervised tokens."""
    nll: Tensor
    """Negative log-likelihood of the supervised tokens in nats."""
    kl: Tensor | None = None
    """KL(teacher || model) in nats, where there is a teacher."""
    top1: Tensor | None = None
    """Tokens whose most likely continuation is the teacher's, where there is a teacher."""

    @classmethod
    def joined(cls, parts: Sequence[RowSums]) -> RowSums:
        """The rows of all parts, in order; rows without a supervised token are left out.

        Raises:
            ValueError: no row has one.
        """
        if not any(part.tokens.any() for part in parts):
            raise ValueError("the held-out rows have no supervised token: nothing to measure")
        tokens = torch.cat([part.tokens for part in parts])
        kl = [part.kl for part in parts if part.kl is not None]
        top1 = [part.top1 for part in parts if part.top1 is not None]
        kept = tokens > 0
        return cls(
            tokens=tokens[kept],
            utf8_bytes=torch.cat([part.utf8_bytes for part in parts])[kept],
            nll=torch.cat([part.nll for part in parts])[kept],
            kl=torch.cat(kl)[kept] if kl else None,
            top1=torch.cat(top1)[kept] if top1 else None,
        )


def _hidden(model: LlamaForCausalLM, batch: Mapping[str, Tensor], predicts_BS: Tensor) -> Tensor:
    """Final hidden states of the positions that predict a label, ``[T, D]``."""
    # No attention mask and no cache: transformers then keeps documents apart where the position ids restart.
    hidden_BSD: Tensor = model.model(
        input_ids=batch["input_ids"].to(model.device),
        position_ids=batch["position_ids"].to(model.device),
        use_cache=False,
    ).last_hidden_state
    return hidden_BSD[:, :-1][predicts_BS.to(model.device)]


def project(hidden_TD: Tensor, head_VD: Tensor) -> Tensor:
    """Logits ``[T, V]`` in float32 or better: never rounded to the 16 bits that weights may have."""
    exact = torch.promote_types(head_VD.dtype, torch.float32)
    if head_VD.is_cuda and head_VD.dtype != exact:
        return torch.mm(hidden_TD.to(head_VD.dtype), head_VD.T, out_dtype=exact)
    return hidden_TD.to(exact) @ head_VD.to(exact).T


def _log_probabilities(model: LlamaForCausalLM, hidden_TD: Tensor) -> Tensor:
    return functional.log_softmax(project(hidden_TD, model.lm_head.weight), dim=-1)


def join_launch() -> PartialState:
    """The processes of this launch; makes the process group, so every rank must come here."""
    on_cpu = not torch.cuda.is_available()
    # Not told the backend, accelerate lets every process of a launch on CPUs believe that it is alone.
    backend = None if "RANK" not in os.environ else "gloo" if on_cpu else "nccl"
    return PartialState(cpu=on_cpu, backend=backend, timeout=runs.COLLECTIVE_TIMEOUT)


@torch.inference_mode()
def row_sums(
    model: LlamaForCausalLM,
    batch: Mapping[str, Tensor],
    token_bytes_V: Tensor,
    *,
    teacher: LlamaForCausalLM | None = None,
    chunk_values: int = CHUNK_VALUES,
) -> RowSums:
    """Sums over each row of ``batch``: position s predicts label s + 1, within its document.

    The head is applied to so many positions at a time that at most ``chunk_values`` logits exist per model.
    """
    labels_BS = batch["labels"][:, 1:]
    predicts_BS = labels_BS != IGNORE
    row_T, target_T = predicts_BS.nonzero()[:, 0], labels_BS[predicts_BS]
    sums: dict[str, Tensor] = {}

    def add(name: str, row_T: Tensor, value_T: Tensor) -> None:
        sums.setdefault(name, torch.zeros(len(labels_BS), dtype=torch.float64))
        sums[name].index_add_(0, row_T.cpu(), value_T.double().cpu())

    add("tokens", row_T, torch.ones_like(row_T))
    add("utf8_bytes", row_T, token_bytes_V[target_T.cpu()])
    hidden_TD = _hidden(model, batch, predicts_BS)
    teacher_hidden_TD = None if teacher is None else _hidden(teacher, batch, predicts_BS)
    size = max(1, chunk_values // model.config.vocab_size)
    for start in range(0, max(1, len(row_T)), size):
        part = slice(start, start + size)
        student_TV = _log_probabilities(model, hidden_TD[part])
        nll_T = -student_TV.gather(1, target_T[part, None].to(student_TV.device)).squeeze(1)
        add("nll", row_T[part], nll_T)
        if teacher is None or teacher_hidden_TD is None:
            continue
        teacher_TV = _log_probabilities(teacher, teacher_hidden_TD[part]).to(student_TV.device)
        kl_TV = functional.kl_div(student_TV, teacher_TV, reduction="none", log_target=True)
        add("kl", row_T[part], kl_TV.sum(-1, dtype=torch.float64))
        add("top1", row_T[part], student_TV.argmax(-1) == teacher_TV.argmax(-1))
    return RowSums(**sums)


@faults.phase("measuring a model", memory="a smaller data.batch_rows")
def measure(
    model: LlamaForCausalLM,
    batches: Iterable[Mapping[str, Tensor]],
    token_bytes_V: Tensor,
    *,
    teacher: LlamaForCausalLM | None = None,
) -> RowSums:
    """Sums of every row of ``batches``, and of the batches that the other ranks of the launch were given.

    Both models must be in evaluation mode and share their vocabulary. The order of the rows depends on the batches
    alone, so the results of two models for the same batches can be paired.

    Raises:
        ValueError: no rank has a supervised token.
    """
    PartialState()
    parts = [row_sums(model, batch, token_bytes_V, teacher=teacher) for batch in batches]
    return RowSums.joined(gather_object(parts))


@dataclass(frozen=True)
class Estimate:
    """A value and the standard error that the choice of held-out rows gives it; ``None`` from a single row."""

    value: float
    stderr: float | None


def ratio(numerator_R: Tensor, denominator_R: Tensor) -> Estimate:
    """Ratio of two sums over rows, and its standard error by linearisation: the one place that divides.

    With R = Σx/Σn over m rows, se² = m/(m-1) · Σ(x - R n)² / (Σn)² (Cochran, 1977, Sampling Techniques, section
    6.4). Tokens of one row depend on each other; rows hardly do, which is why rows are the unit.
    """
    total = float(denominator_R.sum())
    value = float(numerator_R.sum()) / total
    rows = len(numerator_R)
    if rows < 2:
        return Estimate(value, None)
    residual = float((numerator_R - value * denominator_R).square().sum())
    return Estimate(value, math.sqrt(rows / (rows - 1) * residual) / total)


def summary(rows: RowSums) -> dict[str, Estimate]:
    """``loss`` (nats per token), ``perplexity``, ``bits_per_byte``; with a teacher ``kl`` (nats) and ``top1_agree``.

    Bits per byte do not depend on the tokenizer: Σ nll / (ln 2 · UTF-8 bytes of the supervised tokens) (Gao et al.,
    2020, arXiv:2101.00027, section 3.1).

    Raises:
        ValueError: the loss is not a finite number.
    """
    loss = ratio(rows.nll, rows.tokens)
    if not math.isfinite(loss.value):
        raise ValueError(
            f"the model's loss is {loss.value}: its weights are not finite, or too large for their dtype; "
            "float16 is too narrow for most Llamas, dtype=bfloat16 and dtype=float32 are not"
        )
    perplexity = math.exp(min(loss.value, LARGEST_LOSS))
    values = {
        "loss": loss,
        "perplexity": Estimate(perplexity, None if loss.stderr is None else perplexity * loss.stderr),
        "bits_per_byte": ratio(rows.nll / math.log(2), rows.utf8_bytes),
    }
    if rows.kl is not None and rows.top1 is not None:
        values["kl"] = ratio(rows.kl, rows.tokens)
        values["top1_agree"] = ratio(rows.top1, rows.tokens)
    return values


def difference(first: RowSums, second: RowSums) -> dict[str, Estimate]:
    """``loss`` and ``bits_per_byte`` of the first model minus the second's, paired by row.

    Rows that are hard for one model are hard for the other, so the error of the difference is far below those of its
    parts.

    Raises:
        ValueError: the two were not measured on the same rows.
    """
    if not torch.equal(first.tokens, second.tokens) or not torch.equal(first.utf8_bytes, second.utf8_bytes):
        raise ValueError("a paired difference needs both models measured on the same rows")
    gap_R = first.nll - second.nll
    return {
        "loss": ratio(gap_R, first.tokens),
        "bits_per_byte": ratio(gap_R / math.log(2), first.utf8_bytes),
    }


def sizes(rows: RowSums) -> dict[str, int]:
    """How much was measured: ``rows``, ``tokens``, ``utf8_bytes``."""
    return {"rows": len(rows.tokens), "tokens": int(rows.tokens.sum()), "utf8_bytes": int(rows.utf8_bytes.sum())}


def differences(sums: Mapping[str, RowSums]) -> list[dict[str, Any]]:
    """:func:`difference` of every pair of models, as ``{"first": name, "second": name, metric: estimate}``."""
    pairs = itertools.combinations(sums, 2)
    return [{"first": a, "second": b, **difference(sums[a], sums[b])} for a, b in pairs]


def metrics(
    split: str, values: Mapping[str, Estimate], scores: Mapping[str, Mapping[str, Estimate]]
) -> dict[str, float]:
    """Names of the dashboards: ``val/<split>/…``, ``kd/top1_agree``, ``eval/<task>/<metric>``."""
    names = {"kl": f"val/{split}/kd", "top1_agree": "kd/top1_agree"}
    logged = {names.get(name, f"val/{split}/{name}"): estimate.value for name, estimate in values.items()}
    for task, metrics in scores.items():
        logged |= {f"eval/{task}/{metric}": estimate.value for metric, estimate in metrics.items()}
    return logged
