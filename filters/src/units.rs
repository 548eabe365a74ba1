//! Durations, sizes and rates as people write them: `80ms`, `64KiB`, `60/min`.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A quantity that does not read as one: what was found and what would do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{found}` is not {expected}")]
pub struct NotAQuantity {
    found: String,
    expected: &'static str,
}

fn split(text: &str) -> Option<(u64, &str)> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    Some((number.parse().ok()?, unit.trim()))
}

macro_rules! quantity {
    ($type:ident, $pattern:literal, $example:literal) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<$type, D::Error> {
                String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
            }
        }
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.collect_str(self)
            }
        }
        impl schemars::JsonSchema for $type {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($type).into()
            }
            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({ "type": "string", "pattern": $pattern, "examples": [$example] })
            }
        }
    };
}

/// A span of time: a whole number and `ms`, `s`, `min`, `h` or `d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);
quantity!(Span, r"^[0-9]+ ?(ms|s|min|h|d)$", "80ms");

impl FromStr for Span {
    type Err = NotAQuantity;
    fn from_str(text: &str) -> Result<Span, NotAQuantity> {
        let millis = split(text).and_then(|(number, unit)| {
            let factor = match unit {
                "ms" => 1,
                "s" => 1_000,
                "min" => 60_000,
                "h" => 3_600_000,
                "d" => 86_400_000,
                _ => return None,
            };
            number.checked_mul(factor)
        });
        let expected = "a duration: a whole number and a unit (ms, s, min, h, d), such as `80ms` or `10min`";
        millis.map(|millis| Span(Duration::from_millis(millis))).ok_or(NotAQuantity { found: text.into(), expected })
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.0.as_millis();
        for (factor, unit) in [(86_400_000, "d"), (3_600_000, "h"), (60_000, "min"), (1_000, "s")] {
            if millis > 0 && millis % factor == 0 {
                return write!(f, "{}{unit}", millis / factor);
            }
        }
        write!(f, "{millis}ms")
    }
}

/// A number of bytes: a whole number and `B`, `KiB`, `MiB` or `GiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);
quantity!(Bytes, r"^[0-9]+ ?(B|KiB|MiB|GiB)$", "64KiB");

impl FromStr for Bytes {
    type Err = NotAQuantity;
    fn from_str(text: &str) -> Result<Bytes, NotAQuantity> {
        let bytes = split(text).and_then(|(number, unit)| {
            let factor = match unit {
                "B" => 1,
                "KiB" => 1 << 10,
                "MiB" => 1 << 20,
                "GiB" => 1 << 30,
                _ => return None,
            };
            number.checked_mul(factor)
        });
        bytes.map(Bytes).ok_or(NotAQuantity {
            found: text.into(),
            expected: "a size: a whole number and a unit (B, KiB, MiB, GiB), such as `64KiB`",
        })
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (factor, unit) in [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")] {
            if self.0 > 0 && self.0 % factor == 0 {
                return write!(f, "{}{unit}", self.0 / factor);
            }
        }
        write!(f, "{}B", self.0)
    }
}

/// So many in a span of time: a whole number (with `k` for thousands, `M` for millions) and `/s`, `/min`, `/h` or `/d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// How many.
    pub count: u32,
    /// In how long.
    pub per: Duration,
}
quantity!(Rate, r"^[0-9]+[kM]?/(s|min|h|d)$", "60/min");

impl FromStr for Rate {
    type Err = NotAQuantity;
    fn from_str(text: &str) -> Result<Rate, NotAQuantity> {
        let rate = text.split_once('/').and_then(|(count, per)| {
            let (number, scale) = split(count)?;
            let scale = match scale {
                "" => 1,
                "k" => 1_000,
                "M" => 1_000_000,
                _ => return None,
            };
            let per = match per {
                "s" => 1,
                "min" => 60,
                "h" => 3_600,
                "d" => 86_400,
                _ => return None,
            };
            let count = u32::try_from(number.checked_mul(scale)?).ok().filter(|count| *count > 0)?;
            Some(Rate { count, per: Duration::from_secs(per) })
        });
        rate.ok_or(NotAQuantity { found: text.into(), expected: "a rate: a number above 0, perhaps with k or M, and /s, /min, /h or /d, such as `60/min` or `100k/min`" })
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, scale) = match self.count {
            count if count % 1_000_000 == 0 => (count / 1_000_000, "M"),
            count if count % 1_000 == 0 => (count / 1_000, "k"),
            count => (count, ""),
        };
        let per = match self.per.as_secs() {
            1 => "s",
            60 => "min",
            3_600 => "h",
            _ => "d",
        };
        write!(f, "{count}{scale}/{per}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_read_back_as_written() {
        for text in ["0ms", "80ms", "1500ms", "30s", "10min", "2h", "3d"] {
            assert_eq!(text.parse::<Span>().unwrap().to_string(), text);
        }
        for text in ["0B", "100B", "64KiB", "4MiB", "1GiB"] {
            assert_eq!(text.parse::<Bytes>().unwrap().to_string(), text);
        }
        for text in ["60/min", "100k/min", "5/s", "2M/d", "7/h"] {
            assert_eq!(text.parse::<Rate>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn a_quantity_without_a_unit_is_refused_with_an_example() {
        assert!("80".parse::<Span>().unwrap_err().to_string().contains("`80ms`"));
        assert!("64k".parse::<Bytes>().unwrap_err().to_string().contains("`64KiB`"));
        assert!("60".parse::<Rate>().unwrap_err().to_string().contains("`60/min`"));
        assert!("0/min".parse::<Rate>().is_err());
        assert!("99999999999999999999s".parse::<Span>().is_err());
        assert!("18446744073709551615GiB".parse::<Bytes>().is_err());
    }
}
