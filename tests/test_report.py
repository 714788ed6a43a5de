"""The report of synthetic run directories: what is shown, what is left out, and what hostile names cannot do."""

from __future__ import annotations

import dataclasses
import html.parser
import io
import json
import re
import xml.etree.ElementTree
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from llamita import checkpoints, runs, storage
from llamita.report import drawing, gather, labels, page, palettes, pruning, quality, training
from llamita.report.metrics import Metrics, Over
from llamita.report.models import Estimate
from llamita.report.roles import Role
from llamita.shapes import PUBLISHED, LlamaShape

BIG = LlamaShape(
    num_hidden_layers=8,
    hidden_size=128,
    intermediate_size=448,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=8,
    vocab_size=512,
    tie_word_embeddings=False,
)
SMALL = dataclasses.replace(
    BIG, num_hidden_layers=4, hidden_size=64, intermediate_size=256, num_attention_heads=8, tie_word_embeddings=True
)


def hash_of(path: Path) -> str:
    return checkpoints.content_hash(path)


def stage(
    path: Path,
    recipe: str,
    *,
    settings: dict[str, Any] | None = None,
    shape: LlamaShape | None = None,
    parents: dict[str, Path] | None = None,
    metrics: Iterable[tuple[int, dict[str, float]]] = (),
    finish: bool = True,
) -> Path:
    """A directory as the recipe would leave it, with a few bytes instead of weights."""
    with runs.start(path, recipe, settings or {}, runs.RunConfig()) as run:
        for step, row in metrics:
            run.log(row, step=step)
        files = []
        if shape is not None:
            config = {"model_type": "llama", **shape.config_fields()}
            (path / "config.json").write_text(json.dumps(config))
            (path / "model.safetensors").write_bytes(str(path).encode())
            listed = {name: {"path": str(p), "sha256": hash_of(p)} for name, p in (parents or {}).items()}
            storage.write_json(path / "llamita.json", {"recipe": recipe, "parents": listed})
            files = ["config.json", "model.safetensors", "llamita.json"]
        if finish:
            run.finish(files, parents={name: hash_of(p) for name, p in (parents or {}).items()})
    return path


def trained(start: float, end: float, *, taught: bool, speed: float = 5e5) -> list[tuple[int, dict[str, float]]]:
    """Metrics of a training run whose held-out bits per byte fall from ``start`` to ``end``."""
    noise = np.random.default_rng(int(end * 1e4))
    rows: list[tuple[int, dict[str, float]]] = []
    for step in range(0, 401, 10):
        share = np.exp(-step / 45)
        bits = end + (start - end) * share
        row = {
            "train/loss": bits * 1.9,
            "train/ce": bits * 1.9 + 0.06 * noise.standard_normal(),
            "data/tokens": step * 16384,
            "optim/lr": 1e-3,
            "perf/tokens_per_s_per_gpu": speed * (1 + 0.03 * noise.standard_normal()),
            "perf/step_s": 0.4,
            "perf/data_s": 0.004,
        }
        if taught:
            row |= {"train/kd": bits - 0.9 + 0.03 * noise.standard_normal(), "perf/teacher_s": 0.11}
        rows.append((step, row))
        if step % 100 == 0:
            rows.append((step, {"perf/save_s": 0.2}))
        if step % 50 == 0:
            rows.append((step, {"val/held_out/bits_per_byte": bits, "val/held_out/loss": bits * 1.9}))
    return rows


def write_plan(path: Path, source: LlamaShape, target: LlamaShape, *, scores: bool = True) -> None:
    """Plan and scores as the pruning stage saves them."""
    noise = np.random.default_rng(0)
    folder = path / "pruning"
    folder.mkdir(exist_ok=True)
    num_layers, group = source.num_hidden_layers, target.num_attention_heads // target.num_key_value_heads
    layers = np.sort(noise.permutation(num_layers)[: target.num_hidden_layers])
    mlp = np.exp(noise.standard_normal((num_layers, source.intermediate_size)) + 0.1 * np.arange(num_layers)[:, None])
    hidden = np.exp(
        1.2
        * noise.standard_normal((num_layers, 2, source.hidden_size))
        * np.linspace(1, 0.4, num_layers)[:, None, None]
    )
    kept_mlp = np.sort(np.argsort(-mlp[layers], axis=1)[:, : target.intermediate_size], axis=1)
    kept_hidden = np.sort(np.argsort(-hidden[layers].sum((0, 1)))[: target.hidden_size])
    width = source.num_attention_heads // source.num_key_value_heads
    inside = np.sort(noise.random((len(layers), source.num_key_value_heads, width)).argsort(-1)[..., :group], -1)
    heads = (inside + width * np.arange(source.num_key_value_heads)[:, None]).reshape(len(layers), -1)
    kinds = {"mlp": "activation", "attention": "activation", "hidden": "activation", "layers": "block_influence"}
    rest = {
        "format": 1,
        "source": dataclasses.asdict(source),
        "target": dataclasses.asdict(target),
        "rope": "parent",
        "tie": None,
        "scores": kinds,
    }
    tensors = {"layers": layers, "mlp": kept_mlp, "hidden": kept_hidden, "heads": heads}
    save_file(tensors, folder / "plan.safetensors", {"plan": json.dumps(rest)})
    if scores:
        measured = {
            "layers.block_influence": 0.05 + noise.random(num_layers) * np.linspace(1, 0.3, num_layers),
            "mlp.activation": mlp,
            "attention.activation": noise.random((num_layers, source.num_attention_heads, source.head_dim)),
            "hidden.activation": hidden,
        }
        save_file(measured, folder / "scores.safetensors", {"info": "{}"})


