"""
Fast simulation: calorimeter showers of given incident energies from a trained SPADE generator.

    accelerate launch training/generate_showers.py --model spade --n_showers 100000 --energy 10-100 --output generated

The showers are made in files of `--rows_per_shard`, in the order of the requested energies. A file depends on `--seed`
and its number alone, so that the result is the same for any number of processes, and a restarted run makes only the
files that are missing. A file is also the unit of work: with several processes there should be more of them.
"""

import argparse
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.training.generation_common import check_at_least, load_config, make_missing_files, parse_range

EXAMPLES = """\
examples:
  hepzoo generate showers --model spade --n_showers 1000 --energy 50 --output generated
  hepzoo generate showers --model spade --energies_from data/test.parquet --no_duplicate_cells --output matched
  hepzoo generate showers --model spade --top_p 0.995 --axis_temperatures x=1,y=1,z=0.9 --output cooler
  hepzoo generate showers --model spade --fit_energy_sum_filter data/train.parquet --mip_cut --output filtered
  accelerate launch --num_processes 4 training/generate_showers.py --model spade --n_showers 1000000 --output big
"""

ENERGY_LIMITS = (1e-3, 1e5)  # GeV
DEFAULT_ENERGY = "10-100"
DEFAULT_NUM_SHOWERS = 1000
# options that say how to draw, which greedy search does not
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "axis_temperatures", "energy_temperature")
SUFFIXES = {"parquet": ".parquet", "showerdata": ".h5", "padded": ".h5"}


@dataclass
class Generator:
    """A model with its tokenizer, how to sample from it, and what is done with its showers."""

    model: Any
    tokenizer: Any
    generate_kwargs: dict[str, Any]
    max_hits: int
    energy_filter: Any = None  # `EnergySumFilter`
    merge_duplicates: bool = False
    mip_cut: float | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


