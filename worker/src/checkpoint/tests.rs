use std::cell::Cell;
use std::rc::Rc;

use quintet_kernels::{Device, Tensor};

use super::*;

const MODEL: [f32; 6] = [1.0, -2.5, 3.25, f32::MIN_POSITIVE, 0.0, -0.0];

fn progress(step: u64) -> Progress {
    Progress {
        step,
        epoch: 1,
        position: 64 * step,
        seed: 42,
        job_fingerprint: "job".to_owned(),
        weights_digest: blake3::hash(bytemuck::cast_slice(&MODEL)).to_hex().to_string(),
        loss_scaler: None,
    }
}

fn upload(values: &[f32]) -> Tensor {
    Device::cpu().upload(values, 1, values.len()).unwrap()
}

/// Calls `body` with a snapshot of `step`, whose second moments are `moments`.
fn with_snapshot<T>(step: u64, moments: &[f32], body: impl FnOnce(&Snapshot) -> T) -> T {
    let (weights, shape) = (upload(&MODEL), vec![moments.len()]);
    let model = [
        NamedTensor { name: "shared.weight".to_owned(), shape: vec![2, 2], values: weights.view().columns(0..4) },
        NamedTensor { name: "norm.weight".to_owned(), shape: vec![2], values: weights.view().columns(4..6) },
    ];
    let moments = upload(moments);
    let optimizer = [NamedTensor { name: "shared.weight.exp_avg_sq".to_owned(), shape, values: moments.view() }];
    body(&Snapshot { progress: progress(step), model: &model, optimizer: &optimizer })
}

fn save_step(directory: &Path, step: u64) -> PathBuf {
    with_snapshot(step, &[step as f32; 1000], |snapshot| save(directory, snapshot)).unwrap()
}

fn latest_step(directory: &Path) -> Option<u64> {
    latest(directory).unwrap().checkpoint.map(|c| c.progress.step)
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = entries(directory).unwrap().into_iter().map(|e| e.0).collect();
    names.sort();
    names
}

/// A file on a disk that is full after some more bytes.
struct Limited {
    file: File,
    left: Rc<Cell<usize>>,
}

