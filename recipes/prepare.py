"""Turn text, JSONL, Parquet, a data set or dialogues into packed rows of tokens.

python recipes/prepare.py source.path=books/ tokenizer.path=Llama-3.1-8B sequence_length=4096 out=data/books
"""

from __future__ import annotations

from _main import command, exit_with, store  # isort: skip
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from omegaconf import MISSING
from transformers import PreTrainedTokenizerFast

from llamita import chat, checkpoints, runs, storage
from llamita.data import corpus, shards, sources, split, tokens
from llamita.data.pack import PackingConfig, pack
from llamita.data.sources import SourceConfig
from llamita.data.split import ValidationConfig
from llamita.data.tokens import TokenizerConfig, num_cores

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Prepare:
    """Everything that this recipe can be told."""

    source: SourceConfig = field(default_factory=SourceConfig)
    """One source; or else ``sources``."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Several sources by name, with weights if they are to be mixed."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    packing: PackingConfig = field(default_factory=PackingConfig)
    sequence_length: int = MISSING
    """Tokens per row."""
    max_tokens: int | None = None
    """Of the training split; unset: all."""
    num_proc: int | None = None
    """Processes that encode; unset: one per core. The result does not depend on it."""
    allow_network: bool = False
    """Let ``kind=datasets`` download."""
    run: runs.RunConfig = field(default_factory=runs.RunConfig)
    out: Path = MISSING

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what cannot be meant."""
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, got {self.sequence_length}")
        for name in ("max_tokens", "num_proc"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if bool(self.sources) == (self.source != SourceConfig()):
            raise ValueError("set either source.path (or source.kind=python_stdlib) or sources.<name>.path")
        split.check_weights({name: source.weight for name, source in named(self).items()})


store("prepare_schema", Prepare)


def run(config: Prepare) -> None:
    """Check the input, prepare it in a hidden folder, publish."""
    found, tokenizer = [], None
    if not (config.out / "DONE.json").is_file():  # what is wrong with the input is said before anything is written
        found = [sources.resolve(name, source) for name, source in named(config).items()]
        tokenizer = tokens.load(config.tokenizer.path) if config.tokenizer.path else None
    with runs.start(config.out, "prepare", storage.plain(config), config.run, may_change=["num_proc"]) as run:
        if run.done or not runs.is_main_process():
            return
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        with shards.publishing(config.out) as folder:
            manifest = prepare(run, config, found, tokenizer, folder)
            files = [str(file.relative_to(folder)) for file in shards.files(folder)]
        summary = {
            f"{name}/{key}": entry[key]
            for name, entry in manifest["splits"].items()
            for key in ("documents", "rows", "tokens", "labels", "padding")
        }
        run.log({f"data/{key}": value for key, value in summary.items()})
        log.info("%s: %s", config.out, summary)
        run.finish(files, summary=summary)


def prepare(
    run: runs.Run, config: Prepare, found: list[sources.Source], tokenizer: PreTrainedTokenizerFast | None, folder: Path
) -> dict[str, Any]:
    """Read, hold out, encode, mix, pack and write; returns the manifest."""
    scratch = folder / ".scratch"
    scratch.mkdir()
    documents = corpus.read(found, scratch, seed=config.run.seed, allow_network=config.allow_network)
    stop_if_asked(run)
    held = split.hold_out(documents.priority, config.validation)
    if config.validation.fraction and not held.any():
        raise ValueError(
            f"validation.fraction={config.validation.fraction} can hold nothing out of a single document (of kind=text "
            "each file is one): give several documents, or set validation.fraction=0"
        )
    if tokenizer is None:
        texts = corpus.sample(documents, ~held, config.tokenizer.train_bytes)
        tokenizer = tokens.train(texts, config.tokenizer.vocab_size)
    tokens.save(tokenizer, config.tokenizer.path, folder / shards.TOKENIZER)
    stream, length = corpus.encode(
        documents,
        tokenizer,
        scratch,
        date=config.tokenizer.date,
        num_proc=config.num_proc or num_cores(),
    )
    stop_if_asked(run)
    weights = {name: source.weight for name, source in named(config).items()}
    train = np.flatnonzero(~held)
    kept = split.mixture(
        documents.source_index[train], length[train], documents.priority[train], weights, max_tokens=config.max_tokens
    )
    chosen = {"train": train[kept], "validation": np.flatnonzero(held)}
    start = np.cumsum(length) - length
    pad_id = chat.borders(tokenizer).pad_id
    splits = {}
    for name, index in chosen.items():
        packing = pack(start[index], length[index], config.sequence_length, config.packing, seed=config.run.seed)
        splits[name] = shards.write(folder / shards.FOLDER, name, stream, packing, pad_id=pad_id)
        splits[name] |= {"documents": index.size, "utf8_bytes": int(documents.num_bytes[index].sum())}
    manifest = {
        "format": shards.FORMAT,
        "sequence_length": config.sequence_length,
        "vocab_size": tokens.vocab_size(tokenizer),
        "tokenizer_hash": checkpoints.tokenizer_hash(tokenizer),
        "seed": config.run.seed,
        "splits": splits,
        "sources": corpus.describe(documents, length, chosen),
    }
    storage.write_json(folder / shards.MANIFEST, manifest)
    return manifest


def stop_if_asked(run: runs.Run) -> None:
    """Between two parts of the work, end with nothing half-written."""
    if run.stop.is_set():
        raise runs.Stopped(f"{run.path}: stopped as asked before anything was published; start it again")


def named(config: Prepare) -> dict[str, SourceConfig]:
    """The sources by name; a single one is called ``source``."""
    return config.sources or {"source": config.source}


main = command("prepare", Prepare, run)

if __name__ == "__main__":
    exit_with(main)
