"""A model directory is written whole or not at all, and read strictly."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from llamita import checkpoints, manifests, runs, storage
from llamita.checkpoints import ModelWriter, Weights, load_model, save_model


@pytest.fixture
def saved(tiny: LlamaForCausalLM, tmp_path: Path) -> Path:
    save_model(tiny, tmp_path / "model", source=None, provenance={"parents": {}})
    return tmp_path / "model"


def rewrite(path: Path, **changes: torch.Tensor | None) -> None:
    """Replace or remove tensors of a saved model."""
    tensors = load_file(path / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_what_is_saved_is_what_is_loaded(tiny: LlamaForCausalLM, saved: Path) -> None:
    ids = torch.arange(12)[None]
    again = load_model(saved).eval()
    assert torch.equal(again(ids).logits, tiny(ids).logits)
    stock = LlamaForCausalLM.from_pretrained(saved).eval()
    assert torch.equal(stock(ids).logits, tiny(ids).logits)


def test_every_tensor_is_read_onto_the_device(saved: Path) -> None:
    """Rotary frequencies too, which no file holds."""
    model = load_model(saved, device="meta")
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert model.model.rotary_emb.inv_freq.is_meta


def test_weights_may_be_read_by_whoever_may_read_other_new_files(saved: Path) -> None:
    assert (saved / "model.safetensors").stat().st_mode == (saved / "config.json").stat().st_mode


def test_a_tied_head_stays_one_matrix(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        num_hidden_layers=1,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    save_model(LlamaForCausalLM(config), tmp_path, source=None, provenance={})
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_shards_hold_what_one_file_holds(tiny: LlamaForCausalLM, saved: Path, tmp_path: Path) -> None:
    weights = Weights(saved)
    with ModelWriter(tmp_path / "sharded", weights.config, shard_bytes=40_000) as writer:
        for name in weights.shape.tensors():
            writer.add(name, weights[name])
        names = writer.publish(saved, {})
    assert sum(name.endswith(".safetensors") for name in names) > 2
    ids = torch.arange(12)[None]
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "sharded")(ids).logits, tiny(ids).logits)
    assert not list((tmp_path / "sharded").glob(".model-*"))


def test_tensors_of_other_shapes_than_the_configuration_has_are_not_published(saved: Path, tmp_path: Path) -> None:
    weights = Weights(saved)
    wrong = "model.layers.1.mlp.up_proj.weight"
    with ModelWriter(tmp_path / "out", weights.config) as writer:
        for name in weights.shape.tensors():
            writer.add(name, weights[name][1:] if name == wrong else weights[name])
        with pytest.raises(ValueError, match=rf"written and expected differ: {re.escape(wrong)}$"):
            writer.publish(saved, {})
    assert not list((tmp_path / "out").iterdir())


def test_a_truncated_file_is_named(saved: Path) -> None:
    file = saved / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cut short"):
        Weights(saved)


def test_a_missing_tensor_is_never_made_up(saved: Path) -> None:
    rewrite(saved, **{"model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(ValueError, match=r"lacks 1 tensors: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(saved)


def test_an_unexpected_tensor_is_never_passed_over(saved: Path) -> None:
    rewrite(saved, **{"model.layers.9.mlp.up_proj.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"has no use for: model\.layers\.9"):
        load_model(saved)


def test_a_tensor_of_another_shape_is_refused(saved: Path) -> None:
    rewrite(saved, **{"model.norm.weight": torch.ones(63)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \[63\], config\.json asks for \[64\]"):
        load_model(saved)


def test_a_missing_shard_is_named(saved: Path, tmp_path: Path) -> None:
    weights = Weights(saved)
    with ModelWriter(tmp_path / "sharded", weights.config, shard_bytes=40_000) as writer:
        for name in weights.shape.tensors():
            writer.add(name, weights[name])
        shard = writer.publish(saved, {})[1]
    (tmp_path / "sharded" / shard).unlink()
    with pytest.raises(ValueError, match=f"lacks the shard {shard}"):
        Weights(tmp_path / "sharded")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "asks for code of its own"),
        ({"model_type": "mistral"}, "model_type must be 'llama', got 'mistral'"),
        ({"mlp_bias": True}, "mlp_bias must be false"),
        ({"num_attention_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads=2, got 3"),
    ],
)
def test_a_configuration_that_is_no_plain_llama_is_refused(
    saved: Path, change: dict[str, object], message: str
) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        Weights(saved)


def test_a_tensor_that_the_index_promises_and_the_shard_lacks_is_named(saved: Path) -> None:
    names = dict.fromkeys(Weights(saved).files, "model.safetensors")
    (saved / checkpoints.INDEX).write_text(json.dumps({"weight_map": names}))
    rewrite(saved, **{"model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(ValueError, match=r"lacks 1 tensors: model\.layers\.1\.mlp\.up_proj\.weight"):
        Weights(saved)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (checkpoints.INDEX, "{}", r"index\.json has no weight_map"),
        (checkpoints.INDEX, '{"weight_map": {"model.norm.weight": 1}}', r"index\.json has no weight_map"),
        (checkpoints.INDEX, "[]", r"index\.json must hold a mapping, got list"),
        ("config.json", "[]", r"config\.json must hold a mapping, got list"),
        ("config.json", '{"model_type": "gpt2"}', r"config\.json: model_type must be 'llama', got 'gpt2'"),
        ("generation_config.json", "{", r"generation_config\.json is not valid JSON"),
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1", r"model\.safetensors is damaged"),
        ("model.safetensors", "", r"model\.safetensors is damaged"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_named(saved: Path, name: str, text: str, message: str) -> None:
    (saved / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_model(saved)


def test_a_setting_of_the_wrong_type_in_a_configuration_is_named(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"hidden_size": "64"}))
    with pytest.raises(ValueError, match=r"config\.json: .*hidden_size"):
        load_model(saved)


def test_a_done_marker_that_no_run_wrote_is_refused(saved: Path) -> None:
    (saved / "DONE.json").write_text("{}")
    with pytest.raises(ValueError, match=r"DONE\.json lists no files"):
        checkpoints.content_hash(saved)
    with pytest.raises(ValueError, match=r"DONE\.json lists no files"):
        runs.check_done(saved)


def test_pickled_weights_are_refused_with_a_hint(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not read: convert it to safetensors"):
        Weights(saved)


def test_an_index_cannot_point_outside_its_directory(saved: Path) -> None:
    (saved / checkpoints.INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="names a file outside its directory"):
        Weights(saved)


def test_the_directory_of_an_unfinished_run_is_refused(saved: Path) -> None:
    (saved / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="unfinished run"):
        load_model(saved)


def test_a_full_disk_leaves_nothing_half_written(
    tiny: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    with pytest.raises(OSError, match="no space left") as raised:
        save_model(tiny, tmp_path / "out", source=None, provenance={})
    assert raised.value.errno == errno.ENOSPC
    assert list((tmp_path / "out").iterdir()) == []


def test_a_write_that_the_system_refuses_half_way_leaves_nothing(tiny: LlamaForCausalLM, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large") as raised:
            save_model(tiny, tmp_path / "out", source=None, provenance={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.errno == errno.EFBIG
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("crash", ["before_rename"])
def test_a_kill_while_publishing_leaves_no_model_under_its_name(saved: Path, tmp_path: Path, crash: str) -> None:
    program = (
        "from pathlib import Path; from llamita import checkpoints\n"
        f"model = checkpoints.load_model(Path({str(saved)!r}))\n"
        f"checkpoints.save_model(model, Path({str(tmp_path / 'out')!r}), source=None, provenance={{}})\n"
    )
    environment = {**os.environ, "LLAMITA_CRASH_AT": crash}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == -9
    assert not (tmp_path / "out" / "model.safetensors").exists()
    save_model(load_model(saved), tmp_path / "out", source=None, provenance={})
    assert not list((tmp_path / "out").glob(".model-*"))


def test_the_content_hash_is_that_of_the_content(saved: Path, tmp_path: Path) -> None:
    before = checkpoints.content_hash(saved)
    shutil.copytree(saved, tmp_path / "copy")
    assert checkpoints.content_hash(tmp_path / "copy") == before
    weight = load_file(saved / "model.safetensors")["model.norm.weight"]
    rewrite(saved, **{"model.norm.weight": weight + 1})
    assert checkpoints.content_hash(saved) != before


def test_a_published_folder_is_whole_and_a_failed_one_is_gone(tmp_path: Path) -> None:
    with manifests.publishing(tmp_path / "step-1") as folder:
        (folder / "state.json").write_text("{}")
    assert manifests.check_manifest(tmp_path / "step-1", hashes=True) is None
    with pytest.raises(RuntimeError), manifests.publishing(tmp_path / "step-2") as folder:  # noqa: PT012
        (folder / "state.json").write_text("{}")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_folders_below_a_published_one_are_synced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = storage.fsync
    monkeypatch.setattr(storage, "fsync", lambda path: (synced.append(path.name), real(path)))
    with manifests.publishing(tmp_path / "step-1") as folder:
        (folder / "deepspeed").mkdir()
        (folder / "deepspeed" / "states.pt").write_bytes(b"0123")
    assert {"deepspeed", "states.pt"} <= set(synced)


def test_what_another_process_wrote_must_be_seen_whole_before_it_is_published(tmp_path: Path) -> None:
    with manifests.publishing(tmp_path / "step-1", known := {}) as folder:
        (folder / "theirs").write_bytes(b"0123")
        (folder / "mine").write_bytes(b"4")
        known |= manifests.sync_and_hash(folder, ["theirs"])
    assert manifests.check_manifest(tmp_path / "step-1", hashes=True) is None
    assert storage.read_json(tmp_path / "step-1" / "MANIFEST.json")["files"].keys() == {"theirs", "mine"}
    for entry in ({"theirs": {"bytes": 5, "sha256": ""}}, {"absent": {"bytes": 4, "sha256": ""}}):
        with pytest.raises(OSError, match="a process wrote"), manifests.publishing(tmp_path / "step-2", entry) as f:
            (f / "theirs").write_bytes(b"0123")
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_damage_to_a_published_folder_is_found(tmp_path: Path) -> None:
    with manifests.publishing(tmp_path / "step-1") as folder:
        (folder / "state.bin").write_bytes(b"0123")
    file = tmp_path / "step-1" / "state.bin"
    file.write_bytes(b"0124")
    assert manifests.check_manifest(tmp_path / "step-1") is None
    assert (
        manifests.check_manifest(tmp_path / "step-1", hashes=True) == "state.bin has another content than was written"
    )
    file.write_bytes(b"012")
    assert manifests.check_manifest(tmp_path / "step-1") == "state.bin has 3 bytes instead of 4"
    file.unlink()
    assert manifests.check_manifest(tmp_path / "step-1") == "state.bin is missing"
    storage.write_atomically(tmp_path / "step-1" / "MANIFEST.json", "")
    assert "cannot be read" in str(manifests.check_manifest(tmp_path / "step-1"))
