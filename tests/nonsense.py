"""Objects that are given to every argument in turn, and what an answer to them may be."""

from __future__ import annotations

import math
import re
import warnings
from fractions import Fraction
from typing import Any

import torch

# What the library raises for what it was given, by its documentation.
REFUSALS = (ValueError, TypeError, IndexError, NotImplementedError)


class Strange:
    """An object of a class that no one has heard of."""

    def __repr__(self) -> str:
        return "Strange()"


def _tensors() -> dict[str, Any]:
    z = torch.zeros
    with torch.inference_mode():
        inference = z(4, 6)
    halves = [z(2, 6), z(2, 6)]
    return {
        "a number in a tensor": torch.tensor(0.5), "an int in a tensor": torch.tensor(3),
        "a bool in a tensor": torch.tensor(True), "a complex number in a tensor": torch.tensor(1j),
        "NaN in a tensor": torch.tensor(math.nan), "half a number": torch.tensor(0.5).half(),
        "a number on meta": z((), device="meta"), "one number": z(1), "none": z(0), "four": z(4), "six": z(6),
        "logits": z(4, 6), "more logits": z(5, 6), "fewer logits": z(0, 6), "no classes": z(4, 0), "deep": z(2, 4, 6),
        "labels": z(4, dtype=torch.long), "bad labels": torch.tensor([0, 1, 99, -5]),
        "labels for each class": z(4, 6, dtype=torch.long), "int32": z(4, dtype=torch.int32),
        "uint8": z(4, dtype=torch.uint8), "uint16": z(4, dtype=torch.uint16), "bool": z(4, 6).bool(),
        "complex": z(4, 6, dtype=torch.complex64), "float8": z(4, 6).to(torch.float8_e4m3fn), "float64": z(4, 6).double(),
        "meta": z(4, 6, device="meta"), "meta labels": z(4, dtype=torch.long, device="meta"),
        "sparse": z(4, 6).to_sparse(), "csr": torch.eye(4, 6).to_sparse_csr(), "mkldnn": z(4, 6).to_mkldnn(),
        "jagged": torch.nested.nested_tensor(halves, layout=torch.jagged), "nested": torch.nested.nested_tensor(halves),
        "quantized": torch.quantize_per_tensor(z(4, 6), 0.1, 0, torch.qint8), "inference": inference,
        "negated": torch._neg_view(z(4, 6)), "imaginary": z(4, 6, dtype=torch.complex64).conj().imag,
        "expanded": z(1, 1).expand(4, 6), "parameter": torch.nn.Parameter(z(4, 6)), "buffer": torch.nn.Buffer(z(4, 6)),
        "nothing but zeros": torch._efficientzerotensor((4, 6)),
    }  # fmt: skip


POOL: dict[str, Any] = {
    "None": None, "True": True, "0": 0, "-1": -1, "3": 3, "2^40": 2**40, "2^63": 2**63, "10^400": 10**400, "10^5000": 10**5000, "0.5": 0.5,
    "-0.0": -0.0, "nan": math.nan, "inf": math.inf, "1j": 1j, "fraction": Fraction(1, 2), "mean": "mean", "": "",
    "null byte": "a\0b", "bytes": b"x", "list": [], "list of one": [1], "tuple": (), "tuple of tensor": (torch.zeros(4, 6),),
    "tuple of two": (torch.zeros(4, 5), torch.zeros(6, 5)), "tuple of Nones": (None, None), "dict": {}, "dict of int": {"a": 1},
    "dict by number": {1: torch.zeros(4)}, "set": set(), "strange": Strange(), "class": int, "function": len,
    "module": torch.nn.Linear(2, 2), "dtype": torch.float32, "size": torch.Size([4]), "range": range(4),
}  # fmt: skip
with warnings.catch_warnings():  # torch's own, about layouts and dtypes that it does not recommend
    warnings.simplefilter("ignore")
    POOL |= _tensors()


# What else an error may name: arguments whose shapes belong together.
_TOGETHER = (
    {"logits", "target", "reference", "class_dim"}, {"hidden", "weight", "target", "bias"}, {"weight", "class weight"},
    {"mode", "validation"}, {"bytes", "limit"},
)  # fmt: skip


def named(error: Exception, argument: str) -> bool:
    """Whether an error names the argument that it is about, or one whose shape has to fit that one's."""
    others = set().union(*(group for group in _TOGETHER if argument in group))
    return any(re.search(rf"(?<![a-z_]){re.escape(name)}(?![a-z_])", str(error)) for name in {argument, *others})
