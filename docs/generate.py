# ruff: noqa: INP001 - a script beside the pages that it writes, no package
"""Writes the pages that follow from the code: recipe and command reference, JSON Schemas, the README's exit codes.

python docs/generate.py            write them
python docs/generate.py --check    write nothing; end with 1 when one of them is not what the code says
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import click

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- begin exit codes -->", "<!-- end exit codes -->"
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_GENERATED = "<!-- Written by `make docs` from {source}; change it there. -->"


def pages(root: Path) -> dict[str, str]:
    """Each generated file below the root, as it should be: path -> content."""
    from job.core.recipe.schema import Recipe
    from job.core.reports.report import Report

    readme = root / "README.md"
    found = {
        "docs/recipe.md": recipe_page(),
        "docs/commands.md": commands_page(),
        "docs/recipe.schema.json": _schema_text(Recipe.model_json_schema()),
        "docs/report.schema.json": _schema_text(Report.model_json_schema(mode="serialization")),
    }
    if readme.exists():
        found["README.md"] = with_exit_codes(readme.read_text(encoding="utf-8"))
    return found


def stale(root: Path) -> list[str]:
    """The generated files that are missing, or not what the code says."""
    return [name for name, content in pages(root).items() if _read(root / name) != content]


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _schema_text(schema: Mapping[str, Any]) -> str:
    return json.dumps({"$schema": _DIALECT, **schema}, indent=2, ensure_ascii=False) + "\n"


def with_exit_codes(readme: str) -> str:
    """The README with the table of exit codes between its markers.

    Raises:
        ValueError: the markers are not there, each once and in this order.
    """
    from job.core.errors import table_markdown

    before, begin, rest = readme.partition(BEGIN)
    _old, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"README.md: needs {BEGIN} and then {END}, each once")
    return f"{before}{BEGIN}\n\n{table_markdown()}\n\n{END}{after}"


# --- the recipe ------------------------------------------------------------------------------------------------------

_RECIPE_HEAD = """\
# The recipe

A recipe is one YAML file: what to start from, what to learn, how, and where to put it. This is a whole one:

```yaml
model:
  base: meta-llama/Llama-2-7b-hf
  revision: 01c7f73d771dfac7d292323805ebc428287df4f9
data:
  train: s3://datasets/notes/train/*.jsonl
  prompt: "### Question: {input}\\n ### Answer:"
  completion: " {output}"
train:
  steps: 500
  batch_size: 16
  learning_rate: 2e-4
output: s3://models/notes
```

Everything else has a default. [`recipes/`](../recipes) has commented ones to start from.

**Mistakes.** An unknown key is one, and so is a value of another kind or out of bounds. All of them are told at once,
each with its line, before anything is fetched (exit code 64). `python entrypoint.py check RECIPE` looks at the data,
the base model and the permissions as well, and needs no GPU.

**One key for one run.** `--set lora.r=16` overrides a key; the value is YAML. `--set` may come several times, and
`JOB_SET` holds one override a line. Both add up, and where they name the same key the command line wins. `--output URI`
does the same for `output`. The log, `check`, `run.json` and the attempt's record name each override and its source.

**Places.** A URI is `s3://bucket/key`, `file:///folder/file` or a local path, relative to the folder that the job is
started in. It holds no credentials: those come from where the AWS tools look for them (environment, profile, role).

In a `file://` URI `%20` is a blank, as programs write it; in a path every sign stands for itself. A file or folder that
has the very name (`notes [1].jsonl`) is what is meant, and no glob.

**Templates.** `text`, `prompt` and `completion` are text in which `{name}` stands for that field of the record, and
`{outer.inner}` for one inside an object, unless a field has that very name. `{{` and `}}` are literal braces. BOS and
EOS are added by the job; a template that writes one of them where it belongs gets it once.

- A field must be there and not be blank. Numbers, `true` and `false` are text as the record writes them (`strict_types:
  true` refuses them); null, lists and objects are wrong lines.
- `{input?}` may be left out: where the record has no such field, or null or a blank one, nothing stands there. Square
  brackets around optional fields are a group, which is there where all the optional fields directly in it are; the
  brackets themselves are not part of the text. Brackets around no optional field are text, as in `[INST]`.
- An example whose answer is blank is left out and named: the fields of `completion`, or the last one of `text`.

