"""The fused attention, run by Triton's interpreter, against float64; and what it compiles to."""
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model
from model import (ATTENTIONS, GPT, TILES, Shape, attention_reference, choose_attention,
                   decode_attention, fused_attention, generate, token_logprobs)

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 5e-2}
HERE = "cuda" if torch.cuda.is_available() else "cpu"
SENTINEL, MARGIN = 777.0, 4096

pytestmark = pytest.mark.skipif(model.triton is None, reason="triton is not installed")


def normal(*shape, dtype=torch.float32, seed=0):
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return numbers.to(HERE, dtype)


def among_nan(x):
    """x (B, H, T, D) as a slice of a larger tensor: whatever lies beyond its rows is NaN."""
    B, H, T, D = x.shape
    slice = x.new_full((B, T + 7, H, 2 * D), math.nan)[:, :T, :, :D].transpose(1, 2)
    return slice.copy_(x)


def between(fill, x):
    """x in memory between two margins of `fill`; (B, H, T, D) is laid out as (B, T, H, D)."""
    memory = x.new_full((x.numel() + 2 * MARGIN,), fill)
    inner = memory[MARGIN:-MARGIN].view_as(x.transpose(1, 2) if x.dim() == 4 else x)
    return memory, (inner.transpose(1, 2) if x.dim() == 4 else inner).copy_(x)


