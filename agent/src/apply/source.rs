//! Where transactions come from.

use std::io::Read;

/// What is known of a transaction before its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransactionHeader {
    /// Bytes in a page.
    pub page_size: u32,
    /// Size of the database in pages after the transaction; 0: the database is dropped.
    pub commit: u32,
    /// Owner and mode for a database file that this transaction creates.
    pub owner: Option<ltx::Owner>,
}

/// Consecutive transactions of one database.
pub trait TransactionSource {
    /// Goes to the next transaction; pages of the current one that were not read are skipped.
    fn next_transaction(&mut self) -> Result<Option<TransactionHeader>, ltx::Error>;

    /// The next page of the current transaction: puts its content into `page` and returns its number. `None` says
    /// that there are no more, and that what was given is all right (checksums and so on).
    fn next_page(&mut self, page: &mut Vec<u8>) -> Result<Option<u32>, ltx::Error>;
}

/// The transactions in LTX files.
pub struct LtxTransactions<I, R: Read> {
    files: I,
    current: Option<ltx::Decoder<R>>,
}

impl<I, R> LtxTransactions<I, R>
where
    I: Iterator<Item = R>,
    R: Read,
{
    /// Reads the files in this order, each as one transaction.
    pub fn new(files: impl IntoIterator<IntoIter = I>) -> Self {
        LtxTransactions { files: files.into_iter(), current: None }
    }
}

impl<I, R> TransactionSource for LtxTransactions<I, R>
where
    I: Iterator<Item = R>,
    R: Read,
{
    fn next_transaction(&mut self) -> Result<Option<TransactionHeader>, ltx::Error> {
        if let Some(unread) = self.current.take() {
            unread.finish()?;
        }
        let Some(file) = self.files.next() else { return Ok(None) };
        let decoder = ltx::Decoder::new(file)?;
        let header = decoder.header();
        let transaction =
            TransactionHeader { page_size: header.page_size, commit: header.commit, owner: header.owner };
        self.current = Some(decoder);
        Ok(Some(transaction))
    }

    fn next_page(&mut self, page: &mut Vec<u8>) -> Result<Option<u32>, ltx::Error> {
        let Some(decoder) = &mut self.current else { return Ok(None) };
        if let Some(pgno) = decoder.next_page(page)? {
            return Ok(Some(pgno));
        }
        // Only now is the file's checksum known to be right: before the transaction is published.
        if let Some(decoder) = self.current.take() {
            decoder.finish()?;
        }
        Ok(None)
    }
}
