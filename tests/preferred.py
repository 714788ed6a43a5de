"""A tiny Llama that can be spoken to, and pairs, tasks and dialogues for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import tiny_model
from llamita import chat, checkpoints
from llamita.align import dialogues
from llamita.align.dialogues import Pair, Task
from llamita.data import tokens

SENTENCE = "the cat sat on a mat and saw nine green birds fly over seven quiet hills before it rained all day"
WORDS = SENTENCE.split()


def model(folder: Path, *, template: bool = False, seed: int = 0, **overrides: Any) -> Path:
    """A model directory with a tokenizer of 300 ids, Llama 3's special tokens among them."""
    tokenizer = tokens.train([" ".join(WORDS[n % 7 :] + WORDS[: n % 5]) for n in range(40)], 300)
    if template:
        tokenizer.chat_template = chat.TEMPLATE
    ids = tokenizer.get_vocab()
    fields = {"vocab_size": 300, "bos_token_id": ids[chat.BOS], "eos_token_id": ids[chat.TURN_END], **overrides}
    source = folder.with_name(f"{folder.name}-tokenizer")
    tokenizer.save_pretrained(source)
    made = tiny_model(seed, num_hidden_layers=2, **fields)
    checkpoints.save_model(made, folder, source=source, provenance={})
    return folder


def asked(number: int) -> tuple[dict[str, Any], ...]:
    return ({"role": "user", "content": f"{WORDS[number % 7]} {WORDS[number % 11]} {WORDS[number % 5]}?"},)


def said(*words: str) -> dict[str, Any]:
    return {"role": "assistant", "content": " ".join(words)}


def pairs(first: int, last: int) -> list[Pair]:
    """The preferred answer speaks of birds, the other of rain; both of many lengths."""
    return [
        Pair(
            f"pair-{n}",
            asked(n),
            said(*WORDS[n % 4 : n % 4 + 1 + n % 5], "green", "birds"),
            said(*WORDS[n % 6 : n % 6 + 2 + n % 3], "it", "rained"),
        )
        for n in range(first, last)
    ]


def tasks(first: int, last: int, **check: Any) -> list[Task]:
    return [Task(f"task-{n}", asked(n), check) for n in range(first, last)]


def data(folder: Path, rows: Any = None, *, training: int = 10, validation: int = 6, **check: Any) -> Path:
    """A directory as the recipe ``dialogues`` writes it; ``rows`` by split, in the place of pairs and tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    last = training + validation
    usual = {
        "train": {"pairs": pairs(0, training), "tasks": tasks(0, training, **check)},
        "validation": {"pairs": pairs(training, last), "tasks": tasks(training, last, **check)},
    }
    dialogues.write_all(folder, rows or usual, {})
    return folder
