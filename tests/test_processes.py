"""Guards several processes of torchrun: they come to what one comes to, and end together."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import safety
from eval import load_results
from torchrun import SMALL, STORY, TORCHRUN

TRAIN = Path(safety.__file__).with_name("train.py")


def leaves(value):
    """All numbers, words and keys of nested results, in one row."""
    if isinstance(value, dict):
        return leaves(list(value.items()))
    if not isinstance(value, (list, tuple)):
        return [value]
    return [leaf for part in value for leaf in leaves(part)]


def test_two_processes_give_the_numbers_of_one(two_processes, tmp_path, monkeypatch):
    status, printed, folder = two_processes
    assert status == 0, printed
    assert printed.count("adversarial  trained     4 updates") == 1  # the first one prints
    for name, value in SMALL.items():
        monkeypatch.setattr(safety, name, value)
    safety.main([*STORY, f"--out={tmp_path}"])
    one = load_results(str(tmp_path / "story"))
    two = load_results(str(folder / "story"))
    assert two["machine"]["processes"] == 2
    of_one = leaves(one["models"])
    assert len(of_one) > 700  # nothing equals nothing
    for leaf, expected in zip(leaves(two["models"]), of_one, strict=True):
        if isinstance(expected, float):
            expected = pytest.approx(expected, abs=1e-5)  # sums in another order
        assert leaf == expected


@pytest.mark.skipif(os.name == "nt", reason="Windows ends processes in another way")
def test_a_process_that_dies_ends_the_others_with_a_sentence(tmp_path):
    process = subprocess.Popen(
        [sys.executable, *TORCHRUN, TRAIN, "--threads=1", "--device=cpu", "--base.steps=100000",
         "--base.rows=200", "--eval.n=5", f"--out={tmp_path}", "--name=run"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True)
    log = tmp_path / "run" / "log.jsonl"
    try:
        while not log.exists():  # the first updates have been done
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.2)
        listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
        _, second = map(int, listed.stdout.split())
        os.kill(second, signal.SIGKILL)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.terminate()  # it ends what is left
        process.wait(timeout=60)
    assert process.returncode != 0 and "another process of this run has ended" in printed
