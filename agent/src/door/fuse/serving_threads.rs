//! The threads that serve the mount: how many there are, and on which CPUs.

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How many threads serve the mount, and where.
#[derive(Debug)]
pub struct Threads {
    /// How many.
    pub count: usize,
    /// Each stays on a CPU of its own. The kernel wakes them in turn; one that runs where the application does takes
    /// the request without waking another CPU, which in a virtual machine costs more than the request itself.
    pinned: bool,
    /// Those that have found their CPU.
    settled: AtomicUsize,
}

impl Threads {
    /// On one or two CPUs a pinned thread for each; otherwise four, wherever the scheduler puts them.
    pub fn choose(wanted: Option<usize>) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let count = wanted.unwrap_or(if cpus <= 2 { cpus } else { 4 });
        Threads { count, pinned: count == cpus && cpus <= 2, settled: AtomicUsize::new(0) }
    }

    /// Puts a serving thread on its CPU at its first request.
    pub fn settle(&self) {
        thread_local!(static SETTLED: Cell<bool> = const { Cell::new(false) });
        if !self.pinned || SETTLED.replace(true) {
            return;
        }
        let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap_or_default();
        let cpus: Vec<usize> =
            (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false)).collect();
        let mut own = CpuSet::new();
        if let Some(cpu) = cpus.get(self.settled.fetch_add(1, Ordering::Relaxed) % cpus.len().max(1))
            && own.set(*cpu).is_ok()
            && let Err(error) = sched_setaffinity(Pid::from_raw(0), &own)
        {
            tracing::debug!(%error, cpu, "a thread of the mount stays unpinned");
        }
    }
}
