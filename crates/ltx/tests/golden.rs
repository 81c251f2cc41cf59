//! Files that the Go libraries wrote, each from the same two-page database.

#![allow(clippy::unwrap_used, reason = "what is unexpected fails the test")]

use ltx::{Checksum, Decoder, Encoder, Error, FLAG_LZ4_FRAME, Format, Header, Trailer, Txid};

const HEADER: &str = "4c5458310000000000000200000000020000000000000001000000000000000100000000000003e80000000000000000\
    00000000000000000000000000000000000000000000000011223344556677880000000000000000000000000000000000000000";

const POST_APPLY: Checksum = Checksum(0xad2d_ffe3_3333_3333);

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
}

fn header(flags: u32) -> Header {
    Header {
        flags,
        page_size: 512,
        commit: 2,
        min_txid: Txid(1),
        max_txid: Txid(1),
        timestamp_ms: 1000,
        pre_apply: Checksum(0),
        wal_offset: 0,
        wal_size: 0,
        wal_salt1: 0,
        wal_salt2: 0,
        node_id: 0x1122_3344_5566_7788,
        epoch: 0,
        owner: None,
    }
}

/// Library v0.3.14, flags 0.
fn v1() -> Vec<u8> {
    let page = |n: u8| [&[0, 0, 0, n][..], &[n; 512]].concat();
    [unhex(HEADER), page(1), page(2), unhex("00000000ad2dffe333333333fdb6a24cc0f1e332")].concat()
}

/// Library v0.3.14, flags 1.
fn v1_lz4() -> Vec<u8> {
    let mut bytes = unhex(HEADER);
    bytes[7] = 1;
    bytes.extend(unhex(
        "04224d186440a7210000004f000000010100ffee4f000000020100ffe4e0020202020202020202020000000000000000c5d6954b\
         ad2dffe33333333388ad3befab4025f3",
    ));
    bytes
}

/// Library v0.4.0.
fn v2() -> Vec<u8> {
    let body = "0000000104224d186440a7180000001f010100ffda000200000200b0010101010101010101010100000000d9e9c34f\
        0000000204224d186440a7180000001f020100ffda000200000200b002020202020202020202020000000055f02215\
        0000000001642f0293012f000000000000000008ad2dffe333333333fd84d20db7e62479";
    unhex(&[HEADER, body].concat())
}

/// Library v0.5.1.
fn v3_frames() -> Vec<u8> {
    let body = "00000001000004224d186440a7180000001f010100ffda000200000200b0010101010101010101010100000000d9e9c34f\
        00000002000004224d186440a7180000001f020100ffda000200000200b002020202020202020202020000000055f02215\
        00000000000001643102950131000000000000000008ad2dffe3333333339e85d24223ab71e4";
    unhex(&[HEADER, body].concat())
}

/// Library v0.5.2.
fn v3() -> Vec<u8> {
    let body = "000000010001000000181f010100ffda000200000200b00101010101010101010101\
        000000020001000000181f020100ffda000200000200b00202020202020202020202\
        00000000000001642202860122000000000000000008ad2dffe333333333d674fb0e9f89f9d8";
    unhex(&[HEADER, body].concat())
}

