"""Every configuration composes against its schema, and mistakes in one are found."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
PIPELINES = sorted(path.stem for path in (CONFIGS / "pipeline").glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))


def composed(name: str, *overrides: str) -> Any:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(name, overrides=list(overrides))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_configuration_that_composes(name: str, recipe: Callable[[str], ModuleType]) -> None:
    recipe(name)
    assert "out" in composed(name).keys()  # noqa: SIM118  (a value that is still missing is no member)


@pytest.mark.parametrize("name", RECIPES)
def test_no_setting_depends_on_where_the_code_is(name: str, recipe: Callable[[str], ModuleType]) -> None:
    """A job runs from a copy; one that is submitted again from another copy would have other settings."""
    recipe(name)
    settings = OmegaConf.to_yaml(composed(name), resolve=False)
    assert str(CONFIGS.parent) not in settings


@pytest.mark.parametrize("name", RECIPES)
def test_an_unknown_key_is_refused(name: str, recipe: Callable[[str], ModuleType]) -> None:
    recipe(name)
    with pytest.raises((HydraException, OmegaConfBaseException), match="no_such_setting"):
        composed(name, "no_such_setting=1")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes(experiment: str, recipe: Callable[[str], ModuleType]) -> None:
    """Its second line names its recipe, ``# recipe: distill``, and the command in its header is one of that recipe."""
    text = (CONFIGS / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8")
    name = text.splitlines()[1].removeprefix("# recipe: ")
    assert name in RECIPES, f"the second line of experiment/{experiment}.yaml must be '# recipe: NAME'"
    header = "\n".join(line.removeprefix("#") for line in text.splitlines() if line.startswith("#"))
    told = re.findall(rf"recipes/{name}\.py (.*)", header.replace("\\\n", " "))
    assert len(told) == 1, f"experiment/{experiment}.yaml must show one command of recipes/{name}.py"
    assert f"experiment={experiment}" in told[0].split()
    module = recipe(name)
    sys.modules["_main"].settings(composed(name, *told[0].split()), getattr(module, name.capitalize()))


def test_an_experiment_that_begins_with_another_has_its_settings(recipe: Callable[[str], ModuleType]) -> None:
    module, paths = recipe("sft"), ["model.path=m", "data.path=d", "out=out", "teachers.llama_8b_instruct.path=t"]
    assert module
    small, taught = (composed("sft", f"experiment={name}", *paths) for name in ("sft_1b", "sft_1b_from_8b_instruct"))
    assert (small.deepspeed.stage, taught.deepspeed.stage) == (1, 1)
    assert (small.sequence_length, taught.sequence_length) == (8192, 8192)
    assert (small.loss.ce_weight, taught.loss.ce_weight) == (1.0, 0.5)
    assert (small.micro_batch_rows, taught.micro_batch_rows) == (2, 1)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_stage_of_every_pipeline_composes_in_its_recipe(
    pipeline: str, recipe: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    """A typo in an override is found here, not after the stages before it have run for a week."""
    module, main = recipe("pipeline"), sys.modules["_main"]
    cfg = composed("pipeline", f"pipeline={pipeline}", f"out={tmp_path}")
    for name in cfg.inputs:
        cfg.inputs[name] = str(tmp_path / name)
    for name, stage in main.settings(cfg, module.Pipeline).stages.items():
        stage_module = recipe(stage.recipe)
        schema = getattr(stage_module, stage.recipe.capitalize())
        main.settings(composed(stage.recipe, *stage.overrides, f"out={tmp_path / name}"), schema)


def commands() -> list[list[str]]:
    """Every recipe with its overrides that a page shows: ``[name, override, …]``."""
    found = []
    for page in [CONFIGS.parent / "README.md", *sorted((CONFIGS.parent / "docs").glob("*.md"))]:
        for block in re.findall(r"```(?:sh|bash)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if match := re.search(r"(?:recipes/(\w+)\.py|run\.sbatch (\w+))(.*)", line):
                    words = shlex.split(match[3], comments=True)
                    found.append([match[1] or match[2], *words])
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_of_the_pages_composes(
    command: list[str], recipe: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    name, overrides = command[0], [word for word in command[1:] if "=" in word and "…" not in word]
    if name == "plan":  # takes the overrides of the recipe that it plans, and a few of its own
        own = composed("plan").keys() if recipe("plan") else ()
        name = next(word for word in overrides if word.startswith("recipe=")).removeprefix("recipe=")
        overrides = [word for word in overrides if word.partition("=")[0] not in own or word.startswith("out=")]
    module = recipe(name)
    if not any(word.startswith("out=") for word in overrides):
        overrides.append(f"out={tmp_path}")
    composed(name, *overrides)
    assert module


def test_what_deepspeed_is_told_needs_no_plus_sign(recipe: Callable[[str], ModuleType]) -> None:
    """Its keys are in no schema of ours; a mistyped key of ours beside them is still found."""
    module, main = recipe("distill"), sys.modules["_main"]
    told = "deepspeed.config.zero_optimization.offload_optimizer.device=cpu"
    needed = ["deepspeed=zero2", "out=out", "data.path=data", "student.path=student"]
    config = main.settings(composed("distill", *needed, told), module.Distill).deepspeed
    assert (config.stage, config.config) == (2, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
    with pytest.raises((HydraException, OmegaConfBaseException), match="confg"):
        composed("distill", *needed, told, "deepspeed.confg.x=1")
