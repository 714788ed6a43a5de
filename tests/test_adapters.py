"""Settings of what is trained beside weights that rest."""

from __future__ import annotations

from typing import Any

import pytest

from llamita.adapters import LoraConfig, Projection


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": -1}, "lora.rank must be >= 0, got -1"),
        ({"rank": 2, "alpha": 0.0}, "lora.alpha must be > 0"),
        ({"rank": 2, "dropout": 1.0}, "lora.dropout must be in 0..1"),
        ({"rank": 2, "targets": []}, "lora.targets must name"),
        ({"rank": 2, "targets": [Projection.q_proj, Projection.q_proj]}, "lora.targets must name"),
        ({"dropout": 0.1}, "need lora.rank"),
        ({"embeddings": True}, "need lora.rank"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_meant_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(**changes)
