"""preview: examples as they are learned, before there is a GPU; check and the report show them too."""

import re
import subprocess
import sys

import pytest
from job_process import ROOT, environment_without_job, write_lines
from terminals import terminal

from job.core.lines import cells
from job.core.reports.report import Report
from job.render.report_text import report_lines

PAINT = re.compile(r"\x1b\[[0-9;]*m")
WITHOUT_TORCH = (
    "import sys, entrypoint; from job.cli import main; from job.edge.host.interrupt import Interrupt;"
    "code = main(Interrupt()); print('torch' in sys.modules, file=sys.stderr); sys.exit(code)"
)


def previewed(job, *options, **environment):
    """The real command, and whether it loaded torch."""
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *job.command("preview", *options)[2:]],
        env=environment_without_job({"JOB_LOG_FORMAT": "console", **environment}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout, ended.stderr.split()[-1] == "True"


def test_what_is_learned_is_shown_without_torch_and_without_weights(job, tmp_path):
    rows = [{"question": "12 red </s>", "answer": "red 12"}, {"question": "13 hats " * 8, "answer": "blue"}]
    write_lines(job.data / "train.jsonl", [*rows, *[{"question": f"{n} hats", "answer": "red"} for n in range(20, 40)]])
    for weights in tmp_path.rglob("work/**/*.safetensors"):
        weights.unlink()
    text, loaded_torch = previewed(job, "--random", "3")
    lines = text.splitlines()

    assert not loaded_torch
    assert "\x1b" not in text
    assert re.fullmatch(r"train.jsonl:1  first of \S+  \d+ tokens, 3 learned", lines[lines.index("") + 3])
    assert re.search(r"«<s>» ?12 red ?«<unk>».*↵\n  \[learned\]·red 12 ?«</s>»\[/learned\]", text)
    assert text.count("</s>") == 6  # the one in a question is none
    assert [line.split("  ")[1].split()[0] for line in lines if line.startswith("train.jsonl:")] == [
        "first",
        "longest",
        "shortest",
        "random",
        "random",
        "random",
    ]
    assert not list(job.store.rglob("runs/*/*"))
    assert not list(job.workdir.glob("preview-*"))


def test_ids_name_every_token(job):
    text, _ = previewed(job, "--ids", "--random", "0")
    body = next(line for line in text.splitlines() if "[learned]" in line and "=" in line)
    assert body.startswith("  «<s>»=1 ")
    assert body.endswith(" «</s>»=2 [/learned]")
    assert len(re.findall(r"=\d+ ", body)) == 8


@pytest.mark.parametrize(
    ("environment", "painted"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({"CLICOLOR": "0"}, False)],
)
@pytest.mark.parametrize("columns", [80, 200])
def test_on_a_terminal_it_fits_and_is_painted_as_the_environment_wants(job, warm, environment, painted, columns):
    write_lines(job.data / "train.jsonl", [{"question": "12 red hats " * 12, "answer": "red"}] * 8)
    job.write()
    with terminal(columns) as shown:
        child = warm.begin(
            job.command("preview")[2:],
            environment=environment_without_job({"TERM": "xterm", **environment}),
            cwd=job.folder,
            stdout=shown.writer,
            stderr=shown.writer,
        )
        assert child.wait() == 0
        text = shown.text()
    assert ("\x1b[32m" in text) is painted
    assert ("[learned]" in text) is not painted
    assert max(cells(PAINT.sub("", line)) for line in text.split("\n")) <= columns


def test_colours_can_be_forced_where_there_is_no_terminal(job):
    assert "\x1b[32m" in previewed(job, CLICOLOR_FORCE="1")[0]


def test_what_a_run_would_refuse_of_the_data_is_refused(job):
    write_lines(job.data / "train.jsonl", [{"question": "12 red hats"}])
    ended = job.call("preview")
    assert ended.code == 65
    assert '"answer" is missing' in ended.outcome["reason"]


def test_a_border_within_a_word_is_refused_with_what_to_write(job):
    job.recipe["data"] |= {"prompt": "{question} re", "completion": "d {answer}"}
    for command in ("preview", "check"):
        ended = job.call(command)
        assert ended.code == 64
        assert "let data.prompt end with a whole word" in ended.outcome["reason"]


def test_check_shows_two_and_the_report_keeps_them(job, finished):
    told = job.call("check", "--quick").stdout
    assert len(re.findall(r"^ +train\.jsonl:\d+  (?:first|longest) of ", told, re.MULTILINE)) == 2
    assert "[learned]" in told

    report = Report.model_validate(finished[0].report())
    assert [each.shown for each in report.data.preview][:2] == ["first", "longest"]
    assert "".join(piece.text for piece in report.data.preview[0].pieces if piece.learned).endswith("</s>")
    assert any(line.endswith("«</s>»[/learned]") for line in report_lines(report))
