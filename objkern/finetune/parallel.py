"""How ranks share the work of a run, on torch.distributed as it is.

data        each has the whole model and some of a window's batches; gradients are added up
fsdp        each has a part of every weight and of its moments, which are gathered a layer at a time (fully_shard)
tensor      each has some classes of a language model's head, and all of them see the same batches
tensor:2    two by two; pairs share the batches as under data

One rank alone has the whole model, whatever is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed import is_dtensor, whole_logits
from .strategies import layers_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .tasks import Task

NAMES = ("data", "fsdp", "tensor")


def parse(parallel: str) -> tuple[str, int]:
    """A name and its number: ``"tensor:2"`` → ``("tensor", 2)``; 0 stands for all ranks."""
    name, colon, number = str(parallel).partition(":")
    if name not in NAMES or (colon and (name != "tensor" or not number.isdecimal() or int(number) < 1)):
        raise ValueError(f"parallel: expected data, fsdp, tensor or tensor:K but got {parallel!r}")
    return name, int(number) if number else 0


def check(parallel: str, strategy: str, task: type[Task] | Task) -> None:
    """Raises a ValueError for what does not go together."""
    name, _ = parse(parallel)
    if name == "fsdp" and (strategy == "gradual" or strategy.startswith("prompt")):
        raise ValueError(f"parallel: fsdp needs to know from the start which weights train, and has no {strategy}")
    if name == "tensor" and not task.linear_head:
        raise ValueError(f"parallel: tensor splits the head of a language model, which {task.name} does not have")


@dataclass(frozen=True)
class Layout:
    """Who shares the batches of a window, and how they stay together.

    Attributes:
        name: what the ranks have parts of: "fsdp", "tensor", or nothing under "data"; of one rank alone always "data".
        rank, ranks: among those that share the batches.
        group: of them; None where this rank is alone among all.
        mesh: under "tensor" of the ranks that share the classes.
    """

    name: str = "data"
    rank: int = 0
    ranks: int = 1
    group: Any = None
    mesh: DeviceMesh | None = None

    @property
    def in_step(self) -> bool:
        """Whether a pass of one is a pass of all, so that each needs as many."""
        return self.name == "fsdp"

    def places(self, count: int) -> list[int | None]:
        """Of the window's batches those of this rank; None: a pass beside others' that counts for nothing."""
        own: list[int | None] = list(range(self.rank, count, self.ranks))
        passes = -(-count // self.ranks) if self.in_step else len(own)
        return own + [None] * (passes - len(own))


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def layout_of(parallel: str) -> Layout:
    """Of this rank; all have to call.

    Raises:
        ValueError: the ranks do not come out even.
    """
    from torch.distributed.device_mesh import init_device_mesh

    name, size = parse(parallel)
    if world() == 1:
        return Layout()
    if name != "tensor":
        return Layout(name, dist.get_rank(), world(), dist.group.WORLD)
    size = size or world()
    if world() % size:
        raise ValueError(f"parallel: expected a number that divides the {world()} ranks but got tensor:{size}")
    mesh = init_device_mesh(_device_type(), (world() // size, size), mesh_dim_names=("data", "tensor"))
    return Layout(name, mesh.get_local_rank("data"), mesh["data"].size(), mesh.get_group("data"), mesh["tensor"])


def apply(model: nn.Module, layout: Layout) -> nn.Module:
    """Splits a whole model, with its strategy applied, in place. Every rank has the same (`same_weights`).

    Raises:
        ValueError, TypeError: a model that cannot be split so.
    """
    if layout.name == "fsdp":
        _shard(model)
    elif layout.mesh is not None:
        _split_head(model, layout.mesh)
    return model


def same_weights(model: nn.Module) -> None:
    """Those of rank 0 on all, whose new layers may have begun otherwise; parts of a tensor come from one already."""
    if world() > 1:
        with torch.no_grad():
            for value in model.state_dict().values():
                if not is_dtensor(value):
                    dist.broadcast(value, src=0)


def is_split(model: nn.Module) -> bool:
    """Whether a rank has only a part of some weight."""
    return is_dtensor(*model.parameters())


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with whole tensors in the CPU's memory, on rank 0; empty on the others, which all have to call."""
    first, found = world() == 1 or dist.get_rank() == 0, {}
    for name, value in model.state_dict().items():
        if is_dtensor(value):
            value = value.full_tensor()
        if first:
            found[name] = value.detach().cpu()
    return found


