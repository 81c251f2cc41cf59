//! Halt locks for programs that open `NAME-lock`.

use super::Node;
use crate::database::Database;
use crate::door::lock_file::{HaltLocks, Opener, Told};
use crate::lease::clock;
use crate::status::ViewError;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::runtime::Handle;

/// Between looks whether somebody who waits has given up.
const LOOK: Duration = Duration::from_millis(50);

/// The node, as its door gets locks from it.
#[derive(Debug)]
pub(super) struct LockFiles {
    node: Weak<Node>,
    runtime: Handle,
}

impl LockFiles {
    /// Of a node whose runtime this is called on.
    pub fn of(node: &Arc<Node>) -> LockFiles {
        LockFiles { node: Arc::downgrade(node), runtime: Handle::current() }
    }
}

/// What opening the file says.
fn errno_of(error: &ViewError, waited: Duration) -> i32 {
    match error {
        ViewError::NoSuchDatabase(_) => libc::ENOENT,
        _ if waited >= super::halt::ACQUIRE => libc::ETIMEDOUT,
        _ => libc::ENOLCK,
    }
}

impl HaltLocks for LockFiles {
    fn acquire(&self, db: Arc<Database>, opener: Opener, told: Told) {
        let Some(node) = self.node.upgrade() else { return told(Err(libc::ENOLCK)) };
        self.runtime.spawn(async move {
            let (begun, pid, name) = (clock::now(), opener.pid, db.name());
            let given_up = async {
                while !(opener.has_given_up)() {
                    tokio::time::sleep(LOOK).await;
                }
            };
            let got = tokio::select! {
                got = node.clone().halt(name.clone()) => got,
                () = given_up => return told(Err(libc::EINTR)),
                () = opener.closed.cancelled() => return told(Err(libc::EINTR)),
                () = node.halt_locks.stop.cancelled() => {
                    Err(ViewError::HaltLock("this agent stops".into()))
                }
            };
            let lock = match got {
                Ok(lock) => lock,
                Err(error) => {
                    let waited = clock::now() - begun;
                    tracing::warn!(database = %name, pid, %error, ?waited, "a program that opened the lock file gets no halt lock");
                    return told(Err(errno_of(&error, waited)));
                }
            };
            tracing::debug!(database = %name, pid, "a program that opened the lock file has the halt lock");
            told(Ok(()));
            tokio::select! {
                // What it commits from now on is refused; others on this host need not wait for it to close the file.
                why = lock.lost() => {
                    tracing::warn!(database = %name, pid, why, "a program that has the lock file open has lost the halt lock");
                }
                () = opener.closed.cancelled() => {}
            }
            lock.release().await;
        });
    }
}
