"""Runs the product as a user runs it, and reads its log and its report."""

import json
import sys
from pathlib import Path

from bench.measured import Measured
from bench.memory_hog import only_free
from bench.processes import NoResultError, run
from bench.training import recipe_of

ENTRY_POINT = Path(__file__).parent.parent / "entrypoint.py"
_NEVER = 1_000_000
"""Steps."""


def measure(contestant, *, data, device, limit_seconds, folder):
    """One run of the entry point in a process of its own.

    Raises:
        NoResultError: it failed, or took too long.
    """
    folder.mkdir()
    recipe = folder / "recipe.yaml"
    content = recipe_content(
        contestant, base=data.base, train=data.train, text=data.text, max_length=data.max_length, folder=folder
    )
    recipe.write_text(json.dumps(content))  # JSON is YAML
    command = command_of(contestant, recipe, device, folder)
    with only_free(contestant.free_gib):
        output = run(command, limit_seconds=limit_seconds, log=folder / "process")
    events = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    report = json.loads((folder / "store/runs" / contestant.name / "report.json").read_text())
    return _read(contestant, [event for event in events if event.get("event") == "step"], report)


def recipe_content(contestant, *, base, train, text, max_length, folder):
    """The recipe of its run, with an evaluation before the first step and at the end, on a few examples."""
    training = {"steps": contestant.steps, "batch_size": contestant.batch} | contestant.training
    data = {"text": text, "max_length": max_length}
    content = recipe_of(base, train, **data, dropout=contestant.dropout, head=contestant.head, **training).model_dump(
        mode="json"
    )
    if contestant.targets is not None:
        content["lora"]["targets"] = contestant.targets
    content["checkpoint"]["every_steps"] = content["evaluate"]["every_steps"] = _NEVER
    content["evaluate"]["max_examples"] = 16
    return content | {"output": (folder / "store").resolve().as_uri()}


def command_of(contestant, recipe, device, folder):
    """The command line of its run."""
    command = [sys.executable, str(ENTRY_POINT), "--log-format", "json", "run", str(recipe)]
    command += ["--engine", contestant.engine, "--device", device]
    return [*command, "--run-id", contestant.name, "--workdir", str(folder / "work")]


def _read(contestant, steps, report):
    rates = [step["tokens_per_second"] for step in steps[contestant.warm_up :]]
    if not rates:
        raise NoResultError(f"{len(steps)} steps in its log, {contestant.warm_up} of them to warm up")
    plan, losses = report["plan"], report["curve"]["loss"]
    about = (
        f"{plan['engine']} engine, {plan['micro_batch_tokens']:,} tokens a micro-batch, {plan['recomputed_layers']} "
        f"layers recomputed, {plan['kept_layers']} with dequantised weights kept"
    )
    if plan["out_of_memory"]:
        about += f", {plan['out_of_memory']} times out of memory"
    return Measured(
        rates=tuple(rates),
        steps=len(rates),
        tokens_per_step=report["throughput"]["tokens"] / len(losses),
        real_share=1.0,  # packed to the token
        losses=(losses[0], losses[-1]),
        peak_bytes=report["throughput"]["peak_memory_bytes"],
        adapter_parameters=report["model"]["trainable_parameters"],
        plan=plan,
        about=about,
        versions=report["versions"],
    )
