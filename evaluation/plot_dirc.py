"""Plot DIRC tracks: hit patterns, time spectra, photon yields, ratios, log-likelihood differences.

Pictures go to the output folder, one per kind and species; the kind `pdf` makes, for every theta 25, 30, .. 155 at one
momentum, the hit patterns and time spectra of pions and kaons from a given number of photons.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from hepzoo.evaluation.tracks_dirc import SPECIES, DircTracks, read_tracks

KINDS = ("hits", "time", "yield", "ratio", "dll", "pdf")
PDF_THETAS = np.arange(25.0, 155.1, 5.0)

EXAMPLES = """examples:
  Real against generated, all comparisons:
    hepzoo plot dirc --real sim/ --generated gen/ --kind hits time yield ratio --output plots/
  Hit pattern of real pions and kaons at 6 GeV/c and 30 degrees, as PDF:
    hepzoo plot dirc --real sim_6GeV/ --momentum 6 --theta 30 --kind hits --format pdf --output plots/
  Photon densities (100000 photons per species) for theta = 25, 30, .. 155 at 6 GeV/c, from generated tracks:
    hepzoo plot dirc --generated gen_6GeV/ --momentum 6 --kind pdf --photons 100000 --output pdfs/
  Log-likelihood differences with fits, and separation against theta:
    hepzoo plot dirc --real sim_6GeV/ --generated gen_6GeV/ --kind dll --output plots/
