//! The frames that the streams between nodes are made of. `docs/replication-protocol.md` is the specification.

use crate::DatabaseName;
use crate::ship::engine::Epoch;
use crate::ship::peer::RefusalCode;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use crc_fast::{CrcAlgorithm, Digest};
use http_body::Body;
use http_body_util::BodyExt;
use ltx::{Checksum, Pos, Txid};

/// Bytes before a payload: type u8, three zero bytes, payload length u32, CRC-64/GO-ISO u64 (the checksum of the
/// LTX format) over the eight bytes before it and the payload. All integers are big-endian.
pub const HEADER_BYTES: usize = 16;

/// Largest record that travels in one frame; a larger one travels in chunks, from file to file.
pub const INLINE_RECORD_BYTES_MAX: usize = 1 << 20;

/// Largest payload of any frame: a record with the 40 bytes that describe it.
pub const PAYLOAD_BYTES_MAX: usize = INLINE_RECORD_BYTES_MAX + RECORD_HEAD_BYTES;

/// Content of one chunk of a large record, and of one frame of snapshot pages before compression.
pub const CHUNK_BYTES_MAX: usize = 256 << 10;

/// Largest LTX file that is accepted: an insane size is refused before anything is written.
pub const RECORD_BYTES_MAX: u64 = 16 << 40;

/// Longest text in an error frame.
pub const MESSAGE_BYTES_MAX: usize = 4096;

const RECORD_HEAD_BYTES: usize = 40;

/// Page numbers (at most one per 512 bytes) and their count stand before the contents.
const PAGES_RAW_BYTES_MAX: usize = CHUNK_BYTES_MAX + 4 + 4 * (CHUNK_BYTES_MAX / 512);

/// Types from here on are optional: a reader that does not know one skips it.
const OPTIONAL_TYPES: u8 = 0x80;

const HEARTBEAT: u8 = 0x01;
const POSITION: u8 = 0x02;
const UNKNOWN: u8 = 0x03;
const LISTED: u8 = 0x04;
const HOLDS: u8 = 0x05;
const ACK: u8 = 0x06;
const RECORD: u8 = 0x10;
const RECORD_START: u8 = 0x11;
const RECORD_CHUNK: u8 = 0x12;
const SNAPSHOT_BEGIN: u8 = 0x20;
const PAGES: u8 = 0x21;
const SNAPSHOT_END: u8 = 0x22;
const END: u8 = 0x30;
const ERROR: u8 = 0x31;

/// What is wrong with the bytes of a stream. The stream is of no further use after any of these.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The transport failed: the connection broke or the peer reset the stream.
    #[error("the stream was cut: {0}")]
    Cut(String),
    /// The stream ended inside a frame.
    #[error("the stream ended inside a frame ({have} of {need} bytes)")]
    Truncated {
        /// Bytes that came.
        have: usize,
        /// Bytes of the frame.
        need: usize,
    },
    /// The checksum of a frame is wrong.
    #[error("a frame of type {kind:#04x} and {len} bytes is corrupt (checksum mismatch)")]
    Corrupt {
        /// Type byte as received.
        kind: u8,
        /// Payload length as received.
        len: usize,
    },
    /// A length beyond [`PAYLOAD_BYTES_MAX`].
    #[error("a frame of type {kind:#04x} claims {len} bytes, more than {PAYLOAD_BYTES_MAX}")]
    TooLong {
        /// Type byte as received.
        kind: u8,
        /// Payload length as received.
        len: usize,
    },
    /// A frame type that this version does not know and must not skip.
    #[error("a frame of unknown type {0:#04x}")]
    UnknownType(u8),
    /// The payload breaks the rules of its type.
    #[error("a malformed {what} frame: {why}")]
    Malformed {
        /// Kind of frame.
        what: &'static str,
        /// Which rule.
        why: String,
    },
    /// A valid frame that has no place at this point of this stream.
    #[error("a {0} frame is out of place here")]
    OutOfPlace(&'static str),
}

/// Describes a record; its LTX file follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHead {
    /// Epoch it was committed in.
    pub epoch: Epoch,
    /// First transaction.
    pub min_txid: Txid,
    /// Last transaction.
    pub max_txid: Txid,
    /// Checksum of the database after it.
    pub post_apply: Checksum,
    /// Bytes of the LTX file.
    pub size: u64,
}

/// Why a stream ended although nothing is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// Nothing moved for a while: open it again when the position moves.
    Idle,
    /// The node stops.
    Stopping,
    /// The same follower opened a newer control stream.
    Superseded,
}

