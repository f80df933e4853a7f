"""What the device sustains: one large bf16 product after another, and a copy. Shares in the results are of these.

    python -m bench.ceiling

Prints one JSON line. The product is that of Llama-2-7B's MLP with 16,384 tokens, long enough that the clock has come
down to what the power limit allows. On the CPU both are small, so that the commands can be tried.
"""

import itertools
import json
import statistics
import time

import torch

from bench.results import device_and_versions

_GPU_PRODUCT, _CPU_PRODUCT = (16384, 4096, 11008), (256, 512, 512)
_GPU_COPY, _CPU_COPY = 2**32, 2**24
"""Bytes."""
_GPU_SECONDS, _CPU_SECONDS = 3.0, 0.05


def measure():
    """gemm_flops: operations a second; copy_bytes: bytes read and written a second; product: the sides of one."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    rows, inner, columns = _GPU_PRODUCT if on_gpu else _CPU_PRODUCT
    left = torch.randn(rows, inner, dtype=torch.bfloat16, device=device)
    right = torch.randn(columns, inner, dtype=torch.bfloat16, device=device)
    result = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
    product = _median_seconds(lambda: torch.mm(left, right.t(), out=result))
    source = torch.ones(_GPU_COPY if on_gpu else _CPU_COPY, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _median_seconds(lambda: target.copy_(source))
    return {
        "gemm_flops": 2 * rows * inner * columns / product,
        "copy_bytes": 2 * source.nbytes / copy,
        "product": f"{rows} x {inner} x {columns}",
    }


def _median_seconds(act):
    """Median seconds of one call, while it is called without a pause."""
    on_gpu = torch.cuda.is_available()
    act()
    began, times = time.perf_counter(), []
    while time.perf_counter() - began < (_GPU_SECONDS if on_gpu else _CPU_SECONDS):
        times += _group_seconds(act) if on_gpu else [_host_seconds(act)]
    return statistics.median(times)


def _group_seconds(act, size=20):
    """Seconds of each of `size` calls, by the GPU's own clock."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(size + 1)]
    marks[0].record()
    for mark in marks[1:]:
        act()
        mark.record()
    marks[-1].synchronize()
    return [one.elapsed_time(other) / 1000 for one, other in itertools.pairwise(marks)]


def _host_seconds(act):
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


if __name__ == "__main__":
    print(json.dumps({"about": device_and_versions()} | measure()))
