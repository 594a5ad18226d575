"""Log lines with fields: readable as text, and searchable as JSON, where each field is a key of its own.

Serve adds the request's id, which is the client's `X-Request-ID` where it sent one, to every line of every hop.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

logger = logging.getLogger("ray.serve.greenroom")


def log_facts(event: str, facts: Mapping[str, int | float | str]) -> None:
    if logger.isEnabledFor(logging.INFO):
        told = ", ".join(
            f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in facts.items()
        )
        logger.info("%s: %s", event, told, extra=dict(facts))
