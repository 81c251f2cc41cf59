//! The static lease: the configuration says who the primary is, and only an operator changes it.

use super::{Claim, Gift, Lease, LeaseError, Outcome, Peer, Record, Standing, Term, View};
use crate::ship::engine::Epoch;
use futures_util::future::BoxFuture;
use tokio::sync::watch;

/// The one session there is.
const SESSION: &str = "configuration";

/// What the configuration says, as a lease that never ends.
#[derive(Debug)]
pub struct StaticLease {
    own: Peer,
    /// Counts configurations; the address of the node to follow, unless it is this one.
    configured: watch::Sender<(u64, Option<String>)>,
}

impl StaticLease {
    /// `primary_url`: whom `own` follows; `None`: it is the primary.
    pub fn new(own: Peer, primary_url: Option<String>) -> Self {
        StaticLease { own, configured: watch::Sender::new((1, primary_url)) }
    }

    /// The configuration says something else now.
    pub fn configure(&self, primary_url: Option<String>) {
        self.configured.send_if_modified(|(version, known)| {
            let changed = *known != primary_url;
            *version += u64::from(changed);
            *known = primary_url;
            changed
        });
    }

    fn seen(&self) -> View {
        let (version, primary_url) = self.configured.borrow().clone();
        let session = primary_url.is_none().then(|| SESSION.to_owned());
        let holder = match primary_url {
            None => self.own.clone(),
            Some(url) => Peer { node_id: 0, name: String::new(), url },
        };
        // Each term of this host begins with its start, or with the configuration that makes it primary.
        let term = Term {
            holder,
            epoch: Epoch(0),
            standing: Standing::default(),
            released: false,
            beat: 0,
            sync: Vec::new(),
        };
        let record = Record { version, taken: 0, session: Some(SESSION.to_owned()), term: Some(term) };
        View { index: version, resets: 0, record, members: Vec::new(), session }
    }

    fn held(&self) -> Outcome {
        let (version, primary_url) = &*self.configured.borrow();
        primary_url.is_none().then_some(*version)
    }
}

fn refused<'a>() -> BoxFuture<'a, Result<Outcome, LeaseError>> {
    let why = "the lease is static: change [lease] role in the configuration of both hosts, and reload";
    Box::pin(async move { Err(LeaseError(why.to_owned())) })
}

impl Lease for StaticLease {
    fn view(&self, after: Option<u64>) -> BoxFuture<'_, Result<View, LeaseError>> {
        Box::pin(async move {
            let mut configured = self.configured.subscribe();
            let changed = configured.wait_for(|(version, _)| after != Some(*version)).await;
            changed.map_err(|e| LeaseError(e.to_string()))?;
            Ok(self.seen())
        })
    }

    fn claim(&self, _: Claim) -> BoxFuture<'_, Result<Outcome, LeaseError>> {
        refused()
    }

    fn renew(&self, _: u64, _: Term) -> BoxFuture<'_, Result<Outcome, LeaseError>> {
        Box::pin(async move { Ok(self.held()) })
    }

    fn give(&self, _: Gift) -> BoxFuture<'_, Result<Outcome, LeaseError>> {
        refused()
    }

    fn release(&self, _: u64, _: Term) -> BoxFuture<'_, Result<Outcome, LeaseError>> {
        Box::pin(async move { Ok(self.held()) })
    }

    fn leave(&self) -> BoxFuture<'_, Result<(), LeaseError>> {
        Box::pin(async { Ok(()) })
    }
}
