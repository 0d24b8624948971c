"""Data sets: a name -> arrays on the device, NHWC float32 in [0, 1] with int32 labels."""

from advmeta.data.dataset import Dataset as Dataset
from advmeta.data.dataset import split as split
from advmeta.data.loading import load as load
