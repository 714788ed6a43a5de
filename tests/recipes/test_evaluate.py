"""``recipes/evaluate.py`` on tiny models and real packed rows."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from transformers import LlamaForCausalLM

from llamita import checkpoints, runs, storage
from llamita.metrics import read_metrics
from llamita.progress import Progress

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TEXT = "def f(x):\n    return x + {}\n\n\nclass C{}:\n    '''Ein größeres Δ, {} mal.'''\n"


def launch(*overrides: str, processes: int = 1, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the recipe as a user would."""
    command = [sys.executable, "recipes/evaluate.py", *overrides]
    if processes > 1:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
        command = [
            *launcher,
            "--num_machines",
            "1",
            "--main_process_port",
            "0",
            "--mixed_precision",
            "no",
            *command[1:],
        ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "typings"), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_DATASETS_CACHE": str(cache)} if cache else {}
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def told(recipe: Callable[[str], ModuleType], *overrides: str) -> Any:
    """The settings that the command line would give."""
    module = recipe("evaluate")
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        return sys.modules["_main"].settings(compose("evaluate", overrides=list(overrides)), module.Evaluate)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, recipe: Callable[[str], ModuleType]) -> Path:
    """Packed rows of sixty small files, and their tokenizer."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "text").mkdir()
    for index in range(60):
        (folder / "text" / f"{index}.py").write_text(TEXT.format(index, index * 7, index % 9) * (1 + index % 3))
    prepare = recipe("prepare")
    prepare.run(
        prepare.Prepare(
            source=prepare.SourceConfig(path=str(folder / "text"), suffixes=[".py"]),
            tokenizer=prepare.TokenizerConfig(vocab_size=320),
            validation=prepare.ValidationConfig(fraction=0.3),
            sequence_length=64,
            num_proc=1,
            out=folder / "data",
        )
    )
    return folder / "data"


def model_directory(path: Path, tiny: LlamaForCausalLM, tokenizer: Path, *, seed: int = 0, size: int = 0) -> Path:
    """A saved Llama of ``tiny``'s proportions with the vocabulary of ``tokenizer``."""
    config = copy.deepcopy(tiny.config)
    config.vocab_size = size or len(checkpoints.load_tokenizer(tokenizer))
    torch.manual_seed(seed)
    path.mkdir(parents=True)
    checkpoints.save_model(LlamaForCausalLM(config), path, source=tokenizer, provenance={"parents": {}})
    return path


@pytest.fixture
def models(tmp_path: Path, tiny: LlamaForCausalLM, data: Path) -> dict[str, Path]:
    tokenizer = data / "tokenizer"
    return {
        name: model_directory(tmp_path / name, tiny, tokenizer, seed=seed)
        for seed, name in enumerate(("teacher", "first", "second"))
    }