def value(number: float, stderr: float | None = 0.004) -> dict[str, float | None]:
    return {"value": number, "stderr": stderr}


def entry(path: Path, shape: LlamaShape, bits: float, kl: float | None) -> dict[str, Any]:
    values = {"loss": value(bits * 1.9), "bits_per_byte": value(bits), "perplexity": value(float(np.exp(bits * 1.9)))}
    if kl is not None:
        values |= {"kl": value(kl), "top1_agree": value(float(np.exp(-kl)))}
    scores = {f"task_{n}": {"acc": value(0.2 + 0.6 / bits + 0.1 * n, 0.03)} for n in (0, 1)}
    return {
        "path": str(path),
        "sha256": hash_of(path),
        "parameters": shape.num_parameters,
        "shape": dataclasses.asdict(shape),
        "values": values,
        "tasks": scores,
    }


def world(root: Path, big: LlamaShape = BIG, small: LlamaShape = SMALL) -> dict[str, Path]:
    """Teacher, pruned, distilled, two baselines and their evaluation."""
    teacher = stage(root / "teacher", "distill", shape=big, metrics=trained(3.0, 1.02, taught=False))
    pruned = stage(
        root / "pruned", "prune", settings={"target": {"hidden_size": 64}}, shape=small, parents={"model": teacher}
    )
    write_plan(pruned, big, small)
    taught = {"teachers": {"large": {"path": str(teacher)}}}
    fresh = {"student": {"path": str(pruned), "init": "random"}}
    family = {"student": pruned, "large": teacher}
    distilled = stage(
        root / "distilled", "distill", settings=taught, shape=small, parents=family,
        metrics=trained(6.4, 1.21, taught=True),
    )  # fmt: skip
    plain = stage(
        root / "ce_only", "distill", settings={"teachers": {}}, shape=small, parents={"student": pruned},
        metrics=trained(6.4, 1.32, taught=False, speed=6.4e5),
    )  # fmt: skip
    random = stage(
        root / "random", "distill", settings=taught | fresh, shape=small, parents=family,
        metrics=trained(7.9, 1.36, taught=True),
    )  # fmt: skip
    evaluation = stage(root / "evaluation", "evaluate")
    models = {
        "teacher": entry(teacher, big, 1.02, None),
        "pruned": entry(pruned, small, 6.4, 9.0),
        "distilled": entry(distilled, small, 1.21, 0.31),
        "ce_only": entry(plain, small, 1.32, 0.52),
        "random": entry(random, small, 1.36, 0.49),
    }
    gap = {"first": "distilled", "second": "ce_only", "bits_per_byte": value(-0.11, 0.002)}
    storage.write_json(
        evaluation / "evaluation.json",
        {
            "data": {"split": "validation", "rows": 128, "tokens": 130_000, "utf8_bytes": 417_000},
            "teacher": "teacher",
            "models": models,
            "differences": [gap],
        },
    )
    names = ("teacher", "pruned", "distilled", "ce_only", "random", "evaluation")
    return {name: root / name for name in names}


class Reader(html.parser.HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def ids(self) -> list[str]:
        return [value for _, name, value in self.attributes if name == "id"]


def drawn(paths: dict[str, Path], out: Path) -> str:
    page.write(gather.gather(paths), out)
    return (out / page.PAGE).read_text(encoding="utf-8")


def read(paths: dict[str, Path]) -> str:
    """The page alone, without pictures beside it."""
    report = gather.gather(paths)
    return page.html(report, page._sketches(report))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], gather.Report, Path, str]:
    """Directories of a whole pipeline, what was gathered, where the page is, and the page."""
    root = tmp_path_factory.mktemp("world")
    paths = world(root)
    text = drawn(paths, root / "report")
    return paths, gather.gather(paths), root / "report", text


SECTIONS = {"quality", "tasks-section", "size", "kept", "training", "lineage"}
PICTURES = {"recovery", "parameters", "tasks", "losses", "losses-steps", "losses-wall-time", "throughput"}
LOSSES = {name for name in PICTURES if name.startswith("losses")}
PICTURES |= {"heads-pruned", "mlp-pruned", "hidden-pruned", "layers-pruned"}


def test_a_whole_pipeline_has_every_section_and_picture(whole: Any) -> None:
    _, _, out, text = whole
    ids = set(Reader(text).ids)
    assert ids >= SECTIONS | PICTURES
    assert {file.stem for file in (out / "plots").iterdir()} == PICTURES
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in (out / "plots").iterdir())


