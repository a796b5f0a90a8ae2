"""Reconstruction in a time projection chamber: track finding, and the classes of points.

Events are rows of points (ADC counts, cm) with the track that each belongs to and the track that a model gives it
(-1: none). Efficiency and purity are those of the FM4NPP evaluation (arXiv 2508.14087): a true track t is found by a
found track a if they share at least 4 points, more than half of the points of t and more than half of those of a.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.evaluation.showers import _flat
from hepzoo.evaluation.tracks_dirc import expand_paths

PID_NAMES = ("other", "pion", "kaon", "proton", "electron")
NOISE_NAMES = ("signal", "noise")
COORDINATES = ("E", "x", "y", "z")
# column of a point -> number of classes, None for any integer
CLASSES = {
    "track_id": None,
    "pid": len(PID_NAMES),
    "noise": len(NOISE_NAMES),
    "predicted_track_id": None,
    "predicted_pid": len(PID_NAMES),
    "predicted_noise": len(NOISE_NAMES),
}
TRUTH = ("truth_track_id", "truth_pdg", "truth_pt", "truth_eta")

MIN_SHARED = 4  # points that a true and a found track must share
MIN_TRUE = 3  # points that a true track must have to count
NOISE_ID = 0  # track id of points that belong to no track
UNASSIGNED = -1  # predicted track id of points that belong to no track
PT_EDGES = np.append(np.linspace(0.0, 3.0, 16), np.inf)  # GeV/c


# ---- events


@dataclass(frozen=True)
class TpcEvents:
    """Events in flat arrays: `n` events, `p` points; those of event `i` are `offsets[i]:offsets[i + 1]`.

    Attributes:
        offsets (`np.ndarray` of shape `(n + 1,)`): first point of every event, and the total.
        points (`dict[str, np.ndarray]`): what is known of the points, shape `(p,)`: of `COORDINATES` and `CLASSES`.
        truth_offsets (`np.ndarray` of shape `(n + 1,)`): first true track of every event, and the total.
        truth (`dict[str, np.ndarray]`): what is known of the true tracks, of `TRUTH`; empty if nothing.
    """

    offsets: np.ndarray
    points: dict[str, np.ndarray]
    truth_offsets: np.ndarray
    truth: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def event(self) -> np.ndarray:
        """Number of the event of every point, shape `(p,)`."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    @cached_property
    def truth_event(self) -> np.ndarray:
        """Number of the event of every true track of the table."""
        return np.repeat(np.arange(len(self)), np.diff(self.truth_offsets))

    def __contains__(self, name: str) -> bool:
        return name in self.points

    def __getitem__(self, name: str) -> np.ndarray:
        """A column of the points.

        Raises:
            ValueError: the events do not have it.
        """
        if name not in self.points:
            raise ValueError(f"column {name!r} is missing (found: {', '.join(self.points) or 'nothing'})")
        return self.points[name]

    def select(self, which: np.ndarray) -> "TpcEvents":
        """The events of a boolean mask of shape `(n,)` or of an array of event numbers, in that order."""
        at, offsets = _take(self.offsets, which)
        truth_at, truth_offsets = _take(self.truth_offsets, which)
        return TpcEvents(
            offsets,
            {name: values[at] for name, values in self.points.items()},
            truth_offsets,
            {name: values[truth_at] for name, values in self.truth.items()},
        )

    @staticmethod
    def concatenate(parts: Sequence["TpcEvents"]) -> "TpcEvents":
        """All events of several sets, in order, with the columns that all of them have."""
        if not parts:
            raise ValueError("no events to concatenate: the list of parts is empty")
        with_truth = all(part.truth for part in parts)

        def joined(columns: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
            names = [name for name in columns[0] if all(name in other for other in columns)]
            return {name: np.concatenate([other[name] for other in columns]) for name in names}

        return TpcEvents(
            _offsets(np.concatenate([np.diff(part.offsets) for part in parts])),
            joined([part.points for part in parts]),
            _offsets(np.concatenate([np.diff(part.truth_offsets) * with_truth for part in parts])),
            joined([part.truth for part in parts]) if with_truth else {},
        )


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _take(offsets: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of all entries of the chosen lists, and their new offsets."""
    which = np.asarray(which)
    index = np.flatnonzero(which) if which.dtype == bool else which.astype(np.int64)
    counts = np.diff(offsets)[index]
    new = _offsets(counts)
    return np.arange(new[-1]) + np.repeat(offsets[index] - new[:-1], counts), new


def as_events(rows: Any, first_row: int = 0) -> TpcEvents:
    """Checks rows and lays them out flat; columns that are none of an event are left aside.

    Args:
        rows: pyarrow table, dict of columns, list of records, `datasets.Dataset`, or `TpcEvents`.
        first_row (`int`): number of the first row in messages.

    Raises:
        ValueError: lists of one row differ in length, a row has no points, a number is not finite, a class is out of
            range, or a true track is twice in its table. The message names the row.
    """
    if isinstance(rows, TpcEvents):
        return rows
    columns = _columns(rows)
    points, offsets = _lists(columns, (*COORDINATES, *CLASSES), first_row)
    if not points:
        raise ValueError(f"no points: a TPC event needs track_id or coordinates (found: {', '.join(columns)})")
    empty = np.flatnonzero(np.diff(offsets) == 0)
    if len(empty):
        raise ValueError(f"row {first_row + empty[0]}: the event has no points")
    truth, truth_offsets = _lists(columns, TRUTH, first_row)
    if "truth_track_id" not in truth:
        truth, truth_offsets = {}, np.zeros_like(offsets)

    def refuse(name: str, values: np.ndarray, wrong: np.ndarray, bounds: np.ndarray, expected: str) -> None:
        at = np.flatnonzero(wrong)
        if len(at):
            row = int(np.searchsorted(bounds, at[0], side="right")) - 1
            place = f"row {first_row + row}: {name}[{at[0] - bounds[row]}]"
            raise ValueError(f"{place} is {values[at[0]]}, expected {expected}")

    for name, values in points.items():
        refuse(name, values, ~np.isfinite(values), offsets, "a finite number")
        if name in CLASSES:
            refuse(name, values, values != np.floor(values), offsets, "an integer")
            classes = CLASSES[name]
            if classes is not None:
                refuse(name, values, (values < 0) | (values >= classes), offsets, f"a class of 0..{classes - 1}")
            points[name] = values.astype(np.int64)
    for name, values in truth.items():
        # along the beam eta has no end
        wrong = np.isnan(values) if name == "truth_eta" else ~np.isfinite(values)
        refuse(name, values, wrong, truth_offsets, "a finite number")
    if truth:
        truth["truth_track_id"] = truth["truth_track_id"].astype(np.int64)
        refuse("truth_pt", truth.get("truth_pt", np.zeros(0)), truth.get("truth_pt", np.zeros(0)) < 0, truth_offsets,
               "at least 0 GeV/c")  # fmt: skip
        event = np.repeat(np.arange(len(truth_offsets) - 1), np.diff(truth_offsets))
        order = np.lexsort((truth["truth_track_id"], event))
        again = np.zeros(len(order), bool)
        again[order[1:]] = (np.diff(event[order]) == 0) & (np.diff(truth["truth_track_id"][order]) == 0)
        refuse("truth_track_id", truth["truth_track_id"], again, truth_offsets, "every track once")
    return TpcEvents(offsets, points, truth_offsets, truth)


def _columns(rows: Any) -> Mapping[str, Any]:
    if hasattr(rows, "with_format") and hasattr(rows, "column_names"):  # datasets.Dataset
        rows = rows.with_format("arrow")[:]
    if hasattr(rows, "column_names") and hasattr(rows, "column"):  # pyarrow.Table
        return {name: rows.column(name) for name in rows.column_names}
    if isinstance(rows, Mapping):
        return rows
    rows = list(rows)
    if not rows:
        raise ValueError("no events: the list of rows is empty")
    for number, row in enumerate(rows):
        missing = [name for name in rows[0] if name not in row]
        if missing:
            raise ValueError(f"row {number}: column {missing[0]!r} is missing (row 0 has it)")
    return {name: [row[name] for row in rows] for name in rows[0]}


def _lists(
    columns: Mapping[str, Any], names: Iterable[str], first_row: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Flat values of the columns that there are, which must have lists of the same lengths, and their offsets."""
    found: dict[str, np.ndarray] = {}
    lengths, first = np.zeros(0, np.int64), ""
    for name in names:
        if name not in columns:
            continue
        values, counts = _flat(_without_booleans(columns[name]), name, first_row)
        if not found:
            lengths, first = counts, name
        if len(counts) != len(lengths):
            raise ValueError(f"column {name!r} has {len(counts)} rows, column {first!r} has {len(lengths)}")
        differ = np.flatnonzero(counts != lengths)
        if len(differ):
            row = differ[0]
            raise ValueError(
                f"row {first_row + row}: {name} has {counts[row]} entries, {first} has {lengths[row]}: expected as many"
            )
        found[name] = values
    return found, _offsets(lengths)


def _without_booleans(column: Any) -> Any:
    """Lists of truth values as lists of 0 and 1."""
    if hasattr(column, "combine_chunks"):
        import pyarrow as pa

        array = column.combine_chunks()
        is_list = pa.types.is_list(array.type) or pa.types.is_large_list(array.type)
        if is_list and pa.types.is_boolean(array.type.value_type):
            return pa.chunked_array([array.cast(pa.list_(pa.int8()))])
        return column
    return [
        np.asarray(v, dtype=np.int8) if v is not None and len(v) and isinstance(v[0], (bool, np.bool_)) else v
        for v in column
    ]


def iter_events(
    paths: str | Path | Iterable[str | Path], max_events: int | None = None, batch_size: int = 500
) -> Iterator[TpcEvents]:
    """Events of Parquet files, folders or glob patterns in batches.

    Args:
        max_events (`int`, *optional*): stop after so many events in all.
        batch_size (`int`): most events at a time.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    left = max_events
    for path in expand_paths(paths):
        row = 0
        try:
            file = pq.ParquetFile(path)
            wanted = [n for n in (*COORDINATES, *CLASSES, *TRUTH) if n in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size, columns=wanted):
                events = as_events(pa.Table.from_batches([batch]), first_row=row)
                row += len(events)
                if left is not None:
                    events = events.select(np.arange(min(left, len(events))))
                    left -= len(events)
                yield events
                if left == 0:
                    return
        except (pa.ArrowException, OSError) as err:
            raise ValueError(f"{path}: not a readable Parquet file ({(str(err).splitlines() or [err])[0]})") from None
        except ValueError as err:
            raise ValueError(f"{path}: {err}") from None


def read_events(paths: str | Path | Iterable[str | Path], max_events: int | None = None) -> TpcEvents:
    """All events of Parquet files, folders or glob patterns (arguments of `iter_events`)."""
    parts = list(iter_events(paths, max_events))
    if not parts:
        names = str(paths) if isinstance(paths, (str, Path)) else ", ".join(map(str, paths))
        raise ValueError(f"{names}: no events")
    return TpcEvents.concatenate(parts)


# ---- contingency of true and found tracks


@dataclass(frozen=True)
class Contingency:
    """How many points true and found tracks share.

    Attributes:
        true_event, true_id, true_points (`np.ndarray` of shape `(t,)`): event, id and points of every true track.
        found_event, found_id, found_points (`np.ndarray` of shape `(f,)`): the same of every found track.
        true, found, shared (`np.ndarray` of shape `(pairs,)`): numbers of the true and of the found track of every pair
            that shares points, and how many; ordered by event, found id and true id.
        num_events (`int`): of all.
    """

    true_event: np.ndarray
    true_id: np.ndarray
    true_points: np.ndarray
    found_event: np.ndarray
    found_id: np.ndarray
    found_points: np.ndarray
    true: np.ndarray
    found: np.ndarray
    shared: np.ndarray
    num_events: int


def contingency(event: np.ndarray, true_id: np.ndarray, found_id: np.ndarray, num_events: int) -> Contingency:
    """Counts the points of every true track, found track and pair of them; arguments are per point, shape `(p,)`."""
    true_event, true_ids, true, true_points = _groups(event, true_id)
    found_event, found_ids, found, found_points = _groups(event, found_id)
    pairs, shared = np.unique(found * max(len(true_ids), 1) + true, return_counts=True)
    found, true = np.divmod(pairs, max(len(true_ids), 1))
    return Contingency(
        true_event, true_ids, true_points, found_event, found_ids, found_points, true, found, shared, num_events
    )


def _groups(event: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Event, id, members and size of every (event, id), ordered by both."""
    values, number = np.unique(ids, return_inverse=True)  # ids may be any 64-bit integers
    keys, member, size = np.unique(
        event * max(len(values), 1) + number.reshape(-1), return_inverse=True, return_counts=True
    )
    group_event, number = np.divmod(keys, max(len(values), 1))
    return group_event, values[number], member.reshape(-1), size


# ---- adjusted Rand index


def _rand_index(points, together, together_true, together_found) -> np.ndarray:
    """Adjusted Rand index from numbers of points and of pairs of points (in the same cell, true and found track)."""
    points = np.asarray(points, np.float64)
    expected = together_true * together_found / np.maximum(points * (points - 1) / 2, 1)
    best = (together_true + together_found) / 2
    # both sides put all points together, or all apart: the same partition
    same = (together == together_true) & (together == together_found)
    return np.where(same, 1.0, (together - expected) / np.where(same, 1.0, best - expected))


def _pairs(counts: np.ndarray) -> np.ndarray:
    return counts * (counts - 1.0) / 2


def adjusted_rand_index(table: Contingency) -> tuple[np.ndarray, float]:
    """Adjusted Rand index of true and found tracks.

    Returns:
        of every event, shape `(n,)`, NaN for an event without points; and pooled: of all points together, tracks of
        different events being different. The mean of the first is the published figure, the second is lower because
        it weights events by their points.
    """
    n = table.num_events
    sums = [
        np.bincount(events, _pairs(counts), n)
        for events, counts in (
            (table.true_event[table.true], table.shared),
            (table.true_event, table.true_points),
            (table.found_event, table.found_points),
        )
    ]
    points = np.bincount(table.true_event, table.true_points, n)
    per_event = np.where(points > 0, _rand_index(points, *sums), np.nan)
    return per_event, float(_rand_index(points.sum(), *(s.sum() for s in sums))) if points.any() else float("nan")


# ---- efficiency and purity


@dataclass(frozen=True)
class TrackMatches:
    """True and found tracks and which belong together.

    Attributes:
        true_event, true_id, true_points (`np.ndarray` of shape `(t,)`): the true tracks that count.
        true_found (`np.ndarray` of shape `(t,)`): whether a found track matches.
        found_event, found_id, found_points (`np.ndarray` of shape `(f,)`): the found tracks that count.
        found_true_id (`np.ndarray` of shape `(f,)`): the true track that most of its points belong to.
        found_purity (`np.ndarray` of shape `(f,)`): the share of its points from there.
        found_passes (`np.ndarray` of shape `(f,)`): whether it matches a true track.
        found_is_noise (`np.ndarray` of shape `(f,)`): whether most of its points are noise.
    """

    true_event: np.ndarray
    true_id: np.ndarray
    true_points: np.ndarray
    true_found: np.ndarray
    found_event: np.ndarray
    found_id: np.ndarray
    found_points: np.ndarray
    found_true_id: np.ndarray
    found_purity: np.ndarray
    found_passes: np.ndarray
    found_is_noise: np.ndarray


def match_tracks(table: Contingency, noise_id: int | None = NOISE_ID, published: bool = False) -> TrackMatches:
    """Applies the matching rules.

    A pair of a true track t and a found track a passes when it shares at least `MIN_SHARED` points, more than half of
    those of t and more than half of those of a. True tracks of at least `MIN_TRUE` points count, and found tracks that
    share at least `MIN_SHARED` points with the true track that most of their points belong to (the smaller id of two).

    Args:
        noise_id (`int`, *optional*): true id of points that belong to no track; a cluster of them is neither a true
            track nor, when found, a track of some momentum. `None`: no such id.
        published (`bool`): as the published evaluation counts: unassigned points are a found track, and the true track
            of a found one, for its pT and for `MIN_SHARED`, is that of the smallest id that it shares points with, not
            the one it shares most with.
    """
    share_of_found = table.shared / table.found_points[table.found]
    share_of_true = table.shared / table.true_points[table.true]
    assigned = table.found_id != UNASSIGNED
    is_noise = np.zeros(len(table.true_id), bool) if noise_id is None else table.true_id == noise_id
    passes = (table.shared >= MIN_SHARED) & (share_of_true > 0.5) & (share_of_found > 0.5)
    passes &= ~is_noise[table.true]
    if not published:
        passes &= assigned[table.found]

    # pairs are ordered by found track, then true id: the first of the largest, or the first at all
    order = np.lexsort((table.true, -table.shared, table.found))
    majority = order[np.unique(table.found[order], return_index=True)[1]]
    first = np.unique(table.found, return_index=True)[1]
    chosen = first if published else majority
    counts = (table.shared[chosen] >= MIN_SHARED) & (published | assigned)

    true_found = np.zeros(len(table.true_id), bool)
    true_found[table.true[passes]] = True
    found_passes = np.zeros(len(table.found_id), bool)
    found_passes[table.found[passes]] = True
    keep = (table.true_points >= MIN_TRUE) & ~is_noise
    return TrackMatches(
        true_event=table.true_event[keep],
        true_id=table.true_id[keep],
        true_points=table.true_points[keep],
        true_found=true_found[keep],
        found_event=table.found_event[counts],
        found_id=table.found_id[counts],
        found_points=table.found_points[counts],
        found_true_id=table.true_id[table.true[chosen]][counts],
        found_purity=share_of_found[majority][counts],
        found_passes=found_passes[counts],
        found_is_noise=is_noise[table.true[majority]][counts],
    )


def look_up_truth(events: TpcEvents, event: np.ndarray, track_id: np.ndarray, name: str) -> np.ndarray:
    """A quantity of the table of true tracks, such as `truth_pt`, of tracks; NaN for those that it does not have."""
    values = np.full(len(event), np.nan)
    if name not in events.truth:
        return values
    ids, number = np.unique(np.concatenate([events.truth["truth_track_id"], track_id]), return_inverse=True)
    number = number.reshape(-1)
    known = len(events.truth_event)
    keys = events.truth_event * len(ids) + number[:known]
    wanted = event * len(ids) + number[known:]
    order = np.argsort(keys)
    at = np.minimum(np.searchsorted(keys[order], wanted), max(known - 1, 0))
    hit = (keys[order][at] == wanted) if known else np.zeros(len(wanted), bool)
    values[hit] = events.truth[name][order[at[hit]]]
    return values


def efficiency_by_pt(
    matches: TrackMatches, true_pt: np.ndarray, found_pt: np.ndarray, edges: Sequence[float] = PT_EDGES
) -> list[dict[str, float]]:
    """Efficiency, purity and fake rate in bins of pT [GeV/c], one row per bin; a bin holds its lower edge.

    Args:
        matches (`TrackMatches`): of `match_tracks`.
        true_pt, found_pt (`np.ndarray`): pT of the true tracks, and of the true track of the found ones.
        edges: rising; the last may be infinite.

    Returns:
        `low`, `high`, `true_tracks`, `efficiency` and its binomial error, `found_tracks`, `purity` (mean) and its error
        (of the mean), `fake_rate` and its binomial error; NaN without tracks.
    """
    edges = np.asarray(edges, np.float64)
    true_bin, found_bin = (np.searchsorted(edges, pt, side="right") - 1 for pt in (true_pt, found_pt))
    rows = []
    for number, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        true, found = (true_bin == number) & np.isfinite(true_pt), (found_bin == number) & np.isfinite(found_pt)
        rows.append({"low": float(low), "high": float(high), **_figures(matches, true, found)})
    return rows


def _figures(matches: TrackMatches, true: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Efficiency, purity and fake rate of the true and found tracks of two masks."""
    purity = matches.found_purity[found]
    efficiency, efficiency_error = _share(matches.true_found[true])
    fake_rate, fake_rate_error = _share(~matches.found_passes[found])
    return {
        "true_tracks": int(true.sum()),
        "efficiency": efficiency,
        "efficiency_error": efficiency_error,
        "found_tracks": int(found.sum()),
        "purity": float(purity.mean()) if len(purity) else float("nan"),
        "purity_error": float(purity.std(ddof=1) / np.sqrt(len(purity))) if len(purity) > 1 else float("nan"),
        "fake_rate": fake_rate,
        "fake_rate_error": fake_rate_error,
    }


def _share(passing: np.ndarray) -> tuple[float, float]:
    if not len(passing):
        return float("nan"), float("nan")
    share = float(passing.mean())
    return share, float(np.sqrt(share * (1 - share) / len(passing)))


def track_finding(
    events: TpcEvents,
    edges: Sequence[float] = PT_EDGES,
    noise_id: int | None = NOISE_ID,
    published: bool = False,
) -> dict[str, Any]:
    """All figures of track finding of events with `track_id` and `predicted_track_id`.

    Args:
        edges: of the bins of pT, GeV/c.
        noise_id, published: of `match_tracks`.

    Returns:
        `ari` (mean over events), `ari_error` (of the mean), `ari_pooled`; the same with `_tracks` in the name of the
        points that belong to true tracks only (their true id is not `noise_id`); `true_tracks`, `efficiency`,
        `found_tracks`, `purity`, `fake_rate` and their errors, over all pT; `noise_tracks`: found tracks most of whose
        points are noise, which `found_tracks` and `fake_rate` include, and `fake_rate_without_noise` and
        `purity_without_noise`, which leave them out; `unassigned`: share of points given to no track; `by_pt`: rows of
        `efficiency_by_pt`, empty without `truth_pt`; `mean_efficiency`, `mean_purity`: over the bins that have
        tracks and an upper edge.
    """
    true_id, found_id = events["track_id"], events["predicted_track_id"]
    table = contingency(events.event, true_id, found_id, len(events))
    per_event, pooled = adjusted_rand_index(table)
    report: dict[str, Any] = {"events": len(events), "points": len(true_id)}
    report |= {**_mean(per_event, "ari"), "ari_pooled": pooled}
    if noise_id is not None:
        of_tracks = true_id != noise_id
        part = contingency(events.event[of_tracks], true_id[of_tracks], found_id[of_tracks], len(events))
        per_event, pooled = adjusted_rand_index(part)
        report |= {**_mean(per_event, "ari_tracks"), "ari_tracks_pooled": pooled}

    matches = match_tracks(table, noise_id, published)
    every = np.ones(len(matches.true_id), bool), np.ones(len(matches.found_id), bool)
    report |= _figures(matches, *every)
    some = _figures(matches, every[0], ~matches.found_is_noise)
    report["noise_tracks"] = int(matches.found_is_noise.sum())
    report["fake_rate_without_noise"], report["purity_without_noise"] = some["fake_rate"], some["purity"]
    report["unassigned"] = float(np.mean(found_id == UNASSIGNED))
    report["by_pt"] = []
    if "truth_pt" in events.truth:
        pts = [
            look_up_truth(events, event, track, "truth_pt")
            for event, track in ((matches.true_event, matches.true_id), (matches.found_event, matches.found_true_id))
        ]
        report["by_pt"] = efficiency_by_pt(matches, *pts, edges)
        report["without_pt"] = int(np.isnan(pts[0]).sum())
        for name in ("efficiency", "purity"):
            # the published mean is over 0 to 3 GeV/c, without what is above
            values = [row[name] for row in report["by_pt"] if np.isfinite(row["high"]) and not np.isnan(row[name])]
            report[f"mean_{name}"] = float(np.mean(values)) if values else float("nan")
    return report


def _mean(values: np.ndarray, name: str) -> dict[str, float]:
    values = values[~np.isnan(values)]
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return {name: float(values.mean()) if len(values) else float("nan"), f"{name}_error": error}


# ---- classes of points


def confusion_matrix(references: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Points by true class (row) and predicted class (column), shape `(num_classes, num_classes)`.

    Raises:
        ValueError: lengths differ, there are no points, or a class is out of range; names the point.
    """
    references, predictions = np.asarray(references), np.asarray(predictions)
    if references.ndim != 1 or references.shape != predictions.shape or not len(references):
        raise ValueError(
            f"expected as many predictions as references, at least one, got shapes {predictions.shape} and "
            f"{references.shape}"
        )
    for kind, values in (("reference", references), ("prediction", predictions)):
        wrong = np.flatnonzero((values < 0) | (values >= num_classes))
        if len(wrong):
            raise ValueError(f"{kind} {wrong[0]} is {values[wrong[0]]}, expected a class of 0..{num_classes - 1}")
    pairs = references.astype(np.int64) * num_classes + predictions
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def point_classification(matrix: np.ndarray, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Figures of a confusion matrix: `accuracy`, `macro_precision`, `macro_recall`, and `classes`, one row per class.

    Args:
        matrix (`np.ndarray` of shape `(classes, classes)`): of `confusion_matrix`.
        names (*optional*): of the classes, default their numbers.
    """
    names = [str(i) for i in range(len(matrix))] if names is None else list(names)
    if len(names) != len(matrix):
        raise ValueError(f"{len(names)} names for {len(matrix)} classes")
    right, true, found = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    precision, recall = right / np.maximum(found, 1), right / np.maximum(true, 1)
    occurs = (true > 0) | (found > 0)
    rows = [
        {"class": name, "points": int(t), "predicted": int(f), "precision": float(p), "recall": float(r)}
        for name, t, f, p, r in zip(names, true, found, precision, recall, strict=True)
    ]
    return {
        "accuracy": float(right.sum() / matrix.sum()),
        "macro_precision": float(precision[occurs].mean()),
        "macro_recall": float(recall[occurs].mean()),
        "classes": rows,
    }
