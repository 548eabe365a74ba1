//! Writes JSON straight into a buffer: the few shapes that are written once per event.

/// Writes a number.
pub(super) fn number(out: &mut Vec<u8>, mut value: u64) {
    // 20 digits hold u64::MAX.
    let mut digits = [0u8; 20];
    let mut used = 0;
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (value % 10) as u8;
        value /= 10;
        used += 1;
        if value == 0 {
            break;
        }
    }
    out.extend_from_slice(digits.get(digits.len() - used..).unwrap_or_default());
}

/// Bytes that cannot stand in a JSON string as they are: RFC 8259 section 7.
static ESCAPED: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < 0x20 {
        table[byte] = true;
        byte += 1;
    }
    table[b'"' as usize] = true;
    table[b'\\' as usize] = true;
    table
};

/// How many bytes at the front can stand in a string as they are.
fn plain(bytes: &[u8]) -> usize {
    const AT_ONCE: usize = 32;
    // Without a way out of the inner loop, it is a few instructions for all of them.
    let is_plain = |chunk: &&[u8]| !chunk.iter().fold(false, |any, byte| any | (*byte < 0x20) | (*byte == b'"') | (*byte == b'\\'));
    let at = AT_ONCE * bytes.chunks_exact(AT_ONCE).take_while(is_plain).count();
    let rest = bytes.get(at..).unwrap_or_default();
    at + rest.iter().position(|byte| ESCAPED[usize::from(*byte)]).unwrap_or(rest.len())
}

/// Writes a string, with its quotes.
pub(super) fn string(out: &mut Vec<u8>, text: &str) {
    out.reserve(text.len() + 2);
    out.push(b'"');
    let mut rest = text.as_bytes();
    loop {
        let (kept, tail) = rest.split_at(plain(rest));
        out.extend_from_slice(kept);
        let Some((byte, tail)) = tail.split_first() else { break };
        match byte {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            byte => {
                const HEX: &[u8; 16] = b"0123456789abcdef";
                out.extend_from_slice(b"\\u00");
                out.push(HEX[usize::from(byte >> 4)]);
                out.push(HEX[usize::from(byte & 15)]);
            }
        }
        rest = tail;
    }
    out.push(b'"');
}

/// Writes `,"name":` for a fixed name.
pub(super) fn member(out: &mut Vec<u8>, name: &'static str) {
    out.extend_from_slice(b",\"");
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"\":");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_character_survives_the_trip() {
        let text: String = (0..0x500).filter_map(char::from_u32).chain("\u{2028}\u{1f600}\u{10ffff}".chars()).collect();
        // Wherever it stands among others.
        for before in 0..70 {
            let (mut out, text) = (Vec::new(), "~".repeat(before) + &text);
            string(&mut out, &text);
            assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), text);
            assert!(!out.iter().any(|byte| *byte < b' '));
        }
    }

    #[test]
    fn numbers_are_written_in_full() {
        for value in [0, 9, 10, 99, 100, 12345, u64::MAX] {
            let mut out = Vec::new();
            number(&mut out, value);
            assert_eq!(String::from_utf8(out).unwrap(), value.to_string());
        }
    }
}
