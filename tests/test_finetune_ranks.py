"""Several ranks, each a process: their window is one big batch, they stop together, and go on as if nothing had been."""

from __future__ import annotations

import datetime
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

transformers = pytest.importorskip("transformers")
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("ranks need torch.distributed with gloo", allow_module_level=True)

import objkern  # noqa: E402
from objkern.distributed import is_dtensor  # noqa: E402
from objkern.finetune import checkpoints, parallel, saved, strategies  # noqa: E402
from objkern.finetune.tasks import TASKS, Evaluation  # noqa: E402
from objkern.finetune.training import TrainingOptions, train  # noqa: E402

from .test_finetune_tasks import tokenizer_of_words  # noqa: E402
from .test_finetune_training import ONE_STEP, REGULARIZED, model_of, rows_of, run, task_of  # noqa: E402

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
NAMES = ["token-classification", "sequence-classification", "several", "causal-lm", "packed", "seq2seq"]
# (batch size, accumulation) by the number of ranks, all 8 rows in one window: batches for everyone, one too few, ranks
# that have none, and all rows on rank 0.
CUTS = {1: [(8, 1), (3, 3)], 2: [(3, 2), (1, 4), (8, 1)], 3: [(1, 3), (3, 1), (8, 1)], 4: [(1, 2), (2, 1), (8, 1)]}
# By the number of ranks, how they share the work beside data, with the cuts: under tensor they see the same batches.
PARALLEL = {1: {}, 2: {"fsdp": CUTS[2], "tensor": CUTS[1]}, 3: {}, 4: {"fsdp": CUTS[4], "tensor:2": CUTS[2]}}
TOGETHER = {"data": NAMES, "fsdp": ["token-classification", "causal-lm", "seq2seq"], "tensor": ["packed", "seq2seq"],
            "tensor:2": ["causal-lm", "seq2seq"]}  # fmt: skip  # what is tried in each way: only language models' heads are split
# Steps of six batches of one row: windows are the same on 1, 2 and 3 ranks, and the last one of an epoch has two.
STEPS: dict[str, Any] = ONE_STEP | {"epochs": 2, "batch_size": 1, "clip": 1.0}
MOVED = {"data": "token-classification", "fsdp": "seq2seq", "tensor": "seq2seq"}
RESUMED = TrainingOptions(epochs=3, batch_size=2, accumulation=1, learning_rate=1e-2, patience=9)


def ways(ranks: int, name: str) -> dict[str, list[tuple[int, int]]]:
    """The cuts of a window, by how the ranks share the work."""
    return {how: cuts for how, cuts in {"data": CUTS[ranks], **PARALLEL[ranks]}.items() if name in TOGETHER[how]}


def trained(name: str, folder: Path, options: TrainingOptions) -> dict[str, Any]:
    """Weights and what was logged of a run with terms on rows and on parameters."""
    kind = "causal-lm" if name == "packed" else name
    rows = rows_of(kind, 8)
    task = (
        TASKS[kind](tokenizer_of_words(), rows, max_length=12, pack=True) if name == "packed" else task_of(name, rows)
    )
    model = strategies.apply(model_of(task), options.strategy, task.name)
    formula = "BinaryCrossEntropy() + 0.1*LogitL2()" if name == "several" else REGULARIZED
    objective = objkern.parse(formula) + 0.02 * objkern.L2(model) + 0.3 * objkern.L2SP(model)
    model = parallel.apply(model, parallel.layout_of(options.parallel))
    records: list[dict[str, Any]] = []
    train(model, task, task.examples(rows), lambda: Evaluation({task.metric: 1.0}), objective, options, folder,
          lambda record: records.append({k: v for k, v in record.items() if k != "seconds"}))  # fmt: skip
    return {"weights": whole(model), "records": records}


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.full_tensor() if is_dtensor(x) else x for name, x in model.state_dict().items()}


