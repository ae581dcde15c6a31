//! `quintet doctor --cluster`: every link between the hosts of a job, by a probe on each.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, SystemTime};

use quintet_coordinator::launch::command::CommandLine;
use quintet_identity::{Authority, Role};
use serde_json::{Value, json};

use super::link::Measured;
use super::probe::{self, Answer, Question, now_ns};
use crate::args::DoctorArguments;
use crate::commands::launch::cluster_hosts;
use crate::commands::print_json;
use crate::error::{Failure, Result, exit};

/// Reading the data takes longest.
const HELLO_PATIENCE: Duration = Duration::from_secs(600);
const ANSWER_PATIENCE: Duration = Duration::from_secs(60);
/// Certificates are good from their making on, so that clocks which differ by more refuse them.
const CLOCK_DIFFERENCE_MAX_SECONDS: f64 = 30.0;
const CLOCK_READINGS: usize = 5;

/// This process's name among the hosts.
const HERE: &str = "here";

pub(super) fn run(arguments: &DoctorArguments, job: &Path) -> Result<u8> {
    // A job that is wrong is told as one, and not as a trouble of hosts.
    probe::load(job)?;
    let question = ["doctor", "--probe", "--cluster"].map(str::to_string);
    let words = question.into_iter().chain([job.display().to_string()]).collect();
    let hosts = cluster_hosts(&arguments.hosts, words)?;
    let mut report = Report { quiet: arguments.json, hosts: Vec::new(), links: Vec::new(), problems: Vec::new() };
    let commands = [(HERE.to_string(), hosts.here)].into_iter().chain(hosts.there);
    let mut probes: Vec<Probe> = commands.filter_map(|(name, command)| start(name, &command, &mut report)).collect();
    report.compare(&probes);
    certify(&mut probes, &mut report)?;
    for probe in &mut probes {
        report.clock(probe);
    }
    // This host listens where a coordinator would, and the others where workers would: on their way to it.
    for probe in &mut probes {
        report.listen(probe, hosts.own);
    }
    let addresses: Vec<(String, SocketAddr)> =
        probes.iter().filter_map(|probe| Some((probe.name.clone(), probe.address?))).collect();
    for probe in &mut probes {
        for (to, address) in addresses.iter().filter(|(name, _)| *name != probe.name).collect::<Vec<_>>() {
            report.link(probe, to, *address);
        }
    }
    if arguments.json {
        print_json(&report.to_json());
    } else if report.problems.is_empty() {
        println!("all {} hosts and {} links are well", report.hosts.len(), report.links.len());
    }
    Ok(if report.problems.is_empty() { exit::DONE } else { exit::FAILURE })
}

/// A probe under way.
struct Probe {
    name: String,
    child: Child,
    questions: ChildStdin,
    answers: Receiver<String>,
    errors: Receiver<String>,
    version: String,
    data: std::result::Result<String, String>,
    public_key: Vec<u8>,
    address: Option<SocketAddr>,
}

