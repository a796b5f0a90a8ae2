"""Plots of calorimeter showers, real against generated: spectra, profiles, response, correlations, event displays.

The figures of arXiv:2005.05334 and arXiv:2606.11304 with a panel of the ratio generated / real and statistical errors
below. Every function draws one figure, writes it if `path` is given (format by the ending) and returns the path;
without `path` the figure is returned. Needs matplotlib (`pip install "hepzoo[plots]"`); `style` names an mplhep style.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.evaluation.figures import COLORS, NAMES, colormap, draw_pair, draw_ratio, finish, styled, subplots
from hepzoo.evaluation.showers import (
    CORRELATED,
    GRID,
    MIP,
    OBSERVABLES,
    ShowerObservables,
    Showers,
    as_showers,
    energy_bins,
    energy_response,
)

# observables that are whole numbers, drawn in bins of whole numbers
COUNTS = ("num_hits", "start_layer", "hottest_layer")
AXES = {
    "visible_energy": "visible energy [MeV]",
    "energy_ratio": "visible energy / incident energy",
    "num_hits": "number of hits",
    "mean_hit_energy": "mean cell energy [MeV]",
    "cog_x": "centre of gravity $x$ [cells]",
    "cog_y": "centre of gravity $y$ [cells]",
    "cog_z": "centre of gravity $z$ [layers]",
    "width_x": "width in $x$ [cells]",
    "width_y": "width in $y$ [cells]",
    "width_z": "width in $z$ [layers]",
    "width_r": "width in $r$ [cells]",
    "r50": "radius of 50 % of the energy [cells]",
    "r90": "radius of 90 % of the energy [cells]",
    "hottest_layer": "layer of the hottest cell",
}
PROFILE_AXES = {
    "energy_per_layer": ("layer", "mean energy [MeV / layer]"),
    "hits_per_layer": ("layer", "mean number of hits / layer"),
    "radial_profile": ("radius [cells]", "mean energy [MeV / cell width]"),
}
CORRELATION_LABELS = {
    "cog_x": r"$m_{1,x}$", "cog_y": r"$m_{1,y}$", "cog_z": r"$m_{1,z}$",
    "moment_x": r"$m_{2,x}$", "moment_y": r"$m_{2,y}$", "moment_z": r"$m_{2,z}$",
    "visible_energy": r"$E_\mathrm{vis}$", "incident_energy": r"$E_\mathrm{inc}$", "num_hits": r"$n_\mathrm{hit}$",
    "front_fraction": r"$E_1/E_\mathrm{vis}$", "middle_fraction": r"$E_2/E_\mathrm{vis}$",
    "back_fraction": r"$E_3/E_\mathrm{vis}$",
}  # fmt: skip
OVERVIEW = ("visible_energy", "num_hits", "cog_z", "energy_per_layer", "radial_profile", "cell_energy")


def _title(real: ShowerObservables, generated: ShowerObservables) -> str:
    low, high = float(real.incident_energy.min()), float(real.incident_energy.max())
    span = f"{low:.3g}" if high - low < 1e-2 else f"{low:.3g}\N{EN DASH}{high:.3g}"
    return f"$E_\\mathrm{{inc}}$ = {span} GeV; {len(real):,} real, {len(generated):,} generated showers"


def _edges(name: str, samples: Sequence[np.ndarray], bins: int) -> np.ndarray:
    """Bins over the values of both samples without their outermost 0.05 %, whole numbers for `COUNTS`."""
    both = np.concatenate(samples)
    low, high = np.quantile(both, [0.0005, 0.9995])
    if name in COUNTS:
        width = max(int(np.ceil((high - low) / bins)), 1)
        return np.arange(np.floor(low) - width, high + 2 * width, width) - 0.5
    margin = 0.05 * (high - low) or 0.01 * abs(high) or 0.5
    return np.linspace(low - margin, high + margin, bins + 1)


def _draw_observable(top, bottom, samples: Sequence[ShowerObservables], name: str, bins: int) -> None:
    values = [o.scalars[name][np.isfinite(o.scalars[name])] for o in samples]
    for sample, label in zip(values, NAMES, strict=True):
        if not len(sample):
            raise ValueError(f"{name}: no {label} shower has this observable")
    edges = _edges(name, values, bins)
    counts = [np.histogram(v, edges)[0].astype(float) for v in values]
    scale = [1 / (len(v) * np.diff(edges)) for v in values]
    heights, errors = ([f(c) * s for c, s in zip(counts, scale, strict=True)] for f in (np.asarray, np.sqrt))
    draw_pair(top, edges, heights, errors)
    top.set_ylim(0, 1.3 * max(h.max() for h in heights))
    unit = "hit" if name == "num_hits" else OBSERVABLES[name][1].rstrip("s")
    top.set_ylabel(f"fraction of showers / {unit}" if unit else "normalised to 1")
    draw_ratio(bottom, edges, heights, errors)
    bottom.set_xlim(edges[0], edges[-1])
    label = AXES.get(name, OBSERVABLES[name][0])
    if name == "start_layer":
        label = "start layer (first above threshold)"
    if name in COUNTS:
        bottom.xaxis.get_major_locator().set_params(integer=True)
    bottom.set_xlabel(label)
    outside = [len(v) - int(c.sum()) for v, c in zip(values, counts, strict=True)]
    if any(outside):
        text = f"outside: {outside[0]} real, {outside[1]} gen."
        top.text(0.02, 0.97, text, transform=top.transAxes, va="top", fontsize=8, color="0.4")
    top.legend(loc="upper right")


def _draw_profile(top, bottom, samples: Sequence[ShowerObservables], name: str) -> None:
    edges = samples[0].edges[name]
    means = [o.profiles[name].mean(axis=0) for o in samples]
    errors = [o.profiles[name].std(axis=0) / np.sqrt(len(o)) for o in samples]
    draw_pair(top, edges, means, errors)
    xlabel, ylabel = PROFILE_AXES[name]
    top.set_ylabel(ylabel)
    last = edges[-1]
    if name == "radial_profile":
        top.set_yscale("log")
        last = edges[1 + np.flatnonzero(sum(means) > 0).max(initial=0)]
        top.set_ylim(0.5 * min(m[m > 0].min() for m in means), 3 * max(m.max() for m in means))
    else:
        top.set_ylim(0, 1.3 * max(m.max() for m in means))
    draw_ratio(bottom, edges, means, errors)
    bottom.set_xlim(edges[0], last)
    bottom.xaxis.get_major_locator().set_params(integer=True)
    bottom.set_xlabel(xlabel)
    top.legend(loc="upper right")


def _draw_cell_energy(top, bottom, samples: Sequence[ShowerObservables]) -> None:
    edges, cut = samples[0].edges["all_cell_energy"], samples[0].cut
    tables = [o.profiles["all_cell_energy"] for o in samples]
    means = [t.mean(axis=0) for t in tables]
    errors = [t.std(axis=0) / np.sqrt(len(t)) for t in tables]  # over showers: the cells of one are not independent
    draw_pair(top, edges, means, errors)
    top.set_xscale("log")
    top.set_yscale("log")
    some = np.flatnonzero(sum(means) > 0)
    low = min(edges[some.min()], cut / 2) if cut else edges[some.min()]
    high = edges[some.max() + 1]
    top.set_ylim(0.5 * min(m[m > 0].min() for m in means), 8 * max(m.max() for m in means))
    top.set_ylabel("mean number of cells / bin")
    draw_ratio(bottom, edges, means, errors)
    for axis in (top, bottom):
        axis.set_xlim(low, high)
        if cut > low:
            axis.axvspan(low, cut, color="0.5", alpha=0.25, lw=0)
    if cut > low:
        top.text(0.015, 0.04, "below cut", transform=top.transAxes, rotation=90, fontsize=9, color="0.35")
    bottom.set_xlabel("cell energy [MeV]")
    mips = top.secondary_xaxis("top", functions=(lambda e: e / MIP, lambda m: m * MIP))
    mips.set_xlabel(f"cell energy [MIP = {MIP:g} MeV]")
    top.tick_params(which="both", top=False)
    top.legend(loc="upper right")


def _draw(top, bottom, samples: Sequence[ShowerObservables], name: str, bins: int) -> None:
    if name == "cell_energy":
        _draw_cell_energy(top, bottom, samples)
    elif name in PROFILE_AXES:
        _draw_profile(top, bottom, samples, name)
    elif name in OBSERVABLES:
        _draw_observable(top, bottom, samples, name, bins)
    else:
        known = ", ".join([*OBSERVABLES, *PROFILE_AXES, "cell_energy"])
        raise ValueError(f"unknown observable {name!r}; known: {known}")
    bottom.set_ylabel("gen. / real")


@styled
def plot_observable(
    real: ShowerObservables,
    generated: ShowerObservables,
    name: str,
    path: str | Path | None = None,
    bins: int = 40,
    title: str | None = None,
    style: str | None = None,
):
    """One observable or profile, with the ratio generated / real below.

    Args:
        real, generated (`ShowerObservables`): of `hepzoo.evaluation.showers.observe`.
        name (`str`): of `OBSERVABLES`, or `energy_per_layer`, `hits_per_layer`, `radial_profile`, `cell_energy`.
        bins (`int`): of the histogram of an observable.
        title (`str`, *optional*): default: incident energies and sample sizes.
    """
    figure, axes = subplots(2, 1, figsize=(6.4, 5.6), sharex=True, height_ratios=(3, 1))
    _draw(axes[0, 0], axes[1, 0], (real, generated), name, bins)
    figure.suptitle(title or _title(real, generated), fontsize=11)
    return finish(figure, path)


@styled
def plot_overview(
    real: ShowerObservables,
    generated: ShowerObservables,
    path: str | Path | None = None,
    names: Sequence[str] = OVERVIEW,
    bins: int = 40,
    title: str | None = None,
    style: str | None = None,
):
    """Several observables and profiles in rows of three, each with its ratio; arguments as `plot_observable`."""
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = subplots(2 * rows, columns, figsize=(5.2 * columns, 4.6 * rows), height_ratios=(3, 1) * rows)
    for number, name in enumerate(names):
        row, column = divmod(number, columns)
        top, bottom = axes[2 * row, column], axes[2 * row + 1, column]
        top.sharex(bottom)
        top.tick_params(labelbottom=False)
        _draw(top, bottom, (real, generated), name, bins)
    for number in range(len(names), rows * columns):
        row, column = divmod(number, columns)
        axes[2 * row, column].remove()
        axes[2 * row + 1, column].remove()
    figure.suptitle(title or _title(real, generated), fontsize=13)
    return finish(figure, path)


@styled
def plot_response(
    real: ShowerObservables,
    generated: ShowerObservables,
    path: str | Path | None = None,
    edges: np.ndarray | None = None,
    title: str | None = None,
    style: str | None = None,
):
    """Response and resolution (narrowest 90 %) against the incident energy, with their ratios.

    Args:
        edges (`np.ndarray`, *optional*): bins of the incident energy, GeV; default `energy_bins`.
    """
    edges = energy_bins(real.incident_energy) if edges is None else np.asarray(edges, dtype=np.float64)
    rows = [energy_response(o, edges) for o in (real, generated)]
    table = [{key: np.array([row[key] for row in part], dtype=float) for key in part[0]} for part in rows]
    figure, axes = subplots(2, 2, figsize=(11, 5.4), sharex=True, height_ratios=(3, 1))
    half = np.diff(edges) / 2
    labels = {
        "response": r"$\mu_{90}(E_\mathrm{vis}/E_\mathrm{inc})$ [%]",
        "resolution": r"$\sigma_{90}/\mu_{90}$ [%]",
    }
    for column, (key, label) in enumerate(labels.items()):
        top, bottom = axes[:, column]
        values, errors = [100 * t[key] for t in table], [100 * t[f"{key}_error"] for t in table]
        if not any(np.isfinite(v).any() for v in values):
            raise ValueError("energy response: no energy bin has 20 showers; choose wider bins")
        for i, name in enumerate(NAMES):
            top.errorbar(table[i]["energy"], values[i], errors[i], xerr=half, fmt="os"[i], ms=5, lw=1.1,
                         mfc="white" if i == 0 else None, color=COLORS[name], label=name)  # fmt: skip
        known = np.concatenate([v[np.isfinite(v)] for v in values])
        room = max(known.max() - known.min(), 0.05 * known.max())
        low = 0.0 if key == "resolution" else known.min() - 0.4 * room
        top.set_ylim(low, known.max() + (0.4 * (known.max() - low) if key == "resolution" else 0.7 * room))
        top.set_ylabel(label)
        top.legend(loc="upper right", ncols=2)
        draw_ratio(bottom, edges, *([np.nan_to_num(v) for v in pair] for pair in (values, errors)))
        bottom.set_xlabel("incident energy [GeV]")
        bottom.set_xlim(edges[0], edges[-1])
    axes[1, 0].set_ylabel("gen. / real")
    figure.suptitle(title or _title(real, generated), fontsize=11)
    return finish(figure, path)


@styled
def plot_correlations(
    real: ShowerObservables,
    generated: ShowerObservables,
    path: str | Path | None = None,
    title: str | None = None,
    style: str | None = None,
):
    """Pearson correlations of shower quantities: real, generated, and generated minus real in per cent points."""
    matrices = [o.correlations() for o in (real, generated)]
    difference = 100 * (matrices[1] - matrices[0])
    known = np.abs(difference[np.isfinite(difference)])
    reach = max(5.0, 5 * np.ceil(known.max(initial=0) / 5))
    labels = [CORRELATION_LABELS[name] for name in CORRELATED]
    panels = (
        ("real", 100 * matrices[0], 100),
        ("generated", 100 * matrices[1], 100),
        ("generated $-$ real", difference, reach),
    )
    figure, axes = subplots(1, 3, figsize=(17.5, 5.4))
    size = len(labels)
    for axis, (heading, values, limit) in zip(axes[0], panels, strict=True):
        color = colormap("RdBu_r", bad="none")
        image = axis.imshow(
            np.tril(values) + np.triu(np.full_like(values, np.nan), 1), vmin=-limit, vmax=limit, cmap=color
        )
        for i in range(size):
            for j in range(i + 1):
                value = values[i, j]
                text = f"{value:.0f}" if np.isfinite(value) else "-"
                light = np.isfinite(value) and abs(value) > 0.6 * limit
                axis.text(j, i, "0" if text == "-0" else text, ha="center", va="center",
                          fontsize=7, color="white" if light else "black")  # fmt: skip
        axis.set_xticks(range(size), labels, rotation=60, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(size), labels)
        axis.tick_params(length=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(heading)
        figure.colorbar(image, ax=axis, shrink=0.8, label="difference [%]" if axis is axes[0, 2] else "correlation [%]")
    figure.suptitle(title or _title(real, generated), fontsize=11)
    return finish(figure, path)


def _shower_map(showers: Showers, axes: tuple[str, str]) -> np.ndarray:
    """Energy of a sample per shower in the plane of two axes, MeV, shape (cells of the second, cells of the first)."""
    first, second = ("xyz".index(a) for a in axes)
    shape = (showers.grid[second], showers.grid[first])
    flat = getattr(showers, axes[1]) * shape[1] + getattr(showers, axes[0])
    energy = np.bincount(flat, showers.energy, shape[0] * shape[1]).reshape(shape) / len(showers)
    return np.where(energy > 0, energy, np.nan)


@styled
def plot_event_display(
    real: Any,
    generated: Any,
    path: str | Path | None = None,
    grid: tuple[int, int, int] = GRID,
    cut: float = 0.1,
    title: str | None = None,
    style: str | None = None,
):
    """Side, top and front view of showers, the energy summed along the third axis, on common colour scales.

    Args:
        real, generated: rows as `as_showers` takes them; one shower is an event display, several are their mean.
        grid (`tuple[int, int, int]`): number of cells in x, in y, and of layers.
        cut (`float`): MeV; hits at or below it are not drawn.
    """
    from matplotlib.colors import LogNorm

    samples = [as_showers(rows, grid) for rows in (real, generated)]
    shown = [s.above(cut) for s in samples]
    for sample, name in zip(shown, NAMES, strict=True):
        if not len(sample) or not len(sample.energy):
            raise ValueError(f"{name}: no hit above {cut:g} MeV to plot")
    views = (("z", "y"), ("z", "x"), ("x", "y"))
    figure, axes = subplots(2, 3, figsize=(11, 7.6))
    mean = any(len(s) > 1 for s in shown)
    for column, view in enumerate(views):
        maps = [_shower_map(s, view) for s in shown]
        top = max(np.nanmax(m) for m in maps)
        low = max(min(np.nanmin(m) for m in maps), top * 1e-5)
        for row, values in enumerate(maps):
            axis = axes[row, column]
            height, width = values.shape
            edges = np.arange(width + 1) - 0.5, np.arange(height + 1) - 0.5
            norm = LogNorm(low, max(top, 1.01 * low))
            mesh = axis.pcolormesh(*edges, values, norm=norm, cmap=colormap("viridis"), rasterized=True)
            axis.set_xlabel("layer $z$" if view[0] == "z" else f"${view[0]}$ [cells]")
            axis.set_ylabel(f"${view[1]}$ [cells]")
            axis.set_aspect("equal")
            if column == 0:
                s, energy = shown[row], shown[row].incident_energy
                hits = len(s.energy) / len(s)
                head = f"{len(s):,} showers" if len(s) > 1 else f"{energy[0]:.1f} GeV"
                axis.set_title(
                    f"{NAMES[row]}: {head}, {hits:.0f} hits{' on average' if len(s) > 1 else ''}", loc="left"
                )
        label = "mean energy [MeV]" if mean else "energy [MeV]"
        figure.colorbar(mesh, ax=axes[:, column].tolist(), label=label, location="bottom", shrink=0.8, aspect=35)
    figure.suptitle(title or ("mean of showers" if mean else "one shower each"), fontsize=12)
    return finish(figure, path)
