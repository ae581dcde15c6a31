//! The cases: shapes that are no multiple of anything, sequences of very different length, and a few usual sizes.

use super::{Bench, Input};
use crate::ops::{self, CrossEntropy, IGNORED_LABEL, RelativeBuckets};
use crate::oracle;
use crate::{DType, Device, Dropout, Result};

pub(super) const MASK: Dropout = Dropout::new(0.1, 11, 12);

pub(super) fn all(bench: &mut Bench) -> Result<()> {
    for (rows, cols) in [(1, 1), (3, 70), (200, 96), (130, 513), (37, 768)] {
        bench.shape = format!("{rows}x{cols}");
        for case in [casts, residuals, activations, rms_norm] {
            case(bench, rows, cols)?;
        }
        embedding(bench, rows, cols, 17)?;
    }
    for (rows, inputs, outputs) in [(1, 5, 3), (19, 33, 65), (150, 128, 512), (300, 700, 96)] {
        bench.shape = format!("{rows}x{inputs}->{outputs}");
        linear(bench, rows, inputs, outputs)?;
    }
    for (rows, inputs, outputs, rank) in [(1, 5, 3, 1), (97, 33, 65, 3), (200, 128, 96, 16)] {
        bench.shape = format!("{rows}x{inputs}->{rank}->{outputs}");
        lora(bench, rows, inputs, outputs, rank)?;
    }
    // Rows that several warps have, unevenly; more of them than there are blocks to sum over them.
    for (rows, cols) in [(3, 4096), (9, 2050), (4500, 24)] {
        bench.shape = format!("{rows}x{cols}");
        rms_norm(bench, rows, cols)?;
    }
    // Frequent and rare ids, more rows than are sorted at a time, whole groups of the dropout generator and parts of them.
    for (rows, cols, vocabulary) in [(2500, 384, 17), (5000, 24, 3000)] {
        bench.shape = format!("{rows}x{cols}, vocabulary {vocabulary}");
        embedding(bench, rows, cols, vocabulary)?;
    }
    views_with_gaps(bench)?;
    // The last two are longer than what a block of a GPU has of a row at a time.
    for (rows, width, vocabulary) in [(5, 8, 3), (600, 24, 80), (70, 64, 5000), (9, 16, 20_000), (6, 8, 9001)] {
        bench.shape = format!("{rows}x{width}, vocabulary {vocabulary}");
        cross_entropy(bench, rows, width, vocabulary)?;
    }
    relative_bias(bench)?;
    super::decoding::all(bench)?;
    super::attention::all(bench)
}

fn casts(bench: &mut Bench, rows: usize, cols: usize) -> Result<()> {
    let x = bench.input(rows, cols, 1.0)?;
    for other in [DType::F32, DType::Bf16, DType::F16] {
        let mut y = bench.typed_output(other, rows, cols)?;
        ops::cast(x.tensor.view(), y.view_mut())?;
        let round = |&x: &f64| match other {
            DType::Bf16 => half::bf16::from_f32(x as f32).to_f64(),
            DType::F16 => half::f16::from_f32(x as f32).to_f64(),
            _ => x,
        };
        let rounded: Vec<f64> = x.exact.iter().map(round).collect();
        bench.compare(&format!("cast to {}", other.name()), &y, &rounded, 0, 0)?;
    }
    Ok(())
}

fn residuals(bench: &mut Bench, rows: usize, cols: usize) -> Result<()> {
    let (x, delta) = (bench.input(rows, cols, 1.0)?, bench.input(rows, cols, 1.0)?);
    for mask in [Dropout::NONE, MASK] {
        let dropped = oracle::multiply(&delta.exact, &oracle::dropout_factors(mask, rows * cols));
        let mut y = bench.output(rows, cols)?;
        ops::dropout(delta.tensor.view(), mask, y.view_mut())?;
        bench.compare("dropout", &y, &dropped, 2, 1)?;
        let mut y = bench.output(rows, cols)?;
        ops::residual_forward(x.tensor.view(), delta.tensor.view(), mask, y.view_mut())?;
        bench.compare("residual_forward", &y, &oracle::add(&x.exact, &dropped), 2, 1)?;
    }
    Ok(())
}

