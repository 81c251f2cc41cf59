//! Transaction ids, rolling checksums, and the position that both make.

use crate::checksum::CHECKSUM_FLAG;
use crate::error::Error;
use std::fmt;
use std::str::FromStr;

/// The number of a transaction in its database, counted from 1. 0 is the position before the first.
/// Text form: 16 lower-case hex digits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Txid(pub u64);

/// The rolling checksum of a database: XOR of its page checksums, bit 63 always set. 0 means "none".
/// Text form: 16 lower-case hex digits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Checksum(pub u64);

impl Checksum {
    /// The checksum of a database without pages (empty or deleted).
    pub const EMPTY: Checksum = Checksum(CHECKSUM_FLAG);

    /// Adds a page checksum to a rolling checksum, or takes it away again: both are XOR. Bit 63 stays set.
    #[must_use]
    pub fn xor(self, other: Checksum) -> Checksum {
        Checksum(CHECKSUM_FLAG | (self.0 ^ other.0))
    }
}

/// A position: the last transaction of a database and its rolling checksum after it.
/// Text form: `txid/checksum`, 33 characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Pos {
    /// The last transaction, 0 before the first.
    pub txid: Txid,
    /// The rolling checksum after it, 0 before the first.
    pub checksum: Checksum,
}

impl fmt::Display for Txid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Display for Pos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.txid, self.checksum)
    }
}

impl FromStr for Txid {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        parse_hex(text, "transaction id").map(Txid)
    }
}

impl FromStr for Checksum {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        parse_hex(text, "checksum").map(Checksum)
    }
}

impl FromStr for Pos {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let (txid, checksum) = text.split_once('/').ok_or_else(|| unreadable(text, "position"))?;
        Ok(Pos { txid: txid.parse()?, checksum: checksum.parse()? })
    }
}

fn parse_hex(text: &str, what: &'static str) -> Result<u64, Error> {
    let digits = text.len() == 16 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    match u64::from_str_radix(text, 16) {
        Ok(value) if digits => Ok(value),
        _ => Err(unreadable(text, what)),
    }
}

fn unreadable(text: &str, what: &'static str) -> Error {
    Error::Text { what, text: text.chars().take(64).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_forms_round_trip() {
        let pos = Pos { txid: Txid(0x1f), checksum: Checksum(0xad2d_ffe3_3333_3333) };
        assert_eq!(pos.to_string(), "000000000000001f/ad2dffe333333333");
        assert_eq!(pos.to_string().parse::<Pos>().unwrap(), pos);
        assert_eq!(Pos::default().to_string(), "0000000000000000/0000000000000000");
    }

    #[test]
    fn text_that_is_not_16_lower_hex_digits_is_refused() {
        for text in ["", "1", "000000000000001F", "+00000000000001f", "000000000000001f0", "00000000000000é"]
        {
            assert!(text.parse::<Txid>().is_err(), "{text:?}");
            assert!(text.parse::<Checksum>().is_err(), "{text:?}");
        }
        assert!("000000000000001f".parse::<Pos>().is_err());
        assert!("000000000000001f/".parse::<Pos>().is_err());
    }

    #[test]
    fn xor_is_its_own_inverse_and_keeps_the_flag() {
        let page = Checksum(0xe4e4_aaa1_0237_7eee);
        assert_eq!(Checksum::EMPTY.xor(page), page);
        assert_eq!(page.xor(page), Checksum::EMPTY);
    }
}
