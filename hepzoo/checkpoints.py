"""Reading of published checkpoints without executing anything that they hold."""

import pickle
import pickletools
import re
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


# Torch refuses a checkpoint whose pickle holds anything but tensors and plain values, and training frameworks store
# much else. A checkpoint is a zip archive: a pickle that says what there is, and one record of plain numbers per
# storage. The pickle is read by `read_pickle`, which has no function that a file could call: tensors, dictionaries and
# lists come out, and whatever else a training run stored (configurations, callbacks, loops) is an `UnreadObject`.

STORAGE_DTYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
REBUILT_TENSORS = {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"}
REBUILT_PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
# Any name of another package may stand in a training checkpoint, and is left unread. Of these packages only values,
# containers and types may: whatever else is named does not belong there. (Protocol 2 writes the names of Python 2.)
KNOWN_PACKAGES = {*sys.stdlib_module_names, "__builtin__", "copy_reg", "torch", "numpy"}
HARMLESS_GLOBALS = re.compile(
    r"collections\.(OrderedDict|defaultdict|deque|Counter)|functools\.partial|enum\.\w+|typing\.\w+|_codecs\.encode"
    r"|pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path|datetime\.(datetime|date|time|timedelta|timezone)"
    r"|(copyreg|copy_reg)\._reconstructor|argparse\.Namespace|types\.SimpleNamespace"
    r"|(builtins|__builtin__)\.(object|dict|list|tuple|set|frozenset|bool|int|long|float|complex|str|unicode|bytes)"
    r"|(builtins|__builtin__)\.(bytearray|slice|range|xrange)"
    r"|torch\.(Size|device|dtype|Tensor|u?int\d+|b?float\d+|bool|complex\d+)|torch\.optim\.(\w+\.)*[A-Z]\w+"
    r"|numpy\.(dtype|ndarray|bool_?|u?int\d+|float\d+|dtypes\.\w+DType)"
    r"|numpy\.(core|_core)\.multiarray\.(scalar|_reconstruct)"
)
MAX_PICKLE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Global:
    """A function or class that the pickle names; never looked up."""

    name: str


class UnreadObject:
    """Stands for an object that is no tensor and no plain container; nothing of it is kept."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "<unread object>"


@dataclass(frozen=True)
class Storage:
    """Numbers of a dtype in a record of the archive."""

    dtype: str
    record: str
    num_elements: int


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor of the archive, not read yet."""

    storage: Storage
    offset: Any
    size: Any
    stride: Any

    def read(self, archive: zipfile.ZipFile, folder: str, storages: dict[str, Any]):
        """The tensor. `storages` collects the records by name, so that tied weights stay tied."""
        import torch

        record, count = self.storage.record, self.storage.num_elements
        if record not in storages:
            dtype = getattr(torch, self.storage.dtype)
            content = read_record(archive, f"{folder}/data/{record}")
            if len(content) != count * dtype.itemsize:
                raise ValueError(f"storage {record} has {len(content)} bytes, expected {count} numbers of {dtype}")
            flat = torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)
            storages[record] = flat
        return storages[record].as_strided(self.size, self.stride, self.offset)


def read_record(archive: zipfile.ZipFile, name: str) -> bytes:
    """A record of the archive as it lies in the file: torch does not compress, so no record can unfold to more."""
    record = archive.getinfo(name)
    if record.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"record {name} is compressed")
    return archive.read(record)


def check_global(module: str, name: str) -> Global:
    """
    A name that may stand in a checkpoint.

    Raises:
        pickle.UnpicklingError: if it is something of the standard library, torch or numpy that is no plain value.
    """
    if not (isinstance(module, str) and isinstance(name, str)):
        raise pickle.UnpicklingError("global without a name")
    full_name = f"{module}.{name}"
    is_known = module.partition(".")[0] in KNOWN_PACKAGES
    is_tensor = full_name in REBUILT_TENSORS | REBUILT_PARAMETERS
    is_storage = module in ("torch", "torch.storage") and name in STORAGE_DTYPES
    if is_known and not (is_tensor or is_storage or HARMLESS_GLOBALS.fullmatch(full_name)):
        raise pickle.UnpicklingError(f"global {full_name!a}")
    return Global(full_name)


def called(function: Any, arguments: Any) -> Any:
    """What stands for the result of a call that the pickle asks for."""
    if not isinstance(function, (Global, UnreadObject)) or not isinstance(arguments, tuple):
        raise pickle.UnpicklingError(f"call of a {type(function).__name__}, which is no global")
    name = getattr(function, "name", None)
    if name in REBUILT_TENSORS:
        if not isinstance(arguments[0], Storage):
            raise pickle.UnpicklingError("tensor of something else than a storage")
        return StoredTensor(*arguments[:4])
    if name in REBUILT_PARAMETERS:
        return arguments[0]
    if name == "collections.OrderedDict":
        content: dict = {}
        for key, value in arguments[0] if arguments else ():
            set_item(content, key, value)
        return content
    return UnreadObject()


