//! Renaming files of databases.

use crate::managed::Managed;
use crate::table::{self, Kind};
use crate::{agent, process, sys};
use shim_protocol::Op;

/// `rename`: nothing of a database moves on a replica, and no database that somebody has open.
#[cold]
pub fn rename(from: Option<Managed>, to: Option<Managed>, real: &dyn Fn() -> i32) -> i32 {
    if !process::is_own() {
        return real();
    }
    for managed in [&from, &to].into_iter().flatten() {
        if let Err(error) = may_move(managed) {
            return sys::fail(error);
        }
    }
    let result = real();
    if result == 0 {
        let error = sys::errno();
        // Should this fail, the agent finds out by itself.
        for (managed, op) in [(from, Op::Dropped), (to, Op::Moved)] {
            if let Some((Kind::Database, database)) = managed.and_then(|m| table::database(&m).ok()) {
                let _ = agent::ask(database, op, 0, &[], process::wait_ms());
                table::release(database);
            }
        }
        sys::set_errno(error);
    }
    result
}

fn may_move(managed: &Managed) -> Result<(), i32> {
    let (kind, database) = match table::database(managed) {
        Ok(found) => found,
        Err(0) => return Ok(()),
        Err(error) => return Err(error),
    };
    let may = match agent::attach(database, process::wait_ms()) {
        Ok(true) if !agent::may_write(database.cluster()) => Err(libc::EROFS),
        Ok(true) if kind == Kind::Database && database.is_open() => Err(libc::EBUSY),
        Ok(true) if kind == Kind::Database => agent::ask(database, Op::Move, 0, &[], process::wait_ms()),
        Ok(_) => Ok(()),
        Err(_) => Err(libc::EIO),
    };
    table::release(database);
    may
}
