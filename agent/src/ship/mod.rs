//! Streams records and snapshots to followers, and follows an upstream.
pub mod engine;
