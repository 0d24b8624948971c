"""Square Attack (Andriushchenko et al. 2020): random search that needs only the logits.

Follows AutoAttack's variant, fra31/auto-attack: its schedule, its margin loss and its windows,
which never reach the last row and column. Unlike there, every example has windows of its own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from advmeta.attacks import losses, square_windows
from advmeta.attacks.batching import choose, fold
from advmeta.attacks.runs import check_counts, check_start
from advmeta.attacks.square_moves import move_mass_l1, move_mass_l2
from advmeta.attacks.square_windows import BumpWindows, Grid
from advmeta.attacks.threat_model import ThreatModel, example_keys
from advmeta.attacks.validation import AttackResult, as_partial, check_attack_inputs
from advmeta.types import Array, Key, LogitsFn

# How many proposals ahead of the next query are looked at for one that changes the image.
LOOKAHEAD = 8
# For so many iterations at a time the windows of l2 and l1 are worked out.
BLOCK = 50


def square(
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    threat_model: ThreatModel,
    key: Key,
    queries: int = 5000,
    restarts: int = 1,
    targeted: bool = False,
    x_init: Array | None = None,
    p_init: float = 0.8,
    rescale_schedule: bool = False,
) -> AttackResult:
    """Random search over square windows, keeping a change if it raises the margin loss.

    ``x_{t+1} = x' if L(f(x'), y) > L(f(x_t), y) else x_t,  x' = P(x_t + delta_t),
    L(z, y) = max_{i != y} z_i - z_y``

    For linf delta_t is +-2 epsilon, one sign a channel, in one window: every pixel is always at one
    end of what it may be. For l2 delta_t moves the perturbation of one window into another and adds
    a bump of two halves, positive and negative, there; so it does for l1, with steeper bumps, and
    projects onto the ball and the bounds. The window covers a share p_t of the image that
    falls from ``p_init`` by a half at iterations 11, 51, 201, 501, 1001, 2001 and so on.

    No gradient is taken, so masked gradients do not stop it.

    Args:
      logits_fn: x [n, ...] -> logits [n, k].
      x: images [n, h, w, c] or [n, h, w], or vectors [n, d], whose windows are intervals; in the
        threat model's bounds.
      y: true labels [n], or the labels to reach if targeted.
      threat_model: the ball; its epsilon may be [n].
      key: for starts and windows. Each example draws from its own key.
      queries: iterations a restart, after the query of the start. Proposals that would leave the
        image as it is count, but the model is not asked: its answer is known.
      restarts: runs from other random starts, for the examples not yet broken.
      targeted: search until the labels y are predicted.
      x_init: start here [n, ...] in the first restart instead of at random stripes (linf) or a
        checkerboard of bumps (l2, l1).
      p_init: the first window's share of the image.
      rescale_schedule: stretch the schedule, made for 10,000 queries, to ``queries``. AutoAttack
        does not.

    Returns:
      `AttackResult`; the loss is L at x_adv, with y and the others exchanged if targeted.

    Raises:
      ValueError: labels that do not fit, images out of bounds or NaN, x of more than 4 axes,
        queries or restarts below 1, p_init outside of (0, 1].

    Example:
      >>> logits_fn = lambda x: jnp.stack([x[:, 0], x[:, 1]], axis=1)
      >>> x, y = jnp.array([[0.6, 0.5], [0.9, 0.1]]), jnp.array([0, 0])
      >>> result = advmeta.attacks.square(logits_fn, x, y, key=jax.random.key(0), queries=100,
      ...                                 threat_model=advmeta.ThreatModel("linf", epsilon=0.1))
      >>> result.is_adversarial.tolist()  # the margins are 0.1 and 0.8; 0.2 is the most it can move
      [True, False]

    Reference:
      Andriushchenko et al. 2020, Square Attack: a query-efficient black-box adversarial attack via
      random search, algorithms 1 to 3. arXiv:1912.00049; for l1 Croce and Hein 2021, Mind the Box:
      l1-APGD for Sparse Adversarial Attacks on Image Classifiers, section 4. arXiv:2103.01208
    """
    check_counts(queries=queries, restarts=restarts)
    if not 0 < p_init <= 1:
        raise ValueError(f"p_init={p_init} is a share of the image: it must be in (0, 1]")
    x, y = check_attack_inputs(logits_fn, x, y, threat_model)
    square_windows.grid(x.shape)  # raises for shapes that have no windows
    x_init = check_start(x_init, x)
    return _square(
        as_partial(logits_fn), x, y, threat_model, key, x_init, queries=queries, restarts=restarts,
        targeted=targeted, p_init=p_init, rescale_schedule=rescale_schedule,
    )  # fmt: skip


class _Found(NamedTuple):
    """The best point so far of every example."""

    loss: Array  # [n]
    is_adversarial: Array  # [n]


@jax.jit(static_argnames=("queries", "restarts", "targeted", "p_init", "rescale_schedule"))
def _square(
    logits_fn: Partial, x, y, threat_model, key, x_init,
    *, queries, restarts, targeted, p_init, rescale_schedule,
) -> AttackResult:  # fmt: skip
    grid = square_windows.grid(x.shape)
    sides = square_windows.sides(grid, threat_model.norm, queries, p_init, rescale_schedule)
    images = x.reshape(-1, *grid)
    sign = -1.0 if targeted else 1.0

    def query(images) -> _Found:
        logits = logits_fn(images.reshape(x.shape))
        # The reference stops where the margin is 0 or beyond; at 0 exactly the prediction may still
        # be y, and then this goes on.
        return _Found(sign * losses.margin(logits, y), losses.is_right(logits, y) == targeted)

    search = _search_linf if threat_model.norm == "linf" else _search_bumps
    keys = example_keys(key, x)

    def run(carry):
        restart, result = carry
        run_keys = fold(keys, restart)
        start, use_start = images, False
        if x_init is not None:
            start, use_start = x_init.reshape(images.shape), restart == 0
        found, x_adv = search(
            query, images, threat_model, run_keys, sides, grid, (start, use_start),
            result.is_adversarial,
        )  # fmt: skip
        take = ~result.is_adversarial & (found.is_adversarial | (found.loss > result.loss))
        return restart + 1, AttackResult(
            choose(take, x_adv, result.x_adv),
            result.is_adversarial | found.is_adversarial,
            jnp.where(take, found.loss, result.loss),
        )

    n = x.shape[0]
    nothing = AttackResult(images, jnp.zeros(n, bool), jnp.full(n, -jnp.inf, x.dtype))
    _, result = jax.lax.while_loop(
        lambda carry: (carry[0] < restarts) & ~carry[1].is_adversarial.all(), run, (0, nothing)
    )
    return result._replace(x_adv=result.x_adv.reshape(x.shape))


class _LinfState(NamedTuple):
    t: Array  # [n] the next proposal of each example
    signs: Array  # [n, h, c, words] uint32, a bit a pixel: 1 at its upper end, 0 at its lower
    moved: Array  # the same, 1 where the pixel is at an end at all; x_init need not be
    found: _Found


def _search_linf(query, x, threat_model, keys, sides, grid: Grid, start, done):
    """Search over sign patterns, kept as bits.

    A proposal of 2 epsilon, clipped, puts a window at its upper or lower end whatever was there.
    Bits make it cheap to see that a window is there already: then the loss cannot change, and the
    proposal is passed over. That is a fifth to a third of all proposals.
    """
    radius, bounds = threat_model.radius(x), threat_model.bounds
    lower, upper = jnp.clip(x - radius, *bounds), jnp.clip(x + radius, *bounds)
    start, use_start = start
    count = sides.shape[0]
    draws = square_windows.draw(keys, count, grid, positions=1)
    sides = jnp.asarray(sides)

    def render(signs, moved):
        ends = jnp.where(square_windows.unpack(signs, grid), upper, lower)
        # Without x_init every pixel has moved.
        if use_start is False:
            return ends
        return jnp.where(square_windows.unpack(moved, grid), ends, start)

    def turn(state: _LinfState) -> _LinfState:
        ahead = state.t[:, None] + jnp.arange(LOOKAHEAD, dtype=state.t.dtype)
        window = square_windows.windows(draws, sides, ahead, grid)
        fill = window.signs[:, :, None, :, None]
        change = window.bits & ((state.signs[:, None] ^ fill) | ~state.moved[:, None])
        useful = change.any(axis=(2, 3, 4)) & (ahead < count)
        pick = useful.argmax(axis=1)
        bits, fill = _pick(window.bits, pick), _pick(fill, pick)
        signs = (state.signs & ~bits) | (fill & bits)
        moved = state.moved | bits
        new = query(render(signs, moved))
        ask = useful.any(axis=1) & ~state.found.is_adversarial
        accept = ask & (new.is_adversarial | (new.loss > state.found.loss))
        return _LinfState(
            jnp.where(useful.any(axis=1), _pick(ahead, pick) + 1, state.t + LOOKAHEAD),
            choose(accept, signs, state.signs),
            choose(accept, moved, state.moved),
            choose(accept, new, state.found),
        )

    # Stripes: one sign a column and channel. Each pixel starts at an end, unless it is x_init.
    signs = square_windows.stripes(draws, grid)
    moved = jnp.where(use_start, jnp.zeros_like(signs), ~jnp.zeros_like(signs))
    found = query(render(signs, moved))
    found = found._replace(is_adversarial=found.is_adversarial | done)
    state = _LinfState(jnp.zeros_like(found.loss, jnp.int32), signs, moved, found)
    state = jax.lax.while_loop(
        lambda s: ((s.t < count) & ~s.found.is_adversarial).any(), turn, state
    )
    return state.found, render(state.signs, state.moved)


class _BumpState(NamedTuple):
    t: Array  # the next proposal, the same for all
    x: Array  # [n, c, h, w]
    found: _Found


def _search_bumps(query, x, threat_model, keys, sides, grid: Grid, start, done):
    start, use_start = start
    # Channels before pixels: what is summed is contiguous.
    x, start = jnp.moveaxis(x, 3, 1), jnp.moveaxis(start, 3, 1)
    radius = jnp.broadcast_to(threat_model.radius(x), (x.shape[0], 1, 1, 1))
    draws = square_windows.draw(keys, len(sides), grid, positions=2)
    move = {"l2": move_mass_l2, "l1": move_mass_l1}[threat_model.norm]

    def ask(x):
        return query(jnp.moveaxis(x, 1, 3))

    def moved(delta):
        if threat_model.norm == "l1":
            return threat_model.project(x + delta, x)
        return jnp.clip(x + delta, *threat_model.bounds)

    def turn(state: _BumpState, window: BumpWindows) -> _BumpState:
        x_new = moved(move(state.x - x, window, radius))
        new = ask(x_new)
        accept = new.is_adversarial | (new.loss > state.found.loss)
        accept = accept & ~state.found.is_adversarial
        found = choose(accept, new, state.found)
        return _BumpState(state.t + 1, choose(accept, x_new, state.x), found)

    def goes_on(state: _BumpState, end):
        return (state.t < end) & ~state.found.is_adversarial.all()

    def block(state: _BumpState) -> _BumpState:
        first = state.t
        t = first + jnp.arange(BLOCK)
        some = square_windows.bump_windows(draws, sides, t, grid, x.dtype, threat_model.norm)
        return jax.lax.while_loop(
            lambda state: goes_on(state, jnp.minimum(first + BLOCK, len(sides))),
            lambda state: turn(state, jax.tree.map(lambda a: a[state.t - first], some)),
            state,
        )

    first = square_windows.checkerboard(draws, grid, x.dtype, threat_model.norm)
    if threat_model.norm == "l2":
        norm = jnp.sqrt(jnp.square(first).sum(axis=(1, 2, 3), keepdims=True))
        first = first * (radius / (norm + 1e-12))
    first = jnp.where(use_start, start, moved(first))
    found = ask(first)
    found = found._replace(is_adversarial=found.is_adversarial | done)
    state = _BumpState(jnp.zeros((), jnp.int32), first, found)
    state = jax.lax.while_loop(lambda state: goes_on(state, len(sides)), block, state)
    return state.found, jnp.moveaxis(state.x, 1, 3)


def _pick(values: Array, index: Array) -> Array:
    """values[i, index[i]] for each i."""
    return jnp.take_along_axis(
        values, index.reshape((-1,) + (1,) * (values.ndim - 1)), axis=1
    ).squeeze(1)
