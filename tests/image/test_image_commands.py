"""Every `make image` of docs/image.md as it is typed, with a stand-in for docker that writes down what it is asked."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from typed_commands import blocks

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "image.md").read_text(encoding="utf-8")
TYPED = [line for block in blocks(PAGE) for line in block.splitlines() if line.startswith("make image")]
DOCKER = """#!/bin/bash
case $1 in
  version) echo 29 ;;
  build) printf '%s\\n' "$@" > "$ASKED" ;;
  history) printf '1.5MB|COPY /app /app\\n0B|CMD []\\n' ;;
  image) echo 1500000 ;;
esac
"""


@pytest.fixture
def asked(tmp_path):
    """What `docker build` gets when a line is typed."""
    program = tmp_path / "docker"
    program.write_text(DOCKER)
    program.chmod(0o755)
    variables = ("IMAGE", "BASE_IMAGE", "LOCK", "EXTRA_INDEX_URL", "SOURCE", "BUILDER", "BUILD_FLAGS")
    kept = {name: value for name, value in os.environ.items() if name not in variables and not name.startswith("MAKE")}

    def words(line):
        environment = kept | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ASKED": str(tmp_path / "asked")}
        done = subprocess.run(
            ["bash", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "0.00 GB  in all" in done.stdout
        return (tmp_path / "asked").read_text().splitlines()

    return words


@pytest.mark.parametrize("line", TYPED)
def test_what_is_typed_reaches_the_builder(asked, line):
    """Each variable of the line, and the words of BUILD_FLAGS one by one."""
    words = asked(line)
    given = dict(re.findall(r"\b(BASE_IMAGE|LOCK|EXTRA_INDEX_URL)=(\S+)", line))
    (flags,) = re.findall(r"BUILD_FLAGS='(.*?)'", line) or [""]
    (image,) = re.findall(r"(?<!_)IMAGE=(\S+)", line) or ["qlora-job"]

    assert words[words.index("--tag") + 1] == image
    assert [f"{name}={value}" for name, value in given.items() if f"{name}={value}" not in words] == []
    assert words[-1 - len(flags.split()) : -1] == flags.split()
    assert words[-1] == "."


def test_there_are_lines_and_one_hands_secrets_on(asked):
    assert len(TYPED) >= 3
    (line,) = [each for each in TYPED if "--secret" in each]
    mounted = dict(re.findall(r"id=([\w.]+),target=(\S+)", (ROOT / "Dockerfile").read_text()))
    named = dict(re.findall(r"id=([\w.]+),src=([^\s']+)", line))

    assert named.keys() == mounted.keys()
    assert f"`cert = {mounted['ca.crt']}`" in PAGE
    assert [word for word in asked(line) if word.startswith("id=")] == [f"id={i},src={s}" for i, s in named.items()]
