"""The adapter's README, of the report alone: what it is, how well it does, how it is served."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from job.core.recipe import is_hub_id
from job.core.report import EvaluationReport, Report
from job.core.visible import code_span, visible
from job.render.serving_text import asked_as, peft_lines, vllm_line
from job.render.verdict_text import verdict_text

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
_MOST_ROWS = 12
"""Evaluations in the table, evenly from the first to the last, besides the chosen one."""
_MOST_OBJECTS = 50
_SETTINGS = {
    "lora": ("r", "alpha", "dropout", "targets"),
    "train": (
        *("steps", "epochs", "batch_size", "learning_rate", "warmup_steps", "schedule", "optimizer"),
        *("weight_decay", "max_grad_norm", "seed"),
    ),
}
"""Keys of the recipe that are hyper-parameters, by section."""


def adapter_card(report: Report) -> str:
    """README.md, in Markdown. What strangers wrote is code in it, whatever it holds."""
    front = yaml.safe_dump(_front_matter(report), sort_keys=False, width=10_000)  # ASCII: what it escapes, none obeys
    parts = [
        f"# LoRA adapter for {code_span(report.model.base)}",
        verdict_text(report),
        "\n".join(_made_of(report)),
        "\n\n".join(_use(report)),
        "\n".join(["## Evaluation", "", *_evaluation(report)]),
        "\n".join(["## Hyper-parameters", "", *_hyper_parameters(report)]),
        "\n".join(["## Data", "", *_data(report)]),
    ]
    return f"---\n{front}---\n" + "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(report: Report) -> dict[str, Any]:
    """Metadata as the hub reads it. It refuses a `base_model` that is no hub id, and links what `datasets` names."""
    base = report.model.base
    front: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "qlora"]}
    if is_hub_id(base):
        front = {"base_model": base, "base_model_relation": "adapter"} | front
    front |= _licence(report.model.licence, base if is_hub_id(base) else None)
    if named := _datasets(report):
        front["datasets"] = named
    return front | {"model-index": [{"name": _plain(report.run_id), "results": [_results(report)]}]}


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


def _results(report: Report) -> dict[str, Any]:
    """One entry of the model index: the held-out examples at the chosen step."""
    chosen = _chosen(report)
    counts = {"examples": report.data.validation.used, "tokens": chosen.tokens}
    measured = [
        ("loss", "Validation loss, nats a token", chosen.loss, counts),
        ("perplexity", "Perplexity", chosen.perplexity, counts),
        ("accuracy", "Token accuracy", chosen.token_accuracy, counts),
    ]
    if report.exact_match is not None:
        count = {"examples": report.exact_match.examples}
        measured.append(("exact_match", "Exact match", report.exact_match.tuned, count))
    return {
        "task": {"type": "text-generation", "name": "Text generation"},
        "dataset": {"type": "held-out", "name": "Held-out examples", "split": "validation"},
        "metrics": [
            {"type": kind, "name": f"{name} (n = {n['examples']})", "value": round(value, 6), "args": n}
            for kind, name, value, n in measured
        ],
    }


def _made_of(report: Report) -> Iterator[str]:
    model = report.model
    licence = code_span(model.licence) if model.licence else "not known; look at the base model"
    yield f"- Base: {code_span(model.base)}, revision {code_span(model.revision)}"
    yield f"- Licence of the base: {licence}. It holds for what is made from the base too."
    yield f"- Base read as {code_span(model.quantisation)}; {model.trainable_parameters:,} parameters trained"
    if model.left_out is not None:
        yield f"- Not adapted: {code_span(model.left_out)}"
    yield f"- Run {code_span(report.run_id)}; all of its figures stand in its `report.json` and `report.html`"


def _use(report: Report) -> Iterator[str]:
    yield "## Use"
    yield f"```python\n{peft_lines(report)}\n```"
    yield (
        "On some CPUs bitsandbytes refuses sizes that it can compute with; there, before anything is asked: "
        "`for module in base.modules(): module.support_avx512bf16_for_cpu = False`."
    )
    if (served := vllm_line(report)) is not None:
        yield f"With vLLM:\n\n```\n{served}\n```"
    yield asked_as(report)
    if beside := [name for name in ("chat_template.jinja", "generation_config.json") if name in report.adapter.files]:
        yield (
            f"{' and '.join(f'`{name}`' for name in beside)} {'differs' if len(beside) == 1 else 'differ'} from the "
            "base's own: without what stands here it is asked, or stopped, otherwise than it was taught."
        )
    for each in report.adapter.refused_by:
        yield f"{each}."


def _evaluation(report: Report) -> Iterator[str]:
    judged, chosen = report.evaluations, _chosen(report)
    found = report.held_out
    around = dict(zip((e.step for e in judged), found.plus_minus if found is not None else (), strict=False))
    yield f"On {report.data.validation.used:,} held-out examples, {chosen.tokens:,} target tokens:"
    yield ""
    yield "| step | loss, nats a token | 95 % | perplexity | token accuracy |"
    yield "|--:|--:|--:|--:|--:|"
    places = {i * (len(judged) - 1) // (_MOST_ROWS - 1) for i in range(_MOST_ROWS)}
    for i, each in enumerate(judged):
        if i in places or each is chosen:
            interval = around.get(each.step)
            yield (
                f"| {each.step:,}{' (this adapter)' if each is chosen else ''} | {each.loss:.4f} | "
                f"{'-' if interval is None else f'± {interval:.2g}'} | {each.perplexity:.4g} | "
                f"{each.token_accuracy:.1%} |"
            )
    if report.exact_match is not None:
        match = report.exact_match
        yield ""
        yield (
            f"Answers equal to the expected one, of {match.examples:,} held-out questions: {match.base:.1%} (base) -> "
            f"{match.tuned:.1%}."
        )
    yield from _by_source(judged[0], chosen)


def _by_source(base: EvaluationReport, chosen: EvaluationReport) -> Iterator[str]:
    pairs = [*zip(base.sources, chosen.sources, strict=True)]
    if pairs:
        yield from ("", "| source | held out | loss, base | loss, tuned |", "|---|--:|--:|--:|")
    for one, other in pairs:
        yield f"| {_cell(one.name)} | {one.examples:,} | {_loss(one.loss)} | {_loss(other.loss)} |"


def _hyper_parameters(report: Report) -> Iterator[str]:
    yield from ("| | |", "|---|---|")
    for section, keys in _SETTINGS.items():
        values = report.recipe.get(section)
        for key in keys:
            if isinstance(values, Mapping) and values.get(key) is not None:
                yield f"| {section}.{key} | {_cell(_words(values[key]))} |"
    yield f"| longest example | {report.data.max_length:,} tokens |"
    yield f"| examples drawn | {report.plan.epochs:.3g} epochs of {report.data.train.used:,} |"


def _data(report: Report) -> Iterator[str]:
    data = report.data
    yield f"Trained on {data.train.used:,} examples, judged on {data.validation.used:,}:"
    yield ""
    objects = (*data.train.objects, *data.validation.objects)
    for each in objects[:_MOST_OBJECTS]:
        yield f"- {code_span(each.uri)} sha256 {code_span(each.sha256)}"
    if len(objects) > _MOST_OBJECTS:
        yield f"- and {len(objects) - _MOST_OBJECTS:,} more, which `report.json` names"
    shares = [*zip(data.train.sources, report.plan.sources, strict=True)]
    if shares:
        yield from ("", "What was drawn of each source:", "")
    for source, share in shares:
        yield f"- {code_span(source.name)}: {source.used:,} examples, {share.share:.1%} of what was drawn"


def _chosen(report: Report) -> EvaluationReport:
    return next(each for each in report.evaluations if each.step == report.sweet_spot.step)


def _words(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return str(value)


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def _cell(text: str) -> str:
    """A stranger's text in a table's cell."""
    return code_span(text).replace("|", r"\|")


def _plain(text: str) -> str:
    return visible(" ".join(text.split()))[:200]
