"""Tiny Llamas and recipes for all tests."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import hypothesis
import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import LlamaConfig, LlamaForCausalLM

REPOSITORY = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)
# A law is not a stop-watch: the first example of a test pays for imports, and machines are shared.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def no_precision_of_another_test() -> Iterator[None]:
    """accelerate keeps the first precision of a process, which the next test of the same worker may not want."""
    yield
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != "no":
        AcceleratorState._reset_state()


def tiny_config(**overrides: Any) -> LlamaConfig:
    """A configuration with the proportions of Llama 3.1 8B that runs in milliseconds."""
    fields: dict[str, Any] = {
        "num_hidden_layers": 3,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 128,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }
    return LlamaConfig(**{**fields, **overrides})


def tiny_model(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A random Llama in float32, norms included, in evaluation mode."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(**overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def tiny() -> LlamaForCausalLM:
    return tiny_model()


@pytest.fixture(scope="session")
def recipe() -> Callable[[str], ModuleType]:
    """Import a recipe file by its name, as ``python recipes/NAME.py`` would."""

    def load(name: str) -> ModuleType:
        for module in ("_main", name):
            key = module if module == "_main" else f"recipe_{name}"
            if key not in sys.modules:
                spec = importlib.util.spec_from_file_location(key, REPOSITORY / "recipes" / f"{module}.py")
                assert spec is not None
                assert spec.loader is not None
                sys.modules[key] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(sys.modules[key])
        return sys.modules[f"recipe_{name}"]

    return load
