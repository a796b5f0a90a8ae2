"""The delay pattern: streams of one sequence stand at different distances behind its start.

With delay d_k, entry i of stream k stands at position 1 + d_k + i behind the slots: streams of different hits share a
position, and the features of one hit are predicted one after the other. Delays of 0 give the plain sequence. SPADE
(arXiv 2606.11304) has delays x 1, y 2, z 0, energy 3.

Rows of different lengths lie end to end in flat arrays: `values` (sum of lengths, streams) and `lengths` (rows,).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def delay_streams(
    values: np.ndarray,
    lengths: np.ndarray,
    delays: Sequence[int],
    bos_values: Any,
    end_values: Any,
    num_slots: int,
    num_end: int = 0,
    max_delay: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Writes the entries of each row into its delayed streams.

    Stream k of a row with n entries becomes (D = max_delay)

        [bos_k] * (num_slots + 1 + d_k),  n entries,  [end_k] * (D - d_k + num_end)

    Args:
        values: (sum of lengths, streams), ids or floats.
        lengths: entries of each row, int (rows,).
        delays: d_k of each stream.
        bos_values, end_values: one for all streams, or one per stream.
        num_slots: positions in front of the beginning-of-sequence position.
        num_end: positions of `end_values` behind the last entry of the latest stream.
        max_delay: D, at least the largest of `delays` (its default). Set it where several calls write streams of one
            sequence, such as ids and floats.

    Returns:
        (streams, totals): (sum of totals, streams) in the dtype of `values`, and the positions of each row, int64
        (rows,), num_slots + 1 + n + D + num_end.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    max_delay = max(delays) if max_delay is None else max_delay
    totals = lengths + (num_slots + 1 + max_delay + num_end)
    starts = np.cumsum(totals) - totals
    entry = np.arange(len(values)) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    streams = np.empty((int(totals.sum()), len(delays)), dtype=values.dtype)
    bos_values, end_values = np.broadcast_to(bos_values, len(delays)), np.broadcast_to(end_values, len(delays))
    for k, delay in enumerate(delays):
        before = num_slots + 1 + delay
        streams[starts[:, None] + np.arange(before), k] = bos_values[k]
        streams[entry + before, k] = values[:, k]
        behind = starts + before + lengths
        streams[behind[:, None] + np.arange(max_delay - delay + num_end), k] = end_values[k]
    return streams, totals


def undelay_streams(
    streams: np.ndarray, lengths: np.ndarray, delays: Sequence[int], valid: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `delay_streams`: brings what belongs to one hit to one position.

    Position p of the result holds stream k of position p + d_k of the same row, so hit i stands at
    num_slots + 1 + i whatever the delays.

    Args:
        streams: (sum of lengths, streams).
        lengths: positions of each row, int (rows,).
        delays: d_k of each stream.
        valid: bool, shape of `streams`: the entries that can belong to a hit (ordinary ids).

    Returns:
        (values, complete): `values` has the shape of `streams`, 0 where position p + d_k is beyond the row; `complete`
        bool (sum of lengths,) is True where the entries of all streams exist and are valid.
    """
    index = np.arange(len(streams))
    ends = np.repeat(np.cumsum(lengths), lengths)
    values = np.zeros_like(streams)
    complete = np.ones(len(streams), dtype=bool)
    for k, delay in enumerate(delays):
        inside = index + delay < ends
        source = index[inside] + delay
        values[inside, k] = streams[source, k]
        complete[inside] &= valid[source, k]
        complete[~inside] = False
    return values, complete
