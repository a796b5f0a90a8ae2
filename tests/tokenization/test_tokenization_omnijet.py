"""OmniJetTokenizer: transforms, ids, the VQ-VAE in its folder, the way back to four-momenta, malformed input."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, DataCollatorWithPadding

from hepzoo.modeling.configuration_omnijet_vqvae import OmniJetVQVAEConfig
from hepzoo.modeling.modeling_omnijet_vqvae import OmniJetVQVAEModel
from hepzoo.tokenization.jet_features import (
    FUNCTIONS,
    constituent_features,
    four_momenta,
    inverse_transform,
    make_features,
    momentum_features,
    transform,
    wrap_phi,
)
from hepzoo.tokenization.tokenization_omnijet import OmniJetTokenizer
from tests.subprocesses import checked, run_python

AutoConfig.register("omnijet_vqvae", OmniJetVQVAEConfig, exist_ok=True)
AutoModel.register(OmniJetVQVAEConfig, OmniJetVQVAEModel, exist_ok=True)
CODES = 40


def make_vqvae(**kwargs) -> OmniJetVQVAEModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "codebook_size": CODES}
    model = OmniJetVQVAEModel(OmniJetVQVAEConfig(**{**sizes, **kwargs}))
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def tokenizer() -> OmniJetTokenizer:
    return OmniJetTokenizer(vqvae=make_vqvae())


def make_rows(lengths=(5, 1, 9, 3), seed=0) -> list[dict]:
    """Jets of JetClass-like records."""
    generator = np.random.default_rng(seed)
    rows = []
    for index, length in enumerate(lengths):
        pt = np.sort(generator.uniform(1, 100, length))[::-1]
        eta, phi = 0.1 * generator.normal(size=(2, length))
        momenta = four_momenta(pt, eta + 0.5, wrap_phi(phi + 3.1), 0.14)
        row = {name: momenta[:, k] for k, name in enumerate(("part_px", "part_py", "part_pz", "part_energy"))}
        labels = {"label_QCD": float(index % 2 == 0), "label_Tbqq": index % 2}
        rows.append({**row, **labels, "jet_eta": 0.5, "file": "a.root"})
    return rows


# --- transforms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [None, *FUNCTIONS])
def test_transforms_are_inverted(function):
    (feature,) = make_features({"part_pt": {"function": function, "subtract": 1.8, "multiply": -3}})
    values = np.array([0.003, 0.2, 0.4, 0.9])
    np.testing.assert_allclose(feature.inverse(feature.transform(values)), values, rtol=1e-9)


def test_transforms_written_out():
    features = make_features(
        {
            "part_pt": {"function": "signed_log", "subtract": 1.8},
            "part_mass": {"clip_input": [0, None], "clip_output": [None, 2], "multiply": 4},
            "part_etarel": {"binning": [-1, 1, 5], "multiply": 3},
        }
    )
    found = transform(features, np.array([[-2.0, -0.5, -5.0], [3.0, 0.25, 0.1], [0.0, 7.0, 1.0]]))
    offset = 1e-5
    expected = np.array(
        [[-np.log(3 + offset) - 1.8, 0, -0.75 * 3], [np.log(4 + offset) - 1.8, 1, 0.25 * 3], [-1.8, 2, 0.75 * 3]]
    )
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(inverse_transform(features, found)[:, 0], [-2, 3, 0], atol=1e-12)


def test_derived_features_are_relative_to_the_sum_of_constituents():
    rows = make_rows((4, 2))
    names = ("part_px", "part_py", "part_pz", "part_energy")
    momenta = np.concatenate([np.stack([row[name] for name in names], axis=-1) for row in rows])
    found = constituent_features(momenta, np.array([4, 2]))
    for jet, part in ((slice(0, 4), 0), (slice(4, 6), 1)):
        total = momentum_features(momenta[jet].sum(0))
        eta = np.arcsinh(momenta[jet][:, 2] / np.hypot(momenta[jet][:, 0], momenta[jet][:, 1]))
        np.testing.assert_allclose(found["part_etarel"][jet], eta - total["eta"])
        np.testing.assert_allclose(found["part_ptrel"][jet], found["part_pt"][jet] / total["pt"])
        assert (np.abs(found["part_phirel"][jet]) < 1).all(), part
    np.testing.assert_allclose(found["part_mass"], 0.14, rtol=1e-6)
    np.testing.assert_allclose(wrap_phi(np.array([np.pi, -np.pi, 3.5, -3.5, 7])), [np.pi, np.pi, 3.5 - 2 * np.pi,
                               2 * np.pi - 3.5, 7 - 2 * np.pi])  # fmt: skip


# --- ids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separate, vocab_size, pad", [(True, CODES + 3, CODES + 2), (False, CODES + 2, 0)])
def test_ids(separate, vocab_size, pad):
    tokenizer = OmniJetTokenizer(vqvae=make_vqvae(), separate_pad_id=separate)
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert special == (0, CODES + 1, pad) and tokenizer.vocab_size == len(tokenizer) == vocab_size
    batch = tokenizer(make_rows(), padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.shape == mask.shape == (4, 11) and mask.sum(1).tolist() == [7, 3, 11, 5]
    assert (ids[:, 0] == 0).all() and (ids[mask == 0] == pad).all()
    for row, length in zip(ids, mask.sum(1)):
        assert row[length - 1] == CODES + 1
        assert ((row[1 : length - 1] >= 1) & (row[1 : length - 1] <= CODES)).all()
    for index in range(vocab_size):
        assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(index)) == index


def test_ids_are_the_codes_of_the_vqvae(tokenizer):
    rows = make_rows()
    batch = tokenizer(rows, padding=True, return_tensors="pt", return_particle_features=True)
    alone = tokenizer(rows[2], return_particle_features=True)
    features = torch.from_numpy(alone["particle_features"][None, 1:-1])
    with torch.no_grad():
        expected = tokenizer.vqvae.encode(features) + 1
    assert np.array_equal(alone["input_ids"][1:-1], expected[0]) and np.array_equal(
        batch["input_ids"][2][1:-1], expected[0]
    )
    assert not batch["particle_features"][:, 0].any() and not batch["particle_features"][1, 2:].any()
    momenta = np.stack([rows[2][name] for name in ("part_px", "part_py", "part_pz", "part_energy")], axis=-1)
    derived = constituent_features(momenta, np.array([9]))
    np.testing.assert_allclose(features[0, :, 0], np.log(derived["part_pt"]) - 1.8, rtol=1e-5)
    np.testing.assert_allclose(features[0, :, 2], 3 * derived["part_phirel"], rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_codes_are_the_same_on_a_gpu(tokenizer):
    """Sums in another order may move a latent that lies between two codes, and nothing else."""
    rows = make_rows((60,) * 20)
    here = np.concatenate(tokenizer(rows)["input_ids"])
    tokenizer.vqvae.to("cuda")
    try:
        there = np.concatenate(tokenizer(rows)["input_ids"])
    finally:
        tokenizer.vqvae.to("cpu")
    assert np.mean(here == there) > 0.999


def test_forms_of_rows_and_direct_columns(tokenizer):
    rows = make_rows()
    expected = tokenizer(rows)["input_ids"]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    lists = {name: [v.tolist() if hasattr(v, "tolist") else v for v in values] for name, values in columns.items()}
    for form in (columns, lists):
        assert all(np.array_equal(a, b) for a, b in zip(tokenizer(form)["input_ids"], expected, strict=True))
    direct = []
    for row in rows:
        momenta = np.stack([row[name] for name in ("part_px", "part_py", "part_pz", "part_energy")], axis=-1)
        direct.append(constituent_features(momenta, np.array([len(momenta)])))
    assert all(np.array_equal(a, b) for a, b in zip(tokenizer(direct)["input_ids"], expected, strict=True))
    assert tokenizer([])["input_ids"] == []


def test_class_ids(tokenizer):
    rows = make_rows()
    assert list(tokenizer(rows)["class_ids"]) == [0, 8, 0, 8]
    binary = OmniJetTokenizer(vqvae=make_vqvae(), label_names=["label_QCD", "label_Tbqq"])
    assert binary(rows, padding=True, return_tensors="pt")["class_ids"].tolist() == [0, 1, 0, 1]
    assert "class_ids" not in binary(rows, return_class_ids=False)


def test_features_without_vqvae_train_one():
    tokenizer = OmniJetTokenizer()
    rows = tokenizer(make_rows(), return_input_ids=False)
    assert set(rows) == {"particle_features", "attention_mask", "class_ids"}
    collator = DataCollatorWithPadding(tokenizer, return_tensors="pt")
    batch = collator([{name: rows[name][index] for name in rows} for index in range(4)])
    assert set(batch) == {"particle_features", "attention_mask", "class_ids"}
    assert batch["particle_features"].shape == (4, 9, 3) and batch["attention_mask"].sum().item() == 18
    assert torch.isfinite(make_vqvae()(batch["particle_features"], batch["attention_mask"]).loss)
    with pytest.raises(ValueError, match="has no VQ-VAE"):
        tokenizer(make_rows())


@pytest.mark.parametrize("side", ["right", "left"])
def test_pad(tokenizer, side):
    rows = tokenizer(make_rows(), return_particle_features=True)
    features = [{name: rows[name][index] for name in rows} for index in range(4)]
    batch = tokenizer.pad(features, return_tensors="pt", padding_side=side, pad_to_multiple_of=8)
    expected = tokenizer(
        make_rows(), padding=True, pad_to_multiple_of=8, padding_side=side, return_tensors="pt",
        return_particle_features=True,
    )  # fmt: skip
    assert set(batch) == set(expected)
    for name, values in expected.items():
        assert torch.equal(batch[name], values), name


def test_cuts_truncation_and_sorting():
    rows = make_rows((6,))
    for name in ("part_px", "part_py", "part_pz", "part_energy"):
        rows[0][name] = rows[0][name][::-1]
    lowest = np.hypot(rows[0]["part_px"], rows[0]["part_py"]).min()
    features = {"part_pt": {"function": "log", "larger_than": lowest}, "part_etarel": {}, "part_phirel": {}}
    tokenizer = OmniJetTokenizer(features, make_vqvae(), sorting="part_pt")
    found = tokenizer(rows, truncation=True, max_length=4, return_particle_features=True)["particle_features"][0][1:-1]
    expected = np.sort(np.log(np.hypot(rows[0]["part_px"], rows[0]["part_py"])))[::-1][:4]
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5)
    assert tokenizer.dropped == {"constituent:cut": 1, "constituent:truncated": 1}
    shuffled = OmniJetTokenizer(None, make_vqvae(), sorting="random", seed=3)
    again = OmniJetTokenizer(None, make_vqvae(), sorting="random", seed=3)
    assert all(np.array_equal(shuffled(rows)["input_ids"][0], again(rows)["input_ids"][0]) for _ in range(3))


def test_showers_are_a_configuration():
    features = {
        "x": {"subtract": 14.5, "multiply": 0.3},
        "y": {"subtract": 14.5, "multiply": 0.3},
        "z": {"subtract": 15.5, "multiply": 0.2},
        "energy": {"function": "log", "subtract": -1, "larger_than": 0},
    }
    tokenizer = OmniJetTokenizer(features, make_vqvae(num_features=4), sorting="energy", model_max_length=1700)
    rows = [{"x": [3, 4, 0], "y": [5, 6, 0], "z": [7, 8, 0], "energy": [0.5, 2.0, 0.0], "incident_energy": 10.0}]
    batch = tokenizer(rows, return_particle_features=True)
    expected = [[-3.15, -2.55, -1.5, 1 + np.log(2)], [-3.45, -2.85, -1.7, 1 + np.log(0.5)]]
    np.testing.assert_allclose(batch["particle_features"][0][1:-1], expected, rtol=1e-6)
    decoded = tokenizer.batch_decode(batch["input_ids"])
    assert set(decoded) == {"x", "y", "z", "energy", "num_constituents", "row_index"} and len(decoded["x"][0]) == 2


# --- decoding --------------------------------------------------------------------------------------------------------


def test_decoding_gives_the_vqvae_and_four_momenta(tokenizer):
    batch = tokenizer(make_rows(), padding=True, return_tensors="pt")
    eta = np.array([0.5, -1.0, 0.0, 2.0])
    columns = tokenizer.batch_decode(batch["input_ids"], jet_eta=eta, jet_phi=3.1)
    assert columns["num_constituents"].tolist() == [5, 1, 9, 3]
    for index, length in enumerate((5, 1, 9, 3)):
        codes = batch["input_ids"][index : index + 1, 1 : length + 1] - 1
        with torch.no_grad():
            values = tokenizer.vqvae.decode(codes)[0].numpy()
        np.testing.assert_allclose(columns["part_pt"][index], np.exp(values[:, 0] + 1.8), rtol=1e-4)
        np.testing.assert_allclose(columns["part_etarel"][index], values[:, 1] / 3, rtol=1e-4, atol=1e-6)
        total = sum(np.float64(columns[f"part_{name}"][index]).sum() ** 2 for name in ("px", "py", "pz"))
        energy = np.float64(columns["part_energy"][index]).sum()
        assert columns["jet_energy"][index] == pytest.approx(energy, rel=1e-5)
        assert columns["jet_mass"][index] == pytest.approx(np.sqrt(max(energy**2 - total, 0)), rel=1e-2, abs=0.1)
        pseudorapidity = np.arcsinh(columns["part_pz"][index] / np.hypot(*(columns[f"part_p{a}"][index] for a in "xy")))
        np.testing.assert_allclose(pseudorapidity, columns["part_etarel"][index] + eta[index], rtol=1e-4, atol=1e-4)
    # mass and pt of a jet do not depend on its axis
    other = tokenizer.batch_decode(batch["input_ids"])
    np.testing.assert_allclose(other["jet_pt"], columns["jet_pt"], rtol=1e-4)
    # decoded jets are rows again
    assert len(tokenizer(columns, return_input_ids=False)["particle_features"]) == 4


def test_where_jets_end(tokenizer):
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    sequences = [
        [0, 3, 4, eos, 7, 8],
        [pad, pad, 0, 3, 4, eos],
        [0, 3, 4, 5, 6, 7],
        [0, eos, 3, 4, eos, pad],
        [0, 3, pad, 4, eos, pad],
        [0, 0, 3, 4, 0, 5],
        [pad] * 6,
    ]
    columns = tokenizer.batch_decode(torch.tensor(sequences))
    assert columns["num_constituents"].tolist() == [2, 2, 5, 0, 1, 2, 0]
    np.testing.assert_array_equal(columns["part_pt"][0], columns["part_pt"][1])
    assert columns["jet_pt"][3] == columns["jet_mass"][3] == columns["jet_eta"][6] == 0
    published = OmniJetTokenizer(vqvae=tokenizer.vqvae, separate_pad_id=False)
    ragged = [np.array(row)[np.array(row) != pad] for row in sequences[:3]]
    assert published.batch_decode(ragged)["num_constituents"].tolist() == [2, 2, 5]
    record = tokenizer.decode(sequences[0])
    assert record["num_constituents"] == 2 and len(record["part_px"]) == 2


# --- saving ----------------------------------------------------------------------------------------------------------


def test_one_folder_holds_everything(tmp_path):
    features = {
        "part_phirel": {"multiply": 3},
        "part_pt": {"function": "log", "binning": [-1, 7, 90]},
        "part_etarel": {},
    }
    tokenizer = OmniJetTokenizer(features, make_vqvae(), sorting="part_pt", label_names=["label_QCD"])
    tokenizer.save_pretrained(tmp_path / "first")
    loaded = OmniJetTokenizer.from_pretrained(tmp_path / "first")
    # read only when it is needed
    assert loaded._vqvae is None and loaded.feature_names == list(features)
    loaded.save_pretrained(tmp_path / "second")
    again = AutoTokenizer.from_pretrained(tmp_path / "second", trust_remote_code=True)
    rows = make_rows()
    expected = tokenizer(rows, return_class_ids=False)["input_ids"]
    for other in (loaded, again):
        found = other(rows, return_class_ids=False)["input_ids"]
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    config = json.loads((tmp_path / "second" / "tokenizer_config.json").read_text())
    assert config["features"][1] == {"name": "part_pt", "function": "log", "binning": [-1.0, 7.0, 90]}


LOAD = """
import json
try:
    import hepzoo
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("hepzoo can be imported: this is no test")
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
ids = tokenizer({"part_pt": [[9.0, 4.0]], "part_etarel": [[0.1, 0.0]], "part_phirel": [[0.0, 0.2]]})["input_ids"]
print(json.dumps([row.tolist() for row in ids]))
"""


def test_loads_without_hepzoo(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "folder")
    row = {"part_pt": [[9.0, 4.0]], "part_etarel": [[0.1, 0.0]], "part_phirel": [[0.0, 0.2]]}
    output = checked(run_python(f"FOLDER = {str(tmp_path / 'folder')!r}\n{LOAD}", tmp_path, hepzoo=False))
    expected = [ids.tolist() for ids in tokenizer(row)["input_ids"]]
    assert json.loads(output.strip().splitlines()[-1]) == expected


# --- malformed input -------------------------------------------------------------------------------------------------


def broken(**changes):
    rows = make_rows((3, 4))
    rows[1].update(changes)
    return rows


@pytest.mark.parametrize(
    "rows, message",
    [
        (broken(part_px=[1.0, np.nan, 2.0, 3.0]), "row 1: part_px[1] = nan is not a finite number"),
        (broken(part_energy=[1.0, 2.0, 3.0, -4.0]), "row 1: part_energy[3] = -4 is negative, expected 0 or more"),
        (broken(part_py=[1.0]), "row 1: lists differ in length: part_px 4, part_py 1"),
        (
            broken(part_px=[0.0] * 4, part_py=[0.0] * 4),
            "row 1: part_etarel[0] = nan does not follow from the four-momentum",
        ),
        (broken(part_px="1234"), "row 1: part_px must be a flat list of numbers"),
        (broken(label_QCD=1.0), "row 1: not exactly one of label_QCD"),
        (broken(label_QCD="QCD"), "row 1: label_QCD must be a number"),
        (
            [{"part_pt": [1.0, -2.0], "part_etarel": [0, 0], "part_phirel": [0, 0]}],
            "row 0: part_pt[1] = -2 is negative",
        ),
        (
            [{"part_pt": [1.0, 0.0], "part_etarel": [0, 0], "part_phirel": [0, 0]}],
            "part_pt[1] = 0 is outside the domain",
        ),
        ([{"part_pt": [1.0], "part_etarel": [2.0], "part_phirel": [0]}], "row 0: none of 1 constituents is left"),
        ([{"part_pt": [], "part_etarel": [], "part_phirel": []}], "row 0: none of 0 constituents is left"),
        ([{"part_pt": [1.0], "part_etarel": [0]}], "field part_phirel (or part_px, part_py, part_pz, part_energy)"),
        ([3], "row 0: expected a record dict, got int"),
        ("jets", "rows: expected a record dict"),
        ({"part_pt": [[1.0]], "part_etarel": [[0.0], [1.0]], "part_phirel": [[0.0]]}, "columns differ in length"),
    ],
)
def test_hostile_rows(tokenizer, rows, message):
    with pytest.raises(ValueError) as error:
        tokenizer(rows)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_hostile_rows_can_be_dropped_on_request():
    tokenizer = OmniJetTokenizer(vqvae=make_vqvae())
    rows = broken(part_px=[1.0, np.nan, 2.0, 3.0], part_py=[0.1] * 4, part_pz=[1.0] * 4, part_energy=[9.0] * 4)
    batch = tokenizer(rows, on_invalid="drop_constituents")
    assert [len(ids) for ids in batch["input_ids"]] == [5, 5]
    assert tokenizer.dropped == {"constituent:part_px": 1}
    batch = tokenizer(rows, on_invalid="drop_jets", return_row_index=True)
    assert list(batch["row_index"]) == [0] and tokenizer.dropped["jet:part_px"] == 1
    empty = [*make_rows((2,)), {**make_rows((2,))[0], **{f"part_{n}": [] for n in ("px", "py", "pz", "energy")}}]
    assert list(tokenizer(empty, on_invalid="drop_jets", return_row_index=True)["row_index"]) == [0]


def test_hostile_lengths(tokenizer):
    rows = make_rows((4,))
    with pytest.raises(ValueError, match="row 0: 4 constituents; expected at most 3 \\(truncation=True"):
        tokenizer(rows, max_length=3)
    with pytest.raises(ValueError, match="max_length must be an integer of at least 1, got 0"):
        tokenizer(rows, max_length=0)
    with pytest.raises(ValueError, match="encodes jets, not text"):
        tokenizer.tokenize("a jet")


@pytest.mark.parametrize(
    "sequences, kwargs, message",
    [
        ([[0, 99]], {}, "row 0: token id 99 is outside 0.."),
        ([[0, -1]], {}, "row 0: token id -1 is outside"),
        ([[0.5]], {}, "ids must be integers"),
        ([[0, 1, 2]], {"jet_eta": np.nan}, "jet_eta must be one finite number or 1 of them"),
        ([[0, 1, 2]], {"jet_phi": [1.0, 2.0]}, "jet_phi must be one finite number or 1 of them"),
    ],
)
def test_hostile_sequences(tokenizer, sequences, kwargs, message):
    with pytest.raises(ValueError) as error:
        tokenizer.batch_decode(sequences, **kwargs)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"features": {}}, "features must map feature names to settings"),
        ({"features": {"part_pt": {"function": "eval"}}}, "features.part_pt.function must be one of log"),
        ({"features": {"part_pt": {"multiply": 0}}}, "features.part_pt.multiply must be a number other than 0"),
        ({"features": {"part_pt": {"subtract": np.inf}}}, "features.part_pt.subtract must be a finite number"),
        ({"features": {"part_pt": {"binning": [1, 0, 5]}}}, "features.part_pt.binning must be"),
        ({"features": {"part_pt": {"clip_input": [0]}}}, "features.part_pt.clip_input must be"),
        ({"features": {"part_pt": {"clip_input": [3, 1]}}}, "clip_input must be (lowest, highest), the lowest first"),
        ({"features": {"part_pt": {"function": ["log"]}}}, "features.part_pt.function must be one of log"),
        ({"features": {"x": {"larger_than": 1, "smaller_than": 1}}}, "smaller_than must be more than larger_than"),
        ({"features": [{"name": ["part_pt"]}]}, "the name of a feature must be text, got ['part_pt']"),
        ({"features": {"part_pt": {"func": "log"}}}, "features.part_pt has the unknown setting 'func'"),
        ({"features": [{"name": "x"}, {"name": "x"}]}, "features must differ in name"),
        ({"sorting": "part_mass"}, "sorting must be None, 'random' or one of part_pt"),
        ({"codebook_size": 1}, "codebook_size must be an integer of at least 2"),
        ({"label_names": ["a", "a"]}, "label_names must differ"),
    ],
)
def test_hostile_settings(arguments, message):
    with pytest.raises(ValueError) as error:
        OmniJetTokenizer(**arguments)
    assert message in str(error.value)


def test_hostile_vqvae(tmp_path):
    with pytest.raises(ValueError, match="vqvae has num_features = 4, but the tokenizer has 3"):
        OmniJetTokenizer(vqvae=make_vqvae(num_features=4))
    with pytest.raises(ValueError, match="vqvae has codebook_size = 40, but the tokenizer has 99"):
        OmniJetTokenizer(vqvae=make_vqvae(), codebook_size=99)
    OmniJetTokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no VQ-VAE in the folder vqvae"):
        OmniJetTokenizer.from_pretrained(tmp_path)(make_rows())
