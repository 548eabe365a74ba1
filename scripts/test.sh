#!/usr/bin/env bash
# Everything that must hold. Each stage runs even where one before it failed, and the summary at the end names them all.
#
# HEADGATE_REQUIRE_SERVICES=1 makes a missing service (Redis, nginx, Chromium, Python clients) a failure instead of a skip.
set -uo pipefail
cd "$(dirname "$0")/.."

export CARGO_TERM_COLOR="${CARGO_TERM_COLOR:-never}"
# Other people's clients, as scripts/tools.sh installed them.
if [ -z "${HEADGATE_PYTHON:-}" ] && [ -x .tools/python/bin/python ]; then
    HEADGATE_PYTHON="$PWD/.tools/python/bin/python"
    export HEADGATE_PYTHON
fi

logs=$(mktemp -d)
child=
# Whoever interrupts this wants all of it gone: each stage is a process group of its own, and what its tests have started are others.
below() { # PID: all its descendants, the youngest first
    local pid
    for pid in $(ps -o pid= --ppid "$1" 2>/dev/null); do
        below "$pid"
        echo "$pid"
    done
}
stop() {
    trap - EXIT INT TERM
    if [ -n "$child" ]; then
        # Found before any of them is gone: an orphan has no parent to be found by.
        local pids
        pids=$(below "$child")
        kill -TERM -- "-$child" $pids 2>/dev/null
        wait "$child" 2>/dev/null
    fi
    rm -rf "$logs"
}
trap stop EXIT
trap 'stop; exit 130' INT TERM
set -m

names=() results=() times=()
failed=0

stage() { # NAME COMMAND...
    local name=$1 log begun code
    shift
    log="$logs/${#names[@]}"
    begun=$SECONDS
    printf '\n== %s: %s\n' "$name" "$*"
    (set -o pipefail; "$@" 2>&1 </dev/null | tee "$log") &
    child=$!
    wait "$child"
    code=$?
    child=
    names+=("$name")
    times+=($((SECONDS - begun)))
    if [ $code = 0 ]; then results+=(ok); else results+=(FAILED) failed=1; fi
}

browser() { (cd tests/browser && node --test --test-concurrency=1); }
# What the tests have built will do: this asks whether all is correct, not how fast.
smoke() {
    local built="${CARGO_TARGET_DIR:-target}/debug"
    cargo build --quiet --workspace --bin headgate --bin headgate-load && "$built/headgate-load" smoke --headgate "$built/headgate"
}

stage format cargo fmt --all --check
stage dependencies scripts/deny.sh
stage lints cargo clippy --workspace --all-targets --keep-going --quiet -- -D warnings
# What `make demo` builds.
stage lints-demo cargo clippy -p headgate-gateway -p headgate-orchestrator --no-default-features --all-targets --keep-going --quiet -- -D warnings
# What is built for brokers in plain text, without OpenSSL.
stage lints-kafka cargo clippy -p headgate-gateway -p headgate-orchestrator --no-default-features --features headgate-gateway/kafka --all-targets --keep-going --quiet -- -D warnings
stage tests cargo test --workspace --no-fail-fast
if [ -d tests/browser/node_modules ] && command -v chromium >/dev/null; then
    stage page browser
elif [ "${HEADGATE_REQUIRE_SERVICES:-}" = 1 ]; then
    stage page sh -c 'echo "the page needs Chromium and the npm packages of tests/browser: run scripts/tools.sh" >&2; exit 1'
else
    echo "SKIPPED the page: it needs Chromium and the npm packages of tests/browser: run scripts/tools.sh"
fi
if [ -f loadtests/src/main.rs ]; then stage load smoke; fi
if command -v valgrind >/dev/null && [ "$(uname -m)" = x86_64 ]; then
    stage counts cargo run --quiet --release -p headgate-benches
elif [ "${HEADGATE_REQUIRE_SERVICES:-}" = 1 ]; then
    stage counts sh -c 'echo "instruction counts need valgrind on x86-64: run scripts/tools.sh" >&2; exit 1'
else
    echo "SKIPPED instruction counts: they need valgrind on x86-64: run scripts/tools.sh"
fi

# What cargo and node counted, over all stages.
sum() { sed -nE "s/$1/\1/p" "$logs"/* | awk '{ n += $1 } END { print n + 0 }'; }
passed=$(($(sum '^test result: [^.]*\. ([0-9]+) passed.*') + $(sum '^# pass ([0-9]+)') + $(sum '^ℹ pass ([0-9]+)')))
broken=$(($(sum '^test result:.* ([0-9]+) failed.*') + $(sum '^# fail ([0-9]+)') + $(sum '^ℹ fail ([0-9]+)')))
ignored=$(sum '^test result:.* ([0-9]+) ignored.*')

printf '\n== Summary\n'
for i in "${!names[@]}"; do printf '%-14s %-7s %4d s\n' "${names[$i]}" "${results[$i]}" "${times[$i]}"; done
printf '%d tests passed, %d failed, %d ignored, in %d s\n' "$passed" "$broken" "$ignored" "$SECONDS"
grep -h '^SKIPPED' "$logs"/* | sort -u
if [ $failed = 0 ]; then echo "This tree is good."; else
    grep -hE '^test .* FAILED$|^error(\[|:)' "$logs"/* | sort -u | head -40
    echo "This tree is NOT good."
fi
exit $failed
