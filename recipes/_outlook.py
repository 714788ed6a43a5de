"""What each recipe's settings mean in bytes, operations and directories, and what is wrong with them."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

import _compose
import _ways
from llamita import checkpoints, checks, estimate, evaluate, redaction, runs
from llamita.data import shards, sources, tokens
from llamita.distill import cache_format, capture, fused, loop, student
from llamita.distill.engines import Precision
from llamita.distill.teachers import Attention
from llamita.prune.ranking import check_wanted
from llamita.prune.scores import LayerScore
from llamita.prune.target import target_shape
from llamita.shapes import PUBLISHED, LlamaShape

T = TypeVar("T")
UNKNOWN = object()
"""Made by a stage of which a mistake hides what it makes."""
MARGIN = 1.35
"""Measured over planned memory, at most (docs/plan.md)."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True)
class Rows:
    """Packed data as far as a plan needs to know it."""

    sequence_length: int
    vocab_size: int
    """0 where it is not known."""
    rows: dict[str, int] = field(default_factory=dict)
    """By split."""
    tokenizer_hash: str | None = None


@dataclass
class World:
    """What exists, or will exist because an earlier stage of the same pipeline makes it."""

    hardware: estimate.Device
    num_gpus: int | None
    """As asked for; unset: see :attr:`processes`."""
    sequence_length: int
    """Assumed where the data does not exist."""
    mfu: float = 0.35
    """Assumed share of the hardware's peak."""
    entries_per_token: float = 16.0
    """Assumed of a cache."""
    made: dict[Path, Any] = field(default_factory=dict)
    """A :class:`LlamaShape` or :class:`Rows`, ``UNKNOWN``, or ``None`` for what is neither model nor data."""
    tokenizers: dict[Path, str] = field(default_factory=dict)
    """Hash of the tokenizer in each of these."""
    waits_for: frozenset[str] = frozenset()
    """Stages that are done before the one at hand begins."""
    stage_processes: int | None = None
    """What the pipeline says about the stage at hand."""

    @property
    def processes(self) -> int:
        """Of a stage that trains."""
        return self.num_gpus or self.stage_processes or (8 if self.hardware.is_gpu else 1)

    def model(self, setting: str, path: Path, outlook: Outlook, *, needs_tokenizer: bool = True) -> LlamaShape | None:
        """The shape of a model; what is wrong with it goes to ``outlook``."""
        if _normal(path) in self.made:
            return self._earlier(setting, path, outlook, LlamaShape, "model")
        outlook.mistakes += checks.model(setting, path, needs_tokenizer=needs_tokenizer)
        shape = checks.model_shape(path)
        if shape is not None and not (path.is_dir() and checks.has_weights(path)):
            outlook.notes.append(f"{setting}={path} has no weights here: the recipe will need a directory with them")
        return shape

    def rows(self, setting: str, path: Path, outlook: Outlook) -> Rows:
        """The data; where there is none, a row length is assumed."""
        if _normal(path) in self.made:
            return self._earlier(setting, path, outlook, Rows, "data") or Rows(self.sequence_length, 0)
        problems = checks.errors_of(lambda: shards.PackedData.open(path))
        outlook.mistakes += [problem if setting in problem else f"{setting}: {problem}" for problem in problems]
        if problems:
            outlook.notes.append(f"{setting} cannot be read: rows of {self.sequence_length} tokens are assumed")
            return Rows(self.sequence_length, 0)
        data = shards.PackedData.open(path)
        rows_by_split = {name: entry["rows"] for name, entry in data.manifest["splits"].items()}
        return Rows(data.sequence_length, data.vocab_size, rows_by_split, data.tokenizer_hash)

    def _earlier(self, setting: str, path: Path, outlook: Outlook, kind: type[T], noun: str) -> T | None:
        self.check_order(setting, path, outlook)
        made = self.made[_normal(path)]
        if isinstance(made, kind):
            return made
        if made is not UNKNOWN:
            outlook.mistakes.append(f"{setting}={path}: stage {path.name} makes no {noun}")
        return None

    def check_order(self, setting: str, path: Path, outlook: Outlook) -> None:
        """A stage that reads another must wait for it."""
        if path.name not in self.waits_for:
            outlook.mistakes.append(
                f"{setting}={path} is made by stage {path.name}, for which this stage does not wait: add it to after"
            )

    def stage(self, setting: str, path: Path, outlook: Outlook) -> None:
        """A directory that only a finished stage can have made, or that an earlier one will make."""
        if _normal(path) in self.made:
            self.check_order(setting, path, outlook)
        else:
            outlook.mistakes += checks.finished_stage(setting, path)

    def is_inside_made(self, path: Path) -> bool:
        """Whether it lies in the directory of another stage, so that it need not exist yet."""
        return any(parent in self.made for parent in _normal(path).parents)

    def tokenizer(self, path: Path) -> str | None:
        """The hash of a directory's tokenizer, where it has or will have one that can be read."""
        if (place := _normal(path)) in self.made:
            return self.tokenizers.get(place)
        return None if _tokenizer("", path) else checkpoints.tokenizer_of(path)


