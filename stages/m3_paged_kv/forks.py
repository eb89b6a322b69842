"""Several samples of one prompt (n > 1): computed once, its blocks shared (PagedAttention, SOSP '23, section 4.4)."""

from common.kv_cache import PagedManager
from common.request import Request, RequestStatus


def fork_siblings(parent: Request, cache: PagedManager, running: list[Request]) -> list[Request]:
    """The end of the prompt is about to be computed: its siblings share its blocks and draw their own first tokens."""
    forks, parent.siblings = parent.siblings, []
    for child in forks:
        cache.fork(parent, child)
        child.num_open_chunks += 1
        child.num_tokens += 1
        child.status = RequestStatus.RUNNING
        child.scheduled_time = parent.scheduled_time
        running.append(child)
    return forks
