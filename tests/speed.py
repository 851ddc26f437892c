"""How fast the core loop is on this machine: python tests/speed.py [--size=nano] [--base.batch=24]

Training and decoding are timed beside the plain way to write them, and on a GPU both captured
beside eager. Numbers are medians of runs that take turns in one process, so that other work on the
machine slows all of them alike. Nothing here passes or fails.

The plain way to train is float32, sdpa, AdamW that is not fused, and logits at every position. The
plain way to decode is a cached loop that draws by Gumbel-max. A quarter of the positions of a row
are targets, as in a dialogue. Options are those of train.py; --base.batch is the number of rows.
"""
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import from_command_line, run_program  # noqa: E402
from model import GPT, Captured, Decoder, generate, shape_of  # noqa: E402
from train import Config, Stage, lm_loss, make_optimizers, prepare, update  # noqa: E402

STAGE = Stage(lr=1e-3)
ROUNDS = 9  # runs of each job


# ---------------------------------------------------------------- what is timed

def plain_training(model, optimizer, tokens, mask):
    """One update as a first draft would write it."""
    targets = tokens[:, 1:].masked_fill(~mask[:, 1:], -100)
    logits = model.logits(model(tokens[:, :-1]))
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def plain_decoding(model, prompts, max_new):
    """`generate` with a Gumbel number for every token of the vocabulary."""
    decoder = Decoder(model, len(prompts), len(prompts[0]) + max_new, 1.0, None)
    decoder.begin(prompts)
    for _ in range(max_new - 1):
        last = decoder.tokens[decoder.rows, decoder.lengths]
        hidden = model(last[:, None], decoder)[:, 0]
        decoder.lengths += 1
        logits = model.logits(hidden)
        noise = torch.empty_like(logits).exponential_()
        token = (logits.softmax(-1) / noise).argmax(-1) * decoder.alive
        decoder.tokens[decoder.rows, decoder.lengths] = token
        decoder.alive *= token != model.shape.end


def jobs_of(machine, shape, rows) -> dict:
    """{name: (job, its tokens)}: training on rows of a full context, and decoding from prompts of
    half the context, with a quarter of it to answer."""
    T = shape.context
    tokens = torch.randint(1, shape.vocab, (rows, T), device=machine.device)
    mask = (torch.arange(T, device=machine.device) >= 3 * T // 4).repeat(rows, 1)
    prompts = tokens[:, :T // 2].tolist()
    answers = rows * (T // 4)

    model = GPT(shape).to(machine.device)
    optimizer = torch.optim.AdamW(model.parameters(), STAGE.lr, betas=(0.9, 0.99), weight_decay=0.0)
    jobs = {
        "training, plain": (partial(plain_training, model, optimizer, tokens, mask), mask.numel()),
        "decoding, plain": (partial(plain_decoding, model, prompts, T // 4), answers)}
    for name in ("eager", "captured"):
        if name == "captured" and machine.capture == "off":
            continue
        model = GPT(shape, machine.attention, name == "captured", machine.precision)
        model = model.to(machine.device)
        optimizers = make_optimizers(model, STAGE)
        step = partial(update, model, optimizers, lm_loss, STAGE)
        if name == "captured":
            step = Captured(step, optimizers)
        jobs[f"training, {name}"] = partial(step, tokens, mask), mask.numel()
        jobs[f"decoding, {name}"] = partial(generate, model, prompts, T // 4), answers
    return jobs


# ---------------------------------------------------------------- how it is timed

def take_turns(jobs: dict) -> dict:
    """{name: median seconds of a run}. The first round warms up. A run that is over in less than
    50 ms is repeated until it is not, for a clock and a launch have their own price."""
    seconds = {name: [] for name in jobs}
    repeats = dict.fromkeys(jobs, 1)
    for turn in range(ROUNDS + 1):
        for name, (job, _) in jobs.items():
            wait_for_device()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                job()
            wait_for_device()
            spent = (time.perf_counter() - start) / repeats[name]
            repeats[name] = 1 + int(0.05 / spent)
            if turn > 0:
                seconds[name].append(spent)
    return {name: median(spent) for name, spent in seconds.items()}


def wait_for_device():
    """A GPU works on after the call that started it has returned."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(argv):
    """Print how many tokens a second are trained on and drawn, and how many times the plain pace
    that is."""
    config = from_command_line(Config(), argv, main.__doc__)
    vocab = 1024
    if torch.cuda.is_available():
        vocab = 50_257
    shape = shape_of(config.size, vocab, 0)
    machine = prepare(config, shape)
    jobs = jobs_of(machine, shape, config.base.batch)
    seconds = take_turns(jobs)
    print(f"{machine} | {config.size}, {config.base.batch} rows")
    for name, (_, tokens) in jobs.items():
        plain = seconds[name.split(",")[0] + ", plain"]
        print(f"{name:20s} {1e3 * seconds[name]:10.4g} ms {tokens / seconds[name]:10.4g} tokens/s "
              f"{plain / seconds[name]:6.2f} x plain")


if __name__ == "__main__":
    run_program(main)
