"""Tokenizer of OmniJet (arXiv:2403.05618): jets or calorimeter showers <-> one id per constituent.

The features of the constituents are transformed, a VQ-VAE gives each constituent a code in 0..K - 1, and the sequence
is <bos>, code + 1 of every constituent, <eos>. Ids of a codebook of K codes:

    0 <bos>, 1..K codes, K + 1 <eos>, K + 2 <pad>        published models have no <pad>: 0 pads too

The VQ-VAE belongs to the tokenizer: `save_pretrained` writes it into the folder `vqvae` beside the settings.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizer
from transformers.utils import logging

from .batching import (
    as_tensors,
    check_integer,
    check_side,
    flatten_ids,
    pad_features,
    pad_rows,
    padding_strategy,
    round_up,
    split_rows,
)
from .jet_features import (
    FOUR_MOMENTUM,
    KINEMATICS,
    constituent_features,
    four_momenta,
    inverse_transform,
    jet_columns,
    make_features,
    momentum_features,
    source_fields,
    sum_jets,
    transform,
    wrap_phi,
)
from .records_dirc import list_column, scalar_column, short_repr, to_numpy

logger = logging.get_logger(__name__)

# the classes of JetClass (arXiv:2202.03772) in the order of the published models
LABEL_NAMES = (
    "label_QCD",
    "label_Hbb",
    "label_Hcc",
    "label_Hgg",
    "label_H4q",
    "label_Hqql",
    "label_Zqq",
    "label_Wqq",
    "label_Tbqq",
    "label_Tbl",
)
VQVAE_FOLDER = "vqvae"
# positions that go through the VQ-VAE at a time, padding included: on a CPU no more than its cache holds
MAX_POSITIONS = 2**15
MAX_POSITIONS_CPU = 2**12
# features that are never negative
NON_NEGATIVE = ("part_pt", "part_mass", "part_energy", "energy")
# what is left out on request, in contrast to invalid input
_REQUESTED = ("constituent:truncated", "constituent:cut")


class OmniJetTokenizer(PreTrainedTokenizer):
    """Turns jets into the ids of OmniJet and back (arXiv:2403.05618), with the VQ-VAE that it owns.

    Args:
        features: the input channels in order: a mapping of names to arguments of `JetFeature`, or a list of such
            arguments with a `name`; default those of OmniJet-alpha. A name is a column of the rows (a list per jet), or
            one that follows from the four-momenta `part_px`, `part_py`, `part_pz`, `part_energy`: part_pt, part_eta,
            part_phi, part_mass, part_ptrel, part_erel, part_etarel, part_phirel, part_deltaR.
        vqvae: an `OmniJetVQVAEModel`. Without it, the one in the folder that the tokenizer was loaded from.
        codebook_size (`int`): number of codes K; default that of `vqvae`, or 8192.
        separate_pad_id (`bool`): padding has an id of its own; `False` for published models, which pad by `<bos>`.
        sorting (`str`, *optional*): feature by which the constituents are sorted, falling; "random"; default the order
            of the rows.
        seed (`int`): of the random order.
        label_names: columns of the one-hot class labels; the class id is the place in this list.
        model_max_length (`int`): largest number of constituents.
    """

    model_input_names = ["input_ids", "attention_mask"]
    vocab_files_names: dict[str, str] = {}

    def __init__(
        self,
        features: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        vqvae: Any = None,
        codebook_size: int | None = None,
        separate_pad_id: bool = True,
        sorting: str | None = None,
        seed: int = 0,
        label_names: Sequence[str] = LABEL_NAMES,
        model_max_length: int = 128,
        **kwargs,
    ):
        self._features = make_features(features)
        # Attributes named like init keywords are what save_pretrained writes: plain JSON values only.
        # A list, because the keys of a mapping are saved in alphabetical order.
        self.features = [feature.settings() for feature in self._features]
        self.feature_names = [feature.name for feature in self._features]
        if vqvae is not None and not hasattr(vqvae, "config"):
            raise ValueError(f"vqvae must be an OmniJetVQVAEModel, got {short_repr(vqvae)}")
        if codebook_size is None:
            codebook_size = 8192 if vqvae is None else vqvae.config.codebook_size
        self.codebook_size = check_integer("codebook_size", codebook_size, 2)
        if not isinstance(separate_pad_id, bool):
            raise ValueError(f"separate_pad_id must be True or False, got {short_repr(separate_pad_id)}")
        self.separate_pad_id = separate_pad_id
        if sorting not in (None, "random", *self.feature_names):
            raise ValueError(
                f"sorting must be None, 'random' or one of {', '.join(self.feature_names)}, got {sorting!r}"
            )
        self.sorting = sorting
        self.seed = check_integer("seed", seed, 0)
        if isinstance(label_names, str) or not isinstance(label_names, Sequence):
            raise ValueError(f"label_names must be a list of names, got {short_repr(label_names)}")
        self.label_names = [str(name) for name in label_names]
        if len(set(self.label_names)) != len(self.label_names):
            raise ValueError(f"label_names must differ, got {self.label_names}")
        self.dropped: Counter = Counter()
        self._generator: np.random.Generator | None = None
        self._vqvae = None
        self._source: dict[str, Any] | None = None
        if vqvae is not None:
            self.vqvae = vqvae

        # an id is special by its place, so names cannot be chosen
        kwargs.update(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>" if self.separate_pad_id else "<bos>")
        super().__init__(
            features=self.features,
            codebook_size=self.codebook_size,
            separate_pad_id=self.separate_pad_id,
            sorting=self.sorting,
            seed=self.seed,
            label_names=self.label_names,
            model_max_length=check_integer("model_max_length", model_max_length, 1),
            **kwargs,
        )

    def __getstate__(self):
        # Counts of what was dropped and drawn random numbers must not change the fingerprint that datasets.map takes
        # of its function.
        return {**self.__dict__, "dropped": Counter(), "_generator": None}

    # --- the VQ-VAE --------------------------------------------------------------------------------------------------

    @property
    def vqvae(self) -> Any:
        """The VQ-VAE, in evaluation mode; move it to run on another device: `tokenizer.vqvae.to("cuda")`."""
        if self._vqvae is None:
            self.vqvae = self._load_vqvae()
        return self._vqvae

    @vqvae.setter
    def vqvae(self, model: Any):
        for name, expected in (("num_features", len(self._features)), ("codebook_size", self.codebook_size)):
            if getattr(model.config, name) != expected:
                raise ValueError(f"vqvae has {name} = {getattr(model.config, name)}, but the tokenizer has {expected}")
        self._vqvae = model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *inputs, **kwargs):
        """As that of `PreTrainedTokenizer`. The VQ-VAE comes later, from the same folder or revision."""
        tokenizer = super().from_pretrained(pretrained_model_name_or_path, *inputs, **kwargs)
        options = ("subfolder", "revision", "cache_dir", "token", "local_files_only")
        is_folder = Path(pretrained_model_name_or_path).is_dir()
        tokenizer._source = {
            # the working directory may change before the VQ-VAE is needed
            "name": str(Path(pretrained_model_name_or_path).resolve() if is_folder else pretrained_model_name_or_path),
            **{name: kwargs[name] for name in options if kwargs.get(name) is not None},
        }
        return tokenizer

    def _vqvae_folder(self) -> Path | None:
        """Where the VQ-VAE lies that was saved with the tokenizer; `None` if it was saved without."""
        if self._source is None:
            return None
        options = dict(self._source)
        root, inside = Path(options.pop("name")), Path(options.pop("subfolder", "")) / VQVAE_FOLDER
        if not root.is_dir():
            from huggingface_hub import snapshot_download

            try:
                patterns = f"{inside.as_posix()}/*"
                root = Path(snapshot_download(self._source["name"], allow_patterns=patterns, **options))
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"{self.name_or_path}: cannot get the folder {VQVAE_FOLDER} ({reason})") from None
        return root / inside if (root / inside / "config.json").is_file() else None

    def _load_vqvae(self) -> Any:
        from transformers import AutoModel

        if self._source is None:
            raise ValueError("the tokenizer has no VQ-VAE; give it one: OmniJetTokenizer(vqvae=model)")
        folder = self._vqvae_folder()
        if folder is None:
            raise ValueError(f"{self.name_or_path}: no VQ-VAE in the folder {VQVAE_FOLDER}")
        # code that came with the tokenizer was trusted when the tokenizer was loaded
        trust = True if __name__.startswith("transformers_modules.") else None
        try:
            return AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{self.name_or_path}: no VQ-VAE in the folder {VQVAE_FOLDER} ({reason})") from None

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes the VQ-VAE, which is the vocabulary, into the folder `vqvae`."""
        if self._vqvae is None and self._vqvae_folder() is None:
            return ()
        folder = Path(save_directory) / VQVAE_FOLDER
        self.vqvae.save_pretrained(folder)
        return tuple(str(path) for path in sorted(folder.iterdir()))

    # --- vocabulary --------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        return self.codebook_size + (3 if self.separate_pad_id else 2)

    @property
    def prefix_length(self) -> int:
        """Leading positions that are never a target: the beginning of the sequence."""
        return 1

    def get_vocab(self) -> dict[str, int]:
        """Number of the code, `<bos>`, `<eos>`, `<pad>` -> id."""
        return {self._convert_id_to_token(index): index for index in range(self.vocab_size)}

    def _tokenize(self, text, **kwargs):
        raise ValueError(f"{type(self).__name__} encodes jets, not text; got {short_repr(text)}")

    def _convert_token_to_id(self, token: str) -> int | None:
        special = {"<bos>": 0, "<eos>": self.codebook_size + 1}
        if self.separate_pad_id:
            special["<pad>"] = self.codebook_size + 2
        if token in special:
            return special[token]
        is_code = token.isascii() and token.isdigit() and str(int(token)) == token and int(token) < self.codebook_size
        return int(token) + 1 if is_code else None

    def _convert_id_to_token(self, index: int) -> str | None:
        index = int(index)
        if not 0 <= index < self.vocab_size:
            return None
        special = {0: "<bos>", self.codebook_size + 1: "<eos>", self.codebook_size + 2: "<pad>"}
        return special.get(index, str(index - 1))

    # --- encoding ----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        rows: Any,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        on_invalid: str = "error",
        return_class_ids: bool | None = None,
        return_particle_features: bool = False,
        return_input_ids: bool = True,
        return_row_index: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        **kwargs,
    ) -> BatchEncoding:
        """Encodes jets.

        Args:
            rows: a list of records, a dict of columns, or one record, with the fields of `features` (see the class).
                Constituents that a `larger_than` or `smaller_than` of a feature excludes are left out and counted.
            padding: True or "longest", "max_length", or False for ragged output.
            truncation: True keeps the first `max_length` constituents in sorting order and counts the others; False
                makes a longer jet invalid.
            max_length: largest number of constituents; default `model_max_length`.
            return_tensors: None, "np" or "pt"; a batch must then be padded.
            on_invalid: "error" raises one line on the first invalid value; "drop_constituents" removes invalid
                constituents (a jet that this cannot repair is an error); "drop_jets" removes invalid jets. What is
                removed is counted by reason in `tokenizer.dropped` and logged once per call.
            return_class_ids: None adds `class_ids` if the rows have all or some of the columns `label_names`; True
                requires them; False omits it.
            return_particle_features: adds `particle_features`, what the VQ-VAE sees.
            return_input_ids: False leaves out `input_ids`, and needs no VQ-VAE: to train one. The positions are then
                the constituents alone.
            return_row_index: adds `row_index`, the input row of each encoded jet.
            pad_to_multiple_of: rounds the array length up.
            padding_side: "right" or "left"; default the tokenizer's.

        Returns:
            `BatchEncoding` with
            - `input_ids` int64 (length,) per jet, length = constituents + 2;
            - `attention_mask` int64 (length,);
            - `particle_features` float32 (length, features), transformed, 0 at `<bos>`, `<eos>` and padding;
            - `class_ids` int64.
            Batches are lists of arrays, or stacked arrays if padded; one record gives its arrays without batch axis
            unless `return_tensors` is set.

        Raises:
            ValueError: one line that names row, field, value and what was expected.
        """
        for name, value in kwargs.items():
            if value is not None and name != "verbose":
                raise ValueError(f"unknown argument {name!r}")
        if on_invalid not in ("error", "drop_constituents", "drop_jets"):
            raise ValueError(f"on_invalid must be 'error', 'drop_constituents' or 'drop_jets', got {on_invalid!r}")
        strategy = padding_strategy(padding)
        side = check_side(padding_side or self.padding_side)
        truncate = truncation not in (False, None, "do_not_truncate")
        limit = self._max_constituents(max_length)

        columns, count, single = jet_columns(rows, self.feature_names)
        jets = self._read_jets(columns, count, on_invalid, limit, truncate, return_class_ids)
        self._report(jets["reasons"])
        lengths = jets["lengths"]
        if single and not len(lengths):
            raise ValueError(f"the record was dropped: {', '.join(jets['reasons'])}")

        flat, fills = {}, {"input_ids": self.pad_token_id, "attention_mask": 0, "particle_features": 0}
        num_special = 0
        if return_input_ids:
            num_special = 2
            ids = self._encode(jets["values"], lengths) + 1
            # position of each constituent once <bos> and <eos> stand around every jet
            places = np.arange(len(ids)) + 2 * np.repeat(np.arange(len(lengths)), lengths) + 1
            ends = np.cumsum(lengths + 2)
            flat["input_ids"] = np.zeros(len(ids) + 2 * len(lengths), dtype=np.int64)
            flat["input_ids"][places] = ids
            flat["input_ids"][ends - 1] = self.eos_token_id
        else:
            places = np.arange(len(jets["values"]))
        totals = lengths + num_special
        flat["attention_mask"] = np.ones(totals.sum(), dtype=np.int64)
        if return_particle_features or not return_input_ids:
            flat["particle_features"] = np.zeros((totals.sum(), len(self._features)), dtype=np.float32)
            flat["particle_features"][places] = jets["values"]

        if strategy is None:
            data = {name: split_rows(values, totals) for name, values in flat.items()}
        else:
            width = limit + num_special if strategy == "max_length" else int(totals.max(initial=0))
            width = round_up(width, pad_to_multiple_of)
            data = {name: pad_rows(values, totals, width, side, fills[name]) for name, values in flat.items()}
        for name, wanted in (("class_ids", True), ("row_index", return_row_index)):
            if wanted and jets[name] is not None:
                data[name] = jets[name]
        if return_tensors is not None:
            return as_tensors(data, return_tensors)
        if single:
            data = {name: values[0] for name, values in data.items()}
        elif strategy is None and "class_ids" in data:
            data["class_ids"] = list(data["class_ids"])
        return BatchEncoding(data)

    def encode(self, rows: Any, **kwargs) -> Any:
        """`input_ids` of `__call__`."""
        return self(rows, **kwargs)["input_ids"]

    def _max_constituents(self, max_length: int | None) -> int:
        return self.model_max_length if max_length is None else check_integer("max_length", max_length, 1)

    def _read_jets(
        self, columns, count: int, on_invalid: str, limit: int, truncate: bool, return_class_ids: bool | None
    ) -> dict[str, Any]:
        """Reads, validates, cuts, sorts and transforms; returns flat arrays of the constituents of all jets."""
        reasons: Counter = Counter()
        row_index = np.arange(count)
        names = list(dict.fromkeys(field for name in self.feature_names for field in source_fields(name, columns)))
        flat = {name: list_column(columns, name, count) for name in names}
        sizes = np.stack([flat[name][1] for name in names])
        equal = (sizes == sizes[0]).all(axis=0)
        if not equal.all():
            if on_invalid != "drop_jets":
                row = int(np.argmin(equal))
                found = ", ".join(f"{name} {size}" for name, size in zip(names, sizes[:, row], strict=True))
                raise ValueError(f"row {row}: lists differ in length: {found}; expected equal lengths")
            reasons["jet:unequal_lengths"] += int((~equal).sum())
            row_index = row_index[equal]
            flat = {name: (values[np.repeat(equal, size)], size[equal]) for name, (values, size) in flat.items()}
        lengths = flat[names[0]][1]
        starts = np.cumsum(lengths) - lengths
        owner = np.repeat(np.arange(len(lengths)), lengths)
        keep = np.ones(len(lengths), dtype=bool)
        good = np.ones(len(owner), dtype=bool)

        def reject_jets(bad, reason, line):
            bad = bad & keep
            if not bad.any():
                return
            if on_invalid != "drop_jets":
                raise ValueError(line(int(np.argmax(bad))))
            reasons[f"jet:{reason}"] += int(bad.sum())
            keep[bad] = False

        def reject_constituents(bad, name, values, expected):
            bad = bad & good & keep[owner]
            if not bad.any():
                return
            if on_invalid == "error":
                h = int(np.argmax(bad))
                place = f"row {row_index[owner[h]]}: {name}[{h - starts[owner[h]]}]"
                raise ValueError(f"{place} = {values[h]:.9g} {expected}")
            if on_invalid == "drop_constituents":
                reasons[f"constituent:{name}"] += int(bad.sum())
                good[bad] = False
            else:
                jets = np.unique(owner[bad])
                reasons[f"jet:{name}"] += len(jets)
                keep[jets] = False

        for name in names:
            values = flat[name][0]
            reject_constituents(~np.isfinite(values), name, values, "is not a finite number")
            if name in NON_NEGATIVE:
                reject_constituents(values < 0, name, values, "is negative, expected 0 or more")
        # derived quantities of a jet follow from its valid constituents
        usable = good & keep[owner]
        derived = {}
        if any(name not in flat for name in self.feature_names):
            momenta = np.stack([np.where(usable, flat[name][0], 0.0) for name in FOUR_MOMENTUM], axis=-1)
            derived = constituent_features(momenta, lengths)
        values = np.stack(
            [flat[name][0] if name in flat else derived[name] for name in self.feature_names], axis=-1
        ).reshape(-1, len(self._features))
        for k, name in enumerate(self.feature_names):
            reject_constituents(
                ~np.isfinite(values[:, k]), name, values[:, k], "does not follow from the four-momentum"
            )
        inside = np.ones(len(owner), dtype=bool)
        for k, feature in enumerate(self._features):
            inside &= feature.passes(values[:, k])
        reasons["constituent:cut"] += int((~inside & good & keep[owner]).sum())
        good &= inside
        transformed = transform(self._features, values) if len(values) else values
        with np.errstate(over="ignore"):
            transformed = transformed.astype(np.float32)
        for k, feature in enumerate(self._features):
            reject_constituents(
                ~np.isfinite(transformed[:, k]), feature.name, values[:, k], "is outside the domain of its transform"
            )

        numbers = np.bincount(owner[good], minlength=len(lengths))
        reject_jets(
            numbers == 0,
            "empty",
            lambda i: f"row {row_index[i]}: none of {lengths[i]} constituents is left; expected at least 1",
        )
        if not truncate:
            reject_jets(
                numbers > limit,
                "too_many_constituents",
                lambda i: (
                    f"row {row_index[i]}: {numbers[i]} constituents; expected at most {limit} (truncation=True keeps "
                    "the first in sorting order)"
                ),
            )
        class_ids = self._class_ids(columns, count, return_class_ids)
        if class_ids is not None:
            class_ids = class_ids[row_index]
            reject_jets(
                class_ids < 0,
                "label",
                lambda i: f"row {row_index[i]}: not exactly one of {', '.join(self.label_names)} is 1",
            )

        good &= keep[owner]
        numbers = numbers[keep]
        values, transformed, owner = values[good], transformed[good], owner[good]
        order = self._order(values, owner)
        if (numbers > limit).any():
            rank = np.arange(len(order)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
            reasons["constituent:truncated"] += int((rank >= limit).sum())
            order = order[rank < limit]
            numbers = np.minimum(numbers, limit)
        return {
            "reasons": +reasons,
            "row_index": row_index[keep],
            "class_ids": None if class_ids is None else class_ids[keep],
            "lengths": numbers,
            "values": transformed[order],
        }

    def _order(self, values: np.ndarray, owner: np.ndarray) -> np.ndarray:
        """Permutation (constituents,) that sorts inside each jet; stable."""
        if self.sorting is None:
            return np.arange(len(owner))
        if self.sorting == "random":
            if self._generator is None:
                self._generator = np.random.default_rng(self.seed)
            return np.lexsort([self._generator.random(len(owner)), owner])
        return np.lexsort([-values[:, self.feature_names.index(self.sorting)], owner])

    def _class_ids(self, columns, count: int, wanted: bool | None) -> np.ndarray | None:
        """Class of each row, -1 where not exactly one label is 1; `None` if there are no labels, or not wanted."""
        present = [name for name in self.label_names if name in columns]
        if wanted is False or not (present or wanted):
            return None
        if not present:
            raise ValueError(f"columns {', '.join(self.label_names)} are missing; class_ids were asked for")
        labels = np.zeros((count, len(self.label_names)))
        for name in present:
            flags = [float(value) if isinstance(value, (bool, np.bool_)) else value for value in columns[name]]
            labels[:, self.label_names.index(name)] = scalar_column({name: flags}, name, count)
        is_one_hot = ((labels == 0) | (labels == 1)).all(axis=1) & (labels.sum(axis=1) == 1)
        return np.where(is_one_hot, labels.argmax(axis=1), -1)

    def _report(self, reasons: Counter):
        self.dropped.update(reasons)
        loud = {reason: number for reason, number in reasons.items() if reason not in _REQUESTED}
        if loud:
            logger.warning("invalid input: " + ", ".join(f"{reason} x {number}" for reason, number in loud.items()))

    def _batches(self, lengths: np.ndarray, max_positions: int):
        """Rows of similar length, (rows,) each, at most so many positions; rows of length 0 are in none."""
        order = np.argsort(lengths, kind="stable")
        order = order[lengths[order] > 0]
        while len(order):
            # from the longest: the last row sets the width
            size = max(1, max_positions // int(lengths[order[-1]]))
            yield order[-size:]
            order = order[:-size]

    def _run_vqvae(self, function: str, flat: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """`encode` or `decode` of the VQ-VAE over rows that lie end to end."""
        import torch

        vqvae = self.vqvae
        vqvae.eval()
        rows = split_rows(flat, lengths)
        results: list = [None] * len(rows)
        with torch.inference_mode():
            max_positions = MAX_POSITIONS_CPU if vqvae.device.type == "cpu" else MAX_POSITIONS
            for batch in self._batches(lengths, max_positions):
                sizes = lengths[batch]
                width = int(sizes.max())
                padded = pad_rows(np.concatenate([rows[row] for row in batch]), sizes, width, "right", 0)
                mask = torch.from_numpy(np.arange(width) < sizes[:, None]).to(vqvae.device)
                found = getattr(vqvae, function)(torch.from_numpy(padded).to(vqvae.device), mask)
                found = found.float().cpu().numpy() if found.is_floating_point() else found.cpu().numpy()
                for row, size, values in zip(batch, sizes, found, strict=True):
                    results[row] = values[:size]
        results = [values for values in results if values is not None]
        if results:
            return np.concatenate(results)
        return np.zeros((0, len(self._features)), dtype=np.float32) if function == "decode" else np.zeros(0, np.int64)

    def _encode(self, values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Codes (constituents,) of transformed features (constituents, features)."""
        return self._run_vqvae("encode", values, lengths)

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
        """Pads encoded jets to one length and stacks them; usable as collator through `DataCollatorWithPadding`.

        Args:
            encoded_inputs: list of feature dicts, or a dict of lists, of arrays, tensors or plain lists, with
                `input_ids` (length,) or `particle_features` (length, features) per jet, or both.
            padding: True or "longest", "max_length", or False (the lengths must then agree).
            max_length: number of constituents that "max_length" makes room for, as in `__call__`.
            pad_to_multiple_of: rounds the array length up.
            padding_side: "right" or "left"; default the tokenizer's.
            return_tensors: None or "np" for numpy, "pt" for torch.

        Returns:
            `BatchEncoding`: `input_ids`, `attention_mask` int64 (batch, length), `particle_features` float32 (batch,
            length, features), 0 at padding; every other key stacked.

        Raises:
            ValueError: a feature is missing, of the wrong shape, or longer than `max_length`.
        """
        if isinstance(encoded_inputs, Mapping):
            names = list(encoded_inputs)
            encoded_inputs = [
                dict(zip(names, values)) for values in zip(*(encoded_inputs[name] for name in names), strict=True)
            ]
        encoded_inputs = [dict(row) for row in encoded_inputs]
        has_ids = any("input_ids" in row for row in encoded_inputs)
        if not has_ids:
            for index, row in enumerate(encoded_inputs):
                if "particle_features" not in row:
                    raise ValueError(f"feature {index}: expected input_ids or particle_features, got {sorted(row)}")
                length = len(row["particle_features"])
                row["input_ids"] = np.zeros(length, dtype=np.int64)
                row.setdefault("attention_mask", np.ones(length, dtype=np.int64))
        # without a mask, the padding id alone cannot tell padding from <bos>
        for row in encoded_inputs:
            if "input_ids" in row and "attention_mask" not in row:
                row["attention_mask"] = np.ones(len(row["input_ids"]), dtype=np.int64)
        data = dict(
            pad_features(
                encoded_inputs,
                pad_ids=[self.pad_token_id],
                float_fills={"particle_features": 0.0},
                strategy=padding_strategy(padding),
                max_positions=self._max_constituents(max_length) + 2 * has_ids,
                side=padding_side or self.padding_side,
                multiple=pad_to_multiple_of,
                return_attention_mask=return_attention_mask,
                return_tensors=None,
            )
        )
        ids = data.pop("input_ids")
        if has_ids:
            data = {"input_ids": ids[..., 0], **data}
        return as_tensors(data, return_tensors) if return_tensors is not None else BatchEncoding(data)

    # --- decoding ----------------------------------------------------------------------------------------------------

    def batch_decode(
        self,
        sequences: Any,
        jet_eta: Any = None,
        jet_phi: Any = None,
        skip_special_tokens: bool = True,
        **kwargs,
    ) -> dict[str, Any]:
        """Turns ids into jets.

        A jet is what stands between the leading `<bos>` (and padding) and the first id that is no code; without
        `<eos>`, all codes.

        Args:
            sequences: (batch, length) tensor or array, or a list of (length,), or the output of `generate()`.
            jet_eta, jet_phi: axis of each jet, (batch,) or one for all; None leaves the jets at eta = phi = 0.

        Returns:
            Columns, one row per sequence:
            - the features as lists of float32 arrays, e.g. `part_pt` [GeV/c], `part_etarel`, `part_phirel`;
            - with these three, the constituents `part_px`, `part_py`, `part_pz`, `part_energy` [GeV] around the axis,
              massless unless there is a `part_mass`, and the jet that they add up to: `jet_pt`, `jet_eta`, `jet_phi`,
              `jet_energy`, `jet_mass` float32 (batch,), 0 for jets without constituents;
            - `num_constituents` int32 (batch,) and `row_index`.

        Raises:
            ValueError: a wrong shape, an id outside the vocabulary, or a feature that is not finite.
        """
        sequences = getattr(sequences, "sequences", sequences)
        if not hasattr(sequences, "__iter__") or getattr(sequences, "ndim", 2) == 0:
            raise ValueError(f"sequences must be ids of shape (batch, length), got {short_repr(sequences)}")
        ids, lengths = flatten_ids(sequences, [self.vocab_size], ["token"])
        ids = ids[:, 0]
        count = len(lengths)
        owner = np.repeat(np.arange(count), lengths)
        is_code = (ids > 0) & (ids <= self.codebook_size)
        # the first run of codes: behind its start nothing but codes has come
        first = np.full(count, len(ids))
        np.minimum.at(first, owner[is_code], np.flatnonzero(is_code))
        first_end = np.full(count, len(ids))
        position = np.arange(len(ids))
        is_end = ~is_code & ((position > first[owner]) | (ids == self.eos_token_id))
        np.minimum.at(first_end, owner[is_end], np.flatnonzero(is_end))
        select = is_code & (position < first_end[owner])
        codes, owner = ids[select] - 1, owner[select]
        numbers = np.bincount(owner, minlength=count)

        values = inverse_transform(self._features, self._run_vqvae("decode", codes, numbers))
        columns = {name: values[:, k] for k, name in enumerate(self.feature_names)}
        for name in NON_NEGATIVE:
            if name in columns:
                columns[name] = np.maximum(columns[name], 0.0)
        result: dict[str, Any] = {name: split_rows(_to_float32(name, v, owner), numbers) for name, v in columns.items()}
        if all(name in columns for name in KINEMATICS):
            axis = {"jet_eta": jet_eta, "jet_phi": jet_phi}
            for name, angles in axis.items():
                angles = to_numpy(0.0 if angles is None else angles).astype(np.float64)
                if angles.shape not in ((), (count,)) or not np.isfinite(angles).all():
                    raise ValueError(f"{name} must be one finite number or {count} of them, got {short_repr(angles)}")
                axis[name] = np.broadcast_to(angles, (count,))[owner]
            momenta = four_momenta(
                columns["part_pt"],
                columns["part_etarel"] + axis["jet_eta"],
                wrap_phi(columns["part_phirel"] + axis["jet_phi"]),
                columns.get("part_mass", 0.0),
            )
            for k, name in enumerate(("part_px", "part_py", "part_pz", "part_energy")):
                result[name] = split_rows(_to_float32(name, momenta[:, k], owner), numbers)
            jets = momentum_features(sum_jets(momenta, numbers))
            result.update({f"jet_{name}": values.astype(np.float32) for name, values in jets.items()})
        result["num_constituents"] = numbers.astype(np.int32)
        result["row_index"] = np.arange(count)
        return result

    def decode(self, token_ids: Any, **kwargs) -> dict[str, Any]:
        """One sequence (length,) -> one record. A batch is passed on to `batch_decode`, whose arguments this takes."""
        if not hasattr(token_ids, "__len__") or getattr(token_ids, "ndim", 1) == 0:
            raise ValueError(f"token_ids must be ids of shape (length,), got {short_repr(token_ids)}")
        if hasattr(token_ids, "sequences") or len(token_ids) and np.ndim(token_ids[0]) == 1:
            return self.batch_decode(token_ids, **kwargs)
        columns = self.batch_decode([token_ids], **kwargs)
        columns.pop("row_index")
        return {
            name: values[0].item() if isinstance(values, np.ndarray) else values[0] for name, values in columns.items()
        }


# ---------------------------------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------------------------------


def _to_float32(name: str, values: np.ndarray, owner: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        result = values.astype(np.float32)
    if not np.isfinite(result).all():
        h = int(np.argmin(np.isfinite(result)))
        raise ValueError(f"row {owner[h]}: decoded {name} = {values[h]:g} is not a finite number")
    return result


# `save_pretrained` then writes this code beside the settings, so that they load anywhere with `trust_remote_code=True`
OmniJetTokenizer.register_for_auto_class("AutoTokenizer")