```yaml
prompt: "### Instruction:\\n{instruction}\\n\\n[### Input:\\n{input?}\\n\\n]### Response:\\n"
completion: "{output}"
```

**Chats.** `chat: messages` reads records like `{"messages": [{"role": "user", "content": "..."}, ...]}`; `from` and
`value`, `human` and `gpt` and the like, and a field `conversations` are read as well. The tokenizer's own chat
template renders them, or the one that `chat_template` names. Learned are the assistant's turns, tool calls too, each
with the control token that ends it; what the system, the user and tools say is given. A turn begins where the
generation prompt ends, found by rendering the conversation turn by turn, so that any template works; one that renders
a beginning otherwise than the whole is refused with the first difference. Reasoning stands in `reasoning_content` (or
`thinking`, `reasoning`), or between `<think>` and `</think>` at an answer's beginning; an empty `<think></think>` that
a template adds is not learned. The template puts BOS itself; EOS is added only where no control token ends the last
turn. A template that asks for the date gets 26 July 2024, so that a conversation is the same tomorrow. It runs in a
sandbox of its own with 10 seconds of computing for a conversation; one that needs more ends the job (exit code 65). Of
the templates that ship `alpaca` suits bases without control tokens; `chatml`, `llama3` and `gemma` use the base's EOS
where it lacks their end of a turn. None of them knows tools. Prompts of `evaluate.prompts` and `try --prompt` are a
user's turn.

**Control tokens.** What a template itself writes, such as `<|im_end|>`, is a control token whenever the base's files
mark it as special. What stands in a field never is: `</s>` in an answer is spelled letter by letter.

**The border.** Prompt and completion become tokens apart, so that the prompt has the tokens that it has when the model
is asked, and together they read as the text: no space is added between them. A tokenizer that marks where words begin
or end (WordPiece) cannot be cut within one: such a border is refused (64). `python entrypoint.py preview RECIPE` shows
it all on the data.

**Several sources.** `data.train` may be a list of sections, one a source, each with its files, its share and, where its
records are of another kind, templates of its own:

```yaml
data:
  train:
    - {uri: s3://datasets/notes/*.jsonl, weight: 3}
    - {uri: s3://datasets/chats.jsonl, weight: 1, chat: messages}
  prompt: "### Question: {input}\\n### Answer:"
  completion: " {output}"
```

With `weight`, each step's examples are shared out by the weights, exact at every step to less than one example; an
epoch is as many examples as all sources have together. Without weights each source is passed over `train.epochs` times,
or its own `epochs` times as often, and examples of all are spread evenly over the run; with `train.steps` instead, each
source has the share of its size. Each source has a shuffled order of its own, a new one for each pass over it. What is
drawn at a step follows from the seed and the step alone, so a resumed run goes on exactly.

`validation: {fraction: 0.05}` holds that share of every source out, by content; or `validation` is a list of sources
too, without shares. Loss is reported for all held-out examples and for each source. A list of URIs is one source:
its files in a row.

**Answers and their metric.** `evaluate.answers: 200` has base and tuned model answer the first 200 held-out examples
that are whole; `evaluate.metric` says what makes an answer right. Its mean for both models and the gain, with a 95 %
interval that is paired over the examples, stand in log, report and page, for each source and each slice as well.

| metric | an answer scores 1 where, once blanks at both ends are gone, |
|---|---|
| `exact_match` | it is the learned answer, word for word |
| `contains` | the learned answer stands in it |
| `pattern` | the first match of `pattern`, its group or all of it, is that of the learned answer |
| `json_equal` | it is JSON, and the same value: 1 is 1.0, the order of an object's keys says nothing |
| `rouge_l` | between 0 and 1: ROUGE-L (F measure) by rouge-score, over small letters, the first 1,000 words of each |

```yaml
evaluate:
  answers: 500
  metric: pattern
  pattern: "#### (-?[0-9]+(?:[.,][0-9]+)*)" # GSM8K: "... so she sold 72 clips. #### 72"
  slices: [lang, meta.topic]
```

Patterns are of RE2: no look-ahead and no back-references, and no answer can make one run for ever. A pattern that RE2
does not know is refused with the recipe (exit code 64). ROUGE-L takes words of any script; a character of a script that
puts no spaces counts as a word. With `metric_field: final` answers are compared with that field of the record and not
with the learned answer; of `pattern` the field may be the bare value. An example without anything to compare with is
answered and not judged, and the report says which; where there is none at all, the job ends early (exit code 65).

