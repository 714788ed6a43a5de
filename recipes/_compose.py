"""Settings of any recipe from its overrides, with every mistake in them found, not the first."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from _main import CONFIGS
from llamita import checks, redaction

UNSET = "(not-set)"
"""Stands for a path that was not given, so that what does not depend on it can be checked."""


def load(name: str) -> ModuleType:
    """The module of ``recipes/<name>.py``, without running it."""
    key = f"recipe_{name}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, Path(__file__).parent / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[key] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[key])
    return sys.modules[key]


def composed(recipe: str, overrides: Sequence[str], schema: type | None = None) -> tuple[Any, list[str]]:
    """The typed settings, or ``None`` where mistakes leave none, and the mistakes.

    An override that is refused is left out, so that the rest can be looked at. ``schema`` is the recipe's own unless
    it is given.
    """
    schema = schema or getattr(load(recipe), recipe.capitalize())
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        kept, mistakes = _kept(recipe, list(overrides))
        refused = {_key(override) for override in overrides if override not in kept}
        while True:
            cfg, unset, failed = _typed(recipe, kept, schema)
            mistakes += [f"{name} must be given" for name in unset if name not in refused] + [
                text for _, text in failed
            ]
            fewer = _without(recipe, kept, schema, {node for node, _ in failed if node})
            if not failed or len(fewer) == len(kept):
                break
            kept = fewer
    config = None if failed or OmegaConf.missing_keys(cfg) else OmegaConf.to_object(cfg)
    return config, list(dict.fromkeys(mistakes))


def _typed(recipe: str, overrides: list[str], schema: type) -> tuple[Any, list[str], list[tuple[str, str]]]:
    """The composed settings held to the schema, what was not given, and what is refused, by the name of its node."""
    cfg: Any = compose(recipe, overrides=overrides)
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.to_container(cfg))
    except OmegaConfBaseException as error:
        name = str(error.full_key)
        if not isinstance(error, ConfigKeyError):
            return cfg, [], [(name, f"{name}: {str(error).partition(chr(10))[0]}")]
        known = [field.name for field in fields(error.object_type)] if is_dataclass(error.object_type) else []
        parent = name.rpartition(".")[0]
        hint = checks.suggestion(name, [f"{parent}.{field}" for field in known])
        return cfg, [], [(name, f"{name} is no setting of {recipe}{hint}")]
    unset = _fill_missing(cfg)
    return cfg, unset, list(_failures(cfg, ""))


def _kept(recipe: str, overrides: list[str]) -> tuple[list[str], list[str]]:
    """The overrides that Hydra takes, and one line for each that it does not."""
    try:
        compose(recipe, overrides=overrides)
        return overrides, []
    except (HydraException, OmegaConfBaseException):
        pass
    kept: list[str] = []
    mistakes = []
    for override in overrides:
        try:
            compose(recipe, overrides=[*kept, override])
            kept.append(override)
        except (HydraException, OmegaConfBaseException) as error:
            mistakes.append(_explain(recipe, kept, override, error))
    return kept, mistakes


def _without(recipe: str, kept: list[str], schema: type, nodes: set[str]) -> list[str]:
    """The overrides without the one below each refused node that made it so, or without all below it."""
    for node in nodes:
        below = [o for o in kept if _key(o) == node or _key(o).startswith(f"{node}.")]
        for one in below:
            _, _, failed = _typed(recipe, [o for o in kept if o != one], schema)
            if node not in dict(failed):
                below = [one]
                break
        kept = [o for o in kept if o not in below]
    return kept


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def _explain(recipe: str, kept: list[str], override: str, error: Exception) -> str:
    """One line for a refused override."""
    key, cause = _key(override), error.__cause__
    if "Could not override" in str(error):
        plain = OmegaConf.to_container(compose(recipe, overrides=kept), throw_on_missing=False)
        known = [name for name, _ in redaction.flat(plain)]
        prefixes = {".".join(name.split(".")[:depth]) for name in known for depth in range(1, name.count(".") + 1)}
        return f"{key} is no setting of {recipe}{checks.suggestion(key, [*known, *sorted(prefixes)])}"
    lines = str(cause or error).splitlines()
    wanted = [
        line.strip() for line in lines if line.strip() and not line.lstrip().startswith(("full_key", "object_type"))
    ]
    text = " ".join(wanted).partition(" Config search path")[0].partition(" See https")[0]
    return f"{override}: {text}"


def _fill_missing(cfg: Any) -> list[str]:
    """Names of mandatory settings without a value; paths get one that is no path."""
    # First those at the root: others may name them, as ${out}, and cannot be looked at before.
    unset = [str(name) for name in cfg if OmegaConf.is_missing(cfg, name)]
    for name in unset:
        with contextlib.suppress(OmegaConfBaseException):
            OmegaConf.update(cfg, name, UNSET)
    inner = sorted(OmegaConf.missing_keys(cfg) - set(unset))
    unset = sorted([*unset, *inner])
    for name in inner:
        try:
            OmegaConf.update(cfg, name, UNSET)
        except OmegaConfBaseException:
            continue
    return unset


def _failures(node: Any, name: str) -> Iterator[tuple[str, str]]:
    """Nodes of ``cfg`` that their dataclass refuses, innermost first; a refused child hides its parents."""
    inner: list[tuple[str, str]] = []
    if isinstance(node, DictConfig):
        for key in node:
            if not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig):
                inner += _failures(node[key], f"{name}.{key!s}" if name else str(key))
    yield from inner
    if inner or not is_dataclass(OmegaConf.get_type(node)):
        return
    try:
        OmegaConf.to_object(node)
    except MissingMandatoryValue:
        return  # has a line of its own
    except (ValueError, OmegaConfBaseException) as error:
        yield name, str(error).partition("\n")[0]
