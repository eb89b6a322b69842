"""The prefix-aware router, behind Serve's public request-router interface."""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false
from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from common.scale.prefixes import Prefixes


class PrefixRouter(RequestRouter):
    """Each front has one, which counts its own requests in flight. Serve passes over a replica that is full."""

    def initialize_state(self, **options: Any) -> None:
        self._prefixes = Prefixes(**options)
        self._in_flight: dict[str, str] = {}  # request to replica

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Lists of replicas in the order in which Serve shall try them."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # else Serve does not pause when all are full
        request, keys = pending_request.metadata.internal_request_id, pending_request.kwargs.get("keys", [])
        self._in_flight.pop(request, None)  # tried before
        by_name = {one.replica_id.unique_id: one for one in candidate_replicas}
        counts = Counter(self._in_flight.values())
        order = self._prefixes.order(keys, {name: counts[name] for name in by_name})
        if not pending_request.future.done():  # noted before it is sent, so that a burst is spread
            self._in_flight[request] = order[0]
            self._prefixes.add(keys, order[0])
            forget = self._in_flight.pop
            pending_request.future.add_done_callback(lambda future: future.cancelled() and forget(request, None))
        return [[by_name[name]] for name in order]

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Also of a request that the replica did not accept: it is chosen for again."""
        self._in_flight.pop(internal_request_id, None)
