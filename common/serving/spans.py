"""OpenTelemetry spans: for each prompt one, and in it `queue`, `prefill` and `decode`.

The library is behind the extra `spans`: nothing here is imported unless it is asked for.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Generator
from typing import Any

from common.errors import UserError
from common.outputs import RequestOutput
from common.serving.engine_thread import Job

LAST_EXPORT = 3
"""Seconds that the end of the server waits for a collector that does not answer; the exporter would wait up to 30."""
log = logging.getLogger("folovllm.serving")


class Spans:
    """Written when a request has ended, from the times that the engine notes anyway: a step pays nothing for them."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("folovllm.serving")
        self._propagator = TraceContextTextMapPropagator()

    def record(self, job: Job, output: RequestOutput, outcome: str) -> None:
        from opentelemetry import trace

        # From the engine's clock to the one on the wall, each time anew: only the latter is set, or goes on while the
        # machine sleeps.
        epoch = time.time() - time.perf_counter()

        def nanoseconds(seconds: float) -> int:
            return int((epoch + seconds) * 1e9)

        arrival = output.arrival_time
        end = arrival + (output.e2e or 0.0)
        started = end if output.queue_time is None else arrival + output.queue_time
        first = end if output.ttft is None else arrival + output.ttft
        carrier = {"traceparent": job.trace_parent} if job.trace_parent else {}
        attributes = {
            "request_id": job.id,
            "outcome": outcome,
            "prompt_tokens": len(job.prompt),
            "output_tokens": sum(len(sample.token_ids) for sample in output.outputs),
        }
        root = self._tracer.start_span(
            "request", self._propagator.extract(carrier), start_time=nanoseconds(arrival), attributes=attributes
        )
        inside = trace.set_span_in_context(root)
        for name, begin, finish in (("queue", arrival, started), ("prefill", started, first), ("decode", first, end)):
            if finish > begin:
                span = self._tracer.start_span(name, inside, start_time=nanoseconds(begin))
                span.end(nanoseconds(finish))
        root.end(nanoseconds(end))


@contextlib.contextmanager
def spans_to(exporter: str | None) -> Generator[Spans | None]:
    """Spans for a server, all of which have been exported at the end if they can be; None if nobody asked for any."""
    if exporter is None:
        yield None
        return
    provider = _provider(exporter)
    try:
        yield Spans(provider)
    finally:
        shutdown = threading.Thread(target=provider.shutdown, name="last spans", daemon=True)
        shutdown.start()
        shutdown.join(LAST_EXPORT)
        if shutdown.is_alive():
            log.warning("spans lost", extra={"fields": {"exporter": exporter, "seconds": LAST_EXPORT}})


def _provider(exporter: str) -> Any:
    """A provider that writes JSON to standard error (`console`), or sends to `OTEL_EXPORTER_OTLP_ENDPOINT` (`otlp`).

    The other `OTEL_` variables count too; what they say about the service goes before our own name for it.
    """
    import sys

    try:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

        if exporter == "otlp":
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # pyright: ignore
                OTLPSpanExporter,
            )

            chosen: Any = OTLPSpanExporter()
        else:
            chosen = ConsoleSpanExporter(out=sys.stderr)
    except ImportError as error:
        raise UserError(f"spans need {error.name}, which is not installed: pip install '.[spans]'") from None
    resource = Resource.create({"service.name": "folovllm"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(chosen))
    return provider
