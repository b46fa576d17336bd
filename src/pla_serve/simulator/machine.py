"""What a machine can do, as a file of numbers: the only thing the simulator knows of hardware."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import msgspec

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel, CostProfile
from pla_serve.policy.protocol import Batch
from pla_serve.simulator.captured import Captured, CapturedCost


class MachineError(ValueError):
    """There is no such machine, or its file cannot be used; the message says which and why."""


class UnitSeconds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fields of `CostProfile`: seconds for one unit of work of each kind."""

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
    """That each token passes through; an embedding table is looked up, not multiplied."""
    weight_bytes: float
    """Read once a launch."""
    layers: int
    attention_width: int
    """Heads times head size."""
    kv_bytes_per_token: float
    flops: float
    """Peak operations a second, dense, in the type computed with."""
    bytes_per_second: float
    flops_efficiency: float
    bytes_efficiency: float
    launch_seconds: float
    """Host and kernel start-up that a pass cannot hide."""


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One instance: a device, or several that work as one, with a model on it."""

    name: str
    source: str
    """Where the numbers come from: a data sheet, a paper, or a measurement and its date."""
    layers: int
    """Decoder layers; a prefill can be left between two of them."""
    kv_tokens: int
    """Tokens whose KV fits beside the weights."""
    kv_bytes_per_token: float
    transfer_bytes_per_second: float
    """KV from one instance to another."""
    transfer_seconds: float
    """Fixed cost of such a transfer."""
    max_batch_tokens: int = PolicyConfig().max_batch_tokens
    """The batch limit of a deployment on it; a policy's knob goes before it."""
    roofline: Roofline | None = None
    seconds: UnitSeconds | None = None
    """Measured, or given; goes before the roofline."""
    captured: Captured | None = None
    """None: launching kernels is in ``per_launch``, and no batch is padded."""

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
        """Seconds by kind of work."""
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
        """The true time of a batch; policies believe in `profile` alone."""
        if self.captured is None:
            return KnownCost(self.profile)
        return CapturedCost(self.profile, self.captured)

    def transfer(self, tokens: int) -> float:
        """Seconds to move the KV of so many tokens to another instance."""
        size = tokens * self.kv_bytes_per_token
        return self.transfer_seconds + size / self.transfer_bytes_per_second


class KnownCost(CostModel):
    """A cost model that knows the machine and learns nothing; predictions are exact."""

    def observe(self, batch: Batch, seconds: float) -> None:
        """Nothing to learn."""


def load_machine(name_or_file: str) -> Machine:
    """A machine that comes with the project, by name, or one from a JSON file.

    Raises:
        MachineError: it is not there, or not a machine.
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
    """Names of the machines that come with the project."""
    folder = files(__package__).joinpath("machines")
    return sorted(
        entry.name.removesuffix(".json")
        for entry in folder.iterdir()
        if entry.name.endswith(".json")
    )
