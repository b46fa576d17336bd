"""A prefix tree with scopes is as many trees as there are scopes, in one memory."""

from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.engine.kv.blocks import BlockPool
from pla_serve.engine.kv.manager import BlockTable, KVManager
from pla_serve.engine.kv.prefix import PrefixTree

BLOCK = 2
SCOPES = ("", "a", "b", "ab")
TOKENS = st.lists(st.integers(0, 1), min_size=BLOCK, max_size=BLOCK * 5)


class Tree:
    """A tree in a memory of its own, which is never full."""

    def __init__(self) -> None:
        self.pool = BlockPool(2000)
        self.tree = PrefixTree(self.pool, BLOCK)

    def use(self, tokens: list[int], scope: str) -> int:
        """Run a sequence from its prefill to its end; returns the blocks found in the cache."""
        whole = len(tokens) // BLOCK
        blocks = self.tree.hold(tokens, len(tokens), scope)
        found = len(blocks)
        blocks += self.pool.allocate(whole - found)
        self.tree.insert(tokens, blocks, found, whole, scope)
        self.tree.release(blocks)
        return found


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(SCOPES), TOKENS), max_size=40))
def test_one_tree_with_scopes_finds_what_a_tree_for_each_scope_finds(
    used: list[tuple[str, list[int]]],
) -> None:
    one, each = Tree(), defaultdict[str, Tree](Tree)
    for scope, tokens in used:
        assert one.use(tokens, scope) == each[scope].use(tokens, "")
    assert len(one.tree) == sum(len(own.tree) for own in each.values())
    for scope in SCOPES:
        for _, tokens in used:
            blocks = one.tree.match(tokens, len(tokens), scope)
            assert len(blocks) == len(each[scope].tree.match(tokens, len(tokens), ""))


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from(SCOPES), TOKENS), max_size=30),
    st.lists(st.integers(1, 4), max_size=5),
)
def test_eviction_takes_from_all_scopes_and_mixes_none(
    used: list[tuple[str, list[int]]], evicted: list[int]
) -> None:
    one = Tree()
    known = defaultdict[str, set[tuple[int, ...]]](set)
    for scope, tokens in used:
        one.use(tokens, scope)
        known[scope] |= {tuple(tokens[: end * BLOCK]) for end in range(len(tokens) // BLOCK + 1)}
    for count in evicted:
        blocks = len(one.tree)
        assert one.tree.evict(count) == min(count, blocks)
    owners: dict[int, str] = {}
    for scope in SCOPES:
        for _, tokens in used:
            blocks = one.tree.match(tokens, len(tokens), scope)
            assert not blocks or tuple(tokens[: len(blocks) * BLOCK]) in known[scope]
            assert all(owners.setdefault(block, scope) == scope for block in blocks)
    one.tree.evict(len(one.tree))
    assert one.pool.free == one.pool.count


def test_a_table_caches_in_its_scope_and_in_no_other() -> None:
    kv = KVManager(20, BLOCK)
    tokens = list(range(8))
    table = BlockTable(scope="a")
    assert kv.reserve(tokens, table) == 0
    kv.remember(tokens, len(tokens), table)
    kv.release(table)
    assert [kv.cached_prefix([*tokens, 1], scope) for scope in ("a", "b", "")] == [8, 0, 0]
    assert [len(kv.pin_cached(tokens, scope)) for scope in ("b", "", "a")] == [0, 0, 4]
    other = BlockTable(scope="b")
    assert kv.reserve([*tokens, 1], other) == 0
