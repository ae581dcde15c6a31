//! Workers are lost, hang, come late and come back; coordinators too.

use super::*;

#[test]
fn a_dead_worker_costs_the_step_in_flight_only() {
    let mut script = Script::started(settings());
    script.done(0, 1, 1, 0..1);
    script.done(1, 1, 1, 1..2);
    assert_lines(script.done(0, 1, 2, 0..1), "");
    assert_lines(
        script.leave(1),
        "1 <- dismissed: taken for lost: gone
         lost 1 (Connection), 1 left
         0 <- plan 2 rank 0 of 1 after 1, next 2 micro-batches 0..2",
    );
    // What the survivor had sent before it knew counts for nothing, nor does a late word of the dead.
    assert_lines(script.done(0, 1, 2, 0..1), "");
    assert_lines(script.done(1, 1, 2, 1..2), "");
    assert_lines(
        script.done(0, 2, 2, 0..2),
        "ledger 2 epoch 0 positions [4, 8] generation 2 workers 1 digest -
         recovered at step 2 as generation 2 of 1: lost [1], joined [], 0 s, 2 micro-batches
         train 2 loss 0.75 examples 4
         0 <- commit 2, next 3 micro-batches 0..1",
    );
}

#[test]
fn a_newcomer_takes_part_from_the_next_step_on_and_is_given_the_state() {
    let mut script = Script::started(Settings { digest_steps: Some(100), ..settings() });
    script.leave(1);
    assert_lines(script.join(5), "5 <- welcome to a run under way\n joined 5, 2 of 2");
    assert_lines(script.join(6), "6 <- refused: the run already has its 2 workers (cluster.workers)");
    assert_lines(script.report(5, newcomer()), "");
    let digested = |script: &Script, generation, step, range: std::ops::Range<u32>| {
        let lease = Lease { step, first_micro_batch: range.start, last_exclusive: range.end };
        let done = step_done(&script.schedule, generation, &lease);
        Report::StepDone(StepDone { weights_digest: Some(vec![1]), ..done })
    };
    let done = digested(&script, 2, 1, 0..2);
    assert_lines(
        script.report(0, done),
        "ledger 1 epoch 0 positions [0, 4] generation 2 workers 1 digest 01
         recovered at step 1 as generation 2 of 1: lost [1], joined [], 0 s, 2 micro-batches
         train 1 loss 0.75 examples 4
         0 <- commit 1
         0 <- plan 3 rank 0 of 2 after 1 heals [1] digest, next 2 micro-batches 0..1
         5 <- plan 3 rank 1 of 2 after 1 heals [1] digest, next 2 micro-batches 1..2",
    );
    // Lost before it has the state: nobody knows what it holds now.
    let done = digested(&script, 3, 2, 0..1);
    assert_lines(script.report(0, done), "");
    script.now_ms += 500;
    let done = digested(&script, 3, 2, 1..2);
    assert_lines(
        script.report(5, done),
        "ledger 2 epoch 0 positions [4, 8] generation 3 workers 2 digest 01
         recovered at step 2 as generation 3 of 2: lost [], joined [5 healed], 0.5 s, 0 micro-batches
         train 2 loss 0.75 examples 4
         0 <- commit 2, next 3 micro-batches 0..0
         5 <- commit 2, next 3 micro-batches 0..1",
    );
}

#[test]
fn a_newcomer_with_other_data_is_sent_away_and_the_run_goes_on() {
    let mut script = Script::started(settings());
    script.leave(1);
    script.join(2);
    let other = Report::Ready(Ready { dataset_fingerprint: "other".to_owned(), ..Ready::default() });
    let lines = script.report(2, other);
    assert!(lines[0].starts_with("refused: worker 2 (h, process 102) reads other data"), "{lines:?}");
    assert!(lines[1].starts_with("2 <- refused: worker 2"), "{lines:?}");
    assert_eq!(script.done(0, 2, 1, 0..2)[0], "ledger 1 epoch 0 positions [0, 4] generation 2 workers 1 digest -");
}

