"""Options of the endpoint picker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pla_serve.flags import Flag
from pla_serve.policy.knobs import check_knobs

PICKER = "Endpoint picker"
"""Panel of these flags."""


@dataclass(frozen=True, slots=True)
class PickerOptions:
    """Where an Envoy asks which instance a request goes to.

    Raises:
        ValueError: a field is out of range, or the picker's package is missing.
    """

    picker_port: Annotated[
        int | None,
        Flag(
            "Port on which an Envoy asks where requests go (external processing, gRPC without TLS; "
            "0 takes a free one). Needs pla-serve[picker]. Without it nobody is answered.",
            panel=PICKER,
            least=0,
            most=65535,
        ),
    ] = None
    picker_host: Annotated[
        str, Flag("Address of that port. Whoever reaches it may ask.", panel=PICKER)
    ] = "127.0.0.1"
    picker_requests: Annotated[
        int,
        Flag(
            "Most requests that Envoy may ask about at once; others it sends on by itself.",
            panel=PICKER,
            least=1,
        ),
    ] = 4096

    def __post_init__(self) -> None:
        check_knobs(self)
        if self.picker_port is not None:
            _check_package()


def _check_package() -> None:
    from importlib.util import find_spec

    if find_spec("grpc") is None:
        raise ValueError("--picker-port needs the package grpcio: pip install 'pla-serve[picker]'")
