//! On a GPU: `cuda/attention_forward.cu` and `cuda/attention_backward.cu`, launched.

use super::{Attention, AttentionGradients};
use crate::driver::{Argument, Gpu, Launch, Module, dropout_arguments};
use crate::{DType, Error, Result, View, ViewMut};

/// Numbers of a head that a row of a tile has room for.
const HEAD_SIZE_MAX: usize = 128;
/// Distances beyond which the bias, and a sum by distance for each warp, would fill the shared memory.
const REACH_MAX: usize = 1024;
/// Warps of the kernel that adds the parts of `d_bias`; each lane has a distance.
const BIAS_WARPS: usize = 8;
const LANES: usize = 32;

/// How the kernels cut the scores of a head into tiles, as `cuda/attention.cuh` has it. A warp has its rows of scores, and of what they are multiplied
/// with, in registers: 32 rows where they fit (operands from shared memory then serve twice as many products), 16 where
/// rows are long. A block has 128 rows, so that the rows of a tile are read by it alone, or 64 if shared memory would not
/// hold more.
#[derive(Clone, Copy)]
struct Tiling {
    dtype: DType,
    head_size: usize,
    warp_rows: usize,
    warps: usize,
    /// Columns of the scores that are computed at a time.
    forward_keys: usize,
    backward_keys: usize,
}

impl Tiling {
    fn new(dtype: DType, head_size: usize) -> Self {
        let row_bytes = head_size.next_multiple_of(16) * dtype.bytes();
        let (warp_rows, warps, forward_keys, backward_keys) = match (dtype, row_bytes) {
            (DType::F32, ..=256) => (16, 8, 64, 32),
            (DType::F32, _) => (16, 4, 32, 16),
            (_, ..=128) => (32, 4, 64, 32),
            _ => (16, 8, 64, 32),
        };
        Tiling { dtype, head_size, warp_rows, warps, forward_keys, backward_keys }
    }

    /// Rows of the scores that a block computes.
    fn rows(&self) -> usize {
        self.warps * self.warp_rows
    }

    fn threads(&self) -> u32 {
        (self.warps * LANES) as u32
    }

    /// Of `rows` rows of a tile.
    fn tile_bytes(&self, rows: usize) -> usize {
        let bytes = self.dtype.bytes();
        rows * (self.head_size.next_multiple_of(16) * bytes + 16)
    }

    /// Of a table by distance, with its margins.
    fn table_bytes(&self, reach: Option<usize>, keys: usize) -> usize {
        reach.map_or(0, |reach| 4 * (2 * reach + 1 + 2 * (self.warp_rows + keys)))
    }
}

/// Sum of what a kernel takes of shared memory, each part rounded up to 16 bytes.
fn shared_bytes(parts: &[usize]) -> usize {
    parts.iter().map(|bytes| bytes.next_multiple_of(16)).sum()
}