/// One frame of any stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Either way on the control stream.
    Heartbeat {
        /// Newest epoch the sender knows.
        epoch: Epoch,
        /// Sender's clock, milliseconds since 1970.
        unix_ms: i64,
    },
    /// Server: a database's durable position.
    Position {
        /// Database.
        name: DatabaseName,
        /// Its position.
        pos: Pos,
        /// Server's clock, milliseconds since 1970.
        unix_ms: i64,
    },
    /// Server: the follower has a database that the server does not know.
    Unknown {
        /// Database.
        name: DatabaseName,
    },
    /// The list of databases that began the stream is complete.
    Listed,
    /// Follower, at the beginning: a database it has.
    Holds {
        /// Database.
        name: DatabaseName,
        /// Its position there.
        pos: Pos,
        /// Records after this transaction are still needed; 0 when none are (a snapshot is needed anyway).
        needs_after: Txid,
    },
    /// Follower: everything up to the position is durable in its log.
    Ack {
        /// Database.
        name: DatabaseName,
        /// Durable position.
        pos: Pos,
    },
    /// A record with its LTX file.
    Record(RecordHead, Bytes),
    /// A large record; chunks of its LTX file follow until `size` is reached.
    RecordStart(RecordHead),
    /// A piece of the LTX file announced by [`Frame::RecordStart`].
    RecordChunk(Bytes),
    /// First frame of a snapshot.
    SnapshotBegin {
        /// All pages are as of this position or later.
        base: Pos,
        /// Epoch of the server.
        epoch: Epoch,
        /// Bytes in a page; 0 when `commit` is.
        page_size: u32,
        /// Pages in the database at `base`; unless the snapshot is resumed, then as of now.
        commit: u32,
        /// Number of the first page that follows.
        first_page: u32,
    },
    /// LZ4-compressed pages, see [`encode_pages`].
    Pages(Bytes),
    /// All pages were sent; none of them is newer than `position`.
    SnapshotEnd {
        /// Durable position after the last page was read.
        position: Pos,
        /// Epoch of the server.
        epoch: Epoch,
    },
    /// Last frame of a stream that ends well.
    End(EndReason),
    /// Last frame of a stream that cannot go on.
    Error {
        /// What kind of reason.
        code: RefusalCode,
        /// What happened, for people.
        message: String,
    },
}

