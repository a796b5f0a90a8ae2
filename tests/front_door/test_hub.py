"""Publishing and reading back through the Hub's protocol, against a server on the loopback interface."""

import io
import json
import urllib.error
import urllib.request
import zipfile

import pytest
import yaml
from safetensors.torch import load

from tests.hub_server import HubServer
from tests.subprocesses import answer, checked, run_python
from tests.training.jets import make_jets, write_jets
from tests.training_runs import make_tracks, write_tracks

PUSH = """
import json, sys
import numpy as np, torch, hepzoo
from datasets import Dataset
from hepzoo.data_scripts.dirc_schema import DIRC_FEATURES

torch.manual_seed(4)
sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
model = hepzoo.CMHCADircForCausalLM(hepzoo.CMHCADircConfig(**sizes)).eval()
tokenizer = hepzoo.CMHCADircTokenizer()
model.push_to_hub("tester/generator")
tokenizer.push_to_hub("tester/generator")

rng = np.random.default_rng(0)
columns = {name: [] for name in DIRC_FEATURES}
for number in range(50):
    hits = int(rng.integers(5, 12))
    channel = rng.integers(0, 6144, hits)
    pmt, pixel = channel // 256, channel % 256
    x, y = tokenizer.detector.pixel_center(pmt, pixel)
    track = {"P": rng.uniform(1, 10), "Theta": rng.uniform(25, 160), "Phi": 0.0, "PDG": [211, 321][number % 2]}
    track |= {"NHits": hits, "pmtID": pmt, "pixelID": pixel, "channel": channel, "x": x, "y": y}
    track["leadTime"] = rng.uniform(10, 150, hits)
    for name in columns:
        columns[name].append(track[name])
dataset = Dataset.from_dict(columns, features=DIRC_FEATURES)
dataset.push_to_hub("tester/tracks", split="train", num_shards=3)
dataset.select(range(5)).push_to_hub("tester/tracks", split="test")

kinematics = torch.tensor([[6.0, 30.0], [2.0, 120.0]])
ids = model.generate(kinematics=kinematics, do_sample=False, max_new_tokens=10)
print(json.dumps({"ids": ids.tolist(), "channels": [row["channel"] for row in dataset], "P": dataset["P"][:]}))
"""

# `hepzoo` may be missing here
PULL = """
import json, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from datasets import load_dataset

remote = {"trust_remote_code": sys.argv[1] == "trust"}
model = AutoModelForCausalLM.from_pretrained("tester/generator", **remote).eval()
tokenizer = AutoTokenizer.from_pretrained("tester/generator", **remote)
kinematics = torch.tensor([[6.0, 30.0], [2.0, 120.0]])
ids = model.generate(kinematics=kinematics, do_sample=False, max_new_tokens=10)

stream = load_dataset("tester/tracks", split="train", streaming=True)
encoded = stream.map(lambda rows: dict(tokenizer(rows)), batched=True, batch_size=8)
rows = list(encoded)
test = load_dataset("tester/tracks", split="test")
answer = {
    "ids": ids.tolist(),
    "channels": [row["channel"] for row in rows],
    "P": [row["P"] for row in rows],
    "shards": stream.num_shards,
    "lengths": [len(row["input_ids"]) for row in rows],
    "nhits": [row["NHits"] for row in rows],
    "test": test.num_rows,
    "features": {name: str(feature) for name, feature in stream.features.items()},
    "classes": [type(model).__module__, type(tokenizer).__module__],
}
print(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The server with a model, its tokenizer and a data set pushed to it, and what the publisher had."""
    folder = tmp_path_factory.mktemp("publisher")
    with HubServer() as hub:
        result = run_python(PUSH, folder, **hub.environment)
        yield hub, answer(result)


