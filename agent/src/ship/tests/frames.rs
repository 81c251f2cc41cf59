//! Frames: what is written is read, and nothing else is.

use super::memory_node::{content, name};
use crate::ship::engine::Epoch;
use crate::ship::frame::{
    EndReason, Frame, FrameError, FrameReader, HEADER_BYTES, PAYLOAD_BYTES_MAX, RecordHead, decode_pages,
    encode_pages,
};
use crate::ship::peer::RefusalCode;
use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use http_body_util::StreamBody;
use ltx::{Checksum, Pos, Txid};
use proptest::prelude::*;
use std::convert::Infallible;

fn pos(n: u64) -> Pos {
    Pos { txid: Txid(n), checksum: Checksum(1 << 63 | n) }
}

fn all_frames() -> Vec<Frame> {
    let head = RecordHead {
        epoch: Epoch(3),
        min_txid: Txid(4),
        max_txid: Txid(6),
        post_apply: Checksum(1 << 63),
        size: 5,
    };
    vec![
        Frame::Heartbeat { epoch: Epoch(7), unix_ms: -1 },
        Frame::Position { name: name("app/ä.db"), pos: pos(9), unix_ms: 12 },
        Frame::Unknown { name: name("x") },
        Frame::Listed,
        Frame::Holds { name: name("x"), pos: pos(2), needs_after: Txid(1) },
        Frame::Ack { name: name("x"), pos: pos(3) },
        Frame::Record(head, Bytes::from_static(b"01234")),
        Frame::RecordStart(RecordHead { size: 1 << 30, ..head }),
        Frame::RecordChunk(Bytes::from_static(b"chunk")),
        Frame::SnapshotBegin { base: pos(5), epoch: Epoch(1), page_size: 4096, commit: 10, first_page: 3 },
        Frame::SnapshotBegin { base: pos(5), epoch: Epoch(1), page_size: 0, commit: 0, first_page: 1 },
        Frame::Pages(Bytes::from_static(b"lz4")),
        Frame::SnapshotEnd { position: pos(8), epoch: Epoch(2) },
        Frame::End(EndReason::Idle),
        Frame::End(EndReason::Stopping),
        Frame::End(EndReason::Superseded),
        Frame::Error { code: RefusalCode::Gap, message: "no".into() },
        Frame::Error { code: RefusalCode::Other(500), message: String::new() },
    ]
}

fn encoded(frames: &[Frame]) -> Bytes {
    let mut out = BytesMut::new();
    frames.iter().for_each(|frame| frame.encode(&mut out));
    out.freeze()
}

/// Reads all frames of a body that comes in the given parts.
fn read(parts: Vec<Bytes>) -> (Vec<Frame>, Option<FrameError>) {
    let parts = parts.into_iter().map(|part| Ok::<_, Infallible>(http_body::Frame::data(part)));
    let mut reader = FrameReader::new(StreamBody::new(futures_util::stream::iter(parts)));
    let mut frames = Vec::new();
    loop {
        match reader.next().now_or_never().expect("the body is there") {
            Ok(Some(frame)) => frames.push(frame),
            Ok(None) => return (frames, None),
            Err(error) => return (frames, Some(error)),
        }
    }
}

#[test]
fn frames_are_read_as_written_however_the_body_is_cut_up() {
    let bytes = encoded(&all_frames());
    for size in [1, 2, 7, HEADER_BYTES, 64, bytes.len()] {
        let parts = bytes.chunks(size).map(Bytes::copy_from_slice).collect();
        let (frames, error) = read(parts);
        assert!(error.is_none(), "{error:?}");
        assert_eq!(frames, all_frames());
    }
}

#[test]
fn a_body_that_ends_inside_a_frame_is_an_error() {
    for frame in all_frames() {
        let bytes = encoded(&[frame]);
        for len in 1..bytes.len() {
            let (frames, error) = read(vec![bytes.slice(..len)]);
            assert!(frames.is_empty());
            assert!(matches!(error, Some(FrameError::Truncated { have, .. }) if have == len), "{error:?}");
        }
    }
}

#[test]
fn every_flipped_bit_is_noticed() {
    for frame in all_frames() {
        let bytes = encoded(&[frame]);
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let (frames, error) = read(vec![flipped.into()]);
            assert!(frames.is_empty() && error.is_some(), "bit {bit} gave {frames:?}");
        }
    }
}

#[test]
fn a_huge_length_is_refused_before_anything_is_allocated() {
    let mut bytes = encoded(&[Frame::Listed]).to_vec();
    bytes[4..8].copy_from_slice(&u32::MAX.to_be_bytes());
    let (_, error) = read(vec![bytes.into()]);
    assert!(matches!(error, Some(FrameError::TooLong { len, .. }) if len > PAYLOAD_BYTES_MAX));
}

