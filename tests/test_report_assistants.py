"""Assistants on the page: figures side by side, what each step changed, and what damaged files and hostile names do."""

from __future__ import annotations

import dataclasses
import functools
import html
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from llamita import checkpoints, runs, storage
from llamita.report import assistants, gather, labels, page, palettes, training
from llamita.report.roles import Role
from llamita.shapes import LlamaShape

SHAPE = LlamaShape(
    num_hidden_layers=2,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=300,
    tie_word_embeddings=True,
)
Rows = Iterable[tuple[int, dict[str, float]]]


def run(path: Path, recipe: str, *, rows: Rows = (), summary: Any = None, model: bool = False, **more: Any) -> Path:
    """A finished directory of that recipe, with a few bytes instead of weights."""
    with runs.start(path, recipe, more.get("settings", {}), runs.RunConfig()) as this:
        for step, row in rows:
            this.log(row, step=step)
        files = []
        if model:
            (path / "config.json").write_text(json.dumps({"model_type": "llama", **SHAPE.config_fields()}))
            (path / "model.safetensors").write_bytes(str(path).encode())
            files = ["config.json", "model.safetensors"]
        this.finish(files, parents=more.get("parents", {}), summary=summary or {})
    return path


def estimate(value: float, stderr: float | None = 0.125) -> dict[str, Any]:
    return {"value": value, "stderr": stderr}


def gap(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high, "p": 0.5}


def results(names: tuple[str, str, str] = ("start", "better", "also")) -> dict[str, Any]:
    """What ``assess`` says of three models of which the first is not the first by name."""
    first, better, also = names
    figures_of = {
        first: {"loss": estimate(2.0), "number/exact": estimate(0.25, None)},
        better: {"loss": estimate(1.5), "number/exact": estimate(0.5)},
        also: {"loss": estimate(1.75)},
    }
    return {
        "models": {
            name: {"path": name, "sha256": f"hash of {name}", "values": values, "rows": {}, "tasks": {}}
            for name, values in figures_of.items()
        },
        "differences": [
            {"first": first, "second": better, "loss": gap(-0.5, -0.6, -0.4), "number/exact": gap(0.25, -0.1, 0.6)},
            {"first": first, "second": also, "loss": gap(-0.25, -0.75, 0.25)},
        ],
        "first": first,
    }


def assessed(path: Path, told: Any) -> Path:
    """A directory as ``recipes/assess.py`` leaves it."""
    run(path, "assess")
    storage.write_json(path / assistants.FILE, told)
    return path


def drawn(paths: dict[str, Path], out: Path) -> str:
    """The section of the page."""
    out.mkdir()
    page.write(gather.gather(paths), out)
    text = (out / "report.html").read_text()
    begin = text.index('<section id="assistants">')
    return text[begin : text.index("</section>", begin)]


def table(section: str, number: int = 0) -> list[list[str]]:
    """Its cells, marks included."""
    body = re.findall(r"<tbody>(.*?)</tbody>", section, re.DOTALL)[number]
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", body)]


def test_every_figure_stands_beside_the_first_assistants_and_only_a_clear_gap_is_bold(tmp_path: Path) -> None:
    """An interval that holds nought is not clear. The file is sorted by name; the page begins with the first."""
    section = drawn({"assess": assessed(tmp_path / "assess", results())}, tmp_path / "out")
    assert re.findall(r'<th scope="col">(.*?)</th>', section)[:4] == ["figure", "start", "better", "also"]
    assert "the difference from start, paired by row" in section
    assert table(section) == [
        [
            "loss of what the assistant says, nats per token",
            "2.000 ± 0.125",
            "1.500 ± 0.125<br><small><b>−0.500</b></small>",
            "1.750 ± 0.125<br><small>−0.250</small>",
        ],
        ["right numbers", "0.250", "0.500 ± 0.125<br><small>+0.250</small>", "–"],
    ]


def test_an_interval_of_no_numbers_is_not_clear() -> None:
    nan = float("nan")
    assert not assistants.Gap(value=1.0, low=nan, high=nan).is_clear
    assert assistants.Gap(value=1.0, low=0.5, high=2.0).is_clear
    assert not assistants.Gap(value=1.0, low=0.0, high=2.0).is_clear


