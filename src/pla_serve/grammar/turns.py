"""A queue in which tenants take turns."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """First come first served within a tenant; after one item of a tenant come all other tenants.

    Example: after ``add("a", 1); add("a", 2); add("b", 3)`` the items come as 1, 3, 2.
    """

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[T]] = OrderedDict()
        """None is empty; the tenant whose turn is next comes first."""

    def count(self, tenant: str) -> int:
        """Items of a tenant that wait."""
        return len(self._queues.get(tenant, ()))

    def add(self, tenant: str, item: T) -> None:
        self._queues.setdefault(tenant, deque()).append(item)

    def take(self, not_of: Collection[str] = ()) -> T | None:
        """The next item of a tenant that is none of these; None if there is none."""
        tenant = next((name for name in self._queues if name not in not_of), None)
        if tenant is None:
            return None
        queue = self._queues[tenant]
        item = queue.popleft()
        self._queues.move_to_end(tenant)
        if not queue:
            del self._queues[tenant]
        return item

    def __len__(self) -> int:
        """Items that wait, of all tenants."""
        return sum(len(queue) for queue in self._queues.values())

    def put_back(self, tenant: str, item: T) -> None:
        """Undo `take`: the item is the next one again."""
        self._queues.setdefault(tenant, deque()).appendleft(item)
        self._queues.move_to_end(tenant, last=False)

    def remove(self, tenant: str, item: T) -> None:
        """Take an item out, if it is there."""
        queue = self._queues.get(tenant)
        if queue is not None and item in queue:
            queue.remove(item)
            if not queue:
                del self._queues[tenant]

    def clear(self) -> list[T]:
        """Take everything out."""
        items = [item for queue in self._queues.values() for item in queue]
        self._queues.clear()
        return items
