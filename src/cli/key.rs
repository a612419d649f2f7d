//! Keys and values as text. Printable text stands for itself, `\xNN` for any byte, and `\\` for a
//! backslash. Every sequence of bytes can be written so, and what is printed reads back as the same
//! bytes.

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use esker_model::limits::KEYS_TOP;
use esker_rpc::text::{Printable, WIDE_SPACE};
use serde::{Serialize, Serializer};

/// A key or a value: any bytes, in the form of text on the command line and in output.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Text(pub Bytes);

/// Why a text does not stand for bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    #[error("`\\x{0}` is not an escape: two hexadecimal digits follow `\\x`, as in \\x7F")]
    Hexadecimal(String),
    #[error("`\\{0}` is not an escape: write \\\\ for a backslash and \\xNN for a byte")]
    Unknown(char),
    #[error("a backslash at the end escapes nothing: write \\\\ for a backslash")]
    Unfinished,
}

impl FromStr for Text {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, TextError> {
        let mut bytes = Vec::with_capacity(text.len());
        let mut rest = text;
        while let Some((literal, escape)) = rest.split_once('\\') {
            bytes.extend_from_slice(literal.as_bytes());
            let mut characters = escape.chars();
            match characters.next() {
                Some('\\') => bytes.push(b'\\'),
                Some('x') => {
                    let digits: String = characters.by_ref().take(2).collect();
                    bytes.push(byte(&digits).ok_or(TextError::Hexadecimal(digits))?);
                }
                Some(other) => return Err(TextError::Unknown(other)),
                None => return Err(TextError::Unfinished),
            }
            rest = characters.as_str();
        }
        bytes.extend_from_slice(rest.as_bytes());
        Ok(Text(bytes.into()))
    }
}

/// The byte that exactly two hexadecimal digits stand for.
fn byte(digits: &str) -> Option<u8> {
    let hexadecimal = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    if !hexadecimal {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Printable(&self.0).fmt(f)
    }
}

impl Text {
    /// The text in a table. A space at an end of a cell could not be seen, and two spaces separate
    /// columns, so such spaces are escaped.
    pub fn cell(&self) -> String {
        let text = self.to_string();
        let mut cell = String::with_capacity(text.len());
        let mut characters = text.chars().peekable();
        // A space at the beginning is escaped, too.
        let mut before = ' ';
        while let Some(character) = characters.next() {
            let is_lost = is_space(before) || characters.peek().is_none();
            match character {
                ' ' if is_lost => cell.push_str("\\x20"),
                WIDE_SPACE if is_lost => cell.push_str("\\xE3\\x80\\x80"),
                _ => cell.push(character),
            }
            before = character;
        }
        cell
    }

    /// A bound of a range in a table; `""` for no bound.
    pub fn bound(&self) -> String {
        match &self.0[..] {
            b"" => "\"\"".to_owned(),
            // The bound above all keys is longer than any key, and a person could not read it.
            top if *top == KEYS_TOP => "(top)".to_owned(),
            // Keys that look like these two texts.
            b"\"\"" => "\\x22\\x22".to_owned(),
            b"(top)" => "\\x28top)".to_owned(),
            _ => self.cell(),
        }
    }
}

fn is_space(character: char) -> bool {
    matches!(character, ' ' | WIDE_SPACE)
}

impl Serialize for Text {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn assert_reads_back(text: &Text) -> Result<(), TestCaseError> {
        let in_json = serde_json::to_value(text).expect("plain data");
        let printed = [text.to_string(), text.cell(), in_json.as_str().unwrap_or("").to_owned()];
        for printed in printed {
            prop_assert!(!printed.contains(char::is_control), "{printed:?}");
            prop_assert_eq!(printed.parse(), Ok(text.clone()));
        }
        let cell = text.cell();
        prop_assert_eq!(cell.trim(), &cell);
        prop_assert!(!cell.contains("  "), "{cell:?} is two cells");
        Ok(())
    }

    proptest! {
        #[test]
        fn what_is_printed_reads_back_as_the_same_bytes(bytes: Vec<u8>) {
            let text = Text(bytes.into());
            assert_reads_back(&text)?;
        }

        #[test]
        fn text_of_every_language_reads_back_as_the_same_bytes(
            parts in prop::collection::vec(
                prop_oneof![
                    "\\PC{0,4}",
                    "[ \"'\\\\x]{1,3}",
                    any::<char>().prop_map(String::from),
                    "[\\u{300}-\\u{36F}\\u{200B}-\\u{202E}\\u{3000}\\u{FE0F}\\u{E000}\\u{5D0}]",
                ],
                0..6,
            )
        ) {
            assert_reads_back(&Text(parts.concat().into()))?;
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "[\\\\x0-9a-fé]{0,12}") {
            let _ = text.parse::<Text>();
        }
    }

    #[test]
    fn spaces_are_escaped_only_where_a_table_would_lose_them() {
        let cell = |text: &'static str| Text(Bytes::from(text)).cell();
        assert_eq!(cell("a b"), "a b");
        assert_eq!(cell(" a  b "), "\\x20a \\x20b\\x20");
        assert_eq!(cell(" "), "\\x20");
        assert_eq!(cell("一\u{3000}二\u{3000} "), "一\u{3000}二\u{3000}\\x20");
        assert_eq!(cell("\u{3000}"), "\\xE3\\x80\\x80");
        assert_eq!(cell("clé ключ"), "clé ключ");
        assert_eq!(Text(Bytes::from(" a  b ")).to_string(), " a  b ");
    }

    #[test]
    fn no_bound_is_told_from_a_key_that_looks_like_it() {
        assert_eq!(Text::default().bound(), "\"\"");
        let quotes = Text(Bytes::from("\"\""));
        assert_eq!(quotes.bound(), "\\x22\\x22");
        assert_eq!(quotes.bound().parse(), Ok(quotes));
        let top = Text(Bytes::from("(top)"));
        assert_eq!(top.bound(), "\\x28top)");
        assert_eq!(top.bound().parse(), Ok(top));
    }

    #[test]
    fn escapes_stand_for_bytes_and_the_rest_for_itself() {
        let parsed = |text: &str| text.parse::<Text>().map(|text| text.0.to_vec());
        assert_eq!(parsed(""), Ok(vec![]));
        assert_eq!(parsed("r\\x00\\xfF a"), Ok(b"r\x00\xFF a".to_vec()));
        assert_eq!(parsed("a\\\\x41"), Ok(b"a\\x41".to_vec()));
        assert_eq!(parsed("é"), Ok("é".as_bytes().to_vec()));
    }

    #[test]
    fn a_malformed_escape_is_named() {
        let fault = |text: &str| text.parse::<Text>().expect_err("the escape is malformed");
        assert_eq!(fault("\\x4"), TextError::Hexadecimal("4".to_owned()));
        assert_eq!(fault("\\x+1"), TextError::Hexadecimal("+1".to_owned()));
        assert_eq!(fault("\\xé1"), TextError::Hexadecimal("é1".to_owned()));
        assert_eq!(fault("a\\n"), TextError::Unknown('n'));
        assert_eq!(fault("a\\"), TextError::Unfinished);
    }
}
