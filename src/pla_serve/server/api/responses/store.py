"""Answers that are kept, so that clients can ask for them and continue them.

Each answer holds its turn of the conversation, and that holds the turn before it. So a conversation
of many turns is kept once, and stays as long as any answer of it does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

ENTRY_BYTES = 1024
"""Bytes that each answer counts for besides its texts."""


class Turn:
    """Items that one request added to a conversation: its input, and the answer's output.

    Attributes:
        before: the turn that it continues; None: it is the first.
        items: JSON of a list of items.
        size: bytes of the items of this turn and of all before it.
    """

    __slots__ = ("before", "holders", "items", "size")

    def __init__(self, before: Turn | None, items: bytes) -> None:
        self.before = before
        self.items = items
        self.size: int = len(items) + (before.size if before else 0)
        self.holders = 0

    def conversation(self) -> list[bytes]:
        """Return the items of all turns up to this one, the first turn first."""
        return [turn.items for turn in self._back()][::-1]

    def hold(self) -> int:
        """Count one more holder (an answer, or a later turn); return the bytes that it adds."""
        added = 0
        for turn in self._back():
            turn.holders += 1
            if turn.holders > 1:
                break
            added += len(turn.items)
        return added

    def release(self) -> int:
        """Count one holder less; return the bytes that nobody needs any more."""
        freed = 0
        for turn in self._back():
            turn.holders -= 1
            if turn.holders:
                break
            freed += len(turn.items)
        return freed

    def _back(self) -> Iterator[Turn]:
        turn: Turn | None = self
        while turn is not None:
            yield turn
            turn = turn.before


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """One answer that is over.

    Attributes:
        body: JSON of the answer.
        turn: its turn of the conversation.
        inputs: number of items of the turn that are input; those that follow are output.
        background: the client did not wait for it.
        can_continue: it ended as an answer that another request may continue.
    """

    body: bytes
    turn: Turn
    inputs: int
    background: bool
    can_continue: bool


@dataclass(slots=True)
class _Kept:
    answer: StoredAnswer
    used: float


class _Shelf:
    """Answers of one tenant, the least recently used one first."""

    def __init__(self) -> None:
        self.answers: OrderedDict[str, _Kept] = OrderedDict()
        self.bytes = 0

    def add(self, id: str, kept: _Kept) -> None:
        self.answers[id] = kept
        self.bytes += ENTRY_BYTES + len(kept.answer.body) + kept.answer.turn.hold()

    def remove(self, id: str) -> None:
        kept = self.answers.pop(id)
        self.bytes -= ENTRY_BYTES + len(kept.answer.body) + kept.answer.turn.release()


class ResponseStore:
    """Keeps the answers of all tenants, within bounds of number, size and time.

    Where there is no room, the tenant that holds most loses its least recently used answer. A store
    belongs to one event loop.

    Args:
        most_answers: how many answers are kept.
        most_bytes: bytes of all of them, texts and conversations; 0 keeps nothing.
        seconds: how long an answer is kept after its last use.
        clock: monotonic seconds.

    Example:

        store = ResponseStore(1000, 2**26, 3600.0)
        store.put("key-0", "resp_1", answer)     # True: it is kept
        store.get("key-1", "resp_1")             # None: it belongs to another tenant
    """

    def __init__(
        self, most_answers: int, most_bytes: int, seconds: float, clock: Callable[[], float]
    ) -> None:
        self._most_answers = most_answers
        self._most_bytes = most_bytes
        self._seconds = seconds
        self._clock = clock
        self._shelves: dict[str, _Shelf] = {}

    @property
    def bytes(self) -> int:
        """Bytes that all answers count for."""
        return sum(shelf.bytes for shelf in self._shelves.values())

    def __len__(self) -> int:
        return sum(len(shelf.answers) for shelf in self._shelves.values())

    def takes(self, size: int) -> bool:
        """Whether an answer of so many bytes, with its whole conversation, is kept at all."""
        return ENTRY_BYTES + size <= self._most_bytes

    def put(self, tenant: str, id: str, answer: StoredAnswer) -> bool:
        """Keep an answer; False if it is too large."""
        if not self.takes(len(answer.body) + answer.turn.size):
            return False
        self._expire()
        self._shelves.setdefault(tenant, _Shelf()).add(id, _Kept(answer, self._clock()))
        while len(self) > self._most_answers:
            self._drop_one(max(self._shelves, key=lambda name: len(self._shelves[name].answers)))
        while self.bytes > self._most_bytes:
            self._drop_one(max(self._shelves, key=lambda name: self._shelves[name].bytes))
        return self.get(tenant, id) is not None

    def get(self, tenant: str, id: str) -> StoredAnswer | None:
        """Return a tenant's own answer, and keep it for longer; None: there is none."""
        self._expire()
        shelf = self._shelves.get(tenant)
        kept = shelf.answers.get(id) if shelf else None
        if shelf is None or kept is None:
            return None
        kept.used = self._clock()
        shelf.answers.move_to_end(id)
        return kept.answer

    def delete(self, tenant: str, id: str) -> bool:
        """Forget a tenant's own answer; False: there was none."""
        if self.get(tenant, id) is None:
            return False
        self._remove(tenant, id)
        return True

    def _drop_one(self, tenant: str) -> None:
        self._remove(tenant, next(iter(self._shelves[tenant].answers)))

    def _remove(self, tenant: str, id: str) -> None:
        shelf = self._shelves[tenant]
        shelf.remove(id)
        if not shelf.answers:
            del self._shelves[tenant]

    def _expire(self) -> None:
        oldest = self._clock() - self._seconds
        for tenant in list(self._shelves):
            while (shelf := self._shelves.get(tenant)) is not None:
                if next(iter(shelf.answers.values())).used > oldest:
                    break
                self._drop_one(tenant)
