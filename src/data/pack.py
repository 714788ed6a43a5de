"""Documents of any length into rows of one length, with almost no padding and each token exactly once.

A document longer than a row is cut into pieces; a piece is a document of its own to the model (its positions start at
zero, it attends to itself only, its first token is not predicted).

Shape letters: D = documents, P = pieces, R = rows, F = fragments of pieces.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llamita.data import order

Int = NDArray[np.int64]


@dataclass(kw_only=True)
class PackingConfig:
    """How documents share rows."""

    max_padding: float = 0.02
    """Share of positions that may stay empty before documents are cut to fill them; 1 cuts none that fits a row."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what cannot be meant."""
        if not 0 <= self.max_padding <= 1:
            raise ValueError(f"packing.max_padding must be in 0..1, got {self.max_padding}")


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Where each piece lies: ``length`` tokens from ``start`` on in the stream of all documents, in row ``row``.

    Pieces are sorted by row; within a row they follow each other in this order from its first position on.
    """

    start: Int
    length: Int
    row: Int
    num_rows: int
    sequence_length: int

    @property
    def padding(self) -> float:
        """Share of positions that hold no token."""
        return 1 - int(self.length.sum()) / max(1, self.num_rows * self.sequence_length)


def pack(
    start_D: Int, length_D: Int, sequence_length: int, config: PackingConfig | None = None, *, seed: int = 0
) -> Packing:
    """Pack documents into the fewest rows that best-fit-decreasing finds, then into fewer where padding is too much.

    Whole rows are cut off each document; what remains of it is packed by best fit, longest first, which needs at most
    11/9 of the fewest rows possible (Johnson et al., 1974, doi:10.1137/0203025, theorem 2.1). Lengths just above half
    a row fit together with nothing: while more than ``max_padding`` of all positions is empty, the emptiest rows are
    dissolved and their documents are cut to fill the gaps of the others. The bound holds wherever there are tokens
    enough for it; the last row of a small corpus may be emptier. ``max_padding=1`` cuts no document that fits a row.

    Rows come in a pseudo-random order, so that the first rows are a fair sample of all.
    """
    if sequence_length < 2:
        raise ValueError(f"sequence_length must be at least 2, got {sequence_length}")
    max_padding = (config or PackingConfig()).max_padding
    whole_D, rest_D = length_D // sequence_length, length_D % sequence_length
    document_W = np.repeat(np.arange(length_D.size), whole_D)
    nth_W = np.arange(document_W.size) - np.repeat(np.cumsum(whole_D) - whole_D, whole_D)
    rest = np.flatnonzero(rest_D)
    start_P = (start_D + whole_D * sequence_length)[rest]
    length_P = rest_D[rest]
    row_P, num_bins = best_fit(length_P, sequence_length)
    surplus = document_W.size + num_bins - _fewest_rows(int(length_D.sum()), sequence_length, max_padding)
    if max_padding < 1 and surplus > 0:
        start_P, length_P, row_P = dissolve(start_P, length_P, row_P, num_bins, surplus, sequence_length)
        num_bins -= surplus
    num_rows = num_bins + document_W.size
    start_P = np.concatenate([start_P, start_D[document_W] + nth_W * sequence_length])
    length_P = np.concatenate([length_P, np.full(document_W.size, sequence_length, dtype=np.int64)])
    row_P = np.concatenate([row_P, num_bins + np.arange(document_W.size)])
    row_P = order.permute(row_P, num_rows, seed)
    sort = np.argsort(row_P, kind="stable")
    return Packing(
        start=start_P[sort],
        length=length_P[sort],
        row=row_P[sort],
        num_rows=num_rows,
        sequence_length=sequence_length,
    )


def _fewest_rows(num_tokens: int, sequence_length: int, max_padding: float) -> int:
    """The largest number of rows whose padding is at most ``max_padding``, or else all that the tokens need."""
    allowed = int(num_tokens / ((1 - max_padding) * sequence_length)) if max_padding < 1 else 0
    return max(-(-num_tokens // sequence_length), allowed)


def best_fit(length_P: Int, capacity: int) -> tuple[Int, int]:
    """Bin of each piece by best-fit-decreasing, and how many bins there are.

    Pieces of one length and bins of one remaining space are handled together: a bin that fits best for a piece still
    fits best for the next of the same length, so it takes as many as it can. The cost is that of sorting the lengths
    plus a few array operations per distinct length, not per piece.
    """
    bin_P = np.empty(length_P.size, dtype=np.int64)
    by_length = np.argsort(-length_P, kind="stable")
    lengths, counts = np.unique(length_P, return_counts=True)
    open_bins: dict[int, list[Int]] = defaultdict(list)
    spaces = 0  # bit s is set while some bin has s positions left
    num_bins, done = 0, 0
    for length, count in zip(lengths[::-1].tolist(), counts[::-1].tolist(), strict=True):
        pieces = by_length[done : done + count]
        done += count
        while pieces.size:
            fitting = spaces >> length
            if fitting:
                space = length + (fitting & -fitting).bit_length() - 1
                groups = open_bins.pop(space)
                bins = groups[0] if len(groups) == 1 else np.concatenate(groups)
                spaces ^= 1 << space
            else:
                space = capacity
                bins = num_bins + np.arange(-(-pieces.size // (capacity // length)))
                num_bins += bins.size
            each = space // length
            taken = min(pieces.size, bins.size * each)
            full, part = divmod(taken, each)
            bin_P[pieces[:taken]] = np.repeat(bins[: full + 1], each)[:taken]
            pieces = pieces[taken:]
            for group, left in (
                (bins[:full], space - each * length),
                (bins[full : full + 1], space - part * length),
                (bins[full + 1 :], space),
            ):
                if group.size and left:
                    open_bins[left].append(group)
                    spaces |= 1 << left
    return bin_P, num_bins


def dissolve(
    start_P: Int, length_P: Int, bin_P: Int, num_bins: int, num_dissolved: int, capacity: int
) -> tuple[Int, Int, Int]:
    """Empty the ``num_dissolved`` emptiest bins into the gaps of the others, the largest gaps first.

    The pieces of the dissolved bins and the gaps are laid end to end on one line; each stretch between two
    neighbouring borders of either kind is a fragment. Bins are numbered anew from zero.
    """
    used_B = np.bincount(bin_P, weights=length_P, minlength=num_bins).astype(np.int64)
    fullest_first = np.argsort(-used_B, kind="stable")
    kept_bins = fullest_first[: num_bins - num_dissolved][::-1]
    number_B = np.full(num_bins, -1, dtype=np.int64)
    number_B[kept_bins] = np.arange(kept_bins.size)
    kept_P = number_B[bin_P] >= 0
    loose = np.flatnonzero(~kept_P)
    piece_end = np.cumsum(length_P[loose])
    gap_end = np.cumsum(capacity - used_B[kept_bins])
    volume = int(piece_end[-1])
    border = np.union1d(np.concatenate([piece_end, gap_end[gap_end < volume]]), [0])
    begin_F, length_F = border[:-1], np.diff(border)
    piece_F = np.searchsorted(piece_end, begin_F, side="right")
    piece_begin = piece_end - length_P[loose]
    return (
        np.concatenate([start_P[kept_P], start_P[loose][piece_F] + begin_F - piece_begin[piece_F]]),
        np.concatenate([length_P[kept_P], length_F]),
        np.concatenate([number_B[bin_P[kept_P]], np.searchsorted(gap_end, begin_F, side="right")]),
    )
