"""What keeps the starting model in mind: the numbers that each of the three adds, on three tasks, and what it is for."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

import objkern  # noqa: E402
from objkern.finetune import retention  # noqa: E402
from objkern.finetune.tasks import Evaluation, Task  # noqa: E402
from objkern.finetune.training import TrainingOptions, train  # noqa: E402
from objkern.transformers import attach, is_attached  # noqa: E402

from .faults import ROOT  # noqa: E402
from .test_finetune_training import ONE_STEP, differences, model_of, rows_of, task_of  # noqa: E402

NAMES = ["token-classification", "causal-lm", "seq2seq"]
# Two steps: in the first one the model is still where it began, and no penalty has a gradient.
STEPS: dict[str, Any] = ONE_STEP | {"epochs": 2, "learning_rate": 0.5}


def made(name: str, dropout: float = 0.0) -> tuple[nn.Module, Task, list[Any]]:
    rows = rows_of(name, 8)
    task = task_of(name, rows)
    return model_of(task, dropout), task, task.examples(rows)


def logits_and_labels(model: nn.Module, task: Task, examples: list[Any]) -> tuple[Tensor, Tensor]:
    """Of the labels that count, in full: (N, V) and (N)."""
    batch = task.collate(examples)
    inputs, y = dict(batch.inputs), batch.target
    if task.name == "seq2seq":
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(y)
    logits = model(**inputs).logits
    if task.name == "causal-lm":
        logits, y = logits[:, :-1], y[:, 1:]
    return logits[y != -100], y[y != -100]


def weights_that_count(model: nn.Module) -> dict[str, Tensor]:
    """Neither biases nor those of norms."""
    norms = {f"{prefix}.{name}" for prefix, module in model.named_modules() if "norm" in type(module).__name__.lower()
             for name, _ in module.named_parameters(recurse=False)}  # fmt: skip
    return {name: p for name, p in model.named_parameters() if not name.endswith("bias") and name not in norms}


def two_steps_by_hand(name: str, penalty: Any) -> nn.Module:
    """SGD with momentum on all rows at once, a penalty of the model and its starting weights beside cross-entropy."""
    model, task, examples = made(name)
    start, _, _ = made(name)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in range(2):
        logits, y = logits_and_labels(model, task, examples)
        (F.cross_entropy(logits, y) + penalty(model, start, logits, task, examples)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def fisher_by_hand(name: str) -> dict[str, Tensor]:
    """Mean over the examples of the squared gradient of each one's summed log-likelihood."""
    model, task, examples = made(name)
    model.eval()
    found = {key: torch.zeros_like(p) for key, p in weights_that_count(model).items()}
    for example in examples:
        model.zero_grad()
        F.cross_entropy(*logits_and_labels(model, task, [example]), reduction="sum").backward()
        for key, p in weights_that_count(model).items():
            found[key] += 0.0 if p.grad is None else p.grad.square() / len(examples)
    return found


def l2sp(model: nn.Module, start: nn.Module, *_: Any) -> Tensor:
    before = weights_that_count(start)
    return 0.3 * sum(0.5 * (p - before[key]).square().sum() for key, p in weights_that_count(model).items())


def ewc(model: nn.Module, start: nn.Module, logits: Tensor, task: Task, *_: Any) -> Tensor:
    before, f = weights_that_count(start), fisher_by_hand(task.name)
    return 0.3 * sum(0.5 * (f[key] * (p - before[key]).square()).sum() for key, p in weights_that_count(model).items())


def kl(model: nn.Module, start: nn.Module, logits: Tensor, task: Task, examples: list[Any]) -> Tensor:
    with torch.no_grad():
        r, _ = logits_and_labels(start.eval(), task, examples)
    return 0.3 * F.kl_div(logits.log_softmax(-1), r.log_softmax(-1), reduction="batchmean", log_target=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("penalty", [l2sp, ewc, kl])
def test_training_is_that_of_the_formula(penalty: Any, name: str, tmp_path: Path) -> None:
    """24: counted once a step, however the step is cut into batches of other numbers of labels."""
    expected, plain = two_steps_by_hand(name, penalty), two_steps_by_hand(name, lambda *_: 0.0)
    effect = differences(expected, plain)
    assert effect > 1e-5
    for size, accumulation in ((8, 1), (3, 3)):
        model, task, examples = made(name)
        start = {key: x.clone() for key, x in model.state_dict().items()}
        objective, reference = retention.apply(
            f"{penalty.__name__}:0.3", objkern.CrossEntropy(), model, task, examples, batch_size=3
        )
        assert (reference is not None) == (penalty is kl)
        assert all(torch.equal(x, start[key]) for key, x in model.state_dict().items())
        options = TrainingOptions(batch_size=size, accumulation=accumulation, metric="score", **STEPS)
        scores = iter([0.1, 0.2])
        train(model, task, examples, lambda scores=scores: Evaluation({"score": next(scores)}), objective, options,
              tmp_path / str(size), reference=reference)  # fmt: skip
        assert differences(model, expected) < 1e-2 * effect + 1e-6, (size, differences(model, expected), effect)
        if reference is not None:
            assert all(torch.equal(x, start[key]) for key, x in reference.state_dict().items())
            assert not any(p.requires_grad or p.grad is not None for p in reference.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_fisher(name: str) -> None:
    """Of single examples, whatever the batch, with dropout off; and the model is as it was."""
    model, task, examples = made(name, dropout=0.5)
    if task.linear_head:
        attach(model, objkern.CrossEntropy())
    found = retention.fisher(model.train(), task, examples, batch_size=3)
    assert model.training
    assert not task.linear_head or not is_attached(model)
    assert all(p.grad is None for p in model.parameters())
    for key, f in fisher_by_hand(name).items():
        torch.testing.assert_close(found[key], f, rtol=1e-3, atol=1e-5 * f.max().item() + 1e-12)


@pytest.mark.parametrize("spec", ["l2", "kl", "kl:", "ewc:x", "l2sp:0", "kl:-1", "kl:nan", "ewc:inf", "kl:0.5:2", ""])
def test_bad_specs(spec: str) -> None:
    with pytest.raises(ValueError, match=r"retain: expected l2sp:C, ewc:C or kl:C with a positive number C but got"):
        retention.parse(spec)


def test_an_objective_that_is_attached_is_taken_off() -> None:
    """What retains is a part of another one."""
    model, task, examples = made("causal-lm")
    for spec in ("l2sp:1", "kl:1"):
        attach(model, objkern.CrossEntropy())
        _, reference = retention.apply(spec, objkern.CrossEntropy(), model, task, examples)
        assert not is_attached(model)
        assert reference is None or not is_attached(reference)


def test_what_cannot_be_retained() -> None:
    assert retention.parse("kl:0.5") == ("kl", 0.5)
    model, task, _ = made("several")
    with pytest.raises(ValueError, match=r"retain: expected an objective of classes beside kl but got BinaryCross"):
        retention.apply("kl:1", objkern.BinaryCrossEntropy(), model, task, [])
    with pytest.raises(ValueError, match="expected at least one sample but got none"):
        retention.apply("ewc:1", objkern.BinaryCrossEntropy(), model, task, [])


def test_the_example_of_forgetting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    found = importlib.import_module("forgetting").main()  # which asserts what it claims
    assert list(found) == ["nothing", "l2sp", "ewc", "kl"]
