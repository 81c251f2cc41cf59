//! `litefs agent`.

use super::failure::{self, Failure};
use super::logging;
use crate::config::{Config, Source};

pub fn run(source: &Source) -> Result<u8, Failure> {
    let config = Config::load(source).map_err(|error| Failure::new(failure::CONFIG, error))?;
    logging::init(config.log_output).map_err(|error| Failure::new(failure::SOFTWARE, error))?;
    match crate::node::run(config) {
        Ok(()) => Ok(0),
        Err(error) => Err(Failure::new(failure::SOFTWARE, one_line(&error))),
    }
}

/// An error with its causes, without those that it already names.
fn one_line(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |line, cause| {
        let cause = cause.to_string();
        match line.as_str() {
            "" => cause,
            known if known.contains(&cause) => line,
            _ => format!("{line}: {cause}"),
        }
    })
}
