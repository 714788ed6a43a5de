"""The report itself: one HTML file without scripts or requests, pictures as PNG beside it, and a terminal table."""

from __future__ import annotations

import dataclasses
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llamita import progress, storage
from llamita.report import assistants, drawing, labels, mended, palettes, pruning, quality, searches, training
from llamita.report.drawing import Sketch
from llamita.report.gather import Report
from llamita.report.models import Estimate, Model
from llamita.report.roles import Role
from llamita.report.stages import Stage

PAGE = "report.html"
PLOTS = "plots"
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "datasets", "safetensors", "numpy")


def write(report: Report, out: Path) -> list[str]:
    """Write ``report.html`` and ``plots/*.png`` into ``out``; returns their names."""
    (out / PLOTS).mkdir(parents=True, exist_ok=True)
    sketches = _sketches(report)
    names = [f"{PLOTS}/{drawing.save_png(sketch, out / PLOTS).name}" for group in sketches.values() for sketch in group]
    storage.write_atomically(out / PAGE, html(report, sketches))
    return [PAGE, *names]


def _sketches(report: Report) -> dict[str, list[Sketch]]:
    """Pictures by section; a section without any is absent."""
    groups: dict[str, list[Sketch | None]] = {
        "recovery": [quality.recovery(report)],
        "parameters": [_parameters(report)],
        "tasks": [quality.tasks(report)],
        "losses": [*training.losses(report)],
        "training": [training.throughput(report)],
        "assistants": [assistants.best_of(assistants.read(report))],
    }
    for index, search in enumerate(_searches(report)):
        groups[f"search-{index}"] = [searches.pareto(search)]
    stages = {stage.name: stage for stage in report.stages}
    for index, kept in enumerate(report.kept):
        groups[f"kept-{index}"] = [*pruning.of_plan(kept), mended.errors(stages[kept.name])]
    drawn = {name: [sketch for sketch in group if sketch is not None] for name, group in groups.items()}
    _make_unique([sketch for group in drawn.values() for sketch in group])
    return {name: group for name, group in drawn.items() if group}


def _searches(report: Report) -> list[searches.Search]:
    found = [searches.read(stage) for stage in report.stages]
    return [search for search in found if search is not None and search.candidates]


def _make_unique(sketches: Sequence[Sketch]) -> None:
    """Different runs may have names that differ in characters that no file name has."""
    seen: set[str] = set()
    for sketch in sketches:
        stem, number = sketch.name, 2
        while sketch.name in seen:
            sketch.name, number = f"{stem}-{number}", number + 1
        seen.add(sketch.name)


def _parameters(report: Report) -> Sketch | None:
    before, after = report.first(Role.teacher), report.result
    if before is None or after is None or before.shape is None or after.shape is None:
        return None
    return pruning.parameters(before.shape, after.shape, (before.name, after.name))


