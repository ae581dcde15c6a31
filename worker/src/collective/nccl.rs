//! Gradients summed by NCCL from GPU to GPU, in buckets, while the backward pass still runs.
//!
//! The TCP mesh of the generation stays: over it the ranks agree on whether NCCL can be used at all, rank 0's id reaches
//! the others (so that it is fenced by generation, and only who knows the job's token gets it), and messages are gathered.

use std::collections::HashMap;
use std::sync::Arc;

use quintet_kernels::{Communicator, Gpu, Nccl, NcclVersion, Patience, Place, UniqueId, ViewMut, WaitLimits};
use serde::{Deserialize, Serialize};

use super::Mesh;
use crate::{Error, Result};

/// Elements of a bucket, if the gradient is large: 32 MiB, enough for the full bandwidth of any link.
const BUCKET_MAX: usize = 8 << 20;
const BUCKET_MIN: usize = 1 << 10;
/// Buckets of a smaller gradient, so that little is left to sum when the backward pass ends.
const BUCKETS: usize = 16;

/// Ranks that share a GPU are refused by older versions.
const SHARES_GPUS_SINCE: NcclVersion = NcclVersion(23_003);

/// The ranks of a generation, connected by TCP and by NCCL.
pub struct NcclMesh {
    pub(super) mesh: Mesh,
    communicator: Communicator,
    /// The elements from here on are being summed; none are where it is absent.
    begun: Option<usize>,
}

/// What a rank tells the others before they decide.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Offer {
    /// The library's version, or why there is none.
    nccl: std::result::Result<u32, String>,
    /// Of its GPU.
    gpu: String,
    /// Whether its environment allows ranks to share a GPU.
    shares_gpu: bool,
    /// Of a new communicator; rank 0's is taken.
    id: Vec<u8>,
}

/// A mesh with NCCL if all ranks can use it, else as it was; and in words how gradients are reduced.
///
/// `shares_gpu` is whether `NCCL_MULTI_RANK_GPU_ENABLE=1` is set.
///
/// # Errors
/// Those of the mesh.
pub(super) fn upgrade(
    mut mesh: Mesh,
    gpu: &Gpu,
    step: u64,
    shares_gpu: bool,
    limits: WaitLimits,
) -> Result<(std::result::Result<NcclMesh, Mesh>, String)> {
    let library = Nccl::open(gpu);
    let offer = offer(&library, gpu, shares_gpu)?;
    let offers: Vec<Offer> = exchange(&mut mesh, step, &offer)?;
    let version = match agree(&offers) {
        Ok(version) => version,
        Err(reason) => return Ok((Err(mesh), through_host(&reason))),
    };
    let interrupter = mesh.interrupter();
    let patience = Patience { limits, is_void: Arc::new(move || interrupter.is_interrupted()) };
    let id = UniqueId::from_bytes(&offers[0].id);
    let (rank, world_size) = (mesh.rank(), mesh.world_size());
    let joined = match (library, id) {
        (Ok(nccl), Some(id)) => Communicator::join(gpu, nccl, Place { id, rank, world_size }, patience),
        (Err(error), _) => Err(error),
        (_, None) => return Err(Error::Protocol { rank: 0, problem: "an NCCL id of a wrong length".to_string() }),
    };
    // What keeps one rank from joining keeps all others waiting: they go on together, one way or the other.
    let problem = joined.as_ref().err().map(ToString::to_string);
    let problems: Vec<Option<String>> = exchange(&mut mesh, step, &problem)?;
    let first_problem = (0..).zip(problems).find_map(|(rank, problem)| Some(format!("rank {rank}: {}", problem?)));
    match (joined, first_problem) {
        (Ok(communicator), None) => {
            let line = format!("gradients are reduced by NCCL {version} between {world_size} GPUs");
            Ok((Ok(NcclMesh { mesh, communicator, begun: None }), line))
        }
        (_, problem) => Ok((Err(mesh), through_host(&problem.unwrap_or_default()))),
    }
}

