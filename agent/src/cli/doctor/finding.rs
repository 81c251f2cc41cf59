//! What a check found, and how it is shown.

use crate::cli::failure::{self, Failure};
use crate::cli::printable;
use serde::Serialize;
use std::io::Write;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Nothing to do.
    Ok,
    /// Works, or cannot be told; look at it.
    Warn,
    /// Does not work.
    Fail,
}

/// One result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub level: Level,
    /// What was looked at: a path, `PID n`, or `host`.
    pub subject: String,
    /// Which check; stable, for scripts.
    pub check: &'static str,
    /// What it is like.
    pub found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

/// All results for one thing that was looked at.
#[derive(Debug)]
pub struct Findings {
    subject: String,
    /// In the order of the checks.
    pub list: Vec<Finding>,
}

impl Findings {
    /// None yet.
    pub fn about(subject: impl std::fmt::Display) -> Findings {
        Findings { subject: subject.to_string(), list: Vec::new() }
    }

    fn add(&mut self, level: Level, check: &'static str, found: String, advice: Option<String>) {
        self.list.push(Finding { level, subject: self.subject.clone(), check, found, advice });
    }

    /// Nothing to do.
    pub fn ok(&mut self, check: &'static str, found: impl Into<String>) {
        self.add(Level::Ok, check, found.into(), None);
    }

    /// Works, or cannot be told.
    pub fn warn(&mut self, check: &'static str, found: impl Into<String>, advice: impl Into<String>) {
        self.add(Level::Warn, check, found.into(), Some(advice.into()));
    }

    /// Does not work.
    pub fn fail(&mut self, check: &'static str, found: impl Into<String>, advice: impl Into<String>) {
        self.add(Level::Fail, check, found.into(), Some(advice.into()));
    }
}

/// The worst of them.
pub fn worst(findings: &[Finding]) -> Level {
    findings.iter().map(|finding| finding.level).max().unwrap_or(Level::Ok)
}

/// As JSON: `{"verdict": "ok" | "warn" | "fail", "findings": [...]}`.
pub fn print_json(findings: &[Finding], out: &mut dyn Write) -> Result<(), Failure> {
    let answer = serde_json::json!({ "verdict": worst(findings), "findings": findings });
    let text =
        serde_json::to_string_pretty(&answer).map_err(|error| Failure::new(failure::SOFTWARE, error))?;
    writeln!(out, "{text}").map_err(failure::stdout)
}

/// As a table for each subject, advice below what needs it.
pub fn print_table(findings: &[Finding], out: &mut dyn Write) -> Result<(), Failure> {
    let width = findings.iter().map(|finding| finding.check.len()).max().unwrap_or_default();
    let mut text = String::new();
    let mut subject = "";
    for finding in findings {
        if finding.subject != subject {
            if !subject.is_empty() {
                text.push('\n');
            }
            subject = &finding.subject;
            text.push_str(&printable(subject));
            text.push('\n');
        }
        let level = match finding.level {
            Level::Ok => "OK  ",
            Level::Warn => "WARN",
            Level::Fail => "FAIL",
        };
        text.push_str(&format!("  {level}  {:width$}  {}\n", finding.check, printable(&finding.found)));
        if let Some(advice) = &finding.advice {
            text.push_str(&format!("        {:width$}  -> {}\n", "", printable(advice)));
        }
    }
    out.write_all(text.as_bytes()).map_err(failure::stdout)
}
