"""The gradients that inner steps give to the optimizer: (task, params, key) -> (loss, gradient)."""

from advmeta.inner_gradients.basic import CONSTANT as CONSTANT
from advmeta.inner_gradients.basic import InnerGradient as InnerGradient
from advmeta.inner_gradients.basic import StatefulGradient as StatefulGradient
from advmeta.inner_gradients.basic import adversarial as adversarial
from advmeta.inner_gradients.basic import attacked as attacked
from advmeta.inner_gradients.basic import clean as clean
from advmeta.inner_gradients.basic import mean_cross_entropy as mean_cross_entropy
from advmeta.inner_gradients.basic import noisy as noisy
from advmeta.inner_gradients.basic import replayed as replayed
from advmeta.inner_gradients.basic import stateful as stateful
from advmeta.inner_gradients.divergence import trades as trades
from advmeta.inner_gradients.divergence import vat as vat
from advmeta.inner_gradients.low_cost import fgsm_rs as fgsm_rs
from advmeta.inner_gradients.low_cost import free as free
from advmeta.inner_gradients.low_cost import remembered as remembered
from advmeta.inner_gradients.low_cost import yopo as yopo
from advmeta.inner_gradients.recipes import RECIPES as RECIPES
from advmeta.inner_gradients.recipes import Recipe as Recipe
from advmeta.inner_gradients.recipes import by_name as by_name
