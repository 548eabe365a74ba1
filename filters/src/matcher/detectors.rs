//! What a detector looks for: its shapes, the check behind them, and the tail that belongs to a match.
//!
//! Shapes are patterns over normalised (so lower-case) text. They begin at token boundaries, so that ordinary prose starts few
//! threads and is held briefly. A detector that needs a whole token to decide (an e-mail address may begin with any word)
//! holds the last word of a piece until the next character comes: that is the least it can hold.

use std::{fmt, str::FromStr};

/// A built-in kind of text, found by shape and, where there is one, by checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Detector {
    /// `name@host.tld`, ASCII; local part up to 64 bytes, up to 8 labels (RFC 5321 section 4.5.3.1.1, RFC 1035 section 2.3.4).
    Email,
    /// `+` and 8 to 15 digits (ITU-T E.164) with separators, or ten digits in the North American groups `415-555-0132`.
    Phone,
    /// 13 to 19 digits, single blanks or dashes between them, a known issuer range, Luhn's checksum (ISO/IEC 7812-1).
    CreditCard,
    /// Country code, the country's length, checksum modulo 97 (ISO 13616); single blanks or dashes allowed.
    Iban,
    /// An IPv4 address in dotted decimal, or an IPv6 address (RFC 4291 section 2.2) of at least three groups, or a global,
    /// unique-local or link-local prefix with `::`, or `::1`.
    Ip,
    /// A United States social security number `123-45-6789`, areas 000, 666 and 900-999 excluded.
    UsSsn,
    /// Keys with a known prefix: AWS, GitHub, GitLab, Slack, Stripe, OpenAI, Anthropic, Google, npm, PyPI, SendGrid,
    /// Hugging Face, DigitalOcean, Shopify, Databricks, Twilio.
    ApiKey,
    /// A PEM private key (RFC 7468): from its `-----BEGIN` to its `-----END` line, or to the first character that can stand
    /// in neither, or 8192 characters on. Masked as it comes: only its first line has to be held.
    PrivateKey,
    /// A JSON web token (RFC 7519): two base64url segments that begin like JSON objects, and what follows of base64url and
    /// dots. Masked as it comes once the second segment has begun.
    Jwt,
}

impl Detector {
    /// All detectors.
    pub const ALL: [Detector; 9] = [
        Detector::Email,
        Detector::Phone,
        Detector::CreditCard,
        Detector::Iban,
        Detector::Ip,
        Detector::UsSsn,
        Detector::ApiKey,
        Detector::PrivateKey,
        Detector::Jwt,
    ];

    /// Its name in config, which is also the category of its hits.
    pub fn name(self) -> &'static str {
        match self {
            Detector::Email => "email",
            Detector::Phone => "phone",
            Detector::CreditCard => "credit_card",
            Detector::Iban => "iban",
            Detector::Ip => "ip",
            Detector::UsSsn => "us_ssn",
            Detector::ApiKey => "api_key",
            Detector::PrivateKey => "private_key",
            Detector::Jwt => "jwt",
        }
    }

    pub(super) fn shapes(self) -> &'static [Shape] {
        match self {
            Detector::Email => EMAIL,
            Detector::Phone => PHONE,
            Detector::CreditCard => CREDIT_CARD,
            Detector::Iban => IBAN,
            Detector::Ip => IP,
            Detector::UsSsn => US_SSN,
            Detector::ApiKey => API_KEY,
            Detector::PrivateKey => PRIVATE_KEY,
            Detector::Jwt => JWT,
        }
    }
}

impl fmt::Display for Detector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// No detector has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no detector is called `{0}`; there are email, phone, credit_card, iban, ip, us_ssn, api_key, private_key and jwt")]
pub struct UnknownDetector(String);

impl FromStr for Detector {
    type Err = UnknownDetector;

    fn from_str(name: &str) -> Result<Detector, UnknownDetector> {
        Detector::ALL.into_iter().find(|detector| detector.name() == name).ok_or_else(|| UnknownDetector(name.to_owned()))
    }
}

/// Accepts or refuses the normalised text of a match.
pub(super) type Check = fn(&[u8]) -> bool;

