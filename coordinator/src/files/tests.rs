use super::*;
use crate::secret::Secret;
use crate::state::{EvalMetrics, JoinedWorker, LostWorker, Notice, Recovery, TrainMetrics};

fn identity() -> Identity {
    Identity { run_token: Secret::from_bytes([1; 32]), collective_token: Secret::from_bytes([2; 32]) }
}

fn commit(step: u64) -> CommitRecord {
    CommitRecord {
        step,
        epoch: 0,
        positions: [4 * (step - 1), 4 * step],
        generation: 3,
        workers: 2,
        weights_digest: (step == 2).then(|| "ab".to_owned()),
    }
}

fn train(step: u64) -> Event {
    Event::Train(TrainMetrics {
        step,
        epoch: 0,
        loss: 1.5,
        grad_norm: 2.0,
        learning_rate: 0.001,
        examples: 4,
        source_tokens: 10,
        target_tokens: 6,
        step_seconds: 0.5,
        tokens_per_second: 32.0,
        workers: 2,
        peak_memory_bytes: 1024,
        loss_scale: None,
    })
}

fn record(step: u64) -> Record {
    Record {
        generation: 5,
        committed_step: step,
        committed_generation: 3,
        workers: 2,
        evaluate: false,
        save: false,
        finish: false,
        last_worker: 1,
    }
}

fn entry(step: u64) -> Entry {
    Entry { commit: Some(commit(step)), events: vec![train(step)], record: record(step) }
}

fn run_of(directory: &Path, steps: u64) -> RunFiles {
    let mut files = RunFiles::create(directory, &identity()).unwrap();
    for step in 1..=steps {
        files.record(&entry(step)).unwrap();
    }
    files
}

fn text(directory: &Path, name: &str) -> String {
    fs::read_to_string(directory.join(name)).unwrap()
}

#[test]
fn lines_are_as_documented() {
    let directory = tempfile::tempdir().unwrap();
    let mut files = run_of(directory.path(), 2);
    let metrics = [("exact_match".to_owned(), 0.25)].into();
    let eval = Event::Eval(EvalMetrics { step: 2, eval_loss: 0.75, metrics });
    let lost = LostWorker { worker: 1, host: "h".into(), pid: 9, why: "gone".into(), noticed_by: Notice::Connection };
    let joined = JoinedWorker { worker: 2, host: "h".into(), pid: 10, healed: true };
    let recovery = Event::Recovery(Recovery {
        step: 3,
        generation: 4,
        lost: vec![lost],
        workers: 2,
        joined: vec![joined],
        coordinator_restarted: false,
        seconds: 0.5,
        micro_batches_recomputed: 4,
        steps_recomputed: 0,
    });
    files
        .record(&Entry { commit: None, events: vec![Event::Saved { step: 2 }, eval, recovery], record: record(2) })
        .unwrap();
    assert_eq!(
        text(directory.path(), LEDGER),
        r#"{"step":1,"epoch":0,"positions":[0,4],"generation":3,"workers":2,"weights_digest":null}
{"step":2,"epoch":0,"positions":[4,8],"generation":3,"workers":2,"weights_digest":"ab"}
"#
    );
    let metrics = text(directory.path(), METRICS);
    let lines: Vec<&str> = metrics.lines().skip(1).collect();
    let expected = [
        r#"{"event":"train","step":2,"epoch":0,"loss":1.5,"grad_norm":2.0,"learning_rate":0.001,"examples":4,"source_tokens":10,"target_tokens":6,"step_seconds":0.5,"tokens_per_second":32.0,"workers":2,"peak_memory_bytes":1024}"#,
        r#"{"event":"eval","step":2,"eval_loss":0.75,"metrics":{"exact_match":0.25}}"#,
        r#"{"event":"recovery","step":3,"generation":4,"lost":[{"worker":1,"host":"h","pid":9,"why":"gone","noticed_by":"connection"}],"workers":2,"joined":[{"worker":2,"host":"h","pid":10,"healed":true}],"coordinator_restarted":false,"seconds":0.5,"micro_batches_recomputed":4,"steps_recomputed":0}"#,
    ];
    assert_eq!(lines, expected);
    let evaluations = RunFiles::evaluations(directory.path()).unwrap();
    assert_eq!(evaluations.iter().map(|eval| (eval.step, eval.eval_loss)).collect::<Vec<_>>(), [(2, 0.75)]);
}

#[test]
fn resuming_cuts_both_files_back_and_appends() {
    let directory = tempfile::tempdir().unwrap();
    run_of(directory.path(), 5).finish().unwrap();
    let torn = r#"{"step":6,"epo"#;
    for name in [LEDGER, METRICS] {
        let path = directory.path().join(name);
        fs::write(&path, text(directory.path(), name) + torn).unwrap();
    }
    let (mut files, generation, of_step) = RunFiles::resume(directory.path(), 3, &identity()).unwrap();
    assert_eq!((generation, of_step), (3, 3));
    files.record(&entry(4)).unwrap();
    let whole = tempfile::tempdir().unwrap();
    drop(run_of(whole.path(), 4));
    for name in [LEDGER, METRICS] {
        assert_eq!(text(directory.path(), name), text(whole.path(), name));
    }
}

