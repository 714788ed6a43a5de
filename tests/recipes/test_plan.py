"""A plan says what a stage takes and collects every mistake, with the overrides of the stage itself."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from conftest import tiny_config, tiny_model
from llamita import checkpoints, checks, runs, storage
from llamita.data.sources import SourceConfig
from llamita.data.tokens import TokenizerConfig
from llamita.prune.importance import FORMAT
from llamita.prune.scores import Scores
from llamita.shapes import PUBLISHED

EIGHT = "model.path=meta-llama/Llama-3.1-8B"
MAGNITUDES = [f"scores.{axis}=magnitude" for axis in ("mlp", "attention", "hidden", "layers")]


@pytest.fixture
def plan(
    recipe: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., dict[str, Any]]]:
    """Plan as the command line would, and give back what was printed as JSON."""
    module = recipe("plan")

    def make(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        sys.argv = ["plan.py", *arguments, "format=json"]
        with contextlib.suppress(ValueError):  # its message says to look above, where the mistakes are
            module.main()
        answer: dict[str, Any] = json.loads(capsys.readouterr().out)
        return answer

    argv = sys.argv
    yield make
    sys.argv = argv


Planner = Callable[..., dict[str, Any]]


def test_pruning_eight_billion_to_one_is_planned_without_weights_and_without_a_gpu(
    plan: Planner, tmp_path: Path
) -> None:
    answer = plan(
        "recipe=prune", EIGHT, "target=llama3.2_1b", *MAGNITUDES, f"out={tmp_path / 'pruned'}", "hardware=cpu"
    )
    (stage,) = answer["stages"]
    assert answer["mistakes"] == []
    assert stage["parameters"] == {"before": 8_030_261_248, "after": 1_235_814_400}
    assert stage["disk_bytes"]["model"] == 2 * 1_235_814_400
    assert 0 < stage["memory_bytes"]["total"] < 8 * 2**30
    assert not (tmp_path / "pruned").exists()


def test_all_mistakes_are_collected_each_in_one_line(plan: Planner, tmp_path: Path) -> None:
    answer = plan(
        "recipe=prune",
        EIGHT,
        "target.num_attention_heads=30",
        "target.hidden_size=3001",
        "target.head_dim=48",
        "target.hiden_size=5",
        "calibration.tokens=-1",
        "calibration.path=nowhere",
        "scores.mlp=loud",
        "run.project=a b",
    )
    expected = [
        "target.hiden_size is no setting of prune; did you mean target.hidden_size?",
        "scores.mlp=loud: Invalid value 'loud', expected one of",
        "out must be given",
        "calibration.tokens must be at least 1, got -1",
        "calibration.path: nowhere does not exist",
        "target.num_attention_heads must give each of the 8 KV heads between 1 and 4",
        "target.hidden_size must be a multiple of num_attention_heads=32",
        "target.head_dim must be even and divide the source's 128",
        "run.project: a name has 1 to 64",
    ]
    assert [m[: len(e)] for m, e in zip(answer["mistakes"], expected, strict=True)] == expected
    assert "nearest are 24 and 32; got 30" in answer["mistakes"][5]
    assert not any("\n" in mistake for mistake in answer["mistakes"])


def test_a_pruning_on_a_gpu_says_what_its_host_needs_and_what_every_score_costs(
    plan: Planner, data: Path, tmp_path: Path
) -> None:
    """What is counted is what the recipe would measure: nothing for layers that are named."""
    arguments = ["recipe=prune", bare_eight(tmp_path / "8b"), "target=llama3.2_1b", f"calibration.path={data}"]
    arguments.append(f"out={tmp_path / 'x'}")

    def planned(*more: str) -> dict[str, Any]:
        stage: dict[str, Any] = plan(*arguments, *more)["stages"][0]
        return stage

    usual = planned()
    assert usual["host_memory_bytes"]["Python and its libraries"] > 0
    assert "Python and its libraries" not in usual["memory_bytes"]
    assert usual["arithmetic"]["mending, steps"] == "float32"
    assert usual["arithmetic"]["calibration, elimination"] == "float64"
    assert usual["hours"] > sum(usual["flops"].values()) / 2 / 989.4e12 / 0.35 / 3600
    for setting, item in (
        ("scores.mlp=taylor_element", "calibration, gradients"),
        ("scores.layers=contiguous", "calibration, contiguous removal"),
    ):
        assert item in planned(setting)["flops"]
        assert item not in usual["flops"]
    greedy = "calibration, greedy removal"
    assert planned("scores.removed_layers=28")["flops"][greedy] > usual["flops"][greedy]
    kept = ",".join(map(str, range(16)))
    assert greedy not in planned(f"target.keep_layers=[{kept}]")["flops"]
    only_layers = plan(arguments[0], arguments[1], "target.num_hidden_layers=16", *arguments[3:])["stages"][0]
    assert "calibration, elimination" not in only_layers["flops"]
    on_host = planned("hardware=cpu")
    assert on_host["host_memory_bytes"] == {"total": 0}
    assert on_host["memory_bytes"]["total"] > usual["memory_bytes"]["total"]


def test_pruning_that_does_not_fit_the_gpu_is_a_mistake(plan: Planner, tmp_path: Path) -> None:
    arguments = ["recipe=prune", EIGHT, "target=llama3.2_1b", "calibration.path=nowhere", f"out={tmp_path / 'x'}"]
    arguments += ["calibration.tokens=1048576", "calibration.batch_rows=128"]
    assert any("one process needs" in mistake for mistake in plan(*arguments)["mistakes"])
    fewer = plan(*arguments, "calibration.batch_rows=1")["mistakes"]
    assert not any("one process needs" in mistake for mistake in fewer)


def test_a_target_larger_than_the_source_is_a_mistake(plan: Planner, tmp_path: Path) -> None:
    answer = plan("recipe=prune", "model.path=meta-llama/Llama-3.2-1B", "target=llama3.2_3b", f"out={tmp_path / 'x'}")
    assert "target.num_hidden_layers must be at most the source's 16, got 28" in answer["mistakes"]
    assert "target.hidden_size must be at most the source's 2048, got 3072" in answer["mistakes"]


def test_output_rows_of_a_tied_head_are_a_mistake(plan: Planner, tmp_path: Path) -> None:
    answer = plan("recipe=prune", EIGHT, "target=llama3.2_1b", "target.output_rows=[1,2]", f"out={tmp_path / 'x'}")
    assert "tie_word_embeddings=false" in answer["mistakes"][0]


def bare_eight(folder: Path) -> str:
    """A directory that says no more than the shape of an 8B: its tokenizer may be any."""
    folder.mkdir()
    fields = PUBLISHED["meta-llama/Llama-3.1-8B"].config_fields()
    storage.write_json(folder / "config.json", tiny_config(**fields, max_position_embeddings=131072).to_dict())
    return f"model.path={folder}"


def test_data_that_the_tokenizer_of_a_published_model_cannot_have_made_is_a_mistake(
    plan: Planner, data: Path, tmp_path: Path
) -> None:
    answer = plan("recipe=prune", EIGHT, "target=llama3.2_1b", f"calibration.path={data}", f"out={tmp_path / 'x'}")
    assert [mistake for mistake in answer["mistakes"] if "token ids, the tokenizer of model.path=meta-llama" in mistake]


def test_pruning_by_scores_of_text_without_text_is_a_mistake(plan: Planner, data: Path, tmp_path: Path) -> None:
    arguments = ["recipe=prune", bare_eight(tmp_path / "8b"), "target=llama3.2_1b", f"out={tmp_path / 'x'}"]
    assert plan(*arguments)["mistakes"] == [
        "scores.mlp=obs, scores.attention=obs, scores.hidden=pca, scores.layers=greedy "
        "are measured on text: set calibration.path, or " + " ".join(MAGNITUDES)
    ]
    assert plan(*arguments, f"calibration.path={data}")["mistakes"] == []
    assert plan(*arguments, *MAGNITUDES)["mistakes"] == []
    assert "holds no scores" in plan(*arguments, "scores.path=nowhere")["mistakes"][0]


def test_pruning_with_the_scores_of_an_earlier_run_is_planned_by_what_it_measured(
    plan: Planner, tmp_path: Path
) -> None:
    arguments = ["recipe=prune", EIGHT, "target.num_hidden_layers=4", "scores.layers=block_influence"]
    arguments.append(f"scores.path={tmp_path / 'early'}")
    ranked = {"layers.block_influence": torch.rand(32)}
    for tokens, tensors, wrong in ((0, {}, 1), (64, {}, 1), (64, ranked, 0)):
        Scores(tensors=tensors, info={"format": FORMAT, "tokens": tokens}).save(tmp_path / "early" / "pruning")
        assert len(plan(*arguments, f"out={tmp_path / 'x'}")["mistakes"]) == wrong


def test_layers_that_cannot_be_removed_are_a_mistake_before_anything_is_measured(
    plan: Planner, data: Path, tmp_path: Path
) -> None:
    arguments = ["recipe=prune", EIGHT, "target.num_hidden_layers=4", f"calibration.path={data}"]
    said = plan(*arguments, "scores.layers=greedy", "scores.removed_layers=3", f"out={tmp_path / 'x'}")["mistakes"]
    assert [line for line in said if line.startswith("scores.removed_layers must be in 28..31")]


def test_the_published_rope_of_another_kind_of_model_is_a_mistake(plan: Planner, data: Path, tmp_path: Path) -> None:
    plain = model(tmp_path / "m", data, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    answer = plan("recipe=prune", f"model.path={plain}", "target.rope=published", f"out={tmp_path / 'x'}")
    assert answer["mistakes"] == ["target.rope=published needs a model with rope_type 'llama3', got 'default'"]


def test_a_tokenizer_by_a_name_on_the_hub_is_a_note(plan: Planner, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text " * 1000)
    arguments = ["recipe=prepare", f"source.path={tmp_path / 'a.txt'}", "sequence_length=64", f"out={tmp_path / 'x'}"]
    answer = plan(*arguments, "tokenizer.path=meta-llama/Llama-3.1-8B")
    assert answer["mistakes"] == []
    assert any("tokenizer.path=meta-llama/Llama-3.1-8B is no directory" in n for n in answer["stages"][0]["notes"])
    assert plan(*arguments, "tokenizer.path=someone/Llama")["mistakes"] == [
        "tokenizer.path=someone/Llama has no tokenizer.json"
    ]


def test_a_secret_is_a_mistake_and_is_nowhere_in_the_answer(plan: Planner, tmp_path: Path) -> None:
    canary = "hf_" + "Zq9" * 11
    answer = plan("recipe=prune", EIGHT, f"run.project={canary}", f"unknown={canary}", f"out={tmp_path / 'x'}")
    assert sum("looks like a Hugging Face token" in mistake for mistake in answer["mistakes"]) == 2
    assert canary not in json.dumps(answer)


def test_a_directory_of_other_settings_or_of_strangers_is_a_mistake(plan: Planner, tmp_path: Path) -> None:
    with runs.start(tmp_path / "used", "prune", {"a": 1}, runs.RunConfig()):
        owned = plan("recipe=prune", EIGHT, f"out={tmp_path / 'used'}")["mistakes"]
    assert any("other settings" in mistake for mistake in owned)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.tex").touch()
    assert "no run wrote" in plan("recipe=prune", EIGHT, f"out={tmp_path / 'own'}")["mistakes"][0]
    assert [file.name for file in (tmp_path / "own").iterdir()] == ["thesis.tex"]


def test_a_directory_whose_run_is_alive_is_a_mistake(plan: Planner, tmp_path: Path) -> None:
    overrides = [EIGHT, f"out={tmp_path / 'used'}"]
    with runs.start(tmp_path / "used", "prune", {}, runs.RunConfig()):
        (tmp_path / "used" / "config.yaml").unlink()
        assert "is owned by another run" in plan("recipe=prune", *overrides)["mistakes"][0]


def test_a_disk_that_is_too_small_is_a_mistake(plan: Planner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10 * 2**30))
    answer = plan("recipe=prune", EIGHT, f"out={tmp_path / 'x'}", "hardware=cpu")
    assert f"out={tmp_path / 'x'} needs 15.0 GiB, {tmp_path} has 10.0 GiB free" in answer["mistakes"]


def test_preparing_without_a_source_or_a_tokenizer_is_a_mistake(plan: Planner, tmp_path: Path) -> None:
    answer = plan(
        "recipe=prepare",
        f"source.path={tmp_path / 'no'}",
        f"tokenizer.path={tmp_path}",
        "sequence_length=64",
        f"out={tmp_path / 'x'}",
    )
    assert len(answer["mistakes"]) == 2
    assert "does not exist" in answer["mistakes"][0]
    assert "has no tokenizer.json" in answer["mistakes"][1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, recipe: Callable[[str], ModuleType]) -> Path:
    """A small data directory, as ``prepare`` writes it."""
    root = tmp_path_factory.mktemp("data")
    for number in range(40):
        (root / f"{number}.txt").write_text(f"Document {number} says that {number} is not {number + 1}. " * 8)
    prepare = recipe("prepare")
    prepare.run(
        prepare.Prepare(
            source=SourceConfig(path=str(root)),
            tokenizer=TokenizerConfig(vocab_size=300),
            sequence_length=64,
            num_proc=1,
            out=root / "out",
        )
    )
    return root / "out"


def model(path: Path, data: Path, **overrides: Any) -> Path:
    """A tiny model directory with the tokenizer of ``data``."""
    path.mkdir()
    size = storage.read_json(data / "data.json")["vocab_size"]
    tiny = tiny_model(**({"vocab_size": size} | overrides))
    checkpoints.save_model(tiny, path, source=data / "tokenizer", provenance={})
    return path


def test_a_distillation_is_counted_item_by_item(plan: Planner, data: Path, tmp_path: Path) -> None:
    student, teacher = model(tmp_path / "s", data), model(tmp_path / "t", data, hidden_size=128)
    arguments = [
        "recipe=distill",
        f"student.path={student}",
        f"teachers.big.path={teacher}",
        f"data.path={data}",
        "steps=10",
        "global_batch_rows=8",
        "micro_batch_rows=2",
        f"out={tmp_path / 'out'}",
    ]
    answer = plan(*arguments, "num_gpus=4", "deepspeed=zero2")
    assert answer["mistakes"] == []
    (stage,) = answer["stages"]
    shape = checks.model_shape(student)
    assert shape is not None
    assert stage["processes"] == 4
    assert stage["parameters"]["student"] == shape.num_parameters
    assert stage["memory_bytes"]["AdamW moments"] == 8 * shape.num_parameters / 4
    tokens = 10 * 8 * 64
    assert stage["flops"]["student, forward and backward"] == 3 * tokens * shape.forward_flops_per_token(32)
    assert any(f"{tokens:,} tokens in 10 steps" in note for note in stage["notes"])
    alone = plan(*arguments, "hardware=cpu")["stages"][0]
    assert alone["processes"] == 1
    assert alone["gpu_hours"] == 0
    assert alone["memory_bytes"]["weights"] == 4 * shape.num_parameters
    again = plan(*arguments, "hardware=cpu", "activation_checkpointing=true")["stages"][0]
    assert again["memory_bytes"]["activations"] < alone["memory_bytes"]["activations"]


def ways(plan: Planner, tmp_path: Path, *overrides: str) -> dict[str, dict[str, Any]]:
    """Of a 1B on 64 H100s with 21 billion tokens, by name; the data does not exist."""
    answer = plan(
        "recipe=distill",
        "student.path=meta-llama/Llama-3.2-1B",
        "teachers.b.path=meta-llama/Llama-3.1-70B",
        f"data.path={tmp_path / 'none'}",
        "steps=10000",
        "global_batch_rows=256",
        "micro_batch_rows=1",
        "activation_checkpointing=true",
        "attention=documents",
        "deepspeed=zero2",
        "num_gpus=64",
        "validation_rows=0",
        f"out={tmp_path / 'out'}",
        *overrides,
    )
    return {way["way"]: way for way in answer["stages"][0]["ways"]}


def test_a_seventy_billion_teacher_is_weighed_online_and_cached(plan: Planner, tmp_path: Path) -> None:
    """140 GB do not fit an H100; an eighth of them does, to be captured as well."""
    found = ways(plan, tmp_path)
    fits = {name: way["fits"] for name, way in found.items()}
    assert fits == {
        "online, resident": False,
        "online, ZeRO-3": True,
        "online, 8 bits": False,
        "online, 4 bits": True,
        "cached": True,
    }
    tokens = 10_000 * 256 * 8192
    cached, spread = found["cached"], found["online, ZeRO-3"]
    assert cached["cache_bytes"] == tokens * (3 * 16 + 1)
    hours = tokens * PUBLISHED["meta-llama/Llama-3.1-70B"].forward_flops_per_token(4096) / 989.4e12 / 0.35 / 3600
    assert cached["capture_gpu_hours"] == pytest.approx(hours)
    assert cached["gpu_hours"] == pytest.approx(spread["gpu_hours"])
    assert [name for name, way in found.items() if way["recommended"]] == ["online, ZeRO-3"]
    fewer = ways(plan, tmp_path, "assume_entries_per_token=12")
    assert fewer["cached"]["cache_bytes"] == tokens * (3 * 12 + 1)


@pytest.mark.parametrize(
    ("setting", "gigabytes"), [("placement=resident", 141.1), ("placement=zero3", 23.7), ("weights=nf4", 39.5)]
)
def test_a_seventy_billion_teacher_is_captured_as_it_is_held(
    setting: str, gigabytes: float, plan: Planner, tmp_path: Path
) -> None:
    """On eight processes: whole, in the pieces that the spread teacher's own text counts, and in four bits."""
    words = ["recipe=cache", "teacher.path=meta-llama/Llama-3.1-70B", f"data.path={tmp_path / 'none'}"]
    stage = plan(*words, f"teacher.{setting}", "num_gpus=8", f"out={tmp_path / 'out'}")["stages"][0]
    assert stage["memory_bytes"]["teacher, weights"] / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_two_teachers_take_the_sum_of_both_and_two_caches(plan: Planner, tmp_path: Path) -> None:
    one, both = ways(plan, tmp_path), ways(plan, tmp_path, "teachers.a.path=meta-llama/Llama-3.1-8B")
    eight = 2 * PUBLISHED["meta-llama/Llama-3.1-8B"].num_parameters
    gap = both["online, resident"]["memory_bytes"] - one["online, resident"]["memory_bytes"]
    assert gap == pytest.approx(eight, rel=0.02)
    assert both["cached"]["cache_bytes"] == 2 * one["cached"]["cache_bytes"]
    assert both["cached"]["memory_bytes"] == one["cached"]["memory_bytes"]


