//! `litefs agent`.

use super::failure::{self, Failure};
use super::logging;
use crate::config::{Config, Source};

pub fn run(source: &Source) -> Result<u8, Failure> {
    let config = Config::load(source).map_err(|error| Failure::new(failure::CONFIG, error))?;
    logging::init(config.log_output).map_err(|error| Failure::new(failure::SOFTWARE, error))?;
    match crate::node::run(config) {
        Ok(()) => Ok(0),
        Err(error) => Err(Failure::new(failure::SOFTWARE, format_args!("{error:#}"))),
    }
}
