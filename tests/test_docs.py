"""What the pages say is what the code does: generated pages, options, variables, keys, examples, links."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import click
import jsonschema
import pytest

from job.cli import cli
from job.core.errors import ENDINGS, table_markdown
from job.core.recipe.schema import Recipe
from job.core.recipe.text import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")) if path.exists())
SCRIPTS = sorted(
    path
    for folder in ("k8s", "slurm", "recipes")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".yaml", ".sh", ".sbatch", ".md"}
) + [path for path in (ROOT / "Makefile", ROOT / "Dockerfile") if path.exists()]
"""What starts the job, and so names its options, variables and keys as well."""


def read(path):
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def generate():
    """The script that writes the pages."""
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(tmp_path):
    """The pages elsewhere, to be spoilt."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "README.md").write_text(
        f"# x\n\n<!-- begin exit codes -->\n\n{table_markdown()}\n\n<!-- end exit codes -->\n\nend\n"
    )
    return tmp_path


# --- generated pages -------------------------------------------------------------------------------------------------


def test_every_generated_page_is_what_the_code_says(generate):
    assert generate.stale(ROOT) == [], "run `make docs`"


@pytest.mark.parametrize("name", ["recipe.md", "commands.md", "recipe.schema.json", "report.schema.json"])
def test_a_page_that_was_changed_by_hand_or_is_missing_is_seen(generate, copy, name):
    page = copy / "docs" / name
    assert generate.stale(copy) == []

    page.write_text(read(page) + " ")
    assert generate.stale(copy) == [f"docs/{name}"]
    page.unlink()
    assert generate.stale(copy) == [f"docs/{name}"]


def test_an_outdated_table_in_the_readme_is_seen_and_the_rest_is_left_alone(generate, copy):
    readme = copy / "README.md"
    right = read(readme)
    readme.write_text(right.replace("read the report", "do nothing"))

    assert generate.stale(copy) == ["README.md"]
    assert generate.with_exit_codes(read(readme)) == right


@pytest.mark.parametrize(
    "readme",
    [
        "no markers",
        "<!-- begin exit codes -->",
        "<!-- end exit codes --> <!-- begin exit codes -->",
        "<!-- begin exit codes --> <!-- begin exit codes --> <!-- end exit codes -->",
        "<!-- begin exit codes --> <!-- end exit codes --> <!-- end exit codes -->",
    ],
)
def test_a_readme_without_its_two_markers_is_refused(generate, readme):
    with pytest.raises(ValueError, match="each once"):
        generate.with_exit_codes(readme)


def test_the_script_says_by_its_exit_code_whether_the_pages_are_right():
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", ["recipe.schema.json", "report.schema.json"])
def test_a_schema_on_disk_is_a_json_schema(name):
    schema = json.loads(read(ROOT / "docs" / name))

    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_rows_of_a_table_have_as_many_cells_as_its_head(path):
    cells = [len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0 for line in read(path).splitlines()]

    assert all(one == other for one, other in pairwise(cells) if one and other)


# --- the recipe ------------------------------------------------------------------------------------------------------


def recipe_keys():
    """`section.key` of every key."""
    return {
        f"{section}.{key}"
        for section, field in Recipe.model_fields.items()
        for key in getattr(field.annotation, "model_fields", ())
    }


def named_keys(text):
    """Each `section.key` that a text names in backticks or after --set; a file's name is none."""
    sections = "|".join(Recipe.model_fields)
    found = re.findall(rf"(?:`|--set )((?:{sections})\.\w+)", text)
    return {key for key in found if key.split(".")[1] not in {"jsonl", "json", "md", "py", "yaml", "safetensors"}}


def test_the_recipe_page_has_a_row_for_every_key():
    page = read(ROOT / "docs" / "recipe.md")
    for key in recipe_keys():
        section, name = key.split(".")
        part = page.split(f"\n## {section}")[1].split("\n## ")[0]
        assert f"| `{name}` |" in part, key


def test_every_key_says_what_it_means():
    schema = Recipe.model_json_schema()

    assert all(
        part.get("description") for section in schema["$defs"].values() for part in section["properties"].values()
    )


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_key_of_the_recipe_that_is_named_exists(path):
    assert named_keys(read(path)) - recipe_keys() == set()


