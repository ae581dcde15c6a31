//! A line chart of efficiency over workers, as SVG.

use std::fmt::Write;

pub(super) struct Chart {
    pub(super) title: String,
    pub(super) subtitle: String,
    pub(super) series: Vec<Series>,
}

pub(super) struct Series {
    pub(super) name: String,
    /// Else modelled, and dashed.
    pub(super) measured: bool,
    /// Workers and efficiency.
    pub(super) points: Vec<(u32, f64)>,
}

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 480.0;
/// The plot's edges; the legend is to its right.
const LEFT: f64 = 64.0;
const RIGHT: f64 = 590.0;
const TOP: f64 = 72.0;
const BOTTOM: f64 = 420.0;
/// Colours that people with any colour vision can tell apart (Okabe and Ito), darkest first.
const COLOURS: [&str; 7] = ["#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"];

impl Chart {
    pub(super) fn svg(&self) -> String {
        let mut svg = String::new();
        let _ = writeln!(
            svg,
            r#"<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">
<rect width="100%" height="100%" fill="white"/>"#
        );
        text(&mut svg, LEFT, 30.0, "start", 18, &self.title);
        text(&mut svg, LEFT, 52.0, "start", 12, &self.subtitle);
        self.axes(&mut svg);
        for (index, series) in self.series.iter().enumerate() {
            self.line(&mut svg, series, COLOURS[index % COLOURS.len()]);
            legend(&mut svg, index, series);
        }
        svg.push_str("</svg>\n");
        svg
    }

    /// The exponent of two at the right edge.
    fn doublings(&self) -> f64 {
        let most = self.series.iter().flat_map(|series| &series.points).map(|point| point.0).max().unwrap_or(2);
        f64::from(most.max(2)).log2().ceil()
    }

    fn x(&self, workers: f64) -> f64 {
        LEFT + (RIGHT - LEFT) * workers.log2() / self.doublings()
    }

    fn axes(&self, svg: &mut String) {
        for tenths in (0..=10).step_by(2) {
            let y = y(f64::from(tenths) / 10.0);
            let _ = writeln!(svg, r##"<line x1="{LEFT}" y1="{y:.1}" x2="{RIGHT}" y2="{y:.1}" stroke="#ddd"/>"##);
            text(svg, LEFT - 8.0, y + 4.0, "end", 13, &format!("{} %", 10 * tenths));
        }
        for power in 0..=self.doublings() as u32 {
            let workers = 1_u64 << power;
            let x = self.x(workers as f64);
            let _ =
                writeln!(svg, r##"<line x1="{x:.1}" y1="{BOTTOM}" x2="{x:.1}" y2="{}" stroke="#333"/>"##, BOTTOM + 5.0);
            text(svg, x, BOTTOM + 20.0, "middle", 13, &workers.to_string());
        }
        let _ = writeln!(svg, r##"<path d="M{LEFT},{TOP} V{BOTTOM} H{RIGHT}" fill="none" stroke="#333"/>"##);
        text(svg, (LEFT + RIGHT) / 2.0, BOTTOM + 44.0, "middle", 13, "workers");
    }

    fn line(&self, svg: &mut String, series: &Series, colour: &str) {
        let points: Vec<String> = series
            .points
            .iter()
            .map(|&(workers, efficiency)| format!("{:.1},{:.1}", self.x(f64::from(workers)), y(efficiency)))
            .collect();
        let _ = writeln!(svg, r#"<polyline points="{}" fill="none" {}/>"#, points.join(" "), stroke(series, colour));
        for point in points.iter().filter(|_| series.measured) {
            if let Some((x, y)) = point.split_once(',') {
                let _ = writeln!(svg, r#"<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>"#);
            }
        }
    }
}

/// Of an efficiency; more than 1 is drawn at the edge.
fn y(efficiency: f64) -> f64 {
    BOTTOM - (BOTTOM - TOP) * efficiency.clamp(0.0, 1.05)
}

fn stroke(series: &Series, colour: &str) -> String {
    let dashes = if series.measured { "" } else { r#" stroke-dasharray="6 4""# };
    format!(r#"stroke="{colour}" stroke-width="2"{dashes}"#)
}

fn legend(svg: &mut String, index: usize, series: &Series) {
    let (x, y) = (RIGHT + 20.0, TOP + 10.0 + 22.0 * index as f64);
    let stroke = stroke(series, COLOURS[index % COLOURS.len()]);
    let _ = writeln!(svg, r#"<line x1="{x}" y1="{y}" x2="{}" y2="{y}" {stroke}/>"#, x + 28.0);
    text(svg, x + 36.0, y + 4.0, "start", 13, &series.name);
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, size: u32, content: &str) {
    let content = content.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(svg, r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}" font-size="{size}">{content}</text>"#);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_has_its_points_where_they_belong() {
        let series = |measured| Series { name: "a < b".into(), measured, points: vec![(1, 1.0), (4, 0.5)] };
        let chart = Chart { title: "t".into(), subtitle: "s".into(), series: vec![series(true), series(false)] };
        let svg = chart.svg();
        let middle = (TOP + BOTTOM) / 2.0;
        assert!(svg.contains(&format!(r#"points="{LEFT:.1},{TOP:.1} {RIGHT:.1},{middle:.1}""#)), "{svg}");
        assert_eq!(svg.matches("<circle").count(), 2, "only what was measured has points");
        assert!(svg.contains("a &lt; b") && svg.contains("stroke-dasharray"));
    }
}
