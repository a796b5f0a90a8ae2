"""`load_checkpoint`: what is read of a training checkpoint, and what its pickle cannot do."""

import copyreg
import io
import os
import pickle
import struct
import sys
import time
import warnings
import zipfile

import pytest
import torch

from hepzoo import checkpoints
from hepzoo.checkpoints import load_checkpoint

WEIGHT = torch.tensor([1.0, 2.0, 3.0, 4.0])


def text(value: str) -> bytes:
    """A string as the pickle has it."""
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def name_of(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return name_of(module, name) + b"(" + b"".join(arguments) + b"tR"


def saved(value) -> tuple[bytes, dict[str, bytes]]:
    """Pickle, without its first and last operation, and the other records that `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with zipfile.ZipFile(buffer) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    content = records.pop("data.pkl")
    assert content[:2] == b"\x80\x02" and content[-1:] == b"."
    return content[2:-1], records


def write(path, content: bytes, records: dict[str, bytes], compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, value in {"data.pkl": content, **records}.items():
            archive.writestr(f"model/{name}", value)
    return path


def checkpoint_with(path, extra: bytes, where: str = "callbacks"):
    """A training checkpoint with `extra`, operations that leave one object, beside the weights or among them."""
    weights, records = saved({"w": WEIGHT})
    if where == "state_dict":
        weights = weights[:1] + b"(" + text("evil") + extra + b"u" + weights[1:]
        extra = b"N"
    content = b"\x80\x04}(" + text("state_dict") + weights + text("callbacks") + extra + b"u."
    return write(path, content, records)


def tensor_pickle(size: bytes, stride: bytes, offset: bytes = b"K\x00", count: bytes = b"K\x04", **changes) -> bytes:
    """A state dict of one tensor, its numbers as operations."""
    storage = changes.get("storage", name_of("torch", "FloatStorage"))
    reference = b"(" + text("storage") + storage + text(changes.get("record", "0")) + text("cpu") + count + b"tQ"
    rebuilt = name_of("torch._utils", "_rebuild_tensor_v2") + b"(" + changes.get("reference", reference)
    return b"\x80\x02}" + text("w") + rebuilt + offset + size + stride + b"\x89}tRs."


def refusal(path) -> str:
    start = time.perf_counter()
    with pytest.raises(ValueError) as caught:
        load_checkpoint(path)
    assert time.perf_counter() - start < 30
    message = str(caught.value)
    assert type(caught.value) is ValueError and "\n" not in message and message.startswith(f"{path}: "), message
    return message


# ---------------------------------------------------------------------------------------------------------------------
# What is read
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_weights_of_every_kind_and_protocol(protocol, tmp_path):
    matrix = torch.arange(24.0).reshape(4, 6)
    weights = {
        "whole": matrix,
        "transposed": matrix.t(),
        "column": matrix[:, 2],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        **{str(dtype): torch.ones(3, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)},
        **{str(dtype): torch.ones(3, dtype=dtype) for dtype in (torch.int64, torch.uint8, torch.bool)},
    }
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "model.ckpt", pickle_protocol=protocol)
    loaded = load_checkpoint(tmp_path / "model.ckpt")
    assert list(loaded) == list(weights)
    for name, tensor in weights.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor.data), name
    # views of one storage stay so
    assert loaded["whole"].untyped_storage().data_ptr() == loaded["column"].untyped_storage().data_ptr()
    loaded["whole"][0, 2] = -1.0
    assert loaded["column"][0] == -1.0


def test_state_dict_of_a_module(tmp_path):
    """An ordered dictionary with attributes."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    torch.save(module.state_dict(), tmp_path / "model.pt")
    loaded = load_checkpoint(tmp_path / "model.pt")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in module.state_dict().items())
    assert len(loaded) == 4