"""


def _span(text: str) -> tuple[float, float] | float:
    """`6` or `1-10`."""
    try:
        parts = [float(part) for part in text.split("-")]
    except ValueError:
        parts = []
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2 and parts[0] < parts[1]:
        return parts[0], parts[1]
    raise argparse.ArgumentTypeError(f"expected a number such as 6 or a range such as 1-10, got {text!r}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hepzoo plot dirc",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--real", nargs="+", metavar="FILES", help="Parquet files, folders or patterns")
    parser.add_argument("--generated", nargs="+", metavar="FILES", help="the same, tracks of a model")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=["hits", "time", "yield"], help="what to plot")
    parser.add_argument("--momentum", type=_span, help="GeV/c: a point (6) or a range (1-10); default all")
    parser.add_argument("--theta", type=_span, help="deg: a point (30) or a range (25-155); default all")
    parser.add_argument("--momentum-window", type=float, default=0.05, help="half width of a point, GeV/c (0.05)")
    parser.add_argument("--theta-window", type=float, default=0.5, help="half width of a point, deg (0.5)")
    parser.add_argument("--photons", type=int, help="photons per picture and species; for pdf 100000, else all")
    parser.add_argument("--support-photons", type=int, default=500_000, help="dll: support per species (500000)")
    parser.add_argument("--test-tracks", type=int, default=500, help="dll: test tracks per species and point (500)")
    parser.add_argument("--max-tracks", type=int, help="read at most this many tracks of every file")
    parser.add_argument("--format", default="png", choices=("png", "pdf", "svg"), help="picture format (png)")
    parser.add_argument("--style", help="an mplhep style, for instance CMS or ATLAS")
    return parser


def first_photons(tracks: DircTracks, number: int | None) -> DircTracks:
    """The first tracks that together hold at least `number` photons, the last one cut so that the total is exact."""
    if number is None or tracks.offsets[-1] <= number:
        return tracks
    last = int(np.searchsorted(tracks.offsets, number))
    kept = tracks.select(np.arange(last))
    offsets = kept.offsets.copy()
    offsets[-1] = number
    hit_fields = {name: getattr(kept, name)[:number] for name in ("pmt", "pixel", "x", "y", "time")}
    return DircTracks(kept.momentum, kept.theta, kept.phi, kept.pdg, offsets, **hit_fields)


class _Plotter:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.sets = {}
        for name in ("real", "generated"):
            paths = getattr(args, name)
            if not paths:
                continue
            tracks = self._select(read_tracks(paths, max_tracks=args.max_tracks))
            if not len(tracks):
                raise ValueError(f"no {name} track is left at momentum {args.momentum}, theta {args.theta}")
            self.sets[name] = tracks
        self.written: list[Path] = []

    def _window(self, value, half: float):
        return value if value is None or isinstance(value, tuple) else (value - half, value + half)

    def _select(self, tracks: DircTracks) -> DircTracks:
        args = self.args
        return tracks.at(self._window(args.momentum, args.momentum_window), self._window(args.theta, args.theta_window))

    def _path(self, name: str) -> Path:
        path = self.args.output / f"{name}.{self.args.format}"
        self.written.append(path)
        return path

    def _species(self, limit: int | None) -> dict[str, dict[str, DircTracks]]:
        """species -> {"real": ..., "generated": ...}, for the species that any sample has."""
        from hepzoo.evaluation.plots_dirc import species_tracks

        found: dict[str, dict[str, DircTracks]] = {}
        for which, tracks in self.sets.items():
            for name, part in species_tracks(tracks).items():
                found.setdefault(name, {})[which] = first_photons(part, limit)
        return found

    def _pairs(self, kind: str) -> dict[str, dict[str, DircTracks]]:
        pairs = {name: parts for name, parts in self._species(self.args.photons).items() if len(parts) == 2}
        if not pairs:
            raise ValueError(f"--kind {kind} compares --real with --generated: no species is in both")
        return pairs

    def hits(self) -> None:
        from hepzoo.evaluation.plots_dirc import plot_hit_comparison, plot_hit_pattern

        species = self._species(self.args.photons)
        for which in self.sets:
            panels = {f"{name}s, {which}": parts[which] for name, parts in species.items() if which in parts}
            plot_hit_pattern(panels, self._path(f"hits_{which}"), style=self.args.style)
        for name, parts in species.items():
            if len(parts) == 2:
                plot_hit_comparison(
                    parts["real"], parts["generated"], self._path(f"hits_{name}_comparison"), style=self.args.style
                )

    def time(self) -> None:
        from hepzoo.evaluation.plots_dirc import plot_time_spectrum

        species = self._species(self.args.photons)
        for name, parts in species.items():
            if len(parts) == 2:
                plot_time_spectrum(
                    parts["real"], parts["generated"], self._path(f"time_{name}"),
                    labels=(f"{name}s, real", f"{name}s, generated"), style=self.args.style,
                )  # fmt: skip
        for which in self.sets:
            have = {name: parts[which] for name, parts in species.items() if which in parts}
            self._two_species(have, f"time_{which}", which)

    def _two_species(self, have: dict[str, DircTracks], stem: str, which: str) -> None:
        from hepzoo.evaluation.plots_dirc import plot_time_spectrum

        names = list(have)
        second = have[names[1]] if len(names) > 1 else None
        labels = tuple(f"{name}s, {which}" for name in names)
        colors = tuple(name if name in SPECIES else "real" for name in names)
        plot_time_spectrum(
            have[names[0]], second, self._path(stem), style=self.args.style,
            labels=(*labels, "")[:2], colors=(*colors, "kaon")[:2],
        )  # fmt: skip

    def yields(self) -> None:
        from hepzoo.evaluation.plots_dirc import plot_photon_yield

        for name, parts in self._species(None).items():
            plot_photon_yield(parts, self._path(f"yield_{name}"), style=self.args.style)

    def ratio(self) -> None:
        from hepzoo.evaluation.plots_dirc import plot_ratios

        for name, parts in self._pairs("ratio").items():
            plot_ratios(parts["real"], parts["generated"], self._path(f"ratio_{name}"), style=self.args.style)

    def dll(self) -> None:
        from hepzoo.evaluation.dll_dirc import fixed_point_dll, split_test_support
        from hepzoo.evaluation.plots_dirc import plot_dll, plot_separation
        from hepzoo.evaluation.separation import separation_table

        if "real" not in self.sets:
            raise ValueError("--kind dll needs --real: the test tracks")
        test, own_support = split_test_support(self.sets["real"], self.args.test_tracks)
        supports = {"real": own_support} | {k: v for k, v in self.sets.items() if k == "generated"}
        tables = {}
        for which, support in supports.items():
            result = fixed_point_dll(test, support, self.args.support_photons, progress=sys.stderr.isatty())
            tables[f"support: {which}"] = separation_table(result.tracks, result.scores)
            for point in result.points:
                here = (np.abs(result.tracks.momentum - point["momentum"]) < 1e-3) & (
                    np.abs(result.tracks.theta - point["theta"]) < 1e-3
                )
                kaon = np.abs(result.tracks.pdg) == SPECIES["kaon"]
                name = f"dll_{which}_P{point['momentum']:g}_theta{point['theta']:g}"
                plot_dll(
                    result.scores[here & kaon], result.scores[here & ~kaon], self._path(name), style=self.args.style,
                    title=f"{point['momentum']:g} GeV/$c$, {point['theta']:g} deg, {which} support",
                )  # fmt: skip
        axis = "theta" if len({row["theta"] for t in tables.values() for row in t}) > 1 else "momentum"
        plot_separation(tables, self._path(f"separation_vs_{axis}"), axis, style=self.args.style)

    def pdf(self) -> None:
        from tqdm import tqdm

        from hepzoo.evaluation.plots_dirc import plot_hit_pattern, species_tracks

        if self.args.momentum is None or isinstance(self.args.momentum, tuple):
            raise ValueError("--kind pdf needs one momentum, for instance --momentum 6")
        if isinstance(self.args.theta, float):
            thetas = np.array([self.args.theta])
        elif self.args.theta is None:
            thetas = PDF_THETAS
        else:
            thetas = PDF_THETAS[(self.args.theta[0] <= PDF_THETAS) & (self.args.theta[1] >= PDF_THETAS)]
        wanted, made, short = self.args.photons or 100_000, 0, []
        for which, tracks in self.sets.items():
            for theta in tqdm(thetas, desc=f"pdf, {which}", unit="angle", disable=not sys.stderr.isatty()):
                here = tracks.at(theta=self._window(float(theta), self.args.theta_window))
                if not len(here):
                    short.append(f"{which} at {theta:g} deg: no tracks")
                    continue
                have = {name: first_photons(part, wanted) for name, part in species_tracks(here).items()}
                few = [f"{int(t.offsets[-1])} {name}" for name, t in have.items() if t.offsets[-1] < wanted]
                if few:
                    short.append(f"{which} at {theta:g} deg: only {', '.join(few)} photons")
                stem = f"{which}_P{self.args.momentum:g}_theta{theta:g}"
                panels = {f"{name}s, {which}": t for name, t in have.items()}
                plot_hit_pattern(panels, self._path(f"pdf_hits_{stem}"), style=self.args.style)
                self._two_species(have, f"pdf_time_{stem}", which)
                made += 1
        if not made:
            raise ValueError(
                f"no track at {self.args.momentum:g} GeV/c and theta {', '.join(f'{t:g}' for t in thetas)} deg"
            )
        for line in short:
            sys.stderr.write(f"note: {line} (wanted {wanted})\n")


def main(argv: list[str] | None = None) -> int:
    """Runs `hepzoo plot dirc`; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.real and not args.generated:
        parser.error("give --real, --generated or both")
    for name in ("photons", "support_photons", "test_tracks", "max_tracks"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    for name in ("momentum_window", "theta_window"):
        if not getattr(args, name) >= 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative, got {getattr(args, name)}")
    try:
        plotter = _Plotter(args)
        for kind in dict.fromkeys(args.kind):
            getattr(plotter, "yields" if kind == "yield" else kind)()
    except (ValueError, OSError, ImportError) as err:
        sys.stderr.write(f"hepzoo plot dirc: {err}\n")
        return 2
    for path in plotter.written:
        sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
