//! Too few workers: how long the run waits for others, when it goes on, and which processes are
//! started in place of dead ones.

use super::membership::Loss;
use super::{Abandoned, CALM_STEPS, Effect, Event, Machine, Member, Notice, Phase, Record, Settings};
use crate::exit_code;

/// When enough are there for the run to go on, the others have so long to come too.
const LAST_CALL_MS: u64 = 2_000;

/// Of a run that waits for workers.
#[derive(Debug)]
pub(super) struct Wait {
    since_ms: u64,
    /// With so many, all that were there before, nobody else is waited for.
    wanted: u32,
    /// Since when enough are there.
    enough_ms: Option<u64>,
    /// What led to this, for people.
    cause: String,
}

impl Wait {
    pub(super) fn forgive(&mut self, pause_ms: u64) {
        self.since_ms += pause_ms;
        self.enough_ms = self.enough_ms.map(|ms| ms + pause_ms);
    }
}

impl Machine {
    /// Goes on where another coordinator left its record. Its workers are expected to connect.
    pub fn take_over(settings: Settings, record: &Record) -> Self {
        let mut machine = Self::new(settings);
        assert!(record.committed_step <= machine.settings.schedule.total_steps);
        machine.last_worker = record.last_worker;
        machine.generation = record.generation;
        machine.committed_step = record.committed_step;
        machine.committed_generation = record.committed_generation;
        machine.due = record.due(machine.best_step());
        machine.phase = Phase::Waiting;
        machine.took_over = true;
        let cause = "the coordinator came back".to_owned();
        machine.wait = Some(Wait { since_ms: 0, wanted: record.workers, enough_ms: None, cause });
        machine.trouble();
        machine
    }

    /// What the committed step asks for: computing the next, or what a run leaves.
    pub(super) fn phase_at_committed(&self) -> Phase {
        let last = self.committed_step == self.settings.schedule.total_steps || self.due.finish;
        match (last, self.preempting) {
            (true, _) => Phase::Finishing,
            (false, true) => Phase::Preempted,
            (false, false) => Phase::Running,
        }
    }

    fn workers_needed(&self) -> u32 {
        // What remains after the last step, one can do.
        if self.phase_at_committed() == Phase::Running { self.settings.workers_min } else { 1 }
    }

    fn is_held(&self) -> bool {
        !self.state_is_lost && self.members.values().any(|member| member.ready.is_some() && member.holds)
    }

    pub(super) fn can_go_on(&self) -> bool {
        self.roster().len() as u32 >= self.workers_needed() && self.is_held()
    }

    pub(super) fn wait_for_workers(&mut self, cause: String) {
        self.phase = Phase::Waiting;
        let wanted = self.workers_needed();
        self.wait = Some(Wait { since_ms: self.now_ms, wanted, enough_ms: None, cause });
        self.go_on_if_possible();
        if self.phase == Phase::Waiting {
            let (ready, needed) = (self.members.len() as u32, self.workers_needed());
            let timeout_ms =
                if self.is_held() { self.settings.join_timeout_ms } else { self.settings.reconnect_timeout_ms };
            let seconds = timeout_ms as f64 / 1000.0;
            self.event(match &self.wait {
                Some(wait) if self.state_is_lost => Event::StateIncomplete { problem: wait.cause.clone(), seconds },
                _ => Event::Waiting { workers: ready, needed, seconds },
            });
        }
    }

    /// Whenever something has changed for a run that waits.
    pub(super) fn go_on_if_possible(&mut self) {
        if self.phase != Phase::Waiting {
            return;
        }
        // A link may be tried again.
        self.state_is_lost &= !self.others_may_hold();
        let enough = self.can_go_on();
        let all_ready = self.members.values().all(|member| member.ready.is_some());
        let Some(wait) = &mut self.wait else { return };
        if !enough {
            wait.enough_ms = None;
            return self.give_up_if_hopeless();
        }
        let since_ms = *wait.enough_ms.get_or_insert(self.now_ms);
        let complete = all_ready && self.members.len() as u32 >= wait.wanted || self.preempting;
        if complete || self.now_ms - since_ms >= LAST_CALL_MS {
            self.phase = self.phase_at_committed();
            if self.phase == Phase::Preempted {
                (self.due.save, self.due.evaluate) = (true, false);
            }
            self.plan();
        }
    }

