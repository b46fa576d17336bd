from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.engine.sampling import GrammarError, Sampler, SamplingError, SequenceSampling
from pla_serve.wire.engine import Grammar, SamplingParams

VOCAB = 300
EOS = frozenset({1, 2})
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
SAMPLER = Sampler(VOCAB, torch.device("cpu"))


def start(request_id: str = "r", prompt: Sequence[int] = (5, 6), **params: Any) -> SequenceSampling:
    params.setdefault("max_tokens", 100)
    return SAMPLER.start(request_id, prompt, SamplingParams(**params), EOS, default_seed=0)


def logits_of(step: int, rows: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(step)).to(dtype)


def favouring(*tokens: int) -> torch.Tensor:
    """The likeliest first."""
    logits = torch.zeros(1, VOCAB)
    logits[0, list(tokens)] = torch.arange(len(tokens), 0, -1).float() * 5
    return logits


@DTYPES
def test_greedy_is_argmax(dtype: torch.dtype) -> None:
    logits = logits_of(0, 8, dtype)
    sampled = SAMPLER.sample(logits, [start(temperature=0.0) for _ in range(8)])
    assert [one.token for one in sampled] == logits.argmax(-1).tolist()
    assert not any(one.error or one.logprob for one in sampled)


def test_an_empty_batch_is_fine() -> None:
    assert SAMPLER.sample(torch.empty(0, VOCAB), []) == []


def test_a_wrong_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"\(2, 300\) for 1 sequences"):
        SAMPLER.sample(logits_of(0, 2), [start()])


@DTYPES
def test_logits_are_not_changed(dtype: torch.dtype) -> None:
    logits = logits_of(0, 4, dtype)
    before = logits.clone()
    params = {"top_k": 4, "top_p": 0.5, "logprobs": 2, "frequency_penalty": 1.0, "min_tokens": 2}
    SAMPLER.sample(logits, [start(logit_bias={3: 9.0}, **params) for _ in range(4)])
    assert torch.equal(logits, before)


any_params = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.7, 1.5])},
    optional={
        "top_k": st.integers(1, 50),
        "top_p": st.floats(0.1, 1),
        "min_p": st.floats(0, 0.5),
        "seed": st.integers(0, 9),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.5, 2),
        "min_tokens": st.integers(0, 5),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=3),
        "logprobs": st.integers(0, 3),
    },
)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(any_params, min_size=1, max_size=5), data=st.data())
def test_the_schedule_does_not_show_in_the_output(rows: list[dict[str, Any]], data: Any) -> None:
    """Each sequence alone, or in random company at each step: the same tokens and logprobs."""
    steps = 6
    logits = [logits_of(100 + step, len(rows)) for step in range(steps)]
    expected = []
    for row, params in enumerate(rows):
        alone = start(str(row), **params)
        expected.append([SAMPLER.sample(one[row : row + 1], [alone])[0] for one in logits])
    sequences = [start(str(row), **params) for row, params in enumerate(rows)]
    got: list[list[Any]] = [[] for _ in rows]
    while pending := [row for row in range(len(rows)) if len(got[row]) < steps]:
        batch = data.draw(st.lists(st.sampled_from(pending), min_size=1, unique=True))
        together = torch.stack([logits[len(got[row])][row] for row in batch])
        step = SAMPLER.sample(together, [sequences[row] for row in batch])
        for row, one in zip(batch, step, strict=True):
            got[row].append(one)
    for mine, theirs in zip(got, expected, strict=True):
        assert [one._replace(logprob=None) for one in mine] == [
            one._replace(logprob=None) for one in theirs
        ]
        for one, other in zip(mine, theirs, strict=True):
            if one.logprob is not None:
                assert one.logprob.rank == other.logprob.rank
                assert one.logprob.logprob == pytest.approx(other.logprob.logprob, abs=1e-5)


def tokens(sequence: SequenceSampling, steps: int = 20) -> list[int]:
    return [SAMPLER.sample(logits_of(step), [sequence])[0].token for step in range(steps)]


def test_a_seed_repeats_and_another_differs() -> None:
    assert tokens(start("a", seed=1)) == tokens(start("b", seed=1))
    assert tokens(start("a", seed=1)) != tokens(start("a", seed=2))


