//! A model of how long an exchange of gradients takes: latency and bandwidth.
//!
//! Ranks exchange directly: each sends every other its part of that one's slice, then the total of its own. So a rank
//! sends 2·(n − 1) messages and 2·(n − 1)/n of the gradient:
//! ```text
//! t(n, bytes) = α · 2·(n − 1) + β · bytes · 2·(n − 1)/n · max(1, n/p)
//! ```
//! with α what a message costs and β what a byte does. On one machine both are the work of p cores (or links of p GPUs),
//! which n ranks share. Between nodes of one rank each, a byte takes what the network or that work takes, whichever is
//! longer, and the latency of either of the two phases comes on top.

use std::fmt;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct CostModel {
    /// α, seconds a message.
    alpha: f64,
    /// β, seconds a byte.
    beta: f64,
    /// p
    places: f64,
}

/// What lies between nodes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Network {
    /// Of each node and direction, in 10⁹ **bits** a second, as networks are sold.
    pub(super) gbps: f64,
    pub(super) latency_us: f64,
}

/// A measured sum that the model was not fitted to, and what it says of it.
pub(super) struct Held {
    pub(super) world_size: u32,
    pub(super) bytes: usize,
    pub(super) seconds: f64,
    pub(super) predicted_seconds: f64,
}

impl Held {
    /// As a share of what was measured; negative where the model is too fast.
    pub(super) fn error(&self) -> f64 {
        self.predicted_seconds / self.seconds - 1.0
    }
}

/// Messages a rank, and the share of the bytes that it sends.
fn traffic(world_size: u32) -> (f64, f64) {
    let others = 2.0 * f64::from(world_size - 1);
    (others, others / f64::from(world_size))
}

impl CostModel {
    /// The least sum of squared **relative** errors over (ranks, bytes, seconds), so that small sums count as large ones
    /// do; neither cost is negative.
    pub(super) fn fit(places: usize, measured: &[(u32, usize, f64)]) -> Self {
        let mut model = CostModel { alpha: 0.0, beta: 0.0, places: places as f64 };
        // (x·α + y·β) should be 1 in each row.
        let rows: Vec<(f64, f64)> = measured
            .iter()
            .map(|&(world_size, bytes, seconds)| {
                let (messages, volume) = model.work(world_size, bytes);
                (messages / seconds, volume / seconds)
            })
            .collect();
        let sum = |f: fn(&(f64, f64)) -> f64| rows.iter().map(f).sum::<f64>();
        let (xx, xy, yy) = (sum(|r| r.0 * r.0), sum(|r| r.0 * r.1), sum(|r| r.1 * r.1));
        let (x, y) = (sum(|r| r.0), sum(|r| r.1));
        let determinant = xx * yy - xy * xy;
        (model.alpha, model.beta) = ((x * yy - y * xy) / determinant, (y * xx - x * xy) / determinant);
        if model.beta < 0.0 {
            (model.alpha, model.beta) = (x / xx, 0.0);
        } else if model.alpha < 0.0 || determinant == 0.0 {
            (model.alpha, model.beta) = (0.0, y / yy);
        }
        model
    }

    /// What α and β are multiplied with on this machine.
    fn work(&self, world_size: u32, bytes: usize) -> (f64, f64) {
        let (messages, share) = traffic(world_size);
        (messages, share * bytes as f64 * (f64::from(world_size) / self.places).max(1.0))
    }

    /// Seconds of a sum over ranks on this machine.
    pub(super) fn here(&self, world_size: u32, bytes: usize) -> f64 {
        let (messages, volume) = self.work(world_size, bytes);
        self.alpha * messages + self.beta * volume
    }

    /// Seconds of a sum over nodes of one rank each.
    pub(super) fn between_nodes(&self, nodes: u32, bytes: usize, network: Network) -> f64 {
        let (messages, share) = traffic(nodes);
        let byte = self.beta.max(8.0 / (network.gbps * 1e9));
        2.0 * network.latency_us * 1e-6 + self.alpha * messages + byte * share * bytes as f64
    }
}

impl fmt::Display for CostModel {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (alpha, bandwidth) = (self.alpha * 1e6, 1e-9 / self.beta);
        write!(
            formatter,
            "α = {alpha:.1} µs a message, β = 1 / ({bandwidth:.2} GB/s), {} of them at a time",
            self.places
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fit_finds_what_made_the_times() {
        let truth = CostModel { alpha: 40e-6, beta: 0.5e-9, places: 2.0 };
        let points: Vec<(u32, usize)> =
            [2, 4].into_iter().flat_map(|n| [1 << 10, 1 << 18, 1 << 26].map(|b| (n, b))).collect();
        let measured: Vec<_> = points.iter().map(|&(n, bytes)| (n, bytes, truth.here(n, bytes))).collect();
        let fitted = CostModel::fit(2, &measured);
        assert!((fitted.alpha / truth.alpha - 1.0).abs() < 1e-9 && (fitted.beta / truth.beta - 1.0).abs() < 1e-9);
        let held = Held {
            world_size: 3,
            bytes: 1 << 20,
            seconds: truth.here(3, 1 << 20),
            predicted_seconds: fitted.here(3, 1 << 20),
        };
        assert!(held.error().abs() < 1e-9);
    }

    #[test]
    fn costs_are_never_negative() {
        let falling = [(2, 1 << 10, 1e-3), (2, 1 << 20, 1e-4)];
        let fitted = CostModel::fit(2, &falling);
        assert!(fitted.alpha >= 0.0 && fitted.beta >= 0.0);
    }

    #[test]
    fn a_slow_network_decides_and_a_fast_one_does_not() {
        let model = CostModel { alpha: 0.0, beta: 0.5e-9, places: 2.0 };
        let seconds = |gbps| model.between_nodes(2, 1 << 30, Network { gbps, latency_us: 0.0 });
        assert!((seconds(1.0) / (8.0 * 1.073_741_824) - 1.0).abs() < 1e-9);
        assert_eq!(seconds(100.0), seconds(1000.0));
    }
}
