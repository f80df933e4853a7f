"""Log events as a container, a terminal and the libraries make them."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from terminals import lines_seen, too_wide

from job.edge.host.logs import HIDDEN, redact

ROOT = Path(__file__).parents[3]
START = """
import logging, sys, warnings
import structlog
from job.edge.host.logs import bind, configure, quiet_libraries
log = structlog.get_logger()
"""


def run(script: str, *, tty: bool = False) -> str:
    """What a process that runs the script writes to stdout and stderr, the first of them a terminal or a pipe."""
    command = [sys.executable, "-c", START + script]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    if not tty:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, env=env, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        output = b""
        try:
            while chunk := os.read(ours, 65536):
                output += chunk
        except OSError:
            pass  # the way a pseudo-terminal says that the other end is closed
        os.close(ours)
    assert process.returncode == 0, output
    return output.decode().replace("\r\n", "\n")


def events(script: str) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in run(script).splitlines()]


def test_a_pipe_gets_one_json_object_a_line_with_time_level_and_what_was_bound():
    (event,) = events('configure(secrets=[]); bind(run_id="r1", attempt=2); log.info("step", step=1, loss=0.5)')

    assert event.pop("timestamp").endswith("Z")
    assert event == {"level": "info", "event": "step", "step": 1, "loss": 0.5, "run_id": "r1", "attempt": 2}


def test_an_exception_is_one_json_field_with_its_cause_and_without_local_variables():
    (event,) = events("""
configure(secrets=[])
def inner():
    local_password_like = "do not show locals"
    raise ValueError("bad")
try:
    try: inner()
    except ValueError as error: raise RuntimeError("worse") from error
except RuntimeError:
    log.exception("failed")
""")

    assert event["level"] == "error"
    assert [each["exc_type"] for each in event["exception"]] == ["RuntimeError", "ValueError"]
    assert event["exception"][1]["frames"][-1]["name"] == "inner"
    assert "do not show locals" not in json.dumps(event)


def test_values_that_json_does_not_know_still_make_valid_json():
    (event,) = events("""
import numpy, pathlib
configure(secrets=[])
loop = []; loop.append(loop)
log.info("e", nan=float("nan"), half=numpy.float32(0.5), whole=numpy.int64(3), path=pathlib.Path("/a"), loop=loop,
         odd={(1, 2): {3}}, yes=True, text="\\udcff\\n")
""")

    assert {key: event[key] for key in ("nan", "half", "whole", "path", "odd", "yes")} == {
        "nan": "nan",
        "half": 0.5,
        "whole": 3,
        "path": "/a",
        "odd": {"(1, 2)": [3]},
        "yes": True,
    }


SECRETS = """
configure(secrets=["s3cret/Value+1", "s3cret/Value+1-longer", "tiny"], json={json})
bind(run_id="s3cret/Value+1")
class Odd:
    def __repr__(self): return "Odd s3cret/Value+1"
log.info("at s3cret/Value+1", deep={{"a": [("s3cret/Value+1-longer", b"s3cret/Value+1")]}}, odd=Odd(), word="tiny",
         quoted="https://x/?k=s3cret%2FValue%2B1", aws_secret_access_key="anything", tokens=5)
try: raise ValueError("s3cret/Value+1")
except ValueError as error:
    error.add_note("s3cret/Value+1")
    log.exception("failed")
logging.getLogger("botocore").error("denied for %s", "s3cret/Value+1")
warnings.warn("s3cret/Value+1")
"""


@pytest.mark.parametrize("as_json", [True, False])
def test_given_secrets_appear_nowhere(as_json):
    output = run(SECRETS.format(json=as_json))

    assert "s3cret" not in output
    assert "longer" not in output
    assert "anything" not in output
    assert "tiny" in output  # too short to be hidden without hiding common words
    assert output.count(HIDDEN) >= 8


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("GET https://b.s3/k?X-Amz-Credential=AK%2F1&X-Amz-Signature=0123abcd&x=1", ["AK%2F1", "0123abcd"]),
        ("x-amz-security-token=FwoGZX//abc==", ["FwoGZX"]),
        ("https://cdn/x?Expires=1&Signature=ab~cd-ef&Key-Pair-Id=K", ["ab~cd-ef"]),
        ("token hf_abcdefghijklmnopqrstuvwxyzABCDEFGH rejected", ["hf_abcdef"]),
        ("Authorization: Bearer abc.def-ghi_123", ["abc.def"]),
        (
            "AWS4-HMAC-SHA256 Credential=AKIA/2026/us/s3/aws4_request, SignedHeaders=host;x, Signature=deadbeef",
            ["AKIA", "deadbeef"],
        ),
        ("https://user:p%40ss:word@host/path", ["p%40ss", "word"]),
        ("redis://:p@ss@host", ["p@ss"]),
    ],
)
def test_what_looks_like_a_secret_is_hidden_and_the_rest_stays(text, hidden):
    shown = redact(text)

    assert HIDDEN in shown
    for secret in hidden:
        assert secret not in shown
    assert shown.split(HIDDEN)[0] == text[: len(shown.split(HIDDEN)[0])]


@pytest.mark.parametrize(
    "text",
    [
        "hf_hub_download and hf_transfer",
        "s3://bucket/runs/r1/checkpoints/step-000050-a01",
        "https://host:8443/path?a=b",
        "see https://host/a: mail someone@example.org",
        "design=1 config=2",
    ],
)
def test_what_is_no_secret_is_left_alone(text):
    assert redact(text) == text


def test_a_step_is_pleasant_to_follow_on_a_terminal():
    output = run(
        'configure(secrets=[], colours=True, in_place=False); bind(run_id="r1", attempt=1)\n'
        'log.info("step", step=20, of=500, loss=1.2341, tokens_per_second=2345.4, eta_seconds=750.9, lr=0.000025)\n'
        'log.info("saved", step=20, text="two words", evil="\\x1b[2J")',
        tty=True,
    )

    step, saved = output.splitlines()
    assert "step  20/500  loss 1.234  2,345 tok/s  eta 00:12:30" in step
    assert "lr=2.5e-05" in step
    assert "\x1b[1msaved\x1b[0m" in saved
    assert "step=20 text='two words' evil='\\x1b[2J'" in saved
    assert "r1" not in output


IN_PLACE = """
import contextlib
from job.edge.host.output import lasting_output
with lasting_output():
    configure(secrets=[], json={json})
    log.info("phase", name="train")
    for step in range(1, 201):
        log.info("step", step=step, of=200, loss=1.2341, tokens_per_second=2345.4, eta_seconds=750.9, grad_norm=0.12345)
    log.info("progress", evaluated=1, of=9)
    log.info("evaluation", step=200, loss=1.5, spent={{"encode": 5.0, "lock": 0.001, "self_test": 2}}, files=["a", "b"])
    log.info("step", step=1, of=2, loss=1.5)
    log.warning("odd", reason="a sentence that is so long that it does not fit into one line of any usual terminal")
