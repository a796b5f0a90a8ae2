"""JetClass files (ROOT, arXiv 2202.03772, Zenodo record 6619768) -> sharded Parquet.

One TTree `tree`, one entry per jet; constituents as std::vector or as counted arrays. Branches of `JETS_FEATURES` that
a file lacks are columns that the data set lacks; only the four-momenta are required. Memory stays constant.
"""

import argparse
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from functools import partial

import numpy as np
from datasets import List

from hepzoo.data_scripts.hdf5_files import UnreadableFileError
from hepzoo.data_scripts.jet_files import JetBlock, JetFile, add_output_options, run_conversion
from hepzoo.data_scripts.jets_schema import JETS_FEATURES, REQUIRED_COLUMNS, jet_features

BLOCK_JETS = 5000


def _opened_tree(path: str | os.PathLike, name: str):
    try:
        import uproot
    except ImportError:
        raise ValueError('ROOT files need uproot; install it with: pip install "hepzoo[data]"') from None
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    try:
        file = uproot.open(os.fspath(path))
        keys = file.keys(recursive=False, cycle=False)
        tree = file[name] if name in keys else None
    # Damaged bytes come out of the reader as nearly any exception.
    except Exception as error:
        raise _unreadable(path, error) from None
    if tree is not None and not isinstance(tree, uproot.TTree):
        raise ValueError(f"{path}: {name} must be a TTree, found {file.classname_of(name)}")
    if tree is None:
        raise ValueError(f"{path}: TTree {name} is missing; the file holds {', '.join(keys)[:100] or 'nothing'}")
    return tree


def _unreadable(path, error: Exception) -> UnreadableFileError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UnreadableFileError(f"{path}: not a readable ROOT file, truncated or damaged ({reason:.120})")


def describe_jetclass(path: str | os.PathLike, tree: str = "tree") -> JetFile:
    """The jets and columns of a JetClass file.

    Raises:
        UnreadableFileError: not a ROOT file, or damaged.
        ValueError: the tree or a required branch is missing.
    """
    opened = _opened_tree(path, tree)
    with opened.file:
        branches = opened.keys(recursive=False)
        for name in REQUIRED_COLUMNS:
            if name not in branches:
                raise ValueError(f"{path}: branch {name} is missing; expected the branches of JetClass")
        known = [name for name in branches if name in JETS_FEATURES]
        ignored = [name for name in branches if name not in JETS_FEATURES]
        return JetFile(int(opened.num_entries), jet_features(known), ignored)


def read_jetclass(
    path: str | os.PathLike, counts: Counter | None = None, tree: str = "tree", block_jets: int = BLOCK_JETS
) -> Iterator[JetBlock]:
    """Reads a JetClass file in blocks.

    Raises:
        UnreadableFileError: the file is truncated or damaged.
        ValueError: a branch is not what JetClass has under its name.
    """
    import awkward as ak

    features = describe_jetclass(path, tree).features
    opened = _opened_tree(path, tree)
    with opened.file:
        blocks = opened.iterate(list(features), step_size=block_jets, library="ak")
        first = 0
        while True:
            try:
                block = next(blocks, None)
            except Exception as error:
                raise _unreadable(path, error) from None
            if block is None:
                break
            lengths, particles, jets = None, {}, {}
            for name, feature in features.items():
                values = block[name]
                is_list = isinstance(feature, List)
                if values.ndim != 1 + is_list or isinstance(ak.type(values).content, ak.types.RecordType):
                    kind = "a list of numbers" if is_list else "one number"
                    raise ValueError(f"{path}: branch {name} must hold {kind} per jet, found {ak.type(values).content}")
                if not is_list:
                    jets[name] = values.to_numpy()
                    continue
                number = ak.num(values).to_numpy()
                lengths = number if lengths is None else lengths
                bad = np.flatnonzero(number != lengths)
                if bad.size:
                    raise ValueError(
                        f"{path}: jet {first + bad[0]}: {name} has {number[bad[0]]} constituents, part_px has "
                        f"{lengths[bad[0]]}; expected equal"
                    )
                particles[name] = ak.flatten(values).to_numpy()
            yield JetBlock(lengths, particles, jets)
            first += len(lengths)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="hepzoo convert-data jetclass",
        description="Convert JetClass ROOT files to sharded Parquet.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=textwrap.dedent(
            """\
            examples:
              python data_scripts/convert_jetclass.py TTBar_*.root ZJetsToNuNu_*.root --output data/top_qcd
              python data_scripts/convert_jetclass.py val_5M/*.root --output data/jetclass --split validation
            Jets keep the order of the files: shuffle when reading.
            """
        ),
    )
    add_output_options(parser)
    parser.add_argument("--tree", default="tree", help="name of the TTree (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    return run_conversion(args, partial(describe_jetclass, tree=args.tree), partial(read_jetclass, tree=args.tree))


if __name__ == "__main__":
    sys.exit(main())
