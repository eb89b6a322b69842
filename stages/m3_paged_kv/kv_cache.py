"""Paging for keys and values (PagedAttention, SOSP '23, section 4): a request's blocks may lie anywhere, its block
table says where, and it never holds more than one block that is not full."""

from collections import Counter
from collections.abc import Sequence

from common.plan import BlockCopies
from common.request import Request
from common.watch.kv_memory import KVUsage, Region
from stages.m3_paged_kv.block_pool import BlockPool, Pool


class PagedCache:
    """Block tables by request id, over one pool on the device and one for swapped requests on the CPU.

    Two requests may hold the same block (`fork`). A request that is about to write into it gets a copy first: `grow`
    notes the copy, `take_copies` hands the notes to the plan.
    """

    def __init__(self, num_blocks: int, block_size: int, num_cpu_blocks: int = 0, pool: Pool | None = None) -> None:
        self.block_size = block_size
        self.pool = pool or BlockPool(num_blocks)
        self.cpu_pool = BlockPool(num_cpu_blocks)
        self.tables: dict[str, list[int]] = {}
        self.swapped_tables: dict[str, list[int]] = {}
        self._stored: dict[str, int] = {}
        self.copies: BlockCopies = []

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def fits(self, num_tokens: int, samples: int = 1) -> bool:
        """Could a request of this many tokens run if it were alone? Each further sample ends in a block of its own."""
        return self.blocks_for(num_tokens) + samples - 1 <= self.pool.num_blocks

    def can_admit(self, request: Request) -> bool:
        """Room for all its tokens and the first new one, and a block for each other request, so that none is preempted
        at once."""
        headroom = len(self.tables) + len(request.siblings)
        return self.blocks_for(request.num_tokens + 1) + headroom <= self.pool.num_free

    def attach_prefix(self, request: Request) -> None:
        """None of its tokens are in the cache before it starts (m6 changes that)."""

    def grow(self, request: Request, upto: int) -> bool:
        """Also replaces shared blocks that are about to be written."""
        table = self.tables.get(request.id, [])
        missing = max(0, self.blocks_for(upto) - len(table))
        shared = self._shared(table, request.num_computed_tokens) if self.pool.num_shared else []
        if not missing and not shared:  # most decodes
            return True
        if missing + len(shared) > self.pool.num_free:
            return False
        for i in shared:  # copy on write
            [copy] = self.pool.take(1)
            self.copies.append((table[i], copy))
            self.pool.release([table[i]])
            table[i] = copy
        table += self.pool.take(missing)
        self.tables[request.id] = table
        return True

    def _shared(self, table: list[int], start: int) -> list[int]:
        """Which blocks of a table have several owners, of those with tokens from `start` on."""
        return [i for i in range(start // self.block_size, len(table)) if self.pool.ref_counts[table[i]] > 1]

    def mark_computed(self, request: Request, upto: int) -> None:
        request.num_computed_tokens = upto
        self._stored[request.id] = upto

    def block_table(self, request: Request) -> Sequence[int]:
        return self.tables[request.id]

    def fork(self, parent: Request, child: Request) -> None:
        """The child starts with the parent's blocks; nothing is copied before one of them writes."""
        self.tables[child.id] = list(self.tables[parent.id])
        self.pool.share(self.tables[child.id])
        self.mark_computed(child, parent.num_computed_tokens)

    def free(self, request: Request) -> None:
        self.pool.release(self.tables.pop(request.id, []))
        self.cpu_pool.release(self.swapped_tables.pop(request.id, []))
        self._stored.pop(request.id, None)

    def swap_out(self, request: Request) -> BlockCopies | None:
        """Move a request to the CPU pool: (device block, CPU block) pairs, or None where that has no room."""
        table = self.tables[request.id]
        if len(table) > self.cpu_pool.num_free:
            return None
        cpu_table = self.cpu_pool.take(len(table))
        self.pool.release(self.tables.pop(request.id))
        self.swapped_tables[request.id] = cpu_table
        return list(zip(table, cpu_table, strict=True))

    def swap_in(self, request: Request) -> BlockCopies | None:
        """Bring a request back: (CPU block, device block) pairs, or None where there is no room for all its tokens and
        a block for each running request."""
        cpu_table = self.swapped_tables[request.id]
        if self.blocks_for(request.num_tokens) + len(self.tables) > self.pool.num_free:
            return None
        table = self.pool.take(len(cpu_table))
        self.cpu_pool.release(self.swapped_tables.pop(request.id))
        self.tables[request.id] = table
        return list(zip(cpu_table, table, strict=True))

    def take_copies(self) -> BlockCopies:
        copies, self.copies = self.copies, []
        return copies

    def usage(self) -> KVUsage:
        """A block counts once, however many share it; what is not stored is the unused tail of last blocks."""
        tails = {table[-1]: len(table) * self.block_size - self._stored[id] for id, table in self.tables.items()}
        used = self.pool.num_blocks - self.pool.num_free
        reserved = used * self.block_size
        stored = reserved - sum(tails.values())
        return KVUsage(self.pool.num_blocks * self.block_size, reserved, stored, used)

    def regions(self) -> list[Region]:
        size = self.block_size
        held: dict[int, Region] = {}
        for id, table in self.tables.items():
            for index, block in enumerate(table):
                stored = min(size, max(0, self._stored[id] - index * size))
                owners = (*held[block].owners, id) if block in held else (id,)
                held[block] = Region(block * size, size, stored, owners)
        return list(held.values())

    def check_integrity(self) -> None:
        for pool, tables in ((self.pool, self.tables), (self.cpu_pool, self.swapped_tables)):
            owners = Counter(block for table in tables.values() for block in table)
            for block, count in enumerate(pool.ref_counts):
                assert count == owners[block], f"block {block}: {owners[block]} owners, counted {count}"
            assert pool.num_blocks - pool.num_free == len(owners), "blocks are in use that belong to no request"
        assert self.tables.keys() | self.swapped_tables.keys() == self._stored.keys()
        for id, table in self.tables.items():
            assert len(set(table)) == len(table), f"{id} holds a block twice"
            assert len(table) >= self.blocks_for(self._stored[id]), f"{id} stores more tokens than its blocks hold"
