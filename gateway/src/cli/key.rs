//! API keys: 256 random bits, shown once, stored as a hash.

use std::fmt::Write;

use headgate_policy::Digest;
use zeroize::Zeroizing;

/// A new API key.
pub struct Key(Zeroizing<String>);

impl Key {
    /// 256 bits from the system. Errors: it has none to give.
    pub fn fresh() -> Result<Key, getrandom::Error> {
        let mut bits = Zeroizing::new([0; 32]);
        getrandom::fill(&mut *bits)?;
        let mut key = Zeroizing::new(String::with_capacity(67));
        key.push_str("hg_");
        for byte in bits.iter() {
            // Writing to a String cannot fail.
            let _ = write!(key, "{byte:02x}");
        }
        Ok(Key(key))
    }

    /// The key itself: for whoever asked for it, once.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// What a config stores: `sha256:` and 64 hex digits.
    pub fn hash(&self) -> String {
        Digest::of(self.0.as_bytes()).as_bytes().iter().fold("sha256:".to_owned(), |mut hash, byte| {
            let _ = write!(hash, "{byte:02x}");
            hash
        })
    }
}
