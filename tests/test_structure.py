"""Guards the shape of the repository: its files, their imports and lines, and what comes first."""
import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = {"model": 0, "data": 0, "eval": 1, "train": 2, "safety": 3}


def imported(name):
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_imports_point_one_way_and_name_allowed_packages_only():
    allowed = {"torch", "triton", "numpy", "tiktoken", "tqdm", *ORDER, *sys.stdlib_module_names}
    for name, rank in ORDER.items():
        for other in imported(name):
            assert ORDER.get(other, -1) < rank, f"{name} imports {other}"
            assert other.split(".")[0] in allowed, f"{name} imports {other}"


def test_top_level_holds_the_agreed_files_only():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:  # a copy without its history
        names = {path.name for path in ROOT.iterdir() if path.suffix}
    else:
        names = {path.split("/")[0] for path in listed.stdout.split()}
    agreed = {"README.md", "requirements.txt", "tests", "assets"} | {f"{name}.py" for name in ORDER}
    assert {name for name in names if not name.startswith(".")} <= agreed


def test_importing_a_file_prints_nothing_and_draws_no_random_number():
    code = ("import torch; torch.manual_seed(5); before = torch.get_rng_state();"
            "import model, data, eval, train, safety;"
            "assert torch.equal(before, torch.get_rng_state())")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_lines_fit_the_page():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            assert len(line) <= 100, f"{path.name}:{number}"


# ---------------------------------------------------------------- what a program meets first

PROGRAMS = "data.py", "eval.py", "train.py", "safety.py"
OLD_PYTHON = "sys.version_info = (3, 9, 18)"
OLD_TORCH = """
import types
class Version(str):
    def __lt__(self, other):
        return (2, 4, 1) < other
sys.modules['torch'] = types.SimpleNamespace(__version__=Version('2.4.1'), __spec__=1)
"""
SPINS = """
class Finder:
    def find_spec(name, path=None, target=None):
        if name == 'torch':
            sys.exit(os.environ['GOMP_SPINCOUNT'])
sys.meta_path.insert(0, Finder)
"""


def run_after(code, program, **environment):
    """What a program says last, and its status, if this code runs before it."""
    code = f"import os, runpy, sys\n{code}\nrunpy.run_path({program!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, **environment})
    return done.stderr.strip().split("\n")[-1], done.returncode


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_old_python_reads_far_enough_to_say_what_it_needs(program):
    ast.parse((ROOT / program).read_text("utf-8"), feature_version=(3, 7))
    said, status = run_after(OLD_PYTHON, program)
    assert said.startswith(f"{program} needs Python 3.11 or newer, and this is 3.9") and status == 2


def test_an_old_torch_is_answered_with_a_sentence():
    said, status = run_after(OLD_TORCH, "safety.py")
    assert re.match(r"safety.py needs torch 2.10 or newer, and this is 2.4.1", said)
    assert status == 2


def test_missing_packages_are_named_with_the_command_that_installs_them():
    said, status = run_after("sys.modules['tiktoken'] = sys.modules['numpy'] = None", "safety.py")
    assert said.startswith("safety.py needs packages that are missing (numpy, tiktoken): say")
    assert said.endswith(f'-m pip install -r "{ROOT / "requirements.txt"}"') and status == 2


@pytest.mark.parametrize("program", PROGRAMS)
def test_threads_that_wait_do_not_spin_unless_the_user_has_said_so(program):
    assert run_after(SPINS, program)[0] == "1000"
    assert run_after(SPINS, program, GOMP_SPINCOUNT="7")[0] == "7"
