"""m3's paged cache, in which a beginning that was computed once is found again (vLLM's automatic prefix caching,
SGLang's RadixAttention).

Full blocks enter an index. A request that starts shares the blocks of its longest known beginning, and whoever gives
blocks back leaves them where they are until their memory is needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from common.kv_cache import KVUsage, PrefixNode, PrefixStats, Region
from common.plan import BlockCopies
from common.request import Request
from stages.m6_prefix_caching.block_pool import BlockPool
from stages.m6_prefix_caching.inspection import check_index, tree
from stages.m6_prefix_caching.prefix_index import Entry, PrefixIndex


class PagedCache:
    """Block tables by request id, over one pool on the device and one for swapped requests on the CPU.

    A request's *path* is its chain of index entries, from the first block on: those that it would share, while it
    waits; those that its table holds, while it runs. So whoever holds a block of the index holds the block before it
    too. Since the end of a table is released before its beginning, the oldest cached block never has a child in the
    index: leaves are evicted before parents, and nobody has to search for them.
    """

    def __init__(self, num_blocks: int, block_size: int, num_cpu_blocks: int, index: PrefixIndex) -> None:
        self.block_size = block_size
        self.index = index
        self.pool = BlockPool(num_blocks, self._evict)
        self.cpu_pool = BlockPool(num_cpu_blocks)
        self.tables: dict[str, list[int]] = {}
        self.swapped_tables: dict[str, list[int]] = {}
        self._stored: dict[str, int] = {}
        self._copies: BlockCopies = []
        self._paths: dict[str, list[Entry]] = {}
        self._entries: dict[int, Entry] = {}  # of the blocks in the index
        self._pinned: list[int] = []  # sources of copies that the plan being made will read
        self._plans = 1  # the plan being made
        self._stats = PrefixStats()

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def fits(self, num_tokens: int, samples: int = 1) -> bool:
        """Could a request of so many tokens run if it were alone? Each further sample ends in a block of its own."""
        return self.blocks_for(num_tokens) + samples - 1 <= self.pool.num_blocks

    # -- the beginning of a request ---------------------------------------------------------------------------------

    def can_admit(self, request: Request) -> bool:
        """Room for all its tokens and the first new one and, so that nobody is preempted at once, a block for everyone
        else to grow into. Blocks that it shares need no room, unless they are free: then they are room no more."""
        return self._spare(request, self._match(request)) >= 0

    def cached_prefix(self, request: Request) -> int:
        """Start a request, that can be admitted, with what is cached of its tokens; returns how many."""
        path = self._match(request)
        spare = self._spare(request, path)
        table = [entry.block for entry in path]
        self.pool.share(table)
        for entry in path:
            entry.hits += 1
        self.tables[request.id] = table
        cached = len(table) * self.block_size + self._copy_part(request, path, spare)
        request.num_computed_tokens = self._stored[request.id] = cached
        if request.num_preemptions:
            self._stats.recovered += cached
        else:
            request.num_cached_tokens = cached
            self._stats.asked += request.num_prompt_tokens
            self._stats.saved += cached
            self._stats.blocks += len(path)
        return cached

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

    def _spare(self, request: Request, path: list[Entry]) -> int:
        """Blocks that would stay free if the request started, beside one for everyone to grow into."""
        fresh = self.blocks_for(request.num_tokens + 1) - len(path)
        revived = sum(self.pool.is_free(entry.block) for entry in path)
        return self.pool.num_free - revived - fresh - len(self.tables) - len(request.siblings)

    def _copy_part(self, request: Request, path: list[Entry], spare: int) -> int:
        """Where the match ends inside a block, copy that block; returns how many of its tokens are the request's.

        Copies run before the step computes anything, so that the source must be of an earlier step; until the plan is
        made, nobody else may get it. A copy of less than a quarter of a block costs more than it saves.
        """
        start = len(path) * self.block_size
        rest = tuple(request.token_ids[start : min(self._usable(request), start + self.block_size)])
        found = self.index.closest(self._end(request, path), rest, self._plans) if rest else None
        if found is None or 4 * found[1] < self.block_size:
            return 0
        source, count = found
        if self.pool.is_free(source.block) and spare < 1:
            return 0
        self.pool.share([source.block])
        self._pinned.append(source.block)
        [copy] = self.pool.take(1)
        self._copies.append((source.block, copy))
        self.tables[request.id].append(copy)
        return count

    @staticmethod
    def _usable(request: Request) -> int:
        """How many tokens may come from the cache: not the last one, and none that is not known yet."""
        return min(len(request.token_ids), request.num_tokens - 1)

    # -- blocks that are full ---------------------------------------------------------------------------------------

    def commit(self, request: Request, upto: int) -> None:
        computed, request.num_computed_tokens = request.num_computed_tokens, upto
        self._stored[request.id] = upto
        if upto >= (len(self._paths[request.id]) + 1) * self.block_size:
            self._register(request, computed, upto)

    def _register(self, request: Request, computed: int, upto: int) -> None:
        """Lengthen the request's path by its blocks that are full, or will be when the step just planned has stored
        its K and V: steps store before they read, so that others may share the blocks in this very step.

        Somebody else may have computed the same block meanwhile: then that one replaces the request's own, as soon as
        no step writes the latter. A block with another owner who does not hold this path (a fork that has not
        replaced its blocks yet) stays out of the index until it has one owner.
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
                entry.step = self._plans
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
        self._stats.evictions += 1
        self.index.remove(self._entries.pop(block))

    # -- as in m3 ---------------------------------------------------------------------------------------------------

    def grow(self, request: Request, upto: int) -> bool:
        """Also replaces shared blocks that are about to be written."""
        table = self.tables.get(request.id, [])
        missing = max(0, self.blocks_for(upto) - len(table))
        first_written = request.num_computed_tokens // self.block_size
        shared = [i for i in range(first_written, len(table)) if self.pool.ref_counts[table[i]] > 1]
        if missing + len(shared) > self.pool.num_free:
            return False
        for i in shared:  # copy on write
            [copy] = self.pool.take(1)
            self._copies.append((table[i], copy))
            self.pool.release([table[i]])
            table[i] = copy
        table += self.pool.take(missing)
        self.tables[request.id] = table
        self._paths.setdefault(request.id, [])
        return True

    def block_table(self, request: Request) -> Sequence[int]:
        return self.tables[request.id]

    def fork(self, parent: Request, child: Request) -> None:
        """The child starts with the parent's blocks; nothing is copied before one of them writes."""
        self.tables[child.id] = list(self.tables[parent.id])
        self.pool.share(self.tables[child.id])
        self._paths[child.id] = list(self._paths[parent.id])
        child.num_computed_tokens = self._stored[child.id] = parent.num_computed_tokens

    def free(self, request: Request) -> None:
        if request.finish_reason in ("stop", "length") and request.id in self.tables:
            # Where steps are planned ahead, its last tokens were not known yet when their blocks were planned. The very
            # last one counts for nothing: whether a step has stored it is not certain.
            stored = min(request.num_computed_tokens, request.num_tokens - 1)
            self._register(request, stored, stored)
        self.pool.release(reversed(self.tables.pop(request.id, [])))
        self.cpu_pool.release(self.swapped_tables.pop(request.id, []))
        self._stored.pop(request.id, None)
        self._paths.pop(request.id, None)

    def swap_out(self, request: Request) -> BlockCopies | None:
        """Move a request to the CPU pool: (device block, CPU block) pairs, or None where that has no room."""
        table = self.tables[request.id]
        if len(table) > self.cpu_pool.num_free:
            return None
        cpu_table = self.cpu_pool.take(len(table))
        self.pool.release(reversed(self.tables.pop(request.id)))
        self.swapped_tables[request.id] = cpu_table
        self._paths[request.id] = []
        return list(zip(table, cpu_table, strict=True))

    def swap_in(self, request: Request) -> BlockCopies | None:
        """Bring a request back: (CPU block, device block) pairs, or None where there is no room for it, its next
        token, and a block for everyone who runs. Its next step finds what the index still has of it, or registers it
        again."""
        cpu_table = self.swapped_tables[request.id]
        if self.blocks_for(request.num_tokens) + len(self.tables) > self.pool.num_free:
            return None
        table = self.pool.take(len(cpu_table))
        self.cpu_pool.release(self.swapped_tables.pop(request.id))
        self.tables[request.id] = table
        return list(zip(cpu_table, table, strict=True))

    def take_copies(self) -> BlockCopies:
        copies, self._copies = self._copies, []
        self.pool.release(self._pinned)
        self._pinned = []
        self._plans += 1
        self._stats.peak_shared = max(self._stats.peak_shared, self.pool.num_shared)  # by requests: no pins are left
        return copies

    def usage(self) -> KVUsage:
        """A block counts once, however many share it; what is not stored is the unused tail of last blocks. A cached
        block that nobody holds is free."""
        tails = {table[-1]: len(table) * self.block_size - self._stored[id] for id, table in self.tables.items()}
        reserved = self.pool.num_used * self.block_size
        stored = reserved - sum(tails.values())
        return KVUsage(self.pool.num_blocks * self.block_size, reserved, stored, self.pool.num_used)

    def regions(self) -> list[Region]:
        size = self.block_size
        held: dict[int, Region] = {}
        for id, table in self.tables.items():
            for index, block in enumerate(table):
                stored = min(size, max(0, self._stored[id] - index * size))
                owners = (*held[block].owners, id) if block in held else (id,)
                held[block] = Region(block * size, size, stored, owners)
        return list(held.values())

    def kept_regions(self) -> list[Region]:
        return [Region(block * self.block_size, self.block_size, self.block_size, ()) for block in self.pool.cached]

    # -- reset, figures, tests --------------------------------------------------------------------------------------

    def prefix_stats(self) -> PrefixStats:
        stats = self._stats
        stats.shared, stats.cached = self.pool.num_shared, len(self._entries)
        return stats

    def reset_prefix_stats(self) -> None:
        self._stats = PrefixStats(peak_shared=self.pool.num_shared)

    def prefix_tree(self) -> list[PrefixNode]:
        return tree(self._entries, self.pool)

    def reset_prefix_cache(self) -> None:
        """Nothing is found any more. Those who run keep their blocks, and register them anew as they go on."""
        self.index.clear()
        self._entries.clear()
        self.pool.forget_all()
        for path in self._paths.values():
            path.clear()

    def check_integrity(self) -> None:
        for pool, tables in ((self.pool, self.tables), (self.cpu_pool, self.swapped_tables)):
            owners = Counter(block for table in tables.values() for block in table)
            for block, count in enumerate(pool.ref_counts):
                assert count == owners[block], f"block {block}: {owners[block]} owners, counted {count}"
            assert pool.num_used == len(owners), f"{pool.num_used} blocks used, {len(owners)} owned"
            pool.check_integrity()
        assert self.tables.keys() | self.swapped_tables.keys() == self._stored.keys()
        for id, table in self.tables.items():
            assert len(set(table)) == len(table), f"{id} holds a block twice"
            assert len(table) >= self.blocks_for(self._stored[id]), f"{id} stores more tokens than its blocks hold"
            path = [entry.block for entry in self._paths[id]]
            assert path == table[: len(path)], f"{id} holds other blocks than the index has for it"
            assert self._entries.keys().isdisjoint(table[len(path) :]), f"{id} holds an indexed block off its path"
        check_index(self._entries, self.index, self.pool)
