"""The pages of all replicas as one."""

from __future__ import annotations

import pytest

pytest.importorskip("prometheus_client", reason="the server's libraries are not installed")

from prometheus_client.parser import text_string_to_metric_families

from common.serving.metrics import one_page

PAGE = """# HELP up Is it up?
# TYPE up gauge
up 1.0
# HELP seconds Of a request.
# TYPE seconds histogram
seconds_bucket{le="0.1"} 1.0
seconds_bucket{le="+Inf"} 3.0
seconds_count 3.0
seconds_sum 7.5
# HELP ends_total How requests ended.
# TYPE ends_total counter
ends_total{outcome="a \\"b\\""} 5.0
"""


def test_every_sample_has_its_replica_and_every_family_one_head() -> None:
    page = one_page({"x": PAGE, "y": PAGE.replace("3.0", "4.0")})
    assert page.count("# TYPE") == 3 and page.count("# HELP up Is it up?") == 1
    samples = [s for family in text_string_to_metric_families(page) for s in family.samples]
    assert len(samples) == 12
    assert {s.labels["replica"] for s in samples} == {"x", "y"}
    values = {(s.name, s.labels["replica"]): s.value for s in samples if s.name != "seconds_bucket"}
    assert values["seconds_count", "x"] == 3 and values["seconds_count", "y"] == 4
    assert {s.labels["outcome"] for s in samples if s.name == "ends_total"} == {'a "b"'}
