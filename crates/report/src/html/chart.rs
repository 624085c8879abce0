//! Charts of errors on a logarithmic scale, as inline SVG.

use maud::{Markup, html};

use crate::table::magnitude;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 200.0;
const LEFT: f64 = 46.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 16.0;
const BOTTOM: f64 = 34.0;

/// A curve.
#[derive(Clone, Debug)]
pub(crate) struct Series {
    pub(crate) name: String,
    /// One value per place on the horizontal axis, where there is one.
    pub(crate) values: Vec<Option<f64>>,
}

/// A bar, and what it may be.
#[derive(Clone, Debug)]
pub(crate) struct Bar {
    /// What stands below it, if there is room.
    pub(crate) label: String,
    /// What it is of.
    pub(crate) name: String,
    pub(crate) value: f64,
    pub(crate) limit: f64,
    pub(crate) beyond: bool,
}

/// Whole decades that hold all values.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Scale {
    low: f64,
    high: f64,
}

impl Scale {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.filter(|x| x.is_finite() && *x > 0.0) {
            low = low.min(value.log10());
            high = high.max(value.log10());
        }
        match low <= high {
            // One decade at the least.
            true => Self { low: low.floor(), high: high.ceil().max(low.floor() + 1.0) },
            false => Self { low: -8.0, high: 0.0 },
        }
    }

    /// Zero is at the bottom; what is no number or infinite is at the top.
    fn y(self, value: f64) -> f64 {
        let share = match value {
            x if !x.is_finite() => 1.0,
            x if x <= 0.0 => 0.0,
            x => ((x.log10() - self.low) / (self.high - self.low)).clamp(0.0, 1.0),
        };
        TOP + (1.0 - share) * (HEIGHT - TOP - BOTTOM)
    }

    fn ticks(self) -> impl Iterator<Item = f64> {
        let every = ((self.high - self.low) / 6.0).ceil().max(1.0);
        let count = ((self.high - self.low) / every).floor() as usize;
        (0..=count).map(move |i| self.low + i as f64 * every)
    }
}

fn x(i: usize, n: usize) -> f64 {
    LEFT + (i as f64 + 0.5) / n.max(1) as f64 * (WIDTH - LEFT - RIGHT)
}

/// Curves over `labels`. `summary` says in words what they show.
pub(crate) fn curves(labels: &[String], axis: &str, series: &[Series], summary: &str) -> Markup {
    let scale = Scale::of(series.iter().flat_map(|s| s.values.iter().copied().flatten()));
    let n = labels.len();
    let body = html! {
        @for (index, series) in series.iter().enumerate() {
            @let class = format!("s{}", index % 4);
            @for run in runs(&series.values) {
                @let points: Vec<String> =
                    run.iter().map(|&(i, value)| format!("{:.1},{:.1}", x(i, n), scale.y(value))).collect();
                polyline class={ "line " (class) } points=(points.join(" ")) {}
                @for &(i, value) in &run {
                    circle class={ "dot " (class) } cx=(format!("{:.1}", x(i, n))) cy=(format!("{:.1}", scale.y(value))) r="2.6" {
                        title { (series.name) ", " (axis) " " (labels[i]) ": " (magnitude(value)) }
                    }
                }
            }
        }
    };
    html! {
        (frame(scale, labels, axis, summary, body))
        ul.legend aria-label="Curves" {
            @for (index, series) in series.iter().enumerate() {
                li {
                    svg viewBox="0 0 38 12" aria-hidden="true" {
                        line class={ "line s" (index % 4) } x1="1" y1="6" x2="37" y2="6" {}
                    }
                    (series.name)
                }
            }
        }
    }
}

/// The stretches of values without a gap.
fn runs(values: &[Option<f64>]) -> Vec<Vec<(usize, f64)>> {
    let mut runs = vec![Vec::new()];
    for (i, value) in values.iter().enumerate() {
        match value {
            Some(value) => runs.last_mut().expect("there is one").push((i, *value)),
            None => runs.push(Vec::new()),
        }
    }
    runs.retain(|run| !run.is_empty());
    runs
}