`slices: [lang]` gives held-out losses and metrics for each value of a field, each with its interval and n: the twelve
values with most examples, what has none, and all others together. Lists and objects count as their JSON.

Each held-out example has a line in `examples.jsonl` beside the report: its hash, `file:line`, target tokens, the losses
of both models and the scores of both answers; the report holds the file's hash. A later run in the same output that was
judged on the same examples says what has changed since, example by example.

**What is left out.** Examples that are dropped as too long, that have nothing of their answer within `max_length`, or
that have a blank field are counted by reason. Up to `unused_limit` log, `check` and report say so; beyond it the job
ends (exit code 65). Each source is held to it by itself; with own validation files each side is, else both together.

**Files.** JSON lines in UTF-8, plain, `.gz` or `.zst`, recognised by their bytes: files put together from several, with
skippable frames (`pzstd`) or zeros behind them are read to the end. UTF-16, a JSON array, CSV, Parquet and Arrow files
are refused with a `python -c ...` line that makes JSON lines of them.

**Editors.** With this first line, editors that know JSON Schema complete and check the keys while you type:

```yaml
# yaml-language-server: $schema=../docs/recipe.schema.json
```
"""


def recipe_page() -> str:
    """Every section and key, with kind, default and meaning."""
    from job.core.recipe.schema import Recipe

    schema = Recipe.model_json_schema()
    needed = schema["required"]
    links = [f"[{name}](#{name}{'-required' if name in needed else ''})" for name in schema["properties"]]
    page = [
        _GENERATED.format(source="job/core/recipe/schema.py"),
        "",
        _RECIPE_HEAD,
        f"The keys: {' · '.join(links)}",
        "",
    ]
    for name, part in schema["properties"].items():
        definition = _definition(part, schema) if "$ref" in part else part
        page += [f"## {name}" + (" (required)" if name in needed else ""), "", definition["description"], ""]
        if "$ref" in part:
            page += ["| key | value | default | meaning |", "|---|---|---|---|"]
            page += [*_rows(definition, schema), ""]
    return "\n".join(page)


def _rows(definition: Mapping[str, Any], schema: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """A row for each key of a section; those of a section inside it follow theirs."""
    named_by_default = prefix != "" and not prefix.endswith("[].")
    for key, part in definition["properties"].items():
        default = "**required**" if key in definition.get("required", ()) and not named_by_default else _default(part)
        yield f"| `{prefix}{key}` | {kind(part)} | {default} | {' '.join(part['description'].split())} |"
        for choice in part.get("oneOf", ()):
            if "$ref" in choice:
                yield from _rows(_definition(choice, schema), schema, prefix=f"{prefix}{key}.")
            elif "$ref" in choice.get("items", ()):
                yield from _rows(_definition(choice["items"], schema), schema, prefix=f"{prefix}{key}[].")


def _definition(part: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = schema["$defs"][part["$ref"].rpartition("/")[2]]
    return found


def _default(part: Mapping[str, Any]) -> str:
    value = part.get("default")
    return "none" if value is None else f"`{_yaml(value)}`"


def _yaml(value: object) -> str:
    """A default as one writes it in a recipe."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_yaml(v)}" for k, v in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)


def kind(part: Mapping[str, Any]) -> str:
    """What values a schema takes, in words.

    Raises:
        KeyError: a kind of schema that has no words yet.
    """
    if _choices(part) != [part]:
        # null is shown as the default "none".
        *first, last = dict.fromkeys(kind(choice) for choice in _choices(part) if choice.get("type") != "null")
        return f"{', '.join(first)} or {last}" if first else last
    if "const" in part or "enum" in part:
        return ", ".join(f"`{value}`" for value in part.get("enum", [part.get("const")]))
    if "$ref" in part:
        return "a section"
    if part["type"] == "array":
        if "$ref" in part["items"]:
            return "list of sections"
        return f"list of {kind(part['items'])}" + ("" if "enum" in part["items"] else "s")
    words = {"boolean": "`true` or `false`", "string": "text", "integer": "whole number", "number": "number"}
    return words[part["type"]] + _bounds(part)


