"""Dialogues as packed rows in the directory of the run that trains on them, with the tokenizer that it will publish."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from llamita import chat, checkpoints, faults, manifests, runs, storage
from llamita.align.dialogues import Dialogue, DialogueData, Refused
from llamita.data import fit, shards, tokens
from llamita.data.fit import Overlong
from llamita.data.pack import PackingConfig, pack

log = logging.getLogger(__name__)

FOLDER = "packed"
SCRATCH = ".encoding"
WAIT_SECONDS = 0.2
GONE_SECONDS = 5.0
GENERATION = "generation_config.json"
"""Beside the tokenizer of the rows."""
BYTES_PER_PROCESS = 2**22
"""Text for which another process is worth its start."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which dialogues become rows, and how."""

    data: DialogueData
    model: Path
    """Whose tokenizer encodes them."""
    tokenizer: PreTrainedTokenizerFast
    splits: tuple[str, ...]
    sequence_length: int
    overlong: Overlong
    max_refused: float
    seed: int
    num_proc: int | None
    """Unset: one per core."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the rows depend on."""
        template = self.tokenizer.chat_template or ""
        return {
            "dialogues": self.data.content_hash,
            "tokenizer": checkpoints.tokenizer_hash(self.tokenizer),
            "template": hashlib.sha256(json.dumps(template).encode()).hexdigest(),
            "splits": list(self.splits),
            "sequence_length": self.sequence_length,
            "overlong": self.overlong.value,
            "seed": self.seed,
        }


def ready(wanted: Wanted, this: runs.Run) -> Path:
    """The folder of the rows: made by the main process, or found as an earlier start has made it; the others wait.

    Raises:
        ValueError: what is there is of other dialogues or damaged; or too few dialogues can be encoded, or none fits.
        Stopped: the run was asked to stop.
    """
    folder = this.path / FOLDER
    if runs.is_main_process():
        if folder.is_dir():
            _check(folder, wanted)
        else:
            _make(folder, wanted, this)
    else:
        _wait(folder, this)
    return folder


def _wait(folder: Path, this: runs.Run) -> None:
    """Wait for the main process, as long as it lives.

    This is before there is a process group, whose patience would end while a million dialogues are encoded.
    """
    owned, gone = False, 0
    while not folder.is_dir():
        _stop_if_asked(this)
        there = (this.path / ".lock").exists()
        owned, gone = owned or there, 0 if there else gone + 1
        # A lock that a killed start has left is away for a moment while it is taken over.
        if owned and gone * WAIT_SECONDS > GONE_SECONDS:
            if (this.path / "run.json").is_file() and not (this.path / faults.FILE).is_file():
                raise runs.Stopped(f"{this.path}: the main process stopped before its dialogues were packed")
            raise ValueError(f"{this.path}: the main process could not pack its dialogues: it has said why")
        time.sleep(WAIT_SECONDS)


def counts(folder: Path) -> dict[str, float]:
    """What became of the dialogues, as metrics."""
    manifest = storage.read_mapping(folder / shards.MANIFEST)
    found: dict[str, float] = {}
    for name, entry in manifest["splits"].items():
        prefix = "sft/" if name == "train" else f"sft/{name}_"
        keys = ("dialogues", "dropped", "truncated", "refused", "labels", "padding")
        found |= {f"{prefix}{key}": entry[key] for key in keys}
    return found


def _check(folder: Path, wanted: Wanted) -> None:
    if reason := manifests.check_manifest(folder, hashes=True):
        raise ValueError(f"{folder} is damaged: {reason}; remove it, and it is made again")
    made = storage.read_mapping(folder / shards.MANIFEST)["made_from"]
    if other := [name for name, value in wanted.identity.items() if made.get(name) != value]:
        raise ValueError(
            f"{folder} was made from other {', '.join(other)} than data.path={wanted.data.path} and "
            f"model.path={wanted.model} have now: choose another out, or put them back"
        )


def _make(folder: Path, wanted: Wanted, this: runs.Run) -> None:
    for stale in (*folder.parent.glob(f".tmp-{FOLDER}-*"), folder.parent / SCRATCH):  # of a start that was killed
        shutil.rmtree(stale, ignore_errors=True)
    scratch = folder.parent / SCRATCH
    scratch.mkdir()
    try:
        streams = {}
        for split in wanted.splits:
            streams[split] = _encode(split, wanted, scratch)
            _stop_if_asked(this)
        with manifests.publishing(folder) as temporary:
            _write(temporary, streams, wanted)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@dataclass(frozen=True)
class _Encoded:
    stream: shards.Words
    fitted: fit.Fitted
    refused: int


