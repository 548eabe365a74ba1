#!/usr/bin/env bash
# Runs the gateway in front of SmolLM2-135M-Instruct, served by llama.cpp's own server on a free port. Both end together.
# Whatever is given goes to `headgate dev`, e.g. `scripts/demo-smollm2.sh --listen 127.0.0.1:8000`.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.tools/llama-cpp/bin/python
headgate=target/release/headgate
[ -x "$python" ] || { echo "llama.cpp and the model are missing: run slm/llama_cpp/install.sh" >&2; exit 69; }
[ -x "$headgate" ] || { echo "headgate is not built: run cargo build --release --bin headgate" >&2; exit 69; }

# Its words come through a pipe, so that we see the moment it can be asked; it gets no interrupt of the terminal's, but ours.
exec 3< <(trap '' INT; exec "$python" slm/llama_cpp/serve.py --port 0 2>/dev/null)
model=$!
trap 'kill -TERM "$model" 2>/dev/null || true' EXIT
trap 'exit 130' INT TERM

url=
while read -r -t 120 line <&3; do
    case "$line" in
        "listening "*) url=${line#listening }; break ;;
        *) echo "$line" ;;
    esac
done
[ -n "$url" ] || { echo "llama.cpp's server did not start; try: $python slm/llama_cpp/serve.py --port 0" >&2; exit 69; }
# It goes on talking; nobody may have to listen for it to go on working.
cat <&3 >/dev/null &

"$headgate" dev --model-server "$url" "$@" &
gateway=$!
trap 'kill -TERM "$gateway" 2>/dev/null || true; wait "$gateway" || true; kill -TERM "$model" 2>/dev/null || true' EXIT
wait "$gateway"
