"""The replicas of an ingress' own deployment: they share its limits, and their records belong beside its own."""

from __future__ import annotations

from ray import serve

from deployments.admission import Share
from deployments.calls import ReplicaReport
from deployments.running import replica_names
from deployments.tier_handle import TierHandle


class Peers:
    """This replica's deployment, itself among them. Made in a replica, whose own handle Serve keeps up to date."""

    def __init__(self) -> None:
        context = serve.get_replica_context()
        self._own = str(context.replica_tag)
        # Serve knows the deployment by now; to be asked whether it does would hold the event loop.
        handle = serve.get_deployment_handle(context.deployment, context.app_name, _check_exists=False)
        self._handle = TierHandle(handle)
        self._handle.variant("report", by_reference=False)  # begins to listen

    def share(self) -> Share:
        """This replica's part of what they have together. One that starts counts itself before the others do."""
        return share_of(self._own, replica_names(self._handle.handle))

    async def reports(self) -> tuple[ReplicaReport, ...]:
        """Of those that answer in time."""
        reports: tuple[ReplicaReport, ...] = await self._handle.broadcast("report")
        return reports


def share_of(own: str, running: frozenset[str]) -> Share:
    """The share of one of several that know of each other: the same division, whoever does it."""
    names = sorted(running | {own})
    return Share(names.index(own), len(names))
