"""What a stage will take, from sizes alone: bytes by item, floating-point operations, hours, disk.

Closed forms on :class:`~llamita.shapes.LlamaShape`; no torch, no weights, no GPU. Letters: N = parameters, D = hidden
size, F = MLP width, Q = query heads times head size, K = KV heads times head size, H = query heads, S = row length.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from llamita.shapes import LlamaShape

GIB = 2**30
DISK_BYTES_PER_SECOND = 1e9
"""Assumed, for reading weights and writing checkpoints."""

TOKENS_PER_CPU_SECOND = 1.78e5
"""Encoded by one process: the lower of the two measured texts (docs/data.md), so prose is faster."""
TEXT_BYTES_PER_TOKEN = 4.0
"""Of English and source code with Llama 3's tokenizer."""

PYTHON_BYTES = 300.0 * 2**20
"""Of a process that has imported torch and transformers, files' pages apart; 282 MiB measured with torch 2.13."""
ZERO_BUCKET_VALUES = 5e8
"""DeepSpeed's default ``reduce_bucket_size``."""


class Hardware(StrEnum):
    """What the stage would run on."""

    h100 = "h100"
    h200 = "h200"
    a100 = "a100"
    cpu = "cpu"
    """This machine's processors and memory."""


class Arithmetic(StrEnum):
    """In what numbers operations are done."""

    bfloat16 = "bfloat16"
    """Or float16."""
    float32 = "float32"
    float64 = "float64"


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator, or this machine without one."""

    name: str
    memory_bytes: float
    peak_flops: float
    """Dense bfloat16 operations per second (float32 on a CPU)."""
    float32_flops: float
    """Without TF32, which nothing here turns on."""
    float64_flops: float
    """Of matrix products, with tensor cores where it has them for these."""
    assumed_mfu: float
    """The share of the peak that is assumed, not measured, where the user gives none."""
    is_gpu: bool = True

    def peak(self, arithmetic: Arithmetic) -> float:
        """Operations per second."""
        match arithmetic:
            case Arithmetic.bfloat16:
                return self.peak_flops
            case Arithmetic.float32:
                return self.float32_flops
            case Arithmetic.float64:
                return self.float64_flops


def device(hardware: Hardware) -> Device:
    """Peaks and memory by the makers' data sheets (NVIDIA: A100 SXM4 80 GB, H100 SXM5, H200 SXM).

    35 % of the peak is what torchtitan publishes for Llama 3.1 8B on H100 (33 to 39 %), in bfloat16; the same share is
    assumed of float32 and float64. A CPU core is taken as 16 multiply-adds per cycle (AVX2, two units) at 2.5 GHz, in
    float64 half of them, of which a quarter is reached.
    """
    match hardware:
        case Hardware.h100:
            return _gpu("H100 SXM 80 GB", 80e9, 989.4e12, 66.9e12, 66.9e12, assumed_mfu=0.35)
        case Hardware.h200:
            return _gpu("H200 SXM 141 GB", 141e9, 989.4e12, 66.9e12, 66.9e12, assumed_mfu=0.35)
        case Hardware.a100:
            return _gpu("A100 SXM 80 GB", 80e9, 311.9e12, 19.5e12, 19.5e12, assumed_mfu=0.4)
        case Hardware.cpu:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            return Device(
                name=f"{cores} CPU cores",
                memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
                peak_flops=80e9 * cores,
                float32_flops=80e9 * cores,
                float64_flops=40e9 * cores,
                assumed_mfu=0.25,
                is_gpu=False,
            )


def _gpu(name: str, memory: float, bfloat16: float, float32: float, float64: float, *, assumed_mfu: float) -> Device:
    return Device(
        name=name,
        memory_bytes=memory,
        peak_flops=bfloat16,
        float32_flops=float32,
        float64_flops=float64,
        assumed_mfu=assumed_mfu,
    )


class Precision(StrEnum):
    """How a model is held while it is trained."""

    float32 = "float32"
    autocast = "autocast"
    """Weights, gradients and moments in float32; matrix products in bfloat16 under ``torch.autocast``."""
    bfloat16 = "bfloat16"
    """Weights in bfloat16; summed gradients, master weights and moments in float32, as DeepSpeed keeps them."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen model beside the student."""

    name: str
    shape: LlamaShape
    bytes_per_value: int
    processes: int = 1
    """Processes that share its weights (ZeRO-3); 1 holds them whole."""
    matrix_bytes: float | None = None
    """Per value of the layers' matrices, where these are quantised; embedding, norms and head are not."""

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights, shared or not."""
        matrices = self.shape.num_hidden_layers * (self.shape.attention_parameters + self.shape.mlp_parameters)
        per_matrix = self.bytes_per_value if self.matrix_bytes is None else self.matrix_bytes
        return per_matrix * matrices + self.bytes_per_value * float(self.shape.num_parameters - matrices)


@dataclass(frozen=True, kw_only=True)
class Training:
    """Everything about a distillation that decides memory, operations and disk."""

    student: LlamaShape
    teachers: Sequence[Teacher]
    precision: Precision
    zero_stage: int
    """DeepSpeed's stage; 0 is plain data parallelism."""
    processes: int
    micro_batch_rows: int
    rows_per_step: int
    sequence_length: int
    steps: int
    packed: bool
    """Rows hold several documents, so attention gets a mask."""
    recompute: bool
    """Activation checkpointing: one input per layer is kept, the rest is computed again."""
    chunk_bytes: float
    """Budget of the loss for logits."""
    checkpoint_every: int
    kept_checkpoints: int
    validation_rows: int
    """Of each validation, over all processes; 0: there is none."""
    validation_every: int
    """0: before the first step and after the last one only."""
    adapter_parameters: int = 0
    """Of a student whose own weights rest; 0: they are all trained."""

    @property
    def trained_parameters(self) -> int:
        """Values that the optimiser moves."""
        return self.adapter_parameters or self.student.num_parameters


