"""Fixtures of all test files."""
from tests.common import quick_scores, small_run  # noqa: F401