def _normal(path: Path) -> Path:
    return Path(os.path.normpath(path.absolute()))


@dataclass
class Outlook:
    """What a stage will take."""

    name: str
    recipe: str
    out: Path
    processes: int = 1
    parameters: dict[str, int] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    """Bytes per process."""
    flops: dict[str, float] = field(default_factory=dict)
    read_bytes: float = 0.0
    disk: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)
    may_change: tuple[str, ...] = ()
    makes: LlamaShape | Rows | None = None
    tokenizer: str | None = None
    """Hash of that of the model or data that it makes."""
    hours: float = 0.0
    """Beside operations and disks."""
    written_bytes: float = 0.0
    ways: list[dict[str, Any]] = field(default_factory=list)
    """What each way to have the teachers would take; see :func:`_ways.compare`."""
    on_accelerator: bool = True
    """Whether the memory is that of an accelerator, not of its host."""


def of(recipe: str, overrides: Sequence[str], world: World, name: str | None = None) -> tuple[list[Outlook], list[str]]:
    """The outlook of a recipe's stages (a pipeline has several), and every mistake that can be seen beforehand."""
    config, mistakes = _compose.composed(recipe, overrides)
    mistakes = redaction.secrets_in(dict(override.partition("=")[::2] for override in overrides)) + mistakes
    if config is None:
        return [], list(map(redaction.redacted, mistakes))
    if recipe == "pipeline":
        return _pipeline(config, world, mistakes)
    outlook = Outlook(name or config.out.name, recipe, config.out)
    match recipe:
        case "prepare":
            _prepare(config, world, outlook)
        case "prune":
            _prune(config, world, outlook)
        case "cache":
            _cache(config, world, outlook)
        case "distill":
            _distill(config, world, outlook)
        case "evaluate":
            _evaluate(config, world, outlook)
        case "report":
            _report(config, world, outlook)
        case _:
            raise AssertionError(recipe)
    _common(config, world, outlook)
    world.made[_normal(config.out)] = outlook.makes
    if outlook.tokenizer is not None:
        world.tokenizers[_normal(config.out)] = outlook.tokenizer
    # What follows from a setting that was not given has been said once.
    mistakes += [mistake for mistake in outlook.mistakes if _compose.UNSET not in mistake]
    return [outlook], list(dict.fromkeys(map(redaction.redacted, mistakes)))


def _pipeline(config: Any, world: World, mistakes: list[str]) -> tuple[list[Outlook], list[str]]:
    """Every stage in order; what one makes, the next may read."""
    outlooks: list[Outlook] = []
    order = _compose.load("pipeline").in_order(config.stages)
    world.made |= {_normal(config.out / name): UNKNOWN for name in order}
    before: dict[str, frozenset[str]] = {}
    on_slurm = config.launcher.kind == "slurm"
    for name in order:
        stage = config.stages[name]
        before[name] = frozenset(stage.after).union(*(before[parent] for parent in stage.after))
        world.waits_for = before[name]
        world.stage_processes = (
            config.launcher.nodes * max(1, config.launcher.gpus_per_node) if on_slurm else stage.processes
        )
        found, wrong = of(stage.recipe, [*stage.overrides, f"out={config.out / name}"], world, name)
        outlooks += found
        mistakes += [f"stage {name}: {mistake}" for mistake in wrong]
    needed = sum(sum(outlook.disk.values()) for outlook in outlooks)
    mistakes += checks.space(config.out, needed, estimate.amount)
    return outlooks, mistakes


