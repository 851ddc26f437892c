"""Lets the tests import the five files, and gives them one world and one small model."""
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if not torch.cuda.is_available():  # before the first import of triton: it decides there
    os.environ.setdefault("TRITON_INTERPRET", "1")

from data import default_world  # noqa: E402
from model import GPT, Shape  # noqa: E402


torch.set_num_threads(1)  # beside another busy process, spinning threads are ten times slower


@pytest.fixture(scope="session")
def world():
    return default_world()


@pytest.fixture
def small(world):
    """A GPT with random weights, small enough to check by hand."""
    torch.manual_seed(0)
    model = GPT(Shape(layers=2, heads=2, width=16, context=96, vocab=world.encoding.n_vocab,
                      end=world.end))
    torch.nn.init.normal_(model.head.weight)
    return model