/// Bars with the line that they may reach up to.
pub(crate) fn bars(bars: &[Bar], axis: &str, summary: &str) -> Markup {
    /// Signs over the bars have room up to here.
    const SIGNED: usize = 64;
    let scale = Scale::of(bars.iter().flat_map(|bar| [bar.value, bar.limit]));
    let n = bars.len();
    let width = (WIDTH - LEFT - RIGHT) / n.max(1) as f64;
    let inner = (width * 0.82).max(width - 3.0);
    let labels: Vec<String> = bars.iter().map(|bar| bar.label.clone()).collect();
    let body = html! {
        @for (i, bar) in bars.iter().enumerate() {
            @let (centre, top) = (x(i, n), scale.y(bar.value));
            rect class=(if bar.beyond { "bar beyond" } else { "bar" })
                x=(format!("{:.2}", centre - inner / 2.0)) y=(format!("{top:.1}"))
                width=(format!("{inner:.2}")) height=(format!("{:.1}", HEIGHT - BOTTOM - top)) {
                title {
                    (axis) " " (bar.name) ": " (magnitude(bar.value)) ", at most " (magnitude(bar.limit))
                    @if bar.beyond { ": beyond" }
                }
            }
            @if bar.beyond && n <= SIGNED {
                text.mark x=(format!("{centre:.1}")) y=(format!("{:.1}", top - 3.0)) { "✗" }
            }
            @let y = format!("{:.1}", scale.y(bar.limit));
            line.bound x1=(format!("{:.2}", centre - width / 2.0)) x2=(format!("{:.2}", centre + width / 2.0)) y1=(y) y2=(y) {}
        }
    };
    frame(scale, &labels, axis, summary, body)
}

/// Axes around `body`.
fn frame(scale: Scale, labels: &[String], axis: &str, summary: &str, body: Markup) -> Markup {
    const LABELS: usize = 16;
    let n = labels.len();
    let every = n.div_ceil(LABELS).max(1);
    let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
    html! {
        div.scroll.chart tabindex="0" role="region" aria-label=(summary) {
            svg viewBox=(format!("0 0 {WIDTH} {HEIGHT}")) role="img" aria-label=(summary) {
                @for tick in scale.ticks() {
                    @let y = scale.y(10f64.powf(tick));
                    line.axis x1=(LEFT) x2=(right) y1=(format!("{y:.1}")) y2=(format!("{y:.1}")) {}
                    text x=(LEFT - 6.0) y=(format!("{:.1}", y + 4.0)) text-anchor="end" { "1e" (tick) }
                }
                (body)
                @for (i, label) in labels.iter().enumerate().step_by(every) {
                    text x=(format!("{:.1}", x(i, n))) y=(bottom + 14.0) text-anchor="middle" { (label) }
                }
                text x=((LEFT + right) / 2.0) y=(HEIGHT - 4.0) text-anchor="middle" { (axis) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_whole_decades_around_what_can_be_drawn() {
        let scale = Scale::of([3e-7, 0.02, 0.0, f64::NAN, f64::INFINITY].into_iter());
        assert_eq!(scale, Scale { low: -7.0, high: -1.0 });
        assert_eq!(scale.ticks().count(), 7);
        let (top, bottom) = (TOP, HEIGHT - BOTTOM);
        assert_eq!([0.0, f64::NAN, 1.0, 1e-9].map(|x| scale.y(x)), [bottom, top, top, bottom]);
        assert!((scale.y(1e-4) - (top + bottom) / 2.0).abs() < 1e-9);
        assert_eq!(Scale::of([1e-3].into_iter()), Scale { low: -3.0, high: -2.0 });
        assert_eq!(Scale::of([0.0].into_iter()), Scale { low: -8.0, high: 0.0 });
        assert!(Scale::of([1e-300, 1e300].into_iter()).ticks().count() <= 8);
    }

    #[test]
    fn curves_are_broken_where_there_is_no_value() {
        let values = [None, Some(1.0), Some(2.0), None, None, Some(3.0)];
        assert_eq!(runs(&values), [vec![(1, 1.0), (2, 2.0)], vec![(5, 3.0)]]);
    }
}