def html(report: Report, sketches: Mapping[str, Sequence[Sketch]]) -> str:
    """The page as text. All that comes from data is escaped by the template."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "count": labels.short,
        "estimate": estimate,
        "duration": duration,
        "exact": "{:,}".format,
        "percent": labels.percent,
        "amount": amount,
        "signed": signed,
    }
    template = environment.from_string(resources.files("llamita.report").joinpath("page.html.j2").read_text("utf-8"))
    pictures = {section: [_safe(sketch) for sketch in group] for section, group in sketches.items()}
    return template.render(
        light=palettes.variables(palettes.LIGHT),
        dark=palettes.variables(palettes.DARK),
        title=_title(report),
        verdict=verdict(report),
        tiles=_tiles(report),
        rows=[_row(model, report) for model in report.models],
        gaps=_gaps(report),
        report=report,
        pictures=pictures,
        components=_component_rows(report),
        searches=list(enumerate(_searches(report))),
        cost_names=searches.COSTS,
        kept=list(enumerate(report.kept)),
        task_rows=_task_rows(report),
        alignment=assistants.read(report),
        training=[_training_row(m, m.stage, report) for m in report.models if m.stage and _trained(m.stage)],
        lineage=[_lineage_row(stage, report) for stage in report.stages],
        environment=environment_now(),
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


def _safe(sketch: Sketch) -> dict[str, Any]:
    picture = drawing.picture(sketch)
    return dataclasses.asdict(picture)


def estimate(value: Estimate | None, digits: int = 3) -> str:
    """A value with its standard error, or a dash."""
    if value is None:
        return "–"
    digits = digits if abs(value.value) < 100 else 0
    text = f"{value.value:,.{digits}f}"
    return text if value.stderr is None else f"{text} ± {value.stderr:,.{digits}f}"


def amount(number: float) -> str:
    """A number that may be large, with two decimals where they say something."""
    return f"{number:,.2f}" if number < 1000 else f"{number:,.0f}"


def signed(number: float, digits: int = 3) -> str:
    """A difference with its sign."""
    return f"{number:+.{digits}f}".replace("-", "−")


def duration(seconds: float | None) -> str:
    """Seconds as people say them, or a dash."""
    return "–" if seconds is None else progress.duration(seconds)


def _title(report: Report) -> str:
    teacher, result = report.first(Role.teacher), report.result
    if result is None:
        return "Llamita report"
    return f"{teacher.name} → {result.name}" if teacher else result.name


def verdict(report: Report) -> list[tuple[str, bool]]:
    """The story in sentences, as pieces of text that are or are not emphasised."""
    teacher, result = report.first(Role.teacher), report.result
    pruned = (result and result.start) or report.first(Role.pruned)
    pieces: list[tuple[str, bool]] = []

    def say(*parts: str) -> None:
        pieces.extend((part, index % 2 == 1) for index, part in enumerate(parts))

    if teacher and result and teacher.shape and result.shape:
        before, after = teacher.shape.num_parameters, result.shape.num_parameters
        say(
            f"From {teacher.name} with {labels.short(before)} parameters, pruning made a model with ",
            f"{labels.short(after)}",
            f", {labels.percent(after / before)} of them. ",
        )
    start, floor = (model.values.get("bits_per_byte") if model else None for model in (pruned, teacher))
    if start and floor:
        say("It cost quality: bits per byte on held-out text went from ", f"{floor.value:.3f}")
        say(" to ", f"{start.value:.3f}", ". ")
    if result and result.role is Role.distilled and (end := result.values.get("bits_per_byte")):
        tokens = f" over {labels.short(result.tokens)} tokens" if result.tokens else ""
        say(f"Distillation{tokens} brought it to ", f"{end.value:.3f}")
        if result.recovered is not None:
            say(": ", f"{labels.percent(result.recovered, 0)} of the loss", " is won back. ")
        else:
            say(". ")
        say(_against_baselines(result, report))
    if pruned is not None and result is pruned and not start:
        say("Nothing was measured on held-out text yet: give the directory of an evaluation too.")
    return pieces


def _against_baselines(result: Model, report: Report) -> str:
    """How the result compares with models of other making, in words."""
    mine = result.values["bits_per_byte"].value
    baselines = [model for model in report.models if model.role is Role.baseline and not model.is_unfinished]
    rivals = [model for model in baselines if "bits_per_byte" in model.values]
    if not rivals:
        return ""
    better = [m for m in rivals if m.values["bits_per_byte"].value > mine]
    listed = ", ".join(f"{m.name} {m.values['bits_per_byte'].value:.3f}" for m in rivals)
    if len(better) == len(rivals):
        return f"It is better than {'the baseline' if len(rivals) == 1 else 'every baseline'} ({listed})."
    return f"It is better than {len(better)} of {len(rivals)} baselines ({listed})."


@dataclass(frozen=True)
class Tile:
    """One number at the top of the page."""

    label: str
    value: str
    note: str


def _tiles(report: Report) -> list[Tile]:
    teacher, result = report.first(Role.teacher), report.result
    pruned = (result and result.start) or report.first(Role.pruned)
    tiles = []
    if result is None:
        return []
    if result.shape:
        before = teacher.shape.num_parameters if teacher and teacher.shape else None
        note = f"of {labels.short(before)}: {labels.percent(result.shape.num_parameters / before)}" if before else ""
        tiles.append(Tile("parameters", labels.short(result.shape.num_parameters), note))
    if (bits := result.values.get("bits_per_byte")) is not None:
        ends = [(m.name, m.values["bits_per_byte"].value) for m in (teacher,) if m and "bits_per_byte" in m.values]
        tiles.append(Tile("bits per byte", f"{bits.value:.3f}", ", ".join(f"{n} {v:.3f}" for n, v in ends)))
    if result.recovered is not None and pruned is not None:
        tiles.append(Tile("loss won back", labels.percent(result.recovered, 0), "of what pruning cost"))
    if (agree := result.values.get("top1_agree")) is not None:
        tiles.append(Tile("same first choice", labels.percent(agree.value), "of tokens, as the teacher"))
    return tiles


def _row(model: Model, report: Report) -> dict[str, Any]:
    colour = palettes.VARIABLES.of(model, report.models)
    return {
        "model": model,
        "colour": f"var({colour})",
        "main": model is report.result,
        "role": _role(model),
        "parameters": model.shape.num_parameters if model.shape else None,
        "values": model.values,
        "share": None if model.recovered is None else max(0.0, min(1.0, model.recovered)),
    }


def _role(model: Model) -> str:
    """What the model is, where its name does not say so, and whether it is on its way still."""
    told = [] if model.name == model.role else [str(model.role)]
    return ", ".join([*told, *(["not finished"] if model.is_unfinished else [])])


def _gaps(report: Report) -> list[dict[str, Any]]:
    """Paired differences between the result and every other model of text, signed as (result - other)."""
    result, aligned = report.result, {model.name for model in report.models if model.role is Role.aligned}
    gaps = []
    for entry in report.differences:
        names = (entry["first"], entry["second"])
        if result is None or result.name not in names or "bits_per_byte" not in entry:
            continue
        sign = 1.0 if names[0] == result.name else -1.0
        gap = Estimate(sign * entry["bits_per_byte"]["value"], entry["bits_per_byte"]["stderr"])
        other = names[1] if sign > 0 else names[0]
        if other not in aligned:
            gaps.append({"other": other, "gap": gap})
    return gaps


def _component_rows(report: Report) -> list[dict[str, Any]]:
    before, after = report.first(Role.teacher), report.result
    if before is None or after is None or before.shape is None or after.shape is None:
        return []
    old, new = pruning.components(before.shape), pruning.components(after.shape)
    rows = [{"name": name, "before": old[name], "after": new[name]} for name in pruning.COMPONENTS]
    total = {"name": "all", "before": before.shape.num_parameters, "after": after.shape.num_parameters}
    return [*rows, total]


def _task_rows(report: Report) -> list[dict[str, Any]]:
    """One row for each task and metric, one cell for each model that was asked."""
    models = [model for model in report.models if model.tasks]
    keys = dict.fromkeys((task, metric) for m in models for task, scores in m.tasks.items() for metric in scores)
    return [
        {
            "task": task,
            "metric": metric,
            "cells": [(model.name, model.tasks.get(task, {}).get(metric)) for model in models],
        }
        for task, metric in keys
    ]


def _trained(stage: Stage) -> bool:
    return bool({"perf/step_s", "perf/tokens_per_s_per_gpu"} & set(stage.metrics.names))


def _mean(stage: Stage, key: str) -> float | None:
    values = stage.metrics.values(key)
    return float(values.mean()) if values.size else None


def _training_row(model: Model, stage: Stage, report: Report) -> dict[str, Any]:
    """Means over the logged steps of one training run."""
    step = _mean(stage, "perf/step_s")
    shares = {"data": _mean(stage, "perf/data_s")}
    if stage.settings.get("teachers"):
        shares["teacher"] = _mean(stage, "perf/teacher_s")
    return {
        "name": model.name,
        "colour": f"var({palettes.VARIABLES.of(model, report.models)})",
        "steps": int(stage.metrics.steps.max(initial=0)),
        "tokens": stage.tokens,
        "speed": _mean(stage, "perf/tokens_per_s_per_gpu"),
        "step": step,
        "shares": {name: value / step for name, value in shares.items() if value is not None and step},
        "save": _mean(stage, "perf/save_s"),
        "restarts": max(stage.restarts, len(stage.metrics.restarts())),
        "lost_steps": stage.metrics.lost_steps,
        "goodput": stage.goodput,
        "duration": stage.seconds,
        "unfinished": stage.is_unfinished,
    }


def _lineage_row(stage: Stage, report: Report) -> dict[str, Any]:
    """One directory, with the display names of its parents where they are known."""
    parents = []
    for parent in stage.parents:
        known = next((other.name for other in report.stages if other.keys & parent.keys), None)
        parents.append({"as": parent.name, "known": known, "path": parent.path, "sha256": parent.sha256})
    return {
        "stage": stage,
        "parents": parents,
        "finished": (stage.done or {}).get("finished"),
        "settings": yaml.safe_dump(stage.settings, sort_keys=False, allow_unicode=True) if stage.settings else "",
        "files": (stage.done or {}).get("files", {}),
    }


def environment_now() -> dict[str, str]:
    """Versions on the machine that makes the report."""
    found = {"Python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in ("llamita", *PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def terminal_table(report: Report) -> Table:
    """The headline table for a terminal; names are text, not markup."""
    table = Table(header_style="bold", title=_text(_title(report), style="bold"), title_justify="left")
    for column in ("model", "parameters", "bits/byte", "perplexity", "KL", "top-1", "recovered", "tokens"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=column != "model")
    for model in report.models:
        values = model.values
        cells = [
            labels.short(model.shape.num_parameters) if model.shape else "–",
            estimate(values.get("bits_per_byte")),
            amount(values["perplexity"].value) if "perplexity" in values else "–",
            f"{values['kl'].value:.3f}" if "kl" in values else "–",
            labels.percent(values["top1_agree"].value) if "top1_agree" in values else "–",
            labels.percent(model.recovered, 0) if model.recovered is not None else "–",
            labels.short(model.tokens) if model.tokens is not None else "–",
        ]
        style = "bold" if model is report.result else ""
        role = _role(model)
        table.add_row(_text(f"{model.name} ({role})" if role else model.name), *cells, style=style)
    return table


def assistants_table(alignment: assistants.Alignment) -> Table:
    """Assistants side by side for a terminal."""
    table = Table(header_style="bold", title=_text("assistants", style="bold"), title_justify="left")
    table.add_column("held-out rows")
    for name in alignment.models:
        table.add_column(_text(name), justify="right", no_wrap=True)
    for row in alignment.rows:
        table.add_row(_text(row.name), *map(estimate, row.values))
    return table


def _text(name: str, style: str = "") -> Text:
    """Text of a terminal that is neither markup nor the terminal's own commands."""
    return Text(labels.printable(name), style=style)


def show(report: Report, page: Path) -> None:
    """Print the table and where the page is."""
    # Into a file there is no terminal whose width could be asked.
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(terminal_table(report))
    if (alignment := assistants.read(report)).rows:
        console.print(assistants_table(alignment))
    console.print(Text(f"{page}"), soft_wrap=True)