def test_without_a_seed_the_id_decides() -> None:
    assert tokens(start("a")) == tokens(start("a"))
    assert tokens(start("a")) != tokens(start("b"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@DTYPES
def test_a_broken_row_harms_nobody_else(bad: float, temperature: float, dtype: torch.dtype) -> None:
    sequences = [
        start(str(row), temperature=temperature, logprobs=1, top_p=0.9) for row in range(3)
    ]
    alone = [start(str(row), temperature=temperature, logprobs=1, top_p=0.9) for row in range(3)]
    logits = logits_of(0, 3, dtype)
    expected = [SAMPLER.sample(logits[row : row + 1], [alone[row]])[0] for row in range(3)]
    logits[1, 17] = bad
    good, broken, fine = SAMPLER.sample(logits, sequences)
    assert (good.token, fine.token) == (expected[0].token, expected[2].token)
    assert broken.token == -1
    assert broken.error is not None
    assert "NaN or infinite" in broken.error
    assert sequences[1].drawn == 0


def test_minus_infinity_only_forbids_a_token() -> None:
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, 42] = 0.0
    assert SAMPLER.sample(logits, [start()])[0].token == 42
    everything = SAMPLER.sample(torch.full((1, VOCAB), -torch.inf), [start()])[0]
    assert everything.error is not None


def test_eos_and_stop_ids_stop() -> None:
    for token in (1, 2, 77):
        sampled = SAMPLER.sample(favouring(token), [start(temperature=0.0, stop_token_ids=(77,))])[
            0
        ]
        assert (sampled.token, sampled.stopped) == (token, True)
    assert not SAMPLER.sample(favouring(3), [start(temperature=0.0)])[0].stopped


def test_ignore_eos_ignores_eos_but_not_stop_ids() -> None:
    sequence = start(temperature=0.0, ignore_eos=True, stop_token_ids=(77,))
    sampled = [SAMPLER.sample(favouring(token), [sequence])[0] for token in (1, 2, 77)]
    assert [one.token for one in sampled] == [1, 2, 77]
    assert [one.stopped for one in sampled] == [False, False, True]


@pytest.mark.parametrize("temperature", [0.0, 0.01])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_nothing_ends_the_text_before_min_tokens(temperature: float, ignore_eos: bool) -> None:
    sequence = start(
        temperature=temperature, min_tokens=3, stop_token_ids=(77,), ignore_eos=ignore_eos
    )
    drawn = [SAMPLER.sample(favouring(1, 77, 2, 9), [sequence])[0] for _ in range(4)]
    assert [one.token for one in drawn] == [9, 9, 9, 1]
    assert drawn[3].stopped is not ignore_eos


def test_bias_can_ban_and_force() -> None:
    banned = start(temperature=0.0, logit_bias={9: -100.0})
    assert SAMPLER.sample(favouring(9, 8), [banned])[0].token == 8
    forced = start(logit_bias={200: 100.0})
    assert SAMPLER.sample(favouring(9, 8), [forced])[0].token == 200


def test_penalties_act_on_the_output_so_far() -> None:
    sequence = start(temperature=0.0, prompt=(9,), frequency_penalty=2.0)
    # 9 leads by 5 and loses 2 each time it is put out; a tie goes to the smaller id.
    drawn = [SAMPLER.sample(favouring(9, 8), [sequence])[0].token for _ in range(5)]
    assert drawn == [9, 9, 9, 8, 9]


@DTYPES
def test_logprobs_are_the_models_own(dtype: torch.dtype) -> None:
    logits = logits_of(3, 2, dtype)
    reference = logits.float().log_softmax(-1)
    sequences = [
        start(temperature=0.3, top_k=2, frequency_penalty=1.0, logit_bias={7: 50.0}, logprobs=3),
        start(temperature=0.0, logprobs=0),
    ]
    for row, sampled in enumerate(SAMPLER.sample(logits, sequences)):
        found = sampled.logprob
        assert found is not None
        assert found.logprob == pytest.approx(reference[row, sampled.token].item(), abs=1e-6)
        assert found.rank == 1 + int((reference[row] > reference[row, sampled.token]).sum())
    first, second = (one for one in SAMPLER.sample(logits, sequences))
    assert first.logprob is not None
    assert second.logprob is not None
    values, ids = reference[0].topk(3)
    assert [id_ for id_, _ in first.logprob.top] == ids.tolist()
    assert [value for _, value in first.logprob.top] == pytest.approx(values.tolist(), abs=1e-6)
    assert second.logprob.top == []


def test_more_logprobs_than_tokens_gives_all() -> None:
    small = Sampler(3, torch.device("cpu"))
    params = SamplingParams(max_tokens=1, logprobs=20)
    sequence = small.start("a", (), params, frozenset(), default_seed=0)
    found = small.sample(torch.randn(1, 3), [sequence])[0].logprob
    assert found is not None
    assert len(found.top) == 3


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias names token id 300; .* 0 to 299"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids names token id -1"),
        ({"repetition_penalty": 1.1, "prompt": (3, 999)}, "the prompt names token id 999"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        start(**params)


def test_a_grammar_without_a_compiler_is_refused() -> None:
    with pytest.raises(GrammarError, match="without support for structured output"):
        start(grammar=Grammar("json_object"))


def test_extreme_temperatures_stay_finite() -> None:
    for temperature in (1e-6, 1e-4, 1e30):
        sampled = SAMPLER.sample(1e4 * logits_of(0), [start(temperature=temperature)])[0]
        assert sampled.error is None
