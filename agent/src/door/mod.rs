//! How applications reach their databases: by a FUSE mount, or by a plain directory with a preloaded library.

pub mod fuse;
pub mod lock_file;
pub mod preload;

use fuse::NameInvalidator;
use fuse_session::{MountError, Mounter};
use std::sync::Arc;

/// The open door.
#[derive(Debug)]
pub enum Door {
    /// A FUSE mount.
    Fuse(fuse::Door),
    /// A plain directory.
    Preload(preload::Door),
}

impl Door {
    /// As the configuration calls it.
    pub fn kind(&self) -> &'static str {
        match self {
            Door::Fuse(_) => "fuse",
            Door::Preload(_) => "preload",
        }
    }

    /// Whether database files are read and written without this process.
    pub fn passes_through(&self) -> bool {
        match self {
            Door::Fuse(door) => door.passes_through(),
            Door::Preload(_) => true,
        }
    }

    /// Something that makes a kernel forget names, where one keeps them.
    pub fn invalidator(&self) -> Option<Arc<dyn NameInvalidator>> {
        match self {
            Door::Fuse(door) => Some(door.invalidator()),
            Door::Preload(_) => None,
        }
    }

    /// Whether it was closed from outside.
    pub fn is_gone(&self) -> bool {
        match self {
            Door::Fuse(door) => door.is_gone(),
            Door::Preload(_) => false,
        }
    }

    /// Closes it.
    pub fn close(self) -> Result<(), MountError> {
        match self {
            Door::Fuse(door) => door.close(),
            Door::Preload(door) => {
                door.close();
                Ok(())
            }
        }
    }
}

/// Whether FUSE can be used here.
pub fn has_fuse(mounter: &Mounter) -> Result<bool, MountError> {
    match mounter.open_device() {
        Ok(_) => Ok(true),
        Err(MountError::Device(_)) => Ok(false),
        Err(error) => Err(error),
    }
}
