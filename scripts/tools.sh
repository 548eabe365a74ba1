#!/usr/bin/env bash
# Installs what the tests need besides Rust; with `load`, also the peers of load runs (a gigabyte). Everything but system packages goes into .tools/ of this checkout, and node_modules beside
# the tests that need them. Running it again costs a second.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p .tools

missing=0
say_missing() { # WHAT, WHAT IS LOST WITHOUT IT, HOW TO GET IT
    echo "MISSING: $1. Without it $2. Get it: $3" >&2
    missing=1
}
has() { command -v "$1" >/dev/null; }

# System packages, installed where that can be done without asking anybody.
need=()
has chromium || need+=(chromium)
has nginx || need+=(nginx-light)
has haproxy || need+=(haproxy)
has valgrind || need+=(valgrind)
has redis-server || has valkey-server || need+=(redis-server)
has node && has npm || need+=(nodejs npm)
has java || need+=(default-jre-headless)
has mvn || need+=(maven)
has perl || say_missing perl "OpenSSL for the Kafka client cannot be built, and no test either" "apt-get install perl"
has strace || need+=(strace)
has g++ || need+=(g++)
has git || need+=(git)
python3 -c 'import ensurepip, venv' 2>/dev/null || need+=(python3-venv)
if [ ${#need[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && has apt-get; then
    echo "installing ${need[*]}"
    if ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${need[@]}" >/dev/null; }; then
        echo "apt-get could not install all of them; what is missing is named below" >&2
    fi
fi
has chromium || say_missing chromium "the page's tests are skipped" "apt-get install chromium"
has nginx || say_missing nginx "tests and load runs beside it are skipped" "apt-get install nginx-light"
has haproxy || say_missing haproxy "it is not measured in load runs" "apt-get install haproxy"
has valgrind || say_missing valgrind "instructions are not counted" "apt-get install valgrind"
has redis-server || has valkey-server || say_missing redis "tests of shared state are skipped" "apt-get install redis-server"
has node && has npm || say_missing "Node 20 and npm" "tests with OpenAI's Node SDK and of the page are skipped" "https://nodejs.org"
python3 -c 'import ensurepip, venv' 2>/dev/null || say_missing "Python 3 with venv" "tests with Python clients are skipped" "apt-get install python3-venv"
has g++ || say_missing "a C++ compiler" "the Kafka client cannot be built, and no test either" "apt-get install g++"
has perl || say_missing perl "OpenSSL for the Kafka client cannot be built, and no test either" "apt-get install perl"
has strace || say_missing strace "tests of failing disks are skipped" "apt-get install strace"
has java && has mvn || say_missing "Java 17 and Maven" "tests with Kafka are skipped" "apt-get install default-jre-headless maven"

# Other people's clients: OpenAI's SDKs and a WebSocket client, in Python and Node. What is installed is what is pinned.
stamp() { cat "$@" | sha256sum | cut -c1-16; }
if python3 -c 'import ensurepip, venv' 2>/dev/null; then
    want=$(stamp tests/clients/requirements.txt)
    if [ "$(cat .tools/python/.stamp 2>/dev/null)" != "$want" ]; then
        echo "installing Python clients into .tools/python"
        python3 -m venv .tools/python
        .tools/python/bin/pip install --quiet --disable-pip-version-check -r tests/clients/requirements.txt
        echo "$want" > .tools/python/.stamp
    fi
    # The second model, and llama.cpp as judge of the embedded one.
    want=$(stamp slm/llama_cpp/server.txt slm/llama_cpp/model.txt)
    if [ "$(cat .tools/llama-cpp/.stamp 2>/dev/null)" != "$want" ]; then
        slm/llama_cpp/install.sh
        echo "$want" > .tools/llama-cpp/.stamp
    fi
fi
# Envoy and LiteLLM, for load runs.
if [ "${1:-}" = load ] && python3 -c 'import ensurepip, venv' 2>/dev/null; then
    want=$(stamp loadtests/requirements.txt)
    if [ "$(cat .tools/load/.stamp 2>/dev/null)" != "$want" ]; then
        echo "installing peers of load runs into .tools/load"
        python3 -m venv .tools/load
        .tools/load/bin/pip install --quiet --disable-pip-version-check -r loadtests/requirements.txt
        echo "$want" > .tools/load/.stamp
    fi
fi
if has npm; then
    for folder in tests/clients tests/browser tests/identity; do
        [ -f "$folder/package.json" ] || continue
        want=$(stamp "$folder/package.json" "$folder/package-lock.json")
        if [ "$(cat "$folder/node_modules/.stamp" 2>/dev/null)" != "$want" ]; then
            echo "installing npm packages of $folder"
            npm ci --silent --no-audit --no-fund --prefix "$folder"
            echo "$want" > "$folder/node_modules/.stamp"
        fi
    done
fi
# A real Apache Kafka: its jars, and a folder formatted once, which every broker of the tests begins with a copy of.
if has java && has mvn; then
    want=$(stamp tests/kafka/pom.xml)
    if [ "$(cat .tools/kafka/.stamp 2>/dev/null)" != "$want" ]; then
        echo "installing Apache Kafka into .tools/kafka"
        rm -rf .tools/kafka
        mkdir -p .tools/kafka
        mvn --quiet --batch-mode --file tests/kafka/pom.xml org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies \
            -DincludeScope=runtime -DoutputDirectory="$PWD/.tools/kafka/libs"
        cat > .tools/kafka/format.properties <<X
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:9093
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://127.0.0.1:9092,CONTROLLER://127.0.0.1:9093
log.dirs=$PWD/.tools/kafka/formatted
X
        java -cp '.tools/kafka/libs/*' kafka.tools.StorageTool format --cluster-id aGVhZGdhdGUta2Fma2EtMQ \
            --config .tools/kafka/format.properties >.tools/kafka/format.log 2>&1 || { cat .tools/kafka/format.log >&2; exit 1; }
        echo "$want" > .tools/kafka/.stamp
    fi
fi

if [ $missing = 0 ]; then echo "tools are here"; fi
if [ $missing = 1 ] && [ "${HEADGATE_REQUIRE_SERVICES:-}" = 1 ]; then
    echo "HEADGATE_REQUIRE_SERVICES=1: nothing may be missing" >&2
    exit 69
fi
