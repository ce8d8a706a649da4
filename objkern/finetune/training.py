"""The training loop, top to bottom: windows of batches, a step for each; evaluation, early stopping, checkpoints.

    epoch ──▶ windows ──▶ batches ──▶ loss / count of the window ──▶ backward     (count: labels of all its batches)
                             └──────▶ step: clip, rate, optimizer, log
          ──▶ score on dev ──▶ best? stop? ──▶ checkpoint

A window is what one step of the optimizer sees: `accumulation` batches on each of the ranks that a run began with, and
as many when it goes on with another number of them. Every loss is a sum over the rows of its batch divided by the count
of the whole window, so gradients add up to that of one big batch, however it is cut. Terms on parameters are added
once, behind the batches. Order is a function of the seed and the epoch, rates are functions of the step, dropout is one
of seed, step and batch; a checkpoint holds the rest. Ranks decide nothing alone: each sees every interruption and every
bad loss.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..batch import describe
from ..distributed import own, part_of
from . import checkpoints, parallel, strategies
from .parallel import Layout
from .schedules import Schedule
from .tables import first_line

if TYPE_CHECKING:
    from objkern import Objective

    from .tasks import Batch, Evaluation, Example, Task

__all__ = ["Outcome", "Progress", "TrainingOptions", "train"]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": lambda p, **o: torch.optim.SGD(p, momentum=0.9, **o),
}  # fmt: skip
RATES: dict[str, Callable[[float], float]] = {  # of the share of the steps after warm-up that are done
    "linear": lambda share: 1.0 - share, "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
    "constant": lambda share: 1.0,
}  # fmt: skip
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TrainingOptions:
    """How to train; what and on what is said elsewhere.

    Attributes:
        epochs: at most.
        batch_size: rows at a time, on every rank.
        accumulation: batches of a step, on every rank; the gradient is that of one big batch.
        optimizer: "adamw", "adam" or "sgd".
        learning_rate: at its peak.
        schedule: of the rate after its peak, "linear", "cosine" or "constant".
        warmup: share of all steps before the peak.
        weight_decay: of matrices; biases and norms have none.
        clip: largest norm of the gradient.
        patience: evaluations without a better one before training stops.
        metric: that decides which epoch is best; None: the task's own.
        precision: "float32" or "bfloat16".
        group_by_length: whether texts of similar length share a batch, which saves padding. Where the length says
            something about the label, as it does where one class is of short texts, a batch then has few of the others.
        checkpointing: activations are computed anew in the backward pass.
        strategy: what trains: "full", "head", "last:2", "lora:16", "prompt:20" or "gradual".
        parallel: how ranks share the work: "data", "fsdp", "tensor" or "tensor:2".
        seed: of weights, dropout and order.
        checkpoint_steps: between checkpoints within an epoch; 0: at its end only.

    Raises:
        ValueError: names the option, what was expected and what came.

    >>> from objkern.finetune.training import TrainingOptions
    >>> TrainingOptions(batch_size=4, accumulation=8, learning_rate=2e-5).schedule
    'linear'
    >>> TrainingOptions(epochs=0)
    Traceback (most recent call last):
    ValueError: epochs: expected a whole number of at least 1 but got 0
    """

    epochs: int = 3
    batch_size: int = 16
    accumulation: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 5e-5
    schedule: str = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    patience: int = 3
    metric: str | None = None
    precision: str = "float32"
    group_by_length: bool = False
    checkpointing: bool = False
    strategy: str = "full"
    parallel: str = "data"
    seed: int = 0
    checkpoint_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulation", "patience"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1 but got {value!r}")
        for name, low, high in (("warmup", 0.0, 1.0), ("weight_decay", 0.0, math.inf)):
            if not low <= getattr(self, name) < high:
                raise ValueError(f"{name}: expected a number in [{low:g}, {high:g}) but got {getattr(self, name)!r}")
        for name, high in (("learning_rate", 1e6), ("clip", math.inf)):
            if not 0.0 < getattr(self, name) < high:
                below = "" if high == math.inf else f" below {high:g}"
                raise ValueError(f"{name}: expected a positive number{below} but got {getattr(self, name)!r}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: expected a whole number in [0, 2**32) but got {self.seed!r}")
        for name, choices in (("optimizer", OPTIMIZERS), ("schedule", RATES), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)} but got {getattr(self, name)!r}")
        if type(self.checkpoint_steps) is not int or self.checkpoint_steps < 0:
            raise ValueError(
                f"checkpoint_steps: expected a whole number of at least 0 but got {self.checkpoint_steps!r}"
            )
        strategies.parse(self.strategy)
        parallel.parse(self.parallel)


@dataclass
class Progress:
    """Where a run stands; all of it is in a checkpoint."""

    batches: int  # of a window: of all the ranks that the run began with
    epoch: int = 1
    window: int = 0  # of the epoch, the next one
    step: int = 0  # that are done
    best: float | None = None
    best_epoch: int = 0
    stale: int = 0  # evaluations since the best one
    finished: bool = False
    sums: dict[str, float] = field(default_factory=dict)  # of the epoch's parts
    seconds: float = field(default=0.0, compare=False)  # for all that is done, in however many sessions

    def check(self) -> None:
        """As read from a file, which says nothing of types."""
        for name, least in (("batches", 1), ("epoch", 1), ("window", 0), ("step", 0), ("best_epoch", 0), ("stale", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}: expected a whole number of at least {least} but got {value!r}")
        if type(self.finished) is not bool:
            raise ValueError(f"finished: expected true or false but got {self.finished!r}")
        best = 0.0 if self.best is None else self.best
        for name, value in [("best", best), ("seconds", self.seconds), *dict(self.sums).items()]:
            if type(value) not in (int, float):
                raise ValueError(f"{name}: expected a number but got {value!r}")


@dataclass(frozen=True)
class Outcome:
    """How a run ended: "finished", "stopped early" or "interrupted", and where it stood."""

    how: str
    progress: Progress


def train(
    model: nn.Module,
    task: Task,
    examples: Sequence[Example],
    score: Callable[[], Evaluation],
    objective: Objective,
    options: TrainingOptions,
    folder: Path,
    log: Callable[[dict[str, Any]], None] = lambda record: None,
    resume: bool = False,
    schedules: Sequence[Schedule] = (),
    reference: nn.Module | None = None,
    layout: Layout | None = None,
) -> Outcome:
    """Trains `model` in place and leaves the weights of the best epoch in it.

    With several ranks (torch.distributed is initialized) each calls this with the same arguments. They begin with the
    weights of rank 0, whose evaluation counts; it alone writes, and all read its folder.

    Args:
        model: on its device, its strategy applied, and split if ``options.parallel`` splits it (``parallel.apply``).
        score: the evaluation after every epoch.
        objective: for tasks with a language-model head one that is attached to the model already.
        folder: for `checkpoints/`; one folder a run.
        log: is given a dict for every step and every epoch, on every rank.
        resume: from the newest checkpoint of the folder, if there is one.
        schedules: set coefficients of the objective before every step.
        reference: a frozen model that evaluates, whose logits are the objective's reference.
        layout: of the ranks; without, as ``options.parallel`` says.

    Raises:
        FloatingPointError: the loss, or its gradient, is not finite; it names the step, the parts and the rows. Nothing
            was changed since the step before, whose checkpoint stands. On all ranks, whichever's it was.
        ValueError: a checkpoint of another run.
    """
    places, layout = folder / "checkpoints", layout or parallel.layout_of(options.parallel)
    objective, penalties = _apart(objective)
    # Of all parameters, also those that do not train yet: moments keep their places when more layers do.
    optimizer = OPTIMIZERS[options.optimizer](parameter_groups(model, options.weight_decay), lr=options.learning_rate)
    parallel.same_weights(model)
    progress = Progress(batches=options.accumulation * layout.ranks)
    if resume:
        progress = _resumed(places, model, optimizer, options) or progress
    total = options.epochs * len(list(windows(examples, options, 1, progress.batches)))
    beginning = time.perf_counter() - progress.seconds
    if options.checkpointing:
        # Reentrant checkpoints, once the default, pass no gradient on where their inputs want none.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})

    with interruptions() as interrupted:
        while not progress.finished and progress.epoch <= options.epochs:
            strategies.begin_epoch(model, options.strategy, progress.epoch)
            model.train()
            for number, window in enumerate(windows(examples, options, progress.epoch, progress.batches)):
                if number < progress.window:  # done before the run was resumed
                    continue
                for scheduled in schedules:
                    scheduled.set(progress.step, total)
                record = _step(
                    model, task, window, objective, penalties, optimizer, options, progress, total, reference, layout
                )
                progress.step, progress.window = progress.step + 1, number + 1
                progress.seconds = time.perf_counter() - beginning
                for name, value in record.items():
                    progress.sums[name] = progress.sums.get(name, 0.0) + value
                coefficients = {f"coefficient_{k}": float(s.coefficient) for k, s in enumerate(schedules)}
                log({"event": "step", "step": progress.step, "epoch": progress.epoch, **record, **coefficients})
                if _any_rank(interrupted(), model):
                    _checkpoint(places, model, optimizer, progress, options)
                    return Outcome("interrupted", progress)
                if options.checkpoint_steps and progress.step % options.checkpoint_steps == 0:
                    _checkpoint(places, model, optimizer, progress, options)

            began = time.perf_counter()
            found = _of_first_rank(score().metrics)
            metric = options.metric or task.metric
            if metric not in found:
                raise ValueError(f"metric: expected one of {', '.join(found)} but got {metric!r}")
            lower = metric in LOWER
            value = -found[metric] if lower else found[metric]
            if math.isnan(value):  # of a metric that these rows do not define: worse than any number
                value = -math.inf
            if progress.best is None or value > progress.best:
                progress.best, progress.best_epoch, progress.stale = value, progress.epoch, 0
                _save(places, "best", weights(model), {"epoch": progress.epoch, "metrics": found}, model)
            else:
                progress.stale += 1
            means = {name: value / progress.window for name, value in progress.sums.items()}
            log({"event": "epoch", "epoch": progress.epoch, "step": progress.step, **means, "score": value,
                 **{f"dev_{name}": value for name, value in found.items()},
                 "seconds": progress.sums["seconds"] + time.perf_counter() - began})  # fmt: skip
            progress.seconds = time.perf_counter() - beginning
            progress.epoch, progress.window, progress.sums = progress.epoch + 1, 0, {}
            progress.finished = progress.stale >= options.patience or progress.epoch > options.epochs
            _checkpoint(places, model, optimizer, progress, options)

    load_weights(model, checkpoints.load(places / "best", _like(model))[0])
    return Outcome("finished" if progress.epoch > options.epochs else "stopped early", progress)


LOWER = ("loss", "perplexity", "mse", "mae")  # metrics of which less is better


def _apart(objective: Objective) -> tuple[Objective, Objective | None]:
    """The terms on rows, and those on parameters, which a step adds once."""
    if not any(term.about_parameters for _, term in objective.weighted_terms):
        return objective, None
    from objkern import Objective

    rows, penalties = (
        [pair for pair in objective._sum() if pair[1].about_parameters is kind] for kind in (False, True)
    )
    if not rows:
        raise ValueError(f"objective: expected a term that reads the model's answers but got {objective!r}")
    return Objective(rows), Objective(penalties)


def _step(
    model: nn.Module, task: Task, window: Sequence[Sequence[Example]], objective: Objective,
    penalties: Objective | None, optimizer: torch.optim.Optimizer, options: TrainingOptions, progress: Progress,
    total: int, reference: nn.Module | None, layout: Layout,
) -> dict[str, float]:  # fmt: skip
    """One step of the optimizer: the window's loss by parts, the norm of its gradient, the rate, seconds."""
    began, step = time.perf_counter(), progress.step
    device = next(model.parameters()).device
    count = sum(task.count(example) for batch in window for example in batch)  # of all ranks: each knows the examples
    sums: dict[str, Tensor] = {}
    problem: str | None = None
    for place in layout.places(len(window)) if count else []:
        # Dropout, without a state to be kept, and the same whichever rank has the batch.
        torch.manual_seed((options.seed * 1_000_003 + step) * progress.batches + (place or 0))
        batch = task.collate(window[place or 0]).to(device)
        counts = place is not None and batch.count > 0
        if not counts and not layout.in_step:  # nothing to learn, and no mean over its rows
            continue
        with _precision(device, options):
            others = _reference(task, reference, batch)
            loss, parts = task.loss(model, batch, objective, count, **others)
        if not counts:
            (0.0 * loss).backward()
            continue
        for name, value in parts.items():
            weight = batch.count / count if name in MEANS else 1.0  # the others are sums divided by the count
            sums[name] = sums.get(name, 0.0) + weight * value.float()
        if problem is None and not math.isfinite(loss.item()):
            values = {name: value.item() for name, value in parts.items()}
            problem = f"the loss is {loss.item()} in step {step + 1}: {values}; rows of the batch: {batch.rows}"
        loss.backward()  # of a bad one too: others may wait for it
    _add_up_over_ranks(model, sums, problem, layout)
    if penalties is not None:
        _penalize(penalties, sums, step)
    gradient_norm = parallel.clip(model.parameters(), options.clip)
    values = torch.stack([*sums.values(), gradient_norm.float()]).tolist()  # one transfer for all
    record = dict(zip((*sums, "gradient_norm"), values, strict=True))
    if not math.isfinite(record["gradient_norm"]):  # of all ranks, which stop together
        numbers = [number for batch in window for example in batch for number in example.numbers]
        raise FloatingPointError(f"the gradient is not finite in step {step + 1}: {record}; its rows: {numbers}")
    rate = options.learning_rate * rate_at(step, total, options.warmup, RATES[options.schedule])
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return record | {"learning_rate": rate, "seconds": time.perf_counter() - began}


