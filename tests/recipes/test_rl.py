"""Learning from a model's own answers: by checks, by a reward model's interface, and by a teacher."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import preferred
from llamita import chat, checkpoints, runs
from llamita.adapters import LoraConfig, Projection
from llamita.align import reinforce, reward_model, verifiers, watch
from llamita.metrics import read_metrics
from llamita.precision import Precision


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, another that can teach it, and tasks whose answers shall be made of letters."""
    folder = tmp_path_factory.mktemp("rl")
    preferred.model(folder / "model")
    preferred.model(folder / "teacher", seed=5)
    split = {"train": (0, 8), "validation": (8, 12)}
    rows = {name: {"tasks": preferred.tasks(*ends, kind="letters")} for name, ends in split.items()}
    preferred.data(folder / "data", rows)
    return folder


def letters(answer: str) -> float:
    """Share of ASCII letters."""
    return sum(c.isascii() and c.isalpha() for c in answer) / max(1, len(answer))


@pytest.fixture(autouse=True)
def checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that these tests can be sure of, in the place of the real ones."""

    def validate(check: Mapping[str, Any]) -> None:
        if check.get("kind") != "letters":
            raise ValueError(f"check.kind must be one of letters, got {check.get('kind')!r}")

    monkeypatch.setattr(verifiers, "validate", validate)
    monkeypatch.setattr(verifiers, "check", lambda check, answer: letters(answer))


def settings(module: ModuleType, folder: Path, out: Path, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "model": module._aligning.ModelConfig(path=folder / "model"),
        "data": module._aligning.DataConfig(path=folder / "data"),
        "max_length": 64,
        "max_answer_tokens": 6,
        "num_generations": 4,
        "global_batch_rows": 16,
        "micro_batch_rows": 8,
        "steps": 3,
        "checkpoint_every": 2,
        "learning_rate": 3e-3,
        "out": out,
    }
    return module.Rl(**{**fields, **changes})


def test_groups_raise_a_reward_that_can_be_checked(
    recipe: Callable[[str], ModuleType], folder: Path, tmp_path: Path
) -> None:
    module, out = recipe("rl"), tmp_path / "out"
    module.run(settings(module, folder, out, steps=15, checkpoint_every=100))
    summary = runs.check_done(out)["summary"]
    rewards = [row["rl/reward"] for row in read_metrics(out) if "rl/reward" in row]
    assert len(rewards) == 15
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
    assert summary["val/held_out/reward"] > summary["before/val/held_out/reward"]
    assert 0 < summary["val/held_out/kl_to_start"] < math.inf
    assert type(AutoModelForCausalLM.from_pretrained(out)).__name__ == "LlamaForCausalLM"
    assert [row["step"] for row in read_metrics(out) if "val/held_out/reward" in row] == [0, 15]


@pytest.mark.parametrize("method", ["grpo", "rloo", "distill"])
def test_a_stopped_run_gives_the_bytes_of_one_that_was_not(
    method: str, recipe: Callable[[str], ModuleType], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is drawn goes on where it was, too; only once the run is over is the result there."""
    module = recipe("rl")
    more: dict[str, Any] = {"method": module.Method(method)}
    if method == "distill":
        more |= {"teacher": module.OtherModel(path=folder / "teacher"), "steps": 4, "num_generations": 1}
    for name in ("whole", "parts"):
        config = settings(module, folder, tmp_path / name, **more)
        if name == "parts":
            listen = watch.Watch.on_step_end

            def on_step_end(self: Any, args: Any, state: Any, control: Any, listen: Any = listen, **more: Any) -> None:
                if state.global_step == 1:
                    self.run.stop._flag.set()
                listen(self, args, state, control, **more)

            with monkeypatch.context() as patch:
                patch.setattr(watch.Watch, "on_step_end", on_step_end)
                with pytest.raises(runs.Stopped, match="stopped after step 1"):
                    module.run(config)
            assert not (tmp_path / name / "model.safetensors").exists()
        module.run(config)
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes() != (folder / "model/model.safetensors").read_bytes()
    if method == "distill":
        summary = runs.check_done(tmp_path / "parts")["summary"]
        assert summary["val/held_out/kl_to_teacher"] < summary["before/val/held_out/kl_to_teacher"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["grpo", "rloo", "distill"])
