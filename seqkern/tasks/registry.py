"""The reference models by name, and the job that trains each; imported when asked for."""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import Any, NamedTuple

from seqkern.tasks.job import Job, JobSpec


class Entry(NamedTuple):
    """Where a model's job, class and config are ("module:Name" below seqkern), and a line on it."""

    job: str
    model: str
    config: str
    about: str


MODELS: dict[str, Entry] = {
    "rnnsearch": Entry(
        "tasks.translation:TranslationJob",
        "models.rnnsearch:RNNSearch",
        "models.rnnsearch:RNNSearchConfig",
        "encoder-decoder with additive attention (Bahdanau et al., 2015)",
    ),
}


def entry(model: str) -> Entry:
    """The entry of a model.

    Raises:
        ValueError: there is no such model.
    """
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(sorted(MODELS))}, got {model!r}")
    return MODELS[model]


def load(where: str) -> Any:
    """The object at "module:Name" below seqkern."""
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(f"seqkern.{module}"), name)


def make_job(spec: JobSpec, vocabularies: dict[str, dict[str, Any]] | None = None) -> Job:
    """The job of a spec; see Job for the arguments and for what is raised."""
    found = entry(spec.model)
    known = {field.name for field in fields(load(found.config))}
    if unknown := spec.sizes.keys() - known:
        raise ValueError(
            f"{sorted(unknown)}: not sizes of model {spec.model!r}, which has {sorted(known)}"
        )
    return load(found.job)(spec, vocabularies)
