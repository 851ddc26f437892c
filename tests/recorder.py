"""Stands in for a CUDA graph on a CPU: records the operations of a step, and replays them.

What a graph would keep is kept here: the memory of every result, and every number that Python had
in its hands. What a graph cannot hold is refused. So a step that replays like an eager one here
needs nothing of Python while it is replayed. Streams and memory pools are not modelled.
"""
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

REFUSED = {"lift_fresh": "a tensor is made from Python's numbers", "multinomial": "it waits"}


class Refused(Exception):
    """The step has done what no CUDA graph can hold."""


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if torch.is_tensor(leaf)]


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


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace != "profiler":
            check(func, args, out)
            self.calls.append((func, *tree_map(lambda leaf: leaf, (args, kwargs, out))))
        return out

    @torch.no_grad()
    def replay(self):
        """Do all again, with the same arguments; new results go where the first ones lie."""
        for func, args, kwargs, out in self.calls:
            for kept, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                if kept.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    kept.copy_(new)  # neither a view nor in place


@contextmanager
def no_way_to_python():
    """On a CPU these reach no dispatcher."""
    def refuse(*_, **__):
        raise Refused("a tensor is copied to the host")
    with patch.multiple(torch.Tensor, cpu=refuse, numpy=refuse, tolist=refuse):
        yield


def record(step, undo, generators, warm=True):
    """As `model.cuda_graph`: a function that replays the step, and the step's output."""
    if warm:
        step()
        undo()
    recorder = Recorder()
    with no_way_to_python(), recorder:
        output = step()
    return recorder.replay, output


def record_cold(step, undo, generators):
    """The same without the run that makes the optimizer's state: a mistake."""
    return record(step, undo, generators, warm=False)