#[test]
fn dead_processes_are_replaced_so_often_and_no_more() {
    let mut script = Script::started(Settings { restarts_max: Some(2), ..settings() });
    let exited = |pid| Input::ProcessExited { pid, exit_code: None, why: "signal 9".to_owned() };
    // Told first by the stream, or first by the process itself.
    let lines = script.leave(1);
    assert!(!lines.iter().any(|line| line.starts_with("replace")), "{lines:?}");
    assert_lines(script.input(exited(101)), "replace process 101");
    script.join(2);
    assert_lines(script.input(exited(102)), "");
    let lines = script.leave(2);
    assert!(lines.contains(&"replace process 102".to_owned()), "{lines:?}");
    // The replacement dies before it joins: that was the last.
    assert_lines(script.input(exited(103)), "refused: worker process 103 ended before it joined: signal 9");
    // Ten good steps, and what was is forgotten; here there are only two more.
    assert_eq!(script.machine.restarts, 2);
    script.machine.calm_steps = 9;
    script.done(0, 2, 1, 0..2);
    assert_eq!(script.machine.restarts, 0);
}

#[test]
fn a_coordinator_goes_on_from_its_record() {
    let settings = Settings { save_steps: Some(2), ..settings() };
    let mut script = Script::started(settings.clone());
    script.done(0, 1, 1, 0..1);
    script.done(1, 1, 1, 1..2);
    script.done(0, 1, 2, 0..1);
    let lease = Lease { step: 2, first_micro_batch: 1, last_exclusive: 2 };
    let done = Report::StepDone(step_done(&script.schedule, 1, &lease));
    let effects = script.machine.step(script.now_ms, Input::Report { worker: 1, report: done });
    let Effect::Record(entry) = &effects[0] else { panic!("{effects:?}") };
    let record = entry.record.clone();
    assert_eq!((record.committed_step, record.generation, record.save), (2, 1, true));

    script.machine = Machine::take_over(settings, &record);
    script.join(2);
    assert_lines(script.join(3), "3 <- welcome to a run under way\n joined 3, 2 of 2");
    let state = |step| State { step, generation: 1 };
    let holder = |step, pending| {
        let Report::Ready(ready) = ready(step) else { unreachable!() };
        Report::Ready(Ready { committed_generation: 1, pending, ..ready })
    };
    // One has heard of the commit; the other has what it takes.
    assert_lines(script.report(2, holder(2, None)), "");
    assert_lines(
        script.report(3, holder(1, Some(state(2)))),
        "2 <- plan 2 rank 0 of 2 after 2 save, next 3 micro-batches 0..0
         3 <- plan 2 rank 1 of 2 after 2 save, next 3 micro-batches 0..1",
    );
}

#[test]
fn who_holds_nothing_waits_for_one_who_does_or_the_run_is_abandoned() {
    let record = Record {
        generation: 4,
        committed_step: 2,
        committed_generation: 3,
        workers: 2,
        evaluate: false,
        save: false,
        finish: false,
        last_worker: 1,
    };
    let mut script = Script::new(settings());
    script.machine = Machine::take_over(settings(), &record);
    script.join(2);
    script.report(2, newcomer());
    // The same step of another commit is not the same state.
    let Report::Ready(other) = ready(2) else { unreachable!() };
    script.join(3);
    assert_lines(
        script.report(3, Report::Ready(Ready { committed_generation: 2, ..other })),
        "abandon: no worker that holds the weights of step 2 came back",
    );
    let mut script = Script::new(settings());
    script.machine = Machine::take_over(settings(), &record);
    assert_lines(script.wait(19_000, &[]), "");
    assert_lines(script.wait(1_000, &[]), "abandon: no worker that holds the weights of step 2 came back");
}

