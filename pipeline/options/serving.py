"""Serving: a store's versions over HTTP."""

from dataclasses import dataclass
from typing import Annotated

from pipeline.options.base import at_least, at_most
from pipeline.options.shared import OneDeviceOptions
from pipeline.options.updates import StoreOptions


@dataclass(kw_only=True)
class ServeCommand(StoreOptions, OneDeviceOptions):
    """Serve a store's current version by the OpenAI API, and follow it; any other version by its number."""

    model: str | None = None
    """The base model, in place of the name that the store knows."""
    host: str = "127.0.0.1"
    """The address to listen at; default: this machine alone. 0.0.0.0 is every network that it is in."""
    port: Annotated[int, at_least(0), at_most(65535)] = 8000
    """The port to listen at; 0: any that is free."""
