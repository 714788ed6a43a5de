"""What the stages of alignment will take, and what is wrong with their settings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import _outlook_distill
from _world import Outlook, Rows, Talks, World, normal
from llamita import checks, estimate, runs
from llamita.adapters import LoraConfig
from llamita.align.dialogues import SPLITS
from llamita.data.tokens import num_cores
from llamita.distill import fused, loop
from llamita.precision import Precision
from llamita.shapes import LlamaShape

ASSUMED_ROWS = 10_000
"""Dialogues, pairs or tasks where they do not exist yet."""
ASSUMED_TOKENS = 500
"""Of one of them."""
GENERATED_TOKENS = 512
"""Of an answer, where no setting says how long it may be."""


def dialogues(config: Any, world: World, outlook: Outlook) -> None:
    outlook.on_accelerator = False
    for name, source in config.sources.items():
        outlook.mistakes += runs.names({"sources": name})
        if source.path is None:
            continue
        path = Path(source.path)
        if source.kind == "stage":
            world.talks(f"sources.{name}.path", path, outlook)
        elif path.is_file():
            outlook.read_bytes += path.stat().st_size
    outlook.disk = {"rows": outlook.read_bytes}
    outlook.makes = Talks()


def sft(config: Any, world: World, outlook: Outlook) -> None:
    """The distillation that it is, on as many rows as its dialogues fill."""
    talks = world.talks("data.path", config.data.path, outlook, "dialogues")
    if config.validation_rows and talks.rows and not talks.rows.get("validation.dialogues"):
        outlook.mistakes.append(
            f"data.path={config.data.path} has no validation dialogues: validation_rows=0 trains without, "
            f"got {config.validation_rows}"
        )
    length, tokens = config.sequence_length, _tokens(talks, "dialogues", outlook)
    rows = max(1, math.ceil(tokens / length))
    training = config.training(config.data.path, config.num_steps(rows))
    student = world.model("model.path", config.model.path, outlook)
    packed = Rows(length, 0, {"train": rows, "validation": max(1, config.validation_rows)})
    _outlook_distill.trained(training, packed, student, world, outlook, own="model.path")
    outlook.hours = estimate.prepare_hours(tokens, config.num_proc or num_cores())
    outlook.disk["packed dialogues"] = 4.0 * rows * (length + 1)
    outlook.may_change = ("num_proc", *loop.MAY_CHANGE)


def preferences(config: Any, world: World, outlook: Outlook) -> None:
    """``dpo``: a pair is two sequences, which the reference reads once too."""
    _aligned(config, world, outlook, "pairs", sequences=2)


def reward(config: Any, world: World, outlook: Outlook) -> None:
    """``reward``: as ``dpo`` without a reference; what it makes gives one number and is no language model."""
    _aligned(config, world, outlook, "pairs", sequences=2, reference=False, is_judge=True)


def reinforcement(config: Any, world: World, outlook: Outlook) -> None:
    """``rl``: tasks are answered several times; a teacher, a judge and, where it counts, a reference rest beside."""
    method = str(_given(config, "method", default="grpo"))
    answers = int(_given(config, "num_generations", "trainer.num_generations", default=8))
    new = int(_given(config, "max_answer_tokens", "trainer.max_completion_length", default=GENERATED_TOKENS))
    leash = float(_given(config, "kl_weight", "trainer.beta", default=0.05 if method == "rloo" else 0.0))
    beside = {}
    if (judge := _judge(config, world, outlook)) is not None:
        beside["reward"] = judge
    if (path := _given(config, "teacher.path", default=None)) is not None:
        teacher = world.model("teacher.path", path, outlook)
        beside |= {"teacher": teacher} if teacher is not None else {}
    model = checks.model_shape(config.model.path) or world.made.get(normal(config.model.path))
    if leash > 0 and not _given(config, "lora.rank", default=0) and isinstance(model, LlamaShape):
        beside["reference"] = model  # with adapters it is the model without them
    _aligned(config, world, outlook, "tasks", beside=beside, answers=answers, new=new, reference=False)


def sample(config: Any, world: World, outlook: Outlook) -> None:
    """``sample``: answers of a model that is not trained."""
    outlook.makes = Talks()
    outlook.processes = world.processes
    talks = world.talks("data.path", config.data.path, outlook)
    judge = _judge(config, world, outlook)
    if (shape := _language_model(config, world, outlook)) is None:
        return
    value = 2 if world.hardware.is_gpu else 4
    which = str(_given(config, "prompts", default="tasks"))
    kinds = ("tasks", "dialogues") if which == "both" else (which,)
    splits = list(_given(config, "data.splits", default=SPLITS))
    there = [sum(talks.rows.get(f"{split}.{kind}", 0) for kind in kinds) for split in splits]
    most = _given(config, "max_prompts", default=None)
    prompts = sum(rows if most is None else min(rows, most) for rows in there if rows)
    if not prompts:
        prompts = ASSUMED_ROWS if most is None else min(ASSUMED_ROWS, most * len(splits))
    answers = int(_given(config, "samples_per_prompt", default=1))
    new = int(_given(config, "sampling.max_new_tokens", "max_new_tokens", default=GENERATED_TOKENS))
    batch = int(_given(config, "sampling.batch_rows", "batch_rows", default=1))
    outlook.parameters = {"model": shape.num_parameters}
    outlook.memory = {
        "model": value * float(shape.num_parameters),
        "keys and values": _cache_bytes(shape, batch, new, value),
    }
    if judge is not None:  # it is read when the model that answered is gone
        outlook.parameters["reward model"] = judge.num_parameters
        judging = {"reward model": value * float(judge.num_parameters)}
        outlook.memory = max(outlook.memory, judging, key=lambda items: sum(items.values()))
    tokens = float(prompts) * (ASSUMED_TOKENS + answers * new)
    outlook.flops = {"model, forward": tokens * shape.forward_flops_per_token(ASSUMED_TOKENS + new / 2)}
    if judge is not None:
        judged = float(prompts) * answers * (ASSUMED_TOKENS + new)
        outlook.flops["reward model, forward"] = judged * judge.forward_flops_per_token((ASSUMED_TOKENS + new) / 2)
    outlook.read_bytes = value * float(sum(outlook.parameters.values()))
    outlook.disk = {"answers": estimate.TEXT_BYTES_PER_TOKEN * prompts * answers * new}
    outlook.notes.append(
        f"{prompts:,} prompts of {ASSUMED_TOKENS} tokens with {answers} answers of {new} tokens each are assumed; "
        "generating waits for memory, not for arithmetic, and takes several times the time told here"
    )


def assess(config: Any, world: World, outlook: Outlook) -> None:
    """``assess``: models side by side, each of which answers and is judged in its turn."""
    outlook.processes = world.processes
    if config.data.path is not None:
        world.talks("data.path", config.data.path, outlook)
    _judge(config, world, outlook)
    for name, member in config.models.items():
        outlook.mistakes += runs.names({"models": name})
        if (shape := world.model(f"models.{name}.path", member.path, outlook)) is not None:
            outlook.parameters[name] = shape.num_parameters
    if outlook.parameters:
        value = 2 if world.hardware.is_gpu else 4
        outlook.memory = {"largest model": value * float(max(outlook.parameters.values()))}
        outlook.read_bytes = value * float(sum(outlook.parameters.values()))
        outlook.notes.append("the time of the answers is not counted")


def average(config: Any, world: World, outlook: Outlook) -> None:
    outlook.on_accelerator = False
    shapes: dict[str, LlamaShape] = {}
    if len(config.models) < 2:
        outlook.mistakes.append(f"models: an average needs at least two models, got {len(config.models)}")
    for name, member in config.models.items():
        outlook.mistakes += runs.names({"models": name})
        if member.path is None:
            outlook.mistakes.append(f"models.{name}.path must be given")
        elif (shape := world.model(f"models.{name}.path", member.path, outlook)) is not None:
            shapes[name] = shape
            outlook.tokenizer = outlook.tokenizer or world.tokenizer(member.path)
    if not shapes:
        return
    if len(set(shapes.values())) > 1:
        sizes = ", ".join(f"{name} {shape.num_parameters:,}" for name, shape in shapes.items())
        outlook.mistakes.append(f"models must have one shape: weights of different ones have no mean, got {sizes}")
    outlook.makes = made = next(iter(shapes.values()))
    outlook.parameters = {"model": made.num_parameters}
    outlook.disk = {"model": 2.0 * made.num_parameters}
    outlook.read_bytes = 2.0 * sum(shape.num_parameters for shape in shapes.values())
    largest = float(max(made.vocab_size * made.hidden_size, made.intermediate_size * made.hidden_size))
    shard = min(2.0 * made.num_parameters, 4.0 * estimate.GIB)
    outlook.memory = {"Python and its libraries": estimate.PYTHON_BYTES, "one matrix": 12 * largest, "a file": shard}


def _given(config: Any, *names: str, default: Any) -> Any:
    """The first of these settings that the recipe has and that is set: the recipes name them in their own ways."""
    for name in names:
        value = config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
        if value is not None:
            return value
    return default


def _language_model(config: Any, world: World, outlook: Outlook) -> LlamaShape | None:
    shape = world.model("model.path", config.model.path, outlook)
    if shape is not None and shape.output_rows is not None:
        outlook.mistakes.append(
            f"model.path={config.model.path} has {shape.output_rows} output rows: it is no language model any more"
        )
    return shape


def _judge(config: Any, world: World, outlook: Outlook) -> LlamaShape | None:
    """A reward model, where the settings name one that another stage makes or that should be there."""
    if (path := _given(config, "reward.path", default=None)) is None:
        return None
    if normal(path) in world.made:
        return world.model("reward.path", path, outlook)
    if (path / "config.json").is_file():
        return checks.model_shape(path)
    outlook.mistakes.append(f"reward.path={path} is not a model directory: it has no config.json")
    return None


def _cache_bytes(shape: LlamaShape, rows: int, new: int, bytes_per_value: int) -> float:
    """Of the keys and values of ``rows`` answers of ``new`` tokens."""
    values = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
    return float(bytes_per_value * rows * (ASSUMED_TOKENS + new) * values)


def _tokens(talks: Talks, kind: str, outlook: Outlook) -> float:
    """Of the rows of a kind in the training split."""
    if size := talks.sizes.get(f"train.{kind}"):
        outlook.notes.append(f"{estimate.TEXT_BYTES_PER_TOKEN:.0f} bytes of data.path per token are assumed")
        return max(1.0, estimate.num_text_tokens(size))
    outlook.notes.append(f"{ASSUMED_ROWS:,} {kind} of {ASSUMED_TOKENS} tokens are assumed: they do not exist yet")
    return float(ASSUMED_ROWS * ASSUMED_TOKENS)


def _aligned(
    config: Any,
    world: World,
    outlook: Outlook,
    kind: str,
    *,
    sequences: int = 1,
    reference: bool = True,
    beside: Mapping[str, LlamaShape] | None = None,
    answers: int = 1,
    new: int = 0,
    is_judge: bool = False,
) -> None:
    """Fine-tuning of ``model.path`` on rows of ``sequences`` sequences each.

    ``reference``: it is read once by the model as it was; ``beside`` are models that read it all the time; ``answers``
    of ``new`` tokens are generated to each row, and are rows of the batch; ``is_judge``: a head for one number takes
    the place of the output matrix.
    """
    talks = world.talks("data.path", config.data.path, outlook, kind)
    outlook.processes = world.processes
    if (shape := _language_model(config, world, outlook)) is None:
        return
    made = dataclasses.replace(shape, tie_word_embeddings=False, output_rows=1) if is_judge else shape
    outlook.makes, outlook.tokenizer = made, world.tokenizer(config.model.path)
    micro = int(_given(config, "micro_batch_rows", "trainer.per_device_train_batch_size", default=1))
    accumulated = int(_given(config, "trainer.gradient_accumulation_steps", default=1))
    step = int(_given(config, "global_batch_rows", default=micro * accumulated * world.processes))
    outlook.mistakes += checks.division(step, micro, world.processes)
    length = int(_given(config, "max_length", "sequence_length", "trainer.max_length", default=world.sequence_length))
    rows = (talks.rows.get(f"train.{kind}") or ASSUMED_ROWS) * answers
    tokens = _tokens(talks, kind, outlook) * answers + float(rows * new)
    epochs = float(_given(config, "epochs", "trainer.num_train_epochs", default=1))
    steps = int(_given(config, "steps", "trainer.max_steps", default=0)) or math.ceil(epochs * rows / step)
    precision = _given(config, "precision", default=Precision.auto)
    half = precision == Precision.bfloat16 or (precision == Precision.auto and world.hardware.is_gpu)
    stage = int(_given(config, "deepspeed.stage", default=0))
    kept = estimate.Precision.bfloat16 if stage else estimate.Precision.autocast
    lora: LoraConfig = _given(config, "lora", default=LoraConfig())
    new_head = made.hidden_size if lora.rank and is_judge and not lora.embeddings else 0
    on = "cuda" if world.hardware.is_gpu else "cpu"
    # TRL's reference is float32 as the policy, where DeepSpeed does not cast both.
    wide = ("reference",) if half and not stage else ()
    resident = [
        estimate.Teacher(name=name, shape=other, bytes_per_value=2 if half and name not in wide else 4)
        for name, other in (beside or {}).items()
    ]
    training = estimate.Training(
        student=shape,
        teachers=resident,
        precision=kept if half else estimate.Precision.float32,
        zero_stage=stage,
        processes=world.processes,
        micro_batch_rows=micro * sequences,
        rows_per_step=step * sequences,
        sequence_length=length,
        steps=steps,
        packed=False,
        recompute=bool(_given(config, "activation_checkpointing", default=False)),
        chunk_bytes=float(fused.default_mebibytes(on) * 2**20),
        checkpoint_every=int(_given(config, "checkpoint_every", "trainer.save_steps", default=steps)),
        kept_checkpoints=max(2, int(_given(config, "keep_checkpoints", default=2))),
        validation_rows=0,
        validation_every=0,
        adapter_parameters=lora.num_parameters(made) + new_head,
    )
    outlook.parameters = {"model": shape.num_parameters}
    outlook.memory = {name.removeprefix("teacher "): size for name, size in estimate.training_memory(training).items()}
    if not world.hardware.is_gpu:
        outlook.memory = {"Python and its libraries": estimate.PYTHON_BYTES} | outlook.memory
    # Rows are as long as they are, and only padded to the longest beside them.
    share = min(1.0, tokens / (rows * sequences * length))
    whole = estimate.training_flops(training)
    outlook.flops = {name.removeprefix("teacher "): share * flops for name, flops in whole.items()}
    context = min(length, tokens / rows) / 2
    if reference:
        outlook.flops["reference, forward"] = tokens * shape.forward_flops_per_token(context)
    if new:  # TRL draws a step's answers at once, from weights as they are kept
        value = 2 if half and stage else 4
        outlook.memory["keys and values of answers"] = _cache_bytes(shape, step // world.processes, new, value)
        outlook.flops["answers, forward"] = steps * step * tokens / rows * shape.forward_flops_per_token(context)
        outlook.notes.append("generating waits for memory, not for arithmetic, and takes several times as long")
    saved = 2 if half else 4
    outlook.disk = estimate.training_disk(training, saved_bytes_per_value=saved)
    outlook.written_bytes = estimate.training_written(training, saved_bytes_per_value=saved)
    outlook.read_bytes = 2.0 * shape.num_parameters
    outlook.notes.append(f"{steps:,} steps of {step} {'answers' if new else kind}")
