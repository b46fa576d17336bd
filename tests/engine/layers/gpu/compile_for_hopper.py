"""Compiles every kernel as Triton would on an H100; prints one JSON line for each. No GPU needed.

What the interpreter forgives, the compiler does not. Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pla_serve.engine.attention import kernels as attention
from pla_serve.engine.attention.paged import (
    FEW_ROWS,
    FLOAT32_KEYS,
    MANY_ROWS,
    SOME_ROWS,
    SPLITS,
    Tile,
)
from pla_serve.engine.layers.gpu import kernels as layer

HOPPER = GPUTarget("cuda", 90, 32)
DIVISIBLE = [["tt.divisibility", 16]]


def build(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int
) -> None:
    """Pointers and strides count as divisible by 16, as they are in an engine."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    even = [
        n for n, t in types.items() if (t.startswith("*") and t != "*i32") or n.endswith("stride")
    ]
    made = triton.compile(
        ASTSource(
            kernel,
            signature,
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(names.index(name),): DIVISIBLE for name in even},
        ),
        target=HOPPER,
        options={"num_warps": warps, "num_stages": stages},
    )
    ptx = made.asm["ptx"]
    print(
        json.dumps(
            {
                "kernel": kernel.__name__,
                "warps": warps,
                "shared": made.metadata.shared,
                "wgmma": ptx.count("wgmma.mma_async"),
                "async_copies": ptx.count("cp.async.c"),
                "waits": [
                    int(n) for n in re.findall(r"async_wait.*num = (\d+)", made.asm["ttgir"])
                ],
                "spilled_bytes": spilled_bytes(ptx),
            }
        )
    )


def spilled_bytes(ptx: str) -> int:
    """Bytes that each thread of a kernel keeps in memory, because registers are too few."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
        words = [str(assembler), "-v", "--gpu-name=sm_90a", str(source), "-o", f"{folder}/out"]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stderr
    return sum(int(number) for number in re.findall(r"(\d+) bytes spill stores", said))


def attend(tile: Tile, splits: int, group: int, dtype: str = "bf16") -> None:
    whole = dict.fromkeys(("queries", "keys", "values", "outputs"), f"*{dtype}")
    part = "*fp32" if splits > 1 else f"*{dtype}"
    lengths = dict.fromkeys(("starts", "contexts", "table_starts", "table"), "*i32")
    strides = ("query_token_stride", "query_head_stride", "slot_stride", "kv_head_stride")
    numbers = dict.fromkeys(("sequences", "capacity", "least_part", *strides), "i32")
    types = {**whole, "parts": part, "part_lse": part, **lengths, **numbers, "scale": "fp32"}
    constants = {
        "GROUP": group, "HEAD": 128, "HEAD_PAD": 128, "BLOCK_TOKENS": 16, "SPLITS": splits,
        "TILE_ROWS": tile.rows, "TILE_KEYS": tile.keys, "WIDE": False,
    }  # fmt: skip
    build(attention.attend_kernel, types, constants, tile.warps, tile.stages)


if __name__ == "__main__":
    attend(FEW_ROWS, SPLITS[0], 7)
    attend(SOME_ROWS, SPLITS[1], 5)
    attend(MANY_ROWS, 1, 7)
    attend(Tile(FEW_ROWS.rows, FLOAT32_KEYS, FEW_ROWS.warps, 1), SPLITS[0], 7, "fp32")
    parts = {"parts": "*fp32", "part_lse": "*fp32", "outputs": "*bf16", "starts": "*i32"}
    numbers = {"sequences": "i32", "capacity": "i32"}
    merged = {"HEAD": 128, "HEAD_PAD": 128, "SPLITS": SPLITS[0]}
    build(attention.merge_kernel, {**parts, **numbers}, merged, 2, 3)
    norm = {"inputs": "*bf16", "weight": "*bf16", "outputs": "*bf16", "width": "i32"}
    build(layer.rms_norm_kernel, {**norm, "epsilon": "fp32"}, {"BLOCK": 4096}, 8, 3)
    gate = {"joint": "*bf16", "outputs": "*bf16", "width": "i32"}
    build(layer.gate_kernel, gate, {"BLOCK": 1024}, 4, 3)
    pointers = ("joint", "cos", "sin", "keys", "values", "query_norm", "key_norm")
    rotate = dict.fromkeys(pointers, "*bf16") | {
        "slots": "*i64", "epsilon": "fp32", "angle_stride": "i32", "slot_stride": "i32",
    }  # fmt: skip
    for normed in (False, True):
        heads = {"QUERY_HEADS": 28, "KV_HEADS": 4, "DIM": 128, "HALF_PAD": 64, "NORM": normed}
        build(layer.rotate_and_store_kernel, rotate, heads, 1, 3)
