"""The report: a versioned schema that JSON keeps whole."""

import json

import jsonschema
import pytest
from pydantic import ValidationError

from job.core.reports.report import SCHEMA_VERSION, Report


def as_json(report):
    return json.loads(report.model_dump_json())


def test_a_report_comes_back_from_its_json_unchanged(report):
    assert Report.model_validate_json(report.model_dump_json()) == report
    assert Report.model_validate(as_json(report)) == report


def test_a_report_names_its_schema_version(report):
    assert as_json(report)["schema_version"] == SCHEMA_VERSION == 1


def test_a_report_by_an_earlier_version_has_no_share_of_the_ceiling(report):
    earlier = as_json(report)
    for name in ("ceiling_share", "ceiling_tflops", "ceiling_from"):
        del earlier["throughput"][name]

    assert Report.model_validate(earlier) == report
    assert report.throughput.ceiling_share is None


def test_a_report_of_another_version_is_not_read_as_this_one(report):
    with pytest.raises(ValidationError, match="schema_version"):
        Report.model_validate({**as_json(report), "schema_version": 2})


def test_a_report_is_valid_by_its_json_schema(report):
    validator = jsonschema.Draft202012Validator(Report.model_json_schema(mode="serialization"))

    assert [error.message for error in validator.iter_errors(as_json(report))] == []
    assert not validator.is_valid({**as_json(report), "extra": 1})
    assert not validator.is_valid({name: value for name, value in as_json(report).items() if name != "sweet_spot"})


def test_a_script_finds_everything_where_the_schema_says(report):
    """The paths that the README and the nightly scripts read; they change only with the version."""
    found = as_json(report)

    assert found["sweet_spot"]["loss"] < found["sweet_spot"]["base_loss"]
    assert found["adapter"]["files"]["adapter_model.safetensors"]["sha256"]
    assert found["evaluations"][0]["step"] == 0
    assert found["data"]["train"]["objects"][0]["uri"].startswith("s3://")
    assert found["attempts"][-1]["exit_code"] == 0


def test_a_finished_run_had_an_attempt(report):
    with pytest.raises(ValidationError, match="attempts"):
        Report.model_validate({**as_json(report), "attempts": []})


def test_a_report_is_frozen(report):
    with pytest.raises(ValidationError, match="frozen"):
        report.run_id = "another"
