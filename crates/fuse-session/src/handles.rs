//! What the next server of a mount must know of the files that are open: a table in anonymous memory that the kernel
//! keeps as long as anybody has its descriptor, so that it survives its writer's SIGKILL.
//!
//! Layout (native integers; it never leaves the host): a header page, then slots of 64 bytes. The header has the magic with
//! the layout's version, how many slots were ever used, the last handle's sequence number, and the kernel's INIT request as
//! it was. A slot is in use while its flags are not 0; they are stored last and cleared first.

use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

const MAGIC: u64 = u64::from_le_bytes(*b"LFSMNT01");
const HEADER_BYTES: usize = 4096;
const SLOT_BYTES: usize = 64;
/// Bits of a handle's number that name its slot: a million open files.
const INDEX_BITS: u32 = 20;
const SLOTS: usize = 1 << INDEX_BITS;
const TABLE_BYTES: usize = HEADER_BYTES + SLOTS * SLOT_BYTES;
/// Room for the INIT request (FUSE protocol 7.x: 104 bytes).
const INIT_BYTES_MAX: usize = 1024;
const INIT_AT: usize = 1024;

/// An open file, as far as another process has to know it. What the flags mean is the file system's business, except that
/// 0 stands for a free slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenHandle {
    /// Number of its inode.
    pub inode: u64,
    /// The kernel's number of the request that opened it, without the bit for a request that is sent again.
    pub request: u64,
    /// Id of the registered backing file, 0 for none.
    pub backing: u32,
    /// How it is open. Not 0.
    pub flags: u32,
}

/// The table.
#[derive(Debug)]
pub struct HandleTable {
    memory: OwnedFd,
    map: NonNull<libc::c_void>,
    free: Mutex<BTreeSet<u32>>,
}

// SAFETY: the mapping lives as long as the table, and is only accessed through atomics.
unsafe impl Send for HandleTable {}
// SAFETY: as above.
unsafe impl Sync for HandleTable {}

#[repr(C)]
struct Header {
    magic: AtomicU64,
    used: AtomicU32,
    init_bytes: AtomicU32,
    sequence: AtomicU64,
    resumable: AtomicU32,
}

#[repr(C)]
struct Slot {
    flags: AtomicU32,
    backing: AtomicU32,
    number: AtomicU64,
    inode: AtomicU64,
    request: AtomicU64,
}

impl HandleTable {
    /// An empty table.
    pub fn new() -> io::Result<HandleTable> {
        let memory = memfd_create(c"litefs-handles", MFdFlags::MFD_CLOEXEC)?;
        File::from(memory.try_clone()?).set_len(TABLE_BYTES as u64)?;
        let table = Self::map(memory)?;
        table.header().magic.store(MAGIC, Ordering::Release);
        Ok(table)
    }