fn activations(bench: &mut Bench, rows: usize, cols: usize) -> Result<()> {
    let (x, d_h) = (bench.input(rows, 2 * cols, 2.0)?, bench.input(rows, cols, 1.0)?);
    let factors = oracle::dropout_factors(MASK, rows * cols);
    let d_dropped = oracle::multiply(&d_h.exact, &factors);

    let mut h = bench.output(rows, cols)?;
    ops::gated_gelu_forward(x.tensor.view(), MASK, h.view_mut())?;
    let want = oracle::multiply(&oracle::gated_gelu(&x.exact, cols), &factors);
    bench.compare("gated_gelu_forward", &h, &want, 10, 1)?;
    let mut d_x = bench.output(rows, 2 * cols)?;
    ops::gated_gelu_backward(x.tensor.view(), d_h.tensor.view(), MASK, d_x.view_mut())?;
    let want = oracle::gated_gelu_backward(&x.exact, &d_dropped, cols);
    bench.compare("gated_gelu_backward", &d_x, &want, 10, 1)?;

    let x = bench.input(rows, cols, 1.0)?;
    let mut h = bench.output(rows, cols)?;
    ops::relu_forward(x.tensor.view(), MASK, h.view_mut())?;
    bench.compare("relu_forward", &h, &oracle::multiply(&oracle::relu(&x.exact), &factors), 2, 1)?;
    let mut d_x = bench.output(rows, cols)?;
    ops::relu_backward(x.tensor.view(), d_h.tensor.view(), MASK, d_x.view_mut())?;
    bench.compare("relu_backward", &d_x, &oracle::relu_backward(&x.exact, &d_dropped), 2, 1)?;
    let mut y = bench.output(rows, cols)?;
    ops::tanh_forward(x.tensor.view(), y.view_mut())?;
    bench.compare("tanh_forward", &y, &oracle::tanh(&x.exact), 4, 1)?;
    let mut d_x = bench.output(rows, cols)?;
    ops::tanh_backward(x.tensor.view(), d_h.tensor.view(), d_x.view_mut())?;
    bench.compare("tanh_backward", &d_x, &oracle::tanh_backward(&x.exact, &d_h.exact), 4, 1)?;
    Ok(())
}

fn rms_norm(bench: &mut Bench, rows: usize, cols: usize) -> Result<()> {
    let eps = 1e-6;
    let (x, weight, d_y) = (bench.input(rows, cols, 3.0)?, bench.input(1, cols, 1.0)?, bench.input(rows, cols, 1.0)?);
    let (mut y, mut rstd) = (bench.output(rows, cols)?, bench.typed_output(DType::F32, rows, 1)?);
    ops::rms_norm_forward(x.tensor.view(), weight.tensor.view(), eps, y.view_mut(), rstd.view_mut())?;
    let (want_y, want_rstd) = oracle::rms_norm(&x.exact, &weight.exact, f64::from(eps));
    bench.compare("rms_norm_forward", &y, &want_y, cols, 2)?;
    bench.compare("rms_norm_forward rstd", &rstd, &want_rstd, cols, 0)?;

    let (d_x, d_weight) = (bench.input(rows, cols, 1.0)?, bench.typed_input(DType::F32, 1, cols, 1.0)?);
    let (Input { tensor: mut got_x, exact: old_x }, Input { tensor: mut got_weight, exact: old_weight }) =
        (d_x, d_weight);
    ops::rms_norm_backward(
        d_y.tensor.view(),
        x.tensor.view(),
        weight.tensor.view(),
        rstd.view(),
        got_x.view_mut(),
        got_weight.view_mut(),
    )?;
    let (d_x, d_weight) = oracle::rms_norm_backward(&d_y.exact, &x.exact, &weight.exact, f64::from(eps));
    bench.compare("rms_norm_backward d_x", &got_x, &oracle::add(&old_x, &d_x), cols, 1)?;
    // A sum of products that were rounded, each by up to ε/2: 8 standard deviations of that are 2.3 ε.
    bench.compare("rms_norm_backward d_weight", &got_weight, &oracle::add(&old_weight, &d_weight), rows + cols, 2)?;
    Ok(())
}

