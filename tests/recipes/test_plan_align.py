"""Stages of alignment are planned before their models and dialogues exist, alone and in a pipeline."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from conftest import tiny_model
from llamita import checkpoints, estimate
from llamita.adapters import LoraConfig, Projection
from llamita.align import dialogues
from llamita.data import tokens
from llamita.shapes import PUBLISHED

ONE = "meta-llama/Llama-3.2-1B"
EIGHT = "meta-llama/Llama-3.1-8B"
SMALL = PUBLISHED[ONE]

Planner = Callable[..., dict[str, Any]]


@pytest.fixture
def plan(recipe: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]) -> Iterator[Planner]:
    """Plan as the command line would, and give back what was printed as JSON."""
    module = recipe("plan")

    def make(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        sys.argv = ["plan.py", *arguments, "format=json"]
        with contextlib.suppress(ValueError):
            module.main()
        answer: dict[str, Any] = json.loads(capsys.readouterr().out)
        return answer

    argv = sys.argv
    yield make
    sys.argv = argv


def talks(folder: Path, *, validation: int = 4) -> Path:
    """Dialogues, pairs and tasks."""
    folder.mkdir()
    asked = [{"role": "user", "content": "how much is that? " * 20}]
    good, bad = ({"role": "assistant", "content": said} for said in ("much", "little"))
    rows: dict[str, Any] = {}
    for split, count in (("train", 40), ("validation", validation)):
        rows[split] = {
            "dialogues": [dialogues.parse_dialogue({"messages": [*asked, good]}, f"{split}-{n}") for n in range(count)],
            "pairs": [
                dialogues.parse_pair({"prompt": asked, "chosen": [good], "rejected": [bad]}, f"{split}-{n}")
                for n in range(count)
            ],
            "tasks": [dialogues.parse_task({"prompt": asked}, f"{split}-{n}") for n in range(count)],
        }
    dialogues.write_all(folder, rows, {})
    return folder


def test_sft_is_planned_as_the_training_that_it_is_on_the_rows_that_its_dialogues_fill(
    plan: Planner, tmp_path: Path
) -> None:
    data = talks(tmp_path / "talks")
    arguments = ["recipe=sft", f"model.path={ONE}", f"data.path={data}", f"out={tmp_path / 'sft'}", "hardware=h100"]
    answer = plan(*arguments, "sequence_length=512", "epochs=3", "global_batch_rows=8", "micro_batch_rows=1")
    assert answer["mistakes"] == []
    (stage,) = answer["stages"]
    rows = math.ceil((data / "train.dialogues.jsonl").stat().st_size / 4 / 512)
    steps = math.ceil(3 * rows / 8)
    flops = 3 * steps * 8 * 512 * SMALL.forward_flops_per_token(256)
    assert stage["parameters"] == {"student": SMALL.num_parameters}
    assert stage["flops"]["student, forward and backward"] == pytest.approx(flops)
    assert stage["disk_bytes"]["packed dialogues"] == 4 * rows * 513
    assert not (tmp_path / "sft").exists()


def test_what_sft_would_refuse_is_a_mistake_of_its_plan(plan: Planner, tmp_path: Path) -> None:
    bare = talks(tmp_path / "bare", validation=0)
    model = tmp_path / "model"
    tokens.train([Path(__file__).read_text(encoding="utf-8")], 400).save_pretrained(tmp_path / "tokenizer")
    made = tiny_model(vocab_size=400, num_hidden_layers=1, max_position_embeddings=16384)
    checkpoints.save_model(made, model, source=tmp_path / "tokenizer", provenance={})

    def mistakes(*changes: str, path: Path = model) -> list[str]:
        given = ["recipe=sft", f"model.path={path}", f"data.path={bare}", f"out={tmp_path / 'out'}", "hardware=cpu"]
        found: list[str] = plan(*given, "sequence_length=128", *changes)["mistakes"]
        return found

    assert mistakes("validation_rows=0") == []
    (wrong,) = mistakes()
    assert wrong.startswith(f"data.path={bare} has no validation dialogues: validation_rows=0 trains without, got 64")
    assert any("16384" in line for line in mistakes("validation_rows=0", "sequence_length=32768"))
    assert any("is no directory" in line for line in mistakes("validation_rows=0", path=tmp_path / "none"))
    assert any("data.path=" in line for line in mistakes("validation_rows=0", f"data.path={tmp_path / 'none'}"))
    taught = mistakes("validation_rows=0", f"teachers.big.path={EIGHT}", "loss.ce_weight=0.5")
    assert any("must have the same vocabulary, got student 400, big 128256" in line for line in taught)
    assert "loss.ce_weight=1 leaves the teachers no weight" in mistakes(f"teachers.big.path={EIGHT}")[0]


def test_a_pipeline_of_rounds_is_planned_before_anything_of_it_exists(plan: Planner, tmp_path: Path) -> None:
    """Dialogues, two trainings on them, their average, and dialogues that a later stage would have made."""
    out, source = tmp_path / "pipeline", tmp_path / "talks.jsonl"
    source.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    sft = [f"model.path={ONE}", f"data.path={out}/talks", "micro_batch_rows=1", "global_batch_rows=8"]
    stages = {
        "talks": ("dialogues", [f"sources.mine.path={source}"], []),
        "one": ("sft", sft, ["talks"]),
        "two": ("sft", [*sft, "run.seed=1"], ["talks"]),
        "mean": ("average", [f"models.one.path={out}/one", f"models.two.path={out}/two"], ["one", "two"]),
        "more": ("dialogues", ["sources.first.kind=stage", f"sources.first.path={out}/talks"], ["talks"]),
        "third": ("sft", [*sft[2:], f"model.path={out}/mean", f"data.path={out}/more"], ["mean", "more"]),
    }

    def planned() -> dict[str, Any]:
        file = tmp_path / "configs" / "pipeline" / "mine.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        entries = {name: {"recipe": r, "overrides": o, "after": a} for name, (r, o, a) in stages.items()}
        file.write_text("# @package _global_\n" + yaml.safe_dump({"stages": entries}))
        searched = f"hydra.searchpath=[file://{file.parent.parent}]"
        return plan("recipe=pipeline", searched, "pipeline=mine", f"out={out}", "hardware=h100", "num_gpus=8")

    answer = planned()
    assert [line for line in answer["mistakes"] if "GiB free" not in line] == []
    found = {stage["stage"]: stage for stage in answer["stages"]}
    assert found.keys() == stages.keys()
    assert found["third"]["parameters"]["student"] == found["mean"]["parameters"]["model"] == SMALL.num_parameters
    assert found["third"]["memory_bytes"]["total"] < 80e9
    assert found["mean"]["memory_bytes"]["total"] < 8 * 2**30
    assert any("10,000 dialogues of 500 tokens are assumed" in note for note in found["one"]["notes"])
    stages["third"] = ("sft", [*sft[2:], f"model.path={out}/talks", f"data.path={out}/mean"], ["mean"])
    wrong = [line for line in planned()["mistakes"] if "GiB free" not in line]
    assert [line.rpartition("pipeline/")[2] for line in wrong] == [
        "mean: stage mean makes no dialogues",
        "talks: stage talks makes no model",
    ]


@pytest.mark.parametrize(
    ("name", "told", "item"),
    [
        ("dpo", ["lora.rank=0"], "reference, forward"),
        ("reward", [], "student, forward and backward"),
        ("rl", ["kl_weight=0.1"], "reference, forward"),
        ("sample", ["samples_per_prompt=2"], "model, forward"),
    ],
)
def test_the_settings_that_the_recipes_have_are_those_that_the_plan_reads(
    name: str, told: list[str], item: str, plan: Planner, tmp_path: Path
) -> None:
    given = [f"recipe={name}", f"model.path={ONE}", f"data.path={talks(tmp_path / 'talks')}", f"out={tmp_path / 'out'}"]
    answer = plan(*given, *told, "hardware=h100", "num_gpus=8")
    assert answer["mistakes"] == []
    (stage,) = answer["stages"]
    assert stage["flops"][item] > 0
    assert 2 * SMALL.num_parameters < stage["memory_bytes"]["total"] < 80e9
    assert plan(*given[:1], f"model.path={tmp_path / 'none'}", *given[2:], *told)["mistakes"]


def test_models_side_by_side_need_the_memory_of_the_largest_and_no_data(plan: Planner, tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text('{"prompt": "a"}\n')
    models = [f"models.small.path={ONE}", f"models.large.path={EIGHT}", f"safety.mine.path={tmp_path / 'asked.jsonl'}"]
    answer = plan("recipe=assess", *models, f"out={tmp_path / 'out'}", "hardware=h100")
    assert answer["mistakes"] == []
    assert answer["stages"][0]["memory_bytes"]["total"] == 2 * PUBLISHED[EIGHT].num_parameters
    wrong = plan("recipe=assess", *models, f"data.path={tmp_path / 'none'}", f"out={tmp_path / 'out'}")["mistakes"]
    assert any("data.path" in line for line in wrong)


def looked(name: str, recipe: Callable[[str], ModuleType], config: dict[str, Any], **made: Any) -> Any:
    """The outlook that a function of the module gives for settings of any recipe that has them."""
    recipe("plan")
    align, world = sys.modules["_outlook_align"], sys.modules["_world"]
    outlook = world.Outlook("stage", name, Path("out"))
    device = estimate.device(estimate.Hardware.h100)
    there = {world.normal(Path(path)): value for path, value in made.items()}
    getattr(align, name)(nested(config), world.World(device, 8, 4096, made=there, waits_for=frozenset(made)), outlook)
    return outlook


def nested(settings: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(**{k: nested(v) if isinstance(v, dict) else v for k, v in settings.items()})


def test_a_reference_is_read_once_by_dpo_and_rests_beside_the_policy_of_rl(
    recipe: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    data = talks(tmp_path / "talks")
    common = {
        "model": {"path": Path(ONE)},
        "data": {"path": data},
        "micro_batch_rows": 1,
        "global_batch_rows": 8,
        "max_length": 1024,
        "deepspeed": {"stage": 2},
        "epochs": 2,
    }
    dpo, reward = (looked(name, recipe, common) for name in ("preferences", "reward"))
    rl = looked("reinforcement", recipe, {**common, "kl_weight": 0.1, "num_generations": 4, "max_answer_tokens": 100})
    assert [outlook.mistakes for outlook in (dpo, rl, reward)] == [[], [], []]
    size = estimate.num_text_tokens((data / "train.pairs.jsonl").stat().st_size)
    assert dpo.flops["reference, forward"] == pytest.approx(size * SMALL.forward_flops_per_token(size / 40 / 2))
    # Two epochs of the pairs' own tokens, however long a row may be; a step of eight pairs is sixteen sequences.
    forward = 2 * size * SMALL.forward_flops_per_token(512)
    assert dpo.flops["student, forward and backward"] == pytest.approx(3 * forward)
    assert rl.memory["reference"] == 2 * SMALL.num_parameters
    judge = {"reward": {"path": Path("judge")}}
    alone = looked("reinforcement", recipe, {**common, **judge, "kl_weight": 0.1, "deepspeed": {}}, judge=reward.makes)
    assert alone.memory["reference"] == 4 * SMALL.num_parameters  # as the policy, which no engine casts
    assert alone.memory["reward"] == 2 * reward.makes.num_parameters
    size = 4 * (estimate.num_text_tokens((data / "train.tasks.jsonl").stat().st_size) + 40 * 100)
    assert rl.flops["answers, forward"] == pytest.approx(2 * size * SMALL.forward_flops_per_token(size / 160 / 2))
    # One answer on each of eight processes, in bfloat16: keys and values of 16 layers of 8 heads of size 64.
    assert rl.memory["keys and values of answers"] == 2 * (500 + 100) * 2 * 16 * 8 * 64
    assert rl.notes[-1] == "40 steps of 8 answers"
    assert "reference" not in dpo.memory
    assert "reference" not in looked("reinforcement", recipe, common).memory
    assert dpo.memory == reward.memory
    assert "reference, forward" not in reward.flops
    assert dpo.makes == rl.makes == SMALL
    assert reward.makes.output_rows == 1
    on_judge = looked("preferences", recipe, {**common, "model": {"path": Path("judge")}}, judge=reward.makes)
    assert "has 1 output rows: it is no language model any more" in on_judge.mistakes[0]
    judged = looked("reinforcement", recipe, {**common, "reward": {"path": Path("judge")}}, judge=reward.makes)
    assert judged.mistakes == []
    assert judged.memory["reward"] == 2 * reward.makes.num_parameters
    taught = looked("reinforcement", recipe, {**common, "method": "distill", "teacher": {"path": Path(EIGHT)}})
    assert taught.memory["teacher"] == 2 * PUBLISHED[EIGHT].num_parameters
    absent = looked("reinforcement", recipe, {**common, "reward": {"path": tmp_path / "none"}})
    assert absent.mistakes == [f"reward.path={tmp_path / 'none'} is not a model directory: it has no config.json"]


def test_the_larger_of_the_model_that_answers_and_the_one_that_judges_decides_on_memory(
    recipe: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    """They are there one after the other."""
    common = {"model": {"path": Path(ONE)}, "data": {"path": talks(tmp_path / "talks")}, "samples_per_prompt": 4}
    alone = looked("sample", recipe, common)
    large = PUBLISHED[EIGHT]
    outlook = looked("sample", recipe, {**common, "reward": {"path": Path("judge")}}, judge=large)
    assert alone.memory["model"] == 2 * SMALL.num_parameters
    assert outlook.memory == {"reward model": 2 * large.num_parameters}
    assert outlook.read_bytes == 2 * (SMALL.num_parameters + large.num_parameters)
    # Forty-four tasks, each answered four times; all 512 tokens of an answer are read with its 500 of the prompt.
    tokens = 44 * 4 * 1012
    assert outlook.flops["reward model, forward"] == pytest.approx(tokens * large.forward_flops_per_token(506))
    small = looked("sample", recipe, {**common, "reward": {"path": Path("judge")}}, judge=SMALL)
    assert small.memory == alone.memory


def test_adapters_of_an_aligned_model_need_no_reference_of_their_own(
    recipe: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    """The model without its adapters is the reference."""
    common = {"model": {"path": Path(ONE)}, "data": {"path": talks(tmp_path / "talks")}, "lora": LoraConfig(rank=8)}
    outlook = looked("reinforcement", recipe, {**common, "kl_weight": 0.1})
    assert outlook.mistakes == []
    assert "reference" not in outlook.memory
    assert outlook.memory["resting weights"] == 2 * SMALL.num_parameters


def test_what_is_trained_beside_resting_weights_is_counted(
    plan: Planner, recipe: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    """An adapter of rank r holds r (in + out) values; an embedding is a float32 copy beside the one that rests."""
    data = talks(tmp_path / "talks")
    some = LoraConfig(rank=8, targets=[Projection.q_proj], embeddings=True)
    common = {"model": {"path": Path(ONE)}, "data": {"path": data}, "lora": some}
    adapters = SMALL.num_hidden_layers * 8 * (2048 + 2048)
    embedding = 128_256 * 2048
    dpo, reward = (looked(name, recipe, common) for name in ("preferences", "reward"))
    assert dpo.memory["adapters"] == 4 * (adapters + embedding)
    assert reward.memory["adapters"] == 4 * (adapters + embedding + 2048)
    common["lora"] = LoraConfig(rank=8, targets=[Projection.q_proj])
    assert looked("reward", recipe, common).memory["adapters"] == 4 * (adapters + 2048)
    given = ["recipe=dpo", f"model.path={ONE}", f"data.path={data}", f"out={tmp_path / 'out'}", "hardware=h100"]
    answer = plan(*given, "lora.rank=8", "lora.targets=[q_proj]", "lora.embeddings=true")
    assert answer["mistakes"] == []
    assert answer["stages"][0]["memory_bytes"]["adapters"] == dpo.memory["adapters"]


def test_sampling_makes_dialogues_and_is_counted_by_its_answers(
    recipe: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    data = talks(tmp_path / "talks")
    config = {"model": {"path": Path(ONE)}, "data": {"path": data}, "sampling": {"max_new_tokens": 100}}
    one, four = (looked("sample", recipe, {**config, "samples_per_prompt": number}) for number in (1, 4))
    assert one.mistakes == []
    assert type(one.makes).__name__ == "Talks"
    forward = SMALL.forward_flops_per_token(550)
    rows = 44
    assert four.flops["model, forward"] - one.flops["model, forward"] == pytest.approx(rows * 300 * forward)
    assert one.memory["model"] == 2 * SMALL.num_parameters


@pytest.mark.parametrize(
    ("told", "prompts"),
    [
        ({}, 44),
        ({"prompts": "dialogues"}, 44),
        ({"prompts": "both"}, 88),
        ({"prompts": "both", "data.splits": ["train"]}, 80),
        ({"prompts": "both", "max_prompts": 10}, 18),
    ],
)
def test_as_many_prompts_are_planned_as_will_be_asked(
    told: dict[str, Any], prompts: int, recipe: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    """40 tasks and 40 dialogues to train on, and 4 of each held out; ``max_prompts`` are those of each split."""
    data: dict[str, Any] = {"path": talks(tmp_path / "talks")}
    if "data.splits" in told:
        data["splits"] = told.pop("data.splits")
    outlook = looked("sample", recipe, {"model": {"path": Path(ONE)}, "data": data, **told})
    assert outlook.notes[-1].startswith(f"{prompts} prompts of ")
