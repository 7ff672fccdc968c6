"""What a joblib dump says, read without running anything of it.

A dump is a pickle with the bytes of its arrays between the instructions. An ordinary reader imports whatever class or
function a pickle names and calls it, which lets the file run what it likes. Here every name stands for a record that
only keeps what it is given: nothing is imported, nothing of the file's choice is called, and no array is made before
its type and size are looked at. So neither joblib nor scikit-learn is needed, and no file has to be trusted.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

# What the unpickler raises for bytes that are no pickle, or instructions that make no sense.
MALFORMED = (
    pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError, OverflowError, AssertionError,
    RecursionError, MemoryError, struct.error,
)  # fmt: skip
ARRAY = "joblib.numpy_pickle.NumpyArrayWrapper"
DTYPE = "numpy.dtype"
PLAIN_TYPES = re.compile(r"b1|[iu][1248]|f[248]")


class NotReadable(ValueError):
    """A file that is no joblib dump, or holds what is not read here; in words."""


class Record:
    """An object of the pickle: what it is called with and the state it is given, and no behaviour."""

    origin = ""
    """Module and name of the class or function that would have made it."""

    arguments: tuple[Any, ...]
    state: Any = None
    values: NDArray[Any] | None = None
    """Of an array: what follows it in the file."""

    def __new__(cls, *arguments: Any, **named: Any) -> Record:
        record = super().__new__(cls)
        record.arguments = arguments
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_joblib(path: Path) -> Any:
    """The object in a dump that is not compressed: plain values as they are, everything else as Records, whose arrays
    `array` gives. Raises NotReadable."""
    content = path.read_bytes()  # in memory, no instruction can ask for more bytes than there are
    if content[:1] != pickle.PROTO:
        raise NotReadable("it is no joblib dump, or a compressed one")
    try:
        return _Reader(io.BytesIO(content)).load()
    except NotReadable:
        raise
    except MALFORMED as error:
        raise NotReadable(f"it is damaged or no joblib dump ({type(error).__name__})") from None


def array(record: Any) -> NDArray[Any]:
    """The array that a Record of a dump stands for. Raises NotReadable where it is none."""
    if not isinstance(record, Record) or record.values is None:
        raise NotReadable("it holds something else where an array of numbers is expected")
    return record.values


class _Reader(pickle._Unpickler):
    """Python's own unpickler, which joblib's builds on too, with every import replaced."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.file = file

    def find_class(self, module: str, name: str) -> type[Record]:
        return type("Record", (Record,), {"origin": f"{module}.{name}"})

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError("extensions of the pickle registry name classes, too")

    def load_build(self) -> None:
        super().load_build()  # type: ignore[misc]
        made = self.stack[-1]  # type: ignore[attr-defined]
        if isinstance(made, Record) and made.origin == ARRAY:
            made.values = self._array(made.state)

    dispatch[pickle.BUILD[0]] = load_build

    def load_nothing(self) -> None:
        raise NotReadable("it holds what joblib does not write")

    # Python takes the memory for these before it looks whether the bytes are there.
    dispatch[pickle.BYTEARRAY8[0]] = load_nothing
    dispatch[pickle.NEXT_BUFFER[0]] = load_nothing
    dispatch[pickle.READONLY_BUFFER[0]] = load_nothing
    # These hash what they hold, which takes for ever of tuples of tuples of the same tuple.
    dispatch[pickle.DICT[0]] = load_nothing
    dispatch[pickle.ADDITEMS[0]] = load_nothing
    dispatch[pickle.FROZENSET[0]] = load_nothing

    def load_setitem(self) -> None:
        self._check_keys(self.stack[-2:])  # type: ignore[attr-defined]
        super().load_setitem()  # type: ignore[misc]

    def load_setitems(self) -> None:
        self._check_keys(self.stack)  # type: ignore[attr-defined]
        super().load_setitems()  # type: ignore[misc]

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems

    def _check_keys(self, items: list[Any]) -> None:
        """Of keys and values in turn."""
        if not all(isinstance(key, str | int | bytes) for key in items[::2]):
            raise NotReadable("it holds a mapping by other keys than joblib writes")

    def _array(self, said: dict[str, Any]) -> NDArray[Any]:
        """The array whose bytes follow its description; newer dumps align them."""
        dtype, shape = _dtype(said["dtype"]), said["shape"]
        if not all(type(length) is int and length >= 0 for length in shape):
            raise NotReadable("it holds an array without a shape")
        if said.get("numpy_array_alignment_bytes") is not None:
            self.file.read(self.file.read(1)[0])
        size = dtype.itemsize * prod(shape)
        data = self.file.read(size)
        if len(data) < size:
            raise NotReadable("it is cut short")
        values = np.frombuffer(data, dtype)
        return values.reshape(shape[::-1]).T if said["order"] == "F" else values.reshape(shape)


def _dtype(said: Any) -> np.dtype[Any]:
    """The number type that a record of numpy's dtype describes: its code, and its byte order in its state."""
    if not isinstance(said, Record) or said.origin != DTYPE or not PLAIN_TYPES.fullmatch(said.arguments[0]):
        raise NotReadable("it holds an array of something else than numbers")
    return np.dtype(said.arguments[0]).newbyteorder(">" if said.state[1] == ">" else "<")