def num_text_tokens(text_bytes: float) -> float:
    """Tokens that a text of so many bytes gives."""
    return text_bytes / TEXT_BYTES_PER_TOKEN


def prepare_hours(tokens: float, processes: int) -> float:
    """Wall-clock hours of encoding, which is nearly all of the work."""
    return tokens / (TOKENS_PER_CPU_SECOND * processes) / 3600


def prepare_disk(text_bytes: float, tokens: float) -> dict[str, float]:
    """Bytes at the fullest moment: the text once, and every token as 4 bytes before and after packing."""
    return {"documents, while it runs": float(text_bytes), "tokens, before and after packing": 8.0 * tokens}


def adapter_state_bytes(training: Training) -> dict[str, float]:
    """As :func:`state_bytes`, of a student whose weights rest in the precision of its layers."""
    resting = 4 if training.precision is Precision.float32 else 2
    spread = training.processes if training.zero_stage == 3 else 1
    items = {"resting weights": resting * float(training.student.num_parameters) / spread}
    for stage, name, size in ((3, "adapters", 4.0), (2, "gradients", 4.0), (1, "AdamW moments", 8.0)):
        share = training.processes if training.zero_stage >= stage else 1
        items[name] = size * training.adapter_parameters / share
    return items


def state_bytes(shape: LlamaShape, precision: Precision, processes: int, zero_stage: int) -> dict[str, float]:
    """Bytes per process of what stays over the whole step; ``zero_stage=0`` is plain data parallelism.

    Adam keeps two float32 moments beside float32 weights and gradients: 16 bytes per parameter. ZeRO-1 divides master
    weights and moments by the processes, ZeRO-2 gradients too, ZeRO-3 weights too (Rajbhandari et al., 2020,
    arXiv:1910.02054, section 3.1 and figure 1). DeepSpeed keeps master weights in float32 training as well, and sums
    gradients in float32; autocast keeps bfloat16 copies of the matrices until the backward pass is over.
    """
    count = float(shape.num_parameters)
    value = 2 if precision is Precision.bfloat16 else 4
    shared = [processes if zero_stage >= stage else 1 for stage in range(4)]
    items = {
        "weights": value * count / shared[3],
        "gradients": 4 * count / shared[2],
        "AdamW moments": 8 * count / shared[1],
    }
    if precision is Precision.autocast:
        matrices = shape.num_hidden_layers * (shape.attention_parameters + shape.mlp_parameters)
        items["bfloat16 copies"] = 2.0 * matrices
    if zero_stage:
        items["master weights"] = 4 * count / shared[1]
        items["communication buckets"] = value * min(ZERO_BUCKET_VALUES, count)
    if zero_stage == 1 and precision is Precision.bfloat16:
        items["gradients of one micro-batch"] = 2 * count
    if zero_stage == 3:
        # The layer at work and the one fetched ahead; embedding and head are gathered one at a time.
        largest = max(2 * shape.layer_parameters, shape.vocab_size * shape.hidden_size)
        items["gathered weights"] = float(value * min(largest, shape.num_parameters))
    return items


