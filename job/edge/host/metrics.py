"""The metrics file: how the job stands, in Prometheus' text format, for an exporter that collects such files."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from job import __version__
from job.edge.host.outcome import replace_file

log = structlog.get_logger(__name__)
_GAUGES = (
    ("step", "step", "Last optimizer step whose numbers are known."),
    ("steps", "of", "Optimizer steps of the run."),
    ("loss", "loss", "Training loss, in nats a token."),
    ("tokens_per_second", "tokens_per_second", "Real tokens a second, in training."),
    ("eta_seconds", "eta_seconds", "Seconds until the last step, as it looks now."),
    ("last_committed_step", "last_committed_step", "Newest step whose checkpoint is in the store."),
    ("exit_code", "code", "Exit code of an attempt that has ended."),
)
"""Name, key in the outcome file, help."""


class MetricsFile:
    """Writes the file, always as a whole: who reads it finds the old or the new one.

    Each series is named by the file's own name, so that files of several jobs may stand in one folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._started = time.time()
        self._known: dict[str, Any] = {}
        """What was said last: an end names no loss, and no speed."""
        self._committed_at: float | None = None
        self._warned = False

    def write(self, values: Mapping[str, Any]) -> None:
        """Say what the outcome file says; a file that cannot be written costs one warning and never the job."""
        said = {key: value for key, value in values.items() if value is not None}
        if said.get("last_committed_step") not in (None, self._known.get("last_committed_step")):
            self._committed_at = time.time()
        self._known |= said
        try:
            replace_file(self._path, self._text(ended=values.get("state") == "ended").encode())
        except OSError as error:
            if not self._warned:
                log.warning("metrics_not_written", path=str(self._path), reason=str(error))
            self._warned = True

    def _text(self, *, ended: bool) -> str:
        labels = {"name": self._path.stem}
        info = {**labels, "version": __version__, "run_id": str(self._known.get("run_uri", "")).rpartition("/")[2]}
        lines = _sample("info", "Which run it is; always 1.", info, 1)
        lines += _sample("running", "1 while an attempt is at work, 0 once it has ended.", labels, int(not ended))
        lines += _sample("start_time_seconds", "When the attempt began, in Unix time.", labels, self._started)
        if self._committed_at is not None:
            what = "When this attempt last found a new checkpoint committed, in Unix time."
            lines += _sample("last_commit_time_seconds", what, labels, self._committed_at)
        for name, key, what in _GAUGES:
            value = self._known.get(key)
            if isinstance(value, int | float):
                lines += _sample(name, what, labels, value)
        return "\n".join([*lines, ""])


def _sample(name: str, what: str, labels: Mapping[str, str], value: float) -> list[str]:
    """One gauge with its help and type."""
    full = f"qlora_job_{name}"
    named = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
    return [f"# HELP {full} {what}", f"# TYPE {full} gauge", f"{full}{{{named}}} {_number(value)}"]


def _number(value: float) -> str:
    """As Go's ParseFloat reads it."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(value)


def _escaped(text: str) -> str:
    # Names of files may be any bytes; the format is UTF-8.
    text = text.encode("utf-8", "replace").decode()
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