/// Makes the checksum of a frame right again after its type or payload was changed.
fn resealed(kind: u8, payload: &[u8]) -> Bytes {
    let mut header = [0; HEADER_BYTES];
    header[0] = kind;
    header[4..8].copy_from_slice(&(payload.len() as u32).to_be_bytes());
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64GoIso);
    digest.update(&header[..8]);
    digest.update(payload);
    header[8..].copy_from_slice(&digest.finalize().to_be_bytes());
    [&header[..], payload].concat().into()
}

#[test]
fn unknown_types_are_errors_unless_they_are_optional() {
    let (_, error) = read(vec![resealed(0x7f, b"?")]);
    assert!(matches!(error, Some(FrameError::UnknownType(0x7f))));
    let (frames, error) = read(vec![resealed(0x80, b"?"), encoded(&[Frame::Listed])]);
    assert!(error.is_none());
    assert_eq!(frames, [Frame::Listed]);
}

#[test]
fn records_and_snapshots_that_cannot_be_are_malformed() {
    let head = |min: u64, max: u64, size: u64| [3, min, max, 0, size].map(u64::to_be_bytes).concat();
    for payload in [head(0, 1, 1), head(2, 1, 1), head(1, 1, 0), head(1, 1, u64::MAX)] {
        let (_, error) = read(vec![resealed(0x11, &payload)]);
        assert!(matches!(error, Some(FrameError::Malformed { .. })), "{error:?}");
    }
    // A record whose size is not what follows.
    let (_, error) = read(vec![resealed(0x10, &[&head(1, 1, 2)[..], b"x"].concat())]);
    assert!(matches!(error, Some(FrameError::Malformed { .. })), "{error:?}");
    for (page_size, first_page) in [(1000_u32, 1_u32), (0, 1), (4096, 0)] {
        let numbers = [page_size, 5, first_page].map(u32::to_be_bytes).concat();
        let (_, error) = read(vec![resealed(0x20, &[&[0; 24][..], &numbers].concat())]);
        assert!(matches!(error, Some(FrameError::Malformed { .. })), "{error:?}");
    }
    for bad in [&b"../etc/passwd"[..], b"/abs", b"", b"\xff"] {
        let (_, error) = read(vec![resealed(0x03, bad)]);
        assert!(matches!(error, Some(FrameError::Malformed { .. })), "{error:?}");
    }
}

#[test]
fn a_long_message_is_shortened_at_a_character() {
    let message = "ä".repeat(5000);
    let (frames, error) = read(vec![encoded(&[Frame::Error { code: RefusalCode::Engine, message }])]);
    assert!(error.is_none());
    let [Frame::Error { message, .. }] = &frames[..] else { panic!("{frames:?}") };
    assert_eq!(message, &"ä".repeat(2048));
}

#[test]
fn pages_survive_compression() {
    for page_size in [512_usize, 4096, 65536] {
        let count = (256 << 10) / page_size as u32;
        let pages: Vec<_> =
            (1..=count).map(|n| (n * 3, Bytes::from(content(u64::from(n), page_size)))).collect();
        assert_eq!(decode_pages(&encode_pages(&pages), page_size as u32).unwrap(), pages);
    }
    let zeros = vec![(1, Bytes::from(vec![0; 65536]))];
    assert!(encode_pages(&zeros).len() < 1000);
}

#[test]
fn pages_that_lie_are_malformed() {
    let payload = encode_pages(&[(2, Bytes::from(vec![1; 512])), (1, Bytes::from(vec![2; 512]))]);
    assert!(matches!(decode_pages(&payload, 512), Err(FrameError::Malformed { .. })), "descending");
    let payload = encode_pages(&[(1, Bytes::from(vec![1; 512]))]);
    assert!(matches!(decode_pages(&payload, 1024), Err(FrameError::Malformed { .. })), "other page size");
    assert!(decode_pages(&payload, 512).is_ok());
    for len in 0..payload.len() {
        assert!(decode_pages(&payload.slice(..len), 512).is_err(), "{len} bytes");
    }
    let mut huge = payload.to_vec();
    huge[..4].copy_from_slice(&u32::MAX.to_be_bytes());
    assert!(decode_pages(&huge.into(), 512).is_err());
}

proptest! {
    #[test]
    fn garbage_is_never_more_than_an_error(garbage in proptest::collection::vec(any::<u8>(), 0..300)) {
        let (frames, _) = read(vec![garbage.clone().into()]);
        prop_assert!(frames.is_empty());
        let _ = decode_pages(&garbage.into(), 512);
    }

    #[test]
    fn garbage_payloads_under_a_right_checksum_are_never_more_than_an_error(
        kind: u8,
        garbage in proptest::collection::vec(any::<u8>(), 0..80),
    ) {
        let _ = read(vec![resealed(kind, &garbage)]);
    }
}
