"""The rooms and floors of design: imports point down, each effect has one owner, what need not load does not load."""

import ast
import functools
import re
import subprocess
import sys
import textwrap
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from job.cli import cli

ROOT = Path(__file__).parents[1]

FLOORS = (
    ("entrypoint",),
    ("job.cli",),
    ("job.run", "job.check", "job.ask", "job.fetch", "job.plan", "job.show"),
    ("job.stages", "job.stages.*"),
    ("job.tune", "job.tune.*", "job.edge", "job.edge.*"),
    ("job.engine", "job.engine.*"),
    ("job.core", "job.core.*"),
    ("job",),
)
"""From the front door down; a module imports its own floor and those below."""
STRANGERS = (("job.tune", "job.edge"),)
"""Rooms of one floor that never see each other."""
OWNERS = {
    "boto3": ("job.edge.s3*",),
    "botocore": ("job.edge.s3*",),
    "signal": ("job.edge.interrupt", "job.edge.crash_points"),
    "bitsandbytes": ("job.tune.model",),
    "click": ("job.cli",),
    "os.environ": ("job.cli",),
    "os.environb": ("job.cli",),
    "os.getenv": ("job.cli",),
    "os.putenv": ("job.cli",),
    "huggingface_hub": ("job.edge.*",),
    "matplotlib": ("job.edge.plots",),
    "pynvml": ("job.edge.gpu",),
    "triton": ("job.engine.attention_kernels", "job.engine.kernels", "job.engine.masked"),
}
"""Who alone may name a library or one of its parts."""
CORE_LIBRARIES = {"job", "numpy", "pydantic", "pydantic_core", "yaml"}
IMPURE = {
    *("asyncio", "io", "logging", "multiprocessing", "os", "pathlib", "random", "shutil", "signal", "socket"),
    *("subprocess", "sys", "tempfile", "threading", "time", "urllib"),
}
"""Parts of the standard library that what only decides has no use for."""
HEAVY = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")
SCHEDULER_WORDS = re.compile(r"slurm|sbatch|kubernetes|kubectl|k8s", re.IGNORECASE)


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


def floor_of(name):
    """Number of a module's floor, from the front door down; None: it has none."""
    return next((n for n, rooms in enumerate(FLOORS) if any(fnmatchcase(name, room) for room in rooms)), None)


def modules_imported(name, source, known):
    """Modules of ours that a module imports."""
    return {other for other in imports(name, source) if other in known and other not in {name, "job"}}


def wrong_ways(name, source, known):
    """Imports that point up, or into a room that must not be seen."""
    found = []
    for other in sorted(modules_imported(name, source, known)):
        if floor_of(other) < floor_of(name):
            found.append(f"{name} imports {other}, which lies above it")
        for pair in STRANGERS:
            for here, there in (pair, pair[::-1]):
                if within(name, here) and within(other, there):
                    found.append(f"{name} imports {other}: {here} and {there} never see each other")
    return found


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
    return sorted({found.group().lower() for found in SCHEDULER_WORDS.finditer(source)})


# --- the job keeps the rules -----------------------------------------------------------------------------------------


def test_every_module_has_a_floor():
    assert len(SOURCES) > 30
    assert [name for name in SOURCES if floor_of(name) is None] == []


@pytest.mark.parametrize("name", SOURCES)
def test_imports_point_down_and_tune_and_edge_never_see_each_other(name):
    assert wrong_ways(name, SOURCES[name], SOURCES) == []


@pytest.mark.parametrize("name", SOURCES)
def test_every_effect_has_one_owner(name):
    assert foreign_effects(name, SOURCES[name]) == []


@pytest.mark.parametrize("thing", ["boto3", "signal", "bitsandbytes", "click", "os.environ"])
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
    computing = {"torch", "peft", "accelerate", "bitsandbytes", "datasets"}

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


# --- the checkers see what they look for -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "source", "told"),
    [
        ("job.core.plan", "from job.edge import storage", "job.core.plan imports job.edge, which lies above it"),
        ("job.core.plan", "import job.cli", "job.core.plan imports job.cli, which lies above it"),
        ("job.core.plan", "def f():\n    from job.tune.loss import x", "imports job.tune.loss, which lies above it"),
        ("job.edge.s3", "def f():\n    from job.stages.attempt import Attempt", "which lies above it"),
        ("job.stages.finish", "from job.run import run", "job.stages.finish imports job.run, which lies above it"),
        ("job.run", "from job import cli", "job.run imports job.cli, which lies above it"),
        ("job.edge.s3", "from job.tune.model import load_base", "job.edge and job.tune never see each other"),
        ("job.tune.train", "from job.edge.logs import redact", "job.tune and job.edge never see each other"),
        ("job.tune.train", "class A:\n    def f(self):\n        import job.edge.storage", "never see each other"),
        ("job.tune.train", "import importlib\nimportlib.import_module('job.edge.storage')", "never see each other"),
        ("job.tune.train", "from ..edge import storage", "never see each other"),
    ],
)
def test_an_import_the_wrong_way_is_seen(name, source, told):
    assert any(told in line for line in wrong_ways(name, source, SOURCES))


def test_imports_the_right_way_are_let_through():
    assert wrong_ways("job.run", "from job.edge import logs\nfrom job.stages.attempt import Attempt", SOURCES) == []
    assert wrong_ways("job.tune.train", "from job.core.plan import pack\nimport torch", SOURCES) == []
    assert wrong_ways("job.ask", "from job.show import open_run", SOURCES) == []
    assert wrong_ways("job.cli", "from job import __version__", SOURCES) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("job.edge.artifacts", "import boto3"),
        ("job.edge.artifacts", "def f():\n    from botocore.exceptions import ClientError"),
        ("job.run", "import signal"),
        ("job.tune.train", "import bitsandbytes as bnb"),
        ("job.run", "from click import echo"),
        ("job.edge.logs", "import os\nvalue = os.environ['X']"),
        ("job.edge.logs", "import os\nvalue = os.environ.get('X')"),
        ("job.edge.logs", "from os import environ"),
        ("job.edge.logs", "import os\ndef f():\n    return os.getenv('X')"),
        ("job.stages.finish", "import huggingface_hub.constants"),
    ],
)
def test_an_effect_outside_its_owner_is_seen(name, source):
    assert len(foreign_effects(name, source)) == 1


def test_an_effect_inside_its_owner_is_let_through():
    assert foreign_effects("job.edge.s3_bucket", "import boto3\nfrom botocore.config import Config") == []
    assert foreign_effects("job.edge.interrupt", "import signal") == []
    assert foreign_effects("job.cli", "import os, click\nos.environ") == []
    assert foreign_effects("job.edge.hub", "import os\nos.path.join('a')\nfrom huggingface_hub import constants") == []


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
    assert impurities("job.core.plan", source) == told


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_scheduler_words_are_seen_in_any_case_and_anywhere():
    assert scheduler_words("x = 'SLURM_JOB_ID'  # for Kubernetes\n") == ["kubernetes", "slurm"]
    assert scheduler_words("k8s = 1") == ["k8s"]
    assert scheduler_words("# any batch scheduler") == []


def test_a_module_without_a_floor_is_seen():
    assert floor_of("job.helpers") is None
    assert floor_of("job.core.plan") > floor_of("job.edge.s3") > floor_of("job.run") > floor_of("job.cli")


def test_a_computed_import_is_seen():
    assert "<computed>" in imports("job.run", "import importlib\nimportlib.import_module(name)")


def test_what_is_loaded_is_seen():
    ended, roots = loaded_by("import numpy\nraise SystemExit(3)")

    assert ended == 3
    assert "numpy" in roots
