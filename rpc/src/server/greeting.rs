//! Whether a connection has sent a complete greeting.
//!
//! HTTP/2 opens with a preface and a SETTINGS frame (RFC 9113, section 3.4). hyper waits for both
//! without a limit, so the bytes are also followed here, one by one. A connection that sends
//! anything else speaks HTTP/1, and shows that it is meant by its first call.

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const FRAME_HEADER_BYTES: usize = 9;
const SETTINGS: u8 = 0x04;

/// How much of the greeting has been received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Greeting {
    /// So many bytes of the preface have been received.
    Preface(usize),
    /// The header of the first frame.
    Header { bytes: [u8; FRAME_HEADER_BYTES], have: usize },
    /// So many bytes of the first frame's payload are still to come.
    Payload(u32),
    /// The greeting is complete, or this is not HTTP/2.
    Over,
}

impl Default for Greeting {
    fn default() -> Self {
        Greeting::Preface(0)
    }
}

impl Greeting {
    /// Takes bytes that were received. Returns true once, when the greeting is complete.
    pub(super) fn hear(&mut self, mut bytes: &[u8]) -> bool {
        loop {
            match self {
                Greeting::Over => return false,
                Greeting::Preface(have) if *have == PREFACE.len() => {
                    *self = Greeting::Header { bytes: [0; FRAME_HEADER_BYTES], have: 0 };
                }
                Greeting::Header { bytes: header, have } if *have == FRAME_HEADER_BYTES => {
                    // Another first frame is an error, for which hyper may close the connection.
                    *self = match header[3] == SETTINGS {
                        true => Greeting::Payload(u32::from_be_bytes([
                            0, header[0], header[1], header[2],
                        ])),
                        false => Greeting::Over,
                    };
                }
                Greeting::Payload(0) => {
                    *self = Greeting::Over;
                    return true;
                }
                _ if bytes.is_empty() => return false,
                Greeting::Preface(have) => {
                    let take = bytes.len().min(PREFACE.len() - *have);
                    if bytes[..take] != PREFACE[*have..*have + take] {
                        *self = Greeting::Over;
                        return false;
                    }
                    *have += take;
                    bytes = &bytes[take..];
                }
                Greeting::Header { bytes: header, have } => {
                    let take = bytes.len().min(FRAME_HEADER_BYTES - *have);
                    header[*have..*have + take].copy_from_slice(&bytes[..take]);
                    *have += take;
                    bytes = &bytes[take..];
                }
                Greeting::Payload(missing) => {
                    let take = bytes.len().min(*missing as usize);
                    *missing -= take as u32;
                    bytes = &bytes[take..];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole() -> Vec<u8> {
        // One setting of six bytes.
        [PREFACE, &[0, 0, 6, SETTINGS, 0, 0, 0, 0, 0], &[0, 3, 0, 0, 0, 100]].concat()
    }

    #[test]
    fn a_greeting_is_complete_with_its_last_byte_however_it_is_cut() {
        let whole = whole();
        for cut in 0..whole.len() {
            let mut greeting = Greeting::default();
            assert!(!greeting.hear(&whole[..cut]), "complete after {cut} bytes");
            assert!(greeting.hear(&[&whole[cut..], b"more"].concat()), "cut at {cut}");
            assert!(!greeting.hear(b"more"), "only once");
        }
        let mut greeting = Greeting::default();
        let complete = whole.iter().filter(|byte| greeting.hear(std::slice::from_ref(byte)));
        assert_eq!(complete.count(), 1);
    }

    #[test]
    fn what_is_no_http_2_is_never_a_greeting() {
        let mut other = whole();
        other[PREFACE.len() + 3] = 0;
        for bytes in [b"GET / HTTP/1.1\r\n\r\n".as_slice(), b"PRI * HTTP/1.1\r\n", &other] {
            let mut greeting = Greeting::default();
            assert!(!greeting.hear(bytes));
            assert!(!greeting.hear(&whole()));
        }
    }
}
