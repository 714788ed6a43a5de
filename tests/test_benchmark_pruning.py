"""Methods of pruning are compared at equal shapes, and a checkpoint of llama2.c is read as llama2.c reads it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.convert_slow_tokenizer import import_protobuf

import calibration
import llama2c
import pruning
import pruning_methods
import pruning_shapes
import pruning_table
from conftest import REPOSITORY, tiny_config, tiny_model
from llamita import checkpoints
from llamita.prune import head, tie_steps, tune
from llamita.prune.compensation import CompensationConfig
from llamita.shapes import LlamaShape
from pruning_shapes import Family

SHARED = REPOSITORY.parent / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "models").is_dir(), reason=f"no shared checkpoints in {SHARED}")
REAL = [pytest.param(name, marks=needs_shared) for name in ("stories260k", "babyllama-tok105")]
WEIGHTS = ("rms_att", "wq", "wk", "wv", "wo", "rms_ffn", "w1", "w2", "w3")


def test_the_proportions_of_llama_3_2_make_its_very_shapes_of_llama_3_1_8b() -> None:
    made = [target.shape for target in pruning_shapes.targets(pruning_shapes.PARENT, Family.llama)]
    assert made == list(pruning_shapes.CHILDREN.values())


@pytest.mark.parametrize("family", [Family.width, Family.axes])
def test_a_budget_is_met_to_one_unit_of_mlp_width(family: Family) -> None:
    source = LlamaShape.from_config(tiny_config(hidden_size=128, intermediate_size=448).to_dict())
    made = list(pruning_shapes.targets(source, family))
    assert len(made) == len(pruning_shapes.BUDGETS)
    for share, target in zip(pruning_shapes.BUDGETS, made, strict=True):
        unit = target.shape.num_hidden_layers * 3 * target.shape.hidden_size
        gap = pruning_shapes.backbone(target.shape) - share * pruning_shapes.backbone(source)
        assert abs(gap) <= unit / 2


@pytest.fixture
def one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many steps mend a cut decides neither on its shape nor on what is left to chance."""

    def short(*arguments: Any, steps: int, **settings: Any) -> tune.Tuned:
        return whole(*arguments, steps=min(steps, 1), **settings)

    whole = tune.tune
    for module in (tune, head, tie_steps):
        monkeypatch.setattr(module, "tune", short)


@pytest.mark.usefixtures("one_step")
def test_every_method_makes_the_shape_that_it_is_asked_for(tmp_path: Path) -> None:
    bench = Stub(tmp_path)
    for family in Family:
        for target in pruning_shapes.targets(bench.weights.shape, family):
            for method in pruning_methods.methods():
                if family in method.families:
                    made = pruning_methods.loaded(method.cut(dataclasses.replace(bench.case, target=target)))
                    assert made.shape == target.shape, method.name


@pytest.mark.usefixtures("one_step")
def test_a_method_that_is_left_to_chance_changes_with_the_seed_and_only_with_it(tmp_path: Path) -> None:
    case = Stub(tmp_path).case
    for method in pruning_methods.methods():
        if Family.mlp in method.families:
            again, other = (pruning_methods.loaded(method.cut(dataclasses.replace(case, seed=seed))) for seed in (0, 1))
            first = pruning_methods.loaded(method.cut(case))
            assert torch.equal(first.layer(0)["mlp.up_proj.weight"], again.layer(0)["mlp.up_proj.weight"])
            same = torch.equal(first.layer(0)["mlp.up_proj.weight"], other.layer(0)["mlp.up_proj.weight"])
            assert same is not method.seeded, method.name


class Stub:
    """A tiny tied model, and scores of random text."""

    def __init__(self, folder: Path) -> None:
        self.weights = calibration.saved(tiny_model(tie_word_embeddings=True, hidden_size=64), folder)
        text = [calibration.text()]
        self.case = pruning_methods.Case(
            weights=self.weights,
            scores=pruning_methods.measure(self.weights, text, 1, "cpu", {}),
            calibration=text,
            target=next(iter(pruning_shapes.targets(self.weights.shape, Family.mlp))),
            seed=0,
            device="cpu",
        )


