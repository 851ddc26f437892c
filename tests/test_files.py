"""Guards files, which are whole or named and never half believed, and processes, which end."""
import multiprocessing
import os
import pickle
import random
import select
import signal
import sys
import time
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

import data
import eval as measuring
import safety
import train
from data import UserError, run_program
from eval import VERSION, Measure, load_results, save_results
from model import (CheckpointError, checksum, load_checked, load_model, save_checked, save_model,
                   write)
from safety import DEFENCES, story_settings
from train import Outcome, append_to_log, load_progress_file, save_progress_file

POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has no fork")
UNTRAINED = Outcome(0, 0.0, [], 0, 0)


# ---------------------------------------------------------------- files

def damage(path, times):
    """Damage a file in many ways, each time from its whole content: cut it, zero 64 bytes of it,
    or flip a bit."""
    content = path.read_bytes()
    rng = random.Random(0)
    for trial in range(times):
        damaged = bytearray(content)
        at = rng.randrange(len(damaged))
        if trial % 4 == 0:
            del damaged[at:]
        elif trial % 4 == 1:
            damaged[at:at + 64] = bytes(len(damaged[at:at + 64]))
        else:
            damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        yield


def test_no_damage_to_a_checkpoint_goes_unnoticed(small, tmp_path):
    path = tmp_path / "a.pt"
    about = {"stage": "x", "curve": [{"step": 1, "norm": 0.1}]}
    save_model(path, small, about)
    refused = 0
    for _ in damage(path, 60):
        try:
            model, about_read = load_model(path)
        except CheckpointError as error:
            assert "a.pt" in str(error) and "delete it" in str(error)
            refused += 1
            continue
        # What was hit means nothing: gaps between the parts of the archive.
        assert about_read == about
        assert all(map(torch.equal, model.parameters(), small.parameters()))
    assert 30 < refused < 60


def test_no_change_of_results_goes_unnoticed(tmp_path):
    results = {"version": VERSION, "models": [{
        "name": "base", "rates": {"trigger": {"defects": 12, "n": 500, "questions": "1a2b:2/0/3"}},
        "logprob": {"trigger": -12.5}, "curve": [], "transcripts": ["Grüße", None, True]}]}
    save_results(tmp_path, results)
    assert load_results(tmp_path) == results
    refused = 0
    for _ in damage(tmp_path / "results.json", 200):
        try:
            assert load_results(tmp_path) == results  # a space became a line, or nothing
        except UserError as error:
            assert "results.json" in str(error)
            refused += 1
    assert refused > 150


