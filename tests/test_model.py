"""The mathematics of the GPT, against second implementations."""
import math

import numpy as np
import pytest
import torch

from model import GPT, Shape, generate, load_model, sample, save_model, shape_of, token_logprobs

PROMPTS = [[5, 9, 11], [7], [3, 2, 8, 6, 1, 4], [9, 9]]


def numpy_logits(model, tokens):
    """GPT-2 for one row in float64 numpy, written from the paper and not from model.py."""
    weights = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
    T, heads = len(tokens), model.shape.heads
    x = weights["tokens.weight"][tokens] + weights["positions.weight"][:T]
    for layer in range(model.shape.layers):
        block = f"blocks.{layer}"
        q, k, v = np.split(linear(norm(x, f"{block}.norm_1"), f"{block}.qkv"), 3, axis=-1)
        out = np.zeros_like(x)
        for head in range(heads):
            part = slice(head * 16 // heads, (head + 1) * 16 // heads)
            for t in range(T):
                scores = k[:t + 1, part] @ q[t, part] / math.sqrt(16 // heads)
                share = np.exp(scores - scores.max())
                out[t, part] = (share / share.sum()) @ v[:t + 1, part]
        x = x + linear(out, f"{block}.mix")
        h = linear(norm(x, f"{block}.norm_2"), f"{block}.up")
        h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3)))
        x = x + linear(h, f"{block}.down")
    return norm(x, "norm") @ weights["tokens.weight"][:model.shape.vocab].T


def test_logits_equal_a_float64_numpy_gpt(small):
    tokens = [3, 14, 15, 92, 65, 35]
    ours = small.logits(small(torch.tensor([tokens])))[0]
    assert ours.shape == (6, small.shape.vocab)
    np.testing.assert_allclose(ours.detach().numpy(), numpy_logits(small, tokens), atol=2e-4)


def test_greedy_cached_generation_equals_uncached_token_for_token(small):
    tokens, mask, _ = generate(small, PROMPTS, max_new=12, temperature=0)
    for prompt, row, answer in zip(PROMPTS, tokens, mask):
        grown = list(prompt)
        for _ in range(12):
            grown.append(int(numpy_logits(small, grown)[-1].argmax()))
            if grown[-1] == small.shape.end:
                break
        assert row[:len(grown)].tolist() == grown
        assert row[answer].tolist() == grown[len(prompt):]
        assert not row[len(grown):].any()


def test_an_ended_row_emits_padding(small):
    with torch.no_grad():  # the last norm gives its bias alone, which points at end-of-text
        small.norm.weight.zero_()
        small.norm.bias.copy_(500 * small.tokens.weight[small.shape.end])
    tokens, mask, logprobs = generate(small, PROMPTS, max_new=5)
    for prompt, row, answer, logprob in zip(PROMPTS, tokens, mask, logprobs):
        assert row.tolist() == prompt + [small.shape.end] + [0] * (len(row) - len(prompt) - 1)
        assert answer.sum() == 1 and answer[len(prompt)]
        assert not logprob[~answer].any()
    small.fixed_shapes = True  # does all steps, where else nothing is done after the last end
    for ours, stopped in zip(generate(small, PROMPTS, max_new=5), (tokens, mask, logprobs)):
        assert torch.equal(ours, stopped)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_equal_those_of_a_full_forward(small, temperature):
    tokens, mask, logprobs = generate(small, PROMPTS, max_new=10, temperature=temperature)
    with torch.no_grad():
        scored = token_logprobs(small, tokens, mask, temperature)
    torch.testing.assert_close(logprobs, scored, atol=1e-5, rtol=0)


def test_a_prompt_that_is_asked_several_times_is_read_once(small, monkeypatch):
    first, second = PROMPTS[:2]
    read = []
    real = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda model, tokens, decoder=None: (
        read.append(len(tokens)), real(model, tokens, decoder))[-1])
    often = [first, second, first, first, second]
    tokens, mask, logprobs = generate(small, often, 8, 1.0, torch.Generator().manual_seed(0))
    assert read[0] == 2 and set(read[1:]) == {5}
    answers = [row[is_answer].tolist() for row, is_answer in zip(tokens, mask)]
    assert len(set(map(tuple, answers))) > 2  # each has random numbers of its own
    with torch.no_grad():
        scored = token_logprobs(small, tokens, mask)
    torch.testing.assert_close(logprobs, scored, atol=1e-5, rtol=0)


