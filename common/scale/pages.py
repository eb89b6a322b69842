"""The pages of all replicas as one."""

import json
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


class _Families(Collector):
    def __init__(self, families: Mapping[str, Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families.values()


def one_page(pages: Mapping[str, str]) -> bytes:
    """Prometheus' text format: all samples, with a label `replica`. Sums and percentiles are the reader's."""
    families: dict[str, Metric] = {}
    for replica, page in pages.items():
        for family in text_string_to_metric_families(page):
            kept = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            kept.samples += [s._replace(labels={**s.labels, "replica": replica}) for s in family.samples]
    registry = CollectorRegistry()
    registry.register(_Families(families))
    return generate_latest(registry)


def one_trace(traces: Mapping[str, bytes]) -> bytes:
    """The Trace Event Format: each replica is a process in Perfetto."""
    events = list[object]()
    for number, (replica, trace) in enumerate(sorted(traces.items()), start=1):
        events.append({"ph": "M", "name": "process_name", "pid": number, "args": {"name": f"replica {replica}"}})
        events += [{**event, "pid": number} for event in json.loads(trace)["traceEvents"]]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode()