@pytest.mark.parametrize(
    ("names", "sections", "pictures"),
    [
        (["pruned"], {"quality", "kept", "lineage"}, {n for n in PICTURES if n.endswith("-pruned")}),
        (["distilled"], {"quality", "training", "lineage"}, {"recovery", *LOSSES, "throughput"}),
        (["evaluation"], {"quality", "tasks-section", "lineage"}, {"tasks"}),
        (["teacher", "pruned"], {"quality", "size", "kept", "training", "lineage"}, None),
    ],
)
def test_sections_without_input_are_left_out(
    whole: Any, names: list[str], sections: set[str], pictures: set[str] | None, tmp_path: Path
) -> None:
    text = drawn({name: whole[0][name] for name in names}, tmp_path)
    ids = set(Reader(text).ids)
    assert ids & SECTIONS == sections
    if pictures is not None:
        assert ids & PICTURES == pictures
    links = {value for tag, name, value in Reader(text).attributes if (tag, name) == ("a", "href")}
    assert links == {f"#{section}" for section in sections}


def test_the_page_asks_for_nothing_and_runs_nothing(whole: Any) -> None:
    text = whole[3]
    reader = Reader(text)
    forbidden = {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "img",
        "image",
        "video",
        "audio",
        "form",
        "base",
        "foreignobject",
    }
    assert not forbidden & {element.lower() for element in reader.elements}
    for tag, name, value in reader.attributes:
        assert name not in {"src", "srcset", "action", "data", "background", "poster", "ping"}, (tag, name)
        assert not name.startswith("on"), (tag, name)
        if name.endswith("href"):
            assert value.startswith("#"), (tag, value)
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert "http:" not in text
    assert "https:" not in text
    assert "default-src 'none'" in text


def test_numbers_on_an_axis_of_many_decades_are_words_and_few(tmp_path: Path) -> None:
    path = stage(tmp_path / "pruned", "prune", shape=SMALL)
    write_plan(path, BIG, SMALL)
    kept = gather.gather({"pruned": path}).kept[0]
    spread = kept.mlp_scores * np.logspace(-3, 4, BIG.num_hidden_layers)[:, None]
    sketch = pruning.mlp(dataclasses.replace(kept, mlp_scores=spread))
    assert sketch is not None
    figure = sketch.draw(palettes.LIGHT)
    figure.draw_without_rendering()
    written = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert {"0.01", "1", "100", "1k"} <= set(written)
    assert len(written) <= 15
    assert not [label for label in written if "e" in label]


def test_a_keyboard_reaches_what_scrolls_and_every_column_has_a_scope(whole: Any) -> None:
    scrolling = re.findall(r'<div class="(?:scroll|card)"[^>]*>(?=\s*<(?:svg|table))', whole[3])
    assert len(scrolling) >= len(PICTURES)
    assert all('tabindex="0"' in element and "aria-label=" in element for element in scrolling)
    assert "<th>" not in whole[3]


def test_identifiers_are_unique_and_references_lead_somewhere(whole: Any) -> None:
    reader = Reader(whole[3])
    assert len(reader.ids) == len(set(reader.ids))
    wanted = set(re.findall(r"url\(#([^)]+)\)", whole[3]))
    wanted |= {value[1:] for _, name, value in reader.attributes if name == "href"}
    assert wanted <= set(reader.ids)


def test_every_colour_of_a_picture_is_a_variable(whole: Any) -> None:
    """So one picture is right in light and in dark."""
    pictures = re.findall(r"<svg.*?</svg>", whole[3], flags=re.DOTALL)
    assert len(pictures) == len(PICTURES)
    for picture in pictures:
        assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", picture)
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", whole[3]))
    for theme in (palettes.LIGHT, palettes.DARK):
        assert used - {"--sans", "--mono", "--page", "--line", "--soft"} <= set(palettes.variables(theme))


def test_a_page_is_the_same_when_it_is_drawn_again(whole: Any, tmp_path: Path) -> None:
    again = drawn(whole[0], tmp_path)
    made = r"Made \d{4}-\d\d-\d\d \d\d:\d\d UTC"
    assert re.sub(made, "", again) == re.sub(made, "", whole[3])


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</svg></style><script>",
    "$\\frac{$ ${7*7} {{ 7*7 }} {% raw %}",
    "[bold red]x[/] & <b>",
    "https://example.invalid/#fe0100",
    "\x1b[2J名' onload='alert(1) font-family: --><!--",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_only_ever_text(name: str, whole: Any, tmp_path: Path) -> None:
    """As a run, as a model of an evaluation, as a task, as a setting and as a parent."""
    found = storage.read_json(whole[0]["evaluation"] / "evaluation.json")
    found["models"]["only evaluated " + name] = dict(found["models"].pop("random"), sha256=name, path=name)
    found["models"]["ce_only"]["tasks"] = {name: {"acc": value(0.5), name: value(0.25)}}
    found["differences"][0]["first"] = name
    evaluation = stage(tmp_path / "evaluation", "evaluate")
    storage.write_json(evaluation / "evaluation.json", found)
    strange = stage(
        tmp_path / "strange",
        "distill",
        settings={"note": name, "teachers": {name: {}}},
        shape=SMALL,
        parents={name: whole[0]["pruned"]},
        metrics=trained(5.0, 1.5, taught=True),
    )
    report = gather.gather({name: whole[0]["distilled"], name + "2": strange, "evaluation": evaluation})
    sketches = page._sketches(report)
    reader = Reader(page.html(report, sketches))
    assert not {"script", "img"} & set(reader.elements)
    assert not [attribute for attribute in reader.attributes if attribute[1].startswith("on")]
    assert name in "".join(reader.text)
    assert "49" not in page.verdict(report)[0][0]
    assert drawing.save_png(sketches["recovery"][0], tmp_path).is_file()
    console = Console(file=io.StringIO(), width=200)
    console.print(page.terminal_table(report))
    assert name.replace("\x1b", "\N{REPLACEMENT CHARACTER}") in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["font-family: <b>", 'font: 9px "', "url(#a", 'id="b', "#fe0100"])