fn embedding(bench: &mut Bench, rows: usize, cols: usize, vocabulary: usize) -> Result<()> {
    let (ids_tensor, ids) = bench.ids(rows, vocabulary)?;
    let (table, d_y) = (bench.input(vocabulary, cols, 1.0)?, bench.input(rows, cols, 1.0)?);
    let factors = oracle::dropout_factors(MASK, rows * cols);
    let mut y = bench.output(rows, cols)?;
    ops::embedding_forward(ids_tensor.view(), table.tensor.view(), MASK, y.view_mut())?;
    let want = oracle::multiply(&oracle::embedding(&ids, &table.exact, cols), &factors);
    bench.compare("embedding_forward", &y, &want, 2, 1)?;
    let Input { tensor: mut d_table, exact: old } = bench.typed_input(DType::F32, vocabulary, cols, 1.0)?;
    ops::embedding_backward(ids_tensor.view(), d_y.tensor.view(), MASK, d_table.view_mut())?;
    let dropped = oracle::multiply(&d_y.exact, &factors);
    let want = oracle::add(&old, &oracle::embedding_backward(&ids, &dropped, vocabulary, cols));
    bench.compare("embedding_backward", &d_table, &want, rows + 1, 0)?;
    Ok(())
}

/// Rows that begin further apart than they are long: columns of wider tensors, at addresses of whole vectors and not.
fn views_with_gaps(bench: &mut Bench) -> Result<()> {
    let (rows, wide) = (21, 320);
    for (first, cols) in [(8, 256), (3, 130)] {
        bench.shape = format!("{rows} x columns {first}..{} of {wide}", first + cols);
        let mut part = |cols: usize, scale| -> Result<(Input, Vec<f64>)> {
            let input = bench.input(rows, wide, scale)?;
            let exact = input.exact.chunks(wide).flat_map(|row| row[first..first + cols].to_vec()).collect();
            Ok((input, exact))
        };
        let ((x, x_exact), (delta, delta_exact)) = (part(cols, 1.0)?, part(cols, 1.0)?);
        let (x, delta) =
            (x.tensor.view().columns(first..first + cols), delta.tensor.view().columns(first..first + cols));
        let weight = bench.input(1, cols, 1.0)?;
        let factors = oracle::dropout_factors(MASK, rows * cols);
        let interleave = |left: &[f64], right: &[f64]| -> Vec<f64> {
            left.chunks(cols).zip(right.chunks(cols)).flat_map(|(left, right)| [left, right].concat()).collect()
        };

        // Results side by side in one tensor.
        let mut both = bench.output(rows, 2 * cols)?;
        let (left, right) = both.view_mut().split_columns(cols);
        ops::dropout(delta, MASK, left)?;
        ops::residual_forward(x, delta, MASK, right)?;
        let dropped = oracle::multiply(&delta_exact, &factors);
        let want = interleave(&dropped, &oracle::add(&x_exact, &dropped));
        bench.compare("dropout and residual_forward", &both, &want, 2, 1)?;

        let mut both = bench.output(rows, 2 * cols)?;
        let mut rstd = bench.typed_output(DType::F32, rows, 1)?;
        let (mut left, mut right) = both.view_mut().split_columns(cols);
        let weight_view = weight.tensor.view();
        ops::rms_norm_forward(x, weight_view, 1e-6, left.reborrow(), rstd.view_mut())?;
        right.reborrow().fill_zero()?;
        let mut d_weight = bench.device.zeros(DType::F32, 1, cols)?;
        ops::rms_norm_backward(delta, x, weight_view, rstd.view(), right, d_weight.view_mut())?;
        let (y, _) = oracle::rms_norm(&x_exact, &weight.exact, 1e-6);
        let (d_x, d_weight_exact) = oracle::rms_norm_backward(&delta_exact, &x_exact, &weight.exact, 1e-6);
        bench.compare("rms_norm forward and backward", &both, &interleave(&y, &d_x), cols, 2)?;
        bench.compare("rms_norm_backward d_weight", &d_weight, &d_weight_exact, rows + cols, 2)?;

        let features = cols / 2;
        let mut both = bench.output(rows, 2 * features)?;
        let (left, right) = both.view_mut().split_columns(features);
        ops::gated_gelu_forward(x, Dropout::NONE, left)?;
        ops::relu_forward(delta.columns(0..features), Dropout::NONE, right)?;
        let relu: Vec<f64> = delta_exact.chunks(cols).flat_map(|row| oracle::relu(&row[..features])).collect();
        let want: Vec<f64> = oracle::gated_gelu(&x_exact, features)
            .chunks(features)
            .zip(relu.chunks(features))
            .flat_map(|(left, right)| [left, right].concat())
            .collect();
        bench.compare("gated_gelu and relu forward", &both, &want, 10, 1)?;
    }
    Ok(())
}

