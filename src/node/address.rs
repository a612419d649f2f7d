//! Addresses of nodes: which texts are addresses, which addresses are the same, and which can be
//! given to other nodes.
//!
//! `HOST:PORT` flows in as a person typed it, for `--listen`, `--advertise`, `--join` and
//! `--placement`. [`Address`] is its one canonical spelling. Before a node makes anything on disk,
//! [`check`] refuses addresses that no other node could use. [`recognise`] looks the names up and
//! refuses a list that has one machine in two spellings, because a node knows that it is a
//! placement member by finding its own address in the list.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::str::FromStr;
use std::time::Duration;

use futures_util::future::join_all;

/// How many placement members there may be. An even number tolerates the loss of no more members
/// than one fewer does. More than five only make every write wait for more disks.
pub const PLACEMENT_MEMBERS: [usize; 3] = [1, 3, 5];

/// How long the look-up of a name may take before a node starts without its result.
const LOOK_UP_TIMEOUT: Duration = Duration::from_secs(2);

/// The longest host name, and the longest part of one, by RFC 1035.
const MAX_NAME: usize = 253;
const MAX_LABEL: usize = 63;

/// An address at which a process can be reached, in one spelling. Names are lower case and without
/// a dot at the end. Numbers are as the standard library prints them. Names are not looked up.
///
/// ```
/// use esker::node::{Address, AddressError};
///
/// let address: Address = "DB-1.example:2379".parse()?;
/// assert_eq!(address.to_string(), "db-1.example:2379");
/// assert_eq!("db-1.example".parse::<Address>(), Err(AddressError::NoPort));
/// # Ok::<(), AddressError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    host: Host,
    port: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Host {
    Name(String),
    Ip(IpAddr),
}

/// Why a text is not an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// There is no text.
    #[error("an address is missing: write HOST:PORT, such as 127.0.0.1:2379")]
    Empty,
    /// The text begins with this scheme and `://`.
    #[error("leave out the scheme `{0}://`: an address is HOST:PORT")]
    Scheme(String),
    /// There is no colon.
    #[error("the port is missing: an address is HOST:PORT, such as 127.0.0.1:2379")]
    NoPort,
    /// This is what comes after the last colon. Port 0 is one only to listen on.
    #[error("`{0}` is not a port: it is a number from 1 to 65535")]
    Port(String),
    /// There is nothing before the colon.
    #[error("the host is missing: an address is HOST:PORT, such as 127.0.0.1:2379")]
    NoHost,
    /// This is what comes before the last colon.
    #[error("`{0}` is not a host: it is a name, an IPv4 address, or an IPv6 address in brackets")]
    Host(String),
    /// This host ends in a number, as only an IPv4 address does, and is none.
    #[error("`{0}` is not an IPv4 address: that is four numbers from 0 to 255, such as 10.0.0.1")]
    Ipv4(String),
}

/// Why a node cannot start with its addresses. `--listen`, `--advertise` and `--join` stand for the
/// methods of [`NodeBuilder`](crate::NodeBuilder) with these names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressesError {
    /// A text is not an address.
    #[error("{option} {text}: {source}")]
    Malformed {
        /// The option that it was given for.
        option: &'static str,
        /// The text, as it was given.
        text: String,
        /// What is wrong with it.
        source: AddressError,
    },
    /// A node that listens at all addresses of its machine was not told which of them others reach.
    #[error(
        "--listen {listen} means every address of this machine, and tells others none of them: \
         add --advertise HOST:PORT, by which nodes and clients reach this node"
    )]
    Everywhere {
        /// `0.0.0.0` or `[::]`, with the port.
        listen: Address,
    },
    /// No connection can be made to an address: it means all machines, or a group of them.
    #[error(
        "{option} {address} is not the address of one machine, so that nobody can connect to it: \
         name a host, or one of its own addresses"
    )]
    Nowhere {
        /// The option that it was given for.
        option: &'static str,
        /// The address.
        address: Address,
    },
    /// There are not 1, 3 or 5 placement members.
    #[error(
        "--join lists {count} placement members, but a group has 1, 3 or 5 of them: \
         an even number bears no more losses than one member fewer"
    )]
    Count {
        /// How many are listed.
        count: usize,
    },
    /// A placement member is listed twice in one spelling.
    #[error("--join lists {address} twice: list each placement member once")]
    Twice {
        /// The address.
        address: Address,
    },
    /// Two names of the list lead to one address, and so to one member.
    #[error(
        "--join lists {first} and {second}, which are the same address: list each placement \
         member once"
    )]
    Same {
        /// The one that is listed first.
        first: Address,
        /// The other one.
        second: Address,
    },
    /// The node finds itself in the list under another name than its own. It would wait for itself.
    #[error(
        "{listed} in --join is this node itself, whose {option} is {own}: write the same spelling \
         in both, on every node"
    )]
    OtherSpelling {
        /// The name in the list.
        listed: Address,
        /// The option that gives the node its own name.
        option: &'static str,
        /// The node's own name.
        own: Address,
    },
    /// The node is in the list, and its [`Roles`](super::Roles) leave placement out.
    #[error(
        "--join lists this node, {address}, as a placement member, but --roles leaves placement \
         out: correct one of the two"
    )]
    NotItsRole {
        /// The node's address.
        address: Address,
    },
}