impl Frame {
    /// Name of the kind, for errors.
    pub fn kind(&self) -> &'static str {
        match self {
            Frame::Heartbeat { .. } => "Heartbeat",
            Frame::Position { .. } => "Position",
            Frame::Unknown { .. } => "Unknown",
            Frame::Listed => "Listed",
            Frame::Holds { .. } => "Holds",
            Frame::Ack { .. } => "Ack",
            Frame::Record(..) => "Record",
            Frame::RecordStart(..) => "RecordStart",
            Frame::RecordChunk(..) => "RecordChunk",
            Frame::SnapshotBegin { .. } => "SnapshotBegin",
            Frame::Pages(..) => "Pages",
            Frame::SnapshotEnd { .. } => "SnapshotEnd",
            Frame::End(..) => "End",
            Frame::Error { .. } => "Error",
        }
    }

    /// Appends the encoded frame to `out`. Panics when the payload exceeds [`PAYLOAD_BYTES_MAX`]: the sender
    /// splits before.
    pub fn encode(&self, out: &mut BytesMut) {
        let start = out.len();
        let kind = match self {
            Frame::Heartbeat { .. } => HEARTBEAT,
            Frame::Position { .. } => POSITION,
            Frame::Unknown { .. } => UNKNOWN,
            Frame::Listed => LISTED,
            Frame::Holds { .. } => HOLDS,
            Frame::Ack { .. } => ACK,
            Frame::Record(..) => RECORD,
            Frame::RecordStart(..) => RECORD_START,
            Frame::RecordChunk(..) => RECORD_CHUNK,
            Frame::SnapshotBegin { .. } => SNAPSHOT_BEGIN,
            Frame::Pages(..) => PAGES,
            Frame::SnapshotEnd { .. } => SNAPSHOT_END,
            Frame::End(..) => END,
            Frame::Error { .. } => ERROR,
        };
        out.put_bytes(0, HEADER_BYTES);
        self.encode_payload(out);
        let len = out.len() - start - HEADER_BYTES;
        assert!(len <= PAYLOAD_BYTES_MAX, "{} frame of {len} bytes", self.kind());
        let (header, payload) = out[start..].split_at_mut(HEADER_BYTES);
        header[0] = kind;
        header[4..8].copy_from_slice(&(len as u32).to_be_bytes());
        let sum = checksum(&header[..8], payload);
        header[8..].copy_from_slice(&sum.to_be_bytes());
    }

    fn encode_payload(&self, out: &mut BytesMut) {
        match self {
            Frame::Heartbeat { epoch, unix_ms } => {
                out.put_u64(epoch.0);
                out.put_i64(*unix_ms);
            }
            Frame::Position { name, pos, unix_ms } => {
                put_pos(out, *pos);
                out.put_i64(*unix_ms);
                out.put_slice(name.as_str().as_bytes());
            }
            Frame::Unknown { name } => out.put_slice(name.as_str().as_bytes()),
            Frame::Listed => {}
            Frame::Holds { name, pos, needs_after } => {
                put_pos(out, *pos);
                out.put_u64(needs_after.0);
                out.put_slice(name.as_str().as_bytes());
            }
            Frame::Ack { name, pos } => {
                put_pos(out, *pos);
                out.put_slice(name.as_str().as_bytes());
            }
            Frame::Record(head, bytes) => {
                put_head(out, head);
                out.put_slice(bytes);
            }
            Frame::RecordStart(head) => put_head(out, head),
            Frame::RecordChunk(bytes) | Frame::Pages(bytes) => out.put_slice(bytes),
            Frame::SnapshotBegin { base, epoch, page_size, commit, first_page } => {
                put_pos(out, *base);
                out.put_u64(epoch.0);
                out.put_u32(*page_size);
                out.put_u32(*commit);
                out.put_u32(*first_page);
            }
            Frame::SnapshotEnd { position, epoch } => {
                put_pos(out, *position);
                out.put_u64(epoch.0);
            }
            Frame::End(reason) => out.put_u8(match reason {
                EndReason::Idle => 1,
                EndReason::Stopping => 2,
                EndReason::Superseded => 3,
            }),
            Frame::Error { code, message } => {
                out.put_u16(code.number());
                out.put_slice(cut_text(message).as_bytes());
            }
        }
    }

    fn decode(kind: u8, mut payload: Bytes) -> Result<Option<Frame>, FrameError> {
        let p = &mut payload;
        let frame = match kind {
            HEARTBEAT => {
                need("Heartbeat", p, 16, true)?;
                Frame::Heartbeat { epoch: Epoch(p.get_u64()), unix_ms: p.get_i64() }
            }
            POSITION => {
                need("Position", p, 24, false)?;
                let (pos, unix_ms) = (get_pos(p), p.get_i64());
                Frame::Position { name: get_name("Position", p)?, pos, unix_ms }
            }
            UNKNOWN => Frame::Unknown { name: get_name("Unknown", p)? },
            LISTED => {
                need("Listed", p, 0, true)?;
                Frame::Listed
            }
            HOLDS => {
                need("Holds", p, 24, false)?;
                let (pos, needs_after) = (get_pos(p), Txid(p.get_u64()));
                Frame::Holds { name: get_name("Holds", p)?, pos, needs_after }
            }
            ACK => {
                need("Ack", p, 16, false)?;
                let pos = get_pos(p);
                Frame::Ack { name: get_name("Ack", p)?, pos }
            }
            RECORD => {
                need("Record", p, RECORD_HEAD_BYTES, false)?;
                let head = get_head("Record", p)?;
                if head.size != p.len() as u64 {
                    return Err(malformed("Record", format!("{} bytes follow, not {}", p.len(), head.size)));
                }
                Frame::Record(head, payload)
            }
            RECORD_START => {
                need("RecordStart", p, RECORD_HEAD_BYTES, true)?;
                Frame::RecordStart(get_head("RecordStart", p)?)
            }
            RECORD_CHUNK if p.is_empty() => return Err(malformed("RecordChunk", "it is empty".into())),
            RECORD_CHUNK => Frame::RecordChunk(payload),
            SNAPSHOT_BEGIN => {
                need("SnapshotBegin", p, 36, true)?;
                let (base, epoch) = (get_pos(p), Epoch(p.get_u64()));
                let (page_size, commit, first_page) = (p.get_u32(), p.get_u32(), p.get_u32());
                if !ltx::is_page_size(page_size) && (page_size, commit) != (0, 0) {
                    return Err(malformed("SnapshotBegin", format!("page size {page_size}")));
                }
                if first_page == 0 {
                    return Err(malformed("SnapshotBegin", "there is no page 0".into()));
                }
                Frame::SnapshotBegin { base, epoch, page_size, commit, first_page }
            }
            PAGES => Frame::Pages(payload),
            SNAPSHOT_END => {
                need("SnapshotEnd", p, 24, true)?;
                Frame::SnapshotEnd { position: get_pos(p), epoch: Epoch(p.get_u64()) }
            }
            END => {
                need("End", p, 1, true)?;
                Frame::End(match p.get_u8() {
                    1 => EndReason::Idle,
                    2 => EndReason::Stopping,
                    3 => EndReason::Superseded,
                    other => return Err(malformed("End", format!("unknown reason {other}"))),
                })
            }
            ERROR => {
                need("Error", p, 2, false)?;
                let code = RefusalCode::from_number(p.get_u16());
                let text = String::from_utf8_lossy(&p[..p.len().min(MESSAGE_BYTES_MAX)]).into_owned();
                Frame::Error { code, message: text }
            }
            optional if optional >= OPTIONAL_TYPES => return Ok(None),
            other => return Err(FrameError::UnknownType(other)),
        };
        Ok(Some(frame))
    }
}

