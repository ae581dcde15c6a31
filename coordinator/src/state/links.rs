//! Links that do not work: which pairs of workers cannot reach each other, and who goes on without whom.

use std::collections::{BTreeMap, BTreeSet};

use super::{Event, LostWorker, Machine, Member, Notice, Phase, WorkerId};

/// When one has complained, what the others say is waited for: they found out at about the same time.
const HEARING_MS: u64 = 1_500;
/// A link is tried again after this time, and each time that it turns out broken after twice the last.
const RETRY_MIN_MS: u64 = 10_000;
const RETRY_MAX_MS: u64 = 600_000;

/// Two processes, by their instances: they may connect anew, and have the same network.
type Pair = (u64, u64);

/// What is known of links that did not work.
#[derive(Debug, Default)]
pub(super) struct Links(BTreeMap<Pair, Broken>);

#[derive(Debug)]
struct Broken {
    /// Not to be used before.
    until_ms: u64,
    retry_ms: u64,
}

fn pair(a: u64, b: u64) -> Pair {
    (a.min(b), a.max(b))
}

impl Links {
    fn note(&mut self, pair: Pair, now_ms: u64) {
        // Whoever has not been heard of for so long is gone.
        self.0.retain(|_, broken| broken.until_ms + RETRY_MAX_MS > now_ms);
        let retry_ms = self.0.get(&pair).map_or(RETRY_MIN_MS, |broken| (2 * broken.retry_ms).min(RETRY_MAX_MS));
        self.0.insert(pair, Broken { until_ms: now_ms + retry_ms, retry_ms });
    }

    fn is_broken(&self, pair: Pair, now_ms: u64) -> bool {
        self.0.get(&pair).is_some_and(|broken| broken.until_ms > now_ms)
    }
}

impl Machine {
    /// Who takes part in the next generation: all who are ready, but of those that cannot reach each other only as many
    /// as can. The one that reaches fewest is left out, then who does not hold the state, then who came last; somebody
    /// who holds the state stays in any case.
    pub(super) fn roster(&self) -> Vec<WorkerId> {
        // What remains after the last step is for those who hold the state.
        let phase = if self.phase == Phase::Waiting { self.phase_at_committed() } else { self.phase };
        let computes = !matches!(phase, Phase::Preempted | Phase::Finishing);
        let is_wanted = |member: &Member| member.ready.is_some() && (member.holds || computes);
        let mut roster: Vec<WorkerId> =
            self.members.iter().filter(|(_, member)| is_wanted(member)).map(|(&worker, _)| worker).collect();
        while let Some(worst) = self.worst_linked(&roster) {
            roster.retain(|&worker| worker != worst);
        }
        roster
    }

    /// Of workers that do not all reach each other, the one that the others do best without.
    fn worst_linked(&self, workers: &[WorkerId]) -> Option<WorkerId> {
        if self.links.0.is_empty() {
            return None;
        }
        let instance = |worker: &WorkerId| self.members[worker].instance;
        let broken = |worker: &WorkerId| {
            let others = workers.iter().filter(|other| *other != worker);
            others.filter(|other| self.links.is_broken(pair(instance(worker), instance(other)), self.now_ms)).count()
        };
        let holders: Vec<WorkerId> = workers.iter().copied().filter(|worker| self.members[worker].holds).collect();
        let candidates = workers.iter().copied().filter(|worker| holders != [*worker]);
        let worst = candidates.max_by_key(|worker| (broken(worker), !self.members[worker].holds, *worker));
        worst.filter(|worker| broken(worker) > 0)
    }

    /// Whether somebody waits who could take part now.
    pub(super) fn can_grow(&self) -> bool {
        let waits = |member: &Member| member.rank.is_none() && member.ready.is_some();
        self.members.values().any(waits) && self.roster().iter().any(|worker| self.members[worker].rank.is_none())
    }

    /// Whether somebody who was not of the last generation, and could be of the next, holds the state.
    pub(super) fn others_may_hold(&self) -> bool {
        self.roster().iter().map(|worker| &self.members[worker]).any(|member| member.rank.is_none() && member.holds)
    }

    /// Whether somebody holds the state who is left out for want of a link.
    pub(super) fn is_holder_left_out(&self) -> bool {
        let roster = self.roster();
        let holds = |member: &Member| member.ready.is_some() && member.holds;
        self.members.iter().any(|(worker, member)| holds(member) && !roster.contains(worker))
    }

    /// Members that said whom they cannot reach, and have been waited for.
    pub(super) fn has_heard_of_broken_links(&self) -> bool {
        self.failed_ms.is_some_and(|ms| self.now_ms - ms >= HEARING_MS) && self.knows_broken_links()
    }

    pub(super) fn knows_broken_links(&self) -> bool {
        self.ranks().any(|(_, member)| !member.unreachable.is_empty())
    }

    /// Goes on with workers that reach each other, as far as these have said. The others stay connected, and are tried
    /// again after a while.
    pub(super) fn go_on_without_broken_links(&mut self) {
        let mut broken: BTreeSet<(WorkerId, WorkerId)> = BTreeSet::new();
        let members: Vec<WorkerId> = self.ranks().map(|(worker, _)| worker).collect();
        for (worker, member) in self.ranks() {
            let others = member.unreachable.iter().filter_map(|&rank| members.get(rank as usize));
            broken
                .extend(others.filter(|&&other| other != worker).map(|&other| (worker.min(other), worker.max(other))));
        }
        if broken.is_empty() {
            // Ranks that there are none of: nothing to go by.
            return self.connect_anew();
        }
        for &(a, b) in &broken {
            let pair = pair(self.members[&a].instance, self.members[&b].instance);
            self.links.note(pair, self.now_ms);
        }
        let roster = self.roster();
        let left_out: Vec<WorkerId> = members.into_iter().filter(|worker| !roster.contains(worker)).collect();
        let lost: Vec<LostWorker> = left_out.iter().map(|&worker| self.left_out(worker, &broken)).collect();
        self.event(Event::Lost { workers: lost.clone(), left: roster.len() as u32 });
        let names: Vec<String> = lost.iter().map(|lost| format!("{}: {}", self.name(lost.worker), lost.why)).collect();
        self.trouble().lost.extend(lost);
        for worker in left_out {
            if let Some(member) = self.members.get_mut(&worker) {
                member.rank = None;
            }
            self.forget_saver(worker);
        }
        (self.attempts_failed, self.calm_steps, self.stalled_ms) = (0, 0, None);
        self.void_step();
        if self.can_go_on() {
            return self.plan();
        }
        self.wait_for_workers(names.join("; "));
    }

    fn left_out(&self, worker: WorkerId, broken: &BTreeSet<(WorkerId, WorkerId)>) -> LostWorker {
        let Member { host, pid, .. } = &self.members[&worker];
        let other = |&(a, b): &(WorkerId, WorkerId)| match worker {
            _ if worker == a => Some(self.name(b)),
            _ if worker == b => Some(self.name(a)),
            _ => None,
        };
        let others: Vec<String> = broken.iter().filter_map(other).collect();
        let why = format!("no connection between it and {}", others.join(", "));
        LostWorker { worker, host: host.clone(), pid: *pid, why, noticed_by: Notice::Link }
    }

    /// The links of a generation that has committed a step work.
    pub(super) fn trust_links(&mut self) {
        if self.links.0.is_empty() {
            return;
        }
        let instances: BTreeSet<u64> = self.ranks().map(|(_, member)| member.instance).collect();
        self.links.0.retain(|(a, b), _| !(instances.contains(a) && instances.contains(b)));
    }
}
