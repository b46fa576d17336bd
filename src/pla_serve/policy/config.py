"""Settings that scheduling policies share; one object, so that a comparison changes one field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pla_serve.policy.knobs import Knob, check_knobs


def read_target(text: str) -> float | None:
    """Read milliseconds, or ``auto`` as None.

    Raises:
        ValueError: the text is neither.
    """
    if text.lower() in ("auto", "none"):
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"itl-slo-ms is a number of milliseconds or auto, not {text!r}") from None


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """Settings shared by all policies. Each policy declares which fields it uses.

    Example: ``PolicyConfig(max_batch_tokens=512)`` is what vLLM calls
    ``--max-num-batched-tokens 512``.

    Raises:
        ValueError: a field is out of range; the message names the field and the range.
    """

    max_batch_tokens: Annotated[
        int,
        Knob("Most tokens in one batch, prefill and decode together.", unit="tokens", least=1),
    ] = 2048
    max_batch_requests: Annotated[
        int, Knob("Most requests in one batch.", unit="requests", least=1)
    ] = 64
    long_chunk_tokens: Annotated[
        int | None,
        Knob(
            "Most tokens of one request in one batch. None: length-aware chooses by its cost "
            "model, all others are only bounded by max_batch_tokens.",
            unit="tokens",
            least=1,
        ),
    ] = None
    boundary_tokens: Annotated[
        int | None,
        Knob(
            "L_m: a prefill of at most this many new tokens is short. None: fitted while serving.",
            unit="tokens",
            least=0,
        ),
    ] = None
    long_share: Annotated[
        float,
        Knob(
            "Share of the device's time that waiting long prefills are guaranteed.",
            above=0,
            below=1,
        ),
    ] = 0.5
    express_burst_seconds: Annotated[
        float | None,
        Knob(
            "How far express work (short prefills and decode steps) may run ahead of long_share "
            "before long prefills get their turn. None: twice the time of a prefill of 256 "
            "tokens, so that the classes take turns quickly.",
            unit="seconds",
            least=0,
        ),
    ] = None
    express_wait_seconds: Annotated[
        float,
        Knob(
            "Longest time that a short prefill is held back, while long prefills wait, for other "
            "shorts to share its launch. It is held only where that is predicted to pay; at light "
            "load never.",
            unit="seconds",
            least=0,
        ),
    ] = 0.005
    itl_slo_ms: Annotated[
        float | None,
        Knob(
            "Target for the time between two tokens of an answer (TPOT), for requests that name "
            "none. Longs are slowed by what keeping it costs, down to long_share. auto: so that "
            "streams take a seventh of the time beside longs.",
            unit="milliseconds",
            least=1,
            most=1e6,
            read=read_target,
        ),
    ] = None
    patience: Annotated[
        float,
        Knob(
            "How long a long prefill may be passed by others with less left to compute: by those "
            "that arrive within patience * sqrt(seconds left * seconds of a full batch) after it. "
            "0 is first come, first served. More of it gives a lower mean and a longer wait of "
            "the longest prefills.",
            least=0,
        ),
    ] = 400.0
    interruptible: Annotated[
        bool,
        Knob(
            "Whether the executor asks at layer boundaries. If not, length-aware keeps chunks as "
            "short as the machine's spare time allows."
        ),
    ] = True
    layers: Annotated[
        int | None,
        Knob(
            "Decoder layers of the model: equal parts of a forward pass between which the "
            "executor asks. length-aware bounds the time of one by it; None sets no bound.",
            unit="layers",
            least=1,
        ),
    ] = None

    @property
    def max_chunk_tokens(self) -> int:
        """Most tokens of one request in one batch, by both limits."""
        return min(self.long_chunk_tokens or self.max_batch_tokens, self.max_batch_tokens)

    def __post_init__(self) -> None:
        check_knobs(self)