fn all() -> [(&'static str, Format, Vec<u8>, u64); 5] {
    [
        ("v0.3.14 raw", Format::V1, v1(), 0xfdb6_a24c_c0f1_e332),
        ("v0.3.14 LZ4", Format::V1Lz4, v1_lz4(), 0x88ad_3bef_ab40_25f3),
        ("v0.4.0", Format::V2, v2(), 0xfd84_d20d_b7e6_2479),
        ("v0.5.1", Format::V3, v3_frames(), 0x9e85_d242_23ab_71e4),
        ("v0.5.2", Format::V3, v3(), 0xd674_fb0e_9f89_f9d8),
    ]
}

type Pages = Vec<(u32, Vec<u8>)>;

fn read(bytes: &[u8]) -> Result<(Format, Header, Pages, Trailer), Error> {
    let mut decoder = Decoder::new(bytes)?;
    let mut pages = Vec::new();
    let mut buf = Vec::new();
    while let Some(pgno) = decoder.next_page(&mut buf)? {
        pages.push((pgno, buf.clone()));
    }
    let (format, header) = (decoder.format(), decoder.header().clone());
    Ok((format, header, pages, decoder.finish()?))
}

#[test]
fn files_of_every_go_version_are_read() {
    for (name, format, bytes, file_checksum) in all() {
        let flags = if format == Format::V1Lz4 { FLAG_LZ4_FRAME } else { 0 };
        let expected = (
            format,
            header(flags),
            vec![(1, vec![1; 512]), (2, vec![2; 512])],
            Trailer { post_apply: POST_APPLY, file_checksum },
        );
        assert_eq!(read(&bytes).unwrap(), expected, "{name}");
    }
}

#[test]
fn a_known_format_is_not_guessed() {
    for (name, format, bytes, file_checksum) in all() {
        let trailer = Decoder::with_format(&bytes[..], format).unwrap().finish().unwrap();
        assert_eq!(trailer.file_checksum, file_checksum, "{name}");
        for other in [Format::V1, Format::V1Lz4, Format::V2, Format::V3] {
            let found = Decoder::with_format(&bytes[..], other).and_then(Decoder::finish);
            assert_eq!(found.is_ok(), other == format, "{name} read as {other}: {found:?}");
        }
    }
}

#[test]
fn reading_stops_exactly_after_the_trailer() {
    for (name, _, bytes, _) in all() {
        let followed = [&bytes[..], b"the next one"].concat();
        let decoder = Decoder::new(&followed[..]).unwrap();
        let (_, rest) = decoder.finish_with_reader().unwrap();
        assert_eq!(rest, b"the next one", "{name}");
    }
}

/// LZ4 libraries differ in the bytes they make, so only what does not depend on them is compared.
#[test]
fn what_is_written_has_the_layout_of_the_current_go_version() {
    let mut encoder = Encoder::new(Vec::new(), header(0)).unwrap();
    encoder.encode_page(1, &[1; 512]).unwrap();
    encoder.encode_page(2, &[2; 512]).unwrap();
    let (trailer, bytes) = encoder.finish(POST_APPLY).unwrap();
    let (format, found, pages, read_trailer) = read(&bytes).unwrap();
    assert_eq!((format, found), (Format::V3, header(0)));
    assert_eq!(pages, [(1, vec![1; 512]), (2, vec![2; 512])]);
    assert_eq!(read_trailer, trailer);

    let first = usize::from(bytes[109]);
    let second = 110 + first;
    assert_eq!(bytes[..100], unhex(HEADER));
    assert_eq!(bytes[100..109], [0, 0, 0, 1, 0, 1, 0, 0, 0]);
    assert_eq!(bytes[second..second + 9], [0, 0, 0, 2, 0, 1, 0, 0, 0]);
    let end = second + 10 + usize::from(bytes[second + 9]);
    assert_eq!(bytes[end..end + 6], [0; 6]);
    assert_eq!(bytes[end + 6..end + 9], [1, 100, 10 + first as u8]);
    assert_eq!(bytes[bytes.len() - 16..bytes.len() - 8], POST_APPLY.0.to_be_bytes());
    assert_eq!(bytes[bytes.len() - 8..], trailer.file_checksum.to_be_bytes());
}

#[test]
fn any_flipped_bit_or_cut_is_an_error_in_every_version() {
    for (name, _, bytes, _) in all() {
        let (_, header, pages, trailer) = read(&bytes).unwrap();
        for len in 0..bytes.len() {
            assert!(read(&bytes[..len]).is_err(), "{name} cut to {len} bytes");
        }
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            // An LZ4 block may unpack to the same page after a flip: that, and only that, cannot be seen.
            if let Ok(found) = read(&flipped) {
                assert!(
                    (&found.1, &found.2, &found.3) == (&header, &pages, &trailer),
                    "{name}: bit {bit} changed what is read"
                );
                assert!((100..bytes.len() - 16).contains(&(bit / 8)), "{name}: bit {bit} is in no block");
            }
        }
    }
}

/// A deletion of each old version: no pages, commit 0.
#[test]
fn files_without_pages_are_told_apart() {
    let seal = |middle: &[u8]| {
        let header = Header { commit: 0, ..header(0) };
        let mut bytes = [&header.encode()[..], middle, &Checksum::EMPTY.0.to_be_bytes()].concat();
        let crc = crc::Crc::<u64>::new(&crc::CRC_64_GO_ISO).checksum(&bytes) | 1 << 63;
        bytes.extend(crc.to_be_bytes());
        bytes
    };
    let index = [0, 0, 0, 0, 0, 0, 0, 0, 1];
    for (format, bytes) in [
        (Format::V1, seal(&[0; 4])),
        (Format::V2, seal(&[&[0; 4][..], &index].concat())),
        (Format::V3, seal(&[&[0; 6][..], &index].concat())),
    ] {
        let (found, header, pages, trailer) = read(&bytes).unwrap();
        assert_eq!((found, header.commit, pages.len()), (format, 0, 0));
        assert_eq!(trailer.post_apply, Checksum::EMPTY);
    }
}
