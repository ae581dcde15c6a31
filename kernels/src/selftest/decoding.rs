//! The cases of what only decoding does: attention over a cache, weights that are prepared, the most probable tokens.

use super::Bench;
use crate::ops::{self, CachedAttention, PreparedWeight, TopTokens};
use crate::oracle;
use crate::{DType, Device, Dropout, Result, Segments};

pub(super) fn all(bench: &mut Bench) -> Result<()> {
    for (queries, length, heads, size, reach) in [(1, 1, 1, 4, 2), (7, 37, 3, 20, 9), (5, 70, 2, 64, 128)] {
        bench.shape = format!("{queries} queries, {length} keys, {heads}x{size}");
        cached_attention(bench, queries, length, heads, size, reach)?;
    }
    for (rows, inputs, outputs) in [(1, 5, 3), (13, 530, 65)] {
        bench.shape = format!("{rows}x{inputs}->{outputs}");
        prepared_linear(bench, rows, inputs, outputs)?;
    }
    // Logits are f32 whatever the type of the weights.
    if bench.dtype == DType::F32 && !bench.tf32 {
        for (rows, vocabulary, count) in [(1, 3, 2), (9, 384, 12), (4, 5003, 50)] {
            bench.shape = format!("{rows}x{vocabulary}, {count} wanted");
            top_tokens(bench, rows, vocabulary, count)?;
        }
    }
    Ok(())
}

fn cached_attention(
    bench: &mut Bench,
    queries: usize,
    length: usize,
    heads: usize,
    size: usize,
    reach: usize,
) -> Result<()> {
    let inner = heads * size;
    let cache_rows = queries * length + 3;
    let q = bench.input(queries, inner, (size as f32).powf(-0.5))?;
    // As the model has them: keys and values are the columns of one tensor.
    let kv = bench.input(cache_rows, 2 * inner, 1.0)?;
    let bias = bench.typed_input(DType::F32, heads, 2 * reach + 1, 1.0)?;
    let (names, rows) = bench.ids(queries * length, cache_rows)?;
    let mut out = bench.output(queries, inner)?;
    let inputs = CachedAttention {
        q: q.tensor.view(),
        k: kv.tensor.view().columns(0..inner),
        v: kv.tensor.view().columns(inner..2 * inner),
        rows: names.view().reshape(0, queries, length),
        heads,
        bias: bias.tensor.view(),
    };
    ops::cached_attention(inputs, out.view_mut())?;

    let gather = |half: usize| {
        rows.iter().flat_map(|&row| kv.exact[row as usize * 2 * inner + half * inner..][..inner].to_vec()).collect()
    };
    let exact = oracle::Attention {
        q: q.exact,
        k: gather(0),
        v: gather(1),
        bias: Some(bias.exact),
        queries: &Segments::strided(queries, 1, 1),
        keys: &Segments::strided(queries, length, length),
        heads,
        size,
        causal: true,
        mask: Dropout::NONE,
    };
    bench.compare_sums("cached_attention", &out, &exact.forward().0, 4 * size + length, 1)
}

fn prepared_linear(bench: &mut Bench, rows: usize, inputs: usize, outputs: usize) -> Result<()> {
    let (x, w) = (bench.input(rows, inputs, 1.0)?, bench.input(outputs, inputs, 1.0)?);
    let mut y = bench.output(rows, outputs)?;
    match PreparedWeight::new(w.tensor.view()) {
        Some(prepared) => ops::linear_forward_prepared(x.tensor.view(), &prepared, y.view_mut())?,
        None => return Ok(()),
    }
    let want = oracle::matmul(&x.exact, &oracle::transpose(&w.exact, inputs), inputs);
    bench.compare("linear_forward_prepared", &y, &want, inputs, 1)
}

fn top_tokens(bench: &mut Bench, rows: usize, vocabulary: usize, count: usize) -> Result<()> {
    let scale = 0.5;
    let mut logits = bench.typed_input(DType::F32, rows, vocabulary, 4.0)?;
    // Of the first row none is set apart, of the others a few.
    let starts: Vec<u32> = (0..=rows as u32).map(|row| row.saturating_sub(1) * 2).collect();
    let apart: Vec<u32> = (0..starts[rows]).map(|index| (index % 2 * 2 + index / 2 % 2) % vocabulary as u32).collect();
    let exact: Vec<f64> = logits.exact.iter().map(|logit| logit * f64::from(scale)).collect();

    let (mut want_tokens, mut want, mut want_apart, mut want_lse) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (row, logits) in exact.chunks(vocabulary).enumerate() {
        let lse = logits.iter().map(|logit| logit.exp()).sum::<f64>().ln();
        let apart = &apart[starts[row] as usize..starts[row + 1] as usize];
        want_lse.push(lse);
        want_apart.extend(apart.iter().map(|&token| logits[token as usize] - lse));
        let mut order: Vec<usize> = (0..vocabulary).filter(|&token| !apart.contains(&(token as u32))).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        order.truncate(count);
        want.extend(order.iter().map(|&token| logits[token] - lse));
        want_tokens.extend(order.iter().map(|&token| token as f64));
    }

    let device: &Device = bench.device;
    let apart = if apart.is_empty() { vec![0] } else { apart };
    let apart_starts = device.upload(&starts, rows + 1, 1)?;
    let apart_tokens = device.upload(&apart, apart.len(), 1)?;
    let mut tokens = device.upload(&vec![7_u32; rows * count], rows, count)?;
    let mut log_probs = bench.output(rows, count)?;
    let mut apart_log_probs = bench.output(apart.len(), 1)?;
    let mut logsumexp = bench.output(rows, 1)?;
    let found = TopTokens {
        apart: apart_tokens.view(),
        apart_starts: apart_starts.view(),
        tokens: tokens.view_mut(),
        log_probs: log_probs.view_mut(),
        apart_log_probs: apart_log_probs.view_mut(),
        logsumexp: logsumexp.view_mut(),
    };
    ops::top_tokens(logits.tensor.view_mut(), scale, found)?;
    let tokens: Vec<f32> = tokens.download::<u32>()?.into_iter().map(|token| token as f32).collect();
    let tokens = device.upload(&tokens, rows, count)?;
    bench.compare("top_tokens", &tokens, &want_tokens, 0, 0)?;
    bench.compare("top_tokens log_probs", &log_probs, &want, vocabulary, 0)?;
    bench.compare("top_tokens logsumexp", &logsumexp, &want_lse, vocabulary, 0)?;
    if !want_apart.is_empty() {
        bench.compare("top_tokens apart", &apart_log_probs, &want_apart, vocabulary, 0)?;
    }
    Ok(())
}
