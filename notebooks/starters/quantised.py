"""One's own `gptq` on the first layers of the embedded model: an engine's answer before and after.

`python -m notebooks.starters.quantised`. All layers take minutes: `make stage7 quantize`.
"""

from itertools import islice

import torch

import stages
from common import SamplingParams
from common.config import DEFAULT_MODEL
from common.models.load import open_source
from common.models.quantized_weight import QuantizedWeight
from stages.m7_gptq.calibrate import calibrate_layers
from stages.m7_gptq.checkpoint.texts import calibration_tokens
from stages.m7_gptq.linear import QuantizedLinear
from stages.m7_gptq.settings import Settings

LAYERS = 3
SEQUENCES = 8

if __name__ == "__main__":
    chat, params = [{"role": "user", "content": "What is the capital of France?"}], SamplingParams(max_tokens=32)
    source, device = open_source(DEFAULT_MODEL), torch.device("cpu")
    text = calibration_tokens(source.tokenizer())[:SEQUENCES]
    with torch.inference_mode(), stages.build("m5", model=DEFAULT_MODEL, device=device, fused_kernels=False) as engine:
        layers = engine.runner.model.layers
        print(f"before: {engine.generate([chat], params)[0].text!r}", flush=True)
        for index, layer in enumerate(islice(calibrate_layers(source, text, Settings(), device), LAYERS)):
            print(f"layer {index} of {len(layers)} is quantised by your gptq", flush=True)
            for name, weight in layer.weights.items():
                assert isinstance(weight, QuantizedWeight)
                setattr(layers[index], name, QuantizedLinear(weight))
        print(f"after: {engine.generate([chat], params)[0].text!r}")
        print("`make stage7 quality` measures what 4 bits cost in all layers.\n")
