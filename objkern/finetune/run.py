"""One run from start to end: data, model, training, tests, and the files it leaves.

sources ──▶ rows of train, dev, test ──▶ task ──▶ examples
model, or a small one from scratch ──▶ strategy ──▶ train ──▶ scores, predictions ──▶ folder

runs/NAME/run.json        what was asked for, by which command, on what; the untrained model's scores
          metrics.jsonl   every step and every epoch; tensorboard/ the same
          result.json     what came out;  curves.png, report.html: to look at
          model/          the model with its tokenizer;  checkpoints/: to resume from
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import objkern

from . import parallel, retention, saved, strategies
from .data import Row, checked, read, read_all
from .lock import alone_in
from .memory import peak_bytes
from .record import SCORE, Recorder, check, check_writable, provenance, write_json
from .reports import write_curves, write_report
from .schedules import Schedule
from .small import SmallModel, make
from .tables import first_line
from .tasks import TASKS, Example, Task
from .training import MAY_CHANGE, TrainingOptions, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from objkern import Objective

    from .tasks import Evaluation

__all__ = ["RunOptions", "run"]

Splits = dict[str, list[Row]]
DEV_SHARE = 0.1  # of training rows, where a source has no others to judge by
SAMPLES = 8  # predictions that a result shows


@dataclass(frozen=True)
class RunOptions:
    """What to train on what.

    Attributes:
        task: a name among `tasks.TASKS`.
        train: a source as `data.read` takes it.
        output: the run's folder.
        dev: another source; None: the dev split of `train`'s, or a tenth of its rows.
        test: another source; None: the test split of `train`'s, or none.
        model: a name on a hub or a folder; None: a small one from scratch, of the sizes `new_model`.
        objective: a formula; None: the task's own.
        retain: what keeps the starting model in mind, as `retention.parse` takes it: "l2sp:0.01".
        retain_data: a source of what is not to be forgotten, for "ewc".
        device: "cpu", "cuda", "cuda:1", ...; "auto": a GPU if there is one.
        max_length: the longest text, in tokens.
        pack: of causal-lm: several texts share a sequence, so that no padding is computed.
        dropout: in the place of every rate that the model's configuration has.
        limit: rows of each split.
        new_model: sizes of a model from scratch.
        training: how to train.

    Raises:
        ValueError: names the option, what was expected and what came.

    >>> from pathlib import Path
    >>> from objkern.finetune.run import RunOptions
    >>> from objkern.finetune.training import TrainingOptions
    >>> options = RunOptions("causal-lm", train="chats.jsonl", output=Path("runs/chats"), pack=True,
    ...                      training=TrainingOptions(strategy="lora:16"))
    >>> RunOptions("summaries", train="pairs.jsonl", output=Path("runs/pairs"))
    Traceback (most recent call last):
    ValueError: task: expected one of sequence-classification, ... but got 'summaries'
    """

    task: str
    train: str
    output: Path
    dev: str | None = None
    test: str | None = None
    model: str | None = None
    objective: str | None = None
    retain: str | None = None
    retain_data: str | None = None
    device: str = "auto"
    max_length: int = 256
    pack: bool = False
    dropout: float | None = None
    limit: int | None = None
    new_model: SmallModel = field(default_factory=SmallModel)
    training: TrainingOptions = field(default_factory=TrainingOptions)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(TASKS)} but got {self.task!r}")
        parallel.check(self.training.parallel, self.training.strategy, TASKS[self.task])
        if self.pack and self.task != "causal-lm":
            raise ValueError(
                f"pack: expected the task causal-lm, whose texts can share a sequence, but got {self.task}"
            )
        if self.pack and self.training.strategy.startswith("prompt"):
            raise ValueError("pack: expected no prompt vectors, whose model does not keep packed texts apart")
        if self.dropout is not None and not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected a number in [0, 1) but got {self.dropout!r}")
        for name, least, most in (("limit", 1, math.inf), ("max_length", 8, 2**20)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not least <= value <= most):
                bounds = f"of at least {least}" if most == math.inf else f"in [{least}, {most}]"
                raise ValueError(f"{name}: expected a whole number {bounds} but got {value!r}")
        how = None if self.retain is None else retention.parse(self.retain)[0]
        if how == "kl" and self.training.strategy.startswith("prompt"):
            raise ValueError(
                "retain: expected another strategy than prompt beside kl; its vectors are no words that the starting "
                "model could read"
            )
        if how in ("l2sp", "ewc") and self.training.strategy == "gradual":
            raise ValueError(
                f"retain: expected kl beside gradual, which has not said yet what will train, but got {how}"
            )
        if (how == "ewc") != (self.retain_data is not None):
            raise ValueError("retain_data: expected data of what is not to be forgotten, with ewc and only with it")


@dataclass
class Run:
    """All that a run needs, ready to train."""

    options: RunOptions
    task: Task
    splits: Splits
    examples: list[Example]
    model: nn.Module
    objective: Objective
    reference: nn.Module | None
    device: torch.device
    source: str  # what the model was loaded from
    files: str  # a fingerprint of that and of its tokenizer
    layout: parallel.Layout


def run(
    options: RunOptions,
    resume: bool = False,
    command: Sequence[str] | None = None,
    schedules: Sequence[Schedule] = (),
    objective: Objective | None = None,
    on_record: Callable[[dict[str, Any]], None] = lambda record: None,
    splits: Splits | None = None,
) -> dict[str, Any]:
    """Trains, tests, and writes everything to ``options.output``; returns what `result.json` holds.

    Args:
        resume: go on with the run in that folder.
        command: that started it, for its record; None: this process's.
        schedules: of coefficients of `objective`.
        objective: an object in the place of a formula.
        on_record: is given what every step and every epoch logs, too.
        splits: rows in the place of sources.

    Raises:
        ValueError: something asked for can't be had; nothing was trained.
        FloatingPointError: the loss stopped being finite; the checkpoints stand.
    """
    _check_folder(options.output, resume)
    if not _is_first_rank():
        return _run(options, resume, command, schedules, objective, on_record, splits)
    check_writable(options.output, 2**24)  # for a model's beginnings; how large it is turns out below
    with alone_in(options.output):
        _check_folder(options.output, resume)  # again, now that nobody else can change it
        return _run(options, resume, command, schedules, objective, on_record, splits)


def _run(
    options: RunOptions, resume: bool, command: Sequence[str] | None, schedules: Sequence[Schedule],
    objective: Objective | None, on_record: Callable[[dict[str, Any]], None], splits: Splits | None,
) -> dict[str, Any]:  # fmt: skip
    ready = prepare(options, objective, splits)
    weight_bytes = sum(x.numel() * x.element_size() for x in ready.model.state_dict().values())
    moments = 2 * sum(4 * p.numel() for p in ready.model.parameters() if p.requires_grad)
    # Two checkpoints while one replaces the other, two times the best weights, and the model at the end.
    needed = 2 * (weight_bytes + moments) + 3 * weight_bytes + 2**22
    first = _is_first_rank()
    if first:
        check_writable(options.output, needed)
    described = _described(options, ready)
    if resume:
        untrained = _same_run(options.output / "run.json", described)
    else:
        rows = ready.splits.get("test") or ready.splits["dev"]
        if (metric := options.training.metric) is not None and metric not in (watched := _score(ready, "dev").metrics):
            raise ValueError(f"metric: expected one of {', '.join(watched)} but got {metric!r}")
        untrained = ready.task.test(ready.model, rows, options.training.batch_size).metrics
        if first:
            write_json(options.output / "run.json", {**described, "untrained": untrained, **provenance(command)})

    with Recorder(options.output) if first else nullcontext(lambda record: None) as recorder:

        def log(record: dict[str, Any]) -> None:
            recorder(record)
            on_record(record)

        outcome = train(
            ready.model, ready.task, ready.examples, lambda: _score(ready, "dev"), ready.objective, options.training,
            options.output, log, resume=resume, schedules=schedules, reference=ready.reference, layout=ready.layout,
        )  # fmt: skip
    result: dict[str, Any] = {
        "how": outcome.how, "best_score": outcome.progress.best,
        "best_epoch": outcome.progress.best_epoch, "steps": outcome.progress.step,
        "seconds": outcome.progress.seconds, "device": str(ready.device), "untrained": untrained,
        "parameters": sum(p.numel() for p in ready.model.parameters()),
        "peak_bytes": peak_bytes(ready.device),
        "trained_parameters": sum(p.numel() for p in ready.model.parameters() if p.requires_grad),
    }  # fmt: skip
    if outcome.how != "interrupted":
        _save_model(ready, first)  # before anything else that could go wrong
        result |= _tested(ready)
    if first:
        write_json(options.output / "result.json", result)
        write_curves(options.output)
        write_report(options.output)
    return result


def _save_model(ready: Run, first: bool) -> None:
    """By the first rank; if each has only parts of it, they come together in another that is whole."""
    model, options = ready.model, ready.options
    if parallel.is_split(model):
        weights = parallel.whole(model)
        if first:
            model = _model(ready.source, ready.task, options)
            model.load_state_dict(weights)
    if first:
        saved.save(options.output / "model", model, ready.task)


def prepare(options: RunOptions, objective: Objective | None = None, splits: Splits | None = None) -> Run:
    """Reads the data and the model, and finds out what can't work before anything is trained."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # a small model is read and written in milliseconds
    kind = TASKS[options.task]
    splits = splits_of(options) if splits is None else {name: rows[: options.limit] for name, rows in splits.items()}
    for name, rows in splits.items():  # all of them before anything is made
        checked(rows, kind.columns, options.train if name == "train" else f"{name} data")
    seed = options.training.seed
    source = options.model
    if source is None:
        source = str(options.output / "start")
        if not (options.output / "run.json").exists() and _is_first_rank():  # else this is where that run began
            make(options.output / "start", kind, splits["train"], options.new_model, options.max_length, seed)
        _wait_for_all_ranks()
    tokenizer = load_tokenizer(source, options.task)
    task = kind(tokenizer, splits["train"], max_length=options.max_length, source=options.train,
                **({"pack": True} if options.pack else {}))  # fmt: skip
    examples = task.examples(splits["train"], options.train)
    for name, rows in splits.items():
        if name != "train":
            task.examples(rows, f"{name} data")
    device, started_from = device_of(options.device), source
    layout = parallel.layout_of(options.training.parallel)
    torch.manual_seed(seed)  # the new head's weights
    model = _model(source, task, options).to(device)
    parallel.same_weights(model)
    formula = task.formula() if options.objective is None else options.objective
    built = objkern.parse(formula) if objective is None else objective
    wanted = task.elementwise
    if getattr(built, "_elementwise", wanted) != wanted:
        kind_of = "terms that compare element by element" if wanted else "terms over classes"
        raise ValueError(f"objective: expected {kind_of}, such as {task.formula()}, for this data but got {built!r}")
    built, reference = built.to(device), None
    if options.retain is not None:
        source = options.retain_data
        kept = task.examples(checked(read(source), kind.columns, source), source) if source else []
        built, reference = retention.apply(options.retain, built, model, task, kept, options.training.batch_size)
    task.check(model)
    _try(model, task, examples, built, reference)
    model = parallel.apply(model, layout)
    files = fingerprint(started_from)
    return Run(
        options, task, splits, examples, model, built, reference, device, started_from, files, layout
    )  # fmt: skip


