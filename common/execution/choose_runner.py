"""How a stage's plans are executed: as the stage defines it, or with kept arrays and CUDA graphs."""

from collections.abc import Callable

from common.attention import Attention
from common.config import EngineConfig
from common.execution.choose import choose_draw
from common.execution.cuda_graphs import CudaRecorder, StepGraphs, step_shapes
from common.execution.step_inputs import StepBuilder
from common.models import Decoder
from common.plan import StepPlan
from common.runner import BuildBatch, Runner


def choose_runner(
    config: EngineConfig,
    model: Decoder,
    attention: Attention,
    batches: BuildBatch,
    move: Callable[[StepPlan], None],
    max_model_len: int,
    spare_block: int | None,
) -> Runner:
    """batches: the stage's definition of a step's tensors, for where fused kernels and graphs are off. spare_block: a
    block that the KV cache manager does not know, for the padding rows of CUDA graphs; None: no graphs."""
    if not config.fused_kernels and spare_block is None:
        return Runner(model, attention, batches, move)
    builder = StepBuilder(config.block_size, config.max_num_seqs)
    runner = Runner(model, attention, builder, move)
    if spare_block is not None:
        shapes, draw = step_shapes(config.max_num_seqs, config.max_num_batched_tokens), choose_draw(model.ops)
        runner.graphs = StepGraphs(model, attention, draw, builder, spare_block, max_model_len, shapes)
        runner.graphs.capture(CudaRecorder())
        if config.ranks is not None:
            config.ranks.on_close.append(runner.graphs.drop)
    return runner
