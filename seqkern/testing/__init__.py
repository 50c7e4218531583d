"""Cases and tolerances for testing the ops, shared by tests and users."""

from seqkern.testing.additive import additive_case as additive_case
from seqkern.testing.attention import attention_case as attention_case
from seqkern.testing.cases import OpCase as OpCase
from seqkern.testing.cases import all_cases as all_cases
from seqkern.testing.compare import assert_matches_reference as assert_matches_reference
from seqkern.testing.compare import cotangents as cotangents
from seqkern.testing.compare import named as named
from seqkern.testing.decoder import decoder_case as decoder_case
from seqkern.testing.recurrent import recurrent_case as recurrent_case
from seqkern.testing.tolerance import assert_within_budget as assert_within_budget
from seqkern.testing.tolerance import error_budget as error_budget
from seqkern.testing.tolerance import neighbours as neighbours

__all__ = [
    "OpCase",
    "additive_case",
    "all_cases",
    "assert_matches_reference",
    "assert_within_budget",
    "attention_case",
    "cotangents",
    "decoder_case",
    "error_budget",
    "named",
    "neighbours",
    "recurrent_case",
]
