"""Plots of track finding in a TPC: event displays of true and found tracks, efficiency and purity against pT.

Every function draws one figure, writes it if `path` is given (format by the ending) and returns the path; without
`path` the figure is returned. Needs matplotlib (`pip install "hepzoo[plots]"`); `style` names an mplhep style.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.evaluation.figures import colormap, finish, styled, subplots
from hepzoo.evaluation.tracking import (
    NOISE_ID,
    UNASSIGNED,
    TpcEvents,
    adjusted_rand_index,
    contingency,
    look_up_truth,
    match_tracks,
)

NOISE_COLOR, FAKE_COLOR = "0.75", "0.1"


def _track_colors(number: int) -> np.ndarray:
    """Colours (`number`, 4) of which neighbours differ well."""
    return colormap("turbo")(np.modf(np.arange(number) * 0.618034 + 0.1)[0] * 0.9 + 0.05)


def _found_colors(event: TpcEvents, colors: dict[int, Any], noise_id: int | None) -> tuple[dict[int, Any], list[str]]:
    """Colour of every found track: that of the true track it finds, black if it finds none, grey if it is noise."""
    table = contingency(event.event, event["track_id"], event["predicted_track_id"], 1)
    matches = match_tracks(table, noise_id)
    chosen: dict[int, Any] = dict.fromkeys(table.found_id.tolist(), FAKE_COLOR)
    for found, true, passes, is_noise in zip(
        matches.found_id, matches.found_true_id, matches.found_passes, matches.found_is_noise, strict=True
    ):
        if passes or is_noise:
            chosen[int(found)] = colors[int(true)]
    chosen[UNASSIGNED] = NOISE_COLOR
    lost = matches.true_id[~matches.true_found]
    return chosen, [
        f"{len(matches.true_id) - len(lost)} of {len(matches.true_id)} true tracks found",
        f"{int((~matches.found_passes & ~matches.found_is_noise).sum())} fakes",
        f"ARI {adjusted_rand_index(table)[1]:.3f}",
    ]


@styled
def plot_event(
    events: TpcEvents,
    number: int = 0,
    path: str | Path | None = None,
    noise_id: int | None = NOISE_ID,
    title: str | None = None,
    style: str | None = None,
):
    """One event: true tracks above, found tracks below, in the transverse plane, in (z, r) and in perspective.

    A found track has the colour of the true track that it finds (see `match_tracks`). Found tracks that find none are
    black crosses; noise, and points of no found track, are grey.

    Args:
        events (`TpcEvents`): with x, y, z, `track_id`, and `predicted_track_id` for the lower row.
        number (`int`): of the event.
        noise_id (`int`, *optional*): true id of noise.
        title (`str`, *optional*): default: number of points, and what was found.

    Raises:
        ValueError: there is no such event, or a column is missing.
    """
    if not 0 <= number < len(events):
        raise ValueError(f"event {number}, expected one of 0..{len(events) - 1}")
    event = events.select(np.array([number]))
    x, y, z, true_id = (event[name] for name in ("x", "y", "z", "track_id"))
    ids = np.unique(true_id)
    colors: dict[int, Any] = dict(zip(ids.tolist(), _track_colors(len(ids)), strict=True))
    if noise_id is not None:
        colors[noise_id] = NOISE_COLOR
    panels = {"true": (true_id, colors)}
    notes = [f"event {number}: {len(x):,} points"]
    if "predicted_track_id" in event:
        found_colors, found_notes = _found_colors(event, colors, noise_id)
        panels["found"] = event["predicted_track_id"], found_colors
        notes += found_notes

    from matplotlib.colors import to_rgba
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.9 * len(panels)), layout="constrained")
    for row, (name, (track, chosen)) in enumerate(panels.items()):
        values, which = np.unique(track, return_inverse=True)
        rgba = np.array([to_rgba(chosen[int(value)]) for value in values])[which.reshape(-1)]
        is_fake = np.array([_is(chosen[int(value)], FAKE_COLOR) for value in values])[which.reshape(-1)]
        is_grey = np.array([_is(chosen[int(value)], NOISE_COLOR) for value in values])[which.reshape(-1)]
        views = (
            ("$x$ [cm]", "$y$ [cm]", (x, y)),
            ("$z$ [cm]", r"$r$ [cm]", (z, np.hypot(x, y))),
            ("$z$ [cm]", "$x$ [cm]", (z, x, y)),
        )
        for column, (first, second, coordinates) in enumerate(views):
            options = {"projection": "3d"} if len(coordinates) == 3 else {}
            axis = figure.add_subplot(len(panels), 3, 3 * row + column + 1, **options)
            for mask, marker, size in ((is_grey, ".", 4), (~is_grey & ~is_fake, ".", 12), (is_fake, "x", 10)):
                axis.scatter(
                    *(c[mask] for c in coordinates), c=rgba[mask], marker=marker, s=size, linewidths=0.7 * (size == 10)
                )
            axis.set_xlabel(first)
            axis.set_ylabel(second)
            if len(coordinates) == 3:
                axis.set_zlabel("$y$ [cm]")
                axis.set_yticks([-50, 0, 50])
                axis.set_box_aspect((np.ptp(z) / max(np.ptp(x), 1), 1, 1), zoom=0.95)
                axis.view_init(elev=18, azim=-60)
            else:
                axis.set_title(f"{name} tracks")
                if column == 0:
                    axis.set_aspect("equal")
    figure.suptitle(title or "; ".join(notes), fontsize=13)
    return finish(figure, path)


def _is(color: Any, wanted: str) -> bool:
    return isinstance(color, str) and color == wanted


@styled
def plot_efficiency(
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    path: str | Path | None = None,
    title: str | None = None,
    style: str | None = None,
):
    """Efficiency and purity of track finding against pT, with their errors.

    Args:
        tables: label -> rows of `hepzoo.evaluation.tracking.efficiency_by_pt`.
        title (`str`, *optional*): none by default.

    Raises:
        ValueError: no bin of any table has tracks.
    """
    figure, axes = subplots(1, 2, figsize=(12, 4.6))
    panels = (("efficiency", "true_tracks", "track finding efficiency"), ("purity", "found_tracks", "mean purity"))
    for axis, (name, count, label) in zip(axes[0], panels, strict=True):
        drawn = 0
        for number, (sample, rows) in enumerate(tables.items()):
            # the open last bin is drawn as wide as the one before
            width = rows[-2]["high"] - rows[-2]["low"] if len(rows) > 1 else 1.0
            rows = [
                {**row, "high": row["low"] + width if np.isinf(row["high"]) else row["high"]}
                for row in rows
                if row[count]
            ]
            low, high, value, error = (
                np.array([row[key] for row in rows], float) for key in ("low", "high", name, f"{name}_error")
            )
            shift = (number - (len(tables) - 1) / 2) * 0.08 * (high - low)
            axis.errorbar(
                (low + high) / 2 + shift,
                value,
                np.nan_to_num(error),
                xerr=(high - low) / 2,
                fmt="osD^v<>"[number % 7],
                ms=4.5,
                lw=1,
                color=f"C{number}",
                label=sample,
            )
            drawn += len(rows)
        if not drawn:
            raise ValueError(f"no {name} to plot: no bin of pT has tracks")
        axis.set_ylim(0, 1.08)
        axis.axhline(1, color="0.6", lw=0.8, ls="--")
        axis.set_xlabel(r"$p_\mathrm{T}$ of the true track [GeV/$c$]")
        axis.set_ylabel(label)
        axis.legend(loc="lower right")
    if any(np.isinf(row["high"]) for rows in tables.values() for row in rows):
        axes[0, 0].text(0.02, 0.02, "last bin: all above", transform=axes[0, 0].transAxes, fontsize=8, color="0.4")
    if title:
        figure.suptitle(title, fontsize=12)
    return finish(figure, path)


@styled
def plot_scaling(
    runs: Sequence[Mapping[str, Any]],
    fit: Mapping[str, float] | None = None,
    path: str | Path | None = None,
    title: str | None = None,
    style: str | None = None,
):
    """Pre-training error against compute, one line per model size, and a power law.

    Args:
        runs: `size`, `compute` (floating-point operations) and `error` of every run.
        fit (*optional*): `amplitude`, `exponent` and its `exponent_error` of error = amplitude * compute ^ -exponent.
        title (`str`, *optional*): none by default.
    """
    figure, ((axis,),) = subplots(1, 1, figsize=(6.8, 4.8))
    for number, size in enumerate(dict.fromkeys(run["size"] for run in runs)):
        of_size = sorted((run["compute"], run["error"]) for run in runs if run["size"] == size)
        axis.plot(*zip(*of_size), "osD^v<>"[number % 7] + "-", ms=5, lw=1, color=f"C{number}", label=size)
    if fit is not None:
        compute = np.geomspace(min(run["compute"] for run in runs), max(run["compute"] for run in runs), 50)
        label = rf"$\propto C^{{-{fit['exponent']:.3f} \pm {fit['exponent_error']:.3f}}}$"
        axis.plot(compute, fit["amplitude"] * compute ** -fit["exponent"], "--", color="0.3", lw=1, label=label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("compute $C$ [floating-point operations]")
    axis.set_ylabel("validation squared error")
    axis.legend()
    if title:
        axis.set_title(title)
    return finish(figure, path)


@styled
def plot_pt_spectrum(
    events: TpcEvents,
    path: str | Path | None = None,
    edges: Sequence[float] | None = None,
    noise_id: int | None = NOISE_ID,
    title: str | None = None,
    style: str | None = None,
):
    """Numbers of all true tracks and of those found against pT.

    Args:
        events (`TpcEvents`): with `track_id`, `predicted_track_id` and `truth_pt`.
        edges (*optional*): bins of pT, GeV/c; default 0 to 3 by 0.1.
    """
    edges = np.linspace(0, 3, 31) if edges is None else np.asarray(edges, float)
    edges = edges[np.isfinite(edges)]
    if "truth_pt" not in events.truth:
        raise ValueError("no spectrum to plot: the rows have no truth_track_id and truth_pt")
    table = contingency(events.event, events["track_id"], events["predicted_track_id"], len(events))
    matches = match_tracks(table, noise_id)
    pt = look_up_truth(events, matches.true_event, matches.true_id, "truth_pt")
    figure, ((axis,),) = subplots(1, 1, figsize=(6.8, 4.6))
    axis.stairs(np.histogram(pt, edges)[0], edges, color="0.2", lw=1.5, label="true tracks")
    axis.stairs(np.histogram(pt[matches.true_found], edges)[0], edges, fill=True, color="C0", alpha=0.6, label="found")
    axis.set_yscale("log")
    axis.set_xlabel(r"$p_\mathrm{T}$ [GeV/$c$]")
    axis.set_ylabel("tracks / bin")
    axis.legend()
    axis.set_title(title or f"{len(events):,} events, {len(pt):,} true tracks")
    return finish(figure, path)
