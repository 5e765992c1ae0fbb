"""Files of `torch.save` (its zip format, torch 1.6 and later), read and written without torch. An archive holds one
pickle, whose tensors refer by key to storages: members that are raw little-endian numbers."""

import contextlib
import functools
import io
import math
import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from sedd_jax.errors import InputError, explained


class Storage(NamedTuple):
    """A run of numbers in the member `key` of the archive. size: how many."""

    key: str
    dtype: np.dtype
    size: int


class Tensor(NamedTuple):
    """A view of a storage. Offset and strides count numbers. They need not fit the storage: `TorchFile.read` checks."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchFile(NamedTuple):
    """tree: the saved object, with a `Tensor` for each tensor. root: the folder of all members in the archive."""

    path: Path
    root: str
    tree: Any

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """The numbers of each tensor, contiguous, in the dtype they were saved in. Tensors may share memory. Raises
        InputError if they are missing, damaged, do not fit, or are more than twice as long as the file."""
        with _opened(self.path) as archive:
            data = functools.cache(lambda key: archive.read(f"{self.root}/data/{key}"))
            views = {name: self._view(tensor, data(tensor.storage.key)) for name, tensor in tensors.items()}
        if sum(view.nbytes for view in views.values()) > 2 * os.path.getsize(self.path):
            raise InputError(f"{self.path}: its tensors share their data too often; get a sound copy")
        return {name: np.asarray(view, order="C") for name, view in views.items()}

    def _view(self, tensor: Tensor, data: bytes) -> np.ndarray:
        storage, shape, itemsize = tensor.storage, tensor.shape, tensor.storage.dtype.itemsize
        # The stride of an axis of length 1 is never used, and may be anything.
        strides = [stride if n > 1 else 1 for n, stride in zip(shape, tensor.strides, strict=False)]
        if (
            len(data) != storage.size * itemsize
            or not len(shape) == len(tensor.strides) <= 8
            # Strides of 0 would make many numbers of a single one, as would views that overlap.
            or min(1 + tensor.offset, *shape, *strides, 1) < 1
            or math.prod(shape) > storage.size
            # In Python's integers, since numpy's own check overflows.
            or tensor.offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) >= storage.size
        ):
            key = storage.key[:100]
            raise InputError(f"{self.path}: a tensor does not fit its data, storage {key!r}; get a sound copy")
        places = [stride * itemsize for stride in strides]
        return np.ndarray(shape, storage.dtype, data, tensor.offset * itemsize, places)


def load(path: Path) -> TorchFile:
    """Opens a file. Raises InputError if it is absent, damaged, of an older format, or names anything but tensors."""
    with _opened(path) as archive:
        names = archive.namelist()
        roots = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise InputError(f"{path} is a zip file, but not one of torch.save (it has {len(roots)} data.pkl, not 1)")
        byte_order = f"{roots[0]}/byteorder"
        if byte_order in names and archive.read(byte_order) != b"little":
            raise InputError(f"{path} is of a big-endian machine, which is not supported; save it again elsewhere")
        data = archive.read(f"{roots[0]}/data.pkl")
    if len(data) > 1 << 23:  # a byte may make an object of 64; a tensor takes some 200
        raise InputError(f"{path}: its pickle is longer than 8 MiB, which weights do not need")
    # A damaged program can fail in any way: too few values on the stack, or values of another kind.
    with explained(str(path), "", InputError), explained("its pickle is damaged", "get a sound copy", Exception):
        reader = _LightningReader if b"state_dict" in data else _Reader
        return TorchFile(path, roots[0], reader(io.BytesIO(data)).load())


def _rebuild_tensor(storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> Tensor:
    if type(storage) is not Storage or {type(offset), *map(type, (*shape, *strides))} != {int}:
        raise TypeError("a tensor of odd parts")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


_DTYPES = {"Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": ml_dtypes.bfloat16, "Long": "int64"}
_DTYPES |= {"Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"}
# All that a pickle may name, as `torch.save` does for weights. A parameter is its tensor.
_NAMES = {f"torch.{kind}Storage": np.dtype(dtype) for kind, dtype in _DTYPES.items()} | {
    "collections.OrderedDict": lambda: {},
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, requires_grad, hooks: tensor,
}
_OPCODES = """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE
SHORT_BINUNICODE BINUNICODE8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT BINPUT
LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BINPERSID"""


class Opaque:
    """Stands for a class that is not known here, and for its objects. It drops what it is given."""

    def __call__(self, *_: Any) -> "Opaque":
        return self

    append = extend = update = __call__


class _Opcodes(dict):
    def __missing__(self, code: int) -> Any:
        name = pickletools.code2op[chr(code)].name
        raise InputError(f"its pickle has the opcode {name}, which weights do not need; nothing was run")


class _Reader(pickle._Unpickler):
    """A pickle is a program that may call what it names. This reader allows what `torch.save` writes for weights.
    Opcodes: plain values, lists, tuples, dicts (with keys that are str or int), names, calls, storages; not objects,
    sets, byte arrays and extension codes, among others. Names: the keys of _NAMES, which stand for functions and dtypes
    of ours; no other function can be called. The state of an object (BUILD) is dropped, so nothing of ours changes. The
    unpickler in C has fixed opcodes, hashes any key (a deep tuple overflows its stack), and allocates what it asks."""

    def find_class(self, module: str, name: str) -> Any:
        if (named := f"{module}.{name}") not in _NAMES:
            raise InputError(f"its pickle names {named[:100]!r}, which weights do not need; nothing was run")
        return _NAMES[named]

    def persistent_load(self, reference: Any) -> Storage:
        match reference:
            case "storage", np.dtype() as dtype, str(key), _, int(size), *_:
                return Storage(key, dtype, size)
        raise ValueError("a reference to something else than a storage")

    def load_build(self) -> None:
        self.stack.pop()  # torch keeps versions of its modules in an attribute of the dict of weights
        if not isinstance(self.stack[-1], dict | Opaque):
            raise TypeError("a state of something else than a dict")

    def load_setitem(self) -> None:
        self.update([self.stack.pop(-2), self.stack.pop()])

    def load_setitems(self) -> None:
        self.update(self.pop_mark())

    def update(self, items: list[Any]) -> None:
        # Other keys can take without end to hash: a tuple of a tuple of a tuple, or integers that collide.
        if not all(isinstance(key, str) or (isinstance(key, int) and abs(key) < 1 << 31) for key in items[::2]):
            raise TypeError("a key that is neither a name nor a number")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    _codes = [getattr(pickle, name)[0] for name in _OPCODES.split()]
    dispatch = _Opcodes((code, pickle._Unpickler.dispatch[code]) for code in _codes)
    dispatch |= {pickle.BUILD[0]: load_build, pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}


class _LightningReader(_Reader):
    """For Lightning's checkpoints, with objects of any classes beside the weights (`hyper_parameters`): unknown names
    stand for `Opaque`, so that nothing is imported or called. Items of dicts with other keys are dropped."""

    def find_class(self, module: str, name: str) -> Any:
        return _NAMES.get(f"{module}.{name}", Opaque())

    def update(self, items: list[Any]) -> None:
        pairs = zip(items[::2], items[1::2], strict=True)
        super().update([part for pair in pairs if isinstance(pair[0], str | int) for part in pair])

    def load_newobj(self) -> None:
        if not isinstance(self.stack.pop(-2), Opaque):
            raise TypeError("an object of something else than a class")
        self.stack[-1] = Opaque()

    _codes = [getattr(pickle, name)[0] for name in ("POP", "POP_MARK", "BINBYTES", "SHORT_BINBYTES")]
    dispatch = _Opcodes(_Reader.dispatch | {code: pickle._Unpickler.dispatch[code] for code in _codes})
    dispatch[pickle.NEWOBJ[0]] = load_newobj


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    # RuntimeError: encrypted. KeyError: no such member. The checksum of a member is verified as it is read.
    damages = zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, KeyError
    what = f"{path} is cut short, damaged, or not a file of torch.save since torch 1.6"
    sound = explained(what, "get a sound copy", *damages)
    with explained(f"{path} cannot be read", "check the path", OSError), sound, zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        # Torch never compresses. So the members may not claim to hold more than the file does.
        stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
        if not stored or sum(member.file_size for member in members) > os.path.getsize(path):
            raise InputError(f"{path} has members that are compressed or overlap, which torch does not write")
        yield archive


def save(path: epath.Path, weights: Mapping[str, np.ndarray]) -> None:
    """Writes float32 weights such that `torch.load(path, weights_only=True)` gives an OrderedDict of tensors."""

    def piece(value: Any) -> bytes:
        return pickletools.optimize(pickle.dumps(value, 2))[2:-1]  # without PROTO and STOP around it, and memo

    # Joined from pieces, since Python's pickle could only name torch's functions if torch were there.
    parts = [pickle.PROTO + b"\2", piece(OrderedDict()), pickle.MARK]
    for key, (name, value) in enumerate(weights.items()):
        strides = tuple(math.prod(value.shape[axis + 1 :]) for axis in range(value.ndim))
        parts += [piece(name), b"ctorch._utils\n_rebuild_tensor_v2\n", pickle.MARK, pickle.MARK]
        parts += [piece("storage"), b"ctorch\nFloatStorage\n", piece(str(key)), piece("cpu"), piece(value.size)]
        parts += [pickle.TUPLE, pickle.BINPERSID, piece(0), piece(value.shape), piece(strides), piece(False)]
        parts += [piece(OrderedDict()), pickle.TUPLE, pickle.REDUCE]
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{path.stem}/data.pkl", b"".join([*parts, pickle.SETITEMS, pickle.STOP]))
        archive.writestr(f"{path.stem}/byteorder", "little")
        for key, value in enumerate(weights.values()):
            with archive.open(f"{path.stem}/data/{key}", "w", force_zip64=True) as member:
                member.write(np.ascontiguousarray(value, "<f4").data)
        archive.writestr(f"{path.stem}/version", "3\n")
