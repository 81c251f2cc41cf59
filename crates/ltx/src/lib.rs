//! LTX, the transaction file format of LiteFS and Litestream.
//!
//! One LTX file holds the pages that one transaction (or a run of transactions) left behind, the size of the database
//! after it, and the rolling checksum of the database before and after it. A file whose first transaction is 1 is a
//! *snapshot*: it holds every page.
//!
//! [`Encoder`] writes the current format only. [`Decoder`] reads that one and the older ones, see [`Format`].
//! [`compact`] makes one file of several that follow each other.
//!
//! Layout of the current format (all integers big-endian unless said):
//!
//! ```text
//! header     100 bytes                                       see Header
//! page       u32 page number, u16 flags (1 = a size follows), u32 size, LZ4 block of that size     any number of these
//! end        6 zero bytes
//! index      { uvarint page number, uvarint offset in the file, uvarint length of the page record } per page, then
//!            uvarint 0, then u64 length of all that
//! trailer    u64 rolling checksum after the transaction, u64 checksum of the file
//! ```
//!
//! The checksum of the file is taken over the *uncompressed* pages, so a changed bit in an LZ4 block is an error unless
//! the block still unpacks to the same page.

mod checksum;
mod compact;
mod decode;
mod encode;
mod error;
mod header;
mod index;
mod pages;
mod position;
mod source;

pub use checksum::{is_page_size, lock_page, page_checksum};
pub use compact::compact;
pub use decode::{Decoder, Format};
pub use encode::{Encoder, EncoderBuffers};
pub use error::Error;
pub use header::{FLAG_LZ4_FRAME, FLAG_NO_CHECKSUM, HEADER_SIZE, Header, Owner, TRAILER_SIZE, Trailer};
pub use position::{Checksum, Pos, Txid};

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;
