"""What can be asked for by name, and where it is."""

from __future__ import annotations

from typing import NamedTuple


class Suite(NamedTuple):
    files: tuple[str, ...]
    what: str


SUITES = {
    "logits": Suite(("test_logits.py",), "objectives on logits, a reference, more and more terms, instruction sets"),
    "linear": Suite(("test_linear.py",), "the last layer and its loss, without the logits; time and memory"),
    "elementwise": Suite(("test_elementwise.py",), "binary cross-entropy, squared errors, with and without penalties"),
    "parameters": Suite(("test_parameters.py",), "terms on all the weights of a model"),
    "finetune-step": Suite(("test_finetune_step.py",), "whole steps of a language model and a tagger"),
    "overhead": Suite(("test_overhead.py",), "what a call costs on next to no data"),
    "compile-time": Suite(("test_compile_time.py",), "building, importing, first calls"),
    "scaling": Suite(("test_scaling.py",), "time over rows and classes, past 2^31 logits"),
    "watch": Suite(("test_watch.py",), "the least times of kernels, which bench compare compares"),
    "memory": Suite(("test_memory.py",), "what a step adds to the peak, over the number of classes"),
}
