"""Random sequences of calls: whatever came before, a call gives what it gives alone.

A state machine draws an objective and what it is called with (properties.py), and then calls it in every manner that
torch has, in any order: graphs are kept and gone through again, coefficients change in place, arguments are replaced
by nonsense. Numbers are held against the reference in float64, repetitions against each other bit by bit, and the
caller's tensors against copies.
"""

from __future__ import annotations

import copy
import pickle
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

import objkern

from . import properties
from .nonsense import POOL, REFUSALS, named
from .properties import Case, Results, cases, mismatch

SEEDS = st.integers(0, 2)  # of upstream gradients: few, so that the same one comes again
INPLACE, TWICE = "modified by an inplace operation", "through the graph a second time"


@dataclass
class Graph:
    loss: Tensor
    leaves: dict[str, Tensor]
    exact_of: dict[str, Tensor]  # what the reference reads, as it was at the call
    in_forward: bool
    coefficient_changed: bool = False
    logits_changed: bool = False
    freed: bool = False
    gradients: dict[Any, Tensor] = field(default_factory=dict)  # that were found so far


def upstream_of(loss: Tensor, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.rand(loss.shape, generator=draw, dtype=torch.float64) + 0.5).to(loss.dtype)


def wide(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The same numbers in float64, all of them to be differentiated by."""
    return {
        name: x.detach().double().clone().requires_grad_() if x is not None and x.is_floating_point() else x
        for name, x in tensors.items()
    }


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


class Calls(RuleBasedStateMachine):
    """One objective, the tensors that it is called with, and the graphs that calls have left."""

    @initialize(data=st.data(), case=cases(most_rows=5, most_classes=70))
    def begin(self, data: st.DataObject, case: Case) -> None:
        self.case, self.graphs = case, []
        self.options = {name: value for name, value in case.options.items() if name != "logit_scale"}
        if case.kind == "labels" and self.options["reduction"] == "mean":
            self.options["empty"] = data.draw(st.sampled_from(["zero", "nan"]))
        z, target = properties.numbers(case)
        draw = torch.Generator().manual_seed(case.seed)
        self.own: dict[str, Tensor | None] = {"target": target}
        if case.linear is None:
            self.own["logits"] = z
        else:
            weight = torch.randn(case.classes, case.classes + 3, generator=draw, dtype=torch.float64)
            self.own["hidden"] = torch.nn.functional.pad(z, (0, 3), value=0.5)
            self.own["weight"] = (weight / case.classes**0.5).to(case.dtype)
            self.own["bias"] = data.draw(st.sampled_from([None, weight[:, 0].to(case.dtype)]))
            self.options |= {"mode": case.linear, "chunk_rows": 1 + case.seed % 4}
        of_numbers = torch.float64 if case.dtype == torch.float64 else torch.float32
        scale = case.options.get("logit_scale")
        learns = case.options.get("gradient", "backward") == "backward" and case.linear != "forward"
        self.own["logit_scale"] = None if scale is None else torch.tensor(scale, dtype=of_numbers)
        self.own["coefficient"] = data.draw(st.sampled_from([None, torch.tensor(0.5, dtype=of_numbers)]))
        self.own["reference"] = None
        if "KLDivergence" in repr(case.objective):
            noise = torch.randn(z.shape, generator=draw, dtype=torch.float64)
            self.own["reference"] = (z.double().masked_fill(z == -torch.inf, 0.0) + noise).to(case.dtype)
        for name, x in self.own.items():
            if x is not None and x.is_floating_point():
                # What follows from options that say: no gradient but that of the logits.
                fixed = not learns and name in ("logit_scale", "reference", "target")
                x = x.detach()
                self.own[name] = x.requires_grad_(not fixed and data.draw(st.booleans(), label=f"{name} requires grad"))
        self.objective = self.objective_of(self.own["coefficient"])
        self.remember()

    def remember(self) -> None:
        self.held = {name: None if x is None else x.detach().clone() for name, x in self.own.items()}
        self.seen: dict[Any, Any] = {}  # results by what they are results of

    def objective_of(self, coefficient: Tensor | None) -> objkern.Objective:
        return self.case.objective if coefficient is None else coefficient * self.case.objective

    def evaluate(self, objective: objkern.Objective, tensors: dict[str, Tensor | None], **more: Any) -> Any:
        options = {**self.options, **more}
        for name in ("logit_scale", "reference"):
            if tensors[name] is not None:
                options[name] = tensors[name]
        if options.get("backend") == "reference":
            for name in ("gradient", "mode", "chunk_rows"):
                options.pop(name, None)
        if self.case.linear is None:
            return objective(tensors["logits"], tensors["target"], **options)
        return objective.linear(
            tensors["hidden"], tensors["weight"], tensors["target"], bias=tensors["bias"], **options
        )

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {name: x for name, x in self.own.items() if x is not None and x.requires_grad}

    @property
    def main(self) -> str:
        return "logits" if self.case.linear is None else "hidden"

    # ---- the truth --------------------------------------------------------------------------------------------------

    def exact(
        self, tensors: dict[str, Tensor | None], seed: int | None, objective: objkern.Objective | None = None
    ) -> Results:
        """Loss, parts, and gradients by everything, in float64."""
        tensors = wide(tensors)
        objective = objective or self.case.objective
        if tensors["coefficient"] is not None:
            objective = tensors["coefficient"] * objective
        loss, parts = self.evaluate(objective, tensors, backend="reference", return_parts=True)
        found = {"loss": loss.detach()} | {name: part for name, part in parts.items() if name != "accuracy"}
        if seed is not None:
            leaves = {name: x for name, x in tensors.items() if x is not None and x.requires_grad}
            upstream = upstream_of(loss, seed)
            gradients = torch.autograd.grad(loss, list(leaves.values()), upstream, allow_unused=True)
            for (name, x), g in zip(leaves.items(), gradients, strict=True):
                found[f"gradient of {name}"] = torch.zeros_like(x) if g is None else g
        return found

    def hold(self, found: Results, tensors: dict[str, Tensor | None], seed: int | None) -> None:
        """What was found is what is true, within the bounds of properties.py."""
        exact = self.exact(tensors, seed)
        exact = {name: exact[name] for name in found}
        if mismatch(self.case, found, exact, exact) is None:
            return
        alone = [
            self.exact(tensors, seed, abs(c) * objkern.parse(term))
            for c, term in self.case.terms
            if not (self.case.kind == "elements" and term == "LogitL2()")
        ]
        # A sum over all logits may cancel where no row does.
        summed = self.exact(tensors, seed)
        if seed is not None and tensors["logit_scale"] is not None:
            x, g = wide(tensors)[self.main], summed[f"gradient of {self.main}"]
            size = (x.detach().nan_to_num(0.0, 0.0, 0.0) * g).abs().sum() if self.main == "logits" else g.abs().sum()
            summed["gradient of logit_scale"] = size * 8
        wrong = mismatch(self.case, found, exact, *alone, exact, summed)
        assert wrong is None, f"{wrong}\n{self.case}"

    def same_as_before(self, key: Any, found: Any) -> None:
        """Bit for bit what the same call gave before."""
        before = self.seen.setdefault(key, found)
        for name, x in before.items():
            assert same_bits(x, found[name]), f"{name} of {key} is not what it was:\n{x}\n{found[name]}\n{self.case}"

    @invariant()
    def the_callers_tensors_are_as_they_were(self) -> None:
        for name, x in getattr(self, "own", {}).items():
            if x is not None:
                assert torch.equal(x.detach().nan_to_num(7.0), self.held[name].nan_to_num(7.0)), (
                    f"{name} was written to"
                )
                assert x.grad is None, f"{name} was given a gradient that nobody asked for"

    # ---- calls ------------------------------------------------------------------------------------------------------

    @rule(
        parts=st.booleans(),
        backend=st.sampled_from(["auto", "auto", "auto", "cpu", "reference"]),
        around=st.sampled_from(["", "", "", "no_grad", "inference_mode", "autocast", "hooks"]),
    )
    def call(self, parts: bool, backend: str, around: str) -> None:
        context: dict[str, AbstractContextManager] = {
            "": nullcontext(), "no_grad": torch.no_grad(), "inference_mode": torch.inference_mode(),
            "autocast": torch.autocast("cpu", torch.bfloat16) if self.case.linear is None else nullcontext(),
            "hooks": torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x),
        }  # fmt: skip
        with context[around]:
            loss = self.evaluate(self.objective, self.own, backend=backend, return_parts=parts)
        found = {}
        if parts:
            loss, found = loss
            assert not any(part.requires_grad for part in found.values())
            found = {name: part for name, part in found.items() if name != "accuracy"}
        assert loss.dtype == (torch.float64 if self.case.dtype == torch.float64 else torch.float32)
        silent = around in ("no_grad", "inference_mode")
        # A target that no term reads, as under label_smoothing=1, may leave no graph.
        assert not (loss.requires_grad and (silent or not self.leaves)), "a graph that nobody asked for"
        found = {"loss": loss.detach().clone()} | found
        self.hold(found, self.own, None)
        self.same_as_before(("call", backend == "reference", parts), found)
        if loss.requires_grad and around != "hooks":
            tensors = {name: None if x is None else x.detach().clone() for name, x in self.own.items()}
            in_forward = backend != "reference" and "forward" in (
                self.options.get("gradient"),
                self.options.get("mode"),
            )
            self.graphs = [*self.graphs[-3:], Graph(loss, self.leaves, tensors, in_forward)]

    @precondition(lambda self: self.graphs)
    @rule(data=st.data(), seed=SEEDS, retain=st.booleans())
    def backward(self, data: st.DataObject, seed: int, retain: bool) -> None:
        graph = data.draw(st.sampled_from(self.graphs), label="graph")
        some = data.draw(st.lists(st.sampled_from(sorted(graph.leaves)), min_size=1, unique=True), label="leaves")
        upstream = upstream_of(graph.loss, seed)
        try:
            gradients = torch.autograd.grad(
                graph.loss, [graph.leaves[name] for name in some], upstream, retain_graph=retain, allow_unused=True
            )
        except RuntimeError as error:
            excused = (graph.freed and TWICE in str(error)) or (
                (graph.logits_changed or graph.coefficient_changed) and INPLACE in str(error)
            )
            if not excused:
                raise
            graph.freed = graph.freed or not retain
            return
        graph.freed = not retain
        found = {}
        for name, g in zip(some, gradients, strict=True):
            leaf = graph.leaves[name]
            g = torch.zeros_like(leaf) if g is None else g
            assert (g.dtype, g.shape) == (leaf.dtype, leaf.shape)
            found[f"gradient of {name}"] = g
        self.hold(found, graph.exact_of, seed)
        # A gradient that came with the loss is used up by the first pass; the next one reads the logits.
        passes = "first" if graph.in_forward and not graph.gradients else "later"
        for name, g in found.items():
            before = graph.gradients.setdefault((passes, seed, name), g.clone())
            assert same_bits(g, before), f"{name} is not what it was\n{self.case}"

    @precondition(lambda self: self.case.dtype in (torch.float32, torch.float64) and self.leaves)
    @rule(seed=SEEDS)
    def second_derivative(self, seed: int) -> None:
        """Of the gradient by the logits, or whatever comes first, by the same: twice the reference's error at most."""
        name = self.main if self.main in self.leaves else sorted(self.leaves)[0]

        def second(tensors: dict[str, Tensor | None], coefficient: Tensor | None, **more: Any) -> Tensor | None:
            loss = self.evaluate(self.objective_of(coefficient), tensors, **more)
            if not loss.requires_grad:
                return None
            leaf = tensors[name]
            (g,) = torch.autograd.grad(loss, leaf, upstream_of(loss, seed), create_graph=True, allow_unused=True)
            if g is None or not g.requires_grad:
                return torch.zeros_like(leaf)
            (h,) = torch.autograd.grad(g, leaf, upstream_of(g, seed), allow_unused=True)
            return torch.zeros_like(leaf) if h is None else h

        ours = second(self.own, self.own["coefficient"])
        if ours is None:
            return
        exact_of = wide(self.own)
        exact = second(exact_of, exact_of["coefficient"], backend="reference")
        native = second(self.own, self.own["coefficient"], backend="reference")
        if native is None:  # of a target that no term reads, the reference has no graph at all
            native = torch.zeros_like(ours)
        error, allowed = (x.double() - exact for x in (ours, native))
        finite = exact.isfinite()
        error, allowed = error.where(finite, 0.0), allowed.where(finite, 0.0)
        least = {torch.float32: 1e-6, torch.float64: 1e-13}[self.case.dtype] * (
            1.0 + exact.where(finite, 0.0).abs().amax() if exact.numel() else 1.0
        )
        assert bool((error.abs() <= 2 * allowed.abs().amax() + least).all()) if exact.numel() else True, (
            f"second derivative by {name}: {error.abs().amax()} against {allowed.abs().amax()}\n{self.case}"
        )

    # ---- changes ----------------------------------------------------------------------------------------------------

    @rule(how=st.sampled_from(["deepcopy", "pickle", "parse", "state dict", "double", "half", "train"]))
    def copies(self, how: str) -> None:
        before = self.objective
        coefficient = self.own["coefficient"]
        if how == "parse":
            if coefficient is not None:
                with pytest.raises(ValueError, match=r"objective: .* holds a tensor"):
                    objkern.parse(repr(before))
                return
            after = objkern.parse(repr(before))
        elif how == "deepcopy" and coefficient is None:
            after = copy.deepcopy(before)
        elif how == "pickle" and coefficient is None:
            after = pickle.loads(pickle.dumps(before))
        elif how == "state dict":
            after = self.objective_of(coefficient)
            after.load_state_dict(before.state_dict())
        elif how in ("double", "half", "train"):
            after = getattr(before, how)()
        else:  # a copy has a coefficient of its own, with the same number
            after = copy.deepcopy(before) if how == "deepcopy" else pickle.loads(pickle.dumps(before))
            assert repr(after) == repr(before)
            with torch.no_grad():
                assert same_bits(self.evaluate(after, self.own), self.evaluate(before, self.own))
            return
        assert repr(after) == repr(before)
        with torch.no_grad():
            assert same_bits(self.evaluate(after, self.own), self.evaluate(before, self.own))
        self.objective = after

    @precondition(lambda self: self.own["coefficient"] is not None)
    @rule(number=st.sampled_from([0.5, -0.25, 0.0, 3.0]))
    def change_the_coefficient(self, number: float) -> None:
        with torch.no_grad():
            self.own["coefficient"].fill_(number)
        for graph in self.graphs:
            graph.coefficient_changed = True
        self.remember()

    @rule(factor=st.sampled_from([0.5, -1.0]))
    def change_the_logits(self, factor: float) -> None:
        x = self.own[self.main]
        if bool((x == -torch.inf).any()):
            factor = 0.5  # an excluded class stays one
        with torch.no_grad():
            x.mul_(factor)
        for graph in self.graphs:
            graph.logits_changed = True
        self.remember()

    # ---- others beside it -------------------------------------------------------------------------------------------

    @precondition(lambda self: self.main in self.leaves)
    @rule(seed=SEEDS)
    def two_losses_on_the_same_logits(self, seed: int) -> None:
        """Their gradients add up, whichever was computed first."""
        leaf = self.own[self.main]
        alone, first, second = (self.evaluate(self.objective, self.own) for _ in range(3))
        upstream = upstream_of(alone, seed)
        (alone,) = torch.autograd.grad(alone, leaf, upstream)
        (both,) = torch.autograd.grad([second, first], leaf, [upstream, upstream])
        assert same_bits(both, alone + alone), f"{both}\n{alone + alone}\n{self.case}"

    @precondition(lambda self: self.case.kind != "elements" and self.case.linear is None)
    @rule(seed=SEEDS, data=st.data())
    def row_statistics(self, seed: int, data: st.DataObject) -> None:
        options = {name: self.options[name] for name in ("ignore_index", "softcap") if name in self.options}
        field = data.draw(st.sampled_from(objkern.Statistics._fields))

        def run(tensors: dict[str, Tensor | None], backend: str) -> Results:
            more = {name: tensors[name] for name in ("logit_scale", "reference") if tensors[name] is not None}
            found = objkern.row_statistics(
                tensors["logits"], tensors["target"], temperature=self.case.temperature, backend=backend, **options,
                **more,
            )  # fmt: skip
            results = {name: x.detach() for name, x in found._asdict().items() if x is not None}
            x = getattr(found, field)
            if x is not None and x.requires_grad and tensors["logits"].requires_grad:
                (g,) = torch.autograd.grad(x, tensors["logits"], upstream_of(x, seed), allow_unused=True)
                results["gradient"] = torch.zeros_like(tensors["logits"]) if g is None else g
            return results

        found, exact = run(self.own, "auto"), run(wide(self.own), "reference")
        self.same_as_before(("statistics", field, seed), found)
        if "gradient" not in found:
            exact.pop("gradient", None)
        steepest = {"mean_square_logit": 60.0, "logit_variance": 60.0}.get(field, 1.0)
        exact_of_zero = {name: x + steepest if name == "gradient" else x for name, x in exact.items()}
        wrong = mismatch(self.case, found | {"loss": torch.zeros(())}, exact | {"loss": torch.zeros(())},
                         exact_of_zero | {"loss": torch.zeros(())})  # fmt: skip
        assert wrong is None, f"{field}: {wrong}\n{self.case}"

    @precondition(lambda self: self.case.linear is None and self.case.kind != "no target")
    @rule()
    def torch_func(self) -> None:
        """vmap is a loop, and grad is backward."""
        z, target = self.own["logits"].detach(), self.own["target"].detach()
        fixed = {name: None if x is None else x.detach() for name, x in self.own.items()}
        objective = self.objective_of(fixed["coefficient"])

        def loss(x: Tensor, y: Tensor) -> Tensor:
            found = self.evaluate(objective, fixed | {"logits": x, "target": y})
            return found.sum() if self.options["reduction"] == "none" else found

        several, targets = torch.stack([z, z.flip(0)]), torch.stack([target, target])
        found = torch.func.vmap(loss)(several, targets)
        for k in range(2):
            alone = loss(several[k], targets[k])
            torch.testing.assert_close(found[k], alone, rtol=1e-6, atol=1e-6, equal_nan=True)
        leaf = z.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf, target), leaf)
        torch.testing.assert_close(torch.func.grad(loss)(z, target), expected, rtol=1e-6, atol=1e-6, equal_nan=True)

    @rule(backend=st.sampled_from(["eager", "aot_eager"]), rare=st.integers(0, 29))
    def compiled(self, backend: str, rare: int) -> None:
        if rare != 7:  # it takes as long as a hundred other calls
            return
        torch._dynamo.reset()
        expected = self.evaluate(self.objective, self.own)
        run = torch.compile(lambda tensors: self.evaluate(self.objective, tensors), backend=backend, fullgraph=True)
        found = run(self.own)
        assert same_bits(found.detach(), expected.detach()), f"compiled {found} for {expected}\n{self.case}"
        if expected.requires_grad:
            leaves = list(self.leaves.values())
            upstream = upstream_of(expected, 1)
            both = [torch.autograd.grad(x, leaves, upstream, allow_unused=True) for x in (found, expected)]
            for a, b in zip(*both, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, equal_nan=True)
        torch._dynamo.reset()

    # ---- what is wrong ----------------------------------------------------------------------------------------------

    @rule(data=st.data())
    def nonsense(self, data: st.DataObject) -> None:
        """Anything for any argument: it is refused by an error that names it, or it is not nonsense."""
        arguments = ["target", "reduction", "ignore_index", "normalizer", "logit_scale", "softcap", "reference", "rows",
                     "shift", "gradient", "empty", "return_parts", "validate", "backend"]  # fmt: skip
        arguments += ["class_dim", "logits"] if self.case.linear is None else ["mode", "chunk_rows", "weight", "hidden"]
        name = data.draw(st.sampled_from(arguments))
        junk = POOL[data.draw(st.sampled_from(sorted(POOL)))]
        tensors, more = dict(self.own), {}
        if name in tensors:
            tensors[name] = junk
        else:
            more[name] = junk
        try:
            self.evaluate(self.objective, tensors, **more)
        except REFUSALS as error:
            if not named(error, name):
                raise

    @precondition(lambda self: self.case.kind == "labels")
    @rule(data=st.data(), label=st.sampled_from([-1, -2, 70, 10**6, 2**63 - 1, -(2**63)]))
    def a_bad_label(self, data: st.DataObject, label: int) -> None:
        if label == self.options.get("ignore_index", -100) or 0 <= label < self.case.classes:
            return
        row = data.draw(st.integers(0, self.case.rows - 1))
        target = self.own["target"].clone()
        target[row] = label
        with pytest.raises(IndexError, match=rf"target: row {row} holds label {label}, .*\(?{self.case.classes}"):
            self.evaluate(self.objective, self.own | {"target": target})

    @precondition(lambda self: self.case.linear is None and self.case.kind != "elements")
    @rule(data=st.data(), value=st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    def a_logit_that_is_no_number(self, data: st.DataObject, value: float) -> None:
        """Its row is NaN where the reference says so, and the others do not notice."""
        row, place = data.draw(st.integers(0, self.case.rows - 1)), data.draw(st.integers(0, self.case.classes - 1))
        z = self.own["logits"].detach().clone()
        z[row, place] = value
        tensors = self.own | {"logits": z.requires_grad_()}
        alone = {"reduction": "none"} | ({"gradient": "backward"} if "gradient" in self.options else {})
        saved, self.options = self.options, {k: v for k, v in self.options.items() if k != "normalizer"} | alone
        try:
            loss = self.evaluate(self.objective, tensors)
            exact_of = wide(tensors)
            exact = self.evaluate(self.objective_of(exact_of["coefficient"]), exact_of, backend="reference")
            assert torch.equal(loss.isnan(), exact.isnan()), f"{loss}\n{exact}\n{self.case}"
            assert torch.equal(loss.isinf(), exact.isinf()), f"{loss}\n{exact}\n{self.case}"
            (g,) = torch.autograd.grad(loss, z, torch.ones_like(loss))
            clean = self.evaluate(
                self.objective, self.own | {"logits": (x := self.held["logits"].clone().requires_grad_())}
            )
            (expected,) = torch.autograd.grad(clean, x, torch.ones_like(clean))
            others = [k for k in range(self.case.rows) if k != row]
            torch.testing.assert_close(g[others], expected[others], rtol=1e-6, atol=1e-6, equal_nan=True)
        finally:
            self.options = saved

    @precondition(lambda self: self.case.linear is None)
    @rule(shape=st.sampled_from(["no rows", "one row", "more dimensions"]))
    def other_shapes(self, shape: str) -> None:
        def reshaped(x: Tensor | None, of_row: int) -> Tensor | None:
            if x is None or shape == "more dimensions":
                return None if x is None else x.reshape(1, -1, 1, *x.shape[x.dim() - of_row :])
            return x[:0] if shape == "no rows" else x[0]

        dense = 1 if self.case.kind in ("probabilities", "elements") else 0
        own = {name: None if x is None else x.detach() for name, x in self.own.items()}
        tensors = own | {
            "logits": reshaped(own["logits"], 1).clone().requires_grad_(), "target": reshaped(own["target"], dense),
            "reference": reshaped(own["reference"], 1),
        }  # fmt: skip
        loss = self.evaluate(self.objective, tensors)
        exact_of = wide(tensors)
        exact = self.evaluate(self.objective_of(exact_of["coefficient"]), exact_of, backend="reference")
        assert loss.shape == exact.shape
        assert torch.equal(loss.isnan(), exact.isnan()), f"{loss}\n{exact}\n{self.case}"
        (g,) = torch.autograd.grad(loss, tensors["logits"], torch.ones_like(loss))
        assert g.shape == tensors["logits"].shape