impl Address {
    /// As from a string, but port 0 is allowed and stands for any free port.
    pub(crate) fn to_listen_on(text: &str) -> Result<Self, AddressError> {
        let text = text.trim();
        if text.is_empty() {
            return Err(AddressError::Empty);
        }
        if let Some((scheme, _)) = text.split_once("://") {
            return Err(AddressError::Scheme(scheme.to_owned()));
        }
        let (host, port) = text.rsplit_once(':').ok_or(AddressError::NoPort)?;
        let host = Host::from_str(host)?;
        // The parser of numbers accepts a plus sign, which an address does not have.
        let digits = port.bytes().all(|byte| byte.is_ascii_digit());
        match port.parse() {
            Ok(port) if digits => Ok(Address { host, port }),
            _ => Err(AddressError::Port(port.to_owned())),
        }
    }

    /// The address with the port that was bound.
    fn with_port(&self, port: u16) -> Self {
        Address { host: self.host.clone(), port }
    }

    /// Whether the system chooses the port.
    pub fn is_any_port(&self) -> bool {
        self.port == 0
    }

    /// Whether this is `0.0.0.0` or `[::]`: all addresses to listen at, and none to connect to.
    pub fn is_unspecified(&self) -> bool {
        matches!(self.host, Host::Ip(ip) if ip.is_unspecified())
    }

    /// Whether this can be the address of one machine, and not of a group of machines.
    fn is_of_one_machine(&self) -> bool {
        match self.host {
            Host::Name(_) => true,
            Host::Ip(ip) => {
                let is_broadcast = ip == IpAddr::V4(Ipv4Addr::BROADCAST);
                !ip.is_unspecified() && !ip.is_multicast() && !is_broadcast
            }
        }
    }

    /// The sockets of the address; none if its name cannot be looked up.
    async fn look_up(&self) -> Vec<SocketAddr> {
        let name = match &self.host {
            Host::Ip(ip) => return vec![SocketAddr::new(*ip, self.port)],
            Host::Name(name) => name.as_str(),
        };
        let found =
            tokio::time::timeout(LOOK_UP_TIMEOUT, tokio::net::lookup_host((name, self.port)));
        match found.await {
            Ok(Ok(sockets)) => sockets.collect(),
            // Connecting to it will fail and give the reason.
            Ok(Err(_)) | Err(_) => Vec::new(),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Name(name) => write!(f, "{name}:{}", self.port),
            Host::Ip(ip) => SocketAddr::new(*ip, self.port).fmt(f),
        }
    }
}

impl From<Address> for String {
    fn from(address: Address) -> String {
        address.to_string()
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        match Address::to_listen_on(text)? {
            Address { port: 0, .. } => Err(AddressError::Port("0".to_owned())),
            address => Ok(address),
        }
    }
}

impl FromStr for Host {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let refused = || AddressError::Host(text.to_owned());
        if let Some(rest) = text.strip_prefix('[') {
            let inner = rest.strip_suffix(']').ok_or_else(refused)?;
            let ip: Ipv6Addr = inner.parse().map_err(|_| refused())?;
            // ::ffff:10.0.0.1 is another name for 10.0.0.1.
            return Ok(Host::Ip(ip.to_canonical()));
        }
        let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
        if name.is_empty() {
            return Err(AddressError::NoHost);
        }
        let is_label = |label: &str| {
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
            (1..=MAX_LABEL).contains(&label.len())
                && label.bytes().all(allowed)
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if name.len() > MAX_NAME || !name.split('.').all(is_label) {
            return Err(refused());
        }
        // A name that ends in a number is an address in one of the old notations. A resolver would
        // accept it: `0` is 0.0.0.0, and `127.1` is 127.0.0.1.
        let last = name.rsplit('.').next().unwrap_or_default();
        let is_number = last.bytes().all(|byte| byte.is_ascii_digit())
            || last
                .strip_prefix("0x")
                .is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_hexdigit()));
        if is_number {
            let ip = name.parse().map_err(|_| AddressError::Ipv4(text.to_owned()))?;
            return Ok(Host::Ip(IpAddr::V4(ip)));
        }
        Ok(Host::Name(name))
    }
}