def test_each_step_tells_what_it_was_before_and_after(tmp_path: Path) -> None:
    """SFT by the first held-out loss that it logged, the others by what their summary says."""
    held_out = [(step, {"val/held_out/loss": loss}) for step, loss in ((0, 2.5), (5, 2.25), (9, 2.0))]
    dpo = {"val/held_out/dpo_margin": 0.5, "before/val/held_out/dpo_margin": 0.0, "val/held_out/dpo_accuracy": 0.75}
    rl = {"val/held_out/reward": 0.5, "before/val/held_out/reward": 0.125, "val/held_out/kl_to_start": 0.01}
    paths = {
        "tuned": run(tmp_path / "tuned", "sft", rows=held_out, summary={"val/held_out/loss": 2.0}),
        "ranked": run(tmp_path / "ranked", "reward", summary={"val/held_out/reward_accuracy": 0.875}),
        "dpo": run(tmp_path / "dpo", "dpo", summary=dpo),
        "rl": run(tmp_path / "rl", "rl", summary=rl),
        "silent": run(tmp_path / "silent", "dpo"),
    }
    assert table(drawn(paths, tmp_path / "out")) == [
        ['tuned<small class="role">sft</small>', "held-out loss of answers", "2.500 → 2.000"],
        ['ranked<small class="role">reward</small>', "held-out pairs ranked rightly", "0.875"],
        ["dpo", "held-out reward margin", "0.000 → 0.500"],
        ["", "held-out pairs ranked rightly", "0.750"],
        ["rl", "held-out reward", "0.125 → 0.500"],
        ["", "KL to its start, nats per token", "0.010"],
    ]


def test_the_best_of_n_answers_is_drawn_over_n(tmp_path: Path) -> None:
    told = {"first": {1: 0.25, 2: 0.375, 4: 0.5}, "second": {1: 0.5, 2: 0.625}}
    for name, points in told.items():
        train = {"prompts": 8, **{f"best_of_{n}": reward for n, reward in points.items()}}
        run(tmp_path / name, "sample", summary={"train": train, "validation": {"best_of_1": 9.0}})
    report = gather.gather({name: tmp_path / name for name in told})
    found = assistants.read(report)
    assert found.best_of == told
    sketch = assistants.best_of(found)
    assert sketch is not None
    (axes,) = sketch.draw(palettes.LIGHT).axes
    lines = {line.get_label(): dict(zip(*map(list, line.get_data()), strict=True)) for line in axes.get_lines()}
    assert lines == told
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "4"]
    (tmp_path / "out").mkdir()
    assert "plots/best-of.png" in page.write(report, tmp_path / "out")
    assert assistants.best_of(dataclasses.replace(found, best_of={})) is None


def test_bits_per_byte_of_text_are_those_of_the_same_weights_whatever_they_are_called(tmp_path: Path) -> None:
    tuned = run(tmp_path / "sft", "sft", model=True)
    told = results()
    told["models"]["better"]["sha256"] = checkpoints.content_hash(tuned)
    measured = {"path": "elsewhere", "sha256": checkpoints.content_hash(tuned), "values": {}}
    measured["values"] = {"bits_per_byte": estimate(0.875, None)}
    other = {"path": "start", "sha256": "weights that nobody assessed", "values": {"bits_per_byte": estimate(3.0)}}
    evaluation = run(tmp_path / "evaluation", "evaluate")
    storage.write_json(evaluation / "evaluation.json", {"models": {"mine": measured, "start": other}})
    paths = {"sft": tuned, "assess": assessed(tmp_path / "assess", told), "evaluation": evaluation}
    assert table(drawn(paths, tmp_path / "out"))[-1] == ["bits per byte of text", "–", "0.875", "–"]
    del paths["evaluation"]
    assert "bits per byte of text" not in str(table(drawn(paths, tmp_path / "without")))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("models", None),
        ("models", ["start"]),
        ("models start values", None),
        ("models start sha256", None),
        ("models start values loss", 2.0),
        ("models start values loss value", "two"),
        ("first", None),
        ("differences", None),
        ("differences 0 second", None),
        ("differences 0 loss low", None),
    ],
)
def test_a_damaged_result_is_named(place: str, value: Any, tmp_path: Path) -> None:
    """One entry is another, or is gone."""
    told: Any = results()
    *outer, last = place.split()
    inner = functools.reduce(lambda found, key: found[int(key) if key.isdigit() else key], outer, told)
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    path = assessed(tmp_path / "assess", told)
    with pytest.raises(ValueError, match=r"assess/results\.json is damaged"):
        assistants.read(gather.gather({"assess": path}))


