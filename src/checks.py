"""Mistakes that can be seen before a stage starts, each in one line that says what, which value, and what to do.

Every function returns a list, empty where all is well: a plan shows all mistakes, not the first.
"""

from __future__ import annotations

import difflib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llamita import checkpoints, runs
from llamita.shapes import PUBLISHED, LlamaShape


def errors_of(action: Callable[[], Any]) -> list[str]:
    """The message of the ``ValueError`` or missing file that ``action`` ends with, as a list of one, or nothing."""
    try:
        action()
    except (ValueError, OSError) as error:
        return [str(error).strip()]
    return []


def refuse(mistakes: list[str]) -> None:
    """Raise ``ValueError`` with all mistakes, if there are any."""
    if mistakes:
        raise ValueError("\n".join(mistakes))


def suggestion(unknown: str, known: list[str]) -> str:
    """A hint at the setting that was probably meant, or nothing; only the last part of a dotted name may differ."""
    parent, _, last = unknown.rpartition(".")
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == parent]
    if close := difflib.get_close_matches(last, siblings, n=1, cutoff=0.6):
        return f"; did you mean {parent + '.' if parent else ''}{close[0]}?"
    return ""


def model_shape(path: Path) -> LlamaShape | None:
    """The shape of a model directory, or of a published model by its name on the hub; ``None`` if it is neither."""
    if (path / "config.json").is_file():
        try:
            return checkpoints.shape_of(checkpoints.load_config(path))
        except ValueError:
            return None
    return PUBLISHED.get(str(path))


def model(setting: str, path: Path, *, needs_tokenizer: bool = True) -> list[str]:
    """What is wrong with a model directory by its names, its configuration and the headers of its files.

    A directory without any weights passes where its configuration does: it is enough to plan with.
    """
    if str(path) in PUBLISHED and not path.is_dir():
        return []
    if not path.is_dir():
        return [f"{setting}={path} is no directory, and no published Llama of a known shape ({', '.join(PUBLISHED)})"]
    if problems := errors_of(lambda: checkpoints.load_config(path)):
        return [f"{setting}: {problem}" for problem in problems]
    problems = unfinished(setting, path)
    if needs_tokenizer and not (path / "tokenizer.json").is_file():
        problems.append(f"{setting}={path} has no tokenizer.json")
    if has_weights(path):
        problems += [f"{setting}: {problem}" for problem in errors_of(lambda: checkpoints.Weights(path))]
    return problems


def has_weights(path: Path) -> bool:
    """Whether the directory holds any weights, whole or not."""
    return (path / checkpoints.INDEX).is_file() or (path / checkpoints.SINGLE).is_file()


def unfinished(setting: str, path: Path) -> list[str]:
    """A directory that a run began and did not finish, or that was changed since."""
    if (path / "DONE.json").is_file():
        return [f"{setting}: {problem}" for problem in errors_of(lambda: runs.check_done(path))]
    if (path / "run.json").is_file():
        return [f"{setting}={path} is the directory of an unfinished run: finish that stage first"]
    return []


def finished_stage(setting: str, path: Path) -> list[str]:
    """A directory that only a finished stage can have made."""
    if not path.is_dir():
        return [f"{setting}={path} does not exist"]
    return [f"{setting}: {problem}" for problem in errors_of(lambda: runs.check_done(path))]


def division(rows: int, micro_batch_rows: int, processes: int) -> list[str]:
    """A global batch that micro-batches and processes cannot share out evenly."""
    each = micro_batch_rows * processes
    if rows % each == 0:
        return []
    nearest = [near for near in (rows // each * each, (rows // each + 1) * each) if near]
    return [
        f"global_batch_rows must be a multiple of micro_batch_rows={micro_batch_rows} times processes={processes}: "
        f"nearest are {' and '.join(map(str, nearest))}, got {rows}"
    ]


def same_tokens(
    model: str, vocab_size: int, tokenizer: str | None, data: str, data_vocab_size: int, data_tokenizer: str | None
) -> list[str]:
    """Data whose ids mean something else to a model, or nothing; a tokenizer is its hash, ``None`` if not known.

    ``model`` and ``data`` are settings with their values, as in ``model.path=small``.
    """
    if data_vocab_size > vocab_size:
        return [f"{data} has {data_vocab_size} token ids, {model} only {vocab_size}"]
    if tokenizer is None or data_tokenizer is None or tokenizer == data_tokenizer:
        return []
    return [
        f"{data} was made with another tokenizer ({data_tokenizer[:12]}) than that of {model} ({tokenizer[:12]}): "
        f"prepare the data again with tokenizer.path={model.partition('=')[2]}"
    ]


def device_name(setting: str, name: str) -> list[str]:
    """What is not the name of a device, whether or not this machine has it."""
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        return []
    return [f"{setting} must be auto, cpu, cuda or cuda:N, got {name!r}"]


def device_here(setting: str, name: str) -> list[str]:
    """A GPU that this machine does not have."""
    gpus = torch.cuda.device_count()
    if not name.startswith("cuda") or int(name.partition(":")[2] or 0) < gpus:
        return []
    return [f"{setting}={name}, but torch {torch.__version__} sees {gpus} GPUs here"]


def positions(sequence_length: int, owner: str, most: int) -> list[str]:
    """Rows that are longer than a model can tell positions apart."""
    if sequence_length <= most:
        return []
    return [f"the data's sequence_length {sequence_length} is more than {owner} can take: {most}"]


def space(out: Path, needed: float, describe: Callable[[float], str]) -> list[str]:
    """A disk that is too small for what will be written."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free >= needed:
        return []
    return [f"out={out} needs {describe(needed)}, {place} has {describe(free)} free"]


def memory(needed: float, device: str, available: float, describe: Callable[[float], str]) -> list[str]:
    """A device that cannot hold what one process needs."""
    if needed <= available:
        return []
    return [f"one process needs {describe(needed)} of memory, {device} has {describe(available)}"]