impl Write for Limited {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let length = buffer.len().min(self.left.get());
        if length == 0 && !buffer.is_empty() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let written = self.file.write(&buffer[..length])?;
        self.left.set(self.left.get() - written);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink for Limited {
    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn limited(bytes: usize) -> impl Fn(&Path) -> io::Result<Box<dyn Sink>> {
    let left = Rc::new(Cell::new(bytes));
    move |path| Ok(Box::new(Limited { file: File::create_new(path)?, left: left.clone() }))
}

#[test]
fn what_is_saved_is_loaded() {
    let directory = tempfile::tempdir().unwrap();
    let path = save_step(directory.path(), 200);
    assert_eq!(path.file_name().unwrap(), "step-00000200");
    let loaded = latest(directory.path()).unwrap().checkpoint.unwrap();
    assert_eq!(loaded.path, path);
    assert_eq!(loaded.progress, progress(200));
    assert_eq!(loaded.model.names(), ["shared.weight", "norm.weight"]);
    let mut shared = [0.0; 4];
    loaded.model.read("shared.weight", &[2, 2], &mut shared).unwrap();
    assert_eq!(shared, MODEL[..4]);
    let mut norm = [1.0; 2];
    loaded.model.read("norm.weight", &[2], &mut norm).unwrap();
    assert_eq!(norm.map(f32::to_bits), [0, 1 << 31]);
    let mut moments = [0.0; 1000];
    loaded.optimizer.read("shared.weight.exp_avg_sq", &[1000], &mut moments).unwrap();
    assert_eq!(moments, [200.0; 1000]);

    let wrong_shape = loaded.model.read("shared.weight", &[4], &mut shared).unwrap_err().to_string();
    assert!(wrong_shape.contains("model.safetensors") && wrong_shape.contains("shared.weight"), "{wrong_shape}");
    let missing = loaded.model.read("lm_head.weight", &[4], &mut shared).unwrap_err();
    assert!(missing.is_user_error() && missing.to_string().contains("lm_head.weight"));
}

#[test]
fn the_tensors_are_a_safetensors_file() {
    let mut bytes = Vec::new();
    let values = upload(&MODEL);
    let tensor = NamedTensor { name: "a".to_owned(), shape: vec![3, 2], values: values.view() };
    tensors::write(&mut bytes, &[tensor]).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let a = file.tensor("a").unwrap();
    assert_eq!(a.shape(), [3, 2]);
    assert_eq!(a.data(), bytemuck::cast_slice::<f32, u8>(&MODEL));
}

#[test]
fn an_absent_directory_has_no_checkpoint() {
    let directory = tempfile::tempdir().unwrap();
    let absent = directory.path().join("checkpoints");
    assert_eq!(latest_step(&absent), None);
    prune(&absent, 1, None).unwrap();
    remove_leftovers(&absent).unwrap();
}

#[test]
fn a_save_that_stops_anywhere_loses_nothing() {
    let whole = with_snapshot(2, &[0.5; 1000], |snapshot| {
        let mut bytes = 0;
        let directory = tempfile::tempdir().unwrap();
        let path = save(directory.path(), snapshot).unwrap();
        for (_, file) in entries(&path).unwrap() {
            bytes += fs::metadata(file).unwrap().len() as usize;
        }
        bytes
    });
    for bytes in [0, 1, 7, 8, 100, whole / 2, whole - 1].into_iter().chain((200..whole).step_by(397)) {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        save_step(directory, 1);
        with_snapshot(2, &[0.5; 1000], |snapshot| {
            // A full disk: an error that says so, and nothing left behind.
            let error = save_with(directory, snapshot, &limited(bytes)).unwrap_err();
            assert!(matches!(error, Error::File { .. }) && !error.is_user_error(), "{error}");
            assert_eq!(names(directory), ["step-00000001"]);
            // A kill: the partial directory stays, and is in nobody's way.
            let partial = directory.join(".tmp-step-00000002");
            assert!(write_files(&partial, snapshot, &limited(bytes)).is_err());
            assert!(partial.exists());
            assert_eq!(latest_step(directory), Some(1));
            remove_leftovers(directory).unwrap();
            assert_eq!(names(directory), ["step-00000001"]);
            save_with(directory, snapshot, &limited(whole)).unwrap();
            assert_eq!(latest_step(directory), Some(2));
        });
    }
}

#[test]
fn a_save_succeeds_over_leftovers() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    fs::create_dir(directory.join(".tmp-step-00000003")).unwrap();
    fs::write(directory.join(".tmp-step-00000003/model.safetensors"), "half").unwrap();
    save_step(directory, 3);
    assert_eq!(names(directory), ["step-00000003"]);
}

#[test]
fn every_flipped_byte_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    save_step(directory, 1);
    let newest = save_step(directory, 2);
    for file in [MODEL_FILE, OPTIMIZER_FILE, STATE_FILE] {
        let path = newest.join(file);
        let intact = fs::read(&path).unwrap();
        for at in (0..intact.len()).step_by(intact.len().div_ceil(40)) {
            let mut flipped = intact.clone();
            // In JSON a changed space means the same: only what has a meaning must be noticed.
            if file == STATE_FILE && intact[at].is_ascii_whitespace() {
                continue;
            }
            flipped[at] ^= 1;
            fs::write(&path, &flipped).unwrap();
            let found = latest(directory).unwrap();
            assert_eq!(found.checkpoint.unwrap().progress.step, 1, "{file} byte {at}");
            let [warning] = &found.skipped[..] else { panic!("one warning") };
            assert!(warning.to_string().contains(file), "{warning}");
        }
        for length in [0, 5, intact.len() - 1] {
            fs::write(&path, &intact[..length]).unwrap();
            assert_eq!(latest_step(directory), Some(1), "{file} cut to {length}");
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(latest_step(directory), Some(1), "{file} removed");
        fs::write(&path, &intact).unwrap();
        assert_eq!(latest_step(directory), Some(2));
    }
}

#[test]
fn only_damaged_checkpoints_are_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let path = save_step(directory.path(), 2);
    fs::remove_file(path.join(STATE_FILE)).unwrap();
    let error = latest(directory.path()).unwrap_err();
    assert!(error.is_user_error() && error.to_string().contains(STATE_FILE), "{error}");
}

#[test]
fn saving_a_step_again_repairs_it_and_keeps_an_intact_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = save_step(directory.path(), 2);
    let written = fs::metadata(path.join(MODEL_FILE)).unwrap().modified().unwrap();
    save_step(directory.path(), 2);
    assert_eq!(fs::metadata(path.join(MODEL_FILE)).unwrap().modified().unwrap(), written);
    fs::write(path.join(MODEL_FILE), "damaged").unwrap();
    save_step(directory.path(), 2);
    assert_eq!(latest_step(directory.path()), Some(2));
    assert_eq!(names(directory.path()), ["step-00000002"]);
}

#[test]
fn pruning_keeps_the_newest() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    for step in [9, 100_000_000, 10, 200] {
        save_step(directory, step);
    }
    fs::write(directory.join("notes.txt"), "not ours").unwrap();
    prune(directory, 2, None).unwrap();
    assert_eq!(names(directory), ["notes.txt", "step-00000200", "step-100000000"]);
    prune(directory, 2, None).unwrap();
    assert_eq!(latest_step(directory), Some(100_000_000));
}

#[test]
fn pruning_keeps_the_best() {
    for (keep, best, kept) in [
        (1, Some(20), &[20, 40][..]),
        (2, Some(20), &[20, 40]),
        (3, Some(10), &[10, 30, 40]),
        (2, Some(40), &[30, 40]),
        (2, Some(99), &[30, 40]),
    ] {
        let directory = tempfile::tempdir().unwrap();
        for step in [10, 20, 30, 40] {
            save_step(directory.path(), step);
        }
        prune(directory.path(), keep, best).unwrap();
        let expected: Vec<String> = kept.iter().map(|&step| name_of(step)).collect();
        assert_eq!(names(directory.path()), expected, "{keep}, {best:?}");
    }
}
