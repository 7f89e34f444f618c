"""Memory embeddings as JSON and back: base64 of raw little-endian numbers, or nested lists. Knows no HTTP.

float32 survives the round trip bit for bit; float16 is half the size and loses up to 1 part in 2,048 of each number.
"""

import base64
import binascii
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.errors import InvalidInputError, TooLargeError

Dtype = Literal["float32", "float16"]
Encoding = Literal["base64", "json"]
DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}


def encode_embeddings(memory: Tensor, dtype: Dtype, encoding: Encoding) -> str | list[list[float]]:
    """`memory` (l, d), any float dtype, as base64 text or as l lists of d numbers."""
    array = memory.detach().to("cpu", torch.float32).numpy().astype(DTYPES[dtype])
    if encoding == "json":
        rows: list[list[float]] = array.tolist()
        return rows
    return base64.b64encode(array.tobytes()).decode("ascii")


def decode_embeddings(
    data: str | Sequence[Sequence[float]],
    dtype: Dtype,
    shape: Sequence[int],
    width: int,
    max_rows: int,
    field: str,
    held_in: torch.dtype = torch.float32,
) -> Tensor:
    """Numbers that `encode_embeddings` wrote, (l, d) float32 on the CPU.

    `width` is the generator's embedding width and `max_rows` the most embeddings taken; both are checked, as is the
    length of `data`, before memory for the numbers is taken. The generator computes in `held_in`, which has to hold
    every number. Raises InvalidInputError and TooLargeError for `field`.
    """
    if len(shape) != 2 or shape[1] != width:
        raise InvalidInputError(f"{field}.shape", f"must be [memory embeddings, {width}], got {list(shape)}")
    if shape[0] < 1:
        raise InvalidInputError(f"{field}.shape", "has no memory embeddings: give at least 1")
    if shape[0] > max_rows:
        raise TooLargeError(f"{field}.shape", f"{shape[0]} is over the limit of {max_rows} memory embeddings", max_rows)
    rows = int(shape[0])
    if isinstance(data, str):
        array = _from_base64(data, dtype, rows, width, field)
    else:
        array = _from_lists(data, rows, width, field)
    if not np.isfinite(array).all():
        raise InvalidInputError(f"{field}.data", "holds a number that is not finite")
    memory = torch.from_numpy(array.astype(np.float32))
    if not memory.to(held_in).isfinite().all():
        most, name = torch.finfo(held_in).max, str(held_in).removeprefix("torch.")
        raise InvalidInputError(f"{field}.data", f"holds a number over {most:.5g}: the generator computes in {name}")
    return memory


def _from_base64(data: str, dtype: Dtype, rows: int, width: int, field: str) -> NDArray[Any]:
    size = rows * width * DTYPES[dtype].itemsize
    expected = 4 * math.ceil(size / 3)
    if len(data) != expected:
        numbers = f"[{rows}, {width}] {dtype}"
        raise InvalidInputError(f"{field}.data", f"must be {expected} base64 characters for {numbers}, got {len(data)}")
    try:
        raw = base64.b64decode(data.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise InvalidInputError(f"{field}.data", "is not base64") from None
    if len(raw) != size:
        raise InvalidInputError(f"{field}.data", f"must hold {size} bytes for shape [{rows}, {width}] in {dtype}")
    return np.frombuffer(raw, DTYPES[dtype]).reshape(rows, width)  # (l, d)


def _from_lists(data: Sequence[Sequence[float]], rows: int, width: int, field: str) -> NDArray[Any]:
    if len(data) != rows or any(len(row) != width for row in data):
        raise InvalidInputError(f"{field}.data", f"must be {rows} lists of {width} numbers, as its shape says")
    limit = float(np.finfo(np.float32).max)
    array = np.asarray(data, dtype=np.float64)  # (l, d)
    if not (np.abs(array) <= limit).all():
        raise InvalidInputError(f"{field}.data", "holds a number that float32 cannot hold")
    return array
