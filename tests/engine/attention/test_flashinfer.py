"""Our side of the contract with FlashInfer, against a wrapper that computes what it documents."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.engine.attention.choose import CAPTURABLE, probe
from pla_serve.engine.attention.flashinfer import FlashInferAttention, Wrapper
from pla_serve.engine.attention.padded import PaddedAttention
from pla_serve.engine.kv.cache import KVShape
from tests.engine.attention.problems import Problem, make_problem
from tests.engine.fake_device import FakeDevice

CPU = torch.device("cpu")


@dataclass(eq=False)
class FakeWrapper:
    """Attends by page tables, and takes all it knows from the arguments of ``plan``."""

    device: FakeDevice = field(default_factory=FakeDevice)
    plans: int = 0
    runs: int = 0
    known: dict[str, Any] = field(default_factory=dict)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        requests = len(qo_indptr) - 1
        for numbers, size in (
            (qo_indptr, requests + 1),
            (paged_kv_indptr, requests + 1),
            (paged_kv_indices, int(paged_kv_indptr[-1])),
            (paged_kv_last_page_len, requests),
        ):
            assert numbers.dtype is torch.int32
            assert numbers.shape == (size,)
        assert 1 <= int(paged_kv_last_page_len.min()) <= int(paged_kv_last_page_len.max())
        assert int(paged_kv_last_page_len.max()) <= page_size
        assert causal
        self.known = dict(locals())
        self.plans += 1
        self.device.enqueue("copy of a plan")

    def run(
        self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        self.runs += 1
        known = self.known
        heads, kv_heads = known["num_qo_heads"], known["num_kv_heads"]
        assert q.shape == (int(known["qo_indptr"][-1]), heads, known["head_dim_qk"])
        assert q.dtype is known["q_data_type"]
        for memory in paged_kv_cache:
            assert memory.shape[1:] == (known["page_size"], kv_heads, known["head_dim_qk"])
            assert memory.dtype is known["kv_data_type"]
        outputs = []
        for i in range(len(known["qo_indptr"]) - 1):
            start, end = known["qo_indptr"][i : i + 2].tolist()
            first, last = known["paged_kv_indptr"][i : i + 2].tolist()
            pages = known["paged_kv_indices"][first:last].long()
            context = (last - first - 1) * known["page_size"] + int(
                known["paged_kv_last_page_len"][i]
            )
            key, value = (
                memory[pages].flatten(0, 1)[:context].repeat_interleave(heads // kv_heads, 1)
                for memory in paged_kv_cache
            )
            scores = torch.einsum("thd,shd->hts", q[start:end].double(), key.double())
            seen = torch.ones(end - start, context, dtype=torch.bool).tril(context - (end - start))
            weights = (scores * known["sm_scale"]).masked_fill(~seen, -torch.inf).softmax(-1)
            outputs.append(torch.einsum("hts,shd->thd", weights, value.double()))
        return torch.cat(outputs).to(q.dtype)


def made(count: int = 4) -> tuple[FlashInferAttention, list[FakeWrapper], FakeDevice]:
    device = FakeDevice()
    wrappers = [FakeWrapper(device) for _ in range(count)]
    return FlashInferAttention(device, lambda: wrappers), wrappers, device


def attend(backend: FlashInferAttention, problem: Problem) -> torch.Tensor:
    return backend.attend(0, problem.query, problem.cache, problem.batch, 0.25)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    lengths=st.lists(
        st.tuples(st.sampled_from((1, 2, 4, 5, 16, 17)), st.sampled_from((0, 1, 3, 4, 31, 70))),
        min_size=1,
        max_size=4,
    ),
    group=st.sampled_from((1, 2, 7)),
    block=st.sampled_from((1, 4, 16)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)
def test_equals_float64(
    seed: int, lengths: list[tuple[int, int]], group: int, block: int, dtype: torch.dtype
) -> None:
    problem = make_problem(seed, lengths, heads=2, group=group, block=block, dtype=dtype)
    got = attend(made()[0], problem)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(got.double(), problem.expected(0.25), rtol=tolerance, atol=tolerance)


def test_passes_the_trial_that_decides_at_start() -> None:
    """Padding and memory that belongs to nobody included."""
    backend = PaddedAttention(made()[0])
    assert probe(backend, KVShape(3, 2, 16, torch.bfloat16), 14, 16, CPU) is None


def test_a_batch_is_planned_once_for_all_its_layers() -> None:
    backend, wrappers, _ = made()
    outer, express = make_problem(1, [(9, 3)]), make_problem(2, [(1, 7), (2, 0)])
    for layer in range(3):
        attend(backend, outer)
        if layer == 1:  # in the middle of the outer pass
            attend(backend, express)
    assert sorted(wrapper.plans for wrapper in wrappers) == [0, 0, 1, 1]
    assert sum(wrapper.runs for wrapper in wrappers) == 4


def test_a_batch_whose_plan_was_taken_by_others_is_planned_again() -> None:
    backend, wrappers, _ = made(count=2)
    problems = [make_problem(seed, [(5, seed), (1, 4)]) for seed in range(4)]
    for problem in (*problems, *problems):
        torch.testing.assert_close(
            attend(backend, problem).double(), problem.expected(0.25), rtol=1e-5, atol=1e-5
        )
    assert sum(wrapper.plans for wrapper in wrappers) == 8


def test_a_plan_is_not_overwritten_before_the_device_has_it() -> None:
    backend, _, device = made(count=2)
    for seed in range(2):
        attend(backend, make_problem(seed, [(3, 0)]))
    assert device.waited_for == []
    attend(backend, make_problem(2, [(3, 0)]))
    assert device.waited_for == [1], "the first wrapper's copy, and no later one"


class Failing(FakeWrapper):
    def plan(self, *args: Any, **kwargs: Any) -> None:
        self.plans += 1
        if self.plans == 2:
            raise RuntimeError("workspace is too small")
        super().plan(*args, **kwargs)
        self.plans -= 1


def test_a_plan_that_failed_is_nobodys() -> None:
    wrapper = Failing()
    wrapper.plans = 1
    backend = FlashInferAttention(FakeDevice(), lambda: [wrapper])
    problem = make_problem(0, [(3, 4)])
    with pytest.raises(RuntimeError, match="too small"):
        attend(backend, problem)
    torch.testing.assert_close(
        attend(backend, problem).double(), problem.expected(0.25), rtol=1e-5, atol=1e-5
    )


def test_it_is_not_captured() -> None:
    assert "flashinfer" not in CAPTURABLE


def test_our_calls_fit_the_real_signatures() -> None:
    flashinfer = pytest.importorskip(
        "flashinfer", reason="FlashInfer is not installed", exc_type=ImportError
    )
    real = flashinfer.BatchPrefillWithPagedKVCacheWrapper
    inspect.signature(real.__init__).bind(None, object(), "NHD")
    for name in ("plan", "run"):
        ours = inspect.signature(getattr(Wrapper, name)).parameters.values()
        positional = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
        named = {p.name: None for p in ours if p.kind is p.KEYWORD_ONLY}
        theirs = inspect.signature(getattr(real, name))
        bound = theirs.bind(*positional, **named)
        # What we give by position must be what they call by the same name.
        assert [bound.arguments[name] for name in positional] == positional
