"""Optimizees: models as pure (init, apply) pairs with parameters in plain nested dicts."""

from advmeta.optimizees.convolutional import cnn as cnn
from advmeta.optimizees.fully_connected import linear as linear
from advmeta.optimizees.fully_connected import mlp as mlp
from advmeta.optimizees.layers import Composed as Composed
from advmeta.optimizees.layers import conv as conv
from advmeta.optimizees.naming import by_name as by_name
from advmeta.optimizees.residual import resnet as resnet
from advmeta.types import Optimizee as Optimizee
