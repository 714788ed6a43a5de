"""What pruning will take, from sizes alone: bytes of a GPU and of its host, and operations by their arithmetic.

Closed forms, as in :mod:`llamita.estimate`: no torch, no weights. Letters: D, F, Q, K = hidden size, MLP width and
widths of queries and of keys of the source, d, f, q, k those of the target, V = vocabulary, S = row length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llamita.estimate import PYTHON_BYTES, Arithmetic, Precision, layer_activation_bytes
from llamita.shapes import LlamaShape

HELD_OUT = 8
"""One batch in so many decides whether steps are kept: it is run forward before and after them."""
ATTENTION_TENSORS = 6
"""Of the size of all heads' attention where it is one chunk: ``attention.CHUNK_TENSORS``, without torch."""
LOGIT_TENSORS = 5
"""Of a chunk's size in the divergence behind the last layer: both logarithms, their gap, two gradients."""


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """Everything about a run that decides its memory and its operations."""

    source: LlamaShape
    target: LlamaShape
    tokens: int
    """Of the calibration text; 0: there is none."""
    row_tokens: int
    batch_tokens: int
    stored_bytes: int
    compute_bytes: int
    shard_bytes: int
    measured: bool = True
    """Whether scores are measured, and not those of an earlier run."""
    second_order: bool = False
    greedy_rounds: int = 0
    longest_block: int = 0
    depth_tokens: int = 0
    depth_bytes: float = 0.0
    gradient_tokens: int = 0
    """Of the Taylor scores; 0: they are not asked for."""
    spills: bool = False
    mended: bool = False
    attention_steps: int = 0
    layer_steps: int = 0
    head_steps: int = 0
    tied_steps: int = 0
    attention_chunk_bytes: int = 0
    logit_chunk_bytes: int = 0

    @property
    def arithmetic(self) -> Arithmetic:
        """Of the whole model's pass."""
        return {4: Arithmetic.float32, 8: Arithmetic.float64}.get(self.compute_bytes, Arithmetic.bfloat16)

    @property
    def wide(self) -> Arithmetic:
        """Of statistics, and of all that is mended."""
        return Arithmetic.float64 if self.compute_bytes == 8 else Arithmetic.float32

    @property
    def wide_bytes(self) -> int:
        """Of a value of these."""
        return max(4, self.compute_bytes)

    @property
    def narrows(self) -> bool:
        """Whether heads narrow, so that values and attention are fitted."""
        return self.target.head_dim < self.source.head_dim


@dataclass(frozen=True)
class Pass:
    """Bytes by item of one of the passes, which follow each other."""

    host: dict[str, float]
    device: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Memory:
    """Bytes by item where a GPU runs the layers, each side at its own peak, and where the host does it all."""

    device: dict[str, float]
    host: dict[str, float]
    together: dict[str, float]


def _total(items: dict[str, float]) -> float:
    return sum(items.values())


def memory(run: Pruning) -> Memory:
    """Bytes of pruning that holds one decoder layer; pages of the mapped weight files apart.

    Scoring, the Taylor scores, removing layers, mending, losses and surgery follow each other: the largest is the peak.
    """
    passes = [_surgery(run)]
    if run.tokens:
        passes += _scoring(run) if run.measured else []
        passes += _mending(run) if run.mended else []
        passes.append(_losses(run))
    python = {"Python and its libraries": PYTHON_BYTES}
    return Memory(
        device=max((part.device for part in passes), key=_total),
        host=python | max((part.host for part in passes), key=_total),
        together=python | max((part.host | part.device for part in passes), key=_total),
    )


def _surgery(run: Pruning) -> Pass:
    layers = run.source.layer_parameters + run.target.layer_parameters
    return Pass(
        {
            "surgery: one layer, before and after": float(run.stored_bytes * layers),
            "surgery: embedding": float(run.stored_bytes * run.target.vocab_size * run.target.hidden_size),
            "surgery: shard being written": float(min(run.shard_bytes, run.stored_bytes * run.target.num_parameters)),
        }
    )