def test_several_models_are_measured_against_a_teacher_and_each_other(
    models: dict[str, Path], data: Path, tmp_path: Path, recipe: Callable[[str], ModuleType]
) -> None:
    out = tmp_path / "out"
    config = told(
        recipe,
        f"models.first.path={models['first']}",
        f"models.again.path={models['first']}",
        f"models.teachers_twin.path={models['teacher']}",
        f"teacher.path={models['teacher']}",
        f"data.path={data}",
        "data.batch_rows=2",
        f"out={out}",
    )
    recipe("evaluate").run(config)
    found = storage.read_json(out / "evaluation.json")
    assert list(found["models"]) == sorted(["teacher", "first", "again", "teachers_twin"])
    assert found["teacher"] == "teacher"
    values = {name: entry["values"] for name, entry in found["models"].items()}
    assert values["first"] == values["again"]
    assert values["first"]["kl"]["value"] > 0
    assert values["teachers_twin"]["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert values["teachers_twin"]["top1_agree"]["value"] == 1
    assert values["first"]["bits_per_byte"]["stderr"] > 0
    gaps = {frozenset((entry["first"], entry["second"])): entry["bits_per_byte"] for entry in found["differences"]}
    assert gaps[frozenset(("first", "again"))] == {"value": 0, "stderr": 0}
    assert len(gaps) == 6
    assert found["models"]["first"]["sha256"] == checkpoints.content_hash(models["first"])
    split = storage.read_json(data / "data.json")["splits"]["validation"]
    assert found["data"]["rows"] == split["rows"]
    assert found["data"]["tokens"] == split["labels"]
    assert (out / "DONE.json").is_file()
    rows = {row["model"]: row for row in read_metrics(out)}
    assert rows["first"]["val/validation/bits_per_byte"] == values["first"]["bits_per_byte"]["value"]
    assert rows["first"]["val/validation/kd"] == values["first"]["kl"]["value"]


def test_the_number_of_processes_changes_nothing(
    models: dict[str, Path],
    data: Path,
    tmp_path: Path,
    recipe: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows and the items of tasks are split over processes."""
    overrides = [f"model.path={models['first']}", f"teacher.path={models['teacher']}", f"data.path={data}"]
    overrides.append("data.batch_rows=1")
    if tasks := importlib.util.find_spec("lm_eval") is not None:
        overrides += ["tasks=[llamita_python_choice]", "task.limit=7"]
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    recipe("evaluate").run(told(recipe, *overrides, f"out={tmp_path / 'one'}"))
    done = launch(*overrides, f"out={tmp_path / 'two'}", processes=2, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    one, two = (storage.read_json(tmp_path / name / "evaluation.json") for name in ("one", "two"))
    for metric, value in one["models"]["model"]["values"].items():
        assert two["models"]["model"]["values"][metric]["value"] == pytest.approx(value["value"], rel=1e-6), metric
        assert two["models"]["model"]["values"][metric]["stderr"] == pytest.approx(value["stderr"], rel=1e-6), metric
    assert one["models"]["model"]["tasks"] == two["models"]["model"]["tasks"]
    assert bool(one["models"]["model"]["tasks"]) == tasks


def test_processes_on_cpus_know_each_other_under_torchrun(tmp_path: Path) -> None:
    """Where not, each would measure all rows."""
    script = tmp_path / "join.py"
    script.write_text(
        "from llamita import evaluate\n"
        "from pathlib import Path\n"
        "joined = evaluate.join_launch()\n"
        "Path(__file__).with_name(f'rank-{joined.process_index}').write_text(str(joined.num_processes))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "typings"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    # A file from each: lines that two processes print to one pipe can mix.
    assert {file.name: file.read_text() for file in tmp_path.glob("rank-*")} == {"rank-0": "2", "rank-1": "2"}, (
        done.stderr
    )


def test_at_most_two_models_are_in_memory(
    models: dict[str, Path],
    data: Path,
    tmp_path: Path,
    recipe: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The teacher and one other, also while the next one is loaded."""
    module = recipe("evaluate")
    loaded: list[weakref.ref[LlamaForCausalLM]] = []
    alive: list[int] = []
    real = module.load

    def load(path: Path, config: Any) -> LlamaForCausalLM:
        alive.append(sum(model() is not None for model in loaded))
        model: LlamaForCausalLM = real(path, config)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(module, "load", load)
    overrides = [f"models.{name}.path={models['first']}" for name in ("a", "b", "c")]
    module.run(told(recipe, *overrides, f"teacher.path={models['teacher']}", f"data.path={data}", f"out={tmp_path}/o"))
    assert alive == [0, 1, 1, 1]


def test_progress_is_told_for_every_batch(
    models: dict[str, Path],
    data: Path,
    tmp_path: Path,
    recipe: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, int]] = []
    update = Progress.update

    def told_of(self: Progress, done: int, note: str = "") -> None:
        seen.append((done, self.total))
        update(self, done, note)

    monkeypatch.setattr(Progress, "update", told_of)
    overrides = [f"models.{name}.path={models['first']}" for name in ("a", "b")]
    more = ["data.batch_rows=1", "data.max_rows=3", f"data.path={data}", f"out={tmp_path}/o"]
    recipe("evaluate").run(told(recipe, *overrides, *more))
    assert seen == [(done, 6) for done in (0, 1, 2, 3, 3, 4, 5, 6)]


def test_a_gpu_that_is_not_here_is_refused_before_anything_is_written(
    models: dict[str, Path], tmp_path: Path, recipe: Callable[[str], ModuleType]
) -> None:
    """By the run, not by the settings: they may be planned on another machine."""
    config = told(recipe, f"model.path={models['first']}", "tasks=[x]", "device=cuda:99", f"out={tmp_path}/out")
    with pytest.raises(ValueError, match="device=cuda:99, but torch"):
        recipe("evaluate").run(config)
    assert not (tmp_path / "out").exists()


def test_rows_longer_than_a_model_can_read_are_refused(
    models: dict[str, Path], data: Path, tmp_path: Path, recipe: Callable[[str], ModuleType]
) -> None:
    file = models["first"] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 32}))
    config = told(recipe, f"model.path={models['first']}", f"data.path={data}", f"out={tmp_path}/out")
    with pytest.raises(ValueError, match="sequence_length 64 is more than"):
        recipe("evaluate").run(config)
    assert not (tmp_path / "out").exists()


def test_tasks_alone_need_no_common_vocabulary(
    models: dict[str, Path], data: Path, tmp_path: Path, tiny: LlamaForCausalLM, recipe: Callable[[str], ModuleType]
) -> None:
    """There is no KL to a teacher without rows."""
    pytest.importorskip("lm_eval", reason='needs lm-eval: pip install -e ".[eval]"')
    wide = model_directory(tmp_path / "wide", tiny, data / "tokenizer", size=400)
    paths = [f"model.path={models['first']}", f"teacher.path={wide}", "tasks=[llamita_python_cloze]"]
    found, rows = recipe("evaluate").check(told(recipe, *paths, f"out={tmp_path}/out"))
    assert (set(found), rows) == ({"teacher", "model"}, None)