/// What the launches of an operation have in common.
struct Launcher<'a> {
    gpu: &'a Gpu,
    inputs: &'a Attention<'a>,
    tiling: Tiling,
    constants: [(&'static str, u32); 2],
    /// Whether all rows begin at, and consist of, whole vectors of 16 bytes.
    aligned: bool,
}

impl<'a> Launcher<'a> {
    /// `views`: all that is read or written in tiles, besides the inputs.
    fn new(gpu: &'a Gpu, inputs: &'a Attention<'a>, views: &[View]) -> Result<Self> {
        let head_size = inputs.head_size();
        if head_size > HEAD_SIZE_MAX {
            return Err(Error::HeadSize { head_size, most: HEAD_SIZE_MAX });
        }
        let reach = inputs.reach().unwrap_or(0);
        if reach > REACH_MAX {
            return Err(Error::BiasReach { reach, most: REACH_MAX });
        }
        let dtype = inputs.q.dtype();
        let whole = |bytes: usize| bytes.is_multiple_of(16);
        let aligned = whole(head_size * dtype.bytes())
            && [inputs.q, inputs.k, inputs.v]
                .iter()
                .chain(views)
                .all(|view| whole(view.address()) && whole(view.stride() * dtype.bytes()));
        let tf32 = dtype == DType::F32 && gpu.tf32();
        let constants = [("HEAD_SIZE", head_size as u32), ("TF32", tf32.into())];
        Ok(Launcher { gpu, inputs, tiling: Tiling::new(dtype, head_size), constants, aligned })
    }

    /// Of the sequences' queries, and of their keys: starts and lengths.
    fn segments(&self) -> Result<[Argument; 4]> {
        let device = self.inputs.q.device();
        let (queries, keys) = (self.inputs.queries.on_device(device)?, self.inputs.keys.on_device(device)?);
        Ok([(queries, 0), (queries, 1), (keys, 0), (keys, 1)].map(|(view, row)| view.rows_range(row..row + 1).into()))
    }

    /// Launches a kernel over tiles of the longest sequence, for each sequence and head. The kernels' arguments have one
    /// order: pointers, where the sequences are, strides, and what is the same for all.
    fn launch(&self, kernel: Kernel, pointers: &[Argument], strides: &[usize]) -> Result<()> {
        let (inputs, tiling) = (self.inputs, self.tiling);
        let Kernel { source, function, longest, shared_bytes } = kernel;
        let tiles = longest.div_ceil(tiling.rows());
        let reach = inputs.reach().map_or(-1, |reach| reach as i32);
        let mut arguments = pointers.to_vec();
        arguments.extend(self.segments()?);
        arguments.extend(strides.iter().map(|&stride| Argument::from(stride)));
        let common: [Argument; 5] =
            [inputs.heads.into(), tiles.into(), reach.into(), inputs.causal.into(), self.aligned.into()];
        arguments.extend(common);
        arguments.extend(dropout_arguments(inputs.mask));
        self.gpu.launch(Launch {
            module: Module { source, element: tiling.dtype, constants: &self.constants },
            function,
            grid: [(inputs.queries.len() * tiles) as u32, inputs.heads as u32, 1],
            block: tiling.threads(),
            shared_bytes,
            arguments: &arguments,
        })
    }
}

/// A kernel, and what about its launch is its own.
struct Kernel {
    source: &'static str,
    function: &'static str,
    /// Rows of the longest sequence: of queries, or of keys.
    longest: usize,
    shared_bytes: usize,
}

impl Attention<'_> {
    /// The largest distance with a bias of its own.
    fn reach(&self) -> Option<usize> {
        self.bias.map(|bias| bias.cols() / 2)
    }

    /// Address and stride of the bias, if there is one.
    fn bias_argument(&self) -> (Argument, usize) {
        self.bias.map_or((Argument::Pointer(0), 0), |bias| (bias.into(), bias.stride()))
    }
}

pub(super) fn forward(gpu: &Gpu, inputs: &Attention, out: &ViewMut, logsumexp: &ViewMut) -> Result<()> {
    let launcher = Launcher::new(gpu, inputs, &[out.view()])?;
    let tiling = launcher.tiling;
    let keys = tiling.forward_keys;
    let kernel = Kernel {
        source: "attention_forward",
        function: "attention_forward",
        longest: inputs.queries.longest(),
        shared_bytes: shared_bytes(&[
            tiling.tile_bytes(tiling.rows() + 4 * keys),
            tiling.table_bytes(inputs.reach(), keys),
        ]),
    };
    let Attention { q, k, v, .. } = *inputs;
    let (bias, bias_stride) = inputs.bias_argument();
    launcher.launch(
        kernel,
        &[q.into(), k.into(), v.into(), bias, out.into(), logsumexp.into()],
        &[q.stride(), k.stride(), v.stride(), bias_stride, out.stride(), logsumexp.stride()],
    )
}

pub(super) fn backward(
    gpu: &Gpu,
    inputs: &Attention,
    out: View,
    logsumexp: View,
    d_out: View,
    gradients: &AttentionGradients,
) -> Result<()> {
    let AttentionGradients { d_q, d_k, d_v, d_bias } = gradients;
    let launcher = Launcher::new(gpu, inputs, &[out, d_out, d_q.view(), d_k.view(), d_v.view()])?;
    let device = d_out.device();
    let tiles = inputs.queries.longest().div_ceil(launcher.tiling.rows());
    let (blocks, distances) = (inputs.queries.len() * tiles, inputs.bias.map_or(0, |bias| bias.cols()));
    let mut delta = device.empty(DType::F32, inputs.q.rows(), inputs.heads)?;
    let mut partials = device.empty(DType::F32, inputs.heads * blocks, distances)?;
    backward_queries(&launcher, out, logsumexp, d_out, d_q, &delta.view_mut(), &partials.view_mut())?;
    if let Some(d_bias) = d_bias {
        add_bias_partials(&launcher, partials.view(), tiles, d_bias)?;
    }
    backward_keys(&launcher, logsumexp, delta.view(), d_out, d_k, d_v)
}

