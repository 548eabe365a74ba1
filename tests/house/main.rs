//! The tree as a whole: who imports whom, whether documents say what is so, whether deployment files fit the code.

mod deploy;
mod directions;
mod documents;
mod metrics;
mod tree;
