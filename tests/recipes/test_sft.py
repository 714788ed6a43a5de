"""Training on dialogues: what is learnt, what is not, and every start and ending."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from conftest import REPOSITORY, tiny_model
from llamita import chat, checkpoints, runs, storage
from llamita.adapters import LoraConfig
from llamita.align import dialogues
from llamita.data import tokens
from llamita.data.fit import Overlong
from llamita.data.shards import PackedData
from llamita.distill import losses, optim
from llamita.distill.teachers import TeacherConfig
from llamita.metrics import read_metrics
from llamita.progress import Progress

WORDS = ("red", "green", "blue", "white", "black", "grey", "pink", "brown")
SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 600}

MARKED = {
    "turns": (
        [
            {"role": "system", "content": "Be brief. "},
            {"role": "user", "content": "red?"},
            {"role": "assistant", "content": " blue"},
            {"role": "user", "content": "and?"},
            {"role": "assistant", "content": "green"},
        ],
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nred?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{blue<|eot_id|>}"
        "<|start_header_id|>user<|end_header_id|>\n\nand?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{green<|eot_id|>}",
    ),
    "tool": (
        [
            {"role": "user", "content": "Rome?"},
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Rome", "days": 2}'}}],
            },
            {"role": "tool", "content": '{"sun": true}'},
            {"role": "assistant", "content": "Sun."},
        ],
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nRome?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{[weather(city='Rome', days=2)]<|eot_id|>}"
        '<|start_header_id|>ipython<|end_header_id|>\n\n{"sun": true}<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n{Sun.<|eot_id|>}",
    ),
    "code": (
        [
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": "print(2 + 2)", "code": True},
            {"role": "ipython", "content": "4"},
            {"role": "assistant", "content": "4"},
        ],
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n2 + 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{<|python_tag|>print(2 + 2)<|eom_id|>}"
        "<|start_header_id|>ipython<|end_header_id|>\n\n4<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{4<|eot_id|>}",
    ),
    "cut": (
        [{"role": "user", "content": "all?"}, {"role": "assistant", "content": "-".join("0123456789" * 20)}],
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nall?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{0-1-2-3-4-5-6-7-8-9",
    ),
}
"""Messages as they come, and what the model reads, with braces around what it learns to say."""


def talk(number: int) -> list[dict[str, Any]]:
    """A colour is asked for, the next one is the answer."""
    first, second = WORDS[number % 8], WORDS[(number + 1) % 8]
    asked = [{"role": "user", "content": f"after {first}, number {number}?"}]
    more = [{"role": "user", "content": "again?"}, {"role": "assistant", "content": f"{second}!"}]
    return [*asked, {"role": "assistant", "content": second}, *(more if number % 3 == 0 else [])]


def write(folder: Path, train: list[Any], validation: list[Any]) -> Path:
    folder.mkdir()
    rows = {}
    for split, items in (("train", train), ("validation", validation)):
        rows[split] = {
            "dialogues": [dialogues.parse_dialogue({"messages": item}, f"{split}-{n}") for n, item in enumerate(items)]
        }
    dialogues.write_all(folder, rows, {})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sft")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    """A tiny Llama with a tokenizer of Llama 3's special tokens and without a chat template."""
    texts = [Path(__file__).read_text(encoding="utf-8"), Path(chat.__file__).read_text(encoding="utf-8")]
    tokens.train(texts, 600).save_pretrained(folder / "tokenizer")
    made = tiny_model(**SIZES, max_position_embeddings=16384)
    checkpoints.save_model(made, folder / "model", source=folder / "tokenizer", provenance={})
    return folder / "model"


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    return write(folder / "talks", [talk(n) for n in range(48)], [talk(n) for n in range(48, 58)])


def settings(module: ModuleType, model: Path, data: Path, out: Path, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "model": module.ModelConfig(path=model),
        "data": module.DialoguesConfig(path=data),
        "sequence_length": 128,
        "steps": 6,
        "global_batch_rows": 4,
        "micro_batch_rows": 2,
        "checkpoint_every": 2,
        "validation_every": 0,
        "optim": optim.OptimConfig(learning_rate=3e-3, warmup_steps=2),
        "num_proc": 1,
        "out": out,
    }
    return module.Sft(**{**fields, **changes})


@pytest.fixture(scope="module")
def module(recipe: Callable[[str], ModuleType]) -> ModuleType:
    return recipe("sft")


