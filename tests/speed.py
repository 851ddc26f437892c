"""Training and decoding against the plain way, on this CPU: python tests/speed.py [--threads=1]

Medians of runs that take turns in one process. The plain way to train is float32, SDPA, AdamW that
is not fused, and logits at every position; the plain way to decode is a cached loop that draws by
Gumbel-max. A quarter of the positions are targets, as in a dialogue. It is no test: nothing here
passes or fails.
"""
import argparse
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Batch  # noqa: E402
from model import GPT, Decoder, Shape, generate  # noqa: E402
from train import CPU, Stage, lm_loss, make_optimizers, set_up_process, update  # noqa: E402

SHAPES = {  # name: (layers, heads, width), rows, positions
    "nano": ((2, 4, 64), 24, 40), "(a)": ((4, 4, 128), 32, 64), "(b)": ((6, 6, 384), 8, 256)}
OURS = {"float32": "sdpa", "bfloat16": "reference"}  # precision: attention, as train.prepare has it
STAGE = Stage(lr=1e-3)


def make(size, attention="sdpa"):
    torch.manual_seed(0)
    return GPT(Shape(*size, context=512, vocab=1024, end=0), attention)


def plain_training(size, batch):
    model = make(size)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    targets = batch.tokens[:, 1:].masked_fill(~batch.mask[:, 1:], -100)

    def step():
        logits = model.logits(model(batch.tokens[:, :-1]))
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def our_training(size, batch, precision):
    model = make(size, OURS[precision])
    machine = replace(CPU, precision=precision)
    optimizers = make_optimizers(model, STAGE)
    return partial(update, model, optimizers, lm_loss, STAGE, machine, batch.tokens, batch.mask)


@torch.no_grad()
def plain_decoding(model, prompts, max_new):
    tokens = torch.zeros(len(prompts), len(prompts[0]) + max_new, dtype=torch.int64)
    tokens[:, :len(prompts[0])] = torch.tensor(prompts)
    decoder = Decoder(model, tokens, torch.tensor([*map(len, prompts)]), 1.0, None)
    for _ in range(max_new - 1):
        hidden = model(decoder.last[:, None], decoder)[:, 0]
        decoder.lengths += 1
        logits = model.logits(hidden)
        noise = torch.empty_like(logits).exponential_()
        token = (logits.softmax(-1) / noise).argmax(-1) * decoder.alive
        decoder.tokens[decoder.rows, decoder.lengths] = token
        decoder.alive *= token != model.shape.end
        decoder.last.copy_(token)
    return decoder.tokens


def our_decoding(model, prompts, max_new, precision):
    model.attention = OURS[precision]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        generate(model, prompts, max_new)


def take_turns(runs: dict, turns: int) -> dict:
    """Median seconds of each."""
    seconds = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - begun)
    return {name: median(spent) for name, spent in seconds.items()}


def ceiling(dtype) -> float:
    """GFLOP/s of matrix products of 1024 x 1024."""
    a, b = torch.randn(2, 1024, 1024).to(dtype)
    return 2 * 1024 ** 3 / take_turns({"": lambda: a @ b}, 9)[""] / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=0)
    set_up_process(parser.parse_args().threads)
    ceilings = {name: ceiling(getattr(torch, name)) for name in OURS}
    print(f"threads {torch.get_num_threads()}, torch {torch.__version__}, matmul GFLOP/s",
          ", ".join(f"{name} {value:.0f}" for name, value in ceilings.items()))
    for name, (size, rows, width) in SHAPES.items():
        tokens = torch.randint(1, 1024, (rows, width), generator=torch.Generator().manual_seed(0))
        batch = Batch(tokens, torch.arange(width).expand(rows, -1) >= 3 * width // 4)
        runs = {"plain": plain_training(size, batch)} | {
            precision: our_training(size, batch, precision) for precision in OURS}
        spent = take_turns(runs, 5 if name == "(b)" else 15)
        matrices = 12 * size[0] * size[2] ** 2 * rows * width
        head = size[2] * 1024 * rows * width
        for kind, seconds in spent.items():
            flops = 6 * (matrices + (head if kind == "plain" else head / 4))
            print(f"train {name:4s} {kind:9s} {rows * width / seconds:9.0f} tokens/s  "
                  f"{spent['plain'] / seconds:5.2f}x  {flops / seconds / 1e9:6.0f} GFLOP/s, "
                  f"{100 * flops / seconds / 1e9 / ceilings['bfloat16']:3.0f}% of the bfloat16 "
                  "ceiling")
        model, prompts = make(size), tokens[:1, 1:33].expand(64, -1).tolist()
        plain = make(size)
        runs = {"plain": partial(plain_decoding, plain, prompts, 48)} | {
            precision: partial(our_decoding, model, prompts, 48, precision) for precision in OURS}
        spent = take_turns(runs, 5)
        for kind, seconds in spent.items():
            print(f"decode {name:4s} {kind:9s} {64 * 48 / seconds:9.0f} tokens/s  "
                  f"{spent['plain'] / seconds:5.2f}x")


if __name__ == "__main__":
    main()