def _common(config: Any, world: World, outlook: Outlook) -> None:
    """What is checked for every recipe."""
    settings = runs.plain(config)
    outlook.mistakes += redaction.secrets_in(settings)
    outlook.mistakes += runs.names({"the last part of out": config.out.absolute().name})
    outlook.mistakes += runs.names({"run.project": config.run.project})
    outlook.mistakes += checks.errors_of(
        lambda: runs.check_out(config.out, outlook.recipe, settings, may_change=outlook.may_change)
    )
    outlook.mistakes += checks.space(config.out, sum(outlook.disk.values()), estimate.amount)
    if outlook.on_accelerator or not world.hardware.is_gpu:  # the memory of a GPU's host is not known here
        needed, device = sum(outlook.memory.values()), world.hardware
        outlook.mistakes += checks.memory(needed, device.name, device.memory_bytes, estimate.amount)
        if MARGIN * needed > device.memory_bytes >= needed:
            outlook.notes.append(
                f"{estimate.amount(needed)} of {device.name} is close: up to a third more than the items above is used "
                "in practice"
            )
    if not outlook.mistakes and not world.made:
        outlook.mistakes += checks.errors_of(lambda: _own_check(outlook.recipe, config))


def _own_check(recipe: str, config: Any) -> None:
    """What the recipe itself refuses before it starts, where everything that it reads is here to be looked at."""
    module = _compose.load(recipe)
    match recipe:
        case "prune":
            if checks.has_weights(config.model.path):
                module.calibration(config.calibration, checkpoints.Weights(config.model.path))
        case "distill":
            if all(map(checks.has_weights, module.models(config).values())):
                # That kernel needs a GPU, which the machine that plans may lack.
                module.check(dataclasses.replace(config, attention=Attention.sdpa))
        case "evaluate":
            if all(map(checks.has_weights, config.paths().values())):
                module.check(config)


def _prepare(config: Any, world: World, outlook: Outlook) -> None:
    found = []
    for name, source in _compose.load("prepare").named(config).items():
        outlook.mistakes += runs.names({"sources": name})
        try:
            found.append(sources.resolve(name, source))
        except ValueError as error:
            outlook.mistakes.append(str(error))
    for source in found:
        if source.kind is sources.Kind.datasets and not Path(str(source.config.path)).is_dir():
            outlook.notes.append(
                f"source {source.name!r}: {source.config.path} is a name, whose size is not known here; "
                f"{'it is downloaded' if config.allow_network else 'allow_network=true lets it be downloaded'}"
            )
        elif source.files and not any(file.stat().st_size for file in source.files):
            outlook.mistakes.append(f"source {source.name!r}: path={source.config.path} is empty")
    vocabulary = _prepare_tokenizer(config.tokenizer, world, outlook)
    text = outlook.read_bytes = float(sum(file.stat().st_size for source in found for file in source.files))
    all_tokens = kept = estimate.num_text_tokens(text)
    if config.max_tokens is not None:
        kept = min(all_tokens, config.max_tokens)
    processes = config.num_proc or _compose.load("prepare").num_cores()
    outlook.hours = estimate.prepare_hours(all_tokens, processes)
    outlook.notes.append(
        f"{estimate.TEXT_BYTES_PER_TOKEN:.0f} bytes of text per token and {estimate.TOKENS_PER_CPU_SECOND:,.0f} tokens "
        f"per second in each of {processes} processes are assumed, compressed files counted as they lie"
    )
    outlook.disk = estimate.prepare_disk(text, all_tokens)
    outlook.on_accelerator = False
    outlook.may_change = ("num_proc",)
    rows = {}
    if text:
        held, per_row = config.validation.fraction, config.sequence_length
        # However short the text, something is trained on and, if asked for, something held out.
        rows = {"train": max(1, int(kept * (1 - held) / per_row))}
        rows["validation"] = max(1, int(all_tokens * held / per_row)) if held else 0
    outlook.makes = Rows(config.sequence_length, vocabulary, rows, outlook.tokenizer)


def _prepare_tokenizer(tokenizer: Any, world: World, outlook: Outlook) -> int:
    """The size of the vocabulary, 0 where it is not known; what is wrong goes to ``outlook``."""
    path = tokenizer.path
    if path is None:
        return int(tokenizer.vocab_size)
    if _is_only_a_name(path):
        outlook.notes.append(f"tokenizer.path={path} is no directory: the recipe will need one with tokenizer.json")
        return PUBLISHED[str(path)].vocab_size
    if _normal(path) in world.made or world.is_inside_made(path):
        return 0
    if wrong := _tokenizer("tokenizer.path", path):
        outlook.mistakes += wrong
        return 0
    outlook.tokenizer = world.tokenizer(path)
    return tokens.vocab_size(checkpoints.load_tokenizer(path))