def _model(source: str, task: Task, options: RunOptions) -> nn.Module:
    return strategies.apply(load_model(source, task, options.dropout), options.training.strategy, task.name)


def splits_of(options: RunOptions) -> Splits:
    """The rows of train, dev and, if there are any, test."""
    found = read_all(options.train)
    for name, source in (("dev", options.dev), ("test", options.test)):
        if source is not None:
            found[name] = read(source, name)
    found = {name: rows[: options.limit] for name, rows in found.items()}
    if "dev" not in found:
        rows = found["train"]
        if len(rows) < 2:
            raise ValueError(f"train: expected at least 2 rows, one of them to judge by, but got {len(rows)}")
        # Whatever the run's seed, so that runs of several seeds are judged by the same rows.
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        held = _held(rows, order, max(1, round(DEV_SHARE * len(rows))), TASKS[options.task].classes)
        found["dev"] = [row for k, row in enumerate(rows) if k in held]
        found["train"] = [row for k, row in enumerate(rows) if k not in held]
    return found


def _held(rows: Sequence[Row], order: Sequence[int], count: int, column: str | None) -> set[int]:
    """The first rows of the order without which every class of the column still occurs; the first one where there are
    none."""
    labels = [None if column is None else row.get(column) for row in rows]
    if any(isinstance(label, float) for label in labels):  # numbers to be told: whole ones are no classes either
        labels = [None] * len(rows)
    names = [_classes_in(label) for label in labels]
    left = Counter(name for some in names for name in some)
    held: set[int] = set()
    for place in order:
        if len(held) == count:
            break
        if all(left[name] > 1 for name in names[place]):
            held.add(place)
            left.subtract(names[place])
    return held or {order[0]}


