"""Prompts the adapter of a finished run and its base, side by side."""

import json
import select
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from job.commands.report import open_run, recipe_of
from job.core.data.asking import asked_fields, asked_sources, fields_given, prompt_of, required_fields
from job.core.data.chats import Chat, as_read, prompt_chat
from job.core.data.fields import Unusable, fields_of
from job.core.data.records import Part, chat_in
from job.core.errors import DataError, UsageError
from job.core.recipe.data_section import DataSection
from job.core.recipe.schema import Recipe
from job.core.reports.report import Report
from job.edge.base.fetching import BaseModelIdentity
from job.edge.host.logs import quiet_libraries
from job.edge.host.planted import refuse_planted
from job.edge.relative_paths import located
from job.edge.run.artifacts import Artifacts
from job.edge.store.folder import FileEntry
from job.edge.store.objects import StoreSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is to be answered."""

    prompts: Iterable[str]
    """Taken as they are, one by one, so that a person can type them."""
    fields: Sequence[str]
    """Of one record, `name=value`: the run's template makes its prompt."""
    record_file: Path | None
    """Records as JSON lines, or one JSON object: a prompt each."""


def try_out(
    run_uri: str,
    asked: Asked,
    *,
    workdir: Path,
    device: str,
    max_new_tokens: int | None,
    should_stop: Callable[[], bool],
    on_answer: Callable[[str, str, str], None],
) -> None:
    """Answer each prompt with both.

    Args:
        run_uri: of a finished run.
        asked: the prompts.
        workdir: where the base model is kept.
        device: `auto`, `cuda` or `cpu`.
        max_new_tokens: longest answer; None: as in the run's recipe.
        should_stop: polled at each token.
        on_answer: called with prompt, base's answer and tuned answer.
    """
    from job.tune.data.chats.chat import ChatTemplates, asked_rules, chat_rules
    from job.tune.data.frame import token_rules
    from job.tune.loop.evaluate import (
        Question,
        answer,
        question_of_chat,
        question_of_parts,
        questions_of_prompts,
    )
    from job.tune.model.config import load_tokenizer

    quiet_libraries()
    refuse_planted(workdir)
    artifacts, report = open_run(run_uri)
    recipe = recipe_of(report)
    made = [*_made_prompts(asked, recipe.data)]  # before a base is loaded for a wrong one
    folder, model = _load(artifacts, report, recipe, workdir=workdir, device=device, should_stop=should_stop)
    tokenizer = load_tokenizer(folder)
    rules = token_rules(tokenizer, recipe.data)

    def reply(question: Question) -> str:
        longest = max_new_tokens or recipe.evaluate.max_new_tokens
        seed = recipe.train.seed
        return answer(model, [question], tokenizer, max_new_tokens=longest, seed=seed, should_stop=should_stop)[0]

    chat = asked_rules(tokenizer, recipe.data)
    with ChatTemplates(should_stop=should_stop) as chats:

        def question_of(prompt: str | _Made) -> Question:
            if isinstance(prompt, str):
                return questions_of_prompts([prompt], rules, None if chat is None else chats.of(chat))[0]
            if isinstance(prompt.content, Chat):
                template = chats.of(chat_rules(tokenizer, prompt.data))
                return question_of_chat(template.question(prompt.content), as_read(prompt.content), rules, template)
            return question_of_parts(prompt.content, rules)

        for question in map(question_of, chain[str | _Made](asked.prompts, made)):
            with model.model.disable_adapter():
                untuned = reply(question)
            on_answer(question.prompt, untuned, reply(question))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """A prompt that is made of a record."""

    content: Chat | tuple[Part, ...]
    data: DataSection
    """How the record was read."""


