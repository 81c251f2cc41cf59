//! What the machine is told.

use crate::lease::election::Answer;
use crate::lease::{Outcome, Time, View};
use crate::ship::engine::Epoch;
use crate::sync::quorum::Promise;

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The lease was read.
    Seen(View),
    /// The lease could not be read.
    Unseen,
    /// A claim ended. `sent`: when it was sent.
    Claimed {
        /// Its term: an answer that comes late is no answer to a later question.
        epoch: Epoch,
        /// When it was sent.
        sent: Time,
        /// `None`: no answer.
        outcome: Option<Outcome>,
    },
    /// A renewal ended.
    Renewed {
        /// Its term: an answer that comes late is no answer to a later question.
        epoch: Epoch,
        /// When it was sent.
        sent: Time,
        /// `None`: no answer.
        outcome: Option<Outcome>,
    },
    /// The candidates that answered, for the question with this number; and this node.
    Heard {
        /// Which question.
        round: u64,
        /// What this node would answer.
        own: Answer,
        /// Those that answered.
        answers: Vec<Answer>,
        /// What this node promises as a primary.
        promises: Vec<Promise>,
    },
    /// The lease is to be given to this node.
    HandOver {
        /// Identity of the successor.
        to: u64,
    },
    /// Writers wait and the successor has everything, or why that could not be brought about.
    Prepared(Result<(), String>),
    /// Giving the lease away ended.
    Given {
        /// `None`: no answer.
        outcome: Option<Outcome>,
    },
    /// The primary that this node has agreed with (see [`super::RoleMachine::prepare`]) gave it the lease.
    Granted {
        /// Version of the record then.
        version: u64,
        /// The new term.
        epoch: Epoch,
    },
    /// This candidate may become primary although it is stale.
    Force,
    /// The node could not do what [`super::Action::Lead`] of this term said, and takes no writes.
    CannotLead {
        /// The term.
        epoch: Epoch,
    },
    /// The agent stops: let go of the lease.
    Stop,
    /// Letting go ended.
    Released,
    /// Time passed.
    Tick,
}
