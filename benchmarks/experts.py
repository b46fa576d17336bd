"""What a layer's experts cost, over the matrix products that they consist of, on this CPU.

For each number of tokens, with the experts that a random router chooses, three things run in turn,
and the best time of each counts:

* products: the products of all experts that were chosen, one after another on packed weights, with
  their inputs in place. No sorting, weighting or summing, and no router;
* block: router, sorting, products, weighting and summing, as the engine runs them;
* stock: the same block of transformers, with its grouped product.

Times are processor time of one thread, so that other processes on the machine cost little.

    python benchmarks/experts.py --json benchmarks/results/experts.json
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from pla_serve.bench.save import write_json
from pla_serve.engine.kernels.open import open_kernels
from pla_serve.engine.layers.cpu import ExpertMlps, optimise
from pla_serve.environment import describe

TOKENS = (1, 2, 4, 8, 64, 256, 1024, 4096)
LEAST_ROUNDS = 3

Run = Callable[[], object]


def block_of(options: argparse.Namespace, dtype: torch.dtype) -> Any:
    """Return a stock block with random weights that bfloat16 holds exactly, as those of files."""
    config = Qwen3MoeConfig(
        hidden_size=options.hidden,
        moe_intermediate_size=options.intermediate,
        num_experts=options.experts,
        num_experts_per_tok=options.chosen,
    )
    config._experts_implementation = "grouped_mm"
    block = Qwen3MoeSparseMoeBlock(config)
    for parameter in block.parameters():
        parameter.data.normal_(0.0, 0.02)
        parameter.data = parameter.data.bfloat16().to(dtype)
    return block.eval().requires_grad_(False)


def products_of(experts: ExpertMlps, choices: torch.Tensor, hidden: torch.Tensor) -> Run:
    """Return a function that runs the products of the experts that were chosen, and no more."""
    counts = torch.bincount(choices.reshape(-1), minlength=len(experts.down)).tolist()
    work = [
        (gates, down, hidden[torch.arange(count) % len(hidden)])
        for gates, down, count in zip(experts.gated, experts.down, counts, strict=True)
        if count
    ]

    def run() -> None:
        for gates, down, inputs in work:
            down(gates(inputs, None))

    return run


def best_of(runs: dict[str, Run], seconds: float) -> dict[str, float]:
    """Return the best time of each, in milliseconds; they run in turn for ``seconds``."""
    best = dict.fromkeys(runs, float("inf"))
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < LEAST_ROUNDS or time.perf_counter() < end:
        for name, run in runs.items():
            started = time.thread_time()
            run()
            best[name] = min(best[name], 1000 * (time.thread_time() - started))
        rounds += 1
    return best


def measure(options: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, object]]:
    """Return a row for each number of tokens."""
    torch.manual_seed(0)
    stock = block_of(options, dtype)
    ours: Any = torch.nn.Sequential(copy.deepcopy(stock))
    optimise(ours, open_kernels(options.kernels))
    assert isinstance(ours[0].experts, ExpertMlps)
    rows: list[dict[str, object]] = []
    for tokens in TOKENS:
        hidden = torch.randn(1, tokens, options.hidden).to(dtype)
        choices = ours[0].gate(hidden[0])[2]
        runs: dict[str, Run] = {
            "products": products_of(ours[0].experts, choices, hidden[0]),
            "block": lambda hidden=hidden: ours(hidden),  # type: ignore[misc]
            "stock": lambda hidden=hidden: stock(hidden),  # type: ignore[misc]
        }
        best = best_of(runs, options.seconds)
        ours_ratio, stock_ratio = best["block"] / best["products"], best["stock"] / best["block"]
        chosen = len(choices.unique())
        rows.append(
            {
                "tokens": tokens,
                "experts": chosen,
                "milliseconds": best,
                "block_over_products": ours_ratio,
                "stock_over_block": stock_ratio,
            }
        )
        print(
            f"{dtype}, {tokens} tokens, {chosen} experts: products {best['products']:.2f} ms, "
            f"block {best['block']:.2f} ({ours_ratio:.2f}x), "
            f"stock {best['stock']:.2f} ({stock_ratio:.1f}x the block)",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--hidden", type=int, default=2048, help="default: sizes of Qwen3-30B-A3B")
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--chosen", type=int, default=8)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each number of tokens")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        rows = {name: measure(options, getattr(torch, name)) for name in options.dtypes.split(",")}
    if options.json:
        sizes = {k: getattr(options, k) for k in ("hidden", "intermediate", "experts", "chosen")}
        write_json(
            options.json,
            {"environment": describe(), "layer": sizes, "unit": "ms of one thread", "rows": rows},
        )


if __name__ == "__main__":
    main()
