"""The Serve application: for `serve deploy`, and for `serve --replicas` on the command line."""

# pyright: reportMissingImports=false
import contextlib
import logging
import os
import re
import signal
import sys
from collections.abc import Generator
from dataclasses import fields
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from common.config import EngineConfig
from common.errors import UserError, one_line
from common.execution.threads import usable_cpus
from common.models.load import open_source
from common.scale.front import Front
from common.scale.replica import Replica
from common.serving.listener import address, listen
from common.serving.options import ServerOptions, replicas_of

ROUTERS = {"prefix": "common.scale.router.PrefixRouter", "load": RequestRouterConfig().request_router_class}
FULL = 1 << 14  # requests in flight of the front, which only passes them on
CACHES = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}  # as in `serve` without replicas


def application(args: dict[str, Any]) -> Any:
    """`args`: see serve.yaml. `router`: instead of the server's option, the path of a class."""
    return _application(**args)


def _application(
    build: str, engine: dict[str, Any] | None = None, server: dict[str, Any] | None = None,
    cpus: float = 1, gpus: float = 0, router: str | None = None,
) -> Any:  # fmt: skip
    options, engine = ServerOptions(**server or {}), engine or {}
    running = engine.get("max_num_seqs", EngineConfig.max_num_seqs)
    routing: dict[str, Any] = {"request_router_class": router or ROUTERS[options.router]}
    fewest, most = replicas_of(options.replicas)
    number: dict[str, Any] = {"num_replicas": most}
    if fewest < most:
        scaling: dict[str, Any] = {"min_replicas": fewest, "max_replicas": most, "target_ongoing_requests": running}
        scaling |= {"upscale_delay_s": 5, "downscale_delay_s": 60, "look_back_period_s": 10}
        number = {"autoscaling_config": AutoscalingConfig(**scaling)}
    ends: dict[str, Any] = {"graceful_shutdown_timeout_s": options.drain + 5, "graceful_shutdown_wait_loop_s": 0.5}
    replicas: Any = serve.deployment(
        Replica,
        name="replica",
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": CACHES}},
        max_ongoing_requests=running + options.max_queue,
        max_queued_requests=options.max_queue,
        request_router_config=RequestRouterConfig(**routing),
        health_check_period_s=5,
        max_constructor_retry_count=1,
        **number,
        **ends,
    )
    few: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": FULL}
    front: Any = serve.deployment(serve.ingress()(Front), name="front", **few, **ends)
    return front.bind(replicas.bind(build, engine, vars(options)), vars(options))


@contextlib.contextmanager
def cluster(engines: int, config: EngineConfig) -> Generator[tuple[float, int]]:
    """The cluster that RAY_ADDRESS names, or one of this machine alone, until the end of the block. Yields what one of
    so many engines may take: CPUs, and GPUs."""
    open_source(config.model, config.torch_device, progress=None)  # downloads or converts once, not in each engine
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")  # Ray's own logs are under /tmp/ray
    place, cpus, gpus = os.environ.get("RAY_ADDRESS"), usable_cpus(), int(config.torch_device.type == "cuda")
    local: dict[str, Any] = {} if place else {"num_cpus": cpus, "include_dashboard": False}
    ray.init(place or "local", logging_level=logging.WARNING, **local)
    try:
        yield 1 if gpus or place else cpus // engines or cpus / engines, gpus
    finally:
        ray.shutdown()


def portable(config: EngineConfig) -> dict[str, Any]:
    """Its options, for another process: a GPU is the one that Ray shows it."""
    return {f.name: getattr(config, f.name) for f in fields(config)} | {"device": config.torch_device.type}


def run(build: str, config: EngineConfig, options: ServerOptions) -> None:
    """Serve until SIGTERM or Ctrl-C, which raise `SystemExit` and `KeyboardInterrupt`; a second one ends the drain."""
    with listen(options) as listener:  # a port in use is found before Ray starts, whose proxy binds it
        url, port = address(listener), listener.getsockname()[1]
    with cluster(replicas_of(options.replicas)[1], config) as (cpus, gpus), contextlib.ExitStack() as stack:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # Ray's own handler says 15
        stack.callback(serve.shutdown)
        serve.start(proxy_location="HeadOnly", http_options={"host": options.host, "port": port})
        try:
            app = _application(build, portable(config), vars(options), cpus, gpus)
            front: Any = serve.run(app, name="folovllm", route_prefix="/")
        except RuntimeError as error:
            said = re.findall(r"UserError: (.*)", str(error)) or [one_line(error)]
            raise UserError(f"no replica starts: {said[-1]}") from None
        print(f"{config.model}, {options.replicas} replicas: {url}/v1 (Ctrl-C ends it)", flush=True)
        try:
            signal.pause()
        finally:
            try:
                front.drain.remote(options.drain).result()
            except (KeyboardInterrupt, SystemExit):
                front.drain.remote(0.0).result()
