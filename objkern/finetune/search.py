"""`--search`: the best values for what stands in braces on the command line, by Optuna.

    --learning-rate {1e-5..1e-3:log}   --batch-size {8,16,32}   --objective "CrossEntropy() + {0..1e-3}*ZLoss()"
          │
          ▼  values of a trial             dev score of every epoch ──▶ worse than the median so far? pruned
    the command with them ──▶ a run ──▶ best dev score ──▶ study.db, search.json, search.html

Any option can be searched, and any number in a formula, because values are put into the command line itself. The study
is in SQLite: a search that was interrupted goes on when the same command is given again.
"""

from __future__ import annotations

import html
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .lock import alone_in
from .record import check_writable, provenance, write_json
from .tables import cell, first_line, table
from .training import interruptions

if TYPE_CHECKING:
    import argparse

    import optuna

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(?:(?P<name>\w+)=)?(?P<low>[^:]+?)\.\.(?P<high>[^:]+?)(?P<log>:log)?")


@dataclass(frozen=True)
class Variable:
    """What stands in one pair of braces: a range of numbers, or choices."""

    name: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    choices: tuple[str, ...] = ()

    def suggested(self, trial: optuna.Trial) -> str:
        if self.choices:
            return str(trial.suggest_categorical(self.name, self.choices))
        if self.whole:
            return str(trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log))
        return repr(trial.suggest_float(self.name, self.low, self.high, log=self.log))

    @property
    def ends(self) -> list[str]:
        """All choices, or the two ends of the range."""
        if self.choices:
            return list(self.choices)
        return [str(int(end)) if self.whole else repr(end) for end in (self.low, self.high)]


def variables_of(argv: Sequence[str]) -> list[Variable]:
    """Of every pair of braces, in order; ValueErrors name the bad one.

    A variable is called after its option, with a number where an option has several, or as ``{name=0..1}`` says.
    """
    found: list[Variable] = []
    option = "value"
    for word in argv:
        if word.startswith("--"):
            option = word[2:].partition("=")[0].replace("-", "_")
        inside = _BRACES.findall(word)
        for number, text in enumerate(inside, 1):
            found.append(_variable(text, option if len(inside) == 1 else f"{option}_{number}"))
    names = [variable.name for variable in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"search: expected a name for every variable of its own but {', '.join(twice)} occurs twice")
    return found


def _variable(text: str, name: str) -> Variable:
    match = _RANGE.fullmatch(text.strip())
    if match is None:
        if "," not in text:
            raise ValueError(f"search: expected {{low..high}}, {{low..high:log}} or {{a,b,c}} but got {{{text}}}")
        return Variable(name, choices=tuple(choice.strip() for choice in text.split(",")))
    try:
        low, high = float(match["low"]), float(match["high"])
    except ValueError as error:
        raise ValueError(f"search: expected two numbers around .. but got {{{text}}}") from error
    log = match["log"] is not None
    if not (math.isfinite(low) and math.isfinite(high) and low < high) or (log and low <= 0):
        above = " above 0" if log else ""
        raise ValueError(f"search: expected a smaller and a larger number{above} around .. but got {{{text}}}")
    whole = all(re.fullmatch(r"[+-]?\d+", match[side].strip()) for side in ("low", "high"))
    return Variable(match["name"] or name, low, high, log, whole)


def filled(argv: Sequence[str], values: Sequence[str]) -> list[str]:
    """The command line with a value in the place of every pair of braces."""
    rest = iter(values)
    return [_BRACES.sub(lambda _: next(rest), word) for word in argv]


