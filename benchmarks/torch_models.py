"""The fixtures' networks in PyTorch, and a JAX model behind the reference's interface."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch

from advmeta.attacks.losses import cross_entropy


class ChannelsLastFlatten(torch.nn.Module):
    """Flattens in the order of NHWC, which the weights of the dense layer are in."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1)


def torch_model(params) -> torch.nn.Module:
    """The CNN or MLP of tests/fixtures, by the layers that its parameters have."""
    layers = []
    for name in ("c1", "c2"):
        if f"{name}.weight" in params:
            kernel = np.array(params[f"{name}.weight"])  # HWIO
            layer = torch.nn.Conv2d(kernel.shape[2], kernel.shape[3], 4, stride=2, padding=1)
            layers += [_filled(layer, kernel.transpose(3, 2, 0, 1), params, name), torch.nn.ReLU()]
    layers.append(ChannelsLastFlatten())
    for name in ("f1", "f2"):
        kernel = np.array(params[f"{name}.weight"])  # [in, out]
        layers.append(_filled(torch.nn.Linear(*kernel.shape), kernel.T, params, name))
        if name == "f1":
            layers.append(torch.nn.ReLU())
    return torch.nn.Sequential(*layers).eval().requires_grad_(False)


def _filled(layer: torch.nn.Module, kernel: np.ndarray, params, name: str) -> torch.nn.Module:
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(kernel)))
        layer.bias.copy_(torch.from_numpy(np.array(params[f"{name}.bias"])))
    return layer


class JaxAdapter:
    """The six methods through which the reference AutoAttack attacks a foreign model.

    Tensors are NCHW on its side. Gradients are of the sum over examples; the DLR losses are
    written here anew, from the paper, so that the oracle does not lean on ours.

    Reference:
      Croce and Hein 2020, eq. 6 and 7 (arXiv:2003.01690).
    """

    def __init__(self, logits_fn):
        self._logits = jax.jit(logits_fn)
        self._xent = self._loss(lambda z, y: cross_entropy(z, y))
        self._dlr = self._loss(dlr)
        self._targeted = self._loss(targeted_dlr)
        self._difference = self._loss(lambda z, y, target: _at(z, target) - _at(z, y))

    def _loss(self, loss):
        @jax.jit
        @functools.partial(jax.grad, has_aux=True)
        def gradient(x, *labels):
            logits = self._logits(x)
            losses = loss(logits, *labels)
            return losses.sum(), (logits, losses)

        return gradient

    def __call__(self, x):
        return self.predict(x)

    def predict(self, x):
        return _to_torch(self._logits(_images(x)))

    def grad_logits(self, x):
        """The gradient of each logit, [n, k, c, h, w]."""
        jacobian = jax.jacrev(lambda image: self._logits(image[None])[0])
        gradients = jax.jit(jax.vmap(jacobian))(_images(x))
        return _to_torch(jnp.moveaxis(gradients, -1, 2))

    def get_logits_loss_grad_xent(self, x, y):
        return self._three(self._xent, x, y)

    def get_logits_loss_grad_dlr(self, x, y):
        return self._three(self._dlr, x, y)

    def get_logits_loss_grad_target(self, x, y, y_target):
        return self._three(self._targeted, x, y, y_target)

    def get_grad_diff_logits_target(self, x, y=None, y_target=None):
        """The difference z_target - z_y and its gradient."""
        gradient, (_, difference) = self._difference(_images(x), _labels(y), _labels(y_target))
        return _to_torch(difference), _to_torch(jnp.moveaxis(gradient, -1, 1))

    def _three(self, gradient, x, *labels):
        gradient, (logits, losses) = gradient(_images(x), *map(_labels, labels))
        return _to_torch(logits), _to_torch(losses), _to_torch(jnp.moveaxis(gradient, -1, 1))


def dlr(logits, y):
    """-(z_y - max_{k != y} z_k) / (z_(1) - z_(3) + 1e-12)"""
    ordered = jnp.sort(logits, axis=1)
    best_other = jnp.where(logits.argmax(axis=1) == y, ordered[:, -2], ordered[:, -1])
    return -(_at(logits, y) - best_other) / (ordered[:, -1] - ordered[:, -3] + 1e-12)


def targeted_dlr(logits, y, target):
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12)"""
    ordered = jnp.sort(logits, axis=1)
    scale = ordered[:, -1] - 0.5 * (ordered[:, -3] + ordered[:, -4]) + 1e-12
    return -(_at(logits, y) - _at(logits, target)) / scale


def _at(logits, labels):
    return jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]


def _images(x: torch.Tensor) -> jax.Array:
    return jnp.asarray(x.detach().numpy().transpose(0, 2, 3, 1))


def _labels(y: torch.Tensor) -> jax.Array:
    return jnp.asarray(y.numpy(), jnp.int32)


def _to_torch(x: jax.Array) -> torch.Tensor:
    return torch.from_numpy(np.array(x))