@pytest.fixture(scope="module")
def subject(recipe: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model and data of its tokens, as ``--model`` names them."""
    folder = tmp_path_factory.mktemp("benchmark")
    lines = [json.dumps({"text": " ".join(str((n * k) % 97) for k in range(40))}) for n in range(80)]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    module = recipe("prepare")
    module.run(
        module.Prepare(
            source=module.SourceConfig(path=str(folder / "lines.jsonl")),
            tokenizer=module.TokenizerConfig(vocab_size=300),
            validation=module.ValidationConfig(fraction=0.2),
            sequence_length=32,
            num_proc=1,
            out=folder / "data",
        )
    )
    llama = tiny_model(vocab_size=300)
    checkpoints.save_model(llama, folder / "model", source=folder / "data" / "tokenizer", provenance={})
    return f"tiny={folder / 'model'}:{folder / 'data'}"


def run(monkeypatch: pytest.MonkeyPatch, subject: str, out: Path, *more: str) -> list[dict[str, object]]:
    words = ["pruning.py", "--model", subject, "--out", str(out), "--calibration-rows", "8", "--held-out-rows", "8"]
    monkeypatch.setattr(sys, "argv", [*words, *more])
    pruning.main()
    return [json.loads(line) for line in (out / pruning.RESULTS).read_text().splitlines()]


def test_what_is_measured_is_not_measured_again(subject: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = ("--families", "mlp", "--targets", "50%", "--methods", "magnitude")
    rows = run(monkeypatch, subject, tmp_path, *one)
    assert [row["method"] for row in rows] == ["magnitude"]

    def measure(*arguments: object) -> None:
        raise AssertionError("the scores are there")

    monkeypatch.setattr(pruning_methods, "measure", measure)
    rows = run(monkeypatch, subject, tmp_path, *one, "random units", "--seeds", "2")
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("magnitude", 0),
        ("random units", 0),
        ("random units", 1),
    ]
    table = (tmp_path / "markdown.md").read_text()
    assert f"{rows[0]['loss']:.3f}" in table
    assert "±" in table


@pytest.mark.slow
def test_a_student_learns(subject: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--families", "mlp", "--targets", "50%", "--methods", "magnitude", "--distill", "magnitude")
    more = ("--distill-shares", "1", "--seeds", "1", "--batch-rows", "4")
    before, after = run(monkeypatch, subject, tmp_path, *options, *more)
    assert (before["distilled"], after["distilled"]) == (0.0, 1.0)
    assert float(str(after["loss"])) < float(str(before["loss"]))
    assert not (tmp_path / "student").exists()


def test_an_unknown_method_is_refused_with_those_there_are(
    subject: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"--methods must be among .*Minitron.*, got \['minitrom'\]"):
        run(monkeypatch, subject, tmp_path, "--methods", "minitrom")


@pytest.mark.parametrize("text", ["tiny", "tiny=model", "=model:data", "tiny=model:data:many"])
def test_a_model_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--model must be NAME=MODEL:DATA"):
        pruning.Subject.parse(text)


def test_the_lowest_loss_of_a_target_is_bold_and_seeds_become_a_spread() -> None:
    common = {"model": "m", "family": "mlp", "target": "50%", "share": 0.6, "whole": 1.0, "distilled": 0.0}
    losses = {"a": [2.0, 4.0], "b": [2.5]}
    rows = [
        common | {"method": name, "ours": False, "seed": seed, "loss": loss, "seconds": 0.1}
        for name, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    lines = pruning_table.markdown(rows).splitlines()
    assert lines[2].endswith("| a | 3.000 ± 1.414 | 0.10 |")
    assert lines[3].endswith("| b | **2.500** | 0.10 |")


def outcome(method: str, loss: float, *, ours: bool = False, **more: object) -> dict[str, object]:
    common = {"model": "m", "family": "llama", "target": "1B", "share": 0.2, "whole": 1.0, "distilled": 0.0, "seed": 0}
    return common | {"method": method, "loss": loss, "ours": ours, "seconds": 1.0} | more


def test_the_summary_sets_the_default_against_the_best_criterion_and_leaves_training_out(tmp_path: Path) -> None:
    rows = [
        outcome("random start", 6.0),
        outcome("magnitude", 5.0),
        outcome("Minitron", 3.0),
        outcome("OSSCAR: elimination + least squares", 2.5),
        outcome("Llamita", 1.5, ours=True),
        outcome("Llamita without values", 1.75, ours=True),
        outcome("Llamita", 1.1, ours=True, distilled=0.05),
        outcome("magnitude", 1.2, distilled=0.05),
        outcome("magnitude", 4.0, target="3B"),
    ]
    (line,) = pruning_table.summary(rows).splitlines()[2:]
    assert line == "| m (1.000) | as Llama 3.2, 1B | 6.000 | 3.000 (Minitron) | 2.500 |  | 1.500 | 0.25 |"
    assert pruning_table.ablation(rows).splitlines()[2:4] == [
        "| Llamita | 1.500 |",
        "| Llamita without values | 1.750 |",
    ]
    pruning_table.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size


def test_every_part_of_mending_is_left_out_once() -> None:
    switches = {field.name for field in dataclasses.fields(CompensationConfig)} - {"prefix", "ridge", "learning_rate"}
    names = {method.name for method in pruning_methods.methods()}
    assert {
        name.removeprefix(pruning_table.WITHOUT) for name in names if name.startswith(pruning_table.WITHOUT)
    } == switches


def written(folder: Path) -> Path:
    """A random checkpoint with a classifier of its own, in llama2.c's first format."""
    torch.manual_seed(0)
    dim, hidden, layers, heads, keys, vocab, length = 16, 20, 2, 4, 2, 24, 32
    size = dim // heads
    per_layer = {
        "rms_att": (dim,),
        "wq": (heads * size, dim),
        "wk": (keys * size, dim),
        "wv": (keys * size, dim),
        "wo": (dim, heads * size),
        "rms_ffn": (dim,),
        "w1": (hidden, dim),
        "w2": (dim, hidden),
        "w3": (hidden, dim),
    }
    parts = [torch.randn(vocab, dim), *(torch.randn(layers, *per_layer[name]) for name in WEIGHTS), torch.randn(dim)]
    parts += [torch.randn(2, length, size // 2), torch.randn(vocab, dim)]
    file = folder / "random.bin"
    header = struct.pack("<7i", dim, hidden, layers, heads, keys, -vocab, length)
    file.write_bytes(header + torch.cat([part.flatten() / 4 for part in parts]).numpy().tobytes())
    return file


def forward(weights: dict[str, Tensor], ids: Tensor, heads: int, keys: int) -> Tensor:
    """Logits [S, V] by the formulas of llama2.c's run.c, in float64, one position and one head at a time."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    dim, size = w["rms_final"].numel(), w["rms_final"].numel() // heads

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean() + 1e-5).sqrt() * gain

    def turned(x: Tensor, position: int) -> Tensor:
        out = x.clone()
        for i in range(0, len(x), 2):
            angle = position / 10000 ** ((i % size) / size)
            out[i] = x[i] * math.cos(angle) - x[i + 1] * math.sin(angle)
            out[i + 1] = x[i] * math.sin(angle) + x[i + 1] * math.cos(angle)
        return out

    cache: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in w["wq"]]
    logits = []
    for position, token in enumerate(ids.tolist()):
        x = w["token_embedding"][token]
        for layer, (seen_keys, seen_values) in enumerate(cache):
            y = norm(x, w["rms_att"][layer])
            query = turned(w["wq"][layer] @ y, position)
            seen_keys.append(turned(w["wk"][layer] @ y, position))
            seen_values.append(w["wv"][layer] @ y)
            mixed = torch.zeros(dim, dtype=torch.float64)
            for number in range(heads):
                mine, theirs = slice(number * size, (number + 1) * size), number // (heads // keys) * size
                their = slice(theirs, theirs + size)
                share = torch.stack([query[mine] @ key[their] for key in seen_keys]).div(size**0.5).softmax(0)
                mixed[mine] = share @ torch.stack([value[their] for value in seen_values])
            x = x + w["wo"][layer] @ mixed
            y = norm(x, w["rms_ffn"][layer])
            gate = w["w1"][layer] @ y
            x = x + w["w2"][layer] @ (gate * gate.sigmoid() * (w["w3"][layer] @ y))
        logits.append(w.get("wcls", w["token_embedding"]) @ norm(x, w["rms_final"]))
    return torch.stack(logits)


def assert_read(file: Path, ids: Tensor) -> None:
    config, weights = llama2c.read(file)
    made: LlamaForCausalLM = llama2c.model(config, weights)
    expected = forward(weights, ids, config.num_attention_heads, config.num_key_value_heads)
    with torch.no_grad():
        # Turned in float32 by transformers, whatever the dtype of the rest.
        torch.testing.assert_close(made.double()(ids[None]).logits[0].double(), expected, rtol=0, atol=1e-5)


def test_a_checkpoint_of_llama2c_gives_the_logits_of_its_formulas(tmp_path: Path) -> None:
    assert_read(written(tmp_path), torch.randint(24, (12,)))


@pytest.mark.parametrize("name", REAL)
def test_a_real_checkpoint_gives_the_logits_of_the_formulas(name: str) -> None:
    (file,) = (found for found in (SHARED / "models" / name).glob("*.bin") if not found.name.startswith("tok"))
    assert_read(file, torch.tensor([1, *range(30, 50)]))


def test_a_checkpoint_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match="bytes, its header asks for"):
        llama2c.read(file)


@pytest.mark.parametrize("name", REAL)
def test_the_tokenizer_merges_the_best_pair_first(name: str) -> None:
    """As run.c encodes: characters, then again and again the neighbours whose union has the highest score."""
    (file,) = (SHARED / "models" / name).glob("*.model")
    proto = import_protobuf().ModelProto()
    proto.ParseFromString(file.read_bytes())
    score = {piece.piece: piece.score for piece in proto.pieces if piece.type == 1}
    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    pieces = list("▁" + text.replace(" ", "▁"))
    while pairs := [(score[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in score]:
        first = -max(pairs)[1]
        pieces[first : first + 2] = ["".join(pieces[first : first + 2])]
    made = llama2c.tokenizer(file)
    assert made.encode(text, add_special_tokens=False) == [ids[piece] for piece in pieces]
    assert made.decode(made.encode(text, add_special_tokens=False)) == text