def layer_activation_bytes(shape: LlamaShape, precision: Precision, sequence_length: int, *, packed: bool) -> int:
    """Bytes per token that the backward pass of one decoder layer keeps, with fused attention.

    Counted tensor by tensor on transformers' LlamaDecoderLayer: each RMSNorm keeps its input in float32 (upcast where
    it was not), the normed value, what the projections read, and one inverse per token; attention keeps q, k, v, its
    output and one float32 per head; the MLP keeps gate, its SiLU, up, and their product. Under autocast the residual
    stream is float32 and every projection keeps a bfloat16 copy of its own. A mask costs a row of S values per token,
    and keys and values are then repeated for every query head.
    """
    hidden, ffn, heads = shape.hidden_size, shape.intermediate_size, shape.num_attention_heads
    query, key = heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    match precision:
        case Precision.float32:
            value, norms = 4, 24 * hidden
        case Precision.bfloat16:
            value, norms = 2, 16 * hidden
        case Precision.autocast:
            value, norms = 2, 26 * hidden
    attention = value * (2 * query + 2 * key) + 4 * heads
    if packed:
        attention += value * (sequence_length + 2 * (query - key))
    return norms + 8 + attention + 4 * value * ffn


def activation_bytes(training: Training) -> dict[str, float]:
    """Bytes that one micro-batch keeps between forward and backward, the loss apart."""
    shape, tokens = training.student, training.micro_batch_rows * training.sequence_length
    layer = layer_activation_bytes(shape, training.precision, training.sequence_length, packed=training.packed)
    stream = 2 if training.precision is Precision.bfloat16 else 4
    # The final norm, and cosine and sine of the rotary angles.
    ends = (4 + stream) * shape.hidden_size + 4 + 2 * stream * shape.head_dim + 8
    items = {"activations": float(tokens * (shape.num_hidden_layers * layer + ends))}
    if training.recompute:
        items["activations"] = float(tokens * (shape.num_hidden_layers * stream * shape.hidden_size + ends))
        items["one layer again"] = float(tokens * layer)
    if training.packed:
        items["document mask"] = float(tokens * training.sequence_length)
    return items


def loss_bytes(training: Training) -> dict[str, float]:
    """Bytes of the chunked loss: logits within their budget, the head's gradient, hidden states of all models."""
    shape, tokens = training.student, training.micro_batch_rows * training.sequence_length
    value = 4 if training.precision is Precision.float32 else 2
    stream = 2 if training.precision is Precision.bfloat16 else 4
    items = {
        "loss: logits of a chunk": float(training.chunk_bytes),
        "loss: hidden states": 2.0 * tokens * stream * shape.hidden_size,
    }
    if not training.adapter_parameters:
        items["loss: gradient of the head"] = 4.0 * (shape.output_rows or shape.vocab_size) * shape.hidden_size
    if training.precision is not Precision.float32:
        # Autocast multiplies with a copy of the head; without it the gradient is copied on its way to the weights.
        items["loss: bfloat16 copy"] = 2.0 * (shape.output_rows or shape.vocab_size) * shape.hidden_size
    for teacher in training.teachers:
        items["loss: hidden states"] += 2.0 * tokens * value * teacher.shape.hidden_size
    return items


def teacher_bytes(teacher: Teacher, tokens: int) -> dict[str, float]:
    """Bytes of a resident teacher: its weights, and the widest moment of its forward pass."""
    shape, value = teacher.shape, teacher.bytes_per_value
    weights = teacher.weight_bytes
    if teacher.processes > 1:  # the head is whole, and two buffers hold a layer, or the embedding, each
        matrix = value * shape.vocab_size * shape.hidden_size
        weights = (weights - matrix) / teacher.processes + matrix
        weights += 2 * max(value * shape.layer_parameters, 0 if shape.tie_word_embeddings else matrix)
    # Residual, normed input, gate, its SiLU, up and their product.
    forward = tokens * value * (2 * shape.hidden_size + 4 * shape.intermediate_size)
    return {f"teacher {teacher.name}": float(weights), f"teacher {teacher.name}: forward": float(forward)}


def training_memory(training: Training) -> dict[str, float]:
    """Bytes per process by item, all at their largest; their sum bounds the peak of the items counted here."""
    items = state_bytes(training.student, training.precision, training.processes, training.zero_stage)
    if training.adapter_parameters:
        items = adapter_state_bytes(training)
    items |= activation_bytes(training) | loss_bytes(training)
    widest: dict[str, float] = {}
    for teacher in training.teachers:
        parts = teacher_bytes(teacher, training.micro_batch_rows * training.sequence_length)
        for name, size in parts.items():
            # Teachers run one after the other: only the widest forward counts.
            if not name.endswith(": forward"):
                items[name] = size
            elif size > sum(widest.values()):
                widest = {name: size}
    return items | widest


