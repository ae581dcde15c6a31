//! How long things may take: deadlines that follow the pace of the run.

use std::collections::VecDeque;

use super::membership::Loss;
use super::{Machine, Notice, Phase};
use crate::exit_code;

/// The run stands still when nothing has come for so many times the longest of the last steps …
const PATIENCE: u64 = 10;
/// … and for this long in any case.
const WATCHDOG_MIN_MS: u64 = 5_000;
/// A generation's first step connects, and hands over weights.
const FIRST_STEP_FACTOR: u64 = 3;
/// Heartbeats are sent every second. When the run stands still, who has missed so many is the cause.
const SILENCE_MS: u64 = 5_000;
/// Who sends heartbeats and yet gets nowhere, with others waiting, is left more time: it may be slow.
const STUCK_MIN_MS: u64 = 30_000;
/// The steps that tell the pace.
const RECENT_STEPS: usize = 16;

/// How long the last steps took.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// When the step in flight was leased.
    leased_ms: u64,
    recent_ms: VecDeque<u64>,
    /// Whether the generation has not committed a step yet.
    first: bool,
}

impl Pace {
    pub(super) fn begin_generation(&mut self, now_ms: u64) {
        (self.leased_ms, self.first) = (now_ms, true);
    }

    pub(super) fn commit(&mut self, now_ms: u64) {
        // What a generation's first step takes says nothing about those that follow.
        if !std::mem::take(&mut self.first) || self.recent_ms.is_empty() {
            self.recent_ms.push_back(now_ms - self.leased_ms);
            if self.recent_ms.len() > RECENT_STEPS {
                self.recent_ms.pop_front();
            }
        }
        self.leased_ms = now_ms;
    }

    /// How long a step may take before somebody is to blame; `None` before one was measured.
    fn limit_ms(&self, least_ms: u64) -> Option<u64> {
        let longest = *self.recent_ms.iter().max()?;
        let factor = if self.first { FIRST_STEP_FACTOR } else { 1 };
        Some(least_ms.max(PATIENCE * longest) * factor)
    }

    pub(super) fn forgive(&mut self, pause_ms: u64) {
        self.leased_ms += pause_ms;
    }
}

impl Machine {
    pub(super) fn on_tick(&mut self) {
        let silent = self.silent(self.settings.heartbeat_timeout_ms);
        if !silent.is_empty() {
            return self.lose(silent);
        }
        match self.phase {
            Phase::Gathering | Phase::Done => {}
            Phase::Waiting => self.go_on_if_possible(),
            Phase::Running | Phase::Preempted | Phase::Finishing => self.watch(),
        }
    }

    fn watch(&mut self) {
        if self.has_heard_of_broken_links() {
            return self.go_on_without_broken_links();
        }
        // By now a dead peer would have been found silent.
        if self.failed_ms.is_some_and(|ms| self.now_ms - ms > self.settings.heartbeat_timeout_ms) {
            return self.try_again();
        }
        let still_ms = self.now_ms - self.progress_ms;
        if still_ms > self.settings.step_timeout_ms {
            return self.on_step_timeout();
        }
        let limit =
            |least_ms| self.pace.limit_ms(least_ms).map_or(u64::MAX, |ms| ms.min(self.settings.step_timeout_ms));
        if still_ms <= limit(WATCHDOG_MIN_MS) {
            return;
        }
        // How long an evaluation or the writing of a model takes, the pace does not tell.
        if self.phase == Phase::Running && !self.due.evaluate {
            let mut hung = self.silent(SILENCE_MS);
            hung.retain(|loss| self.members[&loss.worker].rank.is_some());
            hung.extend(self.stuck(limit(STUCK_MIN_MS)));
            if !hung.is_empty() && hung.len() < self.world() as usize {
                return self.lose(hung);
            }
        }
        // While a generation's first step hands over the state, all but one may wait for long.
        let least_ms = if self.pace.first { STUCK_MIN_MS } else { WATCHDOG_MIN_MS };
        if still_ms > limit(least_ms) && self.everybody_waits(limit(least_ms)) {
            self.connect_anew();
        }
    }

    /// All members are heard of, and have waited for so long.
    fn everybody_waits(&self, limit_ms: u64) -> bool {
        self.ranks().all(|(_, member)| {
            let waits = member.waiting && self.now_ms - member.progress.1 > limit_ms;
            let answered = member.done.is_some() || member.failed.is_some() || member.finished.is_some();
            self.now_ms - member.heard_ms <= SILENCE_MS && (waits || answered)
        })
    }

    /// Members that hold up the others, though they live.
    fn stuck(&self, limit_ms: u64) -> Vec<Loss> {
        let is_stuck = |member: &&super::Member| {
            let idle = member.waiting || member.done.is_some() || member.failed.is_some();
            !idle && self.now_ms - member.heard_ms <= SILENCE_MS && self.now_ms - member.progress.1 > limit_ms
        };
        let stuck = self.ranks().filter(|(_, member)| is_stuck(member));
        stuck
            .map(|(worker, member)| {
                let seconds = (self.now_ms - member.progress.1) as f64 / 1000.0;
                let why = format!("hung: it computes, and got nowhere for {seconds:.1} seconds");
                Loss { worker, noticed_by: Notice::Watchdog, why }
            })
            .collect()
    }

    /// Nothing moves, yet all send heartbeats. If some have answered, or wait, the others hang; if
    /// all are alike, nobody can tell who does.
    fn on_step_timeout(&mut self) {
        let seconds = self.settings.step_timeout_ms as f64 / 1000.0;
        let answered = |member: &super::Member| {
            member.waiting || member.done.is_some() || member.failed.is_some() || member.finished.is_some()
        };
        let hung: Vec<Loss> = self
            .ranks()
            .filter(|(_, member)| !answered(member))
            .map(|(worker, _)| {
                let why = format!("hung: no report of the step for {seconds} seconds");
                Loss { worker, noticed_by: Notice::Watchdog, why }
            })
            .collect();
        if hung.is_empty() {
            return self.connect_anew();
        }
        if hung.len() < self.world() as usize {
            return self.lose(hung);
        }
        let reason = format!(
            "no progress after step {} for {seconds} seconds, though all workers are alive; \
             if steps may take so long, raise cluster.step_timeout_seconds",
            self.committed_step
        );
        self.stop(exit_code::FAILURE, reason);
    }

    /// A coordinator that did not run for a while (stopped, swapped out, a closed lid) has heard
    /// of nobody for that long, which says nothing about the workers.
    pub(super) fn forgive_own_pause(&mut self, now_ms: u64) {
        let pause_ms = now_ms - self.now_ms;
        if pause_ms <= SILENCE_MS.min(self.settings.heartbeat_timeout_ms) / 2 {
            return;
        }
        for member in self.members.values_mut() {
            member.heard_ms += pause_ms;
            member.progress.1 += pause_ms;
        }
        self.progress_ms += pause_ms;
        self.pace.forgive(pause_ms);
        if let Some(wait) = &mut self.wait {
            wait.forgive(pause_ms);
        }
        self.failed_ms = self.failed_ms.map(|ms| ms + pause_ms);
        self.stalled_ms = self.stalled_ms.map(|ms| ms + pause_ms);
    }
}
