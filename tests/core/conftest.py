"""A finished report, as these rooms read it."""

from report_fixtures import report  # noqa: F401 - fixtures
