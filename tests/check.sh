#!/bin/sh
# Every check of the project, as the README's second command and CI run it.
set -eu
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
mypy
lint-imports --no-cache
pytest -n 2 --dist loadgroup "$@"