MEANS = ("lse", "accuracy", "target_probability")  # parts that are means over the rows of their batch


@torch.no_grad()
def _penalize(penalties: Objective, sums: dict[str, Tensor], step: int) -> None:
    """Adds the terms on parameters to the gradients and the parts."""
    value, parts = penalties(return_parts=True)
    if not math.isfinite(value.item()):
        values = {name: part.item() for name, part in parts.items()}
        raise FloatingPointError(f"the loss is {value.item()} in step {step + 1}: {values}, of the parameters alone")
    penalties.accumulate_()
    sums |= {name: part.float() for name, part in parts.items() if name != "total"}
    sums["total"] = sums.get("total", 0.0) + value.float()


def windows(
    examples: Sequence[Example], options: TrainingOptions, epoch: int, of_step: int
) -> Iterator[list[list[Example]]]:
    """The batches of every step of an epoch, `of_step` each, in an order that seed and epoch decide."""
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
    order = torch.randperm(len(examples), generator=generator).tolist()
    size = options.batch_size
    if options.group_by_length:  # of a few batches at a time, so that the order stays random enough
        pools = [order[first : first + 8 * size] for first in range(0, len(order), 8 * size)]
        order = [place for pool in pools for place in sorted(pool, key=lambda place: examples[place].length)]
    batches = [order[first : first + size] for first in range(0, len(order), size)]
    batches = [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]
    for first in range(0, len(batches), of_step):
        yield [[examples[place] for place in batch] for batch in batches[first : first + of_step]]