    /// The table of another process. It is refused if that had another layout.
    pub fn open(memory: OwnedFd) -> io::Result<HandleTable> {
        let len = File::from(memory.try_clone()?).metadata()?.len();
        if len != TABLE_BYTES as u64 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the table of handles has another size"));
        }
        let table = Self::map(memory)?;
        if table.header().magic.load(Ordering::Acquire) != MAGIC {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the table of handles has another layout",
            ));
        }
        let used = table.header().used.load(Ordering::Acquire).min(SLOTS as u32);
        let free = (0..used).filter(|i| table.slot(*i).flags.load(Ordering::Acquire) == 0).collect();
        *table.free.lock().unwrap_or_else(PoisonError::into_inner) = free;
        Ok(table)
    }

    fn map(memory: OwnedFd) -> io::Result<HandleTable> {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap};
        let Some(len) = NonZeroUsize::new(TABLE_BYTES) else { unreachable!("the table has a size") };
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping of a file of that length, which nobody cuts: its descriptor is ours or sealed with those
        // who serve the mount.
        let map = unsafe { mmap(None, len, access, MapFlags::MAP_SHARED, &memory, 0) }?;
        Ok(HandleTable { memory, map, free: Mutex::default() })
    }

    fn header(&self) -> &Header {
        // SAFETY: the mapping begins with a header page; all fields are atomics, for which every content is valid.
        unsafe { &*self.map.as_ptr().cast::<Header>() }
    }

    fn slot(&self, index: u32) -> &Slot {
        assert!((index as usize) < SLOTS, "slot {index} is not in the table");
        // SAFETY: within the mapping, by the assertion; all fields are atomics.
        unsafe {
            &*self.map.as_ptr().cast::<u8>().add(HEADER_BYTES + index as usize * SLOT_BYTES).cast::<Slot>()
        }
    }

    /// Keeps an open handle. Gives its number, which is never used again; `None` when the table is full.
    pub fn add(&self, handle: OpenHandle) -> Option<u64> {
        assert_ne!(handle.flags, 0, "a handle without flags is none");
        let header = self.header();
        let index = {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            match free.pop_first() {
                Some(index) => index,
                None => {
                    let used = header.used.load(Ordering::Relaxed);
                    if used as usize == SLOTS {
                        return None;
                    }
                    header.used.store(used + 1, Ordering::Release);
                    used
                }
            }
        };
        let sequence = header.sequence.fetch_add(1, Ordering::AcqRel) + 1;
        let number = sequence << INDEX_BITS | u64::from(index);
        let slot = self.slot(index);
        slot.number.store(number, Ordering::Relaxed);
        slot.inode.store(handle.inode, Ordering::Relaxed);
        slot.request.store(handle.request, Ordering::Relaxed);
        slot.backing.store(handle.backing, Ordering::Relaxed);
        slot.flags.store(handle.flags, Ordering::Release);
        Some(number)
    }

    /// A number that no handle of this connection has, for something that is open and needs no slot.
    pub fn next_number(&self) -> u64 {
        self.header().sequence.fetch_add(1, Ordering::AcqRel) + 1
    }

    fn slot_of(&self, number: u64) -> Option<(u32, &Slot)> {
        let index = (number & (SLOTS as u64 - 1)) as u32;
        let slot = self.slot(index);
        let there = slot.flags.load(Ordering::Acquire) != 0 && slot.number.load(Ordering::Relaxed) == number;
        there.then_some((index, slot))
    }

    /// Forgets a handle; all right if it is not there.
    pub fn remove(&self, number: u64) {
        if let Some((index, slot)) = self.slot_of(number) {
            slot.flags.store(0, Ordering::Release);
            self.free.lock().unwrap_or_else(PoisonError::into_inner).insert(index);
        }
    }

    /// Sets flags of a handle.
    pub fn set_flags(&self, number: u64, flags: u32) {
        if let Some((_, slot)) = self.slot_of(number) {
            slot.flags.fetch_or(flags, Ordering::AcqRel);
        }
    }

    /// Clears flags of a handle. At least one must be left.
    pub fn clear_flags(&self, number: u64, flags: u32) {
        if let Some((_, slot)) = self.slot_of(number) {
            slot.flags.fetch_and(!flags, Ordering::AcqRel);
        }
    }

    /// The handle that a request opened.
    pub fn opened_by(&self, request: u64) -> Option<u64> {
        self.all().into_iter().find(|(_, handle)| handle.request == request).map(|(number, _)| number)
    }

    /// All handles, by number.
    pub fn all(&self) -> Vec<(u64, OpenHandle)> {
        let used = self.header().used.load(Ordering::Acquire).min(SLOTS as u32);
        let slots = (0..used).map(|index| self.slot(index));
        slots
            .filter_map(|slot| {
                let flags = slot.flags.load(Ordering::Acquire);
                (flags != 0).then(|| {
                    let handle = OpenHandle {
                        inode: slot.inode.load(Ordering::Relaxed),
                        request: slot.request.load(Ordering::Relaxed),
                        backing: slot.backing.load(Ordering::Relaxed),
                        flags,
                    };
                    (slot.number.load(Ordering::Relaxed), handle)
                })
            })
            .collect()
    }

    /// Keeps the kernel's INIT request, and whether another process can go on with the connection.
    pub(crate) fn keep_init(&self, request: &[u8], resumable: bool) -> io::Result<()> {
        if request.len() > INIT_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel's INIT request is too long"));
        }
        nix::sys::uio::pwrite(&self.memory, request, INIT_AT as i64)?;
        self.header().init_bytes.store(request.len() as u32, Ordering::Release);
        self.header().resumable.store(u32::from(resumable), Ordering::Release);
        Ok(())
    }

    /// The kernel's INIT request.
    pub(crate) fn init(&self) -> io::Result<Vec<u8>> {
        let mut request = vec![0; self.header().init_bytes.load(Ordering::Acquire) as usize];
        if request.is_empty() || request.len() > INIT_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the mount was never served"));
        }
        nix::sys::uio::pread(&self.memory, &mut request, INIT_AT as i64)?;
        Ok(request)
    }

    /// Whether the kernel sends unanswered requests again, so that another process can go on.
    pub fn is_resumable(&self) -> bool {
        self.header().resumable.load(Ordering::Acquire) != 0
    }
}

impl AsFd for HandleTable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }
}

impl Drop for HandleTable {
    fn drop(&mut self) {
        // SAFETY: the mapping was made with this length and nothing borrows from it any more.
        let _ = unsafe { nix::sys::mman::munmap(self.map, TABLE_BYTES) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handle(inode: u64) -> OpenHandle {
        OpenHandle { inode, request: inode * 2, backing: 3, flags: 1 }
    }

    #[test]
    fn another_process_sees_what_is_open() {
        let table = HandleTable::new().unwrap();
        let numbers: Vec<u64> = (1..=3).map(|inode| table.add(handle(inode)).unwrap()).collect();
        table.remove(numbers[1]);
        table.set_flags(numbers[2], 8);
        table.keep_init(b"hello", true).unwrap();
        let other = HandleTable::open(table.as_fd().try_clone_to_owned().unwrap()).unwrap();
        let expected = vec![(numbers[0], handle(1)), (numbers[2], OpenHandle { flags: 9, ..handle(3) })];
        assert_eq!(other.all(), expected);
        assert_eq!(other.opened_by(6), Some(numbers[2]));
        assert_eq!((other.init().unwrap(), other.is_resumable()), (b"hello".to_vec(), true));
        // The free slot is used again, under another number.
        let again = other.add(handle(9)).unwrap();
        assert!(!numbers.contains(&again));
        table.remove(numbers[1]);
        assert_eq!(table.all().len(), 3);
    }

    #[test]
    fn something_else_is_refused() {
        let memory = memfd_create(c"other", MFdFlags::MFD_CLOEXEC).unwrap();
        assert!(HandleTable::open(memory.try_clone().unwrap()).is_err());
        File::from(memory.try_clone().unwrap()).set_len(TABLE_BYTES as u64).unwrap();
        assert!(HandleTable::open(memory).is_err());
    }
}