def test_data_that_is_seen_many_times_is_captured_once(plan: Planner, data: Path, tmp_path: Path) -> None:
    student, teacher = model(tmp_path / "s", data), model(tmp_path / "t", data, hidden_size=128)
    answer = plan(
        "recipe=distill",
        f"student.path={student}",
        f"teachers.big.path={teacher}",
        f"data.path={data}",
        "steps=1000",
        "validation_rows=0",
        f"out={tmp_path / 'out'}",
    )
    cached = answer["stages"][0]["ways"][-1]
    rows = storage.read_json(data / "data.json")["splits"]["train"]["rows"]
    assert cached["cache_bytes"] == rows * 64 * 49
    assert cached["recommended"]


def test_every_mistake_of_a_distillation_is_seen(plan: Planner, data: Path, tmp_path: Path) -> None:
    student = model(tmp_path / "s", data, max_position_embeddings=32)
    teacher = model(tmp_path / "t", data, vocab_size=512)
    (teacher / "tokenizer.json").unlink()
    weights = teacher / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    answer = plan(
        "recipe=distill",
        f"student.path={student}",
        f"teachers.big.path={teacher}",
        "teachers.big.wieght=2",
        "teachers.other.path=nowhere",
        f"data.path={data}",
        "loss.temprature=2",
        "optim.learning_rate=-1",
        "global_batch_rows=12",
        "micro_batch_rows=2",
        "num_gpus=4",
        f"out={tmp_path / 'out'}",
    )
    for part in (
        "loss.temprature is no setting of distill; did you mean loss.temperature?",
        "teachers.big.wieght is no setting of distill; did you mean teachers.big.weight?",
        "optim.learning_rate must be > 0 and finite, got -1",
        "the data's sequence_length 64 is more than",
        "has no tokenizer.json",
        "cut short",
        "teachers.other.path=nowhere is no directory",
        "student and teachers must have the same vocabulary",
        "nearest are 8 and 16, got 12",
    ):
        assert sum(part in mistake for mistake in answer["mistakes"]) == 1, (part, answer["mistakes"])
    assert len(answer["mistakes"]) == 9, answer["mistakes"]


