//! The cases of attention: sequences of very different length, all the ways it is called, and head sizes that are whole
//! vectors and that are not.

use super::cases::MASK;
use super::{Bench, Input, download};
use crate::float::{Float, with_float};
use crate::ops::{self, Attention, AttentionGradients};
use crate::oracle;
use crate::{DType, Device, Dropout, Result, Segments, Tensor};

/// A shape of attention.
struct Shape {
    name: &'static str,
    queries: Segments,
    keys: Segments,
    heads: usize,
    size: usize,
    /// The largest distance that the bias tells apart.
    reach: Option<usize>,
    causal: bool,
    mask: Dropout,
}

pub(super) fn all(bench: &mut Bench) -> Result<()> {
    let ragged = Segments::from_offsets(&[0, 3, 4, 21, 87, 217]);
    let tiny = Segments::from_offsets(&(0..=40).map(|index| index * 7 + index % 3).collect::<Vec<_>>());
    let short = Segments::from_offsets(&[0, 9, 10, 12, 90, 95]);
    let long = Segments::from_offsets(&[0, 5, 205]);
    let shape = |name, queries: &Segments, keys: &Segments| Shape {
        name,
        queries: queries.clone(),
        keys: keys.clone(),
        heads: 3,
        size: 20,
        reach: Some(9),
        causal: false,
        mask: MASK,
    };
    let shapes = [
        Shape { heads: 2, size: 64, mask: Dropout::NONE, ..shape("encoder", &ragged, &ragged) },
        Shape { reach: Some(128), ..shape("encoder with dropout", &ragged, &ragged) },
        Shape { causal: true, ..shape("decoder", &ragged, &ragged) },
        Shape { causal: true, size: 32, heads: 4, reach: Some(128), ..shape("tiny decoder", &tiny, &tiny) },
        Shape { reach: None, ..shape("cross", &short, &ragged) },
        Shape { reach: None, ..shape("cross to shorter", &ragged, &short) },
        Shape { heads: 1, size: 64, causal: true, reach: Some(128), ..shape("long decoder", &long, &long) },
        Shape { heads: 1, size: 128, ..shape("large heads", &ragged, &ragged) },
        shape("biased, without queries", &Segments::from_offsets(&[0, 0, 30, 31, 31, 31]), &short),
        Shape {
            causal: true,
            mask: Dropout::NONE,
            ..shape("cached", &Segments::from_offsets(&[0, 1, 2, 3]), &Segments::strided(3, 20, 15))
        },
        Shape {
            causal: true,
            mask: Dropout::NONE,
            reach: Some(2),
            ..shape("cached, several queries", &Segments::from_offsets(&[0, 4, 8]), &Segments::strided(2, 20, 17))
        },
    ];
    shapes.iter().try_for_each(|shape| attention(bench, shape))
}

fn attention(bench: &mut Bench, shape: &Shape) -> Result<()> {
    let Shape { heads, size, .. } = *shape;
    bench.shape = shape.name.to_owned();
    let inner = heads * size;
    let (query_rows, key_rows) = (shape.queries.end(), shape.keys.end());
    let q = bench.input(query_rows, inner, (size as f32).powf(-0.5))?;
    // Keys and values are the columns of one tensor, as the model has them.
    let kv = bench.input(key_rows, 2 * inner, 1.0)?;
    let half = |half: usize| kv.exact.chunks(2 * inner).flat_map(|row| row[half * inner..][..inner].to_vec()).collect();
    let bias = match shape.reach {
        Some(reach) => Some(bench.typed_input(DType::F32, heads, 2 * reach + 1, 1.0)?),
        None => None,
    };
    let d_out = bench.input(query_rows, inner, 1.0)?;
    let inputs = Attention {
        q: q.tensor.view(),
        k: kv.tensor.view().columns(0..inner),
        v: kv.tensor.view().columns(inner..2 * inner),
        queries: &shape.queries,
        keys: &shape.keys,
        heads,
        bias: bias.as_ref().map(|bias| bias.tensor.view()),
        causal: shape.causal,
        mask: shape.mask,
    };
    let exact = oracle::Attention {
        q: q.exact.clone(),
        k: half(0),
        v: half(1),
        bias: bias.as_ref().map(|bias| bias.exact.clone()),
        queries: &shape.queries,
        keys: &shape.keys,
        heads,
        size,
        causal: shape.causal,
        mask: shape.mask,
    };
    let terms = 4 * size + shape.keys.longest();
    // There p and d_score are rounded too: as operands of tensor cores.
    let on_gpu = matches!(bench.device, Device::Gpu(_));
    let roundings = if on_gpu { 2 } else { 1 };

    let (mut out, mut logsumexp) =
        (bench.output(query_rows, inner)?, bench.typed_output(DType::F32, query_rows, heads)?);
    ops::attention_forward(inputs, out.view_mut(), logsumexp.view_mut())?;
    let (want_out, want_logsumexp) = exact.forward();
    bench.compare_sums("attention_forward", &out, &want_out, terms, roundings)?;
    bench.compare("attention_forward logsumexp", &logsumexp, &want_logsumexp, terms, 0)?;

    let mut d_q = bench.output(query_rows, inner)?;
    let mut d_kv = bench.output(key_rows, 2 * inner)?;
    // Cached keys have gaps, which belong to nobody.
    d_kv.view_mut().fill_zero()?;
    poison_keys(&mut d_kv, &shape.keys)?;
    let d_bias = match shape.reach {
        Some(reach) => Some(bench.typed_input(DType::F32, heads, 2 * reach + 1, 0.1)?),
        None => None,
    };
    let (mut d_bias, old_bias) = match d_bias {
        Some(Input { tensor, exact }) => (Some(tensor), exact),
        None => (None, Vec::new()),
    };
    let (d_k, d_v) = d_kv.view_mut().split_columns(inner);
    let d_bias_view = d_bias.as_mut().map(|d_bias| d_bias.view_mut());
    let gradients = AttentionGradients { d_q: d_q.view_mut(), d_k, d_v, d_bias: d_bias_view };
    ops::attention_backward(inputs, out.view(), logsumexp.view(), d_out.tensor.view(), gradients)?;
    let out = if on_gpu { Some(download(&out)?) } else { None };
    let want = exact.backward(&d_out.exact, out.as_deref());
    let terms = 2 * terms + shape.queries.longest();
    bench.compare_sums("attention_backward d_q", &d_q, &want.d_q, terms, roundings)?;
    let d_kv_exact = want.d_k.beside(&want.d_v, inner);
    bench.compare_sums("attention_backward d_k and d_v", &d_kv, &d_kv_exact, terms, roundings)?;
    if let Some(d_bias) = d_bias {
        let mut want = want.d_bias;
        old_bias.iter().enumerate().for_each(|(index, &old)| want.add(index, old, old));
        bench.compare_sums("attention_backward d_bias", &d_bias, &want, terms * shape.queries.longest(), 0)?;
    }
    Ok(())
}

fn poison_keys(d_kv: &mut Tensor, keys: &Segments) -> Result<()> {
    let (dtype, cols) = (d_kv.dtype(), d_kv.cols());
    for sequence in 0..keys.len() {
        let rows = keys.rows(sequence);
        with_float!(dtype, T => {
            let poison = vec![<T as Float>::from_f32(f32::NAN); rows.len() * cols];
            d_kv.view_mut().rows_range(rows).write(&poison)?;
        });
    }
    Ok(())
}