#[test]
fn a_checkpoint_that_fails_is_told_and_the_run_goes_on() {
    let mut script = Script::started(Settings { save_steps: Some(1), ..settings() });
    let failed = |step| Report::SaveFailed(SaveFailed { step, message: "disk full".to_owned() });
    script.done(0, 1, 1, 0..1);
    script.done(1, 1, 1, 1..2);
    // It is written while the next steps are computed.
    script.done(0, 1, 2, 0..1);
    script.done(1, 1, 2, 1..2);
    assert_lines(script.report(0, failed(1)), "not saved 1: disk full");
    assert_lines(script.report(0, failed(1)), "");
    assert_lines(script.report(1, failed(2)), "");
    // The last word of a run may not be lost; what came before may.
    script.done(0, 1, 3, 0..0);
    script.done(1, 1, 3, 0..1);
    assert_lines(script.report(0, failed(2)), "not saved 2: disk full");
    assert_lines(script.report(0, failed(3)), "0 <- stop 1\n 1 <- stop 1\n stop 1: disk full");
}

#[test]
fn the_watchdog_follows_the_pace_and_spares_the_slow() {
    let step = |script: &mut Script, step, milliseconds| {
        script.now_ms += milliseconds;
        script.done(0, 1, step, 0..1);
        script.done(1, 1, step, 1..2);
    };
    let settings = Settings { schedule: schedule(1000, 4, 2, 100), ..settings() };
    let quick = || {
        let mut script = Script::started(settings.clone());
        (1..5).for_each(|number| step(&mut script, number, 100));
        script
    };
    // Stopped by a signal: silent, and the step is late.
    let mut script = quick();
    let lines = script.wait(60_000, &[0]);
    assert_eq!(lines[0], "1 <- dismissed: taken for lost: not heard of for 6.0 seconds");
    // It computes, and says so, and gets nowhere.
    let beat = |waiting, progress| Report::Heartbeat(Heartbeat { waiting, progress });
    let stuck_after = |progresses: bool| {
        let mut script = quick();
        for second in 1..60 {
            script.now_ms += 1000;
            script.report(0, beat(true, 0));
            script.report(1, beat(false, if progresses { second } else { 0 }));
            let lines = script.input(Input::Tick);
            if !lines.is_empty() {
                return Some((second, lines[0].clone()));
            }
        }
        None
    };
    let (second, line) = stuck_after(false).unwrap();
    assert_eq!((second, line.starts_with("1 <- dismissed: taken for lost: hung")), (30, true), "{line}");
    assert_eq!(stuck_after(true), None);
    // Where steps take a second, six of silence are none.
    let mut script = Script::started(settings.clone());
    (1..5).for_each(|number| step(&mut script, number, 1000));
    assert_eq!(script.wait(60_000, &[0])[0], "1 <- dismissed: taken for lost: not heard of for 11.0 seconds");
}

#[test]
fn too_few_workers_left_is_69() {
    let mut script = Script::started(Settings { workers_min: 2, ..settings() });
    assert_lines(
        script.leave(0),
        "0 <- dismissed: taken for lost: gone
         lost 0 (Connection), 1 left
         waiting with 1 of 2 for 30 s",
    );
    assert_lines(script.wait(29_000, &[1]), "");
    assert_lines(
        script.wait(1_000, &[1]),
        "1 <- stop 69
         stop 69: 1 workers left, 2 needed: worker 0 (h, process 100): gone",
    );
    // Where nobody can come, there is nothing to wait for.
    let mut script = Script::started(Settings { workers_min: 2, restarts_max: Some(0), ..settings() });
    script.leave(0);
    let exited = Input::ProcessExited { pid: 100, exit_code: None, why: "signal 9".to_owned() };
    assert_eq!(script.input(exited)[0], "1 <- stop 69");
}

#[test]
fn too_few_workers_wait_for_a_newcomer() {
    let mut script = Script::started(Settings { workers_min: 2, ..settings() });
    script.leave(0);
    script.now_ms += 1_500;
    script.join(2);
    assert_lines(
        script.report(2, newcomer()),
        "1 <- plan 2 rank 0 of 2 after 0 heals [1], next 1 micro-batches 0..1
         2 <- plan 2 rank 1 of 2 after 0 heals [1], next 1 micro-batches 1..2",
    );
    script.done(1, 2, 1, 0..1);
    let lines = script.done(2, 2, 1, 1..2);
    assert_eq!(
        lines[1],
        "recovered at step 1 as generation 2 of 2: lost [0], joined [2 healed], 1.5 s, 2 micro-batches"
    );
}