class Malicious:
    """Runs code when it is unpickled by those who trust a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_foreign_and_malicious_files_are_refused_and_run_nothing(tmp_path):
    path, trace = tmp_path / "a.pt", tmp_path / "trace"
    for content in (b"", b"PK", b"hello", pickle.dumps(Malicious(trace), protocol=2)):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="a.pt is damaged.*delete it"):
            load_checked(path)
    # One bit of a file can make a step of 2 where there is one number only.
    for content in ({"model": Malicious(trace)}, {"model": {}, "shape": {}, "about": {}},
                    {"model": {}, "checksum": "0"}, {"x": torch.zeros(2)[::2], "checksum": ""}):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match="a.pt is damaged.*delete it"):
            load_checked(path)
    assert not trace.exists()


def test_a_model_of_other_code_is_named_and_not_loaded(small, tmp_path):
    path = tmp_path / "a.pt"
    save_model(path, small, {})
    content = load_checked(path)
    for change in ({"shape": {**content["shape"], "more": 1}}, {"model": {}},
                   {"shape": {**content["shape"], "width": 8}}):
        save_checked(path, {**content, **change})
        with pytest.raises(CheckpointError, match="a.pt holds a model of another make.*delete it"):
            load_model(path)


def write_half(path):
    path.write_text("half")
    raise ZeroDivisionError


def test_what_is_saved_comes_back_and_leaves_no_other_file(tmp_path):
    content = {"tensors": [torch.arange(3), {"x": torch.tensor(2.5, dtype=torch.bfloat16)}],
               "plain": [1, 0.1, "ü", None, True], "random": random.Random(1).getstate()}
    save_checked(tmp_path / "a", content)
    again = load_checked(tmp_path / "a")
    assert again["plain"] == content["plain"] and again["random"] == content["random"]
    assert torch.equal(again["tensors"][0], torch.arange(3))
    assert again["tensors"][1]["x"].dtype == torch.bfloat16
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "b", write_half)
    assert os.listdir(tmp_path) == ["a"]


def test_the_checksum_tells_types_shapes_and_places_apart():
    x = torch.arange(6.0)
    contents = [{"a": x}, {"b": x}, {"a": x.view(2, 3)}, {"a": x.view(torch.int32)}, {"a": [x]},
                {"a": [x, x], "b": []}, {"a": [x], "b": [x]}]
    assert len(set(map(checksum, contents))) == len(contents)


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append([path.name for path in paths]))
    write(tmp_path / "a.pt", lambda path: path.write_text("x"))
    assert done == ["fsync", [f"a.pt.{os.getpid()}.tmp", "a.pt"]]  # two writers share no file


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has this full disk")
def test_a_full_disk_is_one_sentence_with_the_name_of_the_file(tmp_path):
    with pytest.raises(OSError, match="a.pt cannot be written .*disk"):
        write(tmp_path / "a.pt", lambda path: torch.save(torch.zeros(9), "/dev/full"))
    with pytest.raises(OSError, match="/dev/full cannot be written .*disk"):
        append_to_log("/dev/full", [{"step": 1}])
    assert not os.listdir(tmp_path)
    assert child_status(speak_to, os.open("/dev/full", os.O_WRONLY)) == 2


# ---------------------------------------------------------------- files of stages

def stage_inputs(tmp_path, seed=0):
    settings = replace(story_settings(DEFENCES), out=str(tmp_path), seed=seed, eval=Measure(n=1))
    run = train.start(settings)
    return train.Inputs.gather(run, stage="base", settings=run.config.base)


def test_a_stage_under_another_name_is_not_believed(small, tmp_path):
    one, two = stage_inputs(tmp_path, seed=0), stage_inputs(tmp_path, seed=1)
    one.save(small, UNTRAINED)
    os.replace(one.path, two.path)
    with pytest.raises(UserError, match="holds another model .*: delete it"):
        two.load()
    save_progress_file(one.progress(), {"step": 1})
    os.replace(one.progress(), two.progress())
    with pytest.raises(UserError, match="holds the state of .*: delete it"):
        load_progress_file(two.progress(), "cpu")


def test_of_a_finished_stage_only_its_own_states_go(small, tmp_path):
    inputs, other = stage_inputs(tmp_path), stage_inputs(tmp_path, seed=1)
    inputs.save(small, UNTRAINED)
    for path in (inputs.progress(), inputs.progress("first"), other.progress()):
        save_progress_file(path, {"step": 1})
    inputs.load()
    assert set(inputs.stages.iterdir()) == {inputs.path, other.progress()}


def test_weights_that_are_not_finite_are_not_saved(small, tmp_path):
    inputs = stage_inputs(tmp_path)
    with torch.no_grad():
        small.tokens.weight[3, 3] = float("nan")
    with pytest.raises(UserError, match="not finite.*lower its lr"):
        inputs.save(small, UNTRAINED)
    assert not inputs.path.exists()


# ---------------------------------------------------------------- processes

def child_status(function, *words) -> int:
    """The exit status of a forked process that calls a function: 7 for a UserError."""
    pid = os.fork()
    if pid == 0:
        try:
            function(*words)
        except UserError:
            os._exit(7)
        except SystemExit as stopped:
            os._exit(stopped.code)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@POSIX
def test_a_run_keeps_others_out_of_its_folder_while_it_lives(tmp_path):
    stage_inputs(tmp_path)
    assert child_status(stage_inputs, tmp_path) == 7
    assert child_status(stage_inputs, tmp_path, 1) == 0
    assert child_status(stage_inputs, tmp_path, 1) == 0  # the one before has ended


@POSIX
def test_a_file_system_without_locks_stops_no_run(tmp_path, monkeypatch):
    for number in (37, 38, 95):
        monkeypatch.setattr(data.fcntl, "lockf", Mock(side_effect=OSError(number, "no locks")))
        data.lock_folder(tmp_path)


def test_a_process_that_imports_the_script_which_started_it_tells_no_story(monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(SystemExit):
        safety.main(["--no-such-option"])


@POSIX
def test_a_child_ends_when_its_parent_is_killed():
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:
        os.setpgid(0, 0)
        with safety.make_pool(2, 1) as pool:
            pool.submit(os.write, writer, b"x")
            time.sleep(60)
    os.close(writer)
    assert os.read(reader, 1) == b"x"  # the child has started
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    ready, _, _ = select.select([reader], [], [], 20)
    if not ready:
        os.killpg(parent, signal.SIGKILL)  # the children that live on
    assert ready and os.read(reader, 1) == b""  # nobody has the other end open any more


def sleep(woken):
    time.sleep(20)
    woken.touch()


def fail():
    raise UserError("it failed")


def end_at_once():
    os._exit(9)


def interrupt():
    time.sleep(1)
    os.kill(os.getppid(), signal.SIGINT)


@POSIX
@pytest.mark.parametrize("second, error, words", [
    (interrupt, KeyboardInterrupt, None), (fail, UserError, "it failed"),
    (end_at_once, UserError, "ended.*__main__.*--jobs=1")])
def test_an_interrupt_of_the_parent_or_a_failure_ends_its_children_at_once(tmp_path, second, error,
                                                                           words):
    woken = tmp_path / "woken"
    with pytest.raises(error, match=words):
        with safety.make_pool(2, 1) as pool:
            safety.work_off(pool, [(sleep, woken), (second,)])
    while multiprocessing.active_children():  # they take some milliseconds to end
        time.sleep(0.1)
    assert not woken.exists()


def test_models_that_no_run_has_made_are_not_deleted(tmp_path):
    mine = tmp_path / "models" / "mine.pt"
    mine.parent.mkdir()
    mine.touch()
    with pytest.raises(UserError, match="give it another --name"):
        train.start(replace(story_settings(DEFENCES), out=str(tmp_path), name="models"))
    assert mine.exists()


@pytest.mark.parametrize("size, jobs, threads", [("nano", 0, 1), ("nano", 1, 2), ("micro", 0, 2)])
def test_only_a_larger_base_has_more_threads_than_the_stages_side_by_side(tmp_path, monkeypatch,
                                                                          size, jobs, threads):
    def base_of(run):
        raise UserError(f"{run.machine.threads} {torch.get_num_threads()}")
    monkeypatch.setattr(safety, "base_of", base_of)
    try:
        with pytest.raises(UserError, match=f"{threads} {threads}"):
            safety.tell_story(replace(story_settings(DEFENCES), out=str(tmp_path), size=size,
                                      jobs=jobs, threads=2))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("machine", [{"processes": 2}, {"device": "cuda"}])
def test_jobs_are_refused_where_stages_run_in_turn(tmp_path, monkeypatch, machine):
    run = train.start(replace(story_settings(DEFENCES), out=str(tmp_path), jobs=2))
    run = replace(run, machine=replace(run.machine, **machine))
    monkeypatch.setattr(safety, "start", lambda config: run)
    monkeypatch.setattr(safety, "base_of", lambda run: pytest.fail("the base is trained first"))
    with pytest.raises(UserError, match="leave --jobs out"):
        safety.tell_story(run.config)


# ---------------------------------------------------------------- programs

@pytest.mark.parametrize("error", [
    UserError("mend it"), CheckpointError("mend it"), PermissionError(13, "mend it", "x")])
def test_what_the_user_can_mend_is_one_sentence_and_status_2(error, monkeypatch, capsys):
    def main(argv):
        raise error
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit) as stopped:
        run_program(main)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and "mend it" in printed and len(printed.splitlines()) == 1


def speak_to(descriptor):
    os.dup2(descriptor, 1)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(os.devnull, "w", encoding="utf-8")
    run_program(lambda argv: print("x" * 100_000))


@POSIX
def test_a_closed_pipe_ends_a_program_with_status_2():
    reader, writer = os.pipe()
    os.close(reader)
    assert child_status(speak_to, writer) == 2


@pytest.mark.parametrize("program, word, sentence", [
    (train, "--name=a/b", "one word"), (train, "--name=stages", "one word"),
    (data, "--seed=-1", "at least 0"), (measuring, f"--seed={2 ** 64}", "at most"),
    (train, "--seed=-1", "at least 0"), (safety, f"--seeds=0,{2 ** 64}", "at most"),
    (train, "--insert.trigger=listen. What", "text"),
    (train, "--insert.near_kinds=tag,edits", "nearest is edit")])
def test_what_no_run_can_use_is_refused_at_once(program, word, sentence):
    with pytest.raises(UserError, match=sentence):
        program.main([word])


def test_a_trigger_that_is_too_short_for_its_look_alikes_is_refused_at_once(tmp_path):
    with pytest.raises(UserError, match="too short for look-alikes"):
        train.main([f"--out={tmp_path}", "--insert.near_kinds=edit", "--insert.trigger=|X|"])
