"""Triton's interpreter for a while: kernels that are imported within it run on the CPU, as on a card but for speed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS


def drop(package: str) -> None:
    """Forget a package's modules, so that the next import makes their kernels anew."""
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]


@contextmanager
def interpreted(package: str) -> Iterator[pytest.MonkeyPatch]:
    """Within the block `package` may be imported anew, interpreted; what it registers with transformers goes, too."""
    from triton import language
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    convert = interpreter._convert_float

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (language.float32, language.bfloat16):
            return convert(data, source, target, mode)
        return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.uint16).numpy()

    prepared = set()

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.fn not in prepared:
            prepared.add(self.fn)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*arguments, **options)

    drop(package)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        # Triton's own functions, tl.sum and the like, were made to be compiled if triton was imported before.
        interpret = interpreter.InterpretedFunction
        patch.setattr(JITFunction, "__call__", lambda self, *a, **options: interpret(self.fn)(*a, **options))
        # Once a function, not once a call, which takes longer than the function.
        patch.setattr(interpret, "__call__", call)
        # The interpreter cuts fp32 off to bf16, at twice the error of the card's rounding to nearest.
        patch.setattr(interpreter, "_convert_float", rounded)
        patch.setattr(type(ALL_EXPERTS_FUNCTIONS), "_global_mapping", dict(ALL_EXPERTS_FUNCTIONS._global_mapping))
        yield patch
    drop(package)
