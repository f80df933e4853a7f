"""What the plan's formula says of 4, 8 and 64 GPUs, over NVLink and over 100 Gb Ethernet: computed, nothing measured.

    python -m bench.scaling_on_paper --base BASE --train GSM8K.jsonl [--gpu h100] [--results bench/RESULTS.md]

BASE needs its config and its tokenizer, no weights, and no GPU is needed.
"""

import tempfile
from pathlib import Path

from bench.options import parser_of
from bench.results import table, write_section
from bench.workload import workload_of
from job.core.plan.forecast import forecast
from job.core.plan.gpus import gpu_named
from job.core.plan.links import network
from job.core.plan.scaling import Cluster

BATCHES = (256, 16)
_EXAMPLES = 16_384
"""Of all steps that are dealt: 64 steps of 256."""
ETHERNET = network(100)
CLUSTERS = (
    *(Cluster(gpus=gpus) for gpus in (4, 8, 64)),
    *(Cluster(gpus=1, nodes=nodes, network=ETHERNET) for nodes in (4, 8, 64)),
    Cluster(gpus=8, nodes=8, network=ETHERNET),
)
_HEADER = ("GPUs", "joined by", "tokens/s", "of each", "times one", "of ideal")
_HEADER += ("busiest above an even share", "ms exchanged", "ms a step")


def rows_of(work, gpu):
    """One GPU, and each cluster."""
    alone = forecast(work, gpu)
    step_tokens = work.course.mean_length(work.lengths) * work.course.batch_size
    yield (1, "", f"{alone.tokens_per_second:,.0f}", *[""] * 5, f"{1000 * step_tokens / alone.tokens_per_second:,.1f}")
    for cluster in CLUSTERS:
        found = forecast(work, gpu, cluster)
        scaled, speed = found.scaled, found.tokens_per_second
        yield (
            cluster.ranks,
            _joined(cluster, gpu),
            f"{speed:,.0f}",
            f"{speed / cluster.ranks:,.0f}",
            f"{scaled.times_one:.2f}",
            f"{scaled.times_one / cluster.ranks:.0%}",
            f"{scaled.busiest - 1:.1%}",
            f"{1000 * scaled.exchange_seconds:.1f}",
            f"{1000 * step_tokens / speed:,.1f}",
        )


def _joined(cluster, gpu):
    if cluster.network is None:
        return f"{gpu.link.name}, all with all"
    return f"100 Gb Ethernet, {cluster.gpus} a host" + (f", {gpu.link.name} within" if cluster.gpus > 1 else "")


_ABOUT = """\
**Computed, not measured**: what `plan --gpu {gpu} --gpus N --nodes M` says of {base}, GSM8K ({mean:.0f} tokens an
example on average) and an adapter of {parameters:,} parameters. One GPU's speed is {source}.

A step takes as long as the rank with most of it computes, and then as long as what is left of the sum of the gradients:
its last piece, or what the backward of the last micro-batch did not hide. Shares are dealt as the job deals them,
document by document. The sum of P parameters in fp32 over h hosts of g GPUs: each GPU sends 2 x 4P (g - 1) / g bytes
within its host, then each host 2 x 4P (h - 1) / h to others; 6 times 4P bytes pass the GPU's memory within, and 6
times 4P / g between; each of 2 (P / 2^23 + 1) exchanges, within and between, begins with 40 microseconds, of which two
ranks need half (`job/core/plan/scaling.py`). What each GPU does by itself, whatever
its share, is counted too: 145 tokens' time a micro-batch, and 40 times 4P bytes for the update (`job/core/plan/cut.py`,
`forecast.py`).

Each way, and what is counted with: {link} {rate:.0f} GB/s a GPU, {share:.0%} of it; Ethernet {ethernet:.1f} GB/s a
host, {ethernet_share:.0%} of it, its cards reading the GPUs' memory; memory {memory:.2f} TB/s. Where they are from:
`job/core/plan/links.py`. 64 GPUs on one NVLink are a rack; usual hosts have 8.
"""
_END = """\
With fewer examples than GPUs the others have no work.
"""


def section(base, work_of, gpu):
    """All tables, with the formula and the speeds that they are made with."""
    works = {batch: work_of(batch) for batch in BATCHES}
    one = works[BATCHES[0]]
    about = _ABOUT.format(
        gpu=gpu.name,
        base=base,
        mean=one.lengths.mean(),
        parameters=one.adapter.parameters,
        source=gpu.speed.source,
        link=gpu.link.name,
        rate=gpu.link.rate / 1e9,
        share=gpu.link.share,
        ethernet=ETHERNET.rate / 1e9,
        ethernet_share=ETHERNET.share,
        memory=gpu.speed.bytes_per_second / 1e12,
    )
    tables = [f"{batch} examples a step:\n\n{table(_HEADER, rows_of(work, gpu))}" for batch, work in works.items()]
    return "\n\n".join([about.strip(), *tables, _END.strip()])


def main(arguments=None):
    parser = parser_of(__doc__)
    parser.add_argument("--gpu", default="h100", help="as `plan --gpu` takes it")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="on-paper-") as scratch:

        def work_of(batch):
            return workload_of(
                options.base,
                options.train,
                Path(scratch, str(batch)),
                text=options.text,
                batch=batch,
                steps=_EXAMPLES // batch,
                max_length=512,
            )

        text = section(options.base.name, work_of, gpu_named(options.gpu))
    command = f"    python -m bench.scaling_on_paper --base FOLDER --train TRAIN.jsonl --gpu {options.gpu}"
    write_section(options.results, "scaling-on-paper", f"## Many GPUs, on paper\n\n{command}\n\n{text}")
    print(text)


if __name__ == "__main__":
    main()
