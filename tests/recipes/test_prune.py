"""The recipe from its settings to its directory, how it ends on bad input, and that a kill changes nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, GenerationConfig

from calibration import ranked
from conftest import REPOSITORY, tiny_config, tiny_model
from llamita import checkpoints, runs, storage
from llamita.metrics import read_metrics
from llamita.prune import depth, importance, mend, plan
from llamita.prune.compensation import CompensationConfig
from llamita.prune.scores import HiddenScore, LayerScore, Scores, WidthScore
from llamita.prune.target import TargetConfig, Tie, target_shape
from llamita.shapes import PUBLISHED
from pruning_methods import OFF

SMALL = (
    "target.num_hidden_layers=2",
    "target.hidden_size=32",
    "target.intermediate_size=40",
    "target.num_attention_heads=2",
    "target.head_dim=8",
    "target.tie_word_embeddings=true",
)


CHEAP = (
    "scores.mlp=norm_product",
    "scores.attention=norm_product",
    "scores.hidden=activation",
    "scores.layers=block_influence",
    "compensation.attention_steps=2",
    "compensation.layer_steps=2",
    "compensation.head_steps=2",
    "compensation.tied_steps=2",
)
"""One cheap pass and few steps; what a test says of them itself comes later and holds."""


def prepare(recipe: Callable[[str], ModuleType], folder: Path, out: Path, *, seed: int = 0, **changes: Any) -> None:
    """A data directory of two hundred short documents of invented words, a language for each seed."""
    module, dice = recipe("prepare"), random.Random(seed)
    (folder / "text").mkdir(parents=True, exist_ok=True)
    words = ["".join(dice.choices(string.ascii_lowercase, k=dice.randint(2, 9))) for _ in range(300)]
    lines = [json.dumps({"text": " ".join(dice.choices(words, k=5 + n % 30))}) for n in range(200)]
    (folder / "text/lines.jsonl").write_text("\n".join(lines))
    fields: dict[str, Any] = {
        "source": module.SourceConfig(path=str(folder / "text/lines.jsonl")),
        "tokenizer": module.TokenizerConfig(vocab_size=640),
        "sequence_length": 64,
        "num_proc": 1,
        "out": out,
    }
    module.run(module.Prepare(**{**fields, **changes}))


@pytest.fixture(scope="session")
def data(recipe: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prune")
    prepare(recipe, folder, folder / "data")
    return folder / "data"


@pytest.fixture(scope="session")
def model(data: Path) -> Path:
    """A tiny untied Llama with the data's tokenizer and settings of generation."""
    path = data.parent / "model"
    path.mkdir()
    checkpoints.copy_tokenizer(data / "tokenizer", path)
    GenerationConfig(temperature=0.6, top_p=0.9, do_sample=True).save_pretrained(path)
    llama = tiny_model(vocab_size=640, pad_token_id=None).bfloat16()
    checkpoints.save_model(llama, path, source=None, provenance={})
    return path


