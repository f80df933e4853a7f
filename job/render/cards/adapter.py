"""The adapter's README, of the report alone: what it is, how well it does, how it is served."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from job.core.judging.judged_answers import MetricReport
from job.core.reports.report import EvaluationReport, Report
from job.core.visible import code_span, one_line, visible
from job.render.cards.front_matter import front_matter, measured
from job.render.metric_text import METRIC_WORDS, compared_with, gain_text, loss_text, score_cells
from job.render.serving_text import asked_as, bring_base_line, peft_lines, remarks, vllm_line
from job.render.verdict_text import verdict_text

_MOST_ROWS = 12
"""Evaluations in the table, evenly from the first to the last, besides the chosen one."""
_MOST_OBJECTS = 50
_HUB_METRICS = {"rouge_l": "rouge"}
"""The hub's own names, where it has one for a metric of answers."""
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
    front = front_matter(
        report, library="peft", relation="adapter", tags=("lora", "qlora"), metrics=[*_measured(report)]
    )
    parts = [
        f"# LoRA adapter for {code_span(report.model.base)}",
        verdict_text(report),
        "\n".join(_made_of(report)),
        "\n\n".join(_use(report)),
        "\n".join(["## Evaluation", "", *_evaluation(report)]),
        "\n".join(["## Hyper-parameters", "", *_hyper_parameters(report)]),
        "\n".join(["## Data", "", *_data(report)]),
    ]
    return front + "\n\n".join(part for part in parts if part) + "\n"


def _measured(report: Report) -> Iterator[dict[str, Any]]:
    """The held-out examples at the chosen step, for the model index."""
    chosen, judged = _chosen(report), report.data.validation.used
    for kind, name, value in (
        ("loss", "Validation loss, nats a token", chosen.loss),
        ("perplexity", "Perplexity", chosen.perplexity),
        ("accuracy", "Token accuracy", chosen.token_accuracy),
    ):
        yield measured(kind, name, value, examples=judged, tokens=chosen.tokens)
    match, metric = report.exact_match, report.metric
    if match is not None and not _is_exact_match(metric):
        yield measured("exact_match", "Exact match", match.tuned, examples=match.examples)
    if metric is not None:
        scores, name = metric.scores, METRIC_WORDS[metric.name]
        of_field = "" if metric.field is None else f" of {visible(one_line(metric.field))}"
        ends = {"gain_low": scores.low, "gain_high": scores.high}
        known = {end: value for end, value in ends.items() if value is not None}
        yield measured(
            _HUB_METRICS.get(metric.name, metric.name),
            f"{name[:1].upper()}{name[1:]}{of_field}",
            scores.after,
            examples=scores.examples,
            base=scores.before,
            gain=scores.gain,
            **known,
        )


def _is_exact_match(metric: MetricReport | None) -> bool:
    """Whether the metric is the exact match that each report has, with its interval."""
    return metric is not None and metric.name == "exact_match" and metric.field is None


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
    if (brought := bring_base_line(report)) is not None:
        yield f"The base, to this machine:\n\n```\n{brought}\n```"
    yield f"```python\n{peft_lines(report)}\n```"
    yield from remarks(report)
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
    yield from _answers(report)
    yield from _by_source(judged[0], chosen)
    yield from _by_slice(judged[0], chosen)


def _answers(report: Report) -> Iterator[str]:
    match, metric = report.exact_match, report.metric
    if match is not None and not _is_exact_match(metric):
        yield ""
        yield (
            f"Answers equal to the expected one, of {match.examples:,} held-out questions: {match.base:.1%} (base) → "
            f"{match.tuned:.1%}."
        )
    if metric is not None:
        yield from ("", f"{compared_with(metric, code_span)} {gain_text(metric.scores)}")
        rows = [(f"source {_cell(each.name)}", each.scores) for each in metric.sources]
        rows += [(f"{_cell(each.slice.field)} {_cell(each.slice.words)}", each.scores) for each in metric.slices]
        if rows:
            yield from ("", "| answers | n | base | tuned | gain | 95 % |", "|---|--:|--:|--:|--:|--:|")
        for name, scores in rows:
            yield f"| {name} | {' | '.join(score_cells(scores))} |"


def _by_source(base: EvaluationReport, chosen: EvaluationReport) -> Iterator[str]:
    pairs = [*zip(base.sources, chosen.sources, strict=True)]
    if pairs:
        yield from ("", "| source | held out | loss, base, 95 % | loss, tuned, 95 % |", "|---|--:|--:|--:|")
    for one, other in pairs:
        losses = " | ".join(loss_text(each.loss, each.plus_minus) for each in (one, other))
        yield f"| {_cell(one.name)} | {one.examples:,} | {losses} |"


def _by_slice(base: EvaluationReport, chosen: EvaluationReport) -> Iterator[str]:
    pairs = [*zip(base.slices, chosen.slices, strict=True)]
    if pairs:
        yield from ("", "| slice | held out | loss, base, 95 % | loss, tuned, 95 % |", "|---|--:|--:|--:|")
    for one, other in pairs:
        name = f"{_cell(one.slice.field)} {_cell(one.slice.words)}"
        losses = " | ".join(loss_text(each.loss, each.plus_minus) for each in (one, other))
        yield f"| {name} | {one.examples:,} | {losses} |"


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


def _cell(text: str) -> str:
    """A stranger's text in a table's cell."""
    return code_span(text).replace("|", r"\|")
