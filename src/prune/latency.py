"""How long a Llama of given sizes takes for one answer, measured on this machine with random weights."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llamita.shapes import LlamaShape


@dataclass(kw_only=True)
class LatencyConfig:
    """The answer that is timed, and how often."""

    batch: int = 1
    """Answers at a time."""
    prompt: int = 128
    """Tokens that are read before the first one is written."""
    new_tokens: int = 32
    """Tokens that are written, one after the other."""
    warmup: int = 1
    """Answers before the clock is looked at."""
    repeats: int = 5
    """Answers that are timed; their median counts."""
    whole_parameters: int = 500_000_000
    """Larger models are timed as their ends plus the number of layers times one layer."""

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("prompt", 1), ("new_tokens", 1), ("warmup", 0), ("repeats", 1)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"latency.{name} must be at least {least}, got {value}")
        if self.whole_parameters < 0:
            raise ValueError(f"latency.whole_parameters must be at least 0, got {self.whole_parameters}")


class Stopwatch:
    """Times shapes of one family; of large ones each part is timed once, however many shapes share it."""

    def __init__(
        self, config: LlamaConfig, settings: LatencyConfig, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """``config`` gives what a shape does not: vocabulary apart, rotary scaling and epsilon."""
        self._config, self._settings = config, settings
        self._dtype, self._device = dtype, torch.device(device)
        self._known: dict[tuple[LlamaShape, int], float] = {}

    def milliseconds(self, shape: LlamaShape) -> float:
        """Median time of one batch of answers: the prompt once, then token by token from the cache.

        Above ``whole_parameters`` it is t(0) + L (t(1) - t(0)), t(n) being the time with n of the L layers: layers are
        alike and follow each other, so only what one leaves in a processor's cache for the next is missed.
        """
        if shape.num_parameters <= self._settings.whole_parameters:
            return self._time(shape, shape.num_hidden_layers)
        ends, one = self._time(shape, 0), self._time(shape, 1)
        return ends + shape.num_hidden_layers * max(one - ends, 0.0)

    def _time(self, shape: LlamaShape, layers: int) -> float:
        key = dataclasses.replace(shape, num_hidden_layers=max(layers, 1))
        if layers == 0:  # nothing of a layer is in it: one time for all that share hidden size and head
            key = dataclasses.replace(
                key, intermediate_size=1, num_attention_heads=1, num_key_value_heads=1, head_dim=2
            )
        if (key, layers) not in self._known:
            fields = shape.config_fields() | {"num_hidden_layers": layers}
            self._known[key, layers] = self._measure(LlamaConfig.from_dict(self._config.to_dict() | fields))
        return self._known[key, layers]

    @torch.no_grad()
    def _measure(self, config: LlamaConfig) -> float:
        settings = self._settings
        config._attn_implementation = "sdpa"
        with torch.device(self._device):
            model = LlamaForCausalLM(config)
            torch.nn.Module.to(model.train(False), dtype=self._dtype)
            prompt = torch.randint(config.vocab_size, (settings.batch, settings.prompt))
        for _ in range(settings.warmup):
            self._answer(model, prompt)
        return (
            statistics.median(self._seconds(lambda: self._answer(model, prompt)) for _ in range(settings.repeats)) * 1e3
        )

    def _answer(self, model: LlamaForCausalLM, tokens: Tensor) -> None:
        """Greedy, and never ended early: every shape writes equally many tokens."""
        cache = None
        for _ in range(self._settings.new_tokens):
            output = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            tokens, cache = output.logits.argmax(-1), output.past_key_values

    def _seconds(self, action: Callable[[], None]) -> float:
        self._wait()
        started = time.perf_counter()
        action()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        """A GPU's queue would make the clock run ahead."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
