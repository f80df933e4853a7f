"""What is looked up later: how the adapter is used, what it was made of, the recipe as it was run."""

import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from job.core.reports.report import Report
from job.render.page.blocks import Block, Chapter, Code, Facts, Fold, Listing, Room, Table, Words, cut
from job.render.serving_text import asked_as, bring_base_line, bring_line, peft_lines, remarks, vllm_line

_FILE = "file://"


def facts_chapters(report: Report, room: Room) -> list[Chapter]:
    """The last chapters."""
    return [
        Chapter(anchor="use", name="How to use it", blocks=_use(report, room)),
        Chapter(anchor="made-of", name="What it was made of", blocks=_made_of(report, room)),
        Chapter(anchor="recipe", name="Recipe", blocks=recipe_blocks(report.recipe, room)),
    ]


def _use(report: Report, room: Room) -> list[Block]:
    run, uri = shlex.quote(report.run_uri), report.adapter.uri
    folder = uri.removeprefix(_FILE) if uri.startswith(_FILE) else "adapter"
    served = vllm_line(report, folder)
    commands = {"Ask it and its base, side by side:": f"python entrypoint.py try {run} --prompt '...'"}
    if (brought := bring_line(uri, folder)) is not None:
        commands["Bring it to this machine:"] = brought
    if (brought := bring_base_line(report)) is not None:
        commands["And its base:"] = brought
    commands["Load it in Python:"] = peft_lines(report, folder)
    words = [room.cut(each) for each in report.adapter.refused_by[: room.rows]]
    blocks: list[Block] = [
        Facts(facts={"adapter": room.cut(report.adapter.uri), "proven": _proven(report)}),
    ]
    if served is not None:
        commands["Serve it with vLLM:"] = served
    commands["Make a model of its own of it, for any other server:"] = f"python entrypoint.py export {run} --to merged"
    blocks += [Code(name=name, text=cut(command, room.recipe)) for name, command in commands.items()]
    said = [each.replace("`", "") for each in (" ".join(remarks(report)), asked_as(report))]  # which are Markdown's
    return [*blocks, *[Words(text=room.cut(each)) for each in (*said, *(f"{each}." for each in words)) if each]]


def _proven(report: Report) -> str:
    adapter = report.adapter
    return (
        f"downloaded again and loaded by PEFT on a fresh 4-bit base it has validation loss {adapter.proven_loss:.4f}; "
        f"training measured {adapter.reported_loss:.4f}"
    )


def _made_of(report: Report, room: Room) -> list[Block]:
    model = report.model
    facts = {
        "base": model.base,
        "revision": model.revision,
        "licence": model.licence or "not known; look at the base model",
        "architecture": model.architecture,
        "read as": model.quantisation,
        "trained": f"{model.trainable_parameters:,} of {model.total_parameters:,} parameters",
        "run": report.run_uri,
    }
    if len(report.attempts) > 1:
        exact = "to the bit as without an interruption"
        facts["resumed"] = exact if report.resume_exact else "not to the bit: see the notes"
    if model.left_out is not None:
        facts["left out"] = model.left_out
    blocks: list[Block] = [Facts(facts={name: room.cut(fact) for name, fact in facts.items()})]
    if report.notes:
        notes = [room.cut(note) for note in report.notes[: room.rows]]
        blocks += [Words(text="Notes:"), Listing(items=notes, left_out=len(report.notes) - len(notes))]
    hashes = [
        (each.uri, each.size, each.sha256) for each in (*report.data.train.objects, *report.data.validation.objects)
    ]
    hashes += [(f"adapter/{name}", file.size, file.sha256) for name, file in report.adapter.files.items()]
    rows = [(room.cut(uri), f"{size:,}", room.cut(sha256)) for uri, size, sha256 in hashes[: room.rows]]
    head = ("object", "bytes", "sha256")
    table = Table(caption="Data and adapter", head=head, rows=rows, words=(0, 2), left_out=len(hashes) - len(rows))
    versions = [*report.versions.items()][: room.rows]
    shown = Facts(facts={room.cut(name): room.cut(fact) for name, fact in (*versions, *_machine(report).items())})
    return [*blocks, Fold(name="Hashes", blocks=[table]), Fold(name="Versions and machine", blocks=[shown])]


def _machine(report: Report) -> dict[str, str]:
    """Of the attempt that finished the run; an earlier version of the job knew the device alone."""
    found = report.machine
    if found is None:
        return {"device": report.device}
    known = {"system": found.system, "processor": found.processor, "driver": found.driver}
    return {"device": report.device} | {name: fact for name, fact in known.items() if fact is not None}


def recipe_blocks(recipe: Mapping[str, Any], room: Room) -> list[Block]:
    """The recipe as it was run, folded."""
    text = yaml.safe_dump(dict(recipe), allow_unicode=True, sort_keys=False, width=100)
    return [Fold(name="The recipe as it was run", blocks=[Code(name="YAML", text=cut(text, room.recipe))])]