@pytest.fixture(scope="module")
def trained(module: ModuleType, model: Path, data: Path, folder: Path) -> Path:
    module.run(settings(module, model, data, folder / "trained"))
    return folder / "trained"


def packed(module: ModuleType, config: Any) -> PackedData:
    """The rows that a run would train on."""
    config.out.mkdir(exist_ok=True)
    here = SimpleNamespace(path=config.out, stop=threading.Event())
    return PackedData.open(module._dialogue_rows.ready(module.check(config), here))


def documents(data: PackedData, split: str) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each document of the rows; padding, of which nothing is supervised, is left out."""
    rows = data.split(split)
    found = []
    for index in range(len(rows)):
        row = {name: value[0] for name, value in rows.rows(torch.tensor([index]).numpy()).items()}
        starts = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), data.sequence_length]
        for begin, end in itertools.pairwise(starts):
            ids, labels = row["input_ids"][begin:end].tolist(), row["labels"][begin:end].tolist()
            if any(label != losses.IGNORE for label in labels):
                found.append((ids, labels))
    return found


def marked(tokenizer: Any, ids: list[int], labels: list[int]) -> str:
    """The text with braces around what is to be predicted."""
    text, inside = "", False
    for token, label in zip(ids, labels, strict=True):
        assert label in (token, losses.IGNORE)
        said = label == token
        text += ("{" if said and not inside else "}" if inside and not said else "") + tokenizer.decode(token)
        inside = said
    return text + ("}" if inside and text.endswith("_id|>") else "")


@pytest.mark.parametrize("overlong", list(Overlong))
def test_the_rows_on_disk_teach_token_by_token_what_was_marked_by_hand(
    overlong: Overlong, module: ModuleType, model: Path, tmp_path: Path
) -> None:
    wanted = {text for _, text in MARKED.values()}
    source = write(tmp_path / "marked", [messages for messages, _ in MARKED.values()], [talk(0)])
    config = settings(module, model, source, tmp_path / "out", overlong=overlong, sequence_length=96)
    rows = packed(module, config)
    tokenizer = checkpoints.load_tokenizer(model)
    found = {marked(tokenizer, *document): len(document[0]) for document in documents(rows, "train")}
    cut = {text: length for text, length in found.items() if not text.endswith("}")}
    whole = {text for text in wanted if text.endswith("}")}
    assert found.keys() - cut.keys() == whole
    counts = module._dialogue_rows.counts(config.out / "packed")
    if overlong is Overlong.drop:
        assert not cut
        assert (counts["sft/dropped"], counts["sft/truncated"]) == (1, 0)
    else:
        ((text, length),) = cut.items()
        assert length == 96
        assert text.startswith(next(iter(wanted - whole)))
        assert (counts["sft/dropped"], counts["sft/truncated"]) == (0, 1)


def test_the_rows_do_not_depend_on_how_many_processes_encode(
    module: ModuleType, model: Path, data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module._dialogue_rows, "BYTES_PER_PROCESS", 100)
    rows = packed(module, settings(module, model, data, tmp_path / "out", num_proc=2))
    assert rows.content_hash == PackedData.open(trained / "packed").content_hash


@pytest.mark.parametrize(
    ("left", "ending"), [(["run.json"], runs.Stopped), (["run.json", "ERROR.json"], ValueError), ([], ValueError)]
)
def test_a_process_that_waits_for_rows_ends_when_the_one_that_makes_them_does(
    left: list[str],
    ending: type[Exception],
    module: ModuleType,
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped where that one was stopped, the user's error where it had one."""
    (tmp_path / ".lock").touch()
    for name in left:
        (tmp_path / name).touch()
    monkeypatch.setattr(runs, "is_main_process", lambda: False)
    monkeypatch.setattr(module._dialogue_rows.time, "sleep", lambda _: (tmp_path / ".lock").unlink(missing_ok=True))
    with pytest.raises(ending, match="the main process"):
        packed(module, settings(module, model, data, tmp_path))


