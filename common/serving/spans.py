"""OpenTelemetry spans: one for each prompt, and in it `queue`, `prefill` and `decode`.

The library is behind the extra `spans` and imported only where spans are asked for.
"""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Generator
from typing import Any

from common.outputs import RequestOutput
from common.serving.engine_thread import Job

LAST_EXPORT = 3  # seconds that the server's end waits for a silent collector; the exporter would wait up to 30
log = logging.getLogger("folovllm.serving")


class Spans:
    """Written when a request has ended, from times that the engine records anyway: they cost a step nothing."""

    def __init__(self, provider: Any) -> None:
        self._tracer = provider.get_tracer("folovllm.serving")

    def record(self, job: Job, output: RequestOutput, outcome: str) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # From the engine's clock to wall time, for each request: only the wall clock can be set, or runs while the
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
            "output_tokens": output.num_generated,
        }
        parent = TraceContextTextMapPropagator().extract(carrier)
        root = self._tracer.start_span("request", parent, start_time=nanoseconds(arrival), attributes=attributes)
        inside = trace.set_span_in_context(root)
        for name, begin, finish in (("queue", arrival, started), ("prefill", started, first), ("decode", first, end)):
            if finish > begin:
                span = self._tracer.start_span(name, inside, start_time=nanoseconds(begin))
                span.end(nanoseconds(finish))
        root.end(nanoseconds(end))


@contextlib.contextmanager
def spans_to(exporter: str | None) -> Generator[Spans | None]:
    """Spans for a server, exported at the end at the latest; None without an exporter."""
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
    `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` override our service name."""
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

    if exporter == "otlp":
        import opentelemetry.exporter.otlp.proto.http.trace_exporter as otlp  # pyright: ignore

        chosen: Any = otlp.OTLPSpanExporter()
    else:
        chosen = ConsoleSpanExporter(out=sys.stderr, formatter=lambda span: span.to_json(indent=None) + "\n")
    resource = Resource.create({"service.name": "folovllm"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(chosen))
    return provider
