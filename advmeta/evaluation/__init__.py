"""Evaluation: robust accuracy, and the evidence that it is not overstated."""

from advmeta.evaluation.autoattack import AutoAttackResult as AutoAttackResult
from advmeta.evaluation.autoattack import autoattack as autoattack
from advmeta.evaluation.ledger import Ledger as Ledger