def test_what_lies_in_the_padding_changes_no_answer(small):
    rows = torch.randint(1, 50, (2, 20))
    mask = torch.zeros_like(rows).bool()
    mask[:, 5:9] = True
    noisy = rows.clone()
    noisy[:, 9:] = torch.randint(50, 99, (2, 11))
    clean = token_logprobs(small, rows, mask)
    torch.testing.assert_close(token_logprobs(small, noisy, mask), clean)


def test_token_logprobs_equal_a_loop_over_positions(small):
    tokens = torch.tensor([[4, 8, 15, 16, 23, 42]])
    mask = torch.tensor([[True, False, True, True, False, True]])
    ours = token_logprobs(small, tokens, mask)[0]
    logits = torch.tensor(numpy_logits(small, tokens[0].tolist()))
    for t in range(6):
        expected = logits[t - 1].log_softmax(-1)[tokens[0, t]] if mask[0, t] and t else 0.0
        assert ours[t].item() == pytest.approx(float(expected), abs=1e-4)


def test_samples_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(40_000, 4)
    uniform = torch.rand(40_000, 1, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = sample(logits, 0.5, uniform)
    expected = (logits[0] / 0.5).softmax(-1)
    counts = torch.bincount(tokens, minlength=4) / 40_000
    torch.testing.assert_close(counts, expected, atol=0.01, rtol=0)
    torch.testing.assert_close(logprobs, expected.log()[tokens])


def test_the_largest_random_number_points_at_a_token():
    tokens, _ = sample(torch.zeros(2, 4), 1.0, torch.ones(2, 1))  # as if rounded up
    assert tokens.tolist() == [3, 3]


@pytest.mark.parametrize("width, std", [(64, 0.1), (256, 0.05)])
def test_weights_are_as_wide_as_the_model_is_narrow(width, std):
    model = GPT(Shape(layers=1, heads=1, width=width, context=64, vocab=640, end=0))
    for weight in (model.tokens.weight, model.positions.weight, model.blocks[0].qkv.weight):
        assert weight.std().item() == pytest.approx(std, rel=0.05)


def test_the_scalar_head_starts_at_zero(world):
    model = GPT(shape_of("nano", world.encoding.n_vocab, world.end))
    assert not model.scalar(model(torch.tensor([[1, 2, 3]]))).any()


def test_sizes_have_the_parameters_of_gpt2():
    with torch.device("meta"):
        model = GPT(shape_of("gpt2", 50257, 0))
    padding = model.tokens.weight[50257:].numel()
    own = padding + sum(weight.numel() for weight in model.head.parameters())
    assert sum(weight.numel() for weight in model.parameters()) - own == 124_439_808


def test_a_prompt_beyond_the_context_is_refused_with_the_fix(small):
    with pytest.raises(ValueError, match="larger size"):
        generate(small, [[1] * 90], max_new=10)
    with pytest.raises(ValueError, match="multiple of heads"):
        Shape(layers=1, heads=3, width=16, context=8, vocab=9, end=1)


def test_answers_to_nothing_are_refused(small):
    for prompts, max_new in (([], 5), ([[1], []], 5), ([[1]], 0)):
        with pytest.raises(ValueError, match="leave empty|at least one new token"):
            generate(small, prompts, max_new)


def test_a_checkpoint_loads_to_the_same_model(small, tmp_path):
    save_model(tmp_path / "a.pt", small, {"stage": "x"})
    loaded, about = load_model(tmp_path / "a.pt")
    tokens = torch.tensor([[1, 2, 3]])
    assert about == {"stage": "x"} and torch.equal(loaded(tokens), small(tokens))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
