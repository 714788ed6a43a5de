"""What alignment did: assistants side by side as ``assess`` measured them, and what each step reports of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure

from llamita import storage
from llamita.report import drawing, labels
from llamita.report.drawing import Sketch
from llamita.report.gather import Report
from llamita.report.models import Estimate, Model
from llamita.report.palettes import Palette
from llamita.report.stages import Stage

FILE = "results.json"
NAMES = {
    "loss": "loss of what the assistant says, nats per token",
    "preference_accuracy": "preferred answer is the likelier one",
    "preference_accuracy_per_token": "preferred answer is the likelier one, per token",
    "python/parses": "answers that are Python",
    "python/score": "reward of Python answers",
    "number/exact": "right numbers",
    "ifeval/prompt_strict": "IFEval, prompts, strict",
    "ifeval/prompt_loose": "IFEval, prompts, loose",
    "ifeval/instruction_strict": "IFEval, instructions, strict",
    "ifeval/instruction_loose": "IFEval, instructions, loose",
    "reward": "reward by the reward model",
    "win_rate": "answers better than the first model's",
    "truncated": "answers that did not end",
    "bits_per_byte": "bits per byte of text",
}
"""What a figure is called; others go by their own names."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A paired difference with its interval of 95 %."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves nought out."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of all assistants."""

    name: str
    values: list[Estimate | None]
    gaps: list[Gap | None]
    """Against the first assistant, paired by row, where that was measured."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step of alignment reports of itself."""

    name: str
    recipe: str
    facts: list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Everything about alignment on the page."""

    models: list[str] = field(default_factory=list)
    """The first one is what the others are compared with."""
    rows: list[Row] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    best_of: dict[str, dict[int, float]] = field(default_factory=dict)
    """Expected best reward of n answers, by stage."""


def read(report: Report) -> Alignment:
    """What the stages tell.

    Raises:
        ValueError: a file is damaged.
    """
    models: list[str] = []
    rows: list[Row] = []
    for stage in report.stages:
        file = stage.path / FILE
        if stage.recipe == "assess" and file.is_file() and not models:
            told = storage.read_mapping(file)
            try:
                models = _names(told)
                rows = _rows(told, report.models)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{file} is damaged: assess wrote no such entry ({error!r})") from error
    steps = [step for stage in report.stages if (step := _step(stage)) is not None]
    best = {stage.name: found for stage in report.stages if (found := _best_of(stage))}
    return Alignment(models=models, rows=rows, steps=steps, best_of=best)


def _names(told: Mapping[str, Any]) -> list[str]:
    """The models as they were given, before all others the one that they are compared with."""
    return [told["first"], *(entry["second"] for entry in told["differences"])]


def _rows(told: Mapping[str, Any], known: Sequence[Model]) -> list[Row]:
    names = _names(told)
    measured = {key for name in names for key in told["models"][name]["values"]}
    keys = [*(key for key in NAMES if key in measured), *sorted(measured - NAMES.keys())]
    gaps = {entry["second"]: entry for entry in told["differences"]}
    rows = []
    for key in keys:
        values = [_estimate(told["models"][name]["values"].get(key)) for name in names]
        paired = [_gap(gaps.get(name, {}).get(key)) for name in names]
        rows.append(Row(name=NAMES.get(key, key), values=values, gaps=paired))
    by_hash = {m.stage.sha256: m.values.get("bits_per_byte") for m in known if m.stage and m.stage.sha256}
    text = [by_hash.get(told["models"][name]["sha256"]) for name in names]
    if any(text):
        rows.append(Row(name=NAMES["bits_per_byte"], values=text, gaps=[None] * len(names)))
    return rows


def _estimate(value: Any) -> Estimate | None:
    if value is None:
        return None
    stderr = value["stderr"]
    return Estimate(float(value["value"]), None if stderr is None else float(stderr))


def _gap(value: Any) -> Gap | None:
    return None if value is None else Gap(**{name: float(value[name]) for name in ("value", "low", "high")})


def _step(stage: Stage) -> Step | None:
    """The facts of a finished step, each with what it was before where that is known."""
    if stage.done is None:
        return None
    summary: Mapping[str, Any] = stage.done.get("summary") or {}
    facts: list[tuple[str, str]] = []

    def change(label: str, key: str, before: Any = None) -> None:
        if isinstance(value := summary.get(key), int | float):
            first = summary.get(f"before/{key}", before)
            told = f"{first:.3f} → {value:.3f}" if isinstance(first, int | float) else f"{value:.3f}"
            facts.append((label, told))

    match stage.recipe:
        case "sft":
            held_out = stage.metrics.values("val/held_out/loss")
            change("held-out loss of answers", "val/held_out/loss", float(held_out[0]) if held_out.size else None)
        case "reward":
            change("held-out pairs ranked rightly", "val/held_out/reward_accuracy")
        case "dpo":
            change("held-out reward margin", "val/held_out/dpo_margin")
            change("held-out pairs ranked rightly", "val/held_out/dpo_accuracy")
            change("preferred answer the likelier one", "val/held_out/logp_accuracy")
        case "rl":
            change("held-out reward", "val/held_out/reward")
            change("KL to its start, nats per token", "val/held_out/kl_to_start")
            change("KL to the teacher, nats per token", "val/held_out/kl_to_teacher")
    return Step(name=stage.name, recipe=stage.recipe or "", facts=facts) if facts else None


def _best_of(stage: Stage) -> dict[int, float]:
    if stage.recipe != "sample" or stage.done is None:
        return {}
    train = (stage.done.get("summary") or {}).get("train") or {}
    prefix = "best_of_"
    return {int(key.removeprefix(prefix)): float(v) for key, v in train.items() if key.startswith(prefix)}


def best_of(alignment: Alignment) -> Sketch | None:
    """The expected best reward of n answers over n, one line for each stage."""
    if not alignment.best_of:
        return None

    def draw(palette: Palette) -> Figure:
        figure, axes = drawing.new_figure(720, 280)
        for index, (name, points) in enumerate(alignment.best_of.items()):
            colour = palette.others[index % len(palette.others)]
            told = {"color": colour, "label": labels.clip(name)}
            axes.plot(list(points), list(points.values()), "o-", linewidth=1.6, markersize=5, **told)
        counts = sorted({n for points in alignment.best_of.values() for n in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, labels=[str(n) for n in counts])
        axes.set_xlabel("answers to each prompt, n")
        axes.set_ylabel("mean reward of the best")
        if len(alignment.best_of) > 1:
            drawing.legend(figure, axes.get_legend_handles_labels()[0])
        return figure

    caption = "Mean over prompts of the best reward among n answers, without bias from those drawn; n = 1 is the mean."
    return Sketch(name="best-of", title="Best of n", caption=caption, draw=draw)
