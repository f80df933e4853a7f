"""A field of a record as the text that evaluations go by, whatever it holds."""

import pytest

from job.core.data.fields import value_of


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ('{"f": " de "}', "de"),
        ('{"f": 1.10}', "1.10"),
        ('{"f": true}', "true"),
        ('{"f": [1, "a"]}', '[1, "a"]'),
        ('{"f": {"b": 1.5}}', '{"b": 1.5}'),
        ('{"f": null}', None),
        ('{"f": "  "}', None),
        ('{"g": 1}', None),
        ('{"f": "\\ud800"}', "?"),
        ('{"f.g": "whole", "f": {"g": "inner"}}', '{"g": "inner"}'),
        ("[1]", None),
    ],
)
def test_a_field_as_text(record, found):
    assert value_of(record.encode(), "f") == found


def test_a_field_is_looked_for_inside_objects():
    assert value_of(b'{"meta": {"lang": "fr"}}', "meta.lang") == "fr"
    assert value_of(b'{"meta.lang": "de", "meta": {"lang": "fr"}}', "meta.lang") == "de"