def _encode(split: str, wanted: Wanted, scratch: Path) -> _Encoded:
    """The words of a split, those refused by the encoder counted and told, and which of them fit a row."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    rows = wanted.data.dialogues(split)
    texts = [json.dumps(row.messages, ensure_ascii=False) for row in rows]
    encoder = fit.CheckedEncoder(wanted.tokenizer, chat.DATE)
    size = sum(map(len, texts))
    parts = list(
        tokens.encode(
            datasets.Dataset.from_dict({"text": texts}),
            encoder,
            scratch / f"{split}.arrow",
            mean_bytes=max(1.0, size / len(texts)),
            num_proc=min(wanted.num_proc or tokens.num_cores(), 1 + size // BYTES_PER_PROCESS),
        )
    )
    stream = np.concatenate([words for words, _ in parts])
    length_D = np.concatenate([lengths for _, lengths in parts])
    name = f"data.path={wanted.data.path}, {split}"
    refused = _refusals(rows, texts, length_D, encoder, wanted.max_refused)
    refused.check(name, int((length_D > 0).sum()))
    fitted = fit.fit(stream, length_D, wanted.sequence_length, wanted.overlong)
    if not fitted.length.size:
        shortest, longest = int(length_D[length_D > 0].min()), int(length_D.max())
        raise ValueError(
            f"sequence_length={wanted.sequence_length} leaves none of the {len(rows)} dialogues of {name}: the "
            f"shortest needs sequence_length={shortest}, all of them {longest}; overlong={wanted.overlong}"
        )
    log.info(
        "%s: %d dialogues, %d refused, %d dropped and %d truncated because they are longer than %d tokens",
        *(name, len(rows), refused.total, fitted.dropped, fitted.truncated, wanted.sequence_length),
    )
    return _Encoded(stream, fitted, refused.total)


def _refusals(
    rows: Sequence[Dialogue],
    texts: Sequence[str],
    length_D: NDArray[np.int64],
    encoder: fit.CheckedEncoder,
    max_share: float,
) -> Refused:
    """Dialogues without words, each with the reason."""
    refused = Refused(max_share, "data.max_refused")
    for index in np.flatnonzero(length_D == 0).tolist():
        try:
            encoder.words(texts[index])
        except ValueError as error:
            refused.add(f"dialogue {rows[index].id}", str(error))
    return refused


def _write(folder: Path, streams: dict[str, _Encoded], wanted: Wanted) -> None:
    encoder = chat.Encoder(wanted.tokenizer)
    splits = {}
    for name, part in streams.items():
        fitted = part.fitted
        # No dialogue is cut to fill a gap: 1 allows any padding.
        whole = PackingConfig(max_padding=1.0)
        packing = pack(fitted.start, fitted.length, wanted.sequence_length, whole, seed=wanted.seed)
        splits[name] = shards.write(
            folder / shards.FOLDER, name, part.stream, packing, pad_id=encoder.borders.pad_id
        ) | {
            "dialogues": fitted.length.size,
            "dropped": fitted.dropped,
            "truncated": fitted.truncated,
            "refused": part.refused,
        }
    manifest = {
        "format": shards.FORMAT,
        "sequence_length": wanted.sequence_length,
        "vocab_size": tokens.vocab_size(wanted.tokenizer),
        "tokenizer_hash": checkpoints.tokenizer_hash(wanted.tokenizer),
        "seed": wanted.seed,
        "splits": splits,
        "made_from": wanted.identity,
    }
    tokens.save(wanted.tokenizer, wanted.model, folder / shards.TOKENIZER)
    speak(wanted.model, wanted.tokenizer, encoder, folder / shards.TOKENIZER)
    storage.write_json(folder / shards.MANIFEST, manifest)


def speak(model: Path, tokenizer: PreTrainedTokenizerFast, encoder: chat.Encoder, folder: Path) -> None:
    """Put into ``folder`` what a model needs to be talked to: a chat template if it has none, and where answers end."""
    if not tokenizer.chat_template:
        (folder / "chat_template.jinja").write_text(chat.TEMPLATE, encoding="utf-8")
    file = model / GENERATION
    settings = storage.read_mapping(file) if file.is_file() else {}
    settings.pop("_from_model_config", None)  # it would be made anew from config.json
    ends = {"bos_token_id": encoder.borders.bos_id, "eos_token_id": encoder.stop_ids}
    storage.write_json(folder / GENERATION, {**settings, **ends, "pad_token_id": encoder.borders.pad_id})


def _stop_if_asked(this: runs.Run) -> None:
    if this.stop.is_set():
        raise runs.Stopped(f"{this.path}: stopped as asked before its dialogues were packed; start it again")
