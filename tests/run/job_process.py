"""The job as an operator starts it: a recipe, a file:// store, a process of its own, from a warm image or cold."""

import contextlib
import io
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog
import yaml
from warm_image import PAGE_BYTES, PATIENCE_SECONDS, Forked, WarmImage

from job.cli import main
from job.edge.host.interrupt import Interrupt

ROOT = Path(__file__).parents[2]
LEASE_SECONDS = "2"
"""A killed attempt holds the run no longer; here nobody works beside another one unless a test says so."""
COLOURS = ("red", "blue", "green", "black", "white", "brown")


def records(count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Questions with answers that a tiny model can begin to learn."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        colour, number = draw.choice(COLOURS), draw.randrange(10, 99)
        rows.append({"question": f"{number} {colour} hats", "answer": f"{colour} {number}"})
    return rows


def write_lines(path: Path, rows: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A process that has ended."""

    code: int
    stdout: str
    stderr: str
    outcome: dict

    @property
    def events(self) -> list[dict]:
        """The JSON lines."""
        return [json.loads(line) for line in self.stdout.splitlines()]

    def named(self, event: str) -> list[dict]:
        return [e for e in self.events if e["event"] == event]

    def phases(self) -> list[str]:
        return [e["name"] for e in self.named("phase")]


class Job:
    """One recipe, one store and one work folder; every start is a new process.

    With an image it is forked from there, unless a test wants it cold: `python entrypoint.py`, as an operator types it.
    """

    def __init__(self, folder: Path, base: Path, image: WarmImage | None = None) -> None:
        self.folder = folder
        self._image = image
        self.data = folder / "data"
        self.store = folder / "store"
        self.workdir = folder / "work"
        self.recipe_path = folder / "recipe.yaml"
        write_lines(self.data / "train.jsonl", records(24))
        write_lines(self.data / "validation.jsonl", records(6, seed=1))
        self.recipe = {
            "model": {"base": str(base)},
            "data": {
                "train": f"file://{self.data}/train*.jsonl",
                "validation": f"file://{self.data}/validation.jsonl",
                "prompt": "{question}\n",
                "completion": "{answer}",
            },
            "lora": {"r": 4, "alpha": 8, "dropout": 0.1, "targets": ["q_proj", "v_proj", "lm_head"]},
            "train": {"steps": 6, "batch_size": 2, "learning_rate": 5e-3},
            "checkpoint": {"every_steps": 2, "keep": 3},
            "evaluate": {"every_steps": 3, "max_new_tokens": 4, "answers": 2, "prompts": ["12 red hats\n"]},
            "output": f"file://{self.store}",
        }

    def write(self) -> Path:
        # As a whole: of several that begin at once, one reads while the next one's is written.
        whole = self.recipe_path.with_name(f".recipe-{threading.get_ident()}.yaml")
        whole.write_text(yaml.safe_dump(self.recipe), encoding="utf-8")
        return whole.replace(self.recipe_path)

    def command(self, name: str, *options: str) -> list[str]:
        """`run`, `check` or `fetch` on the recipe."""
        places = ["--workdir", str(self.workdir), "--device", "cpu", "--outcome-file", str(self.outcome_file)]
        return [sys.executable, str(ROOT / "entrypoint.py"), name, str(self.write()), *places, *options]

    def start(self, name: str, *options: str, cold: bool = False, **environment: str) -> Ended:
        """Run it to its end."""
        with self.begun(name, *options, cold=cold, **environment) as running:
            return running.end()

    @contextmanager
    def begun(
        self, name: str, *options: str, cold: bool = False, forget: Collection[str] = (), **environment: str
    ) -> "Iterator[Running]":
        """Start it and go on; whatever happens, it does not outlive the block."""
        image = None if cold else self._image
        command = self.command(name, *options)
        with process(command, cwd=self.folder, environment=environment, image=image, forget=forget) as running:
            running.outcome_file = self.outcome_file
            yield running

    @property
    def outcome_file(self) -> Path:
        return self.folder / "outcome.json"

    def call(self, name: str, *options: str, stop_in: str | None = None) -> Ended:
        """As `start`, in this process; `stop_in`: asked to stop in this phase."""
        self.outcome_file.unlink(missing_ok=True)
        interrupt = StopIn(stop_in, self.outcome_file) if stop_in else None
        return call(*self.command(name, *options)[2:], interrupt=interrupt, outcome_file=self.outcome_file)

    def runs(self) -> list[Path]:
        folder = self.store / "runs"
        return sorted(folder.iterdir()) if folder.is_dir() else []

    def only_run(self) -> Path:
        (run,) = self.runs()
        return run

    def report(self) -> dict:
        return json.loads((self.only_run() / "report.json").read_text())


class Running:
    """A process under way. Its output comes through a pipe of a dozen lines: while nobody reads it cannot run far."""

    def __init__(self, child: subprocess.Popen | Forked, err: Path) -> None:
        self.child = child
        self.outcome_file: Path | None = None
        self._lines: list[str] = []
        self._err = err

    def until(self, seen: Callable[[dict], bool]) -> dict:
        """Read on to the first event that satisfies a condition."""
        for line in self.child.stdout:
            self._lines.append(line)
            event = json.loads(line)
            if seen(event):
                return event
        raise AssertionError(f"not seen (exit {self.child.wait()}):\n{''.join(self._lines)}\n{self._err.read_text()}")

    def end(self) -> Ended:
        watchdog = threading.Timer(PATIENCE_SECONDS, self.child.kill)
        watchdog.start()
        self._lines += self.child.stdout
        code = self.child.wait()
        watchdog.cancel()
        file = self.outcome_file
        outcome = json.loads(file.read_text()) if file and file.exists() else {}
        return Ended(code=code, stdout="".join(self._lines), stderr=self._err.read_text(), outcome=outcome)


def environment_without_job(extra: Mapping[str, str]) -> dict[str, str]:
    """Ours, without what would steer the job; one thread, as the machine is shared."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JOB_", "PYTEST"))}
    ours = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "JOB_LEASE_SECONDS": LEASE_SECONDS}
    return kept | ours | dict(extra)