"""


def test_on_a_terminal_steps_and_progress_stay_on_one_line_and_all_else_has_its_own():
    text = run(IN_PLACE.format(json=False), tty=True)
    seen = lines_seen(text)

    assert text.count("step ") >= 201
    assert too_wide(text, 80) == []
    assert [line[10:] for line in seen[:2]] == [
        "phase  name=train",
        "evaluation  step=200 loss=1.5 spent.encode=5 spent.self_test=2",
    ]
    assert seen[2].strip() == "spent.other=0.001 files=a,b"
    assert seen[3].startswith(f"{seen[3][:8]}  WARNING  odd  reason='a sentence")
    assert not any("step 1/2" in line or "progress" in line for line in seen)


def test_json_on_a_terminal_is_what_it_is_in_a_pipe():
    text = run(IN_PLACE.format(json=True), tty=True)

    assert [json.loads(line)["event"] for line in text.splitlines()].count("step") == 201
    assert "\x1b" not in text


def test_without_a_terminal_lines_for_people_have_no_colours():
    output = run('configure(secrets=[], json=False); log.warning("odd", why="x"); log.info("step", step=1, loss="nan")')

    assert "\x1b" not in output
    assert "WARNING  odd  why=x" in output
    assert "step 1  loss nan" in output


def test_a_text_of_several_lines_keeps_them_for_people():
    output = run(
        "configure(secrets=[], json=False)\n"
        'log.error("ended", exit_code=64, reason="two mistakes\\n  a.yaml:1: \'x\'\\n  \\x1b[2J", again="no")'
    )

    first, *rest = output.splitlines()
    assert first.endswith("ERROR  ended  exit_code=64 again=no")
    assert rest == ["  reason:", "    two mistakes", "      a.yaml:1: 'x'", "      \\x1b[2J"]


def test_a_libraries_warning_is_one_event_however_often_it_is_given():
    said = events("""
configure(secrets=[])
for _ in range(3):
    logging.getLogger("transformers.modeling_utils").warning("careful with %s", "this")
    logging.getLogger("botocore.client").info("chatter")
    warnings.warn("from python")
    warnings.warn("old name", DeprecationWarning)
    logging.getLogger("transformers").warning("`torch_dtype` is deprecated! Use `dtype` instead!")
logging.getLogger("urllib3").error("bad %d", "format")
""")

    assert [(each["event"], each["level"], each["logger"], each["text"]) for each in said] == [
        ("library_warning", "warning", "transformers.modeling_utils", "careful with this"),
        ("library_warning", "warning", "py.warnings", "from python"),
        ("library_warning", "error", "urllib3", "bad %d"),
    ]


def test_libraries_draw_no_bars_and_write_nothing_of_their_own():
    output = run("""
configure(secrets=[])
import huggingface_hub, transformers
from transformers.utils import logging as transformers_logging
quiet_libraries()
for _ in transformers_logging.tqdm(range(3)): pass
for _ in huggingface_hub.utils.tqdm(range(3)): pass
transformers_logging.get_logger("transformers.trainer").warning("once")
huggingface_hub.utils.logging.get_logger("huggingface_hub.x").warning("twice")
log.info("ours")
""")

    said = [json.loads(line) for line in output.splitlines()]
    assert [(each["event"], each.get("text")) for each in said] == [
        ("library_warning", "once"),
        ("library_warning", "twice"),
        ("ours", None),
    ]


def test_setting_logs_up_loads_no_heavy_library():
    output = run("""
configure(secrets=[])
quiet_libraries()
print(sorted({"torch", "transformers", "huggingface_hub", "numpy"} & set(sys.modules)))
""")

    assert output == "[]\n"
