"""Publishing and reading back through the Hub's protocol, against a server on the loopback interface."""

import json
import urllib.error
import urllib.request

import pytest

from tests.hub_server import HubServer
from tests.subprocesses import checked, run_python

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
        result = run_python(PUSH, folder, timeout=120, **hub.environment)
        yield hub, json.loads(checked(result).splitlines()[-1])


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
    result = run_python(code, tmp_path, trust, hepzoo=with_hepzoo, timeout=120, **hub.environment)
    pulled = json.loads(checked(result).splitlines()[-1])
    for name in ("ids", "channels", "P"):
        assert pulled[name] == pushed[name], name
    assert pulled["shards"] == 3 and pulled["test"] == 5
    # slots, SOS and EOS
    assert pulled["lengths"] == [hits + 4 for hits in pulled["nhits"]]
    assert "int16" in pulled["features"]["pmtID"] and "float32" in pulled["features"]["leadTime"]
    start = "hepzoo." if with_hepzoo else "transformers_modules."
    assert all(name.startswith(start) for name in pulled["classes"])


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
