"""What of a model trains.

full         everything
head         what stands behind the body: a classifier, a language model's last layer
last:2       the head and the last two layers of the body
lora:8       low-rank adapters of rank 8 on every linear layer of the body, by peft; a classifier trains whole
prompt:20    twenty prompt vectors, by peft
gradual      the head in the first epoch, one layer more in every epoch after it
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = ("full", "head", "last", "lora", "prompt", "gradual")
_DEFAULTS = {"last": 2, "lora": 8, "prompt": 20}
_PEFT_TASKS = {"sequence-classification": "SEQ_CLS", "token-classification": "TOKEN_CLS",
               "question-answering": "QUESTION_ANS", "causal-lm": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}  # fmt: skip


def parse(strategy: str) -> tuple[str, int]:
    """A name and its number: ``"last:2"`` → ``("last", 2)``."""
    name, _, number = strategy.partition(":")
    if name not in NAMES or (number and (name not in _DEFAULTS or not number.isdecimal() or int(number) < 1)):
        raise ValueError(f"strategy: expected full, head, last:K, lora:R, prompt:N or gradual but got {strategy!r}")
    return name, int(number) if number else _DEFAULTS.get(name, 0)


def apply(model: PreTrainedModel, strategy: str, task_name: str) -> nn.Module:
    """Freezes what does not train; returns the model, wrapped by peft where that makes it train."""
    name, number = parse(strategy)
    if name == "last" and number > (there := len(layers_of(model.base_model))):
        raise ValueError(f"strategy: expected at most last:{there}, which is all its layers, but got {strategy!r}")
    if name in ("head", "last", "gradual"):
        train_last(model, number)
    elif name in ("lora", "prompt"):
        return _with_adapters(model, name, number, _PEFT_TASKS[task_name])
    return model


def begin_epoch(model: nn.Module, strategy: str, epoch: int) -> None:
    """What an epoch, counted from 1, changes: gradual unfreezing."""
    if parse(strategy)[0] == "gradual":
        train_last(model, epoch - 1)


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The layers of the body, in order: the longest list of modules; of a decoder where there are two as long."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    if not lists:
        raise ValueError(f"strategy: {type(model).__name__} has no list of layers; only full and head can train it")
    longest = max(map(len, lists))
    return [module for module in lists if len(module) == longest][-1]


def train_last(model: PreTrainedModel, count: int) -> None:
    """The head and the last `count` layers, and nothing else."""
    body = model.base_model
    if body is model:
        raise ValueError(f"strategy: {type(model).__name__} is a body without a head")
    for p in body.parameters():
        p.requires_grad_(False)
    in_body = {id(p) for p in body.parameters()}
    for p in model.parameters():
        if id(p) not in in_body:
            p.requires_grad_(True)
    output = model.get_output_embeddings()
    if output is not None:  # a tied one belongs to the body too
        for p in output.parameters():
            p.requires_grad_(True)
    if count == 0:
        return
    layers = layers_of(body)
    for layer in list(layers)[-count:]:
        for p in layer.parameters():
            p.requires_grad_(True)


def _with_adapters(model: PreTrainedModel, name: str, number: int, task_type: str) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"strategy: {name} needs peft: pip install peft") from error
    if name == "prompt":
        if task_type in ("TOKEN_CLS", "QUESTION_ANS"):
            raise ValueError("strategy: prompt vectors would be tokens with answers")
        return peft.get_peft_model(model, peft.PromptTuningConfig(task_type=task_type, num_virtual_tokens=number))
    head = [] if model.get_output_embeddings() is not None else _head_of(model)
    parts = [(part, model.get_submodule(part).named_modules()) for part in head]
    linear = [f"{part}.{name}".rstrip(".") for part, modules in parts for name, module in modules
              if isinstance(module, nn.Linear)]  # fmt: skip
    config = peft.LoraConfig(
        task_type=task_type, r=number, lora_alpha=2 * number, lora_dropout=0.0, target_modules="all-linear",
        exclude_modules=linear,
        modules_to_save=head or None,
    )  # fmt: skip
    return peft.get_peft_model(model, config)


def _head_of(model: PreTrainedModel) -> list[str]:
    """What stands beside the body and has weights."""
    body = model.base_model
    return [name for name, part in model.named_children() if part is not body and any(True for _ in part.parameters())]
