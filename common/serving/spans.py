"""OpenTelemetry spans: for each prompt one, and in it `queue`, `prefill` and `decode`.

The library is behind the extra `spans`: nothing here is imported unless it is asked for.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from typing import Any

from common.errors import UserError
from common.outputs import RequestOutput
from common.serving.engine_thread import Job


class Spans:
    """Written when a request has ended, from the times that the engine notes anyway: a step pays nothing for them."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("folovllm.serving")
        self._propagator = TraceContextTextMapPropagator()
        self._epoch = time.time() - time.perf_counter()  # the engine's clock to the one on the wall

    def record(self, job: Job, output: RequestOutput, outcome: str) -> None:
        from opentelemetry import trace

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
            "request", self._propagator.extract(carrier), start_time=self._nanoseconds(arrival), attributes=attributes
        )
        inside = trace.set_span_in_context(root)
        for name, begin, finish in (("queue", arrival, started), ("prefill", started, first), ("decode", first, end)):
            if finish > begin:
                span = self._tracer.start_span(name, inside, start_time=self._nanoseconds(begin))
                span.end(self._nanoseconds(finish))
        root.end(self._nanoseconds(end))

    def _nanoseconds(self, seconds: float) -> int:
        return int((self._epoch + seconds) * 1e9)


@contextlib.contextmanager
def spans_to(exporter: str | None) -> Generator[Spans | None]:
    """Spans for a server, all of which have been exported at the end; None if nobody asked for any."""
    if exporter is None:
        yield None
        return
    provider = _provider(exporter)
    try:
        yield Spans(provider)
    finally:
        provider.shutdown()


def _provider(exporter: str) -> Any:
    """A provider that writes JSON to standard error (`console`), or sends to `OTEL_EXPORTER_OTLP_ENDPOINT` (`otlp`)."""
    import sys

    try:
        from opentelemetry.sdk.resources import Resource
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
    provider = TracerProvider(resource=Resource.create({"service.name": "folovllm"}))
    provider.add_span_processor(BatchSpanProcessor(chosen))
    return provider
