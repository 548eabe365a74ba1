#!/usr/bin/env bash
# Installs what the tests need besides Rust. Everything but system packages goes into .tools/ of this checkout. Running it again costs a second.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p .tools

# System packages: a browser for the page, nginx and Redis as real peers. Without root their tests say what is missing.
need=()
command -v chromium >/dev/null || need+=(chromium)
command -v nginx >/dev/null || need+=(nginx-light)
if [ ${#need[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing ${need[*]}"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${need[@]}" >/dev/null
    else
        echo "MISSING: ${need[*]}: install them with the system's package manager; until then their tests are skipped" >&2
    fi
fi

# Other people's clients: OpenAI's SDKs and a WebSocket client, in Python and Node.
stamp() { cat "$@" | sha256sum | cut -c1-16; }
want=$(stamp tests/clients/requirements.txt)
if [ "$(cat .tools/python/.stamp 2>/dev/null)" != "$want" ]; then
    echo "installing Python clients into .tools/python"
    python3 -m venv .tools/python
    .tools/python/bin/pip install --quiet --disable-pip-version-check -r tests/clients/requirements.txt
    echo "$want" > .tools/python/.stamp
fi
for folder in tests/clients tests/browser; do
    [ -f "$folder/package.json" ] || continue
    want=$(stamp "$folder/package.json" "$folder/package-lock.json")
    if [ "$(cat "$folder/node_modules/.stamp" 2>/dev/null)" != "$want" ]; then
        echo "installing npm packages of $folder"
        npm ci --silent --no-audit --no-fund --prefix "$folder"
        echo "$want" > "$folder/node_modules/.stamp"
    fi
done

# The second model, and llama.cpp as judge of the embedded one.
slm/llama_cpp/install.sh