def _choices(part: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The schemas that a value may choose from, choices inside choices included."""
    inner = part.get("anyOf") or part.get("oneOf")
    return [choice for each in inner for choice in _choices(each)] if inner else [part]


def _bounds(part: Mapping[str, Any]) -> str:
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    told = [f"{sign} {_bound(part[name])}" for name, sign in signs.items() if name in part]
    if "pattern" in part:
        told.append(f"like `{part['pattern']}`")
    return f" {', '.join(told)}" if told else ""


def _bound(value: float) -> str:
    large = isinstance(value, int) and value >= 2**20 and value.bit_count() == 1
    return f"2^{int(value).bit_length() - 1}" if large else f"{value:g}"


# --- the commands ----------------------------------------------------------------------------------------------------

_COMMANDS_HEAD = """\
# The commands

Each option can also come from the environment, by the name in the second column; an option on the command line wins
over it. One that may come several times adds up instead: first the lines of its variable, then what the command line
gives.

What the exit codes mean, and whether starting the same job again helps, stands in the [README](../README.md).
"""


def commands_page() -> str:
    """Every command and option, with its environment variable, default and meaning."""
    import click

    from job.cli import cli
    from job.core.plan.plan_json import PlanJson

    page = [_GENERATED.format(source="job/cli.py"), "", _COMMANDS_HEAD]
    page += ["## Before any command", "", *_command("python entrypoint.py [OPTIONS] COMMAND ...", cli)]
    for name, command in cli.commands.items():
        words = [p.human_readable_name for p in command.params if isinstance(p, click.Argument)]
        needed = [p for p in command.params if isinstance(p, click.Option) and p.required]
        words += [f"{option.opts[0]} {option.make_metavar(click.Context(command))}" for option in needed]
        about = (command.help or "").strip()
        page += [f"## {name}", "", about, "", *_command(f"python entrypoint.py {name} {' '.join(words)}", command)]
        if name == "plan":
            page += [
                "The object of `--json`, each key as `jq` takes it:",
                "",
                *_json_keys(PlanJson.model_json_schema(mode="serialization")),
                "",
            ]
    return "\n".join(page)


def _json_keys(schema: Mapping[str, Any]) -> list[str]:
    """A table of all keys of an object: `.section.key`, and `.list[].key`."""
    return ["| key | meaning |", "|---|---|", *_keys(schema, schema, prefix=".")]


def _keys(section: Mapping[str, Any], schema: Mapping[str, Any], *, prefix: str) -> Iterator[str]:
    for key, part in section["properties"].items():
        inner, name = (part["items"], f"{prefix}{key}[]") if part.get("type") == "array" else (part, f"{prefix}{key}")
        if "$ref" in inner:
            yield from _keys(_definition(inner, schema), schema, prefix=f"{name}.")
        else:
            yield f"| `{name}` | {part['description']} |"


def _command(usage: str, command: "click.Command") -> list[str]:
    import click

    options = [
        p for p in command.params if isinstance(p, click.Option) and p.name not in {"help", "version"} and not p.hidden
    ]
    rows = [_option(p) for p in sorted(options, key=lambda option: not option.required)]
    head = ["| option | environment | default | meaning |", "|---|---|---|---|"]
    return ["```", usage, "```", "", *(head + rows if rows else ["It has no options."]), ""]


def _option(option: "click.Option") -> str:
    import click

    choices = option.type.choices if isinstance(option.type, click.Choice) else ()
    wanted = "\\|".join(choices) or option.metavar or option.type.name.split()[0].upper()
    value = "" if option.is_flag else f" {wanted}"
    default = f"`{option.default}`" if option.show_default else "**required**" if option.required else "none"
    variable = f"`{option.envvar}`" if option.envvar else "-"
    often = f" May come several times; the lines of {option.envvar} come first." if option.multiple else ""
    return f"| `{option.opts[0]}{value}` | {variable} | {default} | {option.help}{often} |"


def main(arguments: list[str]) -> int:
    """Write or check the pages; the exit code."""
    if arguments == ["--check"]:
        wrong = stale(ROOT)
        if wrong:
            sys.stdout.write(f"not what the code says: {', '.join(wrong)}; run `make docs`\n")
        return 1 if wrong else 0
    for name, content in pages(ROOT).items():
        (ROOT / name).write_text(content, encoding="utf-8")
        sys.stdout.write(f"{name}\n")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))
