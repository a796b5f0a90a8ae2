"""
Density of what a jet generator is asked for: multiplicity and jet quantities, per class.

The published EPiC flow (arXiv:2312.00123) draws multiplicity, pT and eta of a jet from a kernel density estimate per
class, but neither the estimates nor the way they were fitted are public. This fit is our own: a product of Gaussian
kernels around jets of the training set, with Scott's bandwidths (std * n^(-1 / (d + 4))) times a factor, reflected at
the range of the training set, so that the sharp edges of a selection stay sharp. Drawing needs numpy only.
"""

import os
from pathlib import Path

import numpy as np

from .batching import check_integer
from .records_dirc import to_numpy

# narrower than Scott's, which is for a single Gaussian: spectra with edges and tails would be washed out
BANDWIDTH_FACTOR = 0.3
MAX_POINTS = 10_000


class JetConditionDensity:
    """
    Kernel density of (multiplicity, conditions...) for every class.

    Args:
        points: (points, 1 + conditions) jets of all classes, those of a class together; physical units.
        counts: (classes,) points of each class.
        bandwidths: (classes, 1 + conditions) standard deviations of the kernels.
        limits: (classes, 1 + conditions, 2) least and largest value.
    """

    def __init__(self, points: np.ndarray, counts: np.ndarray, bandwidths: np.ndarray, limits: np.ndarray):
        self.points = np.asarray(points, dtype=np.float32)
        self.counts = np.asarray(counts, dtype=np.int64)
        self.bandwidths = np.asarray(bandwidths, dtype=np.float32)
        self.limits = np.asarray(limits, dtype=np.float32)
        num_classes, size = len(self.counts), self.points.shape[-1]
        shapes = {
            "points": (self.points, (int(self.counts.sum()), size)),
            "bandwidths": (self.bandwidths, (num_classes, size)),
            "limits": (self.limits, (num_classes, size, 2)),
        }
        for name, (array, shape) in shapes.items():
            if array.shape != shape:
                raise ValueError(f"condition density: {name} has shape {array.shape}, expected {shape}")
            if not np.isfinite(array).all():
                raise ValueError(f"condition density: {name} is not finite")
        if (self.counts < 0).any() or (self.bandwidths < 0).any() or (self.limits[..., 0] > self.limits[..., 1]).any():
            raise ValueError("condition density: a negative number of points or bandwidth, or limits in wrong order")

    @property
    def num_classes(self) -> int:
        return len(self.counts)

    @property
    def num_conditions(self) -> int:
        """Quantities beside the multiplicity."""
        return self.points.shape[1] - 1

    @classmethod
    def fit(
        cls,
        num_particles: np.ndarray,
        conditions: np.ndarray,
        class_ids: np.ndarray | None = None,
        num_classes: int = 1,
        bandwidth_factor: float = BANDWIDTH_FACTOR,
        max_points: int = MAX_POINTS,
        seed: int = 0,
    ) -> "JetConditionDensity":
        """
        Fit to jets of a training set.

        Args:
            num_particles: (jets,). conditions: (jets, conditions), physical units. class_ids: (jets,), by default 0.
            bandwidth_factor: on Scott's bandwidths; 0 draws the jets of the training set themselves.
            max_points: most jets kept per class, chosen by `seed`.

        Raises:
            ValueError: naming the argument, row and value.
        """
        num_particles, conditions = to_numpy(num_particles), to_numpy(conditions)
        class_ids = np.zeros(len(num_particles), dtype=np.int64) if class_ids is None else to_numpy(class_ids)
        values = np.column_stack([num_particles.astype(np.float64), conditions.reshape(len(num_particles), -1)])
        bad = ~np.isfinite(values).all(axis=1) | (values[:, 0] < 1)
        if bad.any():
            row = int(np.argmax(bad))
            raise ValueError(f"row {row}: {values[row].tolist()}, expected 1 or more constituents, finite conditions")
        if class_ids.shape != (len(values),) or ((class_ids < 0) | (class_ids >= num_classes)).any():
            raise ValueError(f"class_ids must be {len(values)} integers in 0..{num_classes - 1}")
        if not bandwidth_factor >= 0:
            raise ValueError(f"bandwidth_factor is {bandwidth_factor}, expected a number of at least 0")
        check_integer("max_points", max_points, 1)
        rng = np.random.default_rng(seed)
        size = values.shape[1]
        points, counts = [], []
        bandwidths, limits = np.zeros((num_classes, size)), np.zeros((num_classes, size, 2))
        for class_id in range(num_classes):
            of_class = values[class_ids == class_id]
            if len(of_class):
                limits[class_id] = np.stack([of_class.min(axis=0), of_class.max(axis=0)], axis=-1)
                scott = of_class.std(axis=0) * len(of_class) ** (-1 / (size + 4))
                bandwidths[class_id] = bandwidth_factor * scott
            if len(of_class) > max_points:
                of_class = of_class[rng.choice(len(of_class), max_points, replace=False)]
            points.append(of_class)
            counts.append(len(of_class))
        return cls(np.concatenate(points), np.array(counts), bandwidths, limits)

    def sample(self, class_ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """
        Multiplicities int64 (jets,) and conditions float32 (jets, conditions) for jets of `class_ids` (jets,).

        Raises:
            ValueError: a class that is not in the density.
        """
        class_ids = to_numpy(class_ids)
        bad = (class_ids < 0) | (class_ids >= self.num_classes)
        bad |= self.counts[np.where(bad, 0, class_ids)] == 0
        if bad.any():
            row = int(np.argmax(bad))
            known = ", ".join(map(str, np.flatnonzero(self.counts)))
            raise ValueError(f"row {row}: class {class_ids[row]} is not in the density, expected one of {known}")
        starts = np.cumsum(self.counts) - self.counts
        chosen = self.points[starts[class_ids] + rng.integers(self.counts[class_ids])]
        values = chosen + self.bandwidths[class_ids] * rng.standard_normal(chosen.shape, dtype=np.float32)
        low, high = self.limits[class_ids, :, 0].copy(), self.limits[class_ids, :, 1].copy()
        # a multiplicity is all that rounds to it
        low[:, 0] -= 0.49
        high[:, 0] += 0.49
        values = np.where(values < low, 2 * low - values, values)
        values = np.where(values > high, 2 * high - values, values)
        values = np.clip(values, low, high)
        return np.rint(values[:, 0]).astype(np.int64), values[:, 1:]

    def save(self, path: str | Path):
        """Write as a safetensors file."""
        from safetensors.numpy import save_file

        arrays = {name: getattr(self, name) for name in ("points", "counts", "bandwidths", "limits")}
        temporary = Path(path).with_suffix(".tmp")
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path) -> "JetConditionDensity":
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return cls(**load_file(path))
        except (SafetensorError, TypeError) as error:
            raise ValueError(f"{path}: not a condition density ({' '.join(str(error).split())})") from None
