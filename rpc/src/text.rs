//! Bytes as text that people can read, and that reads back as the same bytes.
//!
//! Printable text stands for itself, in any language. Unprintable parts are `\xNN` for each of
//! their bytes: control characters, characters that turn the direction of writing, joiners with
//! nothing to join, unassigned characters, and bytes that are not UTF-8. A backslash is `\\`.

use std::fmt::{self, Write};

/// Bytes, displayed as text.
#[derive(Clone, Copy, Debug)]
pub struct Printable<'a>(pub &'a [u8]);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The visible character on which a combining character can stand, if there is one.
        let mut base = None;
        for chunk in self.0.utf8_chunks() {
            let mut characters = chunk.valid().chars().peekable();
            while let Some(character) = characters.next() {
                let next = characters.peek().copied();
                match kind(character) {
                    Kind::Backslash => f.write_str("\\\\")?,
                    Kind::Printable => f.write_char(character)?,
                    Kind::Combining if base.is_some() => f.write_char(character)?,
                    Kind::Joiner if joins(base, next) => {
                        f.write_char(character)?;
                        continue;
                    }
                    Kind::Combining | Kind::Joiner | Kind::Hidden => {
                        escape(f, character.encode_utf8(&mut [0; 4]).as_bytes())?;
                        base = None;
                        continue;
                    }
                }
                base = Some(character);
            }
            if !chunk.invalid().is_empty() {
                escape(f, chunk.invalid())?;
                base = None;
            }
        }
        Ok(())
    }
}

/// Whether a joiner between these characters is visible by its effect: as in an emoji of several
/// characters, or within a word of a script that joins its letters.
fn joins(before: Option<char>, after: Option<char>) -> bool {
    let is_joined = |character: char| {
        !character.is_ascii() && matches!(kind(character), Kind::Printable | Kind::Combining)
    };
    before.is_some_and(is_joined) && after.is_some_and(is_joined)
}

fn escape(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "\\x{byte:02X}"))
}

enum Kind {
    Printable,
    /// It changes the look of the character before it.
    Combining,
    /// It joins its neighbours, or keeps them apart, and is invisible by itself.
    Joiner,
    Hidden,
    Backslash,
}

/// The space of scripts whose characters are as wide as they are high. It is visible.
pub const WIDE_SPACE: char = '\u{3000}';

fn kind(character: char) -> Kind {
    match character {
        '\\' => Kind::Backslash,
        ' '..='~' | WIDE_SPACE => Kind::Printable,
        '\u{200C}' | '\u{200D}' => Kind::Joiner,
        _ => {
            // The standard library knows what is printable. It escapes a combining character at the
            // beginning of a string, but not a later one. It escapes an unprintable character
            // everywhere.
            let mut buffer = [0; 5];
            buffer[0] = b'a';
            let length = 1 + character.encode_utf8(&mut buffer[1..]).len();
            let text = std::str::from_utf8(&buffer[..length]).unwrap_or_default();
            let later_escaped = text.escape_debug().nth(1) == Some('\\');
            match (character.escape_debug().next() == Some('\\'), later_escaped) {
                (false, _) => Kind::Printable,
                (true, false) => Kind::Combining,
                (true, true) => Kind::Hidden,
            }
        }
    }
}

/// A key as text, in the form of [`Printable`].
pub fn display_key(key: &[u8]) -> String {
    /// Longer keys are cut, because an error is one line.
    const SHOWN: usize = 64;
    if key.is_empty() {
        return "\"\"".into();
    }
    if key.len() <= SHOWN {
        return Printable(key).to_string();
    }
    // Not in the middle of a character, if the key is text there.
    let is_inside = |at: &usize| (0x80..0xC0).contains(&key[*at]);
    let cut = (SHOWN - 3..=SHOWN).rev().find(|at| !is_inside(at)).unwrap_or(SHOWN);
    format!("{}...", Printable(&key[..cut]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(bytes: impl AsRef<[u8]>) -> String {
        Printable(bytes.as_ref()).to_string()
    }

    #[test]
    fn printable_text_of_any_language_stands_for_itself() {
        for text in ["a b", "\"quoted\" 'twice'", "é", "ключ", "鍵", "مفتاح", "🔑", "e\u{301}", "~"]
            .into_iter()
            .chain([
                "👩\u{200D}👧",
                "👩🏽\u{200D}🚀",
                "❤\u{FE0F}\u{200D}🔥",
                "می\u{200C}خواهم",
                "鍵\u{3000}一",
            ])
        {
            assert_eq!(printed(text), text);
        }
    }

    #[test]
    fn what_nobody_would_see_is_escaped() {
        for (bytes, text) in [
            (&b"\x00\n\t\x7F"[..], "\\x00\\x0A\\x09\\x7F"),
            (b"\\", "\\\\"),
            (b"\xFF\xC3", "\\xFF\\xC3"),
            ("a\u{202E}b".as_bytes(), "a\\xE2\\x80\\xAEb"),
            ("a\u{200B}\u{FEFF}".as_bytes(), "a\\xE2\\x80\\x8B\\xEF\\xBB\\xBF"),
            ("a\u{A0}b\u{2028}".as_bytes(), "a\\xC2\\xA0b\\xE2\\x80\\xA8"),
            ("\u{E000}".as_bytes(), "\\xEE\\x80\\x80"),
            // There is nothing to join here.
            ("a\u{200D}b".as_bytes(), "a\\xE2\\x80\\x8Db"),
            ("👩\u{200D}".as_bytes(), "👩\\xE2\\x80\\x8D"),
            (
                "\u{200D}👩\u{200D}\u{200D}👧".as_bytes(),
                "\\xE2\\x80\\x8D👩\\xE2\\x80\\x8D\\xE2\\x80\\x8D👧",
            ),
            // An accent needs something to stand on.
            ("\u{301}e\u{301}\n\u{301}".as_bytes(), "\\xCC\\x81e\u{301}\\x0A\\xCC\\x81"),
        ] {
            assert_eq!(printed(bytes), text);
        }
    }

    #[test]
    fn a_key_in_an_error_is_text_and_not_too_long() {
        assert_eq!(display_key(b""), "\"\"");
        assert_eq!(display_key("clé\n".as_bytes()), "clé\\x0A");
        let long = "é".repeat(100);
        assert_eq!(display_key(long.as_bytes()), format!("{}...", "é".repeat(32)));
        let odd = format!("a{long}");
        assert_eq!(display_key(odd.as_bytes()), format!("a{}...", "é".repeat(31)));
        assert_eq!(display_key(&[0x80; 65]), format!("{}...", "\\x80".repeat(64)));
    }
}
