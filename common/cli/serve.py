"""`serve`: the stage as an OpenAI-compatible server."""

from contextlib import ExitStack

from common.cli.generate import ready_engine
from common.config import EngineConfig
from common.engine import Build
from common.errors import UserError
from common.execution.cores import in_own_thread
from common.serving.options import ServerOptions


def serve(build: Build, config: EngineConfig, options: ServerOptions) -> None:
    """Returns after SIGTERM, when all requests have been answered; Ctrl-C then raises `KeyboardInterrupt`."""
    try:
        from common.serving import server
        from common.serving.listener import listen
        from common.serving.spans import spans_to
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs {error.name}, which is not installed: pip install '.[serve]'") from None
    with (
        listen(options) as listener,  # bad options are refused before a model is loaded
        spans_to(options.spans) as spans,
        ExitStack() as stack,
    ):
        engine = in_own_thread(lambda: stack.enter_context(ready_engine(build, config)))
        server.run(engine, options, listener, spans)
