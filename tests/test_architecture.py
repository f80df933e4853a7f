"""The rooms and floors of design: imports point down, each effect has one owner, what need not load does not load."""

import ast
import functools
import re
import subprocess
import sys
import textwrap
from collections import Counter
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from job_process import Job
from run_material import make_base

from job.cli import cli

ROOT = Path(__file__).parents[1]

FLOORS = {
    "the house": (
        ("entrypoint",),
        (
            "job.cli",
            "job.channel_command",
            "job.options",
            "job.export_options",
            "job.saying",
            "job.showing",
            "job.together",
            "job.ending",
        ),
        ("job.commands", "job.commands.*"),
        ("job.launch", "job.launch.*"),
        ("job.stages", "job.stages.*"),
        ("job.render", "job.render.*", "job.tune", "job.tune.*", "job.edge", "job.edge.*"),
        ("job.kernels", "job.kernels.*"),
        ("job.core", "job.core.*"),
        ("job",),
    ),
    "job.stages": (
        (
            "job.stages.finishing.exporting",
            "job.stages.finishing.finish",
            "job.stages.nightly.looking",
            "job.stages.nightly.other_seed",
            "job.stages.finishing.so_far",
            "job.stages.training",
        ),
        (
            "job.stages.finishing.export_proof",
            "job.stages.finishing.report",
            "job.stages.nightly.promotion",
            "job.stages.nightly.night",
            "job.stages.tracking",
        ),
        ("job.stages.finishing.results",),
        ("job.stages.nightly.fresh_records",),
        ("job.stages.nightly.comparing",),
        ("job.stages.nightly.contenders",),
        ("job.stages.nightly.exams",),
        ("job.stages.nightly.answering",),
        ("job.stages.finishing.proving",),
        ("job.stages.loop", "job.stages.ranks.following"),
        ("job.stages.preparing",),
        (
            "job.stages.committing",
            "job.stages.ranks.placing",
            "job.stages.planning",
            "job.stages.resuming",
            "job.stages.teller",
        ),
        ("job.stages.ranks.company",),
        ("job.stages.nightly.lineage",),
        ("job.stages.gathering", "job.stages.base.loading"),
        (
            "job.stages.base.base_source",
            "job.stages.nightly.channel_changes",
            "job.stages.data.dataset",
            "job.stages.base.weights",
            "job.stages.base.hardware",
            "job.stages.attempts.holding",
            "job.stages.finishing.pushing",
            "job.stages.data.stops",
        ),
        ("job.stages.data.encoding",),
        ("job.stages.data.data_report", "job.stages.data.judging", "job.stages.data.sources"),
        ("job.stages.attempts.guard", "job.stages.attempts.records"),
        ("job.stages.attempts.identity",),
        ("job.stages.data.data_objects",),
        ("job.stages.nightly.late_files",),
        (
            "job.stages.attempt",
            "job.stages.attempts",
            "job.stages.base",
            "job.stages.data",
            "job.stages.finishing",
            "job.stages.nightly",
            "job.stages.ranks",
        ),
    ),
    "job.core": (
        ("job.core.reports", "job.core.reports.*"),
        ("job.core.plan", "job.core.plan.*"),
        ("job.core.data", "job.core.data.*", "job.core.base", "job.core.base.*"),
        ("job.core.recipe", "job.core.recipe.*"),
        ("job.core.nightly", "job.core.nightly.*"),
        ("job.core.judging", "job.core.judging.*"),
        ("job.core.attempt", "job.core.attempt.*"),
        (
            "job.core.close_names",
            "job.core.crash_points",
            "job.core.errors",
            "job.core.given",
            "job.core.library_settings",
            "job.core.lines",
            "job.core.section",
            "job.core.visible",
        ),
    ),
    "job.tune": (
        ("job.tune.loop", "job.tune.loop.*", "job.tune.rehearsal"),
        ("job.tune.device_check", "job.tune.engines", "job.tune.engines.*"),
        ("job.tune.merging", "job.tune.merging.*"),
        ("job.tune.model", "job.tune.model.*"),
        (
            "job.tune.data",
            "job.tune.data.*",
            "job.tune.device",
            "job.tune.device.*",
            "job.tune.ranks",
            "job.tune.world",
        ),
    ),
    "job.tune.model": (
        ("job.tune.model.sharded", "job.tune.model.sharded.*"),
        ("job.tune.model.adapter", "job.tune.model.base", "job.tune.model.serving", "job.tune.model.shrunk"),
        ("job.tune.model.tokenizer",),
        ("job.tune.model.experts", "job.tune.model.promises", "job.tune.model.recurrent_choice"),
        (
            "job.tune.model.config",
            "job.tune.model.four_bit",
            "job.tune.model.mixtures",
            "job.tune.model.recurrent",
            "job.tune.model.wrappers",
        ),
        ("job.tune.model.stored", "job.tune.model.stored.*"),
    ),
    "job.edge": (
        ("job.edge.base", "job.edge.base.*", "job.edge.pushing", "job.edge.remembered"),
        (
            "job.edge.chat_template_files",
            "job.edge.dataset_files",
            "job.edge.exports",
            "job.edge.workers",
            "job.edge.run",
            "job.edge.run.*",
        ),
        ("job.edge.host", "job.edge.host.*", "job.edge.store", "job.edge.store.*"),
        ("job.edge.foreign_formats", "job.edge.relative_paths"),
    ),
}
"""Of each house, from the front door down: a module imports its floor and those below. A room may be a house itself."""
STRANGERS = (
    ("job.tune", "job.edge"),
    ("job.render", "job.tune"),
    ("job.render", "job.edge"),
    ("job.render", "job.kernels"),
    ("job.edge", "job.kernels"),
    ("job.edge.host", "job.edge.store"),
    ("job.edge.host", "job.edge.run"),
    ("job.edge.host", "job.edge.base"),
    ("job.edge.host", "job.edge.dataset_files"),
    ("job.edge.run", "job.edge.dataset_files"),
    ("job.tune.data", "job.tune.device"),
    ("job.tune.device_check", "job.tune.engines"),
    ("job.tune.world", "job.tune.data"),
    ("job.tune.world", "job.tune.device"),
    ("job.tune.ranks", "job.tune.data"),
    ("job.tune.ranks", "job.tune.device"),
    ("job.launch", "job.tune"),
)
"""Rooms that never see each other, whatever their floors."""
OWNERS = {
    "boto3": ("job.edge.store.s3.*",),
    "botocore": ("job.edge.store.s3.*",),
    "signal": ("job.edge.host.interrupt", "job.edge.host.crashing", "job.launch.launched"),
    "subprocess": ("job.launch.launched", "job.edge.workers", "job.tune.data.chats.rendering"),
    "torch.distributed": ("job.tune.ranks",),
    "bitsandbytes": ("job.tune.model.four_bit", "job.tune.loop.optimizer"),
    "click": (
        "job.cli",
        "job.channel_command",
        "job.options",
        "job.export_options",
        "job.saying",
        "job.showing",
        "job.together",
    ),
    "os.environ": ("job.cli", "job.edge.workers"),
    "os.environb": ("job.cli",),
    "os.getenv": ("job.cli",),
    "os.putenv": ("job.cli",),
    "huggingface_hub": ("job.edge.base.*", "job.edge.pushing"),
    "matplotlib": ("job.render.pictures", "job.render.page.figures", "job.render.page.svg"),
    "pynvml": ("job.edge.host.gpu",),
    "triton": ("job.kernels.triton_*",),
    "re2": ("job.core.judging.answer_metrics",),
    "rouge_score": ("job.core.judging.answer_metrics",),
}
"""Who alone may name a library or one of its parts."""
MOST_FILES = 14
"""Of one room, flat: beyond it a room wants inner floors."""
CROWDED = {
    "job/kernels": "one pair of forward and backward a file",
}
"""Rooms with more files, and why."""
CORE_LIBRARIES = {"job", "numpy", "pydantic", "pydantic_core", "re2", "rouge_score", "yaml"}
IMPURE = {
    *("asyncio", "io", "logging", "multiprocessing", "os", "pathlib", "random", "shutil", "signal", "socket"),
    *("subprocess", "sys", "tempfile", "threading", "time", "urllib"),
}
"""Parts of the standard library that what only decides has no use for."""
HEAVY = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "pyarrow")
SCHEDULER_WORDS = re.compile(r"slurm|sbatch|kubernetes|kubectl|k8s", re.IGNORECASE)
SCHEDULER_SYNTAX = re.compile(
    r"--(?:gres|gpus-per-\w+|mem|mem-per-\w+|tmp|cpus-per-\w+|ntasks|partition)(?![\w-])"
    r"|\b(?:srun|salloc|scontrol|scancel|squeue|sacct)\b"
    r"|(?<![\w./])(?:nvidia|amd)\.com/(?=\w)"  # a resource; not a link
    r"|(?<=[\d}])[KMGT]i\b|\bephemeral-storage\b|\b(?:apiVersion|nodeSelector|podFailurePolicy)\b"
)
"""What is pasted into a manifest or a batch script: it stands in the folder of its scheduler."""


