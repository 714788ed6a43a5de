"""Preference pairs: their ids, what a model says of them, and direct preference optimisation on them.

Shape letters: N = pairs, B = pairs of a micro-batch, S = positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor

from llamita import chat
from llamita.align.dialogues import Pair, Refused


@dataclass(frozen=True)
class Rows:
    """Pairs as ids."""

    ids: list[str]
    """What the data calls them."""
    prompt: list[list[int]]
    """With the header of the answer."""
    chosen: list[list[int]]
    """With the end of its turn."""
    rejected: list[list[int]]
    too_long: int = 0
    """Pairs that were left out because a side has more tokens than are allowed."""
    refused: int = 0
    """Pairs that the chat template cannot write."""

    def __len__(self) -> int:
        return len(self.ids)


def encode(pairs: Sequence[Pair], encoder: chat.Encoder, *, max_length: int, name: str) -> Rows:
    """All pairs of which both sides fit.

    Raises:
        ValueError: none is left, or the template refuses more than a few.
    """
    refused = Refused()
    rows = Rows([], [], [], [])
    too_long = 0
    for pair in pairs:
        try:
            prompt, chosen = encoder.answer(pair.prompt, pair.chosen)
            _, rejected = encoder.answer(pair.prompt, pair.rejected)
        except ValueError as error:
            refused.add(f"{name} {pair.id}", str(error))
            continue
        if len(prompt) + max(len(chosen), len(rejected)) > max_length:
            too_long += 1
            continue
        rows.ids.append(pair.id)
        rows.prompt.append(prompt)
        rows.chosen.append(chosen)
        rows.rejected.append(rejected)
    refused.check(name, len(rows) + too_long)
    if not len(rows):
        raise ValueError(f"max_length={max_length} is too small for all {too_long} pairs of {name}")
    return Rows(rows.ids, rows.prompt, rows.chosen, rows.rejected, too_long, refused.total)


def dataset(rows: Rows, reference_N2: Tensor | None = None) -> Dataset:
    """The rows as TRL's trainers read them, with the reference's log-probabilities where they are given."""
    columns: dict[str, Any] = {"prompt_ids": rows.prompt, "chosen_ids": rows.chosen, "rejected_ids": rows.rejected}
    if reference_N2 is not None:
        columns["ref_chosen_logps"], columns["ref_rejected_logps"] = reference_N2.T.tolist()
    return Dataset.from_dict(columns)


def dialogues(rows: Rows) -> Dataset:
    """The rows as TRL's trainer of reward models reads them: each side with its prompt."""
    sides = {"chosen_ids": rows.chosen, "rejected_ids": rows.rejected}
    whole = {name: [[*p, *a] for p, a in zip(rows.prompt, part, strict=True)] for name, part in sides.items()}
    return Dataset.from_dict(whole)


@dataclass(frozen=True)
class Collator:
    """Pairs of a micro-batch as tensors [2 B, S]: the chosen above, the rejected below, padded on the right.

    ``completion_mask`` is 1 where the loss counts: on what the answers say. The header of an answer stands in the
    prompt, and the token that ends its turn is left out as well: both sides have these tokens, which a contrastive
    loss would pull both ways (Llama Team, 2024, arXiv:2407.21783, section 4.1.4).
    """

    pad_id: int
    stop_ids: tuple[int, ...]

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        sides = [(e["prompt_ids"], e[side]) for side in ("chosen_ids", "rejected_ids") for e in examples]
        length = max(len(prompt) + len(answer) for prompt, answer in sides)
        ids = torch.full((len(sides), length), self.pad_id)
        attention, counts = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, (prompt, answer) in enumerate(sides):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor([*prompt, *answer])
            attention[row, :end] = 1
            counts[row, len(prompt) : end] = 1
        counts &= ~torch.isin(ids, torch.tensor(self.stop_ids))
        batch = {"input_ids": ids, "attention_mask": attention, "completion_mask": counts}
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples])
        return batch


def shares(rows: Rows, batch: int) -> Iterator[list[int]]:
    """The pairs of this rank, in batches of nearly equal lengths; every rank has as many batches.

    Ranks that have none left are given the longest pair again: a model that is spread over them needs all at once.
    """
    state = PartialState()
    lengths = [len(p) + max(len(c), len(r)) for p, c, r in zip(rows.prompt, rows.chosen, rows.rejected, strict=True)]
    by_length = sorted(range(len(rows)), key=lambda row: -lengths[row])
    world = state.num_processes
    for first in range(0, len(by_length), batch * world):
        mine = by_length[first : first + batch * world][state.process_index :: world]
        yield mine or by_length[:1]


@torch.no_grad()
def measured(
    model: Any,
    rows: Rows,
    collate: Collator,
    say: Callable[[Any, dict[str, Tensor]], Tensor],
    *,
    batch: int,
    dtype: torch.dtype,
    before_each: Callable[[], None] = lambda: None,
) -> Tensor:
    """What ``say(model, inputs)`` gives for both sides of all pairs, [N, 2], float64, on every rank.

    ``say`` returns one number for each row of a micro-batch of :class:`Collator`; ``before_each`` is called before
    each batch, on every rank.
    """
    device = PartialState().device
    found: list[tuple[int, float, float]] = []
    was_training = model.training
    model.eval()
    columns = dataset(rows)
    for mine in shares(rows, batch):
        before_each()
        inputs = {key: value.to(device) for key, value in collate([columns[row] for row in mine]).items()}
        with torch.autocast(device.type, torch.bfloat16) if dtype is torch.bfloat16 else contextlib.nullcontext():
            chosen, rejected = say(model, inputs).double().chunk(2)
        found += zip(mine, chosen.tolist(), rejected.tolist(), strict=True)
    model.train(was_training)
    table = torch.empty(len(rows), 2, dtype=torch.float64)
    for row, *both in gather_object(found):
        table[row] = torch.tensor(both, dtype=torch.float64)
    return table


def log_probabilities(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Sum of log p(token | before) over the counted tokens of each row, [2 B], float64.

    ``model`` has TRL's fused head, so that this is the training's own arithmetic.
    """
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    outputs = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        use_cache=False,
        labels=labels,
        fused_lm_head=True,
    )
    sums: Tensor = outputs.log_probs.double().sum(1)
    return sums


def rewards(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The reward of each row of a ``LlamaForSequenceClassification``, [2 B]: at the row's last token."""
    found: Tensor = model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
    ).logits.squeeze(1)
    return found


def with_fused_head(model: Any) -> Any:
    """Let a model give the log-probabilities of given tokens without its logits, as TRL's trainers do."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model)
    return model


def preferred(policy_N2: Tensor, reference_N2: Tensor, beta: float) -> dict[str, float]:
    """How often, and by how much, the chosen answer of a held-out pair is ahead; a tie counts half.

    By the implicit reward beta (log p(y) - log p_ref(y)) of Rafailov et al. (2023, arXiv:2305.18290, equation 5), and
    by log p(y) alone, which can be compared with that of a model which no reference was used for.
    """
    return {**ahead("dpo", beta * (policy_N2 - reference_N2)), **ahead("logp", policy_N2)}


def ahead(name: str, sides_N2: Tensor) -> dict[str, float]:
    """Share of pairs whose chosen side is ahead, a tie counting half, and by how much on average."""
    margin = sides_N2[:, 0] - sides_N2[:, 1]
    wins = (margin > 0).double() + 0.5 * (margin == 0).double()
    return {
        f"val/held_out/{name}_accuracy": wins.mean().item(),
        f"val/held_out/{name}_margin": margin.mean().item(),
    }
