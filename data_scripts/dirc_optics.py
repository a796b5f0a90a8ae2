"""Optics of a DIRC: fused silica, Cherenkov emission, photon detection, and the constants of one detector.

Pure functions of numpy arrays, without random numbers. Wavelengths in nm, lengths in mm, momenta in GeV/c, angles in
radians unless a name ends in `_deg`, times in ns.
"""

from dataclasses import dataclass, field, fields
from functools import cached_property

import numpy as np

from hepzoo.tokenization.geometry_dirc import DircGeometry

SPEED_OF_LIGHT = 299.792458  # mm/ns
FINE_STRUCTURE = 1 / 137.035999
ELECTRON_MASS = 0.51099895e-3  # GeV/c2
PARTICLE_MASSES = {211: 0.13957039, 321: 0.493677}  # GeV/c2, by |PDG|

# Sellmeier formula of fused silica, I. H. Malitson, J. Opt. Soc. Am. 55 (1965) 1205; wavelengths in micrometres.
_SELLMEIER_STRENGTH = np.array([0.6961663, 0.4079426, 0.8974794])
_SELLMEIER_RESONANCE = np.array([0.0684043, 0.1162414, 9.896161])

# A generic bialkali photocathode behind a silica window: smooth, peak 25 % near 380 nm, nothing beyond 680 nm.
_BIALKALI_WAVELENGTH = (200, 230, 250, 280, 300, 320, 350, 380, 400, 430, 460, 500, 540, 580, 620, 650, 680)
_BIALKALI_EFFICIENCY = (
    (0.10, 0.14, 0.17, 0.20, 0.215, 0.225, 0.24, 0.25, 0.248, 0.235, 0.215, 0.17)
    + (0.11, 0.06, 0.025, 0.01, 0.0)
)  # fmt: skip


def refractive_index(wavelength: "np.typing.ArrayLike") -> np.ndarray:
    """Phase index n of fused silica at 20 degrees C (Malitson 1965, valid 210..3710 nm).

    Args:
        wavelength: vacuum wavelength, nm, any shape.
    """
    squared = np.asarray(wavelength, dtype=np.float64)[..., None] ** 2 * 1e-6
    terms = _SELLMEIER_STRENGTH * squared / (squared - _SELLMEIER_RESONANCE**2)
    return np.sqrt(1 + terms.sum(axis=-1))


def group_index(wavelength: "np.typing.ArrayLike") -> np.ndarray:
    """Group index n_g = n - lambda dn/dlambda of fused silica; light pulses travel at c / n_g.

    Args:
        wavelength: vacuum wavelength, nm, any shape.
    """
    squared = np.asarray(wavelength, dtype=np.float64)[..., None] ** 2 * 1e-6
    resonance = _SELLMEIER_RESONANCE**2
    index = np.sqrt(1 + (_SELLMEIER_STRENGTH * squared / (squared - resonance)).sum(axis=-1))
    # d(n^2)/dlambda^2 = -sum B C / (lambda^2 - C)^2, hence lambda dn/dlambda = lambda^2 / n times that.
    slope = -(_SELLMEIER_STRENGTH * resonance / (squared - resonance) ** 2).sum(axis=-1)
    return index - squared[..., 0] * slope / index


def velocity(momentum: "np.typing.ArrayLike", mass: "np.typing.ArrayLike") -> np.ndarray:
    """beta = p / sqrt(p^2 + m^2), with momentum in GeV/c and mass in GeV/c2."""
    momentum = np.asarray(momentum, dtype=np.float64)
    return momentum / np.hypot(momentum, mass)


def cherenkov_angle(beta: "np.typing.ArrayLike", index: "np.typing.ArrayLike") -> np.ndarray:
    """Cherenkov angle, cos(theta_C) = 1 / (n beta), in radians; NaN below threshold (n beta <= 1).

    Args:
        beta: particle velocity in units of c.
        index: phase index n at the photon's wavelength.
    """
    product = np.asarray(beta, dtype=np.float64) * np.asarray(index, dtype=np.float64)
    return np.arccos(1 / np.where(product > 1, product, np.nan))


