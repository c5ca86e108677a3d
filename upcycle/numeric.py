"""Raw bytes of bf16, fp16 and fp32 as numpy sees them: conversion, and the search for NaN."""

from collections.abc import Mapping
from typing import Any, Final

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

# The dtypes that can be mixed, by their name in a safetensors header.
FLOATS: Final[Mapping[str, np.dtype[Any]]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
# Names as transformers' config.json and the command line write them.
TORCH_NAMES: Final[Mapping[str, str]] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

_UNSIGNED: Final[Mapping[int, np.dtype[Any]]] = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}
# Twice the bits of infinity, the sign shifted out: everything from there on is an infinity or a NaN.
_NOT_FINITE: Final = {"BF16": 2 * 0x7F80, "F16": 2 * 0x7C00, "F32": 2 * 0x7F800000}


def to_float32(data: bytes | memoryview, dtype: str) -> Array:
    """Raw little-endian bytes as a float32 array."""
    return np.frombuffer(data, FLOATS[dtype]).astype(np.float32)


def first_not_finite(data: Array, dtype: str, scratch: Array) -> int | None:
    """Index of the first NaN or infinity in raw bytes (uint8), or None; `scratch` is as large as `data`.

    Works on the bits in steps that stay in the cache: one shift and one maximum, at the memory's speed.
    """
    kind = _UNSIGNED[FLOATS[dtype].itemsize]
    bits, doubled = data.view(kind), scratch[: data.nbytes].view(kind)
    step = 131_072 // kind.itemsize
    for start in range(0, len(bits), step):
        part = doubled[start : start + step]
        np.left_shift(bits[start : start + step], 1, out=part)
        if part.max() >= _NOT_FINITE[dtype]:
            return start + int(np.argmax(part >= _NOT_FINITE[dtype]))
    return None
