//! Keys and values as text: printable ASCII stands for itself, `\xNN` for any byte,
//! and `\\` for a backslash. Every sequence of bytes can be written so, and what is
//! printed reads back as the same bytes.

use std::fmt::{self, Write};
use std::str::FromStr;

use bytes::Bytes;
use serde::{Serialize, Serializer};

/// A key or a value: any bytes, as text on the command line and in what is printed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Text(pub Bytes);

/// Why a text stands for no bytes.
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
        for byte in &self.0 {
            match byte {
                b'\\' => f.write_str("\\\\")?,
                b' '..=b'~' => f.write_char(char::from(*byte))?,
                _ => write!(f, "\\x{byte:02X}")?,
            }
        }
        Ok(())
    }
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

    proptest! {
        #[test]
        fn what_is_printed_reads_back_as_the_same_bytes(bytes: Vec<u8>) {
            let text = Text(bytes.into());
            let printed = text.to_string();
            prop_assert!(printed.bytes().all(|byte| (b' '..=b'~').contains(&byte)));
            prop_assert_eq!(printed.parse(), Ok(text));
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "[\\\\x0-9a-fé]{0,12}") {
            let _ = text.parse::<Text>();
        }
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