def rate_at(step: int, total: int, warmup: float, falling: Callable[[float], float]) -> float:
    """Share of the peak rate at `step` of `total`, from 0: up in a line, then as `falling` says."""
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    return falling((step - rising) / (total - rising))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms, which are all vectors, don't. What ranks have parts of stands by itself."""
    found = []
    for some in parallel.kinds(model.parameters()):
        found.append({"params": [p for p in some if p.ndim >= 2], "weight_decay": weight_decay})
        found.append({"params": [p for p in some if p.ndim < 2], "weight_decay": 0.0})
    return found


def _precision(device: torch.device, options: TrainingOptions) -> AbstractContextManager[Any]:
    dtype = PRECISIONS[options.precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@torch.no_grad()
def _reference(task: Task, reference: nn.Module | None, batch: Batch) -> dict[str, Any]:
    return {} if reference is None else {"reference": task.reference(reference, batch)}


# ---- ranks ----------------------------------------------------------------------------------------------------------


def _is_first_rank() -> bool:
    return parallel.world() == 1 or dist.get_rank() == 0


def _wait() -> None:
    """For all ranks."""
    if parallel.world() > 1:
        dist.barrier()


def _of_first_rank(value: Any) -> Any:
    """What rank 0 has, on all of them: two that score alone need not agree in the last digit, and when to stop hangs
    on it."""
    if parallel.world() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=_place_of_objects())
    return values[0]


