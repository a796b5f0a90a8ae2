"""What the plots of all families share: style, figures, files, and the pair real and generated with its ratio.

Figures are unknown to pyplot: no display is needed, nothing has to be closed, and the caller's settings stay untouched.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
NAMES = ("real", "generated")
COLORS = {"real": "#222222", "generated": "#d1495b", "pion": "#1f6fb4", "kaon": "#e07b00"}


@contextmanager
def _settings(style: str | None) -> Iterator[None]:
    """The settings of all plots, over matplotlib's defaults and an mplhep style."""
    try:
        import matplotlib.style
    except ImportError:
        raise ImportError('plots need matplotlib: pip install "hepzoo[plots]"') from None
    styles: list[Any] = ["default"]
    if style:
        try:
            import mplhep
        except ImportError:
            raise ImportError('mplhep styles need mplhep: pip install "hepzoo[plots]"') from None
        chosen = getattr(mplhep.style, style, None)
        if not isinstance(chosen, dict):
            raise ValueError(f"unknown mplhep style {style!r}; known are for instance ATLAS, CMS, LHCb2, ALICE")
        styles.append(chosen)
    sizes = {"font.size": 11, "axes.labelsize": 12, "axes.titlesize": 12, "legend.fontsize": 10}
    sizes |= {"xtick.labelsize": 10, "ytick.labelsize": 10, "legend.title_fontsize": 10, "legend.frameon": False}
    ticks = {"xtick.direction": "in", "ytick.direction": "in"}
    with matplotlib.style.context([*styles, sizes | ticks]):
        yield


def styled(plot):
    """Decorator: draws with the settings of this module and the mplhep style that the keyword `style` names."""

    @wraps(plot)
    def with_settings(*args, **kwargs):
        with _settings(kwargs.get("style")):
            return plot(*args, **kwargs)

    return with_settings


def subplots(*shape: int, figsize: tuple[float, float], **options):
    """A figure and its axes as a 2-d array; `options` of matplotlib's `Figure.subplots`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, dpi=DPI, layout="constrained")
    return figure, figure.subplots(*shape, squeeze=False, **options)


def colormap(name: str, **extremes: str):
    """A colormap of matplotlib with other colours for `bad`, `under` or `over`."""
    import matplotlib

    return matplotlib.colormaps[name].with_extremes(**extremes)


def finish(figure: "Figure", path: str | Path | None) -> "Figure | Path":
    """
    Writes the figure, whole or not at all, and returns the path; without a path returns the figure.

    Raises:
        ValueError: the ending is that of no picture format.
    """
    if path is None:
        return figure
    path = Path(path)
    supported = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in supported:
        raise ValueError(f"{path}: unknown picture format {path.suffix!r}; known: {', '.join(sorted(supported))}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        figure.savefig(part, dpi=DPI, bbox_inches="tight")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def draw_pair(axis, edges: np.ndarray, values: Sequence[np.ndarray], errors: Sequence[np.ndarray]) -> None:
    """Real as a filled histogram, generated as a line with its errors."""
    axis.stairs(values[0], edges, fill=True, color=COLORS["real"], alpha=0.18, label="real")
    axis.stairs(values[0], edges, color=COLORS["real"], lw=0.9)
    axis.stairs(values[1], edges, color=COLORS["generated"], lw=1.4, label="generated")
    centers = (edges[:-1] + edges[1:]) / 2
    for i, name in enumerate(NAMES):
        axis.errorbar(centers, values[i], errors[i], fmt="none", color=COLORS[name], lw=0.8)


def draw_ratio(axis, edges: np.ndarray, values: Sequence[np.ndarray], errors: Sequence[np.ndarray]) -> None:
    """generated / real with the errors of each: a band about 1 and bars; points outside the panel are arrows."""
    with np.errstate(divide="ignore", invalid="ignore"):
        band = np.where(values[0] > 0, errors[0] / values[0], np.nan)
        ratio = np.where(values[0] > 0, values[1] / values[0], np.nan)
        bars = np.where(values[1] > 0, ratio * errors[1] / values[1], np.nan)
    # the panel spans what is measured well; a bin of a few entries must not flatten all others
    certain = np.isfinite(ratio) & (np.hypot(band, np.nan_to_num(bars)) < 0.3)
    reach = np.quantile(np.abs(ratio[certain] - 1), 0.85) if certain.any() else 0.5
    reach = next((r for r in (0.05, 0.1, 0.2, 0.3, 0.5) if reach < 0.8 * r), 1.0)
    axis.stairs(1 + np.nan_to_num(band), edges, baseline=1 - np.nan_to_num(band), fill=True, color="0.85")
    axis.axhline(1, color="0.4", lw=0.8)
    centers = (edges[:-1] + edges[1:]) / 2
    above, below = ratio > 1 + reach, ratio < 1 - reach
    inside = np.where(above | below, np.nan, ratio)
    axis.errorbar(centers, inside, bars, fmt=".", ms=4, lw=0.9, color=COLORS["generated"])
    for outside, marker, height in ((above, "^", 1 + 0.92 * reach), (below, "v", 1 - 0.92 * reach)):
        axis.plot(centers[outside], np.full(outside.sum(), height), marker, ms=3.5, color=COLORS["generated"])
    axis.set_ylim(1 - reach, 1 + reach)