def test_another_tokenizer_than_the_datas_is_a_mistake(plan: Planner, data: Path, tmp_path: Path) -> None:
    student = model(tmp_path / "s", data)
    definition = storage.read_json(student / "tokenizer.json")
    definition["model"]["merges"] = definition["model"]["merges"][:-1]
    storage.write_json(student / "tokenizer.json", definition)
    answer = plan(
        "recipe=distill", f"student.path={student}", f"data.path={data}", "num_gpus=1", f"out={tmp_path / 'out'}"
    )
    assert len(answer["mistakes"]) == 1
    assert "another tokenizer" in answer["mistakes"][0]


def test_data_that_is_cut_short_or_not_there_is_a_mistake(plan: Planner, data: Path, tmp_path: Path) -> None:
    student = model(tmp_path / "s", data)
    arguments = ["recipe=distill", f"student.path={student}", "num_gpus=1", f"out={tmp_path / 'out'}"]
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    shard = next((copy / "shards").glob("train*"))
    shard.write_bytes(shard.read_bytes()[:-4])
    assert "cut short" in plan(*arguments, f"data.path={copy}")["mistakes"][0]
    absent = plan(*arguments, f"data.path={tmp_path / 'no'}", "assume_sequence_length=128")
    assert "does not exist" in absent["mistakes"][0]
    assert any("rows of 128 tokens are assumed" in note for note in absent["stages"][0]["notes"])
    (copy / "DONE.json").unlink()
    assert "unfinished" in plan(*arguments, f"data.path={copy}")["mistakes"][0]


