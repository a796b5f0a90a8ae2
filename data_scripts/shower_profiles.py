"""Shape of electromagnetic showers in a silicon-tungsten sampling calorimeter: geometry and parametrised profiles.

The formulas are those of G. Grindhammer and S. Peters, "The parameterized simulation of electromagnetic showers in
homogeneous and sampling calorimeters" (hep-ex/0001020), and of the Review of Particle Physics, "Passage of particles
through matter". Lengths in mm, depths in radiation lengths of tungsten, energies in GeV, deposits in MeV.
"""

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from scipy.special import gammaln

TUNGSTEN_Z = 74
TUNGSTEN_X0 = 3.504  # mm
TUNGSTEN_MOLIERE = 9.33  # mm
TUNGSTEN_CRITICAL_ENERGY = 7.97e-3  # GeV, electrons
SILICON_X0 = 93.7  # mm

# Front faces of the silicon sheets of the ILD electromagnetic calorimeter (barrel), distance from the beam line in mm.
ILD_LAYER_POSITIONS = (
    *(1811.34, 1814.46, 1823.81, 1826.94, 1836.28, 1839.41, 1848.75, 1851.88, 1861.22, 1864.34),
    *(1873.69, 1876.81, 1886.16, 1889.29, 1898.63, 1901.76, 1911.10, 1914.22, 1923.57, 1926.69),
    *(1938.14, 1943.36, 1954.81, 1960.04, 1971.48, 1976.70, 1988.15, 1993.38, 2004.82, 2010.05),
)


@dataclass(frozen=True)
class EcalGeometry:
    """A stack of silicon sheets with a tungsten plate directly in front of each, the first excepted.

    Attributes:
        layer_positions: front faces of the silicon along the beam, mm, increasing.
        tungsten: thickness of the plate in front of each sheet, mm; 0 for none.
        silicon: thickness of the sheets, mm.
        half_width: half the side of sheets and plates, mm.
    """

    layer_positions: tuple[float, ...] = ILD_LAYER_POSITIONS
    tungsten: tuple[float, ...] = (0.0, *[2.1] * 20, *[4.2] * 9)
    silicon: float = 0.525
    half_width: float = 200.0

    def __post_init__(self):
        if len(self.layer_positions) != len(self.tungsten) or len(self.tungsten) < 2:
            raise ValueError(
                "layer_positions and tungsten must have one entry per layer (at least 2), "
                f"got {len(self.layer_positions)} and {len(self.tungsten)}"
            )
        for name in ("silicon", "half_width"):
            if not 0 < getattr(self, name) < np.inf:
                raise ValueError(f"{name} must be a positive length in mm, got {getattr(self, name)}")
        if not np.all(np.isfinite(self.tungsten)) or min(self.tungsten) < 0:
            raise ValueError(f"tungsten must be lengths in mm of at least 0, got {self.tungsten}")
        space = np.diff(self.layer_positions) - self.silicon - np.asarray(self.tungsten[1:])
        if not np.all(space >= 0):
            layer = int(np.argmin(space)) + 1
            raise ValueError(f"the tungsten in front of layer {layer} does not fit: {space[layer - 1]:g} mm are left")

    @property
    def num_layers(self) -> int:
        return len(self.tungsten)

    @cached_property
    def exit_depth(self) -> np.ndarray:
        """Depth at the middle of each silicon sheet, radiation lengths, shape (layers,)."""
        sheets = (np.arange(self.num_layers) + 0.5) * self.silicon / SILICON_X0
        return np.cumsum(self.tungsten) / TUNGSTEN_X0 + sheets

    @cached_property
    def gap_behind(self) -> np.ndarray:
        """Free space between each sheet and the next plate, mm, shape (layers,); infinite behind the last."""
        space = np.diff(self.layer_positions) - self.silicon - np.asarray(self.tungsten[1:])
        return np.append(space, np.inf)


