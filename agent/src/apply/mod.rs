//! Writes records to database files.