def test_a_student_that_does_not_fit_the_device_is_a_mistake(plan: Planner, data: Path, tmp_path: Path) -> None:
    answer = plan(
        "recipe=distill",
        "student.path=meta-llama/Llama-3.1-70B",
        f"data.path={data}",
        "global_batch_rows=8",
        "micro_batch_rows=1",
        f"out={tmp_path / 'out'}",
    )
    assert any("one process needs" in mistake and "H100" in mistake for mistake in answer["mistakes"])


def test_an_evaluation_counts_every_model_and_its_teacher(plan: Planner, data: Path, tmp_path: Path) -> None:
    first, second = model(tmp_path / "a", data), model(tmp_path / "b", data)
    answer = plan(
        "recipe=evaluate",
        f"models.first.path={first}",
        f"models.second.path={second}",
        f"teacher.path={first}",
        f"data.path={data}",
        f"out={tmp_path / 'out'}",
    )
    assert answer["mistakes"] == []
    flops = answer["stages"][0]["flops"]
    assert flops["teacher, forward"] == 3 * flops["first, forward"]


def test_a_report_of_a_directory_that_is_not_there_is_a_mistake(plan: Planner, tmp_path: Path) -> None:
    answer = plan("recipe=report", f"runs.one={tmp_path / 'no'}", f"out={tmp_path / 'out'}")
    assert answer["mistakes"] == [f"runs.one={tmp_path / 'no'} does not exist"]


