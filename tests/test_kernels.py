"""Guards the fused attention: against float64 in Triton's interpreter, and what it compiles to."""
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model
from model import (ATTENTIONS, TILES, attention_reference, choose_attention, decode_attention,
                   fused_attention)

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 5e-2}
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SENTINEL, MARGIN = 777.0, 4096

pytestmark = [pytest.mark.skipif(model.triton is None, reason="triton is not installed"),
              pytest.mark.gpu]


def normal(*shape, dtype=torch.float32, seed=0):
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return numbers.to(HERE, dtype)


def among_nan(x):
    """x (B, H, T, D) as a slice of a larger tensor: whatever lies beyond its rows is NaN."""
    B, H, T, D = x.shape
    slice = x.new_full((B, T + 7, H, 2 * D), math.nan)[:, :T, :, :D].transpose(1, 2)
    return slice.copy_(x)


def between(fill, x):
    """x (B, H, T, D) laid out as (B, T, H, D), or (B, H, T), between two margins of `fill`: all of
    the memory, and the part of it that holds x."""
    memory = x.new_full((x.numel() + 2 * MARGIN,), fill)
    inner = memory[MARGIN:-MARGIN]
    if x.dim() == 4:
        inner = inner.view_as(x.transpose(1, 2)).transpose(1, 2)
    return memory, inner.view_as(x).copy_(x)