def _device_type() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


# ---- fsdp -----------------------------------------------------------------------------------------------------------


def _shard(model: nn.Module) -> None:
    """Layer by layer; what is in none, the head too, with the whole model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(_device_type(), (world(),))
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    # The model itself, and not what peft wraps it in, whose `generate` goes past that. Its parameters would stay whole
    # behind an evaluation, which has no backward pass to end that.
    root = model.get_base_model() if hasattr(model, "get_base_model") else model
    fully_shard(root, mesh=mesh, reshard_after_forward=True)
    if hasattr(root, "generate"):  # which calls an encoder by itself
        register_fsdp_forward_method(root, "generate")
    for module in model.modules():
        if isinstance(module, FSDPModule):  # sums, as everywhere here: rows were divided by the count of all ranks
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _layers(model: nn.Module) -> list[nn.Module]:
    """Those of the body, of encoder and decoder: what transformers says belongs together, else the longest list."""
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [layer for some in lists for layer in some if type(layer).__name__ in names] or list(layers_of(model))


# ---- a head whose classes are split ---------------------------------------------------------------------------------


def _split_head(model: nn.Module, mesh: DeviceMesh) -> None:
    from ..transformers import _owner, detach

    detach(model)  # it is attached anew, to the head as it is by then
    head = _owner(model).get_output_embeddings()
    if type(head).forward is not nn.Linear.forward:
        raise ValueError(f"parallel: tensor needs a head that is a linear layer but got a {type(head).__name__}")
    tied = [
        module for module in model.modules() if module is not head and getattr(module, "weight", None) is head.weight
    ]
    for module in tied:
        if not isinstance(module, nn.Embedding):
            raise ValueError(f"parallel: tensor cannot split a head that is tied to a {type(module).__name__}")
    for name, value in list(head.named_parameters(recurse=False)):
        setattr(head, name, _by_class(value, mesh))
    head.forward = _WholeLogits(head)
    for embedding in tied:
        embedding.weight = head.weight
        embedding.register_forward_pre_hook(_replicated)
        embedding.register_forward_hook(_gathered)


def _by_class(value: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    from torch.distributed.tensor import Shard, distribute_tensor

    # Cloned, or the whole one would be kept for the part.
    part = distribute_tensor(value.detach(), mesh, [Shard(0)], src_data_rank=None).clone()
    return nn.Parameter(part, requires_grad=value.requires_grad)


class _WholeLogits:
    """The forward of a head whose classes are split, where somebody asks for the logits: of all classes, gathered."""

    def __init__(self, head: nn.Linear) -> None:
        self.head = head

    def __call__(self, hidden: Tensor) -> Tensor:
        return whole_logits(hidden, self.head.weight, self.head.bias)


def _replicated(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    from torch.distributed.tensor import DTensor, Replicate

    mesh = module.weight.device_mesh
    return DTensor.from_local(arguments[0], mesh, [Replicate()] * mesh.ndim, run_check=False), *arguments[1:]


def _gathered(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Tensor:
    return output.full_tensor()


# ---- gradients ------------------------------------------------------------------------------------------------------


def kinds(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Whole ones and split ones, which no function of torch takes together."""
    found: dict[bool, list[Tensor]] = {}
    for p in parameters:
        found.setdefault(is_dtensor(p), []).append(p)
    return [found[kind] for kind in sorted(found)]


def clip(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` of weights of both kinds; returns the norm before."""
    groups = kinds(p for p in parameters if p.grad is not None)
    norms = [torch.nn.utils.get_total_norm([p.grad for p in group]) for group in groups]
    norms = [norm.full_tensor() if is_dtensor(norm) else norm for norm in norms]
    if not norms:
        return torch.zeros(())
    total = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, limit, total)
    return total
