"""The mean of weights, and what has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_model
from llamita import checkpoints
from llamita.align import averaging
from llamita.align.averaging import MemberConfig


def saved(path: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **shape: Any) -> Path:
    checkpoints.save_model(tiny_model(seed, **shape), path, source=None, provenance={}, dtype=dtype)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_weight_is_the_weighted_mean(dtype: torch.dtype, tmp_path: Path) -> None:
    paths = [saved(tmp_path / str(seed), seed, dtype) for seed in range(3)]
    members = {str(n): MemberConfig(path=path, weight=n + 1.0) for n, path in enumerate(paths)}
    averaging.publish(members, tmp_path / "mean", {})
    models = [checkpoints.load_model(path).state_dict() for path in paths]
    for name, tensor in checkpoints.load_model(tmp_path / "mean").state_dict().items():
        exact = sum((n + 1) / 6 * model[name].double() for n, model in enumerate(models))
        assert tensor.dtype == dtype
        torch.testing.assert_close(tensor.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-15)


def test_models_of_equal_weights_are_their_own_mean(tmp_path: Path) -> None:
    path = saved(tmp_path / "a")
    averaging.publish({name: MemberConfig(path=path) for name in "ab"}, tmp_path / "mean", {})
    assert checkpoints.content_hash(tmp_path / "mean") == checkpoints.content_hash(path)


def test_what_has_no_mean_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    one, wide = saved(tmp_path / "one"), saved(tmp_path / "wide", intermediate_size=128)
    (wide / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"models.b.path=.*wide and models.a.path=.*one differ in intermediate_size"):
        averaging.check({"a": MemberConfig(path=one), "b": MemberConfig(path=wide)})
    with pytest.raises(ValueError, match="at least two models, got 1"):
        averaging.check({"a": MemberConfig(path=one)})
    with pytest.raises(ValueError, match=r"models.b.weight must be > 0 and finite, got -1"):
        averaging.check({"a": MemberConfig(path=one), "b": MemberConfig(path=one, weight=-1)})
    with pytest.raises(ValueError, match=r"models.b.path must be given"):
        averaging.check({"a": MemberConfig(path=one), "b": MemberConfig()})


def test_a_damaged_model_is_not_averaged(tmp_path: Path) -> None:
    model = tiny_model(1)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    checkpoints.save_model(model, tmp_path / "bad", source=None, provenance={})
    members = {"a": MemberConfig(path=saved(tmp_path / "good")), "b": MemberConfig(path=tmp_path / "bad")}
    with pytest.raises(ValueError, match=r"model.norm.weight of the mean is not finite"):
        averaging.publish(members, tmp_path / "mean", {})
    assert not (tmp_path / "mean" / "config.json").exists()