def _classes_in(label: Any) -> set[str]:
    if label is None:
        return set()
    return {str(name) for name in label} if isinstance(label, list | tuple) else {str(label)}


def load_tokenizer(name: str, task: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a pretrained model or of a folder, with something to pad with."""
    _must_exist(name)
    # RoBERTa and GPT-2 need the prefix space for words that come already cut; the others ignore it.
    tokenizer = saved.load_tokenizer(name, **({"add_prefix_space": True} if task == "token-classification" else {}))
    if not tokenizer.is_fast:
        raise ValueError(f"model: {name!r} has no fast tokenizer, which tells where in a text a token stands")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, task: Task, dropout: float | None = None) -> PreTrainedModel:
    """The pretrained model with a head for the task, new where it has none that fits; `dropout` for all its rates."""
    import transformers
    from safetensors import SafetensorError

    _must_exist(name)
    try:
        # Said, and not left out: transformers would ask, and a "y" that stands in a pipe is an answer.
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **task.model_options())
        if dropout is not None:
            _set_dropout(config, dropout)
        if config.pad_token_id is None:
            config.pad_token_id = task.tokenizer.pad_token_id
        with _quiet():  # that a head is new is what fine-tuning means
            return getattr(transformers, task.auto_model).from_pretrained(
                name,
                config=config,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,  # `precision` says in what it runs
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"model: {name!r} can't be loaded for {task.name}: {first_line(error)}") from error


def fingerprint(source: str) -> str:
    """Of the files of a model's folder, with which a run must go on; of none where it has a name on a hub."""
    found = hashlib.sha256()
    for path in sorted(Path(source).glob("*")) if Path(source).is_dir() else []:
        if path.suffix in (".safetensors", ".json", ".txt", ".model", ".jinja"):
            found.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(2**24):
                    found.update(block)
    return found.hexdigest()


def device_of(name: str) -> torch.device:
    """The device to train on; raises a ValueError for one that isn't there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=name).item()  # a device that computes; "meta" does not
    # An AssertionError from a torch built without CUDA, an ImportError for one whose package is missing.
    except (RuntimeError, AssertionError, ImportError, AttributeError) as error:
        raise ValueError(f"device: {name!r} can't be used: {first_line(error)}") from error
    return torch.device(name)


def _set_dropout(config: Any, rate: float) -> None:
    """Every rate of the configuration but those that leave out whole layers."""
    rates = {name: value for name, value in config.to_dict().items() if "drop" in name and "layerdrop" not in name}
    names = [name for name, value in rates.items() if value is None or isinstance(value, float | int)]
    if not names:
        raise ValueError(f"dropout: {type(config).__name__} has no rate that could be set")
    for name in names:
        setattr(config, name, rate)


def _try(
    model: nn.Module, task: Task, examples: Sequence[Example], objective: Objective, reference: nn.Module | None
) -> None:
    """One batch of the longest examples, so that a formula that asks for more than there is fails now."""
    longest = sorted(examples, key=lambda example: -example.length)[:2]
    batch = task.collate(longest).to(next(model.parameters()).device)
    with torch.random.fork_rng(), torch.no_grad():
        others = {} if reference is None else {"reference": task.reference(reference, batch)}
        try:
            task.loss(model, batch, objective, batch.count, **others)
        except (TypeError, NotImplementedError) as error:
            raise ValueError(f"objective: {objective} does not go with {task.name}: {first_line(error)}") from error
        except (IndexError, RuntimeError) as error:  # a token or a place that it has no vector for; no memory
            longest_length = max(example.length for example in longest)
            places = getattr(model.config.get_text_config(), "max_position_embeddings", "unknown")
            raise ValueError(
                f"model: it can't take these texts, of up to {longest_length} tokens (max_length: {task.max_length}, "
                f"its places: {places}): {first_line(error)}"
            ) from error


def _score(ready: Run, split: str) -> Evaluation:
    return ready.task.score(ready.model, ready.splits[split], ready.options.training.batch_size)


def _tested(ready: Run) -> dict[str, Any]:
    """Scores of the trained model on every split that was not trained on, and some of its answers."""
    found: dict[str, Any] = {}
    for split in ("dev", "test"):
        if split in ready.splits:
            evaluation = ready.task.test(ready.model, ready.splits[split], ready.options.training.batch_size)
            found |= {split: evaluation.metrics, "table": evaluation.table, "confusion": evaluation.confusion,
                      "classes": evaluation.classes}  # fmt: skip
    rows = (ready.splits.get("test") or ready.splits["dev"])[:SAMPLES]
    answers = ready.task.predict(ready.model, rows, ready.options.training.batch_size)
    columns = {column.name for column in ready.task.columns}
    found["samples"] = [
        {"input": {name: value for name, value in row.items() if name in columns and name not in _TRUTH},
         "truth": next((row[name] for name in _TRUTH if name in row), None), "predicted": answer}
        for row, answer in zip(rows, answers, strict=True)
    ]  # fmt: skip
    return found


_TRUTH = ("label", "tags", "answers", "completion", "target")  # columns that say what is right


def fingerprint_of_rows(splits: Splits) -> str:
    return hashlib.sha256(repr(splits).encode("utf-8", "surrogatepass")).hexdigest()


def _described(options: RunOptions, ready: Run) -> dict[str, Any]:
    asked = json.loads(json.dumps(asdict(options), default=str))
    return {
        "name": options.output.name, "task": options.task, "objective": str(ready.objective),
        "model": options.model or "from scratch", "model_files": ready.files,
        "data": {name: len(rows) for name, rows in ready.splits.items()},
        "rows": fingerprint_of_rows(ready.splits),
        "options": asked,
    }  # fmt: skip


def _check_folder(folder: Path, resume: bool) -> None:
    there = (folder / "run.json").exists()
    if there and not resume:
        raise ValueError(f"output: {folder} holds a run already: resume it, or name another folder")
    if resume and not there:
        raise ValueError(f"resume: {folder} holds no run")
    for name in () if there else ("checkpoints", "study.db"):  # of a run whose run.json is gone; of a search
        if (folder / name).exists():
            raise ValueError(f"output: {folder} holds {name} of something else: name another folder")


def _same_run(path: Path, described: dict[str, Any]) -> dict[str, float]:
    """The untrained model's scores, if the run of that record is the one that is asked for now."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        was, now = _flat(before["options"]), _flat(described["options"])
        rows, files, objective = before["rows"], before["model_files"], before["objective"]
        untrained = dict(before["untrained"])
        check(untrained, {str: SCORE}, "untrained")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"resume: {path} is not what a run of this version wrote: {type(error).__name__}: {error}"
        ) from error
    changed = [f"{name} {was.get(name)!r} → {value!r}" for name, value in now.items()
               if name not in _MAY_CHANGE and was.get(name) != value]  # fmt: skip
    if rows != described["rows"]:
        changed.append("other rows in the data")
    if files != described["model_files"]:
        changed.append("another model or tokenizer in the folder that it began with")
    if not changed and objective != described["objective"]:
        changed.append(f"objective {objective} → {described['objective']}")
    if changed:
        raise ValueError(f"resume: {path.parent} is a run with other options: {', '.join(changed)}")
    return untrained


_MAY_CHANGE = ("output", "device", *MAY_CHANGE)  # and it is the same run


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    """Options with those of training and of a new model among them."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        found |= value if isinstance(value, dict) else {name: value}
    return found


def _must_exist(name: str) -> None:
    if (Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1) and not Path(name).is_dir():
        raise ValueError(f"model: folder {name!r} does not exist")


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _is_first_rank() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _wait_for_all_ranks() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
