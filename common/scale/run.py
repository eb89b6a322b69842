"""`serve` with several replicas, on a Ray of its own, or on the cluster that RAY_ADDRESS names."""

# pyright: reportMissingImports=false
import contextlib
import queue
import re
import signal
from typing import Any

from ray import serve

from common.config import EngineConfig
from common.errors import UserError, one_line
from common.scale.cluster import cluster, portable
from common.scale.deploy import application
from common.serving.listener import address, listen
from common.serving.options import ServerOptions, replicas_of

ENDING = (signal.SIGINT, signal.SIGTERM)


def run(build: str, config: EngineConfig, options: ServerOptions) -> None:
    """Serve until SIGTERM, or Ctrl-C, which then raises `KeyboardInterrupt`. build: of the stage, `module:function`."""
    with listen(options) as listener:  # a port in use is found before Ray starts, whose proxy binds it
        url, port = address(listener), listener.getsockname()[1]
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()
    with cluster(replicas_of(options.replicas)[1], config) as (cpus, gpus):
        args = {"build": build, "engine": portable(config), "server": vars(options), "cpus": cpus, "gpus": gpus}
        previous = {number: signal.signal(number, lambda given, _: signals.put(given)) for number in ENDING}
        try:
            serve.start(proxy_location="HeadOnly", http_options={"host": options.host, "port": port})
            front = _deployed(args)
            print(f"{config.model}, {options.replicas} replicas: {url}/v1 (Ctrl-C ends it)", flush=True)
            given = signals.get()
            _drain(front, options.drain, signals)
        finally:
            serve.shutdown()
            for number, handler in previous.items():
                signal.signal(number, handler)
    if given == signal.SIGINT:
        raise KeyboardInterrupt


def _deployed(args: dict[str, Any]) -> Any:
    """Serve's handle of the front, when the first replicas are ready; the first one's complaint if they cannot be."""
    try:
        return serve.run(application(args), name="folovllm", route_prefix="/")
    except RuntimeError as error:
        said = re.findall(r"UserError: (.*)", str(error)) or [one_line(error)]
        raise UserError(f"no replica starts: {said[-1]}") from None


def _drain(front: Any, seconds: float, signals: queue.SimpleQueue[int]) -> None:
    """A second signal ends the wait."""
    waits = [front.drain.remote(seconds)]
    while True:
        try:
            waits[0].result(timeout_s=0.1)
            return
        except TimeoutError:
            with contextlib.suppress(queue.Empty):
                signals.get_nowait()
                waits.append(front.drain.remote(0.0))