@dataclass(frozen=True)
class ShowerConstants:
    """What the formulas leave open, tuned to Geant4 showers in the default geometry (docs/simulate_showers.md).

    Attributes:
        crossing_rate: crossings of a silicon sheet per GeV and unit of the normalised longitudinal profile (1/X0).
        shift_log_depth, shift_log_alpha: added to the mean of ln T and ln alpha of a block of tungsten.
        fluctuation: scale of the published widths of ln T and ln alpha.
        primary_fade: how fast the crossing of the converted electron itself goes over into the profile, in units of T.
        core_scale, tail_scale: scale of the two published radii; air gaps widen the shower.
        core_growth: power of the relative depth with which the core widens; 1 is published.
        core_weight: added to the published weight of the core.
        backscatter: ratio of crossings from the plate behind a sheet to those from the front.
        backscatter_depth: mean distance behind the sheet where they come from, exponential, X0.
        backscatter_spread: their angles, cos(theta) = u^spread with uniform u: 1/2 is a cosine law, 1 is isotropic.
        mip_mode, mip_width: Moyal distribution of the energy of a crossing, MeV.
        soft_fraction, soft_mean: crossings by stopping electrons, exponential energy, MeV.
        soft_radius: their distance from where they come from, exponential, mm.
    """

    crossing_rate: float = 49.4
    shift_log_depth: float = 0.0282
    shift_log_alpha: float = 0.221
    fluctuation: float = 1.38
    primary_fade: float = 0.566
    core_scale: float = 1.92
    tail_scale: float = 1.18
    core_growth: float = 2.25
    core_weight: float = 0.527
    backscatter: float = 0.114
    backscatter_depth: float = 0.454
    backscatter_spread: float = 1.27
    mip_mode: float = 0.187
    mip_width: float = 0.0855
    soft_fraction: float = 0.199
    soft_mean: float = 0.224
    soft_radius: float = 15.3

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            signed = field.name.startswith("shift_") or field.name == "core_weight"
            if not (np.isfinite(value) and (signed or value >= 0)):
                raise ValueError(
                    f"{field.name} must be a finite number{'' if signed else ' of at least 0'}, got {value}"
                )


def longitudinal_parameters(energy: np.ndarray, constants: ShowerConstants, rng: np.random.Generator):
    """Draws the shape of the longitudinal profile of electrons.

    Sections 2.1 and 3 of hep-ex/0001020: ln T and ln alpha are Gaussian and correlated.

    Args:
        energy: GeV, any shape.

    Returns:
        alpha and T (depth of the maximum, X0), each of the shape of `energy`.
    """
    # Below some ten critical energies the published widths diverge; such electrons carry little.
    log_y = np.log(np.maximum(energy / TUNGSTEN_CRITICAL_ENERGY, 12.0))
    mean_depth = np.log(log_y - 0.858) + constants.shift_log_depth
    mean_alpha = np.log(0.21 + (0.492 + 2.38 / TUNGSTEN_Z) * log_y) + constants.shift_log_alpha
    width_depth = constants.fluctuation / (-1.4 + 1.26 * log_y)
    width_alpha = constants.fluctuation / (-0.58 + 0.86 * log_y)
    correlation = 0.705 - 0.023 * log_y
    first, second = rng.standard_normal((2, *np.shape(energy)))
    common, different = np.sqrt((1 + correlation) / 2), np.sqrt((1 - correlation) / 2)
    depth = np.exp(mean_depth + width_depth * (common * first + different * second))
    alpha = np.exp(mean_alpha + width_alpha * (common * first - different * second))
    # alpha = 1 would have no maximum.
    return np.maximum(alpha, 1.05), depth


def longitudinal_profile(depth: np.ndarray, alpha: np.ndarray, maximum: np.ndarray) -> np.ndarray:
    """Normalised gamma profile (1/E) dE/dt in 1/X0; 0 in front of the start.

    Args:
        depth: X0 from the start of the shower.
        alpha, maximum: from `longitudinal_parameters`.
    """
    beta = (alpha - 1) / maximum
    inside = depth > 0
    t = np.where(inside, depth, 1.0)
    log_profile = alpha * np.log(beta) + (alpha - 1) * np.log(t) - beta * t - gammaln(alpha)
    return np.where(inside, np.exp(log_profile), 0.0)


def radial_parameters(energy: np.ndarray, relative_depth: np.ndarray, constants: ShowerConstants):
    """Radii of core and tail (mm) and the weight of the core; section 2.2 of hep-ex/0001020.

    Both parts are distributed as 2 r R^2 / (r^2 + R^2)^2.

    Args:
        energy: GeV.
        relative_depth: depth in units of that of the maximum.
    """
    log_energy = np.log(np.maximum(energy, 0.1))
    growth = (0.1162 - 0.000381 * TUNGSTEN_Z) * relative_depth**constants.core_growth
    core = 0.0251 + 0.00319 * log_energy + growth
    near = np.minimum(relative_depth, 5.0) - 0.645
    tail = (0.659 - 0.00309 * TUNGSTEN_Z) * (np.exp(-2.59 * near) + np.exp((0.3585 + 0.0421 * log_energy) * near))
    # The first term diverges backwards: particles close to the start have not spread yet.
    tail = np.minimum(tail, 3.0)
    run = ((0.401 + 0.00187 * TUNGSTEN_Z) - relative_depth) / (1.313 - 0.0686 * log_energy)
    weight = (2.632 - 0.00094 * TUNGSTEN_Z) * np.exp(run - np.exp(run)) + constants.core_weight
    return (
        TUNGSTEN_MOLIERE * constants.core_scale * np.maximum(core, 1e-3),
        TUNGSTEN_MOLIERE * constants.tail_scale * tail,
        np.clip(weight, 0.0, 1.0),
    )