def test_push_publishes_weights_code_tokenizer_and_card(published):
    hub, _ = published
    files = hub.files("model", "tester/generator")
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"}
    expected |= {"modeling_cmhca_dirc.py", "configuration_cmhca_dirc.py", "tokenization_cmhca_dirc.py"}
    assert expected <= set(files)
    assert b"import hepzoo" not in b"".join(content for path, content in files.items() if path.endswith(".py"))
    config = json.loads(files["config.json"])
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_cmhca_dirc.CMHCADircForCausalLM"
    data = hub.files("dataset", "tester/tracks")
    assert sum(path.startswith("data/train-") for path in data) == 3
    assert b"config_name: default" in data["README.md"]


@pytest.mark.parametrize("with_hepzoo", [False, True], ids=["without_hepzoo", "with_hepzoo"])
def test_pull_gives_what_was_pushed(published, tmp_path, with_hepzoo):
    """Who has hepzoo need not trust the code of a repository."""
    hub, pushed = published
    code, trust = (f"import hepzoo\n{PULL}", "local") if with_hepzoo else (PULL, "trust")
    result = run_python(code, tmp_path, trust, hepzoo=with_hepzoo, **hub.environment)
    pulled = answer(result)
    for name in ("ids", "channels", "P"):
        assert pulled[name] == pushed[name], name
    assert pulled["shards"] == 3 and pulled["test"] == 5
    # slots, SOS and EOS
    assert pulled["lengths"] == [hits + 4 for hits in pulled["nhits"]]
    assert "int16" in pulled["features"]["pmtID"] and "float32" in pulled["features"]["leadTime"]
    start = "hepzoo." if with_hepzoo else "transformers_modules."
    assert all(name.startswith(start) for name in pulled["classes"])


# every run in one process; the names of the repositories are those of the output folders
TRAIN = """
import importlib, json, sys
for script, arguments in json.loads(sys.argv[1]):
    assert importlib.import_module(f"hepzoo.training.{script}").main(arguments) == 0, script
"""
SECRET = "hf_given_on_the_command_line"
SHORT = "--do_train --max_steps 2 --logging_steps 1 --use_cpu --disable_tqdm true --dataloader_pin_memory false"

OPEN = """
import json, sys, transformers
found = {}
for repository, (auto_class, processor_class) in json.loads(sys.argv[1]).items():
    model = getattr(transformers, auto_class).from_pretrained(repository, trust_remote_code=True)
    processor = getattr(transformers, processor_class).from_pretrained(repository, trust_remote_code=True)
    total = sum(weight.double().sum().item() for weight in model.state_dict().values())
    found[repository] = [type(model).__name__, type(processor).__name__, total]
print(json.dumps(found))
"""