def test_a_published_model_can_be_talked_to_and_its_template_marks_what_was_learnt(
    trained: Path, model: Path, data: Path
) -> None:
    stock = AutoModelForCausalLM.from_pretrained(trained)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    encoder = chat.Encoder(checkpoints.load_tokenizer(trained))
    assert type(stock).__name__ == "LlamaForCausalLM"
    assert not (model / "chat_template.jinja").exists()
    assert tokenizer.chat_template == chat.TEMPLATE
    for item, _ in MARKED.values():
        messages = dialogues.parse_messages(item)
        given = tokenizer.apply_chat_template(
            list(messages), return_dict=True, return_assistant_tokens_mask=True, tokenize=True
        )
        assert given["input_ids"] == encoder.dialogue(messages).ids
        assert [bool(one) for one in given["assistant_masks"]] == encoder.dialogue(messages).supervised
    generation = GenerationConfig.from_pretrained(trained)
    assert generation.eos_token_id == encoder.stop_ids == stock.config.eos_token_id
    assert set(encoder.stop_ids) == set(tokenizer.convert_tokens_to_ids([chat.EOS, chat.MESSAGE_END, chat.TURN_END]))
    assert generation.pad_token_id == tokenizer.pad_token_id
    provenance = json.loads((trained / "llamita.json").read_text())
    assert provenance["recipe"] == "sft"
    assert provenance["parents"] == {
        "model": {"path": str(model), "sha256": checkpoints.content_hash(model)},
        "data": {"path": str(data), "sha256": dialogues.DialogueData.open(data).content_hash},
    }
    done = runs.check_done(trained)
    assert set(done["files"]) >= {"model.safetensors", "generation_config.json", "chat_template.jinja"}
    assert done["parents"].keys() == {"model", "data"}


def said_alone(model: Path, items: list[list[dict[str, Any]]]) -> tuple[float, int]:
    """Nats and number of what the assistant says, each dialogue by itself in a stock model of float64."""
    stock, encoder = (
        AutoModelForCausalLM.from_pretrained(model).double(),
        chat.Encoder(checkpoints.load_tokenizer(model)),
    )
    total, count = 0.0, 0
    for messages in items:
        encoded = encoder.dialogue(messages)
        ids, said = torch.tensor([encoded.ids]), torch.tensor(encoded.supervised)[1:]
        with torch.no_grad():
            logits = stock(ids).logits[0, :-1]
        total += float(functional.cross_entropy(logits, ids[0, 1:], reduction="none")[said].sum())
        count += int(said.sum())
    return total, count


def test_the_loss_of_packed_dialogues_is_that_of_the_dialogues_alone(trained: Path, model: Path) -> None:
    first = next(row for row in read_metrics(trained) if "val/held_out/loss" in row)
    total, count = said_alone(model, [talk(n) for n in range(48, 58)])
    assert first["val/held_out/loss"] == pytest.approx(total / count, rel=1e-6)
    assert first["step"] == 0
    counts = read_metrics(trained)[0]
    assert counts["sft/validation_labels"] == count
    assert (counts["sft/dialogues"], counts["sft/dropped"], counts["sft/refused"]) == (48, 0, 0)


def test_held_out_answers_become_likelier(trained: Path) -> None:
    values = [row["val/held_out/loss"] for row in read_metrics(trained) if "val/held_out/loss" in row]
    assert values[-1] < values[0] - 0.5
    total, count = said_alone(trained, [talk(n) for n in range(48, 58)])
    assert values[-1] == pytest.approx(total / count, rel=1e-5)


