"""Feature extraction of FM4NPP (arXiv 2508.14087): the space points of a time projection chamber <-> model inputs.

A point (E, x, y, z) in ADC counts and cm becomes (E, eta, phi, r), normalised. The points of an event are put in the
order in which the model reads them, and each gets the pre-training target: where its nearest neighbours of larger
radius are.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BatchEncoding, FeatureExtractionMixin
from transformers.utils import logging

from .batching import IGNORE_INDEX, as_tensors, check_integer, padding_strategy, round_up, split_rows
from .records_dirc import list_column, short_repr, to_numpy
from .space_filling_curves import hilbert_codes, z_order_codes

logger = logging.get_logger(__name__)

POINT_FIELDS = ("E", "x", "y", "z")
LABEL_FIELDS = {"track_id": "track_labels", "pid": "pid_labels", "noise": "noise_labels"}
AXES = ("eta", "phi", "radius")
RASTER_ORDERS = tuple("".join(letters) for letters in permutations("EPR"))
ORDERS = (*RASTER_ORDERS, "hilbert", "z-order", "none")
BIN_EDGES_COMMAND = "hepzoo convert-data tpc-bin-edges EVENTS.parquet --output FOLDER"

# Lattice of the space-filling curves: normalised coordinates times 10^4 in 16 bits
_CURVE_SCALE = 1e4
_CURVE_BITS = 16
# Distances that are held at a time; more would leave the cache of the processor
_BLOCK_DISTANCES = 2**15
# Where the pad rows change their length, cm. The space between the two groups of rows is a wide gap in r.
_MODULE_BOUNDARIES = (40.0, 57.0)
_BOUNDARY_WINDOW = 3.0


def neighbor_targets(coordinates: np.ndarray, num_neighbors: int) -> np.ndarray:
    """Where the nearest later points are (the pre-training target of FM4NPP).

    Args:
        coordinates: float32 (points, 3), (eta, phi, r) normalised, by ascending r.
        num_neighbors: k.

    Returns:
        float32 (points, 3 * k): the coordinates of the k points further down the array that have the smallest Euclidean
        distance to the point, nearest first; of equal distances the earlier point first; -100 where there are fewer.
        phi is not periodic here, as in the reference.
    """
    coordinates = np.ascontiguousarray(coordinates, dtype=np.float32)
    size = len(coordinates)
    targets = np.full((size, num_neighbors, 3), IGNORE_INDEX, dtype=np.float32)
    none = np.iinfo(np.uint64).max
    rows_at_once = max(1, _BLOCK_DISTANCES // max(size, 1))
    for start in range(0, size - 1, rows_at_once):
        stop = min(start + rows_at_once, size - 1)
        later = coordinates[start + 1 :]
        squared = np.zeros((stop - start, len(later)), dtype=np.float32)
        for axis in range(3):
            difference = coordinates[start:stop, None, axis] - later[:, axis]
            difference *= difference
            squared += difference
        # One integer sorts by distance, then by place: the bits of non-negative floats are ordered as the floats are.
        keys = squared.view(np.uint32).astype(np.uint64)
        keys <<= np.uint64(32)
        keys |= np.arange(len(later), dtype=np.uint64)
        rows = stop - start
        keys[:, :rows][np.tri(rows, rows, -1, dtype=bool)] = none
        count = min(num_neighbors, len(later))
        if count < len(later):
            keys.partition(count - 1, axis=1)
        nearest = np.sort(keys[:, :count], axis=1)
        exists = nearest != none
        place = np.where(exists, nearest & np.uint64(0xFFFFFFFF), 0).astype(np.int64)
        targets[start:stop, :count] = np.where(exists[..., None], later[place], np.float32(IGNORE_INDEX))
    return targets.reshape(size, 3 * num_neighbors)


class Fm4nppFeatureExtractor(FeatureExtractionMixin):
    """Turns space points into the inputs of the FM4NPP models and back (arXiv 2508.14087).

    The coordinates are r = sqrt(x^2 + y^2), phi = atan2(y, x) and eta = atanh(z / |(x, y, z)|), each scaled so that its
    limits become 0 and 1 (points beyond are kept), and E is standardised. All arithmetic is float32.

    Args:
        bin_edges: for the raster orders, a mapping of "eta", "phi", "radius" to ascending edges in normalised
            coordinates, or the name of a JSON file with one. `compute_bin_edges` makes them from data. Points outside
            belong to the outer bins.
        order (`str`): "EPR" and its permutations scan the cells of the bins (the raster scan of the paper): the letters
            name the coordinates (eta, phi, radius) from the fastest to the slowest, and points of one cell stay in
            ascending r; "hilbert" and "z-order" follow these curves; "none" is ascending r.
        num_neighbors (`int`): neighbours of the pre-training target, k.
        max_points (`int`): longest event that is accepted.
        padding_value (`float`): of `points`; the mask tells padding from points. The reference pads by -100.
        energy_mean, energy_std (`float`): ADC counts.
        eta_limits, phi_limits, radius_limits: become 0 and 1; radius in cm.

    Example:
        >>> extractor = Fm4nppFeatureExtractor(order="none")
        >>> batch = extractor({"E": [[250.0]], "x": [[30.0]], "y": [[40.0]], "z": [[10.0]]}, return_tensors="pt")
        >>> batch["points"].shape
        torch.Size([1, 1, 4])
    """

    model_input_names = ["points", "attention_mask"]

    def __init__(
        self,
        bin_edges: Mapping[str, Sequence[float]] | str | Path | None = None,
        order: str = "EPR",
        num_neighbors: int = 30,
        max_points: int = 3200,
        padding_value: float = 0.0,
        energy_mean: float = 253.0982,
        energy_std: float = 268.7093,
        eta_limits: Sequence[float] = (-2.0, 2.0),
        phi_limits: Sequence[float] = (-np.pi, np.pi),
        radius_limits: Sequence[float] = (31.371997833251953, 75.38493347167969),
        **kwargs,
    ):
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
        self.order = order
        self.num_neighbors = check_integer("num_neighbors", num_neighbors, 1)
        self.max_points = check_integer("max_points", max_points, 1)
        self.padding_value = _finite("padding_value", padding_value)
        self.energy_mean = _finite("energy_mean", energy_mean)
        self.energy_std = _finite("energy_std", energy_std)
        if self.energy_std <= 0:
            raise ValueError(f"energy_std must be positive, got {energy_std!r}")
        self.eta_limits = _limits("eta_limits", eta_limits)
        self.phi_limits = _limits("phi_limits", phi_limits)
        self.radius_limits = _limits("radius_limits", radius_limits)
        self.bin_edges = _read_bin_edges(bin_edges)
        # How many events were left out on request, by reason
        self.dropped: Counter = Counter()
        super().__init__(**kwargs)

    def __getstate__(self):
        # Counts must not change the fingerprint that datasets.map takes of its function.
        return {**self.__dict__, "dropped": Counter()}

    @classmethod
    def from_dict(cls, feature_extractor_dict: dict[str, Any], **kwargs) -> Any:
        """As of any extractor. A saved one holds its bin edges: the name of another file could be anywhere.

        Raises:
            ValueError: `bin_edges` in the dictionary is a name.
        """
        settings = {"bin_edges": None, **feature_extractor_dict}
        if isinstance(settings["bin_edges"], (str, Path)) and "bin_edges" not in kwargs:
            raise ValueError(
                f"saved feature extractor: bin_edges is {str(settings['bin_edges'])!r}, expected the edges themselves; "
                "from_pretrained(..., bin_edges=FILE) reads them from a JSON file, and save_pretrained writes them"
            )
        return super().from_dict(settings, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The settings, as saved in `preprocessor_config.json`."""
        return {name: value for name, value in super().to_dict().items() if name != "dropped"}

    # --- encoding ----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        rows: Any,
        padding: bool | str = True,
        return_tensors: str | None = None,
        on_invalid: str = "error",
        return_neighbor_labels: bool = True,
        return_row_index: bool = False,
        pad_to_multiple_of: int | None = None,
    ) -> BatchEncoding:
        """Encodes events.

        Args:
            rows: a list of records, a dict of columns, or one record. A record has the lists E [ADC counts], x, y, z
                [cm] and may have the labels track_id, pid, noise, one integer per point. Other fields are ignored.
            padding: True or "longest", "max_length" (`max_points`), or False for ragged output.
            return_tensors: None, "np" or "pt"; a batch must then be padded.
            on_invalid: "error" raises one line on the first invalid event; "drop_long" leaves out events of more than
                `max_points` points; "drop_events" leaves out these, events without points, and events with a point that
                is not finite or lies on the beam axis. What is left out is counted by reason in `extractor.dropped`;
                all but long events are logged, once per call.
            return_neighbor_labels: False saves the time for the pre-training targets.
            return_row_index: adds `row_index`, the input row of each encoded event.
            pad_to_multiple_of: rounds the array length up.

        Returns:
            `BatchEncoding`, per event with its points in sequence order:
            - `points` float32 (length, 4), normalised (E, eta, phi, r), `padding_value` at padding;
            - `attention_mask` int64 (length,), 1 at points;
            - `neighbor_labels` float32 (length, 3 * num_neighbors), see `neighbor_targets`; -100 for none;
            - `track_labels`, `pid_labels`, `noise_labels` int64 (length,), if the rows have them; -100 at padding;
            - `order` int64 (length,): which point of the row stands here; -100 at padding. See `restore_order`.
            Batches are stacked arrays if padded, else lists of arrays; one record gives its arrays without batch axis
            unless `return_tensors` is set.

        Raises:
            ValueError: one line that names row, field, value and what was expected.
        """
        if on_invalid not in ("error", "drop_long", "drop_events"):
            raise ValueError(f"on_invalid must be 'error', 'drop_long' or 'drop_events', got {on_invalid!r}")
        columns, count, single = _event_columns(rows)
        raw, lengths = _read_points(columns, count)
        labels = {name: _read_labels(columns[name], name, lengths) for name in LABEL_FIELDS if name in columns}
        normalized = self._normalize(raw)
        keep = self._valid_events(raw, normalized, lengths, on_invalid, self.max_points)
        if single and not keep.all():
            raise ValueError("the record was dropped; give a list of records to get the others of a batch")

        ends = np.cumsum(lengths)
        names = ["points", "order", *(LABEL_FIELDS[name] for name in labels)]
        if return_neighbor_labels:
            names.append("neighbor_labels")
        events: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for row in np.flatnonzero(keep):
            event = slice(ends[row] - lengths[row], ends[row])
            points = normalized[event]
            by_radius = np.argsort(points[:, 3], kind="stable")
            points = points[by_radius]
            sequence = self._sequence(points)
            order = by_radius[sequence]
            events["points"].append(points[sequence])
            events["order"].append(order)
            if return_neighbor_labels:
                targets = neighbor_targets(points[:, 1:], self.num_neighbors)
                events["neighbor_labels"].append(targets[sequence])
            for name, values in labels.items():
                events[LABEL_FIELDS[name]].append(values[event][order])
        tails = {"points": (4,), "neighbor_labels": (3 * self.num_neighbors,)}
        data = self._pad(events, lengths[keep], tails, padding, pad_to_multiple_of)
        if return_row_index:
            data["row_index"] = np.flatnonzero(keep)
        if return_tensors is not None:
            return as_tensors(data, return_tensors)
        if single:
            data = {name: values[0] for name, values in data.items()}
        return BatchEncoding(data)

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchEncoding:
        """Pads encoded events to one length and stacks them; usable as collator through `DataCollatorWithPadding`.

        Args:
            encoded_inputs: list of feature dicts as `__call__(..., padding=False)` gives them, or a dict of lists.
            padding, pad_to_multiple_of, return_tensors: see `__call__`.

        Returns:
            `BatchEncoding` as that of `__call__`.

        Raises:
            ValueError: a feature is missing or of the wrong shape.
        """
        for name, value in kwargs.items():
            if value is not None and name not in ("verbose", "max_length", "return_attention_mask"):
                raise ValueError(f"unknown argument {name!r}")
        if not isinstance(encoded_inputs, Mapping):
            features = list(encoded_inputs)
            names = list(features[0]) if features else ["points"]
            for index, feature in enumerate(features):
                if set(feature) != set(names):
                    odd = sorted(map(str, set(feature) ^ set(names)))[0]
                    raise ValueError(f"feature {index}: key {odd} is not in all features of the batch")
            encoded_inputs = {name: [feature[name] for feature in features] for name in names}
        if "points" not in encoded_inputs:
            raise ValueError(
                f"pad: points is missing; the features have {', '.join(map(str, encoded_inputs)) or 'none'}"
            )
        events = {name: [to_numpy(value) for value in values] for name, values in encoded_inputs.items()}
        per_event = {name: events.pop(name) for name in ("row_index",) if name in events}
        events.pop("attention_mask", None)
        lengths = np.array([len(points) for points in events["points"]], dtype=np.int64)
        tails = {"points": (4,)}
        if events.get("neighbor_labels"):
            tails["neighbor_labels"] = events["neighbor_labels"][0].shape[1:]
        data = self._pad(events, lengths, tails, padding, pad_to_multiple_of)
        data.update({name: np.stack(values) for name, values in per_event.items()})
        return as_tensors(data, return_tensors) if return_tensors is not None else BatchEncoding(data)

    def _pad(self, events: Mapping[str, list], lengths: np.ndarray, tails: Mapping, padding, multiple) -> dict:
        strategy = padding_strategy(padding)
        if strategy is None:
            return {**events, "attention_mask": [np.ones(length, dtype=np.int64) for length in lengths]}
        width = self.max_points if strategy == "max_length" else int(lengths.max(initial=0))
        if (lengths > width).any():
            index = int(np.argmax(lengths > width))
            raise ValueError(f"feature {index}: {lengths[index]} points; expected at most {width}")
        width = round_up(width, multiple)
        data = {}
        for name, arrays in events.items():
            tail = tails.get(name, ())
            dtype = np.float32 if tail else np.int64
            fill = self.padding_value if name == "points" else IGNORE_INDEX
            result = np.full((len(lengths), width, *tail), fill, dtype=dtype)
            for index, (row, array, length) in enumerate(zip(result, arrays, lengths.tolist(), strict=True)):
                if array.shape != (length, *tail):
                    raise ValueError(f"feature {index}: {name} has shape {array.shape}, expected {(length, *tail)}")
                row[:length] = array
            data[name] = result
        data["attention_mask"] = (np.arange(width) < lengths[:, None]).astype(np.int64)
        return data

    # --- physics -----------------------------------------------------------------------------------------------------

    def _scales(self) -> tuple[np.ndarray, np.ndarray]:
        """Offsets and widths (4,) float64 of the normalisation."""
        limits = np.array([self.eta_limits, self.phi_limits, self.radius_limits])
        return np.append(self.energy_mean, limits[:, 0]), np.append(self.energy_std, limits[:, 1] - limits[:, 0])

    def _normalize(self, raw: np.ndarray) -> np.ndarray:
        """Raw points (points, 4) float32 -> normalised (E, eta, phi, r); not finite on the beam axis."""
        energy, x, y, z = raw.T
        result = np.empty_like(raw)
        with np.errstate(all="ignore"):
            result[:, 0] = energy
            result[:, 1] = np.arctanh(z / np.sqrt(x**2 + y**2 + z**2))
            result[:, 2] = np.arctan2(y, x)
            result[:, 3] = np.sqrt(x**2 + y**2)
            offset, width = (values.astype(np.float32) for values in self._scales())
            result -= offset
            result /= width
        return result

    def _valid_events(
        self, raw: np.ndarray, normalized: np.ndarray, lengths: np.ndarray, on_invalid: str, max_points: int
    ) -> np.ndarray:
        """Which events (events,) bool are kept; raises on the first invalid one that must not be dropped."""
        ends = np.cumsum(lengths)

        def first_bad(bad_points, row):
            return int(np.argmax(bad_points[ends[row] - lengths[row] : ends[row]]))

        def events_with(bad_points):
            result = np.zeros(len(lengths), dtype=bool)
            result[np.searchsorted(ends, np.flatnonzero(bad_points), side="right")] = True
            return result

        def describe_value(row):
            point = first_bad(~np.isfinite(raw).all(axis=1), row)
            values = raw[ends[row] - lengths[row] + point]
            k = int(np.argmin(np.isfinite(values)))
            return f"{POINT_FIELDS[k]}[{point}] = {values[k]}; expected a finite number"

        def describe_axis(row):
            point = first_bad(~np.isfinite(normalized).all(axis=1), row)
            _, x, y, z = raw[ends[row] - lengths[row] + point]
            return f"point {point} (x {x:g}, y {y:g}, z {z:g} cm) has no finite (E, eta, phi, r); expected r > 0"

        keep = np.ones(len(lengths), dtype=bool)
        checks = (
            ("empty", lengths == 0, lambda row: "no points; expected at least 1"),
            ("not_finite", events_with(~np.isfinite(raw).all(axis=1)), describe_value),
            ("beam_axis", events_with(~np.isfinite(normalized).all(axis=1)), describe_axis),
            (
                "too_many_points",
                lengths > max_points,
                lambda row: f"{lengths[row]} points; expected at most {max_points} (on_invalid='drop_long' drops)",
            ),
        )
        reasons: Counter = Counter()
        for reason, bad, describe in checks:
            bad &= keep
            if not bad.any():
                continue
            if on_invalid == "error" or (on_invalid == "drop_long" and reason != "too_many_points"):
                row = int(np.argmax(bad))
                raise ValueError(f"row {row}: {describe(row)}")
            reasons[reason] += int(bad.sum())
            keep &= ~bad
        self.dropped.update(reasons)
        # Long events are left out as a matter of course; the others mean that something is wrong with the data.
        loud = {reason: number for reason, number in reasons.items() if reason != "too_many_points"}
        if loud:
            logger.warning("invalid events: " + ", ".join(f"{reason} x {number}" for reason, number in loud.items()))
        return keep

    def buckets(self, points: np.ndarray) -> np.ndarray:
        """Bins of normalised points.

        Args:
            points: float32 (points, 4).

        Returns:
            int64 (points, 3) of eta, phi, r: how many edges are below the value, 1..n inside; 0 and n + 1 outside.

        Raises:
            ValueError: the extractor has no bin edges.
        """
        edges = self._edges()
        return np.stack([np.searchsorted(edges[k], points[:, k + 1], side="left") for k in range(3)], axis=1)

    def cells(self, points: np.ndarray) -> np.ndarray:
        """Numbers, int64 (points,), of the cells of normalised points (points, 4) in the order of the raster scan.

        Raises:
            ValueError: the extractor has no bin edges, or its order is no raster order.
        """
        if self.order not in RASTER_ORDERS:
            raise ValueError(f"order {self.order!r} has no cells; expected one of {', '.join(RASTER_ORDERS)}")
        numbers = [len(edges) - 1 for edges in self._edges()]
        buckets = np.clip(self.buckets(points), 1, numbers) - 1
        result = np.zeros(len(points), dtype=np.int64)
        for letter in reversed(self.order):  # from the slowest
            axis = "EPR".index(letter)
            result = result * numbers[axis] + buckets[:, axis]
        return result

    def _edges(self) -> list[np.ndarray]:
        if self.bin_edges is None:
            raise ValueError(
                f"order {self.order!r} needs bin_edges, and this extractor has none; compute them from data with: "
                f"{BIN_EDGES_COMMAND}"
            )
        return [np.asarray(self.bin_edges[name], dtype=np.float32) for name in AXES]

    def _sequence(self, points: np.ndarray) -> np.ndarray:
        """Permutation (points,) from ascending r to the order in which the model reads."""
        if self.order == "none":
            return np.arange(len(points))
        if self.order in RASTER_ORDERS:
            return np.argsort(self.cells(points), kind="stable")
        # eta, r, phi
        lattice = np.clip(points[:, [1, 3, 2]] * np.float32(_CURVE_SCALE), 0, 2**_CURVE_BITS - 1).astype(np.int64)
        codes = hilbert_codes if self.order == "hilbert" else z_order_codes
        return np.argsort(codes(lattice, _CURVE_BITS), kind="stable")

    def compute_bin_edges(self, rows: Any, n_bins: Sequence[int] = (8, 8, 6)) -> dict[str, list[float]]:
        """Computes `bin_edges` from data, sets and returns them.

        In eta and phi, bins of equal counts between 0 and 1. In r, the three modules of the chamber, separated in the
        middle of the gaps near 40 cm and 57 cm, have n / 3 bins of equal counts each.

        Args:
            rows: events as in `__call__`; some hundred are enough.
            n_bins: in eta, phi, r; the last a multiple of 3.

        Raises:
            ValueError: too few points for so many bins, or no points in one of the modules.
        """
        numbers = [check_integer(f"n_bins[{k}]", value, 1) for k, value in enumerate(n_bins)]
        if len(numbers) != 3 or numbers[2] % 3:
            raise ValueError(f"n_bins must be three numbers, the last a multiple of 3, got {short_repr(n_bins)}")
        columns, count, _ = _event_columns(rows)
        raw, lengths = _read_points(columns, count)
        points = self._normalize(raw)
        self._valid_events(raw, points, lengths, "error", int(lengths.max(initial=0)))
        points = np.sort(points, axis=0).astype(np.float64)
        edges = {}
        for name, values, number in zip(AXES, points[:, 1:3].T, numbers, strict=False):
            edges[name] = [0.0, *_quantiles(values, number)[1:-1], 1.0]
        edges["radius"] = self._radius_edges(points[:, 3], numbers[2] // 3)
        self.bin_edges = _read_bin_edges(edges)
        return self.bin_edges

    def _radius_edges(self, radius: np.ndarray, number: int) -> list[float]:
        """Edges of ascending normalised radii (points,): `number` bins in each of the three modules."""
        low, high = self.radius_limits
        boundaries = []
        for boundary in _MODULE_BOUNDARIES:
            first, last = (np.array([-1, 1]) * _BOUNDARY_WINDOW + boundary - low) / (high - low)
            near = radius[(radius > first) & (radius < last)]
            if len(near) < 2:
                raise ValueError(f"no points near r = {boundary:g} cm; expected those of the rows around the gap there")
            gap = int(np.argmax(np.diff(near)))
            boundaries.append((near[gap] + near[gap + 1]) / 2)
        sections = np.split(radius, np.searchsorted(radius, boundaries))
        inner = [_quantiles(section, number)[1:-1] for section in sections]
        return [radius[0], *inner[0], boundaries[0], *inner[1], boundaries[1], *inner[2], radius[-1]]

    # --- decoding ----------------------------------------------------------------------------------------------------

    def restore_order(self, values: Any, order: Any) -> list[np.ndarray]:
        """Per-point results in the order of the rows.

        Args:
            values: (batch, length, ...) array or tensor in sequence order, for example predicted classes.
            order: (batch, length) of `__call__`, -100 at padding.

        Returns:
            One array (points, ...) per event.

        Raises:
            ValueError: shapes that do not fit, or an `order` that is no permutation.
        """
        values = [to_numpy(event) for event in values]
        orders = [to_numpy(event) for event in order]
        if len(values) != len(orders):
            raise ValueError(f"values has {len(values)} events, order has {len(orders)}")
        results = []
        for row, (event, places) in enumerate(zip(values, orders, strict=True)):
            valid = places != IGNORE_INDEX
            if event.shape[:1] != places.shape:
                raise ValueError(f"row {row}: values of shape {event.shape} do not fit order of shape {places.shape}")
            places = places[valid]
            if not np.array_equal(np.sort(places), np.arange(len(places))):
                raise ValueError(f"row {row}: order is no permutation of its {len(places)} points")
            result = np.empty_like(event[valid])
            result[places] = event[valid]
            results.append(result)
        return results

    def inverse_transform(
        self, points: Any, attention_mask: Any = None, order: Any = None
    ) -> dict[str, list[np.ndarray]]:
        """Normalised points back to E [ADC counts] and x, y, z [cm].

        Args:
            points: (batch, length, 4) array or tensor, or a list of (length, 4).
            attention_mask: (batch, length), 1 at points; default all.
            order: of `__call__`; with it, the points come in the order of the rows.

        Returns:
            Columns of one float32 array per event: E, x, y, z.

        Raises:
            ValueError: wrong shapes or a point that is not finite.
        """
        events = [to_numpy(event) for event in points]
        for row, event in enumerate(events):
            if event.ndim != 2 or event.shape[1] != 4 or event.dtype.kind != "f":
                raise ValueError(
                    f"row {row}: points must be floats of shape (length, 4), got {event.dtype} {event.shape}"
                )
        if attention_mask is not None:
            masks = [to_numpy(mask).astype(bool) for mask in attention_mask]
            if [mask.shape for mask in masks] != [event.shape[:1] for event in events]:
                raise ValueError("attention_mask must have one entry per point")
            events = [event[mask] for event, mask in zip(events, masks, strict=True)]
        if order is not None:
            orders = [to_numpy(event) for event in order]
            events = self.restore_order(events, [places[places != IGNORE_INDEX] for places in orders])
        lengths = np.array([len(event) for event in events], dtype=np.int64)
        flat = np.concatenate(events).astype(np.float64) if events else np.zeros((0, 4))
        if not np.isfinite(flat).all():
            row = int(np.searchsorted(np.cumsum(lengths), np.argmin(np.isfinite(flat).all(axis=1)), side="right"))
            raise ValueError(f"row {row}: points has a value that is not finite")
        offset, width = self._scales()
        energy, eta, phi, radius = (flat * width + offset).T
        columns = (energy, radius * np.cos(phi), radius * np.sin(phi), radius * np.sinh(eta))
        return {
            name: split_rows(values.astype(np.float32), lengths)
            for name, values in zip(POINT_FIELDS, columns, strict=True)
        }


# ---------------------------------------------------------------------------------------------------------------------
# Rows and settings
# ---------------------------------------------------------------------------------------------------------------------


def _event_columns(rows: Any) -> tuple[dict[str, Sequence], int, bool]:
    """(columns, number of events, whether `rows` was one record) of events in any of the accepted forms."""
    if isinstance(rows, Mapping):
        columns = {name: rows[name] for name in (*POINT_FIELDS, *LABEL_FIELDS) if name in rows}
        _require_points(columns, "the rows have", rows)
        energy = columns["E"]
        if not hasattr(energy, "__len__"):
            raise ValueError(f"column E: expected a list of numbers per event, got {short_repr(energy)}")
        if len(energy) == 0:
            raise ValueError("rows: E is empty; expected a record with points, or columns with events")
        if np.ndim(energy[0]) == 0:
            return {name: [values] for name, values in columns.items()}, 1, True
        for name, values in columns.items():
            if not hasattr(values, "__len__") or len(values) != len(energy):
                got = f"{len(values)} rows" if hasattr(values, "__len__") else short_repr(values)
                raise ValueError(f"columns differ in length: E has {len(energy)} rows, {name} has {got}")
        return columns, len(energy), False
    if isinstance(rows, (str, bytes)) or not hasattr(rows, "__iter__"):
        raise ValueError(
            f"rows: expected a record dict, a list of records or a dict of columns, got {type(rows).__name__}"
        )
    rows = list(rows)
    names = list(POINT_FIELDS)
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {index}: expected a record dict, got {type(row).__name__}")
        _require_points(row, f"row {index} has", row)
    for name in LABEL_FIELDS:
        having = [name in row for row in rows]
        if any(having) and not all(having):
            index = having.index(False)
            raise ValueError(f"row {index}: field {name} is missing (row {having.index(True)} has it)")
        names += [name] * any(having)
    return {name: [row[name] for row in rows] for name in names}, len(rows), False


def _require_points(columns: Mapping, where: str, available: Mapping):
    for name in POINT_FIELDS:
        if name not in columns:
            raise ValueError(f"field {name} is missing; {where} {', '.join(sorted(map(str, available))) or 'none'}")


def _read_points(columns: Mapping, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(raw points float32 (points, 4) of all events, points per event int64)."""
    fields = {name: list_column(columns, name, count) for name in POINT_FIELDS}
    lengths = fields["E"][1]
    for name, (_, found) in fields.items():
        if not np.array_equal(found, lengths):
            row = int(np.argmax(found != lengths))
            raise ValueError(f"row {row}: {name} has {found[row]} points, but E has {lengths[row]}")
    with np.errstate(over="ignore"):
        return np.stack([values.astype(np.float32) for values, _ in fields.values()], axis=1), lengths


def _read_labels(values: Sequence, name: str, lengths: np.ndarray) -> np.ndarray:
    """The labels of all points int64 (points,)."""
    arrays = [to_numpy(row) for row in values]
    for row, (array, length) in enumerate(zip(arrays, lengths.tolist(), strict=True)):
        if array.shape != (length,):
            raise ValueError(f"row {row}: {name} has {len(array) if array.ndim else 'no'} labels, but E has {length}")
        if length and array.dtype.kind not in "iub":
            raise ValueError(f"row {row}: {name} must be integers, got {short_repr(values[row])}")
        if array.dtype == np.uint64 and array.max(initial=0) > np.iinfo(np.int64).max:
            raise ValueError(f"row {row}: {name} has {array.max()}; expected integers of at most 64 bits with sign")
        if name == "track_id" and (array == IGNORE_INDEX).any():
            point = int(np.argmax(array == IGNORE_INDEX))
            raise ValueError(
                f"row {row}: track_id of point {point} is {IGNORE_INDEX}, which marks padding; use another id"
            )
    return np.concatenate([array.astype(np.int64) for array in arrays]) if arrays else np.zeros(0, dtype=np.int64)


def _quantiles(ordered: np.ndarray, number: int) -> list[float]:
    """Edges of `number` bins of equal counts, of ascending values."""
    places = np.linspace(0, len(ordered), number + 1)
    return np.interp(places, np.arange(len(ordered)), ordered).tolist()


def _finite(name: str, value: Any) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float, np.integer, np.floating))
        or not np.isfinite(value)
    ):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def _limits(name: str, values: Any) -> list[float]:
    if not isinstance(values, (list, tuple, np.ndarray)) or len(values) != 2:
        raise ValueError(f"{name} must be two numbers, got {short_repr(values)}")
    low, high = (_finite(f"{name}[{k}]", value) for k, value in enumerate(values))
    if low >= high:
        raise ValueError(f"{name} must ascend, got {low:g}, {high:g}")
    return [low, high]


def _read_bin_edges(bin_edges: Any) -> dict[str, list[float]] | None:
    """Checked edges under the names of `AXES`; the names may be capitalised, as in files of the reference."""
    if bin_edges is None:
        return None
    if isinstance(bin_edges, (str, Path)):
        try:
            bin_edges = json.loads(Path(bin_edges).read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise ValueError(f"bin_edges: {bin_edges} is not a readable JSON file ({error})") from None
    if not isinstance(bin_edges, Mapping):
        raise ValueError(f"bin_edges must map {', '.join(AXES)} to edges, got {short_repr(bin_edges)}")
    found = {str(name).lower(): values for name, values in bin_edges.items()}
    if set(found) != set(AXES) or len(bin_edges) != len(AXES):
        raise ValueError(f"bin_edges must map {', '.join(AXES)} to edges, got {', '.join(map(str, bin_edges))}")
    result = {}
    for name in AXES:
        edges = to_numpy(found[name])
        if edges.ndim != 1 or len(edges) < 2 or edges.dtype.kind not in "iuf" or not np.isfinite(edges).all():
            raise ValueError(f"bin_edges[{name!r}] must be at least 2 finite numbers, got {short_repr(found[name])}")
        # The comparison with points is in float32.
        if (np.diff(edges.astype(np.float32)) <= 0).any():
            raise ValueError(f"bin_edges[{name!r}] must ascend in float32, got {short_repr(edges.tolist())}")
        result[name] = [float(edge) for edge in edges]
    return result


# `save_pretrained` then writes this code beside the settings, so that they load anywhere with `trust_remote_code=True`
Fm4nppFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