def test_a_name_that_looks_like_what_is_changed_in_a_picture_stays_a_name(name: str, tmp_path: Path) -> None:
    path = stage(tmp_path / "d", "distill", metrics=trained(5.0, 1.5, taught=True))
    sketch = training.throughput(gather.gather({name: path}))
    assert sketch is not None
    drawn_text = [element.text for element in xml.etree.ElementTree.fromstring(drawing.picture(sketch).svg).iter()]
    assert name in drawn_text


def test_roles_follow_from_lineage(whole: Any) -> None:
    report = whole[1]
    assert {model.name: model.role for model in report.models} == {
        "teacher": Role.teacher,
        "pruned": Role.pruned,
        "distilled": Role.distilled,
        "ce_only": Role.baseline,
        "random": Role.baseline,
    }
    assert report.result is report.first(Role.distilled)
    assert report.models[0].role is Role.teacher


def test_a_training_run_alone_is_no_baseline(whole: Any) -> None:
    assert gather.gather({"teacher": whole[0]["teacher"]}).models[0].role is Role.other


def test_directories_may_have_moved_since_the_evaluation(whole: Any, tmp_path: Path) -> None:
    """Models are known by their content, not by their place or display name."""
    moved = {}
    for name, path in whole[0].items():
        moved[f"my {name}"] = tmp_path / name
        (tmp_path / name).symlink_to(path)
    report = gather.gather(moved)
    assert {model.name for model in report.models} == {f"my {name}" for name in whole[0] if name != "evaluation"}
    assert all("bits_per_byte" in model.values for model in report.models)


def test_the_recovered_share_is_what_its_definition_says(whole: Any) -> None:
    report = whole[1]
    share = {model.name: model.recovered for model in report.models}
    assert share["teacher"] is None
    assert share["pruned"] is None
    assert share["distilled"] == pytest.approx((6.4 - 1.21) / (6.4 - 1.02))
    assert share["ce_only"] == pytest.approx((6.4 - 1.32) / (6.4 - 1.02))


def evaluated(path: Path, models: dict[str, Any], *, rows: int = 128, values: bool = True) -> Path:
    """The directory of an evaluation of those models, of tasks alone where no values are wanted."""
    data = {"split": "validation", "rows": rows, "tokens": 1000 * rows, "utf8_bytes": 3000 * rows} if values else {}
    models = {name: entry if values else entry | {"values": {}} for name, entry in models.items()}
    found = {"data": data, "teacher": None, "models": models, "differences": []}
    storage.write_json(stage(path, "evaluate") / "evaluation.json", found)
    return path


def test_an_evaluation_of_tasks_alone_takes_no_value_away(whole: Any, tmp_path: Path) -> None:
    """Whichever of the two evaluations comes first."""
    paths = whole[0]
    tasks = evaluated(tmp_path / "tasks", {"distilled": entry(paths["distilled"], SMALL, 9.0, 9.0)}, values=False)
    for order in ({**paths, "tasks": tasks}, {"tasks": tasks, **paths}):
        report = gather.gather(order)
        assert report.data["rows"] == 128
        assert {m.name: m.values["bits_per_byte"].value for m in report.models}["distilled"] == 1.21


def test_values_of_different_rows_are_never_compared(whole: Any, tmp_path: Path) -> None:
    """Neither those of two evaluations, nor an evaluation's with what a run logged about its own rows."""
    paths = whole[0]
    other = evaluated(tmp_path / "other", {"distilled": entry(paths["distilled"], SMALL, 1.0, 0.1)}, rows=64)
    with pytest.raises(ValueError, match=r"different held-out rows, 128 rows .* and 64 rows"):
        gather.gather({**paths, "other": other})
    alone = {name: path for name, path in paths.items() if name != "evaluation"} | {"other": other}
    report = gather.gather(alone)
    assert [model.name for model in report.models if model.values] == ["distilled"]
    assert {curve.model.name for curve in report.curves} == {"distilled", "ce_only", "random"}


def test_an_evaluation_of_weights_that_were_since_replaced_is_not_taken_for_the_new_ones(
    whole: Any, tmp_path: Path
) -> None:
    """Same name, same place, other content."""
    old = entry(whole[0]["distilled"], SMALL, 1.0, 0.1) | {"sha256": "0" * 64}
    report = gather.gather({"distilled": whole[0]["distilled"], "e": evaluated(tmp_path / "e", {"distilled": old})})
    assert {m.name: bool(m.values) for m in report.models} == {"distilled": False, "distilled (as evaluated)": True}