fn linear(bench: &mut Bench, rows: usize, inputs: usize, outputs: usize) -> Result<()> {
    // Views with gaps, as the parts of a fused tensor are: left and right of the columns that are used are others.
    let gap = 3;
    let x = bench.input(rows, inputs, 1.0)?;
    let w = bench.input(outputs, inputs, (inputs as f32).powf(-0.5))?;
    let wide = bench.input(rows, outputs + 2 * gap, 1.0)?;
    let d_y = wide.tensor.view().columns(gap..gap + outputs);
    let d_y_exact: Vec<f64> =
        wide.exact.chunks(outputs + 2 * gap).flat_map(|row| row[gap..gap + outputs].to_vec()).collect();
    let w_t = oracle::transpose(&w.exact, inputs);

    let product = oracle::matmul(&x.exact, &w_t, inputs);
    for dtype in [bench.dtype, DType::F32] {
        let mut y = bench.typed_output(dtype, rows, outputs)?;
        ops::linear_forward(x.tensor.view(), w.tensor.view(), y.view_mut(), false)?;
        bench.compare("linear_forward", &y, &product, inputs, usize::from(dtype != DType::F32))?;
    }
    let Input { tensor: mut y, exact: old } = bench.input(rows, outputs, 1.0)?;
    ops::linear_forward(x.tensor.view(), w.tensor.view(), y.view_mut(), true)?;
    bench.compare("linear_forward accumulate", &y, &oracle::add(&old, &product), inputs, 1)?;

    let product = oracle::matmul(&d_y_exact, &w.exact, outputs);
    let mut d_x = bench.output(rows, inputs)?;
    ops::linear_backward_input(d_y, w.tensor.view(), d_x.view_mut(), false)?;
    bench.compare("linear_backward_input", &d_x, &product, outputs, 1)?;
    let Input { tensor: mut d_x, exact: old } = bench.input(rows, inputs, 1.0)?;
    ops::linear_backward_input(d_y, w.tensor.view(), d_x.view_mut(), true)?;
    bench.compare("linear_backward_input accumulate", &d_x, &oracle::add(&old, &product), outputs, 1)?;

    let Input { tensor: mut d_w, exact: old } = bench.typed_input(DType::F32, outputs, inputs, 1.0)?;
    ops::linear_backward_weight(d_y, x.tensor.view(), d_w.view_mut())?;
    let want = oracle::add(&old, &oracle::matmul(&oracle::transpose(&d_y_exact, outputs), &x.exact, rows));
    bench.compare("linear_backward_weight", &d_w, &want, rows + 1, 0)?;
    Ok(())
}

