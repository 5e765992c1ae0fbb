"""Files of `torch.save` (its zip format, torch 1.6 and later), read and written without torch.

An archive holds one pickle, whose tensors refer by key to storages: members that are raw little-endian numbers. A
pickle is a program that can call any function. Here it runs on Python's own interpreter of pickles with a short list of
opcodes, all for plain values, and about ten names, none of which is imported or called: every other opcode or name is
refused.
"""

import io
import math
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

# Gives numpy the name bfloat16.
import ml_dtypes  # noqa: F401
import numpy as np
from etils import epath

from sedd_jax.errors import InputError

DTYPES = {
    "torch.FloatStorage": "float32",
    "torch.DoubleStorage": "float64",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}
_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_OPCODES = (
    "PROTO FRAME STOP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE "
    "BINUNICODE8 EMPTY_LIST EMPTY_DICT EMPTY_TUPLE MARK TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS BINPUT LONG_BINPUT "
    "MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BINPERSID"
)


class Storage(NamedTuple):
    """The numbers of a member of the archive. size: how many."""

    key: str
    dtype: str
    size: int


class Tensor(NamedTuple):
    """A view of a storage; offset and strides are counted in numbers. Not checked against the storage yet."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Global:
    """A name of torch in a pickle."""

    name: str

    def __call__(self, *arguments: Any) -> Any:
        if self.name == _DICT and not arguments:
            return {}
        if self.name == _PARAMETER:
            return _of(Tensor, arguments[0])
        if self.name == _TENSOR:
            storage, offset, shape, strides = arguments[:4]
            for number in (offset, *_of(tuple, shape), *_of(tuple, strides)):
                _of(int, number)
            return Tensor(_of(Storage, storage), offset, shape, strides)
        raise TypeError(f"a call of {self.name}")


def _of(kind: type | tuple[type, ...], value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"a {type(value).__name__} out of place")
    return value


class _Dispatch(dict):
    def __missing__(self, code: int) -> Any:
        name = pickletools.code2op[chr(code)].name
        raise InputError(f"its pickle has the opcode {name}, which weights do not need; nothing was run")


class _Unpickler(pickle._Unpickler):  # The one in Python, since that in C does not let us choose the opcodes.
    def find_class(self, module: str, name: str) -> _Global:
        full = f"{module}.{name}"
        if full not in (_DICT, _TENSOR, _PARAMETER, *DTYPES):
            raise InputError(f"its pickle names {full[:100]!r}, which weights do not need; nothing was run")
        return _Global(full)

    def persistent_load(self, reference: Any) -> Storage:
        tag, kind, key, _, size = _of(tuple, reference)[:5]
        if tag != "storage":
            raise ValueError("a reference to something else than a storage")
        return Storage(_of(str, key), DTYPES[_of(_Global, kind).name], _of(int, size))

    def set_items(self, items: list[Any]) -> None:
        # Only plain keys: the hash of a deeply nested tuple would overflow the stack.
        keys = [_of((str, int), key) for key in items[::2]]
        _of(dict, self.stack[-1]).update(zip(keys, items[1::2], strict=True))

    def build(self) -> None:
        # Attributes of a dict of weights, where torch writes versions of its modules, are dropped.
        self.stack.pop()
        _of(dict, self.stack[-1])

    _codes = (ord(opcode.code) for opcode in pickletools.opcodes if opcode.name in _OPCODES.split())
    dispatch = _Dispatch((code, pickle._Unpickler.dispatch[code]) for code in _codes)
    dispatch[pickle.SETITEM[0]] = lambda self: self.set_items([self.stack.pop(-2), self.stack.pop()])
    dispatch[pickle.SETITEMS[0]] = lambda self: self.set_items(self.pop_mark())
    dispatch[pickle.BUILD[0]] = build


def unpickle(data: bytes) -> Any:
    """Plain values, lists, tuples and dicts, with a `Tensor` in place of each tensor.

    Raises InputError if the pickle names anything that tensors do not need, or is damaged.
    """
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except InputError:
        raise
    # Errors of a machine for well-formed programs: too few values, or values of another kind.
    except (
        pickle.UnpicklingError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        EOFError,
        OverflowError,
    ) as error:
        raise InputError(f"its pickle is damaged ({' '.join(str(error).split())[:100]}); get a sound copy") from error


@dataclass(frozen=True)
class TorchFile:
    """tree: the saved values, with a `Tensor` for each tensor. root: the folder of all members in the archive."""

    path: Path
    root: str
    tree: Any

    def read(self, tensor: Tensor) -> np.ndarray:
        """The numbers of a tensor, contiguous, in the dtype they were saved in.

        Raises InputError if they are missing, damaged, or fewer than the tensor's shape and strides claim.
        """
        storage = tensor.storage
        dtype = np.dtype(storage.dtype)
        data = _member(self.path, f"{self.root}/data/{storage.key}")
        last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=False))
        size = math.prod(tensor.shape)
        if (
            len(data) != storage.size * dtype.itemsize
            or not len(tensor.shape) == len(tensor.strides) <= 8
            or min((tensor.offset, *tensor.shape, *tensor.strides)) < 0
            # Strides of 0 would make as many numbers as one likes of a single one.
            or not 0 < size <= storage.size
            or last >= storage.size
        ):
            raise InputError(f"{self.path}: a tensor does not fit its data, storage {storage.key!r}; get a sound copy")
        view = np.lib.stride_tricks.as_strided(
            np.frombuffer(data, dtype)[tensor.offset :],
            tensor.shape,
            [stride * dtype.itemsize if n > 1 else 0 for n, stride in zip(tensor.shape, tensor.strides, strict=True)],
            writeable=False,
        )
        return np.array(view, order="C")


def load(path: Path) -> TorchFile:
    """Opens a file. Raises InputError if it is absent, damaged, of an older format, or names anything but tensors."""
    with _archive(path) as archive:
        names = set(archive.namelist())
    roots = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise InputError(f"{path} is a zip file, but not one of torch.save (it has {len(roots)} data.pkl, not 1)")
    byte_order = f"{roots[0]}/byteorder"
    if byte_order in names and _member(path, byte_order) != b"little":
        raise InputError(f"{path} was saved on a big-endian machine, which is not supported; save it again elsewhere")
    data = _member(path, f"{roots[0]}/data.pkl")
    try:
        return TorchFile(path, roots[0], unpickle(data))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def save(path: epath.Path, weights: Mapping[str, np.ndarray]) -> None:
    """Writes float32 weights such that `torch.load(path, weights_only=True)` gives an OrderedDict of tensors."""
    root = path.stem
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{root}/data.pkl", _pickle(weights))
        archive.writestr(f"{root}/byteorder", "little")
        for key, value in enumerate(weights.values()):
            with archive.open(f"{root}/data/{key}", "w", force_zip64=True) as member:
                member.write(np.ascontiguousarray(value, "<f4").data)
        archive.writestr(f"{root}/version", "3\n")


def _archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}; check the path") from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise InputError(
            f"{path} is cut short, damaged, or not a file of torch.save since torch 1.6 ({error}); get a sound copy"
        ) from error


def _member(path: Path, name: str) -> bytes:
    with _archive(path) as archive:
        try:
            info = archive.getinfo(name)
            # Torch never compresses. So no member may claim to hold more than the file does.
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > os.path.getsize(path):
                raise InputError(f"{path}: {name} is compressed or longer than its file, which torch does not write")
            return archive.read(info)
        except KeyError as error:
            raise InputError(f"{path} has no {name}; get a sound copy") from error
        # RuntimeError: encrypted. The checksum of a member is verified as it is read.
        except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError) as error:
            raise InputError(f"{path}: {name} is damaged ({error}); get a sound copy") from error


def _pickle(weights: Mapping[str, np.ndarray]) -> bytes:
    # Opcode by opcode, since Python's pickle could only name torch's functions if torch were there.
    ordered_dict = _name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    parts = [pickle.PROTO + b"\2", ordered_dict, pickle.MARK]
    for key, (name, value) in enumerate(weights.items()):
        strides = [math.prod(value.shape[axis + 1 :]) for axis in range(value.ndim)]
        storage = _tuple(
            _text("storage"), _name("torch", "FloatStorage"), _text(str(key)), _text("cpu"), _integer(value.size)
        )
        arguments = _tuple(
            storage + pickle.BINPERSID,
            _integer(0),
            _tuple(*map(_integer, value.shape)),
            _tuple(*map(_integer, strides)),
            pickle.NEWFALSE,
            ordered_dict,
        )
        parts += [_text(name), _name("torch._utils", "_rebuild_tensor_v2"), arguments, pickle.REDUCE]
    return b"".join([*parts, pickle.SETITEMS, pickle.STOP])


def _name(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _text(text: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(text.encode())) + text.encode()


def _integer(value: int) -> bytes:
    return pickle.BININT + struct.pack("<i", value)
