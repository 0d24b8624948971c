"""The meta-optimizer: features -> LSTM -> update, as an optax transformation."""

from advmeta.meta_optimizer.features import DEFAULT_FEATURES as DEFAULT_FEATURES
from advmeta.meta_optimizer.features import FEATURES as FEATURES
from advmeta.meta_optimizer.features import Aim as Aim
from advmeta.meta_optimizer.rule import MetaOptimizerConfig as MetaOptimizerConfig
from advmeta.meta_optimizer.transform import ScaleByMetaOptimizerState as ScaleByMetaOptimizerState
from advmeta.meta_optimizer.transform import init_meta_params as init_meta_params
from advmeta.meta_optimizer.transform import scale_by_meta_optimizer as scale_by_meta_optimizer