def test_of_the_rest_nothing_is_read(tmp_path, monkeypatch):
    records = []
    read = checkpoints.read_record
    monkeypatch.setattr(
        checkpoints, "read_record", lambda archive, name: records.append(name.split("/")[1:]) or read(archive, name)
    )
    optimizer_states = [{"state": {0: {"exp_avg": torch.zeros(1000)}}, "param_groups": [{"params": [0]}]}]
    torch.save({"optimizer_states": optimizer_states, "state_dict": {"w": WEIGHT}}, tmp_path / "model.ckpt")
    assert torch.equal(load_checkpoint(tmp_path / "model.ckpt")["w"], WEIGHT)
    assert sorted(records) == [["byteorder"], ["data", "1"], ["data.pkl"]]


def test_objects_of_other_packages_are_left_unread(tmp_path, monkeypatch):
    """Their package is not imported, although it could be."""
    victim = tmp_path / "imported"
    (tmp_path / "some_package.py").write_text(f"open({str(victim)!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    instance = name_of("some_package", "Thing") + b")\x81"
    objects = {
        "called": call("some_package", "Thing", text("argument"), b"K\x07"),
        "made": instance,
        "with attributes": instance + b"}" + text("__setstate__") + name_of("some_package", "run") + b"sb",
        "slots": instance + b"N}" + text("append") + name_of("some_package", "run") + b"s\x86b",
        "elements": instance + b"(K\x01K\x02e",
        "items": instance + b"(" + text("key") + b"K\x02u",
        "keywords": name_of("some_package", "Thing") + b")}" + text("a") + b"K\x01s\x92",
        "stack name": text("some_package") + text("Thing.inner") + b"\x93)R",
        "result is called": instance + b")R",
        "class is changed": name_of("some_package", "Thing") + b")R}" + text("x") + b"K\x01sb",
        "key": b"}" + instance + b"K\x01s",
        "set": b"\x8f(" + instance + b"\x90",
        "frozen set": b"(" + instance + b"\x91",
    }
    for name, operations in objects.items():
        loaded = load_checkpoint(checkpoint_with(tmp_path / "model.ckpt", operations))
        assert list(loaded) == ["w"] and torch.equal(loaded["w"], WEIGHT), name
    assert not victim.exists() and "some_package" not in sys.modules


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("functools", "partial"),
        ("pathlib", "PosixPath"),
        ("collections", "defaultdict"),
        ("typing", "Any"),
        ("__builtin__", "set"),
        ("builtins", "int"),
        ("_codecs", "encode"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("torch.optim.adamw", "AdamW"),
        ("torch.optim.lr_scheduler", "LambdaLR"),
        ("torch", "float32"),
        ("torch", "device"),
        ("datetime", "timedelta"),
        ("__main__", "Settings"),
    ],
)
def test_values_of_known_packages_are_left_unread(module, name, tmp_path):
    for operations in (name_of(module, name), call(module, name, text("a"))):
        assert list(load_checkpoint(checkpoint_with(tmp_path / "model.ckpt", operations))) == ["w"]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------

DANGEROUS = [
    ("posix", "system"),
    ("nt", "system"),
    ("os", "popen"),
    ("subprocess", "Popen"),
    ("builtins", "eval"),
    ("builtins", "getattr"),
    ("builtins", "__import__"),
    ("__builtin__", "eval"),
    ("__builtin__", "apply"),
    ("importlib", "import_module"),
    ("operator", "attrgetter"),
    ("functools", "reduce"),
    ("types", "FunctionType"),
    ("types", "CodeType"),
    ("marshal", "loads"),
    ("pickle", "loads"),
    ("runpy", "run_path"),
    ("copyreg", "add_extension"),
    ("sys", "modules"),
    ("socket", "create_connection"),
    ("shutil", "rmtree"),
    ("pathlib", "Path.write_text"),
    ("pathlib", "os.system"),
    ("collections", "namedtuple"),
    ("functools", "partial.__call__"),
    ("typing.sys", "modules"),
    ("torch", "load"),
    ("torch.serialization", "load"),
    ("torch.storage", "_load_from_bytes"),
    ("torch.hub", "load"),
    ("torch.utils.cpp_extension", "load_inline"),
    ("torch.optim", "os.system"),
    ("torch.jit", "load"),
    ("torch", "FloatStorage.from_file"),
    ("torch._utils", "_rebuild_tensor_v2.__globals__"),
    ("torch.nn.modules.linear", "Linear"),
    ("numpy", "load"),
    ("numpy.testing._private.utils", "runstring"),
    ("numpy", "f2py.os.system"),
]


