//! From the figures of all rounds to the table: medians, their spread, and the ratio to the floor of the same round.
use crate::servers::Spec;
use crate::workloads::{Figure, Figures, Workload};
use std::collections::BTreeMap;
use std::fmt::Write;

/// Everything measured: by workload and server, one entry per round.
#[derive(Default)]
pub struct Results(BTreeMap<(String, String), Vec<Figures>>);

/// The server by whose figures all figures are divided.
pub const FLOOR: &str = "floor";

/// The middle value; of an even number the mean of the two.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

impl Results {
    pub fn add(&mut self, workload: &Workload, spec: &Spec, figures: Figures) {
        self.0.entry((workload.name.into(), spec.name.clone())).or_default().push(figures);
    }

    fn rounds(&self, workload: &str, server: &str) -> &[Figures] {
        self.0.get(&(workload.into(), server.into())).map_or(&[], Vec::as_slice)
    }

    fn median(&self, workload: &str, server: &str, figure: Figure) -> Option<f64> {
        let mut values: Vec<f64> =
            self.rounds(workload, server).iter().filter_map(|f| f.get(&figure).copied()).collect();
        (!values.is_empty()).then(|| median(&mut values))
    }

    /// Half the distance between the quartiles, in percent of the median.
    fn spread(&self, workload: &str, server: &str, figure: Figure) -> Option<f64> {
        let mut values: Vec<f64> =
            self.rounds(workload, server).iter().filter_map(|f| f.get(&figure).copied()).collect();
        let middle = median(&mut values);
        if values.len() < 3 || middle <= 0.0 {
            return None;
        }
        let quartile = |share: f64| values[((values.len() - 1) as f64 * share).round() as usize];
        Some((quartile(0.75) - quartile(0.25)) / 2.0 / middle * 100.0)
    }

    /// The median over the rounds of `one` divided by `other` in the same round.
    pub fn ratio(&self, one: (&str, &str), other: (&str, &str), figure: Figure) -> Option<f64> {
        self.quotient((one, figure), (other, figure))
    }

    /// The same, of any two figures: each of a workload, a server and a column.
    fn quotient(&self, one: ((&str, &str), Figure), other: ((&str, &str), Figure)) -> Option<f64> {
        let pairs = self.rounds(one.0.0, one.0.1).iter().zip(self.rounds(other.0.0, other.0.1));
        let mut ratios: Vec<f64> =
            pairs.filter_map(|(a, b)| Some(a.get(&one.1)? / b.get(&other.1)?)).filter(|r| r.is_finite()).collect();
        (!ratios.is_empty()).then(|| median(&mut ratios))
    }

    /// The best server of `others`, and the ratio of `echod`'s time to its time: the server with the highest such
    /// ratio.
    fn beside_best<'a>(
        &self,
        workload: &str,
        echod: &str,
        others: &[&'a str],
        figure: Figure,
    ) -> Option<(&'a str, f64)> {
        let ratios = others.iter().filter_map(|&other| {
            let (mine, theirs) = ((workload, echod), (workload, other));
            // The inverse of a rate is a time.
            let (one, two) = if figure == Figure::Rate { (theirs, mine) } else { (mine, theirs) };
            Some((other, self.ratio(one, two, figure)?))
        });
        ratios.max_by(|a, b| a.1.total_cmp(&b.1))
    }

    /// The table, in Markdown.
    pub fn table(
        &self,
        workloads: &[&Workload],
        specs: &[Spec],
        skips: impl Fn(&Workload, &Spec) -> Option<&'static str>,
    ) -> String {
        let mut out = String::from(
            "| workload | server | per second | × floor | CPU µs each | × floor | p50 µs | p99 µs | p99.9 µs | peak RSS KiB | also |\n\
             | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |\n",
        );
        for workload in workloads {
            for spec in specs {
                match skips(workload, spec) {
                    Some(reason) => {
                        let _ = writeln!(out, "| {} | {} | | | | | | | | | {reason} |", workload.name, spec.name);
                    }
                    None => self.row(workload.name, &spec.name, &mut out),
                }
            }
        }
        out
    }

