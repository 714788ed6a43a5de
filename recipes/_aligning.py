"""What the recipes on TRL's trainers have in common: settings, what is read, how TRL is told, and what is published."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from omegaconf import MISSING
from transformers import LlamaConfig

from llamita import chat, checkpoints, estimate, preflight, runs
from llamita.align import preferences, published, trainer_keys, trainers, watch
from llamita.align.dialogues import DialogueData
from llamita.align.rejection import evenly
from llamita.distill import launch

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ModelConfig:
    """The model that is trained, and that the result is measured against."""

    path: Path = MISSING


@dataclass(kw_only=True)
class DataConfig:
    """A directory that ``dialogues`` or ``sample`` wrote."""

    path: Path = MISSING


@dataclass(kw_only=True)
class AlignConfig(trainers.TrainingConfig):
    """What every such recipe can be told."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    deepspeed: launch.DeepSpeedConfig = field(default_factory=launch.DeepSpeedConfig)
    run: runs.RunConfig = field(default_factory=runs.RunConfig)
    out: Path = MISSING

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what cannot be meant."""
        super().__post_init__()
        if self.lora.rank and self.deepspeed.stage == 3:
            raise ValueError(f"deepspeed=zero3 does not go with lora.rank={self.lora.rank}: choose zero2 or none")


@dataclass(frozen=True)
class Given:
    """What a stage reads, as far as it costs little."""

    config: LlamaConfig
    dtype: torch.dtype
    """Of the stored weights."""
    encoder: chat.Encoder
    data: DialogueData


def open_all(config: AlignConfig, kind: str) -> Given:
    """Model and data, without the weights; ``kind`` is what the data must hold to train on.

    Raises:
        ValueError: naming what is missing, or what does not go together.
    """
    launch.check_launch(launch.EngineConfig(), config.deepspeed)
    config.micro_batches(launch.world_size())
    stored = checkpoints.Weights(config.model.path)
    if stored.config.architectures not in (None, ["LlamaForCausalLM"]):
        raise ValueError(f"model.path={config.model.path} is a {stored.config.architectures}, not a language model")
    if config.max_length > stored.config.max_position_embeddings:
        raise ValueError(
            f"max_length={config.max_length} is more than the {stored.config.max_position_embeddings} positions of "
            f"model.path={config.model.path}"
        )
    encoder = chat.Encoder(checkpoints.load_tokenizer(config.model.path))
    data = DialogueData.open(config.data.path)
    data.need("train", kind)
    return Given(stored.config, stored.dtype, encoder, data)


def open_pairs(config: AlignConfig, *, held_out: int) -> tuple[Given, dict[str, preferences.Rows]]:
    """What is read, and the pairs of both splits as ids, of the second at most ``held_out``, evenly spaced; 0: none.

    Raises:
        ValueError: TRL is not installed, as :func:`open_all`, there are no pairs, or none fits.
    """
    trainers.check_installed()
    given = open_all(config, "pairs")
    if held_out:
        given.data.need("validation", "pairs", without="validation_pairs=0")
    pairs = {"train": given.data.pairs("train"), "validation": evenly(given.data.pairs("validation"), held_out)}
    return given, {
        split: preferences.encode(part, given.encoder, max_length=config.max_length, name=f"{split}.pairs.jsonl")
        for split, part in pairs.items()
        if part or split == "train"
    }


def counts(rows: Mapping[str, preferences.Rows]) -> dict[str, float]:
    """How many pairs are used, and how many are left out."""
    found: dict[str, float] = {}
    for split, part in rows.items():
        kinds = {"pairs": len(part), "too_long": part.too_long, "refused": part.refused}
        found |= {f"data/{split}_{kind}": number for kind, number in kinds.items()}
    return found


def rows_of(order: Sequence[int], ids: Sequence[str], rows: int) -> Callable[[int], list[str]]:
    """The names of the rows of a step."""
    return lambda step: [ids[row] for row in order[(step - 1) * rows : step * rows]]


def zero(config: AlignConfig) -> dict[str, Any] | None:
    """DeepSpeed's own configuration, of which transformers fills in what is ``auto``."""
    if not config.deepspeed.stage:
        return None
    launch.prepare_for_deepspeed()
    given = copy.deepcopy(config.deepspeed.config)
    spread = {"stage": config.deepspeed.stage, **given.get("zero_optimization", {})}
    if config.deepspeed.stage == 3:
        spread.setdefault("stage3_gather_16bit_weights_on_model_save", True)
    return {
        "zero_force_ds_cpu_optimizer": False,
        **given,
        "zero_optimization": spread,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


def told(config: AlignConfig, *, steps: int, **more: Any) -> dict[str, Any]:
    """What TRL is told by our settings; ``more`` of one trainer alone."""
    common = trainers.settings_of(
        config,
        config.out / "checkpoints",
        steps=steps,
        seed=config.run.seed,
        world_size=launch.world_size(),
        deepspeed=zero(config),
    )
    return {**common, **more}


def told_of_pairs(
    config: AlignConfig, kind: type[Any], rows: Mapping[str, preferences.Rows], **more: Any
) -> dict[str, Any]:
    """As :func:`told`, of a trainer with settings ``kind`` that takes each pair as it is, in the order given.

    Raises:
        ValueError: there are too few pairs, or ``trainer`` has a key that ``kind`` has not or that is decided here.
    """
    steps = config.num_steps(len(rows["train"]))
    found = told(config, steps=steps, max_length=None, train_sampling_strategy="sequential", **more)
    trainer_keys.check(kind, config.trainer, found)
    return found


@dataclass
class Stage:
    """One run at work on what it reads."""

    config: AlignConfig
    given: Given
    run: runs.Run
    arguments: Any
    parents: dict[str, str] = field(default_factory=dict)
    """Content hashes by name, on the main process."""

    def __post_init__(self) -> None:
        """Look at the node and the disk, and hash what is read; every rank comes here."""
        self.device = PartialState().device
        self.precision = self.config.precision.dtype(self.device)
        shape = checkpoints.shape_of(self.given.config)
        trained = self.config.lora.num_parameters(shape) or shape.num_parameters
        each = estimate.checkpoint_bytes(trained)
        wanted = max(watch.FEWEST, self.config.keep_checkpoints) + 1
        there = len(watch.steps_in(self.run.path / "checkpoints"))
        preflight.check(
            self.run.path,
            self.device,
            self.run.settings,
            disk_bytes=each * max(1, wanted - there),
            min_allreduce_gb_per_s=self.config.run.min_allreduce_gb_per_s,
        )

    def hash_parents(self, **paths: Path) -> None:
        """Hash what is read on the main process, and look for a checkpoint to go on from.

        A model's hash is that of its weights; how the trained one and a reward model read text is a parent of its own.

        Raises:
            ValueError: the checkpoint was trained from something else.
        """
        readers = {"tokenizer": paths["model"]}
        if "reward" in paths:
            readers["reward/tokenizer"] = paths["reward"]
        if runs.is_main_process():
            self.parents = {name: checkpoints.content_hash(path) for name, path in paths.items()}
            self.parents |= {name: checkpoints.dialogue_hash(path) for name, path in readers.items()}
            self.parents["data"] = self.given.data.content_hash
        self.paths = {**paths, **readers, "data": self.config.data.path}
        PartialState().wait_for_everyone()
        self.found = watch.newest(self.run.path / "checkpoints")
        if self.found is not None:
            watch.check_parents(self.found, self.parents, self.paths)

    def log_start(self, metrics: Mapping[str, float]) -> None:
        """Log what is known before the first step, where this start is to take it."""
        if self.found is None:
            self.run.log(metrics)

    def load(self, path: Path) -> Any:
        """A language model to train, float32; with adapters it rests in the precision of the arithmetic."""
        resting = self.precision if self.config.lora.rank else torch.float32
        return checkpoints.load_model(path, dtype=resting, device=self.device, attn_implementation="sdpa")

    def load_other(self, path: Path) -> Any:
        """A model that rests, in the precision of the arithmetic."""
        made = checkpoints.load_model(path, dtype=self.precision, device=self.device, attn_implementation="sdpa")
        return made.train(False).requires_grad_(False)

    @property
    def computed_in(self) -> torch.dtype:
        """To what autocast casts in layers; DeepSpeed computes in the precision that it holds the weights in."""
        return torch.float32 if self.config.deepspeed.stage else self.precision

    @property
    def about(self) -> dict[str, str]:
        """What a measurement of the model before training depends on, on the main process."""
        is_cast = self.computed_in is not self.precision
        return {"precision": str(self.precision), **({"weights": "cast"} if is_cast else {}), **self.parents}

    @contextmanager
    def as_trained(self, model: Any) -> Iterator[None]:
        """Let a model be as the trainer will hold it, but whole on every rank: DeepSpeed casts the weights."""
        is_cast = self.computed_in is not self.precision
        held = trainers.weights_in(model, self.precision) if is_cast else nullcontext()
        with trainers.not_yet_spread(self.arguments), held:
            yield

    def autocast(self) -> torch.autocast:
        """The arithmetic of the training where no trainer chooses it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.computed_in is torch.bfloat16)

    def handed_over(self, model: Any) -> Any:
        """The model where its trainer wants it: DeepSpeed itself brings to the device what stays there."""
        return model.cpu() if self.config.deepspeed.stage else model

    def tokenizer(self, model: Any) -> Any:
        """The model's tokenizer as TRL reads it: with a padding token and a chat template.

        TRL's trainers want the model's special tokens to be the tokenizer's; what is published has its own again.
        """
        tokenizer = checkpoints.load_tokenizer(self.config.model.path)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(self.given.encoder.borders.pad_id)
        tokenizer.chat_template = tokenizer.chat_template or chat.TEMPLATE
        for settings in filter(None, (model.config, getattr(model, "generation_config", None))):
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                setattr(settings, name, getattr(tokenizer, name))
        return tokenizer

    def say_of_pairs(
        self,
        model: Any,
        rows: preferences.Rows,
        collate: preferences.Collator,
        say: Callable[[Any, dict[str, torch.Tensor]], torch.Tensor],
    ) -> torch.Tensor:
        """What a model says of both sides of pairs; a stop is heard between batches."""
        return preferences.measured(
            model,
            rows,
            collate,
            say,
            batch=self.config.micro_batch_rows,
            dtype=self.computed_in,
            before_each=self.breathe,
        )

    def breathe(self) -> None:
        """Between pieces of work beside the steps: say that this process lives, and hear a stop on every rank."""
        self.run.watchdog.beat()
        watch.raise_if_stopped(self.run)

    def watch(
        self, family: str, names: Mapping[str, str], rows_of: Callable[[int], Sequence[str]], steps: int
    ) -> watch.Watch:
        """What listens to the trainer."""
        return watch.Watch(
            self.run,
            steps=steps,
            family=family,
            names=names,
            parents=self.parents,
            keep=self.config.keep_checkpoints,
            max_skipped_in_a_row=self.config.max_skipped_in_a_row,
            rows_of=rows_of,
            found=self.found,
        )

    def finish(self, trainer: Any, metrics: Mapping[str, Any], architecture: str = "LlamaForCausalLM") -> None:
        """Publish the model at the root of ``out``, and ``DONE.json`` last."""
        config = LlamaConfig.from_dict(self.given.config.to_dict())
        config.architectures = [architecture]
        if architecture != "LlamaForCausalLM":
            config.num_labels = 1
            config.pad_token_id = self.given.encoder.borders.pad_id
        metrics = {name: value for name, value in metrics.items() if not name.startswith("perf/")}
        provenance = {
            "recipe": self.run.recipe,
            "parents": {
                name: {"path": str(self.paths[name]), "sha256": sha256} for name, sha256 in self.parents.items()
            },
            "settings": self.run.settings,
            "metrics": metrics,
        }
        files = published.publish(
            published.weights(trainer),
            config,
            self.run.path,
            parent=self.config.model.path,
            encoder=self.given.encoder,
            dtype=torch.bfloat16 if self.precision is torch.bfloat16 else self.given.dtype,
            provenance=provenance,
        )
        self.run.finish(files, parents=self.parents, summary=metrics)
        PartialState().wait_for_everyone()
        if runs.is_main_process():
            watch.prune(self.run.path / "checkpoints", self.config.keep_checkpoints)
        trainer.accelerator.end_training()