def _made_prompts(asked: Asked, data: DataSection) -> Iterator[_Made]:
    """By the run's template; of several sources by that of the first one whose fields are there."""
    sources = asked_sources(data)
    with_fields = [each for each in sources if each.chat is None]
    if asked.fields:
        if not with_fields:
            raise UsageError("--field: this run was trained on chats, which have no fields; use --prompt or --record")
        names = {word.partition("=")[0].strip() for word in asked.fields}
        chosen = next((each for each in with_fields if {*asked_fields(each)} == names), with_fields[0])
        yield _Made(content=prompt_of(fields_given(asked.fields, chosen), chosen), data=chosen)
    if asked.record_file is not None:
        for where, raw in _record_lines(asked.record_file):
            read = [_read(raw, each, where) for each in sources]
            found = next((each for each in read if isinstance(each, _Made)), read[0])
            if isinstance(found, str):
                raise DataError(f"{where}: {found}")
            yield found


def _read(raw: bytes, data: DataSection, where: str) -> _Made | str:
    """What a record asks, or the reason why it asks nothing by these templates."""
    if data.chat is not None:
        chat = chat_in(raw, data, where=where, asked=True)
        return chat if isinstance(chat, str) else _Made(content=prompt_chat(chat), data=data)
    fields = fields_of(raw, asked_fields(data), required=required_fields(data), strict_types=data.strict_types)
    return fields.reason if isinstance(fields, Unusable) else _Made(content=prompt_of(fields, data), data=data)


def _record_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Where each record stands, and its bytes."""
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UsageError(f"--record {located(path)}: cannot be read ({error.strerror}); correct the path") from error
    if _is_json(content):
        yield str(path), content
        return
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def _load(
    artifacts: Artifacts,
    report: Report,
    recipe: Recipe,
    *,
    workdir: Path,
    device: str,
    should_stop: Callable[[], bool],
) -> tuple[Path, Any]:
    """The base's folder, and the base with the run's adapter on it."""
    from job.stages.base.base_source import BaseSource, refuse_changed_base
    from job.tune.device.compute_dtype import compute_dtype
    from job.tune.device.device import choose_device
    from job.tune.engines.packed_model import PackedModel
    from job.tune.loop.checkpoint import ADAPTER_FILES, load_adapter
    from job.tune.model.adapter import attach_lora
    from job.tune.model.base import load_base
    from job.tune.model.config import read_wrapper

    settings = StoreSettings(sse_kms_key=recipe.store.sse_kms_key, checksums=recipe.store.checksums)
    identity = BaseModelIdentity(source=report.model.base, revision=report.model.revision)
    refuse_changed_base(identity, settings)
    chosen = choose_device(device)
    source = BaseSource(
        identity,
        recipe.model,
        device=chosen,
        models_folder=workdir / "models",
        settings=settings,
        should_stop=should_stop,
    )
    source.fetch_small(_unseen)
    base = source.fetch(_unseen)
    files = {name: FileEntry(size=f.size, sha256=f.sha256) for name, f in report.adapter.files.items()}
    folder = workdir / "adapters" / report.run_id
    if ADAPTER_FILES[0] not in files:
        raise DataError(f"{report.run_uri}/report.json: names no {ADAPTER_FILES[0]}; start the run again")
    artifacts.fetch_adapter(folder, {ADAPTER_FILES[0]: files[ADAPTER_FILES[0]]}, should_stop=should_stop)
    # By the recipe and the weights alone: a description in a bucket may ask a library for anything.
    model = attach_lora(
        load_base(base.folder, device=chosen, dtype=compute_dtype(chosen)),
        recipe.lora,
        source=identity.source,
        revision=recipe.model.revision,
        seed=recipe.train.seed,
    )
    load_adapter(model, folder, read_wrapper(base.folder))
    return base.folder, PackedModel(model).eval()


def _unseen(_done: int, _of: int) -> None:
    """Nobody follows the download."""


def typed_prompts(should_stop: Callable[[], bool]) -> Iterator[str]:
    """Prompts from the keyboard or a pipe, until its end or Ctrl-C."""
    while True:
        sys.stdout.write("prompt> ")
        sys.stdout.flush()
        # The signal only sets a flag, and reading a line would go on after it.
        while sys.stdin.isatty() and not select.select([sys.stdin], [], [], 0.2)[0]:
            if should_stop():
                return
        line = sys.stdin.readline()
        if not line:
            sys.stdout.write("\n")
            return
        if line.strip():
            yield line.rstrip("\n")