REFUSED = """
import sys
from hepzoo.training import run_clm
from hepzoo.training.data import InputError
for name in ("a/b/c", "tester/model"):
    try:
        run_clm.main([*sys.argv[1:], "--hub_model_id", name])
    except InputError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def trained(published, tmp_path_factory):
    """The server after training scripts have run with --push_to_hub."""
    hub, _ = published
    folder = tmp_path_factory.mktemp("trainer")
    tracks = [write_tracks(folder / f"{n}.parquet", make_tracks(12, n)) for n in (1, 2)]
    jets = write_jets(folder / "jets.parquet", make_jets(16))
    tuned = ["--model_name_or_path", "tester/generator", "--train_file", tracks[0], "--save_steps", "1"]
    tuned += ["--validation_file", tracks[1], "--do_eval", "--hub_token", SECRET]
    sizes = "codebook_size=8,latent_size=2,hidden_size=8,num_hidden_layers=1,num_attention_heads=2"
    tokens = ["--config_overrides", sizes, "--train_file", jets, "--hub_model_id", "jet-tokens", "--save_steps", "1"]
    sizes = "hidden_size=8,num_hidden_layers=1,num_attention_heads=2,num_head_layers=1,num_neighbors=3"
    flow = ["--model_type", "omnilearned", "--config_overrides", sizes, "--train_file", jets, "--ema_decay", "0.5"]
    flow += ["--hub_model_id", "tester/jet-flow", "--save_strategy", "no"]
    runs = [("run_clm", "tuned", tuned), ("run_vqvae", "run_2", tokens), ("run_flow_matching", "run_3", flow)]
    runs = [
        (script, [*SHORT.split(), "--push_to_hub", "--output_dir", output, "--cache_dir", str(folder), *arguments])
        for script, output, arguments in runs
    ]
    checked(run_python(TRAIN, folder, json.dumps(runs), **hub.environment))
    return hub, folder


def read_card(hub: HubServer, repository: str) -> tuple[dict, str]:
    """Metadata and text of the card."""
    _, metadata, text = hub.files("model", repository)["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_training_publishes_what_loads_at_every_commit(trained):
    hub, _ = trained
    for name in ("tester/tuned", "tester/jet-tokens", "tester/jet-flow"):
        commits = hub.repositories["model", name].commits[1:]
        assert commits
        for files in commits:
            config = json.loads(files["config.json"])
            code = {f"{reference.split('.')[0]}.py" for reference in config["auto_map"].values()}
            assert {*code, "model.safetensors"} <= set(files), name
        assert {"train_results.json", "trainer_state.json", "README.md"} <= set(commits[-1])
        assert not [path for path in commits[-1] if path.startswith("checkpoint")]
    assert "vqvae/model.safetensors" in hub.files("model", "tester/jet-tokens")
    flow = hub.files("model", "tester/jet-flow")
    assert load(flow["model.safetensors"]).keys() == load(flow["ema/model.safetensors"]).keys()


def test_cards_say_what_was_trained(trained):
    hub, _ = trained
    metadata, text = read_card(hub, "tester/tuned")
    assert metadata["base_model"] == "tester/generator" and metadata["license"] == "apache-2.0"
    assert metadata["tags"] == ["cmhca_dirc", "hepzoo", "physics"] and "datasets" not in metadata
    assert 'AutoModelForCausalLM.from_pretrained("tester/tuned")' in text and "`1.parquet`" in text
    loss = json.loads(hub.files("model", "tester/tuned")["eval_results.json"])["eval_loss"]
    for line in ("| training records | 12 |", "| steps | 2 |", "| batch size | 8 |", f"| loss | {loss:.4g} |"):
        assert line in text.splitlines()
    metadata, text = read_card(hub, "tester/jet-tokens")
    assert "base_model" not in metadata and 'AutoTokenizer.from_pretrained("tester/jet-tokens")' in text
    _, text = read_card(hub, "tester/jet-flow")
    assert 'AutoFeatureExtractor.from_pretrained("tester/jet-flow")' in text and "Not evaluated." in text


def test_what_was_trained_loads_without_hepzoo(trained, tmp_path):
    hub, _ = trained
    classes = {
        "tester/tuned": ("AutoModelForCausalLM", "AutoTokenizer"),
        "tester/jet-tokens": ("AutoModel", "AutoTokenizer"),
        "tester/jet-flow": ("AutoModelForPreTraining", "AutoFeatureExtractor"),
    }
    result = run_python(OPEN, tmp_path, json.dumps(classes), hepzoo=False, **hub.environment)
    found = answer(result)
    for repository, names in (
        ("tester/tuned", ["CMHCADircForCausalLM", "CMHCADircTokenizer"]),
        ("tester/jet-tokens", ["OmniJetVQVAEModel", "OmniJetTokenizer"]),
        ("tester/jet-flow", ["OmniLearnedForGeneration", "OmniLearnedFeatureExtractor"]),
    ):
        weights = load(hub.files("model", repository)["model.safetensors"]).values()
        total = sum(weight.double().sum().item() for weight in weights)
        assert found[repository] == [*names, pytest.approx(total, rel=1e-6, abs=1e-6)]


def test_hostile_token_is_not_published(trained):
    """Trainer pickles all its arguments into a file that is uploaded."""
    hub, _ = trained
    for (_, name), repository in hub.repositories.items():
        for path, content in repository.files.items():
            if zipfile.is_zipfile(io.BytesIO(content)):
                with zipfile.ZipFile(io.BytesIO(content)) as archive:
                    content = b"".join(archive.read(member) for member in archive.namelist())
            assert SECRET.encode() not in content, f"{name}/{path}"
    assert "training_args.bin" in hub.files("model", "tester/tuned")


def test_hostile_uploads_are_refused_before_training(trained):
    """A name that cannot be, and a Hub that does not answer."""
    hub, folder = trained
    sizes = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32"
    arguments = [*SHORT.split(), "--model_type", "cmhca_dirc", "--config_overrides", sizes, "--cache_dir", str(folder)]
    arguments += ["--train_file", str(folder / "1.parquet"), "--push_to_hub", "--output_dir", "refused"]
    environment = {**hub.environment, "HF_ENDPOINT": "http://127.0.0.1:9"}
    lines = checked(run_python(REFUSED, folder, *arguments, **environment)).splitlines()
    assert len(lines) == 2 and all(line.startswith("--push_to_hub: ") for line in lines)
    assert "a/b/c" in lines[0] and not (folder / "refused" / "model.safetensors").exists()


def ask(url: str, method: str = "GET", data: bytes | None = None, **headers: str):
    request = urllib.request.Request(url, data=data, method=method, headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as response:
            return response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def test_server_ranges_revisions_and_missing_things():
    with HubServer() as hub:
        repository = hub.create("dataset", "tester/numbers")
        old = hub.commit(repository, {"data/a.bin": b"0123456789"})
        hub.commit(repository, {"data/a.bin": b"changed", "b.txt": b"b"})
        base = f"{hub.endpoint}/datasets/tester/numbers/resolve"
        assert ask(f"{base}/{old}/data/a.bin")[2] == b"0123456789"
        assert ask(f"{base}/main/data/a.bin")[2] == b"changed"
        for wanted, expected in (("2-4", b"234"), ("7-", b"789"), ("-2", b"89"), ("8-100", b"89")):
            status, headers, body = ask(f"{base}/{old}/data/a.bin", Range=f"bytes={wanted}")
            assert (status, body) == (206, expected)
            assert headers["Content-Range"].endswith("/10")
        assert ask(f"{base}/{old}/data/a.bin", Range="bytes=50-60")[0] == 416
        for path, code in (
            ("main/missing", "EntryNotFound"),
            ("nobranch/b.txt", "RevisionNotFound"),
        ):
            status, headers, _ = ask(f"{base}/{path}")
            assert (status, headers["X-Error-Code"]) == (404, code)
        status, headers, _ = ask(f"{hub.endpoint}/api/models/tester/missing")
        assert (status, headers["X-Error-Code"]) == (404, "RepoNotFound")
        tree = json.loads(ask(f"{hub.endpoint}/api/datasets/tester/numbers/tree/main")[2])
        assert sorted((entry["type"], entry["path"]) for entry in tree) == [("directory", "data"), ("file", "b.txt")]
        hub.commit(repository, {"data/": None})
        assert set(hub.files("dataset", "tester/numbers")) == {"b.txt"}


def test_hostile_requests_do_not_stop_the_server():
    with HubServer() as hub:
        hub.create("model", "tester/model")
        commit = f"{hub.endpoint}/api/models/tester/model/commit/main"
        for body in (b"not json", b"{}", b'{"key": "lfsFile", "value": {"path": "x", "oid": "unknown"}}', b"[]"):
            assert ask(commit, "POST", body)[0] == 400
        assert ask(f"{hub.endpoint}/objects/{'0' * 64}", "PUT", b"other content")[0] == 400
        assert ask(f"{hub.endpoint}/tester/model/resolve/main/../../etc/passwd")[0] == 404
        assert hub.files("model", "tester/model") == {}
        assert ask(f"{hub.endpoint}/api/whoami-v2")[0] == 200
