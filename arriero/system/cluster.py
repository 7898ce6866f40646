"""A connection to a Ray cluster (extra "ray"): one that is there, or a local one that is started for this process."""

from __future__ import annotations

import re
import socket
from typing import Any

from arriero.errors import UserError, require


def connected(address: str, cpus: int) -> Any:
    """The module ray, connected to the cluster at `address`, or to a local one of so many CPUs ("local").

    Raises `UserError` where ray is not installed, or nothing answers there.
    """
    ray = require("ray", "ray")
    if ray.is_initialized():
        return ray
    try:
        reach(address)
        if address == "local":
            ray.init(
                num_cpus=cpus, include_dashboard=False, log_to_driver=False, configure_logging=False,
                _metrics_export_port=None,
            )  # fmt: skip
        else:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"no Ray cluster at {address!r} ({error}); start one with `ray start --head`, or let one be started for "
            "this run (arriero curate --ray local, arriero grpo --rollout ray)"
        ) from error
    return ray


def reach(address: str, seconds: float = 5.0) -> None:
    """Raise OSError where nothing answers at host:port: Ray itself would try again and again, for minutes."""
    if found := re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address):
        socket.create_connection((found[1], int(found[2])), seconds).close()