def test_content_counts_before_names(whole: Any, tmp_path: Path) -> None:
    """Two directories whose names an evaluation had the other way round."""
    found = {
        "ce_only": entry(whole[0]["distilled"], SMALL, 1.2, 0.3),
        "distilled": entry(whole[0]["ce_only"], SMALL, 1.3, 0.5),
    }
    names = ("distilled", "ce_only")
    report = gather.gather({n: whole[0][n] for n in names} | {"e": evaluated(tmp_path / "e", found)})
    bits = {model.name: model.values["bits_per_byte"].value for model in report.models}
    assert bits == {"distilled": 1.2, "ce_only": 1.3}


def test_two_prunings_each_have_their_own_recovery(whole: Any, tmp_path: Path) -> None:
    """And a second distillation that goes on from the first still began with the pruned model."""
    paths = {name: path for name, path in whole[0].items() if name in ("teacher", "pruned", "distilled")}
    narrow = dataclasses.replace(SMALL, intermediate_size=128)
    taught = {"teachers": {"large": {"path": str(paths["teacher"])}}}
    pruned = stage(tmp_path / "narrow", "prune", shape=narrow, parents={"model": paths["teacher"]})
    first, parent = pruned, {"large": paths["teacher"]}
    for name in ("first", "second"):
        first = stage(tmp_path / name, "distill", settings=taught, shape=narrow, parents={"student": first} | parent)
    paths |= {"narrow": pruned, "first": tmp_path / "first", "second": tmp_path / "second"}
    bits = {"teacher": 1.0, "pruned": 5.0, "distilled": 2.0, "narrow": 9.0, "first": 5.0, "second": 3.0}
    found = {name: entry(path, SMALL, bits[name], 0.1) for name, path in paths.items()}
    report = gather.gather(paths | {"e": evaluated(tmp_path / "e", found)})
    assert {m.name: m.role for m in report.models if m.role is Role.distilled}.keys() == {
        "distilled",
        "first",
        "second",
    }
    recovered = {model.name: model.recovered for model in report.models if model.recovered is not None}
    assert recovered == pytest.approx({"distilled": 3 / 4, "first": 4 / 8, "second": 6 / 8})


def test_the_verdict_gives_the_numbers(whole: Any) -> None:
    text = "".join(piece for piece, _ in page.verdict(whole[1]))
    for expected in (labels.short(BIG.num_parameters), "1.020", "6.400", "1.210", "96", "every baseline"):
        assert expected in text


def test_a_difference_is_signed_from_the_result(whole: Any) -> None:
    assert page._gaps(whole[1]) == [{"other": "ce_only", "gap": Estimate(-0.11, 0.002)}]
    turned = dict(whole[1].differences[0], first="ce_only", second="distilled")
    report = dataclasses.replace(whole[1], differences=[turned])
    assert page._gaps(report) == [{"other": "ce_only", "gap": Estimate(0.11, 0.002)}]


def test_kept_units_are_those_of_the_plan(whole: Any) -> None:
    kept = whole[1].kept[0]
    assert kept.layers.sum() == SMALL.num_hidden_layers
    assert kept.hidden.sum() == SMALL.hidden_size
    np.testing.assert_array_equal(kept.mlp.sum(1), SMALL.intermediate_size * kept.layers)
    np.testing.assert_array_equal(kept.heads.sum(1), SMALL.num_attention_heads * kept.layers)
    for layer in np.flatnonzero(kept.layers):
        worst = kept.mlp_scores[layer][kept.mlp[layer]].min()
        assert worst > kept.mlp_scores[layer][~kept.mlp[layer]].max()
    expected = np.sort(kept.hidden_scores)[::-1][: SMALL.hidden_size].sum() / kept.hidden_scores.sum()
    assert kept.hidden_share == pytest.approx(expected)


def test_a_plan_without_scores_still_shows_its_heads(tmp_path: Path) -> None:
    path = stage(tmp_path / "pruned", "prune", shape=SMALL)
    write_plan(path, BIG, SMALL, scores=False)
    ids = set(Reader(drawn({"pruned": path}, tmp_path / "out")).ids)
    assert ids & PICTURES == {"heads-pruned"}


def test_scores_of_another_run_are_found_through_the_settings(whole: Any, tmp_path: Path) -> None:
    settings = {"scores": {"path": str(whole[0]["pruned"])}}
    path = stage(tmp_path / "pruned", "prune", settings=settings, shape=SMALL)
    write_plan(path, BIG, SMALL, scores=False)
    kept = gather.gather({"pruned": path}).kept[0]
    np.testing.assert_array_equal(kept.mlp_scores, whole[1].kept[0].mlp_scores)


def test_two_plans_have_pictures_of_their_own(whole: Any, tmp_path: Path) -> None:
    """Names that differ only in what a file name cannot hold."""
    reader = Reader(drawn({"a b": whole[0]["pruned"], "a_b": whole[0]["pruned"]}, tmp_path))
    assert {"heads-a-b", "heads-a-b-2"} <= set(reader.ids)
    assert len(reader.ids) == len(set(reader.ids))


def test_an_unfinished_run_is_shown_as_such(tmp_path: Path) -> None:
    path = stage(
        tmp_path / "d", "distill", settings={"teachers": {"t": {}}}, metrics=trained(5, 2, taught=True), finish=False
    )
    report = gather.gather({"d": path})
    assert report.models[0].role is Role.distilled
    assert report.models[0].values["bits_per_byte"].value == pytest.approx(2, abs=0.01)
    assert report.result is None
    text = read({"d": path})
    assert text.count("not finished") == 3, "in the table of quality, of training, and in the lineage"


