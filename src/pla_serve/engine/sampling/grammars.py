"""What a sampler needs of grammars. Their code runs elsewhere, so an answer may be late."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from pla_serve.wire.engine import Grammar


class GrammarFollower(Protocol):
    """One sequence's place in its grammar."""

    eos_token_ids: frozenset[int]
    """Ids that end the text."""
    error: str | None
    """Why it cannot go on, for the client; None while it can."""
    finished: bool
    """The last token completed the text, and nothing can be added. Known once ``settled``."""
    must_stop: bool
    """As ``finished``, or the mask allows nothing but an end. Known once ``ready``."""

    @property
    def settled(self) -> bool:
        """What the last token did is known, and with it ``error`` and ``finished``."""
        ...

    @property
    def ready(self) -> bool:
        """The mask of the next token is there, or an error. Never without ``settled``."""
        ...

    def advance(self, token: int) -> None:
        """Go past ``token``, which the mask allowed and which is no EOS; does not wait for it."""
        ...

    def close(self) -> None:
        """The text has ended, at whatever point; may be called again."""
        ...


class Grammars(Protocol):
    """Makes followers, and waits for them a little."""

    def start(self, grammar: Grammar) -> GrammarFollower:
        """A follower at the start of its text.

        Raises:
            GrammarError: what is wrong, for the client. What shows later is in its ``error``.
        """
        ...

    def open(self, follower: GrammarFollower) -> None:
        """Have its grammar compiled, and go past the tokens that were made already.

        It is done sooner or later anyway; this says that no more such tokens come at once.
        """
        ...

    def settle(self, followers: Sequence[GrammarFollower]) -> None:
        """Give followers a few milliseconds to become ``settled``; some may not."""
        ...

    def prepare(self, followers: Sequence[GrammarFollower]) -> None:
        """Give followers a few milliseconds to become ``ready``; some may not."""
        ...

    def masks(self, followers: Sequence[GrammarFollower]) -> torch.Tensor:
        """(len(followers), words) int32 on the CPU: bit i of word w allows token 32 * w + i.

        Only of ones that are ``ready``; one with an ``error`` allows nothing.
        """
        ...

    def poll(self) -> None:
        """Take the answers that have come; never waits."""
        ...

    def close(self) -> None:
        """End all processes that it has started."""
        ...


def as_masks(rows: Sequence[bytes]) -> torch.Tensor:
    """(len(rows), words) int32 of masks of the same number of bytes, a multiple of 4."""
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
