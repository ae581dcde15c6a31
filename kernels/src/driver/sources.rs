//! The kernels' sources, which are part of the program.

/// A file's name and text.
pub(crate) type Source = (&'static str, &'static str);

/// A file of kernels for each operation.
pub(crate) const SOURCES: &[Source] = &[
    ("activation", include_str!("../../cuda/activation.cu")),
    ("adafactor", include_str!("../../cuda/adafactor.cu")),
    ("adamw", include_str!("../../cuda/adamw.cu")),
    ("attention_backward", include_str!("../../cuda/attention_backward.cu")),
    ("attention_forward", include_str!("../../cuda/attention_forward.cu")),
    ("cached_attention", include_str!("../../cuda/cached_attention.cu")),
    ("cast", include_str!("../../cuda/cast.cu")),
    ("cross_entropy", include_str!("../../cuda/cross_entropy.cu")),
    ("embedding", include_str!("../../cuda/embedding.cu")),
    ("norm", include_str!("../../cuda/norm.cu")),
    ("relative_bias", include_str!("../../cuda/relative_bias.cu")),
    ("residual", include_str!("../../cuda/residual.cu")),
    ("rms_norm", include_str!("../../cuda/rms_norm.cu")),
    ("top_tokens", include_str!("../../cuda/top_tokens.cu")),
];

/// What they include.
pub(crate) const HEADERS: &[Source] = &[
    ("attention.cuh", include_str!("../../cuda/attention.cuh")),
    ("element.cuh", include_str!("../../cuda/element.cuh")),
    ("pack.cuh", include_str!("../../cuda/pack.cuh")),
    ("piece.cuh", include_str!("../../cuda/piece.cuh")),
    ("ptx.cuh", include_str!("../../cuda/ptx.cuh")),
    ("random.cuh", include_str!("../../cuda/random.cuh")),
    ("reduce.cuh", include_str!("../../cuda/reduce.cuh")),
    ("slots.cuh", include_str!("../../cuda/slots.cuh")),
];

/// The text of the file of kernels of this stem.
pub(crate) fn kernels(stem: &str) -> &'static str {
    let found = SOURCES.iter().chain(super::emulated::TEST_KERNELS).find(|(name, _)| *name == stem);
    found.unwrap_or_else(|| panic!("no kernels/cuda/{stem}.cu")).1
}

/// The names of the kernels that a source declares: `KERNEL name(` or `KERNEL LAUNCH_BOUNDS(n) name(` at the beginning of
/// a line.
pub(crate) fn kernel_names(text: &str) -> Vec<&str> {
    let declarations = text.lines().filter_map(|line| line.strip_prefix("KERNEL "));
    declarations
        .filter_map(|rest| {
            let rest = match rest.strip_prefix("LAUNCH_BOUNDS(") {
                Some(bounds) => bounds.split_once(") ")?.1,
                None => rest,
            };
            Some(rest.split_once('(')?.0.trim())
        })
        .collect()
}

/// Whether a kernel is marked as one that the time of a step depends on: by a line `// hot` before its declaration.
pub(crate) fn is_hot(text: &str, kernel: &str) -> bool {
    let declares = |line: &str| kernel_names(line).contains(&kernel);
    let mut before = text.lines().take_while(|line| !declares(line)).collect::<Vec<_>>().into_iter().rev();
    before.by_ref().take_while(|line| line.starts_with("//")).any(|line| line == "// hot")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_found_by_their_declarations() {
        let text = "// KERNEL no(\nKERNEL one(float* x) {\n  KERNEL no(\nKERNEL LAUNCH_BOUNDS(32 * 8) two(u32 n)\n{";
        assert_eq!(kernel_names(text), ["one", "two"]);
    }

    #[test]
    fn hot_kernels_are_marked() {
        let text = "// One.\n// hot\nKERNEL one(float* x) {\n// hot\n}\n\n// Two.\nKERNEL two(u32 n) {";
        assert!(is_hot(text, "one"));
        assert!(!is_hot(text, "two"));
    }
}