def set_item(container: Any, key: Any, value: Any):
    if isinstance(container, dict):
        # the hash of a nested tuple can take forever, and no key but a text matters
        container[key if isinstance(key, str) else UnreadObject()] = value
    elif not isinstance(container, UnreadObject):
        raise pickle.UnpicklingError(f"item of a {type(container).__name__}")


def stored(identity: Any) -> Storage:
    """What a reference to a record says."""
    kind, storage_type, record, _, num_elements = identity
    dtype = STORAGE_DTYPES.get(storage_type.name.rpartition(".")[2])
    if kind != "storage" or dtype is None or not isinstance(record, str) or not isinstance(num_elements, int):
        raise pickle.UnpicklingError("reference to something else than a storage")
    return Storage(dtype, record, num_elements)


def read_pickle(content: bytes) -> Any:
    """
    The plain containers and `StoredTensor`s of the pickle in a torch archive. Nothing that it names is imported or
    called.

    Raises:
        pickle.UnpicklingError: if it names or does what no checkpoint needs.
        ValueError, IndexError, KeyError, TypeError, AttributeError: if it is broken.
    """
    stack: list = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop_to_mark() -> list:
        begin = marks.pop()
        items = stack[begin:]
        del stack[begin:]
        return items

    for opcode, argument, _ in pickletools.genops(content):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                break
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "BINSTRING" | "SHORT_BINSTRING":
                stack.append(argument)
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_SET":
                stack.append(UnreadObject())
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                length = int(opcode.name[-1])
                stack[-length:] = [tuple(stack[-length:])]
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "FROZENSET":
                pop_to_mark()
                stack.append(UnreadObject())
            case "POP":
                stack.pop()
            case "POP_MARK" | "ADDITEMS":
                pop_to_mark()
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if opcode.name == "APPEND" else pop_to_mark()
                if isinstance(stack[-1], list):
                    stack[-1].extend(items)
                elif not isinstance(stack[-1], UnreadObject):
                    raise pickle.UnpicklingError(f"elements of a {type(stack[-1]).__name__}")
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(-2), stack.pop()] if opcode.name == "SETITEM" else pop_to_mark()
                for key, value in zip(items[::2], items[1::2], strict=True):
                    set_item(stack[-1], key, value)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(check_global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(check_global(module, name))
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack.append(called(stack.pop(), arguments))
            case "NEWOBJ_EX":
                del stack[-1]  # keyword arguments
                arguments = stack.pop()
                stack.append(called(stack.pop(), arguments))
            case "BUILD":
                stack.pop()
                # the attributes of a state dict are versions of its modules
                if not isinstance(stack[-1], (dict, UnreadObject)):
                    raise pickle.UnpicklingError(f"attributes of a {type(stack[-1]).__name__}")
            case "BINPERSID":
                stack.append(stored(stack.pop()))
            case name:
                raise pickle.UnpicklingError(f"operation {name}, which torch does not write")
    return stack.pop()


def unwrapped(checkpoint: Any, parts: dict[str, str] | None = None) -> dict[str, Any]:
    """
    The state dict of a training checkpoint, or the state dict itself. `parts` as for `load_checkpoint`.
    """
    if parts and isinstance(checkpoint, dict):
        found = {part: dict.get(checkpoint, part) for part in parts}
        if any(isinstance(content, dict) for content in found.values()):
            return {
                f"{parts[part]}{name}": value
                for part, content in found.items()
                if isinstance(content, dict)
                for name, value in dict.items(content)
            }
    for key in ("net_state_dict", "state_dict", "model_state_dict", "model_state"):
        if isinstance(checkpoint, dict) and isinstance(dict.get(checkpoint, key), dict):
            checkpoint = dict.get(checkpoint, key)
    if not isinstance(checkpoint, dict) or not checkpoint:
        raise ValueError(f"expected a dictionary of parameters, found {type(checkpoint).__name__}")
    # the items themselves, whatever attributes a pickle has given to the dictionary
    return dict(dict.items(checkpoint))


def read_contents(archive: zipfile.ZipFile, path: Path) -> tuple[str, Any]:
    """Folder of the records in an archive of `torch.save`, and the containers and `StoredTensor`s of its pickle."""
    pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"expected one record data.pkl, found {len(pickles)}")
    if sum(record.file_size for record in archive.infolist()) > path.stat().st_size:
        raise ValueError("its records are larger than the file")
    folder = pickles[0].partition("/")[0]
    if f"{folder}/byteorder" in archive.namelist() and read_record(archive, f"{folder}/byteorder") != b"little":
        raise ValueError("its numbers are not little-endian")
    if archive.getinfo(pickles[0]).file_size > MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle is larger than {MAX_PICKLE_BYTES} bytes")
    return folder, read_pickle(read_record(archive, pickles[0]))