#[test]
fn a_run_that_was_cut_off_is_taken_over_as_the_record_has_it() {
    let whole = tempfile::tempdir().unwrap();
    drop(run_of(whole.path(), 50));
    // What the two files may look like after a crash: anything behind what was synced.
    for kept in [0, 1, 100] {
        let directory = tempfile::tempdir().unwrap();
        let files = run_of(directory.path(), 50);
        for lines in [&files.ledger, &files.metrics] {
            let tail = if lines.path.ends_with(LEDGER) { &files.content.ledger } else { &files.content.metrics };
            assert!(tail.offset > 0 && !tail.text.is_empty(), "the test wants both");
            lines.file.set_len((tail.offset + kept).min(lines.bytes)).unwrap();
            lines.file.write_all_at(b"torn", tail.offset + kept).unwrap();
        }
        drop(files);
        let CutOff { mut files, record: found, identity: known } =
            RunFiles::take_over(directory.path()).unwrap().unwrap();
        assert_eq!((found, known), (record(50), identity()));
        for name in [LEDGER, METRICS] {
            assert_eq!(text(directory.path(), name), text(whole.path(), name));
        }
        files.record(&entry(51)).unwrap();
        drop(files);
        assert_eq!(RunFiles::take_over(directory.path()).unwrap().unwrap().record, record(51));
        assert_eq!(RunFiles::resume(directory.path(), 20, &identity()).unwrap().1, 5, "generations never fall");
        assert_eq!(text(directory.path(), LEDGER).lines().count(), 20);
        assert_eq!(RunFiles::identity(directory.path()).unwrap(), Some(identity()));
    }
}

#[test]
fn a_crash_while_files_are_cut_back_is_one_like_any_other() {
    let [whole, cut] = [50, 20].map(|steps| {
        let directory = tempfile::tempdir().unwrap();
        drop(run_of(directory.path(), steps));
        directory
    });
    // Of the two files, none, the first, or both are as they shall be.
    for done in 0..3 {
        let directory = tempfile::tempdir().unwrap();
        drop(run_of(directory.path(), 50));
        // The second crash finds what the first left.
        for crash in 0..2 {
            let (content, _) = cut_back(directory.path(), 20, &identity()).unwrap();
            drop(Journal::open(directory.path(), &content).unwrap());
            for (index, name) in [LEDGER, METRICS].into_iter().enumerate() {
                let expected = text(if index < done || crash == 1 { cut.path() } else { whole.path() }, name);
                fs::write(directory.path().join(name), expected).unwrap();
            }
            assert!(RunFiles::take_over(directory.path()).unwrap().is_none(), "there is nothing to take over");
        }
        let (_, generation, of_step) = RunFiles::resume(directory.path(), 20, &identity()).unwrap();
        assert_eq!((generation, of_step), (5, 3), "generations never fall");
        for name in [LEDGER, METRICS] {
            assert_eq!(text(directory.path(), name), text(cut.path(), name));
        }
    }
}

#[test]
fn a_run_that_ended_is_not_taken_over() {
    let directory = tempfile::tempdir().unwrap();
    assert!(RunFiles::take_over(directory.path()).unwrap().is_none());
    let files = RunFiles::create(directory.path(), &identity()).unwrap();
    assert!(RunFiles::take_over(directory.path()).unwrap().is_none(), "nothing has begun");
    assert_eq!(RunFiles::identity(directory.path()).unwrap(), Some(identity()));
    drop(files);
    run_of(directory.path(), 1).finish().unwrap();
    assert!(RunFiles::take_over(directory.path()).unwrap().is_none());
}

#[test]
fn resuming_before_the_first_checkpoint_starts_empty() {
    let directory = tempfile::tempdir().unwrap();
    let (_, generation, _) = RunFiles::resume(directory.path(), 0, &identity()).unwrap();
    assert_eq!((generation, text(directory.path(), LEDGER)), (0, String::new()));
}

#[test]
fn a_ledger_with_a_gap_is_refused_and_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    run_of(directory.path(), 4).finish().unwrap();
    let resume = |step| RunFiles::resume(directory.path(), step, &identity()).unwrap_err();
    let before = text(directory.path(), LEDGER);
    let error = resume(9);
    assert!(error.is_user_error());
    assert!(error.to_string().contains("line 5: the checkpoint's step 9 is not recorded"), "{error}");
    assert_eq!(text(directory.path(), LEDGER), before);

    let gap: String = before.lines().filter(|l| !l.contains("\"step\":2")).map(|l| format!("{l}\n")).collect();
    fs::write(directory.path().join(LEDGER), &gap).unwrap();
    let error = resume(4);
    assert!(error.to_string().contains("line 2: expected step 2, found 3"), "{error}");

    fs::write(directory.path().join(LEDGER), "nonsense\n").unwrap();
    let error = resume(0);
    assert!(error.to_string().contains("line 1: expected"), "{error}");
}

#[test]
fn a_fresh_run_does_not_overwrite_another() {
    let directory = tempfile::tempdir().unwrap();
    drop(RunFiles::create(directory.path(), &identity()).unwrap());
    drop(run_of(directory.path(), 1));
    let error = RunFiles::create(directory.path(), &identity()).unwrap_err();
    assert!(matches!(error, Error::RunExists { .. }) && error.is_user_error());
    assert_eq!(text(directory.path(), LEDGER).lines().count(), 1);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error_that_says_what_to_do_and_may_be_tried_again() {
    let directory = tempfile::tempdir().unwrap();
    let mut files = run_of(directory.path(), 1);
    let full = |path: &str| OpenOptions::new().write(true).open(path).unwrap();
    // The ledger's line is written, and the metrics' is not.
    let metrics = std::mem::replace(&mut files.metrics.file, full("/dev/full"));
    for _ in 0..2 {
        let error = files.record(&entry(2)).unwrap_err();
        assert!(error.is_storage_full() && !error.is_user_error());
        let text = error.to_string();
        assert!(text.contains("No space left") && text.ends_with("go on with --resume"), "{text}");
    }
    files.metrics.file = metrics;
    files.record(&entry(2)).unwrap();
    let whole = tempfile::tempdir().unwrap();
    drop(run_of(whole.path(), 2));
    for name in [LEDGER, METRICS] {
        assert_eq!(text(directory.path(), name), text(whole.path(), name));
    }
}
