"""A plan as plain text for a terminal: what is known, what it needs, how long it takes, what to ask for."""

from collections.abc import Sequence
from string import Template

from job.core.data.lengths import Candidate
from job.core.data.report_data import DataReport
from job.core.plan.forecast import Ask, Forecast, Workload, ask_for, trained_tokens
from job.core.plan.memory import GIB
from job.core.plan.scaling import Cluster
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
        *_ask(ask_for(work, forecasts[0].cluster, forecasts[0].placement), templates),
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
    shared_out = ", a part of each layer and two of them whole" if shown.placement == "sharded" else ""
    rows = {
        f"base in 4 bits{shared_out}": parts.weights,
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
    rows[f"activations and logits of {shown.memory.peak_tokens:,} tokens"] = peak - sum(rows.values())
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
    several = forecasts[0].cluster.ranks > 1
    head = "gpu          memory    peak  micro-batch  again  tokens/s"
    head += "     a GPU  times one  placement " if several else ""
    lines = [*_together(forecasts[0].cluster), head + "   start    train" + ("      cost" if usd_per_hour else "")]
    for each in forecasts:
        peak, cut = (each.memory.predicted_peak_bytes or 0) / GIB, each.memory.cut
        line = f"{each.gpu.name:<11} {each.gpu.memory_gib:>7.1f} {peak:>7.1f}  "
        if not each.fits:
            lines.append(line + "one example alone does not fit, by estimate")
            continue
        line += f"{cut.micro_batch_tokens:>11,}  {cut.recomputed_layers:>5}"
        if each.tokens_per_second is not None and each.training_seconds is not None:
            line += f"  {each.tokens_per_second:>8,.0f}{_scaled(each)}"
            line += f"  {_time(each.start_seconds):>6}  {_time(each.training_seconds):>7}"
            line += f"  {each.usd(usd_per_hour):>7.2f} $" if usd_per_hour else ""
        elif several:
            line += f"  {each.placement:>30}"
        lines.append(line)
    return [*lines, *_sources(forecasts), *_exchanged(forecasts)]


def _together(cluster: Cluster) -> list[str]:
    """What the table is of, where it is several GPUs."""
    if cluster.ranks == 1:
        return []
    where = "of one node" if cluster.network is None else f"of each of {cluster.nodes} nodes, {cluster.network.name}"
    return [f"{cluster.gpus} GPU{'s' if cluster.gpus > 1 else ''} {where}; memory is that of each GPU:"]


def _scaled(found: Forecast) -> str:
    """What several GPUs make of it."""
    if found.scaled is None or found.tokens_per_second is None:
        return ""
    a_gpu = found.tokens_per_second / found.cluster.ranks
    return f"  {a_gpu:>8,.0f}  {found.scaled.times_one:>9.2f}  {found.placement:<10}"


def _sources(forecasts: Sequence[Forecast]) -> list[str]:
    """Where speed and time are from."""
    lines = []
    named = {each.gpu.name: each.gpu.speed for each in forecasts if each.gpu.speed is not None}
    measured = [name for name, speed in named.items() if speed.source == "measured"]
    one = " of one GPU" if forecasts[0].cluster.ranks > 1 else ""
    if measured:
        lines.append(f"speed{one} measured with Llama-2-7B: {', '.join(measured)}")
    if len(named) > len(measured):
        lines.append("the others' is derived from peak rate, power and memory bandwidth of their data sheets")
    if named:
        lines.append("start is without the download of the base")
    return lines


def _exchanged(forecasts: Sequence[Forecast]) -> list[str]:
    """What several GPUs lose, those of the first kind."""
    first, lines = forecasts[0], []
    if first.scaled is not None and first.gpu.link is not None:
        link = first.cluster.network or first.gpu.link
        megabytes, milliseconds = first.sent_bytes / 1e6, 1000 * first.scaled.exchange_seconds
        lines += [
            "what several GPUs do together is computed, not measured",
            f"{first.gpu.name}: the one with most of a step has {first.scaled.busiest - 1:.1%} more than an even share",
            f"exchanged a step: {megabytes:,.0f} MB a GPU over {link.name}, {milliseconds:.1f} ms of it not hidden",
        ]
    return lines


def _ask(ask: Ask, templates: Sequence[str]) -> list[str]:
    gpus = "one GPU" if ask.gpus == 1 else f"{ask.gpus} GPUs"
    each = "" if ask.gpus * ask.nodes == 1 else " each"
    nodes = "" if ask.nodes == 1 else f", on each of {ask.nodes} nodes"
    lines = [
        (
            f"ask for: {gpus} (from {ask.gpu_memory_gib} GiB{each}; more is faster), {ask.host_memory_gib} GiB of host "
            f"memory, {ask.disk_gib} GiB of disk (the base and the work folder){nodes}"
        )
    ]
    for template in templates:
        filled = Template(template).substitute(ask.model_dump())
        lines += ["", *(f"  {line}" for line in filled.splitlines())]
    return lines


def _time(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours}:{minutes:02d} h" if hours else f"{max(1, minutes)} min"
