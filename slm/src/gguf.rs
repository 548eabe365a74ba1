//! Reads a GGUF file: the names and numbers that describe a model, and its matrices as 32-bit floats.
//!
//! The file is not trusted. Every length is checked against the bytes that are left before anything is allocated, so
//! a file costs at most a small multiple of its own size, and a bad one is an error, never a panic.
//!
//! Source: the GGUF specification, version 3 (version 2 has the same layout).

use std::collections::HashMap;

/// No model has this many; a count beyond is a broken file, and is refused before the loop over it begins.
const ENTRIES_MAX: u64 = 65_536;
/// The format's own limit on a tensor's dimensions.
const DIMENSIONS_MAX: u32 = 4;
/// A Q8_0 block: one 16-bit scale and 32 signed bytes.
const Q8_0_BLOCK: usize = 32;
const Q8_0_BLOCK_BYTES: usize = 34;

/// Why a file cannot be used as a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file cannot be read at all.
    #[error("cannot read the model file")]
    Read(#[from] std::io::Error),
    /// The first four bytes say that it is something else.
    #[error("not a GGUF file")]
    NotGguf,
    /// The file ends in the middle of something.
    #[error("the file ends early, at byte {at}")]
    EndsEarly {
        /// Where the missing bytes should begin.
        at: usize,
    },
    /// A number in the file is impossible.
    #[error("{what} is out of bounds: {value}")]
    OutOfBounds {
        /// Which number.
        what: &'static str,
        /// What the file says.
        value: u64,
    },
    /// Text in the file is not UTF-8.
    #[error("a name is not UTF-8, at byte {at}")]
    NotUtf8 {
        /// Where the text begins.
        at: usize,
    },
    /// A key or tensor the model needs is not there, or has another type.
    #[error("{key} is missing or has the wrong type")]
    Missing {
        /// The name of it.
        key: String,
    },
    /// A tensor has another shape than the model's numbers ask for.
    #[error("tensor {name} has {found} values, not {expected}")]
    Shape {
        /// The tensor.
        name: String,
        /// Values in the file.
        found: usize,
        /// Values needed.
        expected: usize,
    },
    /// A file that is sound but asks for what this runner does not do.
    #[error("not supported: {0}")]
    Unsupported(String),
}

/// One value of the file's dictionary. All widths of a kind are read as the widest.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    List(Vec<Value>),
}

/// A parsed file: its dictionary, and its tensors by name.
#[derive(Debug)]
pub(crate) struct Gguf {
    values: HashMap<String, Value>,
    tensors: HashMap<String, Vec<f32>>,
}

impl Gguf {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let mut reader = Reader { bytes, at: 0 };
        if reader.take(4)? != b"GGUF" {
            return Err(Error::NotGguf);
        }
        let version = reader.u32()?;
        if !(2..=3).contains(&version) {
            return Err(Error::Unsupported(format!("GGUF version {version}")));
        }
        let tensor_count = bounded("tensor count", reader.u64()?, ENTRIES_MAX)?;
        let value_count = bounded("key count", reader.u64()?, ENTRIES_MAX)?;

        let mut values = HashMap::new();
        for _ in 0..value_count {
            let key = reader.text()?;
            let kind = reader.u32()?;
            values.insert(key, reader.value(kind)?);
        }
        let mut infos = Vec::new();
        for _ in 0..tensor_count {
            infos.push(reader.tensor_info()?);
        }

