"""The order of training rows: a pure function of the seed and of how many samples were consumed.

Sample ``n`` of a run over ``R`` rows is row ``permutation(seed, n // R)[n % R]``. No permutation is ever stored: each
element is computed on its own, so that the order costs no memory, needs no start-up, and resumes anywhere.

Shape letters: N = samples asked for at once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
"""Of the Feistel network; four already give a pseudo-random permutation of a large domain (Luby and Rackoff, 1988,
SIAM J. Comput. 17(2), theorem 1), the rest is for the small domains of short corpora."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64-bit words in which every input bit moves every output bit.

    The finaliser of SplitMix64 (Steele, Lea and Flood, 2014, doi:10.1145/2660193.2660195, figure 16, variant 13).
    """
    with np.errstate(over="ignore"):
        value = value + _GOLDEN
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def permute(index_N: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Elements ``index`` of the pseudo-random permutation of ``0..size-1`` that ``key`` names.

    A balanced Feistel network permutes the smallest domain ``4**half_bits >= size``; what falls outside ``size`` is
    sent through again until it falls inside (cycle walking: Black and Rogaway, 2002, doi:10.1007/3-540-45760-7_9,
    section 4), which is again a permutation. The domain is less than four times ``size``, so an element takes less
    than four passes on average.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = [mix(np.array(key % 2**64, dtype=np.uint64) ^ mix(np.array(r, dtype=np.uint64))) for r in range(ROUNDS)]
    value_N = index_N.astype(np.uint64)
    outside = np.arange(value_N.size)
    while outside.size:
        value_N[outside] = _feistel(value_N[outside], half_bits, keys)
        outside = outside[value_N[outside] >= size]
    return value_N.astype(np.int64)


def _feistel(value: NDArray[np.uint64], half_bits: int, keys: list[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    shift, low = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left, right = value >> shift, value & low
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & low)
    return left << shift | right


def rows(seed: int, num_rows: int, start: int, stop: int) -> NDArray[np.int64]:
    """Rows of samples ``start`` to ``stop``; each epoch is a permutation of its own, and none is cut short."""
    sample_N = np.arange(start, stop, dtype=np.int64)
    row_N = np.empty_like(sample_N)
    for epoch in range(start // num_rows, -(-stop // num_rows)):
        here = sample_N // num_rows == epoch
        row_N[here] = permute(sample_N[here] % num_rows, num_rows, _key(seed, epoch))
    return row_N


def _key(seed: int, epoch: int) -> int:
    return int(mix(mix(np.array(seed % 2**64, dtype=np.uint64)) ^ np.array(epoch, dtype=np.uint64)))
