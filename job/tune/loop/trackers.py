"""TensorBoard, MLflow and W&B, each through its own library: one run in them over all attempts."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

Ended = Literal["finished", "stopped", "failed"]
"""Whether the run is done, will go on, or this attempt could not."""
_MOST_METRICS = 900
"""In one request to MLflow, which takes a thousand."""
LastStep = Callable[[str], int]
"""The last step of which a tracker has the number of this name; -1: none."""
_WANDB_SECONDS = 10.0
"""How long W&B may take to begin, and to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """Numbers of one step."""

    step: int
    time: float
    """Unix seconds."""
    numbers: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """What a tracker begins with, or goes on with."""

    key: str
    """The same for each attempt at the run, and for no other run."""
    name: str
    uri: str
    project: str
    folder: Path
    """This attempt's own, for what a tracker writes on this machine."""
    facts: Mapping[str, str | int | float]
    """The recipe, flat."""
    history: Sequence[Values]
    """What earlier attempts have made of it, in the order of the steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conclusion:
    """What came of the run."""

    step: int
    """The last one."""
    figures: Mapping[str, float]
    verdict: str
    page: Path
    """The report's page, on this machine."""


class Tracker(Protocol):
    """One of them. It may raise whatever it likes, and take as long: who calls it is prepared for both."""

    name: ClassVar[str]
    children: ClassVar[tuple[str, ...]]
    """Programs that it starts, which would keep this process from ending while they wait for its server."""

    def open(self, run: TrackedRun) -> LastStep:
        """Begin the tracked run, or go on with that of an earlier attempt; returns what it has of it."""

    def log(self, batch: Sequence[Values]) -> None:
        """Send numbers, in the order of their steps."""

    def conclude(self, conclusion: Conclusion) -> None:
        """Send what came of it."""

    def close(self, ended: Ended) -> None:
        """End this attempt's part."""


class TensorBoard:
    """Event files; those of all attempts are one run to it once they lie in one folder."""

    name: ClassVar[str] = "tensorboard"
    children: ClassVar[tuple[str, ...]] = ()

    def open(self, run: TrackedRun) -> LastStep:
        """See `Tracker`. Files of earlier attempts may be elsewhere: this one's hides what they hold, and has all."""
        from torch.utils.tensorboard.writer import SummaryWriter

        self._uri = run.uri
        self._writer: Any = SummaryWriter(run.folder / self.name, purge_step=0 if run.history else None)
        rows = [f"| {name} | {_cell(value)} |" for name, value in run.facts.items()]
        self._writer.add_text("recipe", "\n".join(["| | |", "|---|---|", *rows]), 0)
        self._writer.flush()
        return lambda _name: -1

    def log(self, batch: Sequence[Values]) -> None:
        """See `Tracker`."""
        for values in batch:
            for name, number in values.numbers.items():
                self._writer.add_scalar(name, number, values.step, values.time)
        self._writer.flush()

    def conclude(self, conclusion: Conclusion) -> None:
        """See `Tracker`. It shows no pages, so it names where the page is."""
        for name, number in conclusion.figures.items():
            self._writer.add_scalar(name, number, conclusion.step)
        self._writer.add_text("verdict", _cell(conclusion.verdict), conclusion.step)
        self._writer.add_text("page", _cell(f"{self._uri}/report.html"), conclusion.step)
        self._writer.flush()

    def close(self, ended: Ended) -> None:  # noqa: ARG002 - an event file knows no end
        """See `Tracker`."""
        self._writer.close()


