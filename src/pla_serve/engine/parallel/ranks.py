"""Communication between ranks: sums of tensors in every layer, and short texts at start."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]

TIMEOUT_SECONDS = 300.0
"""Longest time that an exchange waits for a rank that hangs or still loads. The end of a process
is noticed sooner, by `team`."""
POLL_SECONDS = 0.002
"""Pause between two looks at the texts of other ranks."""
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"


class Ranks(Protocol):
    """This rank and its way to talk to the others. All ranks call the same methods in order."""

    rank: int
    size: int

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which decides, and which adds residuals."""
        ...

    def sum_in_place(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace ``tensor`` by the sum over all ranks, equal bit by bit on each, and return it."""
        ...

    def gather(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return the tensors of all ranks, in order, on rank 0; nothing on others."""
        ...

    def exchange(self, text: str) -> list[str]:
        """Return the texts of all ranks, in order. Slow, so for use at start only."""
        ...

    def before_leaving(self, release: Callable[[], None]) -> None:
        """Have ``release`` called before this rank leaves the others.

        Captured graphs are given up there: NCCL waits for those that use its communicator.
        """
        ...


class Alone:
    """The only rank of a model that is not divided."""

    rank = 0
    size = 1
    leads = True

    def sum_in_place(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Ranks`."""
        return tensor

    def gather(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """See `Ranks`."""
        return [tensor]

    def exchange(self, text: str) -> list[str]:
        """See `Ranks`."""
        return [text]

    def before_leaving(self, release: Callable[[], None]) -> None:
        """See `Ranks`. This rank never leaves."""


ALONE = Alone()


class TorchRanks:
    """Ranks by torch.distributed: NCCL between GPUs, gloo over the loopback device between CPUs.

    This opens torch's default process group, so a process can have one of these at a time.

    Args:
        folder: folder that all ranks share to find each other; it serves for one start.
        watch: called while this rank waits for others at start; it raises if one has ended.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        size: int,
        device: torch.device,
        watch: Callable[[], None] = lambda: None,
    ) -> None:
        self.rank = rank
        self.size = size
        self._watch = watch
        self._exchanges = 0
        self._releases: list[Callable[[], None]] = []
        self._store = FileStore(str(folder / "store"), size)
        self._cuda = cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", LOOPBACK)
        self.exchange("here")  # while torch waits below, it does not notice the end of a rank
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=self._store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=TIMEOUT_SECONDS),
            device_id=device if cuda else None,
        )

    @property
    def leads(self) -> bool:
        """See `Ranks`."""
        return self.rank == 0

    def sum_in_place(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Ranks`."""
        dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """See `Ranks`."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.leads else None
        dist.gather(tensor.contiguous(), parts, dst=0)
        return parts or []

    def exchange(self, text: str) -> list[str]:
        """See `Ranks`. The texts are files in the folder.

        Raises:
            TimeoutError: a rank has given no text within TIMEOUT_SECONDS.
        """
        number = self._exchanges = self._exchanges + 1
        self._store.set(f"{number}/{self.rank}", text)
        deadline = time.monotonic() + TIMEOUT_SECONDS
        found: list[str] = []
        for rank in range(self.size):
            key = f"{number}/{rank}"
            while not self._store.check([key]):
                self._watch()
                if time.monotonic() > deadline:
                    raise TimeoutError(f"rank {rank} has not come within {TIMEOUT_SECONDS:.0f} s")
                time.sleep(POLL_SECONDS)
            found.append(self._store.get(key).decode())
        return found

    def before_leaving(self, release: Callable[[], None]) -> None:
        """See `Ranks`."""
        self._releases.append(release)

    def close(self, alone: bool = False) -> None:
        """Leave the process group; ``alone`` says that the other ranks have ended already."""
        if alone and self._cuda:
            return  # NCCL would wait for them, and so would graphs that wait for their sums
        while self._releases:
            self._releases.pop()()
        dist.destroy_process_group()


def least(ranks: Ranks, number: int) -> int:
    """Return the smallest of the numbers of all ranks."""
    return min(int(text) for text in ranks.exchange(str(number)))


def agree(ranks: Ranks, what: str) -> None:
    """Check that ``what`` is the same text on all ranks.

    Raises:
        RuntimeError: it is not; the message has the text of each rank.
    """
    said = ranks.exchange(what)
    if len(set(said)) > 1:
        each = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(said))
        raise RuntimeError(f"the ranks differ, so they cannot compute together: {each}")
