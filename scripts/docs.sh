#!/usr/bin/env bash
# Writes every generated document anew: schemas and errors of the wire, schema and reference of the config, the index of decisions.
# With --check it writes nothing and fails where one is not fresh; `cargo test` holds the same.
set -euo pipefail
cd "$(dirname "$0")/.."

index() {
    cat <<'HEAD'
# Decisions

One page each, ten lines or so: the question, the choice, why, and what it costs. A new dependency needs one. Numbers are never used twice; a
decision that is overturned stays, and says which one took its place.

| | |
|---|---|
HEAD
    for file in docs/decisions/[0-9]*.md; do
        name=$(basename "$file")
        # The number stands in the name already.
        title=$(head -n 1 "$file" | sed -E 's/^# *//; s/^[0-9]+[.:] *//')
        echo "| ${name%%-*} | [$title]($name) |"
    done
}

case "${1:-}" in
    "")
        index > docs/decisions/README.md
        cargo run --quiet -p headgate-contracts --example schema
        HEADGATE_WRITE=1 cargo test --quiet -p headgate-config --test generated
        ;;
    --check)
        index | diff - docs/decisions/README.md || { echo "docs/decisions/README.md is not fresh: run scripts/docs.sh" >&2; exit 1; }
        cargo test --quiet -p headgate-contracts --lib schema
        cargo test --quiet -p headgate-config --test generated
        ;;
    *) echo "usage: $0 [--check]" >&2; exit 64 ;;
esac