def main(argv: Sequence[str]) -> int:
    """Runs what is left of the trials: 0, or 3 if it was interrupted. ValueErrors name what is wrong before any run."""
    from .cli import options_from, parser
    from .run import fingerprint_of_rows, splits_of

    try:
        import optuna
    except ImportError as error:
        raise ValueError("search: needs optuna: pip install optuna") from error
    variables = variables_of(argv)
    if not variables:
        raise ValueError("search: expected something to search for, such as --learning-rate {1e-5..1e-3:log}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("search: expected one process; each of its runs is one")
    folders = set()
    for values in _corners(variables):
        arguments = parser().parse_args(filled(argv, values))
        options = options_from(arguments)
        folders.add(arguments.output)
    if arguments.search < 1:
        raise ValueError(f"search: expected a number of runs of at least 1 but got {arguments.search}")
    if arguments.resume:
        raise ValueError("resume: a search that was interrupted goes on by itself: give the same command without it")
    if len(folders) > 1:
        raise ValueError("output: expected one folder, in which a search keeps all its runs, but got braces")
    folder: Path = arguments.output
    if (folder / "run.json").exists():
        raise ValueError(f"output: {folder} holds a run, and a search has many; name another folder")
    rows = fingerprint_of_rows(splits_of(replace(options, output=folder)))
    check_writable(folder, 2**24)
    with alone_in(folder):
        study = _study(optuna, folder, variables, [*_fixed(argv), rows])
        return _search(study, variables, arguments, argv, folder)


def _search(
    study: optuna.Study, variables: Sequence[Variable], arguments: argparse.Namespace, argv: Sequence[str], folder: Path
) -> int:
    import optuna

    with interruptions() as interrupted:  # also while a run reads its data
        while (done := _counted(study)) < arguments.search:
            study.sampler = optuna.samplers.TPESampler(seed=arguments.seed + len(study.trials))
            trial = _under_way(study) or study.ask()
            values = [variable.suggested(trial) for variable in variables]
            print(f"run {done + 1} of {arguments.search}: {_assignments(trial.params)}", flush=True)
            ended = _run_trial(optuna, study, trial, filled(argv, values), folder / f"trial-{trial.number:04d}")
            if ended:
                _keep_the_best_model(study, folder)
                _write(study, folder, ["python", "-m", "objkern", "finetune", *argv])
            if not ended or (interrupted() and _counted(study) < arguments.search):
                print("\nInterrupted, and saved. The same command goes on.")
                return 3
    if not _finished(study):
        print("search: no run finished; see the messages above", file=sys.stderr)
        return 1
    print(f"\nbest: {_assignments(study.best_params)}: {study.best_value:.4g}\n\n{trial_table(study)}")
    print(f"\nWritten to {folder}: search.html, search.json, study.db, trial-{study.best_trial.number:04d}/model/")
    return 0


def _under_way(study: optuna.Study) -> optuna.Trial | None:
    """A run whose process was interrupted or killed."""
    import optuna

    found = study.get_trials(states=[optuna.trial.TrialState.RUNNING])
    return optuna.Trial(study, found[0]._trial_id) if found else None


def _corners(variables: Sequence[Variable]) -> Iterator[list[str]]:
    """Command lines' values so that every choice and both ends of every range occur, to be checked before any run."""
    yield [variable.ends[0] for variable in variables]
    for place, variable in enumerate(variables):
        for end in variable.ends[1:]:
            yield [end if k == place else other.ends[0] for k, other in enumerate(variables)]


def _fixed(argv: Sequence[str]) -> list[str]:
    """What all runs of a search share: its command but for the number of runs and the folder."""
    found, skips = [], False
    for word in argv:
        if skips:
            skips = False
        elif word in ("--search", "--output"):
            skips = True
        elif not word.startswith(("--search=", "--output=")):
            found.append(word)
    return found


def _study(optuna: Any, folder: Path, variables: Sequence[Variable], fixed: list[str]) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{(folder / 'study.db').resolve()}", study_name="search", load_if_exists=True,
            direction="maximize", pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=1),
        )  # fmt: skip
    except Exception as error:  # of the database's own kinds
        raise ValueError(f"search: {folder / 'study.db'} can't be used as a study: {first_line(error)}") from error
    space = [fixed, [asdict(variable) | {"choices": list(variable.choices)} for variable in variables]]
    if study.user_attrs.setdefault("space", space) != space:
        raise ValueError(f"search: {folder} is a search over something else or other rows; name another folder")
    study.set_user_attr("space", space)
    return study


def _run_trial(
    optuna: Any, study: optuna.Study, trial: optuna.Trial, command: Sequence[str], folder: Path
) -> bool:  # fmt: skip
    """Whether it came to an end: finished, pruned, or failed with a loss that is not finite."""
    from .cli import options_from, parser
    from .run import run

    states = optuna.trial.TrialState
    options = replace(options_from(parser().parse_args(list(command))), output=folder)
    resume = (folder / "run.json").exists()
    if folder.exists() and not trial.user_attrs.get("begun"):  # no run of this study has had this number
        study.tell(trial, state=states.FAIL)
        raise ValueError(f"search: {folder} is there already, of something else; move it, or name another folder")
    trial.set_user_attr("begun", True)
    if not resume:  # it was killed before it had begun to train
        shutil.rmtree(folder, ignore_errors=True)

    def report(record: dict[str, Any]) -> None:
        if record["event"] == "epoch":
            trial.report(record["score"], record["epoch"])
            if trial.should_prune():
                raise optuna.TrialPruned(f"epoch {record['epoch']}")

    try:
        result = run(options, resume, command=["python", "-m", "objkern", "finetune", *command], on_record=report)
    except optuna.TrialPruned as pruned:
        print(f"    pruned after {pruned}", flush=True)
        study.tell(trial, state=states.PRUNED)
    except Exception as error:  # a loss that is not finite, memory that runs out: the others go on
        if isinstance(error, ValueError) and not _counted(study):  # what the first run is refused for, all are
            study.tell(trial, state=states.FAIL)
            raise
        _failed(study, trial, f"{type(error).__name__}: {first_line(error)}")
    else:
        if result["how"] == "interrupted":
            return False
        if not math.isfinite(result["best_score"]):
            _failed(study, trial, "the dev metric is not defined on these rows")
        else:
            trial.set_user_attr("dev", result["dev"])
            print(f"    {result['best_score']:.4g}", flush=True)
            study.tell(trial, result["best_score"])
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return True