        let alignment = match values.get("general.alignment") {
            Some(Value::Unsigned(a)) => usize::try_from(*a)
                .ok()
                .filter(|a| a.is_power_of_two() && *a <= 65_536)
                .ok_or(Error::OutOfBounds { what: "alignment", value: *a })?,
            Some(_) => return Err(Error::Missing { key: "general.alignment".into() }),
            None => 32,
        };
        let data_at = reader.at.next_multiple_of(alignment);
        let mut tensors = HashMap::new();
        let mut budget_bytes = bytes.len();
        for info in infos {
            let name = info.name.clone();
            let (stored_bytes, values) = info.read(bytes, data_at)?;
            // Tensors may not overlap, so together they fit in the file: without this, many small entries that all
            // point at one big range would multiply the file in memory.
            budget_bytes = budget_bytes
                .checked_sub(stored_bytes)
                .ok_or(Error::OutOfBounds { what: "sum of tensor sizes", value: stored_bytes as u64 })?;
            if tensors.insert(name.clone(), values).is_some() {
                return Err(Error::Unsupported(format!("two tensors called {name}")));
            }
        }
        Ok(Self { values, tensors })
    }

    pub(crate) fn u64(&self, key: &str) -> Result<u64, Error> {
        match self.values.get(key) {
            Some(Value::Unsigned(v)) => Ok(*v),
            Some(Value::Signed(v)) => u64::try_from(*v).map_err(|_| missing(key)),
            _ => Err(missing(key)),
        }
    }

    /// A count or size: an unsigned number from 1 to `most`.
    pub(crate) fn size(&self, key: &str, what: &'static str, most: u64) -> Result<usize, Error> {
        let value = self.u64(key)?;
        if value == 0 {
            return Err(Error::OutOfBounds { what, value });
        }
        bounded(what, value, most)
    }

    pub(crate) fn f32(&self, key: &str) -> Result<f32, Error> {
        match self.values.get(key) {
            Some(Value::Float(v)) if v.is_finite() => Ok(*v as f32),
            _ => Err(missing(key)),
        }
    }

    pub(crate) fn bool_or(&self, key: &str, default: bool) -> Result<bool, Error> {
        match self.values.get(key) {
            None => Ok(default),
            Some(Value::Bool(v)) => Ok(*v),
            Some(_) => Err(missing(key)),
        }
    }

    pub(crate) fn has(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    pub(crate) fn text(&self, key: &str) -> Result<&str, Error> {
        match self.values.get(key) {
            Some(Value::Text(v)) => Ok(v),
            _ => Err(missing(key)),
        }
    }

    pub(crate) fn list(&self, key: &str) -> Result<&[Value], Error> {
        match self.values.get(key) {
            Some(Value::List(v)) => Ok(v),
            _ => Err(missing(key)),
        }
    }

    pub(crate) fn has_tensor(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Takes a tensor out of the file; `expected` is the number of values it must have.
    pub(crate) fn tensor(&mut self, name: &str, expected: usize) -> Result<Vec<f32>, Error> {
        let values = self.tensors.remove(name).ok_or_else(|| missing(name))?;
        if values.len() != expected {
            return Err(Error::Shape { name: name.into(), found: values.len(), expected });
        }
        Ok(values)
    }
}

fn missing(key: &str) -> Error {
    Error::Missing { key: key.into() }
}

fn bounded(what: &'static str, value: u64, most: u64) -> Result<usize, Error> {
    usize::try_from(value).ok().filter(|_| value <= most).ok_or(Error::OutOfBounds { what, value })
}

struct TensorInfo {
    name: String,
    values: usize,
    kind: u32,
    offset: u64,
}

impl TensorInfo {
    /// The bytes the tensor takes in the file, and its values.
    fn read(self, bytes: &[u8], data_at: usize) -> Result<(usize, Vec<f32>), Error> {
        let out_of_bounds = Error::OutOfBounds { what: "tensor offset", value: self.offset };
        let stored_bytes = match self.kind {
            0 => self.values.checked_mul(4),
            8 if self.values.is_multiple_of(Q8_0_BLOCK) => (self.values / Q8_0_BLOCK).checked_mul(Q8_0_BLOCK_BYTES),
            8 => return Err(Error::OutOfBounds { what: "Q8_0 tensor size", value: self.values as u64 }),
            kind => return Err(Error::Unsupported(format!("tensor {} of type {kind}; F32 and Q8_0 are", self.name))),
        };
        let from = usize::try_from(self.offset).ok().and_then(|o| o.checked_add(data_at));
        let (Some(from), Some(stored_bytes)) = (from, stored_bytes) else { return Err(out_of_bounds) };
        let to = from.checked_add(stored_bytes).ok_or(out_of_bounds)?;
        let stored = bytes.get(from..to).ok_or(Error::EndsEarly { at: bytes.len() })?;
        let values = if self.kind == 0 {
            stored.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
        } else {
            let mut values = Vec::with_capacity(self.values);
            for [low, high, weights @ ..] in stored.as_chunks::<Q8_0_BLOCK_BYTES>().0 {
                let scale = half_to_f32(u16::from_le_bytes([*low, *high]));
                values.extend(weights.iter().map(|w| f32::from(*w as i8) * scale));
            }
            values
        };
        Ok((stored_bytes, values))
    }
}

/// IEEE 754 binary16 to binary32.
fn half_to_f32(half: u16) -> f32 {
    let sign = if half & 0x8000 == 0 { 1.0 } else { -1.0 };
    let (exponent, fraction) = (u32::from(half >> 10) & 31, u32::from(half & 1023));
    match exponent {
        0 => sign * fraction as f32 * 2f32.powi(-24),
        31 if fraction == 0 => sign * f32::INFINITY,
        31 => f32::NAN,
        _ => sign * f32::from_bits(((exponent + 112) << 23) | (fraction << 13)),
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], Error> {
        let ends_early = Error::EndsEarly { at: self.bytes.len() };
        let to = self.at.checked_add(n).ok_or(Error::EndsEarly { at: self.bytes.len() })?;
        let taken = self.bytes.get(self.at..to).ok_or(ends_early)?;
        self.at = to;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u32(&mut self) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn text(&mut self) -> Result<String, Error> {
        let length = self.u64()?;
        let at = self.at;
        let bytes = self.take(usize::try_from(length).map_err(|_| Error::EndsEarly { at: self.bytes.len() })?)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| Error::NotUtf8 { at })
    }

    /// A dictionary value; `kind` is the file's number for its type.
    fn value(&mut self, kind: u32) -> Result<Value, Error> {
        if kind == 9 {
            let kind = self.u32()?;
            let count = self.u64()?;
            let least_bytes = match kind {
                0 | 1 | 7 => 1,
                2 | 3 => 2,
                4..=6 => 4,
                8 | 10..=12 => 8,
                // A list in a list: legal, used by no llama file, and a way to nest without end.
                _ => return Err(Error::Unsupported(format!("list of values of type {kind}"))),
            };
            let left_bytes = self.bytes.len() - self.at;
            let count = bounded("list length", count, (left_bytes / least_bytes) as u64)?;
            let mut list = Vec::new();
            for _ in 0..count {
                list.push(self.scalar(kind)?);
            }
            return Ok(Value::List(list));
        }
        self.scalar(kind)
    }

    fn scalar(&mut self, kind: u32) -> Result<Value, Error> {
        Ok(match kind {
            0 => Value::Unsigned(u8::from_le_bytes(self.array()?).into()),
            1 => Value::Signed(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => Value::Bool(self.array::<1>()? != [0]),
            8 => Value::Text(self.text()?),
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            _ => return Err(Error::Unsupported(format!("value of type {kind}"))),
        })
    }

    fn tensor_info(&mut self) -> Result<TensorInfo, Error> {
        let name = self.text()?;
        let dimensions = self.u32()?;
        if dimensions > DIMENSIONS_MAX {
            return Err(Error::OutOfBounds { what: "tensor dimensions", value: dimensions.into() });
        }
        let mut values = 1u64;
        for _ in 0..dimensions {
            let size = self.u64()?;
            values = values.checked_mul(size).ok_or(Error::OutOfBounds { what: "tensor size", value: size })?;
        }
        let values = usize::try_from(values).map_err(|_| Error::OutOfBounds { what: "tensor size", value: values })?;
        Ok(TensorInfo { name, values, kind: self.u32()?, offset: self.u64()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_read_as_ieee_754_says() {
        for (half, float) in
            [(0x3c00, 1.0), (0xc000, -2.0), (0x0001, 2f32.powi(-24)), (0x7bff, 65504.0), (0x8000, -0.0), (0x7c00, f32::INFINITY)]
        {
            assert_eq!(half_to_f32(half).to_bits(), f32::to_bits(float), "{half:#06x}");
        }
        assert!(half_to_f32(0x7e00).is_nan());
    }

    #[test]
    fn a_list_in_a_list_is_refused_at_any_depth() {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend([0u64, 1, 1].iter().flat_map(|n| n.to_le_bytes()));
        bytes.push(b'k');
        for _ in 0..100_000 {
            bytes.extend(9u32.to_le_bytes());
            bytes.extend(1u64.to_le_bytes());
        }
        assert!(Gguf::parse(&bytes).is_err());
    }

    #[test]
    fn many_tensors_over_the_same_bytes_cannot_multiply_the_file() {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend([1000u64, 0].iter().flat_map(|n| n.to_le_bytes()));
        for i in 0..1000u64 {
            bytes.extend(3u64.to_le_bytes());
            bytes.extend(format!("{i:03}").into_bytes());
            bytes.extend(1u32.to_le_bytes());
            bytes.extend(10_000u64.to_le_bytes());
            bytes.extend(0u32.to_le_bytes());
            bytes.extend(0u64.to_le_bytes());
        }
        bytes.resize(bytes.len() + 50_000, 0);
        assert!(matches!(Gguf::parse(&bytes), Err(Error::OutOfBounds { what: "sum of tensor sizes", .. })));
    }
}
