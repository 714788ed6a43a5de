"""What a user may rely on whatever is in the environment, in a settings file or in a model directory."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import invented
from conftest import REPOSITORY, tiny_model
from llamita import checkpoints, runs, storage

CANARIES = {
    "HF_TOKEN": "hf_" + "CanaryA1" * 4,
    "HUGGING_FACE_HUB_TOKEN": "hf_" + "CanaryB2" * 4,
    "WANDB_API_KEY": "c" * 8 + "0a1b2c3d" * 4,
    "AWS_SECRET_ACCESS_KEY": "CanaryC3/" * 4,
    "OPENAI_API_KEY": "sk-" + "CanaryD4" * 4,
    "MY_COMPANYS_PASSWORD": "CanaryE5-correct-horse",
}
PIPELINE = """
# @package _global_
stages:
  data:
    recipe: prepare
    overrides:
      - source.path={lines}
      - tokenizer.vocab_size=640
      - sequence_length=64
      - num_proc=1
      - validation.fraction=0.1
  teacher:
    recipe: distill
    after: [data]
    overrides: &student
      - data.path=${{out}}/data
      - student.shape.num_hidden_layers=2
      - student.shape.hidden_size=32
      - student.shape.intermediate_size=48
      - student.shape.num_attention_heads=4
      - student.shape.num_key_value_heads=2
      - steps=2
      - global_batch_rows=2
      - micro_batch_rows=2
      - validation_rows=2
      - run.wandb=offline
  pruned:
    recipe: prune
    after: [data, teacher]
    overrides:
      - model.path=${{out}}/teacher
      - calibration.path=${{out}}/data
      - calibration.tokens=512
      - target.intermediate_size=32
      - compensation.layer_steps=0
      - compensation.head_steps=0
      - compensation.tied_steps=0
      - compensation.attention_steps=0
  cache:
    recipe: cache
    after: [data, teacher]
    overrides:
      - teacher.path=${{out}}/teacher
      - data.path=${{out}}/data
      - data.splits=[validation]
  distilled:
    recipe: distill
    after: [data, teacher, pruned]
    overrides:
      - student.path=${{out}}/pruned
      - teachers.teacher.path=${{out}}/teacher
      - data.path=${{out}}/data
      - steps=2
      - global_batch_rows=2
      - micro_batch_rows=2
      - validation_rows=2
      - run.wandb=offline
  evaluation:
    recipe: evaluate
    after: [data, teacher, distilled]
    overrides:
      - teacher.path=${{out}}/teacher
      - models.distilled.path=${{out}}/distilled
      - data.path=${{out}}/data
      - data.max_rows=4
  report:
    recipe: report
    after: [evaluation]
    show: true
    overrides:
      - runs.data=${{out}}/data
      - runs.teacher=${{out}}/teacher
      - runs.pruned=${{out}}/pruned
      - runs.distilled=${{out}}/distilled
      - runs.evaluation=${{out}}/evaluation
