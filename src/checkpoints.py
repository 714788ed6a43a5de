"""Model and tokenizer directories: open them lazily, load them strictly, write them so that a crash leaves no half.

Weights are safetensors and nothing else; code that comes with a model is never run.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llamita import faults, runs, storage
from llamita.shapes import LlamaShape

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PROVENANCE = "llamita.json"
SHARD_BYTES = 4 * 2**30

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype of that name; ``ValueError`` lists what is allowed."""
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def load_config(path: Path) -> LlamaConfig:
    """The configuration of a Llama directory.

    Raises:
        ValueError: there is none, it is not of a dense Llama, or it wants foreign code.
    """
    file = path / "config.json"
    if not path.is_dir():
        raise ValueError(f"model directory {path} does not exist")
    if not file.is_file():
        raise ValueError(f"{path} is not a model directory: it has no config.json")
    if (path / "run.json").is_file() and not (path / "DONE.json").is_file():
        raise ValueError(f"{path} is the directory of an unfinished run: finish that stage first")
    mapping = storage.read_mapping(file)
    if "auto_map" in mapping:
        raise ValueError(f"{file} asks for code of its own (auto_map), which is never run")
    try:
        LlamaShape.from_config(mapping)
        # Underscore keys of a foreign file can name code to load (CVE-2026-4372).
        config = LlamaConfig.from_dict({key: value for key, value in mapping.items() if not key.startswith("_")})
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from error
    assert isinstance(config, LlamaConfig)
    return config


def rope_type(config: LlamaConfig) -> str | None:
    """The kind of rotary scaling, by the name that Transformers gives it."""
    kind: str | None = config.to_dict()["rope_parameters"].get("rope_type")
    return kind


def shape_of(config: LlamaConfig) -> LlamaShape:
    """The sizes in a transformers configuration; a token classifier's labels are its output rows."""
    shape = LlamaShape.from_config(config.to_dict())
    if is_classifier(config):
        shape = dataclasses.replace(shape, output_rows=config.num_labels)
    return shape


def is_classifier(config: LlamaConfig) -> bool:
    """Whether the configuration is of a ``LlamaForTokenClassification``: a Llama with fewer output than input rows."""
    return config.architectures == ["LlamaForTokenClassification"]


def is_reward_model(config: LlamaConfig) -> bool:
    """Whether the configuration is of a ``LlamaForSequenceClassification``: one number for a whole dialogue."""
    return config.architectures == ["LlamaForSequenceClassification"]


