"""Cases and tolerances for testing the ops, shared by tests, benchmarks and users."""

from seqkern.testing.cases import OpCase as OpCase
from seqkern.testing.cases import all_cases as all_cases
from seqkern.testing.recurrent import recurrent_case as recurrent_case
from seqkern.testing.tolerance import assert_within_budget as assert_within_budget
from seqkern.testing.tolerance import error_budget as error_budget
from seqkern.testing.tolerance import neighbours as neighbours

__all__ = [
    "OpCase",
    "all_cases",
    "assert_within_budget",
    "error_budget",
    "neighbours",
    "recurrent_case",
]
