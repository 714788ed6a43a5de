"""Packed data of documents that are made of invented words, for recipes that need some text."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from types import ModuleType


def packed(prepare: ModuleType, folder: Path, *, documents: int = 200, held_out: float = 0.1) -> Path:
    """Short documents in rows of 64 tokens, a share of them held out; 640 ids."""
    dice = random.Random(0)
    words = ["".join(dice.choices(string.ascii_lowercase, k=dice.randint(2, 9))) for _ in range(300)]
    lines = [json.dumps({"text": " ".join(dice.choices(words, k=5 + n % 30))}) for n in range(documents)]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    prepare.run(
        prepare.Prepare(
            source=prepare.SourceConfig(path=str(folder / "lines.jsonl")),
            tokenizer=prepare.TokenizerConfig(vocab_size=640),
            validation=prepare.ValidationConfig(fraction=held_out),
            sequence_length=64,
            num_proc=1,
            out=folder / "data",
        )
    )
    return folder / "data"
