"""A reward model as a directory, a stock ``LlamaForSequenceClassification`` with one label, and its scores.

Shape letters: B = rows of a batch, S = positions, D = hidden size, N = all rows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from llamita import chat, checkpoints
from llamita.align.dialogues import Message

log = logging.getLogger(__name__)

ARCHITECTURE = "LlamaForSequenceClassification"


def load_config(path: Path) -> LlamaConfig:
    """The configuration of a reward model's directory; no weight is read.

    Raises:
        ValueError: it is none, it is unfinished, or it asks for code of its own.
    """
    config = checkpoints.load_config(path)
    if config.architectures != [ARCHITECTURE] or config.num_labels != 1:
        raise ValueError(
            f"reward.path={path} must be a {ARCHITECTURE} with one label, as the recipe reward writes; it is "
            f"{config.architectures} with {config.num_labels}"
        )
    if not list(path.glob("*.safetensors")):
        raise ValueError(f"reward.path={path} has no safetensors file: other formats are not read")
    if not (path / "tokenizer.json").is_file():
        raise ValueError(f"reward.path={path} has no tokenizer.json")
    return config


def least_where_unread(values: Sequence[float], names: Sequence[str]) -> list[float]:
    """The rewards, with the least of them where there is none.

    An answer that the reward model cannot read (it spells a special token, or is too long) is worth no more than the
    worst that it can; one such answer must not end a run, which would draw it again after every start.

    Raises:
        ValueError: there is no reward at all, or one is not finite; the row is named.
    """
    there = [value for value in values if not math.isnan(value)]
    for name, value in zip(names, values, strict=True):
        if not there or math.isinf(value):
            raise ValueError(
                f"the reward of {name} is {value}: the reward model's weights are not finite, or it reads "
                "none of the answers"
            )
    return [min(there) if math.isnan(value) else value for value in values]


class RewardModel:
    """Scores answers: one number each, at the last token of the dialogue."""

    def __init__(self, model: LlamaForSequenceClassification, encoder: chat.Encoder, *, batch_rows: int = 16) -> None:
        self._model = model
        self._encoder = encoder
        self._batch_rows = batch_rows

    @classmethod
    def open(
        cls, path: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", batch_rows: int = 16
    ) -> Self:
        """The reward model in ``path``.

        Raises:
            ValueError: as :func:`load_config`, or a weight is missing, too many or of another shape.
        """
        config = load_config(path)
        try:
            loaded: Any = LlamaForSequenceClassification.from_pretrained(
                path,
                config=config,
                dtype=dtype or "auto",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (OSError, RuntimeError) as error:
            raise ValueError(f"reward.path={path} cannot be read: {' '.join(str(error).split())[:300]}") from error
        model, told = loaded
        wrong = [*told["missing_keys"], *told["unexpected_keys"], *map(str, told["mismatched_keys"])]
        if wrong:
            # A head that is missing would be filled with random numbers.
            raise ValueError(f"reward.path={path} is not the model that its config.json says: {', '.join(wrong[:3])}")
        model.train(False)
        return cls(model.to(device), chat.Encoder(checkpoints.load_tokenizer(path)), batch_rows=batch_rows)

    def score(
        self, dialogues: Sequence[tuple[Sequence[Message], str]], names: Sequence[str], *, may_be_nan: bool = False
    ) -> list[float]:
        """The reward of each answer to its prompt.

        With ``may_be_nan`` an answer that cannot be judged has the reward NaN.

        Raises:
            ValueError: the row is named: a reward is not a finite number, the dialogue is longer than the model's
                positions, or the chat template refuses it.
        """
        rows: dict[int, list[int]] = {}
        for place, (name, (prompt, answer)) in enumerate(zip(names, dialogues, strict=True)):
            try:
                rows[place] = self._ids(prompt, answer)
            except ValueError as error:
                if not may_be_nan:
                    raise ValueError(f"{name}: {error}") from None
                log.warning("%s has no reward: %s", name, error)
        found = [math.nan] * len(names)
        order = sorted(rows, key=lambda place: len(rows[place]))
        for first in range(0, len(order), self._batch_rows):
            places = order[first : first + self._batch_rows]
            # In the model's own precision, also where somebody else's answers were just drawn in another.
            with torch.autocast(self._model.device.type, enabled=False):
                values = self._batch([rows[place] for place in places])
            for place, value in zip(places, values, strict=True):
                found[place] = value
        for name, value in zip(names, found, strict=True):
            if not math.isfinite(value) and not may_be_nan:
                raise ValueError(f"the reward of {name} is {value}: the reward model's weights are not finite")
        return found

    def _ids(self, prompt: Sequence[Message], answer: str) -> list[int]:
        ids = self._encoder.dialogue([*prompt, {"role": "assistant", "content": answer}]).ids
        most = self._model.config.max_position_embeddings
        if len(ids) > most:
            raise ValueError(f"it has {len(ids)} tokens, the reward model has {most} positions")
        return ids

    @torch.inference_mode()
    def _batch(self, rows: Sequence[list[int]]) -> list[float]:
        length = max(map(len, rows))
        # Padding on the right, where nothing sees it; its id does not matter, because places are counted, not sought.
        ids_BS = torch.tensor([ids + [0] * (length - len(ids)) for ids in rows])
        mask_BS = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in rows])
        model: Any = self._model
        hidden_BSD = model.model(
            input_ids=ids_BS.to(model.device), attention_mask=mask_BS.to(model.device), use_cache=False
        ).last_hidden_state
        last_B = torch.tensor([len(ids) - 1 for ids in rows], device=model.device)
        hidden_BD = hidden_BSD[torch.arange(len(rows), device=model.device), last_B]
        exact = torch.promote_types(hidden_BD.dtype, torch.float32)
        values: list[float] = (hidden_BD.to(exact) @ model.score.weight.to(exact).T).squeeze(1).tolist()
        return values
