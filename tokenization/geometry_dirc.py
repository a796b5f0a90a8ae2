"""The photosensor plane of a DIRC detector: PMT modules on a grid, square pixels inside each module.

The defaults are the ePIC high-performance DIRC as modelled by FM4DIRC (arXiv 2505.08736): 4 x 6 modules of 16 x 16
pixels of 3.3125 mm. All lengths are in mm, measured from one corner of the plane.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property

import numpy as np

# Nothing real is near; tables of all pixels are held in memory.
MAX_CHANNELS = 2**22


def _checked_ids(values: "np.typing.ArrayLike", name: str, upper: int) -> np.ndarray:
    """Returns integer ids as int64, or raises one line naming the first value outside `0..upper-1`."""
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        if array.size and (array.dtype.kind != "f" or not np.all(array == np.floor(array))):
            raise ValueError(f"{name} must be integers in 0..{upper - 1}, got dtype {array.dtype}")
        array = array.astype(np.int64)
    array = array.astype(np.int64, copy=False)
    if array.size and (array.min() < 0 or array.max() >= upper):
        bad = array[(array < 0) | (array >= upper)].ravel()[0]
        raise ValueError(f"{name} must be in 0..{upper - 1}, got {bad}")
    return array


@dataclass(frozen=True)
class DircGeometry:
    """Layout of PMT modules and pixels, and the map between ids and positions.

    Module `pmt` sits in row `pmt // pmt_columns` and column `pmt % pmt_columns`; pixel `pixel` of a module likewise
    in row `pixel // pixel_columns` and column `pixel % pixel_columns`. x grows with the column, y with the row.

    Args:
        pmt_rows, pmt_columns (`int`): modules of one readout box.
        pixel_rows, pixel_columns (`int`): pixels of one module.
        pixel_width, pixel_height (`float`): pixel pitch in x and y, mm.
        gap_x, gap_y (`float`): dead space between neighbouring modules, mm.
        border (`float`): distance from the origin to the first pixel, mm.
        num_boxes (`int`): identical readout boxes read out with consecutive PMT ids. Ids are folded onto the first
            box (`pmt % num_pmts`), so 2 accepts PMT ids up to `2 * num_pmts - 1`.
        inactive_pmts (`tuple[int, ...]`): modules of the grid that do not exist or are dead; they get no token.
    """

    pmt_rows: int = 4
    pmt_columns: int = 6
    pixel_rows: int = 16
    pixel_columns: int = 16
    pixel_width: float = 3.3125
    pixel_height: float = 3.3125
    gap_x: float = 5.89216111455965
    gap_y: float = 5.3571428571428572
    border: float = 2.0
    num_boxes: int = 1
    inactive_pmts: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("pmt_rows", "pmt_columns", "pixel_rows", "pixel_columns", "num_boxes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"geometry: `{name}` must be a positive integer, got {value!r}")
            object.__setattr__(self, name, int(value))
        if self.num_channels * self.num_boxes > MAX_CHANNELS:
            raise ValueError(
                f"geometry: {self.num_channels * self.num_boxes:,} pixels, expected at most {MAX_CHANNELS:,}"
            )
        for name, lowest in (("pixel_width", None), ("pixel_height", None), ("gap_x", 0), ("gap_y", 0), ("border", 0)):
            value = getattr(self, name)
            good = isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and np.isfinite(value)
            if not good or (value <= 0 if lowest is None else value < lowest):
                wanted = "positive" if lowest is None else "non-negative"
                raise ValueError(f"geometry: `{name}` must be a {wanted} length in mm, got {value!r}")
            object.__setattr__(self, name, float(value))
        try:
            inactive = _checked_ids(list(self.inactive_pmts), "geometry: `inactive_pmts`", self.num_pmts)
        except TypeError:
            raise ValueError(
                f"geometry: `inactive_pmts` must be a list of PMT ids, got {self.inactive_pmts!r}"
            ) from None
        object.__setattr__(self, "inactive_pmts", tuple(sorted({int(i) for i in inactive})))
        if len(self.inactive_pmts) == self.num_pmts:
            raise ValueError("geometry: `inactive_pmts` leaves no active PMT")

    @property
    def num_pmts(self) -> int:
        """Modules of one box, active or not."""
        return self.pmt_rows * self.pmt_columns

    @property
    def pixels_per_pmt(self) -> int:
        return self.pixel_rows * self.pixel_columns

    @property
    def num_channels(self) -> int:
        """Pixels of one box, active or not."""
        return self.num_pmts * self.pixels_per_pmt

    @cached_property
    def active_pmts(self) -> np.ndarray:
        """Ids of the active modules of one box, ascending, int64."""
        return np.setdiff1d(np.arange(self.num_pmts), np.asarray(self.inactive_pmts, dtype=np.int64))

    @cached_property
    def active_channels(self) -> np.ndarray:
        """Channels of the active modules, ascending, int64."""
        return (self.active_pmts[:, None] * self.pixels_per_pmt + np.arange(self.pixels_per_pmt)).ravel()

    @cached_property
    def x_edges(self) -> np.ndarray:
        """Histogram edges in x, mm: every pixel edge, so that each dead gap is one bin of its own (FM4DIRC layout)."""
        return self._edges(self.pmt_columns, self.pixel_columns, self.pixel_width, self.gap_x)

    @cached_property
    def y_edges(self) -> np.ndarray:
        """Histogram edges in y, mm; see `x_edges`."""
        return self._edges(self.pmt_rows, self.pixel_rows, self.pixel_height, self.gap_y)

    def _edges(self, modules: int, pixels: int, pitch: float, gap: float) -> np.ndarray:
        starts = self.border + np.arange(modules) * (pixels * pitch + gap)
        edges = (starts[:, None] + np.arange(pixels + 1) * pitch).ravel()
        # A border of 0 or a gap of 0 would repeat an edge.
        return np.unique(np.concatenate([[0.0], edges, [edges[-1] + self.border]]))

    def channel(self, pmt: "np.typing.ArrayLike", pixel: "np.typing.ArrayLike") -> np.ndarray:
        """Channel number `pmt * pixels_per_pmt + pixel`, int64, after folding `pmt` onto one box.

        Raises:
            ValueError: an id is outside the geometry or not an integer.
        """
        pmt = _checked_ids(pmt, "pmtID", self.num_pmts * self.num_boxes) % self.num_pmts
        return pmt * self.pixels_per_pmt + _checked_ids(pixel, "pixelID", self.pixels_per_pmt)

    def pmt_pixel(self, channel: "np.typing.ArrayLike") -> tuple[np.ndarray, np.ndarray]:
        """Inverse of `channel`: (pmt, pixel), int64 arrays of the same shape."""
        channel = _checked_ids(channel, "channel", self.num_channels)
        return channel // self.pixels_per_pmt, channel % self.pixels_per_pmt

    def pixel_center(self, pmt: "np.typing.ArrayLike", pixel: "np.typing.ArrayLike") -> tuple[np.ndarray, np.ndarray]:
        """Pixel centres (x, y) in mm, float64 arrays of the broadcast shape of `pmt` and `pixel`.

        Raises:
            ValueError: an id is outside the geometry or not an integer.
        """
        pmt = _checked_ids(pmt, "pmtID", self.num_pmts * self.num_boxes) % self.num_pmts
        pixel = _checked_ids(pixel, "pixelID", self.pixels_per_pmt)
        pmt_row, pmt_column = pmt // self.pmt_columns, pmt % self.pmt_columns
        row = pmt_row * self.pixel_rows + pixel // self.pixel_columns
        column = pmt_column * self.pixel_columns + pixel % self.pixel_columns
        x = self.border + column * self.pixel_width + pmt_column * self.gap_x + self.pixel_width / 2
        y = self.border + row * self.pixel_height + pmt_row * self.gap_y + self.pixel_height / 2
        return x, y

    def find_pixel(self, x: "np.typing.ArrayLike", y: "np.typing.ArrayLike") -> tuple[np.ndarray, np.ndarray]:
        """The pixel under each point: (pmt, pixel), int64 arrays; both -1 in gaps, outside the plane, in inactive
        modules and for NaN. A pixel contains its lower edges, not its upper ones.

        Args:
            x, y: positions in mm, any common shape.
        """
        x, y = np.broadcast_arrays(np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64))
        pmt_column, column, in_x = self._locate(x, self.pmt_columns, self.pixel_columns, self.pixel_width, self.gap_x)
        pmt_row, row, in_y = self._locate(y, self.pmt_rows, self.pixel_rows, self.pixel_height, self.gap_y)
        pmt = pmt_row * self.pmt_columns + pmt_column
        found = in_x & in_y
        if self.inactive_pmts:
            found &= ~np.isin(pmt, self.inactive_pmts)
        return np.where(found, pmt, -1), np.where(found, row * self.pixel_columns + column, -1)

    def _locate(self, u: np.ndarray, modules: int, pixels: int, pitch: float, gap: float):
        size = pixels * pitch
        offset = u - self.border
        valid = np.isfinite(offset) & (offset >= 0) & (offset < modules * (size + gap))
        offset = np.where(valid, offset, 0.0)
        module = np.minimum((offset // (size + gap)).astype(np.int64), modules - 1)
        within = offset - module * (size + gap)
        valid &= (within >= 0) & (within < size)
        return module, np.clip(within // pitch, 0, pixels - 1).astype(np.int64), valid

    def to_dict(self) -> dict:
        """Plain JSON values; `from_dict` rebuilds an equal geometry."""
        return {**asdict(self), "inactive_pmts": list(self.inactive_pmts)}

    @classmethod
    def from_dict(cls, values: "dict | None") -> "DircGeometry":
        """Builds a geometry from (some of) its fields; missing ones keep the hpDIRC default.

        Raises:
            ValueError: an unknown field or an impossible value.
        """
        if not isinstance(values, (Mapping, type(None))):
            raise ValueError(f"geometry must be a dict of its fields, got {values!r}")
        values = dict(values or {})
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            known = ", ".join(field.name for field in fields(cls))
            raise ValueError(f"geometry: unknown field {unknown[0]!r}; known fields: {known}")
        if "inactive_pmts" in values:
            inactive = values["inactive_pmts"]
            values["inactive_pmts"] = tuple(inactive) if isinstance(inactive, (list, tuple)) else inactive
        return cls(**values)