def _of_all_ranks(value: Any) -> list[Any]:
    found: list[Any] = [None] * parallel.world()
    dist.all_gather_object(found, value)
    return found


def _place_of_objects() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def _any_rank(flag: bool, model: nn.Module) -> bool:
    """Whether one of them says so: a rank that ended alone would leave the others waiting for it."""
    if parallel.world() == 1:
        return flag
    found = torch.tensor(float(flag), device=next(model.parameters()).device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.item() > 0.0


def _add_up_over_ranks(model: nn.Module, sums: dict[str, Tensor], problem: str | None, layout: Layout) -> None:
    """Gradients and parts of all ranks, which are sums over rows by the same count, so that nothing is averaged.

    Raises:
        FloatingPointError: one of them has a problem.
    """
    if parallel.world() == 1:
        if problem is not None:
            raise FloatingPointError(problem)
        return
    parameters = list(model.parameters())
    mine = [k for k, p in enumerate(parameters) if p.grad is not None]
    names, places, problems = zip(*_of_all_ranks((sorted(sums), mine, problem)), strict=True)
    for found in problems:
        if found is not None:
            raise FloatingPointError(found)
    # Of those that have a gradient on any rank: one that has none at all must not begin to decay.
    for k in [] if layout.in_step else sorted(set().union(*places)):  # in step they are added up as they come
        p = parameters[k]
        if p.grad is None:  # of a rank that had no batch in this window
            p.grad = torch.zeros_like(p)
        dist.all_reduce(own(p.grad), group=layout.group)
    for name in sorted(set().union(*names)):
        sums[name] = torch.as_tensor(sums.get(name, 0.0), dtype=torch.float32, device=parameters[0].device)
        dist.all_reduce(sums[name], group=layout.group)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": value for name, value in model.state_dict().items()}


def _of_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): x for name, x in tensors.items() if name.startswith("model.")}


