from __future__ import annotations

import numpy as np
import pytest

from pla_serve.traces import clock
from pla_serve.traces.clock import ClockOptions, common_clock, on_one_clock
from pla_serve.traces.rows import Row, root


def own_clocks(sessions: int) -> list[Row]:
    return [
        Row(2 * i + turn, 10.0 * turn, 5, 1, session=str(i), turn=turn + 1)
        for i in range(sessions)
        for turn in (0, 1)
    ]


def test_a_common_clock_is_kept_and_sorted() -> None:
    rows = [Row(0, 7.0, 5, 1), Row(1, 5.0, 5, 1, session="a"), Row(2, 6.0, 5, 1, session="b")]
    timed, words = on_one_clock(rows, ClockOptions())
    assert [(row.index, row.arrival) for row in timed] == [(1, 0.0), (2, 1.0), (0, 2.0)]
    assert "the trace's" in words


def test_sessions_with_clocks_of_their_own_start_over_the_span() -> None:
    rows = own_clocks(400)
    assert not common_clock(rows)
    timed, words = on_one_clock(rows, ClockOptions(session_span=1000))
    assert "1000 s" in words
    assert timed == sorted(timed, key=lambda row: row.arrival or 0)
    starts = {row.session: row.arrival or 0.0 for row in timed if row.turn == 1}
    for row in timed:
        if row.turn == 2:
            assert row.arrival == pytest.approx(starts[row.session] + 10)
    quartiles = np.percentile(list(starts.values()), [0, 25, 50, 75, 100])
    assert quartiles == pytest.approx([0, 250, 500, 750, 1000], abs=70)
    assert timed == on_one_clock(rows, ClockOptions(session_span=1000))[0]
    assert timed != on_one_clock(rows, ClockOptions(session_span=1000, seed=1))[0]


def test_a_sub_agent_has_the_clock_of_its_session() -> None:
    rows = [*own_clocks(9), Row(18, 4.0, 5, 1, session="3.1"), Row(19, 6.0, 5, 1, session="3.2")]
    timed, _ = on_one_clock(rows, ClockOptions())
    at = {(row.session, row.turn): row.arrival or 0.0 for row in timed}
    assert at["3.1", None] == pytest.approx(at["3", 1] + 4)
    assert at["3.2", None] == pytest.approx(at["3", 1] + 6)


def test_without_times_requests_are_poisson_at_the_rate() -> None:
    rows = [Row(i, None, 5, 1) for i in range(4000)]
    timed, words = on_one_clock(rows, ClockOptions(rate=4))
    assert "4 requests/s" in words
    assert [row.index for row in timed] == list(range(4000))
    gaps = np.diff([row.arrival or 0.0 for row in timed])
    assert gaps.mean() == pytest.approx(0.25, rel=0.06)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.06)


def test_without_times_turns_follow_each_other_after_a_thought() -> None:
    rows = [
        Row(
            3 * i + turn,
            None,
            5,
            1,
            session=str(i),
            turn=turn + 1,
            think=1.0 if turn == 2 else None,
        )
        for i in range(2000)
        for turn in range(3)
    ]
    timed, _ = on_one_clock(rows, ClockOptions(think_seconds=8))
    assert len(timed) / (timed[-1].arrival or 0) == pytest.approx(1.0, rel=0.08)
    by_turn = {(row.session, row.turn): row for row in timed}
    thoughts = []
    for i in range(2000):
        one, two, three = (by_turn[str(i), turn] for turn in (1, 2, 3))
        assert one.think is None
        assert (two.arrival or 0) - (one.arrival or 0) == pytest.approx(two.think)
        assert (three.arrival or 0) - (two.arrival or 0) == pytest.approx(1.0)
        thoughts.append(two.think or 0)
    assert np.mean(thoughts) == pytest.approx(8, rel=0.06)


@pytest.mark.parametrize("field", ["session_span", "rate", "think_seconds"])
def test_out_of_range(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        ClockOptions(**{field: -1.0})


def test_clocks_of_their_own_are_told_from_a_common_one() -> None:
    assert clock.own_clocks(own_clocks(3))
    assert not clock.own_clocks(own_clocks(1))
    assert not clock.own_clocks([Row(0, None, 5, 1, session="a"), Row(1, None, 5, 1, session="b")])


def test_sessions_start_anew_and_long_pauses_are_cut() -> None:
    rows = [
        *own_clocks(200),
        Row(400, 13.0, 5, 1, session="7.1"),
        Row(401, 90.0, 5, 1, session="7"),
    ]
    timed = clock.start_sessions(rows, 500.0, 3, max_pause=20.0)
    assert timed[0].arrival == 0
    assert sorted(row.index for row in timed) == list(range(402))
    times = [row.arrival or 0.0 for row in timed if root(row.session or "") == "7"]
    # 0, 10, 13 and 90: the last pause is 77.
    assert np.diff(times) == pytest.approx([10, 3, 20])
    starts = [row.arrival or 0.0 for row in timed if row.turn == 1]
    assert np.percentile(starts, [25, 50, 75]) == pytest.approx([125, 250, 375], abs=45)


def test_another_span_stretches_the_same_starts() -> None:
    short, long = (
        {
            row.session: row.arrival or 0.0
            for row in clock.start_sessions(own_clocks(20), span, 3)
            if row.turn == 1
        }
        for span in (100.0, 300.0)
    )
    assert long == pytest.approx({name: 3 * time for name, time in short.items()})
    with pytest.raises(ValueError, match="at least 0"):
        clock.start_sessions(own_clocks(2), -1.0, 0)