@pytest.mark.parametrize(("module", "name"), DANGEROUS)
def test_hostile_names_are_refused_however_they_are_written(module, name, tmp_path):
    argument = text("touch executed")
    spellings = {
        "call": call(module, name, argument),
        "value": name_of(module, name),
        "stack": text(module) + text(name) + b"\x93" + argument + b"\x85R",
        "new object": name_of(module, name) + argument + b"\x85\x81",
        "keywords": name_of(module, name) + b")}" + text("a") + b"K\x01s\x92",
        "inside a partial": call("functools", "partial", name_of(module, name)),
        "state": call("some_package", "Thing") + b"}" + text("__setstate__") + name_of(module, name) + b"sb",
    }
    for spelling, operations in spellings.items():
        for where in ("callbacks", "state_dict"):
            message = refusal(checkpoint_with(tmp_path / "model.ckpt", operations, where))
            assert "refused" in message and name in message, (spelling, message)


def test_hostile_operations_that_torch_does_not_write(tmp_path):
    command = text("touch executed")
    operations = {
        "INST": b"(" + command + b"iposix\nsystem\n",
        "OBJ": b"(" + name_of("some_package", "Thing") + command + b"o",
        "PERSID": b"Pstorage\n",
        "NEXT_BUFFER": b"\x97",
        "DUP": b"N2",
        "GET": b"g0\n",
        "BYTEARRAY8": b"\x96" + struct.pack("<Q", 1) + b"a",
    }
    for name, content in operations.items():
        assert f"operation {name}" in refusal(checkpoint_with(tmp_path / "model.ckpt", content)), name


@pytest.mark.parametrize("operation", [b"\x82\xf0", b"\x83\xf0\x00", b"\x84\xf0\x00\x00\x00"])
def test_hostile_extension_codes(operation, tmp_path):
    """A code that some package has registered brings its object without a name in the file."""
    copyreg.add_extension("posix", "system", 0xF0)
    try:
        copyreg._extension_cache[0xF0] = os.system
        message = refusal(checkpoint_with(tmp_path / "model.ckpt", operation + text("touch executed") + b"\x85R"))
    finally:
        copyreg._extension_cache.pop(0xF0)
        copyreg.remove_extension("posix", "system", 0xF0)
    assert "operation EXT" in message


