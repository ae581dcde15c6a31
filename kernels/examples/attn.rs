use quintet_kernels::{Device, selftest};
fn main() {
    let seed = std::env::args().nth(1).map_or(1, |s| s.parse().unwrap());
    let start = std::time::Instant::now();
    let mut fails = 0;
    match selftest::run(&Device::emulated(seed).unwrap()) {
        Ok(outcomes) => {
            for o in outcomes.iter().filter(|o| o.op.contains("attention")) {
                fails += usize::from(!o.passed);
                println!(
                    "{} {:45} {:5} {:28} {:.2e} / {:.2e} = {:.2}",
                    if o.passed { "ok  " } else { "FAIL" },
                    o.op,
                    o.dtype,
                    o.shape,
                    o.max_error,
                    o.tolerance,
                    o.max_error / o.tolerance
                );
            }
        }
        Err(e) => println!("{e}"),
    }
    println!("{fails} fails {:?}", start.elapsed());
}
