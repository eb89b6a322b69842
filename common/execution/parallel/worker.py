"""A rank that rank 0 has started: builds the same engine of its own part, and runs what it is told. Arguments: the
store's port, and its rank."""

import importlib
import os
import pickle
import sys

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from common.errors import UserError, one_line
from common.execution.cores import use_threads
from common.execution.parallel.ranks import SAID, Ranks
from common.execution.parallel.runner import follow
from common.execution.parallel.split import Split
from common.execution.parallel.start import Order, placed
from common.watch.progress import listen


def main() -> None:
    listen(lambda *_: None)  # rank 0 has the same to say
    rank, store = int(sys.argv[2]), TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False)
    order: Order = pickle.loads(bytes.fromhex(store.get("order").decode()))
    module, config, whole, threads = order
    try:
        use_threads(threads)
        mine = placed(config, rank, config.tensor_parallel_size)
        split = Split(whole, rank, config.tensor_parallel_size)
        ranks = mine.ranks = Ranks(split, store, mine.torch_device, rank)
        engine = importlib.import_module(module).build(mine)
        ranks.least(0)
        follow(engine.runner, ranks)
    except Exception as error:
        if "gloo" not in str(error):  # which would only say that another rank has ended
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            store.set(SAID, f"{kind}{one_line(error)}")
        os._exit(1)
    os._exit(0)  # at once: threads of the collectives may wait for ranks that have ended


if __name__ == "__main__":
    main()
