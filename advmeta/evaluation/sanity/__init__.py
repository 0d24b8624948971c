"""Sanity checks: does a model's robustness come from the model, or from a weak attack on it?"""

from advmeta.evaluation.sanity.checks import Check as Check
from advmeta.evaluation.sanity.checks import sanity_checks as sanity_checks
