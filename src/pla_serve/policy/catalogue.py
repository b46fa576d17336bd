"""Every policy by name, and its knobs. A new one is a file of its own and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from pla_serve.policy.baselines.bucketserve import BucketOptions, bucketserve
from pla_serve.policy.baselines.fastserve import FastServe, FeedbackOptions
from pla_serve.policy.baselines.fcfs import fcfs
from pla_serve.policy.baselines.flowprefill import FlowOptions, FlowPrefill
from pla_serve.policy.baselines.hrrn import hrrn
from pla_serve.policy.baselines.laps import Laps, LapsOptions
from pla_serve.policy.baselines.srpt import SrptOptions, srpt
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.length_aware import LengthAware
from pla_serve.policy.protocol import PrefillPolicy

BATCH = ("max_batch_tokens", "max_batch_requests")
"""Fields of `PolicyConfig` that bound a batch."""
CONTINUOUS = (*BATCH, "long_chunk_tokens", "boundary_tokens")
"""Those of a baseline; its boundary is for metrics only."""


@dataclass(frozen=True, slots=True)
class PolicyKind:
    """How to make a policy, and what can be set about it."""

    make: Callable[..., PrefillPolicy]
    """Called with `PolicyConfig`, `CostModel` and, where there are any, the options."""
    settings: tuple[str, ...]
    """The fields of `PolicyConfig` that it uses."""
    options: type | None = None
    """A frozen dataclass, every field with a default: knobs that no other policy has."""


POLICIES: Mapping[str, PolicyKind] = MappingProxyType(
    {
        "length-aware": PolicyKind(LengthAware, tuple(f.name for f in fields(PolicyConfig))),
        "fcfs": PolicyKind(fcfs, CONTINUOUS),
        "hrrn": PolicyKind(hrrn, CONTINUOUS),
        "srpt": PolicyKind(srpt, CONTINUOUS, SrptOptions),
        "laps": PolicyKind(Laps, ("max_batch_requests", "boundary_tokens"), LapsOptions),
        "bucketserve": PolicyKind(bucketserve, CONTINUOUS, BucketOptions),
        "fastserve": PolicyKind(FastServe, CONTINUOUS, FeedbackOptions),
        "flowprefill": PolicyKind(FlowPrefill, CONTINUOUS, FlowOptions),
    }
)
