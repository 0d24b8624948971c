"""Learned optimizers that train robust models on clean data."""

from advmeta import attacks as attacks
from advmeta import data as data
from advmeta import inner_gradients as inner_gradients
from advmeta import optimizees as optimizees
from advmeta import report as report
from advmeta.attacks.threat_model import ThreatModel as ThreatModel
from advmeta.evaluation.ensemble import AutoAttackResult as AutoAttackResult
from advmeta.evaluation.ensemble import autoattack as autoattack
from advmeta.held_out import held_out_accuracy as held_out_accuracy
from advmeta.meta_optimizer.pretrained import list_pretrained as list_pretrained
from advmeta.meta_optimizer.pretrained import load_meta_optimizer as load_meta_optimizer
from advmeta.meta_optimizer.transform import MetaOptimizerConfig as MetaOptimizerConfig
from advmeta.meta_optimizer.transform import init_meta_params as init_meta_params
from advmeta.meta_optimizer.transform import scale_by_meta_optimizer as scale_by_meta_optimizer
from advmeta.meta_optimizer.weights import load_weights as load_weights
from advmeta.meta_optimizer.weights import save_weights as save_weights
from advmeta.meta_training import MetaTrainingConfig as MetaTrainingConfig
from advmeta.meta_training import meta_train as meta_train
from advmeta.parameter_files import load_params as load_params
from advmeta.parameter_files import save_params as save_params
from advmeta.tasks import Task as Task
from advmeta.tasks import TaskConfig as TaskConfig
from advmeta.tasks import TaskFamily as TaskFamily
from advmeta.types import Batch as Batch
from advmeta.types import Optimizee as Optimizee
from advmeta.unroll import train as train
