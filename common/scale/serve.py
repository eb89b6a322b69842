"""The Serve application: for `serve deploy`, and for `serve --replicas` on the command line."""

# pyright: reportMissingImports=false
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Generator
from dataclasses import asdict
from typing import Any

import ray
from ray import serve

from common.config import EngineConfig
from common.errors import UserError, require
from common.execution.threads import usable_cpus
from common.models.load import open_source
from common.scale.front import Front
from common.scale.replica import Replica
from common.serving.listener import address, listen
from common.serving.options import ServerOptions


def application(args: dict[str, Any]) -> Any:
    """args: the stage's `build`, and options of the `engine`, of the `server`, and, for Serve, of each `replica`."""
    engine, options = args.get("engine", {}), ServerOptions(**args.get("server", {}))
    ends = {"graceful_shutdown_timeout_s": options.drain}
    passing: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": 1 << 14, **ends}
    replica: dict[str, Any] = {
        "num_replicas": options.replicas,
        "max_ongoing_requests": engine.get("max_num_seqs", EngineConfig.max_num_seqs) + options.max_queue,
        "max_queued_requests": options.max_queue,
        "request_router_config": {"request_router_class": "common.scale.router.PrefixRouter"},
        "max_constructor_retry_count": 1,
        **ends,
        **args.get("replica", {}),
    }
    engines: Any = serve.deployment(Replica, name="replica", **replica)
    front: Any = serve.deployment(serve.ingress()(Front), name="front", **passing)
    return front.bind(engines.bind(args["build"], engine, vars(options)), vars(options))


@contextlib.contextmanager
def cluster(config: EngineConfig) -> Generator[None]:
    """The cluster that RAY_ADDRESS names, or one of this machine alone, until the end of the block."""
    open_source(config.model, config.torch_device, progress=None)  # downloads or converts once, not in each engine
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    place = os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = {} if place else {"num_cpus": usable_cpus(), "include_dashboard": False}
    ray.init(place or "local", logging_level=logging.WARNING, log_to_driver=False, **local)  # logs are in /tmp/ray
    try:
        yield
    finally:
        ray.shutdown()


def share(engines: int | None, config: EngineConfig) -> tuple[int, dict[str, float]]:
    """How many, by default one for each GPU or machine, and what one takes: GPUs, or its part of a machine's CPUs."""
    if config.torch_device.type == "cuda":
        each, gpus = config.tensor_parallel_size, int(ray.cluster_resources().get("GPU", 0))
        number = engines or max(1, gpus // each)
        require(gpus >= number * each, f"{number} engines need {number * each} GPUs: Ray has {gpus}")
        return number, {"num_cpus": 1, "num_gpus": each}
    cpus = [node["Resources"]["CPU"] for node in ray.nodes() if node["Alive"] and "CPU" in node["Resources"]]
    number = engines or len(cpus)
    on_one = -(-number // len(cpus))
    return number, {"num_cpus": min(cpus) // on_one or min(cpus) / on_one}


def run(build: str, config: EngineConfig, options: ServerOptions) -> None:
    """Serve until SIGTERM or Ctrl-C, which raise `SystemExit` and `KeyboardInterrupt` when open requests have ended."""
    with listen(options) as listener:  # a port in use is found before Ray starts, whose proxy binds it
        url, port = address(listener), listener.getsockname()[1]
    with cluster(config), contextlib.ExitStack() as stack:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # Ray's own handler says 15
        stack.callback(serve.delete, "folovllm")
        serve.start(proxy_location="HeadOnly", http_options={"host": options.host, "port": port})
        try:
            engine = asdict(config) | {"device": config.torch_device.type}  # a GPU is the one that Ray shows it
            args = {"build": build, "engine": engine, "server": vars(options)}
            args["replica"] = {"ray_actor_options": share(options.replicas, config)[1]}
            serve.run(application(args), name="folovllm", route_prefix="/")
        except RuntimeError as error:
            why = serve.status().applications["folovllm"].deployments["replica"].message.strip() or str(error)
            raise UserError(f"no replica starts: {why.splitlines()[-1].rpartition('UserError: ')[2]}") from None
        print(f"{config.model}, {options.replicas} replicas: {url}/v1 (Ctrl-C ends it)", flush=True)
        signal.pause()
