#!/usr/bin/env bash
# Checks licences, sources and bans of every dependency (deny.toml). Installs cargo-deny into .tools/ once.
# `scripts/deny.sh advisories` asks the advisory database too, which it fetches from the network.
set -euo pipefail
cd "$(dirname "$0")/.."
version=0.20.2
deny=.tools/deny/bin/cargo-deny
if [ ! -x "$deny" ]; then
    echo "installing cargo-deny $version into .tools/ (some minutes, once)"
    cargo install cargo-deny --version "$version" --locked --quiet --root .tools/deny
fi
if [ $# -eq 0 ]; then set -- bans licenses sources; fi
"$deny" check "$@"