impl Probe {
    fn start(name: String, command: &CommandLine) -> std::result::Result<Self, String> {
        let mut child = Command::new(&command.program)
            .args(&command.arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{}: {error}", command.program))?;
        let (Some(questions), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err("it has no pipes".to_string());
        };
        let (answers, errors) = (lines(stdout), lines(stderr));
        let (version, data) = (String::new(), Err(String::new()));
        let mut probe =
            Probe { name, child, questions, answers, errors, version, data, public_key: Vec::new(), address: None };
        match probe.answer(HELLO_PATIENCE)? {
            Answer::Hello { version, data, public_key } => {
                (probe.version, probe.data, probe.public_key) = (version, data, public_key);
                Ok(probe)
            }
            _ => Err("it does not say hello".to_string()),
        }
    }

    fn ask(&mut self, question: &Question) -> std::result::Result<Answer, String> {
        let line = serde_json::to_string(question).map_err(|error| error.to_string())? + "\n";
        let asked = self.questions.write_all(line.as_bytes()).and_then(|()| self.questions.flush());
        // One that has ended says why.
        match (asked, self.answer(ANSWER_PATIENCE)) {
            (_, Ok(Answer::Failed(problem))) => Err(problem),
            (_, Ok(answer)) => Ok(answer),
            (Ok(()) | Err(_), Err(problem)) => Err(problem),
        }
    }

    fn answer(&mut self, patience: Duration) -> std::result::Result<Answer, String> {
        use std::sync::mpsc::RecvTimeoutError;
        match self.answers.recv_timeout(patience) {
            Ok(line) => serde_json::from_str(&line).map_err(|_| format!("it says {line:?}, which is no answer")),
            Err(RecvTimeoutError::Timeout) => Err(format!("no answer within {} s", patience.as_secs())),
            Err(RecvTimeoutError::Disconnected) => {
                let said: Vec<String> = self.errors.iter().collect();
                let status = self.child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
                Err(said.last().map_or(status, Clone::clone))
            }
        }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        // ssh ends with its input; one that does not is of no more use.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lines(stream: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (send, receive) = channel();
    std::thread::spawn(move || {
        let mut lines = BufReader::new(stream).lines().map_while(std::result::Result::ok);
        // When nobody listens any more, that is all.
        let _ = lines.try_for_each(|line| send.send(line));
    });
    receive
}

fn start(name: String, command: &CommandLine, report: &mut Report) -> Option<Probe> {
    match Probe::start(name.clone(), command) {
        Ok(probe) => {
            report.hosts.push(name);
            Some(probe)
        }
        Err(problem) => {
            let advice = format!("this must work, and end without a question: {command}");
            report.problem(HERE, &name, "start", problem, &advice);
            None
        }
    }
}

/// Makes the hosts known to each other, as members of a run are, by an authority that lives for this only.
fn certify(probes: &mut [Probe], report: &mut Report) -> Result<()> {
    let folder = std::env::temp_dir().join(format!("quintet-doctor-{}-{}", std::process::id(), now_ns()));
    let authority = Authority::open(&folder, &folder);
    let outcome = authority.map_err(Failure::from).and_then(|authority| {
        for probe in probes {
            let (now, lifetime) = (SystemTime::now(), Duration::from_secs(3600));
            let token = authority.issue_token(Role::Worker, now, lifetime)?.to_text();
            let admitted = authority.redeem(&token, &probe.public_key, now, lifetime)?;
            let admitted = admitted.map_err(|refusal| Failure::failed(refusal.to_string()))?;
            let question = Question::Certificate {
                certificate: admitted.certificate,
                authority: authority.certificate().to_vec(),
                fingerprint: authority.fingerprint(),
            };
            if let Err(problem) = probe.ask(&question) {
                report.problem(HERE, &probe.name, "start", problem, "run the same quintet on all hosts");
            }
        }
        Ok(())
    });
    // A folder of this process's own.
    let _ = std::fs::remove_dir_all(&folder);
    outcome
}

/// What was found, told as it is found.
struct Report {
    quiet: bool,
    hosts: Vec<String>,
    links: Vec<Value>,
    problems: Vec<Value>,
}

impl Report {
    fn problem(&mut self, from: &str, to: &str, hop: &str, problem: String, advice: &str) {
        if !self.quiet {
            let place = if from == to { from.to_string() } else { format!("{from} -> {to}") };
            println!("FAILED {place}: {hop}: {problem}\n       {advice}");
        }
        self.problems.push(json!({"from": from, "to": to, "hop": hop, "problem": problem, "advice": advice}));
    }

    /// Programs and data must be the same everywhere.
    fn compare(&mut self, probes: &[Probe]) {
        for probe in probes {
            if probe.version != env!("CARGO_PKG_VERSION") {
                let problem = format!("quintet {} there, {} here", probe.version, env!("CARGO_PKG_VERSION"));
                self.problem(HERE, &probe.name, "version", problem, "run the same quintet on all hosts");
            }
            if let Err(problem) = &probe.data {
                let advice = "its workers would read the data from the coordinator's machine; to read them there, they must be where \
                              the job says, relative to the folder that is run in";
                self.problem(&probe.name, &probe.name, "data", problem.clone(), advice);
            }
        }
        let mut read = probes.iter().filter_map(|probe| Some((&probe.name, probe.data.as_ref().ok()?)));
        let Some((first, expected)) = read.next() else { return };
        for (name, found) in read.filter(|(_, found)| *found != expected) {
            let problem = format!("the data have the fingerprint {found}, and {expected} on {first}");
            self.problem(
                first,
                name,
                "data",
                problem,
                "its workers would read the coordinator's; copy the same files to all hosts",
            );
        }
    }

    fn clock(&mut self, probe: &mut Probe) {
        let mut best: Option<(u64, f64)> = None;
        for _ in 0..CLOCK_READINGS {
            let before = now_ns();
            let Ok(Answer::Clock(there)) = probe.ask(&Question::Clock) else { return };
            let after = now_ns();
            let (took, middle) = (after.saturating_sub(before), before / 2 + after / 2);
            let ahead = (i128::from(there) - i128::from(middle)) as f64 / 1e9;
            if best.is_none_or(|(shortest, _)| took < shortest) {
                best = Some((took, ahead));
            }
        }
        let Some((took, ahead)) = best else { return };
        // Where in that time the clock was read is not known.
        let uncertain = took as f64 / 2e9;
        if ahead.abs() - uncertain > CLOCK_DIFFERENCE_MAX_SECONDS {
            let problem = format!("its clock is {ahead:+.1} s ahead of the one here");
            self.problem(HERE, &probe.name, "clock", problem, "set the clocks by NTP, or certificates are refused");
        } else if !self.quiet {
            println!("ok     {}: clock {ahead:+.4} s (within {uncertain:.4} s)", probe.name);
        }
    }

    fn listen(&mut self, probe: &mut Probe, towards: IpAddr) {
        match probe.ask(&Question::Listen { towards }) {
            Ok(Answer::Listening(address)) => probe.address = Some(address),
            Ok(_) => {}
            Err(problem) => {
                let advice = "is there a route to the other hosts, and may programs open ports?";
                self.problem(&probe.name, &probe.name, "listen", problem, advice);
            }
        }
    }

    fn link(&mut self, probe: &mut Probe, to: &str, address: SocketAddr) {
        match probe.ask(&Question::Measure(address)) {
            Ok(Answer::Link(Ok(measured))) => self.measured(&probe.name, to, address, &measured),
            Ok(Answer::Link(Err(broken))) => {
                let hop = format!("{:?}", broken.hop).to_lowercase();
                let problem = format!("{address}: {}", broken.problem);
                self.problem(&probe.name, to, &hop, problem, broken.hop.advice());
            }
            Ok(_) => {}
            Err(problem) => self.problem(HERE, &probe.name, "probe", problem, "it ended; is the host well?"),
        }
    }

    fn measured(&mut self, from: &str, to: &str, address: SocketAddr, measured: &Measured) {
        if !self.quiet {
            println!(
                "ok     {from} -> {to} ({}): connects in {:.2} ms, TLS in {:.2} ms, round trip {:.3} ms, {:.2} Gbit/s",
                address.ip(),
                measured.connect_ms,
                measured.tls_ms,
                measured.round_trip_ms,
                measured.bytes_per_second * 8.0 / 1e9
            );
        }
        let mut link = json!(measured);
        link["from"] = json!(from);
        link["to"] = json!(to);
        link["address"] = json!(address);
        self.links.push(link);
    }

    fn to_json(&self) -> Value {
        json!({"hosts": self.hosts, "links": self.links, "problems": self.problems})
    }
}
