"""Settings: ``--additional-config '{"pla_serve": {"long_share": 0.3}}'``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.step_length import SPARE_SHARE

SECTION = "pla_serve"
VLLM_KEYS = frozenset(
    {
        "gdn_prefill_backend",
        "kda_prefill_backend",
        "kda_prefill_checkpoint",
        "kda_decode_backend",
        "kda_spec_decode_backend",
    }
)
"""Keys that vLLM itself reads from ``--additional-config``, in the supported versions."""


@dataclass(frozen=True, slots=True)
class PluginOptions:
    """The section ``pla_serve`` of ``--additional-config``.

    Raises:
        ValueError: a value is out of range or of the wrong type; the message names the key.
    """

    boundary_tokens: int | None = None
    """At most this many uncached tokens are short. Null: fitted to the machine, 256 to 1,024."""
    long_share: float = 0.5
    """Share of the time that waiting longs are guaranteed, between 0 and 1."""
    express_burst_seconds: float | None = None
    """Seconds that shorts may run ahead of that. Null: twice the time of 256 tokens."""
    patience: float = 400.0
    """Patience: how long shorter prefills may pass a long one; 0 is the order of arrival."""
    step_seconds: float | None = None
    """Most seconds of a step of long work while shorts come. Null: chosen from their rate, the
    cost of a launch and the time that the machine has to spare."""
    spare_share: float = SPARE_SHARE
    """Share of that spare time for what small steps add, 0 to 1. Less of it gives longs a better
    tail, and shorts a worse one."""

    def __post_init__(self) -> None:
        for name, whole in _NUMBERS.items():
            value = getattr(self, name)
            if value is None and name not in _REQUIRED:
                continue
            kinds = (int,) if whole else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds):
                kind = "a whole number" if whole else "a number"
                raise ValueError(f"{SECTION}.{name} must be {kind}, not {value!r}")
        step = self.step_seconds
        if step is not None and not (step > 0 and isfinite(step)):
            raise ValueError(f"{SECTION}.step_seconds must be positive and finite, not {step}")
        if not 0 <= self.spare_share <= 1:
            raise ValueError(
                f"{SECTION}.spare_share must lie between 0 and 1, not {self.spare_share}"
            )
        try:
            self.policy(1, 1)
        except ValueError as error:
            raise ValueError(f"{SECTION}.{error}") from None

    def policy(self, batch_tokens: int, batch_requests: int) -> PolicyConfig:
        """Settings of the policy for steps of at most so many tokens and requests."""
        return PolicyConfig(
            max_batch_tokens=batch_tokens,
            max_batch_requests=batch_requests,
            boundary_tokens=self.boundary_tokens,
            long_share=self.long_share,
            express_burst_seconds=self.express_burst_seconds,
            patience=self.patience,
            interruptible=False,
        )


_NUMBERS = {
    "boundary_tokens": True,
    "long_share": False,
    "express_burst_seconds": False,
    "patience": False,
    "step_seconds": False,
    "spare_share": False,
}
"""Every option, and whether it is a whole number."""
_REQUIRED = ("long_share", "patience", "spare_share")


def read_options(additional: object, *, foreign_keys: bool = False) -> PluginOptions:
    """The options in vLLM's ``additional_config``.

    Args:
        additional: the parsed JSON.
        foreign_keys: whether other sections may belong to somebody else (a hardware plugin).

    Raises:
        ValueError: something is unknown or does not fit; the message says what and what there is.
    """
    if not isinstance(additional, Mapping):
        raise ValueError("--additional-config must be a JSON object for this scheduler to read it")
    known = [field.name for field in fields(PluginOptions)]
    for key in additional:
        if key == SECTION or key in VLLM_KEYS:
            continue
        if key in known:
            raise ValueError(
                f"{key} in --additional-config belongs into its section: "
                f'{{"{SECTION}": {{"{key}": ...}}}}'
            )
        if not foreign_keys:
            raise ValueError(
                f"nobody reads {key!r} in --additional-config; this scheduler's section is "
                f"{SECTION!r}"
            )
    section: Any = additional.get(SECTION, {})
    if not isinstance(section, Mapping):
        raise ValueError(f"{SECTION} in --additional-config must be an object, not {section!r}")
    unknown = [key for key in section if key not in known]
    if unknown:
        raise ValueError(
            f"{SECTION} in --additional-config has no option {unknown[0]!r}; "
            f"it has: {', '.join(known)}"
        )
    return PluginOptions(**section)
