"""The KV manager against a model that stores every token's prefix in its block."""

from itertools import pairwise

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pla_serve.engine.kv.blocks import BlockPool
from pla_serve.engine.kv.manager import BlockTable, KVManager

BLOCK = 4
BLOCKS = 12
# Two token values make shared and diverging prefixes common.
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=BLOCK * 5)


class ManagerMachine(RuleBasedStateMachine):
    """``contents[block]`` is the scope and the exact prefix whose KV was written there."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = KVManager(BLOCKS, BLOCK)
        self.contents: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.live: list[tuple[list[int], BlockTable]] = []

    def write(self, tokens: list[int], table: BlockTable, start: int) -> None:
        for index in range(start // BLOCK, len(table.blocks)):
            self.contents[table.blocks[index]] = (table.scope, tuple(tokens[: (index + 1) * BLOCK]))

    def check_readable(self, tokens: list[int], table: BlockTable, count: int) -> None:
        for index in range(count // BLOCK):
            own = (table.scope, tuple(tokens[: (index + 1) * BLOCK]))
            assert self.contents[table.blocks[index]] == own

    @rule(
        tokens=TOKENS,
        scope=st.sampled_from(("", "a", "b")),
        spare=st.integers(0, 3),
        remember=st.booleans(),
    )
    def start(self, tokens: list[int], scope: str, spare: int, remember: bool) -> None:
        table = BlockTable(scope=scope)
        before = self.kv.available
        expected = self.kv.cached_prefix(tokens, scope)
        cached = self.kv.reserve(tokens, table, spare=spare)
        if cached is None:
            assert not table.blocks
            assert self.kv.available == before
            return
        assert cached == expected < len(tokens)
        self.check_readable(tokens, table, cached)
        self.write(tokens, table, cached)
        if remember:
            self.kv.remember(tokens, len(tokens), table)
        self.live.append((tokens, table))

    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        if self.live:
            tokens, table = data.draw(st.sampled_from(self.live))
            if self.kv.grow(table, len(tokens) + 1):
                tokens.append(data.draw(st.integers(0, 1)))
                self.write(tokens, table, len(tokens) - 1)
                in_use, own = data.draw(st.booleans()), list(table.blocks)
                self.kv.remember(tokens, len(tokens), table, in_use=in_use)
                assert not in_use or table.blocks == own, "a batch reads these"
            else:
                assert self.kv.available == 0

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        if self.live:
            index = data.draw(st.integers(0, len(self.live) - 1))
            _, table = self.live.pop(index)
            self.kv.release(table)
            assert not table.blocks

    @invariant()
    def nothing_lost_or_overwritten(self) -> None:
        for tokens, table in self.live:
            assert len(table.blocks) == -(-len(tokens) // BLOCK)
            self.check_readable(tokens, table, len(tokens))
            runs = table.runs()
            assert [b for first, end in runs for b in range(first, end)] == table.blocks
            assert all(a[1] != b[0] for a, b in pairwise(runs))
        held = {block for _, table in self.live for block in table.blocks}
        assert self.kv.available == BLOCKS - len(held)

    @invariant()
    def each_block_is_offered_for_eviction_once(self) -> None:
        offered = [block for _, block in self.kv._tree._leaves]
        assert len(offered) == len(set(offered))
        assert set(offered) <= set(self.kv._tree._by_block)

    def teardown(self) -> None:
        for _, table in self.live:
            self.kv.release(table)
        assert self.kv.available == BLOCKS
        everything = BlockTable()
        assert self.kv.reserve([7] * (BLOCKS * BLOCK), everything) == 0


TestManager = ManagerMachine.TestCase
TestManager.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_finished_answer_is_found_by_the_next_turn() -> None:
    kv = KVManager(BLOCKS, BLOCK)
    table = BlockTable()
    turn = list(range(10))
    assert kv.reserve(turn, table) == 0
    kv.remember(turn, 10, table)
    answer = [*turn, 10, 11]
    assert kv.grow(table, 12)
    kv.remember(answer, 12, table)
    kv.release(table)
    assert kv.cached_prefix([*answer, 12], "") == 12
    assert kv.cached_prefix(answer, "") == 8, "the last token is always left to compute"


def test_a_table_in_use_keeps_its_blocks_and_is_cached_afterwards() -> None:
    kv = KVManager(BLOCKS, BLOCK)
    one, two = BlockTable(), BlockTable()
    text = list(range(3 * BLOCK))
    assert kv.reserve(text[:BLOCK], one) == kv.reserve(text, two) == 0
    kv.remember(text[:BLOCK], BLOCK, one)
    own = list(two.blocks)
    kv.remember(text, len(text), two, in_use=True)
    assert two.blocks == own
    assert kv.cached_prefix([*text, 1], "") == BLOCK, (
        "what follows on a block of its own waits with it"
    )
    kv.remember(text, len(text), two)
    assert two.blocks == [*one.blocks, *own[1:]]
    assert kv.cached_prefix([*text, 1], "") == 3 * BLOCK


def test_least_recently_used_prefix_goes_first() -> None:
    kv = KVManager(4, BLOCK)
    for value in (0, 1):
        table = BlockTable()
        kv.reserve([value] * 8, table)
        kv.remember([value] * 8, 8, table)
        kv.release(table)
    again = BlockTable()
    assert kv.reserve([0] * 9, again) is not None
    kv.release(again)
    kv.release(table)
    other = BlockTable()
    assert kv.reserve([2] * 5, other) == 0
    assert kv.cached_prefix([0] * 9, "") == 8
    assert kv.cached_prefix([1] * 9, "") <= 4


class CountedTokens(list[int]):
    """Counts how often blocks of it are looked at."""

    looks = 0

    def __getitem__(self, index: object) -> object:
        self.looks += 1
        return super().__getitem__(index)


def test_remembering_costs_what_is_new_however_long_the_context() -> None:
    kv = KVManager(BLOCKS * 10, BLOCK)
    tokens = CountedTokens(range(BLOCK * BLOCKS * 8))
    table = BlockTable()
    assert kv.reserve(tokens, table) == 0
    kv.remember(tokens, len(tokens) - BLOCK, table)
    tokens.looks = 0
    kv.remember(tokens, len(tokens), table)
    assert tokens.looks == 1
    assert kv.cached_prefix([*tokens, 1], "") == len(tokens)


def test_what_was_given_back_last_is_evicted_last_whoever_began_first() -> None:
    kv = KVManager(6, BLOCK)
    tables = [BlockTable(), BlockTable()]
    for value, table in enumerate(tables):
        kv.reserve([value] * 8, table)
        kv.remember([value] * 8, 8, table)
    kv.release(tables[1])
    kv.release(tables[0])
    kv.reserve([2] * 16, BlockTable())
    assert (kv.cached_prefix([0] * 9, ""), kv.cached_prefix([1] * 9, "")) == (8, 0)


def test_sequences_leave_each_other_room_to_grow() -> None:
    pool = BlockPool(64)
    tables = [pool.allocate(2, room=8) for _ in range(3)]
    for _ in range(8):
        for table in tables:
            table += pool.allocate(1, after=table[-1], room=8)
    for table in tables:
        assert table == list(range(table[0], table[0] + 10)), "one run each"


def test_a_crowded_pool_gives_what_it_has_in_pieces() -> None:
    pool = BlockPool(8)
    blocks = pool.allocate(8)
    pool.release(blocks[1::2])
    assert sorted(pool.allocate(4, room=8)) == blocks[1::2]
    assert pool.free == 0
