//! T5's relative position bias: a learnt number for each head and bucket of distance.
//!
//! Every distance of `max_distance` or more falls into the last bucket of its side, so that a head's bias is a vector
//! over the clamped distance `key − query` in `-R..=R`, `R = max_distance`. Attention looks it up there.

use super::{check_dtype, check_shape};
use crate::driver::{Gpu, Launch, Module};
use crate::{DType, Device, Result, View, ViewMut};

/// A bucket may begin at a whole number of logarithmic steps; which side a distance there falls on must not depend on the
/// last bits of a library's logarithm, the host's or a GPU's.
const NUDGE: f64 = 1e-6;

/// How distances fall into buckets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelativeBuckets {
    pub num_buckets: usize,
    pub max_distance: usize,
    /// Half of the buckets for keys after the query (encoder), or all for keys before it (decoder).
    pub bidirectional: bool,
}

impl RelativeBuckets {
    /// The bucket of `relative = key − query` (T5, `_relative_position_bucket`): one for each small distance, then
    /// logarithmically wider ones up to `max_distance`.
    pub fn bucket(&self, relative: isize) -> usize {
        let (side, first, distance) = match (self.bidirectional, relative > 0) {
            (true, after) => {
                (self.num_buckets / 2, if after { self.num_buckets / 2 } else { 0 }, relative.unsigned_abs())
            }
            (false, true) => (self.num_buckets, 0, 0),
            (false, false) => (self.num_buckets, 0, relative.unsigned_abs()),
        };
        let exact = side / 2;
        if distance < exact {
            return first + distance;
        }
        let ratio = |length: usize| (length as f64 / exact as f64).ln();
        let log_steps = ratio(distance) / ratio(self.max_distance) * (side - exact) as f64;
        first + (exact + (log_steps + NUDGE) as usize).min(side - 1)
    }

    /// The bucket of each clamped distance in `-R..=R`.
    fn buckets(&self) -> impl Iterator<Item = usize> {
        let reach = self.max_distance as isize;
        let this = *self;
        (-reach..=reach).map(move |relative| this.bucket(relative))
    }
}

/// `bias[H, 2R+1]` (f32) by distance from `table[num_buckets, H]`.
pub fn relative_bias_forward(table: View, buckets: RelativeBuckets, bias: ViewMut) -> Result<()> {
    check_shape!(table, buckets.num_buckets, bias.rows());
    check_shape!(bias, table.cols(), 2 * buckets.max_distance + 1);
    check_dtype!(DType::F32, bias);
    match bias.device() {
        Device::Gpu(gpu) => launch(gpu, "relative_bias_forward", table, bias.view(), buckets, 0)?,
        Device::Cpu(_) => crate::float::with_float!(table.dtype(), T => forward_cpu::<T>(table, buckets, bias)),
    }
    Ok(())
}

fn forward_cpu<T: crate::float::Float>(table: View, buckets: RelativeBuckets, bias: ViewMut) {
    let distances = bias.cols();
    let bias = bias.into_slice::<f32>();
    for (distance, bucket) in buckets.buckets().enumerate() {
        for (head, value) in table.row::<T>(bucket).iter().enumerate() {
            bias[head * distances + distance] = value.to_f32();
        }
    }
}

/// `d_table[num_buckets, H] += ` the sums of `d_bias[H, 2R+1]` over each bucket's distances; both f32.
pub fn relative_bias_backward(d_bias: View, buckets: RelativeBuckets, d_table: ViewMut) -> Result<()> {
    check_shape!(d_table, buckets.num_buckets, d_bias.rows());
    check_shape!(d_bias, d_table.cols(), 2 * buckets.max_distance + 1);
    check_dtype!(DType::F32, d_bias, d_table);
    match d_table.device() {
        Device::Gpu(gpu) => {
            let shared_bytes = 2 * (4 * d_bias.cols()).next_multiple_of(16);
            launch(gpu, "relative_bias_backward", d_bias, d_table.view(), buckets, shared_bytes)?;
        }
        Device::Cpu(_) => {
            let heads = d_table.cols();
            let d_table = d_table.into_slice::<f32>();
            for (distance, bucket) in buckets.buckets().enumerate() {
                for (head, sum) in d_table[bucket * heads..][..heads].iter_mut().enumerate() {
                    *sum += d_bias.row::<f32>(head)[distance];
                }
            }
        }
    }
    Ok(())
}

/// From `x` to `y`, of which one is by bucket and the other by head and distance; a block has a head.
fn launch(
    gpu: &Gpu,
    function: &'static str,
    x: View,
    y: View,
    buckets: RelativeBuckets,
    shared_bytes: usize,
) -> Result<()> {
    let heads = if function == "relative_bias_forward" { x.cols() } else { x.rows() };
    gpu.launch(Launch {
        module: Module { source: "relative_bias", element: x.dtype(), constants: &[] },
        function,
        grid: [heads as u32, 1, 1],
        block: 256,
        shared_bytes,
        arguments: &[
            x.into(),
            x.stride().into(),
            y.into(),
            y.stride().into(),
            buckets.num_buckets.into(),
            buckets.max_distance.into(),
            buckets.bidirectional.into(),
        ],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Distances at which buckets begin, for 32 buckets and a maximum of 128.
    #[test]
    fn buckets_begin_where_those_of_t5_do() {
        let encoder = RelativeBuckets { num_buckets: 32, max_distance: 128, bidirectional: true };
        let starts = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91];
        for distance in 0..400 {
            let bucket = starts.iter().rposition(|&start| start <= distance).unwrap();
            assert_eq!(encoder.bucket(-distance), bucket, "{distance}");
            assert_eq!(encoder.bucket(distance), bucket + if distance > 0 { 16 } else { 0 }, "{distance}");
        }
        let decoder = RelativeBuckets { bidirectional: false, ..encoder };
        let wide = [16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113];
        let starts: Vec<isize> = (0..16).chain(wide).collect();
        for distance in 0..400 {
            let bucket = starts.iter().rposition(|&start| start <= distance).unwrap();
            assert_eq!((decoder.bucket(-distance), decoder.bucket(distance)), (bucket, 0), "{distance}");
        }
    }

    /// Also where a bucket begins at a whole number of logarithmic steps: distances that are powers of two.
    #[test]
    fn gpus_put_distances_into_the_same_buckets() {
        if crate::driver::emulated::is_missing() {
            return;
        }
        let device = Device::emulated(8).unwrap();
        for (num_buckets, max_distance) in [(32, 128), (8, 20), (16, 64), (64, 512), (12, 96), (4, 16)] {
            for bidirectional in [false, true] {
                let buckets = RelativeBuckets { num_buckets, max_distance, bidirectional };
                // The table of one head that names its buckets.
                let names: Vec<f32> = (0..num_buckets).map(|bucket| bucket as f32).collect();
                let table = device.upload(&names, num_buckets, 1).unwrap();
                let mut bias = device.empty(DType::F32, 1, 2 * max_distance + 1).unwrap();
                relative_bias_forward(table.view(), buckets, bias.view_mut()).unwrap();
                let want: Vec<f32> = buckets.buckets().map(|bucket| bucket as f32).collect();
                assert_eq!(bias.download::<f32>().unwrap(), want, "{buckets:?}");
            }
        }
    }
}
