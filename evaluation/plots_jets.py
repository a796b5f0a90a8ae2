"""Plots of jets, real against generated: observables, constituent spectra, mean jet images, residuals of tokens.

The figures of arXiv:2403.05618 with a panel of the ratio generated / real and statistical errors below. Every function
draws one figure, writes it if `path` is given (format by the ending) and returns the path; without `path` the figure is
returned. Needs matplotlib (`pip install "hepzoo[plots]"`); `style` names an mplhep style.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.evaluation.figures import COLORS, NAMES, colormap, draw_pair, draw_ratio, finish, styled, subplots
from hepzoo.evaluation.jets import CLASSES, CONSTITUENTS, OBSERVABLES, JetObservables, Jets
from hepzoo.evaluation.token_quality import align, residuals

AXES = {
    "jet_pt": r"jet $p_\mathrm{T}$ [GeV]",
    "jet_mass": "jet mass [GeV]",
    "jet_eta": r"jet $\eta$",
    "jet_phi": r"jet $\phi$",
    "multiplicity": "number of constituents",
    "tau1": r"$\tau_1$",
    "tau2": r"$\tau_2$",
    "tau3": r"$\tau_3$",
    "tau21": r"$\tau_2/\tau_1$",
    "tau32": r"$\tau_3/\tau_2$",
    "d2": r"$D_2$",
    "part_pt": r"constituent $p_\mathrm{T}$ [GeV]",
    "part_etarel": r"constituent $\eta - \eta_\mathrm{jet}$",
    "part_phirel": r"constituent $\phi - \phi_\mathrm{jet}$",
    "part_ptrel": r"constituent $p_\mathrm{T}$ / jet $p_\mathrm{T}$",
}
OVERVIEW = (
    "jet_pt", "jet_mass", "multiplicity", "tau21", "tau32", "d2", "part_pt", "part_etarel", "part_phirel",
)  # fmt: skip
RESIDUALS = ("jet_pt/", "jet_mass/", "tau21", "tau32", "d2", "part_pt/", "part_etarel", "part_phirel")
# of the study of transfer, arXiv:2412.10504
TRANSFER = ("jet_pt", "jet_mass", "multiplicity", "tau21", "tau32", "d2")
LOGARITHMIC = ("part_pt", "part_ptrel")
IMAGE_REACH = 0.8


def _title(real: JetObservables, generated: JetObservables) -> str:
    classes = [CLASSES[i] for i in np.unique(real.label) if i >= 0]
    kind = f" ({', '.join(classes)})" if classes else ""
    return f"{len(real):,} real{kind}, {len(generated):,} generated jets"


def _edges(name: str, samples: Sequence[np.ndarray], bins: int) -> np.ndarray:
    """Bins over the values of both samples without their outermost 0.2 %; whole numbers for the multiplicity."""
    both = np.concatenate(samples)
    if name in LOGARITHMIC:
        low, high = np.quantile(both, [0.0001, 0.9999])
        return np.geomspace(low, max(high, 1.01 * low), bins + 1)
    low, high = np.quantile(both, [0.001, 0.999])
    if name == "multiplicity":
        width = max(int(np.ceil((high - low) / bins)), 1)
        return np.arange(np.floor(low) - width, high + 2 * width, width) - 0.5
    margin = 0.03 * (high - low) or 0.01 * abs(high) or 0.5
    start = low - margin
    # what cannot be negative starts at 0
    if low >= 0 and start < 0:
        start = 0.0
    return np.linspace(start, high + margin, bins + 1)


def _constituent_errors(observables: JetObservables, name: str, edges: np.ndarray) -> np.ndarray:
    """Errors of the counts in bins of constituents, which are not independent within a jet: of sums over jets."""
    bins = np.searchsorted(edges, observables.constituents[name], side="right") - 1
    inside = (bins >= 0) & (bins < len(edges) - 1)
    owner = np.repeat(np.arange(len(observables)), np.diff(observables.offsets))
    _, counts = np.unique(owner[inside] * (len(edges) - 1) + bins[inside], return_counts=True)
    cells = np.unique(owner[inside] * (len(edges) - 1) + bins[inside]) % (len(edges) - 1)
    total = np.bincount(cells, counts, len(edges) - 1)
    squares = np.bincount(cells, counts.astype(float) ** 2, len(edges) - 1)
    return np.sqrt(np.maximum(squares - total**2 / len(observables), 0.0))


def _draw(top, bottom, samples: Sequence[JetObservables], name: str, bins: int) -> None:
    if name not in AXES:
        raise ValueError(f"unknown observable {name!r}; known: {', '.join(AXES)}")
    values = [o.values(name) for o in samples]
    for sample, label in zip(values, NAMES, strict=True):
        if not len(sample):
            raise ValueError(f"{name}: no {label} jet has this observable")
    edges = _edges(name, values, bins)
    counts = [np.histogram(v, edges)[0].astype(float) for v in values]
    if name in CONSTITUENTS:
        # per jet, so that the yields are compared too
        scale = [1 / len(o) for o in samples]
        errors = [_constituent_errors(o, name, edges) for o in samples]
        top.set_ylabel("constituents / jet / bin")
    else:
        scale = [1 / (len(v) * np.diff(edges)) for v in values]
        errors = [np.sqrt(c) for c in counts]
        unit = OBSERVABLES[name][1]
        top.set_ylabel(f"fraction of jets / {unit}" if unit else "normalised to 1")
    heights, errors = ([c * s for c, s in zip(part, scale, strict=True)] for part in (counts, errors))
    draw_pair(top, edges, heights, errors)
    draw_ratio(bottom, edges, heights, errors)
    high = max(h.max() for h in heights)
    top.set_ylim(0, 1.35 * high)
    if name in CONSTITUENTS:
        top.set_yscale("log")
        top.set_ylim(0.5 * min(h[h > 0].min() for h in heights), 12 * high)
    if name in LOGARITHMIC:
        top.set_xscale("log")
        bottom.set_xscale("log")
    if name == "multiplicity":
        bottom.xaxis.get_major_locator().set_params(integer=True)
    bottom.set_xlim(edges[0], edges[-1])
    bottom.set_xlabel(AXES[name])
    bottom.set_ylabel("gen. / real")
    outside = [len(v) - int(c.sum()) for v, c in zip(values, counts, strict=True)]
    if any(outside):
        text = f"outside: {outside[0]:,} real, {outside[1]:,} gen."
        top.text(0.02, 0.97, text, transform=top.transAxes, va="top", fontsize=8, color="0.4")
    top.legend(loc="upper right")


@styled
def plot_observable(
    real: JetObservables,
    generated: JetObservables,
    name: str,
    path: str | Path | None = None,
    bins: int = 40,
    title: str | None = None,
    style: str | None = None,
):
    """One observable of jets or of their constituents, with the ratio generated / real below.

    Args:
        real, generated (`JetObservables`): of `hepzoo.evaluation.jets.observe`.
        name (`str`): of `OBSERVABLES` or `CONSTITUENTS`.
        bins (`int`): of the histogram.
        title (`str`, *optional*): default: sample sizes.
    """
    figure, axes = subplots(2, 1, figsize=(6.4, 5.6), sharex=True, height_ratios=(3, 1))
    _draw(axes[0, 0], axes[1, 0], (real, generated), name, bins)
    figure.suptitle(title or _title(real, generated), fontsize=11)
    return finish(figure, path)


@styled
def plot_overview(
    real: JetObservables,
    generated: JetObservables,
    path: str | Path | None = None,
    names: Sequence[str] = OVERVIEW,
    bins: int = 40,
    title: str | None = None,
    style: str | None = None,
):
    """Several observables in rows of three, each with its ratio; arguments as `plot_observable`."""
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = subplots(2 * rows, columns, figsize=(5.2 * columns, 4.6 * rows), height_ratios=(3, 1) * rows)
    for number in range(rows * columns):
        row, column = divmod(number, columns)
        top, bottom = axes[2 * row, column], axes[2 * row + 1, column]
        if number >= len(names):
            top.remove()
            bottom.remove()
            continue
        top.sharex(bottom)
        top.tick_params(labelbottom=False)
        _draw(top, bottom, (real, generated), names[number], bins)
    figure.suptitle(title or _title(real, generated), fontsize=13)
    return finish(figure, path)


def jet_image(observables: JetObservables, cells: int = 50, reach: float = IMAGE_REACH) -> np.ndarray:
    """Mean share of the jet pT in cells of (phi, eta) about the jet axis, shape `(cells, cells)`."""
    edges = np.linspace(-reach, reach, cells + 1)
    c = observables.constituents
    image, _, _ = np.histogram2d(c["part_phirel"], c["part_etarel"], (edges, edges), weights=c["part_ptrel"])
    return image / max(len(observables), 1)


@styled
def plot_image(
    real: JetObservables,
    generated: JetObservables,
    path: str | Path | None = None,
    cells: int = 50,
    title: str | None = None,
    style: str | None = None,
):
    """Mean jet images of both samples on one colour scale, and generated - real relative to their mean."""
    from matplotlib.colors import LogNorm

    images = [jet_image(o, cells) for o in (real, generated)]
    if not all(image.any() for image in images):
        raise ValueError(f"jet image: no constituent within {IMAGE_REACH:g} of the jet axis")
    filled = np.concatenate([image[image > 0] for image in images])
    norm = LogNorm(max(np.quantile(filled, 0.02), filled.max() * 1e-5), filled.max())
    mean = (images[0] + images[1]) / 2
    difference = np.divide(images[1] - images[0], mean, out=np.full(mean.shape, np.nan), where=mean > 0)
    edges = np.linspace(-IMAGE_REACH, IMAGE_REACH, cells + 1)
    figure, axes = subplots(1, 3, figsize=(15.5, 4.6))
    for axis, image, name in zip(axes[0], images, NAMES, strict=False):
        shown = np.where(image > 0, image, np.nan)
        mesh = axis.pcolormesh(edges, edges, shown, norm=norm, cmap=colormap("viridis"), rasterized=True)
        axis.set_title(name)
    figure.colorbar(mesh, ax=axes[0, :2].tolist(), label=r"share of the jet $p_\mathrm{T}$ / cell")
    mesh = axes[0, 2].pcolormesh(
        edges, edges, difference, vmin=-1, vmax=1, cmap=colormap("RdBu_r", bad="0.85"), rasterized=True
    )
    axes[0, 2].set_title("(generated $-$ real) / mean")
    figure.colorbar(mesh, ax=axes[0, 2], label="relative difference")
    for axis in axes[0]:
        axis.set_xlabel(r"$\eta - \eta_\mathrm{jet}$")
        axis.set_ylabel(r"$\phi - \phi_\mathrm{jet}$")
        axis.set_aspect("equal")
    figure.suptitle(title or _title(real, generated), fontsize=12)
    return finish(figure, path)


@styled
def plot_residuals(
    original: Jets,
    reconstructed: Jets,
    path: str | Path | None = None,
    names: Sequence[str] = RESIDUALS,
    bins: int = 60,
    title: str | None = None,
    style: str | None = None,
    **options: Any,
):
    """Distributions of reconstructed - original, with median and interquartile range.

    Args:
        original, reconstructed (`Jets`): the same jets and constituents in the same order.
        names: of `hepzoo.evaluation.token_quality.RESIDUALS`; a "/" at the end is relative to the original.
        options: of `align` (`max_relative`, `max_constituents`) and of `observe`.
    """
    cuts = {key: options.pop(key, None) for key in ("max_relative", "max_constituents")}
    found, _ = residuals(*align(original, reconstructed, **cuts), **options)
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure, axes = subplots(rows, columns, figsize=(4.2 * columns, 3.5 * rows))
    for number, axis in enumerate(axes.flat):
        if number >= len(names):
            axis.remove()
            continue
        name = names[number]
        if name not in found:
            raise ValueError(f"unknown residual {name!r}; known: {', '.join(found)}")
        values = found[name][1]
        values = values[np.isfinite(values)]
        if not len(values):
            raise ValueError(f"{name}: no jet has this observable")
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
        reach = max(6 * (high - low), 1e-9 + 1e-6 * np.abs(values).max())
        edges = np.linspace(middle - reach, middle + reach, bins + 1)
        heights = np.histogram(values, edges)[0] / len(values)
        axis.stairs(heights, edges, fill=True, color=COLORS["generated"], alpha=0.25)
        axis.stairs(heights, edges, color=COLORS["generated"], lw=1.2)
        axis.axvline(0, color="0.4", lw=0.8)
        outside = np.mean((values < edges[0]) | (values > edges[-1]))
        text = f"median {middle:.2g}\nIQR {high - low:.2g}\noutside {100 * outside:.2g} %"
        axis.text(0.97, 0.95, text, transform=axis.transAxes, ha="right", va="top", fontsize=9)
        label = AXES[name.rstrip("/")]
        relative = name.endswith("/")
        axis.set_xlabel(("relative residual of " if relative else "residual of ") + (
            label.split(" [")[0] if relative else label
        ))  # fmt: skip
        axis.set_xlim(edges[0], edges[-1])
        axis.set_ylim(0, 1.25 * heights.max())
        axis.set_ylabel("fraction / bin")
    figure.suptitle(title or f"reconstructed $-$ original: {len(original):,} jets", fontsize=12)
    return finish(figure, path)


@styled
def plot_transfer(
    report: Mapping[str, Any],
    path: str | Path | None = None,
    names: Sequence[str] = TRANSFER,
    title: str | None = None,
    style: str | None = None,
):
    """Distances of generated jets against the number of training jets, with the fitted power laws.

    Args:
        report: of `hepzoo.training.transfer_study.run`: `runs` (`mode`, `jets`, `distances`), `fits`, and the
            distances of the `pretrained` model and of the `tokens` alone.
        names: of the observables.
    """
    columns = min(3, len(names))
    figure, axes = subplots(
        -(-len(names) // columns), columns, figsize=(5.0 * columns, 3.9 * -(-len(names) // columns))
    )
    numbers = np.array(sorted({run["jets"] for run in report["runs"]}), dtype=float)
    for axis in axes.flat[len(names) :]:
        axis.remove()
    for axis, name in zip(axes.flat, names, strict=False):
        modes = dict.fromkeys(run["mode"] for run in report["runs"])
        for mode, color in zip(modes, ("0.35", COLORS["generated"]), strict=True):
            own = [run for run in report["runs"] if run["mode"] == mode]
            axis.plot(
                [run["jets"] for run in own], [run["distances"][name]["w1"] for run in own], "o", ms=4, color=color
            )
            law, label = report["fits"].get(mode, {}).get(name), mode
            if law is not None:
                axis.plot(numbers, law["amplitude"] * numbers ** -law["exponent"], color=color, lw=1.2)
                label += f": {law['exponent']:.2f}"
            axis.plot([], [], "o-", ms=4, color=color, label=label)
        for key, line, label in (("pretrained", "--", "pre-trained"), ("tokens", ":", "tokens alone")):
            level = report[key][name]
            # below its floor it is statistics, and may be 0
            if level["w1"] >= level["w1_floor"]:
                axis.axhline(level["w1"], color="0.6", ls=line, lw=1, label=label)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(AXES[name])
        axis.set_xlabel("training jets")
        axis.set_ylabel(r"$W_1$ / std")
        axis.legend(fontsize=8)
    figure.suptitle(title or "generated jets against the number of training jets", fontsize=13)
    return finish(figure, path)


@styled
def plot_token_information(
    report: Mapping[str, Any],
    path: str | Path | None = None,
    names: Sequence[str] = ("auc", "rejection_at_0.5"),
    title: str | None = None,
    style: str | None = None,
):
    """Taggers of two classes on decoded constituents and on ids of every tokenizer; bands: original constituents.

    Error bars and bands are standard deviations of the seeds.

    Args:
        report: of `hepzoo.evaluation.token_information.run`: `means`, `codebook_sizes`, `jets`.
        names: of the figures, of `means`.
    """
    labels = {"auc": "ROC area", "rejection_at_0.3": "rejection at 30 %", "rejection_at_0.5": "rejection at 50 %"}
    # a rejection may be infinite
    finite = [{key: np.nan if value == np.inf else value for key, value in row.items()} for row in report["means"]]
    means = {(row["tagger"], row["representation"]): row for row in finite}
    tokenizers = list(report["codebook_sizes"])
    figure, axes = subplots(1, len(names), figsize=(5.2 * len(names), 4.2))
    for axis, name in zip(axes[0], names, strict=True):
        for number, tagger in enumerate(dict.fromkeys(tagger for tagger, _ in means)):
            color = f"C{number}"
            row = means[tagger, "original"]
            if np.isfinite(row[name]):
                spread = np.nan_to_num(row[f"{name}_std"])
                axis.axhspan(row[name] - spread, row[name] + spread, color=color, alpha=0.2, lw=0)
                axis.axhline(row[name], color=color, lw=1, label=f"{tagger}: original")
            for kind, ending, line in (("decoded", "", "o-"), ("ids", " ids", "s--")):
                rows = [means.get((tagger, tokenizer + ending)) for tokenizer in tokenizers]
                if None in rows:
                    continue
                # side by side, so that the error bars can be seen
                x = np.arange(len(rows)) + 0.06 * (number - bool(ending))
                errors = np.nan_to_num([row[f"{name}_std"] for row in rows])
                axis.errorbar(
                    x, [row[name] for row in rows], errors, fmt=line, ms=5, capsize=3, color=color,
                    label=f"{tagger}: {kind}",
                )  # fmt: skip
        axis.set_xticks(range(len(tokenizers)), [f"{report['codebook_sizes'][t]} codes\n{t}" for t in tokenizers])
        axis.set_xlim(-0.4, len(tokenizers) - 0.6)
        axis.set_ylabel(labels.get(name, name))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    jets = report["jets"]
    figure.suptitle(title or f"taggers of {jets['train']:,} jets, tested on {jets['test']:,}", fontsize=12)
    return finish(figure, path)
