#!/bin/sh
# Installs llama.cpp beside transformers, which is there: compiled for the instructions of this processor (PyPI has its
# Python package as source only), and its row in the table says for which. Without a compiler: its author's ready-made
# build for any processor, if there is one. The stamp is written only if it is installed: else the next run tries again.
set -eu
python=$1
stamp=$2
install() {
    "$python" -m pip install --constraint constraints.txt "$@" llama-cpp-python
}

if CMAKE_ARGS="-DGGML_NATIVE=ON ${CMAKE_ARGS:-}" install --no-binary llama-cpp-python --no-cache-dir; then
    touch "$stamp"
    exit
fi
echo "llama.cpp cannot be compiled here (it needs a C++ compiler): taking a build for any processor, which is slower" >&2
if install --only-binary llama-cpp-python --extra-index-url https://abetlen.github.io/llama-cpp-python/whl/cpu; then
    touch "$stamp"
else
    echo "there is none to be had either: the rows of llama.cpp will say that it is not installed" >&2
fi
