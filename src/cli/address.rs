//! `HOST:PORT`, checked where it is typed.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

/// An address that a process can be reached at. A host's name is not looked up here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address(String);

/// Why a text is no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    #[error("leave out the scheme `{0}://`: an address is HOST:PORT")]
    Scheme(String),
    #[error("the port is missing: an address is HOST:PORT, such as 127.0.0.1:2379")]
    NoPort,
    #[error("`{0}` is not a port: it is a number from 1 to 65535")]
    Port(String),
    #[error("the host is missing: an address is HOST:PORT, such as 127.0.0.1:2379")]
    NoHost,
    #[error("`{0}` is not a host: it is a name, an IPv4 address, or an IPv6 address in brackets")]
    Host(String),
}

impl Address {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<Address> for String {
    fn from(address: Address) -> String {
        address.0
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if let Some((scheme, _)) = text.split_once("://") {
            return Err(AddressError::Scheme(scheme.to_owned()));
        }
        let (host, port) = text.rsplit_once(':').ok_or(AddressError::NoPort)?;
        if host.is_empty() {
            return Err(AddressError::NoHost);
        }
        if !is_host(host) {
            return Err(AddressError::Host(host.to_owned()));
        }
        // Unlike the parser of numbers, an address has no plus sign.
        let digits = port.bytes().all(|byte| byte.is_ascii_digit());
        match port.parse::<u16>() {
            Ok(number) if digits && number != 0 => Ok(Address(text.to_owned())),
            _ => Err(AddressError::Port(port.to_owned())),
        }
    }
}

fn is_host(host: &str) -> bool {
    match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        Some(inner) => inner.parse::<Ipv6Addr>().is_ok(),
        None => host
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_')),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_addresses_with_a_port_are_accepted() {
        for text in ["127.0.0.1:2379", "localhost:1", "db-1.example_net:65535", "[::1]:20160"] {
            assert_eq!(
                text.parse::<Address>().map(|address| address.to_string()),
                Ok(text.to_owned())
            );
        }
    }

    #[test]
    fn each_fault_is_named() {
        let fault = |text: &str| text.parse::<Address>().expect_err("the address is malformed");
        assert_eq!(fault("http://a:1"), AddressError::Scheme("http".to_owned()));
        assert_eq!(fault("localhost"), AddressError::NoPort);
        assert_eq!(fault(""), AddressError::NoPort);
        assert_eq!(fault(":2379"), AddressError::NoHost);
        for port in ["", "0", "65536", "+1", "x", "1 "] {
            assert_eq!(fault(&format!("a:{port}")), AddressError::Port(port.to_owned()));
        }
        for host in ["a b", "::1", "[::1", "[zone]", "a/b", "a,b"] {
            assert_eq!(fault(&format!("{host}:1")), AddressError::Host(host.to_owned()));
        }
    }
}