def test_tasks_alone_need_no_data(
    models: dict[str, Path], tmp_path: Path, recipe: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason='needs lm-eval: pip install -e ".[eval]"')
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    module = recipe("evaluate")
    config = module.Evaluate(
        model=module.ModelConfig(path=models["first"]), tasks=["llamita_python_cloze"], out=tmp_path / "out"
    )
    config.task.limit = 4
    module.run(config)
    entry = storage.read_json(tmp_path / "out" / "evaluation.json")["models"]["model"]
    assert entry["values"] == {}
    assert 0 <= entry["tasks"]["llamita_python_cloze"]["acc"]["value"] <= 1
    assert "eval/llamita_python_cloze/acc" in read_metrics(tmp_path / "out")[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": True}, r"either model\.path= .* or models\.NAME\.path="),
        ({"model": None}, r"either model\.path="),
        ({"data": None}, "nothing to measure"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"device": "gpu"}, "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        ({"batch_rows": 0}, r"data\.batch_rows must be at least 1, got 0"),
        ({"max_rows": 0}, r"data\.max_rows must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    change: dict[str, Any], message: str, recipe: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    module = recipe("evaluate")
    model = module.ModelConfig(path=None if "model" in change else tmp_path)
    with pytest.raises(ValueError, match=message):
        module.Evaluate(
            model=model,
            models={"other": model} if "models" in change else {},
            data=module.DataConfig(
                path=None if "data" in change else tmp_path,
                batch_rows=change.get("batch_rows", 1),
                max_rows=change.get("max_rows"),
            ),
            dtype=change.get("dtype"),
            device=change.get("device", "auto"),
            out=tmp_path / "out",
        )


def test_a_model_with_another_tokenizer_than_the_data_is_refused_before_anything_is_written(
    models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    file = models["second"] / "tokenizer.json"
    definition = json.loads(file.read_text())
    definition["model"]["merges"] = definition["model"]["merges"][:-1]
    file.write_text(json.dumps(definition))
    done = launch(f"model.path={models['second']}", f"data.path={data}", f"out={tmp_path / 'out'}")
    assert done.returncode == runs.EXIT_USER
    assert "another tokenizer" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_models_of_other_vocabularies_are_refused(
    models: dict[str, Path], data: Path, tmp_path: Path, tiny: LlamaForCausalLM, recipe: Callable[[str], ModuleType]
) -> None:
    module = recipe("evaluate")
    tokenizer = data / "tokenizer"
    wide = model_directory(tmp_path / "wide", tiny, tokenizer, size=400)
    small = model_directory(tmp_path / "small", tiny, tokenizer, size=100)
    with pytest.raises(ValueError, match="one vocabulary"):
        module.run(
            module.Evaluate(
                model=module.ModelConfig(path=models["first"]),
                teacher=module.ModelConfig(path=wide),
                data=module.DataConfig(path=data),
                out=tmp_path / "out",
            )
        )
    with pytest.raises(ValueError, match="only 100"):
        module.run(
            module.Evaluate(
                model=module.ModelConfig(path=small), data=module.DataConfig(path=data), out=tmp_path / "out"
            )
        )
    assert not (tmp_path / "out").exists()


def test_models_are_named_without_a_plus_sign(recipe: Callable[[str], ModuleType]) -> None:
    config = told(recipe, "models.a.path=x/y", "models.b-2.path=z", "tasks=[one,two]", "data.path=d", "out=o")
    assert {name: model.path for name, model in config.models.items()} == {"a": Path("x/y"), "b-2": Path("z")}
    assert config.tasks == ["one", "two"]


@pytest.mark.parametrize("override", ["models.a.pth=x", "model.pth=x", "task.limit=ten", "data.rows=3"])
def test_a_setting_that_does_not_exist_or_has_another_type_is_refused(
    override: str, recipe: Callable[[str], ModuleType]
) -> None:
    with pytest.raises((HydraException, OmegaConfBaseException), match=r"pth|ten|rows"):
        told(recipe, override, "data.path=d", "out=o")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_measures_what_the_cpu_measures(
    models: dict[str, Path], data: Path, tmp_path: Path, recipe: Callable[[str], ModuleType]
) -> None:
    module = recipe("evaluate")
    found = []
    for device in ("cpu", "cuda"):
        module.run(
            module.Evaluate(
                model=module.ModelConfig(path=models["first"]),
                teacher=module.ModelConfig(path=models["teacher"]),
                data=module.DataConfig(path=data),
                device=device,
                out=tmp_path / device,
            )
        )
        found.append(storage.read_json(tmp_path / device / "evaluation.json")["models"]["model"]["values"])
    for metric, value in found[0].items():
        assert found[1][metric]["value"] == pytest.approx(value["value"], rel=1e-4), metric
