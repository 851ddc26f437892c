"""How fast the core loop is on this machine: python tests/speed.py [--size=nano] [--rows=24]

Each part is timed beside what it competes with: attention by our kernels beside PyTorch's own, a
training step and decoding beside the plain way to write them, and on a GPU both captured beside
eager. Numbers are medians of runs that take turns in one process, so that other work on the machine
slows all of them alike. A large product of matrices is the ceiling that the rest is held against.
It is no test: nothing here passes or fails.

The plain way to train is float32, sdpa, AdamW that is not fused, and logits at every position. The
plain way to decode is a cached loop that draws by Gumbel-max. A quarter of the positions of a row
are targets, as in a dialogue.
"""
import argparse
import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Batch  # noqa: E402
from model import (ATTENTIONS, GPT, SIZES, Captured, Decoder, choose_attention,  # noqa: E402
                   generate, shape_of)
from train import Stage, lm_loss, make_optimizers, set_up_process, update  # noqa: E402

STAGE = Stage(lr=1e-3)
ROUNDS = 9  # runs of each job


def vocabulary(device) -> int:
    """Tokens: GPT-2's on a GPU, those of the learned tokenizer on a CPU."""
    if device == "cuda":
        return 50257
    return 1024


def make_model(size, device, attention, precision="float32"):
    """A model with random weights, the same ones each time."""
    torch.manual_seed(0)
    shape = shape_of(size, vocabulary(device), 0)
    return GPT(shape, attention, precision=precision).to(device)


# ---------------------------------------------------------------- what is timed

def attention_pass(attend, q, k, v):
    """Forward."""
    with torch.no_grad():
        attend(q, k, v)


def attention_gradient(out, grad, inputs):
    """Backward alone: the graph of a forward pass is kept and walked again."""
    torch.autograd.grad(out, inputs, grad, retain_graph=True)


def plain_training(model, optimizer, batch):
    """One update as a first draft would write it."""
    targets = batch.tokens[:, 1:].masked_fill(~batch.mask[:, 1:], -100)
    logits = model.logits(model(batch.tokens[:, :-1]))
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
        hidden = model(decoder.last[:, None], decoder)[:, 0]
        decoder.lengths += 1
        logits = model.logits(hidden)
        noise = torch.empty_like(logits).exponential_()
        token = (logits.softmax(-1) / noise).argmax(-1) * decoder.alive
        decoder.tokens[decoder.rows, decoder.lengths] = token
        decoder.alive *= token != model.shape.end
        decoder.last.copy_(token)


# ---------------------------------------------------------------- how it is timed

def take_turns(jobs: dict, device) -> dict:
    """{name: median seconds of a run}. The first round warms up. A run that is over in less than
    50 ms is repeated until it is not, for a clock and a launch have their own price."""
    seconds = {name: [] for name in jobs}
    repeats = dict.fromkeys(jobs, 1)
    for turn in range(ROUNDS + 1):
        for name, job in jobs.items():
            wait_for(device)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                job()
            wait_for(device)
            spent = (time.perf_counter() - start) / repeats[name]
            repeats[name] = 1 + int(0.05 / spent)
            if turn > 0:
                seconds[name].append(spent)
    return {name: median(spent) for name, spent in seconds.items()}


def wait_for(device):
    """A GPU works on after the call that started it has returned."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(device) -> float:
    """The most GB in use so far: those of tensors on a GPU, else those of this process; not a
    number on Windows, which does not count them so."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "win32":
        return math.nan
    import resource  # Unix alone has it
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return used / 1e9  # macOS counts bytes, Linux KiB
    return used * 1024 / 1e9