def test_a_stage_may_read_what_an_earlier_stage_will_make(plan: Planner, tmp_path: Path) -> None:
    """A whole pipeline is planned before anything of it exists, and its shapes are handed on."""
    (tmp_path / "a.txt").write_text("text " * 1000)
    out = tmp_path / "pipeline"
    sizes = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2}
    shape = [f"student.shape.{name}={size}" for name, size in sizes.items()]
    stages = {
        "data": (
            "prepare",
            [
                f"source.path={tmp_path / 'a.txt'}",
                "sequence_length=64",
                "tokenizer.vocab_size=400",
                "validation.fraction=0.1",
            ],
            [],
        ),
        "teacher": ("distill", [*shape, f"data.path={out}/data", "steps=5"], ["data"]),
        "small": (
            "prune",
            [f"model.path={out}/teacher", f"calibration.path={out}/data", "target.num_hidden_layers=2"],
            ["data", "teacher"],
        ),
        "checked": ("evaluate", [f"models.small.path={out}/small", f"data.path={out}/data"], ["small"]),
        "page": ("report", [f"runs.small={out}/small"], ["small"]),
    }
    file = tmp_path / "configs" / "pipeline" / "mine.yaml"
    file.parent.mkdir(parents=True)
    entries = {name: {"recipe": r, "overrides": o, "after": a} for name, (r, o, a) in stages.items()}
    file.write_text("# @package _global_\n" + yaml.safe_dump({"stages": entries}))
    searched = f"hydra.searchpath=[file://{file.parent.parent}]"
    answer = plan("recipe=pipeline", searched, "pipeline=mine", f"out={out}", "hardware=cpu")
    assert answer["mistakes"] == []
    assert [stage["stage"] for stage in answer["stages"]] == list(stages)
    before, after = answer["stages"][1]["parameters"]["student"], answer["stages"][2]["parameters"]
    assert after["before"] == before > after["after"]
    # Of the text's 1250 estimated tokens one in ten is held out: one row.
    assert answer["stages"][3]["flops"]["total"] > 0
    assert not out.exists()


