//! How applications reach their databases. Today by FUSE; the preload door comes beside it.

pub mod fuse;
