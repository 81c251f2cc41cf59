//! A lock that can be held across a fork of another thread, and that knows when its own thread comes back (a signal
//! handler inside a call).

use crate::sys;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Guards a value.
pub struct Lock<T> {
    /// Thread that holds it, by the address of its control block, which costs no system call; 0: nobody.
    owner: AtomicU64,
    value: UnsafeCell<T>,
}

// SAFETY: the value is reached by one thread at a time.
unsafe impl<T: Send> Sync for Lock<T> {}

fn first_half(word: u64) -> [u8; 4] {
    let bytes = word.to_ne_bytes();
    [bytes[0], bytes[1], bytes[2], bytes[3]]
}

/// The value, locked.
pub struct Guard<'l, T>(&'l Lock<T>);

impl<T> Lock<T> {
    pub const fn new(value: T) -> Self {
        Lock { owner: AtomicU64::new(0), value: UnsafeCell::new(value) }
    }

    /// Waits for the lock. `None`: this thread has it already.
    pub fn lock(&self) -> Option<Guard<'_, T>> {
        let own = sys::thread();
        let mut spins = 0;
        loop {
            match self.owner.compare_exchange(0, own, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(Guard(self)),
                Err(holder) if holder == own => return None,
                Err(holder) => {
                    spins += 1;
                    if spins > 100 {
                        // SAFETY: the first half of the word, which lives as long as the lock.
                        let half = unsafe { &*self.owner.as_ptr().cast::<AtomicU32>() };
                        // A futex is one half; whoever finds it changed looks again.
                        sys::futex_wait(half, u32::from_ne_bytes(first_half(holder)), 1);
                    } else {
                        core::hint::spin_loop();
                    }
                }
            }
        }
    }

    /// In the child of a fork nobody else is there to give it back.
    pub fn forget_holder(&self) {
        self.owner.store(0, Ordering::Release);
    }
}

impl<T> core::ops::Deref for Guard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: this thread holds the lock.
        unsafe { &*self.0.value.get() }
    }
}

impl<T> core::ops::DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: this thread holds the lock.
        unsafe { &mut *self.0.value.get() }
    }
}

impl<T> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        // Whoever waits looks again within a millisecond.
        self.0.owner.store(0, Ordering::Release);
    }
}