    fn row(&self, workload: &str, server: &str, out: &mut String) {
        let cell = |figure| match (self.median(workload, server, figure), self.spread(workload, server, figure)) {
            (Some(m), Some(s)) => format!("{} ±{s:.0} %", number(m)),
            (Some(m), None) => number(m),
            _ => String::new(),
        };
        let times = |figure| match self.ratio((workload, server), (workload, FLOOR), figure) {
            Some(r) => format!("{r:.2}"),
            None => String::new(),
        };
        let also: Vec<String> = [
            (Figure::QuietP50, "quiet p50 µs"),
            (Figure::QuietP99, "quiet p99 µs"),
            (Figure::Streamed, "lines per second of the streaming user alone"),
            (Figure::StreamedCpu, "CPU ns for each of these"),
            (Figure::Denials, "denied per second"),
            (Figure::Alone, "denied per second alone"),
            (Figure::TurnedDown, "EAGAIN %"),
            (Figure::FirstEcho, "connect to first echo ms"),
            (Figure::Ready, "exec to READY=1 ms"),
            (Figure::PerConnection, "bytes per connection"),
            (Figure::Wakeups, "wake-ups per second"),
        ]
        .iter()
        .filter(|(figure, _)| self.median(workload, server, *figure).is_some())
        .map(|(figure, name)| format!("{name} {}", cell(*figure)))
        .collect();
        let _ = writeln!(
            out,
            "| {workload} | {server} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            cell(Figure::Rate),
            times(Figure::Rate),
            cell(Figure::Cpu),
            times(Figure::Cpu),
            cell(Figure::P50),
            cell(Figure::P99),
            cell(Figure::P999),
            cell(Figure::Peak),
            also.join(", ")
        );
    }

    /// The aims, and whether `echod` reaches them beside all `others`: a list, in Markdown.
    pub fn reach(&self, echod: &str, others: &[&str]) -> String {
        let mut out = String::new();
        let mut aim = |what: &str, value: Option<f64>, most: f64| {
            if let Some(value) = value {
                let verdict = if value <= most { "reached" } else { "**not reached**" };
                let _ = writeln!(out, "| {what} | {} | {} | {verdict} |", number(value), number(most));
            }
        };
        let cpu = |workload, other| self.ratio((workload, echod), (workload, other), Figure::Cpu);
        for workload in ["ping-64", "ping-1000", "pipelined"] {
            aim(&format!("CPU per line, {workload}, / floor"), cpu(workload, FLOOR), 1.10);
        }
        for (workload, most) in [("ping-64", 1.0 / 1.6), ("ping-1000", 1.0 / 1.6), ("pipelined", 1.0 / 20.0)] {
            aim(&format!("CPU per line, {workload}, / Go"), cpu(workload, "Go"), most);
        }
        aim("CPU per line, ping-free, / floor", cpu("ping-free", FLOOR), 1.10);
        // With one connection, ahead of every server in the table.
        for workload in ["ping-free", "ping-same"] {
            for (what, figure) in [("p50", Figure::P50), ("time per line", Figure::Rate)] {
                if let Some((best, ratio)) = self.beside_best(workload, echod, others, figure) {
                    aim(&format!("{what}, {workload}, / best other server ({best})"), Some(ratio), 1.0);
                }
            }
        }
        for workload in ["connect-1", "connect-16"] {
            aim(&format!("CPU per connection, {workload}, / Go"), cpu(workload, "Go"), 0.5);
            let rate = self.ratio((workload, "s6"), (workload, echod), Figure::Rate);
            aim(&format!("time per connection, {workload}, / s6"), rate, 1.0 / 30.0);
        }
        // What the gate costs a service on tokio.
        for (workload, each, most) in
            [("connect-1", "connection", 1.15), ("connect-16", "connection", 1.15), ("ping-64", "line", 1.03)]
        {
            let ratio = self.ratio((workload, "tokio gate"), (workload, "tokio"), Figure::Cpu);
            aim(&format!("CPU per {each}, {workload}, tokio gate / tokio"), ratio, most);
        }
        aim("idle: bytes per connection", self.median("idle", echod, Figure::PerConnection), 256.0);
        aim("idle: wake-ups per second", self.median("idle", echod, Figure::Wakeups), 0.0);
        aim("peak RSS KiB, ping-free", self.median("ping-free", echod, Figure::Peak), 4096.0);
        aim("peak RSS KiB, idle with 10,000", self.median("idle", echod, Figure::Peak), 4096.0);
        aim("exec to READY=1, ms", self.median("cold", echod, Figure::Ready), 3.0);
        self.reach_under_attack(echod, &mut aim);
        for many in ["flat-1000", "flat-10000"] {
            let flat = self.ratio((many, echod), ("flat-64", echod), Figure::Cpu);
            aim(&format!("CPU per line, {many}, / flat-64"), flat, 1.15);
        }
        if out.is_empty() {
            return out;
        }
        format!("| {echod} | measured | at most | |\n| --- | ---: | ---: | --- |\n{out}")
    }