def test_a_stopped_run_goes_on_to_the_same_bytes(
    module: ModuleType, model: Path, data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not encode again."""
    told = Progress.update

    def update(self: Progress, completed: int, note: str = "") -> None:
        told(self, completed, note)
        if completed == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Progress, "update", update)
    config = settings(module, model, data, tmp_path / "run")
    with pytest.raises(runs.Stopped):
        module.run(config)
    monkeypatch.undo()
    monkeypatch.setattr(module._dialogue_rows, "_make", None)
    module.run(config)
    assert (tmp_path / "run/model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 7))
    assert sum("sft/dialogues" in row for row in rows) == 1
    summary = runs.check_done(tmp_path / "run")["summary"]
    assert summary["sft/dialogues"] == 48


def test_a_checkpoint_is_published_as_the_run_itself_would_have(
    recipe: Callable[[str], ModuleType], trained: Path, tmp_path: Path
) -> None:
    """The newest one: the same bytes, tokenizer and ends of answers included."""
    publish = recipe("publish")
    publish.run(publish.Publish(training=publish.TrainingConfig(path=trained), out=tmp_path / "model"))
    for name in ("model.safetensors", "config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "model" / name).read_bytes() == (trained / name).read_bytes(), name


def test_rows_of_other_dialogues_are_refused_on_a_restart_and_damaged_ones_too(
    module: ModuleType, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "talks"
    shutil.copytree(data, source)
    config = settings(module, model, source, tmp_path / "run")
    monkeypatch.setattr(module._training, "begin", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        module.run(config)
    shutil.rmtree(source)
    write(source, [talk(n) for n in range(20)], [talk(n) for n in range(48, 58)])
    with pytest.raises(ValueError, match=r"packed was made from other dialogues than data.path"):
        module.run(config)
    shutil.rmtree(source)
    shutil.copytree(data, source)
    shard = tmp_path / "run/packed/shards/train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"packed is damaged: shards/train-00000.bin has another content"):
        module.run(config)
    for killed in ("packed", ".encoding"):  # while it was made
        shutil.rmtree(tmp_path / "run" / killed, ignore_errors=True)
        (tmp_path / "run" / killed.replace("packed", ".tmp-packed-0") / "shards").mkdir(parents=True)
    monkeypatch.undo()
    module.run(config)
    assert runs.check_done(tmp_path / "run")
    assert not [path for path in (tmp_path / "run").glob(".*") if path.is_dir()]


@pytest.mark.slow
def test_a_kill_while_the_rows_are_written_leaves_nothing_and_costs_nothing(
    model: Path, data: Path, trained: Path, module: ModuleType, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [sys.executable, str(REPOSITORY / "recipes/sft.py"), f"model.path={model}", f"data.path={data}"]
    told = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "typings"), "LLAMITA_CRASH_AT": "after_shard:2"}
    training = ["sequence_length=128", "steps=6", "global_batch_rows=4", "micro_batch_rows=2", "validation_every=0"]
    training += ["optim.learning_rate=3e-3", "optim.warmup_steps=2", "optim.weight_decay=0.1", "checkpoint_every=2"]
    done = subprocess.run([*command, *training, f"out={out}"], env={**os.environ, **told}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name.partition("-")[0] for path in out.glob(".tmp-packed-*")] == [".tmp"]
    module.run(settings(module, model, data, out))
    assert (out / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert not [path for path in out.glob(".*") if path.is_dir()]


@pytest.mark.slow
def test_two_processes_under_zero_2_lose_what_one_loses(model: Path, data: Path, trained: Path, tmp_path: Path) -> None:
    """And one of them packs for both."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(str(REPOSITORY / "recipes/sft.py"), f"model.path={model}", f"data.path={data}", f"out={tmp_path / 'run'}"),
        *("sequence_length=128", "steps=6", "global_batch_rows=4", "micro_batch_rows=1", "validation_every=0"),
        *("optim.learning_rate=3e-3", "optim.warmup_steps=2", "optim.weight_decay=0.1", "num_proc=1"),
        "deepspeed=zero2",
    ]
    environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY / "typings")}
    done = subprocess.run(command, env={**os.environ, **environment}, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("train/loss", "val/held_out/loss", "optim/grad_norm"):
        curves = [
            {row["step"]: row[name] for row in read_metrics(path) if name in row}
            for path in (tmp_path / "run", trained)
        ]
        assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_adapters_are_merged_and_a_teacher_is_learnt_from(
    module: ModuleType, model: Path, data: Path, trained: Path, tmp_path: Path
) -> None:
    config = settings(
        module,
        model,
        data,
        tmp_path / "run",
        lora=LoraConfig(rank=2),
        teachers={"big": TeacherConfig(path=trained)},
        loss=losses.LossConfig(ce_weight=0.5),
        steps=0,
        epochs=1.5,
    )
    module.run(config)
    summary = runs.check_done(tmp_path / "run")["summary"]
    rows = read_metrics(tmp_path / "run")
    steps = max(row["step"] for row in rows)
    assert steps == -(-3 * len(PackedData.open(tmp_path / "run/packed").split("train")) // 8)
    first = next(row for row in rows if "val/held_out/kd" in row)
    assert first["val/held_out/kl_big"] > summary["val/held_out/kl_big"]
    assert summary["train/loss"] == pytest.approx(0.5 * summary["train/ce"] + 0.5 * summary["train/kd"])
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (model, tmp_path / "run"))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("proj" in name for name in changed)
    provenance = json.loads((tmp_path / "run/llamita.json").read_text())
    assert provenance["parents"].keys() == {"model", "data", "big"}
    assert provenance["settings"]["lora"]["rank"] == 2


def test_a_dialogue_that_cannot_be_written_is_counted_and_too_many_end_the_run(
    module: ModuleType, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In a template's text the name of a special token could not be told from the token."""
    templated = tmp_path / "templated"
    shutil.copytree(model, templated)
    settings_of_its_own = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 1, "_from_model_config": True}
    storage.write_json(templated / "generation_config.json", settings_of_its_own)
    (templated / "chat_template.jinja").write_text(chat.TEMPLATE + "{# another #}")
    bad = [{"role": "user", "content": f"what is {chat.TURN_END}?"}, {"role": "assistant", "content": "an end"}]
    source = write(tmp_path / "talks", [bad, *(talk(n) for n in range(9))], [talk(9)])
    config = settings(module, templated, source, tmp_path / "run")
    with pytest.raises(ValueError, match=r"train: 1 of 10 rows were refused, data.max_refused=0.05 allows fewer"):
        packed(module, config)
    assert not (tmp_path / "run/packed").exists()
    config.data.max_refused = 0.2
    assert len(documents(packed(module, config), "train")) == 9
    assert module._dialogue_rows.counts(config.out / "packed")["sft/refused"] == 1
    spoken = storage.read_json(config.out / "packed/tokenizer/generation_config.json")
    assert (spoken["temperature"], spoken["eos_token_id"]) == (
        0.6,
        chat.Encoder(module.check(config).tokenizer).stop_ids,
    )
    assert "_from_model_config" not in spoken
    assert (config.out / "packed/tokenizer/chat_template.jinja").read_text().endswith("{# another #}")
    assert "dialogue train-0: a message holds the special token <|eot_id|>" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0, "epochs": 0.0}, "epochs must be > 0"),
        ({"steps": 3, "epochs": 1.0}, "epochs must be > 0 and finite, with steps not set, got 1.0"),
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"sequence_length": 1}, "sequence_length must be at least 2, got 1"),
        (
            {"sequence_length": 32768},
            r"sequence_length must be at most max_position_embeddings=16384 of model.path=.*32768",
        ),
        ({"teachers": {"big": TeacherConfig(path=Path("x"))}}, r"loss.ce_weight=1 leaves the teachers no weight"),
        ({"loss": losses.LossConfig(ce_weight=0.5)}, "loss.ce_weight=0.5 needs a teacher"),
        ({"teachers": {"model": TeacherConfig(path=Path("x"))}}, r"teachers.model: a teacher must not have the name"),
        ({"global_batch_rows": 3}, "multiple of micro_batch_rows"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_meant_are_refused_before_anything_is_written(
    change: dict[str, Any], message: str, module: ModuleType, model: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        module.run(settings(module, model, data, tmp_path / "out", **change))
    assert not (tmp_path / "out").exists()


def test_dialogues_and_teachers_that_do_not_fit_are_refused_before_anything_is_written(
    module: ModuleType, model: Path, data: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def refused(message: str, **change: Any) -> None:
        with pytest.raises(ValueError, match=message):
            module.run(settings(module, model, **{"data": data, "out": out, **change}))
        assert not out.exists()

    refused("is not a directory that dialogues or sample wrote", data=model)
    bare = write(tmp_path / "bare", [talk(0)], [])
    refused("has no validation dialogues: validation_rows=0 trains without, got 64", data=bare)
    refused(r"has no train.dialogues.jsonl", data=write(tmp_path / "none", [], [talk(0)]))
    foreign = tmp_path / "foreign"
    shutil.copytree(model, foreign)
    definition = storage.read_json(foreign / "tokenizer.json")
    definition["model"]["merges"] = definition["model"]["merges"][:-1]
    storage.write_json(foreign / "tokenizer.json", definition)
    refused(
        r"tokenizer of big .* is not that of model.path",
        teachers={"big": TeacherConfig(path=foreign)},
        loss=losses.LossConfig(ce_weight=0.5),
    )
    refused(
        r"sequence_length=8 leaves none of the 48 dialogues .*talks, train: the shortest needs sequence_length=\d+, "
        r"all of them \d+; overlong=drop",
        sequence_length=8,
    )


def test_a_run_without_held_out_dialogues_needs_none(module: ModuleType, model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "talks", [talk(n) for n in range(8)], [])
    module.run(settings(module, model, source, tmp_path / "run", validation_rows=0, steps=1))
    assert not any("val/" in key for row in read_metrics(tmp_path / "run") for key in row)
