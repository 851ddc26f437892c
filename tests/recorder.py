"""Stands in for a CUDA graph on a CPU: records the operations of a step, and replays them.

What a graph would keep is kept here: the memory of every result, and every number that Python had
in its hands. What a graph cannot hold is refused. So a step that replays like an eager one here
needs nothing of Python while it is replayed. Streams and memory pools are not modelled.
"""
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

REFUSED = {"lift_fresh": "a tensor is made from Python's numbers", "multinomial": "it waits"}


class Refused(Exception):
    """The step has done what no CUDA graph can hold."""


def tensors(tree) -> list[torch.Tensor]:
    return list(filter(torch.is_tensor, tree_leaves(tree)))


def check(func, args, out):
    """Raise `Refused` for an operation whose course or result depends on values on the device."""
    name = func.overloadpacket.__name__
    if name in REFUSED:
        raise Refused(f"{func}: {REFUSED[name]}")
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        if any(index.dtype in (torch.bool, torch.uint8) for index in tensors(args[1])):
            raise Refused(f"{func}: the shape depends on a mask")
    elif {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
        raise Refused(f"{func}: waits for the device")
    if func._schema.returns and not tensors(out):
        raise Refused(f"{func}: returns {type(out).__name__} to Python")


def same(leaf):
    """For a copy of a tree: later changes of its lists do not reach what was recorded."""
    return leaf


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace != "profiler":
            check(func, args, out)
            self.calls.append((func, *tree_map(same, (args, kwargs, out))))
        return out

    @torch.no_grad()
    def replay(self):
        """Do all again, with the same arguments; new results go where the first ones lie."""
        for func, args, kwargs, out in self.calls:
            for first, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                if first.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    first.copy_(new)  # neither a view nor in place


def refuse(*_, **__):
    raise Refused("a tensor is copied to the host")


def record(step, undo, generators):
    """As `model.cuda_graph`: a function that replays the step, and the step's output."""
    step()
    undo()
    recorder = Recorder()
    # On a CPU these methods reach no dispatcher.
    with patch.multiple(torch.Tensor, cpu=refuse, numpy=refuse, tolist=refuse), recorder:
        output = step()
    return recorder.replay, output
