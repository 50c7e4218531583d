"""Settings by name: which of them are the model's sizes, the task's reading, the training's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any

from seqkern.tasks.job import JobSpec
from seqkern.tasks.options import TrainOptions
from seqkern.tasks.recipes import RECIPES, Recipe
from seqkern.tasks.registry import entry, load


def parse_settings(given: Iterable[str]) -> dict[str, Any]:
    """NAME=VALUE texts as a dict; values are read as JSON, and what is none is a text.

    Raises:
        ValueError: one has no "=" or no name.
    """
    settings = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"a setting must be NAME=VALUE, got {text!r}")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings


def recipe_for(model: str, task: str) -> Recipe | None:
    """The first recipe of a model on a task; its settings are what a training starts from."""
    found = [r for r in RECIPES.values() if (r.model, r.task) == (model, task)]
    return found[0] if found else None


def resolve(
    model: str, task: str, data: str, layers: str, settings: dict[str, Any]
) -> tuple[JobSpec, TrainOptions]:
    """The spec and the options of a training.

    What `settings` does not say is as in the recipe of the model on the task, and else the default.

    Args:
        settings: by name; `seed` is of the data, the weights and the training alike.

    Raises:
        ValueError: a name is none of the model's sizes, of its task's reading or of the training;
            or a value is not of its default's kind.
    """
    of_training, of_task, of_model = _defaults(model, settings)
    recipe = recipe_for(model, task)
    sizes = dict(recipe.sizes) if recipe else {}
    reading = dict(recipe.reading) if recipe else {}
    options = dict(recipe.options) if recipe else {}
    if "steps" in settings:  # what is asked for decides, not the recipe's epochs
        options.pop("epochs", None)
    for name, value in settings.items():
        for chosen, defaults in (
            (options, of_training),
            (reading, of_task),
            (sizes, of_model),
        ):
            if name in defaults:
                chosen[name] = _of_kind(name, value, defaults[name])
                break
    seed = settings.get("seed", TrainOptions.seed)
    spec = JobSpec(model, task, data, layers, seed, sizes, reading)
    return spec, TrainOptions(**options)


def expect_known(model: str, names: Iterable[str]) -> None:
    """Raises ValueError where a model has no setting of a name."""
    _defaults(model, names)


def _defaults(model: str, names: Iterable[str]) -> tuple[dict[str, Any], ...]:
    """The defaults of training, task and model, one of which has each of the names."""
    found = entry(model)
    of_training = {field.name: field.default for field in fields(TrainOptions)}
    # What has no default comes from the data, as the number of symbols.
    config = fields(load(found.config))
    of_model = {f.name: f.default for f in config if f.default is not MISSING}
    defaults = of_training, load(found.job).READING, of_model
    known = {name for part in defaults for name in part}
    for name in names:
        if name not in known:
            raise ValueError(
                f"no setting {name!r} of model {model!r}; there are {', '.join(sorted(known))}"
            )
    return defaults


def _of_kind(name: str, value: Any, default: Any) -> Any:
    """The value, as a tuple or a float where the default is one."""
    kind = type(default)
    if kind is tuple and isinstance(value, list):
        of = type(default[0])
        if any(type(item) is not of for item in value):
            raise ValueError(f"{name} must hold {of.__name__}, as {default!r}, got {value!r}")
        return tuple(value)
    if kind is float and type(value) is int:
        return float(value)
    if default is not None and type(value) is not kind:
        raise ValueError(f"{name} must be of kind {kind.__name__}, as {default!r}, got {value!r}")
    return value