def sources():
    """Module name -> its source."""
    found = {"entrypoint": (ROOT / "entrypoint.py").read_text(encoding="utf-8")}
    for path in sorted((ROOT / "job").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path.read_text(encoding="utf-8")
    return found


SOURCES = sources()


# --- the checkers ----------------------------------------------------------------------------------------------------


@functools.cache
def tree(source):
    """Parsed once, however many rules look at it."""
    return ast.parse(source)


@functools.cache
def imports(name, source):
    """Every dotted name that a module imports, wherever in the module: `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # A relative import is refused by its own checker; here it counts as from the module's own package.
            above = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and _called(node) in {"import_module", "__import__"} and node.args:
            first = node.args[0]
            found.add(first.value if isinstance(first, ast.Constant) else "<computed>")
    return found


def _called(node):
    return getattr(node.func, "attr", None) or getattr(node.func, "id", None)


@functools.cache
def named(name, source):
    """What a module imports, and each `module.attribute` that it writes."""
    attributes = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree(source))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    return imports(name, source) | attributes


def within(name, root):
    return name == root or name.startswith(f"{root}.")


def floor_of(name, house="the house"):
    """Number of a module's floor in a house, from the front door down; None: it has none there."""
    floors = enumerate(FLOORS[house])
    return next((n for n, rooms in floors if any(fnmatchcase(name, room) for room in rooms)), None)


def modules_imported(name, source, known):
    """Modules of ours that a module imports."""
    return {other for other in imports(name, source) if other in known and other not in {name, "job"}}


def wrong_ways(name, source, known):
    """Imports that point up, or into a room that must not be seen."""
    found = []
    for other in sorted(modules_imported(name, source, known)):
        for house in FLOORS:
            mine, theirs = floor_of(name, house), floor_of(other, house)
            if mine is not None and theirs is not None and theirs < mine:
                found.append(f"{name} imports {other}, which lies above it")
        for pair in STRANGERS:
            for here, there in (pair, pair[::-1]):
                if within(name, here) and within(other, there):
                    found.append(f"{name} imports {other}: {here} and {there} never see each other")
    return found


def without_floor(names):
    """Modules that lie in a house and on none of its floors; the package itself is no module of its own house."""
    return [
        f"{name} in {house}"
        for name in names
        for house in FLOORS
        if (house == "the house" or (within(name, house) and name != house)) and floor_of(name, house) is None
    ]


def crowded(counts):
    """Rooms with too many files, flat."""
    return sorted(room for room, files in counts.items() if files > MOST_FILES and room not in CROWDED)


def foreign_effects(name, source):
    """Libraries and parts of them that belong to another module."""
    return sorted(
        f"{name} names {thing}, which belongs to {', '.join(owners)}"
        for thing, owners in OWNERS.items()
        if any(within(found, thing) for found in named(name, source))
        and not any(fnmatchcase(name, owner) for owner in owners)
    )


def impurities(name, source):
    """What a module that only decides must not import or do."""
    roots = {found.split(".")[0] for found in imports(name, source)}
    foreign = {root for root in roots if root not in CORE_LIBRARIES and root not in sys.stdlib_module_names}
    opened = any(isinstance(node, ast.Call) and _called(node) == "open" for node in ast.walk(tree(source)))
    return sorted(foreign | (roots & IMPURE) | ({"open()"} if opened else set()))


def scheduler_words(source):
    found = [*SCHEDULER_WORDS.finditer(source), *SCHEDULER_SYNTAX.finditer(source)]
    return sorted({each.group().lower() for each in found})


# --- the job keeps the rules -----------------------------------------------------------------------------------------


def test_every_module_has_a_floor():
    assert len(SOURCES) > 30
    assert without_floor(SOURCES) == []


def test_every_floor_has_a_module():
    """A rule about a module that is gone would hold for ever."""
    empty = [room for floors in FLOORS.values() for rooms in floors for room in rooms]

    assert [room for room in empty if not any(fnmatchcase(name, room) for name in SOURCES)] == []


def test_no_room_is_crowded():
    files = Counter(str(path.parent.relative_to(ROOT)) for path in (ROOT / "job").rglob("*.py"))

    assert crowded(files) == []
    assert [room for room in CROWDED if files[room] <= MOST_FILES] == []


def test_every_room_with_inner_floors_says_what_it_is():
    for room in (
        *[house.replace(".", "/") for house in FLOORS if house != "the house"],
        "job/kernels",
        "job/edge/store",
    ):
        lines = (ROOT / room / "README.md").read_text(encoding="utf-8").splitlines()
        assert 10 <= len(lines) <= 30, room


@pytest.mark.parametrize("path", sorted((ROOT / "job").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_longer_than_it_can_be_read(path):
    source = path.read_text(encoding="utf-8")
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = [n.name for n in functions if n.end_lineno - n.lineno >= 80 and "job/kernels" not in str(path)]

    assert len(source.splitlines()) <= 400
    assert long == []


def test_no_two_files_of_tests_have_the_same_name():
    """pytest collects none of a suite in which two have: their folders are no packages."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))

    assert [name for name, count in names.items() if count > 1] == []


def test_a_run_is_told_in_forty_five_lines():
    """The story of the product; imports and blank lines apart."""
    source = (ROOT / "job/commands/run.py").read_text(encoding="utf-8")
    functions = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)]
    written = source.splitlines()
    lines = [line for n in functions for line in written[n.lineno - 1 : n.end_lineno] if line.strip()]
    docstrings = sum(len((ast.get_docstring(n, clean=False) or "").splitlines()) for n in functions)

    assert len(lines) - docstrings <= 45


@pytest.mark.parametrize("name", SOURCES)
def test_imports_point_down_and_tune_and_edge_never_see_each_other(name):
    assert wrong_ways(name, SOURCES[name], SOURCES) == []


@pytest.mark.parametrize("name", SOURCES)
def test_every_effect_has_one_owner(name):
    assert foreign_effects(name, SOURCES[name]) == []


@pytest.mark.parametrize(
    "thing", ["boto3", "signal", "subprocess", "bitsandbytes", "click", "os.environ", "torch.distributed"]
)
def test_an_owner_really_has_what_it_owns(thing):
    """A rule about a module that is gone would hold for ever."""
    users = [name for name in SOURCES if any(within(found, thing) for found in named(name, SOURCES[name]))]

    assert users
    assert all(any(fnmatchcase(user, owner) for owner in OWNERS[thing]) for user in users)


@pytest.mark.parametrize("name", [name for name in SOURCES if within(name, "job.core")])
def test_core_only_decides(name):
    assert impurities(name, SOURCES[name]) == []


@pytest.mark.parametrize("name", [name for name in SOURCES if within(name, "job.edge")])
def test_edge_does_not_compute(name):
    computing = {"torch", "peft", "accelerate", "bitsandbytes", "pyarrow"}

    assert {found.split(".")[0] for found in imports(name, SOURCES[name])} & computing == set()


def test_no_two_modules_import_each_other_in_a_circle():
    graph = {name: modules_imported(name, source, SOURCES) for name, source in SOURCES.items()}

    assert circle(graph) is None


def circle(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " -> ".join(error.args[1])
    return None


@pytest.mark.parametrize("name", SOURCES)
def test_the_job_knows_no_scheduler(name):
    assert scheduler_words(SOURCES[name]) == []


@pytest.mark.parametrize("name", SOURCES)
def test_every_module_says_its_job_in_one_line(name):
    said = ast.get_docstring(tree(SOURCES[name]))

    assert said
    assert said.splitlines()[0].endswith((".", ":", "?"))


@pytest.mark.parametrize("name", SOURCES)
def test_imports_are_absolute_and_written_out(name):
    """So that the checkers above see all of them."""
    relative = [n for n in ast.walk(tree(SOURCES[name])) if isinstance(n, ast.ImportFrom) and n.level]

    assert relative == []
    assert "<computed>" not in imports(name, SOURCES[name])


# --- what need not load does not load --------------------------------------------------------------------------------


def loaded_by(code, *arguments):
    """Exit code of a fresh Python that runs the code, and the roots of the modules that it loaded."""
    script = (
        "import sys\ncode = 0\ntry:\n"
        + textwrap.indent(code, "    ")
        + "\nexcept SystemExit as error:\n    code = error.code\n"
        + "print('\\nLOADED', code, *sorted({name.split('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    word, ended, *roots = done.stdout.splitlines()[-1].split()
    assert word == "LOADED", done.stdout
    return int(ended), set(roots)


ENTRYPOINT = "import runpy\nrunpy.run_path('entrypoint.py', run_name='__main__')"


def test_core_loads_no_heavy_library():
    names = [name for name in SOURCES if within(name, "job.core")]
    _, roots = loaded_by("\n".join(f"import {name}" for name in names))

    assert {"pydantic", "yaml", "numpy"} <= roots
    assert roots & {*HEAVY, "boto3", "botocore", "huggingface_hub", "matplotlib"} == set()


@pytest.mark.parametrize("arguments", [(), *((name,) for name in sorted(cli.commands))])
def test_help_loads_neither_heavy_libraries_nor_the_recipe_s(arguments):
    """So it answers at once."""
    ended, roots = loaded_by(ENTRYPOINT, *arguments, "--help")

    assert ended == 0
    assert "click" in roots
    assert roots & {*HEAVY, "boto3", "botocore", "huggingface_hub", "pydantic", "numpy", "matplotlib"} == set()


def test_a_wrong_recipe_is_refused_without_the_heavy_libraries(tmp_path):
    (tmp_path / "wrong.yaml").write_text("output: 5\n")
    ended, roots = loaded_by(ENTRYPOINT, "run", str(tmp_path / "wrong.yaml"))

    assert ended == 64
    assert "pydantic" in roots
    assert roots & {*HEAVY, "boto3", "botocore", "huggingface_hub", "matplotlib"} == set()


def test_a_quick_check_counts_the_data_s_tokens_without_torch(tmp_path):
    """Loading it, and what stands on it, takes longer than all that is checked."""
    job = Job(tmp_path, make_base(tmp_path / "base"))
    ended, roots = loaded_by(ENTRYPOINT, *job.command("check", "--quick")[2:])

    assert ended == 0
    assert {"transformers", "tokenizers", "pyarrow"} <= roots
    assert roots & {*(set(HEAVY) - {"transformers", "pyarrow"}), "boto3", "botocore", "matplotlib"} == set()


# --- the checkers see what they look for -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "source", "told"),
    [
        (
            "job.core.plan.course",
            "from job.edge.store import opening",
            "job.core.plan.course imports job.edge.store, which lies above",
        ),
        ("job.core.plan.course", "import job.cli", "job.core.plan.course imports job.cli, which lies above it"),
        ("job.core.plan.course", "def f():\n    from job.tune.engines.loss import x", "loss, which lies above it"),
        ("job.edge.store.s3.store", "def f():\n    from job.stages.attempt import Attempt", "which lies above it"),
        (
            "job.stages.finishing.finish",
            "from job.commands.run import run",
            "imports job.commands.run, which lies above it",
        ),
        ("job.commands.run", "from job import cli", "job.commands.run imports job.cli, which lies above it"),
        ("job.stages.loop", "from job.stages.training import x", "job.stages.training, which lies above it"),
        ("job.tune.model.base", "from job.tune.engines import attention", "job.tune.engines, which lies above it"),
        ("job.tune.engines.loss", "from job.tune.loop.step import x", "job.tune.loop.step, which lies above it"),
        ("job.edge.store.lanes", "from job.edge.run.lock import Lock", "job.edge.run.lock, which lies above it"),
        ("job.edge.run.lock", "from job.edge.base import hub", "job.edge.base, which lies above it"),
        (
            "job.edge.host.logs",
            "from job.edge.store.s3 import store",
            "job.edge.host and job.edge.store never see each other",
        ),
        (
            "job.render.cards.adapter",
            "from job.edge.store.s3 import store",
            "job.render and job.edge never see each other",
        ),
        ("job.edge.store.s3.store", "from job.kernels import ops", "job.edge and job.kernels never see each other"),
        ("job.edge.store.s3.store", "from job.tune.model.base import x", "job.edge and job.tune never see each other"),
        ("job.tune.loop.step", "from job.edge.host.logs import redact", "job.tune and job.edge never see each other"),
        (
            "job.tune.loop.step",
            "class A:\n    def f(self):\n        import job.edge.store.s3.store",
            "never see each other",
        ),
        (
            "job.tune.loop.step",
            "import importlib\nimportlib.import_module('job.edge.store.s3.store')",
            "never see each other",
        ),
        ("job.tune.loop.step", "from ...edge.store import s3", "never see each other"),
    ],
)
def test_an_import_the_wrong_way_is_seen(name, source, told):
    assert any(told in line for line in wrong_ways(name, source, SOURCES))


def test_imports_the_right_way_are_let_through():
    assert (
        wrong_ways("job.commands.run", "from job.edge.host import logs\nfrom job.stages.attempt import x", SOURCES)
        == []
    )
    assert wrong_ways("job.tune.loop.step", "from job.core.data.packing import pack\nimport torch", SOURCES) == []
    assert wrong_ways("job.commands.try_out", "from job.commands.report import open_run", SOURCES) == []
    assert wrong_ways("job.cli", "from job import __version__", SOURCES) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("job.edge.run.artifacts", "import boto3"),
        ("job.edge.run.artifacts", "def f():\n    from botocore.exceptions import ClientError"),
        ("job.commands.run", "import signal"),
        ("job.tune.model.base", "import bitsandbytes as bnb"),
        ("job.commands.run", "from click import echo"),
        ("job.edge.host.logs", "import os\nvalue = os.environ['X']"),
        ("job.edge.host.logs", "import os\nvalue = os.environ.get('X')"),
        ("job.edge.host.logs", "from os import environ"),
        ("job.edge.host.logs", "import os\ndef f():\n    return os.getenv('X')"),
        ("job.stages.finishing.finish", "import huggingface_hub.constants"),
    ],
)
def test_an_effect_outside_its_owner_is_seen(name, source):
    assert len(foreign_effects(name, source)) == 1


def test_an_effect_inside_its_owner_is_let_through():
    assert foreign_effects("job.edge.store.s3.bucket", "import boto3\nfrom botocore.config import Config") == []
    assert foreign_effects("job.edge.host.interrupt", "import signal") == []
    assert foreign_effects("job.cli", "import os, click\nos.environ") == []
    assert (
        foreign_effects("job.edge.base.hub", "import os\nos.path.join('a')\nfrom huggingface_hub import constants")
        == []
    )


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import torch", ["torch"]),
        ("def f():\n    import transformers", ["transformers"]),
        ("from os import path", ["os"]),
        ("import structlog, time", ["structlog", "time"]),
        ("text = open('x').read()", ["open()"]),
        ("import re, math, json\nfrom pydantic import BaseModel\nimport numpy as np\nimport yaml", []),
    ],
)
def test_what_does_more_than_decide_is_seen(source, told):
    assert impurities("job.core.plan.course", source) == told


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_scheduler_words_are_seen_in_any_case_and_anywhere():
    assert scheduler_words("x = 'SLURM_JOB_ID'  # for Kubernetes\n") == ["kubernetes", "slurm"]
    assert scheduler_words("k8s = 1") == ["k8s"]
    assert scheduler_words("# any batch scheduler") == []


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("f'--gres=gpu:1 --cpus-per-task=8'", ["--cpus-per-task", "--gres"]),
        ("f'--mem={gib}G --tmp={gib}G'", ["--mem", "--tmp"]),
        ("call(['srun', '--ntasks', '1'])", ["--ntasks", "srun"]),
        ("{'nvidia.com/gpu': 1}", ["nvidia.com/"]),
        ("f'memory: {gib}Gi'", ["gi"]),
        ("limit = '500Mi'", ["mi"]),
        ("f'ephemeral-storage: {gib}'", ["ephemeral-storage"]),
        ("{'apiVersion': 'batch/v1'}", ["apiversion"]),
        ("'--gpu-memory 24 --gpu h100'  # 80 GiB, 4 MiB; https://nvidia.com/a, docs.nvidia.com/b", []),
    ],
)
def test_scheduler_syntax_is_seen_and_ours_is_let_through(source, seen):
    assert scheduler_words(source) == seen


def test_a_module_without_a_floor_is_seen():
    assert without_floor(["job.helpers", "job.tune.extra", "job.edge.store.s3.store"]) == [
        "job.helpers in the house",
        "job.tune.extra in job.tune",
    ]
    assert (
        floor_of("job.core.plan.course")
        > floor_of("job.edge.store.s3.store")
        > floor_of("job.commands.run")
        > floor_of("job.cli")
    )
    assert floor_of("job.tune.data.frame", "job.tune") > floor_of("job.tune.loop.step", "job.tune")


def test_a_crowded_room_is_seen():
    assert crowded({"job/render": 15, "job/kernels": 40, "job/tune/loop": 14}) == ["job/render"]


def test_a_computed_import_is_seen():
    assert "<computed>" in imports("job.commands.run", "import importlib\nimportlib.import_module(name)")


def test_what_is_loaded_is_seen():
    ended, roots = loaded_by("import numpy\nraise SystemExit(3)")

    assert ended == 3
    assert "numpy" in roots
