#!/bin/sh
# Environments of their own for real clients, in build/clients, and their tests against servers of this repository. The
# Python clients need three: some ask for other versions of what the others ask for. Those of npm run where node is.
set -eu
folder=build/clients
for name in agents structured load; do
    needs=tests/clients/requirements/$name.txt
    if ! cmp -s "$needs" "$folder/$name/.stamp"; then
        rm -rf "$folder/$name"
        "${1:-python3}" -m venv "$folder/$name"
        "$folder/$name/bin/python" -m pip install --quiet --requirement "$needs"
        cp "$needs" "$folder/$name/.stamp"
    fi
done
if command -v npm >/dev/null; then
    mkdir -p "$folder/npm"
    cp tests/clients/npm/* "$folder/npm"
    (cd "$folder/npm" && npm ci --no-audit --no-fund)
fi
"${1:-python3}" -m tests.clients "$folder"
"${1:-python3}" -m tests.clients.lm_eval --python "$folder/load/bin/python"