"""
SPY = """
import os, runpy, sys
log = open(os.environ["SPY_LOG"], "a")
def hook(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        writes = any(letter in (mode or "") for letter in "wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
        if not writes:
            return
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod"):
        path = arguments[0]
    elif event in ("os.rename", "os.link", "os.symlink"):
        path = arguments[1]
    else:
        return
    if isinstance(path, (str, bytes, os.PathLike)):
        log.write(f"{event} {os.path.abspath(os.fsdecode(path))}\\n")
        log.flush()
sys.addaudithook(hook)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def environment(home: Path, **more: str) -> dict[str, str]:
    """An environment whose home and temporary files are below ``home``."""
    (home / "tmp").mkdir(parents=True, exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    return {**inherited, "HOME": str(home), "TMPDIR": str(home / "tmp"), "XDG_CACHE_HOME": str(home / "cache"), **more}


@pytest.mark.slow
def test_no_secret_of_the_environment_is_in_any_byte_that_a_chain_wrote(
    recipe: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    invented.packed(recipe("prepare"), tmp_path)
    (tmp_path / "configs/pipeline").mkdir(parents=True)
    (tmp_path / "configs/pipeline/small.yaml").write_text(PIPELINE.format(lines=tmp_path / "lines.jsonl"))
    command = [sys.executable, str(REPOSITORY / "recipes/pipeline.py"), "--config-dir", str(tmp_path / "configs")]
    done = subprocess.run(
        [*command, "pipeline=small", "local.parallel=2", f"out={tmp_path / 'out'}"],
        env=environment(tmp_path / "home", WANDB_MODE="offline", **CANARIES),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert any(path.name == "report.html" for path in files)
    for name, canary in CANARIES.items():
        assert canary not in done.stdout + done.stderr, name
        for path in files:
            assert canary.encode() not in path.read_bytes(), f"{name} is in {path}"


def test_a_run_writes_below_its_directory_only_and_never_into_what_it_reads(
    recipe: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    data, teacher, out = invented.packed(recipe("prepare"), tmp_path), tmp_path / "teacher", tmp_path / "out"
    checkpoints.save_model(tiny_model(vocab_size=640), teacher, source=data / "tokenizer", provenance={})
    before = {path: storage.sha256(path) for path in (*data.rglob("*"), *teacher.rglob("*")) if path.is_file()}
    (tmp_path / "spy.py").write_text(SPY)
    shape = [f"student.shape.{name}=2" for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")]
    overrides = [f"data.path={data}", f"teachers.big.path={teacher}", *shape, "student.shape.hidden_size=16"]
    overrides += ["student.shape.intermediate_size=16", "steps=2", "global_batch_rows=2", "micro_batch_rows=2"]
    home = tmp_path / "home"
    done = subprocess.run(
        [sys.executable, str(tmp_path / "spy.py"), str(REPOSITORY / "recipes/distill.py"), *overrides, f"out={out}"],
        env=environment(home, SPY_LOG=str(tmp_path / "spy.log"), PYTHONDONTWRITEBYTECODE="1"),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = [line.split(" ", 1)[1] for line in (tmp_path / "spy.log").read_text().splitlines()]
    assert any(path.endswith("/checkpoints/LATEST") for path in written), "the spy saw nothing"
    allowed = (str(out), str(home), "/dev/", "/proc/", "/sys/")
    assert [path for path in written if not path.startswith(allowed)] == []
    assert {path: storage.sha256(path) for path in before} == before
    assert {path for path in (*data.rglob("*"), *teacher.rglob("*")) if path.is_file()} == before.keys()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("broken", "# @package _global_\nstages: [a\n"),
        ("tag", "# @package _global_\nstages:\n  a: !!python/object/apply:os.system ['touch {canary}']\n"),
        ("target", "# @package _global_\nstages:\n  a:\n    recipe: prepare\n    _target_: os.system\n"),
        (
            "resolver",
            "# @package _global_\nstages:\n  a:\n    recipe: prepare\n    overrides: ['${{eval:1}}']\n",
        ),
    ],
)
def test_no_settings_file_runs_code_and_a_broken_one_is_the_users_error(tmp_path: Path, name: str, text: str) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "pipeline").mkdir()
    (tmp_path / f"pipeline/{name}.yaml").write_text(text.format(canary=canary))
    command = [sys.executable, str(REPOSITORY / "recipes/pipeline.py"), "--config-dir", str(tmp_path)]
    done = subprocess.run(
        [*command, f"pipeline={name}", f"out={tmp_path / 'out'}"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == runs.EXIT_USER, done.stderr
    assert done.stderr.startswith("error: ")
    assert not canary.exists()


@pytest.mark.parametrize("value", ["$(touch canary)", "`touch canary`", "; touch canary", "a'b\"c d"])
def test_what_a_shell_would_run_stays_text(tmp_path: Path, value: str) -> None:
    """A value with such characters reaches the recipe as it is, which then says that there is no such file."""
    command = [sys.executable, str(REPOSITORY / "recipes/prepare.py"), f"out={tmp_path / 'out'}"]
    done = subprocess.run(
        [*command, "sequence_length=64", f"source.path={json.dumps(value)}"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == runs.EXIT_USER, done.stderr
    assert value in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == []


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def malicious(tmp_path: Path, recipe: Callable[[str], ModuleType]) -> Path:
    """A model that would make ``canary`` beside itself, by whichever way its code was run."""
    data, folder = invented.packed(recipe("prepare"), tmp_path), tmp_path / "model"
    checkpoints.save_model(tiny_model(vocab_size=640), folder, source=data / "tokenizer", provenance={})
    code = f"import os\nos.mkdir({str(tmp_path / 'canary')!r})\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py", "generate.py"):
        (folder / name).write_text(code)
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "tokenizer.pkl"):
        (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "canary")))
    change(folder / "config.json", _attn_implementation_internal="kernels-evil/attention", _name_or_path=str(folder))
    change(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]},
        tokenizer_class="Evil",
    )
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(code)
    return folder


def change(file: Path, **fields: Any) -> None:
    text = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**text, **fields}))


def test_the_code_of_a_malicious_model_directory_is_never_run(malicious: Path, tmp_path: Path) -> None:
    model = checkpoints.load_model(malicious)
    tokenizer = checkpoints.load_tokenizer(malicious)
    checkpoints.Weights(malicious).layer(0)
    checkpoints.content_hash(malicious)
    assert len(tokenizer("some text").input_ids) > 0
    assert type(model).__name__ == "LlamaForCausalLM"
    assert "evil" not in str(model.config.to_dict()), "an underscore key came through"
    assert not (tmp_path / "canary").exists()
    change(malicious / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    with pytest.raises(ValueError, match=r"asks for code of its own \(auto_map\), which is never run"):
        checkpoints.load_model(malicious)
    (malicious / "model.safetensors").unlink()
    change(malicious / "config.json", auto_map=None)
    text = json.loads((malicious / "config.json").read_text())
    del text["auto_map"]
    (malicious / "config.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match=r"is not read: convert it to safetensors first"):
        checkpoints.load_model(malicious)
    assert not (tmp_path / "canary").exists()


def test_a_malicious_model_directory_leaves_nothing_of_its_code_in_what_is_made_of_it(
    malicious: Path, tmp_path: Path
) -> None:
    checkpoints.save_model(checkpoints.load_model(malicious), tmp_path / "copy", source=malicious, provenance={})
    assert not [path for path in (tmp_path / "copy").rglob("*") if path.suffix in (".py", ".bin", ".pt", ".pkl")]
    assert not re.search("evil", (tmp_path / "copy/config.json").read_text())
    assert not (tmp_path / "canary").exists()


def test_a_pickle_under_the_name_of_weights_is_refused(malicious: Path, tmp_path: Path) -> None:
    (malicious / "model.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "canary")))
    with pytest.raises(ValueError, match="damaged or cut short"):
        checkpoints.load_model(malicious)
    torch.save({"a": torch.zeros(2)}, malicious / "model.safetensors")
    with pytest.raises(ValueError, match="damaged or cut short"):
        checkpoints.load_model(malicious)
    assert not (tmp_path / "canary").exists()
