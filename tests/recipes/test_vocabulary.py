"""The recipe from its settings to its directory: the kept tokens' logits stay, and a kill changes nothing."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import vocabularies
from conftest import tiny_model
from llamita import chat, checkpoints, runs, storage
from llamita.data import sources, tokens
from llamita.metrics import read_metrics
from llamita.prune import surgery, vocabulary

SIZE = 512
ORDINARY = 1188
"""Tokens that are not added ones."""


@pytest.fixture(scope="session", params=[False, True], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose embedding has 16 rows more than its tokenizer has tokens."""
    path = vocabularies.write(tmp_path_factory.mktemp("vocabulary") / "model")
    GenerationConfig(temperature=0.6, do_sample=True, eos_token_id=[1189, 1194]).save_pretrained(path)
    ids = {"bos_token_id": 1188, "eos_token_id": [1189, 1194], "pad_token_id": 1190}
    llama = tiny_model(vocab_size=1216, tie_word_embeddings=request.param, **ids)
    checkpoints.save_model(llama, path, source=None, provenance={})
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "lines.jsonl"
    lines = dict.fromkeys(vocabularies.corpus()[: 2**16].split("\n\n"))
    path.write_text("\n".join(json.dumps({"text": line + " 😀"}) for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def data(recipe: Callable[[str], ModuleType], model: Path, text: Path) -> Path:
    """The text in rows so short that documents are cut within words and within characters."""
    module, out = recipe("prepare"), model.parent / "data"
    settings = {"sequence_length": 16, "num_proc": 1, "out": out, "validation": module.ValidationConfig(fraction=0.1)}
    source, tokenizer = sources.SourceConfig(path=str(text)), tokens.TokenizerConfig(path=model)
    module.run(module.Prepare(source=source, tokenizer=tokenizer, **settings))
    return out


def settings(recipe: Callable[[str], ModuleType], model: Path, out: Path, **changes: Any) -> Any:
    module = recipe("vocabulary")
    if isinstance(changes.get("data"), Path):
        changes["data"] = module.DataConfig(path=changes["data"])
    return module.Vocabulary(model=module.ModelConfig(path=model), out=out, **{"vocab_size": SIZE, **changes})


@pytest.fixture(scope="session")
def finished(recipe: Callable[[str], ModuleType], model: Path, data: Path) -> Path:
    """What a run leaves that nobody disturbed."""
    recipe("vocabulary").run(settings(recipe, model, model.parent / "finished", data=data))
    return model.parent / "finished"


def old_ids(path: Path) -> torch.Tensor:
    return load_file(path / "vocabulary" / vocabulary.FILE)["old_ids"]


def test_the_logits_of_kept_tokens_are_those_of_the_source_bit_for_bit(model: Path, finished: Path) -> None:
    """For inputs of kept tokens, in a process that has only stock classes."""
    before = AutoModelForCausalLM.from_pretrained(model)
    after, info = AutoModelForCausalLM.from_pretrained(finished, output_loading_info=True)
    assert not any(info.values())
    kept = old_ids(finished)
    assert after.config.vocab_size == SIZE == len(kept)
    assert after.config.tie_word_embeddings == before.config.tie_word_embeddings
    new = torch.randint(0, SIZE, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine, whole = after(new), before(kept[new])
    assert torch.equal(mine.logits, whole.logits[..., kept])


def test_only_the_rows_of_tokens_change(model: Path, finished: Path) -> None:
    before, after = load_file(model / "model.safetensors"), load_file(finished / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        by_token = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert torch.equal(tensor, before[name][old_ids(finished)] if by_token else before[name])


def test_the_directory_is_stock_and_says_where_it_comes_from(model: Path, data: Path, finished: Path) -> None:
    tokenizer, config = AutoTokenizer.from_pretrained(finished), checkpoints.load_config(finished)
    assert len(tokenizer) == SIZE
    assert config.bos_token_id == tokenizer.bos_token_id
    assert config.eos_token_id == tokenizer.convert_tokens_to_ids([chat.EOS, chat.TURN_END])
    assert config.pad_token_id == tokenizer.pad_token_id
    assert GenerationConfig.from_pretrained(finished).eos_token_id == config.eos_token_id
    assert GenerationConfig.from_pretrained(finished).temperature == 0.6
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "def f(x)"}], return_dict=False)
    assert ids[:2] == tokenizer.convert_tokens_to_ids([chat.BOS, chat.HEADER])
    runs.check_done(finished)
    provenance = storage.read_json(finished / "llamita.json")
    assert provenance["parents"]["model"] == {"path": str(model), "sha256": checkpoints.content_hash(model)}
    assert provenance["parents"]["data"]["path"] == str(data)
    summary, row = runs.read_done(finished)["summary"], read_metrics(finished)[-1]
    llama = AutoModelForCausalLM.from_pretrained(finished)
    assert summary["parameters_after"] == row["vocabulary/params"] == sum(p.numel() for p in llama.parameters())
    assert 0 < summary["share_of_tokens_kept"] < 1 < summary["growth_by_parts"]
    for prefix in ("", "held_out_"):
        before, after = (summary[f"{prefix}tokens_per_byte_{when}"] for when in ("before", "after"))
        assert 0 < before < after < 1
    assert not list(finished.glob(".tokenizer"))


def test_counts_of_rows_and_of_their_text_choose_the_same_tokens(
    recipe: Callable[[str], ModuleType], model: Path, text: Path, tmp_path: Path
) -> None:
    prepare, module = recipe("prepare"), recipe("vocabulary")
    source, tokenizer = sources.SourceConfig(path=str(text)), tokens.TokenizerConfig(path=model)
    whole = prepare.ValidationConfig(fraction=0)
    options = {"source": source, "tokenizer": tokenizer, "validation": whole, "sequence_length": 16, "num_proc": 1}
    prepare.run(prepare.Prepare(**options, out=tmp_path / "data"))
    module.run(settings(recipe, model, tmp_path / "packed", data=tmp_path / "data"))
    module.run(settings(recipe, model, tmp_path / "text", source=source))
    packed, raw = (load_file(tmp_path / name / "vocabulary" / vocabulary.FILE) for name in ("packed", "text"))
    assert torch.equal(packed["counts"][:ORDINARY], raw["counts"][:ORDINARY])
    assert torch.equal(packed["old_ids"], raw["old_ids"])
    assert "held_out_tokens_per_byte_after" not in runs.read_done(tmp_path / "packed")["summary"]
    both = settings(recipe, model, tmp_path / "both", source=source, data=tmp_path / "data")
    module.run(both)
    doubled = load_file(tmp_path / "both/vocabulary" / vocabulary.FILE)["counts"]
    assert torch.equal(doubled[:ORDINARY], 2 * raw["counts"][:ORDINARY])


def test_the_smaller_model_is_prepared_for_and_cut_like_any_other(
    recipe: Callable[[str], ModuleType], text: Path, finished: Path, tmp_path: Path
) -> None:
    """Data of its own tokenizer fits it; that of the larger one's is refused."""
    prepare, module = recipe("prepare"), recipe("vocabulary")
    source, tokenizer = sources.SourceConfig(path=str(text)), tokens.TokenizerConfig(path=finished)
    prepare.run(
        prepare.Prepare(source=source, tokenizer=tokenizer, sequence_length=64, num_proc=1, out=tmp_path / "data")
    )
    module.run(settings(recipe, finished, tmp_path / "again", data=tmp_path / "data", vocab_size=300))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "again")) == 300


