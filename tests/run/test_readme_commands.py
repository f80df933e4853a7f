"""Every command of README.md, and every call of make and of a module on any page, as it is typed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from job_process import ROOT, Job, process
from typed_commands import blocks, within_sentences

from job.cli import cli
from job.edge.host.interrupt import Interrupt
from job.ending import Session

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")]
CALLS = [line for block in blocks(README) for line in block.splitlines() if line.startswith("python entrypoint.py ")]


def typed(page, program):
    """What begins with it, in fences and in sentences."""
    text = page.read_text(encoding="utf-8")
    shown = [line for block in blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    # What a comment says is not typed.
    found = [re.sub(r"\s+#.*", "", line) for line in shown if line.startswith(program)]
    return sorted({*found, *within_sentences(text, program)})


MADE = sorted({line for page in PAGES for line in typed(page, "make ")})
MODULES = sorted({line for page in PAGES for each in ("python -m ", ".venv/bin/python ") for line in typed(page, each)})


def test_there_are_commands():
    assert len(CALLS) >= 6
    assert {"make demo", "make test", "make image LOCK=locks/cu126.txt"} - {line[:31] for line in MADE} == set()
    assert len(MODULES) >= 3


@pytest.fixture(scope="module")
def person(tmp_path_factory, base, warm):
    """Types a call of the job in a folder with a recipe that takes seconds, on what the calls before it have left."""
    job = Job(tmp_path_factory.mktemp("person"), base)
    job.recipe["promote"] = {"channel": "notes"}
    job.write()
    settings = {"JOB_WORKDIR": str(job.workdir), "JOB_DEVICE": "cpu", "JOB_PROMPT": "12 red hats\\n"}

    def types(line):
        run = f"file://{job.only_run()}" if job.runs() else "RUN_URI"
        channel = f"file://{job.store}/channels/notes"
        here = {"RECIPE": "recipe.yaml", "RUN_URI": run, "FOLDER": "fetched", "CHANNEL_URI": channel}
        words = [here.get(word, word) for word in shlex.split(line, comments=True)]
        command = [sys.executable, str(ROOT / "entrypoint.py"), *words[2:]]
        with process(command, cwd=job.folder, environment=settings, image=warm) as running:
            return running.end()

    return types


@pytest.mark.parametrize("line", CALLS)
def test_a_call_of_the_job_does_its_work(person, line):
    """In the order of the page: what is reported and tried has been run."""
    ended = person(line)

    assert ended.code == 0, ended.stdout + ended.stderr


def test_a_mistake_in_a_call_is_seen(person):
    assert person("python entrypoint.py run RECIPES").code == 64
    assert person("python entrypoint.py fetch RECIPE --into FOLDER").code == 64


@pytest.mark.parametrize(
    "line", sorted({each for page in PAGES for each in typed(page, "python entrypoint.py ")} - {*CALLS})
)
def test_a_call_in_any_page_is_understood(line):
    name, *words = shlex.split(line.replace("...", "").replace("[OPTIONS] COMMAND", "run RECIPE"), comments=True)[2:]
    if not words:  # in a sentence about the command
        assert name in cli.commands
        return
    cli.commands[name].make_context(name, words, obj=Session(interrupt=Interrupt()))


@pytest.mark.parametrize("line", MADE)
def test_make_knows_what_it_is_to_make(line):
    """It only says what it would do."""
    command = [*shlex.split(line.replace("IMAGE=...", "IMAGE=x"), comments=True), "--dry-run", "--no-print-directory"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("line", MODULES)
def test_what_python_is_to_run_is_there(line):
    words = shlex.split(line)
    module = words[words.index("-m") + 1]
    assert module == "pytest" or (ROOT / module.replace(".", "/")).with_suffix(".py").exists()
    for place in (word for word in words if word.startswith("tests/")):
        assert (ROOT / place).exists()
    if "-k" in words:
        (file,) = (word for word in words if word.endswith(".py") and word.startswith("tests/"))
        assert re.search(rf"^def test_\w*{words[words.index('-k') + 1]}", Path(ROOT / file).read_text(), re.MULTILINE)
