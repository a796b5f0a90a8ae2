"""Plots of generators of jets as sets: steps of the solver, particle types, impact parameters.

Every function draws one figure, writes it if `path` is given (format by the ending) and returns the path; without
`path` the figure is returned. Needs matplotlib (`pip install "hepzoo[plots]"`); `style` names an mplhep style.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.evaluation.figures import COLORS, NAMES, finish, styled, subplots
from hepzoo.evaluation.jets import Jets
from hepzoo.evaluation.plots_jets import AXES

SOLVER_COLORS = {"euler": "#888888", "midpoint": "#1f6fb4", "rk4": "#d1495b", "dopri5": "#e07b00"}
SIGNIFICANCES = {"d0_significance": r"$d_0/\sigma(d_0)$", "dz_significance": r"$d_z/\sigma(d_z)$"}
LABELS = AXES | {"part_d0val": "$d_0$ [mm]", "part_dzval": "$d_z$ [mm]", "part_charge": "charge"}


@styled
def plot_sampling_steps(
    report: Mapping[str, Any], path: str | Path | None = None, title: str | None = None, style: str | None = None
):
    """Distances to real jets, and the largest change against the reference, over the evaluations of the network.

    Args:
        report: of `hepzoo.evaluation.sampling_steps.compare_settings`.
    """
    names = list(report["observables"])
    columns = 4
    rows = -(-(len(names) + 1) // columns)
    figure, axes = subplots(rows, columns, figsize=(4.0 * columns, 3.2 * rows))
    for axis in axes.flat[len(names) + 1 :]:
        axis.remove()
    done = [row for row in report["rows"] if "error" not in row]
    for axis, name in zip(axes.flat, [None, *names], strict=False):
        for solver, color in SOLVER_COLORS.items():
            own = sorted((row for row in done if row["solver"] == solver), key=lambda row: row["evaluations"])
            heights = [row["worst_change"] if name is None else row["w1"][name] for row in own]
            # the reference does not differ from itself
            shown = [(row["evaluations"], h) for row, h in zip(own, heights, strict=True) if h > 0]
            if shown:
                axis.plot(*zip(*shown, strict=True), "o-", ms=4, lw=1.1, color=color, label=solver)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_yscale("log")
        axis.set_xlabel("network calls")
        if name is None:
            axis.axhline(1, color="0.4", lw=0.8)
            axis.set_ylabel("largest change / limit")
            axis.legend(fontsize=9)
        else:
            floor = report["floors"][name]
            axis.axhspan(max(floor["mean"] - floor["std"], 1e-9), floor["mean"] + floor["std"], color="0.85")
            axis.axhline(floor["mean"], color="0.6", lw=0.8)
            axis.set_ylabel(f"$W_1$ / std: {LABELS[name]}", fontsize=10)
    figure.suptitle(title or f"{report['jets']:,} jets; band: real to real", fontsize=13)
    return finish(figure, path)


@styled
def plot_particle_types(
    report: Mapping[str, Any], path: str | Path | None = None, title: str | None = None, style: str | None = None
):
    """Shares of particle types by class: real as bars, generated as points, their ratio below.

    Args:
        report: of `hepzoo.evaluation.evaluate_sets.compare_sets`.
    """
    rows = report["types"]
    kinds = list(dict.fromkeys(row["what"] for row in rows))
    classes = list(dict.fromkeys(row["class"] for row in rows))
    figure, axes = subplots(2, len(kinds), figsize=(2.6 * len(kinds) + 1, 4.6), height_ratios=(3, 1), sharex="col")
    for column, kind in enumerate(kinds):
        own = [row for row in rows if row["what"] == kind]
        places = np.arange(len(own))
        real, real_error, generated, generated_error = (
            np.array([row[key] for row in own]) for key in ("real", "real_error", "generated", "generated_error")
        )
        top, bottom = axes[:, column]
        top.bar(places, real, 0.8, yerr=real_error, color=COLORS["real"], alpha=0.25, label="real")
        points = {"fmt": "o", "ms": 4, "color": COLORS["generated"]}
        top.errorbar(places, generated, generated_error, label="generated", **points)
        top.set_title(kind, fontsize=10)
        known = real > 0
        ratio, error = (
            np.divide(v, real, out=np.full(len(own), np.nan), where=known)
            for v in (generated, np.hypot(generated_error, real_error))
        )
        bottom.errorbar(places, ratio, error, **points)
        bottom.axhline(1, color="0.4", lw=0.8)
        bottom.set_xticks(places, classes, rotation=90, fontsize=8)
    axes[0, 0].set_ylabel("share of constituents")
    axes[1, 0].set_ylabel("gen. / real")
    axes[0, 0].legend(fontsize=9)
    figure.suptitle(title or f"{report['real']:,} real, {report['generated']:,} generated jets", fontsize=12)
    return finish(figure, path)


@styled
def plot_impact_parameters(
    samples: Mapping[str, tuple[Jets, Jets]],
    path: str | Path | None = None,
    names: Sequence[str] = ("d0_significance", "dz_significance"),
    reach: float = 20.0,
    title: str | None = None,
    style: str | None = None,
):
    """Impact parameters over their errors of charged constituents, one column of panels per class.

    Args:
        samples: of `hepzoo.evaluation.jet_particles.by_class`.
        names: of `hepzoo.evaluation.jet_particles.IMPACT_PARAMETERS`, a row each.
        reach (`float`): of the axis; the outer bins hold what is beyond.
    """
    names = [name for name in names if all(name in jets.features for pair in samples.values() for jets in pair)]
    if not names:
        raise ValueError("impact parameters: the jets have none with errors")
    edges = np.linspace(-reach, reach, 61)
    figure, axes = subplots(len(names), len(samples), figsize=(3.4 * len(samples) + 0.6, 3.0 * len(names)))
    for line, name in zip(axes, names, strict=True):
        for axis, (label, pair) in zip(line, samples.items(), strict=True):
            for jets, which in zip(pair, NAMES, strict=True):
                values = jets.features[name]
                values = np.clip(values[np.isfinite(values)], -reach, reach)
                heights = np.histogram(values, edges)[0] / max(len(values), 1)
                filled = which == "real"
                axis.stairs(heights, edges, fill=filled, color=COLORS[which], alpha=0.25 if filled else 1, label=which)
            axis.set_yscale("log")
            axis.set_title(label, fontsize=10)
            axis.set_xlabel(SIGNIFICANCES.get(name, name))
        line[0].set_ylabel("share of charged / bin")
    axes[0, 0].legend(fontsize=9)
    figure.suptitle(title or "impact parameters", fontsize=12)
    return finish(figure, path)