def test_a_second_start_finds_it_finished(
    recipe: Callable[[str], ModuleType], model: Path, data: Path, finished: Path
) -> None:
    before = (finished / "DONE.json").stat().st_mtime_ns
    recipe("vocabulary").run(settings(recipe, model, finished, data=data))
    assert (finished / "DONE.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("place", ["after_counts", "before_rename", "before_done"])
def test_killed_anywhere_it_ends_in_the_same_bytes(
    place: str, recipe: Callable[[str], ModuleType], model: Path, data: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if (child := os.fork()) == 0:
        os.environ["LLAMITA_CRASH_AT"] = place
        recipe("vocabulary").run(settings(recipe, model, out, data=data))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (out / "DONE.json").exists()
    recipe("vocabulary").run(settings(recipe, model, out, data=data))
    assert not [*out.glob(".model-*"), *out.glob(".tokenizer*"), *out.rglob("*.tmp")]
    files = storage.read_json(out / "DONE.json")["files"]
    assert files.keys() == storage.read_json(finished / "DONE.json")["files"].keys()
    for name in files.keys() - {"llamita.json"}:
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name


def test_the_command_line_takes_text_and_ends_with_one_message_on_bad_input(
    recipe: Callable[[str], ModuleType],
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = recipe("vocabulary")

    def command(size: int, out: str) -> tuple[int, str]:
        line = [f"model.path={model}", f"source.path={text}", "drop_added=['<|reserved_special_token_*|>']"]
        monkeypatch.setattr(sys, "argv", ["vocabulary.py", *line, f"vocab_size={size}", f"out={tmp_path / out}"])
        with pytest.raises(SystemExit) as ended:
            module.exit_with(module.main)
        return ended.value.code, capsys.readouterr().err

    assert command(400, "out")[0] == 0
    assert not set(vocabularies.RESERVED) & AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab().keys()
    code, said = command(100, "bad")
    assert code == runs.EXIT_USER
    assert "vocab_size must be in 264..1196 (256 bytes, 8 added tokens" in said
    assert not (tmp_path / "bad").exists()


def refused(recipe: Callable[[str], ModuleType], model: Path, out: Path, match: str, **changes: Any) -> None:
    with pytest.raises(ValueError, match=match):
        recipe("vocabulary").run(settings(recipe, model, out, **changes))
    assert not out.exists()


@pytest.mark.parametrize(
    ("size", "match"),
    [(267, r"in 268\.\.1200 .*got 267"), (1201, r"in 268\.\.1200 .*got 1201"), (1216, "below the 1216 rows")],
)
def test_a_size_that_cannot_be_is_refused_before_anything_is_written(
    size: int, match: str, recipe: Callable[[str], ModuleType], model: Path, data: Path, tmp_path: Path
) -> None:
    refused(recipe, model, tmp_path / "out", match, data=data, vocab_size=size)


def test_a_model_without_a_tokenizer_or_with_too_few_rows_is_refused(
    recipe: Callable[[str], ModuleType], text: Path, tmp_path: Path
) -> None:
    source = sources.SourceConfig(path=str(text))
    checkpoints.save_model(tiny_model(), (tmp_path / "bare"), source=None, provenance={})
    refused(recipe, tmp_path / "bare", tmp_path / "out", "no tokenizer.json", source=source, vocab_size=100)
    vocabularies.write(tmp_path / "bare")
    refused(recipe, tmp_path / "bare", tmp_path / "out", "128 rows for 1200 token ids", source=source, vocab_size=100)


def test_data_of_another_tokenizer_is_refused(
    recipe: Callable[[str], ModuleType], model: Path, text: Path, tmp_path: Path
) -> None:
    prepare = recipe("prepare")
    source, tokenizer = sources.SourceConfig(path=str(text)), tokens.TokenizerConfig(vocab_size=300)
    prepare.run(
        prepare.Prepare(source=source, tokenizer=tokenizer, sequence_length=64, num_proc=1, out=tmp_path / "data")
    )
    refused(recipe, model, tmp_path / "out", "another tokenizer", data=tmp_path / "data")


def test_a_model_that_lost_output_rows_is_refused(
    recipe: Callable[[str], ModuleType], text: Path, tmp_path: Path
) -> None:
    path = vocabularies.write(tmp_path / "model")
    checkpoints.save_model(tiny_model(vocab_size=1200), path, source=None, provenance={})
    config = surgery.classifier_config(checkpoints.load_config(path), [3, 4], ["a", "b"])
    weights = load_file(path / "model.safetensors")
    weights |= {"score.weight": weights.pop("lm_head.weight")[:2], "score.bias": torch.zeros(2)}
    checkpoints.save_tensors(weights, path / "model.safetensors", {"format": "pt"})
    config.save_pretrained(path)
    source = sources.SourceConfig(path=str(text))
    refused(recipe, path, tmp_path / "out", "has lost output rows already", source=source)


def test_settings_that_cannot_be_meant_are_refused(recipe: Callable[[str], ModuleType], model: Path) -> None:
    source = sources.SourceConfig(path="x")
    for changes, match in (
        ({}, "set data.path, source.path or sources"),
        ({"source": source, "sources": {"a": source}}, "not both"),
        ({"sources": {"a": sources.SourceConfig(path="x", weight=2.0)}}, "weight=2.0 of source 'a'"),
        ({"source": source, "measure_bytes": 0}, "measure_bytes must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=match):
            settings(recipe, model, Path("out"), **changes)