#[test]
fn silence_is_loss_and_chatter_is_life() {
    let mut script = Script::started(settings());
    assert_lines(script.wait(9_000, &[]), "");
    assert_lines(
        script.wait(9_000, &[1]),
        "0 <- dismissed: taken for lost: not heard of for 11.0 seconds
         lost 0 (Silence), 1 left
         1 <- plan 2 rank 0 of 1 after 0, next 1 micro-batches 0..2",
    );
}

#[test]
fn a_coordinator_that_slept_blames_nobody() {
    let mut script = Script::started(settings());
    script.now_ms += 3_600_000;
    assert_lines(script.input(Input::Tick), "");
    assert_lines(script.wait(9_000, &[]), "");
}

fn failed_in(generation: u64) -> StepFailed {
    StepFailed { generation, step: 1, detail: "reset".to_owned(), unreachable: Vec::new() }
}

#[test]
fn who_reports_a_lost_peer_stays() {
    let mut script = Script::started(settings());
    let failed = Report::StepFailed(StepFailed { detail: "peer 1 closed".to_owned(), ..failed_in(1) });
    assert_lines(script.report(0, failed), "");
    assert_lines(
        script.leave(1),
        "1 <- dismissed: taken for lost: gone
         lost 1 (Connection), 1 left
         0 <- plan 2 rank 0 of 1 after 0, next 1 micro-batches 0..2",
    );
}

#[test]
fn a_step_that_fails_with_all_alive_is_tried_again_thrice() {
    let mut script = Script::started(settings());
    let failed = |generation| Report::StepFailed(failed_in(generation));
    // One complains, nobody turns out to be dead.
    script.report(0, failed(1));
    assert_lines(
        script.wait(20_000, &[0, 1]),
        "step 1 again
         0 <- plan 2 rank 0 of 2 after 0, next 1 micro-batches 0..1
         1 <- plan 2 rank 1 of 2 after 0, next 1 micro-batches 1..2",
    );
    // All complain: no need to wait.
    script.report(0, failed(2));
    assert_eq!(script.report(1, failed(2)).len(), 3);
    script.report(0, failed(3));
    assert_lines(
        script.report(1, failed(3)),
        "0 <- stop 1
         1 <- stop 1
         stop 1: step 1 failed 3 times with all workers alive: \
         worker 0 (h, process 100): reset; worker 1 (h, process 101): reset",
    );
}

#[test]
fn a_hung_worker_is_found_when_others_answered() {
    let mut script = Script::started(settings());
    script.done(0, 1, 1, 0..1);
    assert_lines(
        script.wait(70_000, &[0, 1]),
        "1 <- dismissed: taken for lost: hung: no report of the step for 60 seconds
         lost 1 (Watchdog), 1 left
         0 <- plan 2 rank 0 of 1 after 0, next 1 micro-batches 0..2",
    );
    let lines = script.wait(70_000, &[0]);
    assert!(lines[1].starts_with("stop 1: no progress after step 0 for 60 seconds"), "{lines:?}");
}

#[test]
fn actions_left_undone_by_the_dead_are_due_again() {
    let mut script = Script::started(Settings { eval_steps: Some(1), save_steps: Some(1), ..settings() });
    script.done(0, 1, 1, 0..1);
    script.done(1, 1, 1, 1..2);
    script.report(0, Report::Evaluated(Evaluated { step: 1, loss: 1.0, metrics: Default::default() }));
    assert_lines(
        script.leave(0),
        "0 <- dismissed: taken for lost: gone
         lost 0 (Connection), 1 left
         1 <- plan 2 rank 0 of 1 after 1 save, next 2 micro-batches 0..2",
    );
}

