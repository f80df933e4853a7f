"""How old this process is, by the system's clock."""

import os
import time

import pytest

from job.edge.host.process import age_seconds

FIELDS = ["R", *("0" for _ in range(18)), "{ticks}", *("0" for _ in range(30))]
"""Of /proc/self/stat, from the third on; the twentieth of them is when the process was made."""


def written(root, text):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/stat").write_text(text)
    return root


def test_the_age_is_counted_from_when_the_system_made_the_process(tmp_path):
    ticks = (time.clock_gettime(time.CLOCK_BOOTTIME) - 100) * os.sysconf("SC_CLK_TCK")
    root = written(tmp_path, " ".join(["17", "(py (thon) 3)", *FIELDS]).format(ticks=int(ticks)))

    assert 100 <= age_seconds(root=root) < 160


def test_this_process_is_older_than_its_interpreter():
    age = age_seconds()

    assert age > 0
    time.sleep(0.05)
    assert age_seconds() > age


@pytest.mark.parametrize("text", [None, "", "17 (python) R 1", "17 (python) " + " ".join(FIELDS)])
def test_a_system_that_does_not_say_makes_the_process_new(tmp_path, text):
    root = tmp_path if text is None else written(tmp_path, text)

    assert age_seconds(root=root) == 0.0


def test_a_process_from_the_future_is_new(tmp_path):
    root = written(tmp_path, " ".join(["17", "(python)", *FIELDS]).format(ticks=10**15))

    assert age_seconds(root=root) == 0.0
