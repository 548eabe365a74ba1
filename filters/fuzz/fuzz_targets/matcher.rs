//! `cargo +nightly fuzz run matcher`, in `filters/`.

#![no_main]

use libfuzzer_sys::fuzz_target;

// The matcher itself and not the crate: its oracle can be asked too, and only its five dependencies are built.
#[allow(dead_code, unused_imports, unreachable_pub, reason = "the target needs only a part of it")]
#[path = "../../src/matcher/mod.rs"]
mod matcher;

fuzz_target!(|data: &[u8]| matcher::fuzz::check(data));