def _is_only_a_name(path: Path) -> bool:
    """Whether this is a published model's name on the hub, and no directory."""
    return str(path) in PUBLISHED and not path.is_dir()


def _tokenizer(setting: str, path: Path) -> list[str]:
    if not (path / "tokenizer.json").is_file():
        return [f"{setting}={path} has no tokenizer.json"]
    return [f"{setting}: {problem}" for problem in checks.errors_of(lambda: tokens.load(path))]


def _prune(config: Any, world: World, outlook: Outlook) -> None:
    source = world.model("model.path", config.model.path, outlook, needs_tokenizer=False)
    rows = None
    if config.calibration.path is not None:
        rows = world.rows("calibration.path", config.calibration.path, outlook)
    if source is None:
        return
    outlook.mistakes += _same_tokens("model.path", config.model.path, source, "calibration.path", rows, world)
    outlook.tokenizer = world.tokenizer(config.model.path)
    target, mistakes = _target(source, config.target)
    outlook.mistakes += mistakes + _wanted(source, target, config, world)
    outlook.parameters = {"before": source.num_parameters, "after": target.num_parameters}
    stored = DTYPE_BYTES.get(_dtype(config.model.path), 2)
    compute = DTYPE_BYTES[config.calibration.dtype] if config.calibration.dtype else stored
    num_tokens = 0
    batch_tokens = config.calibration.batch_rows * (rows.sequence_length if rows else 0)
    measured = config.scores.path is None and rows is not None
    second_order = measured and config.scores.second_order
    mended = rows is not None and config.compensation.wanted and source != target
    if rows is not None:
        outlook.mistakes += _split(rows, "calibration.path", config.calibration.path, config.calibration.split)
        there = rows.rows.get(config.calibration.split, config.calibration.tokens)
        num_tokens = min(config.calibration.tokens, there * rows.sequence_length)
        row_tokens = min(rows.sequence_length, config.calibration.tokens)
        outlook.flops = estimate.prune_flops(
            source,
            target,
            tokens=num_tokens,
            row_tokens=row_tokens,
            batch_tokens=batch_tokens,
            second_order=second_order,
            greedy_rounds=(source.num_hidden_layers - target.num_hidden_layers)
            * (config.scores.layers is LayerScore.greedy and measured),
            depth_tokens=min(num_tokens, config.scores.depth_tokens),
            mended=mended,
            layer_steps=config.compensation.layer_steps,
            head_steps=config.compensation.head_steps,
        )
    outlook.memory = estimate.prune_memory(
        source,
        target,
        tokens=num_tokens,
        batch_tokens=min(num_tokens, batch_tokens),
        stored_bytes=stored,
        compute_bytes=compute,
        shard_bytes=checkpoints.SHARD_BYTES,
        second_order=second_order,
        mended=mended,
    )
    # Once for the scores, once for surgery, once more for the content hash, and once for the whole stream of mending.
    outlook.read_bytes = (3.0 + mended) * stored * source.num_parameters
    outlook.disk = {"model": float(stored * target.num_parameters)}
    if mended:
        outlook.disk["mended layers, until the end"] = float(stored * target.num_parameters)
    outlook.on_accelerator = False
    outlook.makes = target


def _target(source: LlamaShape, target: Any) -> tuple[LlamaShape, list[str]]:
    """The shape that is asked for and every mistake in it; a field that is wrong is left as in the source."""
    mistakes: list[str] = []
    while True:
        try:
            return target_shape(source, target), mistakes
        except ValueError as error:
            mistakes.append(str(error))
            named = re.search(r"target\.(\w+)", str(error))
            if named is None or getattr(target, named[1]) is None:
                return source, mistakes
            target = dataclasses.replace(target, **{named[1]: None})