fn lora(bench: &mut Bench, rows: usize, inputs: usize, outputs: usize, rank: usize) -> Result<()> {
    // Of a fused layer, an adapter has some columns.
    let (gap, scale) = (3, 0.75);
    let columns = gap..gap + outputs;
    let wide = outputs + 2 * gap;
    let inner = |wide_rows: &[f64]| -> Vec<f64> {
        wide_rows.chunks(wide).flat_map(|row| row[columns.clone()].to_vec()).collect()
    };
    for mask in [Dropout::NONE, MASK] {
        let x = bench.input(rows, inputs, 1.0)?;
        let a = bench.input(rank, inputs, (inputs as f32).powf(-0.5))?;
        let b = bench.input(outputs, rank, (rank as f32).powf(-0.5))?;
        let lora = ops::Lora { x: x.tensor.view(), a: a.tensor.view(), b: b.tensor.view(), scale, mask };
        let factors = oracle::dropout_factors(mask, rows * inputs);
        let dropped = oracle::multiply(&x.exact, &factors);
        let scaled = |values: Vec<f64>| -> Vec<f64> { values.iter().map(|value| f64::from(scale) * value).collect() };
        let low = scaled(oracle::matmul(&dropped, &oracle::transpose(&a.exact, inputs), inputs));

        let Input { tensor: mut y, exact: old } = bench.input(rows, wide, 1.0)?;
        ops::lora_forward(lora, y.view_mut().columns(columns.clone()))?;
        let product = oracle::matmul(&low, &oracle::transpose(&b.exact, rank), rank);
        let mut want = old;
        for (row, product) in want.chunks_mut(wide).zip(product.chunks(outputs)) {
            row[columns.clone()].iter_mut().zip(product).for_each(|(want, product)| *want += product);
        }
        bench.compare("lora_forward", &y, &want, inputs + rank, 3)?;

        let d_y = bench.input(rows, wide, 1.0)?;
        let d_y_exact = inner(&d_y.exact);
        let d_low = scaled(oracle::matmul(&d_y_exact, &b.exact, outputs));
        let Input { tensor: mut d_a, exact: old_a } = bench.typed_input(DType::F32, rank, inputs, 1.0)?;
        let Input { tensor: mut d_b, exact: old_b } = bench.typed_input(DType::F32, outputs, rank, 1.0)?;
        let Input { tensor: mut d_x, exact: old_x } = bench.input(rows, inputs, 1.0)?;
        let gradients = ops::LoraGradients { d_a: d_a.view_mut(), d_b: d_b.view_mut(), d_x: d_x.view_mut() };
        ops::lora_backward(lora, d_y.tensor.view().columns(columns.clone()), gradients)?;
        let want = oracle::matmul(&oracle::transpose(&d_low, rank), &dropped, rows);
        bench.compare("lora_backward d_a", &d_a, &oracle::add(&old_a, &want), outputs + rows, 2)?;
        let want = oracle::matmul(&oracle::transpose(&d_y_exact, outputs), &low, rows);
        bench.compare("lora_backward d_b", &d_b, &oracle::add(&old_b, &want), inputs + rows, 2)?;
        let want = oracle::multiply(&oracle::matmul(&d_low, &a.exact, rank), &factors);
        bench.compare("lora_backward d_x", &d_x, &oracle::add(&old_x, &want), outputs + rank, 3)?;
    }
    Ok(())
}

