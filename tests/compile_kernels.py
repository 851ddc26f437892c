"""Compiles the kernels of model.py for GPUs that need not be here, and reads what came out.

`python tests/compile_kernels.py` compiles every configuration that is shipped, in about a minute,
prints a line for each and exits with 1 if one of them spills or does not fit. Words narrow it
down: `bf16 sm_90 D64`. `pytest` has it run on another core beside its tests.
"""
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before the first import of triton: it decides there

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model  # noqa: E402

SHARED_KB = {80: 163, 90: 227}  # what one program may use
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
CAUSAL = model.forward_kernel, model.dq_kernel, model.dkv_kernel


@dataclass(frozen=True)
class Case:
    """One configuration; `tile` as in model.TILES."""
    kernel: str
    type: str
    width: int
    arch: int
    tile: tuple

    def __str__(self):
        return f"{self.kernel} {self.type} D{self.width} sm_{self.arch}"


OVERSIZED = Case("forward_kernel", "bf16", 128, 80, (128, 128, 4, 3))


def shipped():
    """Every configuration that model.py can choose."""
    for arch in SHARED_KB:
        for name, size in {"bf16": 2, "fp16": 2, "fp32": 4}.items():
            for width, tiles in model.TILES[size].items():
                for kernel, tile in zip(CAUSAL, tiles):
                    yield Case(kernel.fn.__name__, name, width, arch, tile)
                keys, warps = model.DECODE_TILE
                yield Case("decode_kernel", name, width, arch, (None, keys, warps, 3))


def argument_type(name: str, case: Case) -> str:
    if name in ("D", "OWN", "OTHER"):
        return "constexpr"
    if name.endswith("_ptr"):
        fixed = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "lengths_ptr": "*i32"}
        return fixed.get(name, f"*{case.type}")
    return "fp32" if name == "scale" else "i32"


def compiled(case: Case) -> dict:
    """Registers, bytes of stack, local and shared memory, and counts of instructions of a case."""
    kernel, (own, other, warps, stages) = getattr(model, case.kernel), case.tile
    names = kernel.arg_names
    constants = {"D": case.width, "OWN": own, "OTHER": other}
    whole = [["tt.divisibility", 16]]  # as Triton finds of pointers, and of strides of heads
    source = ASTSource(
        kernel, {name: argument_type(name, case) for name in names},
        {name: value for name, value in constants.items() if name in names},
        {(at,): whole for at, name in enumerate(names)
         if name.endswith("_ptr") or name.startswith(("stride_", "q_"))})
    binary = triton.compile(source, GPUTarget("cuda", case.arch, 32), {
        "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True,
                               text=True, check=True).stdout
    ptx = binary.asm["ptx"]
    return {**{key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)},
            "shared": binary.metadata.shared, "mma.sync": ptx.count("mma.sync"),
            "wgmma": ptx.count("wgmma.mma_async"), "tf32": ptx.count("tf32"),
            "ld.v4": ptx.count("ld.global.v4.b32"),
            "cp.async": len(re.findall(r"cp\.async\.cg\.shared\.global [^;]*, 0x10", ptx))}


def faults(case: Case, found: dict) -> list[str]:
    """What is wrong with a compiled case; nothing if it may be shipped."""
    wrong = [f"{key} {found[key]}" for key in ("STACK", "LOCAL") if found[key]]
    if found["shared"] > SHARED_KB[case.arch] * 1024:
        wrong.append(f"shared {found['shared']}")
    if found["tf32"]:  # products of float32 that are rounded to 10 bits
        wrong.append("tf32")
    needed = ["ld.v4"] if case.kernel == "decode_kernel" else ["cp.async"]  # 16 bytes at a time
    if case.kernel != "decode_kernel" and case.type != "fp32":
        needed.append("mma.sync" if case.arch == 80 else "wgmma")  # tensor cores
    return wrong + [f"no {instruction}" for instruction in needed if not found[instruction]]


def main(words: list[str]) -> int:
    cases = [OVERSIZED] if words == ["oversized"] else [
        case for case in shipped() if set(words) <= set(str(case).split())]
    bad = 0
    for case in cases:
        found = compiled(case)
        wrong = faults(case, found)
        bad += bool(wrong)
        print(f"{str(case):30s}", *(f"{key} {value}" for key, value in found.items()),
              f"| {', '.join(wrong) or 'fits'}", flush=True)
    print(f"{len(cases)} compiled, {bad} do not fit")
    return int(bad > 0 or not cases)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as os.environ["TRITON_CACHE_DIR"]:  # nothing is taken over
        sys.exit(main(sys.argv[1:]))
