#!/usr/bin/env bash
# Serves a model: OpenAI's protocols, and a page to talk to. It installs what is missing first.
#   bash scripts/serve.sh                 the quickstart's model, on this machine only
#   bash scripts/serve.sh FLAGS           the flags of tools/serve.py; --help lists them
#   bash scripts/serve.sh --ray FLAGS     several replicas on Ray Serve
set -euo pipefail
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$REPOSITORY/scripts/environment.sh"

extra=serve
[[ " $* " == *" --ray"* ]] && extra=ray
prepare_environment "$extra"
export TOKENIZERS_PARALLELISM=false
exec "$VENV/bin/python" "$REPOSITORY/tools/serve.py" "$@"
