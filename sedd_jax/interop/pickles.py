"""A pickle of tensors, read as data: nothing that it names is looked up, imported or called.

A pickle is a program for a stack machine, and Python's own reader runs what it names. This one knows the opcodes of
plain values and the few names that `torch.save` writes for weights, and refuses the rest.
"""

import pickletools
from dataclasses import dataclass
from typing import Any

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

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}


@dataclass(frozen=True)
class Storage:
    """A run of numbers that lies elsewhere under a key. size: how many."""

    key: str
    dtype: str
    size: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage; offset and strides are counted in numbers. Nothing says yet that they fit."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Global:
    name: str


def read(data: bytes) -> Any:
    """Plain values, lists, tuples and dicts, with a `Tensor` in place of each tensor.

    Raises InputError if the pickle names anything else than tensors are made of, or is damaged.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.step(opcode.name, argument)
        (result,) = machine.stack
    except InputError:
        raise
    # What a machine for well-formed programs meets in one that is not: too few values, or of another kind.
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"its pickle is damaged ({' '.join(str(error).split())[:100]}); get a sound copy") from error
    return result


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _ if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case _ if name in _LITERALS:
                stack.append(argument)
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(self.pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self.pop(int(name[-1]))))
            case "APPEND" | "APPENDS":
                items = self.pop(1) if name == "APPEND" else self.pop_to_mark()
                _of(list, stack[-1]).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self.pop(2) if name == "SETITEM" else self.pop_to_mark()
                # Only plain keys: the hash of a tuple nested without end would overflow Python's own stack.
                keys = [_of((str, int), key) for key in items[::2]]
                _of(dict, stack[-1]).update(zip(keys, items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(_known(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                stack.append(_known(".".join(_of(str, part) for part in self.pop(2))))
            case "REDUCE":
                function, arguments = self.pop(2)
                stack.append(_made(_of(_Global, function).name, _of(tuple, arguments)))
            case "BUILD":
                # Attributes of a dict of weights (torch writes versions of its modules there).
                self.pop(1)
                _of(dict, stack[-1])
            case "BINPERSID":
                stack.append(_storage(*self.pop(1)))
            case _:
                raise InputError(f"its pickle has the opcode {name}, which weights do not need; nothing was run")

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("too few values")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items


def _of(kind: type | tuple[type, ...], value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"a {type(value).__name__} out of place")
    return value


def _known(name: str) -> _Global:
    if name not in (_DICT, _TENSOR, _PARAMETER, *DTYPES):
        raise InputError(f"its pickle names {name[:100]!r}, which weights do not need; nothing was run")
    return _Global(name)


def _made(name: str, arguments: tuple[Any, ...]) -> Any:
    if name == _DICT and not arguments:
        return {}
    if name == _PARAMETER:
        return _of(Tensor, arguments[0])
    if name == _TENSOR:
        storage, offset, shape, strides = arguments[:4]
        for number in (offset, *_of(tuple, shape), *_of(tuple, strides)):
            _of(int, number)
        return Tensor(_of(Storage, storage), offset, shape, strides)
    raise TypeError(f"a call of {name}")


def _storage(reference: Any) -> Storage:
    tag, kind, key, _, size = _of(tuple, reference)[:5]
    if tag != "storage":
        raise ValueError("a reference to something else than a storage")
    return Storage(_of(str, key), DTYPES[_of(_Global, kind).name], _of(int, size))
