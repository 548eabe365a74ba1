//! headgate-benches
