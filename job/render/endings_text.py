"""How the last jobs on an output ended, as text: when, with which code, why, and what to do."""

from collections.abc import Sequence

from job.core.attempt.ended import Ended, one_line

_REASON_LENGTH = 300
_NO_CODE = "killed"


def endings_lines(endings: Sequence[Ended]) -> list[str]:
    """The endings, in their order, below a heading; nothing where there are none."""
    lines = ["", "last endings, newest first:"] if endings else []
    for ended in endings:
        code = _NO_CODE if ended.code is None else str(ended.code)
        where = one_line(", ".join(_where(ended)), at_most=_REASON_LENGTH)
        lines += ["", f"  {one_line(ended.time, at_most=25)}  {code:<6}  {where}"]
        lines.append(f"    {one_line(ended.reason, at_most=_REASON_LENGTH)}")
        if ended.code != 0:
            lines.append(f"    to do: {one_line(ended.action, at_most=_REASON_LENGTH)}")
    return lines


def _where(ended: Ended) -> list[str]:
    """On which host, of which run."""
    found = [f"on {ended.host}" if ended.host else "", ended.recipe or ""]
    if ended.run_uri is not None:
        found.append(f"run {ended.run_uri.rpartition('/')[2]}")
    if ended.attempt is not None:
        found.append(f"attempt {ended.attempt}")
    if ended.last_committed_step is not None:
        found.append(f"step {ended.last_committed_step} committed")
    return [part for part in found if part]
