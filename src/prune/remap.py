"""Token ids wherever a model directory names them, moved to a smaller vocabulary together.

``tokenizer.json``, ``tokenizer_config.json``, ``special_tokens_map.json``, ``config.json`` and
``generation_config.json`` are read and written as plain JSON; what holds no ids stays as it is.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from llamita import checkpoints, storage
from llamita.prune.vocabulary import Bpe, Kept, pair

log = logging.getLogger(__name__)

GENERATION = "generation_config.json"
NAMES_IDS = re.compile(r"\w+_token_id|forced_decoder_ids")
"""Fields of ``config.json`` and ``generation_config.json`` whose tokens stay; a list of ids may stand there."""
NAMES_FORBIDDEN = ("suppress_tokens", "begin_suppress_tokens")
NAMES_SEQUENCES = ("bad_words_ids", "force_words_ids", "sequence_bias")
POST_PROCESSORS = ("ByteLevel", "Sequence", "TemplateProcessing", "BertProcessing", "RobertaProcessing")


def named(source: Path, bpe: Bpe) -> dict[int, str]:
    """The tokens that a model directory names, each with a place where it does; they must stay.

    Raises:
        ValueError: one of them is no token, or the post-processor is of a kind whose ids are not known.
    """
    definition = storage.read_mapping(source / "tokenizer.json")
    tokenizer = checkpoints.load_tokenizer(source)
    found: dict[int, str] = {}
    template = str(tokenizer.chat_template or "")
    found |= {index: "the chat template writes it" for index, text in bpe.added.items() if text in template}
    roles = {str(token) for token in tokenizer.special_tokens_map.values() if not isinstance(token, list)}
    where = "the tokenizer has it as its begin, end, padding or the like"
    found |= {index: where for text, index in tokenizer.get_vocab().items() if text in roles}
    found |= dict.fromkeys(_tokenizer_ids(definition), "the post-processor or the padding of tokenizer.json has it")
    for name, fields in _fields(source).items():
        listed = {index for ids in _id_lists([fields.get(key) for key in NAMES_SEQUENCES]) for index in ids}
        ids = _setting_ids(fields, source / name) | {index for index in listed if index not in bpe.texts}
        found |= dict.fromkeys(ids, f"{name} names it")
    if strange := sorted(index for index in found if index not in bpe.texts and index not in bpe.added):
        raise ValueError(f"tokenizer.json of {source} has no token {strange[0]}, but {found[strange[0]]}")
    return found


def _fields(source: Path) -> dict[str, dict[str, Any]]:
    """The settings that may name ids, by the file in which they stand."""
    found = {"config.json": checkpoints.load_config(source).to_dict()}
    if (source / GENERATION).is_file():
        found[GENERATION] = storage.read_mapping(source / GENERATION)
    return found


def _id_lists(value: Any) -> Iterator[list[int]]:
    """Lists of ids at any depth."""
    if isinstance(value, list) and all(isinstance(entry, int) for entry in value):
        yield value
    elif isinstance(value, list):
        for entry in value:
            yield from _id_lists(entry)


def _tokenizer_ids(definition: Mapping[str, Any]) -> set[int]:
    steps = list(_processors(definition))
    ids = {index for step in steps for token in step.get("special_tokens", {}).values() for index in token["ids"]}
    ids |= {step[name][1] for step in steps for name in ("sep", "cls") if name in step}
    return ids | ({definition["padding"]["pad_id"]} if definition.get("padding") else set())


def _setting_ids(fields: Mapping[str, Any], place: Path) -> set[int]:
    found: set[int] = set()
    for name, value in fields.items():
        if not NAMES_IDS.fullmatch(name) or value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        ids = [index[1] for index in ids] if name == "forced_decoder_ids" else ids
        if not all(isinstance(index, int) for index in ids):
            raise ValueError(f"{place} has {name}={value!r}, which is no token id and no list of ids")
        found |= {index for index in ids if index >= 0}  # -1 says that there is none
    return found


def settings(fields: Mapping[str, Any], kept: Kept) -> dict[str, Any]:
    """``config.json`` or ``generation_config.json`` with new ids.

    A suppressed token that is cut needs no suppression any more. A cut token in a sequence of ids becomes what its
    text is now.
    """
    return {name: _setting(name, value, kept) for name, value in fields.items()}


def _setting(name: str, value: Any, kept: Kept) -> Any:
    if value is None:
        return None
    if name == "forced_decoder_ids":
        return [[place, _new(index, kept)] for place, index in value]
    if NAMES_IDS.fullmatch(name):
        return _new(value, kept)
    if name in NAMES_FORBIDDEN:
        return [kept.new_ids[index] for index in value if index in kept.new_ids]
    if name in NAMES_SEQUENCES:
        return _sequences(value, kept)
    return value


def _new(value: Any, kept: Kept) -> Any:
    if isinstance(value, Sequence):
        return [_new(index, kept) for index in value]
    return value if value is None or value < 0 else kept.new_ids[value]


def _sequences(value: list[Any], kept: Kept) -> list[Any]:
    """Lists of ids at any depth; what is no id, as the numbers of ``sequence_bias``, stays."""
    if value and all(isinstance(index, int) for index in value):
        return [new for index in value for new in kept.spelled(index)]
    return [_sequences(entry, kept) if isinstance(entry, list) else entry for entry in value]


def dropped(patterns: Sequence[str], bpe: Bpe, needed: Mapping[int, str]) -> set[int]:
    """Ids of the added tokens that patterns such as ``<|reserved_special_token_*|>`` name.

    Raises:
        ValueError: a pattern names none, or one of the tokens ``needed``, given with the reason.
    """
    found: set[int] = set()
    for pattern in patterns:
        ids = {index for index, text in bpe.added.items() if fnmatch.fnmatchcase(text, pattern)}
        if not ids:
            some = ", ".join(list(bpe.added.values())[:8])
            raise ValueError(f"drop_added={pattern!r} names no added token of model.path, which has {some}, …")
        found |= ids
    reasons = {part: "other tokens are made of it" for parts in bpe.parts.values() for part in parts} | dict(needed)
    for index in sorted(found & reasons.keys()):
        raise ValueError(f"drop_added must leave {bpe.added[index]!r} (id {index}): {reasons[index]}")
    return found


def _processors(definition: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every step of the post-processor.

    Raises:
        ValueError: one is of a kind whose ids are not known.
    """
    waiting = [definition["post_processor"]] if definition.get("post_processor") else []
    while waiting:
        step = waiting.pop()
        if step["type"] not in POST_PROCESSORS:
            raise ValueError(f"tokenizer.json has a post_processor of type {step['type']!r}, whose ids are not known")
        yield step
        waiting += step.get("processors", [])