fn through_host(reason: &str) -> String {
    format!("gradients are reduced through the host by TCP, which is slower than NCCL; {reason}")
}

fn offer(library: &quintet_kernels::Result<Nccl>, gpu: &Gpu, shares_gpu: bool) -> Result<Offer> {
    // Cheap enough for every rank to make one; only who made the one that is taken is asked for it later.
    let made = library.as_ref().map(|nccl| nccl.unique_id().map(|id| (nccl.version().0, id)));
    let (nccl, id) = match made {
        Ok(Ok((version, id))) => (Ok(version), id.as_bytes().to_vec()),
        Ok(Err(error)) => (Err(error.to_string()), Vec::new()),
        Err(error) => (Err(error.to_string()), Vec::new()),
    };
    Ok(Offer { nccl, gpu: gpu.id()?, shares_gpu, id })
}

/// Every rank's value, by rank.
fn exchange<T: Serialize + for<'a> Deserialize<'a>>(mesh: &mut Mesh, step: u64, value: &T) -> Result<Vec<T>> {
    let bytes = serde_json::to_vec(value).expect("plain data"); // why: no map keys, no custom types
    let all = mesh.all_gather_bytes(step, &bytes)?;
    let parse = |(rank, bytes): (u32, Vec<u8>)| {
        serde_json::from_slice(&bytes)
            .map_err(|error| Error::Protocol { rank, problem: format!("its offer does not parse: {error}") })
    };
    (0..).zip(all).map(parse).collect()
}

/// The version that all ranks have, or why they cannot use NCCL together.
fn agree(offers: &[Offer]) -> std::result::Result<NcclVersion, String> {
    let mut versions = Vec::with_capacity(offers.len());
    for (rank, offer) in offers.iter().enumerate() {
        let version = offer.nccl.as_ref().map_err(|reason| format!("rank {rank}: {reason}"))?;
        versions.push(NcclVersion(*version));
    }
    let version = versions[0];
    if let Some(rank) = versions.iter().position(|&other| other != version) {
        return Err(format!("rank 0 has NCCL {version}, rank {rank} {}: give all the same", versions[rank]));
    }
    let mut first_on: HashMap<&str, usize> = HashMap::new();
    for (rank, offer) in offers.iter().enumerate() {
        let first = *first_on.entry(&offer.gpu).or_insert(rank);
        if first == rank {
            continue;
        }
        if version < SHARES_GPUS_SINCE {
            return Err(format!("ranks {first} and {rank} share a GPU, for which NCCL {version} is too old"));
        }
        if !(offer.shares_gpu && offers[first].shares_gpu) {
            return Err(format!(
                "ranks {first} and {rank} share a GPU, which NCCL does with NCCL_MULTI_RANK_GPU_ENABLE=1 and NCCL_MAX_CTAS=8"
            ));
        }
    }
    Ok(version)
}

impl NcclMesh {
    /// Begins to sum what makes whole buckets, where `gradient`, `[1, elements]`, is final from element `start` on.
    ///
    /// # Safety
    /// Until [`NcclMesh::finish`] has returned, or this is dropped, the memory of `gradient` stays, and nothing reads or
    /// writes elements that were said to be final.
    pub(super) unsafe fn advance(&mut self, mut gradient: ViewMut, start: usize) {
        let mut begun = self.begun.unwrap_or(gradient.cols());
        for bucket in buckets(gradient.cols(), begun, start) {
            begun = bucket.start;
            let bucket = gradient.reborrow().reshape(bucket.start, 1, bucket.len());
            // SAFETY: the caller's; `wait` is called by `finish`.
            unsafe { self.communicator.all_reduce(bucket) };
        }
        self.begun = Some(begun);
    }

