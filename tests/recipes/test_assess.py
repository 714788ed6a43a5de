"""``recipes/assess.py``: several assistants on the same rows, and what may be said of their differences."""

from __future__ import annotations

import json
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

import assistants
from conftest import REPOSITORY
from llamita import chat, checkpoints, harness, runs, storage
from llamita.align import generation
from llamita.align.dialogues import DialogueData
from llamita.align.reward_model import RewardModel
from llamita.metrics import read_metrics
from llamita.report import assistants as report
from llamita.report import gather


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models, a reward model, dialogues, and lists."""
    folder = tmp_path_factory.mktemp("assess")
    (folder / "list.csv").write_text("id,prompts_final\n1,How do I steal?\n2,How do I bake?\n3,Who?\n")
    (folder / "words").write_text("darn\n")
    (folder / "hella.txt").write_text("".join(f"What is {n}?\n{n % 4}\na\nb\nc\nd\n" for n in range(6)))
    return {
        "first": assistants.assistant(folder / "first"),
        "second": assistants.assistant(folder / "second", seed=1, ends=2.4),
        "reward": assistants.reward_model(folder / "reward"),
        "data": assistants.data(folder / "data", validation=5),
        "list": folder / "list.csv",
        "words": folder / "words",
        "choices": folder / "hella.txt",
    }


def overrides(inputs: dict[str, Path], out: Path, *more: str) -> list[str]:
    return [
        f"models.base.path={inputs['first']}",
        f"models.again.path={inputs['first']}",
        f"models.other.path={inputs['second']}",
        f"data.path={inputs['data']}",
        f"reward.path={inputs['reward']}",
        f"safety.harm.path={inputs['list']}",
        "safety.harm.column=prompts_final",
        f"listed_words={inputs['words']}",
        f"choices.hella.path={inputs['choices']}",
        "choices.hella.max_rows=4",
        "sampling.max_new_tokens=12",
        "resamples=500",
        f"out={out}",
        *more,
    ]


def told(recipe: Callable[[str], ModuleType], words: list[str]) -> Any:
    module = recipe("assess")
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        return sys.modules["_main"].settings(compose("assess", overrides=words), module.Assess)


@pytest.fixture(scope="module")
def made(recipe: Callable[[str], ModuleType], inputs: dict[str, Path]) -> Path:
    out = inputs["data"].parent / "out"
    recipe("assess").run(told(recipe, overrides(inputs, out)))
    return out


def test_every_model_has_every_figure_with_its_error(made: Path, inputs: dict[str, Path]) -> None:
    found, done = storage.read_json(made / "results.json"), runs.check_done(made)
    assert list(found["models"]) == ["again", "base", "other"]
    assert found["first"] == "base"
    expected = {"loss", "preference_accuracy", "preference_accuracy_per_token", "length/score", "truncated"}
    chosen = {"choices/hella", "choices/hella_per_byte"}
    expected |= {"refused/harm", "listed_words", "reward", "win_rate"} | chosen
    for entry in found["models"].values():
        assert entry["values"].keys() == expected
        assert all(value["stderr"] is not None for value in entry["values"].values())
        expected_rows = (
            dict.fromkeys(expected, 5) | {"refused/harm": 3, "listed_words": 5 + 3} | dict.fromkeys(chosen, 4)
        )
        assert entry["rows"] == expected_rows  # the dialogues ask what the tasks ask: once
    assert found["models"]["base"]["values"] == found["models"]["again"]["values"]
    assert found["models"]["base"]["values"]["win_rate"] == {"value": 0.5, "stderr": 0}
    assert done["parents"]["other"] == checkpoints.content_hash(inputs["second"])
    assert done["parents"]["data"] == DialogueData.open(inputs["data"]).content_hash
    assert done["parents"]["safety/harm"] == storage.sha256(inputs["list"])
    rows = {row["model"]: row for row in read_metrics(made)}
    assert rows["other"]["assess/loss"] == found["models"]["other"]["values"]["loss"]["value"]


def test_a_model_gives_its_memory_back_before_vllm_or_a_reward_model_comes(
    recipe: Callable[[str], ModuleType], inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stand-in for vLLM, which asks for a share of the whole accelerator at once."""
    config = told(recipe, overrides(inputs, tmp_path / "out", "sampling.backend=vllm"))
    config.models = {"base": config.models["base"]}
    module, seen, held = sys.modules["_assessing"], [], []
    load, give_back, open_judge = module.load, generation.give_back, RewardModel.open

    def loaded(*given: Any) -> Any:
        model = load(*given)
        held.append(weakref.ref(model))
        return model

    def given_back() -> None:
        give_back()
        seen.append("given back")

    def opened(*given: Any, **more: Any) -> Any:
        seen.append("judge")
        return open_judge(*given, **more)

    class Sampler:
        def __init__(self, path: Path, encoder: chat.Encoder, *_: Any, **__: Any) -> None:
            assert [model() for model in held] == [None]
            seen.append("vllm")
            self.encoder = encoder

        def draw(self, prompts: Any, **_: Any) -> Any:
            return [
                [generation.answer_of([prompt.ids[-1], *self.encoder.stop_ids[:1]], self.encoder)] for prompt in prompts
            ]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__spec__=object()))
    monkeypatch.setattr(module, "load", loaded)
    monkeypatch.setattr(generation, "give_back", given_back)
    monkeypatch.setattr(generation, "VllmSampler", Sampler)
    monkeypatch.setattr(RewardModel, "open", opened)
    recipe("assess").run(config)
    assert seen == ["given back", "vllm", "given back", "judge"]