def bench(size, rows, device, precision) -> dict:
    """{what: {unit: measured}} at the shapes of a size, with `rows` rows of a full context. The
    precision is that of training and decoding."""
    layers, heads, width, T = SIZES[size]
    vocab = vocabulary(device)
    jobs = {}
    work = {}  # name: (amount of a run, unit a second)

    # The ceiling: on a GPU matrices are multiplied in bfloat16, and only large ones fill it.
    side = 1024
    dtype = torch.float32
    if device == "cuda":
        side = 8192
        dtype = torch.bfloat16
    a = torch.randn(side, side, device=device, dtype=dtype)
    jobs["matrix product"] = partial(torch.matmul, a, a)
    work["matrix product"] = 2e-12 * side ** 3, "TFLOP/s"

    # Attention. Two products of T x T matrices forward, of which causality leaves half, and five
    # backward.
    chosen = choose_attention("auto", device, width // heads)
    flop = 2e-12 * rows * T * T * width
    for name in dict.fromkeys((chosen, "sdpa")):
        attend, _ = ATTENTIONS[name]
        qkv = torch.randn(3, rows, T, heads, width // heads, device=device, dtype=dtype)
        inputs = qkv.transpose(2, 3).requires_grad_().unbind()
        out = attend(*inputs)
        jobs[f"{name} attention, forward"] = partial(attention_pass, attend, *inputs)
        work[f"{name} attention, forward"] = flop, "TFLOP/s"
        jobs[f"{name} attention, backward"] = partial(attention_gradient, out,
                                                      torch.ones_like(out), inputs)
        work[f"{name} attention, backward"] = 2.5 * flop, "TFLOP/s"

    # Training: the plain way, ours, and ours replayed.
    tokens = torch.randint(1, vocab, (rows, T), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(T) >= 3 * T // 4).expand(rows, T)
    batch = Batch(tokens, mask.contiguous()).to(device)
    model = make_model(size, device, "sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), STAGE.lr, betas=(0.9, 0.99), weight_decay=0.0)
    jobs["training, plain"] = partial(plain_training, model, optimizer, batch)
    work["training, plain"] = rows * T, "tokens/s"
    attention = chosen
    if device == "cpu" and precision == "bfloat16":
        attention = "reference"  # as `train.prepare` chooses
    model = make_model(size, device, attention, precision)
    optimizers = make_optimizers(model, STAGE)
    step = partial(update, model, optimizers, lm_loss, STAGE)
    jobs["training, ours"] = partial(step, batch.tokens, batch.mask)
    work["training, ours"] = rows * T, "tokens/s"
    if device == "cuda":
        model.fixed_shapes = True  # eager and captured do the same work
        captured = Captured(step, optimizers)
        jobs["training, captured"] = partial(captured, batch.tokens, batch.mask)
        work["training, captured"] = rows * T, "tokens/s"

    # Decoding: prompts of half the context, a quarter of it to answer.
    prompts = tokens[:, :T // 2].tolist()
    model = make_model(size, device, "sdpa")
    jobs["decoding, plain"] = partial(plain_decoding, model, prompts, T // 4)
    work["decoding, plain"] = rows * (T // 4), "tokens/s"
    model = make_model(size, device, attention, precision)
    jobs["decoding, ours"] = partial(generate, model, prompts, T // 4)
    work["decoding, ours"] = rows * (T // 4), "tokens/s"
    if device == "cuda":
        model = make_model(size, device, attention, precision)
        model.fixed_shapes = True
        jobs["decoding, captured"] = partial(generate, model, prompts, T // 4)
        work["decoding, captured"] = rows * (T // 4), "tokens/s"

    seconds = take_turns(jobs, device)
    return compare(seconds, work) | {"peak memory": {"GB": peak_memory(device)}}


def compare(seconds: dict, work: dict) -> dict:
    """{what: {unit: measured}}: time, pace, and the pace beside that of the ceiling or of the plain
    way."""
    measured = {}
    for name, (amount, unit) in work.items():
        row = {"ms": 1e3 * seconds[name], unit: amount / seconds[name]}
        plain = name.split(",")[0] + ", plain"
        if plain in seconds:
            row["x plain"] = seconds[plain] / seconds[name]
        elif name != "matrix product":
            ceiling = measured["matrix product"]["TFLOP/s"]
            row["of the matrix product"] = row[unit] / ceiling
        measured[name] = row
    return measured


def main():
    """Measure, print a table, and the same as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, help="[gpt2 on a GPU, else nano]")
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch [16]")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 takes all [0]")
    parser.add_argument("--precision", choices=("float32", "bfloat16"),
                        help="[bfloat16 on a GPU, else float32; few CPUs gain by bfloat16]")
    options = parser.parse_args()
    set_up_process(options.threads)

    if torch.cuda.is_available():
        device = "cuda"
        machine = torch.cuda.get_device_name()
        size = options.size or "gpt2"
        precision = options.precision or "bfloat16"
    else:
        device = "cpu"
        machine = f"cpu, {torch.get_num_threads()} threads"
        size = options.size or "nano"
        precision = options.precision or "float32"
    measured = bench(size, options.rows, device, precision)

    print(f"{machine} | torch {torch.__version__} | {size}, {options.rows} rows, {precision}")
    for name, row in measured.items():
        print(f"{name:28s}", *(f"{value:10.4g} {unit}" for unit, value in row.items()))
    if device == "cpu":
        print("fused attention, captured steps: not available here, without a GPU")
    print(json.dumps({"machine": machine, "torch": torch.__version__, "size": size,
                      "rows": options.rows, "precision": precision,
                      "measured": measured}))


if __name__ == "__main__":
    main()