/// One way a detector's kind of text is written.
pub(super) struct Shape {
    pub(super) pattern: &'static str,
    pub(super) check: Option<Check>,
    pub(super) tail: Option<&'static Tail>,
}

/// What follows a match and belongs to it: every character of a class, up to a limit or the end of an `-----END ...-----` line.
/// It needs no lookahead, so it is masked as it comes, however long it is.
pub(super) struct Tail {
    pub(super) class: fn(u8) -> bool,
    /// In characters.
    pub(super) limit: u32,
    pub(super) until_end_line: bool,
}

const fn shape(pattern: &'static str) -> Shape {
    Shape { pattern, check: None, tail: None }
}

const fn checked(pattern: &'static str, check: Check) -> Shape {
    Shape { pattern, check: Some(check), tail: None }
}

const fn tailed(pattern: &'static str, tail: &'static Tail) -> Shape {
    Shape { pattern, check: None, tail: Some(tail) }
}

const EMAIL: &[Shape] = &[shape(r"\b[a-z0-9_][a-z0-9._%+'-]{0,63}@(?:[a-z0-9](?:[a-z0-9-]{0,62})\.){1,8}[a-z]{2,24}\b")];

const PHONE: &[Shape] = &[
    checked(r"\B\+[1-9](?:[ .()/-]{0,2}[0-9]){7,14}\b", |text| (8..=15).contains(&digits(text).count())),
    shape(r"\b[2-9][0-9]{2}(?:-[0-9]{3}-|\.[0-9]{3}\.| [0-9]{3} | [0-9]{3}-)[0-9]{4}\b"),
    shape(r"\B\([2-9][0-9]{2}\)[ -]?[0-9]{3}[ .-][0-9]{4}\b"),
];

const CREDIT_CARD: &[Shape] = &[checked(r"\b[2-6](?:[ -]?[0-9]){12,18}\b", is_card)];

const IBAN: &[Shape] = &[checked(r"\b[a-z]{2}[0-9]{2}(?:[ -]?[a-z0-9]){11,30}\b", is_iban)];

