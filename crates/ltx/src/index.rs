//! The page index that follows the pages: where each page record is.

/// The longest uvarint of a u64.
pub(crate) const MAX_UVARINT: usize = 10;

/// One index entry: page number, offset in the file, length of the page record.
pub(crate) struct Entry {
    pub(crate) pgno: u32,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

impl Entry {
    /// Writes the entry and returns how many bytes it took.
    pub(crate) fn encode(&self, out: &mut [u8; 3 * MAX_UVARINT]) -> usize {
        let mut at = 0;
        for mut value in [u64::from(self.pgno), self.offset, self.len] {
            // Seven bits a byte, lowest first, bit 7 says that more follow (as Go's encoding/binary has it).
            while value >= 0x80 {
                out[at] = value as u8 | 0x80;
                value >>= 7;
                at += 1;
            }
            out[at] = value as u8;
            at += 1;
        }
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_uvarints_as_go_writes_them() {
        let mut out = [0; 30];
        let len = Entry { pgno: 1, offset: 100, len: 34 }.encode(&mut out);
        assert_eq!(out[..len], [0x01, 0x64, 0x22]);
        let len = Entry { pgno: 2, offset: 134, len: 300 }.encode(&mut out);
        assert_eq!(out[..len], [0x02, 0x86, 0x01, 0xac, 0x02]);
        let len = Entry { pgno: u32::MAX, offset: u64::MAX, len: u64::MAX }.encode(&mut out);
        assert_eq!(len, 25);
        assert_eq!(out[..5], [0xff, 0xff, 0xff, 0xff, 0x0f]);
        assert_eq!(out[5..15], [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]);
    }
}
