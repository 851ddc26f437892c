"""Compiles the kernels of model.py for GPUs that need not be here, and reads what came out.

`python tests/compile_kernels.py` compiles every configuration that is shipped, in about a minute,
and last a tile that is too large. It prints a line for each. `pytest` runs it beside its tests with
the word `some`, for two types and two widths.
"""
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before the first import of triton: it decides there

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model  # noqa: E402

SHARED_KB = {80: 163, 90: 227}  # what one program may use
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async"}  # their instructions
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {"bf16": 2, "fp32": 4, "fp16": 2}  # bytes of a number
POINTERS = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "lengths_ptr": "*i32"}
OVERSIZED = (128, 128, 4, 3)


def cases(types, widths):
    """Every configuration of these types and widths that model.py can choose: kernel, type, width,
    architecture, tile as in model.TILES; and one with a tile that is too large."""
    kernels = model.forward_kernel, model.dq_kernel, model.dkv_kernel, model.decode_kernel
    keys, warps = model.DECODE_TILE
    for arch in SHARED_KB:
        for kind in types:
            for width in widths:
                tiles = *model.TILES[TYPES[kind]][width], (None, keys, warps, 3)
                for kernel, tile in zip(kernels, tiles):
                    yield kernel, kind, width, arch, tile
    yield model.forward_kernel, "bf16", 128, 80, OVERSIZED


def compiled(kernel, kind, width, arch, tile) -> tuple[dict, str]:
    """{what: amount} of registers, stack, local and shared memory in bytes; and the PTX."""
    own, other, warps, stages = tile
    constants = {"D": width, "OWN": own, "OTHER": other}
    signature = {}
    whole = {}  # multiples of 16, as Triton finds of pointers, and of strides of heads
    for at, name in enumerate(kernel.arg_names):
        signature[name] = "i32"
        if name in constants:
            signature[name] = "constexpr"
        if name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, f"*{kind}")
        if name.endswith("_ptr") or name.startswith("stride_"):
            whole[at,] = [["tt.divisibility", 16]]
    constants = {name: constants[name] for name in constants.keys() & signature.keys()}
    binary = triton.compile(
        ASTSource(kernel, signature, constants, whole), GPUTarget("cuda", arch, 32),
        {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        printed = subprocess.check_output([CUOBJDUMP, "-res-usage", file.name], text=True)
    usage = {"shared": binary.metadata.shared}
    for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed):
        usage[name] = int(number)
    return usage, binary.asm["ptx"]


def faults(kernel, kind, arch, usage, ptx):
    """What is wrong with a compiled kernel; nothing if it may be shipped."""
    for name, most in (("STACK", 0), ("LOCAL", 0), ("shared", SHARED_KB[arch] * 1024)):
        if usage[name] > most:
            yield f"{name} {usage[name]}"
    if "tf32" in ptx:
        yield "tf32 rounds products of float32 to 10 bits"
    needed = ["cp.async.cg.shared.global"]  # 16 bytes at a time
    if kernel is model.decode_kernel:
        needed = ["ld.global.v4.b32"]
    elif kind != "fp32":
        needed.append(TENSOR_CORES[arch])
    for name in needed:
        if name not in ptx:
            yield f"no {name}"


def main(words: list[str]):
    types, widths = TYPES, model.TILES[2]
    if words == ["some"]:
        types, widths = ["bf16", "fp32"], [16, 128]
    for kernel, kind, width, arch, tile in cases(types, widths):
        usage, ptx = compiled(kernel, kind, width, arch, tile)
        wrong = ", ".join(faults(kernel, kind, arch, usage, ptx)) or "fits"
        print(kernel.fn.__name__, kind, f"D{width} sm_{arch}", tile, usage, "|", wrong, flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as os.environ["TRITON_CACHE_DIR"]:  # nothing is taken over
        main(sys.argv[1:])
