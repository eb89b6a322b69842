"""Builds the Serve application: from the arguments in a file of `serve deploy`, or from the command line's options."""

# pyright: reportMissingImports=false
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.deployment import Application

from common.config import EngineConfig
from common.errors import UserError, require_number, unknown
from common.scale.front import Front
from common.scale.replica import Replica
from common.serving.options import ServerOptions, replicas_of

ROUTERS = {
    "prefix": "common.scale.router.PrefixRouter",
    "load": RequestRouterConfig().request_router_class,  # Serve's default, the power of two choices
}
FULL = 1 << 14  # requests in flight of the front, which only passes them on
LAST_WORDS = 5  # seconds more than a drain that Serve leaves a replica
CACHES = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}  # as in `serve` without replicas


def application(args: Mapping[str, Any]) -> Application:
    """`args`: `build`, as in `stages.m6_prefix_caching.engine:build`; `engine` and `server`: options of these; `cpus`
    and `gpus` of a replica (1 and 0); `router`: another class, by its path."""
    known = ("build", "engine", "server", "cpus", "gpus", "router")
    for name in args:
        if name not in known:
            raise unknown("argument", name, known)
    if ":" not in str(args.get("build")):
        raise UserError("give build, as in stages.m6_prefix_caching.engine:build")
    server = ServerOptions(**args.get("server") or {})
    engine: dict[str, Any] = dict(args.get("engine") or {})
    cpus, gpus = args.get("cpus", 1), args.get("gpus", 0)
    require_number("cpus", cpus, int | float, 0, above=True)
    require_number("gpus", gpus, int | float, 0)
    running = engine.get("max_num_seqs", EngineConfig.max_num_seqs)
    routing: dict[str, Any] = {"request_router_class": args.get("router") or ROUTERS[server.router]}
    fewest, most = replicas_of(server.replicas)
    scaling: dict[str, Any] = {"num_replicas": most}
    if fewest < most:
        scaling = {"autoscaling_config": AutoscalingConfig(
            min_replicas=fewest, max_replicas=most, target_ongoing_requests=running,
            upscale_delay_s=5, downscale_delay_s=60, look_back_period_s=10)}  # fmt: skip
    replicas: Any = serve.deployment(
        Replica,
        name="replica",
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": CACHES}},
        max_ongoing_requests=running + server.max_queue,
        max_queued_requests=server.max_queue,
        request_router_config=RequestRouterConfig(**routing),
        health_check_period_s=5,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=server.drain + LAST_WORDS,
        max_constructor_retry_count=1,
        **scaling,
    )
    front: Any = serve.deployment(
        serve.ingress()(Front),
        name="front",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=FULL,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=server.drain + LAST_WORDS,
    )
    options = dict(vars(server))
    return front.bind(replicas.bind(args["build"], engine, options), options)
