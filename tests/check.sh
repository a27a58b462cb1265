#!/bin/sh
# Every check of the project, as the README's second command and CI run it.
set -eu
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
mypy
lint-imports --no-cache
# One thread per worker: two workers with two threads each fight over two cores.
OMP_NUM_THREADS=1 pytest -n 2 -m "not long and not gpu and not alone" "$@"
pytest -m "alone and not long and not gpu" "$@"
