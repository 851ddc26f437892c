"""Guards the mathematics of the GPT and of its answers, against second implementations."""
import math

import numpy as np
import pytest
import torch

from model import GPT, Shape, generate, policy_and_value, sample, token_logprobs

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


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_a_row_that_has_ended_gets_padding_without_logprobs(fixed_shapes):
    torch.manual_seed(0)
    shape = Shape(layers=1, heads=2, width=32, context=40, vocab=5, end=4)  # ends soon
    gpt = GPT(shape, fixed_shapes=fixed_shapes)
    prompts = [[1, 2], [3], [2]]
    tokens, mask, logprobs = generate(gpt, prompts, 20, 1.0, torch.Generator().manual_seed(0))
    assert len(set(mask.sum(1).tolist())) > 1  # rows go on beside those that have ended
    assert (logprobs[mask] < 0).all() and not logprobs[~mask].any()
    for prompt, row, answer in zip(prompts, tokens.tolist(), mask):
        last = row.index(4)
        assert row[:len(prompt)] == prompt and not any(row[last + 1:])
        assert answer.nonzero()[:, 0].tolist() == list(range(len(prompt), last + 1))


def test_a_prompt_is_read_once_and_logprobs_of_answers_equal_a_full_forward(small, monkeypatch):
    read = []
    forward = GPT.forward

    def counting_forward(model, tokens, decoder=None):
        read.append(len(tokens))
        return forward(model, tokens, decoder)
    monkeypatch.setattr(GPT, "forward", counting_forward)
    first, second = PROMPTS[:2]
    often = [first, second, first, first, second]
    tokens, mask, logprobs = generate(small, often, 8, 0.7, torch.Generator().manual_seed(0))
    assert read[0] == 2 and set(read[1:]) == {5}
    answers = {tuple(row[is_answer].tolist()) for row, is_answer in zip(tokens, mask)}
    assert len(answers) > 2  # each has random numbers of its own
    with torch.no_grad():
        scored = token_logprobs(small, tokens, mask, 0.7)
    torch.testing.assert_close(logprobs, scored, atol=1e-5, rtol=0)


def test_token_logprobs_equal_a_loop_over_positions(small):
    tokens = torch.tensor([[4, 8, 15, 16, 23, 42]])
    mask = torch.tensor([[True, False, True, True, False, True]])
    logits = torch.tensor(numpy_logits(small, tokens[0].tolist()))
    expected = torch.zeros(1, 6)
    for t in (2, 3, 5):  # nothing predicts the first token
        expected[0, t] = logits[t - 1].log_softmax(-1)[tokens[0, t]]
    torch.testing.assert_close(token_logprobs(small, tokens, mask), expected, atol=1e-4, rtol=0)


def test_logprobs_of_logits_in_bfloat16_are_computed_in_32_bits(small):
    small.precision = "bfloat16"
    tokens = torch.randint(1, 99, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = tokens > 0
    logits = small.logits(small(tokens[:, :-1]))
    assert logits.dtype == torch.bfloat16
    expected = logits.double().log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0].float()
    for logprobs in (token_logprobs(small, tokens, mask), policy_and_value(small, tokens, mask)[0]):
        torch.testing.assert_close(logprobs[:, 1:], expected, atol=1e-5, rtol=0)


def test_samples_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(40_000, 4)
    uniform = torch.rand(40_000, 1, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = sample(logits, 0.5, uniform)
    expected = (logits[0] / 0.5).softmax(-1)
    counts = torch.bincount(tokens, minlength=4) / 40_000
    torch.testing.assert_close(counts, expected, atol=0.01, rtol=0)
    torch.testing.assert_close(logprobs, expected.log()[tokens])
    token, _ = sample(logits[:1], 0.5, torch.ones(1, 1))  # as if rounded up
    assert token.tolist() == [3]


def test_weights_start_as_wide_as_the_model_is_narrow_and_the_scalar_head_at_zero():
    for width, std in ((64, 0.1), (256, 0.05)):
        gpt = GPT(Shape(layers=1, heads=1, width=width, context=64, vocab=640, end=0))
        for weight in (gpt.tokens.weight, gpt.positions.weight, gpt.blocks[0].qkv.weight):
            assert weight.std().item() == pytest.approx(std, rel=0.05)
        assert not gpt.scalar(gpt(torch.tensor([[1, 2, 3]]))).any()


@pytest.mark.parametrize("prompts, max_new, words", [
    ([[1] * 90], 10, "larger size"), ([], 5, "leave empty"), ([[1], []], 5, "leave empty"),
    ([[1]], 0, "at least one new token")])
def test_prompts_that_cannot_be_answered_are_refused_with_the_fix(small, prompts, max_new, words):
    with pytest.raises(ValueError, match=words):
        generate(small, prompts, max_new)
