"""What the ranks exchange: sums of tensors in every layer, and a few facts at start."""

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
"""Of each exchange. A rank that dies is noticed sooner (`team`); this is for one that hangs.
Loading is not part of an exchange, but waiting for a rank that still loads is."""
POLL_SECONDS = 0.002
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"


class Ranks(Protocol):
    """This rank among all; every method but the attributes is called by all ranks alike."""

    rank: int
    size: int

    @property
    def leads(self) -> bool:
        """Whether it is rank 0, which decides, and adds what is to be added once."""
        ...

    def sum_in_place(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor``, which now is the sum of all ranks' tensors; the same bits on each rank."""
        ...

    def gather(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """On rank 0 the tensors of all ranks, of one shape, in order; empty on others."""
        ...

    def exchange(self, text: str) -> list[str]:
        """Each rank's text, in order. Slow: for facts at start."""
        ...


class Alone:
    """The only rank."""

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


ALONE = Alone()


class TorchRanks:
    """By torch.distributed: NCCL between GPUs, gloo over the loopback interface between CPUs.

    Opens torch's default process group, so there is one at a time in a process.

    Args:
        folder: where the ranks find each other, the same for all; they meet there once.
        watch: called while it waits for others at start; raises if there is no use in waiting.
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
        self._store = FileStore(str(folder / "store"), size)
        self._cuda = cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", LOOPBACK)
        self.exchange("here")  # torch itself would not notice that one has died
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
        """See `Ranks`. Goes through the folder.

        Raises:
            TimeoutError: a rank does not come forward.
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

    def close(self, alone: bool = False) -> None:
        """Leave the process group, as the others do; ``alone``: they are not there to do it."""
        if not (alone and self._cuda):  # NCCL would wait for them; the process ends soon anyway
            dist.destroy_process_group()


def least(ranks: Ranks, number: int) -> int:
    """The smallest of all ranks' numbers."""
    return min(int(text) for text in ranks.exchange(str(number)))


def agree(ranks: Ranks, what: str) -> None:
    """Check that all ranks say the same.

    Raises:
        RuntimeError: they do not; says what each one said.
    """
    said = ranks.exchange(what)
    if len(set(said)) > 1:
        each = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(said))
        raise RuntimeError(f"the ranks differ, so they cannot compute together: {each}")
