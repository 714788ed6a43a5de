"""The recipe `average`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from conftest import tiny_model
from llamita import checkpoints, runs
from llamita.align.averaging import MemberConfig


def test_the_mean_is_published_with_its_parents(recipe: Callable[[str], ModuleType], tmp_path: Path) -> None:
    module = recipe("average")
    for seed in (0, 1):
        checkpoints.save_model(tiny_model(seed), tmp_path / str(seed), source=None, provenance={})
    members = {f"m{seed}": MemberConfig(path=tmp_path / str(seed)) for seed in (0, 1)}
    config = module.Average(models=members, out=tmp_path / "out")
    module.run(config)
    done = runs.read_done(tmp_path / "out")
    assert done["parents"] == {f"m{seed}": checkpoints.content_hash(tmp_path / str(seed)) for seed in (0, 1)}
    checkpoints.load_model(tmp_path / "out")
    (tmp_path / "0" / "config.json").unlink()
    module.run(config)  # what is done is not done again, whatever became of the parents
