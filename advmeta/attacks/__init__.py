"""Attacks: pure functions (logits_fn, x, y, *, threat_model, key, ...) -> AttackResult."""

from advmeta.attacks import losses as losses
from advmeta.attacks.adaptive_boundary import fab as fab
from advmeta.attacks.auto_pgd import apgd as apgd
from advmeta.attacks.carlini_wagner_l2 import carlini_wagner as carlini_wagner
from advmeta.attacks.multi_targeted_attack import multi_targeted as multi_targeted
from advmeta.attacks.noise import gaussian_noise as gaussian_noise
from advmeta.attacks.noise import uniform_noise as uniform_noise
from advmeta.attacks.projected_gradient import fgsm as fgsm
from advmeta.attacks.projected_gradient import pgd as pgd
from advmeta.attacks.randomized import average_logits as average_logits
from advmeta.attacks.square_attack import square as square
from advmeta.attacks.threat_model import ThreatModel as ThreatModel
from advmeta.attacks.validation import AttackResult as AttackResult