def threshold_momentum(mass: float, index: float) -> float:
    """Momentum in GeV/c above which a particle of `mass` (GeV/c2) radiates in a medium of index n: m / sqrt(n^2-1)."""
    return float(mass / np.sqrt(index**2 - 1))


def frank_tamm_yield(
    beta: "np.typing.ArrayLike", length: "np.typing.ArrayLike", wavelength: np.ndarray, efficiency: np.ndarray
) -> np.ndarray:
    """Expected photons, N = 2 pi alpha L integral sin^2(theta_C) efficiency / lambda^2 dlambda (Frank-Tamm).

    Args:
        beta: velocities, any shape.
        length: path in the radiator, mm, broadcast with `beta`.
        wavelength: grid of the integral, nm, ascending, shape (n,).
        efficiency: probability that a photon of that wavelength is kept, shape (n,).

    Returns:
        mean numbers of photons, float64, shape of `beta` and `length`.
    """
    beta = np.asarray(beta, dtype=np.float64)
    sin_squared = np.maximum(1 - 1 / (beta[..., None] * refractive_index(wavelength)) ** 2, 0)
    integrand = sin_squared * efficiency / wavelength**2
    integral = ((integrand[..., 1:] + integrand[..., :-1]) / 2 * np.diff(wavelength)).sum(axis=-1)
    per_mm = 2 * np.pi * FINE_STRUCTURE * integral * 1e6
    return per_mm * length


