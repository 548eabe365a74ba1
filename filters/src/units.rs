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
            if millis > 0 && millis.is_multiple_of(factor) {
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
        bytes
            .map(Bytes)
            .ok_or(NotAQuantity { found: text.into(), expected: "a size: a whole number and a unit (B, KiB, MiB, GiB), such as `64KiB`" })
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (factor, unit) in [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")] {
            if self.0 > 0 && self.0.is_multiple_of(factor) {
                return write!(f, "{}{unit}", self.0 / factor);
            }
        }
        write!(f, "{}B", self.0)
    }
}

/// So many in a span of time: a whole number (with `k` for thousands, `M` for millions) and `/s`, `/min`, `/h` or `/d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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
        rate.ok_or(NotAQuantity {
            found: text.into(),
            expected: "a rate: a number above 0, perhaps with k or M, and /s, /min, /h or /d, such as `60/min` or `100k/min`",
        })
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, scale) = match self.count {
            count if count.is_multiple_of(1_000_000) => (count / 1_000_000, "M"),
            count if count.is_multiple_of(1_000) => (count / 1_000, "k"),
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

/// A moment, in Unix seconds: a day (its begin, UTC) or a day and a time in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub u64);
quantity!(Moment, r"^[0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9]{2}:[0-9]{2}:[0-9]{2}Z)?$", "2027-01-31");

impl FromStr for Moment {
    type Err = NotAQuantity;
    fn from_str(text: &str) -> Result<Moment, NotAQuantity> {
        read_moment(text).map(Moment).ok_or(NotAQuantity {
            found: text.into(),
            expected: "a day or a time in UTC from 1970 on, such as `2027-01-31` or `2027-01-31T08:00:00Z`",
        })
    }
}

fn read_moment(text: &str) -> Option<u64> {
    let (day, time) = match text.split_once('T') {
        Some((day, time)) => (day, time.strip_suffix('Z')?),
        None => (text, "00:00:00"),
    };
    let field = |part: Option<&str>, len: usize| -> Option<u64> {
        part.filter(|part| part.len() == len && part.bytes().all(|b| b.is_ascii_digit()))?.parse().ok()
    };
    let (mut day, mut time) = (day.split('-'), time.split(':'));
    let (year, month, date) = (field(day.next(), 4)?, field(day.next(), 2)?, field(day.next(), 2)?);
    let (hour, minute, second) = (field(time.next(), 2)?, field(time.next(), 2)?, field(time.next(), 2)?);
    if day.next().is_some() || time.next().is_some() || year < 1970 || hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let lengths = [31, 28 + u64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let before = lengths.get(..usize::try_from(month).ok()?.checked_sub(1)?)?;
    if date == 0 || date > *lengths.get(before.len())? {
        return None;
    }
    let days = (1970..year).map(|year| 365 + u64::from(is_leap(year))).sum::<u64>() + before.iter().sum::<u64>() + date - 1;
    Some(days * 86_400 + hour * 3_600 + minute * 60 + second)
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Civil-from-days by Howard Hinnant: years begin in March, so that the leap day comes last.
        let days = self.0 / 86_400 + 719_468;
        let (era, of_era) = (days / 146_097, days % 146_097);
        let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year + year / 4 - year / 100);
        let shifted = (5 * of_year + 2) / 153;
        let (date, month) = (of_year - (153 * shifted + 2) / 5 + 1, if shifted < 10 { shifted + 3 } else { shifted - 9 });
        let year = year + era * 400 + u64::from(month <= 2);
        write!(f, "{year:04}-{month:02}-{date:02}")?;
        let of_day = self.0 % 86_400;
        if of_day > 0 {
            write!(f, "T{:02}:{:02}:{:02}Z", of_day / 3_600, of_day / 60 % 60, of_day % 60)?;
        }
        Ok(())
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
    fn moments_are_unix_seconds_and_read_back_as_written() {
        assert_eq!("1970-01-01".parse::<Moment>().unwrap(), Moment(0));
        assert_eq!("2000-02-29T12:34:56Z".parse::<Moment>().unwrap(), Moment(951_827_696));
        assert_eq!("2026-11-21".parse::<Moment>().unwrap(), Moment(1_795_219_200));
        for day in 0..200_000 {
            let moment = Moment(day * 86_400 + day % 86_400);
            assert_eq!(moment.to_string().parse::<Moment>().unwrap(), moment);
        }
        for bad in ["", "2026-13-01", "2026-00-01", "2026-02-29", "2026-1-1", "2026-01-01T24:00:00Z", "2026-01-01T00:00:00", "1969-12-31"] {
            assert!(bad.parse::<Moment>().unwrap_err().to_string().contains("`2027-01-31`"), "{bad}");
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
