"""The finished run of the report's tests, for those in a browser."""

from tests.report.conftest import finished_run as finished_run
from tests.report.conftest import several_runs as several_runs