class MLflow:
    """A tracking server, named by MLFLOW_TRACKING_URI."""

    name: ClassVar[str] = "mlflow"
    children: ClassVar[tuple[str, ...]] = ()
    _KEY = "qlora_job.key"
    _STATUS: ClassVar[dict[Ended, str]] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}

    def open(self, run: TrackedRun) -> LastStep:
        """See `Tracker`."""
        import mlflow
        from mlflow.entities import Param

        if not mlflow.is_tracking_uri_set():
            raise RuntimeError("MLFLOW_TRACKING_URI is not set, and what is written into a folder here would be lost")
        self._client: Any = mlflow.MlflowClient()
        experiment = self._client.get_experiment_by_name(run.project)
        where = experiment.experiment_id if experiment else self._client.create_experiment(run.project)
        found = self._client.search_runs([where], f"tags.`{self._KEY}` = '{run.key}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return self._last_step
        tags = {self._KEY: run.key, "run_uri": run.uri}
        self._id = self._client.create_run(where, run_name=run.name, tags=tags).info.run_id
        facts = [*run.facts.items()]
        for start in range(0, len(facts), 100):  # as many as it takes at once
            params = [Param(name, str(value)) for name, value in facts[start : start + 100]]
            self._client.log_batch(self._id, params=params)
        return lambda _name: -1

    def _last_step(self, name: str) -> int:
        return max((each.step for each in self._client.get_metric_history(self._id, name)), default=-1)

    def log(self, batch: Sequence[Values]) -> None:
        """See `Tracker`."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, number, int(values.time * 1000), values.step)
            for values in batch
            for name, number in values.numbers.items()
        ]
        for start in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + _MOST_METRICS])

    def conclude(self, conclusion: Conclusion) -> None:
        """See `Tracker`. The note is what its page of the run shows on top."""
        self.log([Values(step=conclusion.step, time=time.time(), numbers=conclusion.figures)])
        for name in ("verdict", "mlflow.note.content"):
            self._client.set_tag(self._id, name, conclusion.verdict)
        self._client.log_artifact(self._id, str(conclusion.page))

    def close(self, ended: Ended) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._id, status=self._STATUS[ended])


class Wandb:
    """W&B's server, or with WANDB_MODE=offline a folder that `wandb sync` sends later."""

    name: ClassVar[str] = "wandb"
    children: ClassVar[tuple[str, ...]] = ("wandb-core",)

    def open(self, run: TrackedRun) -> LastStep:
        """See `Tracker`. It keeps to its folder, prints nothing, and reads no command line: that may hold a token."""
        import wandb

        wanted = {
            "silent": True,
            "console": "off",
            "save_code": False,
            "disable_git": True,
            "disable_job_creation": True,
            "x_disable_meta": True,
            "x_save_requirements": False,
            "init_timeout": _WANDB_SECONDS,
            "finish_timeout": _WANDB_SECONDS,
            "finish_timeout_raises": True,
        }
        known = wandb.Settings.model_fields
        settings = wandb.Settings(**{name: value for name, value in wanted.items() if name in known})
        run.folder.mkdir(parents=True, exist_ok=True)
        self._run: Any = wandb.init(
            project=run.project,
            id=run.key,
            name=run.name,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.facts) | {"run_uri": run.uri},
            settings=settings,
        )
        next_step = int(self._run.step)
        return lambda _name: next_step - 1

    def log(self, batch: Sequence[Values]) -> None:
        """See `Tracker`. Of steps that are made again after a kill it keeps what it has."""
        for values in batch:
            self._run.log(dict(values.numbers), step=values.step)

    def conclude(self, conclusion: Conclusion) -> None:
        """See `Tracker`."""
        import wandb

        page = wandb.Html(str(conclusion.page), inject=False)
        self._run.log({**conclusion.figures, "report": page}, step=conclusion.step)
        self._run.summary["verdict"] = conclusion.verdict

    def close(self, ended: Ended) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=int(ended == "failed"))


TRACKERS: dict[str, Callable[[], Tracker]] = {each.name: each for each in (TensorBoard, MLflow, Wandb)}
"""By the names that recipes have for them."""


def _cell(value: object) -> str:
    """A value in a table that is shown as Markdown."""
    return "`" + str(value).replace("`", "'").replace("|", r"\|").replace("\n", " ") + "`"
