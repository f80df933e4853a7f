"""What accelerate's FSDP2 makes of a base in 4 bits, by hash: the tutorial's way to spread one over several GPUs.

    python -m bench.fsdp_bytes --base BASE [--processes 2] [--device cuda] [--results bench/RESULTS.md]

Each process quantises BASE (a folder in bf16) by bitsandbytes, stores packed weights as uint8 or as bf16, and hands
the model to accelerate's own `fsdp2_prepare_model`. Then each layer is gathered, once as FSDP2 does for a forward and
once after one, and the bytes of each weight are compared with those before.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from bench.processes import NoResultError, run
from bench.results import RESULTS, device_and_versions, table, write_section

STORAGES = ("uint8", "bfloat16")
_HEADER = ("packed weights are stored as", "sharded", "of weights", "bytes of a rank / of the whole")
_HEADER += ("weights that differ when gathered", "after a forward", "of their bytes", "the same logits")
_LIMIT_SECONDS = 300


def prepared(base, storage, device):
    """Before: bytes of each packed weight, and logits; and the model that FSDP2 has."""
    import torch
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=getattr(torch, storage),
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantised, dtype=torch.bfloat16, device_map={"": device}
    )
    model.requires_grad_(requires_grad=False)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False  # else its first forward on such a CPU packs it another way
    before = {name: bytes_of(weight) for name, weight in packed(model)}
    logits = logits_of(model, device)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    like_accelerate = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="bf16",
        is_main_process=False,
        device=torch.device(device),
    )
    return before, logits, fsdp2_prepare_model(like_accelerate, model)


def logits_of(model, device):
    """Of 32 tokens."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.arange(1, 33, device=device)[None]).logits


def packed(model):
    """The packed weights of a model, by the names that they have before it is wrapped."""
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            yield name, module.weight


def bytes_of(weight):
    """Its bytes, flat, on the host."""
    import torch

    return weight.detach().contiguous().view(torch.uint8).reshape(-1).cpu().clone()


def look(model, before):
    """Of the gathered weights, names and bytes that differ from those before."""
    wrapped = [module for module in model.modules() if hasattr(module, "unshard")]
    for module in wrapped:
        module.unshard()
    differ = {}
    for name, weight in packed(model):
        now = bytes_of(weight)
        wrong = int((now != before[name]).sum()) if len(now) == len(before[name]) else len(before[name])
        if wrong:
            differ[name] = wrong
    for module in wrapped:
        module.reshard()
    return differ


def work(base, storage, device, rank, size, meet):
    """One process: prints what it found, as JSON."""
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    if device == "cuda":
        device = f"cuda:{rank}"
        torch.cuda.set_device(rank)
    backend = "nccl" if device != "cpu" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{meet}", rank=rank, world_size=size)
    before, logits, model = prepared(base, storage, device)
    weights = dict(packed(model))
    sharded = [name for name, weight in weights.items() if isinstance(weight, DTensor)]
    here = sum((w.to_local() if isinstance(w, DTensor) else w).nbytes for w in weights.values())
    found = {"weights": len(weights), "sharded": len(sharded), "here": here}
    found |= {"bytes": sum(map(len, before.values())), "gathered": look(model, before)}
    try:
        found["same_logits"] = torch.equal(logits, logits_of(model, device))
        found["after"] = look(model, before)
    except Exception as error:  # noqa: BLE001 - what it does is what is asked
        found["failed"] = f"{type(error).__name__}: {error}"[:300]
    print(json.dumps(found), flush=True)
    os._exit(0)


def measure(base, storage, device, processes):
    """What rank 0 has found.

    Raises:
        NoResultError: they failed.
    """
    with tempfile.TemporaryDirectory(prefix="fsdp-bytes-") as scratch:
        arguments = [storage, device, str(processes), str(Path(scratch, "meet"))]
        command = [sys.executable, "-c", _SPAWN, str(base), *arguments]
        output = run(command, limit_seconds=_LIMIT_SECONDS, log=Path(scratch, "log"))
    return json.loads(output.splitlines()[-1])


_SPAWN = """
import subprocess, sys
base, storage, device, processes, meet = sys.argv[1:]
one = "import sys; from bench.fsdp_bytes import work; b, s, d, r, n, m = sys.argv[1:]; work(b, s, d, int(r), int(n), m)"
ranks = [
    subprocess.Popen(
        [sys.executable, "-c", one, base, storage, device, str(rank), processes, meet],
        stdout=None if rank == 0 else subprocess.DEVNULL,
    )
    for rank in range(int(processes))
]
sys.exit(max(rank.wait() for rank in ranks))
"""


def row_of(storage, found):
    """A row of the table."""
    if isinstance(found, str):
        return (storage, f"no result: {found}", *[""] * (len(_HEADER) - 2))
    after = found.get("after")
    changed = sum((after or found["gathered"]).values())
    return (
        storage,
        found["sharded"],
        found["weights"],
        f"{found['here'] / found['bytes']:.2f}",
        len(found["gathered"]),
        found["failed"] if after is None else len(after),
        f"{changed / found['bytes']:.3%}",
        "yes" if found.get("same_logits") else "no",
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    rows = []
    for storage in STORAGES:
        try:
            found = measure(options.base.resolve(), storage, options.device, options.processes)
        except NoResultError as error:
            found = str(error)
        rows.append(row_of(storage, found))
    command = f"    python -m bench.fsdp_bytes --base FOLDER --processes {options.processes} --device {options.device}"
    title = f"## FSDP2 and a base in 4 bits: {options.base.name}, {options.processes} processes"
    text = f"{title}\n\n{command}\n\n{device_and_versions()}\n\n{table(_HEADER, rows)}"
    write_section(options.results, f"fsdp-bytes-{options.device}", text)
    print(text)


if __name__ == "__main__":
    main()
