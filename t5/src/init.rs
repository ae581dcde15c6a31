//! Fresh weights, as Hugging Face's `_init_weights` draws them.

use crate::{Config, Parameters, Result};

/// Fills an f32 arena. Each element is a pure function of the seed, its tensor's name and its index there, so that every
/// worker draws the same weights.
pub fn initialize(config: &Config, seed: u64, parameters: &mut Parameters) -> Result<()> {
    let layout = parameters.layout().clone();
    parameters.view_mut().fill_zero()?;
    for tensor in layout.tensors() {
        let mut values = vec![1.0; tensor.range.len()];
        if let Some(deviation) = standard_deviation(config, &tensor.name) {
            fill_normal(&mut values, splitmix(seed ^ fnv(&tensor.name)), deviation);
        }
        parameters.write(tensor.range.clone(), &values)?;
    }
    Ok(())
}

/// `None` for norms, which begin at one.
fn standard_deviation(config: &Config, name: &str) -> Option<f64> {
    let [d_model, d_kv, d_ff] = [config.d_model, config.d_kv, config.d_ff].map(|size| size as f64);
    let inner = config.inner() as f64;
    let part = name.trim_end_matches(".weight").rsplit('.').next().unwrap_or(name);
    let deviation = match part {
        "layer_norm" | "final_layer_norm" => return None,
        "shared" | "lm_head" => 1.0,
        "q" => (d_model * d_kv).powf(-0.5),
        "k" | "v" | "relative_attention_bias" | "wi" | "wi_0" | "wi_1" => d_model.powf(-0.5),
        "dense" | "out_proj" => d_model.powf(-0.5),
        "bias" => 0.0,
        "o" => inner.powf(-0.5),
        "wo" => d_ff.powf(-0.5),
        other => unreachable!("no initial deviation for {other}"),
    };
    Some(deviation * f64::from(config.initializer_factor))
}

/// Box–Muller over counters.
fn fill_normal(target: &mut [f32], seed: u64, deviation: f64) {
    for (pair, values) in target.chunks_mut(2).enumerate() {
        let radius = deviation * (-2.0 * uniform(seed, 2 * pair as u64).ln()).sqrt();
        let angle = std::f64::consts::TAU * uniform(seed, 2 * pair as u64 + 1);
        for (value, factor) in values.iter_mut().zip([angle.cos(), angle.sin()]) {
            *value = (radius * factor) as f32;
        }
    }
}

/// Uniform in ±`bound`, by counters, for the tensor `name`.
pub(crate) fn fill_uniform(target: &mut [f32], seed: u64, name: &str, bound: f64) {
    let seed = splitmix(seed ^ fnv(name));
    for (index, value) in target.iter_mut().enumerate() {
        *value = ((2.0 * uniform(seed, index as u64) - 1.0) * bound) as f32;
    }
}

/// Number `index` of a sequence, above 0 and below 1.
fn uniform(seed: u64, index: u64) -> f64 {
    let bits = splitmix(seed.wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15))) >> 11;
    (bits as f64 + 0.5) / (1u64 << 53) as f64
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
fn splitmix(mut state: u64) -> u64 {
    state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    state = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    state = (state ^ (state >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    state ^ (state >> 31)
}

/// FNV-1a.
fn fnv(text: &str) -> u64 {
    text.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3))
}

#[cfg(test)]
mod tests {
    use quintet_kernels::{DType, Device};

    use super::*;
    use crate::Model;

    fn moments(values: &[f32]) -> (f64, f64) {
        let count = values.len() as f64;
        let mean = values.iter().map(|&value| f64::from(value)).sum::<f64>() / count;
        let square = values.iter().map(|&value| (f64::from(value) - mean).powi(2)).sum::<f64>() / count;
        (mean, square.sqrt())
    }

    #[test]
    fn tensors_have_the_deviations_of_t5() {
        let config = Config { vocab_size: 1000, num_layers: 1, d_ff: 700, ..Config::default() };
        let model = Model::new(&Device::cpu(), config.clone()).unwrap();
        let mut parameters = model.zero_parameters(DType::F32).unwrap();
        initialize(&config, 7, &mut parameters).unwrap();
        let all = parameters.download().unwrap();
        for tensor in model.layout().tensors() {
            let values = &all[tensor.range.clone()];
            match standard_deviation(&config, &tensor.name) {
                None => assert!(values.iter().all(|&value| value == 1.0)),
                Some(expected) => {
                    let (mean, deviation) = moments(values);
                    // Five standard errors of a sample's mean and deviation.
                    let error = 5.0 * expected / (values.len() as f64).sqrt();
                    assert!(mean.abs() < error && (deviation - expected).abs() < error, "{}", tensor.name);
                }
            }
        }
    }

    #[test]
    fn seeds_and_names_tell_tensors_apart() {
        let (mut first, mut second) = ([0.0; 8], [0.0; 8]);
        fill_normal(&mut first, splitmix(1 ^ fnv("a")), 1.0);
        fill_normal(&mut second, splitmix(1 ^ fnv("b")), 1.0);
        assert_ne!(first, second);
        fill_normal(&mut second[..5], splitmix(1 ^ fnv("a")), 1.0);
        assert_eq!(first[..5], second[..5]);
    }
}
