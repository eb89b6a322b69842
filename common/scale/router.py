"""The prefix-aware router, behind Serve's public request-router interface."""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false
from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from common.scale.call import Call
from common.scale.prefixes import Prefixes, block_keys


class PrefixRouter(RequestRouter):
    """Each front has one, which counts its own requests in flight. A replica that is full is passed over by Serve for
    the next one."""

    def initialize_state(self, **options: Any) -> None:
        """`request_router_kwargs`: those of `Prefixes`."""
        self._prefixes = Prefixes(**options)
        self._in_flight: dict[str, str] = {}  # request to replica; from its choice on, so that a burst is spread

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Lists of replicas in the order in which Serve shall try them."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # else Serve does not pause when all are full
        request, by_name = _id(pending_request), {one.replica_id.unique_id: one for one in candidate_replicas}
        self._in_flight.pop(request, None)  # tried before
        counts = Counter(self._in_flight.values())
        order = self._prefixes.order(_keys(pending_request), {name: counts[name] for name in by_name})
        if not pending_request.future.done():
            self._take(pending_request, order[0])
            pending_request.future.add_done_callback(lambda future: future.cancelled() and self._drop(request))
        return [[by_name[name]] for name in order]

    def _take(self, request: PendingRequest, replica: str) -> None:
        self._in_flight[_id(request)] = replica
        self._prefixes.add(_keys(request), replica)

    def _drop(self, request: str) -> None:
        self._in_flight.pop(request, None)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """It may be another one than the first of the order."""
        if _id(pending_request) in self._in_flight:
            self._take(pending_request, replica_id.unique_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Also of a request that the replica did not accept: it is chosen for again."""
        self._drop(internal_request_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._prefixes.keep({replica.replica_id.unique_id for replica in replicas})


def _id(request: PendingRequest) -> str:
    return request.metadata.internal_request_id


def _keys(request: PendingRequest) -> list[bytes]:
    call = request.args[0] if request.args else None
    return block_keys(call.salt, call.prompt) if isinstance(call, Call) else []
