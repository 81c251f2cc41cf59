//! Streams records and snapshots to followers, and follows an upstream. The wire protocol is specified in
//! `docs/replication-protocol.md`.
//!
//! | module     | what it does                                                              |
//! |------------|---------------------------------------------------------------------------|
//! | [`engine`] | what shipping needs from the node: the traits `Source` and `Sink`         |
//! | [`http`]   | the node's HTTP server: sockets, HTTP/1 and 2, routing                    |
//! | [`peer`]   | identity, protocol version and refusals, on every request                 |
//! | [`frame`]  | the frames that streams are made of                                       |
//! | [`halt`]   | halt locks: what nodes ask the primary about them                         |
//! | [`server`] | the side that is followed                                                 |
//! | [`follow`] | the side that follows                                                     |

pub mod body;
pub mod engine;
pub mod follow;
pub mod frame;
pub mod halt;
pub mod http;
pub mod peer;
pub mod server;

#[cfg(test)]
mod tests;

use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// This node's clock: milliseconds since 1970.
pub(crate) fn unix_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64)
}

/// Half to all of `delay`, at random, so that many nodes or databases do not come back at the same moment.
pub(crate) fn jitter(delay: Duration) -> Duration {
    // Every RandomState has other keys; no cryptographic quality is needed.
    let random = RandomState::new().hash_one(0_u8) as u32;
    delay / 2 + delay.mul_f64(f64::from(random) / f64::from(u32::MAX)) / 2
}