def read_archive(path: Path, parts: dict[str, str] | None = None) -> dict[str, Any]:
    """State dict of a file of `torch.save` since torch 1.6; of the rest of a training checkpoint nothing is read."""
    with zipfile.ZipFile(path) as archive:
        folder, content = read_contents(archive, path)
        state_dict = unwrapped(content, parts)
        storages: dict[str, Any] = {}
        return {
            name: value.read(archive, folder, storages) if isinstance(value, StoredTensor) else value
            for name, value in state_dict.items()
        }


def read_older_file(path: Path, parts: dict[str, str] | None = None) -> dict[str, Any]:
    """State dict of a file of `torch.save` before torch 1.6: tensors, numpy values and builtin containers only."""
    import numpy as np
    import torch

    # training histories hold numpy numbers; rebuilding arrays runs no code of the file
    multiarray = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
    numpy_types = [np.dtype, np.ndarray, multiarray.scalar, multiarray._reconstruct]
    numpy_types += [type(np.dtype(name)) for name in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")]
    # older numpy pickles name the same functions in numpy.core
    aliases = [(function, f"numpy.core.multiarray.{function.__name__}") for function in numpy_types[2:4]]
    with torch.serialization.safe_globals([*numpy_types, *aliases]):
        return unwrapped(torch.load(path, map_location="cpu", weights_only=True), parts)


def load_checkpoint(path: str | Path, parts: dict[str, str] | None = None) -> dict[str, Any]:
    """
    State dict of a `.safetensors`, `.pth`, `.pt` or `.ckpt` file, on the CPU.

    Training checkpoints that hold the weights under `net_state_dict`, `state_dict`, `model_state_dict` or `model_state`
    are unwrapped.
    The rest of them may hold objects of any package, which are neither imported nor rebuilt.

    Args:
        parts: of training checkpoints that hold the weights in several dictionaries: their names, and what is put in
            front of the names of their parameters.

    Raises:
        ValueError: if the file is not a checkpoint, or its pickle asks for what no checkpoint needs (nothing of it is
            executed).
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file ({error})") from None

    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    try:
        state_dict = read_archive(path, parts) if is_archive else read_older_file(path, parts)
    except pickle.UnpicklingError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "global" in line.lower()), first_line(error))
        raise ValueError(f"{path}: refused, it holds more than tensors and plain values: {reason}") from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a PyTorch checkpoint ({first_line(error)})") from None
    except (zipfile.BadZipFile, ArithmeticError, MemoryError) as error:
        raise ValueError(f"{path}: not a PyTorch checkpoint ({first_line(error)})") from None

    others = sorted(
        name if isinstance(name, str) and name.isprintable() else ascii(name)
        for name, value in state_dict.items()
        if not (isinstance(name, str) and name.isprintable() and isinstance(value, torch.Tensor))
        or value.layout != torch.strided
    )
    if others:
        raise ValueError(f"{path}: expected only named tensors, but these entries are not: {', '.join(others)}")
    # a few stored bytes can be declared as terabytes
    views = [n for n, t in state_dict.items() if t.numel() * t.element_size() > t.untyped_storage().nbytes()]
    if views:
        raise ValueError(f"{path}: these tensors are larger than what is stored of them: {', '.join(sorted(views))}")
    return state_dict


def load_averaged_weights(path: str | Path) -> dict[str, Any] | None:
    """
    State dict of the moving average that a Lightning callback has kept in a training checkpoint as `ema_weights`, a
    list in the order of the state dict; `None` if there is none. Read as safely as by `load_checkpoint`, which should
    have read the file before.

    Raises:
        ValueError: if the list does not have one tensor for every entry of the state dict.
    """
    path = Path(path)
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        folder, checkpoint = read_contents(archive, path)
        callbacks = dict.get(checkpoint, "callbacks") if isinstance(checkpoint, dict) else None
        states = dict.values(callbacks) if isinstance(callbacks, dict) else ()
        averages = [dict.get(state, "ema_weights") for state in states if isinstance(state, dict)]
        averages = [average for average in averages if isinstance(average, list) and average]
        if not averages:
            return None
        names = list(unwrapped(checkpoint))
        average = averages[0]
        if len(average) != len(names) or not all(isinstance(value, StoredTensor) for value in average):
            raise ValueError(f"{path}: ema_weights has {len(average)} entries, expected {len(names)} tensors")
        storages: dict[str, Any] = {}
        try:
            return {name: value.read(archive, folder, storages) for name, value in zip(names, average)}
        except (RuntimeError, OSError, ValueError, LookupError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: its ema_weights cannot be read ({first_line(error)})") from None
