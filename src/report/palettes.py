"""The colours of the page and its pictures: a colour is a role (:class:`Palette`), and a CSS variable on the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llamita.report.models import Model
from llamita.report.roles import Role


@dataclass(frozen=True, kw_only=True)
class Palette:
    """What each colour is for."""

    ink: str
    muted: str
    grid: str
    card: str
    teacher: str
    pruned: str
    distilled: str
    cut: str
    others: tuple[str, ...]

    def of(self, model: Model, models: Sequence[Model] = ()) -> str:
        """The colour of a model: its role's for the first teacher, pruned and distilled one, else one of its own."""
        firsts = {role: next((m for m in models if m.role is role), model) for role in _ROLES_WITH_COLOURS}
        if firsts.get(model.role) is model:
            return str(getattr(self, model.role))
        rest = [m for m in models if firsts.get(m.role) is not m]
        index = next((i for i, other in enumerate(rest) if other is model), 0)
        return self.others[index % len(self.others)]


_ROLES_WITH_COLOURS = (Role.teacher, Role.pruned, Role.distilled)

LIGHT = Palette(
    ink="#1d2126",
    muted="#666c75",
    grid="#e5e2dc",
    card="#ffffff",
    teacher="#1d2126",
    pruned="#c4552f",
    distilled="#0e7c6b",
    cut="#d3cfc7",
    others=(
        "#7467b8",
        "#b3862b",
        "#4c86b5",
        "#a8577e",
        "#6a8f2f",
        "#8a5a3c",
        "#c23b6b",
        "#2f4f9e",
        "#5f7d8c",
        "#d06fc0",
    ),
)
DARK = Palette(
    ink="#ebe9e4",
    muted="#9ba1aa",
    grid="#2d3138",
    card="#1b1e23",
    teacher="#ebe9e4",
    pruned="#f08b66",
    distilled="#4ccab2",
    cut="#41464e",
    others=(
        "#aea2f2",
        "#dcb659",
        "#86b9e6",
        "#e091b7",
        "#a9cf6b",
        "#c99a78",
        "#f0648f",
        "#7f98f5",
        "#9fb6c2",
        "#ec9be0",
    ),
)
NAMES = ("ink", "muted", "grid", "card", "teacher", "pruned", "distilled", "cut")


def variables(palette: Palette) -> dict[str, str]:
    """CSS variables of a palette."""
    named = {f"--{name}": getattr(palette, name) for name in NAMES}
    return named | {f"--other-{index}": colour for index, colour in enumerate(palette.others)}


VARIABLES = Palette(
    **{name: f"--{name}" for name in NAMES},
    others=tuple(f"--other-{index}" for index in range(len(LIGHT.others))),
)
"""Names of the CSS variables themselves."""
