//! Names of turns, sessions and their owners: opaque, bounded, safe in headers, logs and keys.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A turn's id: a UUID version 7 (RFC 9562), chosen by the gateway, never by a client.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(transparent)]
pub struct TurnId(#[schemars(with = "String", extend("format" = "uuid"))] Uuid);

impl TurnId {
    /// A fresh id; ids made later sort later.
    pub fn fresh() -> TurnId {
        TurnId(Uuid::now_v7())
    }

    /// The id as 16 bytes, most significant first.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0.into_bytes()
    }

    /// The id of those bytes.
    pub fn from_bytes(bytes: [u8; 16]) -> TurnId {
        TurnId(Uuid::from_bytes(bytes))
    }

    /// An id within this turn, always the same for the same `name`: a UUID version 5 in the namespace of the turn's own.
    pub fn named(self, name: &str) -> String {
        Uuid::new_v5(&self.0, name.as_bytes()).as_hyphenated().to_string()
    }

    /// The id as it is displayed, in `text`: 36 characters, of the 45 that every form of a UUID has room in.
    pub fn text(self, text: &mut [u8; 45]) -> &str {
        self.0.as_hyphenated().encode_lower(text)
    }

    /// Appends the id as it is displayed: 36 characters.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.text(&mut Uuid::encode_buffer()).as_bytes());
    }
}

impl FromStr for TurnId {
    type Err = InvalidId;
    fn from_str(text: &str) -> Result<TurnId, InvalidId> {
        // One spelling only, so that an id compares equal to its echo: lower case, with hyphens.
        match Uuid::try_parse(text) {
            Ok(id) if text.len() == 36 && !text.bytes().any(|b| b.is_ascii_uppercase()) => Ok(TurnId(id)),
            _ => Err(InvalidId { what: "turn id", expected: "a UUID such as 0193a5f0-7e1c-7000-8000-000000000000" }),
        }
    }
}

impl fmt::Display for TurnId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_hyphenated().fmt(f)
    }
}

impl fmt::Debug for TurnId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A name that is not one: what it should have been.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a {what}: expected {expected}")]
pub struct InvalidId {
    what: &'static str,
    expected: &'static str,
}

/// The longest session, tenant or subject name, in bytes.
const MAX_NAME_BYTES: usize = 128;

fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= MAX_NAME_BYTES
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':' | b'@' | b'|'))
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $what:literal) => {
        $(#[$doc])*
        ///
        /// 1 to 128 bytes of letters, digits and `-_.:@|`: it can stand in a header, a key and a log line as it is.
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, schemars::JsonSchema)]
        #[serde(transparent)]
        pub struct $type(#[schemars(with = "String", length(min = 1, max = 128), regex(pattern = r"^[A-Za-z0-9_.:@|-]+$"))] Arc<str>);

        impl $type {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<$type, InvalidId> {
                if is_name(text) {
                    Ok($type(text.into()))
                } else {
                    Err(InvalidId { what: $what, expected: "1 to 128 characters of A-Z a-z 0-9 - _ . : @ |" })
                }
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<$type, D::Error> {
                String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name! {
    /// A session's id, chosen by the gateway or brought by the client; owned by one principal.
    SessionId, "session id"
}
name! {
    /// Who pays and whose policy applies.
    TenantId, "tenant id"
}
name! {
    /// Who asks, within a tenant: opaque, never an address or a person's name.
    Subject, "subject"
}

impl SessionId {
    /// A fresh session id.
    pub fn fresh() -> SessionId {
        SessionId((&*Uuid::now_v7().as_hyphenated().encode_lower(&mut Uuid::encode_buffer())).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_id_has_one_spelling() {
        let id = TurnId::fresh();
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!(id.to_string().to_uppercase().parse::<TurnId>().is_err() || !id.to_string().contains(|c: char| c.is_alphabetic()));
        assert!(id.to_string().replace('-', "").parse::<TurnId>().is_err());
    }

    #[test]
    fn a_name_cannot_carry_a_line_break_or_a_slash() {
        for bad in ["", "a b", "a\nb", "a/b", "é", &"x".repeat(129)] {
            assert!(bad.parse::<TenantId>().is_err(), "{bad:?}");
        }
        assert!("acme-1.eu:team_2@x|y".parse::<TenantId>().is_ok());
        assert!(serde_json::from_str::<TenantId>("\"a\\r\\nb\"").is_err());
    }
}
