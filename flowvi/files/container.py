"""The format of files: a description in JSON, and arrays.

A file is a line that names the format, the length and the digest of the description, the
description, and the bytes of all arrays, one behind the other. Each array has its place, type,
shape and digest in the description. So a reader knows what is to come before it makes room for it,
and notes whatever is not as it was written. Reading executes nothing.
"""

import contextlib
import hashlib
import json
import math
import os
import pathlib
import tempfile
from typing import Any, BinaryIO

import numpy as np

from flowvi.checks import require

MAGIC = b"flowvi file 1\n"

#: What names a file.
Path = str | os.PathLike[str]
#: What JSON can hold.
Json = Any
Arrays = dict[str, np.ndarray]


def write(path: Path, about: Json, arrays: Arrays) -> None:
    """Writes a description and arrays beside a file's place, and renames that when it is whole.

    Raises:
        OSError: if the file cannot be written; one that was there before is as it was.
    """
    path = pathlib.Path(path)
    table: list[list[Json]] = []
    start = 0
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    for name, array in arrays.items():
        table.append([name, array.dtype.name, list(array.shape), start, digest_of(name, array)])
        start += array.nbytes
    header = json.dumps({"about": about, "arrays": table}).encode()
    # A name that nobody can foresee, and a file that is not there yet: no link is followed.
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            digest = hashlib.sha256(header).digest()
            file.write(MAGIC + len(header).to_bytes(8, "little") + digest + header)
            for array in arrays.values():
                file.write(array.reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)  # which can only be read by a change
        os.umask(mask)
        os.chmod(part, 0o666 & ~mask)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def read(path: Path) -> tuple[Json, Arrays]:
    """The description and the arrays of a file, as they were written.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is another program's, or damaged; the message names the array.
    """
    is_path = isinstance(path, str | os.PathLike)
    require(is_path, "`path` must be the path of a file", path, error=TypeError)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = len(MAGIC) + 40
        head = file.read(start)
        length = int.from_bytes(head[len(MAGIC) : len(MAGIC) + 8], "little")
        if not head.startswith(MAGIC) or start + length > size:
            raise damaged(path, "it does not begin as such a file does")
        header = file.read(length)
        if hashlib.sha256(header).digest() != head[-32:]:
            raise damaged(path, "its description is not what was written")
        try:
            content = json.loads(header)
            about, table = content["about"], content["arrays"]
            arrays = {row[0]: _read_array(file, start + length, size, row) for row in table}
        except (TypeError, KeyError, IndexError, ValueError) as error:
            raise damaged(path, str(error)) from None
    return about, arrays


def _read_array(file: BinaryIO, base: int, size: int, row: list[Json]) -> np.ndarray:
    name, dtype, shape, start, digest = row
    kind = np.dtype(dtype)
    num_bytes = math.prod(map(int, shape)) * kind.itemsize  # Python's integers do not overflow
    has_place = min([0, start, *shape]) == 0 and base + start + num_bytes <= size
    if kind.kind in "OSUMm" or not has_place:
        raise ValueError(f"the array {name!r} does not fit into the file")
    file.seek(base + start)
    array = np.frombuffer(bytearray(file.read(num_bytes)), np.uint8).view(kind).reshape(shape)
    if digest_of(name, array) != digest:
        raise ValueError(f"the array {name!r} is not what was written")
    return array


def digest_of(name: str, array: np.ndarray) -> str:
    """A digest of an array, its type, shape and name."""
    about = f"{name} {array.dtype.name} {array.shape}".encode()
    return hashlib.sha256(about + array.tobytes()).hexdigest()


def damaged(path: Path, why: str) -> ValueError:
    """The error of a file that is not as it was written."""
    rule = "`path` must be a file that flowvi wrote"
    return ValueError(f"{rule}; {os.fspath(path)!r} is damaged or another program's: {why}.")