def all_cases(ranks: int, folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for name in NAMES:
        for how, cuts in ways(ranks, name).items():
            for size, accumulation in cuts:
                case = f"{name} {size} {accumulation} {how}"
                options = TrainingOptions(batch_size=size, accumulation=accumulation, parallel=how, **ONE_STEP)
                found[case] = trained(name, folder / case, options)
        if 6 % ranks == 0:
            found[f"{name} steps"] = trained(name, folder / name, TrainingOptions(accumulation=6 // ranks, **STEPS))
    for how in PARALLEL[ranks]:  # beside what is frozen
        for strategy in ("last:1", "head"):
            options = TrainingOptions(batch_size=8, strategy=strategy, parallel=how, **ONE_STEP)
            found[f"causal-lm {strategy} {how}"] = trained("causal-lm", folder / f"{strategy} {how}", options)
    if ranks == 1:
        for strategy in ("last:1", "head"):
            options = TrainingOptions(batch_size=8, strategy=strategy, **ONE_STEP)
            found[f"causal-lm {strategy}"] = trained("causal-lm", folder / strategy, options)
    return found


def a_step(
    options: TrainingOptions, folder: Path, name: str = "token-classification", **others: Any
) -> dict[str, Any]:  # fmt: skip
    """A run with dropout, and a number that each rank draws behind every step."""
    records: list[dict[str, Any]] = []
    interrupt = others.pop("interrupt", 0)

    def log(record: dict[str, Any]) -> None:
        kept = {k: v for k, v in record.items() if k != "seconds"}
        records.append(kept | {"drawn": torch.rand(()).item()} if record["event"] == "step" else kept)
        if record["event"] == "step" and record["step"] == interrupt:
            os.kill(os.getpid(), signal.SIGTERM)

    outcome, model, _ = run(name, folder, options, count=11, dropout=0.2, log=log, **others)
    return {"how": outcome.how, "weights": whole(model), "records": records, "progress": outcome.progress}


def without_labels(how: str, folder: Path) -> dict[str, Any]:
    """A run in some of whose windows no rank has a label, with a term on parameters."""
    rows = rows_of("token-classification", 8)
    task = task_of("token-classification", rows)
    some = [replace(e, label=[-100] * len(e.label)) if k % 4 else e for k, e in enumerate(task.examples(rows))]
    model = model_of(task)
    objective = objkern.CrossEntropy() + 0.1 * objkern.L2(model)
    model = parallel.apply(model, parallel.layout_of(how))
    options = TrainingOptions(batch_size=1, epochs=1, learning_rate=1e-2, parallel=how)
    records: list[dict[str, Any]] = []
    train(model, task, some, lambda: Evaluation({"f1": 1.0}), objective, options, folder, records.append)
    return {"weights": whole(model), "totals": [record["total"] for record in records if record["event"] == "step"]}


def other_cases(rank: int, folder: Path) -> dict[str, dict[str, Any]]:
    found = {"undisturbed": a_step(RESUMED, folder / "undisturbed")}
    for how, name in MOVED.items():  # for other numbers of ranks to go on with
        options = replace(RESUMED, parallel=how)
        found[f"undisturbed {how}"] = a_step(options, folder / f"undisturbed {how}", name)
        a_step(options, folder / f"moved {how}", name, interrupt=2)
    for how in ("data", "fsdp"):  # by what peft wraps a model in
        options = TrainingOptions(batch_size=2, strategy="lora:2", learning_rate=1e-2, parallel=how)
        found[f"lora {how}"] = a_step(options, folder / f"lora {how}", "causal-lm")
    for how in ("data", "fsdp"):
        found[f"no label {how}"] = without_labels(how, folder / f"no label {how}")
    for case, step in (("first", 2), ("second", 4)):  # on rank 1 alone, then on rank 0 alone; in the midst of epochs
        alone = step if rank == (case == "first") else 0
        found[case] = a_step(RESUMED, folder / "resumed", resume=case != "first", interrupt=alone)
    found["resumed"] = a_step(RESUMED, folder / "resumed", resume=True)

    rows = rows_of("token-classification", 8)
    task = task_of("token-classification", rows)
    model = model_of(task)
    with torch.no_grad():
        model.classifier.weight.add_(rank)  # a new layer that began otherwise; the weights of rank 0 count
    scores = iter([0.1, 0.2, 0.3] if rank == 0 else [0.3, 0.2, 0.1])  # as those of rank 0 do
    outcome = train(model, task, task.examples(rows), lambda: Evaluation({"f1": next(scores)}), objkern.CrossEntropy(),
                    TrainingOptions(epochs=3, patience=1, batch_size=2), folder / "scores")  # fmt: skip
    found["scores"] = {"how": outcome.how, "best": outcome.progress.best_epoch, "weights": model.state_dict()}

    if rank == 1:
        own, task.loss = task.loss, lambda *a, **o: (lambda loss, parts: (loss * torch.nan, parts))(*own(*a, **o))
    for how in ("data", "fsdp"):
        parallel.apply(model, parallel.layout_of(how))
        try:
            train(model, task, task.examples(rows), lambda: Evaluation({"f1": 1.0}), objkern.CrossEntropy(),
                  TrainingOptions(batch_size=2, parallel=how), folder / f"nan {how}")  # fmt: skip
        except FloatingPointError as error:
            found[f"nan {how}"] = {"error": str(error)}
    return found


def work(rank: int, ranks: int, folder: Path) -> None:
    """What a process does, in three minutes at most."""
    signal.alarm(180)
    os.fsync = lambda descriptor: None  # the disk is no concern of these tests, and slow
    if ranks > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks,
            timeout=datetime.timedelta(seconds=60),
        )  # fmt: skip
    if rank > 0:
        checkpoints.keep_newest = checkpoints.restore_interrupted = None  # only rank 0 may write
        save = checkpoints.save
        checkpoints.save = lambda *arguments: save(*arguments) if is_dtensor(*arguments[2].values()) else None.write
    found = all_cases(ranks, folder)
    if ranks == 2:
        found |= other_cases(rank, folder)
    else:  # where two ranks were ended
        for how, name in MOVED.items():
            own = folder / f"moved {how}"
            if rank == 0:
                shutil.copytree(folder.parent / "2" / own.name, own)
            if ranks > 1:
                dist.barrier()
            now = "data" if ranks == 4 else how  # and from parts to whole weights
            found[f"moved {how}"] = a_step(replace(RESUMED, parallel=now), own, name, resume=True)
    torch.save(found, folder / f"{rank}.pt")
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def fork_ranks(folder: Path) -> None:
    """In a process that has only imported, which takes longest: no thread of it is lost in a fork."""
    for name in ("LlamaForCausalLM", "T5ForConditionalGeneration", "BertForTokenClassification"):
        getattr(transformers, name)
    for ranks in sorted(CUTS, key=lambda ranks: ranks != 2):  # what two leave others take
        children = []
        for rank in range(ranks):
            children.append(os.fork())
            if children[-1] == 0:
                code = 1
                try:
                    (folder / str(ranks)).mkdir(exist_ok=True)
                    work(rank, ranks, folder / str(ranks))
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * ranks


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def found(places: Path) -> dict[int, list[dict[str, dict[str, Any]]]]:
    """By the number of ranks, of each rank, by case: everything that the tests look at."""
    folder = places
    code = (
        "import sys, pathlib; from tests.test_finetune_ranks import fork_ranks; fork_ranks(pathlib.Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=400,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        ranks: [torch.load(folder / f"{ranks}/{rank}.pt", weights_only=False) for rank in range(ranks)]
        for ranks in CUTS
    }


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """To 1e-6 of the largest weight, and 1e-5 of what is logged: nothing but the order in which float32 numbers are
    added differs, of gradients that move weights by 1e-3 and more, and of losses of a few units."""
    for key, x in theirs["weights"].items():
        torch.testing.assert_close(ours["weights"][key], x, rtol=1e-6, atol=1e-6 * max(1.0, x.abs().max().item()))
    assert len(ours["records"]) == len(theirs["records"])
    for mine, other in zip(ours["records"], theirs["records"], strict=True):
        assert mine.keys() == other.keys()
        for key, value in other.items():
            assert mine[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5, abs=1e-6)), key


@pytest.mark.parametrize("ranks", CUTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_window_is_one_big_batch_on_any_number_of_ranks(name: str, ranks: int, found: Any) -> None:
    """24: other numbers of labels in every row, ranks with fewer batches than others and with none at all."""
    whole = found[1][0][f"{name} 8 1 data"]
    start = model_of(
        task_of("causal-lm" if name == "packed" else name, rows_of("causal-lm" if name == "packed" else name, 8))
    )
    moved = max((x - start.state_dict()[key]).abs().max().item() for key, x in whole["weights"].items())
    assert moved > 1e-3
    assert {"l2", "l2_sp"} <= whole["records"][0].keys()
    for how, cuts in ways(ranks, name).items():
        for size, accumulation in cuts:
            for of_rank in found[ranks]:
                assert_same(of_rank[f"{name} {size} {accumulation} {how}"], whole)
    if 6 % ranks == 0:
        steps = found[1][0][f"{name} steps"]
        assert steps["records"][2]["l2_sp"] > 0.0
        for of_rank in found[ranks]:
            assert_same(of_rank[f"{name} steps"], steps)


def test_a_window_without_labels(found: Any) -> None:
    """12: what is left of it are the terms on parameters."""
    for of_rank in found[2]:
        data, fsdp = of_rank["no label data"], of_rank["no label fsdp"]
        assert len(data["totals"]) == 4
        assert all(total == total and total > 0.0 for total in data["totals"])
        assert fsdp["totals"] == pytest.approx(data["totals"], rel=1e-5)
        for key, x in data["weights"].items():
            torch.testing.assert_close(fsdp["weights"][key], x, rtol=1e-4, atol=1e-5)


def test_adapters_in_parts(found: Any) -> None:
    for of_rank in found[2]:
        for key, x in of_rank["lora data"]["weights"].items():
            torch.testing.assert_close(of_rank["lora fsdp"]["weights"][key], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", ["last:1", "head"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_what_is_frozen_stays_so_in_parts(ranks: int, strategy: str, found: Any) -> None:
    """22: a head that trains beside a body that is frozen but for its last layer, and alone."""
    whole = found[1][0][f"causal-lm {strategy}"]
    for how in PARALLEL[ranks]:
        for of_rank in found[ranks]:
            assert_same(of_rank[f"causal-lm {strategy} {how}"], whole)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_have_the_same_weights_bit_for_bit(ranks: int, found: Any) -> None:
    first, *others = found[ranks]
    for other in others:
        for case, result in first.items():
            for key, x in result.get("weights", {}).items():
                assert torch.equal(x, other[case]["weights"][key]), (case, key)


def test_a_signal_to_one_rank_ends_all_and_resuming_changes_nothing(found: Any) -> None:
    """28: no rank waits for one that has ended; with dropout, weights and everything logged are bit-equal."""
    for of_rank in found[2]:
        assert [of_rank[case]["how"] for case in ("undisturbed", "first", "second", "resumed")] == [
            "finished", "interrupted", "interrupted", "finished"
        ]  # fmt: skip
        assert of_rank["resumed"]["progress"] == of_rank["undisturbed"]["progress"]
        assert [len(of_rank[case]["records"]) for case in ("first", "second")] == [2, 3]  # one of them of an epoch
        records = [record for case in ("first", "second", "resumed") for record in of_rank[case]["records"]]
        assert [r for r in records if r["event"] == "step"] == [
            r for r in of_rank["undisturbed"]["records"] if r["event"] == "step"
        ]  # fmt: skip
        for key, x in of_rank["undisturbed"]["weights"].items():
            assert torch.equal(x, of_rank["resumed"]["weights"][key]), key


def test_ranks_drop_out_by_themselves(found: Any) -> None:
    drawn = [r["drawn"] for of_rank in found[2] for r in of_rank["undisturbed"]["records"] if r["event"] == "step"]
    assert len(set(drawn)) == len(drawn) == 18


def test_ranks_decide_together(found: Any) -> None:
    """28: rank 0's scores say when to stop; what one rank alone sees go wrong is an error on all."""
    for of_rank in found[2]:
        assert (of_rank["scores"]["how"], of_rank["scores"]["best"]) == ("finished", 3)
        for how in ("data", "fsdp"):
            assert of_rank[f"nan {how}"]["error"].startswith("the loss is nan in step 1: {'cross_entropy'")


@pytest.mark.parametrize("how", MOVED)
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_another_number_of_ranks_goes_on(ranks: int, how: str, found: Any) -> None:
    """A run of two ranks, ended after two steps: the windows are what they were, and so is dropout. The first step has
    the undisturbed run's gradient, but for the order in which it is added up, and the end its loss; also where weights
    and moments were in parts, and are in others now or whole."""
    undisturbed = found[2][0][f"undisturbed {how}"]
    for of_rank in found[ranks]:
        other = of_rank[f"moved {how}"]
        assert other["how"] == "finished"
        assert other["progress"].batches == (1 if how == "tensor" else 2)
        ours, theirs = ([r for r in case["records"] if r["event"] == "step"] for case in (other, undisturbed))
        assert [r["step"] for r in ours] == [r["step"] for r in theirs[2:]]
        for name in ("cross_entropy", "gradient_norm", "learning_rate"):
            assert ours[0][name] == pytest.approx(theirs[2][name], rel=1e-6), name
        assert ours[-1]["cross_entropy"] == pytest.approx(theirs[-1]["cross_entropy"], abs=1e-3)
        for key, x in undisturbed["weights"].items():
            torch.testing.assert_close(other["weights"][key], x, rtol=1e-4, atol=1e-4)


# ---- under torchrun -------------------------------------------------------------------------------------------------

COMMAND = [
    "-m", "objkern", "finetune", "--hidden-size", "32", "--layers", "2", "--heads", "2", "--vocabulary", "400",
    "--max-length", "64", "--epochs", "3", "--batch-size", "4", "--device", "cpu", "--checkpoint-steps", "2",
    "--patience", "9",
]  # fmt: skip


def torchrun(ranks: int, *words: str, kill: int = 0) -> tuple[int, str, float]:
    """Exit status, what was printed, seconds; `kill`: rank 1 ends itself behind this step, as the kernel would."""
    code = f"""
import os, signal, sys
from objkern.finetune import training
own = training._step
def step(model, task, window, objective, penalties, optimizer, options, progress, *others):
    found = own(model, task, window, objective, penalties, optimizer, options, progress, *others)
    if os.environ.get("RANK") == "1" and progress.step + 1 == {kill}:
        os.kill(os.getpid(), signal.SIGKILL)
    return found
training._step = step
from objkern.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, *(["-c", code, *COMMAND[2:]] if ranks == 1 else []), *(words if ranks == 1 else [])]
    if ranks > 1:
        script = Path(words[-1]).parent / "torchrun_script.py"
        script.write_text(code, encoding="utf-8")
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(script)]
        command += [*COMMAND[2:], *words]
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr, time.monotonic() - began


def logged(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def written(folder: Path, name: str, count: int) -> str:
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows_of(name, count))), encoding="utf-8")
    return str(data)


@pytest.mark.parametrize("how", ["data", "fsdp"])
def test_a_killed_rank_ends_the_job_and_any_number_goes_on(how: str, tmp_path: Path) -> None:
    """In bounded time, with a message; what is lost are the steps since the last checkpoint."""
    words = ["token-classification", written(tmp_path, "token-classification", 40), "--parallel", how, "--output"]
    code, printed, _ = torchrun(2, *words, str(tmp_path / "whole"))
    assert code == 0, printed[-3000:]
    whole = logged(tmp_path / "whole", "step")
    assert len(whole) == 15  # nine batches of four in windows of two, three times
    kill = random.Random(0).randrange(4, 12)
    code, printed, seconds = torchrun(2, *words, str(tmp_path / "killed"), kill=kill)
    assert code != 0
    assert seconds < 60
    assert "another rank is gone, or hangs" in printed
    assert len(logged(tmp_path / "killed", "step")) >= kill - 1
    for ranks in (1, 2):
        folder = tmp_path / f"resumed on {ranks}"
        shutil.copytree(tmp_path / "killed", folder)
        code, printed, _ = torchrun(ranks, "--resume", *words, str(folder))
        assert code == 0, printed[-3000:]
        steps = {record["step"]: record for record in logged(folder, "step")}
        assert sorted(steps) == list(range(1, 16))
        first = steps[(kill - 1) // 2 * 2 + 1]  # behind the last checkpoint before the end
        assert first["gradient_norm"] == pytest.approx(whole[first["step"] - 1]["gradient_norm"], rel=1e-5)
        assert steps[15]["cross_entropy"] == pytest.approx(whole[-1]["cross_entropy"], abs=1e-3)
        assert_same_models(folder, tmp_path / "whole", atol=1e-4)


def test_parts_that_are_not_what_was_written(tmp_path: Path, found: Any, places: Path) -> None:
    """A part that is missing, cut short, of another kind, or of nobody: an error, and nothing is loaded."""
    source = places / "2" / "moved fsdp" / "checkpoints" / checkpoints.name_of(2)
    first = sorted((source / "parts").iterdir())[0].name

    def tampered(name: str, how: Any) -> str:
        folder = tmp_path / name
        shutil.copytree(source, folder)
        how(folder / "parts" / first)
        with pytest.raises(ValueError, match="is not what a run wrote") as error:
            checkpoints.load(folder, lambda name, shape: torch.zeros(shape))
        return str(error.value)

    tensors, _ = checkpoints.load(source)
    assert sum(x.numel() for x in tensors.values()) > 1000
    assert "none are there" in tampered("missing", lambda path: path.unlink())
    assert "bytes were written" in tampered("short", lambda path: path.write_bytes(path.read_bytes()[:-4]))
    assert "nobody wrote it" in tampered("more", lambda path: shutil.copy(path, path.with_name("other.safetensors")))
    other = lambda path: path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))  # noqa: E731
    assert "expected torch.float32 but got torch.int32" in tampered("kind", other)


def assert_same_models(ours: Path, theirs: Path, atol: float) -> None:
    """What the end of a run writes is whole, whatever its ranks had."""
    (mine, _), (other, _) = saved.load(ours), saved.load(theirs)
    for (name, x), y in zip(mine.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=atol, msg=name)


def test_a_head_in_parts_from_the_command_line(tmp_path: Path) -> None:
    """Two ranks that see the same batches do what one does."""
    words = ["causal-lm", written(tmp_path, "causal-lm", 24), "--objective", REGULARIZED, "--output"]
    for ranks in (1, 2):
        code, printed, _ = torchrun(ranks, "--parallel", "tensor", *words, str(tmp_path / str(ranks)))
        assert code == 0, printed[-3000:]
    for ours, theirs in zip(*(logged(tmp_path / name, "step") for name in "21"), strict=True):
        for key in ("total", "gradient_norm", "cross_entropy", "z_loss"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
    for ours, theirs in zip(*(logged(tmp_path / name, "epoch") for name in "21"), strict=True):
        assert ours["dev_loss"] == pytest.approx(theirs["dev_loss"], rel=1e-4)
    assert_same_models(tmp_path / "2", tmp_path / "1", atol=1e-4)
    code, printed, _ = torchrun(2, "--parallel", "tensor:3", *words, str(tmp_path / "3"))
    assert code != 0
    assert "expected a number that divides the 2 ranks but got tensor:3" in printed
