"""A plan as plain text for a terminal: what is known, what it needs, how long it takes, what to ask for."""

from collections.abc import Sequence
from string import Template

from job.core.forecast import Ask, Candidate, Forecast, Workload, ask_for, trained_tokens
from job.core.memory import GIB
from job.core.report import DataReport
from job.render.report_text import histogram_lines
from job.render.sources_text import source_rows


def plan_lines(
    data: DataReport,
    candidates: Sequence[Candidate],
    work: Workload,
    forecasts: Sequence[Forecast],
    *,
    words: Sequence[str],
    templates: Sequence[str],
    usd_per_hour: float | None,
) -> list[str]:
    """Everything, the details for the first GPU.

    Args:
        data: the dataset as it would be used.
        candidates: what each max_length would cut.
        work: what is to be done.
        forecasts: of each GPU.
        words: on how the base trains.
        templates: what to ask for in the words of each scheduler, with the fields of `Ask` to be filled in.
        usd_per_hour: what the GPU costs; None: no cost is shown.

    Raises:
        KeyError: a template names a field that `Ask` has not.
    """
    return [
        *_lengths(data, candidates),
        "",
        *_work(work),
        *(f"source {row}" for row in source_rows(data, work.course)),
        *words,
        "",
        *_memory(work, forecasts[0]),
        "",
        *_table(forecasts, usd_per_hour),
        "",
        *_ask(ask_for(work), templates),
    ]


def _lengths(data: DataReport, candidates: Sequence[Candidate]) -> list[str]:
    histogram = data.train.histogram
    return [
        f"max_length {data.max_length}: {data.max_length_reason}",
        "tokens of a training example:",
        *histogram_lines(histogram.edges, histogram.counts, mark=data.max_length),
        "",
        "max_length  examples longer  tokens cut",
        *(
            f"{each.tokens:>10}  {each.examples_over:>15}  {each.share_cut:>10.2%}"
            + ("  <- chosen" if each.tokens == data.max_length else "")
            for each in candidates
        ),
    ]


def _work(work: Workload) -> list[str]:
    course, engine = work.course, f"{work.engine} engine"
    if work.engine == "generic":
        engine += ", layers compiled" if work.compiled else ", layers not compiled"
    if work.rows != "packed":
        engine += f", document rows {work.rows}"
    return [
        (
            f"{course.steps} steps ({course.epochs:.3g} epochs) of {course.batch_size} examples, "
            f"{trained_tokens(work):,} real tokens; {work.evaluations} evaluations of {work.validation_tokens:,}"
        ),
        (
            f"{work.shape.parameters:,} parameters in the base, {work.adapter.parameters:,} trained "
            f"(r {work.adapter.rank}, {work.adapter.optimizer}); {engine}"
        ),
    ]


def _memory(work: Workload, shown: Forecast) -> list[str]:
    parts, cut = shown.parts, shown.memory.cut
    layers = work.shape.layers
    rows = {
        "base in 4 bits": parts.weights,
        "embedding, head and what else is not in 4 bits": parts.embeddings,
        "adapter, fp32": parts.adapter,
        "its gradients": parts.gradients,
        "optimizer": parts.optimizer,
        "copy until an update is known to be finite": parts.update,
        "workspace": parts.workspace - (parts.spared_workspace if cut.kept_layers == layers else 0),
    }
    if cut.kept_layers:
        rows[f"dequantised weights of {cut.kept_layers} of {layers} layers"] = cut.kept_layers * parts.dequantised_layer
    peak = shown.memory.predicted_peak_bytes or 0
    rows[f"activations and logits of {cut.micro_batch_tokens:,} tokens"] = peak - sum(rows.values())
    recomputed = (
        "no activations recomputed"
        if not cut.recomputed_layers
        else f"activations of {cut.recomputed_layers} of {layers} layers recomputed"
    )
    return [
        f"memory on {shown.gpu.name}, micro-batches of at most {cut.micro_batch_tokens:,} tokens, {recomputed}:",
        *(f"  {size / GIB:>7.2f} GiB  {name}" for name, size in rows.items()),
        f"  {peak / GIB:>7.2f} GiB  at the peak of a step, of {shown.gpu.memory_gib:.1f}",
    ]


def _table(forecasts: Sequence[Forecast], usd_per_hour: float | None) -> list[str]:
    head = "gpu          memory    peak  micro-batch  again  tokens/s   start    train"
    lines = [head + ("      cost" if usd_per_hour else "")]
    for each in forecasts:
        peak, cut = (each.memory.predicted_peak_bytes or 0) / GIB, each.memory.cut
        line = f"{each.gpu.name:<11} {each.gpu.memory_gib:>7.1f} {peak:>7.1f}  "
        if not each.fits:
            lines.append(line + "one example alone does not fit, by estimate")
            continue
        line += f"{cut.micro_batch_tokens:>11,}  {cut.recomputed_layers:>5}"
        if each.tokens_per_second is not None and each.training_seconds is not None:
            line += (
                f"  {each.tokens_per_second:>8,.0f}  {_time(each.start_seconds):>6}  {_time(each.training_seconds):>7}"
            )
            line += f"  {each.usd(usd_per_hour):>7.2f} $" if usd_per_hour else ""
        lines.append(line)
    named = {each.gpu.name: each.gpu.speed for each in forecasts if each.gpu.speed is not None}
    measured = [name for name, speed in named.items() if speed.source == "measured"]
    if measured:
        lines.append(f"speed measured with Llama-2-7B: {', '.join(measured)}")
    if len(named) > len(measured):
        lines.append("the others' is derived from peak rate, power and memory bandwidth of their data sheets")
    if named:
        lines.append("start is without the download of the base")
    return lines


def _ask(ask: Ask, templates: Sequence[str]) -> list[str]:
    lines = [
        (
            f"ask for: one GPU (from {ask.gpu_memory_gib} GiB; more is faster), {ask.host_memory_gib} GiB of host "
            f"memory, {ask.disk_gib} GiB of disk (the base and the work folder)"
        )
    ]
    for template in templates:
        filled = Template(template).substitute(ask.model_dump())
        lines += ["", *(f"  {line}" for line in filled.splitlines())]
    return lines


def _time(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours}:{minutes:02d} h" if hours else f"{max(1, minutes)} min"
