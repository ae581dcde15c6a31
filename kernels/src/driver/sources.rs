//! The kernels' sources, which are part of the program, and the modules that they are compiled to.

use super::Module;
use crate::DType;

/// A file's name and text.
pub(crate) type Source = (&'static str, &'static str);

/// A file of kernels for each operation.
const KERNELS: &[Source] = &[
    ("activation", include_str!("../../cuda/activation.cu")),
    ("adafactor", include_str!("../../cuda/adafactor.cu")),
    ("adamw", include_str!("../../cuda/adamw.cu")),
    ("attention_backward", include_str!("../../cuda/attention_backward.cu")),
    ("attention_forward", include_str!("../../cuda/attention_forward.cu")),
    ("cast", include_str!("../../cuda/cast.cu")),
    ("cross_entropy", include_str!("../../cuda/cross_entropy.cu")),
    ("embedding", include_str!("../../cuda/embedding.cu")),
    ("norm", include_str!("../../cuda/norm.cu")),
    ("relative_bias", include_str!("../../cuda/relative_bias.cu")),
    ("residual", include_str!("../../cuda/residual.cu")),
    ("rms_norm", include_str!("../../cuda/rms_norm.cu")),
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

/// The constants of a module.
type Constants = &'static [(&'static str, u32)];

/// Sources whose modules have constants, and all that operations use of them. Others have one module for each element
/// type.
const VARIANTS: &[(&str, &[Constants])] = &[
    ("attention_backward", HEAD_SIZES),
    ("attention_forward", HEAD_SIZES),
    ("cast", &[&[("TO", 0)], &[("TO", 1)], &[("TO", 2)]]),
    (
        "rms_norm",
        &[
            &[("WARPS", 1), ("PACKS", 1)],
            &[("WARPS", 1), ("PACKS", 2)],
            &[("WARPS", 1), ("PACKS", 3)],
            &[("WARPS", 1), ("PACKS", 4)],
            &[("WARPS", 2), ("PACKS", 4)],
            &[("WARPS", 4), ("PACKS", 4)],
            &[("WARPS", 8), ("PACKS", 4)],
        ],
    ),
];

/// Those of the selftest and of published models; attention takes others too, which are compiled when they are met.
const HEAD_SIZES: &[Constants] = &[
    &[("HEAD_SIZE", 20), ("TF32", 0)],
    &[("HEAD_SIZE", 32), ("TF32", 0)],
    &[("HEAD_SIZE", 64), ("TF32", 0)],
    &[("HEAD_SIZE", 64), ("TF32", 1)],
    &[("HEAD_SIZE", 128), ("TF32", 0)],
];

/// The modules that operations launch kernels of: all, but for the values of constants. One that is not here is not compiled
/// for GPUs before it is used on one, so it may not be used at all.
pub(crate) fn modules() -> impl Iterator<Item = Module<'static>> {
    KERNELS.iter().flat_map(|(source, _)| {
        let elements = [DType::F32, DType::Bf16, DType::F16];
        let modules =
            move |element| variants(source).iter().map(move |constants| Module { source, element, constants });
        let of_use = |module: &Module| module.element == DType::F32 || !module.constants.contains(&("TF32", 1));
        elements.into_iter().flat_map(modules).filter(of_use)
    })
}

fn variants(stem: &str) -> &'static [Constants] {
    VARIANTS.iter().find(|(source, _)| *source == stem).map_or(&[&[]], |(_, variants)| variants)
}

/// The text of a module's source.
pub(crate) fn text(module: &Module) -> &'static str {
    if let Some((_, text)) = super::emulated::TEST_KERNELS.iter().find(|(name, _)| *name == module.source) {
        return text;
    }
    let names = |constants: &[(&'static str, u32)]| constants.iter().map(|(name, _)| *name).collect::<Vec<_>>();
    let known = variants(module.source).iter().any(|constants| names(constants) == names(module.constants));
    assert!(known, "{} is not among the modules of driver/sources.rs", module.describe());
    kernels(module.source)
}

/// The text of the file of kernels of this stem.
fn kernels(stem: &str) -> &'static str {
    let found = KERNELS.iter().find(|(name, _)| *name == stem);
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

    #[test]
    fn modules_are_all_elements_of_all_sources() {
        assert_eq!(modules().filter(|module| module.source == "residual").count(), 3);
        for (stem, _) in VARIANTS {
            assert!(KERNELS.iter().any(|(source, _)| source == stem), "{stem}");
        }
    }

    #[test]
    #[should_panic(expected = "not among the modules")]
    fn a_module_that_nobody_compiles_cannot_be_used() {
        text(&Module { source: "residual", element: DType::F32, constants: &[("UNKNOWN", 1)] });
    }
}