def test_an_unfinished_run_is_never_the_headline_nor_a_rival(whole: Any, tmp_path: Path) -> None:
    """However good its last value looks."""
    names = ("pruned", "distilled", "ce_only")
    paths = {name: whole[0][name] for name in names}
    family = {"student": paths["pruned"], "large": whole[0]["teacher"]}
    for name, taught in (("early", {"large": {}}), ("early_ce", {})):
        settings = {"teachers": taught, "student": {"path": str(paths["pruned"])}}
        rows = trained(5.0, 0.5, taught=bool(taught))
        paths[name] = stage(tmp_path / name, "distill", settings=settings, parents=family, metrics=rows, finish=False)
    report = gather.gather(paths)
    assert {m.name: m.role for m in report.models if m.is_unfinished} == {
        "early": Role.distilled,
        "early_ce": Role.baseline,
    }
    assert report.result is not None
    assert report.result.name == "distilled"
    assert "the baseline (ce_only" in "".join(piece for piece, _ in page.verdict(report))
    only = gather.gather({name: paths[name] for name in ("pruned", "early")})
    assert only.result is not None
    assert only.result.name == "pruned"
    console = Console(file=io.StringIO(), width=200)
    console.print(page.terminal_table(report))
    assert "early (distilled, not finished)" in console.file.getvalue()  # type: ignore[attr-defined]


def test_every_run_has_a_colour_of_its_own_and_the_result_that_of_its_role(whole: Any, tmp_path: Path) -> None:
    paths = {name: whole[0][name] for name in ("teacher", "pruned")}
    family = {"student": paths["pruned"], "large": paths["teacher"]}
    bits = (1.4, 1.2, 1.3, 1.5, 1.6, 1.7, 1.8)
    for index, end in enumerate(bits):
        paths[f"run{index}"] = stage(
            tmp_path / f"run{index}", "distill", settings={"teachers": {"large": {}}}, shape=SMALL, parents=family,
            metrics=trained(6.0, end, taught=True),
        )  # fmt: skip
    report = gather.gather(paths)
    assert report.result is report.first(Role.distilled)
    assert report.result is not None
    assert report.result.name == "run1"
    for palette in (palettes.LIGHT, palettes.DARK, palettes.VARIABLES):
        colours = {model.name: palette.of(model, report.models) for model in report.models}
        assert len(set(colours.values())) == len(colours) == 9
        assert [colours["run1"], colours["pruned"]] == [palette.distilled, palette.pruned]