/// Shortens a text to [`MESSAGE_BYTES_MAX`] at a character boundary.
fn cut_text(text: &str) -> &str {
    let end = (0..=text.len().min(MESSAGE_BYTES_MAX)).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
    &text[..end]
}

fn checksum(header: &[u8], payload: &[u8]) -> u64 {
    let mut digest = Digest::new(CrcAlgorithm::Crc64GoIso);
    digest.update(header);
    digest.update(payload);
    digest.finalize()
}

fn malformed(what: &'static str, why: String) -> FrameError {
    FrameError::Malformed { what, why }
}

fn need(what: &'static str, payload: &Bytes, len: usize, exact: bool) -> Result<(), FrameError> {
    if payload.len() < len || (exact && payload.len() != len) {
        return Err(malformed(what, format!("{} bytes where {len} are expected", payload.len())));
    }
    Ok(())
}

fn put_pos(out: &mut BytesMut, pos: Pos) {
    out.put_u64(pos.txid.0);
    out.put_u64(pos.checksum.0);
}

fn get_pos(payload: &mut Bytes) -> Pos {
    Pos { txid: Txid(payload.get_u64()), checksum: Checksum(payload.get_u64()) }
}

fn get_name(what: &'static str, payload: &Bytes) -> Result<DatabaseName, FrameError> {
    let text = std::str::from_utf8(payload).map_err(|_| malformed(what, "its name is not UTF-8".into()))?;
    DatabaseName::new(text).map_err(|e| malformed(what, e.to_string()))
}

fn put_head(out: &mut BytesMut, head: &RecordHead) {
    out.put_u64(head.epoch.0);
    out.put_u64(head.min_txid.0);
    out.put_u64(head.max_txid.0);
    out.put_u64(head.post_apply.0);
    out.put_u64(head.size);
}

fn get_head(what: &'static str, payload: &mut Bytes) -> Result<RecordHead, FrameError> {
    let head = RecordHead {
        epoch: Epoch(payload.get_u64()),
        min_txid: Txid(payload.get_u64()),
        max_txid: Txid(payload.get_u64()),
        post_apply: Checksum(payload.get_u64()),
        size: payload.get_u64(),
    };
    if head.min_txid.0 == 0 || head.min_txid > head.max_txid {
        return Err(malformed(what, format!("transactions {}-{}", head.min_txid, head.max_txid)));
    }
    if head.size == 0 || head.size > RECORD_BYTES_MAX {
        return Err(malformed(what, format!("a record of {} bytes", head.size)));
    }
    Ok(head)
}

/// Payload of a [`Frame::Pages`]: u32 length before compression, then one LZ4 block of: u32 count, that many page
/// numbers (u32), their contents. The caller keeps to [`CHUNK_BYTES_MAX`] bytes of contents.
pub fn encode_pages(pages: &[(u32, Bytes)]) -> Bytes {
    let contents: usize = pages.iter().map(|(_, data)| data.len()).sum();
    let mut raw = Vec::with_capacity(4 + 4 * pages.len() + contents);
    raw.put_u32(pages.len() as u32);
    pages.iter().for_each(|(pgno, _)| raw.put_u32(*pgno));
    pages.iter().for_each(|(_, data)| raw.put_slice(data));
    assert!(raw.len() <= PAGES_RAW_BYTES_MAX, "{} bytes of pages in one frame", raw.len());
    let mut out = BytesMut::zeroed(4 + lz4_flex::block::get_maximum_output_size(raw.len()));
    out[..4].copy_from_slice(&(raw.len() as u32).to_be_bytes());
    let len = lz4_flex::block::compress_into(&raw, &mut out[4..]).expect("the buffer has LZ4's worst case");
    out.truncate(4 + len);
    out.freeze()
}

