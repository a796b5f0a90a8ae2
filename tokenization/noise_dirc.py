"""Dark counts of the photosensors, added to DIRC records.

The model is the one of FM4DIRC (arXiv 2505.08736): every PMT fires with a small probability per event window, at a
uniform time and in a uniform pixel. `scale=100` makes the training data of the noise filter (0.28 hits per PMT),
`scale=1` is the physical rate used for generated tracks.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .geometry_dirc import DircGeometry
from .records_dirc import list_column, rows_to_columns, scalar_column

_DTYPES = {"pmtID": np.int16, "pixelID": np.int16, "channel": np.int32, "leadTime": np.float32}


def add_dark_noise(
    rows: Any,
    geometry: DircGeometry | dict | None = None,
    rng: np.random.Generator | int | None = None,
    rate_hz_per_pmt: float = 28e3,
    window_ns: float = 100.0,
    scale: float = 1.0,
    window_start_ns: float = 0.0,
    uniform: Callable[[], float] | None = None,
) -> Any:
    """Appends dark hits to tracks.

    The expected number of dark hits per active PMT is mu = scale * rate_hz_per_pmt * window_ns * 1e-9; as in FM4DIRC
    it is floor(mu) plus one more with probability mu - floor(mu).

    Args:
        rows: a record, a list of records, or a dict of columns. Not modified.
        geometry: `DircGeometry`, its dict, or None for the hpDIRC.
        rng: generator or seed for the vectorised draws; a fresh one if None.
        rate_hz_per_pmt: dark rate of a whole PMT, Hz.
        window_ns: length of the time window, ns.
        scale: factor on the rate.
        window_start_ns: start of the window, ns.
        uniform: function that returns the next number of [0, 1). If given, it is used instead of `rng`, one number at
            a time in the order of FM4DIRC: track by track and PMT by PMT, one number to accept, and for a hit one for
            its time and one for its pixel.

    Returns:
        The same form as `rows`, with numpy hit lists: dark hits after the track's own, unsorted in time; `channel`,
        `x`, `y` [mm] extended (computed for all hits where absent), `NHits` raised by the number of dark hits, and
        `is_noise` int8, 1 for dark hits. Integer columns stay integer. Times before or after the range of a tokenizer
        are its business (`on_invalid="drop_hits"`).

    Raises:
        ValueError: rows, rate or window are not usable.
    """
    if not isinstance(geometry, DircGeometry):
        geometry = DircGeometry.from_dict(geometry)
    mean = scale * rate_hz_per_pmt * window_ns / 1e9
    if not (np.isfinite(mean) and mean >= 0 and window_ns > 0):
        raise ValueError(
            "dark noise needs a non-negative rate and scale and a positive window, got "
            f"rate_hz_per_pmt={rate_hz_per_pmt}, scale={scale}, window_ns={window_ns}"
        )
    if uniform is not None and rng is not None:
        raise ValueError("give either rng or uniform, not both")
    columns, count, single = rows_to_columns(rows)
    flat, lengths = _read_hits(columns, count)
    # A track is read out by one box; its dark hits belong there too.
    box = np.zeros(count, dtype=np.int64)
    filled = lengths > 0
    box[filled] = flat["pmtID"][(np.cumsum(lengths) - lengths)[filled]] // geometry.num_pmts
    if uniform is not None:
        owner, noise = _draw_in_order(uniform, count, geometry, mean)
    else:
        owner, noise = _draw(np.random.default_rng(rng), count, geometry, mean)
    noise["leadTime"] = window_start_ns + window_ns * noise["leadTime"]
    noise["channel"] = geometry.channel(noise["pmtID"], noise["pixelID"])
    noise["x"], noise["y"] = geometry.pixel_center(noise["pmtID"], noise["pixelID"])
    noise["pmtID"] = noise["pmtID"] + box[owner] * geometry.num_pmts
    noise["is_noise"] = np.ones(len(owner), dtype=np.int8)

    own_pixels = (flat["pmtID"], flat["pixelID"])
    if "channel" not in flat:
        flat["channel"] = geometry.channel(*own_pixels)
    if "x" not in flat or "y" not in flat:
        flat["x"], flat["y"] = geometry.pixel_center(*own_pixels)
    flat.setdefault("is_noise", np.zeros(len(flat["pmtID"]), dtype=np.int8))

    track = np.concatenate([np.repeat(np.arange(count), lengths), owner])
    order = np.argsort(track, kind="stable")
    extra = np.bincount(owner, minlength=count)
    ends = np.cumsum(lengths + extra)
    starts = ends - lengths - extra
    result = dict(columns)
    for name, own in flat.items():
        dtype = _column_dtype(columns.get(name), name)
        merged = np.concatenate([own, noise[name]])[order].astype(dtype, copy=False)
        result[name] = [merged[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
    recorded = scalar_column(columns, "NHits", count).astype(np.int64) if "NHits" in columns else lengths
    result["NHits"] = (recorded + extra).tolist()
    if single:
        return {name: values[0] for name, values in result.items()}
    if hasattr(rows, "keys"):
        return result
    # Fields that only some of the records have stay where they are.
    return [{**row, **{name: result[name][i] for name in result}} for i, row in enumerate(rows)]


def _read_hits(columns, count: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    flat, lengths = {}, None
    for name in ("pmtID", "pixelID", "leadTime", "channel", "x", "y", "is_noise"):
        if name not in columns and name in ("channel", "x", "y", "is_noise"):
            continue
        if not count:
            flat[name], sizes = np.zeros(0), np.zeros(0, dtype=np.int64)
        else:
            flat[name], sizes = list_column(columns, name, count)
        lengths = sizes if lengths is None else lengths
        if not np.array_equal(sizes, lengths):
            row = int(np.argmax(sizes != lengths))
            raise ValueError(
                f"row {row}: {name} has {sizes[row]} entries, pmtID has {lengths[row]}; expected equal lengths"
            )
        if name in ("pmtID", "pixelID", "channel", "is_noise"):
            whole = np.isfinite(flat[name]) & (flat[name] == np.floor(flat[name]))
            if not whole.all():
                where = int(np.argmin(whole))
                row = int(np.searchsorted(np.cumsum(lengths), where, side="right"))
                raise ValueError(f"row {row}: {name} has {flat[name][where]:g}; expected integers")
            flat[name] = flat[name].astype(np.int64)
    return flat, lengths


def _draw(rng: np.random.Generator, count: int, geometry: DircGeometry, mean: float):
    pmts = geometry.active_pmts
    number = np.full((count, len(pmts)), int(mean), dtype=np.int64)
    number += rng.random(number.shape) < mean - int(mean)
    owner = np.repeat(np.arange(count), number.sum(axis=1))
    pmt = np.repeat(np.tile(pmts, count), number.ravel())
    return owner, {
        "pmtID": pmt,
        "pixelID": rng.integers(geometry.pixels_per_pmt, size=len(pmt)),
        "leadTime": rng.random(len(pmt)),
    }


def _draw_in_order(uniform: Callable[[], float], count: int, geometry: DircGeometry, mean: float):
    pmts = geometry.active_pmts.tolist()
    fraction, owner, pmt, pixel, time = mean - int(mean), [], [], [], []
    for track in range(count):
        for module in pmts:
            for iteration in range(int(mean) + 1):
                if iteration == 0 and uniform() >= fraction:
                    continue
                owner.append(track)
                pmt.append(module)
                time.append(uniform())
                pixel.append(int(geometry.pixels_per_pmt * uniform()))
    return np.asarray(owner, dtype=np.int64), {
        "pmtID": np.asarray(pmt, dtype=np.int64),
        "pixelID": np.asarray(pixel, dtype=np.int64),
        "leadTime": np.asarray(time, dtype=np.float64),
    }


def _column_dtype(values: Any, name: str) -> np.dtype:
    """The dtype the column has, else the one of the record schema; python floats stay float64."""
    if values is not None and len(values):
        first = values if hasattr(values, "dtype") and getattr(values, "ndim", 1) > 1 else values[0]
        if isinstance(first, np.ndarray) and first.dtype.kind in "iuf":
            return first.dtype
        if name == "leadTime":
            return np.dtype(np.float64)
    return np.dtype({"x": np.float32, "y": np.float32, "is_noise": np.int8, **_DTYPES}[name])
