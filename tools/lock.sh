#!/bin/sh
# Write requirements/*.lock anew from pyproject.toml, with hashes and without any index's address.
set -eu
cd "$(dirname "$0")/.."
compile() {
    out=$1
    shift
    .venv/bin/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-strip-extras --python-version 3.11 \
        --custom-compile-command "make lock" "$@" --output-file "requirements/$out.lock"
}
compile agent pyproject.toml
compile server --extra server --excludes requirements/unneeded.txt pyproject.toml
compile dev --extra server --extra dev pyproject.toml
compile build requirements/build.in