#[test]
fn a_finished_worker_writes_the_model_when_rank_0_died_over_it() {
    let settings = Settings { start_step: 3, start_generation: 4, ..settings() };
    let mut script = Script::started(settings);
    let finished = |generation| Report::Finished(Finished { generation, weights_digest: vec![] });
    assert_lines(script.report(1, finished(5)), "");
    assert_lines(
        script.leave(0),
        "0 <- dismissed: taken for lost: gone
         lost 0 (Connection), 1 left
         1 <- plan 6 rank 0 of 1 after 3 finish",
    );
    assert_lines(script.report(1, finished(5)), "");
    assert_lines(script.report(1, finished(6)), "1 <- stop 0\n stop 0: trained to step 3");
}

#[test]
fn two_who_cannot_reach_each_other_do_not_end_the_run() {
    let mut script = Script::new(Settings { workers_expected: 3, schedule: schedule(1000, 4, 2, 100), ..settings() });
    (0..3).for_each(|worker| drop(script.join(worker)));
    (0..3).for_each(|worker| drop(script.report(worker, ready(0))));
    // The last dials the others, and one does not answer. What the others say is waited for.
    let failed = |generation, unreachable| {
        Report::StepFailed(StepFailed { unreachable, detail: "no answer".to_owned(), ..failed_in(generation) })
    };
    assert_lines(script.report(2, failed(1, vec![1])), "");
    assert_lines(script.wait(1_000, &[0, 1, 2]), "");
    assert_lines(
        script.wait(1_000, &[0, 1, 2]),
        "lost 2 (Link), 2 left
         0 <- plan 2 rank 0 of 2 after 0, next 1 micro-batches 0..1
         1 <- plan 2 rank 1 of 2 after 0, next 1 micro-batches 1..2",
    );
    // It is not tried again at once, but after ten seconds, and then given the state.
    let commit = |script: &mut Script, generation, step, world: u64| {
        let mut lines = Vec::new();
        for rank in 0..world {
            let share = quintet_data::share(2, rank as u32, world as u32);
            lines = script.done(rank, generation, step, share);
        }
        lines
    };
    let lines = commit(&mut script, 2, 1, 2);
    assert_eq!(lines.len(), 5, "{lines:?}");
    assert_lines(script.wait(10_000, &[0, 1, 2]), "");
    let lines = commit(&mut script, 2, 2, 2);
    assert_eq!(lines[6], "2 <- plan 3 rank 2 of 3 after 2 heals [2], next 3 micro-batches 1..2", "{lines:?}");
    // Still broken: all have failed, so that nobody is waited for. The next time is later.
    script.report(2, failed(3, vec![1]));
    script.report(0, failed(3, vec![]));
    let lines = script.report(1, failed(3, vec![]));
    assert_eq!(lines[0], "lost 2 (Link), 2 left", "{lines:?}");
    assert_lines(script.wait(15_000, &[0, 1, 2]), "");
    let lines = commit(&mut script, 4, 3, 2);
    assert_eq!(lines.len(), 5, "{lines:?}");
    assert_lines(script.wait(5_000, &[0, 1, 2]), "");
    let lines = commit(&mut script, 4, 4, 2);
    assert!(lines[6].starts_with("2 <- plan 5 rank 2 of 3"), "{lines:?}");
}

#[test]
fn the_fewest_are_left_out_and_never_all_who_hold_the_state() {
    let broken = |script: &mut Script, generation, worker, unreachable| {
        let failed = StepFailed { unreachable, ..failed_in(generation) };
        script.report(worker, Report::StepFailed(failed))
    };
    let mut script = Script::new(Settings { workers_expected: 4, workers_min: 2, ..settings() });
    (0..4).for_each(|worker| drop(script.join(worker)));
    (0..4).for_each(|worker| drop(script.report(worker, ready(0))));
    // Worker 1 is cut off from all others, who say so, or wait for it.
    broken(&mut script, 1, 2, vec![1]);
    broken(&mut script, 1, 3, vec![1]);
    broken(&mut script, 1, 1, vec![0]);
    let lines = broken(&mut script, 1, 0, vec![]);
    assert_eq!(lines[0], "lost 1 (Link), 3 left", "{lines:?}");
    // Two of those who are left leave: the run waits until the link may be tried again.
    script.leave(2);
    let lines = script.leave(3);
    assert_eq!(lines[2], "waiting with 2 of 2 for 30 s", "{lines:?}");
    let lines = script.wait(30_000, &[0, 1]);
    assert!(lines[0].starts_with("0 <- plan 4 rank 0 of 2"), "{lines:?}");
}