def load_weights(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Of whole tensors every rank takes its part, if it has only a part."""
    there = model.state_dict()
    found = _of_model(tensors)
    _check_weights(model, found)
    model.load_state_dict({name: part_of(x, there.get(name)) for name, x in found.items()})


def _check_weights(model: nn.Module, found: dict[str, Tensor]) -> None:
    """Whether they are the model's, all of them: torch would convert numbers of another kind."""
    there = model.state_dict()
    if odd := sorted(there.keys() ^ found.keys()):
        raise ValueError(f"{odd[0]}: {'nobody has' if odd[0] in found else 'expected'} such a weight")
    for name, x in found.items():
        if (x.shape, x.dtype) != (there[name].shape, there[name].dtype):
            raise ValueError(f"{name}: expected {describe(there[name])} but got {describe(x)}")


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer knows of every parameter: ``optimizer.PARAMETER.exp_avg``."""
    found = {}
    for name, p in model.named_parameters():
        for what, value in optimizer.state.get(p, {}).items():
            if value is not None:
                found[f"optimizer.{name}.{what}"] = torch.as_tensor(value)
    return found


def load_moments(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    places = {p: k for k, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            of, what = _parameter_of(name)
            p = parameters[of]
            if value.shape != (() if what == "step" else p.shape):
                raise ValueError(
                    f"{name}: expected the shape of its parameter, {tuple(p.shape)}, but got {describe(value)}"
                )
            state.setdefault(places[p], {})[what] = value if what == "step" else part_of(value, p)
    expected = _moments_of(optimizer)
    for kept in state.values():
        if kept.keys() != expected:
            raise ValueError(f"optimizer: expected {sorted(expected)} of a parameter but got {sorted(kept)}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _moments_of(optimizer: torch.optim.Optimizer) -> set[str]:
    """What such an optimizer keeps of a parameter."""
    p = torch.zeros(1, requires_grad=True)
    options = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    trial = type(optimizer)([{"params": [p], **options}])
    p.grad = torch.zeros(1)
    trial.step()
    return {name for name, value in trial.state[p].items() if value is not None}


def _parameter_of(name: str) -> tuple[str, str]:
    of, _, what = name.removeprefix("optimizer.").rpartition(".")
    return of, what


def _like(model: nn.Module) -> Callable[[str, torch.Size], Tensor | None]:
    """By the name of a tensor in a checkpoint and its whole shape, one that is spread over the ranks as it is to be."""
    there, parameters = model.state_dict(), dict(model.named_parameters())

    def like(name: str, shape: torch.Size) -> Tensor | None:
        if name.startswith("optimizer."):
            found = parameters.get(_parameter_of(name)[0])
        else:
            found = there.get(name.removeprefix("model."))
        return None if found is None or found.shape != shape else torch.zeros_like(found)

    return like


def _save(places: Path, name: str, tensors: dict[str, Tensor], state: dict[str, Any], model: nn.Module) -> None:
    """By the first rank, or by all where each has parts."""
    if _is_first_rank() or parallel.is_split(model):
        checkpoints.save(places, name, tensors, state)


def _checkpoint(
    places: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, options: TrainingOptions
) -> None:
    tensors = {**weights(model), **moments(model, optimizer)}
    state = {"progress": asdict(progress), "options": asdict(options)}
    _save(places, checkpoints.name_of(progress.step), tensors, state, model)
    if _is_first_rank():
        checkpoints.keep_newest(places)
    _wait()


def _resumed(
    places: Path, model: nn.Module, optimizer: torch.optim.Optimizer, options: TrainingOptions
) -> Progress | None:
    if _is_first_rank():
        checkpoints.restore_interrupted(places)
    _wait()
    newest = checkpoints.newest(places)
    if newest is None:
        return None
    tensors, state = checkpoints.load(newest, _like(model))
    now = json.loads(json.dumps(asdict(options)))
    try:
        was, progress = dict(state["options"]), Progress(**state["progress"])
        progress.check()
        changed = [name for name in now if name not in MAY_CHANGE and now[name] != was.get(name)]
        if not changed:
            load_weights(model, tensors)
            load_moments(model, optimizer, tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"checkpoint: {newest} is not what this run wrote: {first_line(error)}") from error
    if changed:
        differences = ", ".join(f"{name} {was.get(name)!r} → {now[name]!r}" for name in changed)
        raise ValueError(f"resume: {newest} is of a run with other options: {differences}")
    if progress.best is not None:  # which the end needs: now, and not after the other epochs
        try:
            _check_weights(model, _of_model(checkpoints.load(places / "best", _like(model))[0]))
        except ValueError as error:
            raise ValueError(
                f"checkpoint: {places / 'best'} is not what this run wrote: {first_line(error)}"
            ) from error
    return progress


MAY_CHANGE = ("checkpoint_steps", "parallel")  # from one session of a run to the next


_came: list[int] | None = None  # of the interruptions under way


@contextmanager
def interruptions() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or SIGINT has come: the step under way ends, and then the run, with a checkpoint.

    Within others, such as those of a search around its runs, they are the same.
    """
    global _came
    if _came is not None:
        outer = _came
        yield lambda: bool(outer)
        return
    came: list[int] = []

    def handler(number: int, frame: Any) -> None:
        came.append(number)

    previous: dict[int, Any] = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread, which alone may
        pass
    _came = came
    try:
        yield lambda: bool(came)
    finally:
        _came = None
        for number, old in previous.items():
            signal.signal(number, old)
