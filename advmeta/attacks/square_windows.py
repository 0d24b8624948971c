"""The windows of `square`: how large, where, and with what in them.

An image is h x w pixels with c channels; a vector is an image of one row. What depends on shapes
only is computed with numpy when an attack is traced.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from advmeta.types import Array, Key

WORD = 32  # bits of a uint32

# After so many of 10,000 iterations the window's share of the image is halved.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


class Grid(NamedTuple):
    """Height, width and channels of what windows are cut from."""

    h: int
    w: int
    c: int


def grid(shape: tuple[int, ...]) -> Grid:
    """The grid of examples x of that shape; a single row, where there is no second direction.

    Raises:
      ValueError: more than three axes an example, or an axis too long for the random numbers.
    """
    if len(shape) > 4:
        raise ValueError(
            f"x has shape {shape}; Square cuts windows from images [n, h, w, c] or [n, h, w] or "
            "from vectors [n, d]: reshape x, and reshape back in logits_fn"
        )
    h, w, c = {2: (1, *shape[1:], 1), 3: (*shape[1:], 1), 4: shape[1:]}[len(shape)]
    if max(h, w) > 2**16:
        raise ValueError(
            f"x has shape {shape}; Square draws positions of 16 bits: reshape vectors of more than "
            f"{2**16} numbers to images, and reshape back in logits_fn"
        )
    return Grid(1, h, c) if w == 1 else Grid(h, w, c)


def sides(grid: Grid, norm: str, queries: int, p_init: float, rescale: bool) -> np.ndarray:
    """The side of the square window in each iteration, or its width in a vector, [queries]."""
    iteration = np.arange(queries)
    if rescale:
        iteration = iteration * 10_000 // queries
    share = p_init / 2.0 ** np.searchsorted(_HALVINGS, iteration)
    exact = share * grid.w if grid.h == 1 else np.sqrt(share * grid.h * grid.w)
    # np.round rounds halves to even, as Python does in the reference.
    side = np.round(exact).astype(np.int32)
    largest = grid.w if grid.h == 1 else min(grid.h, grid.w)
    if norm == "linf":
        return np.clip(side, 1, largest)
    # The bumps have a middle, so their side is odd; in the reference small images overflow.
    side = np.maximum(side, 3)
    return np.minimum(side + (side % 2 == 0), largest - (largest % 2 == 0))


class Draws(NamedTuple):
    """The random numbers of all iterations; bits are read off them when they are needed."""

    start: Array  # [n, anything] uint32, for the starting point
    positions: Array  # [n, queries, windows] uint32: the row in the upper half, the column below
    orientation: Array  # [n, queries] bool
    signs: Array  # [n, queries, words] uint32, a bit a channel


def draw(keys: Key, queries: int, grid: Grid, *, positions: int) -> Draws:
    """Draws everything at once: in the loop it would cost more than a small model.

    And in one call: each one adds half a second to the compilation.
    """
    words = -(-grid.c // WORD)
    start = _tiles(grid) * (1 + grid.c) if positions == 2 else grid.c * -(-grid.w // WORD)
    shape = (queries, positions + 1 + words)

    def one(key):
        return jax.random.bits(key, (start + shape[0] * shape[1],), jnp.uint32)

    drawn = jax.vmap(one)(keys)
    bits = drawn[:, start:].reshape(-1, *shape)
    return Draws(
        drawn[:, :start],
        bits[..., :positions],
        bits[..., positions] >> (WORD - 1) == 1,
        bits[..., positions + 1 :],
    )


def _corner(position: Array, side: Array, grid: Grid) -> tuple[Array, Array]:
    """The first row and column of a window."""

    def below(bits16, extent):
        return (bits16 * extent.astype(jnp.uint32) >> 16).astype(jnp.int32)

    if grid.h == 1:
        return jnp.zeros_like(position, jnp.int32), below(position >> 16, grid.w - side + 1)
    # floor(U (h - side)): the last row and column are never reached, a quirk of the reference.
    return below(position >> 16, grid.h - side), below(position & 0xFFFF, grid.w - side)


def _channel_bits(words: Array, channels: int) -> Array:
    """[..., words] -> [..., channels] bool."""
    bits = words[..., None] >> jnp.arange(WORD, dtype=jnp.uint32) & 1
    return bits.reshape(*words.shape[:-1], -1)[..., :channels] == 1


def _signs(is_positive: Array, dtype) -> Array:
    return jnp.where(is_positive, 1.0, -1.0).astype(dtype)


# What follows is for linf, where an image is a pattern of bits.


class Windows(NamedTuple):
    """Some windows of each example, [n, some, ...]."""

    bits: Array  # [n, some, h, 1, words] uint32: which pixels
    signs: Array  # [n, some, c] uint32: all ones or all zeros


def windows(draws: Draws, sides: Array, t: Array, grid: Grid) -> Windows:
    """The windows of the iterations t [n, some]; beyond the last iteration they mean nothing."""
    t = jnp.minimum(t, sides.shape[0] - 1)
    side = sides[t]
    position = jnp.take_along_axis(draws.positions[:, :, 0], t, axis=1)
    row, column = _corner(position, side, grid)
    rows = jnp.arange(grid.h) - row[..., None]
    in_rows = (rows >= 0) & (rows < side[..., None])
    start = jnp.arange(-(-grid.w // WORD)) * WORD
    first = jnp.clip(column[..., None] - start, 0, WORD)
    last = jnp.clip((column + side)[..., None] - start, 0, WORD)
    in_columns = _low_bits(last) & ~_low_bits(first)
    bits = jnp.where(in_rows[..., None], in_columns[..., None, :], jnp.uint32(0))
    words = jnp.take_along_axis(draws.signs, t[..., None], axis=1)
    fill = jnp.where(_channel_bits(words, grid.c), jnp.uint32(0xFFFFFFFF), jnp.uint32(0))
    return Windows(bits[..., None, :], fill)


def _low_bits(count: Array) -> Array:
    """A uint32 with the lowest ``count`` bits set, 0 to 32."""
    # A shift by 32 is undefined, hence the two cases.
    partial = (jnp.uint32(1) << jnp.minimum(count, WORD - 1).astype(jnp.uint32)) - 1
    return jnp.where(count >= WORD, jnp.uint32(0xFFFFFFFF), partial)


def stripes(draws: Draws, grid: Grid) -> Array:
    """A random sign for each column and channel, as bits [n, h, c, words]."""
    bits = draws.start.reshape(-1, 1, grid.c, -(-grid.w // WORD))
    return jnp.broadcast_to(bits, (bits.shape[0], grid.h, *bits.shape[2:]))


def unpack(bits: Array, grid: Grid) -> Array:
    """[n, h, c, words] -> [n, h, w, c] bool."""
    column = jnp.arange(grid.w)
    words = jnp.moveaxis(bits, 2, 3)[:, :, column // WORD]
    shift = (column % WORD).astype(jnp.uint32)[:, None]
    return (words >> shift & 1) == 1


# What follows is for l2 and l1.

# The order of the norm, and the power by which the rings of a bump get lower.
_ORDER_AND_POWER = {"l2": (2, 2), "l1": (1, 4)}


class Profiles(NamedTuple):
    """Bumps of several sizes as products of one-dimensional tables.

    A bump is rings of height ``sum_{k >= d} 1/(k+1)^p`` at distance d (the larger of the distances
    in rows and in columns) from the middle of each half, one half positive and one negative; p is
    2 for l2 and 4 for l1. That sum falls with d, so its value at the larger distance is the smaller
    of two values.
    """

    split: np.ndarray  # [size, side]: along the axis that is cut in halves
    cross: np.ndarray  # [size, side]: along the other
    scale: np.ndarray  # [size, side]: sign and normalisation, along the axis that is cut


def profiles(sizes: np.ndarray, is_row: bool, norm: str) -> Profiles:
    """The tables for windows of those sides, each bump of norm 1."""
    tables = [_profile(int(s), 1 if is_row else int(s), int(max(sizes)), norm) for s in sizes]
    return Profiles(*(np.stack(table).astype(np.float32) for table in zip(*tables, strict=True)))


def _profile(split: int, cross: int, length: int, norm: str):
    half = split // 2
    order, power = _ORDER_AND_POWER[norm]
    heights = 1.0 / np.arange(1.0, split + cross + 2) ** power

    def tail(distance, rings):
        return np.array([heights[d:rings].sum() for d in distance])

    parts, scales = [], []
    across = np.abs(np.arange(cross) - cross // 2)
    crossing = tail(across, max(half // 2, (split - half) // 2, cross // 2) + 1)
    for part, sign in ((half, 1.0), (split - half, -1.0)):
        along = tail(np.abs(np.arange(part) - part // 2), max(part // 2, cross // 2) + 1)
        size = (np.minimum.outer(along, crossing) ** order).sum() if part else 1.0
        parts.append(along)
        scales.append(np.full(part, sign / size ** (1 / order)))
    scale = np.concatenate(scales) / (2.0 if half else 1.0) ** (1 / order)
    pad = (0, length - split)
    return (
        np.pad(np.concatenate(parts), pad),
        np.pad(crossing, (0, length - cross)),
        np.pad(scale, pad),
    )


class Lines(NamedTuple):
    """Along one axis, at each of its positions [..., extent]; outer products make the windows."""

    to: Array  # 1 in the window where the bump goes, 0 elsewhere
    emptied: Array  # 1 in the window that is emptied
    ring: Array  # the height of the bump, to be combined by a minimum
    scale: Array  # its sign and normalisation, 0 outside of ``to``; to be multiplied


class BumpWindows(NamedTuple):
    """The proposals of some iterations, as rows, columns and signs."""

    rows: Lines  # [some, n, h]
    columns: Lines  # [some, n, w]
    signs: Array  # [some, n, c] of +-1


def bump_windows(
    draws: Draws, sides: np.ndarray, t: Array, grid: Grid, dtype, norm: str
) -> BumpWindows:
    """The windows of the iterations t [some]; beyond the last iteration they mean nothing.

    Many at a time, to be read in an inner loop: XLA's CPU compiler would otherwise work out
    positions and table entries again for every pixel.
    """
    t = jnp.minimum(t, len(sides) - 1)
    sizes, size = np.unique(sides, return_inverse=True)
    tables = jax.tree.map(
        lambda table: jnp.asarray(table, dtype), profiles(sizes, grid.h == 1, norm)
    )

    def one(t, positions, orientation, sign_words):
        side = jnp.asarray(sides)[t]
        table = jax.tree.map(lambda table: table[jnp.asarray(size)[t]], tables)
        # In a vector there is one way to cut a window in halves.
        transposed = orientation | (grid.h == 1)
        to, emptied = (_corner(positions[i], side, grid) for i in (0, 1))
        rows, columns = (
            _line(extent, to[axis], emptied[axis], side, table, transposed == (axis == 1))
            for axis, extent in enumerate((grid.h, grid.w))
        )
        return BumpWindows(rows, columns, _signs(_channel_bits(sign_words, grid.c), dtype))

    # Iterations first, then examples.
    per_example = jax.vmap(one, in_axes=(None, 0, 0, 0))
    return jax.vmap(per_example, in_axes=(0, 1, 1, 1))(
        t, draws.positions[:, t], draws.orientation[:, t], draws.signs[:, t]
    )


def _line(extent, to, emptied, side, table: Profiles, is_split) -> Lines:
    def inside(start):
        offset = jnp.arange(extent) - start
        return ((offset >= 0) & (offset < side)).astype(table.split.dtype)

    offset = jnp.clip(jnp.arange(extent) - to, 0, table.split.shape[0] - 1)
    in_to = inside(to)
    ring = jnp.where(is_split, table.split[offset], table.cross[offset])
    scale = jnp.where(is_split, table.scale[offset], 1.0) * in_to
    return Lines(in_to, inside(emptied), ring, scale)


def paint(rows: Lines, columns: Lines, signs: Array) -> tuple[Array, Array, Array]:
    """The masks ``to``, ``emptied`` [n, 1, h, w] and the bump [n, c, h, w] of one iteration."""

    def outer(combine, a, b):
        return combine(a[:, None, :, None], b[:, None, None, :])

    to = outer(jnp.multiply, rows.to, columns.to)
    emptied = outer(jnp.multiply, rows.emptied, columns.emptied)
    ring = outer(jnp.minimum, rows.ring, columns.ring)
    bump = ring * outer(jnp.multiply, rows.scale, columns.scale)
    return to, emptied, bump * signs[:, :, None, None]


def _tile(grid: Grid) -> int:
    """The side of a tile."""
    return max((grid.w if grid.h == 1 else min(grid.h, grid.w)) // 5, 1)


def _tiles(grid: Grid) -> int:
    """How many of them there are."""
    return max(grid.h // _tile(grid), 1) * (grid.w // _tile(grid))


def checkerboard(draws: Draws, grid: Grid, dtype, norm: str) -> Array:
    """Five by five tiles with a bump each, [n, c, h, w]; not normalised.

    Orientation and signs are drawn for each tile.
    """
    tile = _tile(grid)
    table = Profiles(*(t[0] for t in profiles(np.array([tile]), grid.h == 1, norm)))

    def axis(extent):
        """Position within the tile, number of the tile, and 1 where there is a tile at all."""
        size = min(tile, extent)
        offset = np.arange(extent) - extent % size // 2
        inside = (offset >= 0) & (offset < extent // size * size)
        return offset % size, np.where(inside, offset // size, 0), inside.astype(np.float32)

    (row, tile_row, in_row), (column, tile_column, in_column) = axis(grid.h), axis(grid.w)
    mask = np.outer(in_row, in_column)
    halves_in_rows = np.minimum.outer(table.split[row], table.cross[column])
    halves_in_rows *= mask * table.scale[row][:, None]
    halves_in_columns = np.minimum.outer(table.cross[row], table.split[column])
    halves_in_columns *= mask * table.scale[column]

    shape = (tile_row.max() + 1, tile_column.max() + 1, 1 + grid.c)
    bits = draws.start[:, : np.prod(shape)].reshape(-1, *shape) >> (WORD - 1) == 1
    bits = bits[:, tile_row][:, :, tile_column]
    transposed, positive = bits[:, None, :, :, 0] | (grid.h == 1), jnp.moveaxis(bits[..., 1:], 3, 1)
    bump = jnp.where(transposed, halves_in_columns, halves_in_rows)
    return (bump * _signs(positive, jnp.float32)).astype(dtype)