const IP: &[Shape] = &[
    shape(concat!(r"\b(?:(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\.){3}", r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\b")),
    checked(r"\b[0-9a-f]{1,4}:[0-9a-f:]{1,34}(?:[0-9.]{0,15})", is_ipv6),
    shape(r"\B::(?:1|ffff:(?:[0-9]{1,3}\.){3}[0-9]{1,3})\b"),
];

const US_SSN: &[Shape] = &[checked(r"\b[0-8][0-9]{2}(?:-[0-9]{2}-| [0-9]{2} )[0-9]{4}\b", is_ssn)];

const KEY_TAIL: Tail = Tail { class: |b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'), limit: 512, until_end_line: false };

const API_KEY: &[Shape] = &[
    shape(r"\b(?:akia|asia)[a-z2-7]{16}\b"),
    tailed(r"\bgh[pousr]_[a-z0-9]{36}", &KEY_TAIL),
    tailed(r"\bgithub_pat_[a-z0-9_]{22}", &KEY_TAIL),
    tailed(r"\bglpat-[a-z0-9_-]{20}", &KEY_TAIL),
    tailed(r"\bxox[abeoprs]-[a-z0-9-]{10}", &KEY_TAIL),
    tailed(r"\bxapp-[0-9]-[a-z0-9-]{10}", &KEY_TAIL),
    tailed(r"\b[rs]k_(?:live|test)_[a-z0-9]{16}", &KEY_TAIL),
    tailed(r"\bwhsec_[a-z0-9]{24}", &KEY_TAIL),
    Shape { pattern: r"\bsk-(?:proj-|ant-|svcacct-|or-)?[a-z0-9_-]{20,48}", check: Some(has_digit), tail: Some(&KEY_TAIL) },
    tailed(r"\baiza[a-z0-9_-]{35}", &KEY_TAIL),
    tailed(r"\bnpm_[a-z0-9]{36}", &KEY_TAIL),
    tailed(r"\bpypi-[a-z0-9_-]{50}", &KEY_TAIL),
    tailed(r"\bsg\.[a-z0-9_-]{22}\.[a-z0-9_-]{43}", &KEY_TAIL),
    tailed(r"\bhf_[a-z0-9]{34}", &KEY_TAIL),
    tailed(r"\bdop_v1_[0-9a-f]{64}", &KEY_TAIL),
    tailed(r"\bshp(?:at|ca|pa|ss)_[0-9a-f]{32}", &KEY_TAIL),
    tailed(r"\bdapi[0-9a-f]{32}", &KEY_TAIL),
    shape(r"\bsk[0-9a-f]{32}\b"),
];

const PRIVATE_KEY: &[Shape] = &[tailed(
    r"-----begin [a-z0-9 ]{0,32}private key(?: block)?-----",
    // Headers ("Proc-Type: 4,ENCRYPTED") and the quotes and backslashes of a key in source code belong to it.
    &Tail {
        class: |b| {
            b.is_ascii_alphanumeric()
                || b.is_ascii_whitespace()
                || matches!(b, b'+' | b'/' | b'=' | b'-' | b':' | b',' | b'\\' | b'"' | b'\'' | b'_' | b'>' | b'|')
        },
        limit: 8192,
        until_end_line: true,
    },
)];

const JWT: &[Shape] = &[tailed(
    r"\beyj[a-z0-9_-]{8,1024}\.eyj[a-z0-9_-]{8}",
    &Tail { class: |b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'), limit: 8192, until_end_line: false },
)];

fn digits(text: &[u8]) -> impl DoubleEndedIterator<Item = u8> {
    text.iter().filter(|b| b.is_ascii_digit()).map(|b| b - b'0')
}

fn has_digit(text: &[u8]) -> bool {
    text.iter().any(u8::is_ascii_digit)
}

/// The first `n` digits as a number.
fn prefix(text: &[u8], n: usize) -> u32 {
    digits(text).take(n).fold(0, |number, digit| number * 10 + u32::from(digit))
}

/// Issuer ranges and their lengths as published by the networks; ISO/IEC 7812-1 annex B for the checksum.
fn is_card(text: &[u8]) -> bool {
    let length = digits(text).count();
    let known = match (prefix(text, 1), prefix(text, 2), prefix(text, 3), prefix(text, 4)) {
        (4, _, _, _) => matches!(length, 13 | 16 | 19),
        (_, 34 | 37, _, _) => length == 15,
        (_, 51..=55, _, _) | (_, _, _, 2221..=2720) => length == 16,
        (_, 36 | 38 | 39, _, _) | (_, _, 300..=305, _) => (14..=19).contains(&length),
        (_, _, _, 3528..=3589 | 6011) | (_, 62 | 65, _, _) | (_, _, 644..=649, _) => (16..=19).contains(&length),
        (_, 50 | 56..=58 | 60 | 61 | 63 | 64 | 66..=69, _, _) => (13..=19).contains(&length),
        (_, _, _, _) => false,
    };
    let luhn: u32 = digits(text)
        .rev()
        .enumerate()
        .map(|(i, digit)| match (i % 2, u32::from(digit)) {
            (0, digit) => digit,
            (_, digit) => digit * 2 / 10 + digit * 2 % 10,
        })
        .sum();
    known && luhn.is_multiple_of(10)
}

/// SWIFT's IBAN registry, release 99: country and length.
const IBAN_LENGTHS: &[(&[u8; 2], usize)] = &[
    (b"ad", 24),
    (b"ae", 23),
    (b"al", 28),
    (b"at", 20),
    (b"az", 28),
    (b"ba", 20),
    (b"be", 16),
    (b"bg", 22),
    (b"bh", 22),
    (b"bi", 27),
    (b"br", 29),
    (b"by", 28),
    (b"ch", 21),
    (b"cr", 22),
    (b"cy", 28),
    (b"cz", 24),
    (b"de", 22),
    (b"dj", 27),
    (b"dk", 18),
    (b"do", 28),
    (b"ee", 20),
    (b"eg", 29),
    (b"es", 24),
    (b"fi", 18),
    (b"fk", 18),
    (b"fo", 18),
    (b"fr", 27),
    (b"gb", 22),
    (b"ge", 22),
    (b"gi", 23),
    (b"gl", 18),
    (b"gr", 27),
    (b"gt", 28),
    (b"hn", 28),
    (b"hr", 21),
    (b"hu", 28),
    (b"ie", 22),
    (b"il", 23),
    (b"iq", 23),
    (b"is", 26),
    (b"it", 27),
    (b"jo", 30),
    (b"kw", 30),
    (b"kz", 20),
    (b"lb", 28),
    (b"lc", 32),
    (b"li", 21),
    (b"lt", 20),
    (b"lu", 20),
    (b"lv", 21),
    (b"ly", 25),
    (b"mc", 27),
    (b"md", 24),
    (b"me", 22),
    (b"mk", 19),
    (b"mn", 20),
    (b"mr", 27),
    (b"mt", 31),
    (b"mu", 30),
    (b"ni", 28),
    (b"nl", 18),
    (b"no", 15),
    (b"om", 23),
    (b"pk", 24),
    (b"pl", 28),
    (b"ps", 29),
    (b"pt", 25),
    (b"qa", 29),
    (b"ro", 24),
    (b"rs", 22),
    (b"ru", 33),
    (b"sa", 24),
    (b"sc", 31),
    (b"sd", 18),
    (b"se", 24),
    (b"si", 19),
    (b"sk", 24),
    (b"sm", 27),
    (b"so", 23),
    (b"st", 25),
    (b"sv", 28),
    (b"tl", 23),
    (b"tn", 24),
    (b"tr", 26),
    (b"ua", 29),
    (b"va", 22),
    (b"vg", 24),
    (b"xk", 20),
    (b"ye", 30),
];

fn is_iban(text: &[u8]) -> bool {
    let signs = || text.iter().copied().filter(u8::is_ascii_alphanumeric);
    let length = signs().count();
    let country = IBAN_LENGTHS.iter().any(|(code, n)| *n == length && text.starts_with(*code));
    // ISO 7064, MOD 97-10, over the text with its first four signs moved to the end and letters read as 10 to 35.
    let rest = signs().skip(4).chain(signs().take(4)).fold(0u32, |rest, sign| match sign {
        b'0'..=b'9' => (rest * 10 + u32::from(sign - b'0')) % 97,
        letter => (rest * 100 + u32::from(letter.to_ascii_lowercase().saturating_sub(b'a')) + 10) % 97,
    });
    country && rest == 1
}

fn is_ipv6(text: &[u8]) -> bool {
    // Asked at every colon and digit: most are refused by their colons, without being parsed.
    let colons = text.iter().filter(|b| **b == b':').count();
    if !(matches!(colons, 6 | 7) || (colons < 8 && text.windows(2).any(|pair| pair == b"::"))) {
        return false;
    }
    let parsed = std::str::from_utf8(text).ok().and_then(|text| text.parse::<std::net::Ipv6Addr>().ok());
    parsed.is_some_and(|address| {
        let groups = text.split(|b| *b == b':').filter(|group| !group.is_empty()).count();
        // Two groups around `::` may be a path in source code, `fe::cafe`, unless the first is a prefix in use.
        groups >= 3 || matches!(address.segments()[0], 0x2000..=0x3fff | 0xfc00..=0xfdff | 0xfe80..=0xfebf)
    })
}

/// Social Security Administration, POMS RM 10201.035: never assigned are area 000, 666 and 9xx, group 00, serial 0000.
fn is_ssn(text: &[u8]) -> bool {
    let mut parts = text.split(|b| !b.is_ascii_digit());
    let (area, group, serial) = (parts.next(), parts.next(), parts.next());
    !matches!(area, Some(b"000" | b"666")) && group != Some(b"00") && serial != Some(b"0000")
}

/// How much of `-----end ...-----` has been read: 13 is all. The words between are not looked at.
pub(super) fn end_line(read: u8, byte: u8) -> u8 {
    match (read, byte) {
        (0..=4, b'-') => read + 1,
        (5, b'-') => 5,
        (5, b'e') => 6,
        (6, b'n') => 7,
        (7, b'd') => 8,
        (6 | 7, b'-') => 1,
        (8..=12, b'-') => read + 1,
        (8..=12, _) => 8,
        (_, _) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matcher::{Action, MatcherBuilder, tests::shown_always};

    /// Each text shown with what `detector` finds masked as a bullet, however it is cut.
    fn check(detector: Detector, right: &[(&str, &str)], wrong: &[&str]) {
        let mut builder = MatcherBuilder::new();
        let matcher = builder.detector(detector, Action::Mask).build().unwrap();
        for (text, want) in right {
            assert_eq!(shown_always(&matcher, text), *want, "{text:?}");
        }
        for text in wrong {
            assert_eq!(shown_always(&matcher, text), *text, "is no {detector}");
        }
        assert_eq!(detector.name().parse(), Ok(detector));
    }

    #[test]
    fn e_mail_addresses() {
        let right = &[
            ("write to ada@example.com.", "write to •."),
            ("Ada.Lovelace+x@mail.Example.co.uk, please", "•, please"),
            ("<_a@b.io>", "<•>"),
            ("ada@exam\u{200b}ple.com", "•"),
            ("ａｄａ＠example．com", "•"),
            ("a@b.co c@d.org", "• •"),
        ];
        check(Detector::Email, right, &["ada@example", "@example.com", "ada@@example.com", "ada @ example.com", "a@-b.com", "1@2.3"]);
    }

    #[test]
    fn phone_numbers() {
        let right = &[
            ("call +49 30 901820 now", "call • now"),
            ("+1 (415) 555-0132", "•"),
            ("tel:+33-1-23-45-67-89.", "tel:•."),
            ("415-555-0132 or (415) 555-0132", "• or •"),
        ];
        check(
            Detector::Phone,
            right,
            &["2024-01-02 03:04", "1+4915112345678", "+49 30", "123-456-7890", "415-5555-0132", "3.141592653589"],
        );
    }

    #[test]
    fn credit_cards() {
        let right = &[
            ("4111 1111 1111 1111", "•"),
            ("card 5555-5555-5555-4444, thanks", "card •, thanks"),
            ("378282246310005", "•"),
            ("6011111111111117 3530111333300000", "• •"),
            ("30569309025904;2223003122003222", "•;•"),
        ];
        let wrong = &["4111 1111 1111 1112", "1234567812345670", "411111111111111", "4111  1111 1111 1111", "order 20260101123456"];
        check(Detector::CreditCard, right, wrong);
    }

    #[test]
    fn bank_accounts() {
        let right = &[
            ("DE89 3704 0044 0532 0130 00", "•"),
            ("pay gb82west12345698765432 today", "pay • today"),
            ("NO93 8601 1117 947, FR14 2004 1010 0505 0001 3M02 606", "•, •"),
        ];
        check(
            Detector::Iban,
            right,
            &["DE88 3704 0044 0532 0130 00", "DE89 3704 0044 0532 0130", "XX82WEST12345698765432", "be careful 22"],
        );
    }

    #[test]
    fn internet_addresses() {
        let right = &[
            ("from 192.168.0.1 to 8.8.8.8:53", "from • to •:53"),
            ("2001:db8::1 and [fe80::1:2:3]", "• and [•]"),
            ("::1 ::ffff:10.0.0.1", "• •"),
            ("2001:0db8:85a3:0000:0000:8a2e:0370:7334.", "•."),
        ];
        let wrong = &["256.1.1.1", "1.2.3", "12:30:45", "00:1b:44:11:3a:b7", "std::vec", "fe::cafe", "v1.2.03.4", "a:b"];
        check(Detector::Ip, right, wrong);
    }

    #[test]
    fn social_security_numbers() {
        let right = &[("078-05-1120", "•"), ("ssn: 219 09 9999.", "ssn: •.")];
        check(
            Detector::UsSsn,
            right,
            &["000-12-3456", "666-12-3456", "900-12-3456", "123-00-4567", "123-45-0000", "123-45 6789", "1123-45-6789"],
        );
    }

    /// Written in two, so that no scanner of repositories takes an example for a leak.
    fn key(prefix: &str, body: &str) -> String {
        format!("{prefix}{body}")
    }

    #[test]
    fn api_keys() {
        let digits = "a1b2c3d4e5f6a7b8c9d0a1b2c3d4e5f6a7b8c9d0";
        let keys = [
            key("AKIA", "IOSFODNN7EXAMPLE"),
            key("ghp", &format!("_{}", &digits[..36])),
            key("github", &format!("_pat_{digits}_{digits}")),
            key("glpat", "-abcdefgh1234567890xy"),
            key("xoxb", "-123456789012-abcdefghij"),
            key("sk_live", &format!("_{}", &digits[..24])),
            key("sk-proj", &format!("-{digits}-{digits}")),
            key("sk-ant", &format!("-api03-{digits}")),
            key("AIza", &digits[..35]),
            key("npm", &format!("_{}", &digits[..36])),
            key("SG.", &format!("{}.{}{}", &digits[..22], digits, &digits[..3])),
            key("hf", &format!("_{}", &digits[..34])),
        ];
        for key in &keys {
            check(Detector::ApiKey, &[(key, "•"), (&format!("key={key}, ok"), "key=•, ok")], &[]);
        }
        check(
            Detector::ApiKey,
            &[],
            &["sk-learn", "risk-adjusted-portfolio-management-theory", "sk-this-is-only-a-hyphenated-text", "ghp_short", "akiak"],
        );
    }

    #[test]
    fn private_keys() {
        let begin = key("-----BEGIN RSA PRIVATE", " KEY-----");
        let end = key("-----END RSA PRIVATE", " KEY-----");
        let body = "MIIEowIBAAKCAQEA7bq\n+/9Zx==\n".repeat(4);
        check(
            Detector::PrivateKey,
            &[
                (&format!("here: {begin}\n{body}{end}\nkeep it safe"), "here: •\nkeep it safe"),
                (&format!("{begin}\n{body}"), "•"),
                (&format!("the line {begin} begins it. Then"), "the line •. Then"),
                (&format!("{begin}{end}{begin}\nabc"), "••"),
                (&format!("\"{begin}\\n{body}{end}\\n\";"), "\"•\\n\";"),
            ],
            &["-----BEGIN CERTIFICATE-----\nMIIE", "-----", "private key", "----BEGIN PRIVATE KEY-----"],
        );
    }

    #[test]
    fn a_private_key_is_masked_as_it_comes() {
        let mut builder = MatcherBuilder::new();
        let matcher = builder.detector(Detector::PrivateKey, Action::Mask).build().unwrap();
        let (mut scan, mut out) = (matcher.scan(), Default::default());
        scan.push(&matcher, &key("-----BEGIN PRIVATE", " KEY-----\n"), &mut out);
        let line = "Qm9i".repeat(16);
        for lines in 1..=127 {
            let cleared = scan.push(&matcher, &line, &mut out).cleared;
            assert_eq!(cleared, 27 + 64 * lines, "only the last character waits");
        }
        assert_eq!(scan.push(&matcher, &line, &mut out).cleared, 28 + 64 * 128, "the limit has come");
        let masked: u64 = out.masks.iter().map(|mask| mask.range.end - mask.range.start).sum();
        assert_eq!((masked, out.masks.iter().filter(|mask| mask.first).count()), (27 + 8192, 1));
    }

    #[test]
    fn web_tokens() {
        let token = key("eyJhbGciOiJIUzI1NiJ9", ".eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U");
        check(
            Detector::Jwt,
            &[(&token, "•"), (&format!("Bearer {token}, then"), "Bearer •, then")],
            &["eyJhbGciOiJIUzI1NiJ9", "eyj.eyj", "eyJhbGciOiJIUzI1NiJ9.abc.def"],
        );
    }

    #[test]
    fn an_unknown_detector_is_named() {
        assert!("e-mail".parse::<Detector>().unwrap_err().to_string().contains("`e-mail`"));
    }

    #[test]
    fn an_end_line_is_read_over_dashes_that_are_too_many() {
        let all = |text: &str| text.bytes().fold(0, end_line);
        assert_eq!(all("abc-------end x key-----"), 13);
        assert_eq!(all("-----end x key----"), 12);
        assert_eq!(all("-----en-----end k-----"), 13);
        assert_ne!(all("-----begin x-----"), 13);
    }
}
