"""m3's paged cache, in which a beginning that was computed once is found again (vLLM's automatic prefix caching,
SGLang's RadixAttention).

Full blocks enter an index. A request that starts shares the blocks of its longest known beginning; blocks that are
given back stay in the index until their memory is needed.
"""

from common.plan import BlockCopies
from common.request import Request
from common.watch.kv_memory import PrefixNode, PrefixStats, Region
from stages.m3_paged_kv.kv_cache import PagedCache
from stages.m6_prefix_caching.block_pool import BlockPool
from stages.m6_prefix_caching.inspection.index import check_index, check_paths, check_pool, tree
from stages.m6_prefix_caching.inspection.statistics import Statistics
from stages.m6_prefix_caching.prefix_index import Entry, PrefixIndex
from stages.m6_prefix_caching.radix.partial_copy import PartialCopy


class PrefixPagedCache:
    """m3's block tables, over a pool that keeps what it frees, and an index that finds it.

    A request's *path* is its chain of index entries, from the first block on: those that it would share, while it
    waits; those that its table holds, while it runs. So a request that holds a block of the index holds the block
    before it too. Since the end of a table is released before its beginning, the least recently released block never
    has a child in the index: eviction needs no search for leaves.
    """

    def __init__(self, num_blocks: int, block_size: int, num_cpu_blocks: int, index: PrefixIndex) -> None:
        self.block_size = block_size
        self.index = index
        self.pool = BlockPool(num_blocks, self._evict)
        self._paged = paged = PagedCache(num_blocks, block_size, num_cpu_blocks, self.pool)
        self.tables, self.cpu_pool = paged.tables, paged.cpu_pool
        self.fits, self.grow, self.block_table = paged.fits, paged.grow, paged.block_table  # as they are in m3
        self.swap_in, self.usage, self.regions = paged.swap_in, paged.usage, paged.regions
        self._paths: dict[str, list[Entry]] = {}
        self._entries: dict[int, Entry] = {}  # of the blocks in the index
        self._partial = PartialCopy(index, self.pool, paged)
        self._plan_number = 1  # of the plan being made
        self._statistics = Statistics(self.pool)

    # -- the beginning of a request ---------------------------------------------------------------------------------

    def can_admit(self, request: Request) -> bool:
        """As in m3: room for all its tokens and the first new one, and a block for each other request. Blocks that it
        shares need no room, but those of them that are free are taken."""
        return self._left_if_started(request, self._match(request)) >= 0

    def attach_prefix(self, request: Request) -> None:
        """Start a request that can be admitted with what is cached of its tokens."""
        path = self._match(request)
        spare = self._left_if_started(request, path)
        table = [entry.block for entry in path]
        self.pool.share(table)
        for entry in path:
            entry.hits += 1
        self.tables[request.id] = table
        start = len(path) * self.block_size
        rest = tuple(request.token_ids[start : min(self._usable(request), start + self.block_size)])
        end = self._end(request, path)
        cached = start + self._partial.into(request.id, end, rest, spare, self._plan_number)
        self._paged.mark_computed(request, cached)
        self._statistics.started(request, cached, len(path))

    def _match(self, request: Request) -> list[Entry]:
        """The longest known beginning, without the last token: its logits are wanted. A request that asks again goes
        on where it stopped the last time, once what was evicted since then is cut off."""
        path = self._paths.setdefault(request.id, [])
        while path and self._entries.get(path[-1].block) is not path[-1]:
            path.pop()
        while len(path) < self._usable(request) // self.block_size:
            entry = self.index.find(self._end(request, path), self._tokens(request, len(path)))
            if entry is None:
                break
            path.append(entry)
        return path

    def _left_if_started(self, request: Request, path: list[Entry]) -> int:
        """Blocks that would stay free if the request started, without one for each other request."""
        fresh = self._paged.blocks_for(request.num_tokens + 1) - len(path)
        revived = sum(self.pool.is_free(entry.block) for entry in path)
        return self.pool.num_free - revived - fresh - len(self.tables) - len(request.siblings)

    @staticmethod
    def _usable(request: Request) -> int:
        """How many tokens may come from the cache: not the last one, none that is not known yet, and none of whose
        position the logits are still wanted (`prompt_logprobs`)."""
        usable, scored = min(len(request.token_ids), request.num_tokens - 1), request.prompt_logprobs
        return usable if scored is None or len(scored) == request.num_prompt_tokens else len(scored) - 1

    # -- blocks that are full ---------------------------------------------------------------------------------------

    def mark_computed(self, request: Request, upto: int) -> None:
        computed = request.num_computed_tokens
        self._paged.mark_computed(request, upto)
        if upto >= (len(self._paths[request.id]) + 1) * self.block_size:
            self._register(request, computed, upto)

    def _register(self, request: Request, computed: int, upto: int) -> None:
        """Lengthen the request's path by its blocks that are full, or will be when the step just planned has stored
        its K and V: steps store before they read, so that others may share the blocks in this very step.

        If another request has computed the same block meanwhile, that one replaces the request's own, as soon as no
        step writes the latter. A block that a fork shares without this path stays out of the index until it has one
        owner.
        """
        path, table, size = self._paths[request.id], self.tables[request.id], self.block_size
        parent, ids, new = self._end(request, path), request.token_ids, list[int]()
        for i in range(len(path), min(upto, len(ids)) // size):
            own, tokens = table[i], tuple(ids[i * size : (i + 1) * size])
            alone = self.pool.ref_counts[own] == 1
            entry = self.index.add(parent, tokens, own) if alone else self.index.find(parent, tokens)
            if entry is None:
                break
            if entry.block == own:
                entry.step = self._plan_number
                self._entries[own] = entry
                new.append(own)
            elif (i + 1) * size <= computed:
                self.pool.share([entry.block])
                self.pool.release([own])
                table[i] = entry.block
            else:
                break
            path.append(entry)
            parent = entry
        self.pool.keep(new)

    def _end(self, request: Request, path: list[Entry]) -> Entry:
        return path[-1] if path else self.index.root(request.cache_salt)

    def _tokens(self, request: Request, block: int) -> tuple[int, ...]:
        return tuple(request.token_ids[block * self.block_size : (block + 1) * self.block_size])

    def _evict(self, block: int) -> None:
        self._statistics.counts.evictions += 1
        self.index.remove(self._entries.pop(block))

    # -- what m3 does, and the paths ---------------------------------------------------------------------------------

    def fork(self, parent: Request, child: Request) -> None:
        self._paged.fork(parent, child)
        self._paths[child.id] = list(self._paths[parent.id])

    def free(self, request: Request) -> None:
        """Where steps are planned ahead, a request's last tokens were not known when their blocks were planned: those
        that are full are registered here. The very last token is left out, since a step may not have stored it."""
        if request.finish_reason in ("stop", "length") and request.id in self.tables:
            stored = min(request.num_computed_tokens, request.num_tokens - 1)
            self._register(request, stored, stored)
        self._paged.free(request)
        self._paths.pop(request.id, None)

    def swap_out(self, request: Request) -> BlockCopies | None:
        """When it is back, its next step finds what the index still has of it, or registers it again."""
        moves = self._paged.swap_out(request)
        if moves is not None:
            self._paths[request.id] = []
        return moves

    def take_copies(self) -> BlockCopies:
        copies = self._paged.take_copies()
        self._partial.unpin()
        self._plan_number += 1
        self._statistics.planned()
        return copies

    # -- reset, figures, tests --------------------------------------------------------------------------------------

    def kept_regions(self) -> list[Region]:
        return [Region(block * self.block_size, self.block_size, self.block_size, ()) for block in self.pool.reusable]

    def prefix_stats(self) -> PrefixStats:
        return self._statistics.read(len(self._entries))

    def reset_prefix_stats(self) -> None:
        self._statistics.reset()

    def prefix_tree(self) -> list[PrefixNode]:
        return tree(self._entries, self.pool)

    def reset_prefix_cache(self) -> None:
        """Nothing is found any more. Running requests keep their blocks, and register them again as they go on."""
        self.index.clear()
        self._entries.clear()
        self.pool.forget_all()
        for path in self._paths.values():
            path.clear()

    def check_integrity(self) -> None:
        self._paged.check_integrity()
        check_pool(self.pool)
        check_paths(self.tables, self._paths, self._entries)
        check_index(self._entries, self.index, self.pool)