def _wanted(source: LlamaShape, target: LlamaShape, config: Any, world: World) -> list[str]:
    """What the plan of units lacks: text, or a model with the rotary scaling that is asked for."""
    kinds, has_text, mistakes = config.scores, True, []
    future = kinds.path is not None and _normal(kinds.path) in world.made
    if not future:
        calibrated = config.calibration.path is not None
        mistakes = checks.errors_of(lambda: kinds.have_text(calibrated=calibrated))
        has_text = bool(mistakes) or kinds.have_text(calibrated=calibrated)
    if future or mistakes:  # what it holds is not known
        kinds = dataclasses.replace(kinds, path=None)
    rope = None
    if (config.model.path / "config.json").is_file():
        rope = checkpoints.rope_type(checkpoints.load_config(config.model.path))
    return mistakes + checks.errors_of(
        lambda: check_wanted(source, target, config.target, kinds, has_text=has_text, rope_type=rope)
    )


def _dtype(path: Path) -> str:
    if not (path / "config.json").is_file():
        return "bfloat16"
    config = runs.read_json(path / "config.json")
    return str(config.get("dtype") or config.get("torch_dtype"))


def _split(rows: Rows, setting: str, path: Path, name: str) -> list[str]:
    """A split that the data does not have, or that is empty."""
    if not rows.rows or rows.rows.get(name):
        return []
    filled = ", ".join(split for split, number in rows.rows.items() if number)
    return [f"{setting}={path} has no rows in split {name!r}; it has {filled}"]


def _same_tokens(setting: str, path: Path, shape: LlamaShape, data: str, rows: Rows | None, world: World) -> list[str]:
    """Whether the data's ids mean the same to the model."""
    if rows is None:
        return []
    model, made_with = f"{setting}={path}", rows.tokenizer_hash
    if _is_only_a_name(path) and rows.vocab_size not in (0, shape.vocab_size):
        return [f"{data} has {rows.vocab_size} token ids, the tokenizer of {model} has {shape.vocab_size}"]
    return checks.same_tokens(model, shape.vocab_size, world.tokenizer(path), data, rows.vocab_size, made_with)


def _cache(config: Any, world: World, outlook: Outlook) -> None:
    rows = world.rows("data.path", config.data.path, outlook)
    outlook.may_change = capture.MAY_CHANGE
    outlook.processes = world.processes
    if (shape := world.model("teacher.path", config.teacher.path, outlook)) is None:
        return
    outlook.mistakes += _same_tokens("teacher.path", config.teacher.path, shape, "data.path", rows, world)
    outlook.mistakes += checks.errors_of(lambda: cache_format.check_fits(shape.vocab_size, config.samples_per_token))
    half = config.teacher.precision.dtype(torch.device("cuda" if world.hardware.is_gpu else "cpu")) is torch.bfloat16
    tokens = rows.sequence_length * sum(rows.rows.get(split, 0) for split in config.data.splits)
    weights = (2 if half else 4) * shape.num_parameters
    chunk = (config.chunk_mebibytes or capture.default_chunk_mebibytes(on_cpu=not world.hardware.is_gpu)) * 2**20
    outlook.parameters = {"teacher": shape.num_parameters}
    outlook.memory = {"teacher, weights": weights, "distributions": chunk}
    outlook.flops = {"teacher, forward": tokens * shape.forward_flops_per_token(rows.sequence_length / 2)}
    outlook.read_bytes = float(weights)
    entries = min(capture.USUAL_ENTRIES, config.samples_per_token)
    outlook.disk = {"entries": float(cache_format.ENTRY_BYTES * entries * tokens), "lengths": float(tokens)}
    outlook.notes.append(
        f"{entries} entries per token are assumed, for a teacher of billions of weights; a weak one needs up to three "
        f"times as many, and never more than samples_per_token={config.samples_per_token}"
    )