def test_an_embedding_that_is_trained_leaves_the_model_without_adapters_as_it_was(
    method: str,
    precision: str,
    recipe: Callable[[str], ModuleType],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which is the reference that a policy stays near to; in bfloat16 it rests beside a float32 embedding."""
    module, out = recipe("rl"), tmp_path / "out"
    more: dict[str, Any] = {"method": module.Method(method), "precision": Precision(precision), "learning_rate": 1e-2}
    taught = {"teacher": module.OtherModel(path=folder / "teacher"), "num_generations": 1}
    more |= taught if method == "distill" else {"kl_weight": 0.1}
    lora = LoraConfig(rank=2, embeddings=True, targets=[Projection.v_proj])
    ids = torch.arange(12)[None]
    logits: list[torch.Tensor] = []
    train = watch.train

    def trained(trainer: Any, listener: watch.Watch) -> dict[str, float]:
        found = train(trainer, listener)
        assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
        with torch.no_grad(), trainer.model.disable_adapter():
            logits.append(trainer.model.eval()(ids).logits)
        return found

    monkeypatch.setattr(watch, "train", trained)
    module.run(settings(module, folder, out, lora=lora, **more))
    start = checkpoints.load_model(folder / "model", dtype=checkpoints.dtype_named(precision))
    with torch.no_grad():
        assert torch.equal(logits[0].float(), start(ids).logits.float())
    if precision == "float32":
        before, after = (checkpoints.Weights(path) for path in (folder / "model", out))
        changed = {name for name in after.files if not torch.equal(before[name], after[name])}
        ends = {"model.embed_tokens.weight", "lm_head.weight"}
        assert changed == ends | {name for name in after.files if "v_proj" in name}
    if method != "distill":
        kl = [row["rl/kl"] for row in read_metrics(out) if "rl/kl" in row]
        assert kl[0] == pytest.approx(0, abs=1e-6 if precision == "float32" else 1e-2)
        assert kl[-1] > 10 * abs(kl[0])


@pytest.mark.parametrize("method", ["grpo", "rloo", "distill"])
def test_the_dropout_of_adapters_is_there_in_training(
    method: str, recipe: Callable[[str], ModuleType], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = recipe("rl")
    shares: set[float] = set()
    train = watch.train

    def trained(trainer: Any, listener: watch.Watch) -> dict[str, float]:
        shares.update(layer.p for layer in trainer.model.modules() if isinstance(layer, torch.nn.Dropout))
        return train(trainer, listener)

    monkeypatch.setattr(watch, "train", trained)
    more: dict[str, Any] = {"method": module.Method(method), "steps": 1}
    taught = {"teacher": module.OtherModel(path=folder / "teacher"), "num_generations": 1}
    more |= taught if method == "distill" else {}
    module.run(settings(module, folder, tmp_path / "out", lora=LoraConfig(rank=2, dropout=0.5), **more))
    assert shares == {0.5}


def test_prompts_are_the_encoders_own(recipe: Callable[[str], ModuleType], folder: Path) -> None:
    """For all trainers, special tokens in what a user says included; and so does the template that is published."""
    recipe("rl")
    ours = importlib.import_module("llamita.align.rl_trainers")
    encoder = chat.Encoder(checkpoints.load_tokenizer(folder / "model"))
    tokenizer = checkpoints.load_tokenizer(folder / "model")
    tokenizer.chat_template = chat.TEMPLATE
    messages = [list(task.prompt) for task in preferred.tasks(0, 3)]
    messages.append([{"role": "user", "content": f"a {chat.TURN_END} b"}])
    for kind in (ours.GroupTrainer, ours.LeaveOneOutTrainer, ours.OnPolicyTrainer):
        trainer = kind.__new__(kind)
        trainer.encoder = encoder
        assert trainer._tokenize_prompts(messages)[0] == [encoder.prompt(prompt) for prompt in messages]
    for prompt in messages[:3]:
        rendered = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        assert rendered == encoder.prompt(prompt)


def test_a_reward_that_is_no_number_names_the_task_and_the_answer(
    recipe: Callable[[str], ModuleType], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = recipe("rl")
    monkeypatch.setattr(verifiers, "check", lambda check, answer: math.nan)
    with pytest.raises(ValueError, match="the reward of task task-8 must be a finite number, got nan for '"):
        module.run(settings(module, folder, tmp_path / "held_out"))
    with pytest.raises(ValueError, match=r"the reward of task task-\d must be a finite number, got nan for '"):
        module.run(settings(module, folder, tmp_path / "out", validation_tasks=0))
    for value in (math.inf, None, "0.5"):
        with pytest.raises(ValueError, match=f"the reward of task task-0 must be a finite number, got {value!r} for"):
            reinforce.judged(lambda *_, value=value: [value], preferred.tasks(0, 1), ["a" * 100])
    with pytest.raises(ValueError, match="1 answers were to be judged, 2 rewards came back"):
        reinforce.judged(lambda *_: [0.0, 1.0], preferred.tasks(0, 1), ["a"])


def test_a_reward_model_is_asked_where_there_is_one(
    recipe: Callable[[str], ModuleType], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its interface alone: prompts with answers, and the names of the tasks."""
    module = recipe("rl")
    asked: list[Any] = []

    class RewardModel:
        @classmethod
        def open(cls, path: Path, **_: Any) -> RewardModel:
            assert path == folder / "teacher"
            return cls()

        def score(self, dialogues: Any, names: Any, **_: Any) -> list[float]:
            asked.extend(zip(names, dialogues, strict=True))
            return [letters(answer) for _, answer in dialogues]

    monkeypatch.setattr(reward_model, "RewardModel", RewardModel)
    monkeypatch.setattr(reward_model, "load_config", lambda path: None)
    config = settings(module, folder, tmp_path / "out", steps=1, reward=module.OtherModel(path=folder / "teacher"))
    module.run(config)
    assert {name for name, _ in asked[:4]} == {f"task-{number}" for number in range(8, 12)}
    assert asked[0][1][0] == preferred.asked(8)
    assert runs.check_done(tmp_path / "out")["parents"].keys() == {
        "model",
        "tokenizer",
        "reward",
        "reward/tokenizer",
        "data",
    }


def test_the_divergence_is_that_of_dense_distributions(folder: Path) -> None:
    encoder = chat.Encoder(checkpoints.load_tokenizer(folder / "model"))
    models = [checkpoints.load_model(folder / name) for name in ("model", "teacher")]
    prompts = reinforce.encode(preferred.tasks(0, 3), encoder, most=60, name="tasks")
    torch.manual_seed(0)
    said = reinforce.answers(models[0], prompts, encoder, most=5, batch=2, temperature=1.0)
    assert all(1 <= len(row) <= 5 for row in said)
    total, count = 0.0, 0
    for prompt, answer in zip(prompts.ids, said, strict=True):
        with torch.no_grad():
            p, q = (m.double()(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1) for m in models)
        for place in range(len(prompt) - 1, len(prompt) + len(answer) - 1):
            total += (p[place].exp() * (p[place] - q[place])).sum().item()
            count += 1
    got = reinforce.divergence(*models, prompts, said, dtype=torch.float32)
    assert got == pytest.approx(total / count, rel=1e-9)
    assert reinforce.divergence(models[0], models[0], prompts, said, dtype=torch.float32) == 0


@pytest.mark.parametrize("rank", [0, 2])
def test_trl_and_vllm_find_the_model_where_it_lies(
    rank: int, recipe: Callable[[str], ModuleType], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL starts vLLM with the model's name."""
    module = recipe("rl")

    def trained(trainer: Any, listener: watch.Watch) -> None:
        model = trainer.model
        raise InterruptedError(f"{model.name_or_path} {model.config._name_or_path}")

    monkeypatch.setattr(watch, "train", trained)
    config = settings(module, folder, tmp_path / "out", lora=LoraConfig(rank=rank), validation_tasks=0)
    with pytest.raises(InterruptedError) as told:
        module.run(config)
    assert str(told.value) == f"{folder / 'model'} {folder / 'model'}"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["grpo", "distill"])
def test_held_out_answers_are_drawn_in_one_arithmetic_before_and_after(
    method: str,
    precision: str,
    recipe: Callable[[str], ModuleType],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, answers = recipe("rl"), reinforce.answers
    seen: list[bool] = []

    def answered(*given: Any, **more: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return answers(*given, **more)

    monkeypatch.setattr(reinforce, "answers", answered)
    more: dict[str, Any] = {"method": module.Method(method), "precision": Precision(precision), "steps": 1}
    taught = {"teacher": module.OtherModel(path=folder / "teacher"), "num_generations": 1}
    more |= taught if method == "distill" else {}
    module.run(settings(module, folder, tmp_path / "out", **more))
    assert seen == [precision == "bfloat16"] * 3


def test_the_likeliest_answer_does_not_depend_on_the_batch(folder: Path) -> None:
    encoder = chat.Encoder(checkpoints.load_tokenizer(folder / "model"))
    model = checkpoints.load_model(folder / "model")
    prompts = reinforce.encode(preferred.tasks(0, 5), encoder, most=60, name="tasks")
    alone, together = (reinforce.answers(model, prompts, encoder, most=5, batch=batch) for batch in (1, 5))
    assert alone == together


def test_what_cannot_be_is_said_before_anything_is_written(
    recipe: Callable[[str], ModuleType], folder: Path, tmp_path: Path
) -> None:
    module, out = recipe("rl"), tmp_path / "out"
    other = module.OtherModel(path=folder / "teacher")
    distill = {"method": module.Method.distill, "teacher": other, "num_generations": 1}
    for changes, message in (
        ({"num_generations": 3}, "num_generations must be at least 2 and divide global_batch_rows=16, got 3"),
        ({"num_generations": 1}, "num_generations must be at least 2"),
        ({"max_answer_tokens": 64}, r"max_answer_tokens must be in 1\.\.63"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"kl_weight": -1.0}, "kl_weight must be >= 0"),
        ({"teacher": other}, "method=grpo: distill needs it, alone"),
        ({"method": module.Method.distill}, r"teacher\.path=None and method=distill"),
        ({**distill, "kl_weight": 0.1}, "method=distill reads no reward"),
        ({**distill, "temperature": 0.7}, "temperature must be 1 with method=distill, got 0.7"),
        ({**distill, "num_generations": 4}, "num_generations must be 1 with method=distill, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(module, folder, out, **changes)
    with pytest.raises(ValueError, match=r"trainer\.epsilonn=1: GRPOConfig of TRL has no such setting"):
        module.run(settings(module, folder, out, trainer={"epsilonn": 1}))
    with pytest.raises(ValueError, match="max_length leaves 4 tokens for a prompt, too few for all 8 tasks"):
        module.run(settings(module, folder, out, max_length=10))
    preferred.data(tmp_path / "unknown", {"train": {"tasks": preferred.tasks(0, 2, kind="magic")}})
    config = settings(module, folder, out, validation_tasks=0, global_batch_rows=8)
    config.data.path = tmp_path / "unknown"
    with pytest.raises(ValueError, match=r"task task-0: check\.kind must be one of letters, got 'magic'"):
        module.run(config)
    preferred.data(tmp_path / "none", {"train": {"tasks": preferred.tasks(0, 2)}})
    config.data.path = tmp_path / "none"
    with pytest.raises(ValueError, match=r"task task-0 has no check: reward\.path must be given"):
        module.run(config)
    assert not out.exists()
