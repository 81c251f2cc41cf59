//! Figures, what is demanded of them, and the table: a column for native SQLite, and some for each door.

use super::door::Door;
use std::fmt::Write;

/// What is demanded. Of ratios more is better, of milliseconds and MiB less: the aim lies beyond the demand.
#[derive(Clone, Copy)]
pub struct Bar {
    /// A figure on the wrong side of this is short.
    pub at_least: f64,
    /// The aim.
    pub reach: f64,
}

impl Bar {
    fn mark(self, figure: f64) -> &'static str {
        let less_is_better = self.reach < self.at_least;
        let is_met = |bar: f64| if less_is_better { figure <= bar } else { figure >= bar };
        if is_met(self.reach) {
            "reached"
        } else if is_met(self.at_least) {
            "met"
        } else {
            "SHORT"
        }
    }
}

/// A figure of one door.
pub struct Cell {
    /// As it is printed.
    pub figure: String,
    /// Beside it: the ratio to native and its range, or something else that is known.
    pub beside: String,
    /// What the bar is held against.
    pub judged: f64,
}

/// The same thing measured in several rounds, natively and through each door one right after the other.
pub struct Rounds {
    native: Vec<f64>,
    /// By door.
    ours: Vec<Vec<f64>>,
}

impl Rounds {
    /// Nothing yet, for so many doors.
    pub fn new(doors: usize) -> Self {
        Rounds { native: Vec::new(), ours: vec![Vec::new(); doors] }
    }

    /// Adds what a round gave: natively, then by door.
    pub fn add(&mut self, figures: &[f64]) {
        self.native.push(figures[0]);
        for (ours, figure) in self.ours.iter_mut().zip(&figures[1..]) {
            ours.push(*figure);
        }
    }

    /// The median of the native figures.
    pub fn native(&self) -> String {
        thousands(median(&self.native))
    }

    /// By door: the median, and the median of the ratios in the same round.
    pub fn cells(&self) -> Vec<Cell> {
        let cell = |ours: &Vec<f64>| {
            let ratios: Vec<f64> = self.native.iter().zip(ours).map(|(native, ours)| ours / native).collect();
            let judged = median(&ratios);
            let (least, most) = (percentile(&ratios, 0.0), percentile(&ratios, 100.0));
            let beside = format!("{judged:>6.3} ({least:.3}-{most:.3})");
            Cell { figure: thousands(median(ours)), beside, judged }
        };
        self.ours.iter().map(cell).collect()
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
pub struct Report {
    doors: Vec<Door>,
    text: String,
    short: usize,
    bars: usize,
}

impl Report {
    /// An empty table with columns for these doors.
    pub fn new(doors: &[Door]) -> Self {
        Report { doors: doors.to_vec(), text: String::new(), short: 0, bars: 0 }
    }

    /// A line as it is.
    pub fn line(&mut self, text: &str) {
        self.text.push_str(text.trim_end());
        self.text.push('\n');
    }

    /// Begins a part of the table; `beside` says what stands beside the doors' figures.
    pub fn heading(&mut self, title: &str, native: &str, beside: &str) {
        self.line("");
        let mut line = format!("{title:<30} {native:>10}");
        for door in &self.doors {
            let _ = write!(line, " | {:>9} {beside:<21} {:<7} {:<10}", door.name(), "", "aim");
        }
        self.line(&line);
    }

    /// A row; `cells` by door, judged by the door's bar.
    pub fn row(
        &mut self,
        title: &str,
        bar: impl Fn(Door) -> Option<Bar>,
        native: &str,
        cells: &[Cell],
        note: &str,
    ) {
        let mut line = format!("  {title:<28} {native:>10}");
        for (cell, door) in cells.iter().zip(&self.doors) {
            let bar = bar(*door);
            let mark = bar.map_or("", |bar| bar.mark(cell.judged));
            let aim = bar.map_or(String::new(), |bar| format!("{}, {}", bar.at_least, bar.reach));
            self.bars += usize::from(bar.is_some());
            self.short += usize::from(mark == "SHORT");
            let _ = write!(line, " | {:>9} {:<21} {mark:<7} {aim:<10}", cell.figure, cell.beside);
        }
        if !note.is_empty() {
            let _ = write!(line, " | {note}");
        }
        self.line(&line);
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
        let ratio = Bar { at_least: 0.1, reach: 0.5 };
        assert_eq!([0.09, 0.1, 0.5].map(|figure| ratio.mark(figure)), ["SHORT", "met", "reached"]);
        let latency = Bar { at_least: 10.0, reach: 2.0 };
        assert_eq!([10.1, 10.0, 2.0].map(|figure| latency.mark(figure)), ["SHORT", "met", "reached"]);
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
        let mut rounds = Rounds::new(2);
        for figures in [[100.0, 50.0, 90.0], [1000.0, 100.0, 1000.0], [10.0, 8.0, 8.0]] {
            rounds.add(&figures);
        }
        let judged: Vec<f64> = rounds.cells().iter().map(|cell| cell.judged).collect();
        assert_eq!((judged, rounds.native()), (vec![0.5, 0.9], "100".to_owned()));
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(["0", "999", "1,000", "1,234,568"], [0.4, 999.0, 1000.0, 1_234_567.8].map(thousands));
    }
}
