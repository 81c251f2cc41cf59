//! Figures, what the issue demands of them, and the table.

use std::fmt::Write;

/// What is demanded.
#[derive(Clone, Copy)]
pub struct Bar {
    /// A figure on the wrong side of this is short.
    pub at_least: f64,
    /// The aim.
    pub reach: f64,
}

impl Bar {
    /// A ratio to native: the more the better.
    pub const fn ratio(at_least: f64, reach: f64) -> Self {
        Bar { at_least, reach }
    }

    /// Milliseconds or MiB: the less the better.
    pub const fn at_most(at_least: f64, reach: f64) -> Self {
        Bar { at_least, reach }
    }

    fn is_met(at: f64, bar: f64, less_is_better: bool) -> bool {
        if less_is_better { at <= bar } else { at >= bar }
    }

    fn mark(self, figure: f64) -> &'static str {
        // An aim lies beyond what is demanded, so it tells which way is good.
        let less_is_better = self.reach < self.at_least;
        if Self::is_met(figure, self.reach, less_is_better) {
            "PASS, reached"
        } else if Self::is_met(figure, self.at_least, less_is_better) {
            "PASS"
        } else {
            "SHORT"
        }
    }
}

/// The same thing measured several times, natively and by this product one right after the other.
#[derive(Default)]
pub struct Pairs {
    native: Vec<f64>,
    ours: Vec<f64>,
}

impl Pairs {
    /// Adds what one round gave.
    pub fn add(&mut self, native: f64, ours: f64) {
        self.native.push(native);
        self.ours.push(ours);
    }

    fn ratios(&self) -> Vec<f64> {
        self.native.iter().zip(&self.ours).map(|(native, ours)| ours / native).collect()
    }
}

/// The middle of some figures; 0 of none.
pub fn median(figures: &[f64]) -> f64 {
    percentile(figures, 50.0)
}

/// The figure that `percent` of all are not above; 0 of none.
pub fn percentile(figures: &[f64], percent: f64) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied().unwrap_or_default()
}

/// The table, as it grows.
#[derive(Default)]
pub struct Report {
    text: String,
    short: usize,
    bars: usize,
}

impl Report {
    /// A line as it is.
    pub fn line(&mut self, text: &str) {
        self.text.push_str(text.trim_end());
        self.text.push('\n');
    }

    /// Begins a part of the table.
    pub fn heading(&mut self, title: &str, native: &str, ours: &str) {
        self.line("");
        self.line(&format!(
            "{title:<36} {native:>11} {ours:>11} {:>7} {:<15} {:>8} {:>7}",
            "ratio", "  (of rounds)", "at least", "reach"
        ));
    }

    /// A row of which the ratio counts.
    pub fn ratio(&mut self, name: &str, pairs: &Pairs, bar: Option<Bar>, note: &str) {
        let ratios = pairs.ratios();
        let ratio = median(&ratios);
        let of_rounds = format!("  ({:.3}-{:.3})", percentile(&ratios, 0.0), percentile(&ratios, 100.0));
        let (native, ours) = (thousands(median(&pairs.native)), thousands(median(&pairs.ours)));
        let verdict = self.verdict(bar, ratio);
        self.line(&format!(
            "  {name:<34} {native:>11} {ours:>11} {ratio:>7.3} {of_rounds:<15} {verdict}  {note}"
        ));
    }

    /// A row of which our own figure counts.
    pub fn figure(&mut self, name: &str, native: Option<f64>, ours: f64, bar: Option<Bar>, note: &str) {
        let native = native.map_or(String::new(), |native| format!("{native:.2}"));
        let verdict = self.verdict(bar, ours);
        self.line(&format!("  {name:<34} {native:>11} {ours:>11.2} {:>7} {:<15} {verdict}  {note}", "", ""));
    }

    fn verdict(&mut self, bar: Option<Bar>, figure: f64) -> String {
        let Some(bar) = bar else { return format!("{:>8} {:>7}", "", "") };
        let mark = bar.mark(figure);
        self.bars += 1;
        self.short += usize::from(mark == "SHORT");
        format!("{:>8} {:>7}  {mark:<13}", bar.at_least, bar.reach)
    }

    /// The whole, with a last line that says how many bars were missed.
    pub fn finish(mut self) -> String {
        let (met, bars) = (self.bars - self.short, self.bars);
        let _ = writeln!(self.text, "\n{met} of {bars} bars met");
        self.text
    }
}

/// A whole number with commas.
pub fn thousands(figure: f64) -> String {
    let digits = format!("{figure:.0}");
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_knows_which_way_is_good() {
        let ratio = Bar::ratio(0.1, 0.5);
        assert_eq!([0.09, 0.1, 0.5].map(|figure| ratio.mark(figure)), ["SHORT", "PASS", "PASS, reached"]);
        let latency = Bar::at_most(10.0, 2.0);
        assert_eq!([10.1, 10.0, 2.0].map(|figure| latency.mark(figure)), ["SHORT", "PASS", "PASS, reached"]);
    }

    #[test]
    fn percentiles_are_figures_that_were_measured() {
        let figures: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(percentile(&figures, 0.0), 1.0);
        assert_eq!(percentile(&figures, 50.0), 50.0);
        assert_eq!(percentile(&figures, 99.0), 99.0);
        assert_eq!(percentile(&figures, 100.0), 100.0);
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[7.0]), 7.0);
    }

    #[test]
    fn the_ratio_is_the_median_of_the_rounds() {
        let mut pairs = Pairs::default();
        for (native, ours) in [(100.0, 50.0), (1000.0, 100.0), (10.0, 8.0)] {
            pairs.add(native, ours);
        }
        assert_eq!(median(&pairs.ratios()), 0.5);
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(["0", "999", "1,000", "1,234,568"], [0.4, 999.0, 1000.0, 1_234_567.8].map(thousands));
    }
}
