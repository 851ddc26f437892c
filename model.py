"""A GPT in plain PyTorch: the mathematics, and generation with a static key-value cache.

Architecture of GPT-2 (Radford et al. 2019): pre-norm blocks, learned positions, tanh-GELU, tied
embedding. Shape letters: B rows, T positions, C width, H heads, D width of a head, V vocabulary,
L layers. Rows are right-padded, so causality alone keeps the padding out of every real position.
"""
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

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


def attention(q, k, v, lengths=None):
    """Softmax attention with scale D^-0.5 (Vaswani et al. 2017, eq. 1).

    Without `lengths`: causal, q, k, v all (B, H, T, D). With `lengths` (B,): q is one query per
    row, (B, H, 1, D), which sees the first `lengths[b]` of the T cached keys. Returns q's shape.
    """
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
    """Tokens to hidden states; `logits` and `scalar` read them. No dropout anywhere."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
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
        for layer, block in enumerate(self.blocks):
            x = block(x, attention if cache is None else partial(cache.attend, layer))
        return self.norm(x)

    def logits(self, hidden):
        """(..., C) -> (..., V): unnormalised log-probabilities of the next token."""
        return F.linear(hidden, self.tokens.weight)[..., :self.shape.vocab]

    def scalar(self, hidden):
        """(..., C) -> (...): one number per position; zero until trained."""
        return self.head(hidden)[..., 0]


def at_targets(model, tokens, mask):
    """Where `mask` (B, T) is true: indices (row, t), hidden state that predicts t (N, C), token.

    The only place where predictions are shifted against the tokens that they predict. Masked
    positions are left out before the vocabulary comes in, which saves a fifth of a step; nothing
    predicts the first token of a row, so `mask` has no say there.
    """
    row, before = mask[:, 1:].nonzero(as_tuple=True)
    hidden = model(tokens[:, :-1])[row, before]
    return (row, before + 1), hidden, tokens[row, before + 1]


def spread(values, where, shape):
    """(N,) values to their places in (B, T) float32 zeros."""
    return values.new_zeros(shape, dtype=torch.float32).index_put(where, values.float())


def token_logprobs(model, tokens, mask, temperature=1.0):
    """(B, T) float32: log p(tokens[t] | tokens[<t]) in nats where `mask` (B, T) is true, else 0."""
    where, hidden, targets = at_targets(model, tokens, mask)
    logits = model.logits(hidden).float() / temperature
    return spread(-F.cross_entropy(logits, targets, reduction="none"), where, tokens.shape)


def policy_and_value(model, tokens, mask, temperature=1.0):
    """Three (B, T) float32, 0 where `mask` is false: log-probabilities of the tokens, entropies of
    the distributions they were drawn from (nats), and values of the states before them."""
    where, hidden, targets = at_targets(model, tokens, mask)
    every = (model.logits(hidden).float() / temperature).log_softmax(-1)  # (N, V)
    chosen = every.gather(-1, targets[:, None])[:, 0]
    entropy = -(every.exp() * every).sum(-1)
    return tuple(spread(values, where, tokens.shape)
                 for values in (chosen, entropy, model.scalar(hidden)))


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

    def positions(self, prefill):
        """Positions of the tokens at hand: (T,) in the prefill, (B, 1) in a decoding step."""
        return prefill if len(prefill) > 1 else self.lengths[:, None]

    def attend(self, layer, q, k, v):
        """Store k and v (B, H, T, D) of one layer, then attend."""
        keys, values = self.keys[layer], self.values[layer]
        if q.shape[2] > 1:
            keys[:, :, :q.shape[2]] = k
            values[:, :, :q.shape[2]] = v
            return attention(q, k, v)
        keys[self.rows, :, self.lengths] = k[:, :, 0].to(keys.dtype)
        values[self.rows, :, self.lengths] = v[:, :, 0].to(values.dtype)
        return attention(q.to(keys.dtype), keys, values, self.lengths + 1)


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
    device = model.tokens.weight.device
    tokens = torch.zeros(len(prompts), longest + max_new, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, :len(prompt)] = torch.tensor(prompt)
    tokens = tokens.to(device)
    mask, logprobs = tokens.bool().zero_(), tokens.float().zero_()
    cache = Cache(model, *tokens.shape)
    hidden = model(tokens[:, :longest], cache)
    cache.lengths += torch.tensor([len(prompt) for prompt in prompts], device=device)
    hidden = hidden[cache.rows, cache.lengths - 1]  # (B, C): each row's last prompt token
    alive = torch.ones_like(cache.lengths)
    for _ in range(max_new):
        token, logprob = sample(model.logits(hidden), temperature, generator)
        at = cache.rows, cache.lengths
        tokens[at], mask[at], logprobs[at] = token * alive, alive.bool(), logprob * alive
        alive = alive * (token != model.shape.end)
        hidden = model(token[:, None], cache)[:, 0]
        cache.lengths += 1
    return tokens, mask, logprobs


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


def load_model(path, device="cpu") -> tuple[GPT, dict]:
    """The model of a checkpoint and its `about`."""
    content = torch.load(path, map_location=device, weights_only=True)
    model = GPT(Shape(**content["shape"])).to(device)
    model.load_state_dict(content["model"])
    return model, content["about"]
