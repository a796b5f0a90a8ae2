"""Plots of DIRC tracks: hit patterns, time spectra, photon yields, ratios and log-likelihood differences.

Every function draws one figure, writes it if `path` is given (format by the ending: .png, .pdf, ...) and returns the
path; without `path` the figure is returned. Needs matplotlib (`pip install "hepzoo[plots]"`) and uses an mplhep style
when asked. No display is needed, and neither pyplot's state nor the caller's settings are touched.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.evaluation.distances import ratio_rms
from hepzoo.evaluation.figures import COLORS, colormap, finish, styled, subplots
from hepzoo.evaluation.tracks_dirc import SPECIES, DircTracks, as_tracks
from hepzoo.tokenization.geometry_dirc import DircGeometry

TIME_EDGES = np.arange(9.0, 157.25, 0.5)
SYMBOL = {"pion": r"$\pi$", "kaon": r"$K$", "all": "all tracks"}


def _kinematics_title(tracks: DircTracks) -> str:
    """For instance `6 GeV/c, 30 deg`, or ranges."""

    def span(values: np.ndarray, unit: str) -> str:
        low, high = float(values.min()), float(values.max())
        return f"{low:.3g} {unit}" if high - low < 1e-2 else f"{low:.3g}\N{EN DASH}{high:.3g} {unit}"

    return f"$p$ = {span(tracks.momentum, 'GeV/$c$')}, $\\theta$ = {span(tracks.theta, 'deg')}"


def _require(tracks: DircTracks, name: str) -> DircTracks:
    if not len(tracks) or not tracks.offsets[-1]:
        raise ValueError(f"{name}: no photons to plot")
    return tracks


def _density(tracks: DircTracks, geometry: DircGeometry) -> np.ndarray:
    """Hits per bin of (y, x), normalised to 1 in total; gaps between sensors are NaN."""
    counts, _, _ = np.histogram2d(tracks.y, tracks.x, bins=(geometry.y_edges, geometry.x_edges))
    density = counts / max(counts.sum(), 1)
    density[~np.isin(np.arange(len(geometry.y_edges) - 1), _live(geometry, "y"))] = np.nan
    density[:, ~np.isin(np.arange(len(geometry.x_edges) - 1), _live(geometry, "x"))] = np.nan
    return density


def _draw_densities(figure, axes, sets: Mapping[str, DircTracks], geometry: DircGeometry) -> list[np.ndarray]:
    """Draws the hit density of each sample, on one logarithmic colour scale, and returns them."""
    from matplotlib.colors import LogNorm

    densities = [_density(tracks, geometry) for tracks in sets.values()]
    filled = np.concatenate([d[d > 0] for d in densities])
    # nearly all pixels with hits, at most four decades
    floor = float(max(np.quantile(filled, 0.005), filled.max() * 1e-4))
    scale = LogNorm(floor, filled.max())
    color = colormap("viridis", bad="white", under="#e9e9e9")  # pixels without hits; gaps between sensors stay white
    for axis, (name, tracks), density in zip(axes, sets.items(), densities, strict=True):
        shown = np.where(density > 0, np.maximum(density, floor), density * 0 + floor / 10)
        mesh = axis.pcolormesh(geometry.x_edges, geometry.y_edges, shown, norm=scale, cmap=color, rasterized=True)
        axis.set_title(f"{name} ({tracks.offsets[-1]:,} photons)")
    figure.colorbar(mesh, ax=list(axes), label="fraction of photons per pixel", shrink=0.85, pad=0.015)
    return densities


def _live(geometry: DircGeometry, axis: str) -> np.ndarray:
    """Numbers of the histogram bins that hold pixels (the others are gaps and borders)."""
    pmts = np.arange(geometry.num_pmts).repeat(geometry.pixels_per_pmt)
    pixels = np.tile(np.arange(geometry.pixels_per_pmt), geometry.num_pmts)
    x, y = geometry.pixel_center(pmts, pixels)
    edges, centers = (geometry.x_edges, x) if axis == "x" else (geometry.y_edges, y)
    return np.unique(np.searchsorted(edges, centers) - 1)


def _block_ratio(
    real: np.ndarray, generated: np.ndarray, photons: int, geometry: DircGeometry, fewest: float = 10.0
) -> tuple[np.ndarray, np.ndarray, int]:
    """Ratio of two densities in blocks of `k x k` pixels that hold 20 photons on average where any block size does.

    `photons` is the size of the smaller sample. Returns the ratio (NaN where fewer than `fewest` photons are expected
    on average of both samples), 0 where that is the reason (else NaN), and k.
    """
    rows, columns = _live(geometry, "y"), _live(geometry, "x")
    sizes = [k for k in range(1, geometry.pixel_rows + 1) if not geometry.pixel_rows % k | geometry.pixel_columns % k]
    block = next((k for k in sizes if photons * k * k >= 20 * geometry.num_channels), sizes[-1])

    def grouped(density: np.ndarray) -> np.ndarray:
        live = density[np.ix_(rows, columns)]
        return live.reshape(len(rows) // block, block, len(columns) // block, block).sum(axis=(1, 3))

    a, b = grouped(real), grouped(generated)
    enough = (a + b) * photons >= 2 * fewest
    ratio, few = np.full(real.shape, np.nan), np.full(real.shape, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.where(enough, b / a, np.nan)
    for target, value in ((ratio, values), (few, np.where(enough, np.nan, 0.0))):
        target[np.ix_(rows, columns)] = value.repeat(block, axis=0).repeat(block, axis=1)
    return ratio, few, block


@styled
def plot_hit_pattern(
    panels: Mapping[str, Any],
    path: str | Path | None = None,
    geometry: DircGeometry | None = None,
    title: str | None = None,
    style: str | None = None,
):
    """Hit patterns side by side on a common logarithmic colour scale.

    Args:
        panels: heading -> rows, for instance `{"pions": ..., "kaons": ...}`.
        path (*optional*): file to write.
        geometry (`DircGeometry`, *optional*): sensor plane; its `x_edges` and `y_edges` are the bins.
        title (`str`, *optional*): default: the kinematics of the first panel.
        style (`str`, *optional*): name of an mplhep style, for instance `"CMS"`.
    """
    geometry = DircGeometry() if geometry is None else geometry
    sets = {name: _require(as_tracks(rows, geometry), name) for name, rows in panels.items()}
    figure, axes = subplots(1, len(sets), figsize=(5.6 * len(sets) + 0.8, 4.4), sharey=True)
    _draw_densities(figure, axes[0], sets, geometry)
    for axis in axes[0]:
        axis.set_xlabel("$x$ [mm]")
        axis.set_aspect("equal")
    axes[0, 0].set_ylabel("$y$ [mm]")
    figure.suptitle(title or _kinematics_title(next(iter(sets.values()))), fontsize=12)
    return finish(figure, path)


@styled
def plot_hit_comparison(
    real: Any,
    generated: Any,
    path: str | Path | None = None,
    geometry: DircGeometry | None = None,
    title: str | None = None,
    style: str | None = None,
):
    """Real and generated hit pattern, and their ratio in blocks of pixels large enough for the smaller sample.

    Args: as `plot_hit_pattern`; `real` and `generated` are rows of one species.
    """
    from matplotlib.colors import ListedColormap, LogNorm

    geometry = DircGeometry() if geometry is None else geometry
    real, generated = (
        _require(as_tracks(real, geometry), "real"),
        _require(as_tracks(generated, geometry), "generated"),
    )
    figure, (axes,) = subplots(1, 3, figsize=(15, 4.0), sharey=True)
    figure.get_layout_engine().set(wspace=0.06)
    a, b = _draw_densities(figure, axes[:2], {"real": real, "generated": generated}, geometry)
    ratio, few, block = _block_ratio(a, b, min(real.offsets[-1], generated.offsets[-1]), geometry)
    diverging = colormap("RdBu_r", bad="none")
    axes[2].pcolormesh(geometry.x_edges, geometry.y_edges, few, cmap=ListedColormap(["#bdbdbd"]), rasterized=True)
    mesh = axes[2].pcolormesh(
        geometry.x_edges, geometry.y_edges, ratio, norm=LogNorm(0.25, 4), cmap=diverging, rasterized=True
    )
    where = "pixel" if block == 1 else f"{block} x {block} pixels"
    axes[2].set_title(f"generated / real, per {where} (grey: < 10 hits)")
    bar = figure.colorbar(mesh, ax=axes[2], label="ratio", shrink=0.85, pad=0.03, extend="both")
    bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["0.25", "0.5", "1", "2", "4"])
    bar.minorticks_off()
    for axis in axes:
        axis.set_xlabel("$x$ [mm]")
        axis.set_aspect("equal")
    axes[0].set_ylabel("$y$ [mm]")
    figure.suptitle(title or _kinematics_title(real), fontsize=12)
    return finish(figure, path)


def _histogram(values: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Density and its error, normalised to the entries inside the edges."""
    counts = np.histogram(values, edges)[0].astype(float)
    norm = max(counts.sum(), 1) * np.diff(edges)
    return counts / norm, np.sqrt(counts) / norm


