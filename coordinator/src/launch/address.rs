//! By which of its addresses others reach this machine.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs, UdpSocket};

/// The address that this machine has on the way to `peer`. Nothing is sent.
///
/// # Errors
/// The system's, where there is no such way.
pub fn towards(peer: SocketAddr) -> io::Result<IpAddr> {
    let any: IpAddr = match peer {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    // For datagrams, this only looks up the route.
    socket.connect(peer)?;
    Ok(socket.local_addr()?.ip())
}

/// The same for a host by its name.
///
/// # Errors
/// The system's, where the name has no address or there is no way to it.
pub fn towards_host(host: &str) -> io::Result<IpAddr> {
    // Routes know no ports; 9 is that of datagrams to be thrown away.
    let mut addresses = (host, 9).to_socket_addrs()?;
    let none = || io::Error::new(io::ErrorKind::NotFound, format!("{host} has no address"));
    towards(addresses.next().ok_or_else(none)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_the_way_to_this_machine_lies_loopback() {
        assert!(towards("127.0.0.1:4700".parse().unwrap()).unwrap().is_loopback());
        assert!(towards_host("localhost").unwrap().is_loopback());
        assert!(towards_host("no such host").is_err());
    }
}
