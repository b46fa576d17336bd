"""Interface of the sampler to grammars, whose code runs elsewhere and may answer late."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from pla_serve.wire.engine import Grammar


class GrammarFollower(Protocol):
    """State of one sequence within its grammar."""

    eos_token_ids: frozenset[int]
    """Ids that end the text."""
    error: str | None
    """Message for the client if the text cannot be continued; None while it can."""
    finished: bool
    """Whether the last token completed the text, so that nothing can follow. Valid once
    ``settled``."""
    must_stop: bool
    """Whether only an EOS token can follow. Valid once ``ready``."""

    @property
    def settled(self) -> bool:
        """Whether the effect of the last token is known: ``error`` and ``finished`` are valid."""
        ...

    @property
    def lags(self) -> bool:
        """Whether masks have often been late, and the next one is not there yet: batches had better
        go on without the sequence."""
        ...

    @property
    def ready(self) -> bool:
        """Whether the mask of the next token has arrived, or an error. Implies ``settled``."""
        ...

    def advance(self, token: int) -> None:
        """Append ``token``, which the mask allowed and which is not EOS. Returns at once."""
        ...

    def close(self) -> None:
        """End the follower, at any point of its text. Repeated calls do nothing."""
        ...


class Grammars(Protocol):
    """Makes followers of grammars, and returns their masks."""

    def start(self, grammar: Grammar, tenant: str = "") -> GrammarFollower:
        """Return a follower at the start of its text.

        Args:
            tenant: owner of the request; tenants share workers, and the time that is waited.

        Raises:
            GrammarError: the grammar is refused; the message is for the client. Faults that show
                later are in `GrammarFollower.error`.
        """
        ...

    def open(self, follower: GrammarFollower) -> None:
        """Begin to compile the grammar of a follower, and replay the tokens that it has already.

        Call it once these tokens are complete. Otherwise the first `settle` or `prepare` does it.
        """
        ...

    def settle(self, followers: Sequence[GrammarFollower]) -> None:
        """Wait a few milliseconds for the followers to become ``settled``; some may not.

        The time of all waits is bounded together, so that there may be no wait at all.
        """
        ...

    def prepare(self, followers: Sequence[GrammarFollower]) -> None:
        """Wait like `settle` for the followers to become ``ready``; some may not."""
        ...

    def masks(self, followers: Sequence[GrammarFollower]) -> torch.Tensor:
        """Return the masks of ``ready`` followers: (len(followers), words) int32 on the CPU.

        Bit i of word w allows token 32 * w + i. After an error no token is allowed.
        """
        ...

    def poll(self) -> None:
        """Send what followers have been told, and take the answers that have arrived."""
        ...

    def close(self) -> None:
        """End all worker processes."""
        ...


def as_masks(rows: Sequence[bytes]) -> torch.Tensor:
    """Join masks of the same size, a multiple of 4 bytes, to a tensor (len(rows), words) int32."""
    if not rows:
        return torch.empty(0, 0, dtype=torch.int32)
    joined = torch.frombuffer(bytearray().join(rows), dtype=torch.int32)
    return joined.view(len(rows), -1)


def forbid(logits: torch.Tensor, rows: torch.Tensor, masks: torch.Tensor) -> None:
    """Set the logits of tokens that the masks do not allow to -inf, in place.

    Args:
        logits: (n, vocab) float32.
        rows: (g,) int64, the rows that have a grammar.
        masks: (g, words) int32 from `Grammars.masks`, on any device.
    """
    vocab = logits.shape[1]
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    words = masks.to(logits.device, non_blocking=True).unsqueeze(2)
    allowed = ((words >> shifts) & 1).flatten(1)[:, :vocab].bool()
    logits[rows] = logits[rows].masked_fill(~allowed, -torch.inf)
