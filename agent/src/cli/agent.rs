//! `litefs agent`.

use super::failure::{self, Failure};
use super::logging;
use crate::config::{Config, Source};

pub fn run(source: &Source) -> Result<u8, Failure> {
    let config = Config::load(source).map_err(|error| Failure::new(failure::CONFIG, error))?;
    give_large_buffers_back();
    logging::init(config.log_output).map_err(|error| Failure::new(failure::SOFTWARE, error))?;
    match crate::node::run(config) {
        Ok(()) => Ok(0),
        Err(error) => Err(Failure::new(failure::SOFTWARE, one_line(&error))),
    }
}

/// Buffers of snapshots and imports go back to the kernel once they are freed. By itself glibc raises the size from which
/// they do (mallopt(3), `M_MMAP_THRESHOLD`), and keeps some ten MiB for good.
fn give_large_buffers_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt() takes two numbers; it is called before there are other threads.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 * 1024);
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