def _ratio_panel(axis, edges, reference, others: Sequence[tuple[np.ndarray, str]], band: float, label: str) -> None:
    """Ratios to the reference sample with its `band` x sqrt(N) statistical band."""
    counts = np.histogram(reference, edges)[0].astype(float)
    total = max(counts.sum(), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(counts > 0, band / np.sqrt(counts), np.nan)
    axis.stairs(
        1 + relative, edges, baseline=1 - relative, fill=True, color="0.85", label=rf"${band:g}\sqrt{{N}}$ (real)"
    )
    axis.axhline(1, color="0.4", lw=0.8)
    centers = (edges[:-1] + edges[1:]) / 2
    for values, color in others:
        other = np.histogram(values, edges)[0].astype(float)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(counts > 0, (other / max(other.sum(), 1)) / (counts / total), np.nan)
            error = np.where((counts > 0) & (other > 0), ratio / np.sqrt(other), np.nan)
        outside = (ratio > 2) | (ratio < 0)
        axis.errorbar(centers, np.where(outside, np.nan, ratio), error, fmt=".", ms=3, lw=0.7, color=color)
        axis.plot(centers[outside], np.full(outside.sum(), 1.93), "^", ms=3, color=color)
    axis.set_ylim(0, 2)
    axis.set_ylabel(label)


@styled
def plot_time_spectrum(
    real: Any,
    generated: Any | None = None,
    path: str | Path | None = None,
    edges: np.ndarray = TIME_EDGES,
    title: str | None = None,
    labels: tuple[str, str] = ("real", "generated"),
    colors: tuple[str, str] = ("real", "generated"),
    style: str | None = None,
):
    """Arrival times in bins of 0.5 ns from 9 to 157 ns; with a second sample also the ratio to the first.

    Args:
        real, generated: rows (of one species); the second is optional.
        edges (`np.ndarray`): bin edges, ns.
        labels, colors: of the two samples; colours are keys of `COLORS` or matplotlib colours.
    """
    real = _require(as_tracks(real), labels[0])
    two = generated is not None
    figure, axes = subplots(
        2 if two else 1,
        1,
        figsize=(7.5, 5.6 if two else 4.2),
        sharex=True,
        height_ratios=(3, 1) if two else (1,),
    )
    axes = axes[:, 0]
    shades = [COLORS.get(c, c) for c in colors]
    sets = [real] + ([_require(as_tracks(generated), labels[1])] if two else [])
    for i, tracks in enumerate(sets):
        density, _ = _histogram(tracks.time, edges)
        axes[0].stairs(
            density, edges, color=shades[i], lw=1.3, fill=two and i == 0, alpha=0.35 if two and i == 0 else 1,
            label=f"{labels[i]} ({tracks.offsets[-1]:,} photons)",
        )  # fmt: skip
        if two and i == 0:
            axes[0].stairs(density, edges, color=shades[i], lw=0.8)
    axes[0].set_yscale("log")
    axes[0].set_ylabel("photons / ns (normalised to 1)")
    axes[0].legend(loc="upper right")
    axes[0].set_title(title or _kinematics_title(real))
    if two:
        _ratio_panel(axes[1], edges, real.time, [(sets[1].time, shades[1])], 1, f"{labels[1]} /\n{labels[0]}")
        inside = [np.histogram(t.time, edges)[0] for t in sets]
        rms = ratio_rms(*inside)
        axes[1].text(
            0.99,
            0.06,
            f"ratio RMS = {rms:.2g}",
            transform=axes[1].transAxes,
            ha="right",
            fontsize=9,
            bbox={"color": "white", "alpha": 0.8, "pad": 1},
        )
    last = max(np.quantile(t.time, 0.9999) for t in sets)
    axes[-1].set_xlim(edges[0], min(edges[-1], edges[0] + 1.15 * (last - edges[0])))
    axes[-1].set_xlabel("arrival time [ns]")
    return finish(figure, path)


def _profile(tracks: DircTracks, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard deviation and error of the mean of the yield in theta bins (NaN below 2 tracks)."""
    inside = (tracks.theta >= edges[0]) & (tracks.theta <= edges[-1])
    which = np.clip(np.searchsorted(edges, tracks.theta[inside], side="right") - 1, 0, len(edges) - 2)
    n = np.bincount(which, minlength=len(edges) - 1).astype(float)
    n[n < 2] = np.nan
    counts = tracks.num_hits[inside].astype(float)
    mean = np.bincount(which, counts, len(edges) - 1) / n
    spread = np.sqrt(np.bincount(which, (counts - mean[which]) ** 2, len(edges) - 1) / (n - 1))
    return mean, spread, spread / np.sqrt(n)


@styled
def plot_photon_yield(
    samples: Mapping[str, Any],
    path: str | Path | None = None,
    theta_edges: np.ndarray | None = None,
    title: str | None = None,
    colors: Mapping[str, str] | None = None,
    style: str | None = None,
):
    """Photon yield: mean and spread against the polar angle (left), distribution (right).

    Args:
        samples: label -> rows. The first one is drawn as the reference (band of +- 1 standard deviation).
        theta_edges (`np.ndarray`, *optional*): bins, deg; default: 5 degrees wide over the data. Left out when the
            tracks cover less than one such bin.
        colors (*optional*): label -> colour.
    """
    sets = {name: _require(as_tracks(rows), name) for name, rows in samples.items()}
    palette = {name: COLORS.get(name, f"C{i}") for i, name in enumerate(sets)} | dict(colors or {})
    low = min(t.theta.min() for t in sets.values())
    high = max(t.theta.max() for t in sets.values())
    wide = high - low > 2
    if theta_edges is None:
        theta_edges = np.arange(5 * np.floor(low / 5), 5 * np.floor(high / 5) + 10, 5.0)
    figure, axes = subplots(1, 2 if wide else 1, figsize=(12 if wide else 6.5, 4.4))
    if wide:
        axis = axes[0, 0]
        centers, half = (theta_edges[:-1] + theta_edges[1:]) / 2, np.diff(theta_edges) / 2
        shifts = np.linspace(-0.15, 0.15, len(sets)) * 2 * half.mean() if len(sets) > 1 else [0.0]
        for i, (name, tracks) in enumerate(sets.items()):
            mean, spread, error = _profile(tracks, theta_edges)
            axis.errorbar(
                centers + shifts[i], mean, error, fmt="o" if i == 0 else "s", ms=4, color=palette[name], label=name
            )
            if i == 0:
                axis.stairs(
                    mean + spread, theta_edges, baseline=mean - spread, fill=True, color=palette[name], alpha=0.13
                )
            else:
                for sign in (-1, 1):
                    axis.stairs(mean + sign * spread, theta_edges, baseline=None, color=palette[name], ls=":", lw=1.2)
        first = next(iter(sets))
        axis.plot([], [], color=palette[first], alpha=0.25, lw=8, label=r"$\pm$ 1 std of tracks (" + first + ")")
        if len(sets) > 1:
            axis.plot([], [], color="0.4", ls=":", label=r"$\pm$ 1 std (others)")
        axis.set_xlabel(r"polar angle $\theta$ [deg]")
        axis.set_ylabel("photons per track")
        axis.set_ylim(0, 1.3 * axis.get_ylim()[1])
        axis.legend(loc="upper center", ncols=2)
    axis = axes[0, -1]
    highest = max(np.quantile(t.num_hits, 0.999) for t in sets.values())
    step = max(int(np.ceil(highest / 50)), 1)
    lowest = min(np.quantile(t.num_hits, 0.001) for t in sets.values())
    first_bin = max(lowest - 0.15 * (highest - lowest), 0) // step * step
    edges = np.arange(first_bin, highest + 0.15 * (highest - lowest) + step, step) - 0.5
    for i, (name, tracks) in enumerate(sets.items()):
        density, error = _histogram(tracks.num_hits, edges)
        label = f"{name}: {tracks.num_hits.mean():.1f} $\\pm$ {tracks.num_hits.std():.1f}"
        axis.stairs(density, edges, color=palette[name], lw=1.4, fill=i == 0, alpha=0.25 if i == 0 else 1, label=label)
        axis.errorbar((edges[:-1] + edges[1:]) / 2, density, error, fmt="none", color=palette[name], lw=0.8)
    axis.set_xlabel("photons per track")
    axis.set_ylabel("fraction of tracks / photon")
    axis.set_ylim(0, 1.3 * axis.get_ylim()[1])
    axis.legend(title="mean $\\pm$ std", loc="upper right")
    figure.suptitle(title or _kinematics_title(next(iter(sets.values()))), fontsize=12)
    return finish(figure, path)


@styled
def plot_ratios(
    real: Any,
    generated: Any,
    path: str | Path | None = None,
    geometry: DircGeometry | None = None,
    time_edges: np.ndarray = TIME_EDGES,
    title: str | None = None,
    style: str | None = None,
):
    """Densities of x, y and time with generated/real below, the 3 sqrt(N) band of the real sample, and the ratio RMS.

    x and y are binned per pixel column and row (the gaps between sensors are empty by construction).
    """
    geometry = DircGeometry() if geometry is None else geometry
    real, generated = (
        _require(as_tracks(real, geometry), "real"),
        _require(as_tracks(generated, geometry), "generated"),
    )
    figure, axes = subplots(2, 3, figsize=(16, 5.2), sharex="col", height_ratios=(2.2, 1))
    columns = [
        ("x", "$x$ [mm]", geometry.x_edges),
        ("y", "$y$ [mm]", geometry.y_edges),
        ("time", "arrival time [ns]", time_edges),
    ]
    for number, (name, label, edges) in enumerate(columns):
        top, bottom = axes[:, number]
        a, b = getattr(real, name), getattr(generated, name)
        density, _ = _histogram(a, edges)
        top.stairs(density, edges, fill=True, color=COLORS["real"], alpha=0.25, label="real")
        top.stairs(density, edges, color=COLORS["real"], lw=0.6)
        top.stairs(_histogram(b, edges)[0], edges, color=COLORS["generated"], lw=1.1, label="generated")
        top.set_ylabel(f"photons / {'ns' if name == 'time' else 'mm'} (normalised to 1)")
        rms = ratio_rms(np.histogram(a, edges)[0], np.histogram(b, edges)[0])
        top.set_title(f"ratio RMS = {rms:.2g}", fontsize=10)
        if name == "time":
            top.set_yscale("log")
            last = max(np.quantile(a, 0.9999), np.quantile(b, 0.9999))
            top.set_xlim(edges[0], min(edges[-1], edges[0] + 1.15 * (last - edges[0])))
        else:
            top.set_xlim(edges[0], edges[-1])
            top.set_ylim(0, 1.25 * top.get_ylim()[1])
        _ratio_panel(bottom, edges, a, [(b, COLORS["generated"])], 3, "generated / real" if number == 0 else "")
        bottom.set_xlabel(label)
    axes[0, 0].legend(loc="upper right", ncols=2)
    axes[1, 0].legend(loc="upper right", fontsize=9)
    kinematics = _kinematics_title(real)
    sizes = f"{real.offsets[-1]:,} real, {generated.offsets[-1]:,} generated photons"
    figure.suptitle(f"{title or kinematics}; {sizes}", fontsize=12)
    return finish(figure, path)


@styled
def plot_dll(
    scores_kaon: np.ndarray,
    scores_pion: np.ndarray,
    path: str | Path | None = None,
    edges: np.ndarray | str | float = "auto",
    title: str | None = None,
    xlabel: str = r"$\Delta\,\mathrm{LL} = \mathrm{LL}_K - \mathrm{LL}_\pi$",
    style: str | None = None,
):
    """Score distributions of true kaons and pions with their Gaussian fits, separation power and AUC.

    Args:
        scores_kaon, scores_pion (`np.ndarray`): DLL or logits.
        edges: histogram edges, see `hepzoo.evaluation.separation.separation_power`.
    """
    from hepzoo.evaluation.roc import auc_score
    from hepzoo.evaluation.separation import auto_edges, classifier_edges, kde_edges, separation_power

    if isinstance(edges, str):
        edges = classifier_edges() if edges == "classifier" else auto_edges(scores_kaon, scores_pion)
    elif np.ndim(edges) == 0:
        edges = kde_edges(float(edges))
    try:
        result, why = separation_power(scores_kaon, scores_pion, edges), ""
    except ValueError as err:
        result, why = None, str(err)
    figure, ((axis,),) = subplots(1, 1, figsize=(7, 4.6))
    grid = np.linspace(edges[0], edges[-1], 1000)
    for name, scores in (("kaon", scores_kaon), ("pion", scores_pion)):
        scores = np.asarray(scores, dtype=float)
        counts = np.histogram(scores, edges)[0]
        axis.stairs(
            counts, edges, fill=True, alpha=0.3, color=COLORS[name], label=f"{SYMBOL[name]} ({len(scores):,} tracks)"
        )
        if result is not None:
            fit = getattr(result, name)
            curve = fit.amplitude * np.exp(-((grid - fit.mean) ** 2) / (2 * fit.sigma**2))
            text = f"fit: $\\mu$ = {fit.mean:.2f}, $\\sigma$ = {fit.sigma:.2f}"
            axis.plot(grid, curve, color=COLORS[name], lw=1.6, label=text)
    head = f"AUC = {auc_score(scores_kaon, scores_pion):.3f}"
    if result is not None:
        head = f"separation = {result.separation:.2f} $\\pm$ {result.error:.2f} $\\sigma$, " + head
    else:
        axis.text(0.5, 0.5, "no fit", transform=axis.transAxes, ha="center", color="0.5")
        head += f" ({why.split(':')[0]}: fit failed)"
    axis.set_title(f"{title}: {head}" if title else head, fontsize=11)
    axis.set_xlabel(xlabel)
    axis.set_ylabel("tracks / bin")
    used = np.concatenate([np.asarray(scores_kaon, float), np.asarray(scores_pion, float)])
    used = used[np.isfinite(used)]
    low, high = np.quantile(used, [0.001, 0.999])
    pad = 0.15 * (high - low) + (edges[1] - edges[0])
    axis.set_xlim(max(edges[0], low - pad), min(edges[-1], high + pad))
    axis.set_ylim(0, 1.35 * axis.get_ylim()[1])
    axis.legend(loc="upper center", ncols=2)
    return finish(figure, path)


@styled
def plot_separation(
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    path: str | Path | None = None,
    versus: str = "theta",
    title: str | None = None,
    style: str | None = None,
):
    """Separation power against theta or momentum.

    Args:
        tables: label -> table of `hepzoo.evaluation.separation.separation_table`.
        versus (`str`): `"theta"` or `"momentum"`.
    """
    if versus not in ("theta", "momentum"):
        raise ValueError(f"versus must be 'theta' or 'momentum', got {versus!r}")
    figure, ((axis,),) = subplots(1, 1, figsize=(7, 4.4))
    markers = "osD^v<>"
    drawn = 0
    for i, (name, rows) in enumerate(tables.items()):
        rows = sorted((r for r in rows if np.isfinite(r["separation"])), key=lambda r: r[versus])
        if not rows:
            continue
        drawn += len(rows)
        at = [r[versus] for r in rows]
        reach = [[r[versus] - r[f"{versus}_low"] for r in rows], [r[f"{versus}_high"] - r[versus] for r in rows]]
        axis.errorbar(
            at,
            [r["separation"] for r in rows],
            [r["error"] for r in rows],
            xerr=np.maximum(reach, 0),
            fmt=markers[i % len(markers)],
            ms=5,
            lw=1,
            color=COLORS.get(name, f"C{i}"),
            label=name,
        )
    if not drawn:
        raise ValueError("no separation to plot: every bin of the tables is without a figure (see their notes)")
    axis.axhline(3, color="0.5", lw=0.8, ls="--")
    axis.text(
        0.995, 3, r"3$\sigma$", transform=axis.get_yaxis_transform(), ha="right", va="bottom", color="0.4", fontsize=9
    )
    axis.set_ylim(0, max(3.5, 1.2 * axis.get_ylim()[1]))
    axis.set_xlabel(r"polar angle $\theta$ [deg]" if versus == "theta" else r"momentum [GeV/$c$]")
    axis.set_ylabel(r"$\pi/K$ separation [standard deviations]")
    axis.legend()
    if title:
        axis.set_title(title)
    return finish(figure, path)


def species_tracks(tracks: DircTracks) -> dict[str, DircTracks]:
    """The species present, `{"pion": ..., "kaon": ...}`, or `{"all": ...}` where the rows have no PDG code."""
    found = {name: tracks.species(name) for name in SPECIES}
    found = {name: t for name, t in found.items() if len(t)}
    return found or {"all": tracks}