def training_flops(training: Training) -> dict[str, float]:
    """Operations of the whole stage: student 6 per weight and token with its head, each teacher 2.

    Attention is counted for a full causal row, S / 2 tokens back on average; documents that end earlier cost less.
    Recomputation repeats the layers' forward pass, not the head's: the loss computes that once in every case.
    """
    tokens = float(training.rows_per_step) * training.sequence_length * training.steps
    context = training.sequence_length / 2
    forward = tokens * training.student.forward_flops_per_token(context)
    items = {"student, forward and backward": 3 * forward}
    if training.adapter_parameters:  # weights that rest get no gradient
        items = {"student, forward and backward": 2 * forward + 6 * tokens * training.adapter_parameters}
    if training.recompute:
        again = training.student.forward_flops_per_token(context, head=False)
        items["student, recomputed layers"] = tokens * again
    for teacher in training.teachers:
        items[f"teacher {teacher.name}, forward"] = tokens * teacher.shape.forward_flops_per_token(context)
    if training.validation_rows:
        shapes = [training.student, *(teacher.shape for teacher in training.teachers)]
        held_out = float(num_validations(training)) * training.validation_rows * training.sequence_length
        items["validation, forward"] = held_out * sum(shape.forward_flops_per_token(context) for shape in shapes)
    return items


def num_validations(training: Training) -> int:
    """Before the first step, after the last, and each time between them that is due."""
    between = (training.steps - 1) // training.validation_every if training.validation_every else 0
    return 2 + between


def checkpoint_bytes(trained_parameters: float) -> float:
    """Bytes of one checkpoint: float32 weights and two moments of what is trained."""
    return 12.0 * trained_parameters


def training_disk(training: Training, *, saved_bytes_per_value: int) -> dict[str, float]:
    """Bytes at the fullest moment: the checkpoints that stay, one more while it is published, and the model."""
    return {
        f"{training.kept_checkpoints} checkpoints and one being written": checkpoint_bytes(training.trained_parameters)
        * (training.kept_checkpoints + 1),
        "model": float(saved_bytes_per_value * training.student.num_parameters),
    }


def training_written(training: Training, *, saved_bytes_per_value: int) -> float:
    """Bytes written over the whole stage, those of checkpoints that do not stay included."""
    checkpoints = -(-training.steps // training.checkpoint_every)
    return (
        checkpoints * checkpoint_bytes(training.trained_parameters)
        + saved_bytes_per_value * training.student.num_parameters
    )


def evaluation_flops(
    models: Mapping[str, LlamaShape], *, rows: int, sequence_length: int, teacher: str | None
) -> dict[str, float]:
    """Operations of measuring every model; the teacher runs once for itself and once beside each of the others."""
    tokens = float(rows) * sequence_length
    return {
        f"{name}, forward": (len(models) if name == teacher else 1)
        * tokens
        * shape.forward_flops_per_token(sequence_length / 2)
        for name, shape in models.items()
    }


def evaluation_memory(
    models: Mapping[str, LlamaShape],
    *,
    batch_rows: int,
    sequence_length: int,
    bytes_per_value: int,
    chunk_values: int,
    teacher: str | None,
) -> dict[str, float]:
    """Bytes per process while the largest model is measured, beside the teacher where there is one.

    ``chunk_values`` logits exist at a time for each model, in float32, with their log-probabilities.
    """
    others = {name: shape for name, shape in models.items() if name != teacher}
    largest = max((others or models).values(), key=lambda shape: shape.num_parameters)
    items = {"largest model": bytes_per_value * float(largest.num_parameters)}
    if others and teacher is not None and teacher in models:
        items["teacher"] = bytes_per_value * float(models[teacher].num_parameters)
    if tokens := batch_rows * sequence_length:
        widest = max(2 * shape.hidden_size + 4 * shape.intermediate_size for shape in models.values())
        items["forward of one batch"] = float(tokens * bytes_per_value * widest)
        items["document mask"] = float(tokens * sequence_length * (1 + bytes_per_value))
        items["logits of a chunk"] = (5.0 if "teacher" in items else 2.0) * 4 * chunk_values
    return items


def hours(
    flops: float, processes: int, hardware: Device, mfu: float, arithmetic: Arithmetic = Arithmetic.bfloat16
) -> float:
    """Wall-clock hours of ``flops`` on ``processes`` devices that reach the share ``mfu`` of their peak."""
    return flops / (processes * hardware.peak(arithmetic) * mfu) / 3600


def amount(size: float) -> str:
    """Bytes as a reader wants them."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"


def duration(in_hours: float) -> str:
    """Hours as a reader wants them."""
    seconds = in_hours * 3600
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{in_hours:,.1f} h" if in_hours < 96 else f"{in_hours / 24:,.1f} days"