    /// Sums what is left of `gradient`, and waits until all of it is summed.
    pub(super) fn finish(&mut self, mut gradient: ViewMut) -> Result<()> {
        // SAFETY: `gradient` is borrowed until `wait` has returned; or has failed, which ends what is under way.
        unsafe { self.advance(gradient.reborrow(), 0) };
        self.begun = None;
        match self.communicator.wait() {
            Err(_) if self.mesh.interrupter().is_interrupted() => Err(Error::Interrupted),
            outcome => Ok(outcome?),
        }
    }
}

/// The buckets below `begun` whose elements are all final, from the arena's end to its start: the same for all ranks,
/// however their backward passes come along.
fn buckets(elements: usize, begun: usize, start: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let size = (elements / BUCKETS).clamp(BUCKET_MIN, BUCKET_MAX).next_multiple_of(BUCKET_MIN);
    let mut end = begun;
    std::iter::from_fn(move || {
        let bucket = end.saturating_sub(size)..end;
        (end > 0 && bucket.start >= start).then(|| {
            end = bucket.start;
            bucket
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(version: u32, gpu: &str) -> Offer {
        Offer { nccl: Ok(version), gpu: gpu.to_string(), shares_gpu: false, id: Vec::new() }
    }

    #[test]
    fn all_ranks_need_the_same_library_and_a_gpu_of_their_own() {
        assert_eq!(agree(&[offer(22_703, "a"), offer(22_703, "b")]), Ok(NcclVersion(22_703)));
        let problem = |offers: &[Offer]| agree(offers).unwrap_err();
        let missing = Offer { nccl: Err("NCCL is missing".to_string()), ..offer(0, "b") };
        assert_eq!(problem(&[offer(23_007, "a"), missing]), "rank 1: NCCL is missing");
        let mixed = problem(&[offer(23_007, "a"), offer(23_007, "b"), offer(22_703, "c")]);
        assert_eq!(mixed, "rank 0 has NCCL 2.30.7, rank 2 2.27.3: give all the same");
        let old = problem(&[offer(22_703, "a"), offer(22_703, "a")]);
        assert_eq!(old, "ranks 0 and 1 share a GPU, for which NCCL 2.27.3 is too old");
        let closed = problem(&[offer(23_007, "b"), offer(23_007, "a"), offer(23_007, "a")]);
        assert!(closed.starts_with("ranks 1 and 2 share a GPU, which NCCL does with NCCL_MULTI_RANK_GPU"), "{closed}");
        let shared = |gpu| Offer { shares_gpu: true, ..offer(23_007, gpu) };
        assert_eq!(agree(&[shared("a"), shared("a")]), Ok(NcclVersion(23_007)));
        assert!(agree(&[shared("a"), offer(23_007, "a")]).is_err());
    }

    #[test]
    fn buckets_are_the_same_however_the_backward_pass_comes_along() {
        for elements in [1, 16, 1023, 1024, 5000, 100_000, 3 * BUCKETS * BUCKET_MAX / 2 + 48] {
            let at_once: Vec<_> = buckets(elements, elements, 0).collect();
            assert_eq!(at_once.first().map(|bucket| bucket.end), Some(elements));
            assert_eq!(at_once.last().map(|bucket| bucket.start), Some(0));
            assert!(at_once.windows(2).all(|pair| pair[0].start == pair[1].end));
            assert!(at_once.iter().all(|bucket| bucket.len() <= BUCKET_MAX));
            for pieces in [1, 3, 7, 50] {
                let (mut begun, mut seen) = (elements, Vec::new());
                for start in (0..=pieces).rev().map(|piece| elements * piece / pieces) {
                    for bucket in buckets(elements, begun, start) {
                        assert!(bucket.start >= start, "not final yet");
                        begun = bucket.start;
                        seen.push(bucket);
                    }
                }
                assert_eq!(seen, at_once, "{elements} elements in {pieces} pieces");
            }
        }
        assert_eq!(buckets(100_000, 100_000, 0).count(), 14);
        assert_eq!(buckets(0, 0, 0).count(), 0);
    }
}
