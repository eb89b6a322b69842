"""`serve`: the stage as an OpenAI-compatible server."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from common.cli.generate import ready_engine
from common.config import EngineConfig
from common.engine import Build
from common.errors import UserError
from common.execution.cores import in_own_thread


def serve(build: Build, config: EngineConfig, **options: Any) -> None:
    """`options` are those of `ServerOptions`. Returns after SIGTERM, when everybody has been answered; Ctrl-C raises
    `KeyboardInterrupt` then."""
    try:
        from common.serving import server
        from common.serving.listener import listen
        from common.serving.options import ServerOptions
        from common.serving.spans import spans_to
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs {error.name}, which is not installed: pip install '.[serve]'") from None
    checked = ServerOptions(**options)
    with (
        listen(checked) as listener,  # what cannot be is said before a model is loaded
        spans_to(checked.spans) as spans,
        ExitStack() as stack,
    ):
        engine = in_own_thread(lambda: stack.enter_context(ready_engine(build, config)))
        server.run(engine, checked, listener, spans)
