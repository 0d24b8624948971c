"""Evaluation: robust accuracy, and the evidence that it is not overstated."""

from advmeta.evaluation.ensemble import AutoAttackResult as AutoAttackResult
from advmeta.evaluation.ensemble import autoattack as autoattack
from advmeta.evaluation.ledger import Ledger as Ledger
from advmeta.evaluation.sanity import Check as Check
from advmeta.evaluation.sanity import sanity_checks as sanity_checks
