"""The short way of a call without options: the same numbers as the general way, and only calls that it understands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import objkern
from objkern import ops
from objkern.functional import _DEFAULTS as DROP_IN_DEFAULTS
from objkern.objective import _DEFAULTS

from .conftest import DTYPES

SUM = objkern.CrossEntropy(label_smoothing=0.1) + 1e-2 * objkern.ZLoss() - 0.1 * objkern.Entropy()


def short(logits: Any, target: Any, objective: objkern.Objective = SUM, options: tuple[Any, ...] = _DEFAULTS) -> Any:
    return ops.default_call(ops.Program.of(objective.weighted_terms), logits, target, options, _DEFAULTS)


def rows(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    target = torch.randint(7, (5,))
    target[2] = -100
    return (3 * torch.randn(5, 7)).to(dtype).requires_grad_(), target


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_the_general_way(dtype: torch.dtype) -> None:
    logits, target = rows(dtype)
    loss = short(logits, target)
    general = SUM(logits, target, reduction="".join(("me", "an")))  # equal, but not the default itself
    assert loss.dtype == general.dtype
    assert torch.equal(loss, general)
    gradients = [torch.autograd.grad(x, logits)[0] for x in (loss, general)]
    assert torch.equal(*gradients)


def test_taken_by_calls_without_options(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_general_way(*_: Any, **__: Any) -> None:
        raise AssertionError("the general way")

    monkeypatch.setattr("objkern.objective.flatten", no_general_way)
    monkeypatch.setattr("objkern.functional.flatten", no_general_way)
    logits, target = rows()
    SUM(logits, target).backward()
    objkern.cross_entropy(logits, target, label_smoothing=0.1, z_loss=0.1).backward()
    for options in ({"ignore_index": 3}, {"reduction": "sum"}, {"softcap": 3.0}, {"return_parts": True}):
        with pytest.raises(AssertionError, match="the general way"):
            SUM(logits, target, **options)


@pytest.mark.parametrize("place", range(len(_DEFAULTS)))
def test_not_taken_with_an_option(place: int) -> None:
    assert short(*rows()) is not None
    options = list(_DEFAULTS)
    options[place] = object()
    assert short(*rows(), options=tuple(options)) is None


def test_not_taken_by_anything_unusual() -> None:
    logits, target = rows()
    unusual: dict[str, tuple[Any, Any]] = {
        "one row": (logits[0], target[0]),
        "sequences": (logits[None], target[None]),
        "no target": (logits, None),
        "probabilities": (logits, logits.softmax(-1)),
        "int32 labels": (logits, target.int()),
        "too few labels": (logits, target[1:]),
        "no classes": (logits[:, :0], target),
        "integers": (logits.long(), target),
        "complex": (logits.to(torch.complex64), target),
        "meta": (logits, target.to("meta")),
        "a list": (logits.tolist(), target),
        "a parameter": (torch.nn.Parameter(logits.detach()), target),
        "sparse": (logits.detach().to_sparse(), target),
    }
    for name, arguments in unusual.items():
        assert short(*arguments) is None, name
    coefficient = torch.tensor(0.5) * objkern.CrossEntropy()
    assert short(logits, target, coefficient) is None
    custom = objkern.custom(lambda s: s.lse, needs=("lse",))
    assert short(logits, target, custom) is None


def test_not_taken_under_a_mode() -> None:
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchFunctionMode):
        names: tuple[str, ...] = ()

        def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Seen.names += (str(f),)
            return f(*args, **(kwargs or {}))

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return f(*args, **(kwargs or {}))

    logits, target = rows()
    with Ops():
        assert short(logits, target) is None
    with Seen():
        SUM(logits, target)
    assert any("objkern" in name for name in Seen.names)


def test_errors_are_those_of_the_general_way() -> None:
    logits, target = rows()
    target[3] = 7
    messages = []
    for options in ({}, {"reduction": "sum"}):
        with pytest.raises(IndexError) as error:
            SUM(logits, target, **options)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert "row 3 holds label 7" in messages[0]


def test_nothing_is_leaked() -> None:
    import sys

    logits, target = rows()
    program = ops.Program.of(SUM.weighted_terms)
    held = (logits, target, program.terms, _DEFAULTS, *_DEFAULTS[1:2])
    before = [sys.getrefcount(x) for x in held]
    for _ in range(100):
        assert ops.default_call(program, logits, target, _DEFAULTS, _DEFAULTS) is not None
        assert ops.default_call(program, logits[0], target, _DEFAULTS, _DEFAULTS) is None
    assert [sys.getrefcount(x) for x in held] == before


def test_the_drop_in_keeps_infinite_logits() -> None:
    logits, target = rows()
    with torch.no_grad():
        logits[0, 1] = -torch.inf
    program = ops.Program([0.0, 0.1, 1.0])
    loss = ops.default_call(program, logits, target, DROP_IN_DEFAULTS, DROP_IN_DEFAULTS, masked=False)
    expected = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
    assert loss.isinf()
    assert expected.isinf()
