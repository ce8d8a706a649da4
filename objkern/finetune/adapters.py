"""Adapters on disk: merged into the weights, or, as prompt vectors can't be, as peft has them.

model.safetensors              a model with LoRA merged into it is like any other
adapter_model.safetensors      prompt vectors, and a head if that has trained with them
adapter_config.json            which model they belong to, by its name on the hub
base/                          that model, if it has no name by which others could load it
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

from torch import nn

from ..transformers import detach
from .record import read_json
from .tables import first_line
from .tasks import Task

CONFIG = "adapter_config.json"


def are_in(folder: Path) -> bool:
    return (folder / CONFIG).exists()


def base_of(folder: Path) -> str:
    """The name of the model that the adapters belong to, or its folder."""
    own = folder / "base"
    if own.is_dir():
        return str(own)
    config = read_json(folder / CONFIG, "model", {"base_model_name_or_path": str})
    return config.get("base_model_name_or_path") or ""


def is_hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not Path(name).exists()


def save(folder: Path, model: Any, task: Task) -> None:
    """A model that peft has changed."""
    if hasattr(model, "merge_and_unload") and not any(c.is_prompt_learning for c in model.peft_config.values()):
        _merged(model, task).save_pretrained(str(folder))
        return
    base = model.get_base_model()
    if not is_hub_name(model.peft_config[model.active_adapter].base_model_name_or_path or ""):
        # peft keeps a head twice, as it was and as it is trained; the second one goes with the adapter.
        state = {key.replace("original_module.", ""): x for key, x in base.state_dict().items()
                 if "modules_to_save." not in key}  # fmt: skip
        base.save_pretrained(str(folder / "base"), state_dict=state)
    model.save_pretrained(str(folder), save_embedding_layers=False)


def _merged(model: Any, task: Task) -> Any:
    merged = copy.deepcopy(model)
    if task.linear_head:
        detach(merged)
    return merged.merge_and_unload()


def load(folder: Path, base: nn.Module) -> Any:
    """The model with the adapters of a folder."""
    import peft

    try:
        return peft.PeftModel.from_pretrained(base, str(folder), use_safetensors=True)
    except Exception as error:  # of many kinds: a file cut short, another model's adapters
        raise ValueError(f"model: the adapters of {folder} can't be loaded: {first_line(error)}") from error