@dataclass(frozen=True)
class DircDetector:
    """One bar of a high-performance DIRC with its lens, prism and sensor plane. Lengths in mm.

    Coordinates of the bar: x across its width, y through its thickness (the track enters at the inner face and goes
    towards +y), z along the bar towards the readout, z = 0 opposite the interaction point. Dimensions follow
    published hpDIRC studies (bar 17 x 35 mm, four pieces of 1225 mm, prism 300 mm deep and 350 mm wide with a 32
    degree opening, three-layer lens); position along z and efficiency are set to match the fast-simulation sample of
    the networks of arXiv 2504.19042. A constructor argument overrides any of them.

    Args:
        geometry: pixels of the sensor plane.
        bar_thickness, bar_width, bar_length: the radiator.
        bar_radius: distance from the beam line to the inner face of the bar.
        readout_z: z of the bar end that carries the lens; the other end is a mirror.
        track_x: where the track crosses the bar, from its middle, in x.
        track_x_spread: full width of a uniform spread around `track_x`; 0 for none.
        bar_x: x of the middle of the bar in coordinates of the sensor plane (bar 6 of 10 in front of the prism).
        lens_thickness: silica path added between bar and prism.
        lens_open_length: rays that pass the sides of the lens (the bar in x, the prism entry in y) within this
            length are lost; the rest of its thickness guides the light as the bar does.
        focal_length: of the lens, inside silica; equal to the prism depth it focuses on the sensor plane.
        lens_distortion: image height = focal_length * tan / sqrt(1 + 2 lens_distortion tan^2), of the angle to
            the axis; near the axis relative to an ideal lens 1 - lens_distortion * tan^2.
        lens_blur, lens_field_blur: Gaussian aberration on the sensor plane, per axis, mm:
            sigma = hypot(lens_blur, lens_field_blur * tan^2 of the angle to the bar axis).
        lens_transmission: what the lens and its interfaces let through.
        prism_depth, prism_width: along z and x.
        prism_entry_height: height of the prism where the bar is coupled; the bar is centred on it.
        prism_opening_deg: angle of the slanted face; the opposite face continues the bar.
        mirror_reflectivity: of the far bar end.
        surface_roughness: rms of the bar faces, nm; loss per reflection (4 pi sigma n cos(i) / lambda)^2.
        attenuation_length, attenuation_wavelength: bulk attenuation at that wavelength (nm), scaled as lambda^4.
        outside_index: index around the silica; sets the limit of total internal reflection.
        glue_cutoff, glue_cutoff_width: logistic absorption edge of the optical glue, nm.
        collection_efficiency: photoelectron collection of the sensors (and all constant losses).
        wavelength_range: band that is simulated, nm.
        time_resolution: Gaussian time spread of a single photon, ns.
        time_window: hits outside are lost, ns. t = 0 when the track enters the bar.
        theta_range_deg: polar angles accepted.
        angular_resolution: Gaussian error of the track direction per projection, rad: the recorded angle is the
            nominal one, the photons see the smeared one.
        multiple_scattering: the direction of the track diffuses along its path (Highland formula).
        radiation_length: of the radiator.
        delta_rays: knock-on electrons emit Cherenkov light of their own.
    """

    geometry: DircGeometry = field(default_factory=DircGeometry)
    bar_thickness: float = 17.0
    bar_width: float = 35.0
    bar_length: float = 4900.0
    bar_radius: float = 766.0
    readout_z: float = 3060.0
    track_x: float = 0.0
    track_x_spread: float = 0.0
    bar_x: float = 192.5
    lens_thickness: float = 15.0
    lens_open_length: float = 7.0
    focal_length: float = 300.0
    lens_distortion: float = 0.045
    lens_blur: float = 1.0
    lens_field_blur: float = 4.0
    lens_transmission: float = 0.95
    prism_depth: float = 300.0
    prism_width: float = 350.0
    prism_entry_height: float = 50.0
    prism_opening_deg: float = 32.0
    mirror_reflectivity: float = 0.92
    surface_roughness: float = 0.5
    attenuation_length: float = 500e3
    attenuation_wavelength: float = 442.0
    outside_index: float = 1.00027
    glue_cutoff: float = 305.0
    glue_cutoff_width: float = 6.0
    collection_efficiency: float = 0.95
    wavelength_range: tuple[float, float] = (270.0, 680.0)
    time_resolution: float = 0.1
    time_window: tuple[float, float] = (9.0, 157.0)
    theta_range_deg: tuple[float, float] = (25.0, 160.0)
    angular_resolution: float = 0.5e-3
    multiple_scattering: bool = True
    radiation_length: float = 123.0
    delta_rays: bool = True

    def __post_init__(self):
        may_be_zero = {"track_x_spread", "lens_thickness", "lens_blur", "lens_field_blur", "surface_roughness"}
        may_be_zero |= {"lens_distortion", "lens_open_length"}
        may_be_zero |= {"time_resolution", "angular_resolution"}
        anything = {"track_x", "bar_x", "readout_z", "geometry", "multiple_scattering", "delta_rays"}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("wavelength_range", "time_window", "theta_range_deg"):
                if len(value) != 2 or not 0 <= value[0] < value[1] < np.inf:
                    raise ValueError(f"detector: `{item.name}` must be (low, high) with 0 <= low < high, got {value!r}")
            elif item.name not in anything and not (
                np.isfinite(value) and (value > 0 or (value == 0 and item.name in may_be_zero))
            ):
                wanted = "non-negative" if item.name in may_be_zero else "positive"
                raise ValueError(f"detector: `{item.name}` must be {wanted} and finite, got {value!r}")
        for name in ("lens_transmission", "mirror_reflectivity", "collection_efficiency"):
            if getattr(self, name) > 1:
                raise ValueError(f"detector: `{name}` must be at most 1, got {getattr(self, name)!r}")
        if abs(self.track_x) + self.track_x_spread / 2 > self.bar_width / 2:
            raise ValueError(
                f"detector: `track_x` {self.track_x!r} with `track_x_spread` {self.track_x_spread!r} leaves the bar, "
                f"|x| <= {self.bar_width / 2}"
            )

    @property
    def mirror_z(self) -> float:
        """z of the mirrored bar end, mm."""
        return self.readout_z - self.bar_length

    @cached_property
    def wavelengths(self) -> np.ndarray:
        """Grid of `wavelength_range` in steps of about 1 nm, shape (n,)."""
        low, high = self.wavelength_range
        return np.linspace(low, high, int(np.ceil(high - low)) + 1)

    def detection_efficiency(self, wavelength: "np.typing.ArrayLike") -> np.ndarray:
        """Probability that a photon of `wavelength` (nm) that reaches a pixel is counted: photocathode, collection,
        glue edge and lens; everything but the losses along the bar."""
        wavelength = np.asarray(wavelength, dtype=np.float64)
        cathode = np.interp(wavelength, _BIALKALI_WAVELENGTH, _BIALKALI_EFFICIENCY)
        glue = 1 / (1 + np.exp(-(wavelength - self.glue_cutoff) / self.glue_cutoff_width))
        return cathode * glue * self.collection_efficiency * self.lens_transmission

    @cached_property
    def wavelength_sampling(self) -> tuple[np.ndarray, float]:
        """Cumulative distribution of efficiency / lambda^2 on `wavelengths`, shape (n,), and its integral, 1/mm."""
        density = self.detection_efficiency(self.wavelengths) / self.wavelengths**2
        steps = (density[1:] + density[:-1]) / 2 * np.diff(self.wavelengths)
        cumulative = np.concatenate([[0.0], np.cumsum(steps)])
        return cumulative / cumulative[-1], float(cumulative[-1] * 1e6)