    fn reach_under_attack(&self, echod: &str, aim: &mut impl FnMut(&str, Option<f64>, f64)) {
        let flood = ("flood", echod);
        aim("flood: p99 / quiet p99", self.quotient((flood, Figure::P99), (flood, Figure::QuietP99)), 2.0);
        let unfair = ("unfair-connect", echod);
        for (what, figure, quiet, most) in
            [("p50", Figure::P50, Figure::QuietP50, 2.0), ("p99", Figure::P99, Figure::QuietP99, 5.0)]
        {
            aim(
                &format!("unfair-connect: {what} / quiet {what}"),
                self.quotient((unfair, figure), (unfair, quiet)),
                most,
            );
        }
        let lines = ("unfair-lines", echod);
        aim("unfair-lines: p50 / quiet p50", self.quotient((lines, Figure::P50), (lines, Figure::QuietP50)), 5.0);
        aim("unfair-connect: EAGAIN, per cent", self.median("unfair-connect", echod, Figure::TurnedDown), 0.1);
    }
}

/// Three significant digits are more than the spread allows.
fn number(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        _ => 2,
    };
    let plain = format!("{value:.digits$}");
    if value < 10_000.0 {
        return plain;
    }
    let mut grouped = String::new();
    for (i, digit) in plain.chars().enumerate() {
        if i > 0 && (plain.len() - i) % 3 == 0 {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_is_the_mean_of_the_two() {
        assert!((median(&mut [4.0, 1.0, 3.0, 2.0]) - 2.5).abs() < 1e-9);
        assert!((median(&mut [9.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
    }

    fn results(workload: &str, figures: &[(&str, Figure, [f64; 3])]) -> Results {
        let mut results = Results::default();
        for round in 0..3 {
            for (server, figure, values) in figures {
                let rounds = results.0.entry((workload.to_owned(), (*server).to_owned())).or_default();
                rounds.resize(round + 1, Figures::new());
                rounds[round].insert(*figure, values[round]);
            }
        }
        results
    }

    #[test]
    fn a_ratio_is_of_figures_of_the_same_round() {
        let results =
            results("ping", &[("echod", Figure::Cpu, [2.0, 40.0, 6.0]), (FLOOR, Figure::Cpu, [1.0, 20.0, 3.0])]);
        assert_eq!(results.ratio(("ping", "echod"), ("ping", FLOOR), Figure::Cpu), Some(2.0));
    }

    #[test]
    fn what_the_flood_does_to_the_tail_is_compared_within_each_round() {
        // The quotient of the medians would be 30 / 20.
        let results = results(
            "flood",
            &[("echod", Figure::P99, [30.0, 20.0, 120.0]), ("echod", Figure::QuietP99, [10.0, 20.0, 60.0])],
        );
        assert!(results.reach("echod", &[]).contains("| flood: p99 / quiet p99 | 2.00 | 2.00 | reached |"));
    }

    #[test]
    fn echod_stands_beside_the_best_of_the_others_whoever_that_is() {
        let figures = [
            ("echod", Figure::P50, [10.0, 10.0, 10.0]),
            ("echod", Figure::Rate, [50.0, 50.0, 50.0]),
            ("polling floor", Figure::P50, [8.0, 8.0, 8.0]),
            ("polling floor", Figure::Rate, [40.0, 40.0, 40.0]),
            ("Go", Figure::P50, [20.0, 20.0, 20.0]),
            ("Go", Figure::Rate, [45.0, 45.0, 45.0]),
        ];
        let reach = results("ping-free", &figures).reach("echod", &["polling floor", "Go", "not there"]);
        let p50 = "| p50, ping-free, / best other server (polling floor) | 1.25 | 1.00 | **not reached** |\n";
        let rate = "| time per line, ping-free, / best other server (Go) | 0.90 | 1.00 | reached |\n";
        assert!(reach.contains(&format!("{p50}{rate}")), "{reach}");
    }

    #[test]
    fn numbers_are_short() {
        let cases = [(1.234, "1.23"), (12.34, "12.3"), (1234.0, "1234"), (1_234_567.0, "1,234,567")];
        cases.iter().for_each(|(value, text)| assert_eq!(number(*value), *text));
    }
}