def test_the_command_prints_a_table_and_ends_with_zero_or_sixty_four(
    recipe: Callable[[str], ModuleType],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = recipe("plan")
    good = ["recipe=prune", EIGHT, "target=llama3.2_3b", *MAGNITUDES, f"out={tmp_path / 'x'}", "save=true"]
    for arguments, code in ((good, 0), (["recipe=prune", EIGHT, "target.hidden_size=7"], 64)):
        monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
        with pytest.raises(SystemExit) as ending:
            module.exit_with(module.main)
        assert ending.value.code == code
    printed = capsys.readouterr().out
    assert "3,212,749,824" in printed
    assert "assumed, not measured" in printed
    assert "no mistake was found" in printed
    saved = json.loads((tmp_path / "x" / "plan.json").read_text())
    assert saved["stages"][0]["parameters"]["after"] == PUBLISHED["meta-llama/Llama-3.2-3B"].num_parameters
    assert "mistake: out must be given" in printed
    assert "2 mistake(s)" in printed


def test_a_kept_plan_does_not_make_the_directory_a_strangers(plan: Planner, tmp_path: Path) -> None:
    overrides = ["recipe=prune", EIGHT, "target=llama3.2_1b", *MAGNITUDES, f"out={tmp_path / 'x'}", "save=true"]
    assert plan(*overrides) == plan(*overrides)
    assert plan(*overrides)["mistakes"] == []


ALIGNING = ["dialogues", "sft", "sample", "dpo", "reward", "rl", "average", "assess"]


@pytest.mark.parametrize("name", ["prepare", "prune", "distill", "evaluate", "report", "pipeline", *ALIGNING])
def test_no_recipe_has_a_setting_of_the_plans_own_name(name: str, recipe: Callable[[str], ModuleType]) -> None:
    schema = getattr(recipe(name), name.capitalize())
    assert {field.name for field in dataclasses.fields(schema)} & recipe("plan").OWN <= {"out"}


@pytest.mark.parametrize("wrong", ["num_gpus=0", "mfu=0", "mfu=1.5", "assume_sequence_length=0"])
def test_the_plans_own_settings_have_limits(
    wrong: str, recipe: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["plan.py", "recipe=prune", wrong])
    with pytest.raises(ValueError, match=wrong.partition("=")[0]):
        recipe("plan").main()


def pipeline(tmp_path: Path, stages: dict[str, tuple[str, list[str], list[str]]]) -> list[str]:
    """Arguments that plan a pipeline of these stages: recipe, overrides, and what each waits for."""
    file = tmp_path / "configs" / "pipeline" / "mine.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    entries = {name: {"recipe": r, "overrides": o, "after": a} for name, (r, o, a) in stages.items()}
    file.write_text("# @package _global_\n" + yaml.safe_dump({"stages": entries}))
    searched = f"hydra.searchpath=[file://{file.parent.parent}]"
    return ["recipe=pipeline", searched, "pipeline=mine", f"out={tmp_path / 'pipeline'}", "hardware=cpu"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A little corpus."""
    (tmp_path / "a.txt").write_text("text " * 1000)
    return tmp_path / "a.txt"


def test_stages_of_different_tokenizers_are_a_mistake_before_the_first_one_runs(
    plan: Planner, data: Path, text: Path, tmp_path: Path
) -> None:
    mine, other = model(tmp_path / "mine", data), model(tmp_path / "other", data)
    definition = storage.read_json(other / "tokenizer.json")
    definition["model"]["merges"] = definition["model"]["merges"][:-1]
    storage.write_json(other / "tokenizer.json", definition)
    out = tmp_path / "pipeline"

    def mistakes(tokenizer: Path) -> list[str]:
        stages = {
            "data": ("prepare", [f"source.path={text}", f"tokenizer.path={tokenizer}", "sequence_length=64"], []),
            "small": (
                "prune",
                [f"model.path={mine}", f"calibration.path={out}/data", "target.num_hidden_layers=1"],
                ["data"],
            ),
            "trained": (
                "distill",
                [f"student.path={out}/small", f"teachers.big.path={mine}", f"data.path={out}/data"],
                ["data", "small"],
            ),
        }
        found: list[str] = plan(*pipeline(tmp_path, stages))["mistakes"]
        return found

    assert mistakes(mine) == []
    wrong = mistakes(other)
    assert [mistake.partition(":")[0] for mistake in wrong] == ["stage small", "stage trained", "stage trained"]
    assert all("another tokenizer" in mistake for mistake in wrong)


def test_a_stage_that_does_not_wait_for_what_it_reads_is_a_mistake(plan: Planner, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "pipeline"
    shape = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    sizes = [f"student.shape.{name}={size}" for name, size in (shape | {"num_key_value_heads": 1}).items()]
    stages = {
        "data": ("prepare", [f"source.path={text}", "tokenizer.vocab_size=400", "sequence_length=64"], []),
        "trained": ("distill", [*sizes, f"data.path={out}/data"], []),
        "page": ("report", [f"runs.trained={out}/trained"], []),
    }
    wrong = plan(*pipeline(tmp_path, stages))["mistakes"]
    assert sorted(wrong, reverse=True) == [
        f"stage trained: data.path={out}/data is made by stage data, for which this stage does not wait: "
        "add it to after",
        f"stage page: runs.trained={out}/trained is made by stage trained, for which this stage does not wait: "
        "add it to after",
    ]


def test_a_mistake_in_one_stage_is_not_said_again_by_those_that_read_it(
    plan: Planner, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pipeline"
    stages = {
        "data": ("prepare", [f"source.path={text}", "sequence_length=1"], []),
        "small": (
            "prune",
            [EIGHT, f"calibration.path={out}/data", "target=llama3.2_1b", "target.head_dim=7"],
            ["data"],
        ),
        "checked": ("evaluate", [f"models.small.path={out}/small", f"data.path={out}/data"], ["data", "small"]),
    }
    wrong = plan(*pipeline(tmp_path, stages))["mistakes"]
    assert len(wrong) == 2, wrong
    assert wrong[0].startswith("stage data: sequence_length must be at least 2, got 1")
    assert wrong[1].startswith("stage small: target.head_dim must be even")


def test_a_stage_that_makes_no_model_cannot_be_pruned(plan: Planner, text: Path, tmp_path: Path) -> None:
    stages = {
        "data": ("prepare", [f"source.path={text}", "tokenizer.vocab_size=400", "sequence_length=64"], []),
        "small": ("prune", [f"model.path={tmp_path / 'pipeline'}/data", *MAGNITUDES], ["data"]),
    }
    (wrong,) = plan(*pipeline(tmp_path, stages))["mistakes"]
    assert wrong.endswith("pipeline/data: stage data makes no model")


def test_training_without_held_out_rows_is_a_mistake_unless_nothing_is_validated(
    plan: Planner, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pipeline"
    overrides = [f"source.path={text}", "tokenizer.vocab_size=400", "sequence_length=64", "validation.fraction=0"]
    shape = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    sizes = [f"student.shape.{name}={size}" for name, size in (shape | {"num_key_value_heads": 1}).items()]
    for rows, number in ((64, 1), (0, 0)):
        stages = {
            "data": ("prepare", overrides, []),
            "trained": ("distill", [*sizes, f"data.path={out}/data", f"validation_rows={rows}"], ["data"]),
        }
        wrong = plan(*pipeline(tmp_path, stages))["mistakes"]
        assert sum("has no held-out rows" in mistake for mistake in wrong) == len(wrong) == number


def test_a_pipeline_whose_paths_are_not_given_says_which(plan: Planner) -> None:
    wrong = plan("recipe=pipeline", "pipeline=llama3.2_1b")["mistakes"]
    assert wrong[0] == "out must be given"
    assert "inputs.corpus" in wrong[1]
    assert len(wrong) == 2


@pytest.mark.parametrize("name", ["llama3.2_1b", "llama3.2_3b"])
def test_the_published_pipelines_are_planned_before_anything_of_them_exists(
    plan: Planner, text: Path, tmp_path: Path, name: str
) -> None:
    answer = plan(
        "recipe=pipeline",
        f"pipeline={name}",
        "inputs.teacher=meta-llama/Llama-3.1-8B",
        f"inputs.corpus={text}",
        f"out={tmp_path / 'chain'}",
    )
    stages = {stage["stage"]: stage for stage in answer["stages"]}
    assert list(stages) == ["data", "pruned", "distilled", "evaluation", "report"]
    assert not [mistake for mistake in answer["mistakes"] if "GiB free" not in mistake]
    target = PUBLISHED[f"meta-llama/Llama-{name[5:8]}-{name[-2:].upper()}"]
    assert stages["distilled"]["parameters"]["student"] == target.num_parameters
    assert stages["distilled"]["memory_bytes"]["total"] < 80e9


def test_a_plan_for_slurm_counts_the_processes_that_each_stage_has_there(
    plan: Planner, text: Path, tmp_path: Path
) -> None:
    """All nodes train; pruning is one process, and evaluation shares one node."""
    answer = plan(
        "recipe=pipeline",
        "pipeline=llama3.2_1b",
        "launcher=slurm",
        "launcher.nodes=4",
        "launcher.gpus_per_node=4",
        "inputs.teacher=meta-llama/Llama-3.1-8B",
        f"inputs.corpus={text}",
        f"out={tmp_path / 'chain'}",
    )
    processes = {stage["stage"]: stage["processes"] for stage in answer["stages"]}
    assert processes == {"data": 1, "pruned": 1, "distilled": 16, "evaluation": 4, "report": 1}


def test_the_room_of_all_stages_together_must_be_there(
    plan: Planner, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = {name: ("prune", [EIGHT, "target=llama3.2_1b", *MAGNITUDES], []) for name in ("first", "second", "third")}
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5 * 2**30))
    wrong = plan(*pipeline(tmp_path, stages))["mistakes"]
    assert [mistake for mistake in wrong if "needs 6.9 GiB" in mistake and not mistake.startswith("stage")] == wrong


def test_pruning_for_a_gpu_node_is_not_held_to_the_memory_of_the_machine_that_plans(
    plan: Planner, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login node is smaller than what the stage runs on."""
    monkeypatch.setattr("os.sysconf", lambda name: 2**15)
    overrides = ["recipe=prune", bare_eight(tmp_path / "8b"), "target=llama3.2_1b"]
    overrides += [f"calibration.path={data}", f"out={tmp_path / 'x'}"]
    assert plan(*overrides)["mistakes"] == []
    assert "one process needs" in plan(*overrides, "hardware=cpu")["mistakes"][0]


def test_a_plan_that_only_just_fits_says_so(plan: Planner, data: Path, tmp_path: Path) -> None:
    answer = plan("recipe=evaluate", "model.path=meta-llama/Llama-3.1-8B", f"data.path={data}", f"out={tmp_path / 'x'}")
    assert not any("is close" in note for note in answer["stages"][0]["notes"])
    training = ["recipe=distill", "student.path=meta-llama/Llama-3.1-8B", f"data.path={data}", "deepspeed=zero2"]
    notes = plan(*training, "num_gpus=3", "micro_batch_rows=1", "global_batch_rows=6", f"out={tmp_path / 'y'}")[
        "stages"
    ][0]["notes"]
    assert any("is close: up to a third more" in note for note in notes)


def test_settings_that_the_engine_refuses_are_mistakes(plan: Planner, data: Path, tmp_path: Path) -> None:
    student = model(tmp_path / "s", data)
    overrides = ["recipe=distill", f"student.path={student}", f"data.path={data}", "num_gpus=1"]
    overrides += [f"out={tmp_path / 'x'}"]
    (wrong,) = plan(*overrides, "compile=true", "deepspeed=zero1")["mistakes"]
    assert wrong.startswith("compile=true does not go with deepspeed")
    assert plan(*overrides, "attention=flash_attention_2")["mistakes"] == []
    for other in ("hardware=cpu", "precision=float32"):
        (wrong,) = plan(*overrides, "attention=flash_attention_2", other)["mistakes"]
        assert wrong.startswith("attention=flash_attention_2 needs a GPU and precision=bfloat16")


def test_rows_longer_than_a_teachers_positions_are_a_mistake(plan: Planner, data: Path, tmp_path: Path) -> None:
    student, teacher = model(tmp_path / "s", data), model(tmp_path / "t", data, max_position_embeddings=32)
    wrong = plan(
        "recipe=distill",
        f"student.path={student}",
        f"teachers.big.path={teacher}",
        f"data.path={data}",
        "num_gpus=1",
        f"out={tmp_path / 'x'}",
    )["mistakes"]
    assert wrong == [f"the data's sequence_length 64 is more than teachers.big.path={teacher} can take: 32"]


def test_a_split_that_is_not_there_is_a_mistake(plan: Planner, data: Path, tmp_path: Path) -> None:
    small = model(tmp_path / "m", data)
    evaluation = ["recipe=evaluate", f"model.path={small}", f"data.path={data}", f"out={tmp_path / 'x'}"]
    pruning = ["recipe=prune", f"model.path={small}", f"calibration.path={data}", f"out={tmp_path / 'y'}"]
    for arguments in ([*evaluation, "data.split=test"], [*pruning, "calibration.split=test"]):
        (wrong,) = plan(*arguments)["mistakes"]
        assert "has no rows in split 'test'; it has train, validation" in wrong


def test_a_task_that_nobody_knows_is_a_mistake(
    plan: Planner, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same look at lm-eval's index that the recipe takes, which lasts half a minute."""

    def unknown(names: list[str], _: Path) -> None:
        raise ValueError(f"tasks has {names[0]!r}, which lm-eval does not know")

    monkeypatch.setattr("llamita.harness.task_manager", unknown)
    small = model(tmp_path / "m", data)
    answer = plan("recipe=evaluate", f"model.path={small}", "tasks=[nothing]", f"out={tmp_path / 'x'}")
    assert answer["mistakes"] == ["tasks has 'nothing', which lm-eval does not know"]


def test_an_empty_corpus_is_a_mistake(plan: Planner, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    wrong = plan(
        "recipe=prepare", f"source.path={tmp_path / 'empty.txt'}", "sequence_length=64", f"out={tmp_path / 'x'}"
    )["mistakes"]
    assert wrong == [f"source 'source': path={tmp_path / 'empty.txt'} is empty"]


def test_preparing_takes_the_time_of_encoding(plan: Planner, text: Path, tmp_path: Path) -> None:
    answer = plan("recipe=prepare", f"source.path={text}", "sequence_length=64", "num_proc=2", f"out={tmp_path / 'x'}")
    assert answer["stages"][0]["hours"] * 3600 == pytest.approx(5000 / 4 / 1.78e5 / 2, rel=0.01)


def test_what_the_recipe_itself_refuses_no_plan_calls_faultless(
    plan: Planner, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe's own check is asked at the end, so that the two cannot drift apart."""
    small = model(tmp_path / "m", data)

    def refuse(*_: object) -> None:
        raise ValueError("a reason that no plan knows")

    for name, function, overrides in (
        ("distill", "check", [f"student.path={small}"]),
        ("evaluate", "check", [f"model.path={small}"]),
        ("prune", "calibration", [f"model.path={small}"]),
    ):
        own = "calibration.path" if name == "prune" else "data.path"
        with monkeypatch.context() as patched:
            patched.setattr(sys.modules["_compose"].load(name), function, refuse)
            answer = plan(f"recipe={name}", *overrides, f"{own}={data}", f"out={tmp_path / 'x'}", "num_gpus=1")
        assert answer["mistakes"] == ["a reason that no plan knows"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "recipe must be given"),
        (["recipe=cash"], "recipe=cash: Invalid value 'cash', expected one of [prepare, prune"),
        (["recipe=prune", "hardware=b52"], "hardware=b52: Invalid value 'b52', expected one of [h100"),
    ],
)
def test_a_mistake_in_the_plans_own_settings_is_one_line(
    recipe: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
    with pytest.raises(ValueError, match=re.escape(expected)) as refused:
        recipe("plan").main()
    assert "\n" not in str(refused.value)


def test_help_names_the_plans_own_settings(
    recipe: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["plan.py", "--help"])
    recipe("plan").main()
    printed = capsys.readouterr().out
    assert "python recipes/plan.py recipe=" in printed
    assert "assume_sequence_length=" in printed
