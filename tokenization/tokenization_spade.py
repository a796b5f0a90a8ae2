"""Tokenizer of SPADE (arXiv 2606.11304): calorimeter showers <-> delayed streams of cell ids and hit energies.

Streams of a shower with n hits A, B, .. sorted by layer, split mode, n = 2, two registers (M = MISSING, P = PAD):

    position  0  1  2  3  4  5  6  7  8       0, 1 registers; 2 beginning of sequence
    x         M  M  M  M  xA xB M  M  P       delay 1
    y         M  M  M  M  M  yA yB M  P       delay 2
    z         M  M  M  zA zB M  M  M  P       delay 0
    energy    0  0  0  0  0  0  eA eB 0       delay 3

Ids of an axis with b cells: 0 PAD, 1..b cells, b + 1 MISSING. A stop network ends showers, there is no id for it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizer
from transformers.utils import logging

from .batching import (
    DECODING_SWITCHES,
    MAX_VOCAB_SIZE,
    as_tensors,
    check_integer,
    check_integers,
    check_known,
    check_side,
    flatten_floats,
    flatten_ids,
    pad_features,
    pad_rows,
    padding_strategy,
    round_up,
    split_rows,
)
from .delay_pattern import delay_streams, undelay_streams
from .records_dirc import list_column, scalar_column, short_repr, to_numpy
from .records_spade import HIT_FIELDS, shower_columns

logger = logging.get_logger(__name__)

AXES = ("x", "y", "z")
SORTINGS = (
    "layer_energy",
    "layer_desc_energy",
    "layer_x",
    "layer_radius_from_ip",
    "layer_random",
    "layer",
    "energy",
    "radius_from_ip",
    "random",
    "none",
)
# What is left out on request, in contrast to invalid input.
_REQUESTED = ("hit:truncated", "hit:below_threshold")


class SpadeTokenizer(PreTrainedTokenizer):
    """Turns calorimeter showers into the inputs of SPADE and back (arXiv 2606.11304).

    Args:
        nbins: cells of the grid along x, y, z.
        axis_mode (`str`): "split" for one stream per axis, "combined" for one stream with a token for each cell,
            1 + x + nx y + nx ny z.
        num_registers (`int`): slots in front of the sequence where the model puts its learned registers.
        energy_transform: of the hit energy E [MeV]: {"log": bool, "subtract": s, "multiply": m} stands for
            (ln E - s) m, or (E - s) m without the logarithm.
        sorting (`str`): order of the hits; all sorts are stable. "layer_energy": layers front to back, inside a layer
            by falling energy; "layer_desc_energy": the same from the last layer to the first; "layer", "layer_x" (x
            inside a layer), "layer_random", "layer_radius_from_ip"; "energy" (falling), "radius_from_ip" (distance to
            the centre of the front face, in cells), "random", "none".
        seed (`int`): of the random sortings.
        energy_threshold (`float`): hits with this energy or less are no hits, MeV. Those above 0 are counted in
            `dropped`.
        model_max_length (`int`): largest number of hits.
        stream_delays: delay of each stream; default (1, 2, 0) for x, y, z and (0,) in combined mode.
        energy_delay (`int`, *optional*): delay of the energy; default behind all streams.
        legacy_pad_length (`int`, *optional*): restores the published truncation to a fixed length: hits beyond it are
            dropped and the delayed streams are cut after so many positions, registers not counted, so that the last
            hits of a long shower are incomplete.
    """

    model_input_names = ["input_ids", "attention_mask", "hit_energy", "incident_energy"]
    vocab_files_names: dict[str, str] = {}

    def __init__(
        self,
        nbins: Sequence[int] = (30, 30, 30),
        axis_mode: str = "split",
        num_registers: int = 2,
        energy_transform: Mapping[str, Any] | None = None,
        sorting: str = "layer_energy",
        seed: int = 0,
        energy_threshold: float = 0.0,
        model_max_length: int = 1700,
        stream_delays: Sequence[int] | None = None,
        energy_delay: int | None = None,
        legacy_pad_length: int | None = None,
        **kwargs,
    ):
        # Attributes named like init keywords are what save_pretrained writes: plain JSON values only.
        self.nbins = check_integers("nbins", nbins, 1, np.iinfo(np.int16).max)
        if len(self.nbins) != len(AXES):
            raise ValueError(f"nbins must have one entry for each of x, y, z, got {list(nbins)}")
        if axis_mode not in ("split", "combined"):
            raise ValueError(f"axis_mode must be 'split' or 'combined', got {axis_mode!r}")
        if sorting not in SORTINGS:
            raise ValueError(f"sorting must be one of {', '.join(SORTINGS)}, got {sorting!r}")
        self.axis_mode, self.sorting = axis_mode, sorting
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(f"nbins {self.nbins} are {self.vocab_size - 2:,} cells, too many for one vocabulary")
        self.num_registers = check_integer("num_registers", num_registers, 0)
        self.seed = check_integer("seed", seed, 0)
        self.energy_transform = _check_transform(energy_transform)
        if not isinstance(energy_threshold, Real) or not (np.isfinite(energy_threshold) and energy_threshold >= 0):
            raise ValueError(f"energy_threshold must be 0 or a positive energy in MeV, got {energy_threshold}")
        self.energy_threshold = float(energy_threshold)
        delays = stream_delays if stream_delays is not None else ((1, 2, 0) if axis_mode == "split" else (0,))
        self.stream_delays = check_integers("stream_delays", delays, 0)
        if len(self.stream_delays) != self.num_streams:
            raise ValueError(
                f"stream_delays must have one entry for each of {', '.join(self.stream_names)}, got {list(delays)}"
            )
        if energy_delay is None:
            energy_delay = max(self.stream_delays) + 1
        self.energy_delay = check_integer("energy_delay", energy_delay, 0)
        self.legacy_pad_length = (
            None if legacy_pad_length is None else check_integer("legacy_pad_length", legacy_pad_length, 1)
        )
        self.dropped: Counter = Counter()
        self._generator: np.random.Generator | None = None

        kwargs.update(pad_token="<pad>")
        super().__init__(
            nbins=self.nbins,
            axis_mode=self.axis_mode,
            num_registers=self.num_registers,
            energy_transform=self.energy_transform,
            sorting=self.sorting,
            seed=self.seed,
            energy_threshold=self.energy_threshold,
            model_max_length=check_integer("model_max_length", model_max_length, 1),
            stream_delays=self.stream_delays,
            energy_delay=self.energy_delay,
            legacy_pad_length=self.legacy_pad_length,
            **kwargs,
        )

    @classmethod
    def from_model_config(cls, config: Any, **overrides) -> "SpadeTokenizer":
        """The tokenizer that fits a `SpadeConfig`; `overrides` are arguments of the tokenizer."""
        names = ("nbins", "axis_mode", "num_registers", "stream_delays", "energy_delay")
        arguments = {name: getattr(config, name) for name in names if hasattr(config, name)}
        if hasattr(config, "max_num_hits"):
            arguments["model_max_length"] = config.max_num_hits
        return cls(**{**arguments, **overrides})

    def __getstate__(self):
        # Counts of what was dropped and drawn random numbers must not change the fingerprint that datasets.map takes
        # of its function.
        return {**self.__dict__, "dropped": Counter(), "_generator": None}

    # --- vocabularies ------------------------------------------------------------------------------------------------

    @property
    def stream_names(self) -> list[str]:
        return list(AXES) if self.axis_mode == "split" else ["cell"]

    @property
    def num_streams(self) -> int:
        """Size of the last axis of `input_ids`: 3, or 1 in combined mode."""
        return len(self.stream_names)

    @property
    def stream_vocab_sizes(self) -> list[int]:
        """Ids of each stream: its cells, PAD and MISSING."""
        sizes = self.nbins if self.axis_mode == "split" else [int(np.prod(self.nbins, dtype=np.int64))]
        return [size + 2 for size in sizes]

    @property
    def vocab_size(self) -> int:
        """The largest of `stream_vocab_sizes`."""
        return max(self.stream_vocab_sizes)

    @property
    def missing_token_ids(self) -> list[int]:
        """MISSING of each stream: no hit at this position, because of a delay."""
        return [size - 1 for size in self.stream_vocab_sizes]

    @property
    def untrained_token_ids(self) -> list[int]:
        """Ids that are no targets of training, one per stream."""
        return self.missing_token_ids

    @property
    def num_conditioning_tokens(self) -> int:
        """Positions in front of the beginning of the sequence: the registers."""
        return self.num_registers

    @property
    def prefix_length(self) -> int:
        """Leading positions that are never a target: registers and the beginning of the sequence."""
        return self.num_registers + 1

    @property
    def max_delay(self) -> int:
        return max(*self.stream_delays, self.energy_delay)

    def num_positions(self, num_hits: int) -> int:
        """Length of the sequence of a shower, registers included."""
        total = self.prefix_length + num_hits + self.max_delay
        if self.legacy_pad_length is not None:
            total = min(total, self.num_registers + self.legacy_pad_length)
        return total

    @cached_property
    def _vocab(self) -> dict[str, int]:
        last = self.vocab_size - 1
        return {"<pad>": 0, **{str(index - 1): index for index in range(1, last)}, "<missing>": last}

    def get_vocab(self) -> dict[str, int]:
        """Vocabulary of the largest stream: cell number and the special tokens -> id."""
        return dict(self._vocab)

    def _tokenize(self, text, **kwargs):
        raise ValueError(f"{type(self).__name__} encodes showers, not text; got {short_repr(text)}")

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._vocab.get(token)

    def _convert_id_to_token(self, index: int) -> str | None:
        index = int(index)
        if not 0 <= index < self.vocab_size:
            return None
        return {0: "<pad>", self.vocab_size - 1: "<missing>"}.get(index, str(index - 1))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Nothing to write: the vocabularies follow from tokenizer_config.json."""
        return ()

    # --- physics <-> tokens, element by element ----------------------------------------------------------------------

    def cells_to_tokens(self, cells: Any) -> np.ndarray:
        """Ids (..., streams), int64, of cell indices (..., 3) = (x, y, z) inside the grid, without validation."""
        cells = np.asarray(cells, dtype=np.int64)
        if self.axis_mode == "split":
            return cells + 1
        nx, ny, _ = self.nbins
        return 1 + cells @ np.array([[1], [nx], [nx * ny]])

    def tokens_to_cells(self, tokens: Any) -> np.ndarray:
        """Cell indices (..., 3), int64, of ids (..., streams) that are neither PAD nor MISSING."""
        cells = np.asarray(tokens, dtype=np.int64) - 1
        if self.axis_mode == "split":
            return cells
        nx, ny, _ = self.nbins
        return np.concatenate([cells % nx, cells // nx % ny, cells // (nx * ny)], axis=-1)

    def transform_energy(self, energy: Any) -> np.ndarray:
        """Model energies, float64, of hit energies in MeV, any shape."""
        energy = np.asarray(energy, dtype=np.float64)
        values = np.log(energy) if self.energy_transform["log"] else energy
        return (values - self.energy_transform["subtract"]) * self.energy_transform["multiply"]

    def inverse_transform_energy(self, values: Any) -> np.ndarray:
        """Hit energies in MeV, float64, of model energies, any shape."""
        values = np.asarray(values, dtype=np.float64) / self.energy_transform["multiply"]
        values = values + self.energy_transform["subtract"]
        return np.exp(values) if self.energy_transform["log"] else values

    def sort_hits(self, cells: np.ndarray, energy: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Order of the hits of each shower under `sorting`.

        Args:
            cells: (hits of all showers, 3), cell indices.
            energy: (hits of all showers,).
            lengths: hits of each shower (showers,).

        Returns:
            int64 (hits of all showers,), a permutation inside each shower.
        """
        layer = cells[:, 2]
        center = np.array([(self.nbins[0] - 1) / 2, (self.nbins[1] - 1) / 2, 0.0])
        kind = self.sorting.removeprefix("layer_")
        if kind == "none":
            return np.arange(len(cells))
        if kind == "random":
            if self._generator is None:
                self._generator = np.random.default_rng(self.seed)
            key = self._generator.random(len(cells))
        elif kind == "radius_from_ip":
            key = np.square(cells - center).sum(axis=-1)
        elif kind == "layer":
            key = layer
        else:
            key = {"energy": -energy, "desc_energy": -energy, "x": cells[:, 0]}[kind]
        keys = [key]
        if self.sorting.startswith("layer_"):
            keys.append(-layer if kind == "desc_energy" else layer)
        return np.lexsort([*keys, np.repeat(np.arange(len(lengths)), lengths)])

    # --- encoding ----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        rows: Any,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        on_invalid: str = "error",
        return_row_index: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        **kwargs,
    ) -> BatchEncoding:
        """Encodes showers.

        Args:
            rows: a list of records, a dict of columns, or one record (fields `incident_energy` [GeV], `x`, `y`, `z`,
                `energy` [MeV]); or padded arrays, see `shower_columns`.
            padding: True or "longest", "max_length", or False for ragged output.
            truncation: True keeps the first `max_length` hits in sorting order and counts the others; False makes a
                longer shower invalid. With `legacy_pad_length` longer showers are always truncated.
            max_length: largest number of hits; default `model_max_length`.
            return_tensors: None, "np" or "pt"; a batch must then be padded.
            on_invalid: "error" raises one line on the first invalid value; "drop_hits" removes invalid hits (a shower
                that this cannot repair is an error); "drop_showers" removes invalid showers. What is removed is counted
                by reason in `tokenizer.dropped` and logged once per call.
            return_row_index: adds `row_index`, the input row of each encoded shower.
            pad_to_multiple_of: rounds the array length up.
            padding_side: "right" or "left"; default the tokenizer's.

        Returns:
            `BatchEncoding` with
            - `input_ids` int64 (length, streams) per shower, length = num_registers + 1 + hits + largest delay;
            - `attention_mask` int64 (length,);
            - `hit_energy` float32 (length,), transformed, in its delayed place, 0 elsewhere;
            - `incident_energy` float32, GeV.
            Batches are lists of arrays, or stacked arrays if padded; one record gives its arrays without batch axis
            unless `return_tensors` is set.

        Raises:
            ValueError: one line that names row, field, value and what was expected.
        """
        check_known(kwargs, ["verbose"])
        if on_invalid not in ("error", "drop_hits", "drop_showers"):
            raise ValueError(f"on_invalid must be 'error', 'drop_hits' or 'drop_showers', got {on_invalid!r}")
        strategy = padding_strategy(padding)
        side = check_side(padding_side or self.padding_side)
        truncate = truncation not in (False, None, "do_not_truncate") or self.legacy_pad_length is not None
        limit = self._max_hits(max_length)

        columns, count, single = shower_columns(rows)
        showers = self._read_showers(columns, count, on_invalid, limit, truncate)
        self._report(showers["reasons"])
        if single and not len(showers["row_index"]):
            raise ValueError(f"the record was dropped: {', '.join(showers['reasons'])}")

        ids, hit_energy, totals = self._delayed(showers)
        flat = {"input_ids": ids, "attention_mask": np.ones(len(ids), dtype=np.int64), "hit_energy": hit_energy}
        if strategy is None:
            data = {name: split_rows(values, totals) for name, values in flat.items()}
        else:
            width = self.num_positions(limit) if strategy == "max_length" else int(totals.max(initial=0))
            width = round_up(width, pad_to_multiple_of)
            data = {name: pad_rows(values, totals, width, side, 0) for name, values in flat.items()}
        data["incident_energy"] = showers["incident_energy"]
        if return_row_index:
            data["row_index"] = showers["row_index"]
        if return_tensors is not None:
            return as_tensors(data, return_tensors)
        if single:
            data = {name: values[0] for name, values in data.items()}
        elif strategy is None:
            data["incident_energy"] = list(data["incident_energy"])
        return BatchEncoding(data)

    def encode(self, rows: Any, **kwargs) -> Any:
        """`input_ids` of `__call__`."""
        return self(rows, **kwargs)["input_ids"]

    def _max_hits(self, max_length: int | None) -> int:
        limit = self.model_max_length if max_length is None else check_integer("max_length", max_length, 1)
        return limit if self.legacy_pad_length is None else min(limit, self.legacy_pad_length)

    def _read_showers(self, columns, count: int, on_invalid: str, limit: int, truncate: bool) -> dict[str, Any]:
        """Reads and validates; returns flat hit arrays sorted inside each shower."""
        reasons: Counter = Counter()
        row_index = np.arange(count)
        flat = {name: list_column(columns, name, count) for name in HIT_FIELDS}
        incident = scalar_column(columns, "incident_energy", count)
        sizes = np.stack([flat[name][1] for name in HIT_FIELDS])
        equal = (sizes == sizes[0]).all(axis=0)
        if not equal.all():
            if on_invalid != "drop_showers":
                row = int(np.argmin(equal))
                found = ", ".join(f"{name} {size}" for name, size in zip(HIT_FIELDS, sizes[:, row], strict=True))
                raise ValueError(f"row {row}: hit lists differ in length: {found}; expected equal lengths")
            reasons["shower:unequal_lengths"] += int((~equal).sum())
            row_index, incident = row_index[equal], incident[equal]
            flat = {name: (values[np.repeat(equal, sizes)], sizes[equal]) for name, (values, sizes) in flat.items()}
        lengths = flat["energy"][1]
        starts = np.cumsum(lengths) - lengths
        owner = np.repeat(np.arange(len(lengths)), lengths)

        keep = np.ones(len(lengths), dtype=bool)
        good = np.ones(len(owner), dtype=bool)

        def reject_showers(bad, reason, line):
            bad = bad & keep
            if not bad.any():
                return
            if on_invalid != "drop_showers":
                raise ValueError(line(int(np.argmax(bad))))
            reasons[f"shower:{reason}"] += int(bad.sum())
            keep[bad] = False

        def reject_hits(bad, reason, expected):
            bad = bad & good & keep[owner]
            if not bad.any():
                return
            if on_invalid == "error":
                h = int(np.argmax(bad))
                place = f"row {row_index[owner[h]]}: {reason}[{h - starts[owner[h]]}]"
                raise ValueError(f"{place} = {flat[reason][0][h]:.9g} {expected}")
            if on_invalid == "drop_hits":
                reasons[f"hit:{reason}"] += int(bad.sum())
                good[bad] = False
            else:
                showers = np.unique(owner[bad])
                reasons[f"shower:{reason}"] += len(showers)
                keep[showers] = False

        incident32 = _to_float32(incident)
        reject_showers(
            ~(np.isfinite(incident32) & (incident32 > 0)),
            "incident_energy",
            lambda i: f"row {row_index[i]}: incident_energy = {incident[i]:g} is not a positive energy in GeV",
        )
        # Records hold float32; what is 0 there is padding, whatever cell it names.
        recorded = flat["energy"][0]
        energy = _to_float32(recorded)
        reject_hits(~np.isfinite(energy) | (recorded < 0), "energy", "is not an energy in MeV, 0 or more")
        below = energy <= self.energy_threshold
        dropped = int((below & good & keep[owner] & (recorded > 0)).sum())
        if dropped:
            reasons["hit:below_threshold"] += dropped
        good &= ~below
        cells = np.zeros((len(owner), len(AXES)), dtype=np.int64)
        for k, (name, size) in enumerate(zip(AXES, self.nbins, strict=True)):
            values = flat[name][0]
            inside = (values >= 0) & (values < size)
            cells[inside, k] = values[inside]
            reject_hits(~(inside & (cells[:, k] == values)), name, f"is not an integer in 0..{size - 1}")
        numbers = np.bincount(owner[good], minlength=len(lengths))
        reject_showers(
            numbers == 0,
            "no_hits",
            lambda i: (
                f"row {row_index[i]}: none of {lengths[i]} hits is valid; expected at least 1 of energy above "
                f"{self.energy_threshold:g} MeV"
            ),
        )
        if not truncate:
            reject_showers(
                numbers > limit,
                "too_many_hits",
                lambda i: (
                    f"row {row_index[i]}: {numbers[i]} hits; expected at most {limit} (truncation=True keeps the "
                    "first in sorting order)"
                ),
            )

        good &= keep[owner]
        numbers = numbers[keep]
        cells, energy = cells[good], energy[good]
        order = self.sort_hits(cells, energy, numbers)
        if (numbers > limit).any():
            rank = np.arange(len(order)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
            order = order[rank < limit]
            reasons["hit:truncated"] += int((rank >= limit).sum())
            numbers = np.minimum(numbers, limit)
        return {
            "reasons": reasons,
            "row_index": row_index[keep],
            "incident_energy": incident32[keep],
            "lengths": numbers,
            "cells": cells[order],
            "energy": energy[order],
        }

    def _delayed(self, showers: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Delayed ids (positions, streams) and energies (positions,) of all showers, and the positions of each."""
        lengths = showers["lengths"]
        missing = self.missing_token_ids
        ids, totals = delay_streams(
            self.cells_to_tokens(showers["cells"]),
            lengths,
            self.stream_delays,
            missing,
            missing,
            self.num_registers,
            max_delay=self.max_delay,
        )
        values = self.transform_energy(showers["energy"]).astype(np.float32)
        energy, _ = delay_streams(
            values[:, None], lengths, [self.energy_delay], 0.0, 0.0, self.num_registers, max_delay=self.max_delay
        )
        energy = energy[:, 0]
        if self.legacy_pad_length is not None:
            cut = np.minimum(totals, self.num_registers + self.legacy_pad_length)
            rank = np.arange(len(ids)) - np.repeat(np.cumsum(totals) - totals, totals)
            inside = rank < np.repeat(cut, totals)
            ids, energy, totals = ids[inside], energy[inside], cut
        return ids, energy, totals

    def _report(self, reasons: Counter):
        self.dropped.update(reasons)
        loud = {reason: number for reason, number in reasons.items() if reason not in _REQUESTED}
        if loud:
            logger.warning("invalid input: " + ", ".join(f"{reason} x {number}" for reason, number in loud.items()))

    # --- collation ---------------------------------------------------------------------------------------------------

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Pads encoded showers to one length and stacks them; usable as collator through `DataCollatorWithPadding`.

        Args:
            encoded_inputs: list of feature dicts, or a dict of lists, of arrays, tensors or plain lists. `input_ids`
                is (length, streams) per shower.
            padding: True or "longest", "max_length", or False (the lengths must then agree).
            max_length: number of hits that "max_length" makes room for, as in `__call__`.
            pad_to_multiple_of: rounds the array length up.
            padding_side: "right" or "left"; default the tokenizer's.
            return_tensors: None or "np" for numpy, "pt" for torch.

        Returns:
            `BatchEncoding`: `input_ids` int64 (batch, length, streams), 0 at padding; `attention_mask` and `hit_energy`
            (batch, length), 0 at padding; `incident_energy` float32 (batch,); every other key stacked.

        Raises:
            ValueError: a feature is missing, of the wrong shape, or longer than `max_length`.
        """
        return pad_features(
            encoded_inputs,
            pad_ids=[0] * self.num_streams,
            float_fills={"hit_energy": 0.0},
            strategy=padding_strategy(padding),
            max_positions=self.num_positions(self._max_hits(max_length)),
            side=padding_side or self.padding_side,
            multiple=pad_to_multiple_of,
            return_attention_mask=return_attention_mask,
            return_tensors=return_tensors,
        )

    # --- decoding ----------------------------------------------------------------------------------------------------

    def batch_decode(
        self,
        sequences: Any,
        hit_energy: Any = None,
        incident_energy: Any = None,
        num_hits: Any = None,
        skip_special_tokens: bool = True,
        **kwargs,
    ) -> dict[str, Any]:
        """Turns delayed streams into showers.

        A hit counts if the ids of all its streams are cells and the position of its energy exists and is no padding.

        Args:
            sequences: (batch, length, streams) tensor or array, or a list of (length, streams), registers included; or
                the output of `generate()`, which brings `hit_energy` and `num_hits` along.
            hit_energy: (batch, length), transformed.
            incident_energy: GeV, (batch,) or one for all; None leaves NaN.
            num_hits: (batch,), hits behind the first so many are left out; None keeps all.

        Returns:
            Columns `incident_energy` float32, `num_hits` int32 as arrays (showers,), `x`, `y`, `z` int16 and `energy`
            float32 [MeV] as lists of arrays, and `row_index`: the sequence that each shower came from.

        Raises:
            ValueError: shapes disagree, an id is outside its vocabulary, or an energy is not finite.
        """
        check_known(kwargs, DECODING_SWITCHES)
        if hasattr(sequences, "sequences"):
            output, sequences = sequences, sequences.sequences
            hit_energy = output.continuous["hit_energy"] if hit_energy is None else hit_energy
            num_hits = output.num_hits if num_hits is None else num_hits
        if hit_energy is None:
            raise ValueError("batch_decode needs hit_energy, the transformed energy of each position")
        ids, lengths = flatten_ids(sequences, self.stream_vocab_sizes, self.stream_names)
        energies = flatten_floats(hit_energy, lengths, "hit_energy")
        count = len(lengths)
        owner = np.repeat(np.arange(count), lengths)

        real = (ids > 0).any(axis=-1)
        tokens, complete = undelay_streams(
            ids, lengths, self.stream_delays, (ids > 0) & (ids < np.asarray(self.missing_token_ids))
        )
        energies, has_energy = undelay_streams(energies[:, None], lengths, [self.energy_delay], real[:, None])
        # Number of the hit: its place behind the prefix, which padding on the left may shift.
        places = np.flatnonzero(real)
        rows, first = np.unique(owner[places], return_index=True)
        begin = np.zeros(count, dtype=np.int64)
        begin[rows] = places[first]
        number = np.arange(len(ids)) - begin[owner] - self.prefix_length
        hit = complete & has_energy & (number >= 0)
        if num_hits is not None:
            limits = to_numpy(num_hits)
            if limits.shape != (count,) or limits.dtype.kind not in "iu":
                raise ValueError(f"num_hits must be {count} integers, got {limits.dtype} of shape {limits.shape}")
            hit &= number < limits[owner]

        values = self.inverse_transform_energy(energies[hit, 0])
        energy = _to_float32(values)
        if not np.isfinite(energy).all():
            h = int(np.argmin(np.isfinite(energy)))
            place = f"row {owner[hit][h]}: hit_energy of hit {number[hit][h]}"
            raise ValueError(f"{place} = {energies[hit, 0][h]:g} is not the transform of a finite energy in MeV")
        cells = self.tokens_to_cells(tokens[hit])
        numbers = np.bincount(owner[hit], minlength=count)
        incident = np.nan if incident_energy is None else to_numpy(incident_energy)
        if np.shape(incident) not in ((), (count,)):
            raise ValueError(f"incident_energy must be one number or {count} of them, got shape {np.shape(incident)}")
        return {
            "incident_energy": np.broadcast_to(incident, (count,)).astype(np.float32),
            **{name: split_rows(cells[:, k].astype(np.int16), numbers) for k, name in enumerate(AXES)},
            "energy": split_rows(energy, numbers),
            "num_hits": numbers.astype(np.int32),
            "row_index": np.arange(count),
        }

    def decode(self, token_ids: Any, hit_energy: Any = None, **kwargs) -> dict[str, Any]:
        """One sequence (length, streams) with its `hit_energy` (length,) -> one record.

        A batch is passed on to `batch_decode`, whose arguments this takes.
        """
        if hasattr(token_ids, "sequences") or len(token_ids) and np.ndim(token_ids[0]) == 2:
            return self.batch_decode(token_ids, hit_energy=hit_energy, **kwargs)
        if hit_energy is not None:
            hit_energy = [hit_energy]
        if kwargs.get("num_hits") is not None:
            kwargs["num_hits"] = [kwargs["num_hits"]]
        columns = self.batch_decode([token_ids], hit_energy=hit_energy, **kwargs)
        columns.pop("row_index")
        return {
            name: values[0].item() if isinstance(values, np.ndarray) else values[0] for name, values in columns.items()
        }


# ---------------------------------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------------------------------


def _to_float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _check_transform(transform: Mapping[str, Any] | None) -> dict[str, Any]:
    if transform is None:
        transform = {"log": True, "subtract": -1.5, "multiply": 0.91}
    if (
        not isinstance(transform, Mapping)
        or set(transform) != {"log", "subtract", "multiply"}
        or not isinstance(transform["log"], bool)
    ):
        raise ValueError(f"energy_transform must have log (bool), subtract and multiply, got {transform}")
    for name in ("subtract", "multiply"):
        value = transform[name]
        if not isinstance(value, Real) or not np.isfinite(value) or name == "multiply" and value == 0:
            raise ValueError(f"energy_transform: {name} must be a finite number, not 0 to multiply, got {value!r}")
    return {"log": transform["log"], "subtract": float(transform["subtract"]), "multiply": float(transform["multiply"])}


# `save_pretrained` then writes this code beside the settings, so that they load anywhere with `trust_remote_code=True`
SpadeTokenizer.register_for_auto_class("AutoTokenizer")
