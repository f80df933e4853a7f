"""Runs under attack: one output, any number of attempts, and what must hold between any two of them."""

import contextlib
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from chaos_attempts import Attempt, begin_command, begin_fork
from job_process import ROOT, environment_without_job
from warm_image import WarmImage

STEPS = 12
FILES = {"adapter_config.json", "adapter_model.safetensors", "evaluations.safetensors", "optimizer.safetensors"}
FILES |= {"random.safetensors", "state.json"}
"""What a checkpoint is made of."""
ENGINE = os.environ.get("CHAOS_ENGINE", "auto")
"""Which path trains: `auto` is the generic one on the CPU."""
SETTINGS = {"JOB_LEASE_SECONDS": "1", "JOB_GRACE_SECONDS": "600", "JOB_ENGINE": ENGINE, "OMP_WAIT_POLICY": "PASSIVE"}
"""A dead owner is soon replaced, and no stop is cut short because the machine is slow."""
_COMPARED = ("curve", "evaluations", "sweet_spot", "exact_match", "answers", "plan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A store, and where its objects stand on a disk: what is looked at there needs no server that lives."""

    uri: str
    folder: Path
    environment: Mapping[str, str]

    def below(self, name: str) -> "Place":
        return Place(uri=f"{self.uri}/{name}", folder=self.folder / name, environment=self.environment)

    @property
    def is_locked(self) -> bool:
        """Whether a writer is in the midst of a conditional write to the folder: frozen there, it shuts all out."""
        with contextlib.suppress(FileNotFoundError), (self.folder / ".store-lock").open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


def chaos_recipe(recipe: Mapping) -> dict:
    """A dozen steps with dropout; evaluated each 4, committed each 2: there is always something to lose.

    The adapter's matrices are as large as the optimizer's 8-bit states begin at: of smaller ones it keeps fp32.
    """
    return {
        **recipe,
        "lora": {**recipe["lora"], "r": 64, "alpha": 128},
        "train": {"steps": STEPS, "batch_size": 2, "learning_rate": 5e-3},
        "checkpoint": {"every_steps": 2, "keep": 2},
        "evaluate": {"every_steps": 4, "max_new_tokens": 4, "answers": 2, "prompts": ["12 red hats\n"]},
    }


class Run:
    """One output and the attempts at it, one after another or at once."""

    def __init__(self, folder: Path, place: Place, recipe: Mapping, image: WarmImage) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.place = place
        self._image = image
        self._recipe = folder / "recipe.yaml"
        self._recipe.write_text(yaml.safe_dump({**recipe, "output": place.uri}), encoding="utf-8")
        self._attempts = 0
        self._newest = -1
        self._report: bytes | None = None
        self.workdir = folder / "work-000"

    def begin(
        self, *options: str, cold: bool = False, fresh: bool = True, stdout: Path | None = None, **environment: str
    ) -> Attempt:
        """Start an attempt; `cold`: by the real command; `fresh`: on an empty disk; `stdout`: where a fork's goes."""
        self._attempts += 1
        folder = self.folder / f"{self._attempts:03d}"
        folder.mkdir()
        if fresh:
            self.workdir = self.folder / f"work-{self._attempts:03d}"
        arguments = ["run", str(self._recipe), "--workdir", str(self.workdir), "--device", "cpu"]
        arguments += ["--outcome-file", str(folder / "outcome.json"), *options]
        surroundings = environment_without_job({**SETTINGS, **self.place.environment, **environment})
        if cold:
            command = [sys.executable, str(ROOT / "entrypoint.py"), *arguments]
            return begin_command(command, environment=surroundings, folder=folder)
        return begin_fork(self._image, arguments, environment=surroundings, folder=folder, stdout=stdout)

    # --- what stands in the store -------------------------------------------------------------------------------------

    @property
    def stored(self) -> Path:
        """The run's folder in the store; there is never more than one."""
        found = [*self.place.folder.glob("runs/*")]
        assert len(found) <= 1, found
        return found[0] if found else self.place.folder / "runs" / "none"

    def committed(self) -> set[str]:
        return {path.parent.name for path in self.stored.glob("checkpoints/*/MANIFEST.json")}

    def newest(self) -> int:
        """The newest committed step; -1: none."""
        return max((step_of(name) for name in self.committed()), default=-1)

    def begun(self) -> dict[str, set[str]]:
        """Checkpoints with anything in the store, and their files."""
        return {
            folder.name: {path.name for path in folder.iterdir() if _is_object(path)}
            for folder in self.stored.glob("checkpoints/*")
            if folder.is_dir()
        }

    def read(self, name: str) -> bytes | None:
        try:
            return (self.stored / name).read_bytes()
        except FileNotFoundError:
            return None

    def read_json(self, name: str) -> dict:
        return json.loads((self.stored / name).read_text())

    def content(self) -> dict[str, str]:
        """Key -> sha256 of everything in the run."""
        paths = [path for path in self.stored.rglob("*") if path.is_file() and _is_object(path)]
        return {str(path.relative_to(self.stored)): _sha256(path) for path in paths}

    # --- what stands on the attempt's disk ----------------------------------------------------------------------------

    def parcels(self, attempt: Attempt) -> list[Path]:
        """The attempt's own checkpoints that lie on its disk, half or wholly saved."""
        begun = attempt.named("attempt")
        number = f"a{begun[-1]['number']:02d}" if begun else "none"
        return [*self.workdir.glob(f"runs/*/checkpoints/{number}/step-*-{number}")]

    # --- what must hold ----------------------------------------------------------------------------------------------

    def look(self, attempt: Attempt, before: set[str]) -> None:
        """After an attempt's end: nothing committed is lost, nothing uncommitted was resumed from, one report.

        Args:
            attempt: which has ended.
            before: the checkpoints that were committed when it began.
        """
        for event in attempt.named("resumed"):
            assert event["checkpoint"] in before, self._message(attempt, f"resumed from {event}, committed: {before}")
            newest = max(map(step_of, before))
            assert event["step"] == newest, self._message(attempt, f"resumed at {event['step']}, committed: {newest}")
        if attempt.named("step") and not attempt.named("resumed"):
            assert not before, self._message(attempt, f"began anew, committed: {before}")
        for event in attempt.named("checkpoint_passed_over"):
            assert event["checkpoint"] not in before, self._message(attempt, f"passed over although committed: {event}")
        told = max((event["step"] for event in attempt.named("checkpoint")), default=-1)
        newest = self.newest()
        assert newest >= told, self._message(attempt, f"told of step {told} as committed, {newest} is in the store")
        assert newest >= self._newest, self._message(attempt, f"step {self._newest} was committed, {newest} is left")
        self._newest = newest
        report = self.read("report.json")
        if self._report is not None:
            assert report == self._report, self._message(attempt, "the report was changed")
        self._report = report

    def carried_on(self, reference: "Run") -> Attempt:
        """The next attempt brings the run to its end, and nothing is lost."""
        before = self.committed()
        attempt = self.begin()
        code = attempt.wait()
        self.look(attempt, before)
        assert code == 0, attempt.told()
        self.same_result(reference, attempt)
        return attempt

    def same_result(self, reference: "Run", attempt: Attempt) -> None:
        """The run is done, and to the bit what the undisturbed one is."""
        numbers, expected = self.numbers(), reference.numbers()
        for name, value in expected.items():
            assert numbers[name] == value, self._message(attempt, f"{name}: {numbers[name]}, undisturbed {value}")

    def numbers(self) -> dict:
        report = self.read_json("report.json")
        files = {name: _sha256(self.stored / "adapter" / name) for name in report["adapter"]["files"]}
        assert files == {name: entry["sha256"] for name, entry in report["adapter"]["files"].items()}
        kept = ("adapter_model.safetensors", "adapter_config.json")  # README.md names the run's place
        return {
            **{name: report[name] for name in _COMPARED},
            **{name: files[name] for name in kept},
            "proven_loss": report["adapter"]["proven_loss"],
            "resume_exact": report["resume_exact"],
        }

    def _message(self, attempt: Attempt, what: str) -> str:
        return f"{self.folder.name}, {attempt.folder}: {what}\n{attempt.told()}"


def step_of(name: str) -> int:
    """step-000004-a02 -> 4."""
    return int(name.split("-")[1])


def in_order(names: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda name: (int(name.rpartition("-a")[2]), step_of(name)))


def _is_object(path: Path) -> bool:
    """Not the server's or the folder store's own."""
    return not path.name.endswith((".meta.json", ".tmp")) and not path.name.startswith(".")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def processors() -> int:
    return len(os.sched_getaffinity(0))