/// The addresses of a node, each well-formed and fit for its purpose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Addresses {
    pub(super) listen: Address,
    advertise: Option<Address>,
    pub(super) join: Vec<Address>,
}

/// Checks what can be checked without looking anything up.
pub(super) fn check(
    listen: &str,
    advertise: Option<&str>,
    join: &[String],
) -> Result<Addresses, AddressesError> {
    let malformed = |option, text: &str| {
        let text = text.to_owned();
        move |source| AddressesError::Malformed { option, text, source }
    };
    let for_others = |option, text: &str| {
        let address: Address = text.parse().map_err(malformed(option, text))?;
        match address.is_of_one_machine() {
            true => Ok(address),
            false => Err(AddressesError::Nowhere { option, address }),
        }
    };
    let listen = Address::to_listen_on(listen).map_err(malformed("--listen", listen))?;
    let advertise = advertise.map(|text| for_others("--advertise", text)).transpose()?;
    if advertise.is_none() && listen.is_unspecified() {
        return Err(AddressesError::Everywhere { listen });
    }
    if !listen.is_unspecified() && !listen.is_of_one_machine() {
        return Err(AddressesError::Nowhere { option: "--listen", address: listen });
    }
    let join: Vec<Address> =
        join.iter().map(|text| for_others("--join", text)).collect::<Result<_, _>>()?;
    for (number, address) in join.iter().enumerate() {
        if join[..number].contains(address) {
            return Err(AddressesError::Twice { address: address.clone() });
        }
    }
    // A node that names no members is a cluster of its own.
    if !join.is_empty() && !PLACEMENT_MEMBERS.contains(&join.len()) {
        return Err(AddressesError::Count { count: join.len() });
    }
    Ok(Addresses { listen, advertise, join })
}

impl Addresses {
    /// The address by which others reach the node that listens at `bound`.
    pub(super) fn own(&self, bound: SocketAddr) -> Address {
        self.advertise.clone().unwrap_or_else(|| self.listen.with_port(bound.port()))
    }

    /// Refuses a list that has this node, or any other, under another name than its own. Such a
    /// node would wait for itself, or count twice.
    pub(super) async fn recognise(
        &self,
        bound: SocketAddr,
        runs_placement: Option<bool>,
    ) -> Result<(), AddressesError> {
        let own = self.own(bound);
        if runs_placement == Some(false) && self.join.contains(&own) {
            return Err(AddressesError::NotItsRole { address: own });
        }
        let option = if self.advertise.is_some() { "--advertise" } else { "--listen" };
        let own_sockets = own.look_up().await;
        let looked_up = join_all(self.join.iter().map(Address::look_up)).await;
        for (number, (listed, sockets)) in self.join.iter().zip(&looked_up).enumerate() {
            let is_here = sockets.iter().any(|socket| is_bound_by(*socket, bound));
            if *listed != own && (is_here || share_one(sockets, &own_sockets)) {
                return Err(AddressesError::OtherSpelling { listed: listed.clone(), option, own });
            }
            let earlier = looked_up[..number].iter().position(|other| share_one(sockets, other));
            if let Some(earlier) = earlier {
                let (first, second) = (self.join[earlier].clone(), listed.clone());
                return Err(AddressesError::Same { first, second });
            }
        }
        Ok(())
    }
}

fn share_one(these: &[SocketAddr], those: &[SocketAddr]) -> bool {
    these.iter().any(|this| those.iter().any(|that| are_one(*this, *that)))
}

/// Whether two sockets are the same one. 127.0.0.1 and `[::1]` are two. But an operator does not
/// run two nodes on one port of one machine that differ in that alone, and `localhost` means
/// either.
fn are_one(this: SocketAddr, that: SocketAddr) -> bool {
    let (a, b) = (this.ip().to_canonical(), that.ip().to_canonical());
    let both_loopback = a.is_loopback() && b.is_loopback() && a.is_ipv4() != b.is_ipv4();
    this.port() == that.port() && (a == b || both_loopback)
}