def timed(path: Path, starts: list[list[tuple[float, int, float]]], *, created: float, finished: str) -> Path:
    """A finished run by hand: of each start, when it logged which step, and the mean time of the steps before it."""
    stage(path, "distill", shape=SMALL)
    rows = [
        {"step": step, "time": at, "restart": restart, "perf/step_s": mean, "train/ce": 1.0, "data/tokens": 10 * step}
        for restart, logged in enumerate(starts)
        for at, step, mean in logged
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    storage.write_json(path / "run.json", {"id": "a", "restarts": len(starts) - 1, "created": created})
    storage.write_json(path / "DONE.json", storage.read_json(path / "DONE.json") | {"finished": finished})
    return path


FIRST = [(1020.0 + 20 * n, 10 * n, 2.0) for n in range(1, 6)]
"""Steps 10 to 50 by 1120; a checkpoint at 30, and the process killed behind 50."""
SECOND = [(1200.0, 40, 2.0), (1230.0, 50, 3.0), (1250.0, 60, 2.0)]


def test_goodput_is_the_time_of_steps_that_count_over_all_of_it(tmp_path: Path) -> None:
    """30 steps of 2 s before the kill, then 10 of 2, 10 of 3 and 10 of 2; 290 s from the first start to the end."""
    path = timed(tmp_path / "d", [FIRST, SECOND], created=1000.0, finished="1970-01-01T00:21:30Z")
    stage = gather.gather({"d": path}).stages[0]
    assert stage.seconds == 290
    assert stage.goodput == pytest.approx((30 * 2 + 10 * 2 + 10 * 3 + 10 * 2) / 290)
    assert stage.metrics.lost_steps == 20
    text = read({"d": path})
    assert re.search(r"<td>1</td><td>20</td><td>44\.8\s%</td><td>5 min</td>", text)


@pytest.mark.parametrize(
    ("starts", "lost"),
    [
        ([range(10, 60, 10)], 0),
        ([range(10, 60, 10), range(40, 70, 10)], 20),
        ([range(10, 60, 10), range(40, 50, 10), range(40, 70, 10)], 20 + 10),
        ([range(10, 60, 10), range(60, 70, 10)], 0),
        ([range(1, 4), range(0, 5)], 3),
        ([range(1, 9), range(5, 7), range(3, 9)], (8 - 2) + (6 - 4 + 2)),
    ],
)
def test_lost_steps_are_those_that_a_later_start_did_again(starts: list[range], lost: int) -> None:
    rows = [{"step": step, "restart": restart} for restart, steps in enumerate(starts) for step in steps]
    assert Metrics(rows).lost_steps == lost


def test_a_curve_and_its_restarts_can_be_placed_by_tokens_steps_and_time(tmp_path: Path) -> None:
    path = timed(tmp_path / "d", [FIRST, SECOND], created=1000.0, finished="1970-01-01T00:21:30Z")
    metrics = gather.gather({"d": path}).stages[0].metrics
    steps = [10, 20, 30, 40, 50, 60]
    times = [0, 20, 40, 1200 - 1040, 1230 - 1040, 1250 - 1040]
    expected = {"tokens": [10 * step for step in steps], "steps": steps, "seconds": times}
    assert {over: metrics.series("train/ce", over)[0].tolist() for over in Over} == expected
    assert [metrics.restarts(over) for over in Over] == [[300], [30], [160]]


def test_the_losses_stand_over_tokens_steps_and_wall_time_with_a_line_at_each_restart(tmp_path: Path) -> None:
    path = timed(tmp_path / "d", [FIRST, SECOND], created=1000.0, finished="1970-01-01T00:21:30Z")
    sketches = training.losses(gather.gather({"d": path}))
    assert [sketch.tab for sketch in sketches] == ["tokens", "steps", "wall time"]
    for sketch, place in zip(sketches, (300, 30, 160), strict=True):
        [axes] = sketch.draw(palettes.LIGHT).axes
        assert [line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1] == [place]
    text = read({"d": path})
    chosen = re.findall(r'<input type="radio" name="losses-over" id="show-([a-z-]+)"( checked)?>', text)
    assert chosen == [("losses", " checked"), ("losses-steps", ""), ("losses-wall-time", "")]
    assert set(Reader(text).ids) >= {name for name, _ in chosen}


@pytest.mark.parametrize(
    ("seconds", "unit"), [(299, "seconds"), (300, "minutes"), (3 * 3600, "hours"), (4 * 86400, "days")]
)
def test_wall_time_has_the_unit_of_its_length(seconds: float, unit: str) -> None:
    assert training._axis_of(Over.seconds, seconds)[1].startswith(unit)


def test_rows_that_a_restart_superseded_are_not_drawn(tmp_path: Path) -> None:
    rows = [(step, {"data/tokens": 100.0 * step, "perf/tokens_per_s_per_gpu": 5.0}) for step in range(4)]
    path = stage(tmp_path / "d", "distill", metrics=rows, finish=False)
    stage(path, "distill", metrics=[(step, {**row, "perf/tokens_per_s_per_gpu": 7.0}) for step, row in rows[2:]])
    model = gather.gather({"d": path}).models[0]
    assert model.stage is not None
    tokens, speed = model.stage.metrics.series("perf/tokens_per_s_per_gpu")
    assert (tokens.tolist(), speed.tolist()) == ([0, 100, 200, 300], [5, 5, 7, 7])
    assert model.stage.metrics.restarts() == [100]
    assert model.stage.restarts == 1


def test_a_value_logged_without_tokens_is_placed_by_its_step() -> None:
    name = "val/v/loss"
    rows = [{"step": 0, name: 9.0}, {"step": 5, "data/tokens": 50}, {"step": 5, name: 3.0}, {"step": 7, name: 1.0}]
    tokens, values = Metrics(rows).series(name)
    assert (tokens.tolist(), values.tolist()) == ([0.0, 50.0], [9.0, 3.0])


def test_the_teacher_keeps_its_distance_where_runs_and_evaluation_measured_other_rows(whole: Any) -> None:
    """Runs that measured harder rows than the evaluation: curve end 1.31 where the evaluation has 1.21."""
    report = whole[1]
    ends = {curve.model.name: curve.values[-1] for curve in report.curves}
    gap = 1.21 - 1.02
    assert quality.teacher_level(report) == pytest.approx(ends["distilled"] - gap)
    curves = [dataclasses.replace(c, values=c.values + 0.1) for c in report.curves]
    assert quality.teacher_level(dataclasses.replace(report, curves=curves)) == pytest.approx(
        ends["distilled"] + 0.1 - gap
    )


@pytest.mark.parametrize("shape", [*PUBLISHED.values(), BIG, SMALL], ids=str)
def test_components_add_up_to_all_parameters(shape: LlamaShape) -> None:
    assert sum(pruning.components(shape).values()) == shape.num_parameters


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00k"), (12_345, "12.3k"), (999_600, "1.00M"), (1_235_814_400, "1.24B")],
)
def test_counts_are_said_in_three_digits(number: float, text: str) -> None:
    assert labels.short(number) == text


def test_smoothing_keeps_constants_and_straight_lines() -> None:
    assert training.smoothed(np.full(50, 3.0)) == pytest.approx([3.0] * 50)
    line = np.arange(200.0)
    assert training.smoothed(line)[10:-10] == pytest.approx(line[10:-10])
    assert training.smoothed(np.ones(1)) == [1.0]


def test_a_thinned_curve_keeps_its_ends_and_every_spike() -> None:
    x, values = np.arange(1_000_000.0), np.zeros(1_000_000)
    values[[123_456, 654_321]] = 9, -9
    thin_x, thin = drawing.thinned(x, values)
    assert len(thin) <= 3200
    assert (thin_x[0], thin_x[-1]) == (0, 999_999)
    assert [thin[thin_x == at].tolist() for at in (123_456, 654_321)] == [[9], [-9]]
    assert drawing.thinned(x[:3200], values[:3200])[1] is not thin


