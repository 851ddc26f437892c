"""The core loop: what it learns from, and that nothing about how it is run changes the result."""
import json
import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

import train
from data import Batches, Example, UserError, collate
from model import shape_of
from train import (Config, Stage, fit, lm_loss, make_optimizers, prepare, set_learning_rate,
                   update)

STAGE = Stage(steps=12, batch=8, lr=2.5e-3, warmup=3)


def rows(tokenizer):
    """Rows of different lengths."""
    return [tokenizer.row(Example(f"word {n}", f"answer {n % 7}." + " and" * (n % 3), "", ""))
            for n in range(40)]


def weights(model):
    return torch.cat([value.detach().flatten() for value in model.parameters()])


def trained(small, tokenizer, stage=STAGE, **options):
    """Weights and outcome of a copy of `small` after `fit`."""
    model = deepcopy(small)
    outcome = fit(model, Batches(rows(tokenizer), stage.batch, 0), lm_loss, stage, **options)
    return weights(model), outcome


def test_the_loss_is_that_of_the_answers_and_says_how_many_tokens_they_have(small, tokenizer):
    batch = collate(rows(tokenizer)[:4])
    targets = batch.tokens[:, 1:].masked_fill(~batch.mask[:, 1:], -100)  # what PyTorch leaves out
    logits = small.logits(small(batch.tokens[:, :-1]))
    total, count = lm_loss(small, batch)
    torch.testing.assert_close(total, cross_entropy(logits.mT, targets, reduction="sum"))
    assert count == sum(len(answer) for _, answer in rows(tokenizer)[:4])


@pytest.mark.parametrize("accumulate", [1, 3])  # of 8 rows, the last of three parts is shorter
@pytest.mark.parametrize("clip", [1e6, 0.01])
def test_an_update_is_a_step_along_the_mean_gradient_within_the_clip(small, tokenizer, monkeypatch,
                                                                     clip, accumulate):
    """With SGD the weights move by -lr g min(1, clip / |g|)."""
    monkeypatch.setattr(train, "CLIP_NORM", clip)
    batch = collate(rows(tokenizer)[:8])
    optimizer = torch.optim.SGD(small.parameters(), 0.5)
    for _ in range(2):  # a gradient that is left over counts in the second
        before = weights(small)
        total, count = lm_loss(small, batch)
        gradients = torch.autograd.grad(total / count, list(small.parameters()),
                                        materialize_grads=True)
        gradient = torch.cat([part.flatten() for part in gradients])
        update(small, [optimizer], lm_loss, Stage(accumulate=accumulate), batch.tokens, batch.mask)
        moved = weights(small) - before
        expected = -0.5 * gradient * min(1.0, clip / gradient.norm().item())
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("optimizer, precision", [
    ("adamw", "float32"), ("muon", "float32"), ("adamw", "bfloat16")])
def test_fit_learns_and_logs_every_update_with_its_rate(small, tokenizer, tmp_path, optimizer,
                                                        precision):
    stage = replace(STAGE, steps=60, optimizer=optimizer)
    small.precision = precision
    _, outcome = trained(small, tokenizer, stage, log=tmp_path / "log.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(60))
    assert outcome.loss < 2 < lines[0]["loss"]
    expected = []
    for step in range(60):  # a warm-up and a cosine down to 2%; width 16 takes 64/16 of the rate
        cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * step / 60)) / 2
        expected.append(0.01 * min(1, (step + 1) / 4) * cosine)
    assert [line["lr"] for line in lines] == pytest.approx(expected)


def test_the_rate_of_muon_is_ten_times_that_of_adamw(small):
    stage = replace(STAGE, optimizer="muon")
    optimizers = make_optimizers(small, stage)
    rate = set_learning_rate(optimizers, stage, 5, 64)
    rates = [float(optimizer.param_groups[0]["lr"]) for optimizer in optimizers]
    assert rates == pytest.approx([10 * rate, rate])


def test_weights_without_a_gradient_stay_as_they_are(small, tokenizer):
    before = small.positions.weight[60:].clone()
    fit(small, Batches(rows(tokenizer), 8, 0), lm_loss, STAGE)
    assert torch.equal(small.positions.weight[60:], before)  # no decay


def test_a_base_does_not_depend_on_random_numbers_drawn_before(tmp_path):
    bases = []
    for folder in ("a", "b"):
        config = Config(out=str(tmp_path / folder), base=Stage(steps=0, rows=50))
        torch.rand(7)
        bases.append(weights(train.base_of(train.start(config)).model))
    assert torch.equal(*bases)


def test_a_killed_run_ends_bit_identical_to_an_unbroken_one(small, tokenizer, tmp_path,
                                                            monkeypatch):
    monkeypatch.setattr(train, "WINDOW", 4)
    calls = []

    def measure_point(model):
        calls.append(model)
        if len(calls) == 2:  # at update 9
            raise KeyboardInterrupt
        return {"norm": weights(model).norm().item()}
    options = {"progress": tmp_path / "a.progress", "save_every": 0}
    with pytest.raises(KeyboardInterrupt):
        trained(small, tokenizer, at=(2, 9), measure_point=measure_point, **options)
    broken, resumed = trained(small, tokenizer, at=(2, 9), measure_point=measure_point, **options)
    whole, unbroken = trained(small, tokenizer, at=(2, 9), measure_point=measure_point)
    assert torch.equal(broken, whole) and resumed == unbroken
    assert [point["step"] for point in unbroken.curve] == [2, 9]


def test_a_point_of_the_curve_equals_a_run_of_that_length(small, tokenizer):
    stage = replace(STAGE, schedule="constant")
    _, outcome = trained(small, tokenizer, stage, at=(5,),
                         measure_point=lambda model: {"weights": weights(model).clone()})
    short, _ = trained(small, tokenizer, replace(stage, steps=5))
    assert torch.equal(outcome.curve[0]["weights"], short)


def test_nan_stops_the_run_and_says_what_to_do(small, tokenizer):
    def broken(model, batch):
        total, count = lm_loss(model, batch)
        return total * math.nan, count
    with pytest.raises(UserError, match="lower its lr"):
        fit(small, Batches(rows(tokenizer), 8, 0), broken, STAGE)


def test_a_cpu_computes_in_float32_unless_it_is_told_otherwise():
    for precision, expected in (("auto", ("float32", "sdpa")),
                                ("bfloat16", ("bfloat16", "reference"))):
        machine = prepare(Config(device="cpu", precision=precision), shape_of("nano", 100, 0))
        assert (machine.precision, machine.attention) == expected


def test_the_code_of_a_stage_is_known_without_its_comments(tmp_path):
    digests = []
    for text in ("x = 1\n", "x = 1  # one\n", "x = 2\n"):
        path = tmp_path / f"{len(digests)}.py"
        path.write_text(text)
        digests.append(train.source_digest(str(path)))
    assert digests[0] == digests[1] != digests[2]


def test_what_cannot_run_here_is_refused_with_the_reason(small, monkeypatch):
    monkeypatch.setattr("model.INTERPRET", False)
    with pytest.raises(UserError, match="attention cannot be fused here.*choose sdpa"):
        prepare(Config(device="cpu", attention="fused"), small.shape)
    small.fixed_shapes = True
    with pytest.raises(UserError, match="add --capture=off"):
        make_optimizers(small, replace(STAGE, optimizer="muon"))