def _forward(run: Pruning) -> float:
    """Bytes of one batch in a layer: residual, normed input, gate, its SiLU, up and product, one of them widened."""
    return float(
        run.batch_tokens
        * (
            run.compute_bytes * (2 * run.source.hidden_size + 4 * run.source.intermediate_size)
            + 8 * run.source.intermediate_size
        )
    )


def _states(run: Pruning) -> float:
    """Bytes of the whole model's hidden states of all tokens."""
    return float(run.compute_bytes * run.tokens * run.source.hidden_size)


def _losses(run: Pruning) -> Pass:
    host = {"losses: hidden states, before and behind the final norm": 2 * _states(run)}
    layer = float(run.compute_bytes * run.source.layer_parameters)
    return Pass(host, {"losses: one layer": layer, "losses: one batch": _forward(run)})


def _scoring(run: Pruning) -> list[Pass]:
    source, layer = run.source, float(run.compute_bytes * run.source.layer_parameters)
    device = {
        "calibration: one layer": layer,
        "calibration: one batch": _forward(run),
        "calibration: sums over the stream": 4.0 * 8 * source.hidden_size**2,
    }
    if run.second_order:  # covariance, its inverse, the outputs' Gram matrix, and what is compacted of them
        device["calibration: second order"] = 4.0 * 8 * source.intermediate_size**2
    passes = [Pass({"calibration: hidden states, before and behind the final norm": 2 * _states(run)}, device)]
    if run.gradient_tokens:
        passes.append(_gradients(run))
    if run.greedy_rounds or run.longest_block:
        states = float(run.compute_bytes * run.depth_tokens * source.hidden_size)
        models = source.num_hidden_layers * max(1, run.longest_block) + 1
        side_by_side = max(3, min(models, run.depth_bytes // states)) * states
        depth = {"removed layers: states of models side by side": side_by_side + states}
        passes.append(Pass(depth, {"removed layers: one layer": layer, "removed layers: one batch": _forward(run)}))
    return passes


def _gradients(run: Pruning) -> Pass:
    """The inputs of all layers; a layer's weights, their gradients, and sums of these; before, the output matrix."""
    source, one = run.source, float(run.compute_bytes * run.gradient_tokens * run.source.hidden_size)
    kept = 0 if run.spills else source.num_hidden_layers
    precision = Precision.bfloat16 if run.compute_bytes == 2 else Precision.float32
    graph = layer_activation_bytes(source, precision, run.row_tokens, packed=True) * run.wide_bytes / 4
    weights = (2 * run.compute_bytes + 2 * run.wide_bytes) * source.layer_parameters
    layer = {"gradients: one layer": float(weights), "gradients: one batch": float(run.batch_tokens * graph)}
    matrix = {"gradients: output matrix": float(run.compute_bytes * source.vocab_size * source.hidden_size)}
    return Pass({"gradients: inputs of all layers": (kept + 2) * one}, max(layer, matrix, key=_total))


def _mending(run: Pruning) -> list[Pass]:
    """A layer in closed forms, in steps on its attention, in steps on all of it, and what comes behind the last."""
    source, target, wide = run.source, run.target, run.wide_bytes
    host = {
        "mending: states of the whole stream": _states(run),
        "mending: states of the cut stream, before and in a layer": 2.0 * wide * run.tokens * target.hidden_size,
        "mending: embedding": float(run.stored_bytes * target.vocab_size * target.hidden_size),
    }
    whole, cut = float(run.compute_bytes * source.layer_parameters), float(wide * target.layer_parameters)
    # Gradients, two moments and the start of what is learnt; without steps the layer as it was cut.
    learnt = {"mending: one layer, whole and cut": whole + 5 * cut}
    graph = layer_activation_bytes(target, Precision.float32, run.row_tokens, packed=True) * wide / 4
    batch = {"mending: one batch": max(run.batch_tokens * graph, _forward(run))}
    squares = {"mending: least squares": 3.0 * 8 * max(target.intermediate_size, source.hidden_size) ** 2}
    passes = [Pass(host, {"mending: one layer, whole and cut": whole + 2 * cut} | batch | squares)]
    if run.narrows and run.attention_steps:
        chunk = {"mending: attention of one chunk": float(_attention_chunk(run))}
        passes.append(Pass(host, learnt | {"mending: one batch": _forward(run)} | chunk))
    if run.layer_steps:
        passes.append(Pass(host, learnt | batch))
    rows = target.output_rows or target.vocab_size
    ending = learnt | batch
    ending["mending: output matrices"] = float(
        rows * (run.compute_bytes * source.hidden_size + 5 * wide * target.hidden_size)
    )
    ending["mending: logits of a chunk"] = float(
        min(LOGIT_TENSORS * run.logit_chunk_bytes, LOGIT_TENSORS * 4 * rows * run.batch_tokens)
    )
    if target.tie_word_embeddings and run.tied_steps:
        all_layers = target.num_hidden_layers * target.layer_parameters
        ending["mending: all layers, for the tied matrix"] = float(run.stored_bytes * all_layers)
        states = target.num_hidden_layers * run.batch_tokens * target.hidden_size
        ending["mending: inputs of all layers"] = float(wide * states)
    return [*passes, Pass(host, ending)]


def _attention_chunk(run: Pruning) -> int:
    heads = run.target.num_attention_heads
    return min(
        run.attention_chunk_bytes, ATTENTION_TENSORS * run.wide_bytes * heads * run.batch_tokens * run.row_tokens
    )


@dataclass(frozen=True)
class Work:
    """Operations, and in what numbers they are done."""

    flops: float
    arithmetic: Arithmetic


def operations(run: Pruning) -> dict[str, Work]:
    """Operations of scoring on text, of mending on it, and of the losses of the results on it."""
    if not run.tokens:
        return {}
    whole, cut = (shape.forward_flops_per_token(run.row_tokens / 2) for shape in (run.source, run.target))
    found = _scoring_work(run) if run.measured else {}
    found |= _mending_work(run) if run.mended else {}
    losses = run.tokens * (whole + (1 + run.mended) * cut)
    return found | {"losses, forward": Work(losses, run.arithmetic)}


def _scoring_work(run: Pruning) -> dict[str, Work]:
    """Elimination inverts and empties one matrix of all units of a layer; without a layer, or a block, the rest of the
    model runs behind the gap, with the head; the gradient takes two passes forward and one backward."""
    source, layers = run.source, run.source.num_hidden_layers
    whole = source.forward_flops_per_token(run.row_tokens / 2)
    units, heads = source.intermediate_size, source.num_attention_heads * source.head_dim
    squares = 2 * source.hidden_size**2 + run.second_order * (units**2 + heads**2)
    found = {
        "calibration, forward": Work(run.tokens * whole, run.arithmetic),
        "calibration, covariances": Work(2.0 * run.tokens * layers * squares, run.wide),
    }
    if run.second_order:
        found["calibration, elimination"] = Work(3.0 * layers * (units**3 + heads**3), Arithmetic.float64)
    if run.gradient_tokens:
        found["calibration, gradients"] = Work(4 * run.gradient_tokens * whole, run.arithmetic)
    rounds = [(left * (left + 1) / 2, left + 1) for left in range(layers, layers - run.greedy_rounds, -1)]
    if rounds:
        found["calibration, greedy removal"] = Work(_removals(run, rounds), run.arithmetic)
    blocks = [((layers - n) * (layers - n + 1) / 2, layers - n + 1) for n in range(1, run.longest_block + 1)]
    if blocks:
        found["calibration, contiguous removal"] = Work(_removals(run, [*blocks, (layers, 1)]), run.arithmetic)
    return found


def _removals(run: Pruning, passes: Sequence[tuple[float, int]]) -> float:
    """Operations of so many passes of a layer, and of the head, over ``depth_tokens``."""
    context = run.row_tokens / 2
    behind = run.source.forward_flops_per_token(context, head=False)
    head = run.source.forward_flops_per_token(context) - behind
    each = behind / run.source.num_hidden_layers
    return run.depth_tokens * sum(layers * each + heads * head for layers, heads in passes)


def _held_tokens(run: Pruning) -> int:
    batches = max(1, run.tokens // run.batch_tokens)
    return max(1, batches // HELD_OUT) * run.batch_tokens


def _mending_work(run: Pruning) -> dict[str, Work]:
    """Each layer is run four times in closed forms; a step runs a batch forward and backward, and one of a tied matrix
    runs all layers forward once more; what is held out runs forward before and after the steps."""
    source, target, context = run.source, run.target, run.row_tokens / 2
    whole, cut = (shape.forward_flops_per_token(context, head=False) for shape in (source, target))
    head, head_whole = (2.0 * (target.output_rows or target.vocab_size) * s.hidden_size for s in (target, source))
    held, step = 2 * _held_tokens(run), run.batch_tokens
    one, turn = cut / target.num_hidden_layers, 2.0 * source.hidden_size * target.hidden_size
    kinds = bool(run.layer_steps), bool(run.head_steps), bool(run.tied_steps and target.tie_word_embeddings)
    layer_tokens, head_tokens, tied_tokens = (
        run.layer_steps * step,
        run.head_steps * step,
        kinds[2] * run.tied_steps * step,
    )
    steps = (3 * layer_tokens + kinds[0] * held) * cut + (
        layer_tokens + kinds[0] * held
    ) * target.num_hidden_layers * turn
    steps += (3 * head_tokens + kinds[1] * held) * (one + head)
    steps += tied_tokens * (4 * cut + 3 * head) + kinds[2] * held * (cut + head)
    wanted = (head_tokens + tied_tokens + (kinds[1] + kinds[2]) * held) * head_whole
    found = {
        "mending, whole model": Work(run.tokens * whole + wanted, run.arithmetic),
        "mending, cut model": Work(4 * run.tokens * cut, run.wide),
    }
    found |= _least_squares_work(run)
    if run.narrows and run.attention_steps:
        found |= _attention_work(run)
    return found | {"mending, steps": Work(steps, run.wide)}


def _least_squares_work(run: Pruning) -> dict[str, Work]:
    """Products of what goes in with itself and with what is to come out, and a factor of each matrix.

    Two writers and two readers a layer, and the head; the whole stream is seen along the axes that stay five times.
    """
    source, target = run.source, run.target
    hidden, wide, layers = target.hidden_size, source.hidden_size, target.num_hidden_layers
    writers = (target.num_attention_heads * target.head_dim, target.intermediate_size)
    fits = [(size, hidden) for size in writers] + [(hidden, wide)] * 2
    products = sum(inputs**2 + inputs * outputs for inputs, outputs in fits) + 7 * hidden * wide
    products += run.narrows * wide**2
    factors = sum(inputs**3 / 3 + 2 * inputs**2 * outputs for inputs, outputs in fits)
    return {
        "mending, least squares": Work(2.0 * run.tokens * layers * products, run.wide),
        "mending, factors of matrices": Work(layers * factors, Arithmetic.float64),
    }


def _attention_work(run: Pruning) -> dict[str, Work]:
    """Projections and logits of both models; a row of S positions is counted as S logits each, seen or not."""
    target, tokens = run.target, run.batch_tokens * run.attention_steps
    heads, both = target.num_attention_heads, target.num_attention_heads + target.num_key_value_heads

    def forward(hidden: int, size: int) -> float:
        return 2.0 * target.num_hidden_layers * size * (both * hidden + heads * run.row_tokens)

    held = 2 * _held_tokens(run)
    whole = (tokens + held) * forward(run.source.hidden_size, run.source.head_dim)
    cut = (3 * tokens + held) * forward(target.hidden_size, target.head_dim)
    return {
        "mending, attention steps, whole": Work(whole, run.arithmetic),
        "mending, attention steps": Work(cut, run.wide),
    }
