//! Lists of hosts, as users of `mpirun` and `torchrun` write them.

use crate::{Error, Result};

/// A host and how many workers it takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// As `ssh` takes it: a name, an address, an alias, `user@name`.
    pub name: String,
    /// Workers.
    pub slots: u32,
}

/// More on one host are a slip of the pen.
const SLOTS_MAX: u32 = 1024;

/// `a,b:2,user@c`: hosts with one worker, or as many as the number says.
///
/// # Errors
/// [`Error::Hosts`].
pub fn parse_list(text: &str) -> Result<Vec<Host>> {
    let hosts = text.split(',').map(str::trim).filter(|entry| !entry.is_empty());
    distinct(hosts.map(|entry| parse_entry(entry, "--hosts")).collect::<Result<_>>()?, "--hosts")
}

/// A host file: a host a line, with `slots=N` or `:N`; `#` begins a comment.
///
/// # Errors
/// [`Error::Hosts`] that names the line.
pub fn parse_file(text: &str, name: &str) -> Result<Vec<Host>> {
    let mut hosts = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let place = format!("{name}:{number}");
        let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
        let Some(entry) = words.next() else { continue };
        let mut host = parse_entry(entry, &place)?;
        for word in words {
            match word.split_once('=') {
                Some(("slots", count)) => host.slots = parse_slots(count, &place)?,
                // Open MPI's upper bound: the run takes what slots says.
                Some(("max_slots" | "max-slots", _)) => {}
                _ => return Err(wrong(&place, format!("{word:?} is not understood; write HOST slots=N"))),
            }
        }
        hosts.push(host);
    }
    distinct(hosts, name)
}

fn parse_entry(entry: &str, place: &str) -> Result<Host> {
    // A colon more than one belongs to an IPv6 address, which takes its slots from `slots=`.
    let (name, slots) = match entry.split_once(':') {
        Some((name, count)) if !count.contains(':') => (name, parse_slots(count, place)?),
        _ => (entry, 1),
    };
    // A name that begins so would be an option of ssh.
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-@:%".contains(c);
    if name.is_empty() || name.starts_with('-') || !name.chars().all(allowed) {
        return Err(wrong(place, format!("{name:?} is no host")));
    }
    Ok(Host { name: name.to_owned(), slots })
}

fn parse_slots(text: &str, place: &str) -> Result<u32> {
    let slots = text.parse().ok().filter(|slots| (1..=SLOTS_MAX).contains(slots));
    slots.ok_or_else(|| wrong(place, format!("{text:?} is no number of workers between 1 and {SLOTS_MAX}")))
}

/// A host that is named again has all the slots together, as `mpirun` sees it.
fn distinct(hosts: Vec<Host>, place: &str) -> Result<Vec<Host>> {
    let mut distinct: Vec<Host> = Vec::with_capacity(hosts.len());
    for host in hosts {
        match distinct.iter_mut().find(|other| other.name == host.name) {
            Some(other) => other.slots += host.slots,
            None => distinct.push(host),
        }
    }
    if distinct.is_empty() {
        return Err(wrong(place, "no host is named".to_owned()));
    }
    Ok(distinct)
}

fn wrong(place: &str, problem: String) -> Error {
    Error::Hosts { place: place.to_owned(), problem }
}

/// The first `workers` slots, host after host.
///
/// # Errors
/// [`Error::Hosts`] if there are fewer.
pub fn take(hosts: &[Host], workers: u32) -> Result<Vec<Host>> {
    let slots: u32 = hosts.iter().map(|host| host.slots).sum();
    if workers > slots {
        return Err(wrong("--workers", format!("{workers} workers do not fit into the hosts' {slots} slots")));
    }
    let mut left = workers;
    let taken = hosts.iter().map(|host| {
        let slots = host.slots.min(left);
        left -= slots;
        Host { slots, ..host.clone() }
    });
    Ok(taken.filter(|host| host.slots > 0).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str, slots: u32) -> Host {
        Host { name: name.to_owned(), slots }
    }

    #[test]
    fn a_list() {
        let hosts = parse_list("a, b:2,me@c:8,fe80::1%eth0").unwrap();
        assert_eq!(hosts, [host("a", 1), host("b", 2), host("me@c", 8), host("fe80::1%eth0", 1)]);
    }

    #[test]
    fn a_file() {
        let text = "# the cluster\nn1 slots=4\n\nn2:2   # half of it\nn3 slots=1 max_slots=4\nn1\n";
        assert_eq!(parse_file(text, "hosts").unwrap(), [host("n1", 5), host("n2", 2), host("n3", 1)]);
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        let problem = |text: &str| parse_file(text, "hosts").unwrap_err().to_string();
        assert_eq!(problem("a\nb slots=x\n"), "hosts:2: \"x\" is no number of workers between 1 and 1024");
        assert_eq!(problem("a slot=2"), "hosts:1: \"slot=2\" is not understood; write HOST slots=N");
        assert_eq!(problem("-oProxyCommand=x"), "hosts:1: \"-oProxyCommand=x\" is no host");
        assert_eq!(problem("# nobody\n"), "hosts: no host is named");
        assert_eq!(
            parse_list("a:0").unwrap_err().to_string(),
            "--hosts: \"0\" is no number of workers between 1 and 1024"
        );
        assert!(parse_list("a$(x)").unwrap_err().is_user_error());
    }

    #[test]
    fn slots_are_taken_host_after_host() {
        let hosts = [host("a", 2), host("b", 2), host("c", 1)];
        assert_eq!(take(&hosts, 3).unwrap(), [host("a", 2), host("b", 1)]);
        assert_eq!(take(&hosts, 5).unwrap(), hosts);
        let error = take(&hosts, 6).unwrap_err().to_string();
        assert_eq!(error, "--workers: 6 workers do not fit into the hosts' 5 slots");
    }
}
