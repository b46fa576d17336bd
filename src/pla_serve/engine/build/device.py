"""Stage 4: how batches reach the device, and how long they are expected to take there."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from pla_serve.engine.batch.staging import DirectUploader, PinnedUploader, Uploader
from pla_serve.engine.build.model import RankModel
from pla_serve.engine.build.roofline import measure, starting_profile
from pla_serve.engine.build.settings import RankSettings
from pla_serve.engine.build.stored_profile import ProfileStore, profile_key
from pla_serve.engine.device.marks import Device, device_of
from pla_serve.engine.device.run_ahead import RunAhead
from pla_serve.engine.loading.cache import cache_root
from pla_serve.policy.cost import CostModel, CostProfile


@dataclass(frozen=True, slots=True)
class RankDevice:
    """Access to one rank's device, and predictions of its speed."""

    device: Device
    """Records marks in the device's stream of work."""
    uploader: Uploader
    """Copies batches to the device."""
    run_ahead: RunAhead | None
    """Bound on the layers that the host enqueues ahead. None if the host computes itself."""
    cost: CostModel
    """Predicts the time of batches. Rank 0 fits it to what batches took."""
    capture_cost: CostModel
    """Prices the shapes to capture. All ranks choose the same shapes, so with several ranks this
    is a model of its own that nothing is fitted to."""
    store: ProfileStore | None
    """Keeps the cost profile for the next start. Only rank 0 of an engine on a CPU has one."""
    stored: bool
    """Whether ``cost`` starts with the profile that an earlier start has stored."""

    def capture_seconds(self, tokens: int, requests: int) -> float:
        """Return the predicted time of a captured shape of so many tokens and requests."""
        return self.capture_cost.work_seconds(tokens, 0.0, tokens, requests, 1)


def build_device(settings: RankSettings, model: RankModel) -> RankDevice:
    """Measure what the device can do, and make what copies batches to it."""
    profile, store = _profile(settings, model)
    device = device_of(settings.device)
    stored = store.read() if store is not None else None
    cost = stored or CostModel(profile)
    return RankDevice(
        device=device,
        uploader=PinnedUploader(device) if settings.on_cuda else DirectUploader(settings.device),
        run_ahead=(
            RunAhead(device, settings.config.run_ahead_layers) if device.asynchronous else None
        ),
        cost=cost,
        capture_cost=cost if settings.ranks.size == 1 else CostModel(profile),
        store=store,
        stored=stored is not None,
    )


def _profile(settings: RankSettings, model: RankModel) -> tuple[CostProfile, ProfileStore | None]:
    """Return the roofline of this model on this device, which rank 0 measures for all ranks.

    Rank 0 of an engine on a CPU also gets the store of what was measured beyond that.
    """
    text, store = "", None
    if settings.ranks.leads:
        ceilings = measure(settings.device, settings.dtype, settings.clock)
        profile = starting_profile(model.size, ceilings)
        if settings.device.type == "cpu" and settings.config.stored_profile:
            folder = cache_root() / "profiles"
            store = ProfileStore(folder, profile_key(settings, model), ceilings, profile)
        if settings.ranks.size == 1:
            return profile, store
        text = msgspec.json.encode(profile).decode()
    shared = settings.ranks.exchange(text)[0]
    return msgspec.json.decode(shared, type=CostProfile), store