def test_every_key_that_an_exit_code_advises_exists():
    words = set(re.findall(r"\b(?:data|train|lora|model|evaluate)\.\w+", " ".join(row.action for row in ENDINGS)))

    assert words
    assert words <= recipe_keys()


def test_a_key_that_does_not_exist_is_seen():
    assert named_keys("set `data.on_bad_records: skip`, or --set train.lr=3") == {"data.on_bad_records", "train.lr"}
    assert named_keys("see `train.jsonl`, `model.safetensors` and `retrain.x`") == set()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_recipe_that_is_shown_is_right(path):
    for number, block in enumerate(recipes_shown(read(path))):
        load_recipe(block, source=f"{path.name}, recipe {number}")


def recipes_shown(text):
    return [
        block
        for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
        if re.search(r"^model:", block, re.MULTILINE)
    ]


def test_the_recipe_page_shows_a_whole_recipe():
    assert recipes_shown(read(ROOT / "docs" / "recipe.md"))


# --- commands, options, variables ------------------------------------------------------------------------------------

OPTIONS = {
    name: [option for option in command.params if isinstance(option, click.Option)]
    for name, command in {"": cli, **cli.commands}.items()
}


def variables():
    return {option.envvar for options in OPTIONS.values() for option in options if option.envvar}


def named_variables(text):
    """JOB_ variables, but none of which that is only a part (SLURM_JOB_ID)."""
    return set(re.findall(r"(?<![A-Za-z0-9_])JOB_[A-Z0-9_]+", text))


@pytest.mark.parametrize("command", OPTIONS)
def test_every_option_that_help_shows_is_explained_in_the_pages(command):
    done = subprocess.run(
        [sys.executable, "entrypoint.py", *([command] if command else []), "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    shown = set(re.findall(r"^\s+(?:-\w, )?(--[a-z-]+)", done.stdout, re.MULTILINE)) - {"--help", "--version"}
    pages = "\n".join(read(path) for path in PAGES)

    meant = {option.opts[0] for option in OPTIONS[command] if not option.hidden}
    assert shown == meant - {"-h", "--help", "--version"}
    assert {option for option in shown if not re.search(rf"{option}\b", pages)} == set()


@pytest.mark.parametrize("command", OPTIONS)
def test_every_option_also_comes_from_the_environment_by_its_own_name(command):
    """As --help and docs/commands.md promise."""
    for option in OPTIONS[command]:
        if option.name not in {"help", "version"}:
            assert option.envvar == "JOB_" + option.opts[0].removeprefix("--").replace("-", "_").upper()


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_variable_that_is_named_exists(path):
    assert named_variables(read(path)) - variables() == set()


def test_a_variable_that_does_not_exist_is_seen():
    assert named_variables("JOB_RUNID=1 $JOB_DEVICE SLURM_JOB_ID X_JOB_Y") == {"JOB_RUNID", "JOB_DEVICE"}
    assert {"JOB_RUN_ID", "JOB_SET", "JOB_WORKDIR", "JOB_LOG_FORMAT", "JOB_OUTCOME_FILE"} <= variables()


def calls(text):
    """(command, options) of each `entrypoint.py ...` line; a line that ends in a backslash goes on."""
    lines = re.findall(r"entrypoint\.py ([a-z][^\n`#|]*)", text.replace("\\\n", " "))
    return [(line.split()[0], re.findall(r"(?<=\s)--[a-z][a-z-]*", line)) for line in lines]


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_that_is_shown_exists_with_its_options(path):
    for command, options in calls(read(path)):
        assert command in cli.commands
        assert set(options) <= {name for option in OPTIONS[command] for name in option.opts}


def test_a_command_line_that_is_wrong_is_seen():
    text = "`python entrypoint.py tune x.yaml`\npython entrypoint.py run x.yaml --foo 1 \\\n  --output file://x\n"

    assert calls(text) == [("tune", []), ("run", ["--foo", "--output"])]


# --- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_to_a_file_or_heading_leads_somewhere(path):
    for target, heading in re.findall(r"\]\((?!https?://)([^)#\s]*)(#[^)\s]*)?\)", read(path)):
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), target
        if heading and there.suffix == ".md":
            assert heading in anchors(read(there)), heading


def anchors(text):
    """The headings of a page, as GitHub links to them."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_headings_become_anchors():
    assert anchors("# The recipe\n\n## model (required)\n") == {"#the-recipe", "#model-required"}
