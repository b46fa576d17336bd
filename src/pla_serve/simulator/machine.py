"""Machine profiles: files of numbers, which are all that the simulator knows of hardware."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import msgspec

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel, CostProfile
from pla_serve.policy.protocol import Batch
from pla_serve.simulator.captured import Captured, CapturedCost


class MachineError(ValueError):
    """Raised if a machine is unknown or its file cannot be used; the message says why."""


class UnitSeconds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds for one unit of work of each kind, with the fields of `CostProfile`."""

    per_token: float
    per_attention: float
    per_kv: float
    per_sequence: float
    per_launch: float


class Roofline(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Published numbers of a chip and a model, from which `UnitSeconds` follow.

    Efficiencies are the shares of the peaks that kernels reach; their source belongs in the
    machine's ``source``.
    """

    parameters: float
    """Parameters that each token is multiplied with; an embedding table is looked up instead."""
    weight_bytes: float
    """Bytes of weights, which are read once a launch."""
    layers: int
    attention_width: int
    """Number of query heads times the size of a head."""
    kv_bytes_per_token: float
    flops: float
    """Peak operations a second, dense, in the type that is computed with."""
    bytes_per_second: float
    flops_efficiency: float
    bytes_efficiency: float
    launch_seconds: float
    """Time of the host and of kernel starts that a pass cannot hide."""


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Profile of one instance: a model on a device, or on several that work as one."""

    name: str
    source: str
    """Origin of the numbers: a data sheet, a paper, or a measurement and its date."""
    layers: int
    """Decoder layers; a prefill can be left between two of them."""
    kv_tokens: int
    """Tokens whose KV fits beside the weights."""
    kv_bytes_per_token: float
    transfer_bytes_per_second: float
    """Rate of KV transfers from one instance to another."""
    transfer_seconds: float
    """Fixed time of such a transfer."""
    max_batch_tokens: int = PolicyConfig().max_batch_tokens
    """Most tokens of a batch, unless a policy's knob says otherwise."""
    roofline: Roofline | None = None
    seconds: UnitSeconds | None = None
    """Measured seconds; a machine has either these or a roofline."""
    captured: Captured | None = None
    """Captured shapes. None: no batch is padded, and ``per_launch`` includes launching kernels."""

    def __post_init__(self) -> None:
        if (self.roofline is None) == (self.seconds is None):
            raise ValueError(f"machine {self.name!r} needs either 'roofline' or 'seconds'")
        for name in ("layers", "kv_tokens", "max_batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"machine {self.name!r}: {name} must be at least 1")
        if not self.transfer_bytes_per_second > 0:
            raise ValueError(f"machine {self.name!r}: transfer_bytes_per_second must be positive")

    @property
    def profile(self) -> CostProfile:
        """Seconds for each kind of work."""
        if self.seconds is not None:
            return CostProfile(**msgspec.structs.asdict(self.seconds))
        chip = self.roofline
        assert chip is not None
        return CostProfile.roofline(
            parameters=chip.parameters,
            weight_bytes=chip.weight_bytes,
            attention_width=chip.attention_width,
            layers=chip.layers,
            kv_bytes_per_token=chip.kv_bytes_per_token,
            flops=chip.flops * chip.flops_efficiency,
            bytes_per_second=chip.bytes_per_second * chip.bytes_efficiency,
            launch_seconds=chip.launch_seconds,
        )

    @property
    def cost(self) -> CostModel:
        """Cost model with the true time of a batch; policies know only `profile`."""
        if self.captured is None:
            return KnownCost(self.profile)
        return CapturedCost(self.profile, self.captured)

    def transfer(self, tokens: int) -> float:
        """Return the seconds to move the KV of so many tokens to another instance."""
        size = tokens * self.kv_bytes_per_token
        return self.transfer_seconds + size / self.transfer_bytes_per_second


class KnownCost(CostModel):
    """Cost model whose predictions are exact; it does not learn."""

    def observe(self, batch: Batch, seconds: float) -> None:
        """Ignore the measurement."""


def load_machine(name_or_file: str) -> Machine:
    """Load the profile of a machine: one that comes with the project, by name, or a JSON file.

    Raises:
        MachineError: no machine has this name, or the file is not a machine profile.
    """
    path = Path(name_or_file)
    if path.suffix == ".json":
        try:
            data = path.read_bytes()
        except OSError as error:
            raise MachineError(f"cannot read {name_or_file}: {error.strerror or error}") from None
    else:
        entry = files(__package__).joinpath("machines", f"{name_or_file}.json")
        if not entry.is_file():
            known = ", ".join(known_machines())
            raise MachineError(
                f"unknown machine {name_or_file!r}; known are: {known}; or give a .json file"
            )
        data = entry.read_bytes()
    try:
        return msgspec.json.decode(data, type=Machine)
    except msgspec.MsgspecError as error:
        raise MachineError(f"{name_or_file} is not a machine profile: {error}") from None


def known_machines() -> list[str]:
    """Return the names of the machines that come with the project."""
    folder = files(__package__).joinpath("machines")
    return sorted(
        entry.name.removesuffix(".json")
        for entry in folder.iterdir()
        if entry.name.endswith(".json")
    )
