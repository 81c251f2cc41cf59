//! Who may write: the lease, and the role that follows from it.
//!
//! ```text
//!   Lease (static | consul)  --view-->  RoleMachine  --actions-->  node/role   (stops writes, follows, asks peers)
//!            ^                              |
//!            +----- claim, renew, give -----+
//! ```
//!
//! A [`Lease`] is one record that all nodes see: in whose name it is, in which epoch, and how far that node was. The
//! [`machine`] decides from it, without a clock or a socket of its own, so that it can be simulated. The node executes
//! what it decides and publishes one value, the node's role, which everything else reads.
//!
//! Rules that keep two nodes from writing at once:
//!
//! - Every change of the record names the version it was decided on, and all but a claim prove that the record is still in
//!   this node's name. What was decided on something old, or arrives late, changes nothing.
//! - A primary writes until [`Timing::fence`] after it *sent* its last renewal that succeeded. Others count
//!   [`Timing::ttl`] from when they *saw* a renewal, which is later, and the fence is shorter than the TTL. So clocks may
//!   differ in rate by what lies between the two.
//! - The epoch grows with each term, and nothing is written in it before it is durable here and in the record.

pub mod clock;
pub mod consul;
pub mod election;
pub mod fixed;
pub mod machine;
pub mod peers;

use crate::ship::engine::Epoch;
use crate::sync::quorum::Promise;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use std::time::Duration;

pub use election::{Answer, Standing};
pub use machine::{Action, Event, RoleMachine, Timing};

/// Time since some fixed moment, by a clock that never goes back and does not stop while the host sleeps.
pub type Time = Duration;

/// A node, as others reach it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its identity; 0 when only its address is known.
    #[serde(with = "hex_id")]
    pub node_id: u64,
    /// Its name, for people; may be empty.
    pub name: String,
    /// Address of its port.
    pub url: String,
}

/// What is written into the lease by the node in whose name it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Term {
    /// Who it is.
    #[serde(flatten)]
    pub holder: Peer,
    /// Number of the term.
    pub epoch: Epoch,
    /// How far the holder was when it wrote this.
    #[serde(flatten)]
    pub standing: Standing,
    /// The holder has stopped writing and let go: nobody needs to wait for the TTL.
    #[serde(default)]
    pub released: bool,
    /// Another one with each renewal.
    #[serde(default)]
    pub beat: u64,
    /// What it promises of commits; the next holder has to have what was acknowledged under it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sync: Vec<Promise>,
}

/// The lease as it was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Grows with every change of the record.
    pub version: u64,
    /// How often the lease has been taken, where the store counts that.
    pub taken: u64,
    /// Session that holds it now.
    pub session: Option<String>,
    /// What its last holder wrote.
    pub term: Option<Term>,
}

/// A node that takes part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Who it is.
    pub peer: Peer,
    /// Whether it may become primary.
    pub candidate: bool,
    /// Its session.
    pub session: String,
}

/// Everything that a node sees of the lease.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// To wait for the next one.
    pub index: u64,
    /// How often the store has lost what it had: versions begin anew then.
    pub resets: u64,
    /// The lease.
    pub record: Record,
    /// Nodes whose sessions are alive.
    pub members: Vec<Member>,
    /// This node's session, while it has one.
    pub session: Option<String>,
}

/// A change of the lease was made, and gave the record this version; or the record was not as it should be, and
/// nothing was changed.
pub type Outcome = Option<u64>;

/// Why the lease could not be asked. The question may nevertheless have had its effect.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct LeaseError(pub String);

/// Taking the lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Version of the record that the claim was decided on; 0: there is none.
    pub version: u64,
    /// Session of a holder whose time is over.
    pub from: Option<String>,
    /// What is written.
    pub term: Term,
}

/// Giving the lease to another node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gift {
    /// Version of the record.
    pub version: u64,
    /// Session of the new holder.
    pub session: String,
    /// The new term.
    pub term: Term,
}

/// A record that all nodes see and of which one is the holder. Every call ends within a bounded time, but for
/// [`Lease::view`], which waits for a change.
pub trait Lease: Send + Sync + 'static {
    /// What it is now; with the index of an earlier view: as soon as something differs from it.
    fn view(&self, after: Option<u64>) -> BoxFuture<'_, Result<View, LeaseError>>;
    /// Takes it.
    fn claim(&self, claim: Claim) -> BoxFuture<'_, Result<Outcome, LeaseError>>;
    /// Says that the holder is alive, if it is still this node.
    ///
    /// Like every change, only if the record has this version still: one that arrives late must change nothing.
    fn renew(&self, version: u64, term: Term) -> BoxFuture<'_, Result<Outcome, LeaseError>>;
    /// Makes another node its holder, if it is this one.
    fn give(&self, gift: Gift) -> BoxFuture<'_, Result<Outcome, LeaseError>>;
    /// Lets go of it, if this node holds it. `term` says `released`.
    fn release(&self, version: u64, term: Term) -> BoxFuture<'_, Result<Outcome, LeaseError>>;
    /// This node will not come back soon: what it has at the store beside the lease may go.
    fn leave(&self) -> BoxFuture<'_, Result<(), LeaseError>>;
}

mod hex_id {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(id: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{id:016x}"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        u64::from_str_radix(&String::deserialize(deserializer)?, 16).map_err(D::Error::custom)
    }
}
