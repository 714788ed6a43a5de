"""Cut a Llama's vocabulary to the tokens that a corpus needs: tokenizer, embedding, head and every id together.

python recipes/vocabulary.py model.path=llama-3.1-8b data.path=data vocab_size=65536 out=smaller
"""

from __future__ import annotations

from _main import command, exit_with, store  # isort: skip
import itertools
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from transformers import LlamaConfig, PreTrainedTokenizerFast

from llamita import chat, checkpoints, checks, faults, runs, storage
from llamita.data import corpus_ids, shards, sources, tokens
from llamita.data.sources import SourceConfig
from llamita.prune import remap, vocabulary

log = logging.getLogger(__name__)

FOLDER = "vocabulary"


@dataclass(kw_only=True)
class ModelConfig:
    """The model whose vocabulary is cut."""

    path: Path = MISSING


@dataclass(kw_only=True)
class DataConfig:
    """Packed text whose tokens are counted."""

    path: Path | None = None
    """A data directory of ``recipes/prepare.py``, made with the model's tokenizer."""
    split: str = "train"


@dataclass(kw_only=True)
class Vocabulary:
    """Everything that this recipe can be told."""

    model: ModelConfig = field(default_factory=ModelConfig)
    vocab_size: int = MISSING
    """Tokens that stay, added ones included: the rows of the new embedding."""
    data: DataConfig = field(default_factory=DataConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    """Text that is counted, besides or instead of ``data``; or else ``sources``."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Several by name."""
    drop_added: list[str] = field(default_factory=list)
    """Added tokens that go, by name or pattern, such as ``<|reserved_special_token_*|>``; all others stay."""
    measure_bytes: int = 2**24
    """Text that is encoded in both vocabularies to tell tokens per byte."""
    run: runs.RunConfig = field(default_factory=runs.RunConfig)
    out: Path = MISSING

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what cannot be meant."""
        if self.measure_bytes < 1:
            raise ValueError(f"measure_bytes must be at least 1, got {self.measure_bytes}")
        if self.sources and self.source != SourceConfig():
            raise ValueError("set either source.path or sources.<name>.path, not both")
        if self.data.path is None and not self.named_sources():
            raise ValueError(
                "set data.path, source.path or sources.<name>.path: what stays is chosen by counts of text"
            )
        for name, source in self.named_sources().items():
            if source.weight is not None:
                raise ValueError(
                    f"weight={source.weight} of source {name!r} has no meaning here: documents are counted as they come"
                )

    def named_sources(self) -> dict[str, SourceConfig]:
        """The sources by name; a single one is called ``source``."""
        return self.sources or ({"source": self.source} if self.source != SourceConfig() else {})


store("vocabulary_schema", Vocabulary)


class Inputs:
    """What the recipe reads, opened and checked.

    Raises:
        ValueError: the model has no tokenizer that can be cut, the data is of another one, or the sizes do not fit.
    """

    def __init__(self, config: Vocabulary) -> None:
        path = config.model.path
        self.weights = checkpoints.Weights(path)
        if checkpoints.is_classifier(self.weights.config):
            raise ValueError(f"model.path={path} has lost output rows already: cut the model that it was made from")
        self.tokenizer: PreTrainedTokenizerFast = checkpoints.load_tokenizer(path)
        self.bpe = vocabulary.Bpe.read(storage.read_mapping(path / "tokenizer.json"))
        self.shape = vocabulary.cut_shape(self.weights.shape, config.vocab_size)
        if (most := tokens.vocab_size(self.tokenizer)) > self.weights.shape.vocab_size:
            raise ValueError(f"model.path={path} has {self.weights.shape.vocab_size} rows for {most} token ids")
        self.named = remap.named(path, self.bpe)
        self.never = remap.dropped(config.drop_added, self.bpe, self.named)
        self.found = [sources.resolve(name, source) for name, source in config.named_sources().items()]
        self.data = None
        if config.data.path is not None:
            self.data = shards.PackedData.open(config.data.path)
            where, own = f"data.path={config.data.path}", checkpoints.tokenizer_hash(self.tokenizer)
            size = self.weights.shape.vocab_size
            checks.refuse(
                checks.same_tokens(
                    f"model.path={path}", size, own, where, self.data.vocab_size, self.data.tokenizer_hash
                )
            )
            self.data.split(config.data.split)
        vocabulary.check_size(self.bpe, config.vocab_size, always=self.named, never=self.never)

    def choose(self, config: Vocabulary, run: runs.Run) -> vocabulary.Kept:
        """Count, and choose the tokens that stay."""
        packed = corpus_ids.packed_ids(self.data.split(config.data.split)) if self.data else iter(())
        text = corpus_ids.source_ids(self.found, self.tokenizer, date=tokens.TokenizerConfig().date)
        blocks = run.until_stopped(itertools.chain(packed, text))
        counts_V = vocabulary.count(blocks, self.weights.shape.vocab_size)
        return vocabulary.choose(self.bpe, counts_V, config.vocab_size, always=self.named, never=self.never)

    def texts(self, config: Vocabulary) -> Iterator[tuple[str, Iterator[str]]]:
        """Text to measure on, by the prefix of its figures: what was counted, and what was held out."""
        before = self.tokenizer.backend_tokenizer
        packed = corpus_ids.packed_texts(self.data.split(config.data.split), before) if self.data else iter(())
        yield "", itertools.chain(packed, corpus_ids.source_texts(self.found))
        if self.data and config.data.split == "train" and self.data.manifest["splits"]["validation"]["rows"]:
            yield "held_out_", corpus_ids.packed_texts(self.data.split("validation"), before)


def run(config: Vocabulary) -> None:
    """Count the tokens of the text, choose those that stay, write the model and its tokenizer without the others."""
    inputs = None
    if not (config.out / "DONE.json").is_file():  # what cannot work is said before anything is written
        inputs = Inputs(config)
    with runs.start(config.out, "vocabulary", storage.plain(config), config.run) as run:
        if run.done or not runs.is_main_process():
            return
        inputs, source = inputs or Inputs(config), config.model.path
        kept = inputs.choose(config, run)
        kept.save(config.out / FOLDER)
        faults.crash_point("after_counts")
        staged = config.out / ".tokenizer"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        after = remap.write(source, staged, kept)
        summary = kept.summary() | measured(config, inputs, after, run)
        summary |= {
            "parameters_before": inputs.weights.shape.num_parameters,
            "parameters_after": inputs.shape.num_parameters,
        }
        log.info("%s: %s", config.out, summary)
        run.log(
            {f"vocabulary/{name}": value for name, value in (summary | {"params": summary["parameters_after"]}).items()}
        )
        parents = {"model": (source, checkpoints.content_hash(source))}
        if inputs.data is not None:
            parents["data"] = (inputs.data.path, inputs.data.content_hash)
        lineage = {name: {"path": path, "sha256": digest} for name, (path, digest) in parents.items()}
        cut = summary | {"file": f"{FOLDER}/{vocabulary.FILE}"}
        provenance = {"recipe": "vocabulary", "parents": lineage, "vocabulary": cut, "settings": run.settings}
        fields = remap.settings(inputs.weights.config.to_dict(), kept) | inputs.shape.config_fields()
        with checkpoints.ModelWriter(config.out, LlamaConfig.from_dict(fields)) as writer:
            for name, tensor in run.until_stopped(vocabulary.tensors(inputs.weights, kept)):
                writer.add(name, tensor)
            files = writer.publish(staged, provenance)
        shutil.rmtree(staged)
        files.append(f"{FOLDER}/{vocabulary.FILE}")
        run.finish(files, parents={name: digest for name, (_, digest) in parents.items()}, summary=summary)


def measured(config: Vocabulary, inputs: Inputs, after: PreTrainedTokenizerFast, run: runs.Run) -> dict[str, Any]:
    """Tokens per byte in the old and in the new vocabulary."""
    both = chat.plain_backend(inputs.tokenizer), chat.plain_backend(after)
    found: dict[str, Any] = {}
    for prefix, texts in inputs.texts(config):
        length = vocabulary.lengths(run.until_stopped(texts), *both, most_bytes=config.measure_bytes)
        found |= length.summary(prefix)
    return found


main = command("vocabulary", Vocabulary, run)

if __name__ == "__main__":
    exit_with(main)
