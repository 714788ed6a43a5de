"""Tiny assistants, reward models and dialogues for the recipes that align."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from conftest import tiny_config
from llamita import chat, checkpoints
from llamita.align import dialogues
from llamita.align.dialogues import Dialogue, Pair, Task
from llamita.data import tokens

VOCABULARY = 340


def tokenizer() -> PreTrainedTokenizerFast:
    """Llama 3's special tokens over a vocabulary of few merges."""
    text = " ".join(f"What is {a} + {b}? The answer is {a + b}." for a in range(20) for b in range(20))
    return tokens.train([text, "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ"], VOCABULARY)


def _config(layers: int = 2) -> object:
    return tiny_config(
        vocab_size=VOCABULARY, num_hidden_layers=layers, hidden_size=32, intermediate_size=48, head_dim=8
    )


def assistant(path: Path, *, seed: int = 0, ends: float = 2.0) -> Path:
    """A random Llama whose answers end soon: ``ends`` is how much the end of a turn stands out among the logits."""
    words = tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_config())  # type: ignore[arg-type]
    with torch.no_grad():
        # Channel 0 is the same for every token: the head reads from it what it would have as a bias.
        model.model.embed_tokens.weight[:, 0] = 0.05
        model.lm_head.weight *= 20
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[words.convert_tokens_to_ids(chat.TURN_END), 0] = ends
    path.mkdir(parents=True)
    checkpoints.save_model(model, path, source=_saved(words, path), provenance={"parents": {}})
    return path


def reward_model(path: Path, *, seed: int = 0, scale: float = 20.0) -> Path:
    """A random reward model, whose rewards differ from answer to answer."""
    torch.manual_seed(seed)
    config = _config()
    config.num_labels = 1  # type: ignore[attr-defined]
    model = LlamaForSequenceClassification(config)  # type: ignore[arg-type]
    with torch.no_grad():
        model.score.weight *= scale
    model.save_pretrained(path)
    checkpoints.copy_tokenizer(_saved(tokenizer(), path), path)
    return path


def _saved(words: PreTrainedTokenizerFast, path: Path) -> Path:
    folder = path.with_name(f"{path.name}-tokenizer")
    tokens.save(words, None, folder)
    return folder


def user(text: str) -> tuple[dialogues.Message, ...]:
    return ({"role": "user", "content": text},)


def said(text: str) -> dialogues.Message:
    return {"role": "assistant", "content": text}


def data(path: Path, *, train: int = 6, validation: int = 3, seed: int = 0) -> Path:
    """A directory as the recipe ``dialogues`` writes it: sums as tasks, dialogues and pairs, in both splits."""
    dice = random.Random(seed)
    rows: dict[str, dict[str, list[dialogues.Row]]] = {}
    for split, count in (("train", train), ("validation", validation)):
        sums = [(dice.randint(0, 9), dice.randint(0, 9)) for _ in range(count)]
        asked = [(f"{split}-{place}", user(f"What is {a} + {b}?"), a + b) for place, (a, b) in enumerate(sums)]
        rows[split] = {
            "dialogues": [
                Dialogue(f"d-{name}", (*prompt, said(f"The answer is {right}."))) for name, prompt, right in asked
            ],
            "pairs": [
                Pair(f"p-{name}", prompt, said(f"The answer is {right}."), said(f"It is {right + 1}, or so."))
                for name, prompt, right in asked
            ],
            "tasks": [
                Task(f"t-{name}", prompt, {"kind": "length", "min": 3, "max": 12, "unit": "characters"})
                for name, prompt, _ in asked
            ],
        }
    path.mkdir(parents=True, exist_ok=True)
    dialogues.write_all(path, rows, {})
    return path
