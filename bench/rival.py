"""Runs a rival's script and reads the line that it prints (`bench.rivals.timing`)."""

import json

from bench.measured import Measured
from bench.processes import NoResultError, run

_QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def measure(contestant, *, data, python, limit_seconds, folder):
    """One run of the script in a process of its own, by the interpreter that has the rivals.

    Raises:
        NoResultError: it failed, took too long, or printed no result.
    """
    folder.mkdir()
    command = [python, "-m", contestant.module, "--base", str(data.base), "--train", str(data.train)]
    command += ["--text", data.text, "--max-length", str(data.max_length)]
    command += ["--steps", str(contestant.steps), "--warm-up", str(contestant.warm_up), *contestant.arguments]
    output = run(
        command, limit_seconds=limit_seconds, log=folder / "process", environment=_QUIET | {"TMPDIR": str(folder)}
    )
    results = [line for line in output.splitlines() if line.startswith('{"seconds"')]
    if not results:
        raise NoResultError("ended well, but printed no result")
    return _read(json.loads(results[-1]))


def _read(found):
    seconds, tokens, together = found["seconds"], found["tokens"], found["steps_together"]
    if not seconds:
        raise NoResultError("no step after the warm-up")
    return Measured(
        rates=tuple(n / s for n, s in zip(tokens, seconds, strict=True)),
        steps=len(seconds) * together,
        tokens_per_step=sum(tokens) / len(tokens) / together,
        real_share=sum(tokens) / sum(found["padded_tokens"]),
        losses=tuple(found["losses"]),
        peak_bytes=found["peak_bytes"],
        adapter_parameters=found["adapter_parameters"],
        versions=found["versions"],
    )