def call(*arguments: str, interrupt: Callable[[], bool] | None = None, outcome_file: Path | None = None) -> Ended:
    """The same command line in this process, where the libraries are loaded already."""
    out, err = io.StringIO(), io.StringIO()
    structlog.contextvars.clear_contextvars()
    before = sys.argv
    sys.argv = ["entrypoint.py", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(interrupt or Interrupt())
    finally:
        sys.argv = before
    outcome = json.loads(outcome_file.read_text()) if outcome_file and outcome_file.exists() else {}
    return Ended(code=code, stdout=out.getvalue(), stderr=err.getvalue(), outcome=outcome)


class StopIn(Interrupt):
    """Asks to stop as soon as the outcome file tells of a phase, or of one of several: `a|b`."""

    def __init__(self, phase: str, outcome_file: Path) -> None:
        super().__init__()
        self._phases, self._file = phase.split("|"), outcome_file

    def __call__(self) -> bool:
        return self._file.exists() and json.loads(self._file.read_text()).get("phase") in self._phases


@contextmanager
def process(
    command: Sequence[str],
    *,
    cwd: Path,
    environment: Mapping[str, str],
    image: WarmImage | None = None,
    forget: Collection[str] = (),
) -> Iterator[Running]:
    """A command under way: `python entrypoint.py ...`; with an image a fork that does the same.

    Args:
        command: word by word.
        cwd: where it is begun, and where its errors are kept.
        environment: besides our own.
        image: None: the real command.
        forget: packages that a fork imports anew.
    """
    err = cwd / f"process-{len(list(cwd.glob('process-*.err')))}.err"
    environment = environment_without_job(environment)
    with err.open("wb") as stderr:
        if image is None:
            child = subprocess.Popen(
                command,
                env=environment,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                pipesize=PAGE_BYTES,
            )
        else:
            child = image.begin(
                command[2:], environment=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=stderr, forget=forget
            )
    try:
        yield Running(child, err)
    finally:
        child.kill()
        child.stdout.close()
        child.wait()


def objects(folder: Path) -> list[str]:
    """What a store holds, as its keys; its own lock file is none."""
    return sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != ".store-lock"
    )
