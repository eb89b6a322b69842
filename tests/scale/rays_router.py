"""Ray's own prefix-aware router, given what ours sees. `ray.serve.llm` has it only beside vLLM or SGLang."""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false
from typing import Any

from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router import PrefixCacheAffinityRouter


class RaysRouter(PrefixCacheAffinityRouter):
    def _extract_text_from_request(self, pending_request: Any) -> str:
        """The body: prompts of these workloads come first in it, behind the model's name."""
        return pending_request.args[1].decode()