@pytest.fixture
def command(
    recipe: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The recipe's command line, in this process: exit code, stdout and stderr."""

    def call(*overrides: str) -> tuple[int, str, str]:
        module = recipe("prune")
        monkeypatch.setattr(sys, "argv", ["prune.py", *CHEAP, *overrides])
        with pytest.raises(SystemExit) as ended:
            module.exit_with(module.main)
        return ended.value.code, *capsys.readouterr()

    return call


def settings(recipe: Callable[[str], ModuleType], model: Path, data: Path | None, out: Path, **changes: Any) -> Any:
    module = recipe("prune")
    fields: dict[str, Any] = {
        "model": module.ModelConfig(path=model),
        "calibration": module.CalibrationConfig(path=data, tokens=1024, batch_rows=4),
        "target": TargetConfig(
            num_hidden_layers=2,
            hidden_size=32,
            intermediate_size=40,
            num_attention_heads=2,
            head_dim=8,
            tie_word_embeddings=True,
        ),
        "scores": ranked(),
        "compensation": CompensationConfig(attention_steps=2, layer_steps=2, head_steps=2, tied_steps=2),
        "out": out,
    }
    return module.Prune(**{**fields, **changes})


def weights_of(path: Path) -> dict[str, bytes]:
    names = ["model.safetensors", "config.json", "pruning/plan.safetensors", "pruning/scores.safetensors"]
    return {name: (path / name).read_bytes() for name in names}


def importances(path: Path) -> list[float]:
    """What the metrics say of each layer of the source."""
    name = "prune/layers/importance/block_influence"
    return [row[name] for row in read_metrics(path) if name in row]


def test_one_command_makes_a_stock_model_with_its_tokenizer(model: Path, data: Path, tmp_path: Path) -> None:
    """All dimensions of a Llama at once, from the command line."""
    out = tmp_path / "out"
    line = [sys.executable, str(REPOSITORY / "recipes/prune.py"), f"model.path={model}", *SMALL]
    line += [f"calibration.path={data}", "calibration.tokens=1024", f"out={out}"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    llama, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    shape = checkpoints.shape_of(llama.config)
    assert shape == plan.Plan.load(out / "pruning").target
    assert f"-> {shape.num_parameters:,} parameters" in done.stdout
    assert sum(p.numel() for p in llama.parameters()) == shape.num_parameters
    assert llama.dtype == torch.bfloat16
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    before, after = (json.loads((path / "config.json").read_text()) for path in (model, out))
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {name.split("=")[0].removeprefix("target.") for name in SMALL}
    runs.check_done(out)
    provenance = storage.read_json(out / "llamita.json")
    assert provenance["parents"]["model"] == {"path": str(model), "sha256": checkpoints.content_hash(model)}
    assert provenance["parents"]["calibration"]["path"] == str(data)
    assert provenance["plan"]["parameters_after"] == shape.num_parameters
    rows = read_metrics(out)
    assert {row["prune/layers/importance/block_influence"] > 0 for row in rows[:3]} == {True}
    assert rows[-1]["prune/params"] == shape.num_parameters
    assert rows[-1]["prune/loss_after"] == provenance["plan"]["loss_after"] > 0
    assert rows[-1]["prune/loss_before"] == provenance["plan"]["loss_before"] > 0


@pytest.fixture(scope="module")
def finished(recipe: Callable[[str], ModuleType], model: Path, data: Path) -> Path:
    """What a run leaves that nobody disturbed."""
    recipe("prune").run(settings(recipe, model, data, data.parent / "finished"))
    return data.parent / "finished"


def test_a_second_start_finds_it_finished(
    recipe: Callable[[str], ModuleType], model: Path, data: Path, finished: Path
) -> None:
    before = (finished / "DONE.json").stat().st_mtime_ns
    recipe("prune").run(settings(recipe, model, data, finished))
    assert (finished / "DONE.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("place", ["after_scores", "before_rename", "before_done"])
def test_killed_anywhere_it_ends_in_the_same_bytes(
    place: str, recipe: Callable[[str], ModuleType], model: Path, data: Path, tmp_path: Path, finished: Path
) -> None:
    out = tmp_path / "out"
    if (child := os.fork()) == 0:
        os.environ["LLAMITA_CRASH_AT"] = place
        recipe("prune").run(settings(recipe, model, data, out))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (out / "DONE.json").exists()
    measured = (out / "pruning/scores.safetensors").stat().st_mtime_ns
    (out / "pruning/.plan.safetensors.dead.tmp").write_text("half of a plan")
    recipe("prune").run(settings(recipe, model, data, out))
    assert (out / "pruning/scores.safetensors").stat().st_mtime_ns == measured
    assert not [*out.glob(".model-*"), *out.rglob("*.tmp")]
    assert weights_of(out) == weights_of(finished)
    assert importances(out) == importances(finished)
    files = [storage.read_json(path / "DONE.json")["files"].keys() for path in (out, finished)]
    assert files[0] == files[1]


@pytest.mark.parametrize("place", ["before_done", "after_done"])
def test_killed_at_the_end_it_mends_nothing_again(
    place: str,
    recipe: Callable[[str], ModuleType],
    model: Path,
    data: Path,
    tmp_path: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, module = tmp_path / "out", recipe("prune")
    if (child := os.fork()) == 0:
        os.environ["LLAMITA_CRASH_AT"] = place
        module.run(settings(recipe, model, data, out))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert list((out / "pruning").glob("mended-*/final.safetensors"))
    monkeypatch.setattr(mend, "_fit_layer", lambda *_, **__: pytest.fail("a layer was mended again"))
    module.run(settings(recipe, model, data, out))
    assert not list((out / "pruning").glob("mended-*"))
    assert weights_of(out) == weights_of(finished)
    files = [storage.read_json(path / "DONE.json")["files"].keys() for path in (out, finished)]
    assert files[0] == files[1]


def test_scores_are_measured_once_and_serve_other_targets(
    recipe: Callable[[str], ModuleType], model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, first, second = recipe("prune"), tmp_path / "first", tmp_path / "second"
    target = TargetConfig(intermediate_size=32, num_hidden_layers=1)
    module.run(settings(recipe, model, data, first, target=target, compensation=OFF))
    again = settings(
        recipe, model, None, tmp_path / "again", target=target, scores=ranked(path=first), compensation=OFF
    )
    fresh = settings(recipe, model, data, second, target=TargetConfig(hidden_size=32))
    reused = dataclasses.replace(fresh, scores=ranked(path=first), out=tmp_path / "third")
    module.run(fresh)
    monkeypatch.setattr(importance, "measure", None)
    module.run(again)
    module.run(reused)
    for one, other in ((first, tmp_path / "again"), (second, tmp_path / "third")):
        assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert importances(first) == importances(tmp_path / "again") == importances(tmp_path / "third")
    assert len(importances(first)) == 3
    losses = [storage.read_json(path / "DONE.json")["summary"]["loss_before"] for path in (second, tmp_path / "third")]
    assert losses[0] == losses[1]
    digest = Scores.load(first).content_hash
    assert storage.read_json(tmp_path / "third/llamita.json")["parents"]["scores"]["sha256"] == digest


def test_costly_scores_are_measured_where_asked_for_and_missed_where_not(
    recipe: Callable[[str], ModuleType], model: Path, data: Path, tmp_path: Path, finished: Path
) -> None:
    module, kinds = recipe("prune"), WidthScore
    asked = ranked(layers=LayerScore.greedy, mlp=kinds.taylor_unit, spill_path=tmp_path)
    module.run(settings(recipe, model, data, tmp_path / "first", scores=asked))
    names = set(Scores.load(tmp_path / "first").tensors) - set(Scores.load(finished).tensors)
    by_gradient = {f"{axis}.taylor_{way}" for axis in ("mlp", "attention") for way in ("unit", "element")}
    assert names == by_gradient | {"layers.greedy", "depth.greedy"}
    missed = settings(recipe, model, None, tmp_path / "second", scores=dataclasses.replace(asked, path=finished))
    with pytest.raises(ValueError, match=r"scores hold no mlp\.taylor_unit"):
        module.run(missed)
    assert not (tmp_path / "second").exists()


def test_killed_between_two_removals_the_first_is_not_decided_again(
    recipe: Callable[[str], ModuleType], model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, out, rounds, losses = recipe("prune"), tmp_path / "out", list[int](), depth.losses
    kinds = {"target": TargetConfig(num_hidden_layers=1), "scores": ranked(layers=LayerScore.greedy)}
    kinds["compensation"] = OFF
    if (child := os.fork()) == 0:
        os.environ["LLAMITA_CRASH_AT"] = "after_removal"
        module.run(settings(recipe, model, data, out, **kinds))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (out / "pruning/scores.safetensors").exists()
    counted = lambda model, layers, *rest: rounds.append(len(layers)) or losses(model, layers, *rest)  # noqa: E731
    monkeypatch.setattr(depth, "losses", counted)
    module.run(settings(recipe, model, data, out, **kinds))
    assert rounds == [2]
    module.run(settings(recipe, model, data, tmp_path / "undisturbed", **kinds))
    assert rounds == [2, 3, 2]
    assert weights_of(out) == weights_of(tmp_path / "undisturbed")
    files = [storage.read_json(path / "DONE.json")["files"].keys() for path in (out, tmp_path / "undisturbed")]
    assert files[0] == files[1]


def test_scores_of_another_model_are_refused(
    recipe: Callable[[str], ModuleType], finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    checkpoints.save_model(tiny_model(seed=1, vocab_size=640), tmp_path / "other", source=None, provenance={})
    config = settings(recipe, tmp_path / "other", None, tmp_path / "second")
    config.scores.path = finished
    with pytest.raises(ValueError, match="measured on another model"):
        recipe("prune").run(config)


def test_the_same_shape_is_the_identity(
    recipe: Callable[[str], ModuleType], model: Path, data: Path, tmp_path: Path
) -> None:
    config = settings(recipe, model, data, tmp_path / "out", target=TargetConfig())
    recipe("prune").run(config)
    source, result = (load_file(path / "model.safetensors") for path in (model, tmp_path / "out"))
    assert source.keys() == result.keys()
    assert all(torch.equal(result[name], tensor) for name, tensor in source.items())
    assert (tmp_path / "out/config.json").read_bytes() == (model / "config.json").read_bytes()
    summary = storage.read_json(tmp_path / "out/DONE.json")["summary"]
    assert summary["loss_before"] == summary["loss_after"]


def test_a_tie_of_what_is_one_matrix_already_is_said_to_have_no_effect(
    recipe: Callable[[str], ModuleType], data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "model").mkdir()
    tied = tiny_model(vocab_size=640, pad_token_id=None, tie_word_embeddings=True)
    checkpoints.save_model(tied, tmp_path / "model", source=None, provenance={})
    target = TargetConfig(keep_layers=[0, 2], tie=Tie.mean)
    recipe("prune").run(settings(recipe, tmp_path / "model", None, tmp_path / "out", target=target))
    assert "target.tie=mean has no effect" in caplog.text


def test_magnitudes_need_no_text(recipe: Callable[[str], ModuleType], model: Path, tmp_path: Path) -> None:
    magnitude = ranked(
        mlp=WidthScore.magnitude,
        attention=WidthScore.magnitude,
        hidden=HiddenScore.magnitude,
        layers=LayerScore.magnitude,
    )
    out = tmp_path / "out"
    with pytest.raises(
        ValueError, match=r"scores\.mlp=norm_product, .* set calibration\.path, or scores\.mlp=magnitude"
    ):
        recipe("prune").run(settings(recipe, model, None, out))
    assert not out.exists()
    recipe("prune").run(settings(recipe, model, None, out, scores=magnitude))
    assert checkpoints.load_model(out).config.num_hidden_layers == 2
    rows = read_metrics(out)
    assert [row["prune/mlp/importance/magnitude"] > 0 for row in rows[:3]] == [True] * 3
    for scores in (ranked(path=out), dataclasses.replace(magnitude, path=out)):
        again = settings(recipe, model, None, tmp_path / "again", scores=scores)
        if scores.mlp is WidthScore.magnitude:
            recipe("prune").run(again)
            continue
        with pytest.raises(ValueError, match="measured on text"):
            recipe("prune").run(again)
        assert not (tmp_path / "again").exists()


def test_kept_output_rows_are_named_by_their_tokens(
    recipe: Callable[[str], ModuleType], model: Path, tmp_path: Path
) -> None:
    ids = [300, 20, 301]
    target = TargetConfig(output_rows=ids)
    recipe("prune").run(settings(recipe, model, None, tmp_path / "out", target=target))
    stock, info = AutoModelForTokenClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    tokens = checkpoints.load_tokenizer(model).convert_ids_to_tokens(ids)
    assert stock.config.id2label == dict(enumerate(tokens))
    assert storage.read_json(tmp_path / "out/llamita.json")["plan"]["output_rows"] == ids


def test_calibration_uses_as_many_tokens_as_asked(
    recipe: Callable[[str], ModuleType], model: Path, data: Path, tmp_path: Path
) -> None:
    weights = checkpoints.Weights(model)
    for tokens, rows, columns in ((1024, 16, 64), (20, 1, 20), (100, 1, 64), (10**9, None, 64)):
        config = recipe("prune").CalibrationConfig(path=data, tokens=tokens, batch_rows=3)
        batches, _ = recipe("prune").calibration(config, weights)
        assert {batch["input_ids"].shape[1] for batch in batches} == {columns}
        assert rows in (None, sum(len(batch["input_ids"]) for batch in batches))


def test_a_batch_for_each_process_or_none_starts(
    recipe: Callable[[str], ModuleType], model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are dealt, not rows: eight rows in batches of two are enough for four processes and not for five."""
    module, weights = recipe("prune"), checkpoints.Weights(model)
    config = module.CalibrationConfig(path=data, tokens=512, batch_rows=2)
    for world_size in (4, 5):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        monkeypatch.setenv("RANK", str(world_size - 1))
        if world_size == 4:
            assert [len(batch["input_ids"]) for batch in module.calibration(config, weights)[0]] == [2]
            continue
        said = r"tokens=512 are 8 rows, of which calibration\.batch_rows=2 makes 4 batches: too few for 5 processes"
        with pytest.raises(ValueError, match=said):
            module.calibration(config, weights)


def truncate(path: Path) -> None:
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 100)


def lose_a_tensor(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def overflow(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def lose_the_rope(path: Path) -> None:
    config = storage.read_json(path / "config.json")
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
    storage.write_json(path / "config.json", config)


def shorten(path: Path) -> None:
    config = storage.read_json(path / "config.json")
    storage.write_json(path / "config.json", config | {"max_position_embeddings": 32})


def give_rewards(path: Path) -> None:
    tensors, config = load_file(path / "model.safetensors"), storage.read_json(path / "config.json")
    tensors["score.weight"] = tensors.pop("lm_head.weight")[:1].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    rewards = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "reward"}}
    storage.write_json(path / "config.json", config | rewards)


def lose_the_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


BAD: dict[str, tuple[Callable[[Path], None] | None, tuple[str, ...], str]] = {
    "truncated shard": (truncate, (), "cut short"),
    "missing tensor": (lose_a_tensor, (), "model.layers.1.mlp.up_proj.weight"),
    "no weights": (lose_the_weights, (), "model.safetensors"),
    "rewards": (give_rewards, (), "model.path is a reward model, which gives one number for a dialogue"),
    "target too large": (None, ("target=llama3.2_1b",), "target.num_hidden_layers must be at most the source's 3"),
    "heads do not divide": (None, ("target.num_attention_heads=3",), "nearest are 2 and 4"),
    "unknown key": (None, ("target.hiden_size=32",), "hiden_size"),
    "unknown target": (None, ("target=llama9_1b",), "llama3.2_1b"),
    "unknown score": (None, ("scores.mlp=taylor",), "norm_product"),
    "no text": (None, ("calibration.path=null",), "scores.hidden=activation is measured on text"),
    "no text for pairs": (
        None,
        (
            "calibration.path=null",
            "scores.attention=magnitude",
            "scores.hidden=magnitude",
            "target.head_dim=8",
            "target.pairs=strongest",
        ),
        "target.pairs=strongest is measured on text: set calibration.path, or target.pairs=first",
    ),
    "no text for the tie": (
        None,
        (
            "calibration.path=null",
            "scores.hidden=magnitude",
            "target.tie_word_embeddings=true",
            "target.tie=least_squares",
        ),
        "target.tie=least_squares is measured on text: set calibration.path, or target.tie=mean",
    ),
    "another rope": (lose_the_rope, ("target.rope=published",), "rope_type 'llama3', got 'default'"),
    "not finite": (overflow, (), "set calibration.dtype=float32, or check the weights"),
    "scores of nothing": (None, ("scores.path=/nowhere",), "scores.path=/nowhere holds no"),
    "no such data": (None, ("calibration.path=/nowhere",), "/nowhere"),
    "no such model": (None, ("model.path=/nowhere",), "/nowhere"),
    "bad dtype": (None, ("calibration.dtype=int8",), "bfloat16"),
    "no such device": (None, ("calibration.device=cdua",), "must be auto, cpu, cuda or cuda:N, got 'cdua'"),
    "no such GPU": (None, ("calibration.device=cuda:99",), "calibration.device=cuda:99, but torch"),
    "rows too long": (shorten, (), "max_position_embeddings=32: set calibration.tokens=32"),
    "no tokens": (None, ("calibration.tokens=0",), "calibration.tokens must be at least 1, got 0"),
    "no out": (None, ("out=???",), "out"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_bad_input_ends_with_64_and_leaves_nothing_in_the_way_of_the_corrected_command(
    mistake: str, command: Callable[..., tuple[int, str, str]], model: Path, data: Path, tmp_path: Path
) -> None:
    damage, overrides, words = BAD[mistake]
    shutil.copytree(model, tmp_path / "model")
    if damage is not None:
        damage(tmp_path / "model")
    out = tmp_path / "out"
    good = {"model.path": tmp_path / "model", "calibration.path": data, "out": out, "target.hidden_size": 32}
    good["calibration.tokens"] = 256
    bad = good | dict(override.split("=") for override in overrides)
    code, _, said = command(*(f"{name}={value}" for name, value in bad.items()))
    assert code == 64, said
    assert words in said
    assert "Traceback" not in said
    assert not out.exists() or not any(out.iterdir())
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(model, tmp_path / "model")
    assert command(*(f"{name}={value}" for name, value in good.items()))[0] == 0


def test_a_full_disk_ends_with_64_and_the_same_command_goes_on(
    command: Callable[..., tuple[int, str, str]], model: Path, data: Path, tmp_path: Path
) -> None:
    """No file may grow beyond a limit: the nearest to a full disk that needs no rights. Scores fit, weights do not."""
    out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    line = [f"model.path={model}", *SMALL[:-1], f"calibration.path={data}", "calibration.tokens=1024"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, limits[1]))
    try:
        code, _, said = command(*line, f"out={out}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 64, said
    assert "cannot use" in said
    assert "Traceback" not in said
    assert not [*out.glob(".model-*"), *out.rglob("*.tmp"), *out.glob("*.safetensors")]
    assert not (out / "DONE.json").exists()
    measured = (out / "pruning/scores.safetensors").stat().st_mtime_ns
    assert command(*line, f"out={out}")[0] == 0
    assert (out / "pruning/scores.safetensors").stat().st_mtime_ns == measured
    assert command(*line, f"out={tmp_path / 'other'}")[0] == 0
    assert weights_of(out) == weights_of(tmp_path / "other")


def test_a_model_without_a_tokenizer_is_told_what_is_taken_for_granted(
    recipe: Callable[[str], ModuleType], data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "model").mkdir()
    checkpoints.save_model(tiny_model(vocab_size=640), tmp_path / "model", source=None, provenance={})
    config = recipe("prune").CalibrationConfig(path=data, tokens=64)
    recipe("prune").calibration(config, checkpoints.Weights(tmp_path / "model"))
    assert "has no tokenizer" in caplog.text


def test_data_of_another_tokenizer_is_refused(recipe: Callable[[str], ModuleType], model: Path, tmp_path: Path) -> None:
    prepare(recipe, tmp_path, tmp_path / "data", seed=1)
    with pytest.raises(ValueError, match="another tokenizer"):
        recipe("prune").run(settings(recipe, model, tmp_path / "data", tmp_path / "out"))
    (tmp_path / "model").mkdir()
    checkpoints.save_model(tiny_model(), tmp_path / "model", source=None, provenance={})
    with pytest.raises(ValueError, match="640 token ids"):
        recipe("prune").run(settings(recipe, tmp_path / "model", tmp_path / "data", tmp_path / "other"))


def test_a_directory_of_another_run_is_refused(
    recipe: Callable[[str], ModuleType], model: Path, data: Path, finished: Path
) -> None:
    with pytest.raises(ValueError, match="other settings"):
        recipe("prune").run(settings(recipe, model, data, finished, target=TargetConfig(hidden_size=32)))


@pytest.mark.parametrize(
    ("name", "source", "published"),
    [
        ("llama3.2_1b", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B"),
        ("llama3.2_3b", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-3B"),
        ("llama_guard3_1b_pruned", "meta-llama/Llama-Guard-3-1B", "meta-llama/Llama-Guard-3-1B-INT4"),
        ("custom", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
    ],
)
def test_targets_on_the_command_line_are_the_published_sizes(
    name: str, source: str, published: str, recipe: Callable[[str], ModuleType]
) -> None:
    recipe("prune")
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        cfg = compose("prune", [f"target={name}", "model.path=m", "out=o"])
    config: Any = OmegaConf.to_object(cfg)
    expected = dataclasses.replace(PUBLISHED[published], output_rows=None)
    assert target_shape(PUBLISHED[source], config.target) == expected
    assert checkpoints.shape_of(tiny_config(**expected.config_fields())) == expected


def test_what_was_cut_is_mended_and_said_to_be(
    recipe: Callable[[str], ModuleType], model: Path, data: Path, tmp_path: Path
) -> None:
    compensation = CompensationConfig(attention_steps=20, layer_steps=40, head_steps=40, tied_steps=40)
    recipe("prune").run(settings(recipe, model, data, tmp_path / "out", compensation=compensation))
    summary = storage.read_json(tmp_path / "out/DONE.json")["summary"]
    assert summary["loss_after"] == summary["loss_mended"] < summary["loss_cut"]
    rows = [row for row in read_metrics(tmp_path / "out") if "prune/error/refit" in row]
    assert [row["step"] for row in rows] == [0, 1]
    assert all({"prune/error/start", "prune/error/tuned", "prune/seconds/steps"} <= row.keys() for row in rows)
    (last,) = [row for row in read_metrics(tmp_path / "out") if "prune/divergence/start" in row]
    assert last["prune/divergence/tied"] <= last["prune/divergence/head"] <= last["prune/divergence/start"]
    assert last["prune/seconds/tied"] > 0
    assert not list((tmp_path / "out/pruning").glob("mended-*"))


def test_a_kill_while_mending_costs_one_layer(
    recipe: Callable[[str], ModuleType], model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, fitted = recipe("prune"), mend._fit_layer
    module.run(settings(recipe, model, data, tmp_path / "undisturbed"))
    layers = []

    def dying(fit: Any, *arguments: Any, **options: Any) -> Any:
        layers.append(fit.index)
        if len(layers) == 2:
            raise KeyboardInterrupt
        return fitted(fit, *arguments, **options)

    monkeypatch.setattr(mend, "_fit_layer", dying)
    with pytest.raises(KeyboardInterrupt):
        module.run(settings(recipe, model, data, tmp_path / "killed"))
    module.run(settings(recipe, model, data, tmp_path / "killed"))
    assert layers == [0, 1, 1]
    assert weights_of(tmp_path / "undisturbed") == weights_of(tmp_path / "killed")


UNLIKE = """
import os, sys
from pathlib import Path
sys.path[:0] = [sys.argv.pop(1)]
import prune
from llamita.prune import importance, mend, plan
out, rank, fit = Path(sys.argv[-1][4:]), os.environ["RANK"], mend.mend
vectors, gain = importance.principal_directions, plan.norm_gain
def kept(pruned, *arguments, **options):
    (out / f"rank-{rank}").write_text(pruned.plan.content_hash)
    return fit(pruned, *arguments, **options)
mend.mend = kept
if rank == "1":
    importance.principal_directions = lambda covariance: (-vectors(covariance)[0], vectors(covariance)[1])
    plan.norm_gain = lambda *arguments: gain(*arguments) * (1 + 1e-15)
prune.exit_with(prune.main)
"""
"""The recipe on a node whose library gives eigenvectors another sign and sums another last bit."""


def test_processes_of_unlike_nodes_cut_and_mend_by_the_plan_of_the_first(
    model: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "unlike.py").write_text(UNLIKE)
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "unlike.py")]
    line += [str(REPOSITORY / "recipes"), *CHEAP, "scores.hidden=pca", "target.hidden_size=32", f"model.path={model}"]
    line += [f"calibration.path={data}", "calibration.tokens=256", "calibration.device=cpu", f"out={tmp_path / 'out'}"]
    done = subprocess.run([sys.executable, *line], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = plan.Plan.load(tmp_path / "out/pruning").content_hash
    assert [(tmp_path / "out" / f"rank-{rank}").read_text() for rank in (0, 1)] == [kept, kept]


# Fewer rows than the calibration has, of which the three processes have two, one and none; and memory in which the
# first could compare fewer models side by side than the second.
FURTHER = (
    "scores.all=true",
    "calibration.batch_rows=2",
    "scores.depth_tokens=192",
    f"scores.depth_gib={6 * 64 * 64 * 4 / 2**30}",
    "scores.gradient_tokens=200",
)


@pytest.mark.parametrize(
    "kinds",
    [
        ("scores.layers=block_influence",),
        ("scores.layers=greedy", "scores.mlp=taylor_unit", "scores.attention=taylor_element", *FURTHER),
    ],
)
def test_any_number_of_processes_gives_the_statistics_of_one(
    kinds: tuple[str, ...], model: Path, data: Path, tmp_path: Path
) -> None:
    """Each counts rows of its own; scores, plan and what is fitted in closed form come out the same."""
    line = [f"model.path={model}", f"calibration.path={data}", "calibration.tokens=1024", "calibration.dtype=float32"]
    line += [*SMALL, "compensation.attention_steps=0", "compensation.layer_steps=0", "compensation.head_steps=0"]
    line += ["compensation.tied_steps=0", "calibration.device=cpu", *kinds]
    for number in (1, 2, 3):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
        command = [sys.executable, *(launcher if number > 1 else []), str(REPOSITORY / "recipes/prune.py"), *line]
        done = subprocess.run(
            [*command, f"out={tmp_path / str(number)}"], capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
    alone = load_file(tmp_path / "1/pruning/scores.safetensors")
    kept, weights = load_file(tmp_path / "1/pruning/plan.safetensors"), load_file(tmp_path / "1/model.safetensors")
    for number in ("2", "3"):
        scores = load_file(tmp_path / number / "pruning/scores.safetensors")
        for name in scores.keys() - {"directions.vectors"}:  # eigenvectors have no sign
            torch.testing.assert_close(scores[name], alone[name], rtol=1e-5, atol=1e-5, msg=name)
        plan_of = load_file(tmp_path / number / "pruning/plan.safetensors")
        for name in ("layers", "mlp", "heads", "kv_heads", "pairs", "values"):
            assert torch.equal(plan_of[name], kept[name]), name
        mended = load_file(tmp_path / number / "model.safetensors")
        signs = (plan_of["rotation"] * kept["rotation"]).sum(0).sign().to(weights["model.norm.weight"].dtype)
        table = mended["model.embed_tokens.weight"] * signs
        torch.testing.assert_close(table, weights["model.embed_tokens.weight"], rtol=2e-2, atol=2e-2)
