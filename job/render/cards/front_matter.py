"""A model card's front matter, as the hub reads it: whose base, which licence, which data, what was measured."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import yaml

from job.core.recipe.schema import is_hub_id
from job.core.reports.report import Report
from job.core.visible import visible

_HUB_LICENCES = frozenset(
    [
        "apache-2.0",
        "mit",
        "openrail",
        "bigscience-openrail-m",
        "creativeml-openrail-m",
        "bigscience-bloom-rail-1.0",
        "bigcode-openrail-m",
        "afl-3.0",
        "artistic-2.0",
        "bsl-1.0",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsd-3-clause-clear",
        "c-uda",
        "cc",
        "cc0-1.0",
        "cc-by-2.0",
        "cc-by-2.5",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cc-by-nc-2.0",
        "cc-by-nc-3.0",
        "cc-by-nc-4.0",
        "cc-by-nd-4.0",
        "cc-by-nc-nd-3.0",
        "cc-by-nc-nd-4.0",
        "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0",
        "cc-by-nc-sa-4.0",
        "cdla-sharing-1.0",
        "cdla-permissive-1.0",
        "cdla-permissive-2.0",
        "wtfpl",
        "ecl-2.0",
        "epl-1.0",
        "epl-2.0",
        "etalab-2.0",
        "eupl-1.1",
        "eupl-1.2",
        "agpl-3.0",
        "gfdl",
        "gpl",
        "gpl-2.0",
        "gpl-3.0",
        "lgpl",
        "lgpl-2.1",
        "lgpl-3.0",
        "isc",
        "h-research",
        "intel-research",
        "lppl-1.3c",
        "ms-pl",
        "apple-ascl",
        "apple-amlr",
        "mpl-2.0",
        "odc-by",
        "odbl",
        "openrail++",
        "osl-3.0",
        "postgresql",
        "ofl-1.1",
        "ncsa",
        "unlicense",
        "zlib",
        "pddl",
        "lgpl-lr",
        "deepfloyd-if-license",
        "fair-noncommercial-research-license",
        "llama2",
        "llama3",
        "llama3.1",
        "llama3.2",
        "llama3.3",
        "llama4",
        "gemma",
        "unknown",
    ]
)
"""What the hub knows by name; any other is `other` to it, with a name of its own."""


def front_matter(
    report: Report,
    *,
    library: str,
    relation: Literal["adapter", "finetune"],
    tags: Sequence[str],
    metrics: Sequence[Mapping[str, Any]],
) -> str:
    """The first lines of a card.

    The hub refuses a `base_model` that is no hub id, and links what `datasets` names.

    Args:
        report: of the run.
        library: that loads it.
        relation: to the base.
        tags: what it is found by.
        metrics: of its model index, from `measured`.
    """
    base = report.model.base
    front: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation", "tags": [*tags]}
    if is_hub_id(base):
        front = {"base_model": base, "base_model_relation": relation} | front
    front |= _licence(report.model.licence, base if is_hub_id(base) else None)
    if named := _datasets(report):
        front["datasets"] = named
    results = {
        "task": {"type": "text-generation", "name": "Text generation"},
        "dataset": {"type": "held-out", "name": "Held-out examples", "split": "validation"},
        "metrics": [*metrics],
    }
    front["model-index"] = [{"name": _plain(report.run_id), "results": [results]}]
    # ASCII: what it escapes, none obeys.
    return f"---\n{yaml.safe_dump(front, sort_keys=False, width=10_000)}---\n"


def measured(kind: str, name: str, value: float, *, examples: int, **more: float) -> dict[str, Any]:
    """One metric of a model index.

    Args:
        kind: its name to the hub.
        name: as people read it.
        value: of the tuned model.
        examples: that it is over.
        more: what belongs to it.
    """
    said = f"{name} (n = {examples})"
    return {"type": kind, "name": said, "value": round(value, 6), "args": {"examples": examples, **more}}


def _licence(found: str | None, on_hub: str | None) -> dict[str, Any]:
    if found is None:
        return {}
    names = found.split(", ")
    if all(name in _HUB_LICENCES for name in names):
        return {"license": names[0] if len(names) == 1 else names}
    front = {"license": "other"}
    if not found.startswith("see "):  # the name of a file, and none of a licence
        front["license_name"] = re.sub(r"[^a-z0-9.+-]+", "-", found.lower()).strip("-")[:100] or "other"
    return front | ({} if on_hub is None else {"license_link": f"https://huggingface.co/{on_hub}"})


def _datasets(report: Report) -> list[str]:
    """Sources that the recipe calls by a data set's id on the hub; any other name would be somebody else's there."""
    data = report.recipe.get("data")
    sources = data.get("train") if isinstance(data, Mapping) else None
    names = [each.get("name") for each in sources if isinstance(each, Mapping)] if isinstance(sources, list) else []
    return list(dict.fromkeys(name for name in names if isinstance(name, str) and is_hub_id(name)))


def _plain(text: str) -> str:
    return visible(" ".join(text.split()))[:200]
