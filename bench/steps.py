"""What the steps of a run were on each of its ranks, and which of them were slow, and why: read from watched runs."""

import json
import os
import statistics
from pathlib import Path

_WATCHED = Path(__file__).parent / "watched"
_SLOW = 1.5
"""Times the median."""
_SHOWN = 6
PROFILE = "profile.txt"


def environment_to_watch(folder, *, profiled=0):
    """What a run needs in its environment to leave its steps in a folder.

    Args:
        folder: is there.
        profiled: the step that rank 0 profiles; 0: none.
    """
    path = os.pathsep.join(filter(None, [str(_WATCHED), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "BENCH_STEPS": str(folder), "BENCH_PROFILED": str(profiled)}


def steps_in(folder):
    """Step -> what each rank says of it, by rank."""
    found = {}
    for path in sorted(Path(folder).glob("steps-r*.jsonl")):
        for line in path.read_text().splitlines():
            said = json.loads(line)
            found.setdefault(said["step"], []).append(said)
    return found


def steps_text(steps, warm_up):
    """Lines: the usual step after the warm-up, and the slow ones."""
    if not steps:
        return []
    timed = [ranks for number, ranks in steps.items() if number > warm_up] or [*steps.values()]
    usual = statistics.median(_seconds(ranks) for ranks in timed)
    of_ranks = [
        f"rank {ranks[0]['rank']} {statistics.median(1000 * (each['seconds'] - each['waited']) for each in ranks):.1f}"
        for ranks in zip(*timed, strict=True)
    ]
    lines = [f"- the usual step: {1000 * usual:.1f} ms; without waiting, in ms: {', '.join(of_ranks)}"]
    slow = sorted((ranks for ranks in timed if _seconds(ranks) > _SLOW * usual), key=_seconds, reverse=True)
    lost = sum(_seconds(ranks) - usual for ranks in slow)
    lines.append(f"- {len(slow)} of {len(timed)} steps took more than {_SLOW} times as long, {lost:.2f} s more in all")
    return lines + [
        f"  - step {ranks[0]['step']}: {1000 * _seconds(ranks):.0f} ms; {_said(ranks)}" for ranks in slow[:_SHOWN]
    ]


def _seconds(ranks):
    return max(each["seconds"] for each in ranks)


def _said(ranks):
    return "; ".join(
        f"rank {each['rank']}: {each['tokens']:,} tokens, waited {1000 * each['waited']:.0f} ms"
        + (f", recorded {', '.join(f'{size:,}' for size in each['recorded'])}" if each["recorded"] else "")
        for each in ranks
    )