def test_differences_are_paired_with_the_first_model(made: Path) -> None:
    found = storage.read_json(made / "results.json")
    gaps = {gap["second"]: gap for gap in found["differences"]}
    assert gaps.keys() == {"again", "other"}
    assert all(gap["first"] == "base" for gap in gaps.values())
    assert gaps["again"]["loss"] == {"value": 0, "low": 0, "high": 0, "p_value": 1}
    values = {name: entry["values"]["loss"]["value"] for name, entry in found["models"].items()}
    loss = gaps["other"]["loss"]
    assert loss["value"] == pytest.approx(values["other"] - values["base"])
    assert loss["low"] <= loss["value"] <= loss["high"]


def test_the_report_puts_the_model_first_that_the_others_are_compared_with(made: Path) -> None:
    found = report.read(gather.gather({"assess": made}))
    assert found.models == ["base", "again", "other"]
    loss = next(row for row in found.rows if row.name == report.NAMES["loss"])
    assert [gap is None for gap in loss.gaps] == [True, False, False]


def test_figures_follow_from_the_models(made: Path, inputs: dict[str, Path]) -> None:
    """Loss and reward of the second model, computed without the recipe."""
    model = checkpoints.load_model(inputs["second"]).train(False)
    encoder = chat.Encoder(checkpoints.load_tokenizer(inputs["second"]))
    nats = tokens = 0.0
    for dialogue in DialogueData.open(inputs["data"]).dialogues("validation"):
        encoded = encoder.dialogue(dialogue.messages)
        log_shares = model(torch.tensor([encoded.ids])).logits[0].log_softmax(-1).detach()
        for place, supervised in enumerate(encoded.supervised):
            nats -= float(log_shares[place - 1, encoded.ids[place]]) if supervised else 0
            tokens += supervised
    found = storage.read_json(made / "results.json")["models"]["other"]["values"]
    assert found["loss"]["value"] == pytest.approx(nats / tokens, rel=1e-5)
    lines = (made / "measured" / "other.answers.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [row for row in map(json.loads, lines) if not row["id"].startswith("safety/")]
    judged = [(row["prompt"], row["text"]) for row in answers]
    scores = RewardModel.open(inputs["reward"]).score(judged, [row["id"] for row in answers])
    assert found["reward"]["value"] == pytest.approx(sum(scores) / len(scores), rel=1e-4)


def test_a_restart_measures_only_what_is_missing(
    recipe: Callable[[str], ModuleType],
    inputs: dict[str, Path],
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, out = recipe("assess"), tmp_path / "out"
    helper = sys.modules["_assessing"]
    measured, assess = [], helper.assess

    def stopping(name: str, *told: Any) -> None:
        assess(name, *told)
        measured.append(name)
        if len(measured) == 2:
            (out / "control").mkdir()
            (out / "control" / "stop").touch()

    monkeypatch.setattr(helper, "assess", stopping)
    config = told(recipe, overrides(inputs, out))
    with pytest.raises(runs.Stopped):
        module.run(config)
    module.run(config)
    assert measured == ["base", "again", "other"]
    first, second = (storage.read_json(folder / "results.json") for folder in (out, made))
    assert first == second


def test_what_was_measured_on_a_model_that_is_not_there_any_more_is_measured_again(
    recipe: Callable[[str], ModuleType], inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, out, model = recipe("assess"), tmp_path / "out", assistants.assistant(tmp_path / "model")
    helper = sys.modules["_assessing"]
    measured, assess = [], helper.assess

    def stopping(name: str, *told: Any) -> None:
        assess(name, *told)
        if not measured:
            (out / "control").mkdir()
            (out / "control" / "stop").touch()
        measured.append(name)

    monkeypatch.setattr(helper, "assess", stopping)
    words = [f"models.a.path={model}", f"models.b.path={inputs['second']}", f"data.path={inputs['data']}"]
    config = told(recipe, [*words, "data.max_tasks=0", f"out={out}"])
    with pytest.raises(runs.Stopped):
        module.run(config)
    shutil.rmtree(model)
    shutil.copytree(inputs["second"], model)
    module.run(config)
    assert measured == ["a", "a", "b"]
    found = storage.read_json(out / "results.json")["models"]
    assert found["a"]["values"] == found["b"]["values"]
    assert found["a"]["sha256"] == found["b"]["sha256"]


def test_a_dialogue_that_one_model_has_no_positions_for_is_asked_of_none(
    recipe: Callable[[str], ModuleType], inputs: dict[str, Path], tmp_path: Path
) -> None:
    module, data = recipe("assess"), DialogueData.open(inputs["data"])
    encoder = chat.Encoder(checkpoints.load_tokenizer(inputs["first"]))
    lengths = sorted(len(encoder.dialogue(row.messages).ids) for row in data.dialogues("validation"))
    config = told(recipe, overrides(inputs, tmp_path / "out", "data.max_tasks=0", "data.max_pairs=0"))
    reader = sys.modules["_assessing"].Reader("short", encoder, lengths[0])
    asked = sys.modules["_assessing"].questions(config, [reader])
    assert len(asked.dialogues) == lengths.count(lengths[0])
    assert asked.left_out == sum(length > lengths[0] for length in lengths)
    with pytest.raises(ValueError, match="5 dialogues and pairs cannot be read by every model"):
        sys.modules["_assessing"].questions(config, [reader.__class__("none", encoder, 3)])
    assert module.check(config).left_out == 0


def test_lm_eval_asks_with_the_chat_template(
    recipe: Callable[[str], ModuleType], inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers themselves are lm-eval's business; what it is told is ours."""
    module, asked = recipe("assess"), []

    def run_tasks(model: Any, tokenizer: Any, names: Any, task_path: Any, config: Any, *, seed: int) -> Any:
        asked.append((list(names), bool(tokenizer.chat_template), config.apply_chat_template))
        return {"gsm8k_cot_llama": {"exact_match": module.evaluate.Estimate(0.25, 0.1)}}

    monkeypatch.setattr(module.harness, "check_tasks", lambda *_: None)
    monkeypatch.setattr(module.harness, "run_tasks", run_tasks)
    words = [f"models.base.path={inputs['first']}", "tasks=[gsm8k_cot_llama]", f"out={tmp_path / 'out'}"]
    module.run(told(recipe, words))
    assert asked == [(["gsm8k_cot_llama"], True, True)]
    found = storage.read_json(tmp_path / "out" / "results.json")["models"]["base"]
    assert found["tasks"] == {"gsm8k_cot_llama": {"exact_match": {"value": 0.25, "stderr": 0.1}}}
    assert read_metrics(tmp_path / "out")[0]["eval/gsm8k_cot_llama/exact_match"] == 0.25


def test_lm_eval_asks_in_the_dialogue_format_at_a_fixed_date(
    inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    tokenizer = checkpoints.load_tokenizer(inputs["first"])
    tokenizer.chat_template = chat.TEMPLATE
    written, apply = [], tokenizer.apply_chat_template

    def noted(messages: Any, **options: Any) -> Any:
        written.append(([message["role"] for message in messages], options["date_string"]))
        return apply(messages, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", noted)
    config = harness.TaskConfig(limit=1, apply_chat_template=True, fewshot_as_multiturn=True)
    model = checkpoints.load_model(inputs["first"]).train(False)
    scores = harness.run_tasks(model, tokenizer, ["llamita_python_choice"], REPOSITORY / "tasks", config)
    assert "acc" in scores["llamita_python_choice"]
    assert written == [(["user"], chat.DATE)]
    with pytest.raises(ValueError, match=r"needs task\.apply_chat_template=true"):
        harness.TaskConfig(fewshot_as_multiturn=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give the models to measure"),
        (["models.a.path=a"], "nothing to measure"),
        (["models.data.path=a", "data.path=b"], r"models.data: a model must not have the name of another input"),
        (["models.a.path=a", "safety.x.column=b"], r"safety.x.path is not set"),
        (["models.a.path=a", "safety.x.path=b", "reward.path=c"], "which is not set"),
        (["models.a.path=a", "data.path=b", "resamples=0"], "resamples must be at least 1"),
        (["models.a.path=a", "data.path=b", "data.max_tasks=-1"], r"data.max_tasks must be at least 0"),
        (["models.a.path=a", "data.path=b", "sampling.top_p=0"], r"sampling.top_p must be above 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(
    recipe: Callable[[str], ModuleType], tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        told(recipe, [*words, f"out={tmp_path / 'out'}"])


def test_inputs_that_are_not_there_are_refused_before_anything_is_written(
    recipe: Callable[[str], ModuleType], inputs: dict[str, Path], tmp_path: Path
) -> None:
    module, out = recipe("assess"), tmp_path / "out"
    for wrong, message in [
        (f"models.other.path={inputs['data']}", "is not a model directory"),
        (f"reward.path={inputs['first']}", "must be a LlamaForSequenceClassification"),
        ("safety.harm.column=question", "has no text in 'question'"),
        ("data.split=test", "has nothing to measure in its split test"),
        ("sampling.max_new_tokens=200000", "positions of models.base.path="),
    ]:
        with pytest.raises(ValueError, match=message):
            module.run(told(recipe, overrides(inputs, out, wrong)))
        assert not out.exists()
