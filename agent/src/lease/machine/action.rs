//! What the machine says.

use crate::lease::election::Choice;
use crate::lease::{Member, Peer, Time};
use crate::ship::engine::Epoch;

/// What to do. In this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Take writes in this term, once it is stored durably; until then at most. Follow nobody.
    Lead {
        /// The term.
        epoch: Epoch,
        /// When writing has to stop; `None`: never.
        until: Option<Time>,
    },
    /// The time until which writes are taken.
    Extend {
        /// When writing has to stop.
        until: Option<Time>,
    },
    /// Take no writes, now.
    StopWrites,
    /// Follow this node, or nobody.
    Follow(Option<Peer>),
    /// There is no primary. Get from this node what this candidate lacks; it is no primary either.
    CatchUp(Peer),
    /// The record is not what was seen: read it again.
    Read,
    /// Ask these how far they are; ends with [`super::Event::Heard`].
    Ask {
        /// Number of the question.
        round: u64,
        /// Whom.
        peers: Vec<Peer>,
    },
    /// [`crate::lease::Lease::claim`].
    Claim {
        /// Version of the record that this was decided on.
        version: u64,
        /// Session to take it from.
        from: Option<String>,
        /// The new term.
        epoch: Epoch,
    },
    /// [`crate::lease::Lease::renew`].
    Renew {
        /// Version of the record that this was decided on.
        version: u64,
        /// The term.
        epoch: Epoch,
    },
    /// Make writers wait and bring the successor to where this node is; ends with [`super::Event::Prepared`].
    Prepare {
        /// The successor.
        to: Member,
    },
    /// The handoff does not take place: writers go on.
    LetWritersGoOn,
    /// [`crate::lease::Lease::give`], then tell the successor.
    Give {
        /// Version of the record that this was decided on.
        version: u64,
        /// The successor.
        to: Member,
        /// Its term.
        epoch: Epoch,
    },
    /// [`crate::lease::Lease::release`].
    Release {
        /// Version of the record that this was decided on.
        version: u64,
        /// The term that ends.
        epoch: Epoch,
    },
    /// The handoff that was asked for has ended; why it failed, when it did.
    HandedOver(Result<(), String>),
    /// Why this candidate does not stand.
    Waits(Choice),
    /// It need not: the node goes on following whom it followed.
    WaitsNoMore,
    /// This node has let go of the lease.
    Stopped,
}
