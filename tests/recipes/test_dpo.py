"""Direct preference optimisation: its loss against a dense one in float64, and the run from settings to directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import preferred
from llamita import chat, checkpoints, faults, runs, storage
from llamita.adapters import LoraConfig, Projection
from llamita.align import preferences, watch
from llamita.distill import launch
from llamita.metrics import read_metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and ten pairs to train on with six held out."""
    folder = tmp_path_factory.mktemp("dpo")
    preferred.model(folder / "model")
    preferred.data(folder / "data")
    return folder


def settings(module: ModuleType, folder: Path, out: Path, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "model": module._aligning.ModelConfig(path=folder / "model"),
        "data": module._aligning.DataConfig(path=folder / "data"),
        "max_length": 128,
        "global_batch_rows": 10,
        "micro_batch_rows": 5,
        "steps": 4,
        "checkpoint_every": 2,
        "learning_rate": 3e-3,
        "out": out,
    }
    return module.Dpo(**{**fields, **changes})


def oracle(folder: Path, beta: float, nll_weight: float, *, moved: float) -> tuple[float, float]:
    """Loss of all ten pairs and norm of its gradient, by dense log-softmax in float64.

    ``moved``: the reference's head is the policy's times so much, so that the margin is not zero.
    """
    model = checkpoints.load_model(folder / "model", dtype=torch.float64)
    other = checkpoints.load_model(folder / "model", dtype=torch.float64)
    other.lm_head.weight.data *= moved
    encoder = chat.Encoder(checkpoints.load_tokenizer(folder / "model"))

    def said(net: Any, pair: Any, answer: Any) -> tuple[torch.Tensor, int]:
        prompt, said_ids = encoder.answer(pair.prompt, answer)
        ids = torch.tensor([[*prompt, *said_ids[:-1]]])
        logs = net(ids).logits[0].log_softmax(-1)
        places = range(len(prompt), ids.shape[1])
        return torch.stack([logs[place - 1, ids[0, place]] for place in places]).sum(), len(places)

    total = torch.zeros((), dtype=torch.float64)
    for pair in preferred.pairs(0, 10):
        (won, length), (lost, _) = said(model, pair, pair.chosen), said(model, pair, pair.rejected)
        with torch.no_grad():
            base = said(other, pair, pair.chosen)[0] - said(other, pair, pair.rejected)[0]
        total = total - torch.nn.functional.logsigmoid(beta * (won - lost - base)) - nll_weight * won / length
    (total / 10).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return (total / 10).item(), norm.item()


def first_row(out: Path) -> dict[str, Any]:
    return next(row for row in read_metrics(out) if "train/loss" in row)


