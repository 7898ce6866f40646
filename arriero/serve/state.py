"""What every route needs: the models, the settings, what is counted."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request

from arriero.serve.config import ServeConfig
from arriero.serve.metrics import Metrics
from arriero.serve.models import Models


@dataclass(frozen=True)
class State:
    """Of one server; `app.state.serve`."""

    config: ServeConfig
    models: Models
    metrics: Metrics


def state_of(request: Request) -> State:
    """The state of the server that a request came to."""
    state: State = request.app.state.serve
    return state