def test_a_hundred_thousand_steps_make_no_large_page(tmp_path: Path) -> None:
    path = stage(tmp_path / "d", "distill", settings={"teachers": {"t": {}}}, metrics=trained(5, 2, taught=True))
    noise = np.random.default_rng(0)
    with (path / "metrics.jsonl").open("a") as file:
        for step in range(401, 100_000):
            ce, kd, speed = noise.random(3).tolist()
            row = {"step": step, "restart": 0, "data/tokens": step * 16384, "train/ce": ce, "train/kd": kd}
            file.write(json.dumps(row | {"perf/tokens_per_s_per_gpu": speed}) + "\n")
    assert len(drawn({"d": path}, tmp_path / "out")) < 600_000


@pytest.mark.parametrize("torn", ['{"step": 9, "restart": 0, "val/held_', "{"])
def test_a_line_that_is_still_being_written_is_not_read(torn: str, tmp_path: Path) -> None:
    """Of a run that goes on, or was killed in the middle of a line."""
    path = stage(tmp_path / "d", "distill", metrics=trained(5, 2, taught=False), finish=False)
    before = gather.gather({"d": path}).models[0].values
    with (path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert gather.gather({"d": path}).models[0].values == before
    with (path / "metrics.jsonl").open("a") as file:
        file.write("\n{}\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line \d+, is not a row"):
        gather.gather({"d": path})


@pytest.mark.parametrize(
    "broken", ["plan.safetensors", "scores.safetensors", "evaluation.json", "config.json", "DONE.json"]
)
def test_a_damaged_file_is_named(broken: str, tmp_path: Path) -> None:
    paths = world(tmp_path)
    file = next(tmp_path.rglob(broken))
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match=re.escape(broken)):
        gather.gather(paths)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"runs must name"):
        gather.gather({})
    with pytest.raises(ValueError, match=r"runs\.a=.* is not a directory"):
        gather.gather({"a": tmp_path / "none"})
    with pytest.raises(ValueError, match=r"runs\.a=.* is neither a run directory"):
        gather.gather({"a": tmp_path})


def test_a_model_directory_of_strangers_can_be_the_teacher(whole: Any, tmp_path: Path) -> None:
    """It has no run files; the evaluation knows it by its place."""
    teacher = tmp_path / "hub"
    teacher.mkdir()
    (teacher / "config.json").write_text(json.dumps({"model_type": "llama", **BIG.config_fields()}))
    evaluation = stage(tmp_path / "e", "evaluate")
    found = {"data": {}, "teacher": "teacher", "differences": []}
    models = {"teacher": entry(teacher, BIG, 1.0, None), "distilled": entry(whole[0]["distilled"], SMALL, 1.2, 0.3)}
    storage.write_json(evaluation / "evaluation.json", found | {"models": models})
    report = gather.gather({"Llama": teacher, "distilled": whole[0]["distilled"], "e": evaluation})
    assert [(model.name, model.role) for model in report.models] == [
        ("Llama", Role.teacher),
        ("distilled", Role.distilled),
    ]


def test_what_mending_bought_is_drawn_where_something_was_mended(tmp_path: Path) -> None:
    path = stage(tmp_path / "pruned", "prune", shape=SMALL)
    write_plan(path, BIG, SMALL)
    assert "mended-pruned" not in Reader(drawn({"pruned": path}, tmp_path / "plain")).ids
    rows = [{"prune/error/start": 0.3, "prune/error/refit": 0.2, "prune/seconds/closed_forms": 2.0} for _ in range(2)]
    behind = {"prune/divergence/start": 0.9, "prune/divergence/tied": 0.625, "prune/seconds/tied": 7.0}
    with (path / "metrics.jsonl").open("a") as file:
        file.writelines(
            json.dumps({"step": layer, "time": 0.0, "restart": 0, **row}) + "\n"
            for layer, row in enumerate([*rows, behind])
        )
    text = drawn({"pruned": path}, tmp_path / "mended")
    assert "mended-pruned" in Reader(text).ids
    assert "the closed forms 4 s, those on the shared matrix 7 s." in text  # as records were before parts had clocks
    assert "as mended by layers 0.900, those on the shared matrix 0.625." in text


def test_each_part_of_mending_is_told_with_its_seconds_and_with_what_it_leaves(tmp_path: Path) -> None:
    path = stage(tmp_path / "pruned", "prune", shape=SMALL)
    write_plan(path, BIG, SMALL)
    row = {"prune/error/start": 0.3, "prune/error/refit": 0.2, "prune/seconds/attention_steps": 30.0}
    row |= {"prune/seconds/readers": 1.0, "prune/seconds/passes": 2.0, "prune/left/readers": 0.5}
    with (path / "metrics.jsonl").open("a") as file:
        file.writelines(
            json.dumps({"step": layer, "time": 0.0, "restart": 0, **row, "prune/left/attention_steps": share}) + "\n"
            for layer, share in enumerate((0.2, 0.4))
        )
    text = drawn({"pruned": path}, tmp_path / "page")
    assert "Time: readers 2 s, steps on attention 60 s, running both models through the layers 4 s." in text
    assert "Left of what each part fits, mean over layers: readers 50%, steps on attention 30%." in text