/// Undoes [`encode_pages`]; page numbers are ascending and never 0.
pub fn decode_pages(payload: &Bytes, page_size: u32) -> Result<Vec<(u32, Bytes)>, FrameError> {
    let bad = |why: String| malformed("Pages", why);
    need("Pages", payload, 4, false)?;
    let raw_len = u32::from_be_bytes([payload[0], payload[1], payload[2], payload[3]]) as usize;
    if !(4..=PAGES_RAW_BYTES_MAX).contains(&raw_len) {
        return Err(bad(format!("{raw_len} bytes before compression")));
    }
    let mut raw = vec![0; raw_len];
    let len = lz4_flex::block::decompress_into(&payload[4..], &mut raw).map_err(|e| bad(e.to_string()))?;
    if len != raw_len {
        return Err(bad(format!("{len} bytes after decompression, not {raw_len}")));
    }
    let mut raw = Bytes::from(raw);
    let count = raw.get_u32() as usize;
    if count.checked_mul(4 + page_size as usize) != Some(raw.len()) {
        return Err(bad(format!("{} bytes for {count} pages of {page_size}", raw.len())));
    }
    let mut numbers = raw.split_to(4 * count);
    let mut pages: Vec<(u32, Bytes)> = Vec::with_capacity(count);
    for _ in 0..count {
        let pgno = numbers.get_u32();
        if pgno <= pages.last().map_or(0, |(last, _)| *last) {
            return Err(bad(format!("page {pgno} is out of order")));
        }
        pages.push((pgno, raw.split_to(page_size as usize)));
    }
    Ok(pages)
}

/// Takes frames off an HTTP body.
pub struct FrameReader<B> {
    body: B,
    buffer: BytesMut,
}

impl<B> FrameReader<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// Reads from `body`.
    pub fn new(body: B) -> Self {
        FrameReader { body, buffer: BytesMut::new() }
    }

    /// The next frame; `None` at the end of the body. Cancelling loses nothing.
    pub async fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        loop {
            if let Some(frame) = self.take()? {
                return Ok(Some(frame));
            }
            match self.body.frame().await {
                Some(Ok(part)) => {
                    if let Ok(data) = part.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
                Some(Err(e)) => return Err(FrameError::Cut(full_text(&*e.into()))),
                None if self.buffer.is_empty() => return Ok(None),
                None => {
                    let need = match self.header()? {
                        Some((_, len)) => HEADER_BYTES + len,
                        None => HEADER_BYTES,
                    };
                    return Err(FrameError::Truncated { have: self.buffer.len(), need });
                }
            }
        }
    }

    /// Like [`FrameReader::next`], where the end of the body without a last frame is a cut.
    pub async fn expect(&mut self) -> Result<Frame, FrameError> {
        self.next().await?.ok_or_else(|| FrameError::Cut("it ended without a last frame".into()))
    }

    fn header(&self) -> Result<Option<(u8, usize)>, FrameError> {
        if self.buffer.len() < HEADER_BYTES {
            return Ok(None);
        }
        let kind = self.buffer[0];
        let len =
            u32::from_be_bytes([self.buffer[4], self.buffer[5], self.buffer[6], self.buffer[7]]) as usize;
        if len > PAYLOAD_BYTES_MAX {
            return Err(FrameError::TooLong { kind, len });
        }
        Ok(Some((kind, len)))
    }

    fn take(&mut self) -> Result<Option<Frame>, FrameError> {
        while let Some((kind, len)) = self.header()? {
            if self.buffer.len() < HEADER_BYTES + len {
                return Ok(None);
            }
            let header = self.buffer.split_to(HEADER_BYTES);
            let payload = self.buffer.split_to(len).freeze();
            let sum = checksum(&header[..8], &payload);
            if header[8..] != sum.to_be_bytes() || header[1..4] != [0; 3] {
                return Err(FrameError::Corrupt { kind, len });
            }
            if let Some(frame) = Frame::decode(kind, payload)? {
                return Ok(Some(frame));
            }
        }
        Ok(None)
    }
}

/// An error with its causes: hyper keeps the useful part in the source.
pub(crate) fn full_text(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let more = cause.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = cause.source();
    }
    text
}
