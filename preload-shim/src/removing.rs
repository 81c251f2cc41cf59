//! Removing files: of a database's journal that is a commit, of a super-journal one of several databases, of a WAL its end,
//! of a database a drop.

use crate::managed::Managed;
use crate::table::{self, Kind};
use crate::{agent, process, rollback, sys, wal};
use shim_protocol::Op;

/// `unlink`.
#[cold]
pub fn unlink(managed: &Managed, real: &dyn Fn() -> i32) -> i32 {
    if !process::is_own() {
        return real();
    }
    if table::is_super_journal(managed.name.bytes()) {
        return match rollback::super_journal_ends(managed) {
            Ok(()) => real(),
            Err(error) => sys::fail(error),
        };
    }
    let (kind, database) = match table::database(managed) {
        Ok(found) => found,
        Err(0) => return real(),
        Err(error) => return sys::fail(error),
    };
    let allowed = match kind {
        Kind::Journal => rollback::journal_ends(database),
        // What is in it was taken over when EXCLUSIVE was granted; now the agent only hears that it goes.
        Kind::Wal => {
            let _ = wal::ends(database);
            Ok(())
        }
        Kind::Database => {
            if agent::attach(database, process::wait_ms()).is_ok_and(|yes| yes)
                && !agent::may_write(database.cluster())
            {
                Err(libc::EROFS)
            } else {
                agent::ask(database, Op::Drop, 0, &[], process::wait_ms())
            }
        }
        Kind::Shm => Ok(()),
    };
    let result = match allowed {
        Ok(()) => real(),
        Err(error) => sys::fail(error),
    };
    let error = sys::errno();
    if kind == Kind::Database && result == 0 {
        // Should this fail, the agent finds out by itself.
        let _ = agent::ask(database, Op::Dropped, 0, &[], process::wait_ms());
    }
    table::release(database);
    sys::set_errno(error);
    result
}
