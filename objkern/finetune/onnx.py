"""A saved model as model.onnx: one forward pass, from token numbers to logits, for any number of rows and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import adapters
from .tables import first_line
from .tasks import Task

ONNX = "model.onnx"


class _Logits(nn.Module):
    """The forward pass as ONNX wants it: tensors in by their places, tensors out."""

    def __init__(self, model: nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, list(inputs), list(outputs)
        self.options = {"use_cache": False} if hasattr(model, "generation_config") else {}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        found = self.model(**dict(zip(self.inputs, tensors, strict=True)), **self.options)
        return tuple(getattr(found, name) for name in self.outputs)


def require_onnx(folder: Path) -> None:
    """Raises a ValueError if a package is missing, or if the model in the folder can't be written."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ValueError(f"onnx: needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    if adapters.are_in(folder):
        raise ValueError("onnx: a model with prompt vectors can't be written; train with full or lora instead")


def write_onnx(path: Path, model: Any, task: Task) -> None:
    """Writes the model, whose attention is set to one that can be traced."""
    inputs = _inputs(model, task)
    outputs = ["start_logits", "end_logits"] if task.name == "question-answering" else ["logits"]
    rows, tokens, answer = (torch.export.Dim(name) for name in ("rows", "tokens", "answer_tokens"))
    sizes = [{0: rows, 1: answer if name.startswith("decoder") else tokens} for name in inputs]
    size = sum(x.numel() * x.element_size() for x in model.state_dict().values())
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")  # torch can't trace T5's fused attention for every number of tokens
    try:
        torch.onnx.export(
            _Logits(model, list(inputs), outputs), tuple(inputs.values()), str(path), dynamo=True,
            input_names=list(inputs), output_names=outputs, dynamic_shapes=(tuple(sizes),),
            external_data=size > 2**30, verbose=False,  # a file of ONNX holds no more than 2 GiB
        )  # fmt: skip
    except Exception as error:  # of many kinds: whatever torch can't trace
        raise ValueError(f"onnx: {type(model).__name__} can't be written: {first_line(error)}") from error


def _inputs(model: Any, task: Task) -> dict[str, Tensor]:
    """An example of what the model takes."""
    ids = torch.tensor([[1, 2, 3], [2, 3, 4]]) % model.config.get_text_config().vocab_size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "token_type_ids" in task.tokenizer.model_input_names:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :2]
    return inputs
