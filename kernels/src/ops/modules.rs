//! Which modules the operations launch kernels of, so that they can be compiled, and judged, without a GPU.

use super::rms_norm;
use crate::DType;
use crate::driver::sources::SOURCES;

/// A source with what it is compiled for.
pub(crate) struct KernelModule {
    pub(crate) source: &'static str,
    pub(crate) element: DType,
    pub(crate) constants: Vec<(&'static str, u32)>,
}

/// The modules that models of the usual sizes use.
pub(crate) fn modules() -> Vec<KernelModule> {
    let of_source = |source: &'static str| {
        elements(source).iter().flat_map(move |&element| {
            constants(source, element).into_iter().map(move |constants| KernelModule { source, element, constants })
        })
    };
    SOURCES.iter().flat_map(|(source, _)| of_source(source)).collect()
}

/// The types that an operation compiles its source for.
fn elements(source: &str) -> &'static [DType] {
    match source {
        // What the optimizer reads and writes is f32, and so are logits; types of copies are arguments.
        "adafactor" | "adamw" | "norm" | "top_tokens" => &[DType::F32],
        _ => &[DType::F32, DType::Bf16, DType::F16],
    }
}

/// The sets of constants that an operation compiles its source with.
fn constants(source: &str, element: DType) -> Vec<Vec<(&'static str, u32)>> {
    match source {
        "attention_forward" | "attention_backward" => {
            let tf32: &[u32] = if element == DType::F32 { &[0, 1] } else { &[0] };
            let of_size = |size| tf32.iter().map(move |&tf32| vec![("HEAD_SIZE", size), ("TF32", tf32)]);
            [32, 64, 128].into_iter().flat_map(of_size).collect()
        }
        "cached_attention" => [32, 64, 128].map(|size| vec![("HEAD_SIZE", size)]).to_vec(),
        "cast" => (0..3).map(|to| vec![("TO", to)]).collect(),
        "rms_norm" => {
            let mut teams: Vec<_> = [256, 512, 768, 1024, 2048, 4096].map(rms_norm::constants).to_vec();
            teams.dedup();
            teams
        }
        _ => vec![Vec::new()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_source_has_modules_and_no_two_are_the_same() {
        let modules: Vec<_> = modules().into_iter().map(|it| (it.source, it.element, it.constants)).collect();
        for (source, _) in SOURCES {
            assert!(modules.iter().any(|module| module.0 == *source), "{source}");
        }
        for (index, module) in modules.iter().enumerate() {
            assert!(!modules[..index].contains(module), "{module:?}");
        }
    }
}