/// Three workers of a sharded run have committed a step; one is lost, and what it held is nowhere.
fn with_a_part_of_the_state_lost(settings: Settings) -> (Script, Vec<String>) {
    let mut script = Script::new(Settings { workers_expected: 3, ..settings });
    (0..3).for_each(|worker| drop(script.join(worker)));
    (0..3).for_each(|worker| drop(script.report(worker, ready(0))));
    for (worker, range) in [(0, 0..0), (1, 0..1), (2, 1..2)] {
        script.done(worker, 1, 1, range);
    }
    script.leave(2);
    let lines = script.report(0, state_lost(2));
    assert_lines(script.report(1, state_lost(2)), "");
    (script, lines)
}

fn state_lost(generation: u64) -> Report {
    Report::StateLost(StateLost { generation, problem: "a slice is gone".to_owned() })
}

#[test]
fn a_part_of_the_state_that_is_gone_is_waited_for() {
    let (mut script, lines) = with_a_part_of_the_state_lost(settings());
    assert_lines(lines, "a slice is gone: waiting for 20 s");
    // Who comes back brings it.
    script.join(3);
    let held = State { step: 1, generation: 1 };
    let holder = |state: State| {
        let Report::Ready(ready) = ready(state.step) else { unreachable!() };
        Report::Ready(Ready { committed_generation: state.generation, ..ready })
    };
    assert_lines(
        script.report(3, holder(held)),
        "0 <- plan 3 rank 0 of 3 after 1, next 2 micro-batches 0..0
         1 <- plan 3 rank 1 of 3 after 1, next 2 micro-batches 0..1
         3 <- plan 3 rank 2 of 3 after 1, next 2 micro-batches 1..2",
    );
    // Without it after all: nobody is missing any more.
    assert_lines(script.report(1, state_lost(3)), "abandon: the state of step 1 is lost: a slice is gone");
    let (mut script, _) = with_a_part_of_the_state_lost(settings());
    assert_lines(script.wait(20_000, &[0, 1]), "abandon: the state of step 1 is lost: a slice is gone");
}

#[test]
fn where_nobody_can_bring_it_the_run_goes_on_from_its_checkpoint_and_says_so() {
    let settings = Settings { restarts_max: Some(0), ..settings() };
    let (mut script, lines) = with_a_part_of_the_state_lost(settings.clone());
    // It is not known yet that its process ended.
    assert_lines(lines, "a slice is gone: waiting for 20 s");
    let exited = Input::ProcessExited { pid: 102, exit_code: None, why: "killed".to_owned() };
    let effects = script.machine.step(script.now_ms, exited);
    let Some(Effect::Abandon { abandoned, .. }) = effects.last() else { panic!("{effects:?}") };
    assert_eq!((abandoned.step, abandoned.lost[0].worker), (1, 2));
    let mut script = Script::started(Settings { abandoned: Some(abandoned.clone()), ..settings });
    script.done(0, 1, 1, 0..1);
    let lines = script.done(1, 1, 1, 1..2);
    assert_eq!(
        lines[1],
        "recovered at step 1 as generation 1 of 2: lost [2], joined [], 0 s, 0 micro-batches, 1 steps again"
    );
}

#[test]
fn a_preempted_run_whose_state_is_lost_ends_for_its_checkpoint() {
    let (mut script, _) = with_a_part_of_the_state_lost(settings());
    let lines = script.input(Input::Preempt);
    let reason = "2 workers left, 1 needed, and together they do not hold the state: a slice is gone";
    assert_eq!(lines.last().unwrap(), &format!("stop 75: {reason}"));
}