def exact(q, k, v, grad):
    """Output and gradients of the reference in float64."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out = attention_reference(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.double())


def run_kernels(q, k, v, grad, tiles):
    """Output and gradients from the kernels; they find NaN and leave all as it was around them."""
    q, k, v = among_nan(q), among_nan(k), among_nan(v)
    flat = q.new_zeros(q.shape[:3], dtype=torch.float32)
    results = [between(SENTINEL, x) for x in (q, flat, flat, q, q, q)]
    out, lse, delta, dq, dk, dv = [inner for _, inner in results]
    model.launch(model.forward_kernel, tiles[0], q, k, v, out, lse)
    out_read, lse_read, grad = [between(math.nan, x)[1] for x in (out, lse, grad)]
    model.launch(model.dq_kernel, tiles[1], q, k, v, out_read, grad, lse_read, delta, dq)
    _, delta_read = between(math.nan, delta)
    model.launch(model.dkv_kernel, tiles[2], q, k, v, grad, lse_read, delta_read, dk, dv)
    for memory, _ in results:
        assert (memory[:MARGIN] == SENTINEL).all() and (memory[-MARGIN:] == SENTINEL).all()
    return out, dq, dk, dv


@pytest.mark.parametrize("dtype, D", [  # tiles of equal and of unequal sides
    (torch.float32, 16), (torch.float32, 128), (torch.bfloat16, 32), (torch.float16, 64),
    (torch.bfloat16, 128)], ids=str)
def test_kernels_equal_float64(dtype, D):
    for T in (1, 77):
        q, k, v, grad = [normal(1, 2, T, D, dtype=dtype, seed=seed) for seed in range(4)]
        results = run_kernels(q, k, v, grad, TILES[dtype.itemsize][D])
        for ours, expected in zip(results, exact(q, k, v, grad)):
            assert (ours - expected).abs().max() <= TOLERANCE[dtype], T


@pytest.mark.parametrize("D", [16, 128])
def test_decoding_equals_float64_and_reads_nothing_beyond_a_length(D):
    T, lengths = 130, torch.tensor([1, 64, 65, 130], dtype=torch.int32, device=HERE)
    q, k, v = normal(4, 3, 1, D), normal(4, 3, T, D, seed=1), normal(4, 3, T, D, seed=2)
    expected = attention_reference(q.double(), k.double(), v.double(), lengths)
    for cache in (k, v):
        for row, length in enumerate(lengths):
            cache[row, :, length:] = math.nan
    apart = q.repeat_interleave(2, -1)[..., ::2]  # the last stride is not 1
    for query, kind in ((among_nan(q), torch.int32), (apart, torch.int64)):
        ours = decode_attention(query, among_nan(k), among_nan(v), lengths.to(kind))
        assert (ours - expected).abs().max() <= 1e-5


def test_decoding_refuses_lengths_that_it_cannot_serve():
    q, k, v = normal(2, 1, 1, 16), normal(2, 1, 5, 16), normal(2, 1, 5, 16)
    for lengths in ([0, 5], [1, 6], [[1], [2]], [1], [1.0, 2.0]):
        with pytest.raises(ValueError, match="lengths must"):
            decode_attention(q, k, v, torch.tensor(lengths, device=HERE))


def one_query(q, k, v):
    """(H, D): attention of one query (H, D) to all keys and values (H, T, D)."""
    shares = (torch.einsum("hd,htd->ht", q, k) / q.shape[-1] ** 0.5).exp()
    return torch.einsum("ht,htd->hd", shares / shares.sum(1, keepdim=True), v)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_attention_equals_a_loop_over_queries(name):
    causal, cached = ATTENTIONS[name]
    q, k, v = [normal(2, 2, 5, 16, seed=seed) for seed in range(3)]
    out = causal(q, k, v)
    last = cached(q[:, :, 4:], k, v, torch.tensor([2, 5], device=HERE))
    for row, length in enumerate((2, 5)):
        for t in range(5):
            seen = k[row, :, :t + 1], v[row, :, :t + 1]
            torch.testing.assert_close(out[row, :, t], one_query(q[row, :, t], *seen))
        seen = k[row, :, :length], v[row, :, :length]
        torch.testing.assert_close(last[row, :, 0], one_query(q[row, :, 4], *seen))


def test_scores_whose_powers_overflow_are_summed():
    # Scores go from -300 to 300; in float32 a power of e overflows at 89, in float64 at 710.
    q, k, v = 60 * normal(1, 2, 70, 16), normal(1, 2, 70, 16, seed=1), normal(1, 2, 70, 16, seed=2)
    expected = one_query(q[0, :, -1].double(), k[0].double(), v[0].double())
    out = fused_attention(q, k, v)
    assert out.isfinite().all() and (out[0, :, -1] - expected).abs().max() < 1e-4
    last = decode_attention(q[:, :, -1:], k, v, torch.tensor([70], device=HERE))
    assert (last[0, :, 0] - expected).abs().max() < 1e-4


def test_any_strides_give_the_same_output_and_gradients():
    qkv = normal(2, 9, 3, 2, 16).permute(2, 0, 3, 1, 4)  # as a block makes them
    grad = normal(2, 2, 9, 1).expand(2, 2, 9, 16)
    expected = exact(*qkv, grad)
    wide = qkv.transpose(3, 4).contiguous().transpose(3, 4)  # the last stride is not 1
    for q, k, v in (qkv, wide, (qkv[0], qkv[1], qkv[2].contiguous())):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = fused_attention(*leaves)
        for ours, right in zip((out, *torch.autograd.grad(out, leaves, grad)), expected):
            assert (ours - right).abs().max() < 1e-5


@model.jit
def write_offsets(pointer, stride_b, stride_h, H, T, D: model.constexpr):
    at_q, at_rows, at_lse = model.offsets(stride_b, stride_h, H, T, D)
    pointer += 3 * model.tl.program_id(0)
    model.tl.store(pointer, at_q)
    model.tl.store(pointer + 1, at_rows)
    model.tl.store(pointer + 2, at_lse)


def test_a_head_beyond_2_to_the_31_numbers_is_found():
    stride_b, stride_h, H, T, D = 2 ** 30, 2 ** 20, 2, 2 ** 30, 128
    found = torch.zeros(6, 3, dtype=torch.int64, device=HERE)
    write_offsets[(6,)](found, stride_b, stride_h, H, T, D)
    for head, ours in enumerate(found.tolist()):
        b, h = divmod(head, H)
        assert ours == [b * stride_b + h * stride_h, (b * T * H + h) * D, head * T]


def test_the_operators_pass_the_checks_of_torch():
    q, k, v = [normal(1, 2, 3, 16, dtype=torch.bfloat16, seed=seed) for seed in range(3)]
    out, lse = model.attention_op(q, k, v)
    assert lse.dtype == torch.float32  # the kernels write 32 bits
    lengths = torch.tensor([2], dtype=torch.int32, device=HERE)
    for operator, inputs in ((model.attention_op, (q, k, v)),
                             (model.attention_backward_op, (q, k, v, out, lse, out)),
                             (model.decode_op, (q[:, :, :1], k, v, lengths))):
        torch.library.opcheck(operator, inputs, test_utils=(
            "test_schema", "test_autograd_registration", "test_faketensor"))


def test_what_cannot_be_fused_is_refused_with_the_reason(monkeypatch):
    with pytest.raises(ValueError, match="16, 32, 64, 128, not 48.*choose sdpa"):
        fused_attention(*[torch.zeros(1, 1, 2, 48, device=HERE)] * 3)
    with pytest.raises(ValueError, match="one type"):
        fused_attention(*[torch.zeros(1, 1, 2, 16, dtype=torch.float64, device=HERE)] * 3)
    with pytest.raises(ValueError, match="no attention 'flash'"):
        choose_attention("flash", HERE, 64)
    monkeypatch.setattr(model, "INTERPRET", False)
    with pytest.raises(ValueError, match="it needs triton and a GPU"):
        choose_attention("fused", "cpu", 64)


@pytest.mark.parametrize("device, capability, width, name", [
    ("cuda", (7, 5), 64, "sdpa"), ("cuda", (8, 0), 64, "fused"), ("cuda", (9, 0), 48, "sdpa"),
    ("cpu", None, 64, "sdpa")])
def test_attention_is_fused_on_a_gpu_that_can(monkeypatch, device, capability, width, name):
    monkeypatch.setattr(model, "INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_attention("auto", device, width) == name


def test_all_but_fused_attention_works_without_triton():
    code = ("import sys; sys.modules['triton'] = None\n"
            "import torch, model\n"
            "gpt = model.GPT(model.Shape(1, 1, 16, 8, 9, 0))\n"
            "model.token_logprobs(gpt, torch.ones(1, 4).long(), torch.ones(1, 4).bool())\n"
            "print(model.choose_attention('auto', 'cpu', 16), model.triton)\n"
            "try: model.choose_attention('fused', 'cpu', 16)\n"
            "except ValueError as error: print(error)\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("sdpa None\n") and "needs triton" in done.stdout, done.stderr


def test_every_shipped_kernel_compiles_without_spills_and_with_tensor_cores(compiled):
    *shipped, _ = compiled.splitlines()
    assert len(shipped) == 4 * 2 * 2 * 2, compiled  # kernels, types, widths, architectures
    for line in shipped:
        assert line.endswith("| fits"), compiled


def test_an_oversized_tile_is_refused_by_the_same_check(compiled):
    assert re.search(r"\| STACK \d+$", compiled.rstrip()), compiled