def apply_sampling_options(arguments: argparse.Namespace, model):
    """Options of the command line to the `generation_config` of the model; those not given leave it as it is."""
    from hepzoo.training.data import parse_assignments

    settings = model.generation_config
    for name in ("temperature", "top_k", "top_p", "energy_temperature"):
        if getattr(arguments, name) is not None:
            setattr(settings, name, getattr(arguments, name))
    if arguments.greedy:
        settings.update(do_sample=False, temperature=1.0, top_k=0, top_p=1.0)
        settings.stream_overrides = {}
    if arguments.stop_sampling:
        if model.config.stop_pos_weight == 0:
            raise ValueError(
                f"--stop_sampling: {arguments.model} was trained with the weights of each batch (stop_pos_weight 0), "
                "which leaves no probability to draw with; pass --stop_threshold"
            )
        settings.stop_sampling = True
    if arguments.stop_threshold is not None:
        settings.stop_sampling, settings.stop_threshold = False, arguments.stop_threshold
    if arguments.max_hits is not None and arguments.max_hits > model.config.max_num_hits:
        raise ValueError(f"--max_hits is {arguments.max_hits}, the model has at most {model.config.max_num_hits}")
    if arguments.max_hits is not None or settings.max_new_tokens is None:
        settings.max_new_tokens = (arguments.max_hits or model.config.max_num_hits) + model.config.max_stream_delay

    overrides = {str(stream): dict(own) for stream, own in (getattr(settings, "stream_overrides", None) or {}).items()}
    names = model.config.stream_names
    for name, value in parse_assignments(arguments.axis_temperatures, "axis_temperatures").items():
        if name not in names:
            raise ValueError(f"--axis_temperatures: the model has no axis {name!r}, expected {', '.join(names)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"--axis_temperatures: {name} is {value!r}, expected a finite number > 0")
        overrides.setdefault(str(names.index(name)), {})["temperature"] = float(value)
    if overrides:
        settings.stream_overrides = overrides


def generate_kwargs(arguments: argparse.Namespace, config) -> dict[str, Any]:
    """The physics processors, as arguments of `generate()`."""
    from transformers import LogitsProcessorList

    from hepzoo.modeling.modeling_spade import OccupiedCellLogitsProcessor, layer_monotonic_processor

    processors = LogitsProcessorList()
    if arguments.no_duplicate_cells:
        processors.append(OccupiedCellLogitsProcessor(config))
    if arguments.monotonic_layers:
        processors.append(layer_monotonic_processor(config))
    return {"logits_processor": processors}


def make_energy_filter(arguments: argparse.Namespace, generation_config):
    """The `EnergySumFilter` of the options, or else of the model, or None."""
    from hepzoo.training.shower_postprocessing import EnergySumFilter, fit_energy_sum_filter

    energy_filter = None
    stored = getattr(generation_config, "energy_sum_filter", None)
    if arguments.fit_energy_sum_filter:
        try:
            energy_filter = fit_energy_sum_filter(read_showers(arguments.fit_energy_sum_filter))
        except ValueError as error:
            raise ValueError(f"--fit_energy_sum_filter: {error}") from None
    elif arguments.energy_sum_filter == "off":
        return None
    elif arguments.energy_sum_filter is not None:
        try:
            a, b, c = map(float, arguments.energy_sum_filter.split(","))
        except ValueError:
            raise ValueError(
                f"--energy_sum_filter {arguments.energy_sum_filter!r}: expected three numbers A,B,C or off"
            ) from None
        energy_filter = EnergySumFilter(a, b, c)
    elif stored is not None:
        energy_filter = EnergySumFilter.from_settings(stored)
    changes = {
        name: getattr(arguments, name)
        for name in ("safety_factor", "max_retries")
        if getattr(arguments, name) is not None
    }
    if changes and energy_filter is None:
        raise ValueError(f"--{next(iter(changes))} needs an energy-sum filter, but neither model nor options have one")
    return replace(energy_filter, **changes) if changes else energy_filter


def load_generator(arguments: argparse.Namespace, device) -> Generator:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hepzoo.training.shower_postprocessing import check_mip_cut

    config = load_config(arguments.model, "spade")
    if not config.use_stop_head:
        raise ValueError(f"{arguments.model}: the model has no stop network (use_stop_head), its showers have no end")
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    except (OSError, ValueError) as error:
        raise ValueError(f"{arguments.model}: no tokenizer that can be loaded ({str(error).splitlines()[0]})") from None
    for name in ("nbins", "axis_mode", "num_registers", "stream_delays", "energy_delay"):
        own, other = getattr(tokenizer, name, None), getattr(config, name)
        own, other = (list(value) if isinstance(value, tuple) else value for value in (own, other))
        if own != other:
            raise ValueError(f"{arguments.model}: {name} of the tokenizer is {own}, of the model {other}")
    dtype = getattr(torch, arguments.dtype)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(device).eval()
    apply_sampling_options(arguments, model)

    settings = model.generation_config
    merge_duplicates, mip_cut = arguments.merge_duplicates, arguments.mip_cut
    if merge_duplicates is None:
        merge_duplicates = getattr(settings, "merge_duplicates", None) or False
        if not isinstance(merge_duplicates, bool):
            raise ValueError(f"{arguments.model}: merge_duplicates is {merge_duplicates!r}, expected true or false")
    if mip_cut is None:
        mip_cut = getattr(settings, "mip_cut", None)
    if mip_cut is not None:
        check_mip_cut(mip_cut)
    return Generator(
        model,
        tokenizer,
        generate_kwargs(arguments, config),
        max_hits=settings.max_new_tokens - config.max_stream_delay,
        energy_filter=make_energy_filter(arguments, settings),
        merge_duplicates=merge_duplicates,
        mip_cut=mip_cut,
    )


def read_showers(pattern: str, *names: str) -> dict[str, list]:
    """Columns of Parquet files; all those of a shower, or the given ones."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from hepzoo.tokenization.records_spade import FIELDS

    path = Path(pattern)
    paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not paths or not paths[0].is_file():
        raise ValueError(f"{pattern}: no Parquet file")
    columns: dict[str, list] = {name: [] for name in names or FIELDS}
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                for name in columns:
                    if name not in file.schema_arrow.names:
                        raise ValueError(f"{path}: has no column {name}, expected {', '.join(columns)}")
                table = file.read(columns=list(columns))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not readable as Parquet ({str(error).splitlines()[0]})") from None
        for name, values in columns.items():
            if table[name].null_count:
                raise ValueError(f"{path}: column {name} has missing values")
            values += table[name].to_numpy(zero_copy_only=False).tolist()
    return columns


def requested_energies(arguments: argparse.Namespace) -> np.ndarray | None:
    """Incident energies of another sample, GeV, (n_showers,); None if they are drawn. Sets `n_showers`."""
    if arguments.energies_from is None:
        if arguments.n_showers is None:
            arguments.n_showers = DEFAULT_NUM_SHOWERS
        return None
    path = arguments.energies_from
    energies = np.asarray(read_showers(path, "incident_energy")["incident_energy"])
    if energies.dtype.kind not in "iuf":
        raise ValueError(f"{path}: incident_energy holds {energies.dtype}, expected numbers in GeV")
    if arguments.n_showers is None:
        arguments.n_showers = len(energies)
    if not 0 < arguments.n_showers <= len(energies):
        raise ValueError(f"{path}: has {len(energies)} showers, fewer than --n_showers {arguments.n_showers or 1}")
    energies = energies[: arguments.n_showers].astype(np.float32)
    wrong = ~((energies >= ENERGY_LIMITS[0]) & (energies <= ENERGY_LIMITS[1]))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"{path}: row {row}: incident_energy is {energies[row]:g}, expected {ENERGY_LIMITS[0]:g} to "
            f"{ENERGY_LIMITS[1]:g} GeV"
        )
    return energies


# ---------------------------------------------------------------------------------------------------------------------
# Generation
# ---------------------------------------------------------------------------------------------------------------------


def draw_showers(
    generator: Generator, energies: np.ndarray, batch_size: int, update: Callable[[int], Any] | None = None
) -> tuple[dict[str, Any], int]:
    """
    One shower per incident energy.

    Showers of similar energy, which end after a similar number of hits, share a batch.

    Args:
        energies: GeV, float32 (showers,).
        update: called with the number of showers after every batch.

    Returns:
        the columns of the record in the order of `energies`, and the number of showers that were cut off at the largest
        number of hits.
    """
    import torch

    from hepzoo.tokenization.records_spade import HIT_FIELDS

    columns: dict[str, Any] = {"incident_energy": energies, **{name: [None] * len(energies) for name in HIT_FIELDS}}
    cut_off = 0
    order = np.argsort(energies, kind="stable")
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        with torch.inference_mode():
            output = generator.model.generate(
                incident_energy=torch.from_numpy(energies[batch]),
                return_dict_in_generate=True,
                **generator.generate_kwargs,
            )
        cut_off += int((output.num_hits >= generator.max_hits).sum())
        drawn = generator.tokenizer.batch_decode(output, incident_energy=energies[batch])
        for name in HIT_FIELDS:
            for index, values in zip(batch, drawn[name], strict=True):
                columns[name][index] = values
        if update is not None:
            update(len(batch))
    return columns, cut_off


def make_rows(index: int, arguments: argparse.Namespace, energies: np.ndarray | None, generator: Generator, bar):
    """The showers number `index * rows_per_shard` and following, with post-processing, and counts of what was done."""
    import torch

    from hepzoo.training import shower_postprocessing

    rows = slice(index * arguments.rows_per_shard, min((index + 1) * arguments.rows_per_shard, arguments.n_showers))
    rng = np.random.default_rng([arguments.seed, index])
    torch.manual_seed(int(rng.integers(2**63)))
    if energies is None:
        low, high = parse_range(arguments.energy, "energy", ENERGY_LIMITS)
        own = rng.uniform(low, high, size=rows.stop - rows.start).astype(np.float32)
    else:
        own = energies[rows]

    counts: Counter = Counter()
    columns, counts["cut_off"] = draw_showers(generator, own, arguments.batch_size, bar.update)
    if generator.energy_filter is not None:

        def redraw(lower: np.ndarray) -> dict[str, Any]:
            bar.set_postfix(regenerating=len(lower))
            drawn, cut_off = draw_showers(generator, lower, arguments.batch_size)
            counts["cut_off"] += cut_off
            return drawn

        columns, counts["regenerated"], counts["low"] = shower_postprocessing.regenerate_low_showers(
            columns, generator.energy_filter, redraw
        )
    if generator.merge_duplicates:
        columns, counts["merged"] = shower_postprocessing.merge_duplicate_cells(columns)
    if generator.mip_cut is not None:
        columns, counts["below_cut"] = shower_postprocessing.apply_mip_cut(columns, generator.mip_cut)
    counts["empty"] = sum(len(values) == 0 for values in columns["x"])
    return columns, counts


def write_rows(columns: dict[str, Any], path: Path, arguments: argparse.Namespace, generator: Generator):
    """A file is there as a whole or not at all."""
    if arguments.format != "parquet":
        from hepzoo.data_scripts.showers_hdf5 import write_showers_hdf5

        nx, ny, _ = generator.model.config.nbins
        write_showers_hdf5(
            path,
            columns,
            layout=arguments.format,
            cell_size=arguments.cell_size,
            origin=(nx // 2, ny // 2),
            # the same width in all files
            pad_length=generator.max_hits if arguments.format == "padded" else None,
        )
        return
    import pyarrow.parquet as pq
    from datasets import Dataset

    from hepzoo.data_scripts.showers_schema import SHOWER_FEATURES

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        dataset = Dataset.from_dict({name: columns[name] for name in SHOWER_FEATURES}, features=SHOWER_FEATURES)
        pq.write_table(dataset.with_format("arrow")[:], temporary, row_group_size=1000, compression="zstd")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def report(counts: Counter, generator: Generator) -> str:
    """What was done with the showers that this run has made, in words."""
    parts = [f"{counts['cut_off']} draws cut off at {generator.max_hits} hits", f"{counts['empty']} without a hit"]
    if generator.energy_filter is not None:
        parts.append(f"{counts['regenerated']} regenerated, {counts['low']} kept below the energy-sum envelope")
    if generator.merge_duplicates:
        parts.append(f"{counts['merged']} hits merged")
    if generator.mip_cut is not None:
        parts.append(f"{counts['below_cut']} hits below {generator.mip_cut:g} MeV removed")
    return ", ".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hepzoo generate showers",
        description="Generate calorimeter showers with a trained SPADE model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder or Hub repository of a generator")
    parser.add_argument("--output", required=True, help="folder for the files")
    parser.add_argument(
        "--n_showers",
        type=int,
        help=f"showers in total (default {DEFAULT_NUM_SHOWERS}, or as many as --energies_from has)",
    )
    energies = parser.add_mutually_exclusive_group()
    energies.add_argument(
        "--energy",
        default=DEFAULT_ENERGY,
        help=f'incident energy in GeV, "50" or "10-100" (uniform; default {DEFAULT_ENERGY})',
    )
    energies.add_argument(
        "--energies_from", metavar="FILE", help="Parquet file or folder whose incident energies are taken, in order"
    )
    parser.add_argument("--rows_per_shard", type=int, default=5000, help="showers per file (default 5000)")
    parser.add_argument("--batch_size", type=int, default=64, help="showers per call of generate() (default 64)")
    parser.add_argument("--seed", type=int, default=44, help="default 44")
    parser.add_argument("--format", choices=list(SUFFIXES), default="parquet", help="default parquet")
    parser.add_argument("--cell_size", type=float, default=5.0, help="side of a cell in showerdata, mm (default 5)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")

    sampling = parser.add_argument_group("sampling", "default: the generation_config of the model")
    sampling.add_argument("--greedy", action="store_true", help="most probable cells and mean energies, no drawing")
    sampling.add_argument("--temperature", type=float, help="of all axes")
    sampling.add_argument("--top_k", type=int, help="cells kept on every axis, 0 for all")
    sampling.add_argument("--top_p", type=float, help="probability kept on every axis")
    sampling.add_argument(
        "--axis_temperatures", metavar="x=1,y=1,z=0.9", help="temperatures of single axes (cell=T in combined mode)"
    )
    sampling.add_argument("--energy_temperature", type=float, help="of the mixture of the hit energy")
    sampling.add_argument("--max_hits", type=int, help="showers are cut off here (default: as the model says)")
    stop = sampling.add_mutually_exclusive_group()
    stop.add_argument("--stop_threshold", type=float, help="a shower ends if the stop network's output reaches this")
    stop.add_argument("--stop_sampling", action="store_true", help="draw whether a shower ends")
    sampling.add_argument("--no_duplicate_cells", action="store_true", help="never draw a cell twice in a shower")
    sampling.add_argument("--monotonic_layers", action="store_true", help="never go back to an earlier layer")

    post = parser.add_argument_group("post-processing", "default: the generation_config of the model")
    envelope = post.add_mutually_exclusive_group()
    envelope.add_argument(
        "--energy_sum_filter",
        metavar="A,B,C",
        help="generate a shower again if its visible energy in MeV is below s (A E^B + C), E in GeV; or off",
    )
    envelope.add_argument(
        "--fit_energy_sum_filter", metavar="FILE", help="the same, fitted to the showers of a Parquet file or folder"
    )
    post.add_argument("--safety_factor", type=float, help="s of the energy-sum filter (default 0.9)")
    post.add_argument("--max_retries", type=int, help="rounds of the energy-sum filter (default 2)")
    post.add_argument(
        "--merge_duplicates", action=argparse.BooleanOptionalAction, help="add up hits of the same cell of a shower"
    )
    post.add_argument(
        "--mip_cut", type=float, nargs="?", const=0.1, metavar="MEV", help="remove hits up to this (0.1 if not given)"
    )
    return parser


def check_arguments(arguments: argparse.Namespace):
    check_at_least(arguments, 1, "n_showers", "rows_per_shard", "batch_size", "max_hits")
    check_at_least(arguments, 0, "seed", "top_k", "max_retries")
    for name in ("temperature", "energy_temperature", "cell_size", "safety_factor"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name} is {value}, expected a finite number > 0")
    for name in ("top_p", "stop_threshold"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"--{name} is {value}, expected 0 < {name} <= 1")
    if arguments.mip_cut is not None and not 0 <= arguments.mip_cut < float("inf"):
        raise ValueError(f"--mip_cut is {arguments.mip_cut}, expected a finite energy in MeV, at least 0")
    if arguments.greedy:
        for name in (*SAMPLING_OPTIONS, "stop_sampling"):
            if getattr(arguments, name) not in (None, False):
                raise ValueError(f"--{name} has no effect with --greedy, which draws nothing")
    parse_range(arguments.energy, "energy", ENERGY_LIMITS)
    if arguments.format != "parquet" and find_spec("h5py") is None:
        raise ValueError(f'--format {arguments.format} needs h5py: pip install "hepzoo[data]"')


def run(arguments: argparse.Namespace):
    check_arguments(arguments)
    energies = requested_energies(arguments)
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState(cpu=arguments.cpu)
    generator = load_generator(arguments, state.device)
    folder = Path(arguments.output)
    num_files = -(-arguments.n_showers // arguments.rows_per_shard)
    suffix = SUFFIXES[arguments.format]
    paths = [folder / f"generated-{index:05d}-of-{num_files:05d}{suffix}" for index in range(num_files)]
    size = arguments.rows_per_shard
    sizes = [min(size, arguments.n_showers - index * size) for index in range(num_files)]
    # without what changes neither the showers nor the files
    options = {name: value for name, value in vars(arguments).items() if name not in ("output", "cpu")}
    # what the options do not show by themselves
    options["post_processing"] = {
        "energy_sum_filter": None if generator.energy_filter is None else asdict(generator.energy_filter),
        "merge_duplicates": generator.merge_duplicates,
        "mip_cut": generator.mip_cut,
    }
    if energies is not None:
        options["energies_sha256"] = hashlib.sha256(energies.tobytes()).hexdigest()
    counts: Counter = Counter()

    def make_file(index: int, bar):
        columns, own_counts = make_rows(index, arguments, energies, generator, bar)
        write_rows(columns, paths[index], arguments, generator)
        counts.update(own_counts)

    make_missing_files(state, options, paths, sizes, make_file, files="files", unit="shower")
    total = sum(gather_object([counts]), Counter())
    if state.is_main_process:
        print(f"{folder}: {arguments.n_showers} showers in {num_files} files; this run: {report(total, generator)}")
    if state.num_processes > 1:
        state.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        print(f"hepzoo generate showers: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