/// Whether a connection to `socket` reaches the listener that is bound to `bound`.
fn is_bound_by(socket: SocketAddr, bound: SocketAddr) -> bool {
    // Only an address of this machine can be bound.
    let is_local = || UdpSocket::bind((socket.ip(), 0)).is_ok();
    are_one(socket, bound)
        || socket.port() == bound.port() && bound.ip().is_unspecified() && is_local()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Address {
        text.parse().expect("an address")
    }

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
    fn an_address_has_one_spelling() {
        for (one, other) in [
            ("LocalHost:1", "localhost:1"),
            ("db.example.:1", "db.example:1"),
            (" a:1 ", "a:1"),
            ("[0:0:0:0:0:0:0:1]:1", "[::1]:1"),
            ("[FE80::A]:1", "[fe80::a]:1"),
            ("[::ffff:10.0.0.1]:1", "10.0.0.1:1"),
            ("a:0001", "a:1"),
        ] {
            assert_eq!(address(one), address(other));
            assert_eq!(address(one).to_string(), other);
        }
    }

    #[test]
    fn each_fault_is_named() {
        let fault = |text: &str| text.parse::<Address>().expect_err("the address is malformed");
        assert_eq!(fault("http://a:1"), AddressError::Scheme("http".to_owned()));
        assert_eq!(fault("localhost"), AddressError::NoPort);
        assert_eq!(fault(""), AddressError::Empty);
        assert_eq!(fault(" "), AddressError::Empty);
        assert_eq!(fault(":2379"), AddressError::NoHost);
        assert_eq!(fault(".:2379"), AddressError::NoHost);
        for port in ["", "0", "65536", "+1", "x", " 1"] {
            assert_eq!(fault(&format!("a:{port}")), AddressError::Port(port.to_owned()));
        }
        let long = "a".repeat(MAX_LABEL + 1);
        for host in [
            "a b",
            "::1",
            "::",
            "[::1",
            "[zone]",
            "[fe80::1%lo]",
            "a/b",
            "a,b",
            "a..b",
            "-a",
            &long,
        ] {
            assert_eq!(fault(&format!("{host}:1")), AddressError::Host(host.to_owned()));
        }
        for host in ["0", "127.1", "0x7f.1", "1.2.3", "256.0.0.1", "1.2.3.4.5", "010.0.0.1", "0x0"]
        {
            assert_eq!(fault(&format!("{host}:1")), AddressError::Ipv4(host.to_owned()));
        }
    }

    fn checked(
        listen: &str,
        advertise: Option<&str>,
        join: &[&str],
    ) -> Result<Addresses, AddressesError> {
        let join: Vec<String> = join.iter().map(ToString::to_string).collect();
        check(listen, advertise, &join)
    }

    #[test]
    fn an_address_that_no_other_machine_can_use_is_not_told_to_any() {
        for listen in ["0.0.0.0:1", "[::]:1", "[::ffff:0.0.0.0]:1", "[0:0::0]:1"] {
            let refused = checked(listen, None, &["a:1"]);
            assert!(matches!(refused, Err(AddressesError::Everywhere { .. })), "{refused:?}");
            let told = checked(listen, Some("a:9"), &["a:9"]).expect("others are told a:9");
            let bound = "0.0.0.0:1".parse().expect("a socket");
            assert_eq!(told.own(bound), address("a:9"));
            for (advertise, join) in [(Some("a:1"), listen), (Some(listen), "a:1")] {
                let refused = checked("b:1", advertise, &[join]);
                assert!(matches!(refused, Err(AddressesError::Nowhere { .. })), "{refused:?}");
            }
        }
        for nobody in ["224.0.0.1:1", "255.255.255.255:1", "[ff02::1]:1"] {
            for (listen, advertise, join) in
                [(nobody, None, "a:1"), ("a:1", Some(nobody), "a:1"), ("a:1", None, nobody)]
            {
                let refused = checked(listen, advertise, &[join]);
                assert!(matches!(refused, Err(AddressesError::Nowhere { .. })), "{refused:?}");
            }
        }
        for (option, refused) in [
            ("--advertise", checked("a:1", Some("a:0"), &[])),
            ("--join", checked("a:1", None, &["a:0"])),
            ("--join", checked("a:1", None, &[""])),
            ("--listen", checked("a", None, &[])),
        ] {
            match refused {
                Err(AddressesError::Malformed { option: named, .. }) => assert_eq!(named, option),
                other => panic!("{option}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_group_has_one_three_or_five_members_each_of_them_once() {
        let all = ["a:1", "b:1", "c:1", "d:1", "e:1", "f:1", "g:1"];
        for count in 1..=all.len() {
            let outcome = checked("a:1", None, &all[..count]);
            match PLACEMENT_MEMBERS.contains(&count) {
                true => assert_eq!(outcome.expect("as many as may be").join.len(), count),
                false => assert_eq!(outcome, Err(AddressesError::Count { count })),
            }
        }
        for again in ["a:1", "A:1", "a.:1", " a:1"] {
            let twice = AddressesError::Twice { address: address("a:1") };
            assert_eq!(checked("a:1", None, &["a:1", "b:1", again]), Err(twice));
        }
    }

    async fn recognised(
        listen: &str,
        bound: &str,
        advertise: Option<&str>,
        join: &[&str],
    ) -> Result<(), AddressesError> {
        let addresses = checked(listen, advertise, join).expect("well-formed");
        addresses.recognise(bound.parse().expect("a socket"), None).await
    }

    #[tokio::test]
    async fn a_node_that_is_listed_under_another_spelling_is_told_both() {
        for (listen, bound, advertise, listed) in [
            ("localhost:7", "127.0.0.1:7", None, "127.0.0.1:7"),
            ("localhost:7", "[::1]:7", None, "127.0.0.1:7"),
            ("127.0.0.1:7", "127.0.0.1:7", None, "localhost:7"),
            ("127.0.0.1:7", "127.0.0.1:7", None, "[::1]:7"),
            ("[::1]:7", "[::1]:7", None, "127.0.0.1:7"),
            ("0.0.0.0:7", "0.0.0.0:7", Some("127.0.0.1:9"), "127.0.0.1:7"),
            ("0.0.0.0:7", "0.0.0.0:7", Some("127.0.0.1:9"), "localhost:9"),
            ("[::]:7", "[::]:7", Some("db.invalid:7"), "127.0.0.1:7"),
        ] {
            let refused = recognised(listen, bound, advertise, &[listed]).await;
            let refused = refused.expect_err("it is listed under another spelling").to_string();
            let own = advertise.unwrap_or(listen);
            assert!(refused.contains(listed) && refused.contains(own), "{refused}");
        }
    }

    #[tokio::test]
    async fn nodes_that_are_not_the_same_are_told_apart() {
        let sound = [
            ("127.0.0.1:7", "127.0.0.1:7", None, &["127.0.0.1:7"][..]),
            ("127.0.0.1:7", "127.0.0.1:7", None, &["127.0.0.1:8"]),
            ("127.0.0.1:7", "127.0.0.1:7", None, &["127.0.0.2:7"]),
            ("localhost:7", "127.0.0.1:7", None, &["localhost:7"]),
            ("0.0.0.0:7", "0.0.0.0:7", Some("127.0.0.1:9"), &["127.0.0.1:9"]),
            ("0.0.0.0:7", "0.0.0.0:7", Some("localhost:7"), &["192.0.2.1:7"]),
            // A name that cannot be looked up yet may belong to any node.
            ("a.invalid:7", "127.0.0.1:7", None, &["a.invalid:7", "b.invalid:7", "c.invalid:7"]),
        ];
        for (listen, bound, advertise, join) in sound {
            assert_eq!(recognised(listen, bound, advertise, join).await, Ok(()), "{join:?}");
        }
    }

    #[tokio::test]
    async fn two_spellings_of_one_member_are_not_two_members() {
        for again in ["127.0.0.1:8", "[::1]:8"] {
            let join = ["localhost:8", "127.0.0.1:9", again];
            let refused = recognised("127.0.0.1:7", "127.0.0.1:7", None, &join).await;
            assert!(matches!(refused, Err(AddressesError::Same { .. })), "{refused:?}");
        }
    }

    #[tokio::test]
    async fn a_listed_node_takes_the_role_that_the_list_gives_it() {
        let addresses = checked("127.0.0.1:7", None, &["127.0.0.1:7"]).expect("well-formed");
        let bound = "127.0.0.1:7".parse().expect("a socket");
        let refused = addresses.recognise(bound, Some(false)).await;
        assert!(matches!(refused, Err(AddressesError::NotItsRole { .. })), "{refused:?}");
        assert_eq!(addresses.recognise(bound, Some(true)).await, Ok(()));
    }
}
