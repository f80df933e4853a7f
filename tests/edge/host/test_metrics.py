"""The metrics file: as the documented text format has it, whole at each moment, and never the job's trouble."""

import math
import re
import threading

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from job.edge.host.metrics import MetricsFile, _escaped, _number
from job.edge.host.outcome import Outcome

# https://prometheus.io/docs/instrumenting/exposition_formats/ "Text format details"
NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\\\|\\"|\\n)*"'
NUMBER = r"(?:[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|NaN|[-+]Inf)"
SAMPLE = re.compile(rf"({NAME})(?:\{{({LABEL}(?:,{LABEL})*)?\}})? ({NUMBER})")
HELP = re.compile(rf"# HELP ({NAME}) ((?:[^\\\n]|\\\\|\\n)+)")
TYPE = re.compile(rf"# TYPE ({NAME}) (counter|gauge|histogram|summary|untyped)")
UNESCAPED = {r"\\": "\\", r"\"": '"', r"\n": "\n"}


def parsed(text):
    """Metric -> its labels and value; every line is as the format has it, and a metric's lines stand together."""
    assert text.endswith("\n")  # "the last line must end with a line feed character"
    found = {}
    lines = iter(text[:-1].split("\n"))
    for line in lines:
        name = HELP.fullmatch(line)[1]
        assert name not in found
        assert TYPE.fullmatch(next(lines))[1] == name
        sample = SAMPLE.fullmatch(next(lines))
        assert sample[1] == name
        pairs = re.findall(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\\\|\\"|\\n)*)"', sample[2])
        labels = {key: re.sub(r"\\.", lambda each: UNESCAPED[each.group()], value) for key, value in pairs}
        found[name.removeprefix("qlora_job_")] = (labels, float(sample[3]))
    return found


def values(path):
    return {name: value for name, (_labels, value) in parsed(path.read_text(encoding="utf-8")).items()}


@pytest.fixture
def outcome(tmp_path):
    found = Outcome(None)
    found.follow(MetricsFile(tmp_path / "night.prom").write)
    return found


def test_it_says_how_the_job_stands_and_how_it_ended(tmp_path, outcome):
    outcome.progress(phase="encode")
    assert values(tmp_path / "night.prom").keys() == {"info", "running", "start_time_seconds"}

    outcome.safe(run_uri="s3://b/out/runs/r-1", last_committed_step=4)
    outcome.progress(phase="train", step=7, of=10, loss=1.5, eta_seconds=70.5, tokens_per_second=2048.0)
    found = values(tmp_path / "night.prom")
    assert found.items() >= {
        ("running", 1),
        ("step", 7),
        ("steps", 10),
        ("loss", 1.5),
        ("tokens_per_second", 2048),
        ("eta_seconds", 70.5),
        ("last_committed_step", 4),
    }
    assert found["start_time_seconds"] <= found["last_commit_time_seconds"]
    assert "exit_code" not in found

    outcome.end(code=83, again="yes", reason="r", last_committed_step=4, run_uri="s3://b/out/runs/r-1")
    ended = values(tmp_path / "night.prom")
    assert (ended["running"], ended["exit_code"], ended["loss"], ended["last_committed_step"]) == (0, 83, 1.5, 4)
    assert ended["last_commit_time_seconds"] == found["last_commit_time_seconds"]


def test_files_of_two_jobs_in_one_folder_name_their_series_apart(tmp_path):
    for name in ("a.prom", "b.prom"):
        MetricsFile(tmp_path / name).write({"state": "running", "step": 1, "run_uri": "s3://b/runs/r"})
    series = [
        (name, tuple(labels.items()))
        for path in sorted(tmp_path.iterdir())
        for name, (labels, _value) in parsed(path.read_text()).items()
    ]

    assert len(series) == len(set(series)) > 0
    assert dict(dict(series)["info"])["run_id"] == "r"


def test_only_a_whole_file_ever_stands_there_and_nothing_else_that_would_be_collected(tmp_path):
    metrics, over, seen = MetricsFile(tmp_path / "x.prom"), threading.Event(), []

    def read():
        while not over.is_set():
            for path in tmp_path.glob("*.prom"):
                seen.append(path.name)
                parsed(path.read_text())

    metrics.write({"state": "running", "step": 0})
    reader = threading.Thread(target=read)
    reader.start()
    for step in range(200):
        metrics.write({"state": "running", "step": step})
    over.set()
    reader.join()

    assert set(seen) == {"x.prom"}
    assert [path.name for path in tmp_path.iterdir()] == ["x.prom"]


def test_a_file_that_cannot_be_written_costs_one_warning(tmp_path):
    (tmp_path / "file").write_text("")
    metrics = MetricsFile(tmp_path / "file" / "x.prom")
    with structlog.testing.capture_logs() as said:
        for step in range(3):
            metrics.write({"state": "running", "step": step})

    assert [event["event"] for event in said] == ["metrics_not_written"]


@given(st.text())
def test_any_text_is_a_label_s_value(text):
    name, labels, value = "x", f'a="{_escaped(text)}"', "1"
    sample = SAMPLE.fullmatch(f"{name}{{{labels}}} {value}")
    assert sample is not None
    kept = re.sub(r"\\.", lambda each: UNESCAPED[each.group()], sample[2][3:-1])

    assert kept == text.encode("utf-8", "replace").decode()


@given(st.one_of(st.floats(), st.integers(min_value=0, max_value=10**12)))
def test_any_number_is_a_value(number):
    text = _number(number)

    assert re.fullmatch(NUMBER, text)
    assert float(text) == number or (math.isnan(number) and math.isnan(float(text)))