def _failed(study: optuna.Study, trial: optuna.Trial, why: str) -> None:
    import optuna

    print(f"    failed: {why}", flush=True)
    trial.set_user_attr("error", why)
    study.tell(trial, state=optuna.trial.TrialState.FAIL)


def _counted(study: optuna.Study) -> int:
    """Trials that came to an end by themselves."""
    return sum(trial.state.name in ("COMPLETE", "PRUNED") or "error" in trial.user_attrs for trial in study.trials)


def _finished(study: optuna.Study) -> list[Any]:
    return [trial for trial in study.trials if trial.state.name == "COMPLETE"]


def _keep_the_best_model(study: optuna.Study, folder: Path) -> None:
    best = study.best_trial.number if _finished(study) else None
    for trial in study.trials:
        if trial.number != best:
            for name in ("model", "start"):
                shutil.rmtree(folder / f"trial-{trial.number:04d}" / name, ignore_errors=True)


def _assignments(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {cell(value)}" for name, value in values.items())


def _rows(study: optuna.Study) -> tuple[list[str], list[list[str]]]:
    names = list(dict.fromkeys(name for trial in study.trials for name in trial.params))
    ended = [trial for trial in study.trials if trial.state.name != "WAITING"]
    ended.sort(key=lambda trial: -math.inf if trial.value is None else trial.value, reverse=True)
    rows = [
        [f"trial-{trial.number:04d}", *(cell(trial.params.get(name)) for name in names),
         "" if trial.state.name != "COMPLETE" else f"{trial.value:.4g}", str(max(trial.intermediate_values, default=0)),
         trial.user_attrs.get("error", trial.state.name.lower())]
        for trial in ended
    ]  # fmt: skip
    return ["run", *names, "score", "epochs", "state"], rows


def trial_table(study: optuna.Study) -> str:
    """A line for every run, the best first. The score is the dev metric, negative where less of it is better."""
    return table(*_rows(study))


def _importance(study: optuna.Study) -> dict[str, float]:
    """What share of the differences in score each variable explains, by fANOVA, where there is enough to tell from."""
    import optuna

    if len(_finished(study)) < 4 or len({trial.value for trial in _finished(study)}) < 2:
        return {}
    return optuna.importance.get_param_importances(study)


def _write(study: optuna.Study, folder: Path, command: Sequence[str]) -> None:
    from .reports import picture_of, section, table_of, write_page

    header, rows = _rows(study)
    importance = _importance(study)
    best = {"run": f"trial-{study.best_trial.number:04d}", "values": study.best_params, "score": study.best_value,
            "dev": study.best_trial.user_attrs["dev"]} if _finished(study) else None  # fmt: skip
    made = provenance(command)
    runs = [
        {"run": f"trial-{trial.number:04d}", "state": trial.state.name.lower(), "values": trial.params,
         "score": trial.value, "scores": list(trial.intermediate_values.values()),
         "error": trial.user_attrs.get("error")}
        for trial in study.trials
    ]  # fmt: skip
    write_json(folder / "search.json", {"best": best, "importance": importance, "runs": runs, **made})
    shares = [[name, f"{100 * share:.0f} %"] for name, share in importance.items()]
    write_page(folder / "search.html", f"Search: {folder.name}", "".join((
        f"<h1>{html.escape(folder.name)}</h1><p>{len(rows)} runs; the score is the dev metric, negative where less of "
        "it is better.</p>",
        section("Runs", table_of(header, rows)), section("Scores", picture_of(_picture(study), "score of every run")),
        section("What mattered", table_of(["variable", "share of the differences"], shares)),
        section("Made by", f"<pre>{html.escape(made['command'])}</pre>"),
    )))  # fmt: skip


def _picture(study: optuna.Study) -> bytes:
    """Scores in their order with the best so far, and against each variable, as PNG."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    finished = _finished(study)
    names = list(dict.fromkeys(name for trial in finished for name in trial.params))
    figure, axes = pyplot.subplots(1, 1 + len(names), figsize=(4 * (1 + len(names)), 3.2), layout="constrained",
                                   squeeze=False)  # fmt: skip
    scores = [trial.value for trial in finished]
    best = [max(scores[: k + 1]) for k in range(len(scores))]
    axes[0][0].plot([trial.number for trial in finished], scores, "o")
    axes[0][0].step([trial.number for trial in finished], best, where="post", alpha=0.5)
    axes[0][0].set(title="in their order", xlabel="run", ylabel="score")
    for axis, name in zip(axes[0][1:], names, strict=True):
        some = [trial for trial in finished if name in trial.params]
        axis.plot([trial.params[name] for trial in some], [trial.value for trial in some], "o")
        axis.set(title=name)
        if any(getattr(trial.distributions[name], "log", False) for trial in some):
            axis.set_xscale("log")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    pyplot.close(figure)
    return buffer.getvalue()
