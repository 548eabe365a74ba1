#!/usr/bin/env bash
# Builds `headgate` laid out by what a load run calls: what is hot stands together, so that an event fetches less code
# (profile-guided optimisation, https://doc.rust-lang.org/rustc/profile-guided-optimization.html). Two release builds and a minute of load.
# Writes target/pgo/headgate-pgo. Needs `rustup` for the compiler's llvm-profdata, once.
set -euo pipefail
cd "$(dirname "$0")/.."
CARGO=${CARGO:-cargo}
out=$PWD/target/pgo
# Named, so that what runs while building is not counted as well.
host=$(rustc -vV | sed -n 's/^host: //p')

profdata=$(rustc --print target-libdir)/../bin/llvm-profdata
if [ ! -x "$profdata" ]; then
    command -v rustup >/dev/null || { echo "no llvm-profdata beside this compiler: install the llvm-tools of its version, or rustup" >&2; exit 1; }
    rustup component add llvm-tools
fi

build() { # RUSTFLAGS
    RUSTFLAGS=$1 "$CARGO" build --release --locked --target "$host" --target-dir "$out/build" -p headgate-gateway --bin headgate
}

echo "1 of 3: a build that counts"
rm -rf "$out/counts" "$out/counts.profdata"
build "-Cprofile-generate=$out/counts"
cp "$out/build/$host/release/headgate" "$out/headgate-counting"

echo "2 of 3: a load run that is counted"
"$CARGO" build --release --locked -p headgate-loadtests
workloads=()
for workload in W1 W2b W3 W3t W3c W3w W3m W5; do workloads+=(--workload "$workload"); done
target/release/headgate-load --only --peer headgate --peer headgate-bare --rounds 1 --window 1 "${workloads[@]}" --headgate "$out/headgate-counting" >/dev/null
"$profdata" merge -o "$out/counts.profdata" "$out/counts"

echo "3 of 3: the build that is laid out"
build "-Cprofile-use=$out/counts.profdata"
cp "$out/build/$host/release/headgate" "$out/headgate-pgo"
echo "target/pgo/headgate-pgo"
