"""Answers of a model to prompts, drawn so that they can be drawn again, and how likely a model finds given answers.

The noise behind a drawn answer depends on the seed, the prompt's id, the round and the answer's number, and on nothing
else: one uniform number for every token, fixed before the first. A token is the one in whose share of the unit
interval that number falls (inversion; Devroye, 1986, Non-Uniform Random Variate Generation, section III.2). What
follows from it exactly: the same batches on the same kind of device give the same answers, whenever they are drawn and
however many processes share the work. What holds up to rounding: in other batches, or on another device, the logits
differ in their last bits, and a token differs where the number lies that close to a border.

Shape letters: B = rows of a batch, S = positions, V = vocabulary, D = hidden size, N = all rows, T = scored tokens.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import importlib.util
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from llamita import chat

log = logging.getLogger(__name__)

CHUNK_VALUES = 2**26
"""Logits that exist at a time when answers are scored: 256 MiB in float32."""


class Backend(StrEnum):
    """Who draws the answers."""

    transformers = "transformers"
    vllm = "vllm"
    """Several times faster on a GPU, where it is installed; its answers are not those of the other backend."""


@dataclass(kw_only=True)
class SamplingConfig:
    """How answers are drawn."""

    backend: Backend = Backend.transformers
    temperature: float = 1.0
    """0 takes the likeliest token each time."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this share (Holtzman et al., 2020, arXiv:1904.09751)."""
    max_new_tokens: int = 512
    """Tokens of an answer; one that has not ended by then counts as cut off."""
    batch_rows: int = 16
    """Answers that are drawn at a time."""
    gpu_memory_share: float = 0.9
    """Of the device's memory, for ``vllm``."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what cannot be meant."""
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"sampling.temperature must be >= 0 and finite, got {self.temperature}")
        for name in ("top_p", "gpu_memory_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"sampling.{name} must be above 0 and at most 1, got {getattr(self, name)}")
        for name in ("max_new_tokens", "batch_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"sampling.{name} must be at least 1, got {getattr(self, name)}")

    def check(self) -> None:
        """Raise ``ValueError`` where the backend is not installed."""
        if self.backend is Backend.vllm and importlib.util.find_spec("vllm") is None:
            raise ValueError(
                "sampling.backend=vllm: vllm is not installed; sampling.backend=transformers needs nothing"
            )


@dataclass(frozen=True)
class Prompt:
    """What is answered, as the model reads it."""

    id: str
    ids: list[int]


@dataclass(frozen=True)
class Answer:
    """What a model said."""

    text: str
    tokens: int
    """Tokens drawn, with the one that ends the answer."""
    finished: bool
    """Whether it ended by itself; else it was cut at ``max_new_tokens``."""


class Sampler(Protocol):
    """Draws ``samples`` answers to each prompt, in the order of the prompts."""

    def draw(
        self, prompts: Sequence[Prompt], *, samples: int, seed: int, number: int = 0
    ) -> list[list[Answer]]: ...  # pragma: no cover


def seed_of(seed: int, prompt_id: str, number: int, sample: int) -> int:
    """The seed of one answer: 63 bits of a hash, so that no two answers share their noise."""
    text = f"{seed}\n{number}\n{sample}\n{prompt_id}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def uniforms(seeds: Sequence[int], length: int) -> Tensor:
    """One number in [0, 1) per row and token, ``[B, length]`` in float64; a row's depend on its own seed alone."""
    generator = torch.Generator()
    rows = [torch.rand(length, generator=generator.manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows)


def invert(logits_BV: Tensor, uniform_B: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """The token of each row in whose share of the unit interval its number falls, ``[B]``.

    Shares are the softmax of ``logits / temperature``, without the tokens that ``top_p`` leaves out, in float64: in
    float32 the sum over 128,256 tokens would be off by more than a rare token's share.

    Raises:
        ValueError: a logit is not a number.
    """
    if torch.isnan(logits_BV).any():
        raise ValueError("the model's logits are not numbers: its weights are not finite, or too large for their dtype")
    shares_BV = torch.softmax(logits_BV.double() / temperature, dim=-1)
    if top_p < 1:
        ordered_BV, order_BV = shares_BV.sort(dim=-1, descending=True, stable=True)
        # A token is kept while those before it have less than the share: the likeliest always is.
        dropped_BV = ordered_BV.cumsum(-1) - ordered_BV >= top_p
        shares_BV = shares_BV.masked_fill(dropped_BV.scatter(1, order_BV, dropped_BV), 0.0)
    border_BV = shares_BV.cumsum(-1)
    wanted_B1 = uniform_B.to(border_BV.device)[:, None] * border_BV[:, -1:]
    token_B = torch.searchsorted(border_BV, wanted_B1, right=True).squeeze(1)
    # A number just below one can be rounded up to the last border: the last token that has a share.
    last_B = (shares_BV > 0).long().cumsum(-1).argmax(-1)
    return torch.minimum(token_B, last_B)


class _Choice(LogitsProcessor):
    """Leaves each row the one token that was drawn for it, which greedy search then takes."""

    def __init__(self, uniform_BS: Tensor, config: SamplingConfig, prompt_length: int) -> None:
        self._uniform_BS = uniform_BS
        self._config = config
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self._prompt_length
        settings = {"temperature": self._config.temperature, "top_p": self._config.top_p}
        token_B = invert(scores, self._uniform_BS[:, step], **settings)
        return torch.full_like(scores, -math.inf).scatter(1, token_B[:, None], 0.0)


@contextmanager
def _own_settings(model: LlamaForCausalLM) -> Iterator[None]:
    """Without the model directory's generation settings, which would else add themselves to ours."""
    kept = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = kept


class TransformersSampler:
    """Draws with a model that is in memory."""

    def __init__(self, model: LlamaForCausalLM, encoder: chat.Encoder, config: SamplingConfig) -> None:
        self._model: Any = model
        self._encoder = encoder
        self._config = config

    def draw(self, prompts: Sequence[Prompt], *, samples: int, seed: int, number: int = 0) -> list[list[Answer]]:
        """Answers to each prompt; batches hold prompts of similar length."""
        rows = [(place, sample) for place in range(len(prompts)) for sample in range(samples)]
        rows.sort(key=lambda row: len(prompts[row[0]].ids))
        found: dict[tuple[int, int], Answer] = {}
        size = self._config.batch_rows
        for first in range(0, len(rows), size):
            batch = rows[first : first + size]
            seeds = [seed_of(seed, prompts[place].id, number, sample) for place, sample in batch]
            answers = self._batch([prompts[place].ids for place, _ in batch], seeds)
            found.update(zip(batch, answers, strict=True))
        return [[found[place, sample] for sample in range(samples)] for place in range(len(prompts))]

    @torch.inference_mode()
    def _batch(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Answer]:
        stops, pad = self._encoder.stop_ids, self._encoder.borders.pad_id
        length = max(map(len, prompts))
        ids_BS = torch.tensor([[pad] * (length - len(ids)) + ids for ids in prompts])
        mask_BS = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts])
        chosen = LogitsProcessorList()
        if self._config.temperature > 0:
            chosen.append(_Choice(uniforms(seeds, self._config.max_new_tokens), self._config, length))
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=self._config.max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=stops,
            pad_token_id=pad,
            bos_token_id=self._encoder.borders.bos_id,
            use_cache=True,
        )
        with _own_settings(self._model):
            said_BS = self._model.generate(
                input_ids=ids_BS.to(self._model.device),
                attention_mask=mask_BS.to(self._model.device),
                generation_config=settings,
                logits_processor=chosen,
            )
        return [answer_of(ids, self._encoder) for ids in said_BS[:, length:].tolist()]


def answer_of(ids: Sequence[int], encoder: chat.Encoder) -> Answer:
    """What was said in the ids behind a prompt, which may be followed by padding."""
    stops = set(encoder.stop_ids)
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    return Answer(encoder.text(ids), len(ids) if end is None else end + 1, end is not None)


class VllmSampler:
    """Draws with vLLM, one request to an answer, each with its own seed."""

    def __init__(self, path: Path, encoder: chat.Encoder, config: SamplingConfig, *, dtype: str | None = None) -> None:
        """Load the model in ``path``.

        Raises:
            ValueError: vLLM is not installed.
        """
        config.check()
        self._vllm: Any = importlib.import_module("vllm")
        self._encoder = encoder
        self._config = config
        self._model = self._vllm.LLM(
            model=str(path),
            dtype=dtype or "auto",
            max_num_seqs=config.batch_rows,
            gpu_memory_utilization=config.gpu_memory_share,
            trust_remote_code=False,
            # Every answer to a prompt reads the prompt once.
            enable_prefix_caching=True,
        )

    def draw(self, prompts: Sequence[Prompt], *, samples: int, seed: int, number: int = 0) -> list[list[Answer]]:
        """Answers to each prompt."""
        requests, settings = [], []
        for prompt in prompts:
            for sample in range(samples):
                requests.append({"prompt_token_ids": prompt.ids})
                settings.append(
                    self._vllm.SamplingParams(
                        temperature=self._config.temperature,
                        top_p=self._config.top_p,
                        max_tokens=self._config.max_new_tokens,
                        stop_token_ids=self._encoder.stop_ids,
                        seed=seed_of(seed, prompt.id, number, sample),
                        detokenize=False,
                    )
                )
        outputs = self._model.generate(requests, settings, use_tqdm=False)
        answers = [answer_of(list(output.outputs[0].token_ids), self._encoder) for output in outputs]
        return [answers[first : first + samples] for first in range(0, len(answers), samples)]


def give_back() -> None:
    """Give the memory of models that nothing holds any more back to the accelerator, where others can have it.

    PyTorch keeps what it once had for itself, and vLLM asks for a share of the whole accelerator at once.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_lengths(prompts: Sequence[Prompt], config: SamplingConfig, positions: int, owner: str) -> None:
    """Raise ``ValueError`` for a prompt that leaves a model of so many ``positions`` no room for an answer."""
    for prompt in prompts:
        if len(prompt.ids) + config.max_new_tokens > positions:
            raise ValueError(
                f"prompt {prompt.id} has {len(prompt.ids)} tokens: with sampling.max_new_tokens="
                f"{config.max_new_tokens} that is more than the {positions} positions of {owner}"
            )


@dataclass(frozen=True)
class Scored:
    """A text and which of its tokens are scored, each by what stands before it."""

    ids: list[int]
    scored: list[bool]

    @classmethod
    def answer(cls, prompt: list[int], answer: list[int]) -> Scored:
        """An answer, scored behind its prompt."""
        return cls([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))


@torch.inference_mode()
def log_probabilities(
    model: LlamaForCausalLM, texts: Sequence[Scored], *, batch_rows: int = 16, chunk_values: int = CHUNK_VALUES
) -> tuple[Tensor, Tensor]:
    """Summed log-probability (nats) of the scored tokens of each text, and how many they are: ``[N]`` in float64.

    Padding stands on the right, where no token sees it. Logits are made in float32 or better, whatever the weights'
    dtype, at most ``chunk_values`` at a time.
    """
    total_N = torch.zeros(len(texts), dtype=torch.float64)
    count_N = torch.zeros(len(texts), dtype=torch.float64)
    order = sorted(range(len(texts)), key=lambda place: len(texts[place].ids))
    for first in range(0, len(order), batch_rows):
        places = order[first : first + batch_rows]
        length = max(len(texts[place].ids) for place in places)
        ids_BS = torch.tensor([texts[p].ids + [0] * (length - len(texts[p].ids)) for p in places])
        counts_BS = torch.tensor([texts[p].scored + [False] * (length - len(texts[p].scored)) for p in places])
        mask_BS = torch.tensor([[1] * len(texts[p].ids) + [0] * (length - len(texts[p].ids)) for p in places])
        hidden_BSD = model.model(
            input_ids=ids_BS.to(model.device), attention_mask=mask_BS.to(model.device), use_cache=False
        ).last_hidden_state
        predicts_BS = counts_BS[:, 1:]
        row_T, target_T = predicts_BS.nonzero()[:, 0], ids_BS[:, 1:][predicts_BS]
        hidden_TD = hidden_BSD[:, :-1][predicts_BS.to(model.device)]
        value_T = _log_probabilities(model, hidden_TD, target_T.to(model.device), chunk_values).double().cpu()
        place_T = torch.tensor(places)[row_T]
        total_N.index_add_(0, place_T, value_T)
        count_N.index_add_(0, place_T, torch.ones_like(value_T))
    return total_N, count_N


def _log_probabilities(model: LlamaForCausalLM, hidden_TD: Tensor, target_T: Tensor, chunk_values: int) -> Tensor:
    head_VD = model.lm_head.weight
    exact = torch.promote_types(head_VD.dtype, torch.float32)
    size = max(1, chunk_values // head_VD.shape[0])
    parts = []
    for first in range(0, len(hidden_TD), size):
        logits_TV = hidden_TD[first : first + size].to(exact) @ head_VD.to(exact).T
        parts.append(torch.log_softmax(logits_TV, -1).gather(1, target_T[first : first + size, None]).squeeze(1))
    return torch.cat(parts) if parts else hidden_TD.new_zeros(0)