def expected_photon_yield(
    momentum: "np.typing.ArrayLike",
    pdg: "np.typing.ArrayLike",
    theta_deg: "np.typing.ArrayLike",
    detector: DircDetector,
) -> np.ndarray:
    """Mean number of photons emitted along the track and, if they reached a pixel, counted: Frank-Tamm with the
    detection efficiency, before total internal reflection, transport and gaps; without delta rays.

    Args:
        momentum: GeV/c.
        pdg: +-211 or +-321.
        theta_deg: polar angle, degrees; the path in the bar is thickness / sin(theta).
        detector: constants.

    Returns:
        float64, the broadcast shape of the inputs.
    """
    momentum, pdg, theta_deg = np.broadcast_arrays(momentum, pdg, theta_deg)
    masses = np.vectorize(lambda code: PARTICLE_MASSES[abs(int(code))], otypes=[float])(pdg)
    length = detector.bar_thickness / np.sin(np.radians(theta_deg))
    efficiency = detector.detection_efficiency(detector.wavelengths)
    return frank_tamm_yield(velocity(momentum, masses), length, detector.wavelengths, efficiency)


def fold(position: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Brings a straight line that was drawn through mirror images back between two parallel mirrors.

    Args:
        position: unfolded coordinates, any shape.
        low, high: the mirrors.

    Returns:
        folded coordinates in [low, high], and the signed number of mirrors crossed (int64); the direction is
        reversed where that number is odd.
    """
    size = high - low
    cell = np.floor((position - low) / size).astype(np.int64)
    within = position - low - cell * size
    return np.where(cell % 2 == 0, low + within, high - within), cell


def trace_bar(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, direction: np.ndarray, detector: DircDetector
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Follows photons from their emission to the readout end of the bar by the method of images.

    Args:
        x, y, z: emission points in bar coordinates, shape (n,), mm.
        direction: unit vectors, shape (n, 3); photons with negative z component are reflected by the mirror.
        detector: constants.

    Returns:
        x, y (from the bar axis) and direction (n, 3) at the bar end, the path (mm), and the numbers of reflections
        on the narrow (x) and the wide (y) faces.
    """
    kz = np.maximum(np.abs(direction[:, 2]), 1e-9)
    to_mirror = z - detector.mirror_z
    distance = np.where(direction[:, 2] > 0, detector.readout_z - z, to_mirror + detector.bar_length)
    path = distance / kz
    end_x, bounces_x = fold(x + direction[:, 0] * path, -detector.bar_width / 2, detector.bar_width / 2)
    end_y, bounces_y = fold(y + direction[:, 1] * path, -detector.bar_thickness / 2, detector.bar_thickness / 2)
    out = np.stack(
        [
            np.where(bounces_x % 2 == 0, direction[:, 0], -direction[:, 0]),
            np.where(bounces_y % 2 == 0, direction[:, 1], -direction[:, 1]),
            kz,
        ],
        axis=1,
    )
    return end_x, end_y, out, path, np.abs(bounces_x), np.abs(bounces_y)


def focus(
    x: np.ndarray, y: np.ndarray, direction: np.ndarray, detector: DircDetector
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thin lens on the bar axis with barrel distortion: parallel light meets in one point at `focal_length`.

    Args:
        x, y: positions from the bar axis, shape (n,), mm.
        direction: unit vectors, shape (n, 3), z component positive.
        detector: constants.

    Returns:
        slopes dx/dz and dy/dz behind the lens, and whether the ray stays inside the lens, each of shape (n,).
    """
    tan_x, tan_y = direction[:, 0] / direction[:, 2], direction[:, 1] / direction[:, 2]
    inside = np.abs(x + tan_x * detector.lens_open_length) < detector.bar_width / 2
    inside &= np.abs(y + tan_y * detector.lens_open_length) < detector.prism_entry_height / 2
    scale = 1 / np.sqrt(1 + 2 * detector.lens_distortion * (tan_x**2 + tan_y**2))
    return tan_x * scale - x / detector.focal_length, tan_y * scale - y / detector.focal_length, inside


def trace_prism(
    x: np.ndarray, y: np.ndarray, slope_x: np.ndarray, slope_y: np.ndarray, index: np.ndarray, detector: DircDetector
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Follows photons through the prism: floor, then slanted face, then side walls, all in closed form.

    A ray meets the floor at most once before the slanted face, and that face at most once: afterwards it climbs less
    steeply than the face does. (Rays that come back down to the floor, beyond twice the opening angle, are folded.)

    Args:
        x, y: positions behind the lens from the bar axis, shape (n,), mm.
        slope_x, slope_y: dx/dz and dy/dz there.
        index: phase index of each photon.
        detector: constants.

    Returns:
        x, y on the sensor plane (in its coordinates, mm), the path in the prism (mm), and whether every reflection
        was total.
    """
    depth = detector.prism_depth
    critical = np.sqrt(np.maximum(1 - (detector.outside_index / index) ** 2, 0))  # largest |cos| to a face's normal
    norm = np.sqrt(1 + slope_x**2 + slope_y**2)
    start = y + detector.prism_entry_height / 2
    end = start + slope_y * depth

    # Floor at y = 0: behind it the ray continues as the image of its straight extension.
    downward = slope_y < 0
    climb = np.abs(slope_y)
    origin = np.where(downward, -start, start)
    on_floor = downward & (end < 0)
    total = ~on_floor | (climb / norm < critical)

    # Slanted face: y = entry height + z tan(opening).
    opening = np.radians(detector.prism_opening_deg)
    steep = climb - np.tan(opening)
    meet = (detector.prism_entry_height - origin) / np.where(steep > 0, steep, 1)
    on_slant = (steep > 0) & (meet < depth) & (~downward | on_floor)
    meet = np.where(on_slant, meet, 0.0)
    across = (climb * np.cos(opening) - np.sin(opening)) / norm  # direction cosine to the normal of the slanted face
    total &= ~on_slant | (np.abs(across) < critical)
    slant_y = climb / norm - 2 * across * np.cos(opening)
    slant_z = 1 / norm + 2 * across * np.sin(opening)
    slant_z = np.where(on_slant, slant_z, 1.0)
    y_plane = np.abs(np.where(on_slant, origin + climb * meet + slant_y / slant_z * (depth - meet), end))
    path = np.where(on_slant, meet * norm + (depth - meet) / slant_z, depth * norm)

    # Side walls, parallel: the advance in x is proportional to the path.
    x_plane, walls = fold(detector.bar_x + x + slope_x / norm * path, 0.0, detector.prism_width)
    total &= (walls == 0) | (np.abs(slope_x) / norm < critical)
    return x_plane, y_plane, path, total
