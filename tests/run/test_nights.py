"""Nights on a channel: what is promoted, what is refused and why, what is new, and a night without anything to do."""

import pytest
from job_process import records, write_lines
from nightly_job import NightlyJob, with_customers


@pytest.fixture
def job(tmp_path, base, warm):
    return NightlyJob(tmp_path, base, warm)


def test_the_first_night_is_compared_with_the_base_and_its_report_says_what_came_of_it(job):
    job.recipe["promote"] |= {"cluster": "customer", "slices": ["lang"]}
    ended, report = job.night()

    found = report["promotion"]
    assert found["outcome"] == "promoted", found
    assert found["said"].startswith("Promoted: ")
    assert found["judged"]["decision"]["champion"] == "the base"
    assert found["judged"]["gap"]["clusters"] == 30
    assert {*found["judged"]["slices"]} == {"lang=de", "lang=en"}
    assert job.promoted()["run_id"] == report["run_id"]
    job.in_order()
    print(ended.stdout)
