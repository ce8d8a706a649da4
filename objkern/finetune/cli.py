"""`python -m objkern finetune`: a model, data and an objective given as a formula."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

from .extras import require_finetune_extra
from .tables import epoch_table, first_line, metric_table

DESCRIPTION = """\
Fine-tunes a Hugging Face model on your data with any objective, and leaves a folder with the model, everything that
was measured on the way, and a report that you can send to a colleague."""

EXAMPLES = """\
examples:
  # Classify texts: a small model from scratch, no download. train.jsonl has lines such as {"text": ..., "label": ...}
  python -m objkern finetune sequence-classification train.jsonl

  # A pretrained model with label smoothing and a confidence penalty
  python -m objkern finetune token-classification data/ --model bert-base-cased \\
      --objective "CrossEntropy(label_smoothing=0.1) - 0.01*Entropy()"

  # A language model on chats, by adapters, in bfloat16; steps of 4 x 8 chats
  python -m objkern finetune causal-lm chats.jsonl --model Qwen/Qwen3-0.6B --strategy lora:16 \\
      --batch-size 8 --accumulation 4 --precision bfloat16 --objective "CrossEntropy() + 1e-4*ZLoss()"

  # Go on where a run was interrupted
  python -m objkern finetune sequence-classification train.jsonl --output runs/finetune --resume

  python -m objkern predict runs/finetune --text "something new"      use the model
  python -m objkern export runs/finetune deploy/                      a folder for the hub or a server"""


def parser() -> argparse.ArgumentParser:
    from .small import SmallModel
    from .tasks import TASKS
    from .training import OPTIMIZERS, PRECISIONS, RATES, TrainingOptions

    default, small = TrainingOptions(), SmallModel()
    found = argparse.ArgumentParser(
        prog="python -m objkern finetune", usage="python -m objkern finetune TASK DATA [options]",
        description=DESCRIPTION, epilog=f"{_columns(TASKS)}\n\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip

    def add(group: Any, name: str, help: str, **options: Any) -> None:
        group.add_argument(name, help=help, **options)

    what = found.add_argument_group("what to learn")
    add(what, "task", "what the model is to do: " + ", ".join(TASKS), choices=TASKS, metavar="TASK")
    add(what, "train", "data: a .jsonl, .json, .csv, .tsv or .parquet file, a folder with train.*, validation.*, "
        "test.*, or a name on the Hugging Face hub (name:configuration)", metavar="DATA")  # fmt: skip
    add(
        what,
        "--dev",
        "data that decides which epoch was best (a tenth of DATA, if that has no such split)",
        metavar="DATA",
    )
    add(what, "--test", "data that the finished model is tested on", metavar="DATA")
    add(what, "--limit", "use only so many rows of each", type=int, metavar="ROWS")
    add(what, "--max-length", "longest text, in tokens (%(default)s)", type=int, default=256, metavar="TOKENS")
    add(
        what, "--pack", "causal-lm: several texts share a sequence, so that no padding is computed", action="store_true"
    )

    model = found.add_argument_group("which model")
    add(model, "--model", "name on the hub, or folder; without it, a small one from scratch", metavar="NAME")
    add(model, "--strategy", "what trains: full, head, last:K layers, lora:R (rank R), prompt:N (vectors), gradual "
        "(one layer more in every epoch) (%(default)s)", default=default.strategy)  # fmt: skip
    add(model, "--dropout", "rate of all its dropouts (its own)", type=float, metavar="RATE")
    for name, text in (("hidden_size", "width"), ("layers", "number of layers"), ("heads", "attention heads"),
                       ("vocabulary", "number of tokens")):  # fmt: skip
        add(model, f"--{name.replace('_', '-')}", f"of a model from scratch: {text} (%(default)s)", type=int,
            default=getattr(small, name), metavar="N")  # fmt: skip

    objective = found.add_argument_group("objective")
    add(objective, "--objective", 'a formula of terms, such as "CrossEntropy(label_smoothing=0.1) + 1e-4*ZLoss()" '
        "(the plain loss of the task); docs/objectives.md lists all terms", metavar="FORMULA")  # fmt: skip
    add(objective, "--retain", "keep the starting model in mind: l2sp:0.01 (distance of the weights), ewc:0.1 (each "
        "by how much it mattered), kl:0.5 (divergence from its predictions)", metavar="HOW:STRENGTH")  # fmt: skip
    add(objective, "--retain-data", "with ewc: data of what is not to be forgotten", metavar="DATA")

    steps = found.add_argument_group("training")
    add(steps, "--epochs", "at most (%(default)s)", type=int, default=default.epochs)
    add(steps, "--batch-size", "rows at a time (%(default)s)", type=int, default=default.batch_size)
    add(steps, "--accumulation", "batches of one step; the gradient is that of one big batch (%(default)s)", type=int,
        default=default.accumulation)  # fmt: skip
    add(steps, "--learning-rate", "at its peak (5e-5; 1e-3 for a model from scratch)", type=float, metavar="RATE")
    add(steps, "--schedule", "of the rate after its peak: %(choices)s (%(default)s)", choices=RATES,
        default=default.schedule, metavar="NAME")  # fmt: skip
    add(steps, "--warmup", "share of the steps before the peak (%(default)s)", type=float, default=default.warmup)
    add(
        steps, "--optimizer", "%(choices)s (%(default)s)", choices=OPTIMIZERS, default=default.optimizer, metavar="NAME"
    )
    add(steps, "--weight-decay", "of matrices (%(default)s)", type=float, default=default.weight_decay)
    add(steps, "--clip", "largest norm of the gradient (%(default)s)", type=float, default=default.clip)
    add(steps, "--patience", "stop after so many epochs without a better one (%(default)s)", type=int,
        default=default.patience)  # fmt: skip
    add(steps, "--metric", "that decides which epoch is best (the task's own: accuracy, F1, loss, ...)")
    add(
        steps, "--precision", "%(choices)s (%(default)s)", choices=PRECISIONS, default=default.precision, metavar="NAME"
    )
    add(steps, "--group-by-length", "texts of similar length share a batch: less padding, and where the length says "
        "something about the label, batches of one label", action="store_true")  # fmt: skip
    add(steps, "--checkpointing", "compute activations anew in the backward pass: less memory, more time",
        action="store_true")  # fmt: skip

    run = found.add_argument_group("the run")
    add(run, "--output", "its folder (%(default)s)", type=Path, default=Path("runs/finetune"), metavar="DIR")
    add(run, "--resume", "go on with the run in that folder; give the same options again", action="store_true")
    add(run, "--checkpoint-steps", "steps between checkpoints within an epoch; SIGTERM and Ctrl-C save one anyway "
        "(none)", type=int, default=0, metavar="N")  # fmt: skip
    add(run, "--search", "search for the best hyperparameters by so many runs: ranges stand in braces, such as "
        "--learning-rate {1e-5..1e-3:log} --batch-size {8,16,32} --objective 'CrossEntropy() + {0..1e-3}*ZLoss()'; an "
        "interrupted search goes on when it is started again", type=int, metavar="RUNS")  # fmt: skip
    add(run, "--parallel", "under torchrun, how ranks share the work: data (each has the model), fsdp (each has parts "
        "of all weights), tensor or tensor:K (K ranks have parts of a language model's head) (%(default)s)",
        default=default.parallel)  # fmt: skip
    add(run, "--device", "cpu, cuda, cuda:1, ... (a GPU if there is one)", default="auto")
    add(
        run,
        "--seed",
        "of new weights, dropout and order (%(default)s); not of which rows are held out",
        type=int,
        default=default.seed,
    )
    return found


def _columns(tasks: dict[str, Any]) -> str:
    lines = ["tasks, and the columns of their data:"]
    for name, task in tasks.items():
        lines.append(f"  {name}: {task.about}")
        width = max(len(column.name) for column in task.columns)
        for column in task.columns:
            optional = "" if column.needed else " (optional)"
            lines.append(f"      {column.name:{width}}  {column.expected}{optional}")
    return "\n".join(lines)


def options_from(arguments: argparse.Namespace) -> Any:
    """The checked options; raises a ValueError that names the bad one."""
    from .run import RunOptions
    from .small import SmallModel
    from .training import TrainingOptions

    given = vars(arguments)

    def of(kind: type, **others: Any) -> Any:
        names = {field.name for field in fields(kind)} - set(others)
        return kind(**{name: value for name, value in given.items() if name in names}, **others)

    rate = arguments.learning_rate
    if rate is None:
        rate = 5e-5 if arguments.model else 1e-3
    small = SmallModel(**{name: given[name] for name in ("hidden_size", "layers", "heads", "vocabulary")})
    if arguments.output == Path():
        raise ValueError("output: expected the name of a folder but got none")
    return of(RunOptions, new_model=small, training=of(TrainingOptions, learning_rate=rate))


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, tests, saves: 0. Bad options exit with 2, a loss that is not finite with 1, an interrupted run with 3."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        require_finetune_extra()
        if any(word == "--search" or word.startswith("--search=") for word in argv):
            from .search import main as search

            return search(argv)
        if braces := [word for word in argv if re.search(r"\{.*\}", word)]:
            raise ValueError(f"{braces[0]}: braces are for a search: add --search RUNS, or take a value")
        arguments = parser().parse_args(argv)
        options = options_from(arguments)
        from .run import run

        with ranks(options.device):
            result = run(options, arguments.resume, ["python", "-m", "objkern", "finetune", *argv], on_record=_show)
    except (ImportError, ValueError) as error:
        print(f"python -m objkern finetune: error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"python -m objkern finetune: stopped: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a disk that is full by now; what was written before stands
        print(f"python -m objkern finetune: stopped: {first_line(error)}", file=sys.stderr)
        return 1
    if os.environ.get("RANK", "0") != "0":
        return 3 if result["how"] == "interrupted" else 0
    if result["how"] == "interrupted":
        print(f"\nInterrupted after step {result['steps']}, and saved. The same command with --resume goes on.")
        return 3
    print(f"\n{result['how'].capitalize()} after {result['steps']} steps; the best epoch was {result['best_epoch']}.\n")
    print(metric_table(result))
    print(f"\nWritten to {options.output}: report.html, curves.png, result.json, metrics.jsonl, model/")
    return 0


def _show(record: dict[str, Any]) -> None:
    if record["event"] == "epoch" and os.environ.get("RANK", "0") == "0":
        print(epoch_table(record), flush=True)


PATIENCE = timedelta(minutes=10)  # with a rank that does not answer: a score takes each of them as long


@contextmanager
def ranks(device: str) -> Iterator[None]:
    """The process group that `torchrun` asks for, if it started this process.

    Raises:
        ValueError: a device by number, which all ranks would share.
        OSError: another rank is gone, or hangs.
    """
    import torch
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected cuda, of which each rank takes its own, or cpu, but got {device!r}")
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks", flush=True)
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or re.search(r"gloo|NCCL|ProcessGroup", str(error))
        if not lost:
            raise
        # With the group that is broken nothing is ended in order.
        raise OSError(
            f"rank {os.environ.get('RANK')}: another rank is gone, or hangs ({first_line(error)}); what was saved "
            "stands, and the same command with --resume goes on, on any number of ranks"
        ) from error
    dist.destroy_process_group()