def tokenizer(definition: Mapping[str, Any], kept: Kept) -> dict[str, Any]:
    """``tokenizer.json`` with the kept tokens and the merges of which all three tokens are kept.

    Law: a text whose old ids are all kept gets the same tokens as before. With fewer merges in the same order, each
    step finds the merge that it found before, because a kept token's parts are kept.
    """
    result = copy.deepcopy(dict(definition))
    model, new_ids = result["model"], kept.new_ids
    model["vocab"] = {text: new_ids[index] for text, index in model["vocab"].items() if index in new_ids}
    pairs = [(merge, pair(merge)) for merge in model["merges"]]
    vocabulary = model["vocab"]
    model["merges"] = [m for m, (a, b) in pairs if a in vocabulary and b in vocabulary and a + b in vocabulary]
    result["added_tokens"] = [t | {"id": new_ids[t["id"]]} for t in result["added_tokens"] if t["id"] in new_ids]
    for step in _processors(result):
        for token in step.get("special_tokens", {}).values():
            token["ids"] = [new_ids[index] for index in token["ids"]]
        for name in {"sep", "cls"} & step.keys():
            step[name] = [step[name][0], new_ids[step[name][1]]]
    if padding := result.get("padding"):
        padding["pad_id"] = new_ids[padding["pad_id"]]
    return result


def tokenizer_settings(fields: Mapping[str, Any], kept: Kept) -> dict[str, Any]:
    """``tokenizer_config.json`` or ``special_tokens_map.json`` with new ids, without the tokens that go."""
    gone = {text for index, text in kept.bpe.added.items() if index not in kept.new_ids}
    result = {name: _without(value, gone) for name, value in fields.items()}
    if (decoder := fields.get("added_tokens_decoder")) is not None:
        pairs = ((int(index), token) for index, token in decoder.items())
        result["added_tokens_decoder"] = {str(kept.new_ids[i]): token for i, token in pairs if i in kept.new_ids}
    return result


def _without(value: Any, gone: set[str]) -> Any:
    """Transformers adds what a list of special tokens names, under a new id, where the tokenizer lacks it."""
    if not isinstance(value, list):
        return value
    return [item for item in value if (item.get("content") if isinstance(item, dict) else item) not in gone]


def _write(path: Path, value: Mapping[str, Any]) -> None:
    """As the libraries write them: characters as they are, fields in the order of the source."""
    storage.write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write(source: Path, folder: Path, kept: Kept) -> PreTrainedTokenizerFast:
    """Write the tokenizer's files and the generation settings of ``source`` into ``folder`` with new ids.

    Returns the tokenizer that stands there now.

    Raises:
        ValueError: the tokenizer that was written does not have the ids that were meant for it.
    """
    for name in checkpoints.TOKENIZER_FILES:
        if not (source / name).is_file():
            continue
        match name:
            case "tokenizer.json":
                _write(folder / name, tokenizer(storage.read_mapping(source / name), kept))
            case "tokenizer_config.json" | "special_tokens_map.json":
                _write(folder / name, tokenizer_settings(storage.read_mapping(source / name), kept))
            case "tokenizer.model":
                log.warning("%s is left out: it would tell the old ids", source / name)
            case _:
                shutil.copyfile(source / name, folder / name)
    if (source / GENERATION).is_file():
        _write(folder / GENERATION, settings(storage.read_mapping(source / GENERATION), kept))
    written = checkpoints.load_tokenizer(folder)
    texts = {**kept.bpe.texts, **kept.bpe.added}
    if written.get_vocab() != {texts[old]: new for new, old in enumerate(kept.old_ids)}:
        raise ValueError(f"{source / 'tokenizer.json'} cannot be cut: its ids depend on more than the file says")
    return written