def stored_tensors(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in the files of a model of that configuration."""
    tensors = shape_of(config).tensors()
    if is_reward_model(config):
        tensors.pop("lm_head.weight", None)
        tensors["score.weight"] = (int(config.num_labels or 1), config.hidden_size)
    if is_classifier(config):
        tensors["score.weight"] = tensors.pop("lm_head.weight")
        tensors["score.bias"] = tensors["score.weight"][:1]
    return tensors


class Weights:
    """The tensors of a Llama directory, mapped from its safetensors files and read one at a time.

    Opening checks everything that the files' headers can tell: every tensor of the configuration is there, none is
    too many, each has its shape, and no file is cut short.
    """

    def __init__(self, path: Path) -> None:
        """Open and check ``path``.

        Raises:
            ValueError: a file is missing or damaged, or the tensors are not those of the configuration.
        """
        self.path = path
        self.config = load_config(path)
        self.shape = shape_of(self.config)
        self.files = _tensor_files(path)
        self._handles: dict[str, Any] = {}
        self.dtype = self._check()

    def _open(self, name: str) -> Any:
        file = self.files[name]
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(self.path / file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.path / file} is damaged or cut short: {error}") from error
        return self._handles[file]

    def _check(self) -> torch.dtype:
        expected = stored_tensors(self.config)
        if self.shape.tie_word_embeddings:
            self.files.pop("lm_head.weight", None)  # a copy that some writers store beside the tied matrix
        self.files = {name: file for name, file in self.files.items() if not name.endswith("rotary_emb.inv_freq")}
        missing = sorted(expected.keys() - self.files.keys())
        if not missing:  # an index may name a file that does not hold the tensor
            held = {file: set(self._open(name).keys()) for name, file in self.files.items()}
            missing = sorted(name for name in expected if name not in held[self.files[name]])
        if missing:
            raise ValueError(f"{self.path} lacks {len(missing)} tensors: {_some(missing)}")
        if unexpected := sorted(self.files.keys() - expected.keys()):
            raise ValueError(
                f"{self.path} has {len(unexpected)} tensors that its config.json has no use for: {_some(unexpected)}"
            )
        for name, size in expected.items():
            found = tuple(self._open(name).get_slice(name).get_shape())
            if found != size:
                raise ValueError(f"{self.path}: {name} has shape {list(found)}, config.json asks for {list(size)}")
        return self["model.norm.weight"].dtype

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name, in its stored dtype, on the CPU, its pages still those of the file."""
        tensor: Tensor = self._open(name).get_tensor(name)
        return tensor

    def layer(self, index: int) -> dict[str, Tensor]:
        """The tensors of decoder layer ``index`` by their names below ``model.layers.N.``."""
        return {name: self[f"model.layers.{index}.{name}"] for name in self.shape.layer_tensors()}

    def head(self) -> Tensor:
        """The output matrix, which is the embedding where the two are tied."""
        if is_classifier(self.config) or is_reward_model(self.config):
            return self["score.weight"]
        return self["model.embed_tokens.weight" if self.shape.tie_word_embeddings else "lm_head.weight"]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _tensor_files(path: Path) -> dict[str, str]:
    """File of each tensor by its name."""
    if (path / INDEX).is_file():
        index: Any = storage.read_mapping(path / INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
            raise ValueError(f"{path / INDEX} has no weight_map of tensors to files")
        for file in sorted(set(index.values())):
            if Path(file).name != file:
                raise ValueError(f"{path / INDEX} names a file outside its directory: {file!r}")
            if not (path / file).is_file():
                raise ValueError(f"{path} lacks the shard {file} that {INDEX} names")
        return index
    if (path / SINGLE).is_file():
        try:
            with safe_open(path / SINGLE, framework="pt", device="cpu") as file:
                return dict.fromkeys(file.keys(), SINGLE)
        except SafetensorError as error:
            raise ValueError(f"{path / SINGLE} is damaged or cut short: {error}") from error
    foreign = sorted(p.name for p in path.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt", ".gguf"})
    hint = f"; {foreign[0]} is not read: convert it to safetensors first" if foreign else ""
    raise ValueError(f"{path} has no {SINGLE} and no {INDEX}{hint}")


def meta_model(config: LlamaConfig, *, dtype: torch.dtype, device: torch.device | str) -> LlamaForCausalLM:
    """A Llama without memory for its weights, to be given them one by one; only its rotary frequencies are there."""
    with torch.device("meta"):
        model: LlamaForCausalLM = LlamaForCausalLM(config)
        torch.nn.Module.to(model, dtype=dtype)
    # Rotary frequencies are computed from the configuration, not stored: make them anew off the meta device.
    rotary = type(model.model.rotary_emb)(config)
    model.model.rotary_emb = torch.nn.Module.to(rotary, device)
    return model


def load_model(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    device: torch.device | str = "cpu",
) -> LlamaForCausalLM:
    """A Llama with the weights in ``path``, on ``device``, in ``dtype`` (as stored when ``None``).

    Tensors go to the device one by one: the processes of a node never hold a whole model each in its memory.

    Raises:
        ValueError: as :class:`Weights`; a missing or unexpected tensor is never filled in or passed over. Or the
            model has fewer output than input rows, or rewards for outputs, so it is no language model any more.
    """
    weights = Weights(path)
    config = weights.config
    if is_classifier(config):
        raise ValueError(f"{path} is a token classifier of {config.num_labels} output rows, not a language model")
    if is_reward_model(config):
        raise ValueError(f"{path} is a reward model, which gives one number for a dialogue, not a language model")
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    model = meta_model(config, dtype=dtype or weights.dtype, device=device)
    tensors = {name: weights[name].to(device=device, dtype=model.dtype, copy=True) for name in weights.files}
    if weights.shape.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    if (path / "generation_config.json").is_file():
        storage.read_mapping(path / "generation_config.json")  # a damaged one is named
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return model


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer in ``path``.

    Raises:
        ValueError: there is none.
    """
    if not (path / "tokenizer.json").is_file():
        raise ValueError(f"{path} has no tokenizer.json")
    # Not AutoTokenizer: that of transformers 5.17 builds Llama 2's pipeline over Llama 3's vocabulary where
    # tokenizer_config.json names the class LlamaTokenizer, whatever tokenizer.json says.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of what decides how text becomes ids: vocabulary, merges, normaliser, split, added tokens.

    Padding and truncation, which a user may switch at run time, and the post-processor do not count.
    """
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in ("padding", "truncation", "post_processor", "version"):
        definition.pop(name, None)
    text = json.dumps(definition, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def tokenizer_of(path: Path) -> str | None:
    """:func:`tokenizer_hash` of a model directory, ``None`` where it has no tokenizer."""
    return tokenizer_hash(load_tokenizer(path)) if (path / "tokenizer.json").is_file() else None


def dialogue_hash(path: Path) -> str:
    """SHA-256 of what decides how the model in ``path`` reads a dialogue and ends an answer.

    That is :func:`tokenizer_hash`, the chat template and which tokens are special.
    """
    tokenizer = load_tokenizer(path)
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    special = sorted(map(str, tokenizer.all_special_tokens))
    text = json.dumps([tokenizer_hash(tokenizer), tokenizer.chat_template, ends, special], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
)


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer's files as they are; returns their names. A model directory may have none."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


class ModelWriter:
    """Write a model directory tensor by tensor, so that the model is never whole in memory.

    Everything goes into a hidden folder inside ``out``; :meth:`publish` moves it to the root of ``out``. Used as a
    context manager it removes the hidden folder when an error, a full disk included, ends the block.
    """

    def __init__(self, out: Path, config: LlamaConfig, *, shard_bytes: int = SHARD_BYTES) -> None:
        self.out = out
        self.config = config
        self._folder = out / f".model-{secrets.token_hex(4)}"
        self._shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[dict[str, int]] = []
        self._shapes: dict[str, tuple[int, ...]] = {}

    def __enter__(self) -> Self:
        for stale in self.out.glob(".model-*"):
            shutil.rmtree(stale)
        self._folder.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write ``tensor`` under its name in a Hugging Face file; a shard is written when the next would not fit."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._shard_bytes:
            self._write_shard()
        self._pending[name] = tensor.detach().cpu().contiguous().clone()
        self._pending_bytes += size
        self._shapes[name] = tuple(tensor.shape)

    def _write_shard(self) -> None:
        if shutil.disk_usage(self._folder).free < self._pending_bytes + 2**20:
            raise OSError(errno.ENOSPC, f"no space left for a shard of {self._pending_bytes} bytes", str(self.out))
        save_tensors(self._pending, self._folder / f"shard-{len(self._shards)}", {"format": "pt"})
        self._shards.append({name: t.numel() * t.element_size() for name, t in self._pending.items()})
        self._pending, self._pending_bytes = {}, 0
        faults.crash_point("after_model_shard")

    def publish(
        self,
        source: Path | None,
        provenance: Mapping[str, Any],
        *,
        generation: transformers.GenerationConfig | None = None,
    ) -> list[str]:
        """Finish the directory and return the names of its files.

        Generation settings and tokenizer are copied from ``source``, unless ``generation`` gives the settings;
        ``provenance`` becomes ``llamita.json``.

        Raises:
            ValueError: the tensors written, or their shapes, are not those of the configuration.
        """
        if self._pending:
            self._write_shard()
        names = self._name_shards()
        self.config.save_pretrained(self._folder)
        names.append("config.json")
        if source is not None:
            names += copy_tokenizer(source, self._folder)
            if generation is None and (source / "generation_config.json").is_file():
                shutil.copyfile(source / "generation_config.json", self._folder / "generation_config.json")
                names.append("generation_config.json")
        if generation is not None:
            generation.save_pretrained(self._folder)
            names.append("generation_config.json")
        storage.write_json(self._folder / PROVENANCE, provenance)
        names.append(PROVENANCE)
        for name in names:
            storage.fsync(self._folder / name)
        faults.crash_point("before_rename")
        # Last what a reader looks for first: without it there is no model, whatever else is there.
        for name in sorted(names, key=lambda name: name == "config.json"):
            (self._folder / name).replace(self.out / name)
            faults.crash_point("mid_rename")
        storage.fsync(self.out)
        self._folder.rmdir()
        return names

    def _name_shards(self) -> list[str]:
        expected = stored_tensors(self.config)
        if differ := sorted(name for name, _ in self._shapes.items() ^ expected.items()):
            raise ValueError(f"tensors written and expected differ: {_some(list(dict.fromkeys(differ)))}")
        total = len(self._shards)
        if total == 1:
            (self._folder / "shard-0").rename(self._folder / SINGLE)
            return [SINGLE]
        weight_map: dict[str, str] = {}
        names = [f"model-{index + 1:05d}-of-{total:05d}.safetensors" for index in range(total)]
        for index, (name, shard) in enumerate(zip(names, self._shards, strict=True)):
            (self._folder / f"shard-{index}").rename(self._folder / name)
            weight_map |= dict.fromkeys(shard, name)
        size = sum(sum(shard.values()) for shard in self._shards)
        storage.write_json(self._folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        return [*names, INDEX]


def save_model(
    model: LlamaForCausalLM,
    out: Path,
    *,
    source: Path | None,
    provenance: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Publish a model that is whole in memory into ``out``; returns the names of the files written."""
    config = LlamaConfig.from_dict(model.config.to_dict())
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = dtype or model.dtype
    with ModelWriter(out, config) as writer:
        tensors = model.state_dict()
        for name in shape_of(config).tensors():
            writer.add(name, tensors[name].to(config.dtype))
        return writer.publish(source, provenance)


def os_error(error: SafetensorError, path: Path) -> OSError:
    """The system's own error behind a refused write."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]) if number else errno.EIO, str(error), str(path))


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that whoever may read other new files may read too: the library makes it private.

    Raises:
        OSError: the system refused; with its own error number, which the library hides in a text.
    """
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=dict(metadata))
    except SafetensorError as error:
        raise os_error(error, path) from error
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file so that a crash leaves the old one or the new one, never a part."""
    for stale in path.parent.glob(f".{path.name}.*.tmp"):
        stale.unlink()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        save_tensors(tensors, temporary, metadata)
        storage.fsync(temporary)
        faults.crash_point("mid_write")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    storage.fsync(path.parent)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ValueError: it is damaged or cut short.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name).clone() for name in names}, dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from error


def content_hash(path: Path) -> str:
    """One hash of a directory's weights and configuration, the same wherever the directory lies.

    The hashes in ``DONE.json`` are used where the sizes still agree; else the files are read.
    """
    done = runs.read_done(path)["files"] if (path / "DONE.json").is_file() else {}
    names = sorted(p.name for p in path.iterdir() if p.suffix == ".safetensors" or p.name == "config.json")
    known = {n: done[n] for n in names if n in done and done[n]["bytes"] == (path / n).stat().st_size}
    entries = known | storage.sha256_of_files(path, [name for name in names if name not in known])
    text = "\n".join(f"{name} {entries[name]['sha256']}" for name in names)
    return hashlib.sha256(text.encode()).hexdigest()