@pytest.mark.parametrize(
    "operations",
    [
        text("posix.system") + b")R",  # a text is called
        b"K\x07)R",
        b"})R",
        b"K\x07}b",  # a number gets attributes
        text("a") + b"}b",
        name_of("some_package", "Thing") + b"}" + text("__call__") + b"K\x01sb",  # a class gets attributes
        name_of("torch._utils", "_rebuild_tensor_v2") + b"}" + text("__defaults__") + b"K\x01sb",
        b")(K\x01e",  # a tuple gets elements
        b"K\x07(" + text("a") + b"K\x01u",
        text("storage") + b"Q",  # references
        b"NQ",
        b"(" + text("module") + name_of("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x04tQ",
        b"(" + text("storage") + name_of("some_package", "Thing") + text("0") + text("cpu") + b"K\x04tQ",
        b"(" + text("storage") + text("load") + text("0") + text("cpu") + b"K\x04tQ",
        b"(" + text("storage") + name_of("torch", "FloatStorage") + b"K\x00" + text("cpu") + b"K\x04tQ",
        b"(" + text("storage") + name_of("torch", "FloatStorage") + text("0") + text("cpu") + text("4") + b"tQ",
        name_of("torch._utils", "_rebuild_tensor_v2") + b")R",
        call("torch._utils", "_rebuild_tensor_v2", text("load"), b"K\x00", b")", b")"),
        call("torch._utils", "_rebuild_parameter"),
        call("collections", "OrderedDict", b"K\x07"),
        b"h\x63",  # of the memo, never put there
        b"0000000",  # more than there is
        b"t",
        b"N\x93",
        b"]]\x93",
    ],
)
def test_hostile_calls_and_references(operations, tmp_path):
    refusal(checkpoint_with(tmp_path / "model.ckpt", operations))


def test_hostile_objects_among_the_weights_are_listed(tmp_path):
    thing = call("some_package", "Thing")
    message = refusal(checkpoint_with(tmp_path / "model.ckpt", thing, "state_dict"))
    assert "only named tensors" in message and "evil" in message and ": w" not in message
    for value in (b"N", b"K\x07", b"]", b"}", name_of("torch", "FloatStorage"), text("w")):
        assert "evil" in refusal(checkpoint_with(tmp_path / "model.ckpt", value, "state_dict"))


def test_hostile_names_of_weights(tmp_path):
    _, records = saved({"w": WEIGHT})
    content = tensor_pickle(b"K\x04\x85", b"K\x01\x85")
    thing, huge = call("some_package", "Thing"), b"\x8b\x00\x10\x00\x00" + b"1" * 4096
    for key in (b"K\x07", b"N", b")", b"]", thing, huge, text("line\nbreak"), text("\x1b[2J")):
        message = refusal(write(tmp_path / "model.pt", content.replace(text("w"), key, 1), records))
        assert "\x1b" not in message and len(message) < 1000


@pytest.mark.parametrize(
    "content",
    [
        tensor_pickle(b"K\x05\x85", b"K\x01\x85"),  # more than is stored
        tensor_pickle(b"K\x04\x85", b"K\x02\x85"),
        tensor_pickle(b"K\x04\x85", b"K\x01\x85", offset=b"K\x01"),
        tensor_pickle(b"K\x04\x85", b"K\x01\x85", offset=b"J\xff\xff\xff\xff"),
        tensor_pickle(b"J\xff\xff\xff\xff\x85", b"K\x01\x85"),
        tensor_pickle(b"K\x04\x85", b"J\xff\xff\xff\xff\x85"),
        tensor_pickle(b"K\x02K\x02\x86", b"K\x01\x85"),
        tensor_pickle(b"\x8a\x0d" + b"\x7f" * 13 + b"\x85", b"K\x01\x85"),
        tensor_pickle(b"\x8a\x08" + b"\x7f" * 8 + b"\x85", b"K\x00\x85"),
        tensor_pickle(b"K\x04\x85", b"K\x01\x85", count=b"M\x00\x40"),  # the storage is declared larger than it is
        tensor_pickle(b"K\x04\x85", b"K\x01\x85", count=b"K\x03"),
        tensor_pickle(b"K\x04\x85", b"K\x01\x85", count=b"\x8a\x09" + b"\x7f" * 9),
        tensor_pickle(b"K\x04\x85", b"K\x01\x85", count=b"J\xfc\xff\xff\xff"),
        tensor_pickle(b"K\x04\x85", b"K\x01\x85", storage=name_of("torch", "DoubleStorage")),
        tensor_pickle(b"K\x04\x85", b"K\x01\x85", record="1"),
        tensor_pickle(b"K\x04\x85", b"K\x01\x85", record="../../etc/passwd"),
        tensor_pickle(b"K\x04\x85", b"K\x01\x85", reference=text("load")),
        tensor_pickle(b"N", b"N"),
        tensor_pickle(text("44"), b"K\x01\x85"),
        tensor_pickle(b"G" + struct.pack(">d", 4.0) + b"\x85", b"K\x01\x85"),
        tensor_pickle(call("some_package", "Size"), b"K\x01\x85"),
    ],
)
def test_hostile_shapes_and_storages(content, tmp_path):
    _, records = saved({"w": WEIGHT})
    fitting = tensor_pickle(b"K\x04\x85", b"K\x01\x85")
    assert torch.equal(load_checkpoint(write(tmp_path / "good.pt", fitting, records))["w"], WEIGHT)
    refusal(write(tmp_path / "model.pt", content, records))


BOMBS = {
    "memo": b"Nr\xff\xff\xff\x7f",
    "long text": b"\x8d" + struct.pack("<Q", 2**62),
    "long bytes": b"\x8e" + struct.pack("<Q", 2**40),
    "frame": b"\x95" + struct.pack("<Q", 2**62) + b"N",
    "long integer": b"\x8b\xff\xff\xff\x7f",
    "deep key": b"}" + b")" + b"\x85" * 100_000 + b"Ns",
    "exponential key": b"}" + b")q\x40" + b"h\x40h\x40\x86q\x40" * 200 + b"Ns",
    "exponential name": text("some_package") + b"]q\x40" + b"]q\x41(h\x40h\x40eh\x41q\x40" * 60 + b"\x93",
    "deep list": b"]" * 100_000 + b"a" * 99_999,
    "list in itself": b"]q\x40h\x40a",
    "many names": b"".join(name_of(f"p{i}", f"C{i}") + b"0" for i in range(20_000)) + b"N",
    "repeated class": b"".join(b"c" + b"p" * 1000 + b"\nC\n0" for _ in range(1000)) + b"N",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_hostile_pickle_bombs_take_neither_time_nor_memory(bomb, tmp_path):
    """Refused, or read with what they say left out."""
    import tracemalloc

    path = checkpoint_with(tmp_path / "model.ckpt", BOMBS[bomb])
    start = time.process_time()
    tracemalloc.start()
    try:
        assert list(load_checkpoint(path)) == ["w"]
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert time.process_time() - start < 30
    assert peak < 200 * 2**20


def test_hostile_archives(tmp_path, monkeypatch):
    weights, records = saved({"w": WEIGHT})
    content = b"\x80\x02" + weights + b"."
    path = tmp_path / "model.pt"

    write(path, content, {**records, "zeros": bytes(10**7)}, zipfile.ZIP_DEFLATED)
    assert "larger than the file" in refusal(path)
    write(path, content + os.urandom(10_000), records, zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data/0", bytes(16))
    assert "data.pkl" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("one/data.pkl", content)
        archive.writestr("two/data.pkl", content)
    assert "found 2" in refusal(path)
    assert "little-endian" in refusal(write(path, content, {**records, "byteorder": b"big"}))
    write(path, content, {name: value for name, value in records.items() if name != "data/0"})
    assert "data/0" in refusal(path)
    # one flipped bit of the weights
    write(path, content, records)
    stored = bytearray(path.read_bytes())
    position = stored.index(WEIGHT.numpy().tobytes())
    stored[position] ^= 1
    path.write_bytes(stored)
    assert "CRC" in refusal(path)
    monkeypatch.setattr(checkpoints, "MAX_PICKLE_BYTES", len(content) - 1)
    write(path, content, records)
    assert "larger than" in refusal(path)


def test_hostile_script_archive_is_not_run(tmp_path):
    """A scripted module is a program of its own."""

    class Module(torch.nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return values + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is on its way out of torch
        torch.jit.script(Module()).save(str(tmp_path / "model.pt"))
    refusal(tmp_path / "model.pt")


def test_hostile_dictionary_that_hides_its_items(tmp_path):
    """Attributes of an ordered dictionary come before its methods."""
    weights, records = saved({"w": WEIGHT})
    ordered = name_of("collections", "OrderedDict") + b")R(" + text("evil") + b"K\x07u}(" + text("items")
    ordered += name_of("collections", "OrderedDict") + text("get") + name_of("collections", "OrderedDict") + b"ub"
    assert "evil" in refusal(write(tmp_path / "model.pt", b"\x80\x02" + ordered + b".", records))


class Settings:
    """Of a training run."""


def test_hostile_older_file_with_objects_is_refused(tmp_path):
    """The older format is one stream of pickles, which is read with what torch allows alone."""
    checkpoint = {"state_dict": {"w": WEIGHT}, "settings": Settings()}
    torch.save(checkpoint, tmp_path / "model.pt")
    torch.save(checkpoint, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(checkpoint, protocol=2))
    assert list(load_checkpoint(tmp_path / "model.pt")) == ["w"]
    assert "refused" in refusal(tmp_path / "old.pt")
    refusal(tmp_path / "plain.pt")