def test_a_result_that_was_cut_short_is_named(tmp_path: Path) -> None:
    path = assessed(tmp_path / "assess", results())
    (path / assistants.FILE).write_text('{"models": {"start')
    with pytest.raises(ValueError, match=r"results\.json"):
        assistants.read(gather.gather({"assess": path}))


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "$\\frac{$ {{ 7*7 }}"])
def test_a_hostile_name_is_text_in_the_table_and_in_the_picture(name: str, tmp_path: Path) -> None:
    told = results((name, "better", f"also {name}"))
    for model in told["models"].values():
        model["values"][name] = estimate(1.0)
    step = run(tmp_path / "step", "dpo", summary={"val/held_out/dpo_margin": 0.5})
    sample = run(tmp_path / "sample", "sample", summary={"train": {"best_of_1": 0.25, "best_of_2": 0.5}})
    again = run(tmp_path / "again", "sample", summary={"train": {"best_of_1": 0.25, "best_of_2": 0.375}})
    paths = {"assess": assessed(tmp_path / "assess", told), name: step, f"{name} 2": sample, "again": again}
    section = drawn(paths, tmp_path / "out")
    assert not re.search(r"<(script|img)", section)
    cells = [html.unescape(cell) for row in table(section) for cell in row]
    heads = [html.unescape(head) for head in re.findall(r'<th scope="col">(.*?)</th>', section)]
    assert {name, f"also {name}"} <= set(heads)
    assert name in cells
    assert html.unescape(table(section, 1)[0][0]).startswith(name)
    picture = section[section.index("<svg") : section.index("</svg>")]
    assert labels.clip(f"{name} 2") in html.unescape(picture)


def test_an_aligned_model_is_no_headline_and_has_no_curve_among_those_of_the_text(tmp_path: Path) -> None:
    """Its held-out rows are dialogues: lower than any loss on text, and no rival of one."""

    def rows(bits: float) -> list[tuple[int, dict[str, float]]]:
        common = {"train/ce": bits, "val/held_out/bits_per_byte": bits, "val/held_out/loss": bits}
        return [(step, {**common, "data/tokens": 100.0 * step}) for step in range(4)]

    teacher = run(tmp_path / "teacher", "distill", model=True)
    made_by = {"settings": {"teachers": {"big": {"path": str(teacher)}}}}
    made_by["parents"] = {"big": checkpoints.content_hash(teacher)}
    paths = {
        "teacher": teacher,
        "student": run(tmp_path / "student", "distill", rows=rows(2.0), model=True, **made_by),
        "sft": run(tmp_path / "sft", "sft", rows=rows(0.5), model=True, **made_by),
        "mean": run(tmp_path / "mean", "average", model=True),
    }
    report = gather.gather(paths)
    assert {m.name: m.role for m in report.models} == {
        "teacher": Role.teacher,
        "student": Role.distilled,
        "sft": Role.aligned,
        "mean": Role.aligned,
    }
    assert report.result is not None
    assert report.result.name == "student"
    assert [curve.model.name for curve in report.curves] == ["student"]
    assert next(m for m in report.models if m.name == "sft").values == {}
    for sketch in training.losses(report):
        (axes,) = sketch.draw(palettes.LIGHT).axes
        assert axes.get_ylim()[0] > 1.5
    alone = gather.gather({"sft": paths["sft"]})
    assert alone.result is None
    assert alone.curves == []
    assert training.losses(alone) == []