fn cross_entropy(bench: &mut Bench, rows: usize, width: usize, vocabulary: usize) -> Result<()> {
    let loss = CrossEntropy { scale: 0.5, label_smoothing: 0.1, gradient_scale: 4.0 };
    let (h, w) = (bench.input(rows, width, 1.0)?, bench.input(vocabulary, width, 4.0 * (width as f32).powf(-0.5))?);
    let (_, mut ids) = bench.ids(rows, vocabulary)?;
    ids.iter_mut().step_by(5).for_each(|id| *id = IGNORED_LABEL);
    let labels = bench.device.upload(&ids, rows, 1)?;
    let logits = oracle::matmul(&h.exact, &oracle::transpose(&w.exact, width), width);
    let logits: Vec<f64> = logits.into_iter().map(|logit| logit * f64::from(loss.scale)).collect();
    let exact_labels: Vec<_> = ids.iter().map(|&id| (id != IGNORED_LABEL).then_some(id as usize)).collect();
    let (want, gradient) = oracle::cross_entropy(&logits, &exact_labels, f64::from(loss.label_smoothing));
    let gradient: Vec<f64> =
        gradient.into_iter().map(|value| value * f64::from(loss.scale * loss.gradient_scale)).collect();
    let terms = width + vocabulary;

    let mut losses = bench.typed_output(DType::F32, rows, 1)?;
    ops::cross_entropy_forward(h.tensor.view(), w.tensor.view(), labels.view(), loss, losses.view_mut())?;
    bench.compare("cross_entropy_forward", &losses, &want, terms, 0)?;

    let mut losses = bench.typed_output(DType::F32, rows, 1)?;
    let mut d_h = bench.output(rows, width)?;
    let Input { tensor: mut d_w, exact: old } = bench.typed_input(DType::F32, vocabulary, width, 0.1)?;
    ops::cross_entropy_forward_backward(
        h.tensor.view(),
        w.tensor.view(),
        labels.view(),
        loss,
        losses.view_mut(),
        d_h.view_mut(),
        Some(d_w.view_mut()),
    )?;
    bench.compare("cross_entropy_forward_backward losses", &losses, &want, terms, 0)?;
    let d_h_exact = oracle::matmul(&gradient, &w.exact, vocabulary);
    // GPUs multiply operands of one type: there the gradient by the logits is rounded, too.
    let rounded = usize::from(matches!(bench.device, Device::Gpu(_)));
    bench.compare("cross_entropy_forward_backward d_h", &d_h, &d_h_exact, terms, 1 + rounded)?;
    let d_w_exact = oracle::matmul(&oracle::transpose(&gradient, vocabulary), &h.exact, rows);
    let want = oracle::add(&old, &d_w_exact);
    bench.compare("cross_entropy_forward_backward d_w", &d_w, &want, terms + rows, rounded)?;
    Ok(())
}

fn relative_bias(bench: &mut Bench) -> Result<()> {
    for (num_buckets, max_distance, bidirectional) in [(32, 128, true), (32, 128, false), (8, 20, true)] {
        let buckets = RelativeBuckets { num_buckets, max_distance, bidirectional };
        let (heads, distances) = (6, 2 * max_distance + 1);
        bench.shape = format!("{num_buckets} buckets, distance {max_distance}, {heads} heads");
        let table = bench.input(num_buckets, heads, 1.0)?;
        let mut bias = bench.typed_output(DType::F32, heads, distances)?;
        ops::relative_bias_forward(table.tensor.view(), buckets, bias.view_mut())?;
        bench.compare("relative_bias_forward", &bias, &oracle::relative_bias(&table.exact, buckets, heads), 0, 0)?;
        let d_bias = bench.typed_input(DType::F32, heads, distances, 1.0)?;
        let Input { tensor: mut d_table, exact: old } = bench.typed_input(DType::F32, num_buckets, heads, 1.0)?;
        ops::relative_bias_backward(d_bias.tensor.view(), buckets, d_table.view_mut())?;
        let want = oracle::add(&old, &oracle::relative_bias_backward(&d_bias.exact, buckets, heads));
        bench.compare("relative_bias_backward", &d_table, &want, max_distance, 0)?;
    }
    Ok(())
}
