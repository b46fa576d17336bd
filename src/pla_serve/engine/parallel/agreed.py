"""Captures shapes on all ranks, or on none if one of them fails."""

from __future__ import annotations

from pla_serve.engine.device.capture import Capturer, FixedPass, WarmUpFailed
from pla_serve.engine.parallel.ranks import Ranks


class Unagreed(Exception):
    """Raised when a rank fails while the others wait for it, so that it can only end."""


class AgreedCapture:
    """Wraps the capturer of each rank, so that either all ranks have a shape or none has."""

    def __init__(self, capturer: Capturer, ranks: Ranks) -> None:
        self._capturer = capturer
        self._ranks = ranks

    def capture(self, run: FixedPass) -> FixedPass:
        """See `Capturer`.

        Raises:
            RuntimeError: the capture failed on some rank.
            Unagreed: a pass before the capture failed. The other ranks may wait in a sum of that
                pass, so they cannot be asked.
        """
        made: FixedPass | None = None
        said = ""
        try:
            made = self._capturer.capture(run)
        except WarmUpFailed as error:
            raise Unagreed(f"a pass before a capture failed: {error}") from error
        except RuntimeError as error:
            said = f"{type(error).__name__}: {error}"
        reasons = [(rank, text) for rank, text in enumerate(self._ranks.exchange(said)) if text]
        if reasons or made is None:
            raise RuntimeError("; ".join(f"rank {rank}: {text}" for rank, text in reasons))
        return made

    def bytes_held(self) -> int:
        """See `Capturer`."""
        return self._capturer.bytes_held()

    def release(self) -> None:
        """See `Capturer`."""
        self._capturer.release()
