"""Guards the shape of the repository: its files, their imports, their lines, their places."""
import ast
import subprocess
import sys
from pathlib import Path

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