def _distill(config: Any, world: World, outlook: Outlook) -> None:
    rows = world.rows("data.path", config.data.path, outlook)
    student = _student(config, rows, world, outlook)
    paths = {"student": config.student.path} if config.student.path else {}
    shapes = {"student": student}
    for name, teacher in config.teachers.items():
        outlook.mistakes += runs.names({"teachers": name})
        if name == "student":
            outlook.mistakes.append("teachers.student: a teacher must not have the name of the student")
        if teacher.cache is not None:
            world.stage(f"teachers.{name}.cache", teacher.cache, outlook)
            continue  # it is not run, whatever stands beside it
        paths[name] = teacher.path
        shapes[name] = world.model(f"teachers.{name}.path", teacher.path, outlook)
    _agree(paths, shapes, rows, world, outlook)
    outlook.tokenizer = world.tokenizer(config.student.path) if config.student.path else rows.tokenizer_hash
    outlook.mistakes += _split(rows, "data.path", config.data.path, "train")
    if config.validation_rows and rows.rows and not rows.rows.get("validation"):
        outlook.mistakes.append(
            f"data.path={config.data.path} has no held-out rows: validation_rows=0 trains without, "
            f"got {config.validation_rows}"
        )
    if config.compile and config.deepspeed.stage:
        outlook.mistakes.append("compile=true does not go with deepspeed: choose deepspeed=none")
    outlook.mistakes += checks.division(config.global_batch_rows, config.micro_batch_rows, world.processes)
    if student is None:
        return
    half = config.precision is Precision.bfloat16 or (config.precision is Precision.auto and world.hardware.is_gpu)
    if config.attention is Attention.flash_attention_2 and not (half and world.hardware.is_gpu):
        outlook.mistakes.append(
            f"attention=flash_attention_2 needs a GPU and precision=bfloat16, got {world.hardware.name} and "
            f"{config.precision}; attention=sdpa runs everywhere"
        )
    stage = config.deepspeed.stage
    precision = estimate.Precision.float32
    if half:
        precision = estimate.Precision.bfloat16 if stage else estimate.Precision.autocast
    mebibytes = config.loss.chunk_mebibytes or fused.default_mebibytes("cuda" if world.hardware.is_gpu else "cpu")
    training = estimate.Training(
        student=student,
        teachers=[],
        precision=precision,
        zero_stage=stage,
        processes=world.processes,
        micro_batch_rows=config.micro_batch_rows,
        rows_per_step=config.global_batch_rows,
        sequence_length=rows.sequence_length,
        steps=config.steps,
        packed=config.attention in (Attention.sdpa, Attention.eager),
        recompute=config.activation_checkpointing,
        chunk_bytes=mebibytes * 2**20,
        checkpoint_every=config.checkpoint_every,
        kept_checkpoints=max(2, config.keep_checkpoints),
        validation_rows=min(config.validation_rows, rows.rows.get("validation", config.validation_rows)),
        validation_every=config.validation_every,
        adapter_parameters=config.student.lora.num_parameters(student),
    )
    found = [
        estimate.Teacher(name=name, shape=shape, bytes_per_value=2 if half else 4)
        for name, shape in shapes.items()
        if shape is not None and name != "student"
    ]
    online = [
        _ways.placed(teacher, config.teachers[teacher.name], world.processes)
        for teacher in found
        if not _ways.is_cached(config.teachers[teacher.name])
    ]
    outlook.ways = _ways.compare(
        training,
        found,
        world.hardware,
        mfu=world.mfu,
        data_tokens=rows.rows.get("train", 0) * rows.sequence_length,
        entries_per_token=world.entries_per_token,
    )
    training = dataclasses.replace(training, teachers=online)
    outlook.processes = world.processes
    outlook.parameters = {name: shape.num_parameters for name, shape in shapes.items() if shape is not None}
    outlook.memory = estimate.training_memory(training)
    if not world.hardware.is_gpu:
        outlook.memory = {"Python and its libraries": estimate.PYTHON_BYTES} | outlook.memory
    outlook.flops = estimate.training_flops(training)
    outlook.read_bytes = float(sum(2 * shape.num_parameters for shape in shapes.values() if shape))
    saved = 2 if half else 4
    outlook.disk = estimate.training_disk(training, saved_bytes_per_value=saved)
    outlook.written_bytes = estimate.training_written(training, saved_bytes_per_value=saved)
    outlook.may_change = loop.MAY_CHANGE
    outlook.makes = student
    tokens = config.steps * config.global_batch_rows * rows.sequence_length
    text = f"{tokens:,} tokens in {config.steps:,} steps"
    if there := rows.rows.get("train"):
        text += f", {config.steps * config.global_batch_rows / there:,.1f} times the data"
    outlook.notes.append(text)


def _student(config: Any, rows: Rows, world: World, outlook: Outlook) -> LlamaShape | None:
    wanted = config.student
    if wanted.path is not None:
        return world.model("student.path", wanted.path, outlook)
    outlook.mistakes += checks.positions(rows.sequence_length, "student.shape", wanted.shape.max_position_embeddings)
    sizes = {name: getattr(wanted.shape, name) for name in student.SIZES}
    sizes["head_dim"] = sizes["head_dim"] or sizes["hidden_size"] // max(1, sizes["num_attention_heads"])
    vocabulary = rows.vocab_size or PUBLISHED["meta-llama/Llama-3.1-8B"].vocab_size
    try:
        return LlamaShape(**sizes, vocab_size=vocabulary, tie_word_embeddings=wanted.shape.tie_word_embeddings)
    except ValueError as error:
        outlook.mistakes.append(f"student.shape: {error}")
        return None


