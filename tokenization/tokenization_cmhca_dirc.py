"""Tokenizer of CMHCA-DIRC: the photon hits of one charged track <-> a pair of token streams (pixel, arrival time).

The vocabularies, the time binning and the order of the sequence follow FM4DIRC (arXiv 2505.08736). Sequence of a track
with n hits, sorted by time, one (space, time) pair per position:

    slot_0 .. slot_{c-1}   one per conditioning quantity, ids (0, 0); the model puts the kinematics there
    SOS  hit_1 .. hit_n  EOS

Space ids: 0 SOS, 1..N active pixels, `space_vocab_size - 2` EOS, `space_vocab_size - 1` pad.
Time ids:  0 SOS, 1..B time bins,     `time_vocab_size - 2` EOS,  `time_vocab_size - 1` pad.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizer
from transformers.utils import logging

from .batching import (
    DECODING_SWITCHES,
    IGNORE_INDEX,
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
from .geometry_dirc import DircGeometry
from .records_dirc import HIT_FIELDS, list_column, pdg_column, rows_to_columns, scalar_column, short_repr, to_numpy

logger = logging.get_logger(__name__)


class _Problem:
    """One kind of invalid input: which rows or hits, how to count it, and the line to raise."""

    def __init__(self, reason: str, mask: np.ndarray, line):
        self.reason, self.mask, self.line = reason, mask, line

    def error(self) -> ValueError:
        return ValueError(self.line(int(np.argmax(self.mask))))


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer
# ---------------------------------------------------------------------------------------------------------------------


class CMHCADircTokenizer(PreTrainedTokenizer):
    """Turns DIRC tracks into the inputs of the CMHCA-DIRC models and back (arXiv 2505.08736).

    Everything that describes a detector is configuration, so another DIRC needs no code: see the arguments.

    Args:
        geometry (`dict`, *optional*): fields of `DircGeometry`; None is the ePIC hpDIRC. `tokenizer.detector` is the
            built `DircGeometry`. Pixel tokens count the active channels in order.
        time_min, time_max (`float`): accepted arrival times [time_min, time_max), ns.
        time_resolution (`float`): width of a time bin, ns.
        space_vocab_size (`int`, *optional*): default active channels + 3.
        time_vocab_size (`int`): at least number of bins + 3; ids between the last bin and EOS stay unused.
        conditioning_names: names of the kinematic columns, in the order of the model's conditioning slots.
        conditioning_ranges: (min, max) of each, inclusive, in the unit of the column (GeV/c, degrees).
        class_pdg: |PDG| code of each class; the class id is the index.
        time_encoding (`str`): "categorical" for time tokens, "regression" for scaled times in `times`.
        legacy_time_decoding (`bool`): decode times as the FM4DIRC code does, one bin (`time_resolution`) later than
            the bin a token stands for, clipped to the range. Default: the bin centre.
        legacy_time_sentinels (`bool`): in regression mode mark EOS and padding in `times` by the ids of the time
            vocabulary (5921.0 and 5922.0) as FM4DIRC does. Default: 0.
        model_max_length (`int`): longest sequence counted from SOS to EOS, conditioning slots excluded.
        stream_delays: positions by which the space and the time stream stand behind their place. With (0, 1) a model
            predicts the time of a hit knowing its pixel; `__call__` then gives `labels` too, see there.
    """

    model_input_names = ["input_ids", "attention_mask", "kinematics", "class_ids"]
    vocab_files_names: dict[str, str] = {}

    def __init__(
        self,
        geometry: dict | None = None,
        time_min: float = 9.0,
        time_max: float = 157.0,
        time_resolution: float = 0.025,
        space_vocab_size: int | None = None,
        time_vocab_size: int = 5923,
        conditioning_names: Sequence[str] = ("P", "Theta"),
        conditioning_ranges: Sequence[Sequence[float]] = ((0.5, 10.0), (25.0, 160.0)),
        class_pdg: Sequence[int] = (211, 321),
        time_encoding: str = "categorical",
        legacy_time_decoding: bool = False,
        legacy_time_sentinels: bool = False,
        model_max_length: int = 250,
        stream_delays: Sequence[int] = (0, 0),
        **kwargs,
    ):
        if isinstance(geometry, DircGeometry):
            geometry = geometry.to_dict()
        self.detector = DircGeometry.from_dict(geometry)
        # Attributes named like init keywords are what save_pretrained writes: plain JSON values only.
        self.geometry = self.detector.to_dict()
        for name, value in (("time_min", time_min), ("time_max", time_max), ("time_resolution", time_resolution)):
            if not isinstance(value, Real) or isinstance(value, bool):
                raise ValueError(f"{name} must be a number of ns, got {value!r}")
        self.time_min, self.time_max = float(time_min), float(time_max)
        self.time_resolution = float(time_resolution)
        if not (np.isfinite([self.time_min, self.time_max]).all() and self.time_min < self.time_max):
            raise ValueError(f"time range must satisfy time_min < time_max, got {time_min} and {time_max} ns")
        if not (np.isfinite(self.time_resolution) and 0 < self.time_resolution <= self.time_max - self.time_min):
            raise ValueError(f"time_resolution must be positive and within the time range, got {time_resolution} ns")
        num_active = len(self.detector.active_channels)
        if space_vocab_size is None:
            space_vocab_size = num_active + 3
        self.space_vocab_size = check_integer("space_vocab_size", space_vocab_size, 1, MAX_VOCAB_SIZE)
        if self.space_vocab_size < num_active + 3:
            raise ValueError(
                f"space_vocab_size must be at least {num_active + 3} ({num_active} active pixels + SOS, EOS, pad), "
                f"got {space_vocab_size}"
            )
        self.time_vocab_size = check_integer("time_vocab_size", time_vocab_size, 1, MAX_VOCAB_SIZE)
        if self.time_vocab_size < self.num_time_bins + 3:
            raise ValueError(
                f"time_vocab_size must be at least {self.num_time_bins + 3} ({self.num_time_bins} bins + SOS, EOS, "
                f"pad), got {time_vocab_size}"
            )
        if isinstance(conditioning_names, str) or len(set(conditioning_names)) != len(conditioning_names):
            raise ValueError(f"conditioning_names must be a list of different names, got {conditioning_names!r}")
        self.conditioning_names = [str(name) for name in conditioning_names]
        try:
            self.conditioning_ranges = [[float(low), float(high)] for low, high in conditioning_ranges]
        except (TypeError, ValueError):
            raise ValueError(
                f"conditioning_ranges must be a list of pairs (min, max), got {conditioning_ranges!r}"
            ) from None
        if len(self.conditioning_names) != len(self.conditioning_ranges):
            raise ValueError(
                f"conditioning_names has {len(self.conditioning_names)} entries, "
                f"conditioning_ranges has {len(self.conditioning_ranges)}"
            )
        for name, (low, high) in zip(self.conditioning_names, self.conditioning_ranges, strict=True):
            if not (low < high and np.isfinite([low, high]).all()):
                raise ValueError(f"conditioning_ranges: {name} needs min < max, got ({low}, {high})")
        self.class_pdg = [abs(code) for code in check_integers("class_pdg", class_pdg, -(10**10), 10**10)]
        if len(set(self.class_pdg)) != len(self.class_pdg):
            raise ValueError(f"class_pdg must not repeat a code, got {list(class_pdg)}")
        if time_encoding not in ("categorical", "regression"):
            raise ValueError(f"time_encoding must be 'categorical' or 'regression', got {time_encoding!r}")
        self.time_encoding = time_encoding
        self.legacy_time_decoding = bool(legacy_time_decoding)
        self.legacy_time_sentinels = bool(legacy_time_sentinels)
        self.stream_delays = check_integers("stream_delays", stream_delays, 0)
        if len(self.stream_delays) != 2 or any(self.stream_delays) and time_encoding == "regression":
            raise ValueError(
                f"stream_delays must be the delays of space and time, 0 in regression mode, got {list(stream_delays)}"
            )
        model_max_length = check_integer("model_max_length", model_max_length, self._shortest)
        self.dropped: Counter = Counter()

        kwargs.update(bos_token="<sos>", eos_token="<eos>", pad_token="<pad>")
        super().__init__(
            geometry=self.geometry,
            time_min=self.time_min,
            time_max=self.time_max,
            time_resolution=self.time_resolution,
            space_vocab_size=self.space_vocab_size,
            time_vocab_size=self.time_vocab_size,
            conditioning_names=self.conditioning_names,
            conditioning_ranges=self.conditioning_ranges,
            class_pdg=self.class_pdg,
            time_encoding=self.time_encoding,
            legacy_time_decoding=self.legacy_time_decoding,
            legacy_time_sentinels=self.legacy_time_sentinels,
            model_max_length=model_max_length,
            stream_delays=self.stream_delays,
            **kwargs,
        )

    def __getstate__(self):
        # Counts of what was dropped must not change the fingerprint that datasets.map takes of its function.
        return {**self.__dict__, "dropped": Counter()}

    # --- vocabularies ------------------------------------------------------------------------------------------------

    @cached_property
    def time_edges(self) -> np.ndarray:
        """Edges of the time bins, ns, float64 (num_time_bins + 1,).

        The progression start + i * ((start + step) - start) in float64, so that a token is the same number as in
        FM4DIRC also for times at a nominal edge; with the defaults the last edge is 157.0000000000021.
        """
        step = (self.time_min + self.time_resolution) - self.time_min
        return self.time_min + np.arange(self.num_time_bins + 1) * step

    @property
    def num_time_bins(self) -> int:
        # A range that is a whole number of bins up to rounding gets no extra bin.
        return int(np.ceil((self.time_max - self.time_min) / self.time_resolution - 1e-6))

    @cached_property
    def _channel_to_token(self) -> np.ndarray:
        table = np.zeros(self.detector.num_channels, dtype=np.int64)
        table[self.detector.active_channels] = np.arange(1, len(self.detector.active_channels) + 1)
        return table

    @property
    def vocab_size(self) -> int:
        """Size of the space vocabulary, the primary one."""
        return self.space_vocab_size

    @property
    def num_space_tokens(self) -> int:
        """Ordinary space tokens: ids 1..num_space_tokens are pixels."""
        return len(self.detector.active_channels)

    @property
    def space_eos_token_id(self) -> int:
        return self.space_vocab_size - 2

    @property
    def space_pad_token_id(self) -> int:
        return self.space_vocab_size - 1

    @property
    def time_eos_token_id(self) -> int:
        return self.time_vocab_size - 2

    @property
    def time_pad_token_id(self) -> int:
        return self.time_vocab_size - 1

    @property
    def num_streams(self) -> int:
        """Size of the last axis of `input_ids`: 2, or 1 in regression mode."""
        return 2 if self.time_encoding == "categorical" else 1

    @property
    def stream_names(self) -> list[str]:
        return ["space", "time"][: self.num_streams]

    @property
    def stream_vocab_sizes(self) -> list[int]:
        return [self.space_vocab_size, self.time_vocab_size][: self.num_streams]

    @property
    def num_conditioning_tokens(self) -> int:
        """Positions in front of SOS that hold the kinematics."""
        return len(self.conditioning_names)

    @property
    def prefix_length(self) -> int:
        """Leading positions that are never a target: conditioning slots and SOS."""
        return self.num_conditioning_tokens + 1

    @cached_property
    def _vocab(self) -> dict[str, int]:
        pmt, pixel = self.detector.pmt_pixel(self.detector.active_channels)
        names = [f"{m}:{p}" for m, p in zip(pmt.tolist(), pixel.tolist(), strict=True)]
        vocab = {"<sos>": 0, **{name: index for index, name in enumerate(names, start=1)}}
        vocab.update({f"<unused:{index}>": index for index in range(len(names) + 1, self.space_eos_token_id)})
        vocab.update({"<eos>": self.space_eos_token_id, "<pad>": self.space_pad_token_id})
        return vocab

    @cached_property
    def _id_to_name(self) -> dict[int, str]:
        return {index: name for name, index in self._vocab.items()}

    def get_vocab(self) -> dict[str, int]:
        """Space vocabulary: "pmt:pixel" and the special tokens -> id."""
        return dict(self._vocab)

    def _tokenize(self, text, **kwargs):
        raise ValueError(f"{type(self).__name__} encodes tracks, not text; got {short_repr(text)}")

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._vocab.get(token)

    def _convert_id_to_token(self, index: int) -> str | None:
        return self._id_to_name.get(int(index))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Nothing to write: the vocabularies follow from tokenizer_config.json."""
        return ()

    # --- physics <-> tokens, element by element ----------------------------------------------------------------------

    def times_to_tokens(self, times: Any) -> np.ndarray:
        """Time bin numbers of arrival times, without validation.

        Args:
            times: ns, any shape.

        Returns:
            int64 of the same shape: 1..num_time_bins inside the range; 0 below `time_min`; num_time_bins + 1 at or
            above the last edge and for NaN. `__call__` lets no such time through.
        """
        return np.searchsorted(self.time_edges, np.asarray(times, dtype=np.float64), side="right")

    def tokens_to_times(self, tokens: Any, jitter: Any = 0.0, legacy: bool | None = None) -> np.ndarray:
        """Arrival times of time tokens, ns, float64, clipped to [time_min, time_max].

        Args:
            tokens: time tokens, any shape.
            jitter: displacement from the bin centre in units of a bin, -0.5..0.5.
            legacy: True for FM4DIRC's inverse, one bin later; None takes `legacy_time_decoding`.
        """
        offset = 0.5 if (self.legacy_time_decoding if legacy is None else legacy) else -0.5
        times = self.time_min + (np.asarray(tokens, dtype=np.float64) + offset + jitter) * self.time_resolution
        return np.clip(times, self.time_min, self.time_max)

    def pixels_to_tokens(self, pmt: Any, pixel: Any) -> np.ndarray:
        """Space tokens 1..num_space_tokens, int64; 0 for pixels of inactive PMTs.

        Raises:
            ValueError: an id is outside the geometry.
        """
        return self._channel_to_token[self.detector.channel(pmt, pixel)]

    def tokens_to_pixels(self, tokens: Any) -> tuple[np.ndarray, np.ndarray]:
        """(pmt, pixel), int64, of ordinary space tokens.

        Raises:
            ValueError: a token is not a pixel.
        """
        tokens = np.asarray(tokens)
        if tokens.size and (tokens.min() < 1 or tokens.max() > self.num_space_tokens):
            bad = tokens[(tokens < 1) | (tokens > self.num_space_tokens)].ravel()[0]
            raise ValueError(f"space token must be a pixel, 1..{self.num_space_tokens}, got {bad}")
        return self.detector.pmt_pixel(self.detector.active_channels[tokens - 1])

    def scale_kinematics(self, kinematics: Any) -> np.ndarray:
        """Maps physical conditioning values to [-1, 1]: 2 (k - min) / (max - min) - 1, float64.

        Args:
            kinematics: (..., number of conditioning quantities) in physical units.
        """
        low, high = np.asarray(self.conditioning_ranges, dtype=np.float64).T
        return 2.0 * (np.asarray(kinematics, dtype=np.float64) - low) / (high - low) - 1.0

    # --- encoding ----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        rows: Any,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        on_invalid: str = "error",
        check_nhits: bool = True,
        return_class_ids: bool | None = None,
        return_hit_labels: bool = False,
        return_row_index: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        **kwargs,
    ) -> BatchEncoding:
        """Encodes tracks.

        Args:
            rows: a list of records, a dict of columns, or one record (fields `pmtID`, `pixelID`, `leadTime` [ns],
                the conditioning columns, and where present `NHits`, `PDG` or `PID`, `is_noise`).
            padding: True or "longest", "max_length", or False for ragged output.
            truncation: True keeps the earliest `max_length - 1` positions from SOS on and appends EOS (as FM4DIRC);
                False makes a longer track invalid.
            max_length: longest sequence counted from SOS to EOS, conditioning slots excluded; default
                `model_max_length`. With padding="max_length" arrays are `max_length + num_conditioning_tokens` long.
            return_tensors: None, "np" or "pt"; a batch must then be padded.
            on_invalid: "error" raises one line on the first invalid value; "drop_hits" removes invalid hits (a track
                that this cannot repair is an error); "drop_tracks" removes invalid tracks. What is removed is counted
                by reason in `tokenizer.dropped` and logged once per call.
            check_nhits: False ignores a recorded `NHits` that disagrees with the lists.
            return_class_ids: None adds `class_ids` if the rows have `PDG` or `PID`; True requires it; False omits it.
            return_hit_labels: adds `labels` from `is_noise`: 0 or 1 at hits, -100 elsewhere.
            return_row_index: adds `row_index`, the input row of each encoded track.
            pad_to_multiple_of: rounds the array length up, slots included.
            padding_side: "right" or "left"; default the tokenizer's.

        Returns:
            `BatchEncoding` with
            - `input_ids` int64 (length, 2) per track, length = hits + 2 + num_conditioning_tokens; (length, 1) and
              `times` float32 (length,) scaled to [0, 1] in regression mode;
            - `attention_mask` int64 (length,);
            - `kinematics` float32 (conditioning quantities,) in physical units;
            - `class_ids` int64 (0 pion, 1 kaon by default);
            - with `stream_delays`, `labels` int64 (length, 2): the ids of the hits and the first EOS of each stream,
              -100 elsewhere.
            Batches are lists of arrays, or stacked arrays if padded; one record gives its arrays without batch axis
            unless `return_tensors` is set.

        Raises:
            ValueError: one line that names row, field, value and what was expected.
        """
        check_known(kwargs, ["verbose"])
        if on_invalid not in ("error", "drop_hits", "drop_tracks"):
            raise ValueError(f"on_invalid must be 'error', 'drop_hits' or 'drop_tracks', got {on_invalid!r}")
        strategy = padding_strategy(padding)
        truncate = truncation not in (False, None, "do_not_truncate")
        limit = self._limit(max_length)
        if return_hit_labels and any(self.stream_delays):
            raise ValueError("return_hit_labels needs stream_delays 0: with delays, labels are the next tokens")

        columns, count, single = rows_to_columns(rows)
        hits = self._read_hits(columns, count, on_invalid, check_nhits, return_class_ids, return_hit_labels)
        self._limit_hits(hits, limit, truncate, on_invalid)
        self._report(hits["reasons"])
        if single and not len(hits["row_index"]):
            raise ValueError(f"the record was dropped: {', '.join(hits['reasons'])}")

        data = self._build(hits, strategy, limit, pad_to_multiple_of, padding_side or self.padding_side)
        data["kinematics"] = hits["kinematics"].astype(np.float32)
        if hits["class_ids"] is not None:
            data["class_ids"] = hits["class_ids"]
        if return_row_index:
            data["row_index"] = hits["row_index"]
        if return_tensors is not None:
            return as_tensors(data, return_tensors)
        if single:
            data = {name: values[0] for name, values in data.items()}
        elif strategy is None:
            data = {name: list(values) if name == "kinematics" else values for name, values in data.items()}
        return BatchEncoding(data)

    @property
    def _shortest(self) -> int:
        """SOS, one hit, EOS, and what the latest stream stands behind."""
        return 3 + max(self.stream_delays)

    def _limit(self, max_length: int | None) -> int:
        return self.model_max_length if max_length is None else check_integer("max_length", max_length, self._shortest)

    def encode(self, rows: Any, **kwargs) -> Any:
        """`input_ids` of `__call__`."""
        return self(rows, **kwargs)["input_ids"]

    def _read_hits(self, columns, count, on_invalid, check_nhits, return_class_ids, return_hit_labels) -> dict:
        """Reads and validates; returns flat hit arrays sorted by (track, time) with the columns of the tracks."""
        reasons: Counter = Counter()
        row_index = np.arange(count)
        names = list(HIT_FIELDS) + (["is_noise"] if return_hit_labels else [])
        pdg_name = None if return_class_ids is False else pdg_column(columns)
        if return_class_ids and pdg_name is None and count:
            raise ValueError("column PDG is missing; class_ids were asked for")
        if not count:
            columns = {name: [] for name in (*names, *self.conditioning_names, *filter(None, [pdg_name]))}

        flat = {name: list_column(columns, name, count) for name in names}
        lengths = flat["pmtID"][1]
        unequal = np.zeros(count, dtype=bool)
        for name in names[1:]:
            unequal |= flat[name][1] != lengths
        if unequal.any():
            if on_invalid != "drop_tracks":
                row = int(np.argmax(unequal))
                sizes = ", ".join(f"{name} {flat[name][1][row]}" for name in names)
                raise ValueError(f"row {row}: hit lists differ in length: {sizes}; expected equal lengths")
            reasons["track:unequal_lengths"] += int(unequal.sum())
            row_index = row_index[~unequal]
            flat = {
                name: (values[np.repeat(~unequal, sizes)], sizes[~unequal]) for name, (values, sizes) in flat.items()
            }
            lengths = flat["pmtID"][1]
        values = {name: flat[name][0] for name in names}
        owner = np.repeat(np.arange(len(lengths)), lengths)

        keep = np.ones(len(lengths), dtype=bool)
        track_problems = []
        if check_nhits and "NHits" in columns:
            recorded = scalar_column(columns, "NHits", count)[row_index]
            problem = _Problem(
                "NHits",
                recorded != lengths,
                lambda i: (
                    f"row {row_index[i]}: NHits = {recorded[i]:g} but the hit lists have {lengths[i]} entries; "
                    "expected equal (check_nhits=False ignores NHits)"
                ),
            )
            if problem.mask.any():
                if on_invalid == "error":
                    raise problem.error()
                if on_invalid == "drop_hits":
                    reasons["repaired:NHits"] += int(problem.mask.sum())
                else:
                    track_problems.append(problem)

        kinematics = np.stack(
            [scalar_column(columns, name, count)[row_index] for name in self.conditioning_names] or [np.empty(0)],
            axis=-1,
        ).reshape(len(lengths), len(self.conditioning_names))
        for k, (name, (low, high)) in enumerate(zip(self.conditioning_names, self.conditioning_ranges, strict=True)):
            # A float32 column may store a bound rounded outwards.
            lowest, highest = min(low, float(np.float32(low))), max(high, float(np.float32(high)))
            column = kinematics[:, k]
            track_problems.append(
                _Problem(
                    name,
                    ~((column >= lowest) & (column <= highest)),
                    lambda i, name=name, low=low, high=high, column=column: (
                        f"row {row_index[i]}: {name} = {column[i]:g} is outside [{low:g}, {high:g}]"
                    ),
                )
            )
        class_ids = None
        if pdg_name is not None:
            codes = scalar_column(columns, pdg_name, count)[row_index]
            matches = np.abs(codes)[:, None] == np.asarray(self.class_pdg, dtype=np.float64)
            class_ids = np.argmax(matches, axis=1) if self.class_pdg else np.zeros(len(codes), dtype=np.int64)
            track_problems.append(
                _Problem(
                    pdg_name,
                    ~matches.any(axis=1),
                    lambda i: (
                        f"row {row_index[i]}: {pdg_name} = {codes[i]:g} is not a known class; "
                        f"expected +-{' or +-'.join(map(str, self.class_pdg))} (return_class_ids=False ignores it)"
                    ),
                )
            )
        for problem in track_problems:
            if problem.mask.any() and on_invalid != "drop_tracks":
                raise problem.error()
            new = problem.mask & keep
            if new.any():
                reasons[f"track:{problem.reason}"] += int(new.sum())
                keep &= ~new

        # Only hits of tracks that are still there count as problems.
        live = keep[owner]
        good = np.ones(len(owner), dtype=bool)
        tokens, hit_problems = self._check_hits(values, owner, lengths, row_index)
        for problem in hit_problems:
            new = problem.mask & live & good
            if not new.any():
                continue
            if on_invalid == "error":
                raise _Problem(problem.reason, new, problem.line).error()
            if on_invalid == "drop_hits":
                reasons[f"hit:{problem.reason}"] += int(new.sum())
            else:
                tracks = np.unique(owner[new])
                tracks = tracks[keep[tracks]]
                reasons[f"track:{problem.reason}"] += len(tracks)
                keep[tracks] = False
                live = keep[owner]
            good &= ~new

        sizes = np.bincount(owner[good], minlength=len(lengths)) if len(owner) else np.zeros_like(lengths)
        empty = (sizes == 0) & keep
        if empty.any():
            if on_invalid != "drop_tracks":
                i = int(np.argmax(empty))
                found = f"all {lengths[i]} hits are invalid" if lengths[i] else "the track has 0 hits"
                raise ValueError(f"row {row_index[i]}: {found}; expected at least 1")
            reasons["track:no_hits"] += int(empty.sum())
            keep &= ~empty

        select = good & keep[owner]
        new_owner = (np.cumsum(keep) - 1)[owner[select]]
        times = values["leadTime"][select]
        order = _time_order(times, sizes[keep])
        return {
            "reasons": reasons,
            "row_index": row_index[keep],
            "kinematics": kinematics[keep],
            "class_ids": None if class_ids is None else class_ids[keep].astype(np.int64),
            "lengths": sizes[keep],
            "owner": new_owner,
            "times": times[order],
            "tokens": tokens[select][order],
            "noise": values["is_noise"][select][order].astype(np.int64) if return_hit_labels else None,
        }

    def _check_hits(self, values, owner, lengths, row_index) -> tuple[np.ndarray, list[_Problem]]:
        """Space tokens (0 where invalid) and the invalid hits."""
        detector = self.detector
        starts = np.cumsum(lengths) - lengths

        def place(name, h):
            return f"row {row_index[owner[h]]}: {name}[{h - starts[owner[h]]}] = {values[name][h]:.9g}"

        problems = []
        ids = {}
        for name, upper in (("pmtID", detector.num_pmts * detector.num_boxes), ("pixelID", detector.pixels_per_pmt)):
            raw = values[name]
            valid = (raw >= 0) & (raw < upper)
            ids[name] = np.where(valid, raw, 0).astype(np.int64)
            valid &= ids[name] == raw
            problems.append(
                _Problem(
                    name,
                    ~valid,
                    lambda h, name=name, upper=upper: f"{place(name, h)} is not an integer in 0..{upper - 1}",
                )
            )
        pmt = ids["pmtID"] % detector.num_pmts if detector.num_boxes > 1 else ids["pmtID"]
        tokens = self._channel_to_token[pmt * detector.pixels_per_pmt + ids["pixelID"]]
        if detector.inactive_pmts:
            problems.append(
                _Problem(
                    "inactive_pmt",
                    tokens == 0,
                    lambda h: f"{place('pmtID', h)} is an inactive PMT; active ids are those not in inactive_pmts",
                )
            )
        times = values["leadTime"]
        problems.append(
            _Problem(
                "leadTime",
                ~((times >= self.time_min) & (times < self.time_max)),
                lambda h: f"{place('leadTime', h)} ns is outside [{self.time_min:g}, {self.time_max:g})",
            )
        )
        if "is_noise" in values:
            noise = values["is_noise"]
            problems.append(
                _Problem("is_noise", ~((noise == 0) | (noise == 1)), lambda h: f"{place('is_noise', h)} is not 0 or 1")
            )
        return tokens, problems

    def _limit_hits(self, hits: dict, limit: int, truncate: bool, on_invalid: str):
        """Applies the maximum length in place: hits are in time order, so the latest go."""
        lengths = hits["lengths"]
        # SOS, EOS and what the latest stream stands behind.
        extra = 2 + max(self.stream_delays)
        long = lengths + extra > limit
        if not long.any():
            return
        if truncate:
            rank = np.arange(len(hits["owner"])) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            select = rank < limit - extra
            hits["reasons"]["hit:truncated"] += int((~select).sum())
            hits["lengths"] = np.minimum(lengths, limit - extra)
        elif on_invalid == "drop_tracks":
            select = ~long[hits["owner"]]
            hits["reasons"]["track:too_many_hits"] += int(long.sum())
            hits["owner"] = (np.cumsum(~long) - 1)[hits["owner"]]
            hits["lengths"] = lengths[~long]
            for name in ("row_index", "kinematics", "class_ids"):
                hits[name] = None if hits[name] is None else hits[name][~long]
        else:
            i = int(np.argmax(long))
            raise ValueError(
                f"row {hits['row_index'][i]}: {lengths[i]} hits with SOS and EOS are {lengths[i] + extra} tokens; "
                f"expected at most {limit} (truncation=True keeps the earliest)"
            )
        for name in ("owner", "times", "tokens", "noise"):
            hits[name] = None if hits[name] is None else hits[name][select]

    def _report(self, reasons: Counter):
        self.dropped.update(reasons)
        loud = {reason: number for reason, number in reasons.items() if reason != "hit:truncated"}
        if loud:
            logger.warning("invalid input: " + ", ".join(f"{reason} x {number}" for reason, number in loud.items()))

    def _build(self, hits: dict, strategy: str | None, limit: int, multiple: int | None, side: str) -> dict:
        """Writes all tracks into one array, cut into views where the output is ragged."""
        check_side(side)
        lengths, slots = hits["lengths"], self.num_conditioning_tokens
        tokens = hits["tokens"][:, None]
        if self.time_encoding == "categorical":
            # The drifted last edge can lie below time_max by rounding; such a time belongs to the last bin.
            times = np.clip(self.times_to_tokens(hits["times"]), 1, self.num_time_bins)
            tokens = np.stack([hits["tokens"], times], axis=-1)
        eos = [self.space_eos_token_id, self.time_eos_token_id][: self.num_streams]
        ids, totals = delay_streams(tokens, lengths, self.stream_delays[: self.num_streams], 0, eos, slots, num_end=1)
        flat = {"input_ids": ids, "attention_mask": np.ones(len(ids), dtype=np.int64)}
        fills = {"input_ids": self._pad_ids, "attention_mask": 0, "times": self._time_sentinel("pad")}
        if self.time_encoding == "regression":
            times = (hits["times"] - self.time_min) / (self.time_max - self.time_min)
            times = times.astype(np.float32)[:, None]
            end = self._time_sentinel("eos")
            flat["times"] = delay_streams(times, lengths, [0], 0.0, end, slots, num_end=1)[0][:, 0]
        if hits["noise"] is not None:
            noise = hits["noise"][:, None]
            flat["labels"] = delay_streams(noise, lengths, [0], IGNORE_INDEX, IGNORE_INDEX, slots, num_end=1)[0][:, 0]
        elif any(self.stream_delays):
            # Hits and the first EOS are targets, what only fills the pattern is not.
            targets = np.insert(tokens, np.cumsum(lengths), eos, axis=0)
            flat["labels"], _ = delay_streams(
                targets, lengths + 1, self.stream_delays, IGNORE_INDEX, IGNORE_INDEX, slots
            )
        if strategy is None:
            return {name: split_rows(values, totals) for name, values in flat.items()}
        width = limit + slots if strategy == "max_length" else int(totals.max(initial=0))
        width = round_up(width, multiple)
        return {
            name: pad_rows(values, totals, width, side, fills.get(name, IGNORE_INDEX)) for name, values in flat.items()
        }

    @property
    def _pad_ids(self) -> list[int]:
        return [self.space_pad_token_id, self.time_pad_token_id][: self.num_streams]

    def _time_sentinel(self, kind: str) -> float:
        if not self.legacy_time_sentinels:
            return 0.0
        return float(self.time_eos_token_id if kind == "eos" else self.time_pad_token_id)

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
        """Pads encoded tracks to one length and stacks them; usable as collator through `DataCollatorWithPadding`.

        Args:
            encoded_inputs: list of feature dicts, or a dict of lists, of arrays, tensors or plain lists. `input_ids`
                is (length, streams) per track.
            padding: True or "longest", "max_length", or False (the lengths must then agree).
            max_length: counted from SOS, conditioning slots excluded, as in `__call__`.
            pad_to_multiple_of: rounds the array length up.
            padding_side: "right" or "left"; default the tokenizer's.
            return_tensors: None or "np" for numpy, "pt" for torch.

        Returns:
            `BatchEncoding`: `input_ids` int64 (batch, length, streams), each stream with its own pad id;
            `attention_mask` (batch, length), 0 at padding; `times` float32 (batch, length); `labels` padded by -100 if
            they have one entry per position, else stacked; every other key stacked, floats as float32.

        Raises:
            ValueError: a feature is missing, of the wrong shape, or longer than `max_length`.
        """
        limit = self.model_max_length if max_length is None else check_integer("max_length", max_length, 1)
        return pad_features(
            encoded_inputs,
            pad_ids=self._pad_ids,
            float_fills={"times": self._time_sentinel("pad")},
            strategy=padding_strategy(padding),
            max_positions=limit + self.num_conditioning_tokens,
            side=padding_side or self.padding_side,
            multiple=pad_to_multiple_of,
            return_attention_mask=return_attention_mask,
            return_tensors=return_tensors,
        )

    # --- decoding ----------------------------------------------------------------------------------------------------

    def batch_decode(
        self,
        sequences: Any,
        kinematics: Any = None,
        pdg: Any = None,
        rng: np.random.Generator | None = None,
        min_hits: int = 0,
        max_hits: int | None = None,
        times: Any = None,
        legacy: bool | None = None,
        class_ids: Any = None,
        skip_special_tokens: bool = True,
        **kwargs,
    ) -> dict[str, Any]:
        """Turns token sequences into tracks.

        A position is a hit if both of its tokens are ordinary (a pixel and a time bin); all others are left out, as in
        FM4DIRC.

        Args:
            sequences: (batch, length, streams) tensor or array, or a list of (length, streams); with or without the
                conditioning slots and padding.
            kinematics: (batch, conditioning quantities) or one such vector for all, physical units. None leaves NaN.
            pdg: PDG code per track, or one for all. None leaves -1, FM4DIRC's code for unknown.
            rng: draws each time uniformly within its bin; None gives the bin centre.
            min_hits, max_hits: tracks with fewer or more hits are left out (FM4DIRC: 5 and 250).
            times: regression mode only: (batch, length) scaled times.
            legacy: True decodes times one bin late as FM4DIRC; None takes `legacy_time_decoding`.
            class_ids: alternative to `pdg`: class per track, translated by `class_pdg`.

        Returns:
            Columns `P`, `Theta`, `Phi`, `PDG`, `NHits` as arrays (tracks,), the hit columns `pmtID`, `pixelID`,
            `channel`, `leadTime` [ns], `x`, `y` [mm] as lists of arrays, and `row_index`: the input sequence that each
            track came from. Times are float32 inside [time_min, time_max), so that the tracks can be encoded again;
            with `legacy` the last bin reaches time_max itself.

        Raises:
            ValueError: shapes disagree, or an id is outside its vocabulary.
        """
        check_known(kwargs, DECODING_SWITCHES)
        flat, lengths = flatten_ids(sequences, self.stream_vocab_sizes, self.stream_names)
        count = len(lengths)
        owner = np.repeat(np.arange(count), lengths)
        if any(self.stream_delays):
            ordinary = (flat >= 1) & (flat <= [self.num_space_tokens, self.num_time_bins])
            flat, complete = undelay_streams(flat, lengths, self.stream_delays, ordinary)
            flat[~complete] = 0
        space = flat[:, 0]
        hit = (space >= 1) & (space <= self.num_space_tokens)
        if self.time_encoding == "categorical":
            if times is not None:
                raise ValueError("times belongs to time_encoding='regression'; this tokenizer reads time tokens")
            hit &= (flat[:, 1] >= 1) & (flat[:, 1] <= self.num_time_bins)
        else:
            if times is None:
                raise ValueError("time_encoding='regression' needs times, one scaled time per position")
            scaled = flatten_floats(times, lengths, "times")
            if not np.isfinite(scaled[hit]).all():
                row = owner[hit][~np.isfinite(scaled[hit])][0]
                raise ValueError(f"row {row}: times has a value that is not finite")
        numbers = np.bincount(owner[hit], minlength=count) if count else np.zeros(0, dtype=np.int64)
        keep = numbers >= min_hits
        if max_hits is not None:
            keep &= numbers <= max_hits
        hit &= keep[owner]

        legacy = self.legacy_time_decoding if legacy is None else legacy
        if self.time_encoding == "categorical":
            jitter = rng.random(int(hit.sum())) - 0.5 if rng is not None else 0.0
            lead_time = self.tokens_to_times(flat[hit, 1], jitter, legacy)
        else:
            lead_time = self.time_min + scaled[hit] * (self.time_max - self.time_min)
        lead_time = self._fit_float32(lead_time, legacy)
        channel = self.detector.active_channels[space[hit] - 1]
        pmt, pixel = self.detector.pmt_pixel(channel)
        x, y = self.detector.pixel_center(pmt, pixel)

        row_index = np.flatnonzero(keep)
        numbers = numbers[keep]
        columns = self._track_columns(kinematics, pdg, class_ids, count, row_index)
        columns["NHits"] = numbers.astype(np.int32)
        for name, values, dtype in (
            ("pmtID", pmt, np.int16),
            ("pixelID", pixel, np.int16),
            ("channel", channel, np.int32),
            ("leadTime", lead_time, np.float32),
            ("x", x, np.float32),
            ("y", y, np.float32),
        ):
            columns[name] = split_rows(values.astype(dtype), numbers)
        columns["row_index"] = row_index
        return columns

    def decode(self, token_ids: Any, skip_special_tokens: bool = True, **kwargs) -> dict[str, Any]:
        """One sequence (length, streams) -> one record; takes the arguments of `batch_decode`.

        A batch (batch, length, streams) is passed on to `batch_decode`.
        """
        array = to_numpy(token_ids) if not isinstance(token_ids, (list, tuple)) else None
        if array is None:
            try:
                array = np.asarray(token_ids)
            except ValueError:  # ragged: a batch
                return self.batch_decode(token_ids, **kwargs)
        if array.ndim == 3:
            return self.batch_decode(array, **kwargs)
        if kwargs.get("times") is not None:
            kwargs["times"] = to_numpy(kwargs["times"])[None]
        columns = self.batch_decode(array[None], **kwargs)
        columns.pop("row_index")
        if not len(columns["NHits"]):
            raise ValueError("the sequence has a number of hits outside min_hits..max_hits")
        return {
            name: values[0].item() if isinstance(values, np.ndarray) else values[0] for name, values in columns.items()
        }

    def _fit_float32(self, times: np.ndarray, legacy: bool) -> np.ndarray:
        """float32 times that stay inside the half-open range in spite of rounding."""
        low, high = np.float32(self.time_min), np.float32(self.time_max)
        if low < self.time_min:
            low = np.nextafter(low, np.float32(np.inf))
        if high >= self.time_max and not legacy:
            high = np.nextafter(high, np.float32(-np.inf))
        return np.clip(times.astype(np.float32), low, high)

    def _track_columns(self, kinematics, pdg, class_ids, count: int, row_index: np.ndarray) -> dict[str, np.ndarray]:
        columns = {
            "P": np.full(len(row_index), np.nan, dtype=np.float32),
            "Theta": np.full(len(row_index), np.nan, dtype=np.float32),
            "Phi": np.zeros(len(row_index), dtype=np.float32),
        }
        size = len(self.conditioning_names)
        if kinematics is not None:
            values = to_numpy(kinematics).astype(np.float64)
            if values.shape not in ((count, size), (size,)):
                raise ValueError(f"kinematics must have shape ({count}, {size}) or ({size},), got {values.shape}")
            values = np.broadcast_to(values, (count, size))[row_index]
            for k, name in enumerate(self.conditioning_names):
                columns[name] = values[:, k].astype(np.float32)
        if class_ids is not None:
            if pdg is not None:
                raise ValueError("give either pdg or class_ids, not both")
            classes = to_numpy(class_ids)
            if classes.shape not in ((), (count,)) or classes.size and classes.dtype.kind not in "iu":
                raise ValueError(
                    f"class_ids must be one integer or {count} of them, got {classes.dtype} of shape {classes.shape}"
                )
            classes = np.broadcast_to(classes, (count,))
            if classes.size and (classes.min() < 0 or classes.max() >= len(self.class_pdg)):
                raise ValueError(f"class_ids must be in 0..{len(self.class_pdg) - 1}, got {short_repr(class_ids)}")
            pdg = np.asarray(self.class_pdg)[classes.astype(np.int64)]
        codes = to_numpy(-1 if pdg is None else pdg)
        if codes.shape not in ((), (count,)) or codes.dtype.kind not in "iu":
            raise ValueError(f"pdg must be one integer or {count} of them, got {codes.dtype} of shape {codes.shape}")
        columns["PDG"] = np.broadcast_to(codes, (count,))[row_index].astype(np.int32)
        return columns


# ---------------------------------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------------------------------


def _time_order(times: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Stable order by time within each track. One short sort per track is five times as fast as one lexsort."""
    order = np.empty(len(times), dtype=np.int64)
    ends = np.cumsum(lengths)
    for start, end in zip((ends - lengths).tolist(), ends.tolist(), strict=True):
        order[start:end] = times[start:end].argsort(kind="stable") + start
    return order


# `save_pretrained` then writes this code beside the settings, so that they load anywhere with `trust_remote_code=True`
CMHCADircTokenizer.register_for_auto_class("AutoTokenizer")