@pytest.mark.parametrize("micro", [1, 2, 5, 10])
def test_loss_and_gradient_are_those_of_a_dense_float64_loss_for_every_split(
    micro: int, recipe: Callable[[str], ModuleType], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is moved away from the policy: at the first step of a run both are the same."""
    module = recipe("dpo")
    encoder = chat.Encoder(checkpoints.load_tokenizer(folder / "model"))
    collate = preferences.Collator(encoder.borders.pad_id, tuple(encoder.stop_ids))
    other = checkpoints.load_model(folder / "model", dtype=torch.float32)
    other.lm_head.weight.data *= 0.5
    preferences.with_fused_head(other)
    rows = preferences.encode(preferred.pairs(0, 10), encoder, max_length=128, name="pairs")
    say = preferences.log_probabilities
    table = preferences.measured(other, rows, collate, say, batch=3, dtype=torch.float32)
    monkeypatch.setattr(watch, "measured_once", lambda *_: table)
    config = settings(module, folder, tmp_path / "out", micro_batch_rows=micro, steps=1, validation_pairs=0)
    module.run(config)
    row = first_row(tmp_path / "out")
    loss, norm = oracle(folder, config.beta, config.nll_weight, moved=0.5)
    assert row["train/loss"] == pytest.approx(loss, rel=1e-5)
    assert row["optim/grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.fixture(scope="module")
def finished(recipe: Callable[[str], ModuleType], folder: Path) -> Path:
    """Four steps without a stop."""
    out = folder / "finished"
    recipe("dpo").run(settings(recipe("dpo"), folder, out, steps=8))
    return out


def test_held_out_answers_that_are_preferred_come_ahead(finished: Path) -> None:
    summary = runs.check_done(finished)["summary"]
    assert summary["before/val/held_out/dpo_margin"] == 0
    assert summary["before/val/held_out/logp_accuracy"] <= 0.5
    for name in ("dpo", "logp"):
        assert summary[f"val/held_out/{name}_accuracy"] == 1
        assert summary[f"val/held_out/{name}_margin"] > 0
    steps = [row["step"] for row in read_metrics(finished) if "val/held_out/dpo_accuracy" in row]
    assert steps == [0, 8]


def test_the_result_is_a_stock_model_that_ends_its_turns(finished: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished)
    tokenizer = AutoTokenizer.from_pretrained(finished)
    assert type(model).__name__ == "LlamaForCausalLM"
    messages = [*preferred.asked(0), preferred.said("birds")]
    encoder = chat.Encoder(checkpoints.load_tokenizer(folder / "model"))
    assert tokenizer.apply_chat_template(messages)["input_ids"] == encoder.dialogue(messages).ids
    assert GenerationConfig.from_pretrained(finished).eos_token_id == encoder.stop_ids
    before, after = (storage.read_json(path / "config.json") for path in (folder / "model", finished))
    assert before == after
    provenance = storage.read_json(finished / "llamita.json")
    assert provenance["parents"]["model"]["sha256"] == checkpoints.content_hash(folder / "model")
    assert provenance["parents"]["tokenizer"] == {
        "path": str(folder / "model"),
        "sha256": checkpoints.dialogue_hash(folder / "model"),
    }
    assert provenance["settings"]["beta"] == 0.1
    assert not {p.name for p in finished.glob("*.safetensors")} - {"model.safetensors"}


def stop_after(step: int, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask the run to stop when it logs that step."""
    listen = watch.Watch.on_log

    def on_log(self: Any, args: Any, state: Any, *rest: Any, **more: Any) -> None:
        listen(self, args, state, *rest, **more)
        if state.global_step == step:
            (out / "control").mkdir(exist_ok=True)
            (out / "control/stop").touch()

    monkeypatch.setattr(watch.Watch, "on_log", on_log)


def test_a_run_that_was_stopped_and_killed_gives_the_bytes_of_one_that_was_not(
    recipe: Callable[[str], ModuleType], folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a pass, with a half-written checkpoint of a later step left behind."""
    module, out = recipe("dpo"), tmp_path / "out"
    config = settings(module, folder, out, steps=8)
    with monkeypatch.context() as patch:
        stop_after(2, out, patch)
        with pytest.raises(runs.Stopped, match="stopped after step 3 of 8"):
            module.run(config)
    assert watch.steps_in(out / "checkpoints") == [2, 3]
    assert not (out / "DONE.json").exists()
    (out / "checkpoints/checkpoint-5").mkdir()
    module.run(config)
    assert (out / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    rows, whole = ([row for row in read_metrics(path) if "train/loss" in row] for path in (out, finished))
    assert [(row["step"], row["train/loss"]) for row in rows] == [(row["step"], row["train/loss"]) for row in whole]
    assert watch.steps_in(out / "checkpoints") == [6, 8]


def test_a_crash_while_a_checkpoint_is_written_loses_that_one_alone(
    recipe: Callable[[str], ModuleType],
    folder: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second checkpoint of the run; the first stays, and the result is that of a run without a crash."""
    module, out = recipe("dpo"), tmp_path / "out"
    config = settings(module, folder, out, steps=8)
    seen: list[str] = []

    def crash(name: str) -> None:
        seen.append(name)
        if name == "before_manifest" and seen.count(name) == 2:
            raise RuntimeError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(faults, "crash_point", crash)
        with pytest.raises(RuntimeError, match="the power went"):
            module.run(config)
    whole = {step: (out / f"checkpoints/checkpoint-{step}/MANIFEST.json").exists() for step in (2, 4)}
    assert whole == {2: True, 4: False}
    module.run(config)
    assert (out / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def stopped(module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a model and pairs in ``folder``, stop a run there behind its first step, and return its settings."""
    preferred.model(folder / "model")
    preferred.data(folder / "data")
    config = settings(module, folder, folder / "out")
    with monkeypatch.context() as patch:
        stop_after(1, folder / "out", patch)
        with pytest.raises(runs.Stopped):
            module.run(config)
    return config


def test_a_checkpoint_of_another_model_is_not_gone_on_with(
    recipe: Callable[[str], ModuleType], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = recipe("dpo")
    config = stopped(module, tmp_path, monkeypatch)
    preferred.model(tmp_path / "model", seed=1)
    with pytest.raises(ValueError, match=r"checkpoint-2 was trained from another model \(.*model\) than is there now"):
        module.run(config)


def template(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{# as before #}" + chat.TEMPLATE)


def ends(model: Path) -> None:
    tokenizer = checkpoints.load_tokenizer(model)
    tokenizer.eos_token = chat.MESSAGE_END
    tokenizer.save_pretrained(model)


def words(model: Path) -> None:
    definition = storage.read_mapping(model / "tokenizer.json")
    storage.write_json(model / "tokenizer.json", definition | {"normalizer": {"type": "Lowercase"}})


@pytest.mark.parametrize("edit", [template, ends, words])
def test_a_checkpoint_is_not_gone_on_with_in_other_tokens(
    edit: Callable[[Path], None],
    recipe: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The weights are the same; the tokenizer's files, or the template beside them, were edited."""
    module = recipe("dpo")
    config = stopped(module, tmp_path, monkeypatch)
    before = checkpoints.content_hash(tmp_path / "model")
    reference = (config.out / "reference/train.safetensors").read_bytes()
    edit(tmp_path / "model")
    assert checkpoints.content_hash(tmp_path / "model") == before
    with pytest.raises(
        ValueError, match=r"was trained from another tokenizer \(.*model\) than is there now: put it back"
    ):
        module.run(config)
    assert (config.out / "reference/train.safetensors").read_bytes() == reference


def test_steps_without_a_finite_gradient_end_the_run_and_never_reach_the_weights(
    recipe: Callable[[str], ModuleType], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamita.align.dpo_trainer import PairTrainer

    module, out = recipe("dpo"), tmp_path / "out"
    loss = PairTrainer._compute_loss

    def broken(self: Any, *rest: Any) -> Any:
        return loss(self, *rest) * (float("nan") if self.state.global_step in (1, 3, 4) else 1.0)

    monkeypatch.setattr(PairTrainer, "_compute_loss", broken)
    config = settings(module, folder, out, steps=6, checkpoint_every=1, max_skipped_in_a_row=2, log_every=1)
    with pytest.raises(ValueError, match=r"2 steps in a row had no finite loss.*step 5 with the rows pair-"):
        module.run(config)
    assert not (out / "model.safetensors").exists()
    weights = [checkpoints.load_model(out / f"checkpoints/checkpoint-{step}") for step in (3, 4)]
    pairs_of = zip(*(model.parameters() for model in weights), strict=True)
    assert all(torch.equal(one, other) and torch.isfinite(one).all() for one, other in pairs_of)
    assert [row["optim/skipped_steps"] for row in read_metrics(out) if "optim/lr" in row] == [0, 1, 1, 2]


def test_adapters_end_in_a_stock_llama_of_which_only_the_projections_moved(
    recipe: Callable[[str], ModuleType], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, out = recipe("dpo"), tmp_path / "out"
    config = settings(module, folder, out, lora=LoraConfig(rank=2), learning_rate=1e-2)
    with monkeypatch.context() as patch:
        stop_after(1, out, patch)
        with pytest.raises(runs.Stopped):
            module.run(config)
    module.run(dataclasses.replace(config, micro_batch_rows=2))  # what is learnt does not depend on it
    before, after = (checkpoints.load_model(path).state_dict() for path in (folder / "model", out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 14
    assert all("proj" in name for name in changed)
    summary = runs.check_done(out)["summary"]
    assert summary["val/held_out/dpo_margin"] > 0


def test_the_dropout_of_adapters_is_there_in_training_and_goes_on_where_it_was(
    recipe: Callable[[str], ModuleType], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = recipe("dpo")
    shares: set[float] = set()
    train = watch.train

    def trained(trainer: Any, listener: watch.Watch) -> dict[str, float]:
        shares.update(layer.p for layer in trainer.model.modules() if isinstance(layer, torch.nn.Dropout))
        return train(trainer, listener)

    monkeypatch.setattr(watch, "train", trained)
    lora = LoraConfig(rank=2, dropout=0.5)
    for name, dropout in (("none", 0.0), ("whole", 0.5), ("parts", 0.5)):
        config = settings(module, folder, tmp_path / name, lora=dataclasses.replace(lora, dropout=dropout))
        if name == "parts":
            with monkeypatch.context() as patch:
                stop_after(1, tmp_path / name, patch)
                with pytest.raises(runs.Stopped):
                    module.run(config)
        module.run(config)
    assert shares == {0.5}
    none, whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("none", "whole", "parts"))
    assert parts == whole != none


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_that_is_trained_moves_the_policy_and_not_its_reference(
    tied: bool, recipe: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused head reads the output matrix itself; without adapters it finds the one that training began with."""
    module, out = recipe("dpo"), tmp_path / "out"
    preferred.model(tmp_path / "model", tie_word_embeddings=tied)
    preferred.data(tmp_path / "data")
    lora = LoraConfig(rank=2, embeddings=True, targets=[Projection.q_proj, Projection.up_proj])
    config = settings(module, tmp_path, out, lora=lora, learning_rate=1e-2)
    encoder = chat.Encoder(checkpoints.load_tokenizer(tmp_path / "model"))
    collate = preferences.Collator(encoder.borders.pad_id, tuple(encoder.stop_ids))
    rows = preferences.encode(preferred.pairs(10, 16), encoder, max_length=128, name="pairs")

    def says(model: Any) -> torch.Tensor:
        say = preferences.log_probabilities
        return preferences.measured(model, rows, collate, say, batch=3, dtype=torch.float32)

    said: dict[str, torch.Tensor] = {}
    train = watch.train

    def trained(trainer: Any, listener: watch.Watch) -> dict[str, float]:
        found = train(trainer, listener)
        said["policy"] = says(trainer.model_wrapped)
        with trainer.model.disable_adapter():
            said["reference"] = says(trainer.model_wrapped)
        return found

    monkeypatch.setattr(watch, "train", trained)
    with monkeypatch.context() as patch:
        stop_after(1, out, patch)
        with pytest.raises(runs.Stopped):
            module.run(config)
    module.run(config)
    start, end = (checkpoints.load_model(path, dtype=torch.float32) for path in (tmp_path / "model", out))
    assert torch.equal(said["reference"], says(preferences.with_fused_head(start)))
    torch.testing.assert_close(said["policy"], says(preferences.with_fused_head(end)), rtol=1e-5, atol=1e-4)
    assert (said["policy"] - said["reference"]).abs().min() > 0.1
    before, after = (checkpoints.Weights(path) for path in (tmp_path / "model", out))
    changed = {name for name in after.files if not torch.equal(before[name], after[name])}
    ends = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert changed == ends | {name for name in after.files if "q_proj" in name or "up_proj" in name}
    stock = AutoModelForCausalLM.from_pretrained(out)
    assert type(stock).__name__ == "LlamaForCausalLM"
    assert stock.config.tie_word_embeddings == tied
    assert (stock.lm_head.weight is stock.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer": {"beta_": 1}}, r"trainer\.beta_=1: DPOConfig of TRL has no such setting; did you mean beta"),
        ({"trainer": {"beta": 1}}, r"trainer\.beta=1 is decided by this recipe's own settings"),
        ({"max_length": 12}, "max_length=12 is too small for all 10 pairs of train.pairs.jsonl"),
        ({"global_batch_rows": 20, "steps": None}, "global_batch_rows=20 is more than the data has: 10 rows"),
        ({"global_batch_rows": 12}, r"multiple of micro_batch_rows \* processes = 5 \* 1, got 12"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(
    changes: dict[str, Any], message: str, recipe: Callable[[str], ModuleType], folder: Path, tmp_path: Path
) -> None:
    module = recipe("dpo")
    with pytest.raises(ValueError, match=message):
        module.run(settings(module, folder, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_fewer_held_out_pairs_are_evenly_spaced_over_their_sources(
    recipe: Callable[[str], ModuleType], folder: Path, tmp_path: Path
) -> None:
    module = recipe("dpo")
    rows = module.check(settings(module, folder, tmp_path / "out", validation_pairs=3))[1]
    assert rows["validation"].ids == ["pair-10", "pair-12", "pair-14"]


def test_settings_and_data_without_meaning_are_named(
    recipe: Callable[[str], ModuleType], folder: Path, tmp_path: Path
) -> None:
    module = recipe("dpo")
    for name, value in (("beta", 0.0), ("beta", float("inf")), ("nll_weight", -1.0), ("validation_pairs", -1)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            settings(module, folder, tmp_path / "out", **{name: value})
    with pytest.raises(ValueError, match=r"deepspeed=zero3 does not go with lora\.rank=2"):
        settings(
            module,
            folder,
            tmp_path / "out",
            lora=LoraConfig(rank=2),
            deepspeed=launch.DeepSpeedConfig(stage=3),
        )
    preferred.data(tmp_path / "empty", {"train": {"tasks": preferred.tasks(0, 2)}})
    data = module._aligning.DataConfig(path=tmp_path / "empty")
    with pytest.raises(ValueError, match=r"has no train\.pairs\.jsonl; it has 2 in train\.tasks\.jsonl"):
        module.run(settings(module, folder, tmp_path / "out", data=data))