/// `d_q`, `delta` `[Nq, H]`, and the parts `[H · S · tiles, 2R+1]` of `d_bias`.
fn backward_queries(
    launcher: &Launcher,
    out: View,
    logsumexp: View,
    d_out: View,
    d_q: &ViewMut,
    delta: &ViewMut,
    partials: &ViewMut,
) -> Result<()> {
    let (inputs, tiling) = (launcher.inputs, launcher.tiling);
    let keys = tiling.backward_keys;
    let table_bytes = tiling.table_bytes(inputs.reach(), keys);
    // Eight rows of pairs for each diagonal of a warp's fragments.
    let stage_bytes = inputs.reach().map_or(0, |_| (keys / 8 + tiling.warp_rows / 8 - 1) * 64 * 4);
    let kernel = Kernel {
        source: "attention_backward",
        function: "attention_backward_queries",
        longest: inputs.queries.longest(),
        shared_bytes: shared_bytes(&[
            tiling.tile_bytes(2 * tiling.rows() + 4 * keys),
            4 * tiling.rows(),
            table_bytes,
            tiling.warps * table_bytes,
            tiling.warps * stage_bytes,
        ]),
    };
    let Attention { q, k, v, .. } = *inputs;
    let (bias, bias_stride) = inputs.bias_argument();
    let pointers = [
        q.into(),
        k.into(),
        v.into(),
        bias,
        out.into(),
        logsumexp.into(),
        d_out.into(),
        d_q.into(),
        delta.into(),
        partials.into(),
    ];
    let (out, logsumexp, d_out, d_q) = (out.stride(), logsumexp.stride(), d_out.stride(), d_q.stride());
    launcher.launch(kernel, &pointers, &[q.stride(), k.stride(), v.stride(), bias_stride, out, logsumexp, d_out, d_q])
}

fn backward_keys(
    launcher: &Launcher,
    logsumexp: View,
    delta: View,
    d_out: View,
    d_k: &ViewMut,
    d_v: &ViewMut,
) -> Result<()> {
    let (inputs, tiling) = (launcher.inputs, launcher.tiling);
    let keys = tiling.backward_keys;
    let kernel = Kernel {
        source: "attention_backward",
        function: "attention_backward_keys",
        longest: inputs.keys.longest(),
        shared_bytes: shared_bytes(&[
            tiling.tile_bytes(2 * tiling.rows() + 4 * keys),
            2 * 4 * 2 * keys,
            2 * keys * 16,
            tiling.table_bytes(inputs.reach(), keys),
        ]),
    };
    let Attention { q, k, v, .. } = *inputs;
    let (bias, bias_stride) = inputs.bias_argument();
    let pointers =
        [q.into(), k.into(), v.into(), bias, logsumexp.into(), delta.into(), d_out.into(), d_k.into(), d_v.into()];
    let (logsumexp, d_out, d_k, d_v) = (logsumexp.stride(), d_out.stride(), d_k.stride(), d_v.stride());
    launcher.launch(kernel, &pointers, &[q.stride(), k.stride(), v.stride(), bias_stride, logsumexp, d_out, d_k, d_v])
}

/// Adds the parts of `d_bias`, block by block.
fn add_bias_partials(launcher: &Launcher, partials: View, tiles: usize, d_bias: &ViewMut) -> Result<()> {
    let (inputs, tiling) = (launcher.inputs, launcher.tiling);
    let [_, query_lengths, ..] = launcher.segments()?;
    launcher.gpu.launch(Launch {
        module: Module { source: "attention_backward", element: tiling.dtype, constants: &launcher.constants },
        function: "attention_backward_bias",
        grid: [d_bias.cols().div_ceil(LANES) as u32, inputs.heads as u32, 1],
        block: (BIAS_WARPS * LANES) as u32,
        shared_bytes: BIAS_WARPS * LANES * 4,
        arguments: &[
            partials.into(),
            d_bias.into(),
            query_lengths,
            inputs.queries.len().into(),
            tiles.into(),
            d_bias.cols().into(),
            d_bias.stride().into(),
        ],
    })
}

#[cfg(test)]
mod tests {
    use crate::ops::{Attention, attention_forward};
    use crate::{DType, Device, Dropout, Error, Result, Segments};

    fn attend(head_size: usize, reach: usize) -> Result<()> {
        let (device, rows) = (Device::emulated(1)?, Segments::from_offsets(&[0, 1]));
        let q = device.zeros(DType::F32, 1, head_size)?;
        let bias = device.zeros(DType::F32, 1, 2 * reach + 1)?;
        let (mut out, mut logsumexp) = (device.empty(DType::F32, 1, head_size)?, device.empty(DType::F32, 1, 1)?);
        let inputs = Attention {
            q: q.view(),
            k: q.view(),
            v: q.view(),
            queries: &rows,
            keys: &rows,
            heads: 1,
            bias: Some(bias.view()),
            causal: false,
            mask: Dropout::NONE,
        };
        attention_forward(inputs, out.view_mut(), logsumexp.view_mut())
    }

    #[test]
    fn what_the_kernels_have_no_room_for_is_an_error() {
        let error = attend(130, 9).unwrap_err();
        assert!(matches!(error, Error::HeadSize { head_size: 130, most: 128 }), "{error}");
        let error = attend(64, 5000).unwrap_err();
        assert!(matches!(error, Error::BiasReach { reach: 5000, most: 1024 }), "{error}");
    }
}