    fn give_up_if_hopeless(&mut self) {
        let held = self.is_held();
        let Some(wait) = &self.wait else { return };
        let full = self.members.len() as u32 == self.settings.workers_expected;
        let all_ready = self.members.values().all(|member| member.ready.is_some());
        let timeout_ms = if held { self.settings.join_timeout_ms } else { self.settings.reconnect_timeout_ms };
        let late = self.now_ms - wait.since_ms >= timeout_ms;
        // Where workers are started by hand, anybody may still come.
        let coming = !all_ready || !self.absent.is_empty() || self.coming > 0;
        let hope = match (held, self.settings.restarts_max) {
            (true, Some(_)) => coming,
            (true, None) => true,
            // A replacement brings no state.
            (false, Some(_)) => !all_ready || !self.absent.is_empty(),
            (false, None) => !(full && all_ready || self.preempting) || self.is_holder_left_out(),
        };
        if hope && !late {
            return;
        }
        if !held && (self.took_over || self.state_is_lost && !self.preempting) {
            return self.abandon();
        }
        let (left, needed) = (self.members.len(), self.workers_needed());
        let lost = match (held, self.state_is_lost) {
            (true, _) => "",
            (false, false) => ", and none holds the weights",
            (false, true) => ", and together they do not hold the state",
        };
        let reason = format!("{left} workers left, {needed} needed{lost}: {}", wait.cause);
        let code = if self.preempting { exit_code::PREEMPTED } else { exit_code::TOO_FEW_WORKERS };
        self.stop(code, reason);
    }

    /// The committed state is gone.
    fn abandon(&mut self) {
        let step = self.committed_step;
        let reason = match &self.wait {
            Some(wait) if self.state_is_lost => format!("the state of step {step} is lost: {}", wait.cause),
            _ => format!("no worker that holds the weights of step {step} came back"),
        };
        let lost = self.trouble.take().map_or(Vec::new(), |trouble| trouble.lost);
        self.phase = Phase::Done;
        self.effects.push(Effect::Abandon { reason, abandoned: Abandoned { step, lost } });
    }

    /// A worker that is lost: its process is replaced, once it is known to have ended or where
    /// only killing it can help.
    pub(super) fn replace_if_dead(&mut self, member: &Member, noticed_by: Notice) {
        if self.settings.restarts_max.is_none() || self.phase == Phase::Gathering {
            return;
        }
        match noticed_by {
            Notice::Process => self.replace(member.pid),
            // It may be about to connect again; or its end is about to be told.
            Notice::Connection => self.absent.push(member.pid),
            Notice::Silence | Notice::Watchdog => {
                self.retired.push(member.pid);
                self.replace(member.pid);
            }
            // It is well.
            Notice::Link => {}
        }
    }

    fn replace(&mut self, pid: u32) {
        let ending = matches!(self.phase_at_committed(), Phase::Finishing | Phase::Preempted);
        if ending || self.settings.restarts_max.is_none_or(|most| self.restarts >= most) {
            return;
        }
        self.restarts += 1;
        self.coming += 1;
        self.effects.push(Effect::Replace { pid });
    }

    /// The stream tells of a worker that had joined, and in order with what it said last. Only one
    /// that never came that far leaves no other trace.
    pub(super) fn on_process_exited(&mut self, pid: u32, code: Option<u32>, why: String) {
        if let Some(member) = self.members.values_mut().find(|member| member.pid == pid) {
            member.exited = Some(why);
            return;
        }
        if self.phase == Phase::Gathering {
            let code = code.filter(|&code| code != 0).unwrap_or(exit_code::FAILURE);
            return self.stop(code, format!("worker process {pid} ended before it joined: {why}"));
        }
        if self.settings.restarts_max.is_none() {
            return; // Not to be replaced from here.
        }
        if let Some(index) = self.retired.iter().position(|&retired| retired == pid) {
            self.retired.swap_remove(index);
            return;
        }
        match self.absent.iter().position(|&absent| absent == pid) {
            Some(index) => drop(self.absent.swap_remove(index)),
            None => {
                self.coming = self.coming.saturating_sub(1);
                self.event(Event::Refused { reason: format!("worker process {pid} ended before it joined: {why}") });
            }
        }
        if self.phase != Phase::Waiting || self.is_held() {
            self.replace(pid);
        }
        self.go_on_if_possible();
    }

    /// A step was committed by all who take part.
    pub(super) fn calm_down(&mut self) {
        self.calm_steps += 1;
        if self.calm_steps >= CALM_STEPS {
            self.restarts = 0;
        }
    }

    /// Losses of workers not heard of, by the time of what `since_ms` answers.
    pub(super) fn silent(&self, timeout_ms: u64) -> Vec<Loss> {
        let late = self.members.iter().filter(|(_, member)| self.now_ms - member.heard_ms > timeout_ms);
        late.map(|(&worker, member)| {
            let seconds = (self.now_ms - member.heard_ms) as f64 / 1000.0;
            Loss { worker, noticed_by: Notice::Silence, why: format!("not heard of for {seconds:.1} seconds") }
        })
        .collect()
    }
}