def _agree(
    paths: Mapping[str, Path], shapes: Mapping[str, LlamaShape | None], rows: Rows, world: World, outlook: Outlook
) -> None:
    """One vocabulary and one tokenizer for data, student and teachers."""
    for name, path in paths.items():
        if (shape := shapes[name]) is None:
            continue
        setting = "student.path" if name == "student" else f"teachers.{name}.path"
        outlook.mistakes += _same_tokens(setting, path, shape, "data.path", rows, world)
        if (path / "config.json").is_file():
            most = checkpoints.load_config(path).max_position_embeddings
            outlook.mistakes += checks.positions(rows.sequence_length, f"{setting}={path}", most)
    sizes = {name: shape.vocab_size for name, shape in shapes.items() if shape is not None}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        outlook.mistakes.append(f"student and teachers must have the same vocabulary, got {listed}")
    for name, shape in shapes.items():
        if shape is not None and shape.output_rows is not None:
            outlook.mistakes.append(f"{name} has {shape.output_rows} output rows: it is no language model any more")
    hashes = {name: digest for name, path in paths.items() if (digest := world.tokenizer(path))}
    if rows.tokenizer_hash is None and len(set(hashes.values())) > 1:
        listed = ", ".join(f"{name} {digest[:12]}" for name, digest in hashes.items())
        outlook.mistakes.append(f"student and teachers must have the same tokenizer, got {listed}")


def _evaluate(config: Any, world: World, outlook: Outlook) -> None:
    rows = world.rows("data.path", config.data.path, outlook) if config.data.path is not None else None
    shapes: dict[str, LlamaShape] = {}
    for name, path in config.paths().items():
        outlook.mistakes += runs.names({"models": name})
        setting = f"models.{name}.path" if name in config.models else f"{name}.path"
        if (shape := world.model(setting, path, outlook, needs_tokenizer=bool(config.tasks))) is not None:
            shapes[name] = shape
            outlook.mistakes += _same_tokens(setting, path, shape, "data.path", rows, world)
    sizes = {name: shape.vocab_size for name, shape in shapes.items()}
    if "teacher" in shapes and len(set(sizes.values())) > 1:
        outlook.mistakes.append(f"KL to the teacher needs one vocabulary, got sizes {sizes}")
    outlook.parameters = {name: shape.num_parameters for name, shape in shapes.items()}
    if not shapes:
        return
    value = DTYPE_BYTES[config.dtype] if config.dtype else 2
    teacher = "teacher" if config.teacher.path is not None else None
    outlook.memory = estimate.evaluation_memory(
        shapes,
        batch_rows=config.data.batch_rows if rows is not None else 0,
        sequence_length=rows.sequence_length if rows is not None else 0,
        bytes_per_value=value,
        chunk_values=evaluate.CHUNK_VALUES,
        teacher=teacher,
    )
    if rows is not None:
        outlook.mistakes += _split(rows, "data.path", config.data.path, config.data.split)
        there = rows.rows.get(config.data.split, config.data.max_rows or 0)
        outlook.flops = estimate.evaluation_flops(
            shapes,
            rows=min(config.data.max_rows or there, there),
            sequence_length=rows.sequence_length,
            teacher=teacher,
        )
    if config.tasks:
        outlook.mistakes += checks.errors_of(lambda: evaluate.task_manager(config.tasks, config.task_path))
        outlook.notes.append("the time of lm-eval tasks is not counted")
    outlook.read_bytes = 2.0 * value * sum(outlook.parameters.values())


def _report(config: Any, world: World, outlook: Outlook) -> None:
    outlook.on_accelerator = False
    if not config.runs:
        outlook.mistakes.append("runs must name at least one directory: runs.NAME=PATH")
    for name, path in config.runs.items():
        outlook.mistakes += runs.names({"runs": name})
        if _normal(path) in world.made:
            world.check_order(f"runs.{name}", path, outlook)
            continue
        if not path.is_dir():
            outlook.mistakes.append(f"runs.{name}={path} does not exist")
        elif problems := checks.unfinished(f"runs.{name}", path):
            outlook.notes += problems