def exact(q, k, v, grad):
    """Output and gradients of the reference in float64."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out = attention_reference(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.double())


def run_kernels(q, k, v, grad, tiles):
    """Output and gradients from the kernels; they find NaN and leave all as it was around them."""
    q, k, v = among_nan(q), among_nan(k), among_nan(v)
    flat = q.new_zeros(q.shape[:3], dtype=torch.float32)
    memory, (out, lse, delta, dq, dk, dv) = zip(
        *(between(SENTINEL, x) for x in (q, flat, flat, q, q, q)))
    model.launch(model.forward_kernel, tiles[0], q, k, v, out, lse)
    _, out_, = between(math.nan, out)
    _, lse_ = between(math.nan, lse)
    _, grad = between(math.nan, grad)
    model.launch(model.dq_kernel, tiles[1], q, k, v, out_, grad, lse_, delta, dq)
    _, delta_ = between(math.nan, delta)
    model.launch(model.dkv_kernel, tiles[2], q, k, v, grad, lse_, delta_, dk, dv)
    for whole in memory:
        assert (whole[:MARGIN] == SENTINEL).all() and (whole[-MARGIN:] == SENTINEL).all()
    return out, dq, dk, dv


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("D", TILES[2])
def test_kernels_equal_float64(dtype, D):
    for T in (1, 33, 77):
        q, k, v, grad = (normal(1, 2, T, D, dtype=dtype, seed=seed) for seed in range(4))
        found = run_kernels(q, k, v, grad, TILES[dtype.itemsize][D])
        for ours, expected in zip(found, exact(q, k, v, grad)):
            assert (ours - expected).abs().max() <= TOLERANCE[dtype], (T, D)


@pytest.mark.parametrize("tile", [(32, 16, 4, 2), (16, 32, 4, 2), (16, 64, 4, 2)], ids=str)
def test_kernels_equal_float64_with_tiles_of_unequal_sides(tile):
    for T in (31, 77):
        q, k, v, grad = (normal(1, 2, T, 16, seed=seed) for seed in range(4))
        found = run_kernels(q, k, v, grad, (tile,) * 3)
        for ours, expected in zip(found, exact(q, k, v, grad)):
            assert (ours - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("D", TILES[2])
def test_decoding_equals_float64_and_reads_nothing_beyond_a_length(D):
    T, lengths = 130, torch.tensor([1, 64, 65, 130], dtype=torch.int32, device=HERE)
    q, k, v = normal(4, 3, 1, D), normal(4, 3, T, D, seed=1), normal(4, 3, T, D, seed=2)
    expected = attention_reference(q.double(), k.double(), v.double(), lengths)
    for cache in (k, v):
        for row, length in enumerate(lengths):
            cache[row, :, length:] = math.nan
    apart = q.repeat_interleave(2, -1)[..., ::2]  # the last stride is not 1
    for q_, kind in ((q, torch.int32), (among_nan(q), torch.int64), (apart, torch.int64)):
        ours = decode_attention(q_, among_nan(k), among_nan(v), lengths.to(kind))
        assert (ours - expected).abs().max() <= 1e-5


def test_decoding_refuses_lengths_that_it_cannot_serve():
    q, k, v = normal(2, 1, 1, 16), normal(2, 1, 5, 16), normal(2, 1, 5, 16)
    for lengths in ([0, 5], [1, 6], [[1], [2]], [1], [1.0, 2.0]):
        with pytest.raises(ValueError, match="lengths must"):
            decode_attention(q, k, v, torch.tensor(lengths, device=HERE))


def test_rows_too_far_apart_for_32_bits_are_copied_first(monkeypatch):
    strides = []

    def attention_op(q, k, v):
        strides.append(q.stride(2))
        return q, None
    monkeypatch.setattr(model, "attention_op", attention_op)
    monkeypatch.setattr(model, "choose_attention", lambda *_: "fused")  # of a device without memory
    for apart in (64, 2 ** 30):
        x = torch.empty_strided((1, 1, 3, 16), (1, 1, apart, 1), device="meta")
        fused_attention(x, x, x)
    assert strides == [64, 16]


def by_hand(q, k, v, sees):
    """Attention written out with loops over rows, heads and queries; `sees[b][t]` keys each."""
    out = torch.zeros_like(q)
    for b, h, t in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        n = sees[b][t]
        shares = [math.exp(float(q[b, h, t] @ k[b, h, s]) / math.sqrt(q.shape[3]))
                  for s in range(n)]
        out[b, h, t] = sum(share / sum(shares) * v[b, h, s] for s, share in enumerate(shares))
    return out


@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_attention_equals_loops_by_hand(name):
    causal, cached = ATTENTIONS[name]
    q, k, v = (normal(2, 2, 5, 16, seed=seed) for seed in range(3))
    torch.testing.assert_close(causal(q, k, v), by_hand(q, k, v, [range(1, 6)] * 2))
    lengths = torch.tensor([2, 5], device=HERE)
    one = cached(q[:, :, :1], k, v, lengths)
    torch.testing.assert_close(one, by_hand(q[:, :, :1], k, v, [[2], [5]]))


@pytest.mark.filterwarnings("ignore:Input #")  # float64 is what it would like
def test_gradients_equal_finite_differences():
    inputs = [normal(1, 1, 3, 16, seed=seed).requires_grad_() for seed in range(3)]
    assert torch.autograd.gradcheck(fused_attention, inputs, eps=1e-2, atol=1e-3, rtol=1e-2,
                                    fast_mode=True)


def test_any_strides_give_the_same_output_and_gradients():
    qkv = normal(2, 9, 3, 2, 16).permute(2, 0, 3, 1, 4)  # as a block makes them
    grad = normal(2, 2, 9, 1).expand(2, 2, 9, 16)
    expected = exact(*qkv, grad)
    wide = qkv.transpose(3, 4).contiguous().transpose(3, 4)  # the last stride is not 1
    for q, k, v in (qkv, qkv.contiguous(), wide, (qkv[0].contiguous(), qkv[1], wide[2]),
                    (qkv[0], qkv[1], qkv[2].contiguous())):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = fused_attention(*leaves)
        for ours, right in zip((out, *torch.autograd.grad(out, leaves, grad)), expected):
            assert (ours - right).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_sums_for_the_backward_pass_are_kept_in_32_bits(dtype):
    q, k, v = (normal(1, 2, 40, 16, dtype=dtype, seed=seed) for seed in range(3))
    scores = q.double() @ k.double().mT / 4
    seen = torch.ones(40, 40, device=HERE).tril().bool()
    expected = scores.masked_fill(~seen, -math.inf).logsumexp(-1) / math.log(2)
    assert (model.attention_op(q, k, v)[1] - expected).abs().max() < 1e-4


def test_each_kernel_is_launched_with_the_tile_that_was_compiled_for_it(monkeypatch):
    launched = []
    monkeypatch.setattr(model, "launch", lambda kernel, tile, *_: launched.append((kernel, tile)))
    for size, dtype in ((2, torch.bfloat16), (4, torch.float32)):
        q, k, v = (normal(1, 1, 3, 128, dtype=dtype).requires_grad_() for _ in range(3))
        fused_attention(q, k, v).sum().backward()
        kernels = model.forward_kernel, model.dq_kernel, model.dkv_kernel
        assert launched[-3:] == list(zip(kernels, TILES[size][128]))


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
    q, k, v = (normal(1, 2, 3, 16, seed=seed).requires_grad_() for seed in range(3))
    out, lse = (x.detach() for x in model.attention_op(q, k, v))
    fixed = [x.detach() for x in (q, k, v)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(model.attention_op, (q, k, v), test_utils=tests)
    torch.library.opcheck(model.attention_backward_op, (*fixed, out, lse, out), test_utils=tests)
    lengths = torch.tensor([2], dtype=torch.int32, device=HERE)
    torch.library.opcheck(model.decode_op, (fixed[0][:, :, :1], *fixed[1:], lengths),
                          test_utils=tests)


def tiny(attention):
    torch.manual_seed(0)
    shape = Shape(layers=2, heads=2, width=32, context=24, vocab=50, end=0)
    return GPT(shape, attention).to(HERE)


def losses_of_training(attention):
    gpt, found = tiny(attention), []
    optimizer = torch.optim.AdamW(gpt.parameters(), 1e-2)
    tokens = torch.randint(1, 50, (3, 20), generator=torch.Generator().manual_seed(1)).to(HERE)
    for _ in range(3):
        loss = -token_logprobs(gpt, tokens, tokens > 0).sum() / tokens.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_a_gpt_trains_alike_with_fused_and_reference_attention():
    ours, reference = losses_of_training("fused"), losses_of_training("reference")
    assert reference[-1] < reference[0] - 0.2
    assert ours == pytest.approx(reference, abs=1e-4)


def test_fused_greedy_generation_equals_that_of_the_reference():
    prompts = [[5, 9, 11], [7], [3, 2, 8, 6, 1, 4]]
    answers = [generate(tiny(name), prompts, 8, 0)[0] for name in ("fused", "reference")]
    assert torch.equal(*answers)


def test_what_cannot_be_fused_is_refused_with_the_reason(monkeypatch):
    for width in (8, 48):
        with pytest.raises(ValueError, match=f"16, 32, 64, 128, not {width}"):
            choose_attention("fused", HERE, width)
        with pytest.raises(ValueError, match="choose sdpa"):
            fused_attention(*[torch.zeros(1, 1, 2, width, device=HERE)] * 3)
    with pytest.raises(ValueError, match="one type"):
        fused_attention(*[torch.zeros(1, 1, 2, 16, dtype=torch.float64, device=HERE)] * 3)
    with pytest.raises(ValueError, match="no attention 'flash'"):
        choose_attention("flash", HERE, 64)
    assert choose_attention("fused", HERE, 64) == "fused"
    assert choose_attention("auto", "cpu", 64) == choose_attention("sdpa", "cpu", 8) == "sdpa"
    monkeypatch.setattr(model, "INTERPRET", False)
    for capability, width, name in (((7, 5), 64, "sdpa"), ((8, 0), 64, "fused"),
                                    ((9, 0), 16, "fused"), ((9, 0), 48, "sdpa")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert choose_attention("auto", "cuda", width) == name
    with pytest.raises(ValueError, match="it needs triton and a GPU"):
        choose_attention("fused", "cpu", 64)


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
    status, printed = compiled["kernels"]  # 4 kernels, 4 widths, 3 types, 2 architectures
    assert status == 0 and f"{4 * 4 * 3 * 2} compiled, 0 do not fit" in printed, printed


def test_an_oversized_tile_is_refused_by_the_same_check(compiled):
    status, printed = compiled["oversized"]
    assert status == 1 and "STACK" in printed.split("|")[1], printed
